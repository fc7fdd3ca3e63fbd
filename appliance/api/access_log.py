"""The clock and the id of every request, and one log line at its end: never a body, query string, header or key."""

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
                message = {**message, "headers": [*message.get("headers", []), (b"x-request-id", request_id.encode())]}
            await send(message)

        try:
            await self.app(scope, receive, stamped)
        finally:
            _note(scope, CLIENT_GONE if scope["state"].get("gone") else status, time.monotonic() - started)


def new_request_id() -> str:
    """An id for a request that brought no sane one."""
    return f"req_{secrets.token_hex(12)}"


def write_line(method: str, endpoint: str, status: int, ip: str, request_id: str, key: str | None, ms: float) -> None:
    """The one line of a request; the server's own refusals, which reach no endpoint, write theirs here too."""
    fields = {"method": method, "endpoint": endpoint, "status": status, "ip": ip, "request_id": request_id}
    log.info("request", extra=fields | {"key": key, "ms": ms})


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _SANE_ID.fullmatch(value):
            return str(value.decode("ascii"))
    return new_request_id()


def _note(scope: Scope, status: int, seconds: float) -> None:
    state = scope["state"]
    caller = state.get("caller")
    write_line(
        scope["method"],
        state.get("endpoint", "-"),
        status,
        scope["client"][0] if scope["client"] else "-",
        state["request_id"],
        caller.key_id if caller else None,
        round(seconds * 1e3, 1),
    )
