"""Facts about the machine, the programs and the model, without names or paths of this machine; the default model."""

from __future__ import annotations

import hashlib
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import appliance
from appliance import benchmodel
from scripts.benchlib import servers
from scripts.benchlib.run import say
from scripts.benchlib.servers import Setup

DEFAULT_MODEL = "smol-q8_0.gguf"


def cached_model() -> Path:
    """The random-weight model of the agreed shape, written on first use."""
    place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "appliance-bench"
    if not os.access(_existing(place), os.W_OK):
        place = Path(os.environ.get("TMPDIR") or "/tmp") / "appliance-bench"
    path = place / DEFAULT_MODEL
    if not path.is_file():
        place.mkdir(parents=True, exist_ok=True)
        say(f"Writing the benchmark's model, {DEFAULT_MODEL}, once ...")
        part = path.with_suffix(".part")
        benchmodel.write(part, benchmodel.PRESETS["smol"])
        part.replace(path)
    return path


def _existing(path: Path) -> Path:
    """The nearest folder on the way up that exists."""
    return path if path.exists() else _existing(path.parent)


def facts(setup: Setup, model_name: str) -> dict[str, Any]:
    """What a reader needs in order to judge the figures."""
    versions = {
        "appliance": appliance.__version__,
        "llama-cpp-python": metadata.version("llama-cpp-python"),
        "python": platform.python_version(),
        "kernel": platform.release(),
    }
    if setup.llama_server:
        versions["llama-server"] = servers.version(setup.llama_server)
    with setup.model.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "machine": {
            "cpu": _line("/proc/cpuinfo", "model name"),
            "processors": len(os.sched_getaffinity(0)),
            "memory": _line("/proc/meminfo", "MemTotal"),
            "load_average_before": [round(value, 2) for value in os.getloadavg()],
        },
        "versions": versions,
        "model": {"name": model_name, "bytes": setup.model.stat().st_size, "sha256": digest},
    }


def _line(path: str, name: str) -> str:
    """The value behind `name` in one of the kernel's tables."""
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return "unknown"
