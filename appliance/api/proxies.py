"""Whose request it is behind a reverse proxy: `X-Forwarded-For` is believed from `trusted_proxies` only."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from starlette.types import ASGIApp, Receive, Scope, Send

from appliance.config import ServerSettings

Address = IPv4Address | IPv6Address


class Proxies:
    """Puts the client's own address into `scope["client"]`: the rightmost one that no trusted proxy has."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self.app = app
        self._trusted = tuple(map(ip_network, settings.trusted_proxies))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._trusted and scope["type"] == "http" and scope["client"]:
            values = [value for name, value in scope["headers"] if name == b"x-forwarded-for"]
            scope["client"] = (self._client(scope["client"][0], values), scope["client"][1])
        await self.app(scope, receive, send)

    def _client(self, peer: str, values: list[bytes]) -> str:
        """Every proxy appends whom it saw: going back, the first who is no trusted proxy is the client."""
        client = _address(peer)
        hops = [hop for value in values for hop in value.decode("latin-1").split(",")]
        while client is not None and self._trusts(client) and hops:
            before = _address(hops.pop())
            if before is None:  # nonsense, or a name: the proxy itself is all we know
                break
            client = before
        return peer if client is None else str(client)

    def _trusts(self, address: Address) -> bool:
        return any(address.version == network.version and address in network for network in self._trusted)


def _address(text: str) -> Address | None:
    """An address as proxies write it: bare, with a port, or in brackets."""
    text = text.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        found = ip_address(text)
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found
