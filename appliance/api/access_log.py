"""The clock and the id of every request, and one log line at its end: never a body, query string, header or key."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from appliance import logs
from appliance.api.render import Family, family
from appliance.messages import Caller
from appliance.store.calls import Row

_SANE_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_NAMES: dict[Family, tuple[bytes, ...]] = {  # under which clients look for it
    "seed": (b"x-request-id",),
    "openai": (b"x-request-id",),
    "anthropic": (b"x-request-id", b"request-id"),
}
CLIENT_GONE = 499  # as proxies log an answer that nobody waited for


class AccessLog:
    """Outermost: mints `x-request-id` (or keeps a sane one of the client's) and puts it on the answer; `note` takes
    a row for every call."""

    def __init__(self, app: ASGIApp, note: Callable[[Row], None] = lambda row: None) -> None:
        self.app = app
        self._note = note

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.monotonic()
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        status = CLIENT_GONE

        async def stamped(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                stamp = [(name, request_id.encode()) for name in _NAMES[family(scope["path"])]]
                message = {**message, "headers": [*message.get("headers", []), *stamp]}
            await send(message)

        try:
            await self.app(scope, receive, stamped)
        finally:
            row = _row(scope, CLIENT_GONE if scope["state"].get("gone") else status, time.monotonic() - started)
            write_line(row.method, row.endpoint, row.status, row.ip, row.request_id, row.key_id, row.ms)
            self._note(row)


def new_request_id() -> str:
    """An id for a request that brought no sane one."""
    return f"req_{secrets.token_hex(12)}"


def write_line(method: str, endpoint: str, status: int, ip: str, request_id: str, key: str | None, ms: float) -> None:
    """The one line of a request; the server's own refusals, which reach no endpoint, write theirs here too."""
    logs.write_line(
        "appliance.access", "request",
        method=method, endpoint=endpoint, status=status, ip=ip, request_id=request_id, key=key, ms=ms,
    )  # fmt: skip


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _SANE_ID.fullmatch(value):
            return str(value.decode("ascii"))
    return new_request_id()


def _row(scope: Scope, status: int, seconds: float) -> Row:
    state = scope["state"]
    caller: Caller | None = state.get("caller")
    return Row(
        at=time.time() - seconds,
        method=scope["method"][:10],
        endpoint=state.get("endpoint", "-"),
        status=status,
        ip=scope["client"][0] if scope["client"] else "-",
        request_id=state["request_id"],
        key_id=caller.key_id if caller else None,
        account_id=caller.account_id if caller else None,
        ms=round(seconds * 1e3, 1),
    )
