"""The scenarios that set our server beside the peer: throughput, a shared prefix, and a long prompt among streams."""

from __future__ import annotations

import asyncio
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from scripts.benchlib import servers
from scripts.benchlib.client import Ask, BenchError, Call, Reply, Target, together
from scripts.benchlib.figures import Goal, Row, compared
from scripts.benchlib.run import Run
from scripts.benchlib.servers import PEER, Server, Size

NEW_TOKENS = 48
PROMPT_TOKENS = 48
LEAST_CALLS = 8  # of one measurement; fewer streams take several turns each
STREAM_GOALS = {1: Goal(0.97), 8: Goal(1.0, lenient=True), 32: Goal(1.05)}
BATCHED_BENCH_GOALS = {32: Goal(0.92)}

SHARERS = 16
SHARED_TOKENS = 600
OWN_TOKENS = 24
SHARED_NEW_TOKENS = 32

INTRUDED = 8
INTRUDER_TOKENS = 4_000
ENDLESS = 1_024  # tokens of a stream that outlives the intruder's prompt
SETTLED_SECONDS = 1.5  # llama-server looks for gone clients once a second


# ── throughput ───────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second of one measurement: prompts included, and while every stream was generating."""

    aggregate: float
    decoding: float
    prompt_tokens: int  # of the longest prompt


async def load(
    target: Target, streams: int, turns: int, ask: Callable[[int, int], Ask], seconds: float
) -> list[list[Reply]]:
    """`streams` clients, each with `turns` calls one after the other; the replies turn by turn."""
    calls = [[Call(target, ask(stream, turn)) for stream in range(streams)] for turn in range(turns)]

    async def client(stream: int) -> None:
        for turn in range(turns):
            await calls[turn][stream].run(seconds)

    await asyncio.gather(*(client(stream) for stream in range(streams)))
    return [[call.reply() for call in turn] for turn in calls]


def speed(turns: Sequence[Sequence[Reply]], new: int) -> Speed:
    """Raises BenchError unless every call ended well."""
    replies = [reply for turn in turns for reply in turn]
    tokens = sum(reply.tokens(new) for reply in replies)
    seconds = max(reply.ended for reply in replies) - min(reply.sent for reply in replies)
    longest = max(reply.usage.prompt_tokens for reply in replies if reply.usage)
    return Speed(tokens / seconds, decoding_rate(turns, new), longest)


def decoding_rate(turns: Sequence[Sequence[Reply]], new: int) -> float:
    """Tokens per second in the stretches in which all streams of a turn had begun and none had ended; 0 without any.

    A piece of text may hold several tokens, so the pieces only say which share of the server's own count lies inside.
    """
    tokens = seconds = 0.0
    for turn in turns:
        begin = max(reply.texts[0] for reply in turn)
        end = min(reply.texts[-1] for reply in turn)
        if end > begin:
            seconds += end - begin
            for reply in turn:
                inside = sum(begin < when <= end for when in reply.texts)
                tokens += new * inside / len(reply.texts)
    return tokens / seconds if seconds else 0.0


async def throughput(run: Run, streams: Sequence[int]) -> None:
    """Aggregate tokens per second at each number of streams, beside the peer's and the bare loop's."""
    most = max(streams)
    async with run.pair(Size(most, longest=512, total=most * 512)) as both:
        for server in both:
            run.note_command("throughput", server)
        for count in streams:
            await _throughput_at(run, both, count)


async def _throughput_at(run: Run, both: Sequence[Server], count: int) -> None:
    turns = math.ceil(LEAST_CALLS / count)

    async def measure(server: Server, number: int) -> Speed:
        def ask(stream: int, turn: int) -> Ask:
            return run.ask(PROMPT_TOKENS, NEW_TOKENS, "throughput", count, number, stream, turn)

        return speed(await load(server.target, count, turns, ask, run.setup.request_seconds), NEW_TOKENS)

    async def ceiling(number: int) -> Speed:
        command = servers.batched_bench_command(run.setup, count, PROMPT_TOKENS, NEW_TOKENS)
        rate = servers.batched_bench_rate(await servers.run_command(command, run.setup))
        return Speed(rate, rate, PROMPT_TOKENS)

    sides = {server.name: run.on(server, measure) for server in both}
    if run.setup.batched_bench:
        sides["llama-batched-bench"] = ceiling
    results = await run.interleaved(f"throughput at {count}", sides)
    _report_throughput(run, count, both[0].name, results)


def _report_throughput(run: Run, count: int, own: str, results: dict[str, list[Speed]]) -> None:
    ours, theirs = results[own], results.get(PEER, [])
    top = [side.decoding for side in results.get("llama-batched-bench", [])]
    what = f"{count} stream{'s' if count > 1 else ''}"
    row = Row("throughput", what, "tok/s", goal=STREAM_GOALS.get(count))
    run.add(compared(row, [s.aggregate for s in ours], [s.aggregate for s in theirs], PEER))
    row = Row("throughput", f"{what}, decoding", "tok/s", goal=None)
    run.add(compared(row, [s.decoding for s in ours], [s.decoding for s in theirs], PEER))
    if top:
        note = "tokens per second while all streams generate, beside llama.cpp's bare loop (no sampling, no HTTP)"
        row = Row("throughput", f"{what}, of the ceiling", "tok/s", goal=BATCHED_BENCH_GOALS.get(count), note=note)
        run.add(compared(row, [s.decoding for s in ours], top, "llama-batched-bench"))
        row = Row("throughput", f"{what}, prompts included, of the ceiling", "tok/s")
        run.add(compared(row, [s.aggregate for s in ours], top, "llama-batched-bench"))


# ── shared prefix ────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Shared:
    """Seconds to the end of all answers, median seconds to the first text, share of prompt tokens not computed."""

    total: float
    first_text: float
    cached: float


async def shared_prefix(run: Run) -> None:
    """Simultaneous requests behind one system prompt that neither server has seen before."""

    async def measure(server: Server, number: int) -> Shared:
        system = run.lengths.text(SHARED_TOKENS, f"{run.name} shared {number}", with_template=False)
        asks = [run.ask(OWN_TOKENS, SHARED_NEW_TOKENS, "shared", number, i, system=system) for i in range(SHARERS)]
        return shared(await together([Call(server.target, ask) for ask in asks], run.setup.request_seconds))

    async with run.pair(Size(SHARERS, longest=1_024, total=SHARERS * 1_024)) as both:
        for server in both:
            run.note_command("shared-prefix", server)
        results = await run.interleaved("shared prefix", {server.name: run.on(server, measure) for server in both})
    ours, theirs = results[both[0].name], results.get(PEER, [])
    scenario = "shared-prefix"
    row = Row(scenario, f"{SHARERS} at once, total time", "s", goal=Goal(6.0))
    run.add(compared(row, [s.total for s in ours], [s.total for s in theirs], PEER, inverse=True))
    row = Row(scenario, "time to first text, p50", "s", goal=Goal(5.0))
    run.add(compared(row, [s.first_text for s in ours], [s.first_text for s in theirs], PEER, inverse=True))
    row = Row(scenario, "prompt tokens not computed again", "%", peer_name=PEER if theirs else "")
    run.add(replace(row, ours=tuple(s.cached * 100 for s in ours), peer=tuple(s.cached * 100 for s in theirs)))


def shared(replies: Sequence[Reply]) -> Shared:
    """Raises BenchError unless every call ended well."""
    for reply in replies:
        reply.tokens(SHARED_NEW_TOKENS)
    usages = [reply.usage for reply in replies if reply.usage]
    return Shared(
        total=max(reply.ended for reply in replies) - min(reply.sent for reply in replies),
        first_text=statistics.median(reply.first_text for reply in replies),
        cached=sum(usage.cached_tokens for usage in usages) / sum(usage.prompt_tokens for usage in usages),
    )


# ── intruder ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Intrusion:
    """Seconds: the longest and the median gap while the long prompt was read, and until its own first text."""

    longest_gap: float
    median_gap: float
    first_text: float


async def intruder(run: Run) -> None:
    """Streams are generating when one long prompt arrives: the longest silence of any of them."""

    async def measure(server: Server, number: int) -> Intrusion:
        asks = [run.ask(PROMPT_TOKENS, ENDLESS, "intruded", number, stream) for stream in range(INTRUDED)]
        calls = [Call(server.target, ask) for ask in asks]
        long = Call(server.target, run.ask(INTRUDER_TOKENS, 8, "intruder", number))
        await _intrude(calls, long, run.setup.request_seconds)
        return intrusion([call.reply() for call in calls], long.reply())

    total = INTRUDED * (PROMPT_TOKENS + ENDLESS) + INTRUDER_TOKENS + 2_048
    async with run.pair(Size(INTRUDED + 1, longest=INTRUDER_TOKENS + 512, total=total)) as both:
        for server in both:
            run.note_command("intruder", server)
        results = await run.interleaved("intruder", {server.name: run.on(server, measure) for server in both})
    ours, theirs = results[both[0].name], results.get(PEER, [])
    row = Row("intruder", "longest gap between tokens", "s", goal=Goal(4.0))
    run.add(compared(row, [i.longest_gap for i in ours], [i.longest_gap for i in theirs], PEER, inverse=True))
    row = Row("intruder", "median gap meanwhile", "s")
    run.add(compared(row, [i.median_gap for i in ours], [i.median_gap for i in theirs], PEER, inverse=True))
    row = Row("intruder", "the long prompt's first text", "s")
    run.add(compared(row, [i.first_text for i in ours], [i.first_text for i in theirs], PEER, inverse=True))


async def _intrude(calls: Sequence[Call], long: Call, seconds: float) -> None:
    """Lets the streams get going, sends the long prompt, waits for its end, and hangs up."""
    tasks = [asyncio.create_task(call.run(seconds)) for call in calls]
    try:
        await begun(calls, tasks)
        await asyncio.sleep(1.0)
        await long.run(seconds)
        await asyncio.sleep(0.5)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.sleep(SETTLED_SECONDS)


async def begun(calls: Sequence[Call], tasks: Sequence[asyncio.Task[None]]) -> None:
    """Waits until every call has text. Raises BenchError when one ends before that; its own time limit bounds this."""
    while not all(call.begun.is_set() for call in calls):
        for call, task in zip(calls, tasks, strict=True):
            if task.done() and not call.begun.is_set():
                raise BenchError(f"A stream did not begin: {call.reply().error or 'it brought no text'}.")
        await asyncio.sleep(0.01)


def intrusion(streams: Sequence[Reply], long: Reply) -> Intrusion:
    """Raises BenchError when the long call failed or a stream ended before the long prompt was read."""
    begin, end = long.sent, long.sent + long.first_text
    gaps: list[float] = []
    for stream in streams:
        if stream.error:
            raise BenchError(f"A stream failed: {stream.error}.")
        if stream.usage is not None and stream.texts[-1] < end:
            raise BenchError("A stream ended before the long prompt was read: nothing was disturbed.")
        pairs = zip(stream.texts, [*stream.texts[1:], stream.ended], strict=True)
        gaps += [later - earlier for earlier, later in pairs if later > begin and earlier < end]
    return Intrusion(max(gaps), statistics.median(gaps), long.first_text)
