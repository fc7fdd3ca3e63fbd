"""When a month's calls are used up, if it goes on as it went until now. Pure."""

from __future__ import annotations

import calendar
import time
from dataclasses import dataclass
from datetime import date

from appliance.access.windows import bounds

HOUR = 3_600  # of the month's first one nothing can be concluded


@dataclass(frozen=True, slots=True)
class Forecast:
    """`used_up` is the day (YYYY-MM-DD, UTC) on which the month's calls are used up at this pace; None: they last."""

    used_up: str | None
    sentence: str


def forecast(used: int, limit: int | None, now: float) -> Forecast:
    """By the pace from the month's first day to now."""
    if limit is None:
        return Forecast(None, "The plan sets no limit per month.")
    if used >= limit:
        return Forecast(_iso(now), "The month's calls are used up.")
    start, end = bounds("month", now)
    left = (limit - used) * max(now - start, HOUR) / used if used else end - now
    if now + left >= end:
        return Forecast(None, "At this pace the month's calls last.")
    day = time.gmtime(now + left)
    ending = {1: "st", 2: "nd", 3: "rd"}.get(day.tm_mday % 10 if day.tm_mday // 10 != 1 else 0, "th")
    month = calendar.month_name[day.tm_mon]
    return Forecast(
        _iso(now + left), f"At this pace the month's calls are used up on the {day.tm_mday}{ending} of {month}."
    )


def _iso(at: float) -> str:
    day = time.gmtime(at)
    return date(day.tm_year, day.tm_mon, day.tm_mday).isoformat()
