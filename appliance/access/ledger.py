"""The ledger: what admission charges in memory, written down so that it outlives the process. Lives on the event loop.

A charge is committed before its call's first byte goes out. Where the disk is full, or another process holds the
database, calls go on: what could not be written is owed, kept in order, and written as one when it can be again.
Owns no counts: those are `Windows`'; totals per day are the store's.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

from appliance.access.terms import key_payer
from appliance.access.windows import Charge, Windows
from appliance.errors import Unavailable
from appliance.store import usage
from appliance.store.database import Store
from appliance.store.usage import Call, Spent

log = logging.getLogger("appliance.ledger")

COMMIT_SECONDS = 1.0  # a call waits so long for its charge's commit, and goes on then
RETRY_SECONDS = 1.0
CLOSE_SECONDS = 0.8  # for the last attempt
TOGETHER = 256  # most writes in one transaction


@dataclass(eq=False, slots=True)
class _Write:
    perform: Callable[[Any], None]
    settled: asyncio.Event = field(default_factory=asyncio.Event)  # committed, or known to take longer


class Ledger:
    """Writes charges, and what calls took, to the store: one transaction after the other, in the order they came."""

    def __init__(self, store: Store, *, retry_seconds: float = RETRY_SECONDS) -> None:
        self._store = store
        self._retry_seconds = retry_seconds
        self._owed: deque[_Write] = deque()
        self._writer: asyncio.Task[None] | None = None
        self._failing = False
        self._closing = asyncio.Event()

    @property
    def owed(self) -> int:
        """Writes that the store has not taken yet."""
        return len(self._owed)

    def restore(self, windows: Windows, now: float) -> None:
        """Fills `windows` with what the store remembers; blocks, so it belongs to the start."""
        for payer, window, start, calls in usage.windows(self._store):
            windows.restore(payer, window, start, calls, now)
        for lineage, tokens in usage.tokens_of_keys(self._store, int(now) // usage.DAY * usage.DAY):
            windows.restore_tokens(key_payer(lineage), tokens, now)

    async def charge(self, call: Call, charge: Charge) -> None:
        """Commits a call's charge; returns without, when that takes too long or fails: it is owed then."""
        write = self._owe(partial(usage.charge, call=call, places=charge.rows()))
        if not self._failing:
            try:
                async with asyncio.timeout(COMMIT_SECONDS):
                    await write.settled.wait()
            except TimeoutError:
                log.warning("the store is slow; a call goes on before its charge is written")

    def take_back(self, call: Call, charge: Charge) -> None:
        """The call does not count after all."""
        self._owe(partial(usage.charge, call=call, places=charge.rows(), calls=-1))

    def spend(self, call: Call, spent: Spent) -> None:
        """Adds what the call took of a model; rides a later commit."""
        self._owe(partial(usage.spend, call=call, spent=spent))

    async def close(self) -> None:
        """One last attempt at what is owed; the rest is lost, and the log says how much."""
        self._closing.set()
        if self._writer is not None:
            await asyncio.wait({self._writer}, timeout=CLOSE_SECONDS)
        if self._owed:
            log.error("the store could not be written: %d charges are lost", len(self._owed))

    def _owe(self, perform: Callable[[Any], None]) -> _Write:
        write = _Write(perform)
        self._owed.append(write)
        if self._writer is None or self._writer.done():
            self._writer = asyncio.get_running_loop().create_task(self._settle())
        return write

    async def _settle(self) -> None:
        """Writes until nothing is owed; while the store cannot be written, tries again now and then."""
        together = TOGETHER
        while self._owed:
            last_attempt = self._closing.is_set()
            writes = list(islice(self._owed, together))
            try:
                await asyncio.wrap_future(self._store.write(partial(_perform, writes)))
            except Unavailable:
                self._fail()
                if last_attempt:
                    return
                await self._pause()
                continue
            except Exception:
                if len(writes) > 1:  # one of them is faulty: the others must not wait for it for ever
                    together = 1
                    continue
                log.exception("a charge cannot be written; it is dropped")
                together = TOGETHER
            if self._failing:
                self._failing = False
                log.info("the store can be written again")
            for _ in writes:
                self._owed.popleft().settled.set()

    def _fail(self) -> None:
        """Nobody waits for what cannot be written."""
        if not self._failing:
            self._failing = True
            log.warning("the store cannot be written; charges are kept in memory until it can")
        for write in self._owed:
            write.settled.set()

    async def _pause(self) -> None:
        try:
            async with asyncio.timeout(self._retry_seconds):
                await self._closing.wait()
        except TimeoutError:
            pass


def _perform(writes: list[_Write], db: Any) -> None:
    for write in writes:
        write.perform(db)
