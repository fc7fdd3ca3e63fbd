"""Which Host headers are answered."""

from __future__ import annotations

import asyncio
import socket

import pytest
from starlette.types import Receive, Scope, Send

from appliance.api.hosts import Hosts
from appliance.config import ServerSettings
from appliance.errors import BadRequest

OWN = socket.gethostname()


def ask(*hosts: bytes, settings: ServerSettings | None = None) -> None:
    """Raises what the layer raises for these Host headers."""
    reached = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        reached.append(scope)

    async def nothing(*_: object) -> None:
        raise AssertionError("the layer neither reads nor answers")

    scope = {"type": "http", "headers": [(b"host", host) for host in hosts]}
    layer = Hosts(
        app, settings or ServerSettings(public_url="https://llm.example.org:8443/x", allowed_hosts=("Box.Lan",))
    )
    asyncio.run(layer(scope, nothing, nothing))  # type: ignore[arg-type]
    assert reached == [scope]


@pytest.mark.parametrize(
    "host",
    [
        "localhost", "LOCALHOST:8080", "localhost.", "127.0.0.1", "127.0.0.1:80", "192.0.2.7:8080", "[::1]",
        "[::1]:8080", "[fe80::1:2]", OWN, f"{OWN}:8080", f"{OWN.split('.')[0]}.local", "llm.example.org",
        "llm.example.org:1", "box.lan", "BOX.LAN:8080",
    ],
)  # fmt: skip
def test_ours_are_accepted(host: str) -> None:
    ask(host.encode())


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "example.org", "box.lan.evil", "127.1"]
)
def test_foreign_ones_are_refused_by_naming_the_setting(host: str) -> None:
    with pytest.raises(BadRequest, match=r"\[server\] allowed_hosts") as caught:
        ask(host.encode())
    assert host in caught.value.message


@pytest.mark.parametrize(
    "hosts",
    [
        [], [b""], [b"localhost", b"localhost"], [b"localhost/x"], [b"me@localhost"], [b"localhost:"], [b"localhost:x"],
        [b"localhost:123456"], [b"local host"], [b"localhost, evil.example"], [b"\xffhost"], [b"[::1"], [b"::1"],
        [b"[:::::]"], [b"[fe80::1%25eth0]"], [b"http://localhost"], [b"a" * 10_000],
    ],
)  # fmt: skip
def test_missing_doubled_and_malformed_ones_are_refused(hosts: list[bytes]) -> None:
    with pytest.raises(BadRequest, match="Host header") as caught:
        ask(*hosts)
    assert len(caught.value.message) < 100


def test_a_long_foreign_name_is_not_echoed_whole() -> None:
    with pytest.raises(BadRequest) as caught:
        ask(b"a" * 250)
    assert "a" * 101 not in caught.value.message


def test_a_star_accepts_every_well_formed_name() -> None:
    every = ServerSettings(allowed_hosts=("*",))
    ask(b"anything.example", settings=every)
    with pytest.raises(BadRequest):
        ask(b"any thing", settings=every)


def test_the_name_that_is_listened_on_is_accepted() -> None:
    ask(b"gpu-7.lab:8080", settings=ServerSettings(host="gpu-7.lab"))
