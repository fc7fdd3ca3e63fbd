"""The ledger: what admission charges in memory, written down so that it outlives the process. Lives on the event loop.

A charge is committed before its call's first byte goes out; the calls that come while a transaction runs are summed up
and written by the next. Where the disk is full, or another process holds the database, calls go on: what could not be
written is owed, and written when it can be again. Owns no counts: those are `Windows`'; totals per day are the store's.
"""

from __future__ import annotations

import asyncio
import logging
from asyncio import Event
from contextlib import suppress

from appliance.access.terms import key_payer
from appliance.access.windows import Charge, Windows
from appliance.errors import Unavailable
from appliance.store import usage
from appliance.store.database import Store
from appliance.store.usage import Call, Spent, Tally

log = logging.getLogger("appliance.ledger")

COMMIT_SECONDS = 1.0  # a transaction may take so long until its calls go on without it
RETRY_SECONDS = 1.0
TOGETHER = 256  # charges; a transaction gathers no more
CLOSE_SECONDS = 0.8  # for the last attempt


class Ledger:
    """Writes charges, and what calls took, to the store: one transaction after the other."""

    def __init__(self, store: Store, *, retry_seconds: float = RETRY_SECONDS) -> None:
        self._store = store
        self._retry_seconds = retry_seconds
        self._next, self._settled = Tally(), Event()  # what the next transaction writes; set when nobody need wait
        self._under_way, self._waiting = Tally(), Event()  # the same of the one that runs
        self._writer: asyncio.Task[None] | None = None
        self._late = False  # the store is slow, or cannot be written: nobody waits for it
        self._closing = Event()

    @property
    def owed(self) -> int:
        """Charges and the like that the store has not taken yet."""
        return self._under_way.entries + self._next.entries

    def restore(self, windows: Windows, now: float) -> None:
        """Fills `windows` with what the store remembers; blocks, so it belongs to the start."""
        for payer, window, start, calls in usage.windows(self._store):
            windows.restore(payer, window, start, calls, now)
        for lineage, tokens in usage.tokens_of_keys(self._store, int(now) // usage.DAY * usage.DAY):
            windows.restore_tokens(key_payer(lineage), tokens, now)

    async def charge(self, call: Call, charge: Charge) -> None:
        """Commits a call's charge; returns without, when that takes too long or fails: it is owed then."""
        self._next.charge(call, charge.places)
        settled = self._settled
        self._write_soon()
        if not self._late:
            await settled.wait()

    def take_back(self, call: Call, charge: Charge) -> None:
        """The call does not count after all."""
        self._next.charge(call, charge.places, calls=-1)
        self._write_soon()

    def spend(self, call: Call, spent: Spent) -> None:
        """Adds what the call took of a model."""
        self._next.spend(call, spent)
        self._write_soon()

    async def close(self) -> None:
        """One last attempt at what is owed; the rest is lost, and the log says how much."""
        self._closing.set()
        if self._writer is not None:
            await asyncio.wait({self._writer}, timeout=CLOSE_SECONDS)
        if self.owed:
            log.error("the store could not be written: %d charges are lost", self.owed)

    def _write_soon(self) -> None:
        if self._writer is None or self._writer.done():
            self._writer = asyncio.get_running_loop().create_task(self._write_all())

    async def _write_all(self) -> None:
        """Writes until nothing is owed; while the store cannot be written, tries again now and then."""
        while self._next.entries:
            await self._gather()
            last_attempt = self._closing.is_set()
            self._under_way, self._next = self._next, Tally()
            self._waiting, self._settled = self._settled, Event()
            try:
                await self._write(self._under_way)
            except Unavailable:
                self._let_go("the store cannot be written; charges are kept in memory until it can")
                self._under_way.add(self._next)
                self._under_way, self._next = Tally(), self._under_way
                if last_attempt:
                    return
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._closing.wait(), self._retry_seconds)
            else:
                self._under_way = Tally()
                self._waiting.set()
                if self._late:
                    self._late, self._settled = False, Event()
                    log.info("the store can be written again")

    async def _gather(self) -> None:
        """A commit costs as much as many charges: as long as every turn of the event loop brings more, they join."""
        before = 0
        while before < self._next.entries < TOGETHER:
            before = self._next.entries
            await asyncio.sleep(0)

    async def _write(self, tally: Tally) -> None:
        """One transaction. Raises Unavailable when the store cannot be written now."""
        written = asyncio.wrap_future(self._store.write(tally.write))
        if not (await asyncio.wait({written}, timeout=COMMIT_SECONDS))[0]:
            self._let_go("the store is slow; calls go on before their charges are written")
        try:
            await written
        except Unavailable:
            raise
        except Exception:
            await self._write_apart(tally)

    async def _write_apart(self, tally: Tally) -> None:
        """Some row is faulty: the others must not be lost with it. Empties `tally` as far as it comes."""
        while (part := tally.split_off()) is not None:
            try:
                await asyncio.wrap_future(self._store.write(part.write))
            except Unavailable:
                tally.add(part)
                raise
            except Exception:
                log.exception("a charge cannot be written; it is dropped")

    def _let_go(self, why: str) -> None:
        """Nobody waits for a store that is late."""
        if not self._late:
            self._late = True
            log.warning(why)
        self._waiting.set()
        self._settled.set()
