"""`scripts/bench`: speed and memory of the appliance, beside llama-server and llama-batched-bench on the same model.

Chooses and runs scenarios, prints one table and writes JSON. Every server it starts is gone when it ends.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from scripts.benchlib import alone, edge, machine, pairs
from scripts.benchlib.client import BenchError, Sampling
from scripts.benchlib.figures import table
from scripts.benchlib.run import Run, say
from scripts.benchlib.servers import Setup

Scenario = Callable[[Run], Awaitable[None]]
ENGINE = ("throughput", "shared-prefix", "intruder", "fairness", "host-time", "idle", "memory", "ready", "guide")
NAMES = (*ENGINE, "gate", "scale")
ONLY = f"scenarios: {', '.join(NAMES)}; all but the last, which writes ten million rows first"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="bench",
        description="Speed and memory of the appliance, beside a peer on the same model, threads, context, slots, "
        "KV mode and sampling. Prints medians with their spreads (smallest-largest) and writes JSON.",
    )
    made.add_argument(
        "--model", type=Path, metavar="FILE", help="GGUF; without it the smol shape, made once and kept in a cache"
    )
    made.add_argument(
        "--llama-server", type=Path, metavar="PATH", help="the peer; without it only our server is measured"
    )
    made.add_argument("--llama-batched-bench", type=Path, metavar="PATH", help="the ceiling: llama.cpp's bare loop")
    made.add_argument(
        "--peer-arguments", type=shlex.split, default=[], metavar="WORDS", help="further ones for both peers"
    )
    made.add_argument("--only", type=_names, default=NAMES[:-1], metavar="NAME,...", help=ONLY)
    made.add_argument(
        "--streams", type=_counts, default=(1, 8, 32), metavar="N,...", help="of throughput; default 1,8,32"
    )
    made.add_argument("--rounds", type=_positive, default=5, help="interleaved pairs of every scenario; default 5")
    made.add_argument("--threads", type=_positive, default=len(os.sched_getaffinity(0)), help="default: all processors")
    made.add_argument("--kv-mode", choices=("unified", "split"), default="unified")
    for name, kind, default in (
        ("temperature", float, 0.8),
        ("top-k", int, 40),
        ("top-p", float, 0.95),
        ("min-p", float, 0.05),
    ):
        made.add_argument(f"--{name}", type=kind, default=default, help=f"default {default}")
    made.add_argument(
        "--calm",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="a round is measured again when other programs used more of the machine; default 0.1",
    )
    made.add_argument("--repeats", type=int, default=2, help="how often a round is measured again at most; default 2")
    made.add_argument("--request-seconds", type=_positive, default=300, metavar="S", help="longest call; default 300")
    made.add_argument("--time-limit", type=_positive, default=3_600, metavar="S", help="longest run; default 3600")
    made.add_argument("--out", type=Path, metavar="FILE", help="all measurements as JSON")
    made.add_argument(
        "--control", action="store_true", help="the peer on both sides: its ratios show the machine's noise"
    )
    return made


def _names(text: str) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    if unknown := set(chosen) - set(NAMES):
        raise argparse.ArgumentTypeError(
            f"no such scenario: {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}"
        )
    return chosen


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(map(_positive, text.split(",")))


def scenarios(streams: Sequence[int]) -> dict[str, Scenario]:
    chosen: tuple[Scenario, ...] = (
        partial(pairs.throughput, streams=streams),
        pairs.shared_prefix,
        pairs.intruder,
        alone.fairness,
        alone.host_time,
        alone.idle,
        alone.memory,
        alone.start,
        alone.guide,
        edge.gate,
        edge.scale,
    )
    return dict(zip(NAMES, chosen, strict=True))


async def measure(run: Run, names: Sequence[str], streams: Sequence[int], time_limit: float) -> dict[str, str]:
    """Runs the scenarios; why each failed one failed. Raises BenchError when none can run."""
    failures: dict[str, str] = {}
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    async with asyncio.timeout(time_limit):
        await run.prepare()
        for name in names:
            say(f"{name} ...")
            try:
                await scenarios(streams)[name](run)
            except BenchError as error:
                failures[name] = str(error)
                say(f"{name} failed: {error}")
    return failures


def report(run: Run, options: argparse.Namespace, facts: dict[str, Any], failures: dict[str, str]) -> dict[str, Any]:
    """Everything that was measured, and under which circumstances."""
    setup = run.setup
    return {
        **facts,
        "settings": {
            "threads": setup.threads,
            "kv_mode": setup.kv_mode,
            "sampling": {n: getattr(setup.sampling, n) for n in ("temperature", "top_k", "top_p", "min_p")},
            "rounds": run.rounds,
            "control": setup.control,
            "prompt_words": {"template_tokens": run.lengths.template, "tokens_per_word": run.lengths.per_word},
        },
        "commands": run.commands,
        "disturbance": {
            "meaning": "share of the machine that other programs used, the larger of a round's sides; rounds repeated",
            "others": run.others,
            "repeated": run.repeated,
            "calm": run.calm,
        },
        "scenarios": list(options.only),
        "failures": failures,
        "rows": [row.as_json() for row in run.rows],
    }


def set_up(options: argparse.Namespace, workspace: Path) -> Run:
    """The run that the options describe. Raises BenchError for a program or model that is not there."""
    for program in (options.llama_server, options.llama_batched_bench):
        if program and not os.access(program, os.X_OK):
            raise BenchError(f"{program} is not a program.")
    if options.control and not options.llama_server:
        raise BenchError("A control run needs --llama-server.")
    model = options.model or machine.cached_model()
    if not model.is_file():
        raise BenchError(f"{model} is not a file.")
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.min_p)
    setup = Setup(
        model=model.resolve(),
        threads=options.threads,
        kv_mode=options.kv_mode,
        sampling=sampling,
        workspace=workspace,
        llama_server=options.llama_server,
        batched_bench=options.llama_batched_bench,
        peer_arguments=tuple(options.peer_arguments),
        request_seconds=options.request_seconds,
        control=options.control,
    )
    return Run(
        setup,
        options.rounds,
        secrets.token_hex(4),
        str(options.model or model.name),
        calm=options.calm,
        repeats=options.repeats,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when everything asked for was measured, whatever the verdicts; 1 otherwise; 130 when interrupted."""
    options = parser().parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="bench-") as workspace:
        try:
            run = set_up(options, Path(workspace))
            facts = machine.facts(run.setup, run.model_name)
        except BenchError as error:
            print(error, file=sys.stderr)
            return 1
        return _measure_and_report(run, options, facts)


def _measure_and_report(run: Run, options: argparse.Namespace, facts: dict[str, Any]) -> int:
    started, code, failures = time.perf_counter(), 0, {}
    facts["started"] = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        failures = asyncio.run(measure(run, options.only, options.streams, options.time_limit))
        code = 1 if failures else 0
    except BenchError as error:
        failures, code = {"start": str(error)}, 1
        say(str(error))
    except TimeoutError:
        failures, code = {"time": f"the run took longer than {options.time_limit} s"}, 1
        say("The time limit is reached; what follows is what was measured until now.")
    except (KeyboardInterrupt, asyncio.CancelledError):
        failures, code = {"time": "interrupted"}, 130
        say("Interrupted; what follows is what was measured until now.")
    facts["seconds"] = round(time.perf_counter() - started, 1)
    if run.rows:
        print(table(run.rows))
    if options.out:
        options.out.write_text(json.dumps(report(run, options, facts, failures), indent=1, ensure_ascii=False) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
