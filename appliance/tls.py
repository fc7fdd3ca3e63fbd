"""A self-signed certificate for this machine's names, for boxes without a certificate authority."""

from __future__ import annotations

import datetime
import ipaddress
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from appliance.errors import DataDirError

DAYS = 397  # browsers take no longer ones


@dataclass(frozen=True, slots=True)
class Certificate:
    """Where the two PEM files are, and for which names."""

    certificate: Path
    key: Path
    names: tuple[str, ...]


def self_signed(directory: Path, *, extra_names: Sequence[str] = (), force: bool = False) -> Certificate:
    """Writes `appliance.crt` and `appliance.key` (0600). Raises DataDirError; overwrites only with `force`."""
    made = Certificate(directory / "appliance.crt", directory / "appliance.key", machine_names(extra_names))
    if made.certificate.exists() and not force:
        raise DataDirError(f"{made.certificate} exists already; --force replaces it.")
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write_private(made.key, pem)
        _write_private(made.certificate, _signed(key, made.names).public_bytes(serialization.Encoding.PEM))
    except OSError as error:
        raise DataDirError(f"The certificate cannot be written to {directory}: {error.strerror}.") from error
    return made


def machine_names(extra: Sequence[str] = ()) -> tuple[str, ...]:
    """localhost, the host name (also under .local), the loopback addresses, and the address of the default route."""
    host = socket.gethostname()
    names = ["localhost", host, host if "." in host else f"{host}.local", "127.0.0.1", "::1"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: the kernel only chooses the address it would send from
            names.append(probe.getsockname()[0])
        except OSError:
            pass  # no network, no further address
    return tuple(dict.fromkeys([*names, *(n for n in extra if n != "*")]))


def _signed(key: ec.EllipticCurvePrivateKey, names: Sequence[str]) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[1][:64])])
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=DAYS))
        .add_extension(x509.SubjectAlternativeName([_general_name(n) for n in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(key, hashes.SHA256())
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _write_private(path: Path, data: bytes) -> None:
    """Anew, so that it is never readable by others, not even while it is written."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
