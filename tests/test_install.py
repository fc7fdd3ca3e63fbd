"""install.sh, run for real: in a copy of the checkout whose path has a space, with a PATH of chosen programs.

Programs of the machine are stood in for by small scripts that obey the real interface. The environment is the one
the tests run in, so nothing is built here; the CUDA build itself is not covered.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from appliance import config

ROOT = Path(__file__).parents[1]
CORE = (
    "bash env dirname basename realpath sed awk df cat sha256sum cut grep sort comm mkdir find timeout tail rm cp chmod"
)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may do this")


@dataclass(frozen=True)
class Box:
    """A copy of the checkout's install files, a PATH folder and a data directory."""

    checkout: Path
    bin: Path
    data: Path

    def has(self, name: str, body: str) -> None:
        """Puts a program of this name on the PATH."""
        (self.bin / name).unlink(missing_ok=True)
        (self.bin / name).write_text(f"#!/bin/bash\n{body}\n")
        (self.bin / name).chmod(0o755)

    def environment(self) -> dict[str, str]:
        unit = str(self.checkout / "unit" / "appliance.service")
        home = str(self.checkout / "home")
        return {"PATH": str(self.bin), "HOME": home, "CUDA_HOME": "/nowhere", "APPLIANCE_UNIT_FILE": unit}

    def install(self, *options: str) -> subprocess.CompletedProcess[str]:
        command = [str(self.checkout / "install.sh"), "--data-dir", str(self.data), *options]
        return subprocess.run(command, env=self.environment(), cwd="/", capture_output=True, text=True, timeout=100)


@pytest.fixture
def box(tmp_path: Path) -> Box:
    """A machine that has all that is needed, and no environment yet."""
    made = Box(tmp_path / "a box", tmp_path / "bin", tmp_path / "the data")
    (made.checkout / "scripts").mkdir(parents=True)
    (made.checkout / "unit").mkdir()
    made.bin.mkdir()
    for name in ("install.sh", "pyproject.toml", "scripts/step.sh", "scripts/bootstrap", *map(str, locks())):
        shutil.copy(ROOT / name, made.checkout / name)
    for name in [*CORE.split(), "sleep"]:
        (made.bin / name).symlink_to(str(shutil.which(name)))
    made.has("python3", f'exec "{sys.executable}" "$@"')
    made.has("cmake", "echo cmake version 3.25.1")
    made.has("c++", "exit 0")
    return made


def locks() -> list[Path]:
    return [path.relative_to(ROOT) for path in ROOT.glob("requirements*.lock")]


def installed(box: Box) -> Box:
    """The same machine with the environment of this test run."""
    (box.checkout / ".venv").symlink_to(ROOT / ".venv")
    check = subprocess.run([box.checkout / "scripts" / "bootstrap", "--check"], env=box.environment())
    if check.returncode:
        pytest.skip("the checkout's .venv is not complete: run scripts/bootstrap --dev")
    return box


def recording_bootstrap(box: Box) -> Path:
    """A bootstrap that has work to do, notes what it was asked for, and fails."""
    record = box.checkout / "asked"
    text = (
        f'#!/bin/bash\n[[ " $* " != *" --check "* ]] || exit 1\necho "$@ CUDACXX=${{CUDACXX-}}" >"{record}"\nexit 7\n'
    )
    (box.checkout / "scripts" / "bootstrap").write_text(text)
    return record


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_help_names_every_option(box: Box) -> None:
    done = box.install("--help")
    assert done.returncode == 0
    known = re.findall(r"^            (--[a-z-]+)[ )]", (ROOT / "install.sh").read_text(), re.MULTILINE)
    assert len(known) >= 9
    assert [option for option in known if option not in done.stdout] == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--bogus"], "unknown option --bogus"),
        (["--port"], "--port needs a value"),
        (["--port", "--run"], "--port needs a value"),
        (["--port", "0"], "--port must be a number from 1 to 65535"),
        (["--port=65536"], "--port must be a number from 1 to 65535"),
        (["--port", "08x"], "--port must be a number from 1 to 65535"),
        (["--host", "a b"], "--host must be one address"),
        (["--host", "a\nb"], "control characters"),
        (["--run", "--service"], "exclude each other"),
        (["--uninstall", "--run"], "--uninstall goes with neither"),
        (["--purge"], "--purge only goes with --uninstall"),
        (["--wheel-dir", "/nowhere"], "scripts/make-wheelhouse"),
    ],
)
def test_a_wrong_option_ends_with_one_sentence_and_code_2(box: Box, options: list[str], words: str) -> None:
    done = box.install(*options)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == (2 if "\n" in options[-1] and "\n" in done.stderr[:-1] else 1)
    assert not box.data.exists()


OLD_PYTHON = 'if [[ $1 == --version ]]; then echo Python 3.9.2; else [[ "$2" != *version_info* ]]; fi'
NO_VENV = f'[[ "$2" != *ensurepip* ]] && exec "{sys.executable}" "$@"'


@pytest.mark.parametrize(
    ("program", "body", "words"),
    [
        ("python3", None, ["Python 3.11 or newer", "apt-get install python3 python3-venv"]),
        ("python3", OLD_PYTHON, ["found Python 3.9.2", "apt-get install python3.11 python3.11-venv"]),
        ("python3", NO_VENV, ["venv module", "apt-get install python3-venv"]),
        ("c++", None, ["a C++ compiler", "apt-get install g++"]),
        ("cmake", None, ["CMake", "apt-get install cmake"]),
        ("cmake", "echo cmake version 3.16.3", ["CMake 3.21 or newer", "3.16", "pip install"]),
        (
            "df",
            r"printf 'Filesystem 1024-blocks Used Available\n/dev/x 9 9 1048576 9%% /\n'",
            ["3 GB", "1024 MB are free"],
        ),
        ("nvidia-smi", "echo 'GPU 0: NVIDIA H200 (UUID: GPU-0)'", ["nvcc is not", "nvidia-cuda-toolkit", "--cpu"]),
    ],
)
def test_what_is_missing_is_named_with_its_fix(box: Box, program: str, body: str | None, words: list[str]) -> None:
    record = recording_bootstrap(box)
    if body is None:
        (box.bin / program).unlink()
    else:
        box.has(program, body)
    done = box.install()
    assert done.returncode == 3, done.stderr
    assert len([line for line in done.stderr.splitlines() if not line.endswith(" ...")]) == 1  # beside progress
    assert [word for word in words if word not in done.stderr] == []
    assert not record.exists()


def test_all_that_is_missing_is_one_sentence(box: Box) -> None:
    recording_bootstrap(box)
    (box.bin / "cmake").unlink()
    (box.bin / "c++").unlink()
    done = box.install()
    assert "missing: a C++ compiler, CMake; fix: sudo apt-get install g++ cmake" in done.stderr


def test_a_wrong_python_by_name_is_not_replaced_by_another(box: Box) -> None:
    box.has("oldpython", OLD_PYTHON)
    command = [str(box.checkout / "install.sh"), "--data-dir", str(box.data)]
    done = subprocess.run(command, env=box.environment() | {"PYTHON": "oldpython"}, capture_output=True, text=True)
    assert done.returncode == 3
    assert "PYTHON names 'oldpython'" in done.stderr


@needs_root
def test_root_with_yes_gets_missing_packages_installed(box: Box) -> None:
    record = recording_bootstrap(box)
    (box.bin / "cmake").rename(box.bin / "cmake.later")
    log = box.checkout / "apt.log"
    box.has("apt-get", f'echo "$@" >>"{log}"; [[ $1 != install ]] || cp "{box.bin}/cmake.later" "{box.bin}/cmake"')
    done = box.install("--yes")
    assert log.read_text().splitlines() == ["update", "install --yes --no-install-recommends cmake"]
    assert "installing cmake: done" in done.stderr
    assert record.exists()


@pytest.mark.parametrize(
    ("options", "gpu", "asked"),
    [([], False, " CUDACXX="), ([], True, "--cuda CUDACXX={bin}/nvcc"), (["--cpu"], True, " CUDACXX=")],
)
def test_cuda_is_built_where_gpu_and_nvcc_are(box: Box, options: list[str], gpu: bool, asked: str) -> None:
    record = recording_bootstrap(box)
    if gpu:
        box.has("nvidia-smi", "echo 'GPU 0: NVIDIA H200 (UUID: GPU-0)'")
        box.has("nvcc", "exit 0")
    done = box.install(*options)
    assert record.read_text().rstrip("\n") == asked.format(bin=box.bin)
    assert done.returncode == 1
    assert "failed while preparing .venv (exit 7)" in done.stderr


def test_a_wheelhouse_needs_no_compiler_but_must_fit_the_locks(box: Box) -> None:
    for tool in ("c++", "cmake"):
        (box.bin / tool).unlink()
    wheels = box.checkout / "wheel house"
    wheels.mkdir()
    (wheels / "numpy-1.0-py3-none-any.whl").touch()
    (wheels / "requirements.lock").write_text("numpy==1.0 --hash=sha256:00\n")
    done = box.install("--wheel-dir", str(wheels))
    assert done.returncode == 1
    assert "make it again with scripts/make-wheelhouse" in done.stderr
    assert "installing packages" not in done.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_data_directory_that_cannot_be_written_is_refused(box: Box) -> None:
    box.data.mkdir(mode=0o500)
    done = box.install()
    assert done.returncode == 3
    assert "--data-dir" in done.stderr


def test_the_default_data_directory_is_the_commands_own(box: Box) -> None:
    home = box.checkout / "home"
    for extra in ({}, {"APPLIANCE_DATA_DIR": str(home / "elsewhere")}):
        environment = box.environment() | extra
        command = [str(box.checkout / "install.sh"), "--uninstall"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        if os.geteuid() == 0 or extra:
            assert f"The data stays in {config.default_data_dir(environment)} " in done.stdout
        else:
            assert f"The data stays in {home}/.local/share/appliance " in done.stdout


def test_uninstall_keeps_the_data_and_purge_deletes_it_only_when_confirmed(box: Box) -> None:
    (box.checkout / ".venv").mkdir()
    box.data.mkdir()
    (box.data / "appliance.db").touch()
    done = box.install("--uninstall")
    assert (done.returncode, (box.checkout / ".venv").exists(), box.data.exists()) == (0, False, True)
    refused = box.install("--uninstall", "--purge")
    assert (refused.returncode, box.data.exists()) == (2, True)
    assert "add --yes" in refused.stderr
    done = box.install("--uninstall", "--purge", "--yes")
    assert (done.returncode, box.data.exists()) == (0, False)


def test_purge_spares_a_directory_without_appliance_data_or_with_more(box: Box) -> None:
    box.data.mkdir()
    (box.data / "letter.txt").touch()
    done = box.install("--uninstall", "--purge", "--yes")
    assert (done.returncode, (box.data / "letter.txt").exists()) == (2, True)
    (box.checkout / "appliance.db").touch()
    done = box.install("--uninstall", "--purge", "--yes", "--data-dir", str(box.checkout))
    assert done.returncode == 2
    assert box.checkout.exists()


def test_a_slow_step_shows_life_and_a_failed_one_its_output(tmp_path: Path) -> None:
    script = f"""set -euo pipefail; source "{ROOT}/scripts/step.sh"; STEP_PULSE=1 STEP_LOG="{tmp_path}/log"
        step "sleeping" sleep 2.5; step "breaking" bash -c 'echo the reason; exit 5'"""
    begun = time.monotonic()
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert time.monotonic() - begun < 8  # nothing of ours holds the pipes open afterwards
    assert done.returncode == 5
    lines = done.stderr.splitlines()
    assert lines[:2] == ["sleeping ...", "  ... sleeping, 1 s"]
    assert "the reason" in lines
    assert lines[-1].startswith("Failed while breaking (exit 5)")


def printed_secrets(text: str) -> dict[str, str]:
    return dict(re.findall(r"^  (user|password|key) +(\S+)$", text, re.MULTILINE))


def test_a_second_run_changes_nothing_and_shows_no_secret(box: Box) -> None:
    installed(box)
    first = box.install("--cpu")
    assert first.returncode == 0, first.stderr
    secrets = printed_secrets(first.stdout)
    assert re.fullmatch(r"oai_[A-Za-z0-9]{32}", secrets["key"])
    assert len(secrets["password"]) >= 12
    assert [s for s in (secrets["key"], secrets["password"]) if s in first.stderr] == []
    before = {path: path.read_bytes() for path in box.data.rglob("*") if path.is_file()}
    second = box.install("--cpu")
    assert second.returncode == 0, second.stderr
    assert printed_secrets(second.stdout) == {}
    assert "no new key was made" in second.stderr
    assert {path: path.read_bytes() for path in before} == before


@contextmanager
def running(box: Box, port: int) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """install.sh --run, and what it printed up to the end of its curl."""
    command = [str(box.checkout / "install.sh"), "--cpu", "--run", "--port", str(port), "--data-dir", str(box.data)]
    process = subprocess.Popen(
        command, env=box.environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout
    try:
        text = ""
        while "'{" not in text and (line := process.stdout.readline()):
            text += line
        yield process, text
    finally:
        process.kill()
        process.communicate()


def wait_ready(process: subprocess.Popen[str], url: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    pytest.fail(f"the server was not ready within 60 s; exit code {process.poll()}")


def test_the_printed_curl_works_and_ctrl_c_ends_with_code_0(box: Box) -> None:
    port = free_port()
    with running(installed(box), port) as (process, text):
        wait_ready(process, f"http://127.0.0.1:{port}")
        curl = re.search(r'curl -X POST (\S+) .*"(Authorization): (.+?)".*-d \'(.+)\'', text, re.DOTALL)
        assert curl
        url, name, value, body = curl.groups()
        assert value == f"Bearer {printed_secrets(text)['key']}"
        answer = httpx.post(url, headers={name: value}, json=json.loads(body), timeout=60)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] > 0
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=40) == 0


def test_the_unit_is_hardened_and_systemd_accepts_it(box: Box, tmp_path: Path) -> None:
    done = installed(box).install("--print-unit", "--port", "443", "--host", "::")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for line in ("User=appliance", "ProtectSystem=strict", "NoNewPrivileges=yes", "PrivateTmp=yes", "Restart=always"):
        assert line in lines
    assert "AmbientCapabilities=CAP_NET_BIND_SERVICE" in lines
    settings = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    assert int(settings["TimeoutStopSec"]) > config.ServerSettings().drain_seconds
    assert int(settings["StartLimitBurst"]) > 0
    assert settings["ReadWritePaths"] == f'"{box.data}"'
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed: the unit's text was checked, its syntax not")
    unit = tmp_path / "appliance.service"
    unit.write_text(done.stdout)
    verdict = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    assert [line for line in verdict.stderr.splitlines() if "appliance.service" in line] == []
    unit.write_text(done.stdout.replace("ProtectSystem=strict", "ProtectSystem=wrong"))
    control = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    assert "appliance.service" in control.stderr


@needs_root
def test_service_without_a_running_systemd_says_so_before_any_work(box: Box) -> None:
    for state in ("", "echo offline; exit 1"):
        box.has("systemctl", state)
        done = box.install("--service")
        assert done.returncode == 3
        assert "--service needs a running systemd" in done.stderr
        assert not box.data.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may")
def test_service_needs_root(box: Box) -> None:
    done = box.install("--service")
    assert done.returncode == 3
    assert "sudo" in done.stderr


# Starts what ExecStart says, as systemd would, and notes what it was told.
SYSTEMCTL = """echo "$@" >>"{log}"
case $1 in
    is-system-running) echo running ;;
    restart)
        if [[ -f "{pid}" ]]; then
            kill -TERM "$(<"{pid}")"
            tail --pid="$(<"{pid}")" -f /dev/null
        fi
        command=$(sed -n 's/^ExecStart=//p' "$APPLIANCE_UNIT_FILE")
        eval "exec $command" </dev/null >/dev/null 2>&1 &
        echo $! >"{pid}" ;;
esac
"""


@needs_root
def test_service_is_written_enabled_started_and_removed(box: Box) -> None:
    log, pid = box.checkout / "systemctl.log", box.checkout / "pid"
    installed(box).has("systemctl", SYSTEMCTL.format(log=log, pid=pid))
    for name in ("useradd", "chown"):
        box.has(name, f'echo {name} "$@" >>"{log}"')
    box.has("getent", "exit 2")
    box.has("runuser", '[[ $1 == -u && $3 == -- ]] && exec "${@:4}"')
    port = str(free_port())
    try:
        done = box.install("--service", "--cpu", "--port", port)
        assert done.returncode == 0, done.stderr
        told = log.read_text()
        assert re.search(r"useradd .*appliance\n(.*\n)*daemon-reload\nenable appliance\nrestart appliance\n", told)
        assert f"chown -R -h appliance:appliance {box.data}" in told
        assert printed_secrets(done.stdout)["key"] in done.stdout.split("curl")[1]
        unit = Path(box.environment()["APPLIANCE_UNIT_FILE"])
        assert f'"--port" "{port}"' in unit.read_text()
        kept = unit.read_text().replace("[Service]", "[Service]\n# a line of the administrator's")
        unit.write_text(kept)
        again = box.install("--service", "--cpu")
        assert again.returncode == 0, again.stderr
        assert unit.read_text() == kept and "is kept as it is" in again.stderr
        assert printed_secrets(again.stdout) == {}, "no second key"
        assert f"127.0.0.1:{port}/llm/chat" in again.stdout, "the unit's address, not the default"
        other = str(free_port())
        assert box.install("--service", "--cpu", "--port", other).returncode == 0
        assert f'"--port" "{other}"' in unit.read_text()
        assert unit.with_name("appliance.service.old").read_text() == kept
    finally:
        if pid.exists():
            os.kill(int(pid.read_text()), signal.SIGKILL)
    (box.checkout / ".venv").unlink()
    assert box.install("--uninstall").returncode == 0
    assert "disable --now appliance" in log.read_text()
    assert (unit.exists(), box.data.exists()) == (False, True)
