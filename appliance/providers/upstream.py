"""A server elsewhere that speaks OpenAI's API: Groq, or any that an administrator names. Streams, counts what leaves.

Owns the connection, its time limits, its one retry, and what the server says about its own limits. Whether anything may
leave the box is decided above. Nothing of what a server says reaches a caller, nor does its key: errors are ours.
"""

from __future__ import annotations

import asyncio
import email.utils
import logging
import random
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec
from msgspec import Struct

from appliance.errors import ApplianceError, BadRequest, Unavailable
from appliance.messages import Chunk, CompletionRequest, FinishReason, Meter, Usage

log = logging.getLogger("appliance.upstream")

LONGEST_EVENT = 1_048_576  # bytes
LARGEST_ANSWER = 67_108_864  # bytes
LARGEST_ERROR = 65_536  # bytes of an error's body that are read
CONNECTIONS = 256
FAILURES = 5  # in a row, after which it is left alone
REST_SECONDS = 60.0
USUAL_WAIT = 60  # seconds, where a refusal names none
LONGEST_WAIT = 3_600
RETRY_SECONDS = (0.1, 0.4)
PASSING = {498, 500, 502, 503, 504}  # what may go well a moment later; 498 is Groq's "no capacity"
END_SECONDS = 0.2  # after the last event the end of the response comes at once, or never
DONE = b"[DONE]"
TOKEN_BYTES = 4  # about, where a server counts no tokens

_DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m(?!s))?(?:(\d+(?:\.\d+)?)s)?(?:(\d+)ms)?")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a server is, the `model` that is asked there, and how long it may take, in seconds: to connect, to the
    first event, between two of them, and for all of it."""

    name: str
    base_url: str
    model: str
    key: str = field(default="", repr=False)
    aliases: Mapping[str, str] = field(default_factory=dict)
    connect_seconds: float = 5.0
    first_seconds: float = 60.0
    gap_seconds: float = 30.0
    total_seconds: float = 600.0


class _Failed(Exception):
    """It did not work, and another try may."""


class _Delta(Struct):
    content: str | None = None


class _Choice(Struct):
    index: int = 0
    delta: _Delta = msgspec.field(default_factory=_Delta)
    finish_reason: str | None = None


class _Details(Struct):
    cached_tokens: int | None = None


class _Usage(Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Event(Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


class Upstream:
    """Answers from elsewhere. One per server; its limits are shared by all calls."""

    def __init__(
        self, place: Place, transport: httpx.AsyncBaseTransport | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self.place = place
        limits = httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS)
        self._transport = transport or httpx.AsyncHTTPTransport(limits=limits)
        self._url = httpx.URL(f"{place.base_url.rstrip('/')}/chat/completions")
        self._headers = [("Host", self._url.netloc.decode()), ("Content-Type", "application/json")]
        self._headers += [("Accept", "text/event-stream"), ("Accept-Encoding", "identity")]
        if place.key:
            self._headers.append(("Authorization", f"Bearer {place.key}"))
        self._clock = clock
        self._failures = 0
        self._closed_until = 0.0
        self._why_closed = ""
        self._trying = False  # one call finds out whether it works again

    @property
    def name(self) -> str:
        return self.place.name

    @property
    def destination(self) -> str:
        """Its name and where it is, for the ledger."""
        return f"{self.name} {self._url.netloc.decode()}"

    def model_for(self, request: CompletionRequest) -> str:
        """The one that is set; what was asked for only where an alias knows it."""
        return self.place.aliases.get(request.model, self.place.model)

    @property
    def refusal(self) -> Unavailable | None:
        """Why it cannot be asked now; None when it can."""
        left = self._closed_until - self._clock()
        if left > 0:
            return Unavailable(f"{self.name} {self._why_closed}.", retry_after=max(1, round(left)))
        if self._failures >= FAILURES and self._trying:
            return Unavailable(f"{self.name} does not answer.", retry_after=1)
        return None

    async def close(self) -> None:
        await self._transport.aclose()

    async def complete(self, request: CompletionRequest) -> AsyncGenerator[Chunk]:
        """See `Provider.complete`. Raises Unavailable where the server is at fault, BadRequest where the request is."""
        if (refusal := self.refusal) is not None:
            raise refusal
        self._trying = self._failures >= FAILURES
        deadline = time.monotonic() + self.place.total_seconds
        body = msgspec.json.encode(_payload(request, self.model_for(request)))
        response: httpx.Response | None = None
        reading = _Reading()
        try:
            response = await self._open(request, body, deadline)
            async for chunk in self._chunks(request, response, deadline, reading):
                yield chunk
        except ApplianceError:
            raise
        except Exception as error:  # whatever a server says or does, it is not the caller's fault, nor ours
            raise self._fail(error, reading) from None
        finally:
            self._trying = False
            if reading.began:
                _read_meter(request, reading)
            if response is not None:
                await response.aclose()

    # ── asking ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def _open(self, request: CompletionRequest, body: bytes, deadline: float) -> httpx.Response:
        """The answer's beginning, at the second try if the first fails in passing."""
        try:
            return await self._post(request, body, deadline)
        except (_Failed, httpx.TransportError) as error:
            pause = random.uniform(*RETRY_SECONDS)
            if time.monotonic() + pause >= deadline:
                raise
            log.info("%s failed and is asked once more: %s", self.name, _reason(error))
            await asyncio.sleep(pause)
            return await self._post(request, body, deadline)

    async def _post(self, request: CompletionRequest, body: bytes, deadline: float) -> httpx.Response:
        phases = {"connect": self.place.connect_seconds, "pool": self.place.connect_seconds}
        asked = httpx.Request(
            "POST", self._url, headers=[*self._headers, ("Content-Length", str(len(body)))],
            stream=_Leaving(body, request.meter), extensions={"timeout": phases | {"read": None, "write": None}},
        )  # fmt: skip
        async with asyncio.timeout(min(self.place.first_seconds, deadline - time.monotonic())):
            response = await self._transport.handle_async_request(asked)
            try:
                if response.status_code != 200:
                    raise await self._refused(request, response)
                self._heed(response.headers)
            except BaseException:
                await response.aclose()
                raise
        return response

    def _heed(self, headers: httpx.Headers) -> None:
        """What the server says is left for us."""
        for kind in ("requests", "tokens"):
            if headers.get(f"x-ratelimit-remaining-{kind}", "").strip() == "0":
                wait = _duration(headers.get(f"x-ratelimit-reset-{kind}", ""))
                self._close(wait, f"has no {kind} left for this box")

    async def _refused(self, request: CompletionRequest, response: httpx.Response) -> Exception:
        """What an error status means for us; the log says what the server said of it."""
        status = response.status_code
        code = _code(await _start(request, response, LARGEST_ERROR))
        log.warning("%s answered %d (%s)", self.name, status, code or "no code")
        if status == 429:
            self._close(_retry_after(response.headers.get("retry-after", "")), "has no room for this box now")
            return self.refusal or Unavailable(f"{self.name} has no room for this box now.")
        if status in PASSING:
            return _Failed(f"status {status}")
        self._failures = 0  # it is there, and says so
        if status in (401, 403):
            log.error("%s refuses this box's key: see its file or environment variable", self.name)
            return Unavailable(f"{self.name} does not let this box in.")
        if status == 404 or code in ("model_not_found", "model_decommissioned"):
            log.error("%s has no model %s: choose another in the settings", self.name, self.model_for(request))
            return Unavailable(f"{self.name} does not have the model that is set here.")
        if status == 413:
            return BadRequest(f"The conversation is too long for {self.name}.")
        if 400 <= status < 500:
            return BadRequest(f"{self.name} does not take this request.")
        return _Failed(f"status {status}")

    def _fail(self, error: Exception, reading: _Reading) -> ApplianceError:
        """What a failure means: a server whose answer had begun, or that we had no connection left for, is not down."""
        log.warning("%s failed: %s", self.name, _reason(error))
        if not reading.began and not isinstance(error, httpx.PoolTimeout):
            self._failures += 1
        if self._failures >= FAILURES:
            self._close(REST_SECONDS, "does not answer")
        return Unavailable(f"{self.name} {_told(error)}.", retry_after=5)

    def _close(self, seconds: float, why: str) -> None:
        self._closed_until, self._why_closed = self._clock() + seconds, why

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def _chunks(
        self, request: CompletionRequest, response: httpx.Response, deadline: float, reading: _Reading
    ) -> AsyncGenerator[Chunk]:
        """The answer's pieces. The last one is held back until the usage is known."""
        if "text/event-stream" not in response.headers.get("content-type", ""):
            raise _Failed("it sent no event stream")
        ends = dict[int, FinishReason]()
        events = _events(request, response)
        within = self.place.first_seconds
        while True:
            async with asyncio.timeout(min(within, deadline - time.monotonic())):
                data = await anext(events, DONE)
            within = self.place.gap_seconds
            if data == DONE:
                break
            event = msgspec.json.decode(data, type=_Event)
            if event.error is not None:
                raise _Failed("it sent an error in the stream")
            reading.usage = event.usage or reading.usage
            for choice in event.choices:
                if not 0 <= choice.index < request.n:
                    raise _Failed("it sent a choice that was not asked for")
                if choice.delta.content:
                    self._failures = 0
                    reading.pieces += 1
                    yield Chunk(choice.delta.content, choice.index)
                if choice.finish_reason:
                    ends[choice.index] = "length" if choice.finish_reason == "length" else "stop"
        if len(ends) < request.n:
            raise _Failed("its answer broke off")
        self._failures = 0
        await _read_out(events)
        counted = _usage(reading, request)
        for index, reason in sorted(ends.items()):
            yield Chunk("", index, reason, counted if index == request.n - 1 else None)


@dataclass(slots=True)
class _Reading:
    """How far an answer has come."""

    pieces: int = 0
    usage: _Usage | None = None

    @property
    def began(self) -> bool:
        return self.pieces > 0 or self.usage is not None


class _Leaving(httpx.AsyncByteStream):
    """A body on its way out, counted as it goes."""

    def __init__(self, body: bytes, meter: Meter) -> None:
        self._body = body
        self._meter = meter

    async def __aiter__(self) -> AsyncIterator[bytes]:
        self._meter.bytes_out += len(self._body)
        yield self._body


async def _read_out(events: AsyncGenerator[bytes]) -> None:
    """To the end of the response, which follows at once, so that its connection can be used again."""
    try:
        async with asyncio.timeout(END_SECONDS):
            async for _ in events:
                pass
    except (TimeoutError, httpx.HTTPError, _Failed):
        pass


def _payload(request: CompletionRequest, model: str) -> dict[str, Any]:
    """OpenAI's body for a request; what a server may not know is left out where it is as usual."""
    s = request.sampling
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": m.role, "content": m.content} for m in request.messages],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    optional: dict[str, Any] = {
        "temperature": s.temperature if "temperature" in request.said else None,
        "top_p": s.top_p if "top_p" in request.said else None,
        "max_tokens": request.max_tokens,
        "stop": list(request.stop) or None,
        "seed": s.seed,
        "frequency_penalty": s.frequency_penalty or None,
        "presence_penalty": s.presence_penalty or None,
        "n": request.n if request.n > 1 else None,
    }
    if request.json_schema is not None:
        schema = {"name": "answer", "schema": request.json_schema}
        optional["response_format"] = {"type": "json_schema", "json_schema": schema}
    return body | {name: value for name, value in optional.items() if value is not None}


async def _events(request: CompletionRequest, response: httpx.Response) -> AsyncGenerator[bytes]:
    """The `data` of every event (WHATWG's server-sent events; ours have one line each)."""
    held = b""
    async for piece in _counted(request, response):
        held += piece
        *lines, held = held.split(b"\n")
        if len(held) > LONGEST_EVENT:
            raise _Failed("it sent an endless line")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


async def _counted(request: CompletionRequest, response: httpx.Response) -> AsyncIterator[bytes]:
    assert isinstance(response.stream, httpx.AsyncByteStream)
    size = 0
    async for piece in response.stream:
        size += len(piece)
        request.meter.bytes_in += len(piece)
        if size > LARGEST_ANSWER:
            raise _Failed("its answer has no end")
        yield piece


async def _start(request: CompletionRequest, response: httpx.Response, most: int) -> bytes:
    """The first bytes of a body; whatever goes wrong with it, they will do."""
    found = b""
    try:
        async for piece in _counted(request, response):
            found += piece
            if len(found) >= most:
                break
    except httpx.HTTPError:
        pass
    return found[:most]


def _code(body: bytes) -> str:
    """The code in an error's body, for the log and for choosing ours; empty where there is none."""
    try:
        error = msgspec.json.decode(body)["error"]
        code = error.get("code") or error.get("type")
    except (msgspec.DecodeError, KeyError, TypeError, AttributeError):
        return ""
    return code[:60] if isinstance(code, str) and re.fullmatch(r"[\w.-]+", code[:60]) else ""


def _retry_after(value: str) -> float:
    """Seconds that a refusal asks for: a number or a date (RFC 9110, 10.2.3), held within bounds."""
    try:
        seconds = float(value)
    except ValueError:
        seconds = _until(value)
    return min(max(1.0, seconds), LONGEST_WAIT) if seconds == seconds else USUAL_WAIT


def _until(date: str) -> float:
    try:
        found = email.utils.parsedate_tz(date)
        return USUAL_WAIT if found is None else email.utils.mktime_tz(found) - time.time()
    except (ValueError, OverflowError):  # the year 99999
        return USUAL_WAIT


def _duration(value: str) -> float:
    """Seconds of one of Go's durations such as `2m59.56s`, held within bounds."""
    match = _DURATION.fullmatch(value.strip())
    if match is None or not any(match.groups()):
        return _retry_after(value)
    hours, minutes, seconds, thousandths = (float(part or 0) for part in match.groups())
    return min(max(1.0, 3_600 * hours + 60 * minutes + seconds + thousandths / 1e3), LONGEST_WAIT)


def _usage(reading: _Reading, request: CompletionRequest) -> Usage:
    """What the server counted; else about what it must have been."""
    if (found := reading.usage) is not None:
        details = found.prompt_tokens_details
        cached = (details.cached_tokens or 0) if details else 0
        return Usage(max(0, found.prompt_tokens), max(0, found.completion_tokens), max(0, cached))
    size = sum(len(m.content.encode()) for m in request.messages)
    return Usage(max(1, size // TOKEN_BYTES), reading.pieces)


def _read_meter(request: CompletionRequest, reading: _Reading) -> None:
    """Also what was broken off has been paid for."""
    counted, meter = _usage(reading, request), request.meter
    meter.prompt_tokens, meter.completion_tokens = counted.prompt_tokens, counted.completion_tokens
    meter.cached_tokens = counted.cached_tokens


def _told(error: Exception) -> str:
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return "cannot be reached"
    if isinstance(error, TimeoutError | httpx.TimeoutException):
        return "did not answer in time"
    return "did not answer as it should"


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, _Failed) else type(error).__name__
