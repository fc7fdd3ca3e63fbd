"""Child processes: started, frozen, ended for certain; and what /proc says about them. Linux only; knows no server."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PR_SET_PDEATHSIG = 1
PATIENCE = 10.0  # seconds between SIGTERM and SIGKILL
_libc = ctypes.CDLL(None)


def _die_with_parent() -> None:
    """Runs in the child: should this program be killed, the kernel ends the child, too, frozen or not."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class Child:
    """A running server and the file that takes its output."""

    process: subprocess.Popen[bytes]
    log: Path
    started: float  # time.perf_counter just before exec

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def freeze(self) -> None:
        """Takes the process off the processor, so that it cannot disturb the one that is measured."""
        os.killpg(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.killpg(self.pid, signal.SIGCONT)

    def last_lines(self, count: int = 15) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-count:])


@contextmanager
def child(command: list[str], log: Path, environ: Mapping[str, str] | None = None) -> Iterator[Child]:
    """Runs `command` in a process group of its own; on the way out the whole group is gone, whatever happened."""
    with log.open("wb") as output:
        started = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=None if environ is None else dict(environ),
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
    try:
        yield Child(process, log, started)
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    for number, wait in ((signal.SIGTERM, PATIENCE), (signal.SIGKILL, PATIENCE)):
        try:
            os.killpg(process.pid, number)
            os.killpg(process.pid, signal.SIGCONT)  # a frozen process gets SIGTERM only once it goes on
        except ProcessLookupError:
            break
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            continue
    process.wait(PATIENCE)


def cpu_seconds(pid: int) -> float:
    """Processor time of all threads of the process so far, in user and kernel mode."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Processors:
    """Processor seconds at a moment: of the whole machine, with what its hypervisor took, and of this run's."""

    when: float
    machine: float
    own: float

    @classmethod
    def now(cls) -> Processors:
        user, nice, system, _idle, _iowait, irq, softirq, stolen = map(int, _first_line("/proc/stat").split()[1:9])
        times = os.times()
        own = times.user + times.system + times.children_user + times.children_system
        busy = (user + nice + system + irq + softirq + stolen) / os.sysconf("SC_CLK_TCK")
        return cls(time.perf_counter(), busy, own + sum(map(_cpu_seconds_or_zero, _children())))

    def others_since(self, before: Processors) -> float:
        """The share of the machine's processors that others used, 0 to 1."""
        capacity = (self.when - before.when) * len(os.sched_getaffinity(0))
        others = (self.machine - before.machine) - (self.own - before.own)
        return min(1.0, max(0.0, others / capacity)) if capacity else 0.0


def _first_line(path: str) -> str:
    with open(path) as file:
        return file.readline()


def _children() -> list[int]:
    tasks = Path("/proc/self/task").iterdir()
    return [int(pid) for task in tasks for pid in (task / "children").read_text().split()]


def _cpu_seconds_or_zero(pid: int) -> float:
    """0 for a process that has just ended: its time is then among the children's of `os.times`."""
    try:
        return cpu_seconds(pid)
    except (FileNotFoundError, ProcessLookupError):
        return 0.0


def resident_bytes(pid: int, mapped_file: Path) -> tuple[int, int]:
    """Resident memory of the process: of its mapping of `mapped_file`, and all the rest."""
    wanted = str(mapped_file.resolve())
    mapped = rest = 0
    ours = False
    for line in Path(f"/proc/{pid}/smaps").read_text(errors="replace").splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            ours = line.split(maxsplit=5)[5:] == [wanted]
        elif words[0] == "Rss:":
            size = int(words[1]) * 1024
            mapped, rest = (mapped + size, rest) if ours else (mapped, rest + size)
    return mapped, rest
