"""The servers under measurement: how each is started with the same model, threads, context, slots and KV mode.

Owns their command lines and their life; asks ours for its counters through its admin socket. Measures nothing.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.installation import GUIDE
from scripts.benchlib.client import APPLIANCE, OPENAI, Ask, BenchError, Call, Sampling, Target, get
from scripts.benchlib.processes import Child, child

START_SECONDS = 300.0
POLL_SECONDS = 0.02
HOST = "127.0.0.1"
PEER = "llama-server"
APPLIANCE_COMMAND = Path(sys.executable).with_name("appliance")


@dataclass(frozen=True, slots=True)
class Setup:
    """What is the same for every server of a run, and where the run may write."""

    model: Path
    threads: int
    kv_mode: str
    sampling: Sampling
    workspace: Path
    llama_server: Path | None = None
    batched_bench: Path | None = None
    peer_arguments: tuple[str, ...] = ()
    request_seconds: float = 300.0
    control: bool = False  # the peer on both sides: its ratios show the machine's noise


@dataclass(frozen=True, slots=True)
class Size:
    """How much a scenario needs: sequences at a time, tokens of the longest one, and of all together."""

    slots: int
    longest: int
    total: int

    def context(self, kv_mode: str) -> int:
        """KV tokens in all. Streams of their own are equally long, so each must hold the longest sequence."""
        return self.slots * self.longest if kv_mode == "split" else self.total


@dataclass(slots=True)
class Server:
    """A running server."""

    name: str
    child: Child
    target: Target
    command: list[str]
    data_dir: Path | None = None

    async def call(self, ask: Ask, seconds: float) -> None:
        """One call that must succeed."""
        call = Call(self.target, ask)
        await call.run(seconds)
        call.reply().tokens(ask.max_tokens)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        port: int = listener.getsockname()[1]
        return port


def peer_command(setup: Setup, size: Size, port: int) -> list[str]:
    """llama-server with its defaults but for what must be the same on both sides."""
    return [
        str(setup.llama_server),
        *("-m", str(setup.model), "-np", str(size.slots), "-c", str(size.context(setup.kv_mode))),
        *("-t", str(setup.threads), "-kvu" if setup.kv_mode == "unified" else "-no-kvu"),
        *("--no-webui", "--host", HOST, "--port", str(port)),
        *setup.peer_arguments,
    ]


def our_command(setup: Setup, size: Size, port: int, data_dir: Path) -> list[str]:
    return [
        str(APPLIANCE_COMMAND),
        *("serve", "--data-dir", str(data_dir), "--model", str(setup.model)),
        *("--slots", str(size.slots), "--context", str(size.context(setup.kv_mode))),
        *("--host", HOST, "--port", str(port)),
    ]


def our_environ(setup: Setup) -> dict[str, str]:
    """Settings without a command-line option. A long line: the benchmark, not the line, says when to give up; the
    limits are counted, and out of reach."""
    settings = {"THREADS": str(setup.threads), "KV_MODE": setup.kv_mode, "QUEUE_SECONDS": "3600"}
    plan = dict.fromkeys(("PER_MINUTE", "PER_HOUR"), "1000000000") | {"CONCURRENT": "1000"}
    engine = {f"APPLIANCE_ENGINE__{name}": value for name, value in settings.items()}
    return engine | {f"APPLIANCE_PLANS__ENTERPRISE__{name}": value for name, value in plan.items()}


def batched_bench_command(setup: Setup, streams: int, prompt: int, new: int) -> list[str]:
    """llama.cpp's own loop without sampling or HTTP: the ceiling."""
    cells = Size(streams, prompt + new, streams * (prompt + new)).context(setup.kv_mode)
    return [
        str(setup.batched_bench),
        *("-m", str(setup.model), "-c", str(max(512, cells)), "-b", "2048", "-ub", "512", "-t", str(setup.threads)),
        *("-npp", str(prompt), "-ntg", str(new), "-npl", str(streams)),
        *("-kvu" if setup.kv_mode == "unified" else "-no-kvu", "--output-format", "jsonl"),
        *setup.peer_arguments,
    ]


def batched_bench_rate(output: str) -> float:
    """Decoded tokens per second from llama-batched-bench's JSON lines. Raises BenchError where there are none."""
    for line in output.splitlines():
        if line.startswith("{") and '"speed_tg"' in line:
            return float(json.loads(line)["speed_tg"])
    raise BenchError(f"llama-batched-bench printed no result: {output[-300:].strip()}")


async def run_command(command: list[str], setup: Setup, environ: dict[str, str] | None = None) -> str:
    """Standard output of a command that must succeed."""
    log = setup.workspace / "command.log"
    with child(command, log, {**os.environ, **environ} if environ else None) as started:
        try:
            async with asyncio.timeout(START_SECONDS):
                while started.running:
                    await asyncio.sleep(POLL_SECONDS)
        except TimeoutError as error:
            raise BenchError(f"{Path(command[0]).name} did not end within {START_SECONDS:.0f} s.") from error
    if started.process.returncode:
        raise BenchError(f"{Path(command[0]).name} failed ({started.process.returncode}):\n{started.last_lines()}")
    return log.read_text(errors="replace")


async def our_json(setup: Setup, *arguments: str) -> dict[str, Any]:
    """An `appliance` command with --json, and what it printed."""
    output = await run_command([str(APPLIANCE_COMMAND), *arguments, "--json"], setup)
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            value: dict[str, Any] = json.loads(line)
            return value
    raise BenchError(f"appliance {arguments[0]} printed no JSON: {output[-300:].strip()}")


async def initialise(setup: Setup, name: str) -> tuple[Path, str]:
    """A fresh data directory and its first key."""
    data_dir = setup.workspace / name
    made = await our_json(setup, "init", "--data-dir", str(data_dir))
    return data_dir, str(made["key"])


async def add_account(setup: Setup, data_dir: Path, name: str) -> str:
    """A further account of the highest plan; its key."""
    place = ("--data-dir", str(data_dir))
    await our_json(setup, "account", "create", name, "--plan", "enterprise", *place)
    made = await our_json(setup, "key", "create", "--account", name, "--name", "bench", "--scope", "llm", *place)
    return str(made["key"])


@contextmanager
def last_words(server: Server) -> Iterator[None]:
    """A failure while the server is dead is the server's death, told with the end of its output."""
    try:
        yield
    except BenchError as error:
        if server.child.running:
            raise
        code = server.child.process.returncode
        raise BenchError(f"{error}\n{server.name} ended with {code}:\n{server.child.last_lines()}") from error


@asynccontextmanager
async def ours(setup: Setup, size: Size, data_dir: Path, key: str) -> AsyncIterator[Server]:
    """Our server, ready."""
    port = free_port()
    command = our_command(setup, size, port, data_dir)
    environ = {**os.environ, **our_environ(setup)}
    with child(command, setup.workspace / "appliance.log", environ) as process:
        server = Server("appliance", process, Target(port, APPLIANCE, key), command, data_dir)
        await ready(server, "/readyz")
        with last_words(server):
            yield server


@asynccontextmanager
async def peer(setup: Setup, size: Size, name: str = PEER) -> AsyncIterator[Server]:
    """The peer, ready."""
    port = free_port()
    command = peer_command(setup, size, port)
    with child(command, setup.workspace / f"{name}.log") as process:
        server = Server(name, process, Target(port, OPENAI), command)
        await ready(server, "/health")
        with last_words(server):
            yield server


@asynccontextmanager
async def pair(setup: Setup, size: Size, data_dir: Path, key: str) -> AsyncIterator[list[Server]]:
    """Our server and, where one was given, the peer; both frozen until `measured` thaws one."""
    async with AsyncExitStack() as stack:
        first = peer(setup, size, "control") if setup.control else ours(setup, size, data_dir, key)
        servers = [await stack.enter_async_context(first)]
        servers[0].child.freeze()
        if setup.llama_server:
            servers.append(await stack.enter_async_context(peer(setup, size)))
            servers[1].child.freeze()
        yield servers


@contextmanager
def measured(server: Server) -> Iterator[Server]:
    """Only `server` of its pair runs meanwhile."""
    server.child.thaw()
    try:
        yield server
    finally:
        if server.child.running:
            server.child.freeze()


async def ready(server: Server, path: str) -> float:
    """Waits for 200 on `path`; seconds since exec. Raises BenchError with the server's last words."""
    while time.perf_counter() - server.child.started < START_SECONDS:
        if not server.child.running:
            code = server.child.process.returncode
            raise BenchError(f"{server.name} ended with {code} instead of serving:\n{server.child.last_lines()}")
        status, _ = await get(server.target, path)
        if status == 200:
            return time.perf_counter() - server.child.started
        await asyncio.sleep(POLL_SECONDS)
    raise BenchError(f"{server.name} was not ready within {START_SECONDS:.0f} s:\n{server.child.last_lines()}")


def described(server: Server, setup: Setup, model_name: str) -> list[str]:
    """The command line for the report, without this machine's paths; the user's own words stay."""
    names = {
        **{str(setup.model): model_name, str(GUIDE): GUIDE.name},
        **{str(server.data_dir): "DATA_DIR", str(APPLIANCE_COMMAND): "appliance"},
    }
    return [names.get(word, word) for word in server.command]


def version(program: Path) -> str:
    """First line of what `program --version` says."""
    done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60)
    lines = (done.stdout + done.stderr).strip().splitlines()
    return next((line for line in lines if "version" in line), lines[0] if lines else "unknown")
