"""Brings the log of calls into the store, in groups and beside everything else: no call waits for its own row.

While the store cannot be written, the latest rows wait in memory; older ones are lost, and counted.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from typing import Any

from appliance.config import RetentionSettings
from appliance.errors import ApplianceError
from appliance.store import calls, keys
from appliance.store.calls import Row
from appliance.store.database import Store

log = logging.getLogger("appliance.calls")

EVERY_SECONDS = 1.0
MOST = 10_000  # rows in memory
GROUP = 1_000  # rows of one write
REFUSED = 429
PURGE_SECONDS = 600.0
BREATH_SECONDS = 0.02  # between two portions of a purge


class CallLog:
    """Lives on the event loop."""

    def __init__(self, store: Store, retention: Callable[[], RetentionSettings]) -> None:
        self._store = store
        self._retention = retention
        self._rows: deque[Row] = deque(maxlen=MOST)
        self.lost = 0
        self.counts: Counter[tuple[str, int]] = Counter()  # by route and status, since the start

    def add(self, row: Row) -> None:
        """Notes a call that has ended. Refusals of strangers are only counted: they could fill the disk."""
        self.counts[row.endpoint, row.status] += 1
        if row.key_id is None and row.status == REFUSED:
            return
        self.lost += len(self._rows) == MOST
        self._rows.append(row)

    async def run(self) -> None:
        """Writes and purges until it is cancelled; a purge may take long, and nothing waits for it."""
        await asyncio.gather(self._flush_for_ever(), self._purge_for_ever())

    async def _flush_for_ever(self) -> None:
        while True:
            await asyncio.sleep(EVERY_SECONDS)
            await self.flush()

    async def _purge_for_ever(self) -> None:
        while True:
            await asyncio.sleep(EVERY_SECONDS)
            await self._purge()
            await asyncio.sleep(PURGE_SECONDS)

    async def flush(self) -> None:
        """Writes what has come; what cannot be written stays."""
        while self._rows:
            group = [self._rows.popleft() for _ in range(min(GROUP, len(self._rows)))]
            try:
                await asyncio.shield(asyncio.wrap_future(self._store.write(partial(_write, group))))
            except ApplianceError as error:
                log.warning("the log of calls cannot be written now: %s", error.message)
                kept = group[-(MOST - len(self._rows)) :] if len(self._rows) < MOST else []
                self.lost += len(group) - len(kept)
                self._rows.extendleft(reversed(kept))
                return

    async def _purge(self) -> None:
        retention = self._retention()
        due = partial(calls.purge, self._store, time.time(), ip_days=retention.ip_days, call_days=retention.call_days)
        try:
            while await asyncio.to_thread(due):
                await asyncio.sleep(BREATH_SECONDS)
        except ApplianceError as error:
            log.warning("the log of calls was not purged: %s", error.message)


def _write(group: list[Row], db: Any) -> None:
    """The rows, and when their keys were last used."""
    calls.insert(db, group)
    for key_id, at in {row.key_id: row.at for row in group if row.key_id is not None}.items():
        keys.used(db, key_id, int(at))
