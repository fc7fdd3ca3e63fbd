"""The plans: what an account may use. The seed's three rows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Plan:
    """Calls per UTC minute, hour and month (None: unlimited), calls at once, and the share under contention."""

    name: str
    per_minute: int
    per_hour: int
    per_month: int | None
    concurrent: int
    weight: float


PLANS = {
    plan.name: plan
    for plan in (
        Plan("community", 20, 200, 1_000, 2, 1.0),
        Plan("professional", 60, 1_000, 10_000, 10, 2.0),
        Plan("enterprise", 300, 10_000, None, 50, 4.0),
    )
}
