"""The scenarios that look at our server by itself: fairness between accounts, host time, idle, memory, start, guide."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from appliance.installation import GUIDE
from scripts.benchlib import servers
from scripts.benchlib.client import Ask, BenchError, Call, Reply, Target, together
from scripts.benchlib.counters import counters
from scripts.benchlib.figures import Goal, Row
from scripts.benchlib.pairs import PROMPT_TOKENS
from scripts.benchlib.processes import cpu_seconds, resident_bytes
from scripts.benchlib.run import SMALL, Run, say
from scripts.benchlib.servers import PEER, Server, Size

FAIR_SLOTS = 8
WAITING = 16
BUSY_NEW_TOKENS = 128
GUEST_TOKENS = 30
GUEST_NEW_TOKENS = 4
TRIALS = 20
PAUSE = (0.2, 0.8)  # seconds before a visit, shortest and longest
STEPS_ALLOWED = 8
SMALLEST_PREFILL = 32  # prompt tokens that one step reads at the least

BUSY_STREAMS = 32
HOST_NEW_TOKENS = 160
HOST_GOALS = {0.0: Goal(5.0, at_least=False), 0.8: Goal(8.0, at_least=False)}
IDLE_SECONDS = 10.0
MEGABYTE = 1e6
GUIDE_SIZE = Size(slots=8, longest=512, total=4_096)  # the defaults of the settings and of the guide
GUIDE_NEW_TOKENS = 300
NO_COUNTERS = "the server did not report it"


# ── fairness ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Crowd:
    """Clients of one account that keep a call open each, until told to stop; no call is ever cut short."""

    def __init__(self, run: Run, target: Target, clients: int) -> None:
        self.calls: list[list[Call]] = [[] for _ in range(clients)]
        self._run = run
        self._target = target
        self._stop = False

    async def client(self, number: int) -> None:
        while not self._stop:
            ask = self._run.ask(PROMPT_TOKENS, BUSY_NEW_TOKENS, "crowd", number, len(self.calls[number]))
            call = Call(self._target, ask)
            self.calls[number].append(call)
            await call.run(self._run.setup.request_seconds)
            if not call.begun.is_set():
                self._stop = True  # refused: asking again at once would only hammer

    def stop(self) -> None:
        self._stop = True

    def replies(self) -> list[list[Reply]]:
        return [[call.reply() for call in calls] for calls in self.calls]


async def fairness(run: Run) -> None:
    """One account fills every place and the line; another's short request must not stand behind it."""
    clients = FAIR_SLOTS + WAITING
    starting = run.ours(Size(FAIR_SLOTS, longest=1_024, total=8_192))
    key = await servers.add_account(run.setup, run.data_dir, "guest")
    async with starting as server:
        run.note_command("fairness", server)
        guest = server.target.with_key(key)
        alone = await _visits(run, guest, "alone", 5)
        crowd = Crowd(run, server.target, clients)
        tasks = [asyncio.create_task(crowd.client(number)) for number in range(clients)]
        try:
            await _busy(crowd, tasks)
            visits = await _visits(run, guest, "visit", TRIALS)
            crowd.stop()
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        counted = await counters(server)
    _report_fairness(run, alone, visits, crowd.replies(), counted)


async def _busy(crowd: Crowd, tasks: Sequence[asyncio.Task[None]]) -> None:
    """Waits until every place generates."""
    while sum(call.begun.is_set() for calls in crowd.calls for call in calls) < FAIR_SLOTS:
        if any(task.done() for task in tasks):
            raise BenchError(f"The busy account was refused: {crowd.replies()[0]}.")
        await asyncio.sleep(0.02)
    await asyncio.sleep(1.0)


async def _visits(run: Run, guest: Target, what: str, count: int) -> list[Reply]:
    """Short calls, one at a time, at moments that have nothing to do with the steps."""
    replies = []
    draw = random.Random(run.name)
    for number in range(count):
        await asyncio.sleep(draw.uniform(*PAUSE))
        call = Call(guest, run.ask(GUEST_TOKENS, GUEST_NEW_TOKENS, what, number))
        await call.run(run.setup.request_seconds)
        reply = call.reply()
        reply.tokens(GUEST_NEW_TOKENS)
        replies.append(reply)
        say(f"fairness: {what} {number + 1} of {count}, first text after {reply.first_text:.2f} s")
    return replies


def decode_steps(visit: Reply, crowd: Sequence[Sequence[Reply]]) -> int:
    """Decode steps from the visit's request to its first text: every step gives each stream of the crowd one token.

    So the client with the most texts in that time counts the steps, the one that was under way at the request included.
    """
    begin, end = visit.sent, visit.sent + visit.first_text
    return max(sum(begin < when <= end for reply in client for when in reply.texts) for client in crowd)


def _report_fairness(
    run: Run, alone: Sequence[Reply], visits: Sequence[Reply], crowd: Sequence[Sequence[Reply]], counted: dict[str, Any]
) -> None:
    steps = [decode_steps(visit, crowd) for visit in visits]
    allowed = [
        STEPS_ALLOWED + -(-(visit.usage.prompt_tokens if visit.usage else 0) // SMALLEST_PREFILL) for visit in visits
    ]
    within = sum(took <= most for took, most in zip(steps, allowed, strict=True))
    replies = [reply for client in crowd for reply in client]
    hurt = sum(not _whole(reply) for reply in replies)
    add, name = run.add, "fairness"
    note = (
        f"{STEPS_ALLOWED} decode steps and one per {SMALLEST_PREFILL} tokens of its own prompt; "
        "steps are counted by the texts of the busy account's streams"
    )
    goal = Goal(len(visits))
    add(
        Row(
            name,
            f"first token in time, of {len(visits)}",
            "visits",
            (within,),
            goal=goal,
            goal_on_ratio=False,
            note=note,
        )
    )
    add(Row(name, "decode steps to the first token", "steps", tuple(map(float, steps))))
    add(Row(name, "first text of a visit", "s", tuple(visit.first_text for visit in visits)))
    add(Row(name, "first text on the idle server", "s", tuple(visit.first_text for visit in alone)))
    goal = Goal(0, at_least=False)
    add(
        Row(
            name,
            f"busy account's calls that lost tokens, of {len(replies)}",
            "calls",
            (hurt,),
            goal=goal,
            goal_on_ratio=False,
        )
    )
    if "preempted" in counted:
        add(Row(name, "preemptions", "times", (float(counted["preempted"]),)))


def _whole(reply: Reply) -> bool:
    try:
        return reply.tokens(BUSY_NEW_TOKENS) == BUSY_NEW_TOKENS
    except BenchError:
        return False


# ── host time, idling, memory, start ─────────────────────────────────────────────────────────────────────────────


async def burst(run: Run, server: Server, new: int, *seed: object, temperature: float | None = None) -> None:
    """All streams at once, each for `new` tokens."""
    sampling = run.setup.sampling
    if temperature is not None:
        sampling = replace(sampling, temperature=temperature)
    asks: list[Ask] = [
        replace(run.ask(PROMPT_TOKENS, new, *seed, stream), sampling=sampling) for stream in range(BUSY_STREAMS)
    ]
    for reply in await together([Call(server.target, ask) for ask in asks], run.setup.request_seconds):
        reply.tokens(new)


async def host_time(run: Run) -> None:
    """What a step costs outside llama_decode; a fresh server per temperature, whose counters hold only this load."""
    for temperature, goal in HOST_GOALS.items():
        async with run.ours(Size(BUSY_STREAMS, longest=512, total=BUSY_STREAMS * 512)) as server:
            run.note_command("host-time", server)
            await burst(run, server, HOST_NEW_TOKENS, "host", temperature, temperature=temperature)
            counted = await counters(server)
        say(f"host time: temperature {temperature:g} done")
        values = [(float(counted[name]),) if name in counted else () for name in ("host_ms_p50", "host_ms_p95")]
        what = f"{BUSY_STREAMS} streams, {'greedy' if not temperature else f'temperature {temperature:g}'}"
        note = "" if values[0] else NO_COUNTERS
        run.add(Row("host-time", f"{what}, p50", "ms", values[0], goal=goal, goal_on_ratio=False, note=note))
        run.add(Row("host-time", f"{what}, p95", "ms", values[1]))
        if "decode_ms_p50" in counted:
            run.add(Row("host-time", f"{what}, inside llama_decode", "ms", (float(counted["decode_ms_p50"]),)))


async def idle(run: Run) -> None:
    """Processor time of a server that has worked and now waits."""
    percent: dict[str, float] = {}
    async with run.pair(SMALL) as both:
        for server in both:
            run.note_command("idle", server)
            with servers.measured(server):
                await server.call(run.ask(24, 8, "idle", server.name), run.setup.request_seconds)
                await asyncio.sleep(2.0)
                before, started = cpu_seconds(server.child.pid), time.perf_counter()
                await asyncio.sleep(IDLE_SECONDS)
                used = cpu_seconds(server.child.pid) - before
                percent[server.name] = 100 * used / (time.perf_counter() - started)
    ours, theirs = (tuple(percent[name] for name in names if name in percent) for names in ([both[0].name], [PEER]))
    goal = Goal(1.0, at_least=False)
    peer_name = PEER if theirs else ""
    run.add(
        Row(
            "idle", f"over {IDLE_SECONDS:.0f} s", "% of a core", ours, theirs, peer_name, goal=goal, goal_on_ratio=False
        )
    )


async def memory(run: Run) -> None:
    """Resident memory beside the mapped model file, the KV cache and llama.cpp's compute buffers, after a full load."""
    async with run.ours(Size(BUSY_STREAMS, longest=512, total=BUSY_STREAMS * 512)) as server:
        run.note_command("memory", server)
        await burst(run, server, 32, "memory")
        mapped, rest = resident_bytes(server.child.pid, run.setup.model)
        counted = await counters(server)
    parts = memory_parts(counted, mapped, rest)
    note = "" if "compute_bytes" in counted else f"llama.cpp's buffers are counted as ours: {NO_COUNTERS}"
    goal = Goal(150, at_least=False)
    own = (parts.pop("own") / MEGABYTE,)
    run.add(Row("memory", "above model, KV and buffers", "MB", own, goal=goal, goal_on_ratio=False, note=note))
    for name, size in parts.items():
        run.add(Row("memory", name, "MB", (size / MEGABYTE,)))


def memory_parts(counted: dict[str, Any], mapped: int, rest: int) -> dict[str, float]:
    """Bytes of each part; `weights_bytes` is what llama.cpp took for the model beside the mapped file: repacked weights
    and the tables of its vocabulary."""
    names = ("weights_bytes", "kv_bytes", "parked_bytes", "compute_bytes")
    weights, kv, parked, compute = (int(counted.get(name, 0)) for name in names)
    return {
        "own": rest - kv - parked - compute - weights,
        "model, resident": mapped + weights,
        "KV cache": kv,
        "KV cache, parked prefixes": parked,
        "compute buffers": compute,
    }


async def guide(run: Run) -> None:
    """The built-in guide as a fresh box serves it, whatever model the run is about: one stream, and all memory."""
    rates: list[float] = []
    async with run.ours(GUIDE_SIZE, GUIDE) as server:
        run.note_command("guide", server)
        for number in range(1 + run.rounds):
            call = Call(server.target, run.ask(PROMPT_TOKENS, GUIDE_NEW_TOKENS, "guide", number))
            await call.run(run.setup.request_seconds)
            reply = call.reply()
            if number:  # the first one warms up
                rates.append((reply.tokens(GUIDE_NEW_TOKENS) - 1) / (reply.ended - reply.texts[0]))
        resident = sum(resident_bytes(server.child.pid, GUIDE)) / MEGABYTE
    rate_goal, memory_goal = Goal(300), Goal(350, at_least=False)
    run.add(Row("guide", "1 stream", "tokens/s", tuple(rates), goal=rate_goal, goal_on_ratio=False))
    run.add(Row("guide", "the whole server, resident", "MB", (resident,), goal=memory_goal, goal_on_ratio=False))


async def start(run: Run) -> None:
    """From exec to the first 200 of /readyz, less the model's load."""
    seconds, loads = [], []
    for number in range(run.rounds):
        async with run.ours(SMALL) as server:
            ready = await servers.ready(server, "/readyz")
            counted = await counters(server)
        run.note_command("ready", server)
        loads.append(float(counted.get("load_seconds", 0.0)))
        seconds.append(ready - loads[-1])
        say(f"ready: start {number + 1} of {run.rounds}, {ready:.2f} s, of it {loads[-1]:.2f} s loading")
    note = "" if any(loads) else f"the load's time is included: {NO_COUNTERS}"
    goal = Goal(2.0, at_least=False)
    run.add(
        Row("ready", "exec to ready, less the load", "s", tuple(seconds), goal=goal, goal_on_ratio=False, note=note)
    )
    run.add(Row("ready", "the model's load", "s", tuple(loads)))
    say(f"ready: median {statistics.median(seconds):.2f} s")
