"""Which `Host` a request may name. Others are refused: a foreign name that leads here is a rebinding attack."""

from __future__ import annotations

import ipaddress
import re
import socket
from functools import lru_cache
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from appliance.config import ServerSettings
from appliance.errors import BadRequest

_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]{1,253})(?::\d{1,5})?", re.ASCII)


class Hosts:
    """Accepts IP literals, localhost, this machine's names, the host that is listened on, `public_url`'s host and
    `allowed_hosts`; `*` among these accepts every well-formed one."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self.app = app
        own = socket.gethostname()  # not getfqdn, which may ask a name server that does not answer
        short = own.split(".")[0]
        public = urlsplit(settings.public_url).hostname
        names = ["localhost", own, short, f"{short}.local", settings.host, public, *settings.allowed_hosts]
        self._accepted = frozenset(_bare(name) for name in names if name)
        self._fault = lru_cache(maxsize=128)(self._find_fault)  # a client names the same one every time

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self._check([value for name, value in scope["headers"] if name == b"host"])
        await self.app(scope, receive, send)

    def _check(self, values: list[bytes]) -> None:
        if len(values) != 1:
            raise BadRequest("The request needs exactly one Host header.")
        if fault := self._fault(values[0]):
            raise BadRequest(fault)

    def _find_fault(self, value: bytes) -> str:
        """What is wrong with this Host; empty when nothing is."""
        match = _HOST.fullmatch(value.decode("latin-1"))
        if match is None or (match[1].startswith("[") and not _is_address(match[1])):
            return "The Host header is malformed."
        host = _bare(match[1])
        if self._accepted & {"*", host} or _is_address(host):
            return ""
        return f"This server does not answer for {host[:100]}: add the name to [server] allowed_hosts."


def _bare(name: str) -> str:
    """`name` for comparing: no port, no root dot, lower case."""
    match = _HOST.fullmatch(name)
    return (match[1] if match else name).lower().rstrip(".")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True
