"""The scenarios of the HTTP edge: what key, limits, charge and log cost a small call, and what a long history costs.

The server has one core for itself, the clients another; connections are kept alive.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from functools import partial
from pathlib import Path
from typing import Any

from appliance.access.windows import NAMES
from appliance.store import calls
from appliance.store.calls import Row as Call
from appliance.store.database import Store
from appliance.store.keyfile import read_key
from appliance.store.usage import Call as Usage
from appliance.store.usage import Tally
from scripts.benchlib import servers
from scripts.benchlib.client import APPLIANCE, BenchError, Target
from scripts.benchlib.figures import Goal, Row, compared, quantile
from scripts.benchlib.processes import Child, child, resident_bytes
from scripts.benchlib.run import SMALL, Run, say
from scripts.benchlib.servers import Server, free_port

CONNECTIONS = 16
SECONDS = 3.0
ALONE = 600  # calls one after the other, for the median
SMALL_GET, USAGE = "/v1/models", "/api/usage"
SERVER_CORE, CLIENT_CORE = 0, 1
CALLS, ACCOUNTS, KEYS = 10_000_000, 10_000, 50_000
PORTION = 100_000
DAYS = 31  # with a total per account, key and endpoint
STEADY_RATE, STEADY_SECONDS = 200, 60
PURGED_SECONDS = 15.0  # a purge begins a second after the start


class Connection(asyncio.Protocol):
    """One kept-alive connection: asks again as soon as it is answered; notes how long each answer took, in seconds."""

    def __init__(self, request: bytes) -> None:
        self.request = request
        self.took: list[float] = []
        self.statuses: set[bytes] = set()
        self.until = 0  # so many answers
        self.paced = False  # asks only when told
        self.done = asyncio.get_running_loop().create_future()
        self._got = b""
        self._sent = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def ask(self) -> None:
        self._sent = time.perf_counter()
        self._transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self._got += data
        head = self._got.find(b"\r\n\r\n")
        if head < 0:
            return
        at = self._got.lower().index(b"content-length:") + 15
        if len(self._got) < head + 4 + int(self._got[at : self._got.index(b"\r", at)]):
            return
        self.took.append(time.perf_counter() - self._sent)
        self.statuses.add(self._got[9:12])
        self._got = b""
        if self.until and len(self.took) >= self.until:
            self.finish()
        elif not self.paced and not self.done.done():
            self.ask()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(BenchError(f"The server closed a connection: {error}."))

    def finish(self) -> None:
        if not self.done.done():
            self.done.set_result(None)
        self._transport.close()


def _request(target: Target, path: str) -> bytes:
    head = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{target.port}\r\n"
    return f"{head}Authorization: Bearer {target.key}\r\n\r\n".encode()


async def _connected(target: Target, path: str, count: int) -> list[Connection]:
    loop = asyncio.get_running_loop()
    request = _request(target, path)
    made = [await loop.create_connection(lambda: Connection(request), servers.HOST, target.port) for _ in range(count)]
    return [connection for _, connection in made]


async def rate(target: Target, path: str) -> float:
    """Answers per second with all connections busy. Raises BenchError for any answer but 200."""
    connections = await _connected(target, path, CONNECTIONS)
    started = time.perf_counter()
    for connection in connections:
        connection.ask()
    await asyncio.sleep(SECONDS)
    answered, seconds = sum(len(c.took) for c in connections), time.perf_counter() - started
    for connection in connections:
        connection.finish()
    _all_good(connections)
    return answered / seconds


async def median(target: Target, path: str) -> float:
    """Seconds of an answer, one call after the other."""
    [connection] = await _connected(target, path, 1)
    connection.until = ALONE
    connection.ask()
    await connection.done
    _all_good([connection])
    return quantile(connection.took, 0.5)


def _all_good(connections: list[Connection]) -> None:
    statuses = {status for c in connections for status in c.statuses}
    if statuses != {b"200"}:
        raise BenchError(f"Answers had the statuses {sorted(statuses)}.")


def pin(pid: int, core: int) -> None:
    """All threads of a process on one core; what they start inherits it."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), {core})


@asynccontextmanager
async def bare(run: Run) -> AsyncIterator[tuple[Target, Child]]:
    """A plain Starlette route behind the same uvicorn."""
    port = free_port()
    words = [sys.executable, "-m", "uvicorn", "scripts.benchlib.bare_app:app", "--host", servers.HOST]
    words += ["--port", str(port), "--no-access-log", "--log-level", "error", "--loop", "uvloop", "--http", "httptools"]
    with child(words, run.setup.workspace / "bare.log") as process:
        target = Target(port, APPLIANCE, "none")
        for _ in range(200):
            try:
                [connection] = await _connected(target, "/small", 1)
            except OSError:
                await asyncio.sleep(0.05)
            else:
                connection.finish()
                break
        yield target, process


async def gate(run: Run) -> None:
    """A small authenticated GET with every layer and its committed charge, beside a bare route."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {CLIENT_CORE})
    try:
        async with bare(run) as (plain, process), run.ours(SMALL) as server:
            run.note_command("gate", server)
            pin(process.pid, SERVER_CORE)
            pin(server.child.pid, SERVER_CORE)
            ours, small = server.target, "/small"
            rates = await run.interleaved(
                "gate, calls per second", {"ours": _of(rate, ours, SMALL_GET), "bare": _of(rate, plain, small)}
            )
            medians = await run.interleaved(
                "gate, one call", {"ours": _of(median, ours, SMALL_GET), "bare": _of(median, plain, small)}
            )
    finally:
        os.sched_setaffinity(0, before)
    row = Row("gate", "small authenticated GET, charge committed", "1/s", goal=Goal(0.4))
    run.add(compared(row, rates["ours"], rates["bare"], "bare route"))
    added = tuple(1e3 * (a - b) for a, b in zip(medians["ours"], medians["bare"], strict=True))
    least = Goal(0.4, at_least=False)
    run.add(Row("gate", "added to a call's median", "ms", ours=added, goal=least, goal_on_ratio=False))


def _of(
    measure: Callable[[Target, str], Awaitable[float]], target: Target, path: str
) -> Callable[[int], Awaitable[float]]:
    async def side(number: int) -> float:
        return await measure(target, path)

    return side


# ── a long history ───────────────────────────────────────────────────────────────────────────────────────────────


def fill(data_dir: Path) -> None:
    """Ten million calls of the last 440 days, a tenth of which are due to be purged; accounts and keys."""
    now = time.time()
    with closing(Store.open(data_dir / "appliance.db", read_key(data_dir / "secrets" / "master.key"))) as store:
        accounts = [(f"acc_{n}", f"account {n}", int(now)) for n in range(ACCOUNTS)]
        about = ("n", "llm", "oai_abcd", "wxyz", int(now), "bench")
        keys = [(f"key_{n}", f"acc_{n % ACCOUNTS}", secrets.token_bytes(32), *about) for n in range(KEYS)]

        def nouns(db: Any) -> None:
            [(asker,)] = db.execute("select id from accounts").fetchall()
            db.conn.executemany(
                "insert into accounts (id, name, plan, created) values (?, ?, 'professional', ?)", accounts
            )
            db.conn.executemany(
                """insert into keys (id, account_id, hash, name, scope, prefix, last_four, created, created_by)
                values (?, ?, ?, ?, ?, ?, ?, ?, ?)""",
                keys,
            )
            _tally(asker, now).write(db)

        store.write(nouns).result()
        step = 440 * 86_400 / CALLS
        for first in range(0, CALLS, PORTION):
            rows = [
                Call(now - (CALLS - n) * step, "POST", "/llm/chat", 200, "192.0.2.1", f"req_{n}", f"key_{n % KEYS}",
                     f"acc_{n % ACCOUNTS}", 12.5)
                for n in range(first, first + PORTION)
            ]  # fmt: skip
            store.write(partial(calls.insert, rows=rows)).result()
            if first % (10 * PORTION) == 0:
                say(f"scale: {first:,} of {CALLS:,} calls written")


def _tally(asker: str, now: float) -> Tally:
    """Days of every account, and of the one that asks: with twenty keys that call three endpoints."""
    tally, places = Tally(), [(f"acc_{n}", window, 0) for n in range(ACCOUNTS) for window in NAMES]
    for day in range(DAYS):
        at = now - day * 86_400
        for n in range(ACCOUNTS):
            tally.charge(Usage(f"acc_{n}", f"key_{n}", "/llm/chat", at), places if not n + day else [])
        for n in range(60):
            tally.charge(Usage(asker, f"key_{n % 20}", f"/endpoint/{n // 20}", at), [])
    return tally


async def scale(run: Run) -> None:
    """A call beside ten million others in the log, ten thousand accounts and fifty thousand keys; and while these are
    purged. Then a steady load for a minute."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {CLIENT_CORE})
    try:
        async with run.ours(SMALL) as server:
            pin(server.child.pid, SERVER_CORE)
            empty = [await median(server.target, SMALL_GET) for _ in range(run.rounds)]
            await _steady(run, server)
        await asyncio.to_thread(fill, run.data_dir)
        started = time.monotonic()
        async with run.ours(SMALL) as server:
            ready = time.monotonic() - started
            pin(server.child.pid, SERVER_CORE)
            [connection] = await _connected(server.target, SMALL_GET, 1)
            connection.ask()
            await asyncio.sleep(PURGED_SECONDS)
            connection.finish()
            _all_good([connection])
            full = [await median(server.target, SMALL_GET) for _ in range(run.rounds)]
            usage = [await median(server.target, USAGE) for _ in range(run.rounds)]
    finally:
        os.sched_setaffinity(0, before)
    row = Row("scale", f"a call's median with {CALLS:,} calls in the log", "ms", goal=Goal(1.2, at_least=False))
    run.add(compared(row, [1e3 * x for x in full], [1e3 * x for x in empty], "empty"))
    run.add(_alone("GET /api/usage of a busy account, median", "ms", [1e3 * x for x in usage], 20.0))
    run.add(_alone("start, model included", "s", [ready], 3.0))
    run.add(_alone("longest call while rows are purged", "ms", [1e3 * max(connection.took)], 20.0))


def _alone(what: str, unit: str, values: list[float], most: float) -> Row:
    return Row("scale", what, unit, ours=tuple(values), goal=Goal(most, at_least=False), goal_on_ratio=False)


async def _steady(run: Run, server: Server) -> None:
    """200 calls a second for a minute: what the process and the write-ahead log grow by."""
    connections = await _connected(server.target, SMALL_GET, CONNECTIONS)
    for connection in connections:
        connection.paced = True
    pid, log = server.child.pid, run.data_dir / "appliance.db-wal"
    before, wal, started = 0, 0, time.monotonic()
    for n in range(STEADY_RATE * STEADY_SECONDS):
        await asyncio.sleep(max(0.0, started + n / STEADY_RATE - time.monotonic()))
        connections[n % CONNECTIONS].ask()
        if n == STEADY_RATE * STEADY_SECONDS // 6:
            before = sum(resident_bytes(pid, run.setup.model))
        wal = max(wal, log.stat().st_size)
    await asyncio.sleep(0.5)
    for connection in connections:
        connection.finish()
    _all_good(connections)
    answered = sum(len(c.took) for c in connections)
    if answered != STEADY_RATE * STEADY_SECONDS:
        raise BenchError(f"{answered} of {STEADY_RATE * STEADY_SECONDS} calls were answered.")
    run.add(
        _alone(
            "growth of memory in 50 s of 200 calls/s",
            "MB",
            [(sum(resident_bytes(pid, run.setup.model)) - before) / 1e6],
            3.0,
        )
    )
    run.add(_alone("largest write-ahead log meanwhile", "MB", [wal / 1e6], 8.0))
