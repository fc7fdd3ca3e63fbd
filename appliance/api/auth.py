"""Names the caller of every request, and refuses nobody: who needs a key is the endpoint table's business."""

from __future__ import annotations

import hmac
import time

from starlette.types import ASGIApp, Receive, Scope, Send

from appliance.access.keyring import KeyRing
from appliance.access.keys import bearer
from appliance.api.render import family


class Auth:
    """Puts the `Caller` of a valid key into `scope["state"]["caller"]`, else None; beside it whether a wrong one came,
    and whether it was the token of the monitoring, which is no key."""

    def __init__(self, app: ASGIApp, keyring: KeyRing, metrics_token: str = "") -> None:
        self.app = app
        self.keyring = keyring
        self._metrics_token = metrics_token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            values = [value for name, value in scope["headers"] if name == b"authorization"]
            ip = scope["client"][0] if scope["client"] else ""
            key = bearer(values)
            if family(scope["path"]) == "anthropic":
                own = [value for name, value in scope["headers"] if name == b"x-api-key"]
                key, values = _of_both(key, values, own), values + own
            caller = self.keyring.find(key, time.time(), ip)
            monitors = bool(self._metrics_token) and hmac.compare_digest((key or "").encode(), self._metrics_token)
            scope["state"] |= {
                "caller": caller, "monitors": monitors, "wrong_key": caller is None and bool(values) and not monitors,
            }  # fmt: skip
        await self.app(scope, receive, send)


def _of_both(key: str | None, values: list[bytes], own: list[bytes]) -> str | None:
    """The key of a client of Anthropic's, which says it in `X-Api-Key`; None where a bearer says another."""
    if not own:
        return key
    found = own[0].decode("latin-1") if len(own) == 1 else None
    return found if not values or key == found else None
