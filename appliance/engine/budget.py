"""How many prompt tokens a step may compute while others generate, so that their next token is not late.

The cost of a prompt token is measured from the steps themselves; the budget is what fits between the cost of decoding
and the goal for the gap between two tokens. Pure; the clock is passed in as durations.
"""

from __future__ import annotations

SMALLEST = 64  # a prompt always advances, and by whole tiles: a CPU's attention computes 63 rows one by one
LARGEST = 1_024
PATIENCE = 5.0  # how often the goal is stretched at most while many wait for their first token and few generate
SMOOTHING = 0.2  # weight of the newest measurement


class PrefillBudget:
    """`fixed` > 0 pins the budget; otherwise it adapts to `goal` (seconds between two tokens)."""

    def __init__(self, goal: float, *, batch: int, ubatch: int, fixed: int = 0) -> None:
        self.goal = goal
        self.batch = batch
        self.ubatch = ubatch
        self.fixed = fixed
        self.decode_seconds = 0.0  # of a step that only decodes
        self.prefill_seconds = 0.0  # of one prompt token

    def tokens(self, n_decoding: int, n_prefilling: int = 0) -> int:
        """The budget for a step in which `n_decoding` sequences decode; the whole batch when nobody does.

        A prompt token makes the decoding ones wait, a decoding step the `n_prefilling` others. Where these are many,
        the goal is stretched, so that a burst of arrivals soon decodes as one full batch; one long prompt stretches it
        little.
        """
        if not n_decoding:
            return self.batch
        if self.fixed:
            return self.fixed
        if not self.prefill_seconds:
            return SMALLEST
        goal = self.goal * min(PATIENCE, 1 + n_prefilling**2 / n_decoding)
        fits = int((goal - self.decode_seconds) / self.prefill_seconds)
        budget = max(SMALLEST, min(fits, LARGEST) // SMALLEST * SMALLEST)
        # One graph computes `ubatch` tokens: a few more would cost a second, nearly empty pass over the weights.
        if self.ubatch // 2 < budget + n_decoding:
            return max(SMALLEST, min(budget, self.ubatch - n_decoding))
        return budget

    def observe(self, n_decoding: int, n_prefill: int, seconds: float) -> None:
        """A step with these tokens took `seconds`."""
        if not n_prefill:
            self.decode_seconds = self._smooth(self.decode_seconds, seconds)
        elif n_prefill >= SMALLEST // 4:
            own = max(seconds - (self.decode_seconds if n_decoding else 0.0), seconds / 10)
            self.prefill_seconds = self._smooth(self.prefill_seconds, own / n_prefill)

    @staticmethod
    def _smooth(old: float, new: float) -> float:
        return old + SMOOTHING * (new - old) if old else new
