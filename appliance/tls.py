"""A self-signed certificate for this machine's names, for boxes without a certificate authority.

Makes and writes it; does not configure the server, and never overwrites by itself.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import ipaddress
import os
import re
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from appliance.errors import BadRequest, DataDirError

DAYS = 397  # browsers take no longer ones
SIOCGIFADDR = 0x8915  # Linux: the address of an interface
GLOBAL_SCOPE = "00"  # in /proc/net/if_inet6
_DNS_NAME = re.compile(r"(\*\.)?[a-z0-9_]([a-z0-9_-]{0,62})(\.[a-z0-9_][a-z0-9_-]{0,62})*\.?", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Certificate:
    """Where the two PEM files are, and for which names."""

    certificate: Path
    key: Path
    names: tuple[str, ...]


def self_signed(directory: Path, *, extra_names: Sequence[str] = (), force: bool = False) -> Certificate:
    """Writes `appliance.crt` and `appliance.key` (0600). Raises DataDirError, and BadRequest for an impossible name;
    overwrites only with `force`."""
    made = Certificate(directory / "appliance.crt", directory / "appliance.key", machine_names(extra_names))
    for path in (made.certificate, made.key):
        if path.exists() and not force:
            raise DataDirError(f"{path} exists already; --force replaces it.")
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    certificate = _signed(key, made.names).public_bytes(serialization.Encoding.PEM)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write_private(made.key, pem)
        _write_private(made.certificate, certificate)
    except OSError as error:
        raise DataDirError(f"The certificate cannot be written to {directory}: {error.strerror}.") from error
    return made


def machine_names(extra: Sequence[str] = ()) -> tuple[str, ...]:
    """localhost, the host name (also under .local), the addresses of this machine's interfaces, and `extra`.

    No name server is asked. A host name that no certificate can hold is left out; an `extra` one is BadRequest.
    """
    host = socket.gethostname()
    own = [host, f"{host.split('.')[0]}.local"]
    with contextlib.suppress(BadRequest):
        _general_names(own)
        return _distinct("localhost", *own, *_addresses(), *extra)
    return _distinct("localhost", *_addresses(), *extra)


def _distinct(*names: str) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(name.lower() for name in names if name and name != "*"))
    _general_names(found)
    return found


def _addresses() -> list[str]:
    """Every IPv4 address that an interface has first, every global IPv6 one, and both loopback ones."""
    found = ["127.0.0.1", "::1"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))
                found.append(socket.inet_ntoa(answer[20:24]))
    with contextlib.suppress(OSError), open("/proc/net/if_inet6") as table:  # absent where IPv6 is off
        rows = [line.split() for line in table]
        found += [str(ipaddress.ip_address(bytes.fromhex(row[0]))) for row in rows if row[3] == GLOBAL_SCOPE]
    return found


def _signed(key: ec.EllipticCurvePrivateKey, names: Sequence[str]) -> x509.Certificate:
    """Of the end entity, not of an authority: whoever trusts it trusts this box, and nothing that it could sign."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[1][:64])])
    now = datetime.datetime.now(datetime.UTC)
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "key_cert_sign", "crl_sign",
         "encipher_only", "decipher_only"), False)  # fmt: skip
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=DAYS))
        .add_extension(x509.SubjectAlternativeName(_general_names(names)), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(digital_signature=True, **usage), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def _general_names(names: Sequence[str]) -> list[x509.GeneralName]:
    return [_general_name(name) for name in names]


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name.strip("[]")))
    except ValueError:
        pass
    if not _DNS_NAME.fullmatch(name):
        raise BadRequest(f"{name[:100]!r} is no name that a certificate can hold.")
    return x509.DNSName(name)


def _write_private(path: Path, data: bytes) -> None:
    """Anew, so that it is never readable by others, not even while it is written."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
