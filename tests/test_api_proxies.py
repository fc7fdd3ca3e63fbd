"""Whose address counts behind proxies."""

from __future__ import annotations

import asyncio

import pytest
from starlette.types import Receive, Scope, Send

from appliance.api.proxies import Proxies
from appliance.config import ServerSettings


def client(peer: str, *forwarded: str, trusted: tuple[str, ...] = ("127.0.0.1", "10.0.0.0/8", "fd00::/8")) -> str:
    """Whom the app behind the layer sees."""
    seen = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["client"][0])

    headers = [(b"x-forwarded-for", value.encode("latin-1")) for value in forwarded]
    scope = {"type": "http", "client": (peer, 1234), "headers": headers}
    asyncio.run(Proxies(app, ServerSettings(trusted_proxies=trusted))(scope, None, None))  # type: ignore[arg-type]
    return str(seen[0])


@pytest.mark.parametrize(
    ("peer", "forwarded", "expected"),
    [
        ("127.0.0.1", [], "127.0.0.1"),
        ("127.0.0.1", ["9.9.9.9"], "9.9.9.9"),
        ("127.0.0.1", ["1.1.1.1, 9.9.9.9"], "9.9.9.9"),  # what stands further left, the client may have written
        ("127.0.0.1", ["9.9.9.9, 10.1.2.3"], "9.9.9.9"),
        ("127.0.0.1", ["9.9.9.9", "10.1.2.3"], "9.9.9.9"),
        ("127.0.0.1", ["10.9.9.9, 10.1.2.3"], "10.9.9.9"),
        ("::ffff:127.0.0.1", ["9.9.9.9"], "9.9.9.9"),
        ("fd00::1", ["[2001:db8::7]:443"], "2001:db8::7"),
        ("127.0.0.1", ["9.9.9.9:5000"], "9.9.9.9"),
        ("127.0.0.1", ["unknown"], "127.0.0.1"),
        ("127.0.0.1", ["9.9.9.9, unknown"], "127.0.0.1"),
        ("127.0.0.1", ["\xff, ,"], "127.0.0.1"),
    ],
)
def test_a_trusted_proxy_names_the_client(peer: str, forwarded: list[str], expected: str) -> None:
    assert client(peer, *forwarded) == expected


def test_nobody_else_is_believed() -> None:
    assert client("8.8.8.8", "127.0.0.1") == "8.8.8.8"
    assert client("127.0.0.1", "9.9.9.9", trusted=()) == "127.0.0.1"
