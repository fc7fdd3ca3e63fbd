"""The gate between the route and its handler: may this caller use it, is there room in its limits, and is it its turn.

A refusal comes before a byte of the body is read. The charge is committed before the handler runs, and so before the
answer's first byte; what ends a call is the limits' layer's business. Strangers pay for being refused, by address, so
that keys cannot be guessed; a valid key is never asked about its neighbours at the same address.
"""

from __future__ import annotations

from functools import partial

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as ASGIScope

from appliance.access.admission import Admission
from appliance.access.ledger import Ledger
from appliance.api.limits import TermsOf, Turn
from appliance.errors import Forbidden, Unauthorized
from appliance.messages import Caller, Scope
from appliance.store.usage import Call, Spent


class Gate:
    """Lets calls in."""

    def __init__(self, admission: Admission, ledger: Ledger, terms_of: TermsOf) -> None:
        self.admission = admission
        self._ledger = ledger
        self.terms_of = terms_of

    def allow(self, request: Request, scope: Scope | None) -> None:
        """Raises Unauthorized or Forbidden unless the caller may use an endpoint of this scope, None: open to all."""
        caller: Caller | None = request.state.caller
        if scope is None:
            return
        if caller is None:
            self.refuse(request)
            raise Unauthorized
        reads = caller.scope == "read" and request.method in ("GET", "HEAD")
        if caller.scope not in ("full", scope) and not reads:
            enough = dict.fromkeys(["full", scope, *(["read"] if request.method in ("GET", "HEAD") else [])])
            raise Forbidden(f"This key's scope is {caller.scope}; the endpoint needs {' or '.join(enough)}.")

    def refuse(self, request: Request) -> None:
        """A stranger is about to be refused, and pays for it. Raises RateLimited when that was once too often."""
        if request.state.caller is None and not request.state.wrong_key:  # which has paid already
            self._visit(request.scope)

    def watch(self, app: ASGIApp) -> ASGIApp:
        """Whoever brings a wrong key pays for it, wherever: open pages would show, too, whether one is valid."""

        async def watched(scope: ASGIScope, receive: Receive, send: Send) -> None:
            if scope["state"]["wrong_key"]:
                self._visit(scope)
            await app(scope, receive, send)

        return watched

    def _visit(self, scope: ASGIScope) -> None:
        ip = scope["client"][0] if scope["client"] else ""
        self.admission.visit(self.terms_of(None, ip, wrong_key=scope["state"]["wrong_key"]))

    async def enter(self, request: Request, path: str, *, counts: bool, leases: bool, waits: bool) -> None:
        """Charges the call, commits that, and waits for its turn, unless the handler does so itself (`waits` False).
        Raises RateLimited or MonthlyLimitReached."""
        caller: Caller | None = request.state.caller
        turn: Turn = request.state.turn
        if caller is None:
            return
        entry = turn.reserve(counts=counts, leases=leases)
        if entry.charge is not None and entry.charge.places:
            call = Call(caller.account_id, caller.key_id, path, self.admission.now())
            turn.record = partial(self._spend, call)
            entry.undo = partial(self._ledger.take_back, call, entry.charge)
            await self._ledger.charge(call, entry.charge)
        if waits:
            await turn.wait()

    def _spend(self, call: Call, spent: Spent) -> None:
        """Tokens belong to the day on which the call ends, as in the windows."""
        self._ledger.spend(call._replace(at=self.admission.now()), spent)
