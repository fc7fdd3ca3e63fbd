"""The HTTP server: uvicorn with JSON for what it would say in plain text, a deadline for every phase in which the peer
has to act, and a shutdown that keeps its limit.

Owns sockets, TLS, signals and the HTTP connection; knows no endpoint. The only importer of uvicorn and httptools.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import enum
import fcntl
import logging
import os
import re
import resource
import signal
import socket
import ssl
import stat
import struct
import termios
import urllib.parse
from collections.abc import Callable, Generator
from types import FrameType
from typing import Any

import httptools
import uvicorn
from starlette.types import ASGIApp
from uvicorn._types import ASGI3Application, ASGIReceiveEvent, ASGISendEvent
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from appliance.api.access_log import new_request_id, write_line
from appliance.api.render import error_body, error_headers, error_status
from appliance.config import ServerSettings
from appliance.errors import (
    AddressInUse,
    ApplianceError,
    BadRequest,
    ConfigError,
    Draining,
    HeadersTooLarge,
    InternalError,
    RequestTimeout,
    Unavailable,
)

log = logging.getLogger("appliance.server")

BACKLOG = 2_048
SLICE = 4_096  # bytes parsed at a time, so that limits act within a large read
LINGER_SECONDS = 2.0  # what a refused client still sends is thrown away this long, so that it can read its answer
MOST_PIPELINED = 16
END_SECONDS = 1.0  # at the drain limit, half of it for last words, half for what was cancelled to end
SPARE_FILES = 256  # descriptors beside the connections: database, model, log, admin socket

RESET = struct.pack("ii", 1, 0)  # SO_LINGER: on, for no time

_BAD_VALUE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_ABSOLUTE = re.compile(rb"https?://([^/?#@\\]+)([/?][^#]*)?", re.IGNORECASE)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, before anything expensive happens. Raises ConfigError for a host that does not resolve and
    AddressInUse for an address that cannot be had. Port 0 takes a free one."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"[server] host: {host[:100]} is no address of this machine ({error}).") from error
    family, kind, protocol, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)  # localhost: IPv4
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
        bound.listen(BACKLOG)  # until somebody listens, Linux lets a second server bind the same port
    except OSError as error:
        bound.close()
        why = os.strerror(error.errno or 0)
        raise AddressInUse(
            f"{host}:{port} cannot be used ({why}): choose another with --port or [server] port."
        ) from error
    return bound


def tls_context(settings: ServerSettings) -> ssl.SSLContext | None:
    """What serves HTTPS with the configured files; None without them. Raises ConfigError."""
    if not settings.tls_cert and not settings.tls_key:
        return None
    if not settings.tls_cert or not settings.tls_key:
        raise ConfigError("[server] tls_cert and tls_key belong together: set both or neither.")
    with contextlib.suppress(OSError):
        if stat.S_IMODE(os.stat(settings.tls_key).st_mode) & 0o077:
            raise ConfigError(
                f"[server] tls_key {settings.tls_key} can be read by others: run chmod 600 {settings.tls_key}."
            )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["http/1.1"])
    try:
        # An empty password, because OpenSSL would ask the terminal for that of an encrypted key.
        context.load_cert_chain(settings.tls_cert, settings.tls_key, password=lambda: "")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or getattr(error, "reason", None) or "unreadable"
        raise ConfigError(
            f"[server] tls_cert {settings.tls_cert} with tls_key {settings.tls_key} cannot be used ({why}): "
            "both must be PEM files, the key that of the certificate and without a password."
        ) from error
    return context


async def serve(
    app: ASGIApp,
    settings: ServerSettings,
    bound: socket.socket,
    on_drain: Callable[[], None],
    on_limit: Callable[[], None] = lambda: None,
) -> None:
    """Serves on `bound` until SIGTERM or SIGINT. Then `on_drain` is called, nothing new is accepted, idle connections
    are closed, and running answers may finish within `drain_seconds`. `on_limit` then tells them that their time is
    up; what is left a moment later is cancelled, and this returns within 2 s of the limit. A second signal ends the
    process at once, with 128 + its number. Raises ConfigError.
    """
    _raise_file_limit(settings.max_connections + SPARE_FILES)
    asyncio.get_running_loop().set_exception_handler(_on_loop_error)
    await _Server(app, settings, tls_context(settings), on_drain, on_limit).serve([bound])


def _raise_file_limit(needed: int) -> None:
    """The usual soft limit of 1,024 files would undercut `max_connections`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    wanted = needed if hard == unlimited else min(needed, hard)
    if soft != unlimited and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _on_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Peers that break off, or speak no TLS to a TLS port, are no news; anything else is."""
    error = context.get("exception")
    if not isinstance(error, (ssl.SSLError, ConnectionError)):
        log.error(context.get("message", "the event loop met an error"), exc_info=error)


class _Server(uvicorn.Server):
    """uvicorn's life cycle with our connection class, signals and drain."""

    def __init__(
        self,
        app: ASGIApp,
        settings: ServerSettings,
        tls: ssl.SSLContext | None,
        on_drain: Callable[[], None],
        on_limit: Callable[[], None],
    ) -> None:
        config = uvicorn.Config(
            app, http=HttpToolsProtocol, ws="none", lifespan="off", loop="none", interface="asgi3",
            log_config=None, access_log=False, proxy_headers=False, server_header=False,
        )  # fmt: skip
        super().__init__(config)
        self.settings = settings
        self._tls = tls
        self._on_drain = on_drain
        self._on_limit = on_limit

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        self.servers = [
            await loop.create_server(
                self._connection,
                sock=listener,
                backlog=BACKLOG,
                ssl=self._tls,
                ssl_handshake_timeout=self.settings.header_timeout_seconds if self._tls else None,
                ssl_shutdown_timeout=END_SECONDS if self._tls else None,
            )
            for listener in sockets or []
        ]
        self.started = True

    def _connection(self) -> _Connection:
        return _Connection(self.config, self.server_state, self.settings)

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
        for listener in self.servers:
            listener.close()
        for connection in list(self._connections()):
            connection.shutdown()
        if not await self._emptied(self.settings.drain_seconds):
            log.warning("the drain limit cuts running answers", extra={"answers": len(self.server_state.tasks)})
            self._on_limit()
            await self._emptied(END_SECONDS / 2)
        for task in list(self.server_state.tasks):
            task.cancel()
        await self._emptied(END_SECONDS / 2)
        for connection in list(self._connections()):
            connection.abort()
        await asyncio.sleep(0)

    async def _emptied(self, seconds: float) -> bool:
        """Whether every answer is out and every connection closed within `seconds`."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while (self.server_state.tasks or self.server_state.connections) and loop.time() < end:
            await asyncio.sleep(0.02)
        return not (self.server_state.tasks or self.server_state.connections)

    def _connections(self) -> Generator[_Connection]:
        for connection in self.server_state.connections:
            assert isinstance(connection, _Connection)
            yield connection


class _Input(enum.Enum):
    """Where the peer is in what it sends."""

    IDLE = enum.auto()
    HEAD = enum.auto()
    BODY = enum.auto()


class _Connection(HttpToolsProtocol):
    """One connection. `cycle` is the newest exchange (being received), `running` the one that is being answered,
    `pipeline` those between. Closing is always `finish`."""

    def __init__(self, config: uvicorn.Config, state: ServerState, settings: ServerSettings) -> None:
        super().__init__(config, state, {})
        self.parser.set_dangerous_leniencies(lenient_data_after_close=False)
        self.settings = settings
        # input
        self.input = _Input.IDLE
        self.fresh = True  # no byte of a request has come yet
        self.discarding = False  # whatever still comes is thrown away
        self.replaying = False  # the parser is told what we know already
        self.fed = self.seen = 0  # bytes of the head or body fed to the parser, and those of them that were body
        self.moved = False  # whether the piece being parsed went from one phase to another
        # output
        self.running: _Exchange | None = None
        self.refusal: ApplianceError | None = None  # to be said once the answers before it are out
        self.draining = self.finishing = False
        # timers
        # by the loop's clock, when the peer has to have acted; None: it has nothing to do
        self.due: float | None = None
        self.deadline: asyncio.TimerHandle | None = None  # rings then, or earlier: at
        self.rings_at = 0.0
        self.write_deadline: asyncio.TimerHandle | None = None

    # life

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._arm(self.settings.header_timeout_seconds)
        if len(self.connections) > self.settings.max_connections:
            self.connections.discard(self)  # it lingers a moment, and must not count
            self._refuse(Unavailable("The server has as many connections as it takes.", retry_after=5))

    def connection_lost(self, exc: Exception | None) -> None:
        self.connections.discard(self)
        for timer in (self.deadline, self.write_deadline):
            if timer is not None:
                timer.cancel()
        for exchange in (self.running, self.cycle):
            if exchange is not None:
                exchange.disconnected = not exchange.response_complete
                exchange.message_event.set()
        self.pipeline.clear()
        self.discarding = True
        self.flow.resume_writing()
        self.parser = None  # type: ignore[assignment]  # the two refer to each other

    def shutdown(self) -> None:
        """The server drains: what is being asked or answered is the connection's last."""
        self.draining = True
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False
        elif self.input is not _Input.HEAD:
            self.finish()

    def finish(self) -> None:
        """Closes once everything written is out. While the peer is still sending, closing would reset the connection
        and could destroy the answer on its way: then the input is thrown away for a moment first."""
        if self.finishing or self.transport.is_closing():
            return
        self.finishing = self.discarding = True
        if self.input is _Input.IDLE:
            self._close()
            return
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()
        self._arm(LINGER_SECONDS)

    def _close(self) -> None:
        self._arm(None)
        self.transport.close()
        self._watch_writing()  # the peer may not fetch what is left

    def abort(self) -> None:
        """Drops the connection with a reset: the kernel, too, forgets what was not fetched."""
        with contextlib.suppress(OSError, AttributeError):
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.transport.abort()

    # input

    def data_received(self, data: bytes) -> None:
        view = memoryview(data)
        for start in range(0, len(view), SLICE):
            if self.discarding:
                return
            self._feed(view[start : start + SLICE])

    def _feed(self, piece: memoryview) -> None:
        self.moved = False
        try:
            self._parse(piece)
        except httptools.HttpParserError as error:
            if not self.discarding:
                self._fail(_as_ours(error))
            return
        if not self.moved and not self.discarding:
            self.fed += len(piece)
            self._check_volume()

    def _parse(self, piece: memoryview) -> None:
        while piece:
            try:
                self.parser.feed_data(piece)
                return
            except httptools.HttpParserUpgrade as offer:  # declined by going on as if it had not been made
                piece = piece[offer.args[0] :]
                if self.input is _Input.BODY:
                    self._read_body_anew()

    def _read_body_anew(self) -> None:
        """llhttp ends a request with an offer at its head and takes the body for another protocol (Java's client makes
        such an offer with every first POST; taken for the next request, the body would be a smuggled one). A new
        parser that saw only the framing reads it."""
        framing = b"".join(b"%s: %s\r\n" % header for header in self._framing())
        self.parser = httptools.HttpRequestParser(self)
        self.replaying = True
        self.parser.feed_data(b"POST / HTTP/1.1\r\n" + framing + b"\r\n")
        self.replaying = False

    def _framing(self) -> list[tuple[bytes, bytes]]:
        """The headers that announce a body; none where there is none."""
        named = (b"content-length", b"transfer-encoding")
        return [(n, v) for n, v in self.headers if n in named and v.strip(b"0 ")]

    def _check_volume(self) -> None:
        """Bounds what the parser holds back, or skips, without a callback: heads, chunk extensions, trailers."""
        most = self.settings.max_header_bytes
        if self.input is _Input.HEAD and self.fed > most:
            self._fail(self._head_too_large())
        elif self.input is _Input.BODY and self.fed - self.seen > most + 8 * self.seen:
            self._fail(BadRequest("The chunks of the request body carry too much besides the body."))

    def on_message_begin(self) -> None:
        if self.replaying:
            return
        if len(self.pipeline) >= MOST_PIPELINED:
            self.discarding = True  # what is queued is answered, then the connection ends
        if self.discarding:
            raise BadRequest("Nothing is read any more.")  # only stops the parser
        super().on_message_begin()
        self.input, self.fed, self.moved = _Input.HEAD, 0, True
        if not self.fresh:  # the first head's time runs from the connection's start
            self._arm(self.settings.header_timeout_seconds)
        self.fresh = False

    def on_url(self, url: bytes) -> None:
        if not self.replaying:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.input is _Input.HEAD:  # trailers are dropped: whoever looked at the headers has done so
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.replaying:
            return
        version = self.parser.get_http_version()
        self._check_head(version)
        self._set_target()
        self.scope["method"], self.scope["http_version"] = self.parser.get_method().decode("ascii"), version
        self.input, self.fed, self.seen, self.moved = _Input.BODY, 0, 0, True
        self._arm(self.settings.body_timeout_seconds)
        again = version == "1.1" and self.parser.should_keep_alive() and not self.draining
        self.cycle = _Exchange(self, keep_alive=again)
        if self.running is None:
            self._run(self.cycle)
        else:
            self.pipeline.appendleft((self.cycle, self.app))

    def _check_head(self, version: str) -> None:
        names = [name for name, _ in self.headers]
        size = len(self.url) + len(self.parser.get_method()) + 14  # the spaces, HTTP/1.1 and two line ends
        if size + sum(len(name) + len(value) + 4 for name, value in self.headers) > self.settings.max_header_bytes:
            raise self._head_too_large()
        if version not in ("1.0", "1.1"):
            raise BadRequest(f"HTTP/{version} is not spoken here; HTTP/1.1 is.")
        if any(_BAD_VALUE.search(value) for _, value in self.headers):
            raise BadRequest("A header of the request holds control characters.")
        if b"transfer-encoding" in names:
            values = [value.strip().lower() for name, value in self.headers if name == b"transfer-encoding"]
            if values != [b"chunked"] or version == "1.0" or b"content-length" in names:
                raise BadRequest("The only Transfer-Encoding that is read is chunked, alone and in HTTP/1.1.")

    def _set_target(self) -> None:
        target = self.url
        if absolute := _ABSOLUTE.fullmatch(target):  # its host counts, not the header's (RFC 9112, 3.2.2)
            target = absolute[2] or b"/"
            target = target if target.startswith(b"/") else b"/" + target
            self.headers[:] = [(n, absolute[1] if n == b"host" else v) for n, v in self.headers]
        if not target.startswith(b"/") or b"#" in target or not target.isascii():
            raise BadRequest("The request target must be a path such as /healthz.")
        raw, _, query = target.partition(b"?")
        path = urllib.parse.unquote(raw.decode("ascii"))
        self.scope["path"], self.scope["raw_path"], self.scope["query_string"] = path, raw, query

    def on_body(self, body: bytes) -> None:
        self.seen += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade() and self._framing():
            return  # not yet: see _read_body_anew
        super().on_message_complete()
        self.input, self.moved = _Input.IDLE, True
        self._arm(None)
        if not self.cycle.keep_alive:
            self.discarding = True
        elif self.cycle.response_complete:  # the answer came before the end of the body
            self._arm(self.settings.keep_alive_seconds)

    # output

    def _run(self, exchange: RequestResponseCycle) -> None:
        assert isinstance(exchange, _Exchange)
        self.running = exchange
        self._start_asgi_task(exchange, self.app)

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        self.running = None
        if self.finishing or self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._run(self.pipeline.pop()[0])
        elif self.refusal is not None:
            self._refuse(self.refusal)
        elif self.discarding:
            self.finish()
        elif self.input is _Input.IDLE:
            self._arm(self.settings.keep_alive_seconds)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writing()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.write_deadline is not None and not self.transport.is_closing():
            self.write_deadline.cancel()
            self.write_deadline = None

    def _watch_writing(self, before: int | None = None) -> None:
        """Drops a peer that takes nothing within the time; `before` is what was unsent a time ago, bytes."""
        unsent = self._unsent()
        if before is not None and unsent >= before:
            self.abort()
            return
        if self.write_deadline is not None:
            self.write_deadline.cancel()
        self.write_deadline = self.loop.call_later(self.settings.write_timeout_seconds, self._watch_writing, unsent)

    def _unsent(self) -> int:
        """Bytes that the peer has not taken: in our buffer, and in the kernel's, which may hold megabytes."""
        count = array.array("i", [0])
        with contextlib.suppress(OSError, AttributeError):
            fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, count)
        return self.transport.get_write_buffer_size() + count[0]

    # deadlines and refusals

    def _arm(self, seconds: float | None) -> None:
        """Sets the one deadline for the peer's next act; None: it has nothing to do. A timer that rings too early is
        cheaper than a new one for every phase."""
        self.due = None if seconds is None else self.loop.time() + seconds
        if self.due is not None and (self.deadline is None or self.rings_at > self.due):
            self._ring_at(self.due)

    def _ring_at(self, when: float) -> None:
        if self.deadline is not None:
            self.deadline.cancel()
        self.deadline, self.rings_at = self.loop.call_at(when, self._ring), when

    def _ring(self) -> None:
        self.deadline = None
        if self.due is None:
            return
        if self.loop.time() < self.due:
            self._ring_at(self.due)
        else:
            self._late()

    def _late(self) -> None:
        if self.finishing or self.input is _Input.IDLE:
            self._close()
        elif self.input is _Input.HEAD:
            self._fail(RequestTimeout("The request's head did not arrive in time."))
        elif self.cycle.response_complete:
            self.finish()
        elif self.cycle.response_started:
            self.cycle.keep_alive, self.discarding = False, True
        elif self.cycle is not self.running or self.flow.read_paused or self.cycle.waiting_for_100_continue:
            self._arm(self.settings.body_timeout_seconds)  # we are late, not the peer
        else:
            self._fail(RequestTimeout("The request's body did not arrive in time."))

    def _fail(self, error: ApplianceError) -> None:
        """What the peer sends is unusable from here on. Whoever is to say so, says it when it is their turn."""
        self.discarding = True
        self._arm(None)
        if self.input is _Input.BODY and not self.cycle.response_complete:
            assert isinstance(self.cycle, _Exchange)
            self.cycle.fail(error)
        elif self.input is _Input.BODY:
            self.finish()
        elif self.running is not None:
            self.refusal = error
        else:
            self._refuse(error)

    def _refuse(self, error: ApplianceError) -> None:
        """Answers where there is no exchange, and ends the connection."""
        request_id = new_request_id()
        body = error_body(error, request_id, self.url.decode("latin-1") if self.headers else "")
        headers = [
            *self.server_state.default_headers,
            *error_headers(error),
            (b"content-length", b"%d" % len(body)),
            (b"x-request-id", request_id.encode()),
            (b"connection", b"close"),
        ]
        lines = b"".join(b"%s: %s\r\n" % header for header in headers)
        self.transport.write(STATUS_LINE[error.status] + lines + b"\r\n" + body)
        write_line("-", "-", error.status, self.client[0] if self.client else "-", request_id, None, 0.0)
        self.input = _Input.HEAD  # more of the request may be on its way
        self.finish()

    def _head_too_large(self) -> HeadersTooLarge:
        return HeadersTooLarge(f"The request's head is larger than {self.settings.max_header_bytes:,} bytes.")


def _as_ours(error: httptools.HttpParserError) -> ApplianceError:
    """What a callback raised, or that the parser found the bytes malformed."""
    if isinstance(error.__context__, ApplianceError):
        return error.__context__
    if isinstance(error, httptools.HttpParserCallbackError):
        log.error("a parser callback failed", exc_info=error)
    return BadRequest("The request is not valid HTTP.")


class _Wire(asyncio.Transport):
    """The transport as an exchange sees it: closing is the connection's, and the head of an answer waits until the end
    of the event loop's turn for what comes with it, so that small answers are one packet."""

    def __init__(self, connection: _Connection) -> None:
        super().__init__()
        self._connection = connection
        self._held = b""

    def is_closing(self) -> bool:
        return self._connection.transport.is_closing()

    def hold(self, head: bytes) -> None:
        self._held = head
        self._connection.loop.call_soon(self.flush)

    def flush(self) -> None:
        if self._held:
            self.write(b"")

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        if self._held:
            data, self._held = self._held + data, b""
        if data and not self.is_closing():
            self._connection.transport.write(data)

    def close(self) -> None:
        self.flush()
        self._connection.finish()


class _Exchange(RequestResponseCycle):
    """One request and its answer. `receive` raises what went wrong with the body, so that it is answered like any
    other error; an app that breaks is answered in JSON; HTTP/1.0 gets no chunks."""

    def __init__(self, connection: _Connection, *, keep_alive: bool) -> None:
        wire = _Wire(connection)
        super().__init__(
            scope=connection.scope,
            transport=wire,
            flow=connection.flow,
            logger=connection.logger,
            access_logger=connection.access_logger,
            access_log=False,
            default_headers=connection.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=connection.expect_100_continue,
            keep_alive=keep_alive,
            on_response=connection.on_response_complete,
        )
        self._wire = wire
        self._fault: ApplianceError | None = None
        self._left: int | None = None  # bytes of the body that are still to come; None: as many as do

    def fail(self, error: ApplianceError) -> None:
        """The rest of the body will not come."""
        self._fault, self.keep_alive = error, False
        self.message_event.set()

    async def receive(self) -> ASGIReceiveEvent:
        event = await super().receive()
        if self._fault is not None and event["type"] == "http.request":
            raise self._fault
        return event

    async def send(self, message: ASGISendEvent) -> None:
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected:
            await asyncio.sleep(0)  # an app that only sends would never let go of the event loop
        elif message["type"] == "http.response.start" and not self.response_started:
            self._begin(message["status"], list(message.get("headers", ())))
        elif message["type"] == "http.response.body" and self.response_started and not self.response_complete:
            self._go_on(message.get("body", b""), message.get("more_body", False))
        else:
            raise RuntimeError(f"The app sent {message['type']} at the wrong time.")

    def _begin(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """The head. How the body ends: after the announced length, by chunks, or (HTTP/1.0) with the connection."""
        if self.waiting_for_100_continue:
            self.keep_alive = False  # the peer may or may not send its body now
        self.response_started, self.waiting_for_100_continue = True, False
        self.chunked_encoding = False
        for name, value in headers:
            if name == b"content-length":
                self._left = int(value)
            elif name == b"connection" and b"close" in value.lower():
                self.keep_alive = False
        if self.scope["method"] == "HEAD" or status in (204, 304):
            self._left = 0
        elif self._left is None and self.scope["http_version"] != "1.0":
            self.chunked_encoding = True
            headers.append((b"transfer-encoding", b"chunked"))
        if not self.keep_alive and (b"connection", b"close") not in headers:
            headers = [h for h in headers if h[0] != b"connection"] + [(b"connection", b"close")]
        lines = b"".join([b"%b: %b\r\n" % header for header in (*self.default_headers, *headers)])
        if lines.count(b"\n") + lines.count(b"\r") != 2 * (len(self.default_headers) + len(headers)) or b"\0" in lines:
            raise RuntimeError("A header of the answer holds control characters.")
        self._wire.hold(STATUS_LINE[status] + lines + b"\r\n")

    def _go_on(self, body: bytes, more: bool) -> None:
        if self.scope["method"] == "HEAD":
            body = b""
        elif self._left is not None:
            self._left -= len(body)
            if self._left < 0 or (self._left and not more):
                raise RuntimeError("The answer's body is not as long as was announced.")
        elif self.chunked_encoding:
            body = (b"%x\r\n%b\r\n" % (len(body), body) if body else b"") + (b"" if more else b"0\r\n\r\n")
        self._wire.write(body)
        if not more:
            self.response_complete = True
            self.message_event.set()
            if not self.keep_alive:
                self._wire.close()
            self.on_response()

    async def run_asgi(self, app: ASGI3Application) -> None:
        try:
            await app(self.scope, self.receive, self.send)
        except asyncio.CancelledError:
            await self._end(Draining("The server is stopping and could not finish this.", retry_after=5))
        except Exception:
            log.error("an answer broke off", exc_info=not self.response_started)  # else the guard has logged it
            await self._end(InternalError("Something went wrong here; the log has it."))
        else:
            if not self.response_complete and not self.disconnected:
                log.error("the app left an answer incomplete")
                await self._end(InternalError("Something went wrong here; the log has it."))
        finally:
            self.on_response = lambda: None  # breaks the circle of references

    async def _end(self, error: ApplianceError) -> None:
        """Answers `error` if nothing was said yet; an answer that has begun is cut where it is."""
        self.keep_alive = False
        if self.response_started or self.disconnected:
            self.transport.close()
            return
        request_id = self.scope.get("state", {}).get("request_id") or new_request_id()
        body = error_body(error, request_id, self.scope["path"])
        headers = [
            *error_headers(error),
            (b"content-length", b"%d" % len(body)),
            (b"x-request-id", request_id.encode()),
        ]
        status = error_status(error, self.scope["path"])
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body, "more_body": False})
