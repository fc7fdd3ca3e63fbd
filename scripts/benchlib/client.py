"""A light streaming client over raw sockets. While a call runs it only notes which bytes came when; reading them comes
afterwards.

Owns HTTP and the two dialects (ours, and the peer's OpenAI one); knows no scenario and no statistics.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

LONGEST_HEAD = 65_536
DEFAULT_SECONDS = 300.0


class BenchError(Exception):
    """The benchmark cannot go on, or a figure would be wrong; the message is one sentence."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn, said in full to both servers so that no default differs."""

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05


@dataclass(frozen=True, slots=True)
class Ask:
    """One chat call. It always runs to `max_tokens`: end tokens are ignored."""

    user: str
    max_tokens: int
    system: str = ""
    seed: int = 0
    sampling: Sampling = field(default_factory=Sampling)

    def messages(self) -> list[dict[str, str]]:
        turns = [{"role": "system", "content": self.system}] if self.system else []
        return [*turns, {"role": "user", "content": self.user}]


@dataclass(frozen=True, slots=True)
class Usage:
    """What the server says it computed."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a server is asked and how its events read. `text_mark` is in every event with text, and in no other."""

    path: str
    text_mark: bytes
    body: Callable[[Ask], dict[str, Any]]
    text: Callable[[dict[str, Any]], str]
    usage: Callable[[dict[str, Any]], Usage | None]


def _common(ask: Ask) -> dict[str, Any]:
    return {
        "messages": ask.messages(),
        "max_tokens": ask.max_tokens,
        "temperature": ask.sampling.temperature,
        "top_k": ask.sampling.top_k,
        "top_p": ask.sampling.top_p,
        "min_p": ask.sampling.min_p,
        "seed": ask.seed,
        "stream": True,
        "ignore_eos": True,
    }


def _openai_text(event: dict[str, Any]) -> str:
    choices = event.get("choices") or [{}]
    return choices[0].get("delta", {}).get("content") or ""


def _usage(event: dict[str, Any]) -> Usage | None:
    usage = event.get("usage")
    if not usage:
        return None
    cached = usage.get("cached_tokens", (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0))
    return Usage(usage["prompt_tokens"], usage["completion_tokens"], cached)


APPLIANCE = Dialect(
    path="/llm/chat",
    text_mark=b'"delta":"',
    body=_common,
    text=lambda event: event.get("delta") or "",
    usage=_usage,
)
OPENAI = Dialect(
    path="/v1/chat/completions",
    text_mark=b'"content":"',
    body=lambda ask: {**_common(ask), "stream_options": {"include_usage": True}},
    text=_openai_text,
    usage=_usage,
)


@dataclass(frozen=True, slots=True)
class Target:
    """Where calls go. The key is sent and never shown."""

    port: int
    dialect: Dialect
    key: str = field(default="", repr=False)
    host: str = "127.0.0.1"

    def with_key(self, key: str) -> Target:
        return Target(self.port, self.dialect, key, self.host)


@dataclass(frozen=True, slots=True)
class Reply:
    """A call as it went; times are `time.perf_counter` seconds. `texts` has the arrival of every piece of text."""

    status: int
    sent: float
    ended: float
    texts: tuple[float, ...]
    usage: Usage | None
    error: str = ""

    @property
    def first_text(self) -> float:
        """Seconds from the request to the first piece of text."""
        if not self.texts:
            raise BenchError(f"A call brought no text (status {self.status}: {self.error or 'no error given'}).")
        return self.texts[0] - self.sent

    @property
    def seconds(self) -> float:
        return self.ended - self.sent

    def tokens(self, asked: int) -> int:
        """Tokens by the server's own count. Raises BenchError unless the call ended well and in full length."""
        if self.status != 200 or self.error or self.usage is None:
            raise BenchError(f"A call failed with status {self.status}: {self.error or 'no answer'}.")
        if self.usage.completion_tokens != asked:
            raise BenchError(f"A call brought {self.usage.completion_tokens} tokens instead of {asked}.")
        return asked


class Call:
    """One call. `run` sends it and reads to its end; `reply` may be read after that, also when `run` was cancelled."""

    def __init__(self, target: Target, ask: Ask) -> None:
        self.target = target
        self.ask = ask
        self.begun = asyncio.Event()  # the first text came
        self.sent = self.ended = 0.0
        self._reads: list[tuple[float, bytes]] = []
        self._failure = ""
        self._hung_up = False  # by us

    async def run(self, seconds: float = DEFAULT_SECONDS) -> None:
        """Never raises for what the server does: `reply` tells it. At most `seconds`."""
        self.sent = time.perf_counter()
        try:
            async with asyncio.timeout(seconds):
                await self._exchange()
        except asyncio.CancelledError:
            self._hung_up = True
            raise
        except TimeoutError:
            self._failure = f"no end within {seconds:.0f} s"
        except OSError as error:
            self._failure = f"the connection broke ({error.strerror or error})"
        finally:
            self.ended = time.perf_counter()

    async def _exchange(self) -> None:
        reader, writer = await asyncio.open_connection(self.target.host, self.target.port)
        try:
            self.sent = time.perf_counter()
            writer.write(request_bytes(self.target, json.dumps(self.target.dialect.body(self.ask)).encode()))
            await writer.drain()
            mark = self.target.dialect.text_mark
            while data := await reader.read(65_536):
                self._reads.append((time.perf_counter(), data))
                if mark in data:
                    self.begun.set()
        finally:
            writer.close()

    def reply(self) -> Reply:
        status, body = split_head(self._reads)
        if status != 200:
            text = b"".join(data for _, data in body)
            return Reply(status, self.sent, self.ended, (), None, self._failure or text[:300].decode(errors="replace"))
        dialect = self.target.dialect
        texts: list[float] = []
        usage, error = None, self._failure
        for when, event in events(body):
            if dialect.text(event):
                texts.append(when)
            usage = dialect.usage(event) or usage
            error = error or (json.dumps(event)[:300] if "error" in event else "")
        if usage is None and not error and not self._hung_up:
            error = f"the stream ended early, after {len(texts)} texts and {sum(len(d) for _, d in body)} bytes"
        return Reply(status, self.sent, self.ended, tuple(texts), usage, error)


def request_bytes(target: Target, body: bytes) -> bytes:
    """The whole HTTP request for `body`, a JSON document."""
    lines = [
        f"POST {target.dialect.path} HTTP/1.1",
        f"Host: {target.host}:{target.port}",
        "Content-Type: application/json",
        "Connection: close",
        f"Content-Length: {len(body)}",
    ]
    if target.key:
        lines.append(f"Authorization: Bearer {target.key}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


Reads = list[tuple[float, bytes]]


def split_head(reads: Reads) -> tuple[int, Reads]:
    """The status (0 when no whole head came) and the body's bytes, free of chunked framing, with their times."""
    head = b""
    for at, (when, data) in enumerate(reads):
        head += data
        start, mark, rest = head.partition(b"\r\n\r\n")
        if mark:
            body = [(when, rest), *reads[at + 1 :]]
            chunked = b"transfer-encoding: chunked" in start.lower()
            return int(start.split(b" ", 2)[1]), list(_unchunk(body)) if chunked else body
        if len(head) > LONGEST_HEAD:
            break
    return 0, []


def _unchunk(reads: Reads) -> Iterator[tuple[float, bytes]]:
    """Takes the sizes out of a chunked body; a piece has the time at which its bytes came."""
    pending, left = b"", 0  # left: bytes of the present chunk still to come
    for when, data in reads:
        pending += data
        while pending:
            if left > 0:
                piece, pending = pending[:left], pending[left:]
                left -= len(piece)
                yield when, piece
                continue
            line, mark, rest = pending.lstrip(b"\r\n").partition(b"\r\n")
            if not mark:
                break
            left, pending = int(line.split(b";")[0], 16), rest
            if not left:
                return


def events(body: Iterable[tuple[float, bytes]]) -> Iterator[tuple[float, dict[str, Any]]]:
    """The JSON objects of an event stream, each with the time at which its line was complete."""
    pending = b""
    for when, data in body:
        pending += data
        *lines, pending = pending.split(b"\n")
        for line in lines:
            if line.startswith((b"data:", b"error:")) and b"[DONE]" not in line[:16]:
                value = json.loads(line.partition(b":")[2])
                yield when, value if isinstance(value, dict) else {}


async def together(calls: Iterable[Call], seconds: float = DEFAULT_SECONDS) -> list[Reply]:
    """Runs the calls at the same time; their replies in the same order."""
    calls = list(calls)
    await asyncio.gather(*(call.run(seconds) for call in calls))
    return [call.reply() for call in calls]


async def get(target: Target, path: str, seconds: float = 2.0) -> tuple[int, dict[str, Any]]:
    """A JSON page: status and body; (0, {}) while nobody listens or answers."""
    head = f"GET {path} HTTP/1.1\r\nHost: {target.host}:{target.port}\r\nConnection: close\r\n\r\n"
    try:
        async with asyncio.timeout(seconds):
            reader, writer = await asyncio.open_connection(target.host, target.port)
            try:
                writer.write(head.encode())
                answer = await reader.read()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return 0, {}
    status, body = split_head([(0.0, answer)])
    try:
        value = json.loads(b"".join(data for _, data in body) or b"{}")
    except ValueError:
        value = {}
    return status, value if isinstance(value, dict) else {}
