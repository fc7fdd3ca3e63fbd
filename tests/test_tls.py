"""The self-signed certificate: what is in it, and that real TLS clients accept it for the machine's names only."""

from __future__ import annotations

import datetime
import ipaddress
import shutil
import socket
import ssl
import stat
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtensionOID

from appliance import tls
from appliance.errors import BadRequest, DataDirError


@pytest.fixture
def made(tmp_path: Path) -> tls.Certificate:
    return tls.self_signed(tmp_path / "tls", extra_names=["llm.example.org", "*", "10.1.2.3"])


@contextmanager
def serving(certificate: tls.Certificate) -> Iterator[int]:
    """The port of a TLS server that reads something, answers and hangs up."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.certificate, certificate.key)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                try:
                    with context.wrap_socket(connection, server_side=True) as secured:
                        secured.recv(1_000)
                        secured.sendall(b"hello")
                except OSError:
                    connection.close()

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        try:
            yield int(listening.getsockname()[1])
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join(10)


def greeting(port: int, trusted: Path, name: str) -> bytes:
    """What a strict client reads that trusts only `trusted` and asks for `name`."""
    context = ssl.create_default_context(cafile=str(trusted))
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname=name) as secured,
    ):
        secured.sendall(b"?")
        return secured.recv(5)


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "::1", "llm.example.org", "10.1.2.3", socket.gethostname()])
def test_a_strict_client_accepts_the_machines_names(made: tls.Certificate, name: str) -> None:
    with serving(made) as port:
        assert greeting(port, made.certificate, name) == b"hello"


def test_a_client_refuses_another_name_and_another_certificate(made: tls.Certificate, tmp_path: Path) -> None:
    other = tls.self_signed(tmp_path / "other")
    with serving(made) as port:
        with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
            greeting(port, made.certificate, "other.example.org")
        with pytest.raises(ssl.SSLCertVerificationError, match="self.signed"):
            greeting(port, other.certificate, "localhost")


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_curl_accepts_it(made: tls.Certificate) -> None:
    with serving(made) as port:
        words = ["curl", "-sS", "--http0.9", "--noproxy", "*", "--cacert", str(made.certificate)]
        done = subprocess.run([*words, f"https://127.0.0.1:{port}/"], capture_output=True, timeout=30)
    assert done.stdout == b"hello", done.stderr


def test_the_certificate_is_a_young_one_of_the_end_entity(made: tls.Certificate) -> None:
    found = x509.load_pem_x509_certificate(made.certificate.read_bytes())
    key = found.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name == "secp256r1"
    now = datetime.datetime.now(datetime.UTC)
    assert found.not_valid_before_utc < now
    assert datetime.timedelta(days=396) < found.not_valid_after_utc - now <= datetime.timedelta(days=397)
    constraints = found.extensions.get_extension_for_oid(ExtensionOID.BASIC_CONSTRAINTS).value
    assert isinstance(constraints, x509.BasicConstraints) and not constraints.ca
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    addresses = names.get_values_for_type(x509.IPAddress)
    assert {ipaddress.ip_address("127.0.0.1"), ipaddress.ip_address("::1")} <= set(addresses)
    assert "*" not in names.get_values_for_type(x509.DNSName)


def test_both_files_and_their_directory_are_private(made: tls.Certificate) -> None:
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (made.certificate, made.key, made.key.parent)]
    assert modes == [0o600, 0o600, 0o700]


@pytest.mark.parametrize("kept", ["certificate", "key"])
def test_nothing_is_overwritten_unless_forced(made: tls.Certificate, kept: str) -> None:
    before = getattr(made, kept).read_bytes()
    ({"certificate": made.key, "key": made.certificate}[kept]).unlink()
    with pytest.raises(DataDirError, match="--force"):
        tls.self_signed(made.key.parent)
    assert getattr(made, kept).read_bytes() == before
    tls.self_signed(made.key.parent, force=True)
    assert getattr(made, kept).read_bytes() != before


def test_force_leaves_no_wider_mode(made: tls.Certificate) -> None:
    made.key.chmod(0o644)
    tls.self_signed(made.key.parent, force=True)
    assert stat.S_IMODE(made.key.stat().st_mode) == 0o600


@pytest.mark.parametrize("name", ["two words", "ümlaut.example", "a..b", "-x.example", "x" * 64, "a/b", "name:8080"])
def test_an_impossible_name_is_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadRequest, match="certificate"):
        tls.self_signed(tmp_path / "tls", extra_names=[name])
    assert not (tmp_path / "tls").exists()


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataDirError, match="cannot be written"):
        tls.self_signed(tmp_path / "file" / "tls")


def test_an_odd_host_name_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "box_in the cellar")
    assert tls.machine_names()[:3] == ("localhost", "127.0.0.1", "::1")
    monkeypatch.setattr(socket, "gethostname", lambda: "Box.lan")
    assert tls.machine_names()[:3] == ("localhost", "box.lan", "box.local")


def test_the_address_of_the_default_route_is_in_it() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no network")
        assert probe.getsockname()[0] in tls.machine_names()
