"""The `appliance` command: every word of it, with and without a running server, and what it says of trouble."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from appliance import __version__, cli, config, errors, installation
from appliance.config import CHECKOUT, Config
from appliance.gguf import Writer
from appliance.store.keyfile import ENVIRONMENT
from appliance.store.lock import DataDirLock
from tests.box import APPLIANCE, Box, choose_tiny, command, environment
from tests.test_admin import serving

KEY = re.compile(r"oai_[A-Za-z0-9]{32}")


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An initialised data directory, to be copied."""
    made = tmp_path_factory.mktemp("template") / "data"
    command("init", data_dir=made)
    choose_tiny(made)
    return made


@pytest.fixture
def data(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An initialised data directory of this test's own."""
    for name in [n for n in os.environ if n.startswith("APPLIANCE_")]:
        monkeypatch.delenv(name)
    return Path(shutil.copytree(template, tmp_path / "data"))


def run(data: Path, *words: str, stdin: str | bytes = "") -> Result:
    """A command in this process; nothing but a sentence and an exit code may come of an error."""
    result = CliRunner().invoke(cli.main, [*words, "--data-dir", str(data)], input=stdin)
    assert "Traceback" not in result.output
    return result


def good(data: Path, *words: str, stdin: str | bytes = "") -> str:
    result = run(data, *words, stdin=stdin)
    assert result.exit_code == 0, result.output
    return result.stdout


def listed(data: Path, *words: str) -> Any:
    return json.loads(good(data, *words, "--json"))


def refused(data: Path, *words: str, code: int, stdin: str | bytes = "") -> str:
    """The one sentence on stderr of a command that ends with `code`; stdout is empty."""
    result = run(data, *words, stdin=stdin)
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("appliance: "), result.stderr
    return lines[0].removeprefix("appliance: ")


def fingerprint(directory: Path) -> dict[str, str]:
    """The content of every file."""
    files = [p for p in sorted(directory.rglob("*")) if p.is_file()]
    return {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


# ── the words ────────────────────────────────────────────────────────────────────────────────────────────────────


def commands(group: click.Group = cli.main, before: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    for name, found in group.commands.items():
        if isinstance(found, click.Group):
            yield from commands(found, (*before, name))
        else:
            yield " ".join((*before, name)), found


def test_the_commands_are_the_promised_ones() -> None:
    assert {name for name, _ in commands()} >= {
        "init", "serve", "chat", "doctor", "backup", "restore", "config show", "tls self-signed", "account create",
        "account list", "key create", "key list", "key revoke", "models list", "models add", "models use",
        "models verify",
    }  # fmt: skip


@pytest.mark.parametrize(("name", "found"), list(commands()), ids=[name for name, _ in commands()])
def test_a_command_has_help_and_the_common_options(name: str, found: click.Command) -> None:
    options = {option for parameter in found.params for option in parameter.opts}
    assert {"--config", "--data-dir"} <= options
    assert "--json" in options or name in ("serve", "chat")
    assert found.help
    shown = CliRunner().invoke(cli.main, [*name.split(), "--help"])
    assert shown.exit_code == 0 and found.help.split(".")[0] in " ".join(shown.output.split())


def test_help_lists_every_exit_code() -> None:
    text = CliRunner().invoke(cli.main, ["--help"]).output
    for code in {c.exit_code for c in errors.OperatorError.__subclasses__()} - {2} | {0, 130}:
        assert re.search(rf"^ +{code}\b", text, re.M), code
    assert [len(line) for line in text.splitlines() if len(line) > 100] == []


def test_exit_codes_are_distinct() -> None:
    codes = [c.exit_code for c in errors.OperatorError.__subclasses__()]
    assert len(set(codes)) == len(codes) and not {0, 1, 130} & set(codes)


def test_the_version_is_the_packages() -> None:
    assert __version__ in CliRunner().invoke(cli.main, ["--version"]).output


def test_help_loads_neither_the_model_nor_the_server() -> None:
    code = "import sys; from appliance import {}; print(*sorted({{'llama_cpp', 'starlette'}} & set(sys.modules)))"
    loaded = {
        name: subprocess.run([sys.executable, "-c", code.format(name)], capture_output=True, text=True, timeout=60)
        for name in ("cli", "app")
    }
    assert {name: done.stdout for name, done in loaded.items()} == {"cli": "\n", "app": "llama_cpp starlette\n"}


@pytest.mark.parametrize("words", [["nonsense"], ["key", "create"], ["serve", "--port", "x"], ["init", "--what"]])
def test_wrong_words_are_two(words: list[str]) -> None:
    result = CliRunner().invoke(cli.main, words)
    assert result.exit_code == 2 and "Error" in result.stderr


# ── init ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_init_makes_everything_and_says_it_once(tmp_path: Path) -> None:
    data = tmp_path / "a" / "data"
    first = run(data, "init", "--json")
    made = json.loads(first.stdout)
    assert made == {
        "created": True, "account": "default", "user": "admin", "password": made["password"], "key": made["key"],
    }  # fmt: skip
    assert KEY.fullmatch(made["key"]) and len(made["password"]) >= 16
    assert first.stderr == ""
    modes = {p: (data / p).stat().st_mode & 0o777 for p in (".", "secrets", "secrets/master.key", "appliance.db")}
    assert modes == {".": 0o700, "secrets": 0o700, "secrets/master.key": 0o600, "appliance.db": 0o600}
    before = fingerprint(data)
    assert listed(data, "init") == {"created": False}
    assert "nothing was changed" in good(data, "init")
    after = fingerprint(data)
    assert {name for name in before | after if before.get(name) != after.get(name)} <= {"appliance.db"}  # its counters
    [account] = listed(data, "account", "list")
    assert (account["name"], account["plan"]) == ("default", "enterprise")
    [key] = listed(data, "key", "list")
    assert (key["account"], key["scope"], key["last_four"]) == ("default", "full", made["key"][-4:])
    [model] = listed(data, "models", "list")
    assert (model["name"], model["chosen"], model["guide"]) == ("appliance-guide", True, True)


def test_init_shows_both_secrets_once_to_a_person(tmp_path: Path) -> None:
    text = good(tmp_path / "data", "init")
    assert len(KEY.findall(text)) == 1 and "shown this once" in text
    assert len(re.findall(r"^  password +\w{20}$", text, re.M)) == 1
    assert str(tmp_path / "data" / "secrets" / "master.key") in text
    assert KEY.findall(good(tmp_path / "data", "init")) == []


def test_a_key_file_without_a_database_is_kept(tmp_path: Path) -> None:
    secrets = tmp_path / "data" / "secrets"
    secrets.mkdir(parents=True)
    (secrets / "master.key").write_text("ab" * 32 + "\n")
    (secrets / "master.key").chmod(0o600)
    assert listed(tmp_path / "data", "init")["created"]
    assert (secrets / "master.key").read_text() == "ab" * 32 + "\n"
    assert len(listed(tmp_path / "data", "key", "list")) == 1


def test_an_empty_key_file_is_a_cut_off_beginning(tmp_path: Path) -> None:
    secrets = tmp_path / "data" / "secrets"
    secrets.mkdir(parents=True)
    (secrets / "master.key").touch(0o600)
    assert listed(tmp_path / "data", "init")["created"]
    assert len((secrets / "master.key").read_text().strip()) == 64


@pytest.mark.parametrize("step", ["users", "keys", "accounts", "tinymodel"])
def test_a_beginning_that_was_cut_off_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    data = tmp_path / "data"

    class Cut:
        def __getattr__(self, name: str) -> Any:
            if name in ("create", "write"):
                raise errors.DataDirError("The power is gone.")
            return getattr(real, name)

    real = getattr(installation, step)
    monkeypatch.setattr(installation, "GUIDE", tmp_path / "not-shipped.gguf")
    monkeypatch.setattr(installation, step, Cut())
    assert refused(data, "init", "--json", code=7) == "The power is gone."
    key_file = (data / "secrets" / "master.key").read_bytes()
    monkeypatch.setattr(installation, step, real)
    made = listed(data, "init")
    assert made["created"] and made["password"] and made["key"]
    assert (data / "secrets" / "master.key").read_bytes() == key_file
    valid = [k["last_four"] for k in listed(data, "key", "list") if k["revoked"] is None]
    assert valid == [made["key"][-4:]]
    assert len(listed(data, "account", "list")) == 1
    assert listed(data, "init") == {"created": False}


def test_without_the_built_in_guide_a_placeholder_stands_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "GUIDE", tmp_path / "not-shipped.gguf")
    assert listed(tmp_path / "data", "init")["created"]
    [model] = listed(tmp_path / "data", "models", "list")
    assert (model["name"], model["chosen"], model["placeholder"], model["guide"]) == (
        "tiny-placeholder",
        True,
        True,
        False,
    )


def test_a_damaged_built_in_guide_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = tmp_path / "models"
    shutil.copytree(installation.GUIDE.parent, shipped)
    guide = shipped / installation.GUIDE.name
    guide.write_bytes(guide.read_bytes()[:-1] + b"x")
    monkeypatch.setattr(installation, "GUIDE", guide)
    assert "not the one that was shipped" in refused(tmp_path / "data", "init", code=9)
    monkeypatch.undo()
    assert listed(tmp_path / "data", "init")["created"], "nothing is lost by the failed try"


def test_a_lost_key_file_is_a_refusal_and_never_a_new_database(data: Path) -> None:
    (data / "secrets" / "master.key").unlink()
    before = fingerprint(data)
    for words in (["init"], ["key", "list"], ["serve", "--port", "0"]):
        assert "key file" in refused(data, *words, code=8)
    (data / "secrets" / "master.key").write_text("cd" * 32)
    (data / "secrets" / "master.key").chmod(0o600)
    assert "does not open" in refused(data, "init", code=8)
    (data / "secrets" / "master.key").unlink()
    assert fingerprint(data) == before


def test_the_key_may_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, "ef" * 32)
    assert listed(tmp_path / "data", "init")["created"]
    assert not (tmp_path / "data" / "secrets").exists()
    assert len(listed(tmp_path / "data", "key", "list")) == 1
    monkeypatch.delenv(ENVIRONMENT)
    refused(tmp_path / "data", "key", "list", code=8)


@pytest.mark.parametrize(
    "words",
    [
        ["serve"], ["account", "list"], ["account", "create", "a", "--plan", "community"], ["key", "list"],
        ["key", "create", "--account", "a", "--name", "n", "--scope", "full"], ["key", "revoke", "x"],
        ["models", "list"], ["models", "add", "x.gguf"], ["models", "use", "x"], ["models", "verify"], ["chat", "hi"],
        ["backup", "x"], ["tls", "self-signed"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_without_init_a_command_names_it(tmp_path: Path, words: list[str]) -> None:
    assert "`appliance init`" in refused(tmp_path / "data", *words, code=4)
    assert not (tmp_path / "data").exists()


def test_a_data_directory_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "cannot be made" in refused(tmp_path / "file" / "data", "init", code=7)


# ── accounts, keys, settings ─────────────────────────────────────────────────────────────────────────────────────


def test_accounts_are_made_and_listed(data: Path) -> None:
    made = listed(data, "account", "create", "Team Blue", "--plan", "professional", "--email", "a@b.example")
    assert (made["name"], made["plan"], made["email"]) == ("Team Blue", "professional", "a@b.example")
    assert [a["name"] for a in listed(data, "account", "list")] == ["default", "Team Blue"]
    assert re.search(r"^acc_\w+  Team Blue +professional  a@b\.example", good(data, "account", "list"), re.M)
    assert "already" in refused(data, "account", "create", "Team Blue", "--plan", "community", code=1)
    assert "email" in refused(data, "account", "create", "x", "--plan", "community", "--email", "no", code=1)
    assert "the plans are community, professional, enterprise" in refused(
        data, "account", "create", "x", "--plan", "gold", code=1
    )


def test_keys_are_made_shown_once_listed_and_revoked(data: Path) -> None:
    made = listed(data, "key", "create", "--account", "default", "--name", "ci", "--scope", "llm")
    assert KEY.fullmatch(made["key"]) and made["key"].startswith(made["prefix"])
    assert {"id", "name", "scope", "account", "last_four"} <= made.keys()
    assert made["key"] not in good(data, "key", "list") + good(data, "key", "list", "--json")
    assert listed(data, "key", "revoke", made["id"])["revoked"]
    assert [k["revoked"] is None for k in listed(data, "key", "list")] == [True, False]
    assert "no key" in refused(data, "key", "revoke", "key_0", code=1)
    words = ["key", "create", "--account", "nobody", "--name", "n", "--scope", "full"]
    assert "no account" in refused(data, *words, code=1)
    result = run(data, "key", "create", "--account", "default", "--name", "ci2", "--scope", "read")
    assert len(KEY.findall(result.stdout)) == 1 and "once" in result.stderr


def test_the_settings_are_shown_with_their_sources(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (data / "config.toml").write_text("[engine]\nslots = 3\n")
    monkeypatch.setenv("APPLIANCE_SERVER__PORT", "9000")
    rows = {row["setting"]: row for row in listed(data, "config", "show")}
    assert rows["engine.slots"] == {
        "setting": "engine.slots", "value": "3", "source": f"file {data / 'config.toml'}",
    }  # fmt: skip
    assert rows["server.port"]["source"] == "environment APPLIANCE_SERVER__PORT"
    assert len(rows) == len(config.settings())
    header, *lines = good(data, "config", "show").splitlines()
    assert header.split() == ["setting", "value", "source"] and len(lines) == len(rows)
    assert len({line.index("default") for line in lines if line.endswith("  default")}) == 1


def test_a_wrong_setting_stops_every_command(data: Path, tmp_path: Path) -> None:
    (data / "config.toml").write_text("[server]\nprot = 3\n")
    for words in (["config", "show"], ["key", "list"], ["serve"], ["init"]):
        assert "server.port" in refused(data, *words, code=3)
    (tmp_path / "good.toml").write_text("")
    good(data, "key", "list", "--config", str(tmp_path / "good.toml"))


def test_options_override_and_are_named_when_wrong(data: Path) -> None:
    assert "option --port: server.port must be" in refused(data, "serve", "--port", "99999", code=3)
    assert "option --slots" in refused(data, "serve", "--slots", "0", code=3)
    assert "option --context" in refused(data, "serve", "--context", "-5", code=3)


def test_a_certificate_is_made_with_the_lines_to_use_it(data: Path) -> None:
    (data / "config.toml").write_text("[server]\npublic_url = 'https://llm.example.org:8443/x'\n")
    text = good(data, "tls", "self-signed")
    assert "llm.example.org" in text
    (data / "config.toml").write_text(text[text.index("[server]") :])
    server = config.load(data, environ={}).server
    assert (server.tls_cert, server.tls_key) == (str(data / "tls/appliance.crt"), str(data / "tls/appliance.key"))
    assert "--force" in refused(data, "tls", "self-signed", code=7)
    assert "localhost" in listed(data, "tls", "self-signed", "--force")["names"]


# ── models ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_models_are_added_chosen_and_verified(data: Path, tmp_path: Path, tiny_f32_gguf: Path) -> None:
    file = shutil.copy(tiny_f32_gguf, tmp_path / "Other Model.gguf")
    added = listed(data, "models", "add", str(file))
    assert (added["name"], added["chosen"]) == ("Other-Model", False)
    assert listed(data, "models", "use", "Other-Model")["chosen"]
    assert {m["name"]: m["chosen"] for m in listed(data, "models", "list")} == {"Other-Model": True, "tiny": False}
    assert all(v["good"] for v in listed(data, "models", "verify"))
    assert "Other-Model" in refused(data, "models", "use", "other-model", code=9)
    copied = listed(data, "models", "add", str(file), "--copy", "--name", "copied")
    assert Path(copied["file"]).parent == data / "models"
    Path(file).write_bytes(Path(file).read_bytes()[:-1])
    result = run(data, "models", "verify")
    assert result.exit_code == 9
    assert re.search(r"^Other-Model +no +\S", result.stdout, re.M) and re.search(r"^tiny +yes", result.stdout, re.M)
    refused(data, "models", "use", "Other-Model", code=9)
    assert "does not exist" in refused(data, "models", "add", str(tmp_path / "absent.gguf"), code=9)


def test_choosing_a_model_says_that_the_settings_name_another(data: Path) -> None:
    assert run(data, "models", "use", "tiny").stderr == ""
    (data / "config.toml").write_text("[engine]\nmodel = 'big'\n")
    assert "engine.model" in run(data, "models", "use", "tiny").stderr


def test_what_a_file_says_cannot_steer_the_terminal(data: Path) -> None:
    manifest = data / "models" / "manifest.json"
    found = json.loads(manifest.read_text())
    found["models"][0]["licence"] = "\x1b]0;gotcha\x07"
    manifest.write_text(json.dumps(found))
    text = good(data, "models", "list")
    assert "gotcha" in text and "\x1b" not in text and "\x07" not in text


# ── backups ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_backup_brings_back_what_was(data: Path, tmp_path: Path) -> None:
    made = listed(data, "backup", str(tmp_path / "one.backup"))
    assert made["tables"]["accounts"] == 1 and made["path"] == str(tmp_path / "one.backup")
    good(data, "account", "create", "later", "--plan", "community")
    assert "exists already" in refused(data, "backup", str(tmp_path / "one.backup"), code=10)
    assert listed(data, "restore", str(tmp_path / "one.backup"))["tables"]["accounts"] == 1
    assert [a["name"] for a in listed(data, "account", "list")] == ["default"]


def test_a_bad_backup_changes_nothing(data: Path, tmp_path: Path) -> None:
    good(data, "backup", str(tmp_path / "bad"))
    content = bytearray((tmp_path / "bad").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "bad").write_bytes(content)
    before = fingerprint(data)
    refused(data, "restore", str(tmp_path / "bad"), code=10)
    refused(data, "restore", str(tmp_path / "absent"), code=10)
    assert fingerprint(data) == before


# ── who holds the directory ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_a_data_directory_that_is_read_only_is_one_sentence_and_seven(data: Path) -> None:
    """In a place that everybody may reach, as root's own temporary directories are not."""
    theirs = Path("/tmp") / f"appliance-test-{os.getpid()}"
    shutil.copytree(data, theirs)
    try:
        for path in (theirs, *theirs.rglob("*")):
            os.chown(path, 65_534, 65_534)
            path.chmod((0o500 if path.is_dir() else 0o400) | (0o200 if path.name == "lock" else 0))
        act = "import os, sys; from appliance.cli import main; os.setuid(65534); sys.argv[1:] = ['key', 'list']; main()"
        environ = environment(APPLIANCE_DATA_DIR=str(theirs), PYTHONPATH=str(CHECKOUT))
        done = subprocess.run([sys.executable, "-c", act], env=environ, capture_output=True, text=True, timeout=60)
    finally:
        shutil.rmtree(theirs)
    assert done.returncode == 7 and str(theirs) in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_init_waits_for_a_command_to_end(data: Path) -> None:
    lock = DataDirLock(data)
    lock.acquire()
    release = threading.Timer(0.6, lock.release)
    release.start()
    assert listed(data, "init") == {"created": False}
    release.join()


def test_a_command_waits_for_another_one_to_end(data: Path) -> None:
    lock = DataDirLock(data)
    lock.acquire()
    release = threading.Timer(0.6, lock.release)
    started = time.monotonic()
    release.start()
    assert len(listed(data, "key", "list")) == 1
    assert time.monotonic() - started > 0.5
    release.join()


def test_a_directory_that_stays_held_is_a_refusal(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "BUSY_SECONDS", 0.2)
    with DataDirLock(data):
        assert f"process {os.getpid()}" in refused(data, "key", "list", code=5)
        refused(data, "serve", "--port", "0", code=5)
        refused(data, "restore", "x", code=5)
    good(data, "key", "list")


def test_commands_in_parallel_all_succeed(data: Path) -> None:
    words = [*APPLIANCE, "account", "create", "--data-dir", str(data), "--plan", "community", "--json"]
    running = [
        subprocess.Popen([*words, f"team {i}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
        for i in range(3)
    ]
    ended = [(p.communicate(timeout=60), p.returncode) for p in running]
    assert [code for _, code in ended] == [0, 0, 0], ended
    assert len(listed(data, "account", "list")) == 4


# ── unexpected errors ────────────────────────────────────────────────────────────────────────────────────────────


def test_an_unexpected_error_is_one_line_unless_asked_for(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(settings: Config) -> list[tuple[str, str, str]]:
        raise ValueError("first line\nsecond line")

    monkeypatch.setattr(config, "show", broken)
    assert "ValueError: first line (APPLIANCE_DEBUG=1" in refused(data, "config", "show", code=1)
    monkeypatch.setenv("APPLIANCE_DEBUG", "1")
    result = CliRunner().invoke(cli.main, ["config", "show", "--data-dir", str(data)])
    assert "Traceback" in result.stderr and "second line" in result.stderr


def test_a_reader_that_leaves_is_no_trace(data: Path) -> None:
    words = " ".join([*APPLIANCE, "config", "show", "--data-dir", str(data)])
    done = subprocess.run(f"{words} | true", shell=True, capture_output=True, text=True, timeout=60, env=environment())
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


# ── chat ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_one_answer_without_a_server(data: Path) -> None:
    done = command("chat", "Hello", "--max-tokens", "8", data_dir=data)
    assert len(done.stdout.strip()) > 3
    piped = command("chat", "--max-tokens", "8", data_dir=data, stdin="Hello")
    assert len(piped.stdout.strip()) > 3


@pytest.mark.parametrize("piped", [b"", b" \n ", b"\xff\xfe"])
def test_nothing_to_answer_is_a_refusal(data: Path, piped: bytes) -> None:
    assert "prompt" in (text := refused(data, "chat", code=2, stdin=piped)) or "UTF-8" in text


def test_a_prompt_that_is_no_text_is_refused(data: Path) -> None:
    assert "UTF-8" in refused(data, "chat", "bad \udcff byte", code=2)


class Talker:
    """A stand-in for the server's `chat`: says how many turns it was shown, or talks until the other end is gone."""

    def __init__(self) -> None:
        self.shown: list[dict[str, Any]] = []
        self.stopped = threading.Event()

    async def handle(self, operation: str, arguments: dict[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        if operation == "status":
            yield {"result": {"placeholder": True}}
            return
        assert operation == "chat"
        self.shown.append(arguments)
        match arguments["messages"][-1]["content"]:
            case "talk":
                try:
                    while True:
                        yield {"part": "bla "}
                        await asyncio.sleep(0.01)
                finally:
                    self.stopped.set()
            case "fail":
                yield {"part": "half"}
                raise errors.PromptTooLong(9_000, 100)
            case "escape":
                yield {"part": "\x1b[31mred\x07\tand\nnew"}
        yield {"part": f"<{len(arguments['messages'])} turns>"}
        yield {"result": None}


@pytest.fixture
def talker(data: Path) -> Iterator[Talker]:
    found = Talker()
    with serving(data / "admin.sock", found.handle):
        yield found


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, *words: str) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execvpe(words[0], words, environment(TERM="dumb"))
        self.seen = ""

    def expect(self, text: str, seconds: float = 30) -> None:
        """Reads until `text` has come, after what was expected before."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < deadline, f"{text!r} did not come: {self.seen[-300:]!r}"
            if select.select([self.fd], [], [], 0.2)[0]:
                self.seen += os.read(self.fd, 4_096).decode("utf-8", "replace")
        self.seen = self.seen.partition(text)[2]

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def end(self) -> int:
        """The exit code."""
        while True:
            try:
                if not os.read(self.fd, 4_096):
                    break
            except OSError:  # how Linux says that the other end is closed
                break
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def close(self) -> None:
        os.close(self.fd)


@contextmanager
def terminal(*words: str) -> Iterator[Terminal]:
    found = Terminal(*words)
    try:
        yield found
    finally:
        found.close()


def test_a_conversation_is_kept_and_ends_with_ctrl_d(data: Path, talker: Talker) -> None:
    with terminal(*APPLIANCE, "chat", "--max-tokens", "7", "--data-dir", str(data)) as t:
        t.expect("> ")
        t.type("one\n")
        t.expect("<1 turns>")
        t.type("\n")
        t.type("two\n")
        t.expect("<3 turns>")
        t.expect("> ")
        t.type("\x04")
        assert t.end() == 0
    assert [m["content"] for m in talker.shown[-1]["messages"]] == ["one", "<1 turns>", "two"]
    assert talker.shown[-1]["max_tokens"] == 7


def test_ctrl_c_ends_the_answer_and_not_the_conversation(data: Path, talker: Talker) -> None:
    with terminal(*APPLIANCE, "chat", "--data-dir", str(data)) as t:
        t.expect("> ")
        t.type("talk\n")
        t.expect("bla bla bla")
        assert not talker.stopped.is_set()
        t.type("\x03")
        t.expect("> ")
        assert talker.stopped.wait(20)
        t.type("half a li\x03")
        t.expect("> ")
        t.type("more\n")
        t.expect("<3 turns>")
        t.expect("> ")
        t.type("\x04")
        assert t.end() == 0
    assert talker.shown[-1]["messages"][1]["content"].startswith("bla bla")
    assert talker.shown[-1]["messages"][2]["content"] == "more"


def test_a_turn_that_fails_is_told_and_forgotten(data: Path, talker: Talker) -> None:
    with terminal(*APPLIANCE, "chat", "--data-dir", str(data)) as t:
        t.expect("> ")
        t.type("fail\n")
        t.expect("9000 tokens")
        t.expect("> ")
        t.type("again\n")
        t.expect("<1 turns>")
        t.type("\x04")
        assert t.end() == 0


def test_a_single_answer_that_fails_is_an_exit_code(data: Path, talker: Talker) -> None:
    result = run(data, "chat", "fail")
    assert result.exit_code == 1 and result.stdout == "half\n" and "9000 tokens" in result.stderr


def test_what_a_model_says_cannot_steer_the_terminal(data: Path, talker: Talker) -> None:
    assert good(data, "chat", "escape") == "\ufffd[31mred\ufffd\tand\nnew<1 turns>\n"


def test_ctrl_c_ends_a_single_answer_with_130(data: Path, talker: Talker) -> None:
    words = [*APPLIANCE, "chat", "talk", "--data-dir", str(data)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        assert process.stdout is not None and process.stdout.read(8) == b"bla bla "
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130 and b"Traceback" not in stderr
    assert talker.stopped.wait(20)


# ── with a running server ────────────────────────────────────────────────────────────────────────────────────────


def test_a_key_works_and_ends_at_once_in_the_running_server(box: Box) -> None:
    words = ["key", "create", "--account", "default", "--name", "cli", "--scope", "llm", "--json"]
    made = json.loads(box.command(*words).stdout)
    assert box.chat(key=made["key"]).status == 200
    box.command("key", "revoke", made["id"])
    assert box.chat(key=made["key"]).status == 401
    assert box.chat().status == 200


def test_accounts_and_listings_go_through_the_running_server(box: Box) -> None:
    box.command("account", "create", "through the socket", "--plan", "community")
    again = box.command("account", "create", "through the socket", "--plan", "community", check=False)
    assert again.returncode == 1 and again.stderr.startswith("appliance: ") and "already" in again.stderr
    assert "through the socket" in box.command("account", "list").stdout
    assert "tiny" in box.command("models", "list").stdout
    assert json.loads(box.command("status", "--json").stdout)["model"] == "tiny"
    assert json.loads(box.command("init", "--json").stdout) == {"created": False}


def test_chat_uses_the_running_server(box: Box) -> None:
    before = json.loads(box.command("status", "--json").stdout)
    assert box.command("chat", "Hello", "--max-tokens", "8").stdout.strip()
    after = json.loads(box.command("status", "--json").stdout)
    assert {k for k in before if before[k] != after[k]}, "the server's counters did not move"


def test_a_backup_of_a_running_server_is_good_and_leaves_nothing_behind(box: Box, tmp_path: Path) -> None:
    target = tmp_path / "running.backup"
    made = json.loads(box.command("backup", str(target), "--json").stdout)
    assert (made["path"], made["bytes"]) == (str(target), target.stat().st_size)
    assert target.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in box.data_dir.iterdir() if "backup" in p.name] == []
    again = box.command("backup", str(target), check=False)
    assert (again.returncode, "exists already" in again.stderr) == (10, True)
    nowhere = box.command("backup", str(tmp_path / "absent" / "x"), check=False)
    assert (nowhere.returncode, len(nowhere.stderr.splitlines())) == (10, 1)
    other = tmp_path / "other"
    shutil.copytree(box.data_dir / "secrets", other / "secrets")
    restored = json.loads(command("restore", str(target), "--json", data_dir=other).stdout)
    assert restored["tables"] == made["tables"]


def test_a_running_server_writes_backups_nowhere_but_into_its_data_directory(data: Path, tmp_path: Path) -> None:
    """A hardened service sees no other place, or another /tmp than the person who asks."""
    asked: list[Path] = []

    async def handle(operation: str, arguments: dict[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        asked.append(Path(arguments["file"]))
        asked[-1].write_bytes(b"proved" * 100_000)
        yield {"result": {"path": str(asked[-1]), "bytes": 600_000, "tables": {}}}

    with serving(data / "admin.sock", handle):
        made = listed(data, "backup", str(tmp_path / "target"))
    assert made["path"] == str(tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == b"proved" * 100_000
    assert asked[0].parent == data and not asked[0].exists()


def test_a_running_server_is_told_to_be_stopped_before_a_restore(box: Box, tmp_path: Path) -> None:
    done = box.command("restore", str(tmp_path / "x"), check=False)
    assert done.returncode == 5 and "stop it" in done.stderr


def test_a_second_server_is_refused(box: Box) -> None:
    done = box.command("serve", "--port", "0", check=False)
    assert done.returncode == 5 and str(box.process.pid) in done.stderr


def test_the_doctor_knows_the_running_server(box: Box) -> None:
    done = box.command("doctor", "--json", check=False)
    found = {f["name"]: f for f in json.loads(done.stdout)}
    assert "is running" in found["port"]["sentence"]
    assert done.returncode == int(any(f["state"] == "fail" for f in found.values()))
    shown = box.command("doctor", check=False).stdout
    assert re.search(r"^WARN +model +tiny is a placeholder", shown, re.M) and "Fix: " in shown


def test_commands_reach_a_server_whose_path_is_too_long_for_a_socket(template: Path, tmp_path: Path) -> None:
    data = shutil.copytree(template, tmp_path / ("d" * 60) / ("e" * 60))
    with Box.serve(Path(data)) as running:
        running.wait_ready()
        assert not (Path(data) / "admin.sock").exists()
        assert json.loads(running.command("status", "--json").stdout)["model"] == "tiny"
        assert len(json.loads(running.command("key", "list", "--json").stdout)) == 1


def test_models_are_swapped_in_the_running_server(template: Path, tmp_path: Path, tiny_f32_gguf: Path) -> None:
    data = Path(shutil.copytree(template, tmp_path / "data"))
    bad = tmp_path / "bad.gguf"
    words = ["key", "create", "--account", "default", "--name", "n", "--scope", "full", "--json"]
    key = json.loads(command(*words, data_dir=data).stdout)
    with Box.serve(data, key=key["key"]) as running:
        running.wait_ready()
        running.command("models", "add", str(tiny_f32_gguf), "--name", "second")
        running.command("models", "use", "second")
        assert running.ready()["model"] == "second"
        shutil.copy(tiny_f32_gguf, bad)
        running.command("models", "add", str(bad))
        bad.write_bytes(bad.read_bytes()[:-100])
        refused = running.command("models", "use", "bad", check=False)
        assert refused.returncode == 9 and "truncated" in refused.stderr
        assert running.ready()["model"] == "second"
        writer = Writer(tmp_path / "odd.gguf")  # whole, but of no architecture that llama.cpp knows
        writer.string("general.architecture", "nonsense")
        writer.write()
        running.command("models", "add", str(tmp_path / "odd.gguf"))
        with running.stream(max_tokens=300, ignore_eos=True) as s:
            received = s.recv(4_096)
            refused = running.command("models", "use", "odd", check=False)
            while b'"done":true' not in received:
                assert (more := s.recv(65_536)), "the connection ended first"
                received += more
        assert refused.returncode == 9 and "cannot load" in refused.stderr
        assert b'"done":true' in received, "what ran was drained first"
        assert running.ready()["model"] == "second", "the old model came back"
    chosen = json.loads(command("models", "list", "--json", data_dir=data).stdout)
    assert [m["name"] for m in chosen if m["chosen"]] == ["second"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give files away")
def test_what_root_makes_belongs_to_the_directorys_owner(data: Path, tmp_path: Path, tiny_gguf: Path) -> None:
    """A service under its own user has to read what an administrator made with sudo."""
    nobody = 65_534
    backup = tmp_path / "b"
    good(data, "backup", str(backup))
    for path in (data, *data.rglob("*")):
        os.chown(path, nobody, nobody)
    good(data, "restore", str(backup))
    good(data, "tls", "self-signed")
    good(data, "models", "add", str(tiny_gguf), "--copy", "--name", "copied")
    owners = {str(p.relative_to(data)): p.stat().st_uid for p in data.rglob("*")}
    assert {path for path, uid in owners.items() if uid != nobody} == set()
