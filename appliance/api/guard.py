"""Turns every exception of a request into one JSON answer, in one place. Handlers raise; nobody else renders."""

from __future__ import annotations

import logging

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from appliance.api.render import error_body, error_headers
from appliance.errors import ApplianceError, InternalError, MethodNotAllowed, NotFound

log = logging.getLogger("appliance.guard")


class Guard:
    """Around everything that may raise. A client that is gone gets nothing; a started answer is cut off."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except ClientDisconnect:
            scope["state"]["gone"] = True
        except Exception as error:
            if started:
                log.exception("an answer broke off")
                raise
            await _answer(_translated(error, scope), scope, send)


async def _answer(error: ApplianceError, scope: Scope, send: Send) -> None:
    body = error_body(error, scope["state"]["request_id"])
    headers = [*error_headers(error), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})


def _translated(error: Exception, scope: Scope) -> ApplianceError:
    """Ours as it is, Starlette's as ours, anything else as a 500 that says nothing; the log has the trace."""
    if isinstance(error, ApplianceError) and error.status < 500:
        return error
    if isinstance(error, HTTPException):
        if error.status_code == 405:
            allow = ", ".join(sorted((error.headers or {}).get("Allow", "").split(", ")))
            return MethodNotAllowed(f"This endpoint does not take {scope['method'][:20]}.", headers={"Allow": allow})
        if error.status_code == 404:
            return NotFound("There is no such endpoint.")
    if isinstance(error, ApplianceError) and error.status == 503:
        return error
    log.error("a request failed", exc_info=error, extra={"request_id": scope["state"]["request_id"]})
    return InternalError("Something went wrong here; the log has it under this request id.")
