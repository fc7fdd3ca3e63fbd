"""Brings the ledger of what left the box into the store. No row is lost while the process lives."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from contextlib import suppress
from functools import partial

from appliance.errors import ApplianceError
from appliance.store import egress
from appliance.store.database import Store
from appliance.store.egress import Row

log = logging.getLogger("appliance.egress")

RETRY_SECONDS = 1.0
CLOSE_SECONDS = 0.8


class EgressLog:
    """Lives on the event loop. While the store cannot be written, rows wait."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._rows: deque[Row] = deque()
        self._writer: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()

    def add(self, row: Row) -> None:
        self._rows.append(row)
        if self._writer is None or self._writer.done():
            self._writer = asyncio.get_running_loop().create_task(self._write())

    async def close(self) -> None:
        """One last attempt; the log says how many rows are lost."""
        self._closing.set()
        if self._writer is not None:
            await asyncio.wait({self._writer}, timeout=CLOSE_SECONDS)
        if self._rows:
            log.error("the store could not be written: %d rows of what left the box are lost", len(self._rows))

    async def _write(self) -> None:
        while self._rows:
            last_attempt = self._closing.is_set()
            try:
                await asyncio.wrap_future(self._store.write(partial(egress.insert, row=self._rows[0])))
            except ApplianceError as error:
                if last_attempt:
                    return
                log.warning("what left the box cannot be written down now: %s", error.message)
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._closing.wait(), RETRY_SECONDS)
            except Exception:
                log.exception("a row of what left the box cannot be written; it is dropped")
                self._rows.popleft()
            else:
                self._rows.popleft()
