"""Which `Host` a request may name. Anything else is refused: a foreign name that resolves to this box is a rebinding attack."""

from __future__ import annotations

import ipaddress
import re
import socket
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from appliance.config import ServerSettings
from appliance.errors import BadRequest

_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]{1,253})(?::\d{1,5})?", re.ASCII)


class Hosts:
    """Accepts IP literals, localhost, this machine's names, `public_url`'s host and `allowed_hosts`."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self.app = app
        own = socket.gethostname().lower()
        public = urlsplit(settings.public_url).hostname or "localhost"
        self._accepted = {"localhost", own, own.split(".")[0], f"{own.split('.')[0]}.local", public.lower()}
        self._accepted |= {host.lower() for host in settings.allowed_hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self._check([value for name, value in scope["headers"] if name == b"host"])
        await self.app(scope, receive, send)

    def _check(self, values: list[bytes]) -> None:
        if len(values) != 1:
            raise BadRequest("The request needs exactly one Host header.")
        match = _HOST.fullmatch(values[0].decode("latin-1"))
        if match is None:
            raise BadRequest("The Host header is malformed.")
        host = match[1].lower().rstrip(".")
        if "*" not in self._accepted and host not in self._accepted and not _is_address(host):
            raise BadRequest(f"This server does not answer for {host[:100]}: add the name to [server] allowed_hosts.")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True
