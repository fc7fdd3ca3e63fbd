"""The plans: what an account may use. Their numbers are settings; whoever reloads these replaces them here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from appliance import config
from appliance.config import PlanSettings


@dataclass(frozen=True, slots=True)
class Plan:
    """Calls per UTC minute, hour and month (None: unlimited), calls at once, the share under contention, and how long
    one would have to wait for it to go elsewhere, in seconds."""

    name: str
    per_minute: int
    per_hour: int
    per_month: int | None
    concurrent: int
    weight: float
    fallback_wait: float = 10.0


class Plans(Mapping[str, Plan]):
    """The plans by name. Replaced as a whole, so that nobody sees half a change."""

    def __init__(self, settings: Mapping[str, PlanSettings] = config.PLANS) -> None:
        self._plans: dict[str, Plan] = {}
        self.replace(settings)

    def replace(self, settings: Mapping[str, PlanSettings]) -> None:
        """From now on these numbers count."""
        self._plans = {
            name: Plan(
                name, s.per_minute, s.per_hour, s.per_month or None, s.concurrent, s.weight, s.fallback_wait_seconds
            )
            for name, s in settings.items()
        }

    def __getitem__(self, name: str) -> Plan:
        return self._plans[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._plans)

    def __len__(self) -> int:
        return len(self._plans)
