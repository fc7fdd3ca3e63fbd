"""uvicorn as we need it: JSON for what it would say in plain text, deadlines for slow peers, and a shutdown that keeps its limit.

Owns sockets, signals and the HTTP connection; knows no endpoint. The only importer of uvicorn.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import ssl
from collections.abc import Callable, Generator
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from appliance.api.render import error_body, error_headers
from appliance.config import ServerSettings
from appliance.errors import (
    AddressInUse,
    ApplianceError,
    BadRequest,
    ConfigError,
    HeadersTooLarge,
    RequestTimeout,
    Unavailable,
)

REASONS = {
    400: b"Bad Request",
    408: b"Request Timeout",
    431: b"Request Header Fields Too Large",
    503: b"Service Unavailable",
}


def bind(host: str, port: int) -> socket.socket:
    """A bound socket, before anything expensive happens. Raises AddressInUse or ConfigError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ConfigError(f"[server] host: {host} is no address of this machine ({error}).") from error
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise AddressInUse(
            f"{host}:{port} cannot be used ({os.strerror(error.errno or 0)}): choose another with --port or [server] port."
        ) from error
    return bound


async def serve(app: ASGIApp, settings: ServerSettings, bound: socket.socket, on_drain: Callable[[], None]) -> None:
    """Serves until SIGTERM or SIGINT, then lets running answers finish for `drain_seconds`. Raises ConfigError for bad TLS files."""
    config = uvicorn.Config(
        app,
        http=_protocol(settings),
        ws="none",
        lifespan="off",
        loop="none",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=settings.keep_alive_seconds,  # type: ignore[arg-type]  # any number of seconds works
        timeout_graceful_shutdown=settings.drain_seconds,  # type: ignore[arg-type]
        ssl_certfile=settings.tls_cert or None,
        ssl_keyfile=settings.tls_key or None,
    )
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"[server] tls_cert or tls_key cannot be used: {error}.") from error
    await _Server(config, on_drain).serve([bound])


class _Server(uvicorn.Server):
    """Says when it drains, keeps its exit code, and ends at once on a second signal."""

    def __init__(self, config: uvicorn.Config, on_drain: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_drain = on_drain

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """uvicorn's raises the signal again after serving, which would turn a clean end into a death by signal."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle_exit)
        yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            os._exit(128 + sig)  # the database survives it: every acknowledged write is in its log
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._on_drain()
        await super().shutdown(sockets)
        with contextlib.suppress(TimeoutError):  # cancelled answers close their generators
            await asyncio.wait_for(self._tasks_gone(), 1.0)

    async def _tasks_gone(self) -> None:
        while self.server_state.tasks:
            await asyncio.sleep(0.01)


def _protocol(settings: ServerSettings) -> type[asyncio.Protocol]:
    """The connection class with these settings, as uvicorn wants a class and passes its own arguments."""
    return type("Connection", (_Connection,), {"settings": settings})


class _Connection(HttpToolsProtocol):
    """One connection, with a deadline for every phase in which the peer has to act."""

    settings: ServerSettings

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._timer: asyncio.TimerHandle | None = None  # for the phase that the peer is in
        self._write_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0  # received of a head that is not complete
        self._in_head = True
        self._refused = False

    # phases

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.settings.max_connections:
            self._refuse(Unavailable("The server has as many connections as it takes.", retry_after=5))
        else:
            self._set_timer(self.settings.header_timeout_seconds, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._set_timer(None)
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._in_head and not self._head_bytes and self._timer is None:  # the first byte of a further request
            self._set_timer(self.settings.header_timeout_seconds, self._head_is_late)
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > self.settings.max_header_bytes:
            self._refuse_head()

    def on_headers_complete(self) -> None:
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        self._in_head, self._head_bytes = False, 0
        if size > self.settings.max_header_bytes:
            self._refuse_head()
        if self._refused:
            return
        self._set_timer(self.settings.body_timeout_seconds, self._body_is_late)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._set_timer(None)
        self._in_head = True
        if not self._refused:
            super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.settings.write_timeout_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    # refusals

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls for malformed HTTP."""
        self._refuse(BadRequest("The request is not valid HTTP."))

    def _refuse_head(self) -> None:
        self._refuse(HeadersTooLarge(f"The request head is larger than {self.settings.max_header_bytes:,} bytes."))

    def _head_is_late(self) -> None:
        if self._head_bytes:
            self._refuse(RequestTimeout("The request head did not arrive in time."))
        else:
            self.transport.close()

    def _body_is_late(self) -> None:
        self._refuse(RequestTimeout("The request body did not arrive in time."))

    def _refuse(self, error: ApplianceError) -> None:
        """Answers in the seed's shape, unless an answer has begun, and ends the connection."""
        self._refused = True
        self._set_timer(None)
        if self.transport.is_closing():
            return
        running = self.cycle is not None and not self.cycle.response_complete
        if not (running and self.cycle.response_started):
            self.transport.write(_answer(error))
        if running:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def _set_timer(self, seconds: float | None, action: Callable[[], None] | None = None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(seconds, action) if seconds is not None and action else None


def _answer(error: ApplianceError) -> bytes:
    """A whole HTTP/1.1 answer, for requests that never became one of the app's."""
    request_id = f"req_{secrets.token_hex(12)}"
    body = error_body(error, request_id)
    headers = [*error_headers(error), (b"x-request-id", request_id.encode()), (b"connection", b"close")]
    head = b"HTTP/1.1 %d %s\r\n" % (error.status, REASONS[error.status])
    head += b"".join(b"%s: %s\r\n" % h for h in headers)
    return head + b"content-length: %d\r\n\r\n" % len(body) + body
