"""The windows in which calls are counted: UTC minute, hour and calendar month. Pure; `now` is passed in.

A call takes one place in every window of its account (and of its key, where that has narrower limits), all of them or
none. Tokens of a UTC day are counted beside them, once they are known. Knows no plan, store or HTTP:
limits come with each call, so that a changed plan applies to the next one.

The month never goes back: where the clock is set back, the later month goes on, so that no second allowance begins;
where it was set forward, the month that began then is the one that counts when the time comes. Minute and hour follow
a clock that is set back, and keep what was used of them.
"""

from __future__ import annotations

import calendar
import math
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from appliance.errors import MonthlyLimitReached, RateLimited

NAMES = ("minute", "hour", "month")
MONTH = 2  # place of the month among them
DAY = 86_400
DAYS_RANK = -1.5  # a day is longer than an hour, and shorter than a month
LONGEST_STEP = 32 * 86_400  # seconds; a clock that was further ahead was wrong
KEPT = 86_400  # seconds
NEARLY = 0.8  # share of the month from which a warning is given


class Limits(NamedTuple):
    """Calls per window; None: unlimited."""

    minute: int | None = None
    hour: int | None = None
    month: int | None = None


class Payer(NamedTuple):
    """One of those who are charged for a call: an account, a key of its own limits, an address. `tokens` per UTC day;
    a call that begins below that limit is let in, whatever it will take."""

    id: str
    limits: Limits
    tokens: int | None = None


class View(NamedTuple):
    """One window of one payer as headers show it."""

    window: str
    limit: int
    remaining: int
    reset: int  # epoch seconds
    nearly: bool  # most of the payer's month is used


class Charge(NamedTuple):
    """A place taken in every window, to be given back as a whole, and the view of that moment."""

    places: list[tuple[str, str, int]]  # (payer, window, its start when it was taken)
    view: View | None


class _Counts:
    """What one payer has used of its current windows."""

    __slots__ = ("day", "ends", "limits", "longest", "starts", "tokens", "used")

    def __init__(self) -> None:
        self.starts = [0, 0, 0]
        self.ends = [0, 0, 0]
        self.used = [0, 0, 0]
        self.limits: Limits | None = None  # as they last came
        self.longest = 0  # place of the longest window that was limited
        self.day = 0  # number of the day whose tokens are counted; it never goes back
        self.tokens = 0

    def roll(self, now: float) -> None:
        """Begins the windows that are due, and follows a clock that was set back."""
        for i, name in enumerate(NAMES):
            if now >= self.ends[i]:
                self.starts[i], self.ends[i] = bounds(name, now)
                self.used[i] = 0
            elif now < self.starts[i] - (LONGEST_STEP if i == MONTH else 0):
                self.starts[i], self.ends[i] = bounds(name, now)
        if (day := int(now // DAY)) > self.day:
            self.day, self.tokens = day, 0


class Windows:
    """Every payer's counts. Not thread-safe: the event loop owns it, and takes and checks in one step."""

    def __init__(self) -> None:
        self._payers: dict[str, _Counts] = {}

    def __len__(self) -> int:
        return len(self._payers)

    def take(self, payers: Sequence[Payer], now: float) -> Charge:
        """Charges one call to all `payers`. Raises RateLimited or MonthlyLimitReached, and charges nobody."""
        counts = [self._current(payer, now) for payer in payers]
        if any(map(_is_full, payers, counts)):
            raise _refusal(payers, counts, now)
        places = []
        for payer, counted in zip(payers, counts, strict=True):
            counted.used = [n + 1 for n in counted.used]
            places += [(payer.id, name, start) for name, start in zip(NAMES, counted.starts, strict=True)]
        return Charge(places, _tightest(payers, counts, refused=False))

    def give_back(self, charge: Charge) -> None:
        """Takes a charge off again, where its windows still run; at most once per charge is the caller's business."""
        for payer, window, start in charge.places:
            counted, i = self._payers.get(payer), NAMES.index(window)
            if counted and counted.starts[i] == start and counted.used[i]:
                counted.used[i] -= 1

    def spend(self, payers: Iterable[Payer], tokens: int, now: float) -> None:
        """Adds what a call took to the day of those whose tokens are limited."""
        for payer in payers:
            if payer.tokens is not None:
                self._current(payer, now).tokens += tokens

    def view(self, payers: Iterable[Payer], now: float, *, refused: bool = False) -> View | None:
        """The window with the smallest share left, of equals the shorter (after a refusal the longer, for which the
        caller has to wait); None where nothing is limited."""
        payers = list(payers)
        return _tightest(payers, [self._current(payer, now) for payer in payers], refused=refused)

    def used(self, payer: str, now: float) -> dict[str, int]:
        """Calls in each current window."""
        return dict(zip(NAMES, self._current(Payer(payer, Limits()), now).used, strict=True))

    def restore(self, payer: str, window: str, start: int, calls: int, now: float) -> None:
        """Sets what a store remembers of a window, if it still counts at `now`."""
        i, (begins, ends) = NAMES.index(window), bounds(window, start)
        if now < ends and begins <= now + LONGEST_STEP:
            counted = self._payers.setdefault(payer, _Counts())
            counted.starts[i], counted.ends[i], counted.used[i] = begins, ends, calls
            counted.longest = max(counted.longest, i)

    def restore_tokens(self, payer: str, tokens: int, now: float) -> None:
        """Sets what a store remembers of the current day."""
        counted = self._payers.setdefault(payer, _Counts())
        counted.day, counted.tokens = int(now // DAY), tokens

    def forget(self, now: float) -> None:
        """Drops payers whose longest limited window ended a day ago: sooner, the clock might be set back into it."""
        kept = {}
        for name, counted in self._payers.items():
            if now < max(counted.ends[counted.longest], (counted.day + 1) * DAY if counted.tokens else 0) + KEPT:
                kept[name] = counted
        self._payers = kept

    def _current(self, payer: Payer, now: float) -> _Counts:
        counted = self._payers.get(payer.id)
        if counted is None:
            counted = self._payers[payer.id] = _Counts()
        counted.roll(now)
        if counted.limits is not payer.limits:  # new, or changed: the longest that ever was limited is remembered
            counted.limits = payer.limits
            counted.longest = max([counted.longest, *(i for i, limit in enumerate(payer.limits) if limit is not None)])
        return counted


def bounds(window: str, now: float) -> tuple[int, int]:
    """First second of the UTC window that holds `now`, and of the next one."""
    if window == "month":
        at = time.gmtime(now)
        following = (at.tm_year + at.tm_mon // 12, at.tm_mon % 12 + 1)
        return _month(at.tm_year, at.tm_mon), _month(*following)
    length = 60 if window == "minute" else 3_600
    start = math.floor(now / length) * length
    return start, start + length


def _month(year: int, month: int) -> int:
    return calendar.timegm((year, month, 1, 0, 0, 0))


def _is_full(payer: Payer, counted: _Counts) -> bool:
    for limit, used in zip(payer.limits, counted.used, strict=True):
        if limit is not None and used >= limit:
            return True
    return payer.tokens is not None and counted.tokens >= payer.tokens


def _tightest(payers: Sequence[Payer], counts: Sequence[_Counts], *, refused: bool) -> View | None:
    """See `Windows.view`."""
    rank: tuple[float, float] | None = None
    shown: tuple[str, int, int, int] | None = None
    nearly = False
    for payer, counted in zip(payers, counts, strict=True):
        month = payer.limits.month
        nearly = nearly or (month is not None and counted.used[MONTH] >= NEARLY * month)
        for i, limit in enumerate(payer.limits):
            if limit is not None:
                left = max(0, limit - counted.used[i])
                this = (left / limit if limit else 0.0, -i if refused else i)
                if rank is None or this < rank:
                    rank, shown = this, (NAMES[i], limit, left, counted.ends[i])
        if refused and payer.tokens is not None and counted.tokens >= payer.tokens:
            if rank is None or (0.0, DAYS_RANK) < rank:
                rank, shown = (0.0, DAYS_RANK), ("day", payer.tokens, 0, (counted.day + 1) * DAY)
    return View(*shown, nearly) if shown is not None else None


def _refusal(payers: Sequence[Payer], counts: Sequence[_Counts], now: float) -> RateLimited | MonthlyLimitReached:
    """By the window that takes longest, so that a call after it succeeds if nobody else calls."""
    full = [
        (counted.ends[i], NAMES[i])
        for payer, counted in zip(payers, counts, strict=True)
        for i, limit in enumerate(payer.limits)
        if limit is not None and counted.used[i] >= limit
    ]
    full += [
        ((counted.day + 1) * DAY, "day")
        for payer, counted in zip(payers, counts, strict=True)
        if payer.tokens is not None and counted.tokens >= payer.tokens
    ]
    end, window = max(full)
    after = max(1, math.ceil(end - now))
    what = "tokens" if window == "day" else "calls"
    text = f"The limit of {what} per {window} is used up; the next {window} begins in {after} s."
    if window == "month":
        return MonthlyLimitReached(text, retry_after=after)
    refusal = RateLimited(text, retry_after=after)
    refusal.window = window
    return refusal
