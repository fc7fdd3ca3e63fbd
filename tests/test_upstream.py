"""Servers elsewhere: what is sent, what is made of what they answer, and how long they may take over it.

Answers come from `httpx.MockTransport`; where time matters, from a real server on loopback that misbehaves.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import httpx
import pytest

from appliance.errors import ApplianceError, BadRequest, Unavailable
from appliance.messages import Chunk, CompletionRequest, Message, Meter, Sampling
from appliance.providers import upstream as upstreams
from appliance.providers.upstream import FAILURES, Place, Upstream

KEY = "gsk_the-key-of-this-box"
SECRET = "what-the-server-said"
Handler = Callable[[httpx.Request], Awaitable[httpx.Response]]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstreams, "RETRY_SECONDS", (0.0, 0.0))


def chunk(text: str | None = None, finish: str | None = None, index: int = 0, **more: Any) -> bytes:
    delta = {} if text is None else {"content": text}
    body = {"id": "x", "choices": [{"index": index, "delta": delta, "finish_reason": finish}], "x_groq": {"id": "r"}}
    return b"data: " + json.dumps(body | more).encode() + b"\n\n"


USAGE = {"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 3}, "queue_time": 0.1}
GOOD = (
    chunk("Hel")
    + chunk("lo")
    + chunk(finish="stop")
    + b'data: {"choices": [], "usage": %b}\n\n' % json.dumps(USAGE).encode()
)
DONE = b"data: [DONE]\n\n"


class Script:
    """A server that gives these answers one after the other, the last one for ever; what came is kept."""

    def __init__(self, *answers: tuple[int, bytes] | tuple[int, bytes, dict[str, str]] | Exception) -> None:
        self.answers = list(answers)
        self.asked: list[httpx.Request] = []

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        status, body, headers = (*answer, {})[:3]
        kind = {"content-type": "text/event-stream" if status == 200 else "application/json"}

        async def pieces() -> AsyncIterator[bytes]:
            for at in range(0, len(body), 7_000):  # whatever the pieces
                yield body[at : at + 7_000]

        return httpx.Response(status, headers=kind | headers, content=pieces())


def at(script: Handler, clock: Callable[[], float] = time.time, **place: Any) -> Upstream:
    where = Place("groq", "http://groq.test/openai/v1/", "m-1", KEY, {"old": "new"}, **place)
    transport: Any = script
    return Upstream(where, httpx.MockTransport(transport), clock)


def request(**fields: Any) -> CompletionRequest:
    return CompletionRequest((Message("system", "Be brief."), Message("user", "Hé")), "acc", meter=Meter(), **fields)


def ask(upstream: Upstream, asked: CompletionRequest | None = None) -> list[Chunk]:
    async def chunks() -> list[Chunk]:
        return [c async for c in upstream.complete(asked or request())]

    return asyncio.run(chunks())


def refused(upstream: Upstream) -> ApplianceError:
    with pytest.raises(ApplianceError) as caught:
        ask(upstream)
    assert SECRET not in caught.value.message and KEY not in str(caught.value) + repr(upstream.place)
    return caught.value


def test_a_completion_is_asked_for_as_openai_wants_it() -> None:
    script = Script((200, GOOD + DONE))
    sampling = Sampling(temperature=0.3, top_p=0.9, seed=5, presence_penalty=0.5)
    said = frozenset({"temperature", "top_p"})
    asked = request(
        sampling=sampling, max_tokens=9, stop=("x",), json_schema={"type": "object"}, model="old", said=said
    )
    chunks = ask(at(script), asked)
    [sent] = script.asked
    assert str(sent.url) == "http://groq.test/openai/v1/chat/completions" and sent.method == "POST"
    assert sent.headers["authorization"] == f"Bearer {KEY}" and sent.headers["host"] == "groq.test"
    assert json.loads(sent.content) == {
        "model": "new",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hé"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.3,
        "top_p": 0.9,
        "max_tokens": 9,
        "stop": ["x"],
        "seed": 5,
        "presence_penalty": 0.5,
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "object"}}},
    }
    assert [c.text for c in chunks] == ["Hel", "lo", ""] and chunks[-1].finish_reason == "stop"
    assert chunks[-1].usage and (chunks[-1].usage.prompt_tokens, chunks[-1].usage.cached_tokens) == (5, 3)
    meter = asked.meter
    assert (meter.prompt_tokens, meter.completion_tokens, meter.seconds) == (5, 2, 0.0)
    assert meter.bytes_out == len(sent.content) and meter.bytes_in == len(GOOD + DONE)


def test_what_a_request_does_not_say_is_left_to_the_server() -> None:
    script = Script((200, GOOD + DONE))
    ask(at(script), request(sampling=Sampling(temperature=0.0)))  # as the model here likes it
    assert not {"temperature", "top_p", "seed"} & set(json.loads(script.asked[0].content))


def test_an_answer_that_is_broken_off_has_been_paid_for() -> None:
    async def leave(asked: CompletionRequest) -> None:
        chunks = at(Script((200, GOOD + DONE))).complete(asked)
        await anext(chunks)
        await chunks.aclose()

    asked = request()
    asyncio.run(leave(asked))
    assert asked.meter.prompt_tokens > 0 and asked.meter.completion_tokens == 1
    asked = request()
    with pytest.raises(Unavailable):
        ask(at(Script((200, chunk("Hel") + chunk("lo")))), asked)
    assert asked.meter.completion_tokens == 2


def test_several_choices_and_a_server_that_counts_nothing_and_says_no_done() -> None:
    body = chunk("a") + chunk("b", index=1) + chunk(finish="length", index=1) + chunk(finish="stop")
    chunks = ask(at(Script((200, body))), request(n=2))
    assert [(c.index, c.text, c.finish_reason) for c in chunks] == [
        (0, "a", None),
        (1, "b", None),
        (0, "", "stop"),
        (1, "", "length"),
    ]
    assert chunks[-1].usage and chunks[-1].usage.completion_tokens == 2, "estimated"
    assert [c.usage for c in chunks[:-1]] == [None] * 3


def test_what_fails_in_passing_is_asked_once_more() -> None:
    for failure in (
        (500, b"{}"),
        (498, b"{}"),
        (503, SECRET.encode()),
        httpx.ConnectError("no"),
        httpx.ReadError("reset"),
    ):
        script = Script(failure, (200, GOOD + DONE))
        assert ask(at(script))[0].text == "Hel" and len(script.asked) == 2
    script = Script((502, b"<html>"))
    assert isinstance(refused(at(script)), Unavailable) and len(script.asked) == 2


@pytest.mark.parametrize(
    ("status", "body", "kind", "times"),
    [
        (401, {"error": {"message": SECRET, "code": "invalid_api_key"}}, Unavailable, 1),
        (403, {"error": SECRET}, Unavailable, 1),
        (404, {"error": {"message": SECRET, "code": "model_not_found"}}, Unavailable, 1),
        (400, {"error": {"message": SECRET, "code": "model_decommissioned"}}, Unavailable, 1),
        (400, {"error": {"message": SECRET}}, BadRequest, 1),
        (422, {"detail": SECRET}, BadRequest, 1),
        (413, {"error": {"message": SECRET, "code": "rate_limit_exceeded"}}, BadRequest, 1),
        (429, {"error": {"message": SECRET}}, Unavailable, 1),
        (500, {"error": {"message": SECRET}}, Unavailable, 2),
        (302, {}, Unavailable, 2),
    ],
)
def test_every_status_becomes_one_of_ours(status: int, body: Any, kind: type[ApplianceError], times: int) -> None:
    script = Script((status, json.dumps(body).encode()))
    assert type(refused(at(script))) is kind and len(script.asked) == times


@pytest.mark.parametrize(
    ("value", "least", "most"),
    [
        ("7", 7, 7), (None, 60, 60), ("abc", 60, 60), ("-1", 1, 1), ("1000000000", 3_600, 3_600), ("nan", 60, 60),
        ("Mon, 01 Jan 99999 00:00:00 GMT", 60, 60),
        ("in 100 s", 97, 101), ("Mon, 01 Jan 2001 00:00:00 GMT", 1, 1),
    ],
)  # fmt: skip
def test_a_server_that_has_no_room_is_left_alone_as_long_as_it_says(value: str | None, least: int, most: int) -> None:
    now = [1_000.0]
    if value == "in 100 s":
        value = email.utils.formatdate(time.time() + 100, usegmt=True)
    script = Script((429, b"{}", {} if value is None else {"retry-after": value}), (200, GOOD + DONE))
    groq = at(script, lambda: now[0])
    assert least <= (refused(groq).retry_after or 0) <= most
    again = refused(groq)
    assert least <= (again.retry_after or 0) <= most and len(script.asked) == 1, "not asked meanwhile"
    now[0] += most + 1
    assert groq.refusal is None and ask(groq)


@pytest.mark.parametrize(
    ("reset", "seconds"), [("2m59.56s", 180), ("7.66s", 8), ("250ms", 1), ("1h", 3_600), ("1h1m", 3_600), ("x", 60)]
)
def test_a_limit_that_is_used_up_is_heeded_before_it_is_hit(reset: str, seconds: int) -> None:
    headers = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": reset}
    groq = at(Script((200, GOOD + DONE, headers)), lambda: 1_000.0)
    assert ask(groq), "this one is answered"
    assert groq.refusal is not None and groq.refusal.retry_after == seconds


def test_a_server_that_fails_again_and_again_is_left_alone_and_tried_by_one() -> None:
    now = [1_000.0]
    script = Script((500, b"{}"))
    groq = at(script, lambda: now[0])
    for _ in range(FAILURES):
        assert groq.refusal is None
        refused(groq)
    asked = len(script.asked)
    assert groq.refusal is not None and groq.refusal.retry_after == 60
    refused(groq)
    assert len(script.asked) == asked
    now[0] += 61
    refused(groq)
    assert len(script.asked) > asked and groq.refusal is not None, "still broken: another minute"
    now[0] += 61
    script.answers = [(200, GOOD + DONE)]
    assert ask(groq) and groq.refusal is None
    script.answers = [(500, b"{}")]
    refused(groq)
    assert groq.refusal is None, "one failure is none"
    for answer in ((404, b"{}"), (200, chunk("Hel"))):  # it is there, whatever it says
        script.answers = [answer]
        for _ in range(2 * FAILURES):
            refused(groq)
        assert groq.refusal is None, answer


def test_while_one_call_tries_a_broken_server_the_others_do_not() -> None:
    now, inside, go_on = [1_000.0], asyncio.Event(), asyncio.Event()
    script = Script((500, b"{}"))

    async def slow(request: httpx.Request) -> httpx.Response:
        if not script.answers[0] == (500, b"{}"):
            inside.set()
            await go_on.wait()
        return await script(request)

    groq = at(slow, lambda: now[0])
    for _ in range(FAILURES):
        refused(groq)
    now[0] += 61
    script.answers = [(200, GOOD + DONE)]

    async def both() -> None:
        first = asyncio.ensure_future(anext(groq.complete(request())))
        await inside.wait()
        assert groq.refusal is not None
        go_on.set()
        assert (await first).text == "Hel"

    asyncio.run(both())


BROKEN = {
    "cut short": GOOD[:40],
    "no end": chunk("Hel"),
    "half JSON": b'data: {"choices": [{"ind\n\n',
    "wrong types": b'data: {"choices": [{"index": 0, "delta": {"content": 5}}]}\n\n',
    "wrong shape": b'data: {"choices": "none"}\n\n',
    "a list": b"data: []\n\n",
    "not UTF-8": b'data: {"choices": [{"index": 0, "delta": {"content": "\xff"}}]}\n\n',
    "another choice": chunk("x", index=7),
    "an error": chunk("Hel") + b'data: {"error": {"message": "%b"}}\n\n' % SECRET.encode(),
    "an endless line": b"data: " + b"x" * 3_000_000,
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_answer_that_is_none_is_the_servers_fault(name: str) -> None:
    assert isinstance(refused(at(Script((200, BROKEN[name])))), Unavailable)


def test_a_page_instead_of_a_stream_and_an_answer_without_end_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script((200, b"<html>" + SECRET.encode(), {"content-type": "text/html"}))
    assert isinstance(refused(at(script)), Unavailable)
    monkeypatch.setattr(upstreams, "LARGEST_ANSWER", 1_000_000)
    script = Script((200, chunk("x" * 1_000) * 2_000))
    assert isinstance(refused(at(script)), Unavailable)


# ── over a real socket ───────────────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def listening(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[tuple[int, list[asyncio.StreamWriter]]]:
    """A server on loopback: its port, and the connections that came."""
    came: list[asyncio.StreamWriter] = []
    tasks: list[asyncio.Task[None]] = []

    async def guarded(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.append(writer)
        tasks.append(cast("asyncio.Task[None]", asyncio.current_task()))
        try:
            await serve(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(guarded, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], came
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0.05)


async def served(
    answer: Callable[[asyncio.StreamWriter], Awaitable[None]], **place: Any
) -> tuple[float, ApplianceError | None, int]:
    """Asks a server that answers like that: seconds it took, the error, and the connections that came."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await answer(writer)

    async with listening(serve) as (port, came):
        upstream = Upstream(Place("other", f"http://127.0.0.1:{port}/v1", "m", **place))
        started, error = time.monotonic(), None
        try:
            async for _ in upstream.complete(request()):
                pass
        except ApplianceError as found:
            error = found
        took = time.monotonic() - started
        await upstream.close()
    return took, error, len(came)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


def test_a_real_answer_over_a_real_socket() -> None:
    async def good(writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + GOOD + DONE)
        await writer.drain()

    _, error, came = asyncio.run(served(good))
    assert error is None and came == 1


def test_a_connection_is_used_again() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
            body = GOOD + DONE
            kind = b"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
            writer.write(b"HTTP/1.1 200 OK\r\n" + kind + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
            await writer.drain()

    async def three_times() -> int:
        async with listening(serve) as (port, came):
            upstream = Upstream(Place("other", f"http://127.0.0.1:{port}/v1", "m"))
            for _ in range(3):
                assert [c.text async for c in upstream.complete(request())] == ["Hel", "lo", ""]
            await upstream.close()
        return len(came)

    assert asyncio.run(three_times()) == 1


def test_a_server_that_hangs_is_given_up() -> None:
    async def hang(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(5)

    took, error, came = asyncio.run(served(hang, first_seconds=0.3))
    assert isinstance(error, Unavailable) and 0.3 <= took < 3 and came == 1


def test_a_server_that_drips_is_given_up_when_the_whole_takes_too_long() -> None:
    async def drip(writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD)
        for piece in [chunk("a")] + [b":"] * 50:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.1)

    took, error, _ = asyncio.run(served(drip, gap_seconds=5, total_seconds=1))
    assert isinstance(error, Unavailable) and 1 <= took < 3
    took, error, _ = asyncio.run(served(drip, gap_seconds=0.4, total_seconds=20))
    assert isinstance(error, Unavailable) and took < 3, "bytes that say nothing are no words"


def test_a_server_that_resets_in_mid_stream_is_at_fault() -> None:
    async def reset(writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + chunk("a"))
        await writer.drain()
        writer.transport.abort()

    _, error, came = asyncio.run(served(reset))
    assert isinstance(error, Unavailable) and came == 1, "nothing is asked twice once a word has come"


def test_nobody_there() -> None:
    async def never(writer: asyncio.StreamWriter) -> None:
        raise AssertionError

    async def ask_nobody() -> ApplianceError:
        server = await asyncio.start_server(lambda r, w: never(w), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        server.close()
        await server.wait_closed()
        asked = request()
        with pytest.raises(Unavailable) as error:
            await anext(Upstream(Place("other", f"http://127.0.0.1:{port}/v1", "m")).complete(asked))
        assert asked.meter.bytes_out == 0, "what never left is not counted as out"
        return error.value

    assert "other" in asyncio.run(ask_nobody()).message
