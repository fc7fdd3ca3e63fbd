"""Prefixes that have left the KV cache for main memory: which there are, and which go when room is needed. Pure.

In one pool every row of a batch pays for every cell that somebody else holds, so a prefix that nobody uses is cheaper
outside. A parked one is a holder in the prefix index like a sequence id, under a number below `NOBODY`. The bytes
themselves are the engine's.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NOBODY = -1  # no holder at all: neither a sequence id nor the number of a parked prefix


@dataclass(slots=True)
class Prefix:
    """Computed tokens that are kept for later prompts that begin alike.

    `own` leading ones are the appliance's own, which all accounts share; `rows` counts the rows of others that have
    paid for its cells since it was last used; `copy` is the number under which main memory holds it as well, while it
    is in the cache.
    """

    namespace: str
    tokens: NDArray[np.int32]
    own: int = 0
    rows: int = 0
    copy: int = NOBODY


class Parking:
    """At most `capacity` tokens in all; the least recently used prefix goes first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.tokens = 0
        self._prefixes: OrderedDict[int, Prefix] = OrderedDict()
        self._numbers = itertools.count(NOBODY - 1, -1)

    def __len__(self) -> int:
        return len(self._prefixes)

    def __iter__(self) -> Iterator[int]:
        """The numbers, least recently used first."""
        return iter(tuple(self._prefixes))

    def __contains__(self, number: int) -> bool:
        return number in self._prefixes

    def first_to_go(self) -> int:
        """A mere copy of what the cache holds as well, else the least recently used prefix."""
        copies = (number for number, prefix in self._prefixes.items() if prefix.copy == number)
        return next(copies, next(iter(self._prefixes)))

    def takes(self, prefix: Prefix) -> bool:
        """Whether it fits when all others go."""
        return len(prefix.tokens) <= self.capacity

    def put(self, prefix: Prefix) -> int:
        """Takes a prefix in; its number. The caller has made room: see `too_full_for`."""
        number = next(self._numbers)
        self._prefixes[number] = prefix
        self.tokens += len(prefix.tokens)
        return number

    def too_full_for(self, prefix: Prefix) -> bool:
        return self.tokens + len(prefix.tokens) > self.capacity

    def length(self, number: int) -> int:
        return len(self._prefixes[number].tokens)

    def use(self, number: int) -> None:
        """It is the most recently used one now."""
        self._prefixes.move_to_end(number)

    def remove(self, number: int) -> None:
        self.tokens -= len(self._prefixes.pop(number).tokens)
