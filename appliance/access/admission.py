"""Admission of one call: its place in the windows first, then its turn among the calls that run. Knows no HTTP.

The windows are charged on arrival, so that a call that is over the limit learns it at once; a call that waits in vain
for its turn gets the charge back. Whoever has reserved holds an `Entry`, which must be ended, whatever happens.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from appliance.access.leases import Lease, Leases, Room
from appliance.access.windows import Charge, Payer, View, Windows
from appliance.errors import MonthlyLimitReached, RateLimited

USUAL_SECONDS = 1.0  # how long a call holds its lease, until some have been seen
SMOOTHING = 0.1


@dataclass(frozen=True, slots=True)
class Terms:
    """What a caller is allowed: who is charged, and where its calls find room. Empty: nothing is limited."""

    payers: tuple[Payer, ...] = ()
    rooms: tuple[Room, ...] = ()


@dataclass(eq=False, slots=True)
class Entry:
    """A call that has come: charged, and with its lease or in line for it. `waited` is how long, in seconds; `undo`
    is called when the charge is given back."""

    charge: Charge | None
    lease: Lease | None = None
    undo: Callable[[], None] | None = None
    turn: asyncio.Event | None = None  # of one that waits
    waited: float = 0.0
    began: float = field(default_factory=time.monotonic)
    ended: bool = False

    def has_turn(self) -> None:
        if self.turn is not None:
            self.turn.set()


class Admission:
    """The counts and leases of all callers. Lives on the event loop: check and charge are one step."""

    def __init__(self, *, wait_seconds: float, clock: Callable[[], float] = time.time) -> None:
        self.windows = Windows()
        self.leases = Leases()
        self.wait_seconds = wait_seconds
        self.refusals: Counter[str] = Counter()  # by window; "concurrency"; "stranger"
        self._clock = clock
        self._usual = USUAL_SECONDS

    def now(self) -> float:
        """Epoch seconds, by the clock that the windows go by."""
        return self._clock()

    def view(self, terms: Terms, *, refused: bool = False) -> View | None:
        """The window that headers show now."""
        return self.windows.view(terms.payers, self._clock(), refused=refused)

    def reserve(self, terms: Terms, *, counts: bool, leases: bool) -> Entry:
        """Charges a call, and takes its lease or its place in line. Raises RateLimited or MonthlyLimitReached."""
        entry = Entry(self._take(terms, "") if counts else None)
        if leases and terms.rooms:
            entry.lease = self.leases.ask(terms.rooms, entry.has_turn)
        return entry

    def visit(self, terms: Terms) -> None:
        """Charges somebody who will not be let in; nothing of it is given back. Raises RateLimited."""
        self._take(terms, "stranger")

    def _take(self, terms: Terms, reason: str) -> Charge:
        try:
            return self.windows.take(terms.payers, self._clock())
        except (RateLimited, MonthlyLimitReached) as refusal:
            self.refusals[reason or refusal.window] += 1
            raise

    def spend(self, terms: Terms, tokens: int) -> None:
        """Counts what a call took of a model, where tokens are limited."""
        self.windows.spend(terms.payers, tokens, self._clock())

    async def turn(self, entry: Entry) -> None:
        """Waits until the call may run. Raises RateLimited when its turn does not come in time; it is ended then, as
        when the waiting is cancelled."""
        lease = entry.lease
        if lease is None or lease.is_held:
            return
        started, entry.turn = time.monotonic(), asyncio.Event()
        try:
            async with asyncio.timeout(self.wait_seconds):
                await entry.turn.wait()
        except TimeoutError:
            if not lease.is_held:  # else its turn came in the last moment
                refusal = self._no_turn(lease)
                self.end(entry, give_back=True)
                raise refusal from None
        except BaseException:
            self.end(entry, give_back=True)
            raise
        finally:
            entry.began = time.monotonic()
            entry.waited = entry.began - started

    def end(self, entry: Entry, *, give_back: bool = False) -> None:
        """The call is over. Its charge is given back when it failed by our fault. Harmless the second time."""
        if entry.ended:
            return
        entry.ended = True
        if entry.lease is not None:
            if entry.lease.is_held:
                self._usual += SMOOTHING * (time.monotonic() - entry.began - self._usual)
            self.leases.end(entry.lease)
        if give_back and entry.charge is not None:
            self.windows.give_back(entry.charge)
            if entry.undo is not None:
                entry.undo()

    def estimate(self, lease: Lease) -> float:
        """Seconds until its turn, from its place and how long calls usually take."""
        return self._usual * self.leases.place(lease) / self.leases.limit(lease.rooms[0])

    def forget(self) -> None:
        """Lets go of whoever has not called for long; to be called now and then."""
        self.windows.forget(self._clock())

    def _no_turn(self, lease: Lease) -> RateLimited:
        self.refusals["concurrency"] += 1
        rooms = [room for room in lease.rooms if self.leases.held(room.id) >= self.leases.limit(room)]
        limit = self.leases.limit(rooms[0] if rooms else lease.rooms[0])
        calls = "1 call" if limit == 1 else f"{limit} calls"
        text = f"{calls} may run at the same time, and none ended within {self.wait_seconds:g} s."
        return RateLimited(text, retry_after=max(1, math.ceil(self.estimate(lease))))
