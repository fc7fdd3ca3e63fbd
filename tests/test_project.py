"""The project's own files: locks, version, scripts. What they promise to a person who installs from a checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

import appliance

ROOT = Path(__file__).parents[1]
LOCKS = ("requirements.lock", "requirements-dev.lock", "requirements-build.lock")
PINNED = re.compile(r"^([a-z0-9][a-z0-9.-]*)==\S+( ; .+)? \\$")
HASH = re.compile(r"^    --hash=sha256:[0-9a-f]{64}( \\)?$")
ADDRESS = re.compile(r"://|--(extra-)?index-url|--find-links|--trusted-host|\.(org|com|io|net)\b", re.IGNORECASE)


def scripts() -> list[Path]:
    found = [path for path in (ROOT / "scripts").iterdir() if path.is_file() and path.suffix not in (".md", ".py")]
    return sorted(path for path in found if path.name != "step.sh")  # sourced, never run


def faulty_lines(text: str) -> list[str]:
    """The lines of a lock that are neither a pinned package with its hashes to follow, nor a hash, nor a comment."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    faults = [line for line in lines if not PINNED.match(line) and not HASH.match(line)]
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line.endswith("\\") and not HASH.match(following):
            faults.append(line)
    return faults


def names(lock: str) -> dict[str, str]:
    return dict(re.findall(r"^(\S+)==(\S+)", (ROOT / lock).read_text(), re.MULTILINE))


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_pins_every_package_with_hashes_and_names_no_address(lock: str) -> None:
    text = (ROOT / lock).read_text()
    assert names(lock)
    assert faulty_lines(text) == []
    assert ADDRESS.search(text) is None


@pytest.mark.parametrize(
    "line", ["numpy>=2 \\", "numpy==2.4.6", "numpy==2.4.6 \\", "    --hash=md5:00", "-e .", "--pre", "numpy @ file:x"]
)
def test_the_lock_check_finds_a_bad_line(line: str) -> None:
    assert faulty_lines(line + "\n") != []


@pytest.mark.parametrize("line", ["--index" + "-url x", "x @ https://a/b", "--find-links dir", "files.example.org"])
def test_the_address_check_finds_an_address(line: str) -> None:
    assert ADDRESS.search(line)


def test_the_locks_agree_and_hold_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    run, dev = names("requirements.lock"), names("requirements-dev.lock")
    wanted = {re.split(r"[^A-Za-z0-9-]", line)[0] for line in project["dependencies"]}
    extra = {re.split(r"[^A-Za-z0-9-]", line)[0] for line in project["optional-dependencies"]["dev"]}
    assert wanted <= run.keys()
    assert extra <= dev.keys()
    assert run.items() <= dev.items()
    build = names("requirements-build.lock")
    assert {name: dev[name] for name in build.keys() & dev.keys()} == {
        name: build[name] for name in build.keys() & dev.keys()
    }


def test_the_changelog_opens_with_this_version() -> None:
    versions = re.findall(r"^## \[?(\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == appliance.__version__


@pytest.mark.parametrize(
    "path", [*scripts(), ROOT / "install.sh", ROOT / ".ci" / "run"], ids=lambda path: str(path.name)
)
def test_a_script_is_executable_and_stops_at_the_first_error(path: Path) -> None:
    head = path.read_text()[:1500]
    assert os.access(path, os.X_OK)
    assert re.match(r"#!(/usr/bin/env bash|/bin/sh -e|/usr/bin/env python3)\n", head)
    assert (
        "python3" in head.splitlines()[0]
        or "sh -e" in head.splitlines()[0]
        or re.search(r"^set -E?euo pipefail$", head, re.M)
    )


def test_scripts_are_short_and_in_their_readme() -> None:
    readme = (ROOT / "scripts" / "README.md").read_text()
    assert [path.name for path in scripts() if f"`{path.name}" not in readme] == []
    assert {path.name: n for path in scripts() if (n := len(path.read_text().splitlines())) > 140} == {}


def test_ci_runs_the_test_script_and_nothing_swallows_its_code() -> None:
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "exec scripts/test"
    assert (ROOT / "scripts" / "test").read_text().splitlines()[-1] == '.venv/bin/python -m pytest "$@"'


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_has_no_complaint() -> None:
    files = [
        path
        for path in [*scripts(), ROOT / "install.sh", ROOT / ".ci" / "run"]
        if "sh" in path.read_text().split("\n")[0]
    ]
    done = subprocess.run(["shellcheck", "-x", *files], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == ""
    assert len(files) > 5
