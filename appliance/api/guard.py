"""Turns every exception of a request into one JSON answer, in one place. Handlers raise; nobody else renders."""

from __future__ import annotations

import logging

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from appliance.api.render import error_body, error_event, error_headers, error_status
from appliance.errors import (
    ApplianceError,
    BadRequest,
    Conflict,
    InternalError,
    MethodNotAllowed,
    NotFound,
    PayloadTooLarge,
    RequestTimeout,
    UnsupportedMediaType,
)

log = logging.getLogger("appliance.guard")

_OURS: dict[int, type[ApplianceError]] = {
    404: NotFound,
    408: RequestTimeout,
    409: Conflict,
    413: PayloadTooLarge,
    415: UnsupportedMediaType,
}


class Guard:
    """Around everything that may raise. A client that is gone gets nothing; a started answer is cut off, except that an
    event stream ends with the error as its last event."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        answer = _Answer(send)
        try:
            await self.app(scope, receive, answer.send)
        except ClientDisconnect:
            scope["state"]["gone"] = True
        except Exception as error:
            ours = _translated(error, scope)
            if not answer.started:
                await _answer(ours, scope, send)
            elif answer.is_events and not answer.ended:
                await _last_event(ours, scope, send)
            else:
                raise


class _Answer:
    """What has been sent of one answer."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = self.ended = self.is_events = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            kinds = [value for name, value in message.get("headers", []) if name.lower() == b"content-type"]
            self.is_events = any(kind.startswith(b"text/event-stream") for kind in kinds)
        elif not message.get("more_body", False):
            self.ended = True
        await self._send(message)


async def _answer(error: ApplianceError, scope: Scope, send: Send) -> None:
    body = error_body(error, scope["state"]["request_id"], scope["path"])
    headers = [*error_headers(error), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": error_status(error, scope["path"]), "headers": headers})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})


async def _last_event(error: ApplianceError, scope: Scope, send: Send) -> None:
    event = error_event(error, scope["state"]["request_id"], scope["path"])
    await send({"type": "http.response.body", "body": event})


def _translated(error: Exception, scope: Scope) -> ApplianceError:
    """Ours as it is, Starlette's as ours, anything else as a 500 that says nothing; the log has the trace."""
    if isinstance(error, HTTPException) and error.status_code < 500:
        return _from_starlette(error, scope["method"])
    if isinstance(error, ApplianceError) and error.status != 500:  # 500 is also an operator's error, which names files
        return error
    log.error("a request failed", exc_info=error, extra={"request_id": scope["state"]["request_id"]})
    return InternalError("Something went wrong here; the log has it under this request id.")


def _from_starlette(error: HTTPException, method: str) -> ApplianceError:
    if error.status_code == 405:
        allow = ", ".join(sorted((error.headers or {}).get("Allow", "").split(", ")))
        return MethodNotAllowed(
            f"This endpoint does not take {method[:20]}; it takes {allow}.", headers={"Allow": allow}
        )
    if error.status_code == 404:
        return NotFound("There is no such endpoint.")
    return _OURS.get(error.status_code, BadRequest)(str(error.detail)[:300])
