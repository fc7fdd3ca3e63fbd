"""Who goes next: virtual token counters per account (Sheng et al., "Fairness in Serving Large Language Models", 2024).

An account's counter grows by the tokens it was served, divided by its weight; the lowest counter is served first; an
account that comes back is lifted to the lowest active counter, so that idleness earns no credit. Pure; knows no KV.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from appliance.engine.sequence import Sequence

PROMPT_COST = 1.0  # of one computed prompt token, in virtual tokens (the paper's w_p)
OUTPUT_COST = 2.0  # of one generated token (w_q)


class WaitingLine:
    """The waiting sequences: first come, first served in an account; accounts by counter; interactive before batch."""

    def __init__(self) -> None:
        self._queues: dict[tuple[str, str], deque[Sequence]] = {}  # (lane, account)
        self._counters: dict[str, float] = {}
        self._active: dict[str, int] = {}  # sequences of the account that wait or run

    def __len__(self) -> int:
        return sum(len(q) for q in self._queues.values())

    def __iter__(self) -> Iterator[Sequence]:
        for queue in self._queues.values():
            yield from queue

    def counter(self, account: str) -> float:
        """Virtual tokens served to `account`."""
        return self._counters.get(account, 0.0)

    def arrive(self, sequence: Sequence) -> None:
        """A new sequence joins its account's end of the line."""
        account = sequence.account
        if not self._active.get(account):
            others = [self._counters[a] for a, n in self._active.items() if n]
            floor = min(others, default=0.0)
            self._counters[account] = max(self._counters.get(account, 0.0), floor) if others else 0.0
        self._active[account] = self._active.get(account, 0) + 1
        self._queue(sequence).append(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """A preempted sequence goes first in its account's line."""
        self._queue(sequence).appendleft(sequence)

    def take(self, sequence: Sequence) -> None:
        """`sequence` leaves the line, to run or for good."""
        queue = self._queue(sequence)
        queue.remove(sequence)
        if not queue:
            del self._queues[sequence.lane, sequence.account]

    def leave(self, sequence: Sequence) -> None:
        """`sequence` neither waits nor runs any more."""
        left = self._active[sequence.account] - 1
        if left:
            self._active[sequence.account] = left
            return
        del self._active[sequence.account]
        if not self._active:  # an idle box forgets: nobody is owed anything
            self._counters.clear()

    def charge(self, sequence: Sequence, virtual_tokens: float) -> None:
        """Adds served work to the account's counter."""
        account = sequence.account
        self._counters[account] = self._counters.get(account, 0.0) + virtual_tokens / sequence.weight

    def order(self, running: dict[str, int]) -> Iterator[Sequence]:
        """All waiting sequences in the order in which they should be admitted; ties go to who runs less."""

        def rank(key: tuple[str, str]) -> tuple[bool, float, float, float]:
            head = self._queues[key][0]
            return (key[0] == "batch", self.counter(key[1]), running.get(key[1], 0) / head.weight, head.arrived)

        for key in sorted(self._queues, key=rank):
            yield from tuple(self._queues[key])

    def place(self, sequence: Sequence) -> int:
        """About how many sequences are admitted up to and including `sequence`, if accounts take turns."""
        mine = self._queues.get((sequence.lane, sequence.account))
        if not mine or sequence not in mine:
            return 0
        index = mine.index(sequence)
        others = sum(
            len(queue) if lane != sequence.lane else min(len(queue), index + 1)
            for (lane, account), queue in self._queues.items()
            if account != sequence.account and (lane == sequence.lane or lane == "interactive")
        )
        return index + 1 + others

    def _queue(self, sequence: Sequence) -> deque[Sequence]:
        return self._queues.setdefault((sequence.lane, sequence.account), deque())
