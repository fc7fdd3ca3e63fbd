"""The benchmark's own client, statistics and processes: against small real servers on loopback."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from scripts import bench
from scripts.benchlib import alone, pairs, prompts, servers
from scripts.benchlib.client import (
    APPLIANCE,
    OPENAI,
    Ask,
    BenchError,
    Call,
    Dialect,
    Reply,
    Sampling,
    Target,
    Usage,
    get,
    together,
)
from scripts.benchlib.figures import Goal, Row, compared, quantile, ratios, spread, table
from scripts.benchlib.processes import Processors, child, cpu_seconds, resident_bytes
from scripts.benchlib.run import Run
from scripts.benchlib.servers import Setup, Size

Answer = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]
STEP = 0.05  # seconds between two tokens of the loopback server


# ── a small real server ──────────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def listening(answer: Answer, dialect: Dialect = APPLIANCE) -> AsyncIterator[Target]:
    """A real socket whose every request is answered by `answer`, which gets the whole request."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next((int(line.split(b":")[1]) for line in head.split(b"\r\n") if b"Content-Length" in line), 0)
        body = await reader.readexactly(length)
        try:
            await answer(head + body, writer)
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield Target(server.sockets[0].getsockname()[1], dialect, key="oai_secret")


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def our_events(tokens: int) -> list[bytes]:
    """What our server sends: one event per token, and the last one with the usage."""
    usage = {"prompt_tokens": 7, "completion_tokens": tokens, "total_tokens": tokens + 7, "cached_tokens": 3}
    last = {"done": True, "text": "x" * tokens, "usage": usage, "finish_reason": "length"}
    return [b'data: {"delta":"x"}\n\n'] * tokens + [b"data: " + json.dumps(last).encode() + b"\n\n"]


def peer_events(tokens: int) -> list[bytes]:
    """What llama-server sends, the event without text before the first one included."""

    def event(**fields: object) -> bytes:
        return b"data: " + json.dumps(fields, separators=(",", ":")).encode() + b"\n\n"

    usage = {"prompt_tokens": 7, "completion_tokens": tokens, "prompt_tokens_details": {"cached_tokens": 2}}
    return [
        event(choices=[{"delta": {"role": "assistant", "content": None}}]),
        *[event(choices=[{"delta": {"content": "x"}}])] * tokens,
        event(choices=[{"finish_reason": "length", "delta": {}}]),
        event(choices=[], usage=usage),
        b"data: [DONE]\n\n",
    ]


def streaming(events: list[bytes], seconds: float = 0.0) -> Answer:
    async def answer(request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD)
        for event in events:
            writer.write(chunk(event))
            await writer.drain()
            if b"x" in event:
                await asyncio.sleep(seconds)
        writer.write(chunk(b""))
        await writer.drain()

    return answer


def raw(data: bytes, pieces: int = 1) -> Answer:
    async def answer(request: bytes, writer: asyncio.StreamWriter) -> None:
        size = -(-len(data) // pieces)
        for at in range(0, len(data), size):
            writer.write(data[at : at + size])
            await writer.drain()
            await asyncio.sleep(0.001 if pieces > 1 else 0)

    return answer


async def one(answer: Answer, dialect: Dialect = APPLIANCE, ask: Ask | None = None, seconds: float = 10) -> Reply:
    async with listening(answer, dialect) as target:
        call = Call(target, ask or Ask("hello", 4))
        await call.run(seconds)
        return call.reply()


def reply(texts: list[float], *, sent: float = 0.0, ended: float | None = None, new: int | None = None) -> Reply:
    """A call as if it had gone so."""
    usage = Usage(10, len(texts) if new is None else new, 0)
    return Reply(200, sent, texts[-1] if ended is None else ended, tuple(texts), usage)


# ── client ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("dialect", "events", "cached"), [(APPLIANCE, our_events(4), 3), (OPENAI, peer_events(4), 2)], ids=["ours", "peer"]
)
def test_a_stream_is_read_in_both_dialects(dialect: Dialect, events: list[bytes], cached: int) -> None:
    got = asyncio.run(one(streaming(events, STEP), dialect))
    assert got.tokens(4) == 4
    assert got.usage == Usage(7, 4, cached)
    gaps = [later - earlier for earlier, later in zip(got.texts, got.texts[1:], strict=False)]
    assert len(gaps) == 3
    assert all(STEP * 0.6 < gap < STEP * 6 for gap in gaps)
    assert 0 < got.first_text < 3 * STEP < got.seconds


def test_tokens_are_the_servers_count_and_not_the_number_of_events() -> None:
    merged = [b'data: {"delta":"xxx"}\n\n', our_events(4)[-1]]
    got = asyncio.run(one(streaming(merged)))
    assert len(got.texts) == 1
    assert got.tokens(4) == 4


@pytest.mark.parametrize("pieces", [1, 7, 97, 400])
def test_events_survive_any_cut_of_the_bytes(pieces: int) -> None:
    body = b"".join(our_events(5))
    wire = HEAD + b"".join(chunk(body[at : at + 11]) for at in range(0, len(body), 11)) + chunk(b"")
    got = asyncio.run(one(raw(wire, pieces), ask=Ask("hello", 5)))
    assert got.tokens(5) == 5
    assert len(got.texts) == 5


def test_the_request_says_everything_that_must_not_be_left_to_defaults() -> None:
    seen: list[bytes] = []

    async def answer(request: bytes, writer: asyncio.StreamWriter) -> None:
        seen.append(request)
        await streaming(our_events(2))(request, writer)

    asyncio.run(one(answer, ask=Ask("hello", 2, system="be brief", seed=5)))
    head, _, body = seen[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /llm/chat HTTP/1.1\r\n")
    assert b"Authorization: Bearer oai_secret" in head
    assert json.loads(body) == {
        "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}],
        **{"max_tokens": 2, "temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05},
        **{"seed": 5, "stream": True, "ignore_eos": True},
    }


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (raw(b'HTTP/1.1 503 Busy\r\nContent-Length: 16\r\n\r\n{"error":"busy"}'), "503.*busy"),
        (streaming(our_events(3)), "3 tokens instead of 4"),
        (streaming(our_events(4)[:-1]), "ended early"),
        (streaming([b'data: {"delta":"x"}\n\n', b'data: {"error":{"message":"broke"}}\n\n']), "broke"),
        (raw(b""), "status 0"),
    ],
    ids=["refused", "short", "no-end", "error-event", "nothing"],
)
def test_a_call_that_did_not_end_well_never_counts(answer: Answer, words: str) -> None:
    got = asyncio.run(one(answer))
    with pytest.raises(BenchError, match=words):
        got.tokens(4)


def test_a_silent_server_costs_no_more_than_the_time_limit() -> None:
    async def silent(request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + chunk(our_events(1)[0]))
        await asyncio.sleep(30)

    started = time.perf_counter()
    got = asyncio.run(one(silent, seconds=0.2))
    assert time.perf_counter() - started < 5
    assert got.error == "no end within 0 s"
    assert len(got.texts) == 1


def test_hanging_up_is_no_failure_of_the_server() -> None:
    async def meet() -> Reply:
        async with listening(streaming(our_events(400), STEP)) as target:
            call = Call(target, Ask("hello", 400))
            task = asyncio.create_task(call.run())
            await call.begun.wait()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return call.reply()

    got = asyncio.run(meet())
    assert (got.error, got.usage) == ("", None)
    assert 1 <= len(got.texts) < 400


def test_a_dead_servers_last_words_are_in_the_failure(tmp_path: Path) -> None:
    with child([sys.executable, "-c", "print('out of luck'); raise SystemExit(9)"], tmp_path / "log") as dead:
        dead.process.wait(20)
        server = servers.Server("appliance", dead, Target(1, APPLIANCE), [])
        with pytest.raises(BenchError, match=r"no figure\nappliance ended with 9:\nout of luck"):
            with servers.last_words(server):
                raise BenchError("no figure")


def test_nobody_listening_is_a_failed_call_and_no_page() -> None:
    async def meet() -> tuple[Reply, int]:
        async with listening(raw(b"")) as target:
            pass
        call = Call(target, Ask("hello", 4))
        await call.run(5)
        return call.reply(), (await get(target, "/readyz"))[0]

    got, status = asyncio.run(meet())
    assert "connection broke" in got.error
    assert status == 0


def test_a_page_is_fetched() -> None:
    async def meet() -> tuple[int, dict[str, object]]:
        page = b'HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\n{"queue": 12}'
        async with listening(raw(page)) as target:
            return await get(target, "/readyz")

    assert asyncio.run(meet()) == (200, {"queue": 12})


def test_calls_together_run_at_the_same_time() -> None:
    async def meet() -> list[Reply]:
        async with listening(streaming(our_events(8), STEP)) as target:
            return await together(Call(target, Ask("hello", 8)) for _ in range(6))

    got = asyncio.run(meet())
    assert [r.tokens(8) for r in got] == [8] * 6
    whole = max(r.ended for r in got) - min(r.sent for r in got)
    assert whole < 3 * 8 * STEP  # one after the other would take six times 8 steps


def test_the_key_is_not_shown() -> None:
    assert "oai_secret" not in repr(Target(1, APPLIANCE, key="oai_secret"))
    assert "hello" in repr(Ask("hello", 1))


# ── statistics ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_spread_is_median_smallest_and_largest() -> None:
    assert (spread([3, 9, 1]).median, spread([3, 9, 1]).low, spread([3, 9, 1]).high) == (3, 1, 9)
    assert str(spread([100.4, 250.2, 99])) == "100 (99.0–250)"
    with pytest.raises(ValueError, match="needs a value"):
        spread([])


def test_ratios_go_pair_by_pair_so_that_a_slow_minute_does_not_count() -> None:
    assert ratios([100, 50, 10], [50, 25, 5]) == [2, 2, 2]
    with pytest.raises(ValueError, match="as many"):
        ratios([1], [1, 2])


def test_times_shorter_turns_the_ratio_round() -> None:
    row = compared(Row("s", "f", "s", goal=Goal(6)), [2.0], [12.0], "peer", inverse=True)
    assert row.ratio == (6.0,)
    assert row.verdict == "met"
    assert compared(Row("s", "f", "s", goal=Goal(6)), [2.0], [12.0], "peer").verdict == "missed"


def test_a_quantile_lies_between_its_neighbours() -> None:
    assert quantile([4, 1, 3, 2], 0.5) == 2.5
    assert quantile([4, 1, 3, 2], 1.0) == 4


@pytest.mark.parametrize(
    ("goal", "values", "verdict"),
    [
        (Goal(1.0), [1.0, 1.1, 0.9], "met"),
        (Goal(1.0), [0.99, 1.1, 0.9], "missed"),
        (Goal(1.0, lenient=True), [0.99, 1.1, 0.9], "within the spread"),
        (Goal(1.0, lenient=True), [0.97, 0.98, 0.9], "missed"),
        (Goal(5, at_least=False), [5.0, 4.0, 9.0], "met"),
        (Goal(5, at_least=False), [5.1, 4.0, 9.0], "missed"),
    ],
)
def test_the_median_is_judged(goal: Goal, values: list[float], verdict: str) -> None:
    assert goal.judge(spread(values)) == verdict


def test_a_goal_without_measurement_is_not_met() -> None:
    assert Row("s", "f", "s", goal=Goal(1)).verdict == "not measured"
    assert Row("s", "f", "s", ours=(1.0,)).verdict == ""


def test_the_table_has_every_row_with_goal_and_verdict() -> None:
    rows = [
        compared(Row("throughput", "8 streams", "tok/s", goal=Goal(1.0)), [10, 12, 11], [10, 10, 10], "llama-server"),
        Row(
            "idle", "over 10 s", "% of a core", (0.3,), goal=Goal(1, at_least=False), goal_on_ratio=False, note="quiet"
        ),
    ]
    head, _, first, second, note = table(rows).splitlines()
    assert head.split() == ["scenario", "figure", "ours", "peer", "ratio", "goal"]
    assert first.split("  ")[0] == "throughput"
    assert "11.0 (10.0–12.0)" in first
    assert "1.10 (1.00–1.20)" in first
    assert first.endswith("≥ 1 ×  met")
    assert second.split()[-3:] == ["≤", "1", "met"]
    assert note == "idle, over 10 s: quiet"
    assert json.loads(json.dumps(rows[0].as_json()))["ratio"]["median"] == 1.1


# ── what the scenarios compute ───────────────────────────────────────────────────────────────────────────────────


def test_aggregate_speed_counts_from_the_first_request_to_the_last_end() -> None:
    got = pairs.speed([[reply([1.0, 2.0, 3.0]), reply([2.0, 3.0, 4.0], sent=1.0)]], 3)
    assert got.aggregate == 6 / 4


def test_decoding_speed_leaves_prompts_and_stragglers_out() -> None:
    turn = [reply([1.0, 2.0, 3.0, 4.0]), reply([2.0, 3.0, 4.0, 5.0])]
    assert pairs.decoding_rate([turn], 4) == 4 / 2  # from 2.0 to 4.0 each stream brings two
    assert pairs.decoding_rate([[reply([1.0, 2.0]), reply([3.0, 4.0])]], 2) == 0


def test_decoding_speed_counts_merged_tokens() -> None:
    assert pairs.decoding_rate([[reply([1.0, 2.0, 3.0], new=6)]], 6) == 2 * 2 / 2


def test_the_longest_gap_is_taken_only_while_the_long_prompt_is_read() -> None:
    before = [0.0, 9.0]  # nobody's fault but the stream's own
    stream = reply([*before, 10.0, 12.5, 13.0, 14.0, 30.0], ended=31.0)
    long = reply([13.5, 13.6], sent=11.0)
    got = pairs.intrusion([stream], long)
    assert (got.longest_gap, got.first_text) == (2.5, 2.5)


def test_a_stream_that_is_silent_until_the_end_shows_as_the_gap() -> None:
    hung = Reply(200, 0.0, 50.0, (1.0, 2.0), None)  # cancelled at 50
    assert pairs.intrusion([hung], reply([40.0], sent=3.0)).longest_gap == 48.0


def test_a_stream_that_ended_too_early_makes_no_figure() -> None:
    with pytest.raises(BenchError, match="ended before"):
        pairs.intrusion([reply([1.0, 2.0])], reply([40.0], sent=3.0))


def test_the_crowd_is_the_clock_of_the_visit() -> None:
    crowd = [[reply([1.0, 2.0]), reply([3.0, 4.0, 5.0, 6.0])], [reply([4.5])]]
    visit = reply([5.0, 6.0], sent=1.5)
    assert alone.decode_steps(visit, crowd) == 4  # 2, 3, 4 and 5


def test_a_shared_prefix_is_timed_as_a_whole() -> None:
    got = pairs.shared([reply([1.0, 2.0], sent=0.5, new=32), reply([3.0, 7.0], sent=0.0, new=32)])
    assert (got.total, got.first_text, got.cached) == (7.0, 1.75, 0.0)


def test_memory_is_what_model_cache_and_buffers_leave() -> None:
    counted = {"kv_bytes": 50, "compute_bytes": 20, "weights_bytes": 5, "parked_bytes": 3}
    assert alone.memory_parts(counted, mapped=1_000, rest=100) == {
        "own": 22,
        "model, resident": 1_005,
        "KV cache": 50,
        "KV cache, parked prefixes": 3,
        "compute buffers": 20,
    }


def test_prompts_have_the_wanted_length_and_never_repeat() -> None:
    async def prompt_tokens(text: str) -> int:
        return 9 + 2 * len(text.split())

    lengths = asyncio.run(prompts.measure(prompt_tokens, "run"))
    assert (lengths.template, lengths.per_word) == (9, 2)
    assert len(lengths.text(49, "a").split()) == 20
    assert len(lengths.text(600, "a", with_template=False).split()) == 300
    assert lengths.text(49, "a") == lengths.text(49, "a")
    assert lengths.text(49, "a") != lengths.text(49, "b")


# ── servers and processes ────────────────────────────────────────────────────────────────────────────────────────


def setup(tmp_path: Path, **given: object) -> Setup:
    fields = {"kv_mode": "unified", "llama_server": Path("llama-server"), "batched_bench": Path("bare"), **given}
    return Setup(model=tmp_path / "m.gguf", threads=3, sampling=Sampling(), workspace=tmp_path, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(("mode", "flag", "context"), [("unified", "-kvu", "4000"), ("split", "-no-kvu", "9000")])
def test_both_servers_get_the_same_sizes(tmp_path: Path, mode: str, flag: str, context: str) -> None:
    same, size = setup(tmp_path, kv_mode=mode), Size(slots=9, longest=1_000, total=4_000)
    peer = servers.peer_command(same, size, 81)
    ours = servers.our_command(same, size, 81, tmp_path)
    assert flag in peer
    assert servers.our_environ(same)["APPLIANCE_ENGINE__KV_MODE"] == mode
    assert servers.our_environ(same)["APPLIANCE_ENGINE__THREADS"] == peer[peer.index("-t") + 1] == "3"
    assert ours[ours.index("--context") + 1] == peer[peer.index("-c") + 1] == context
    assert ours[ours.index("--slots") + 1] == peer[peer.index("-np") + 1] == "9"
    assert ours[ours.index("--model") + 1] == peer[peer.index("-m") + 1] == str(tmp_path / "m.gguf")


def test_the_peer_keeps_its_default_batches_and_the_bare_loop_uses_the_same(tmp_path: Path) -> None:
    assert "-b" not in servers.peer_command(setup(tmp_path), Size(1, 10, 10), 81)
    bare = servers.batched_bench_command(setup(tmp_path), 32, 48, 48)
    assert bare[bare.index("-b") + 1 : bare.index("-b") + 4] == ["2048", "-ub", "512"]
    assert bare[bare.index("-c") + 1] == str(32 * 96)


def test_the_bare_loops_rate_is_read_and_its_absence_is_an_error() -> None:
    assert servers.batched_bench_rate('loading\n{"pl": 32, "speed_pp": 9.0, "speed_tg": 81.5}\n') == 81.5
    with pytest.raises(BenchError, match="no result"):
        servers.batched_bench_rate("main: illegal instruction")


SLEEPER = [sys.executable, "-c", "import time; time.sleep(60)"]
FAMILY = "import subprocess,sys,time; p=subprocess.Popen(['sleep','60']); print(p.pid, flush=True); time.sleep(60)"
STUBBORN = "import signal,time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"


def gone(pid: int) -> bool:
    """Neither running nor stopped; a zombie that nobody has waited for is gone, too."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def said(log: Path) -> str:
    """The first line of a child's output, once it is there."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if (text := log.read_text()).endswith("\n"):
            return text.strip()
        time.sleep(0.02)
    raise AssertionError("the child said nothing")


@pytest.mark.parametrize("frozen", [False, True])
def test_a_child_is_gone_after_an_error_also_when_frozen(tmp_path: Path, frozen: bool) -> None:
    with pytest.raises(KeyboardInterrupt), child(SLEEPER, tmp_path / "log") as started:
        assert started.running
        assert not Path(f"/proc/{started.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        if frozen:
            started.freeze()
        raise KeyboardInterrupt
    assert gone(started.pid)


def test_grandchildren_go_with_the_child(tmp_path: Path) -> None:
    with child([sys.executable, "-c", FAMILY], tmp_path / "log") as started:
        grandchild = int(said(tmp_path / "log"))
        assert Path(f"/proc/{grandchild}").exists()
    assert gone(started.pid)
    assert gone(grandchild)


def test_a_child_that_ignores_sigterm_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scripts.benchlib.processes.PATIENCE", 0.3)
    with child([sys.executable, "-c", STUBBORN], tmp_path / "log") as started:
        assert said(tmp_path / "log") == "deaf"
    assert started.process.returncode == -signal.SIGKILL


def test_a_child_dies_with_its_killed_parent(tmp_path: Path) -> None:
    parent = (
        "import sys,time; from pathlib import Path; from scripts.benchlib.processes import child\n"
        f"with child(['sleep', '60'], Path({str(tmp_path / 'inner')!r})) as c:\n"
        " print(c.pid, flush=True); time.sleep(60)"
    )
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-c", parent], stdout=log, cwd=Path(bench.__file__).parents[1])
    inner = int(said(tmp_path / "log"))
    assert Path(f"/proc/{inner}").exists()
    process.kill()
    process.wait(10)
    assert gone(inner)


def test_a_frozen_process_uses_no_processor_and_a_thawed_one_does(tmp_path: Path) -> None:
    with child([sys.executable, "-c", "print('go', flush=True)\nwhile True: pass"], tmp_path / "log") as busy:
        said(tmp_path / "log")
        busy.freeze()
        time.sleep(0.05)
        before = cpu_seconds(busy.pid)
        time.sleep(0.4)
        assert cpu_seconds(busy.pid) == before
        busy.thaw()
        time.sleep(0.6)
        assert cpu_seconds(busy.pid) > before


SPIN = "import time; print('go', flush=True); end = time.time() + 20\nwhile time.time() < end: pass"


def test_the_load_of_others_is_told_from_our_own(tmp_path: Path) -> None:
    before = Processors(0.0, machine=100.0, own=10.0)
    processors = len(os.sched_getaffinity(0))
    assert Processors(10.0, 100.0 + 5 * processors, 10.0 + 5 * processors).others_since(before) == 0
    assert Processors(10.0, 100.0 + 5 * processors, 10.0).others_since(before) == 0.5
    with child([sys.executable, "-c", SPIN], tmp_path / "log"):
        said(tmp_path / "log")
        start = Processors.now()
        time.sleep(0.5)
        end = Processors.now()
        assert end.own - start.own > 0.02  # a child counts as ours while it runs,
    assert Processors.now().own >= end.own - 0.02  # and after its end


def test_a_disturbed_round_is_measured_again_with_other_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = iter([0.5, 0.0, 0.02, 0.01, 0.9, 0.0, 0.8, 0.0])  # two sides a round
    seen = iter([s for share in shares for s in (share, share)])  # asked twice: for the round and for its line
    monkeypatch.setattr(Processors, "others_since", lambda self, before: next(seen))
    run = Run(setup(tmp_path), 2, "run", "m.gguf", repeats=1)
    numbers: list[int] = []

    async def side(number: int) -> int:
        numbers.append(number)
        return number

    got = asyncio.run(run.interleaved("speed", {"ours": side, "peer": side}))
    assert numbers == [0, 0, 2, 2, 1, 1, 3, 3]
    assert got == {"ours": [2, 3], "peer": [2, 3]}
    assert run.repeated == {"speed": 2}
    assert run.others == {"speed": [0.02, 0.8]}  # the last try counts whatever it was


def test_resident_memory_is_split_by_mapping(tmp_path: Path) -> None:
    model = tmp_path / "a model.gguf"
    model.write_bytes(os.urandom(4_000_000))
    code = (
        "import mmap,sys,time; f=open(sys.argv[1],'rb')\n"
        "m=mmap.mmap(f.fileno(),0,prot=mmap.PROT_READ); sum(m[::4096])\n"
        "own=bytearray(9_000_000); print('go', flush=True); time.sleep(60)"
    )
    with child([sys.executable, "-c", code, str(model)], tmp_path / "log") as started:
        said(tmp_path / "log")
        mapped, rest = resident_bytes(started.pid, model)
        none, all = resident_bytes(started.pid, tmp_path / "log")
    assert 4_000_000 <= mapped < 4_100_000
    assert rest > 9_000_000
    assert (none, all) == (0, mapped + rest)


def test_a_server_that_ends_at_once_is_reported_with_its_last_words(tmp_path: Path) -> None:
    failing = tmp_path / "llama-server"
    failing.write_text("#!/bin/sh\necho cannot load >&2\nexit 3\n")
    failing.chmod(0o755)

    async def meet() -> None:
        async with servers.peer(setup(tmp_path, llama_server=failing), Size(1, 10, 10)):
            pass

    with pytest.raises(BenchError, match=r"ended with 3.*\ncannot load"):
        asyncio.run(meet())


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────

STAND_IN = Path(__file__).with_name("bench_stand_in.py")


def stand_in(tmp_path: Path, role: str) -> Path:
    """A program that takes a server's place."""
    program = tmp_path / role
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{STAND_IN}" {role} "$@"\n')
    program.chmod(0o755)
    return program


def command(tmp_path: Path, *further: str) -> list[str]:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")
    peer = stand_in(tmp_path, "llama-server")
    words = ["--model", str(model), "--llama-server", str(peer), "--control", "--calm", "1"]
    words += ["--out", str(tmp_path / "out.json")]
    return [sys.executable, "-m", "scripts.bench", *words, *further]


def test_a_run_prints_a_table_and_writes_all_measurements(tmp_path: Path) -> None:
    words = command(tmp_path, "--only", "throughput,shared-prefix", "--streams", "1,8", "--rounds", "2")
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, cwd=Path(bench.__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert "8 streams, tok/s" in done.stdout
    written = json.loads((tmp_path / "out.json").read_text())
    rows = {(row["scenario"], row["what"]): row for row in written["rows"]}
    assert rows["throughput", "1 stream"]["ours"]["count"] == 2
    assert 0.5 < rows["throughput", "1 stream"]["ratio"]["median"] < 2  # the same program on both sides
    assert rows["shared-prefix", "16 at once, total time"]["verdict"] == "missed"
    assert written["model"]["bytes"] == 4
    assert written["versions"]["llama-server"] == "version: 1"
    assert "-kvu" in written["commands"]["throughput: llama-server"]
    assert os.uname().nodename not in json.dumps(written["machine"])


def test_a_scenario_that_cannot_run_fails_the_command_and_says_why(tmp_path: Path) -> None:
    words = command(tmp_path, "--only", "memory")
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, cwd=Path(bench.__file__).parents[1])
    assert done.returncode == 1
    assert "memory failed: This scenario measures our server" in done.stderr
    assert "memory" in json.loads((tmp_path / "out.json").read_text())["failures"]


def rows_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str, only: str) -> dict[str, dict[str, Any]]:
    """What the scenarios find out about a stand-in of our server."""
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(servers, "APPLIANCE_COMMAND", stand_in(tmp_path, role))
    monkeypatch.setattr(alone, "PAUSE", (0.02, 0.1))
    monkeypatch.setattr(alone, "IDLE_SECONDS", 0.5)
    out = tmp_path / "out.json"
    words = ["--model", str(tmp_path / "model.gguf"), "--only", only, "--rounds", "1", "--calm", "1", "--out", str(out)]
    assert bench.main(words) == 0
    return {row["what"]: row for row in json.loads(out.read_text())["rows"]}


def test_the_built_in_guide_is_measured_whatever_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(tmp_path, monkeypatch, "fair", "guide")
    assert rows["1 stream"]["ours"]["count"] == 1 and rows["1 stream"]["ours"]["median"] > 1
    assert 5 < rows["the whole server, resident"]["ours"]["median"] < 350
    written = json.loads((tmp_path / "out.json").read_text())
    assert "appliance-guide.gguf" in written["commands"]["guide: appliance"]


@pytest.mark.parametrize(("role", "verdict"), [("fair", "met"), ("unfair", "missed")])
def test_fairness_tells_a_fair_server_from_one_that_serves_whoever_came_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str, verdict: str
) -> None:
    monkeypatch.setattr(alone, "TRIALS", 4)
    rows = rows_of(tmp_path, monkeypatch, role, "fairness")
    assert rows["first token in time, of 4"]["verdict"] == verdict
    steps = rows["decode steps to the first token"]["ours"]
    assert steps["high"] <= 9 if role == "fair" else steps["median"] > 2 * 9
    hurt = next(row for what, row in rows.items() if what.startswith("busy account's calls that lost tokens"))
    assert hurt["verdict"] == "met"
    assert int(hurt["what"].split()[-1]) >= alone.FAIR_SLOTS + alone.WAITING


def test_a_server_is_looked_at_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(tmp_path, monkeypatch, "fair", "host-time,idle,memory,ready")
    assert rows["32 streams, greedy, p50"]["ours"]["values"] == [3.5]
    assert rows["32 streams, temperature 0.8, p50"]["verdict"] == "met"
    assert 0 < rows["over 0 s"]["ours"]["median"] < 100
    assert 1 < rows["above model, KV and buffers"]["ours"]["median"] < 150
    assert rows["KV cache"]["ours"]["values"] == [1.0]
    assert rows["exec to ready, less the load"]["ours"]["median"] > 0.01


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_no_server_behind(tmp_path: Path, number: signal.Signals) -> None:
    words = command(tmp_path, "--only", "throughput", "--rounds", "500")
    with (tmp_path / "progress").open("wb") as progress:
        run = subprocess.Popen(words, stderr=progress, stdout=progress, cwd=Path(bench.__file__).parents[1])
    deadline = time.monotonic() + 60
    while "round 1 of 500" not in (tmp_path / "progress").read_text():
        assert time.monotonic() < deadline, (tmp_path / "progress").read_text()
        time.sleep(0.05)
    children = [int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
    assert len(children) == 2
    run.send_signal(number)
    assert run.wait(30) == 130
    assert all(gone(pid) for pid in children)
    assert json.loads((tmp_path / "out.json").read_text())["failures"] == {"time": "interrupted"}


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--only", "speed"], "no such scenario: speed; there are throughput"),
        (["--rounds", "0"], "0 is not a positive number"),
        (["--streams", "8,x"], "x is not a positive number"),
        (["--kv-mode", "both"], "invalid choice"),
    ],
)
def test_wrong_options_are_refused(words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        bench.main(words)
    assert stop.value.code == 2
    assert complaint in capsys.readouterr().err


def test_a_missing_model_or_peer_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--model", str(tmp_path / "none.gguf")]) == 1
    assert capsys.readouterr().err == f"{tmp_path / 'none.gguf'} is not a file.\n"
    assert bench.main(["--llama-server", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err == f"{tmp_path / 'none'} is not a program.\n"
