"""Rate limits at the HTTP edge: the headers on every answer, and the end of a call's lease, whatever ends the call.

Outside the guard, so that errors pass here too. The gate lets a call in, through the `Turn` in the request's state,
once it knows that the caller may use the endpoint: what is refused before does not count.
"""

from __future__ import annotations

from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from appliance.access.admission import Admission, Entry, Terms
from appliance.access.windows import NAMES, Payer, View, bounds
from appliance.messages import Caller

Headers = list[tuple[bytes, bytes]]
TermsOf = Callable[[Caller], Terms]

_SHOWN = (
    "X-RateLimit-Limit, X-RateLimit-Remaining, X-RateLimit-Reset, X-RateLimit-Window, X-RateLimit-Warning, "
    "RateLimit-Policy, RateLimit, Retry-After, X-Queue-Wait-Ms, X-Request-Id"
)


class Turn:
    """One request's way in; `enter` at most once."""

    def __init__(self, admission: Admission, terms_of: TermsOf) -> None:
        self._admission = admission
        self._terms_of = terms_of
        self.entry: Entry | None = None

    async def enter(self, caller: Caller, *, counts: bool, leases: bool) -> Entry:
        """Charges the call and waits for its lease. Raises RateLimited or MonthlyLimitReached."""
        self.entry = await self._admission.enter(self._terms_of(caller), counts=counts, leases=leases)
        return self.entry

    def headers(self, caller: Caller, status: int) -> Headers:
        """What an answer of this status says of the caller's limits."""
        terms = self._terms_of(caller)
        view = self._admission.view(terms, refused=status == 429)
        if view is None:
            return []
        shown = limit_headers(view, terms.payers, self._admission.now())
        if self.entry is not None and self.entry.waited:
            shown.append((b"x-queue-wait-ms", b"%d" % (1_000 * self.entry.waited)))
        return shown

    def end(self, *, give_back: bool) -> None:
        if self.entry is not None:
            self._admission.end(self.entry, give_back=give_back)


class Limits:
    """Gives every request its `Turn`, stamps every answer to a known caller, and ends the turn."""

    def __init__(self, app: ASGIApp, admission: Admission, terms_of: TermsOf) -> None:
        self.app = app
        self._admission = admission
        self._terms_of = terms_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        turn = Turn(self._admission, self._terms_of)
        state = scope.setdefault("state", {})
        state["turn"] = turn
        status = 0

        async def stamped(message: Message) -> None:
            nonlocal status
            caller = state.get("caller")
            if message["type"] == "http.response.start":
                status = message["status"]
                if caller is not None:
                    message = {**message, "headers": [*message.get("headers", []), *turn.headers(caller, status)]}
            await send(message)

        failed = False
        try:
            await self.app(scope, receive, stamped)
        except Exception:
            failed = True
            raise
        finally:
            turn.end(give_back=failed or status >= 500)


def limit_headers(view: View, payers: tuple[Payer, ...], now: float) -> Headers:
    """The seed's four, its warning, and the IETF draft's pair (draft-ietf-httpapi-ratelimit-headers-10)."""
    found = {
        "x-ratelimit-limit": str(view.limit),
        "x-ratelimit-remaining": str(view.remaining),
        "x-ratelimit-reset": str(view.reset),
        "x-ratelimit-window": view.window,
        "ratelimit-policy": ", ".join(_policies(payers[0], now)),
        "ratelimit": f'"{view.window}";r={view.remaining};t={max(1, round(view.reset - now))}',
        "access-control-expose-headers": _SHOWN,
    }
    if view.nearly:
        found["x-ratelimit-warning"] = "approaching-limit"
    return [(name.encode(), value.encode()) for name, value in found.items()]


def _policies(payer: Payer, now: float) -> list[str]:
    """Every limited window: `q` calls in `w` seconds."""
    policies = []
    for name, limit in zip(NAMES, payer.limits, strict=True):
        if limit is not None:
            start, end = bounds(name, now)
            policies.append(f'"{name}";q={limit};w={end - start}')
    return policies
