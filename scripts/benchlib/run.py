"""What the scenarios of one run share: its setup, its account, the rows so far, and the interleaving of the sides."""

from __future__ import annotations

import asyncio
import sys
import time
import zlib
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from scripts.benchlib import prompts, servers
from scripts.benchlib.client import Ask, BenchError, Call
from scripts.benchlib.figures import Row
from scripts.benchlib.processes import Processors
from scripts.benchlib.prompts import Lengths
from scripts.benchlib.servers import Server, Setup, Size

T = TypeVar("T")
SETTLE_SECONDS = 1.0
SMALL = Size(slots=2, longest=2_048, total=4_096)


@dataclass(slots=True)
class Run:
    """One run of the benchmark."""

    setup: Setup
    rounds: int
    name: str  # makes this run's prompts different from every other run's
    model_name: str
    data_dir: Path = Path()
    key: str = field(default="", repr=False)
    lengths: Lengths = field(default_factory=lambda: Lengths(0.0, 1.0))
    rows: list[Row] = field(default_factory=list)
    commands: dict[str, list[str]] = field(default_factory=dict)
    calm: float = 0.1  # share of the machine that others may use during a round; it is measured again beyond that,
    repeats: int = 2  # so many times; which round counts never depends on its figures
    others: dict[str, list[float]] = field(default_factory=dict)
    repeated: dict[str, int] = field(default_factory=dict)

    async def prepare(self) -> None:
        """Makes the data directory and measures how long our words are in this model's tokens."""
        if not self.setup.control:
            self.data_dir, self.key = await servers.initialise(self.setup, "data")
        first = servers.peer(self.setup, SMALL) if self.setup.control else self.ours(SMALL)
        async with first as server:

            async def prompt_tokens(text: str) -> int:
                call = Call(server.target, Ask(text, 1))
                await call.run(self.setup.request_seconds)
                reply = call.reply()
                reply.tokens(1)
                assert reply.usage is not None
                return reply.usage.prompt_tokens

            self.lengths = await prompts.measure(prompt_tokens, self.name)

    def ours(self, size: Size, model: Path | None = None) -> AbstractAsyncContextManager[Server]:
        """Our server alone, with the run's model or another. Raises BenchError in a control run, which has none."""
        if self.setup.control:
            raise BenchError("This scenario measures our server, and a control run has only the peer.")
        setup = self.setup if model is None else replace(self.setup, model=model)
        return servers.ours(setup, size, self.data_dir, self.key)

    def pair(self, size: Size) -> AbstractAsyncContextManager[list[Server]]:
        return servers.pair(self.setup, size, self.data_dir, self.key)

    def ask(self, tokens: int, new: int, *seed: object, system: str = "") -> Ask:
        """A call whose prompt has about `tokens` tokens (beside `system`'s), unlike any other of this run."""
        name = " ".join(map(str, (self.name, *seed)))
        return Ask(self.lengths.text(tokens, name), new, system, zlib.crc32(name.encode()), self.setup.sampling)

    def note_command(self, scenario: str, server: Server) -> None:
        self.commands[f"{scenario}: {server.name}"] = servers.described(server, self.setup, self.model_name)

    def add(self, row: Row) -> None:
        self.rows.append(row)

    async def interleaved(self, what: str, sides: Mapping[str, Callable[[int], Awaitable[T]]]) -> dict[str, list[T]]:
        """A B A B …: one measurement of every side per round, so that a slow minute of the machine touches all."""
        results: dict[str, list[T]] = {name: [] for name in sides}
        shares: list[float] = []
        for number in range(self.rounds):
            for attempt in range(1 + self.repeats):
                measured, others = await self._round(
                    f"{what}: round {number + 1} of {self.rounds}", number, attempt, sides
                )
                if others <= self.calm or attempt == self.repeats:
                    break
                self.repeated[what] = self.repeated.get(what, 0) + 1
                say(f"{what}: other programs used {others:.0%} of the machine: this round is measured again")
            shares.append(round(others, 3))
            for name, value in measured.items():
                results[name].append(value)
        self.others[what] = shares
        return results

    async def _round(
        self, what: str, number: int, attempt: int, sides: Mapping[str, Callable[[int], Awaitable[T]]]
    ) -> tuple[dict[str, T], float]:
        """One measurement of every side, and the largest share of the machine that other programs used meanwhile."""
        measured: dict[str, T] = {}
        worst = 0.0
        for name, measure in sides.items():
            before = Processors.now()
            measured[name] = await measure(number + self.rounds * attempt)  # another number, another prompt
            after = Processors.now()
            worst = max(worst, after.others_since(before))
            say(f"{what}, {name}, {after.when - before.when:.1f} s, others {after.others_since(before):.0%}")
        return measured, worst

    def on(self, server: Server, measure: Callable[[Server, int], Awaitable[T]]) -> Callable[[int], Awaitable[T]]:
        """A side: thaws `server`, gives it a small call to get warm and a moment to settle, as it would have had where
        nobody freezes it, measures, and freezes it again."""

        async def side(number: int) -> T:
            with servers.measured(server):
                await server.call(
                    self.ask(24, 4, "warm", server.name, number, time.time_ns()), self.setup.request_seconds
                )
                await asyncio.sleep(SETTLE_SECONDS)
                return await measure(server, number)

        return side


def say(text: str) -> None:
    """A progress line; the table alone goes to standard output."""
    print(text, file=sys.stderr, flush=True)
