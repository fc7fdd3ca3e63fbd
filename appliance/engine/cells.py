"""Exact accounting of KV cells. Pure: mirrors what the llama.cpp cache does, so that decisions precede acts.

In a unified cache every sequence draws from one pool and a shared prefix occupies its cells once; in a split cache
every sequence has a stream of its own and sharing copies. Owns counts only; the real cache is `model.Context`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Cells = NDArray[np.int32]


class CellTable:
    """Which cell holds which position of which sequence (a page table with pages of one token)."""

    def __init__(self, capacity: int, *, unified: bool, per_sequence: int) -> None:
        self.capacity = capacity
        self.unified = unified
        self.per_sequence = per_sequence  # most tokens one sequence may hold
        self._holders = np.zeros(capacity if unified else 0, np.int32)  # how many sequences hold each cell
        self._free = np.arange(capacity if unified else 0, dtype=np.int32)  # a stack; the first `_n_free` are free
        self._n_free = len(self._free)
        self._tables: dict[int, Cells] = {}
        self._lengths: dict[int, int] = {}

    @property
    def free(self) -> int:
        """Cells that are free for any sequence. In a split cache streams never compete: practically unlimited."""
        return self._n_free if self.unified else self.capacity

    @property
    def used(self) -> int:
        """Cells in use."""
        return self.capacity - self._n_free if self.unified else sum(self._lengths.values())

    def length(self, sequence: int) -> int:
        """Tokens that `sequence` holds."""
        return self._lengths.get(sequence, 0)

    def append(self, sequence: int, count: int) -> None:
        """`sequence` grows by `count` tokens into fresh cells."""
        length = self._lengths.get(sequence, 0)
        if length + count > self.per_sequence or count > self.free:
            raise ValueError(f"sequence {sequence} cannot grow by {count}: {self.free} cells free, {length} held")
        self._lengths[sequence] = length + count
        if not self.unified:
            return
        self._n_free -= count
        room = self._room(sequence, length + count)
        if count == 1:  # a decoded token: an index is three times as fast as a slice
            room[length] = cell = self._free[self._n_free]
            self._holders[cell] = 1
            return
        fresh = self._free[self._n_free : self._n_free + count]
        self._holders[fresh] = 1
        room[length : length + count] = fresh

    def share(self, source: int, target: int, count: int) -> None:
        """The empty `target` takes the first `count` tokens of `source`: the same cells if unified, copies if split."""
        if self.length(target) or count > self.length(source):
            raise ValueError(f"cannot share {count} tokens of {source} with {target}")
        self._lengths[target] = count
        if self.unified:
            cells = self._tables[source][:count]
            self._holders[cells] += 1
            self._room(target, count)[:count] = cells

    def truncate(self, sequence: int, count: int) -> None:
        """`sequence` keeps its first `count` tokens; cells nobody holds any more are free."""
        length = self._lengths.get(sequence, 0)
        if count >= length:
            return
        if self.unified:
            dropped = self._tables[sequence][count:length]
            self._holders[dropped] -= 1
            freed = dropped[self._holders[dropped] == 0]
            self._free[self._n_free : self._n_free + len(freed)] = freed
            self._n_free += len(freed)
        if count:
            self._lengths[sequence] = count
        else:
            del self._lengths[sequence]
            self._tables.pop(sequence, None)

    def held_by(self, sequences: list[int]) -> int:
        """Distinct cells that any of `sequences` holds: what stays in use when all others are dropped."""
        if not self.unified:
            return sum(self.length(s) for s in sequences)
        held = np.zeros(self.capacity, np.bool_)
        for s in sequences:
            if s in self._tables:
                held[self._tables[s][: self._lengths[s]]] = True
        return int(np.count_nonzero(held))

    def _room(self, sequence: int, needed: int) -> Cells:
        """The table of `sequence`, grown by doubling."""
        table = self._tables.get(sequence)
        if table is None or len(table) < needed:
            grown = np.empty(max(64, 2 * needed), np.int32)
            if table is not None:
                grown[: len(table)] = table
            self._tables[sequence] = table = grown
        return table
