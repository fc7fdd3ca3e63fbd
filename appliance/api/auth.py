"""Names the caller of every request, and refuses nobody: who needs a key is the endpoint table's business."""

from __future__ import annotations

import time

from starlette.types import ASGIApp, Receive, Scope, Send

from appliance.access.keyring import KeyRing
from appliance.access.keys import bearer


class Auth:
    """Puts the `Caller` of a valid key into `scope["state"]["caller"]`, else None, and whether a wrong one came."""

    def __init__(self, app: ASGIApp, keyring: KeyRing) -> None:
        self.app = app
        self.keyring = keyring

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            values = [value for name, value in scope["headers"] if name == b"authorization"]
            ip = scope["client"][0] if scope["client"] else ""
            caller = self.keyring.find(bearer(values), time.time(), ip)
            scope["state"]["caller"], scope["state"]["wrong_key"] = caller, caller is None and bool(values)
        await self.app(scope, receive, send)
