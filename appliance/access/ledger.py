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
from functools import partial
from typing import Any

from appliance.access.windows import Charge, Windows
from appliance.errors import Unavailable
from appliance.store import usage
from appliance.store.database import Store
from appliance.store.usage import Call, Spent

log = logging.getLogger("appliance.ledger")

Write = Callable[[Any], None]
COMMIT_SECONDS = 1.0  # a call waits so long for its charge's commit, and goes on then
RETRY_SECONDS = 1.0


class Ledger:
    """Writes charges, and what calls took, to the store."""

    def __init__(self, store: Store, *, retry_seconds: float = RETRY_SECONDS) -> None:
        self._store = store
        self._retry_seconds = retry_seconds
        self._owed: deque[Write] = deque()
        self._retry: asyncio.Task[None] | None = None

    @property
    def owed(self) -> int:
        """Writes that the store has not taken yet."""
        return len(self._owed)

    def restore(self, windows: Windows, now: float) -> None:
        """Fills `windows` with what the store remembers; blocks, so it belongs to the start."""
        for payer, window, start, calls in usage.windows(self._store):
            windows.restore(payer, window, start, calls, now)

    async def charge(self, call: Call, charge: Charge) -> None:
        """Commits a call's charge; returns without, when that takes too long or fails: it is owed then."""
        written = self._write(partial(usage.charge, call=call, places=charge.rows()))
        if written is not None:
            await asyncio.wait({written}, timeout=COMMIT_SECONDS)

    def take_back(self, call: Call, charge: Charge) -> None:
        """The call does not count after all."""
        self._write(partial(usage.charge, call=call, places=charge.rows(), calls=-1))

    def spend(self, call: Call, spent: Spent) -> None:
        """Adds what the call took of a model; rides a later commit."""
        self._write(partial(usage.spend, call=call, spent=spent))

    async def close(self) -> None:
        """One last attempt at what is owed; the rest is lost, and the log says how much."""
        if self._retry is not None:
            self._retry.cancel()
            await asyncio.gather(self._retry, return_exceptions=True)
        if self._owed and not await self._settle():
            log.error("the store could not be written: %d charges are lost", len(self._owed))

    def _write(self, write: Write) -> asyncio.Future[None] | None:
        if self._owed:  # behind what waits already, so that a charge never comes after its own taking back
            self._owe(write)
            return None
        try:
            written = asyncio.wrap_future(self._store.write(write))
        except Unavailable:  # the store is closed
            self._owe(write)
            return None
        written.add_done_callback(partial(self._written, write))
        return written

    def _written(self, write: Write, done: asyncio.Future[None]) -> None:
        if done.cancelled():
            return
        error = done.exception()
        if isinstance(error, Unavailable):
            self._owe(write)
        elif error is not None:
            log.error("a charge could not be written", exc_info=error)

    def _owe(self, write: Write) -> None:
        if not self._owed:
            log.warning("the store cannot be written; charges are kept in memory until it can")
        self._owed.append(write)
        if self._retry is None or self._retry.done():
            self._retry = asyncio.get_running_loop().create_task(self._settle_later())

    async def _settle_later(self) -> None:
        while self._owed:
            await asyncio.sleep(self._retry_seconds)
            if await self._settle():
                log.info("the store can be written again; nothing is owed any more")

    async def _settle(self) -> bool:
        """Writes everything owed in one transaction; False when the store still cannot."""
        writes = list(self._owed)

        def all_of_them(db: Any) -> None:
            for write in writes:
                write(db)

        try:
            await asyncio.wrap_future(self._store.write(all_of_them))
        except Unavailable:
            return False
        for _ in writes:
            self._owed.popleft()
        return not self._owed
