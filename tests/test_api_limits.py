"""The limits' layer: headers on every answer, nothing charged for what is refused, and every lease freed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route, Router

from appliance.access.admission import Admission, Terms
from appliance.access.leases import Room
from appliance.access.windows import Limits as Calls
from appliance.access.windows import Payer
from appliance.api.access_log import AccessLog
from appliance.api.guard import Guard
from appliance.api.limits import Limits, TermsOf
from appliance.errors import Forbidden, NotFound
from appliance.messages import Caller

NOON = 1_773_144_000  # 2026-03-10, 12:00 UTC
CALLER = Caller("a", "team", "community", "k", "full")
TERMS = Terms((Payer("a", Calls(3, 200, 10)),), (Room("a", 1),))


class Stack:
    """The layers around four routes; `hold` keeps a call inside until it is set."""

    def __init__(self, terms: Terms = TERMS) -> None:
        self.admission = Admission(wait_seconds=0.1, clock=lambda: NOON + 12.6)
        self.hold = asyncio.Event()
        self.hold.set()
        routes = [
            Route(f"/{f.__name__}", self._gated(f))
            for f in (self.ok, self.crash, self.stream, self.forbidden, self.gone)
        ]
        self.app = AccessLog(Limits(Guard(self._auth(Router(routes))), self.admission, self._terms_of(terms)))

    def _terms_of(self, terms: Terms) -> TermsOf:
        def of(caller: Caller | None, ip: str, *, wrong_key: bool = False) -> Terms:
            return terms if caller else Terms()

        return of

    def _auth(self, app: Any) -> Any:
        async def named(scope: Any, receive: Any, send: Any) -> None:
            known = (b"authorization", b"yes") in scope["headers"]
            scope["state"]["caller"] = CALLER if known else None
            await app(scope, receive, send)

        return named

    def _gated(self, handler: Callable[[], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def handle(request: Request) -> Response:
            if handler == self.forbidden:
                raise Forbidden("Not with this key.")
            if request.state.caller:
                request.state.turn.reserve(counts=True, leases=True)
                await request.state.turn.wait()
            return await handler()

        return handle

    async def ok(self) -> Response:
        await self.hold.wait()
        return JSONResponse({})

    async def crash(self) -> Response:
        raise RuntimeError

    async def forbidden(self) -> Response:
        return JSONResponse({})

    async def gone(self) -> Response:
        raise NotFound("There is no such run.")

    async def stream(self) -> Response:
        async def parts() -> AsyncIterator[bytes]:
            yield b"1"
            await self.hold.wait()
            yield b"2"

        return StreamingResponse(parts())

    async def get(self, path: str, *, known: bool = True) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://test") as client:
            return await client.get(path, headers={"Authorization": "yes"} if known else {})

    @property
    def used(self) -> int:
        return self.admission.windows.used("a", NOON)["minute"]


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(scenario())  # type: ignore[arg-type]


def test_every_answer_to_a_known_caller_has_the_headers() -> None:
    async def scenario() -> None:
        stack = Stack()
        answer = await stack.get("/ok")
        shown = {name: value for name, value in answer.headers.items() if "ratelimit" in name}
        assert shown == {
            "x-ratelimit-limit": "3",
            "x-ratelimit-remaining": "2",
            "x-ratelimit-reset": str(NOON + 60),
            "x-ratelimit-window": "minute",
            "ratelimit-policy": '"minute";q=3;w=60, "hour";q=200;w=3600, "month";q=10;w=2678400',
            "ratelimit": '"minute";r=2;t=48',
        }
        assert "X-RateLimit-Remaining" in answer.headers["access-control-expose-headers"]
        for path, status in (("/forbidden", 403), ("/nothing", 404), ("/crash", 500), ("/stream", 200)):
            answer = await stack.get(path)
            assert (answer.status_code, "x-ratelimit-remaining" in answer.headers) == (status, True), path
        assert "x-ratelimit-limit" not in (await stack.get("/ok", known=False)).headers

    run(scenario)


def test_what_is_refused_or_fails_by_our_fault_does_not_count() -> None:
    async def scenario() -> None:
        stack = Stack()
        for path in ("/forbidden", "/nothing", "/gone", "/crash", "/crash", "/crash", "/crash"):
            assert (await stack.get(path)).headers["x-ratelimit-remaining"] == "3"
        assert stack.used == 0
        statuses = [(await stack.get("/ok")).status_code for _ in range(5)]
        assert statuses == [200, 200, 200, 429, 429] and stack.used == 3

    run(scenario)


def test_a_refusal_says_when_to_come_again_and_shows_the_window_that_refused() -> None:
    async def scenario() -> None:
        stack = Stack(Terms((Payer("a", Calls(2, 2, 10)),)))
        for _ in range(2):
            await stack.get("/ok")
        answer = await stack.get("/ok")
        assert answer.json()["code"] == "RATE_LIMIT_EXCEEDED"
        assert answer.headers["retry-after"] == str(answer.json()["retry_after"]) == "3588"
        assert answer.headers["x-ratelimit-window"] == "hour" and answer.headers["x-should-retry"] == "false"

    run(scenario)


def test_from_four_fifths_of_the_month_there_is_a_warning() -> None:
    async def scenario() -> None:
        stack = Stack(Terms((Payer("a", Calls(month=10)),)))
        warned = [(await stack.get("/ok")).headers.get("x-ratelimit-warning") for _ in range(10)]
        assert warned == [None] * 7 + ["approaching-limit"] * 3

    run(scenario)


@pytest.mark.parametrize("path", ["/ok", "/stream"])
def test_a_lease_lasts_until_the_answers_end_and_a_call_that_waited_says_so(path: str) -> None:
    async def scenario() -> None:
        stack = Stack()
        stack.hold.clear()
        first = asyncio.ensure_future(stack.get(path))
        await asyncio.sleep(0.01)
        assert stack.admission.leases.held("a") == 1, "the control: the call holds its lease"
        second = asyncio.ensure_future(stack.get(path))
        await asyncio.sleep(0.01)
        stack.hold.set()
        answers = await asyncio.gather(first, second)
        assert [a.status_code for a in answers] == [200, 200]
        assert "x-queue-wait-ms" not in answers[0].headers and int(answers[1].headers["x-queue-wait-ms"]) >= 5
        assert stack.admission.leases.held("a") == 0

    run(scenario)


def test_calls_at_the_same_time_are_told_what_was_left_when_each_was_charged() -> None:
    async def scenario() -> None:
        stack = Stack(Terms((Payer("a", Calls(20, 200, 1_000)),), (Room("a", 50),)))
        stack.hold.clear()
        calls = [asyncio.ensure_future(stack.get("/ok")) for _ in range(30)]
        await asyncio.sleep(0.05)
        assert stack.admission.leases.held("a") == 20, "the control: they run at the same time"
        stack.hold.set()
        answers = await asyncio.gather(*calls)
        left = [int(a.headers["x-ratelimit-remaining"]) for a in answers if a.status_code == 200]
        assert sorted(left) == list(range(20))

    run(scenario)


def scope(path: str) -> dict[str, Any]:
    headers = [(b"authorization", b"yes"), (b"host", b"test")]
    base = {"type": "http", "method": "GET", "path": path, "raw_path": path.encode(), "query_string": b""}
    return {**base, "headers": headers, "client": ("192.0.2.1", 1), "scheme": "http", "http_version": "1.1"}


def test_a_client_that_goes_frees_the_lease_and_the_call_stays_charged() -> None:
    async def scenario() -> None:
        stack = Stack()
        stack.hold.clear()
        left = asyncio.Event()
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        call = asyncio.ensure_future(stack.app(scope("/stream"), receive, send))
        await asyncio.sleep(0.01)
        assert stack.admission.leases.held("a") == 1 and len(sent) == 2, "the control: it is in mid-stream"
        left.set()
        await call
        assert (stack.admission.leases.held("a"), stack.used) == (0, 1)

    run(scenario)


def test_a_call_that_the_server_cuts_before_its_answer_costs_nothing() -> None:
    async def scenario() -> None:
        for path, charged in (("/ok", 0), ("/stream", 1)):
            stack = Stack()
            stack.hold.clear()
            call = asyncio.ensure_future(stack.get(path))
            await asyncio.sleep(0.01)
            assert stack.admission.leases.held("a") == 1, "the control: the call holds its lease"
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
            assert (stack.admission.leases.held("a"), stack.used) == (0, charged)

    run(scenario)


def test_a_keys_own_limits_are_told_beside_its_accounts() -> None:
    async def scenario() -> None:
        stack = Stack(Terms((Payer("a", Calls(20, 200, None)), Payer("k", Calls(minute=5, month=50)))))
        policy = (await stack.get("/ok")).headers["ratelimit-policy"]
        assert policy == '"minute";q=5;w=60, "hour";q=200;w=3600, "month";q=50;w=2678400'

    run(scenario)
