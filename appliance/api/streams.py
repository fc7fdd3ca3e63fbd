"""Answers that take time: give up when the client is gone, and server-sent events with pings. Knows no endpoint."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")
PING = b": ping\n\n"


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; when the client goes first, `work` is cancelled and ClientDisconnect raised."""
    worker = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not worker.done() or worker.cancelled():  # the latter: cut while the client was not reading
            raise ClientDisconnect
        return worker.result()
    finally:
        for task in (worker, watcher):
            task.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends what `events` yields (whole `data:` events as bytes), and a comment after `ping_seconds` of silence.

    `events` reports its own errors as events: the status has been sent. It is closed when the client is gone.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], ping_seconds: float, headers: dict[str, str]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})
        del self.headers["content-length"]
        self.events = events
        self.ping_seconds = ping_seconds
        self._last_sent = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await while_connected(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        pinger: asyncio.Task[None] | None = None
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            pinger = asyncio.ensure_future(self._ping(send))
            async for event in self.events:
                self._last_sent = time.monotonic()
                await send({"type": "http.response.body", "body": event, "more_body": True})
            pinger.cancel()
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            if pinger is not None:
                pinger.cancel()
            await self.events.aclose()

    async def _ping(self, send: Send) -> None:
        """Keeps proxies from closing a silent stream; the first ping goes out with the headers' silence counted."""
        while True:
            silent = time.monotonic() - self._last_sent
            if silent >= self.ping_seconds:
                self._last_sent = time.monotonic()
                await send({"type": "http.response.body", "body": PING, "more_body": True})
                silent = 0.0
            await asyncio.sleep(self.ping_seconds - silent)
