"""Brings the ledger of what left the box into the store. No row is lost while the process lives."""

from __future__ import annotations

import asyncio
from collections import deque
from functools import partial

from appliance.errors import Unavailable
from appliance.store import egress
from appliance.store.database import Store
from appliance.store.egress import Row

RETRY_SECONDS = 1.0
CLOSE_SECONDS = 0.8


class EgressLog:
    """Lives on the event loop. While the store cannot be written, rows wait."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._rows: deque[Row] = deque()
        self._writer: asyncio.Task[None] | None = None

    def add(self, row: Row) -> None:
        self._rows.append(row)
        if self._writer is None or self._writer.done():
            self._writer = asyncio.get_running_loop().create_task(self._write())

    async def close(self) -> None:
        """A last moment for what is not written yet."""
        if self._writer is not None:
            await asyncio.wait({self._writer}, timeout=CLOSE_SECONDS)

    async def _write(self) -> None:
        while self._rows:
            try:
                await asyncio.wrap_future(self._store.write(partial(egress.insert, row=self._rows[0])))
            except Unavailable:
                await asyncio.sleep(RETRY_SECONDS)
            else:
                self._rows.popleft()
