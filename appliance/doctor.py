"""`appliance doctor`: looks at this machine and this data directory, and says what is wrong and how to mend it. Changes nothing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import stat
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sqlcipher3 import dbapi2 as sqlite

from appliance.catalog import Catalog, Model
from appliance.config import Config
from appliance.errors import ApplianceError, ModelError
from appliance.gguf import GgufHeader, read_header
from appliance.store.keyfile import ENVIRONMENT, read_key

State = Literal["ok", "warn", "fail"]
SAFE_SQLITE = (3, 51, 3)  # older ones can corrupt a WAL database (the WAL-reset bug)
LEAST_DISK = 2 * 2**30
KV_BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "q5_1": 24 / 32, "q5_0": 22 / 32, "q4_1": 20 / 32, "q4_0": 18 / 32}  # fmt: skip
DEFAULT_CONTEXT = 32_768
OVERHEAD = 512 * 2**20  # compute buffers, the interpreter, the operating system's share


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: what was found, and the fix unless it is fine."""

    name: str
    state: State
    sentence: str
    fix: str = ""

    def row(self) -> dict[str, Any]:
        return asdict(self)


def examine(config: Config, *, running: bool) -> list[Finding]:
    """Every check, in order. `running` says that this data directory's server answers."""
    checks: list[Callable[[], Finding]] = [
        _python,
        _sqlite,
        _llama,
        _gpu,
        lambda: _model(config),
        lambda: _memory(config),
        lambda: _disk(config),
        lambda: _port(config, running),
        lambda: _key_file(config),
        lambda: _key_place(config),
        lambda: _data_dir(config),
    ]
    return [check() for check in checks]


def _python() -> Finding:
    return Finding("python", "ok", f"Python {platform.python_version()}.")


def _sqlite() -> Finding:
    versions = f"SQLite {sqlite.sqlite_version} in sqlcipher3 {importlib.metadata.version('sqlcipher3')}"
    if tuple(map(int, sqlite.sqlite_version.split("."))) < SAFE_SQLITE:
        return Finding("sqlite", "fail", f"{versions} has the WAL-reset bug.", "install sqlcipher3 0.6.4 or newer")
    return Finding("sqlite", "ok", f"{versions}.")


def _llama() -> Finding:
    return Finding("llama.cpp", "ok", f"llama-cpp-python {importlib.metadata.version('llama-cpp-python')}.")


def _gpu() -> Finding:
    if shutil.which("nvidia-smi") is None:
        return Finding("gpu", "ok", "No NVIDIA GPU was found; the CPU computes.")
    query = ["nvidia-smi", "--query-gpu=name,memory.free", "--format=csv,noheader"]
    try:
        names = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return Finding("gpu", "warn", "nvidia-smi is there but does not answer.", "check the NVIDIA driver")
    built = importlib.metadata.distribution("llama-cpp-python").files or []
    if not any("ggml-cuda" in str(f) for f in built):
        return Finding(
            "gpu",
            "warn",
            f"{names} is not used: llama.cpp is built for the CPU.",
            "install nvcc, then run ./install.sh again",
        )
    return Finding("gpu", "ok", names.replace("\n", "; ") + ".")


def _model(config: Config) -> Finding:
    try:
        model = _served(config)
    except ApplianceError as error:
        return Finding("model", "fail", error.message, "appliance models add FILE, then appliance models use NAME")
    if model.placeholder:
        return Finding("model", "warn", f"{model.name} is a placeholder with random weights.", "appliance models add FILE, then appliance models use NAME")  # fmt: skip
    return Finding("model", "ok", f"{model.name} is whole.")


def _memory(config: Config) -> Finding:
    """Model file, KV cache of the whole context and some overhead against what is available."""
    try:
        model = _served(config)
        kv = kv_bytes(read_header(model.path), config)
    except ApplianceError:
        return Finding("memory", "warn", "Without a model the memory it needs is unknown.", "choose a model first")
    needed, available = model.size + kv + OVERHEAD, _available_memory()
    gigabytes = f"model {model.size / 1e9:.1f} GB + KV cache {kv / 1e9:.1f} GB + {OVERHEAD / 1e9:.1f} GB"
    if needed > available:
        return Finding("memory", "fail", f"{gigabytes} do not fit into {available / 1e9:.1f} GB.", "lower [engine] context, or set kv_type to q8_0")  # fmt: skip
    return Finding("memory", "ok", f"{gigabytes} fit into {available / 1e9:.1f} GB.")


def kv_bytes(header: GgufHeader, config: Config) -> int:
    """Bytes of the KV cache: 2 · layers · KV heads · head width · tokens · bytes of the type."""
    arch = header.text("general.architecture")

    def number(name: str, default: int = 0) -> int:
        value = header.metadata.get(f"{arch}.{name}", default)
        return int(value) if isinstance(value, (int, float)) else default

    heads = number("attention.head_count", 1)
    width = number("attention.key_length") or number("embedding_length") // max(1, heads)
    tokens = config.engine.context or min(number("context_length", DEFAULT_CONTEXT), DEFAULT_CONTEXT)
    values = 2 * number("block_count") * number("attention.head_count_kv", heads) * width * tokens
    return int(values * KV_BYTES[config.engine.kv_type])


def _served(config: Config) -> Model:
    catalog = Catalog(config.models_dir)
    wanted = config.engine.model or (chosen.name if (chosen := catalog.chosen()) else "")
    if not wanted:
        raise ModelError("No model is chosen.")
    return catalog.resolve(wanted)


def _available_memory() -> int:
    with open("/proc/meminfo") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["MemAvailable"].split()[0]) * 1024


def _disk(config: Config) -> Finding:
    place = next(p for p in (config.data_dir, *config.data_dir.parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < LEAST_DISK:
        return Finding(
            "disk",
            "warn",
            f"{free / 1e9:.1f} GB are free at {place}.",
            "free some space: a full disk stops every write",
        )
    return Finding("disk", "ok", f"{free / 1e9:.1f} GB are free at {place}.")


def _port(config: Config, running: bool) -> Finding:
    where = f"{config.server.host}:{config.server.port}"
    if running:
        return Finding("port", "ok", f"The server of this data directory is running ({where} by its settings).")
    with socket.socket(socket.AF_INET6 if ":" in config.server.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.server.host, config.server.port))
        except OSError as error:
            return Finding("port", "fail", f"{where} cannot be used ({os.strerror(error.errno or 0)}).", "set [server] host and port, or stop what uses it")  # fmt: skip
    return Finding("port", "ok", f"{where} is free.")


def _key_file(config: Config) -> Finding:
    if os.environ.get(ENVIRONMENT):
        return Finding("key", "ok", "The master key comes from the environment.")
    if not config.database.exists():
        return Finding("key", "warn", "There is no appliance here yet.", "appliance init")
    try:
        read_key(config.key_file)
    except ApplianceError as error:
        return Finding("key", "fail", error.message, "put the saved copy of the key back, mode 0600")
    return Finding("key", "ok", f"{config.key_file} is private.")


def _key_place(config: Config) -> Finding:
    if not config.key_file.exists() or not config.database.exists():
        return Finding("key place", "ok", "The master key is not beside the data.")
    if config.key_file.stat().st_dev == config.database.stat().st_dev:
        return Finding("key place", "warn", "The master key lies on the same disk as the data it protects.", "move it with [store] key_file, and keep a copy elsewhere")  # fmt: skip
    return Finding("key place", "ok", "The master key lies on another disk than the data.")


def _data_dir(config: Config) -> Finding:
    if not config.data_dir.exists():
        return Finding("data", "warn", f"{config.data_dir} does not exist yet.", "appliance init")
    mode = stat.S_IMODE(config.data_dir.stat().st_mode)
    if mode & 0o077:
        return Finding(
            "data",
            "warn",
            f"{config.data_dir} can be entered by others (mode {mode:04o}).",
            f"chmod 700 {config.data_dir}",
        )
    if not os.access(config.data_dir, os.W_OK):
        return Finding("data", "fail", f"{config.data_dir} cannot be written.", "run as the user that owns it")
    return Finding("data", "ok", f"{config.data_dir} is private and writable.")
