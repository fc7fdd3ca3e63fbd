"""Leases: how many calls of an account, and of a key, may run at once. First come, first served in an account. Pure.

Whoever asks and finds no room waits its turn here; how long it waits, and what it does then, is the caller's business.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum


class State(Enum):
    WAITING = "waiting"
    HELD = "held"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Room:
    """One of those whose calls are bounded: `limit` at once, at least 1. The limit that came last counts for all."""

    id: str
    limit: int


@dataclass(eq=False, slots=True)
class Lease:
    """One call's place. `granted` is called once when a waiting one gets its turn, never from within `ask`."""

    rooms: tuple[Room, ...]  # the account's first
    granted: Callable[[], None]
    state: State = State.WAITING

    @property
    def account(self) -> str:
        return self.rooms[0].id

    @property
    def is_held(self) -> bool:
        return self.state is State.HELD


class Leases:
    """Every lease that is held or waited for. Not thread-safe: the event loop owns it."""

    def __init__(self) -> None:
        self.running = 0  # calls of all accounts
        self._held: Counter[str] = Counter()
        self._limits: dict[str, int] = {}  # as the latest call brought them
        self._waiting: dict[str, list[Lease]] = {}  # by account

    def ask(self, rooms: tuple[Room, ...], granted: Callable[[], None]) -> Lease:
        """A lease: held already, or waiting behind those of its account that came before."""
        lease = Lease(rooms, granted)
        self._limits.update((room.id, room.limit) for room in rooms)
        self._grant(lease.account)  # a raised limit counts first for those who wait already
        if self._fits(lease):
            self._hold(lease)
        else:
            self._waiting.setdefault(lease.account, []).append(lease)
        return lease

    def end(self, lease: Lease) -> None:
        """The call is over, or waits no longer. Harmless when it has ended already."""
        before, lease.state = lease.state, State.ENDED
        if before is State.HELD:
            self.running -= 1
            self._held.subtract(room.id for room in lease.rooms)
        elif before is State.WAITING:
            self._leave(lease)  # it may have stood before one that fits
        self._grant(lease.account)
        if lease.account not in self._waiting:
            for room in lease.rooms:
                if not self._held[room.id]:
                    del self._held[room.id]
                    self._limits.pop(room.id, None)

    def held(self, room: str) -> int:
        """Calls that run."""
        return self._held[room]

    def limit(self, room: Room) -> int:
        """The one that counts now."""
        return self._limits.get(room.id, room.limit)

    def waiting(self, account: str) -> int:
        """Calls that wait their turn."""
        return len(self._waiting.get(account, ()))

    def place(self, lease: Lease) -> int:
        """1 for the next in its account's line; 0 when it does not wait."""
        line = self._waiting.get(lease.account, [])
        return line.index(lease) + 1 if lease in line else 0

    def __len__(self) -> int:
        """How many wait."""
        return sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[Lease]:
        """Those that wait."""
        for line in self._waiting.values():
            yield from line

    def _fits(self, lease: Lease) -> bool:
        return all(self._held[room.id] < self._limits[room.id] for room in lease.rooms)

    def _hold(self, lease: Lease) -> None:
        lease.state = State.HELD
        self.running += 1
        self._held.update(room.id for room in lease.rooms)

    def _leave(self, lease: Lease) -> None:
        line = self._waiting[lease.account]
        line.remove(lease)
        if not line:
            del self._waiting[lease.account]

    def _grant(self, account: str) -> None:
        """Gives what is free to those that wait, in their order; one held up by its own key holds up nobody else."""
        for lease in list(self._waiting.get(account, ())):
            if self._fits(lease):
                self._leave(lease)
                self._hold(lease)
                lease.granted()
