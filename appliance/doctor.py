"""`appliance doctor`: looks at this machine and this data directory, says what is wrong and how to mend it.

Changes nothing. What a check itself cannot look at is a finding too: no check ends the others.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import socket
import stat
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from appliance import secretfiles
from appliance.catalog import Catalog, Model
from appliance.config import Config, EngineSettings
from appliance.errors import ApplianceError, ModelError
from appliance.gguf import GgufHeader, read_header
from appliance.store.database import Store
from appliance.store.keyfile import ENVIRONMENT, MasterKey, read_key

State = Literal["ok", "warn", "fail"]
SAFE_SQLITE = (3, 51, 3)  # older ones can corrupt a WAL database (the WAL-reset bug)
LEAST_DISK = 2 * 2**30
# bytes of one value: the quantised types keep 32 values and their scales together
KV_BYTES = {
    "f32": 4.0,
    "f16": 2.0,
    "bf16": 2.0,
    "q8_0": 34 / 32,
    "q5_1": 24 / 32,
    "q5_0": 22 / 32,
    "q4_1": 20 / 32,
    "q4_0": 18 / 32,
}
DEFAULT_CONTEXT = 32_768
OVERHEAD = 512 * 2**20  # compute buffers, the interpreter, the operating system's share
# a WAL database needs shared memory, which these do not have between machines, and locks, which some only pretend
NETWORK = {"nfs", "nfs4", "cifs", "smb3", "9p", "afs", "ceph", "glusterfs", "lustre", "fuse.sshfs", "fuse.glusterfs"}
CHOOSE_MODEL = "appliance models add FILE, then appliance models use NAME"


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
    checks: dict[str, Callable[[], Finding]] = {
        "python": _python,
        "sqlite": _sqlite,
        "llama.cpp": _llama,
        "gpu": lambda: _gpu(config),
        "model": lambda: _model(config),
        "memory": lambda: _memory(config, running),
        "disk": lambda: _disk(config),
        "file system": lambda: _file_system(config),
        "port": lambda: _port(config, running),
        "key": lambda: _key_file(config),
        "key place": lambda: _key_place(config),
        "data": lambda: _data_dir(config),
        "elsewhere": lambda: _elsewhere(config),
    }
    return [_checked(name, check) for name, check in checks.items()]


def _checked(name: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except ApplianceError as error:
        return Finding(name, "fail", error.message, "see the sentence")
    except OSError as error:
        what = error.filename or "the machine"
        return Finding(name, "fail", f"{what} cannot be examined: {error.strerror}.", "run as the owner of the data")


# ── the software ─────────────────────────────────────────────────────────────────────────────────────────────────


def _python() -> Finding:
    return Finding("python", "ok", f"Python {platform.python_version()}.")


def _sqlite() -> Finding:
    """A scratch database shows the version that is really linked, and that what it writes is no plaintext."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "scratch.db"
        with closing(Store.create(path, MasterKey.generate())) as store:
            version = store.read(lambda db: str(db.execute("select sqlite_version()").fetchone()[0]))
        plain = path.read_bytes().startswith(b"SQLite format 3")
    versions = f"SQLite {version} in sqlcipher3 {importlib.metadata.version('sqlcipher3')}"
    if plain:
        return Finding("sqlite", "fail", f"{versions} does not encrypt.", "run ./install.sh again")
    if tuple(map(int, version.split("."))) < SAFE_SQLITE:
        return Finding("sqlite", "fail", f"{versions} has the WAL-reset bug.", "install sqlcipher3 0.6.4 or newer")
    return Finding("sqlite", "ok", f"{versions}, encrypting.")


def _backend() -> dict[str, str | bool]:
    """Raises ModelError where llama.cpp does not even load: a missing CUDA library, a foreign CPU."""
    try:
        from appliance.engine import model  # here, so that a broken build is a finding and not the end of the command
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise ModelError(f"llama.cpp cannot be loaded: {str(error).splitlines()[0][:200]}.") from error
    return model.describe_backend()


def _llama() -> Finding:
    try:
        backend = _backend()
    except ModelError as error:
        return Finding(
            "llama.cpp",
            "fail",
            error.message,
            "delete .venv and run ./install.sh again: it builds anew for this machine",
        )
    where = "GPU and CPU" if backend["gpu_offload"] else "CPU"
    return Finding("llama.cpp", "ok", f"llama-cpp-python {backend['llama_cpp_python']}, built for the {where}.")


# ── the hardware and the model ───────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Gpu:
    """One NVIDIA GPU; `free` memory in bytes, 0 where it shares the main memory."""

    name: str
    free: int


def gpus(command: str = "nvidia-smi") -> list[Gpu]:
    """What `command` lists; none where there is no such command. Raises ModelError when it does not answer."""
    if shutil.which(command) is None:
        return []
    query = [command, "--query-gpu=name,memory.free", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
        rows = [line.rsplit(",", 1) for line in lines if line.strip()]
        return [Gpu(name.strip(), _mebibytes(size.strip())) for name, size in rows]
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise ModelError("nvidia-smi is there but does not answer.") from error


def _mebibytes(size: str) -> int:
    return 0 if size == "[N/A]" else int(size) * 2**20


def _uses_gpu(config: Config) -> bool:
    return bool(_backend()["gpu_offload"]) and config.engine.gpu_layers != 0


def _gpu(config: Config) -> Finding:
    try:
        found = gpus()
    except ModelError as error:
        return Finding("gpu", "warn", error.message, "check the NVIDIA driver")
    if not found:
        return Finding("gpu", "ok", "No NVIDIA GPU was found; the CPU computes.")
    names = "; ".join(f"{gpu.name} ({gpu.free / 1e9:.1f} GB free)" for gpu in found)
    if not _backend()["gpu_offload"]:
        fix = "install nvcc, then run ./install.sh again"
        return Finding("gpu", "warn", f"{names}: not used, since llama.cpp is built for the CPU.", fix)
    if config.engine.gpu_layers == 0:
        return Finding("gpu", "warn", f"{names}: not used, since [engine] gpu_layers is 0.", "set gpu_layers to -1")
    return Finding("gpu", "ok", f"{names}.")


def _model(config: Config) -> Finding:
    if not config.database.exists():
        return Finding("model", "warn", "There is no appliance here yet.", "appliance init")
    try:
        model = _served(config)
    except ModelError as error:
        return Finding("model", "fail", error.message, CHOOSE_MODEL)
    if model.nature == "placeholder":
        return Finding("model", "warn", f"{model.name} is a placeholder with random weights.", CHOOSE_MODEL)
    if model.nature == "guide":
        return Finding("model", "warn", f"{model.name} is the built-in guide, which knows nothing else.", CHOOSE_MODEL)
    return Finding("model", "ok", f"{model.name} is whole.")


def _memory(config: Config, running: bool) -> Finding:
    """Model file, KV cache of the whole context and some overhead against what is free where the layers go."""
    try:
        model = _served(config)
        kv = kv_bytes(read_header(model.path), config.engine)
        free, where = _free_memory(config)
    except ModelError:
        return Finding("memory", "warn", "Without a model and llama.cpp the need is unknown.", "see the lines above")
    sum_ = f"model {_gb(model.size)} + KV cache {_gb(kv)} + {_gb(OVERHEAD)}"
    if running:
        return Finding("memory", "ok", f"{sum_} are in use by the running server; {_gb(free)} of {where} are left.")
    if model.size + kv + OVERHEAD > free:
        sentence = f"{sum_} do not fit into {_gb(free)} of {where}."
        return Finding(
            "memory", "fail", sentence, "lower [engine] context, set kv_type to q8_0, or use a smaller model"
        )
    return Finding("memory", "ok", f"{sum_} fit into {_gb(free)} of {where}.")


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def _free_memory(config: Config) -> tuple[int, str]:
    """Bytes and their kind: the GPUs' where they hold every layer, main memory otherwise."""
    found = gpus() if _uses_gpu(config) and config.engine.gpu_layers < 0 else []
    free = sum(gpu.free for gpu in (found[:1] if config.engine.split_mode == "none" else found))
    return (free, "GPU memory") if free else (available_memory(), "memory")


def available_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that new processes can use, no more than the container's limit leaves."""
    fields = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    try:
        limit, used = (int((cgroup / f"memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):  # no container, or no limit: "max"
        return available
    return min(available, max(0, limit - used))


def kv_bytes(header: GgufHeader, settings: EngineSettings) -> int:
    """Bytes of the KV cache: (key width + value width) · KV heads of all layers · tokens · bytes of the type."""
    arch = header.text("general.architecture")
    heads = max(1, header.number(f"{arch}.attention.head_count", 1))
    layers = header.number(f"{arch}.block_count")
    width = header.number(f"{arch}.embedding_length") // heads
    keys = header.number(f"{arch}.attention.key_length", width)
    values = header.number(f"{arch}.attention.value_length", width)
    per_layer = header.array(f"{arch}.attention.head_count_kv")  # some models have different ones in every layer
    kv_heads = sum(per_layer) if per_layer else layers * header.number(f"{arch}.attention.head_count_kv", heads)
    tokens = settings.context or min(header.number(f"{arch}.context_length") or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    return int((keys + values) * kv_heads * tokens * KV_BYTES[settings.kv_type])


def _served(config: Config) -> Model:
    catalog = Catalog(config.models_dir)
    wanted = config.engine.model or (chosen.name if (chosen := catalog.chosen()) else "")
    if not wanted:
        raise ModelError("No model is chosen.")
    return catalog.resolve(wanted)


# ── the places ───────────────────────────────────────────────────────────────────────────────────────────────────


def _place(config: Config) -> Path:
    """The data directory, or what there is of the way to it."""
    return next(p for p in (config.data_dir, *config.data_dir.parents) if p.exists())


def _disk(config: Config) -> Finding:
    place = _place(config)
    free = shutil.disk_usage(place).free
    if free < LEAST_DISK:
        return Finding("disk", "warn", f"{_gb(free)} are free at {place}.", "free some: a full disk stops every write")
    return Finding("disk", "ok", f"{_gb(free)} are free at {place}.")


def _file_system(config: Config) -> Finding:
    place = _place(config)
    kind = file_system(place, Path("/proc/self/mounts").read_text())
    if kind in NETWORK:
        sentence = f"{place} is on a network file system ({kind}), on which a database can be damaged."
        return Finding("file system", "warn", sentence, "move the data directory to a local disk")
    return Finding("file system", "ok", f"{place} is on a local file system ({kind}).")


def file_system(path: Path, mounts: str) -> str:
    """The type of the file system that holds `path`, from the text of a mount table; the last mount there counts."""
    real, kinds = Path(os.path.realpath(path)), {}
    for line in mounts.splitlines():
        _, point, kind, *_ = line.split(" ")
        kinds[Path(re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), point))] = kind  # a space is \040 there
    return next((kinds[place] for place in (real, *real.parents) if place in kinds), "unknown")


def _port(config: Config, running: bool) -> Finding:
    host, port = config.server.host, config.server.port
    where = f"{f'[{host}]' if ':' in host else host}:{port}"
    if running:
        return Finding("port", "ok", f"The server of this data directory is running ({where} by its settings).")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, UnicodeError, TypeError) as error:  # the last two: a name that is none
            sentence = f"{where} cannot be used: {getattr(error, 'strerror', None) or 'no such host'}."
            return Finding("port", "fail", sentence, "set [server] host and port, or stop what uses it")
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
        sentence = "The master key lies on the same disk as the data it protects."
        return Finding("key place", "warn", sentence, "move it with [store] key_file, and keep a copy elsewhere")
    return Finding("key place", "ok", "The master key lies on another disk than the data.")


def _data_dir(config: Config) -> Finding:
    path = config.data_dir
    if not path.exists():
        return Finding("data", "warn", f"{path} does not exist yet.", "appliance init")
    if not os.access(path, os.W_OK | os.X_OK) or os.statvfs(path).f_flag & os.ST_RDONLY:
        return Finding("data", "fail", f"{path} cannot be written.", "run as its owner; mount it writable")
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        return Finding("data", "warn", f"{path} can be entered by others (mode {mode:04o}).", f"chmod 700 {path}")
    return Finding("data", "ok", f"{path} is private and writable.")


def _elsewhere(config: Config) -> Finding:
    """The servers that prompts may go to, where an account's policy allows it."""
    keys = {name: secretfiles.read(f"providers.{name}.key_file", s.key_file) for name, s in config.providers.items()}
    bare = [name for name, s in config.providers.items() if keys[name] and _unprotected(s.base_url)]
    named = [*(["groq"] if secretfiles.read("groq.key_file", config.groq.key_file) else []), *config.providers]
    if bare:
        sentence = f"The key of {', '.join(bare)} goes over the network unencrypted."
        return Finding("elsewhere", "warn", sentence, "use https in base_url")
    if not named:
        return Finding("elsewhere", "ok", "No server elsewhere is set up by the settings.")
    return Finding("elsewhere", "ok", f"Prompts may go to {', '.join(named)}, where an account allows it.")


def _unprotected(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1")
