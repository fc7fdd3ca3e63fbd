"""Which ids keep a split batch whole. Pure.

In split streams llama.cpp computes together only rows of ascending ids without a gap: every gap is one more pass over
all weights. So a sequence starts beside those that run, and where one that ends leaves a gap, another moves into it.
"""

from __future__ import annotations

from collections.abc import Iterable, Set


def runs(ids: Iterable[int]) -> list[list[int]]:
    """The ids, ascending, cut at every gap."""
    found: list[list[int]] = []
    for one in sorted(ids):
        if found and found[-1][-1] == one - 1:
            found[-1].append(one)
        else:
            found.append([one])
    return found


def densest(candidates: Iterable[int], running: Set[int]) -> int:
    """The candidate that adds the fewest gaps to `running`; of equals the first."""
    return min(candidates, key=lambda c: 1 - (c - 1 in running) - (c + 1 in running))


def move(running: Iterable[int]) -> tuple[int, int] | None:
    """(from, to): one id of the smallest run goes beside the largest, whence soon there is one run; None: there is."""
    found = runs(running)
    if len(found) < 2:
        return None
    largest = max(found, key=len)
    smallest = min((run for run in found if run is not largest), key=len)
    return (smallest[-1], largest[-1] + 1) if smallest > largest else (smallest[0], largest[0] - 1)
