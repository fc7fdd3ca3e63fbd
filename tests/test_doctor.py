"""The doctor: every trouble it is for is made here, and found; what is fine is called so."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from appliance import config, doctor
from appliance.catalog import Catalog
from appliance.config import Config, EngineSettings
from appliance.doctor import Finding
from appliance.engine.model import Context, Model
from appliance.errors import ModelError
from appliance.gguf import GgufHeader, read_header
from appliance.store.database import Store
from appliance.store.keyfile import ENVIRONMENT, create_key_file
from tests.box import free_port


@pytest.fixture
def settings(tmp_path: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A sound appliance with a model that is no placeholder by name, and a free port."""
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    data = tmp_path / "data"
    data.mkdir(mode=0o700)
    found = config.override(Config(data), {"server.port": free_port()}, "test")
    Store.create(found.database, create_key_file(found.key_file)).close()
    shutil.copy(tiny_gguf, tmp_path / "tiny.gguf")
    catalog = Catalog(found.models_dir)
    catalog.add(tmp_path / "tiny.gguf")
    catalog.choose("tiny")
    return found


def finding(settings: Config, name: str, *, running: bool = False) -> Finding:
    """The one check of this name; every finding that is not fine has a fix."""
    found = doctor.examine(settings, running=running)
    assert len({f.name for f in found}) == len(found)
    for f in found:
        assert bool(f.fix) == (f.state != "ok"), f
        assert f.sentence.endswith(".") and "\n" not in f.sentence
    return next(f for f in found if f.name == name)


def changed(settings: Config, **values: object) -> Config:
    return config.override(settings, {k.replace("__", "."): v for k, v in values.items()}, "test")


def test_a_sound_appliance_has_no_failure(settings: Config) -> None:
    states = {f.name: f.state for f in doctor.examine(settings, running=False)}
    assert set(states.values()) <= {"ok", "warn"}
    assert {n for n, s in states.items() if s == "warn"} <= {"model", "key place", "disk", "gpu"}


def test_the_versions_are_the_ones_in_use(settings: Config) -> None:
    assert importlib.metadata.version("llama-cpp-python") in finding(settings, "llama.cpp").sentence
    assert "sqlcipher3" in finding(settings, "sqlite").sentence
    assert "encrypting" in finding(settings, "sqlite").sentence


def test_an_old_sqlite_fails(settings: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    assert finding(settings, "sqlite").state == "ok"
    monkeypatch.setattr(doctor, "SAFE_SQLITE", (99, 0, 0))
    assert finding(settings, "sqlite").state == "fail"


def test_an_unusable_llama_cpp_is_a_finding(settings: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> dict[str, str | bool]:
        raise ModelError("llama.cpp cannot be loaded: libcuda.so.1: cannot open shared object file.")

    monkeypatch.setattr(doctor, "_backend", broken)
    assert finding(settings, "llama.cpp").state == "fail"
    assert "libcuda" in finding(settings, "llama.cpp").sentence


# ── the model and its memory ─────────────────────────────────────────────────────────────────────────────────────


def test_a_placeholder_is_called_one(settings: Config) -> None:
    found = finding(settings, "model")
    assert found.state == "warn" and "placeholder" in found.sentence and "models add" in found.fix


@pytest.mark.parametrize("trouble", ["missing", "truncated", "changed", "none chosen", "unknown"])
def test_a_bad_model_fails(settings: Config, trouble: str) -> None:
    path = Catalog(settings.models_dir).resolve("tiny").path
    data = path.read_bytes()
    match trouble:
        case "missing":
            path.unlink()
        case "truncated":
            path.write_bytes(data[:-1])
        case "changed":
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        case "none chosen":
            Catalog(settings.models_dir).remove("tiny")
        case "unknown":
            settings = changed(settings, engine__model="tinny")
    assert finding(settings, "model").state == "fail"
    assert finding(settings, "memory").state == "warn"


@pytest.mark.parametrize("kv_type", ["f16", "q8_0", "f32"])
@pytest.mark.parametrize("context", [0, 512])
def test_the_kv_estimate_is_what_llama_cpp_takes(tiny_gguf: Path, context: int, kv_type: str) -> None:
    engine = EngineSettings(context=context, kv_type=kv_type, threads=1, slots=2, flash_attention="on")
    model = Model(tiny_gguf, engine)
    try:
        real = Context(model, engine, ids=2, unified=True)
        taken = real.buffers["kv"]
        real.close()
    finally:
        model.close()
    estimate = doctor.kv_bytes(read_header(tiny_gguf), engine)
    assert taken > 10_000
    assert abs(estimate - taken) <= 0.01 * 2**20  # llama.cpp logs hundredths of a mebibyte


def header(path: Path, **values: object) -> GgufHeader:
    return GgufHeader(path, 3, {"general.architecture": "x", **{f"x.{k}": v for k, v in values.items()}}, (), 0, 0, 0)


def test_the_kv_estimate_follows_odd_shapes(tmp_path: Path) -> None:
    shape = {"block_count": 3, "embedding_length": 1_024, "attention.head_count": 8, "context_length": 100_000}
    engine = EngineSettings(context=10)
    plain = doctor.kv_bytes(header(tmp_path, **shape), engine)
    assert plain == 2 * 3 * 8 * 128 * 10 * 2
    grouped = doctor.kv_bytes(header(tmp_path, **shape, **{"attention.head_count_kv": 2}), engine)
    assert grouped == plain // 4
    varied = doctor.kv_bytes(header(tmp_path, **shape, **{"attention.head_count_kv": (4, 0, 2)}), engine)
    assert varied == plain * 6 // 24
    wide = {"attention.key_length": 192, "attention.value_length": 64}
    assert doctor.kv_bytes(header(tmp_path, **shape, **wide), engine) == plain
    assert doctor.kv_bytes(header(tmp_path, **shape), EngineSettings()) == plain // 10 * doctor.DEFAULT_CONTEXT
    quantised = doctor.kv_bytes(header(tmp_path, **shape), replace(engine, kv_type="q8_0"))
    assert quantised == plain * 34 // 64


def test_a_context_beyond_the_memory_fails_and_one_that_runs_does_not(settings: Config) -> None:
    assert finding(settings, "memory").state == "ok"
    huge = changed(settings, engine__context=16_777_216, engine__kv_type="f32")
    doctor_says = finding(huge, "memory")
    needed = doctor.kv_bytes(read_header(Catalog(huge.models_dir).resolve("tiny")), huge.engine)
    assert doctor_says.state == ("fail" if needed > doctor.available_memory() else "ok")
    assert finding(huge, "memory", running=True).state == "ok"


def test_a_memory_that_is_too_small_fails(settings: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "available_memory", lambda: doctor.OVERHEAD)
    found = finding(settings, "memory")
    assert found.state == "fail" and "do not fit" in found.sentence and "context" in found.fix


def test_a_containers_limit_is_believed(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    assert doctor.available_memory(tmp_path, tmp_path) == 8_000 * 1_024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    assert doctor.available_memory(tmp_path, tmp_path) == 8_000 * 1_024
    (tmp_path / "memory.max").write_text("3000000\n")
    assert doctor.available_memory(tmp_path, tmp_path) == 2_000_000


def smi(directory: Path, script: str) -> str:
    path = directory / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_gpus_are_read_from_nvidia_smi(tmp_path: Path) -> None:
    assert doctor.gpus(str(tmp_path / "absent")) == []
    listed = smi(tmp_path, "echo 'NVIDIA H200, Big, 100'; echo 'GB10, [N/A]'")
    assert doctor.gpus(listed) == [doctor.Gpu("NVIDIA H200, Big", 100 * 2**20), doctor.Gpu("GB10", 0)]
    for trouble in ("exit 9", "echo nonsense", "echo a, b"):
        with pytest.raises(ModelError, match="does not answer"):
            doctor.gpus(smi(tmp_path, trouble))


def test_a_gpu_that_is_not_used_is_told(settings: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi(tmp_path, "echo 'NVIDIA H200, 100000'")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    offload = {"gpu_offload": False, "llama_cpp_python": "1"}
    monkeypatch.setattr(doctor, "_backend", lambda: offload)
    found = finding(settings, "gpu")
    assert found.state == "warn" and "built for the CPU" in found.sentence and "nvcc" in found.fix
    offload["gpu_offload"] = True
    assert finding(settings, "gpu").state == "ok"
    assert "of GPU memory" in finding(settings, "memory").sentence
    assert finding(changed(settings, engine__gpu_layers=0), "gpu").state == "warn"
    smi(tmp_path, "exit 9")
    assert "driver" in finding(settings, "gpu").fix


# ── the places ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_port_that_is_taken_fails_unless_it_is_ours(settings: Config) -> None:
    assert finding(settings, "port").state == "ok"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        settings = changed(settings, server__port=taken.getsockname()[1])
        found = finding(settings, "port")
        assert found.state == "fail" and "in use" in found.sentence
        assert finding(settings, "port", running=True).state == "ok"


@pytest.mark.parametrize("host", ["192.0.2.77", "2001:db8::77", "x" * 70, "ü" * 80], ids=["v4", "v6", "long", "odd"])
def test_a_host_that_is_not_ours_fails(settings: Config, host: str) -> None:
    assert finding(changed(settings, server__host=host), "port").state == "fail"


def test_the_key_files_troubles(settings: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    assert finding(settings, "key").state == "ok"
    settings.key_file.chmod(0o644)
    found = finding(settings, "key")
    assert found.state == "fail" and "chmod 600" in found.sentence
    settings.key_file.unlink()
    assert "missing" in finding(settings, "key").sentence
    monkeypatch.setenv(ENVIRONMENT, "a" * 64)
    assert finding(settings, "key").state == "ok"
    assert "aaaa" not in finding(settings, "key").sentence


def test_a_key_beside_its_data_is_told(settings: Config) -> None:
    found = finding(settings, "key place")
    assert found.state == "warn" and "key_file" in found.fix
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == settings.data_dir.stat().st_dev:
        pytest.skip("there is no second file system here")
    elsewhere = shared / f"appliance-test-{os.getpid()}.key"
    shutil.move(settings.key_file, elsewhere)
    try:
        assert finding(changed(settings, store__key_file=str(elsewhere)), "key place").state == "ok"
    finally:
        elsewhere.unlink()


def test_an_open_data_directory_is_told(settings: Config) -> None:
    assert finding(settings, "data").state == "ok"
    settings.data_dir.chmod(0o755)
    assert finding(settings, "data").fix == f"chmod 700 {settings.data_dir}"


def test_a_full_disk_is_told(settings: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LEAST_DISK", 2**80)
    assert finding(settings, "disk").state == "warn"


def test_before_init_the_fix_is_init(tmp_path: Path) -> None:
    found = {f.name: f for f in doctor.examine(Config(tmp_path / "absent"), running=False)}
    assert {n for n, f in found.items() if f.fix == "appliance init"} == {"model", "key", "data"}
    assert not (tmp_path / "absent").exists()


def test_looking_changes_nothing(settings: Config) -> None:
    def state() -> dict[str, bytes]:
        files = [p for p in settings.data_dir.rglob("*") if p.is_file() and p.parent.name != "models"]
        return {str(p): p.read_bytes() for p in files}

    before = state()
    doctor.examine(settings, running=False)
    assert state() == before and len(before) >= 2


def test_a_check_that_breaks_ends_no_other(settings: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> object:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "disk_usage", broken)
    found = finding(settings, "disk")
    assert found.state == "fail" and "Permission denied" in found.sentence


MOUNTS = (
    "/dev/a / ext4 rw 0 0\n"
    "srv:/x /mnt/my\\040share nfs4 rw 0 0\n"
    "tmpfs /mnt/twice tmpfs rw 0 0\n"
    "b /mnt/twice 9p rw 0 0\n"
)  # fmt: skip


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/var/lib", "ext4"), ("/mnt/my share/deep/er", "nfs4"), ("/mnt/my", "ext4"), ("/mnt/twice/x", "9p")],
)
def test_the_file_system_is_the_innermost_mounts(path: str, kind: str) -> None:
    assert doctor.file_system(Path(path), MOUNTS) == kind


def test_a_network_file_system_is_told(settings: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    assert finding(settings, "file system").state == "ok"
    monkeypatch.setattr(doctor, "file_system", lambda path, mounts: "nfs4")
    assert finding(settings, "file system").state == "warn"
