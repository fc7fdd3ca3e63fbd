"""What the engine counts. The decode thread writes, any thread reads a snapshot; plain numbers need no lock."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, slots=True)
class StepTimes:
    """One step: its sizes, seconds inside llama_decode, and outside since the step before (None after idling)."""

    outputs: int
    prefill: int
    decode_seconds: float
    host_seconds: float | None


@dataclass(slots=True)
class Metrics:
    """Counters since the engine started, and the times of the latest steps."""

    steps: int = 0
    prompt_tokens: int = 0  # computed
    cached_tokens: int = 0  # of prompts, found computed
    generated_tokens: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    preempted: int = 0
    rebuilt: int = 0
    service_seconds: float = 0.0  # smoothed time from admission to end
    waiting: int = 0
    running: int = 0
    kv_used: int = 0
    retained: int = 0  # prefixes in the cache that nobody uses now
    parked: int = 0  # prefixes in main memory
    parked_tokens: int = 0
    restored: int = 0  # prefixes that came back from main memory
    recent: deque[StepTimes] = field(default_factory=lambda: deque(maxlen=1_024))

    def snapshot(self) -> dict[str, float | int]:
        """All counters, and quantiles over the latest steps in milliseconds."""
        values: dict[str, float | int] = {
            name: getattr(self, name) for name in self.__dataclass_fields__ if name != "recent"
        }
        steps = list(self.recent)
        host = [s.host_seconds * 1e3 for s in steps if s.host_seconds is not None and s.outputs]
        pure = [s.decode_seconds * 1e3 for s in steps if not s.prefill]
        for name, series in (("host_ms", host), ("decode_ms", pure)):
            for q in (50, 95):
                values[f"{name}_p{q}"] = round(float(np.percentile(series, q)), 3) if series else 0.0
        return values
