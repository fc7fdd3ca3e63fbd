"""`GET /api/usage`: what the caller's account has used: its windows, the month's totals and days, and a forecast."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from datetime import UTC, datetime

from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from appliance.access.forecast import Forecast, forecast
from appliance.access.windows import NAMES, bounds
from appliance.api.render import json_reply
from appliance.api.services import Services
from appliance.messages import Caller
from appliance.store import usage
from appliance.store.usage import Total


class WindowBody(Struct):
    """One window; `limit` and `remaining` null where the plan sets none."""

    limit: int | None
    used: int
    remaining: int | None
    reset: int


class Sums(Struct):
    """What calls took."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    engine_seconds: float = 0.0

    def add(self, total: Total) -> None:
        self.calls += total.calls
        self.prompt_tokens += total.prompt_tokens
        self.completion_tokens += total.completion_tokens
        self.cached_tokens += total.cached_tokens
        self.engine_seconds = round(self.engine_seconds + total.seconds, 3)


class DayBody(Sums):
    day: str = ""


class UsageReply(Struct):
    account: str
    plan: str
    windows: dict[str, WindowBody]
    month: Sums
    days: list[DayBody]
    forecast: Forecast


async def own_usage(request: Request, services: Services) -> Response:
    """The account of the key that asks."""
    caller: Caller = request.state.caller
    now = services.admission.now()
    first = bounds("month", now)[0]
    totals = await asyncio.to_thread(usage.totals, services.store, caller.account_id, first, int(now))
    plan = services.plans[caller.plan]
    used = services.admission.windows.used(caller.account_id, now)
    limits = dict(zip(NAMES, (plan.per_minute, plan.per_hour, plan.per_month), strict=True))
    windows = {name: _window(limits[name], used[name], bounds(name, now)[1]) for name in NAMES}
    month = Sums()
    for total in totals:
        month.add(total)
    reply = UsageReply(
        account=caller.account_name,
        plan=caller.plan,
        windows=windows,
        month=month,
        days=_days(totals),
        forecast=forecast(used["month"], plan.per_month, now),
    )
    return json_reply(reply)


def _window(limit: int | None, used: int, reset: int) -> WindowBody:
    return WindowBody(limit, used, None if limit is None else max(0, limit - used), reset)


def _days(totals: list[Total]) -> list[DayBody]:
    """One per day with calls, oldest first."""
    found: dict[int, DayBody] = defaultdict(DayBody)
    for total in totals:
        found[total.day].add(total)
    for day, body in found.items():
        body.day = datetime.fromtimestamp(day, UTC).strftime("%Y-%m-%d")
    return [found[day] for day in sorted(found)]
