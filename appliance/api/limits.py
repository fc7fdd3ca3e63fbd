"""Rate limits at the HTTP edge: the headers on every answer, and the end of a call's lease, whatever ends the call.

Outside the guard, so that errors pass here too. The gate lets a call in, through the `Turn` in the request's state,
once it knows that the caller may use the endpoint. A call that ends as 401, 403, 404 or 429 does not count, nor one
that fails by our fault, 5xx, or that the server cuts before its answer began.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from appliance.access.admission import Admission, Entry, Terms
from appliance.access.leases import State
from appliance.access.windows import DAY, NAMES, Payer, View, bounds
from appliance.access.windows import Limits as WindowLimits
from appliance.api.render import Family, family
from appliance.errors import ApplianceError, Unauthorized
from appliance.messages import Caller
from appliance.store.usage import Spent

Headers = list[tuple[bytes, bytes]]


class TermsOf(Protocol):
    """Says what a caller is allowed, or a stranger at an address."""

    def __call__(self, caller: Caller | None, ip: str, *, wrong_key: bool = False) -> Terms: ...


FREE = (401, 403, 404, 429)
_SHOWN = (
    b"X-RateLimit-Limit, X-RateLimit-Remaining, X-RateLimit-Reset, X-RateLimit-Window, X-RateLimit-Warning, "
    b"RateLimit-Policy, RateLimit, Retry-After, X-Queue-Wait-Ms, X-Request-Id, X-Served-By, X-Fallback-Reason"
)


class Turn:
    """One request's way in: `reserve` first, at most once, and `wait` for the lease then. `spent` tells at its end what
    it took of a model, and `record` writes that down."""

    def __init__(self, admission: Admission, terms: Callable[[], Terms], state: dict[str, Any]) -> None:
        self._admission = admission
        self._terms = terms
        self._state = state
        self._working: asyncio.Task[Any] | None = None
        self._cut: ApplianceError | None = None
        self.entry: Entry | None = None
        self.spent: list[Callable[[], Spent]] = []
        self.record: Callable[[Spent], None] | None = None
        self.told: Headers = []  # what else the answer's head says, once that is known

    @property
    def caller(self) -> Caller | None:
        found: Caller | None = self._state.get("caller")
        return found

    def reserve(self, *, counts: bool, leases: bool) -> Entry:
        """Charges the call. Raises RateLimited or MonthlyLimitReached."""
        terms = self._terms()
        self._terms = lambda: terms  # a plan that is changed, or gone, counts for later calls
        self.entry = self._admission.reserve(terms, counts=counts, leases=leases)
        return self.entry

    async def wait(self) -> None:
        """Until the call may run. Raises RateLimited when its turn does not come."""
        if self.entry is not None:
            await self._admission.turn(self.entry)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Around what takes time: a cut ends it with the error of the cut."""
        task = self._working = asyncio.current_task()
        try:
            yield
        except asyncio.CancelledError:
            if self._cut is None or task is None:
                raise
            task.uncancel()
            raise self._cut from None
        finally:
            self._working = None

    def cut(self, error: ApplianceError) -> None:
        """Ends the call where it works, with `error`; harmless where it does not."""
        if self._working is not None and self._cut is None:
            self._cut = error
            self._working.cancel()

    def place(self) -> tuple[int, int] | None:
        """(place in its account's line, about how many seconds until its turn); None when it does not wait."""
        lease = self.entry.lease if self.entry is not None else None
        if lease is None or lease.state is not State.WAITING:
            return None
        return self._admission.leases.place(lease), max(1, math.ceil(self._admission.estimate(lease)))

    def headers(self, status: int, path: str) -> Headers:
        """What an answer of this status says of the caller's limits: as they were when the call was charged."""
        shown: Headers = list(self.told)
        if self.entry is not None and self.entry.waited:
            shown.append((b"x-queue-wait-ms", b"%d" % (1_000 * self.entry.waited)))
        terms, now = self._terms(), self._admission.now()
        charge = self.entry.charge if self.entry is not None else None
        view = charge.view if charge is not None and status not in FREE and status < 500 else None
        if view is None or view.reset <= now:
            view = self._admission.view(terms, refused=status == 429)
        if view is not None:
            shown += limit_headers(view, terms.payers, now) + _told[family(path)](view, now)
        return shown

    def end(self, *, give_back: bool) -> None:
        """The call is over, or will count no more."""
        if self.entry is not None:
            self._admission.end(self.entry, give_back=give_back)

    def settle(self) -> None:
        """Everything has ended: what the call took of a model is counted."""
        record = self.record
        if record is None:
            return
        for spent in [told() for told in self.spent]:
            if spent.prompt_tokens:
                self._admission.spend(self._terms(), spent.prompt_tokens + spent.completion_tokens)
                record(spent)


class Limits:
    """Gives every request its `Turn`, stamps every answer, and ends the turn."""

    def __init__(self, app: ASGIApp, admission: Admission, terms_of: TermsOf) -> None:
        self.app = app
        self._admission = admission
        self._terms_of = terms_of
        self.turns: set[Turn] = set()  # of every request that is under way

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        state = scope.setdefault("state", {})
        ip = scope["client"][0] if scope["client"] else ""

        def terms() -> Terms:
            return self._terms_of(state.get("caller"), ip, wrong_key=state.get("wrong_key", False))

        turn = state["turn"] = Turn(self._admission, terms, state)
        self.turns.add(turn)
        status, failed = 0, False

        async def stamped(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if status in FREE or status >= 500:
                    turn.end(give_back=True)  # before the headers say what is left
                message = {**message, "headers": [*message.get("headers", []), *turn.headers(status, scope["path"])]}
            await send(message)

        try:
            await self.app(scope, receive, stamped)
        except Exception:
            failed = True
            raise
        except asyncio.CancelledError:
            failed = not status  # the server stops, and says 503 by itself
            raise
        finally:
            self.turns.discard(turn)
            turn.end(give_back=failed)
            turn.settle()

    def cut_invalid(self, is_valid: Callable[[Caller], bool]) -> None:
        """Ends the running calls of callers who may call no longer."""
        for turn in list(self.turns):
            if turn.caller is not None and not is_valid(turn.caller):
                turn.cut(Unauthorized())


def limit_headers(view: View, payers: Sequence[Payer], now: float) -> Headers:
    """The seed's four, its warning, and the IETF draft's pair (draft-ietf-httpapi-ratelimit-headers-10)."""
    window, wait = view.window.encode(), max(1, math.ceil(view.reset - now))
    shown = [
        (b"x-ratelimit-limit", b"%d" % view.limit),
        (b"x-ratelimit-remaining", b"%d" % view.remaining),
        (b"x-ratelimit-reset", b"%d" % view.reset),
        (b"x-ratelimit-window", window),
        (b"ratelimit-policy", _policies(tuple(payer.limits for payer in payers), int(now) // DAY)),
        (b"ratelimit", b'"%b";r=%d;t=%d' % (window, view.remaining, wait)),
        (b"access-control-expose-headers", _SHOWN),
    ]
    if view.nearly:
        shown.append((b"x-ratelimit-warning", b"approaching-limit"))
    return shown


def _as_openai(view: View, now: float) -> Headers:
    """What OpenAI's clients read; the reset as a duration of Go's."""
    return [
        (b"x-ratelimit-limit-requests", b"%d" % view.limit),
        (b"x-ratelimit-remaining-requests", b"%d" % view.remaining),
        (b"x-ratelimit-reset-requests", b"%ds" % max(1, math.ceil(view.reset - now))),
    ]


def _as_anthropic(view: View, now: float) -> Headers:
    """What Anthropic's clients read; the reset as a time (RFC 3339)."""
    return [
        (b"anthropic-ratelimit-requests-limit", b"%d" % view.limit),
        (b"anthropic-ratelimit-requests-remaining", b"%d" % view.remaining),
        (b"anthropic-ratelimit-requests-reset", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(view.reset)).encode()),
    ]


_told: dict[Family, Callable[[View, float], Headers]] = {
    "seed": lambda view, now: [],
    "openai": _as_openai,
    "anthropic": _as_anthropic,
}


@lru_cache
def _policies(limits: tuple[WindowLimits, ...], day: int) -> bytes:
    """Every limited window on that UTC day: at most `q` calls in `w` seconds, by whichever payer has the fewest."""
    policies = []
    for i, name in enumerate(NAMES):
        found = [limit for every in limits if (limit := every[i]) is not None]
        if found:
            start, end = bounds(name, day * DAY)
            policies.append(f'"{name}";q={min(found)};w={end - start}')
    return ", ".join(policies).encode()
