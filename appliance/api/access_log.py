"""The clock and the id of every request, and one log line at its end: never a body, a query string, a header or a key."""

from __future__ import annotations

import logging
import re
import secrets
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("appliance.access")

_SANE_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
CLIENT_GONE = 499  # as proxies log an answer that nobody waited for


class AccessLog:
    """Outermost: mints `x-request-id` (or keeps a sane one of the client's) and puts it on the answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.monotonic()
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        status = CLIENT_GONE

        async def stamped(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            await send(message)

        try:
            await self.app(scope, receive, stamped)
        finally:
            _write(scope, CLIENT_GONE if scope["state"].get("gone") else status, time.monotonic() - started)


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _SANE_ID.fullmatch(value):
            return str(value.decode("ascii"))
    return f"req_{secrets.token_hex(12)}"


def _write(scope: Scope, status: int, seconds: float) -> None:
    state = scope["state"]
    caller = state.get("caller")
    log.info(
        "request",
        extra={
            "method": scope["method"] if scope["method"].isalpha() else "?",
            "endpoint": state.get("endpoint", "-"),
            "status": status,
            "ip": scope["client"][0] if scope["client"] else "-",
            "request_id": state["request_id"],
            "key": caller.key_id if caller else None,
            "ms": round(seconds * 1e3, 1),
        },
    )
