"""Every exception becomes one JSON answer of the seed's shape; and the access log around it."""

from __future__ import annotations

import asyncio
import errno
import io
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from appliance import errors, logs
from appliance.api.access_log import AccessLog
from appliance.api.guard import Guard
from appliance.errors import ApplianceError
from appliance.messages import Caller

SECRET = "/secret/path"
Headers = tuple[tuple[bytes, bytes], ...]
HEADERS: Headers = ()


def call(app: ASGIApp, *, method: str = "POST", path: str = "/x", headers: Headers = HEADERS) -> list[Message]:
    """What goes out for one request."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    scope = {
        "type": "http", "method": method, "path": path, "headers": list(headers), "client": ("192.0.2.1", 5),
        "app": app, "query_string": b"canary=1", "root_path": "", "http_version": "1.1",
    }  # fmt: skip
    asyncio.run(app(scope, receive, send))  # type: ignore[arg-type]
    return sent


def raising(error: BaseException, *first: Message) -> ASGIApp:
    """The layers around an app that sends `first` and then raises `error`."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in first:
            await send(message)
        raise error

    return AccessLog(Guard(app))


def body_of(sent: list[Message]) -> Any:
    return json.loads(b"".join(m.get("body", b"") for m in sent))


def headers_of(sent: list[Message]) -> dict[str, str]:
    pairs = [(k.decode(), v.decode()) for k, v in sent[0]["headers"]]
    assert len(dict(pairs)) == len(pairs), f"a header stands twice: {pairs}"
    return dict(pairs)


def every_error() -> list[ApplianceError]:
    """One of each class that a request may raise."""
    made: dict[type[ApplianceError], ApplianceError] = {
        errors.PromptTooLong: errors.PromptTooLong(9, 5),
        errors.Unauthorized: errors.Unauthorized(),
    }
    found = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, ApplianceError)]
    return [made.get(c) or c("It is so.") for c in found if not issubclass(c, errors.OperatorError) and c.status != 500]


@pytest.mark.parametrize("error", every_error(), ids=lambda e: type(e).__name__)
def test_every_error_is_answered_in_the_seeds_shape(error: ApplianceError) -> None:
    sent = call(raising(error))
    body, headers = body_of(sent), headers_of(sent)
    assert sent[0]["status"] == error.status
    assert (body["success"], body["error"], body["code"]) == (False, error.message, error.code)
    assert headers["x-request-id"] == body["request_id"]
    assert headers["content-type"] == "application/json" and headers["cache-control"] == "no-store"
    assert ("retry_after" in body) == ("retry-after" in headers) == (error.status == 503)


def test_the_errors_table_covers_the_seeds_codes() -> None:
    seeds = {(400, "BAD_REQUEST"), (401, "UNAUTHORIZED"), (403, "FORBIDDEN"), (404, "NOT_FOUND")}
    seeds |= {(429, "RATE_LIMIT_EXCEEDED"), (429, "MONTHLY_LIMIT_EXCEEDED"), (503, "SERVICE_UNAVAILABLE")}
    assert seeds <= {(e.status, e.code) for e in every_error()}


@pytest.mark.parametrize(("seconds", "told_off"), [(1, False), (60, False), (61, True)])
def test_retry_after_is_the_same_number_in_both_places(seconds: int, told_off: bool) -> None:
    sent = call(raising(errors.RateLimited("Too many.", retry_after=seconds)))
    assert body_of(sent)["retry_after"] == int(headers_of(sent)["retry-after"]) == seconds
    assert (headers_of(sent).get("x-should-retry") == "false") == told_off


def test_retry_after_is_only_on_429_and_503() -> None:
    sent = call(raising(errors.BadRequest("No.", retry_after=5)))
    assert "retry_after" not in body_of(sent) and "retry-after" not in headers_of(sent)


def test_a_401_names_the_scheme() -> None:
    assert headers_of(call(raising(errors.Unauthorized())))["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(SECRET), RecursionError(), MemoryError(), HTTPException(500, SECRET), errors.DataDirError(SECRET),
        errors.InternalError(SECRET),
    ],
    ids=lambda e: type(e).__name__,
)  # fmt: skip
def test_what_is_our_fault_is_a_500_that_tells_nothing(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    sent = call(raising(error))
    assert (sent[0]["status"], body_of(sent)["code"]) == (500, "INTERNAL_ERROR")
    assert SECRET not in json.dumps(body_of(sent))
    (record,) = [r for r in caplog.records if r.name == "appliance.guard"]
    assert record.exc_info and record.request_id == body_of(sent)["request_id"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("status", "ours"), [(400, 400), (404, 404), (408, 408), (409, 409), (413, 413), (415, 415), (418, 400), (422, 400)]
)
def test_starlettes_errors_become_ours(status: int, ours: int) -> None:
    sent = call(raising(HTTPException(status, "So it is.")))
    assert sent[0]["status"] == ours
    assert body_of(sent)["code"] == ("NOT_FOUND" if ours == 404 else "BAD_REQUEST")


def test_unknown_paths_and_methods_come_from_the_router_in_the_same_shape() -> None:
    async def ok(request: object) -> PlainTextResponse:
        return PlainTextResponse("ok")

    app = AccessLog(Guard(Router([Route("/x", ok, methods=["POST", "GET"])], redirect_slashes=False)))
    assert call(app)[0]["status"] == 200
    wrong = call(app, method="PUT")
    assert (wrong[0]["status"], body_of(wrong)["code"]) == (405, "BAD_REQUEST")
    assert headers_of(wrong)["allow"] == "GET, HEAD, POST"
    for path in ("/y", "/x/", "//x", "/X"):
        assert call(app, path=path)[0]["status"] == 404


def test_head_gets_the_headers_without_a_body() -> None:
    sent = call(raising(errors.NotFound("No.")), method="HEAD")
    assert sent[0]["status"] == 404 and int(headers_of(sent)["content-length"]) > 50
    assert sent[1]["body"] == b""


START: Message = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]}
EVENTS: Message = {**START, "headers": [(b"content-type", b"text/event-stream; charset=utf-8")]}
PART: Message = {"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True}
END: Message = {"type": "http.response.body", "body": b""}


def test_a_started_answer_is_left_to_be_cut() -> None:
    with pytest.raises(RuntimeError):
        call(raising(RuntimeError(), START, PART))


def test_a_started_event_stream_ends_with_the_error() -> None:
    sent = call(raising(RuntimeError(SECRET), EVENTS, PART))
    assert len(sent) == 3 and not sent[2].get("more_body")
    event = sent[2]["body"]
    assert event.startswith(b"data: ") and event.endswith(b"\n\n")
    assert json.loads(event[6:])["code"] == "INTERNAL_ERROR" and SECRET.encode() not in event


def test_an_event_stream_that_had_ended_gets_nothing_more() -> None:
    with pytest.raises(RuntimeError):
        call(raising(RuntimeError(), EVENTS, PART, END))


def test_cancellation_passes() -> None:
    with pytest.raises(asyncio.CancelledError):
        call(raising(asyncio.CancelledError()))


# the access log


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, list[Message]]]:
    """Does a request: its one line, and its answer."""

    def request(app: ASGIApp, **about: Any) -> tuple[Any, list[Message]]:
        monkeypatch.setattr(logs, "out", io.BytesIO())
        sent = call(app, **about)
        (line,) = logs.out.getvalue().splitlines()  # type: ignore[union-attr]
        assert b'"logger":"appliance.access"' in line and b"canary" not in line
        return json.loads(line), sent

    return request


def answering(act: Callable[[Scope], None]) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        act(scope)
        answer: Callable[[Scope, Receive, Send], Awaitable[None]] = PlainTextResponse("canary")
        await answer(scope, receive, send)

    return AccessLog(Guard(app))


def given_id(inbound: bytes) -> str:
    """The id of the answer to a request with this one."""
    return headers_of(call(answering(lambda scope: None), headers=((b"x-request-id", inbound),)))["x-request-id"]


def test_a_request_is_one_line(logged: Callable[..., Any]) -> None:
    def act(scope: Scope) -> None:
        scope["state"]["caller"] = Caller("a1", "canary-name", "community", "k1", "llm")
        scope["state"]["endpoint"] = "/llm/chat"

    headers = ((b"x-request-id", b"mine-1"), (b"x-other", b"canary"))
    line, _ = logged(answering(act), path="/llm/canary", headers=headers)
    fields = [line[name] for name in ("method", "endpoint", "status", "ip", "request_id", "key")]
    assert fields == ["POST", "/llm/chat", 200, "192.0.2.1", "mine-1", "k1"]
    assert 0 <= line["ms"] < 1_000


@pytest.mark.parametrize("error", [ClientDisconnect(), errors.NotFound("No."), RuntimeError("x")])
def test_failures_are_logged_with_their_status(error: Exception, logged: Callable[..., Any]) -> None:
    line, sent = logged(raising(error))
    assert line["status"] == (sent[0]["status"] if sent else 499)
    assert bool(sent) != isinstance(error, ClientDisconnect)  # nobody is there to be told


def test_a_full_disk_or_a_reader_that_is_gone_costs_the_line_and_not_the_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Full(io.RawIOBase):
        tried = 0

        def write(self, data: Any) -> int:
            self.tried += 1
            raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(logs, "out", full := Full())
    assert call(answering(lambda scope: None))[0]["status"] == 200 and full.tried == 1


@pytest.mark.parametrize("inbound", [b"", b"a b", b"x" * 65, b'"', b"a\xff", "\u00e4".encode()])
def test_an_id_that_is_not_sane_is_replaced(inbound: bytes) -> None:
    first, second = given_id(inbound), given_id(inbound)
    assert first != second and first.startswith("req_") and second.startswith("req_")


def test_a_sane_id_is_kept() -> None:
    for inbound in (b"a", b"x" * 64, b"A.b_c-9"):
        assert given_id(inbound) == inbound.decode()
