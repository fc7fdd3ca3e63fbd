"""Settings: the table, the order of the sources, and one clear line for everything that is wrong."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance import config
from appliance.errors import ConfigError, DataDirError

README = config.CHECKOUT / "README.md"


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    found = tmp_path / "data"
    found.mkdir()
    return found


def written(data_dir: Path, text: str) -> config.Config:
    """The settings with `text` as the data directory's file."""
    (data_dir / "config.toml").write_text(text)
    return config.load(data_dir, environ={})


def refusal(data_dir: Path, text: str) -> str:
    """The one line that refuses `text`."""
    with pytest.raises(ConfigError) as refused:
        written(data_dir, text)
    assert refused.value.exit_code == 3
    assert "\n" not in refused.value.message
    assert refused.value.message.startswith(f"{data_dir / 'config.toml'}: ")
    return refused.value.message


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_checkouts_file_is_the_table() -> None:
    assert (config.CHECKOUT / "config.toml").read_text() == config.example()


def test_the_checkouts_file_without_its_marks_holds_the_defaults(data_dir: Path) -> None:
    lines = config.example().splitlines()
    unmarked = "\n".join(re.sub(r"^# (?=[a-z_]+ = )", "", line) for line in lines)
    tables = tomllib.loads(unmarked)
    plans = tables.pop("plans")
    assert sum(map(len, [*tables.values(), *plans.values()])) == len(config.settings())
    loaded = written(data_dir, unmarked)
    plain = config.Config(data_dir)
    assert (loaded.server, loaded.engine, loaded.store) == (plain.server, plain.engine, plain.store)
    assert (loaded.limits, loaded.retention, loaded.plans) == (plain.limits, plain.retention, plain.plans)


@pytest.mark.parametrize("setting", config.settings(), ids=lambda s: str(s.name))
def test_a_setting_has_a_meaning_and_a_default_in_its_own_range(setting: config.Setting) -> None:
    assert len(setting.help) > 8
    assert (setting.low is None) == (setting.high is None)
    kept = config.override(config.Config(Path("/d")), {setting.name: setting.default}, "test")
    assert dict((row[0], row[2]) for row in config.show(kept))[setting.name] == "test"


def test_every_number_has_a_range() -> None:
    unbounded = [s.name for s in config.settings() if s.type in (int, float, tuple[float, ...]) and s.low is None]
    assert unbounded == []


def test_the_readme_names_the_file_the_variables_and_the_command() -> None:
    text = README.read_text()
    for words in ("config.toml", "APPLIANCE_<SECTION>__<KEY>", "appliance config show", "APPLIANCE_DATA_DIR"):
        assert words in text


def test_settings_do_not_change_once_read(data_dir: Path) -> None:
    loaded = config.load(data_dir, environ={})
    with pytest.raises(FrozenInstanceError):
        loaded.server.port = 1  # type: ignore[misc]


# ── where values come from ───────────────────────────────────────────────────────────────────────────────────────


def test_the_file_named_wins_over_the_data_directorys(data_dir: Path, tmp_path: Path) -> None:
    (data_dir / "config.toml").write_text("[server]\nport = 1111\nhost = '::1'")
    named = tmp_path / "named.toml"
    named.write_text("[server]\nport = 2222")
    assert config.load(data_dir, environ={}).server.port == 1111
    loaded = config.load(data_dir, named, environ={})
    assert (loaded.server.port, loaded.server.host, loaded.file) == (2222, "127.0.0.1", named)


def test_without_other_files_the_checkouts_is_read(data_dir: Path) -> None:
    assert config.load(data_dir, environ={}).file == config.CHECKOUT / "config.toml"


def test_the_environment_wins_over_the_file_and_an_option_over_both(data_dir: Path) -> None:
    file = data_dir / "config.toml"
    file.write_text("[server]\nport = 1111\nhost = '::1'\n[engine]\nslots = 3")
    loaded = config.load(data_dir, environ={"APPLIANCE_SERVER__PORT": "2222", "APPLIANCE_ENGINE__SLOTS": "4"})
    loaded = config.override(loaded, {"server.port": 3333}, "option --port")
    assert (loaded.server.port, loaded.engine.slots, loaded.server.host) == (3333, 4, "::1")
    sources = {name: source for name, _, source in config.show(loaded)}
    assert sources["server.port"] == "option --port"
    assert sources["engine.slots"] == "environment APPLIANCE_ENGINE__SLOTS"
    assert sources["server.host"] == f"file {file}"
    assert sources["engine.batch"] == "default"


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        ("SERVER__PORT", "9000", 9000),
        ("SERVER__ALLOWED_HOSTS", "a.example, b.example", ("a.example", "b.example")),
        ("SERVER__ALLOWED_HOSTS", '["a.example"]', ("a.example",)),
        ("SERVER__ALLOWED_HOSTS", "", ()),
        ("SERVER__HOST", "0.0.0.0", "0.0.0.0"),
        ("SERVER__DRAIN_SECONDS", "5", 5.0),
        ("ENGINE__TENSOR_SPLIT", "3, 1", (3.0, 1.0)),
        ("ENGINE__TENSOR_SPLIT", "[3, 1.5]", (3.0, 1.5)),
        ("ENGINE__MLOCK", "true", True),
        ("ENGINE__MODEL", "7", "7"),
        ("ENGINE__MODEL", 'a"b', 'a"b'),
    ],
)
def test_the_environment_is_read_by_the_settings_type(data_dir: Path, variable: str, text: str, value: Any) -> None:
    loaded = config.load(data_dir, environ={f"APPLIANCE_{variable}": text})
    section, key = variable.lower().split("__")
    found = getattr(getattr(loaded, section), key)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("variable", "text", "says"),
    [
        ("APPLIANCE_SERVER__PORT", "ninety", "server.port must be a whole number from 0 to 65,535, not 'ninety'"),
        ("APPLIANCE_SERVER__PORT", "", "server.port must be"),
        ("APPLIANCE_SERVER__PORT", "5\nhost = 'x'", "server.port must be"),
        ("APPLIANCE_SERVER__PORT", "9" * 5000, "server.port must be"),
        ("APPLIANCE_ENGINE__MLOCK", "yes", "engine.mlock must be true or false"),
        ("APPLIANCE_ENGINE__TENSOR_SPLIT", "3,x", "engine.tensor_split must be a list of numbers"),
        ("APPLIANCE_SERVER__PROT", "1", "the nearest name is APPLIANCE_SERVER__PORT"),
        ("APPLIANCE_SREVER__PORT", "1", "the nearest name is APPLIANCE_SERVER__PORT"),
        ("APPLIANCE_SERVER__A__B", "1", "there is no such setting"),
    ],
)
def test_a_wrong_variable_is_named(data_dir: Path, variable: str, text: str, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config.load(data_dir, environ={variable: text})
    assert refused.value.message.startswith(f"environment {variable}: ")
    assert says in refused.value.message
    assert "\n" not in refused.value.message


def test_variables_that_are_no_settings_are_left_alone(data_dir: Path) -> None:
    others = {"APPLIANCE_DATA_DIR": "/x", "APPLIANCE_MASTER_KEY": "secret", "APPLIANCE_DEBUG": "1", "SERVER__PORT": "1"}
    loaded = config.load(data_dir, environ=others)
    assert (loaded.data_dir, loaded.server.port) == (data_dir, 8080)
    assert "secret" not in repr(loaded)


def test_relative_paths_are_relative_to_their_file(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "beside.gguf").touch()
    named = tmp_path / "named.toml"
    named.write_text(
        "[store]\nkey_file = 'keys/../master.key'\n[server]\ntls_cert = '/abs/c.pem'\ntls_key = '~/k.pem'\n"
        "[engine]\nmodel = 'beside.gguf'"
    )
    loaded = config.load(data_dir, named, environ={})
    assert loaded.key_file == tmp_path / "master.key"
    assert loaded.server.tls_cert == "/abs/c.pem"
    assert loaded.server.tls_key == os.path.expanduser("~/k.pem")
    assert loaded.engine.model == str(tmp_path / "beside.gguf")


@pytest.mark.parametrize(("model", "is_path"), [("llama-3.1", False), ("absent.gguf", False), ("models/x", True)])
def test_a_models_name_is_not_made_a_path(data_dir: Path, model: str, is_path: bool) -> None:
    loaded = written(data_dir, f"[engine]\nmodel = '{model}'")
    assert loaded.engine.model == (str(data_dir / model) if is_path else model)


def test_the_data_directory_is_the_option_then_the_variable_then_the_users(tmp_path: Path) -> None:
    assert config.load(tmp_path, environ={"APPLIANCE_DATA_DIR": "/x"}).data_dir == tmp_path
    assert config.default_data_dir({"APPLIANCE_DATA_DIR": "/x"}) == Path("/x")
    home = Path("/var/lib/appliance") if os.geteuid() == 0 else Path("/h/.local/share/appliance")
    assert config.default_data_dir({"HOME": "/h"}) == home
    assert config.default_data_dir({"HOME": "/h", "APPLIANCE_DATA_DIR": ""}) == home


def test_a_relative_data_directory_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert config.load("here", environ={}).data_dir == tmp_path / "here"


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[srever]\nport = 1", "no section [srever]; the nearest name is server"),
        ("port = 1", "no section [port]"),
        ("server = 1", "server is a section: write [server]"),
        ("[[server]]\nport = 1", "server is a section"),
        ("[server]\nprot = 1", "no setting server.prot; the nearest name is server.port"),
        ("[server]\nslots = 1", "no setting server.slots; the nearest name is engine.slots"),
        ('[server]\n"a\\nb" = 1', r"no setting server.a\nb; the nearest"),
        ("[server.port]\nx = 1", "server.port must be a whole number"),
        ("[server]\nport = '8080'", "server.port must be a whole number from 0 to 65,535, not '8080'"),
        ("[server]\nport = true", "server.port must be a whole number"),
        ("[server]\nport = 80.0", "server.port must be a whole number"),
        ("[server]\nport = 65536", "not 65536"),
        ("[server]\nport = -1", "not -1"),
        ("[server]\nhost = 5", "server.host must be a text, not 5"),
        ('[server]\nhost = "a\\u0000b"', "server.host must be a text"),
        ("[server]\ndrain_seconds = true", "server.drain_seconds must be a number"),
        ("[server]\ndrain_seconds = nan", "not nan"),
        ("[server]\ndrain_seconds = inf", "not inf"),
        ("[server]\nallowed_hosts = 'a'", "server.allowed_hosts must be a list of names"),
        ("[server]\nallowed_hosts = ['a', 1]", "server.allowed_hosts must be a list of names"),
        ("[server]\npublic_url = 'http://[::1'", "server.public_url must be an address such as"),
        ("[server]\npublic_url = 'llm.example.org'", "server.public_url must be an address such as"),
        ("[server]\nallowed_hosts = ['https://a.example/']", "server.allowed_hosts must be a list of names"),
        ("[server]\ntrusted_proxies = ['proxy']", "server.trusted_proxies must be a list of addresses or networks"),
        (
            "[server]\ntrusted_proxies = ['10.0.0.1/8']",
            "server.trusted_proxies must be a list of addresses or networks",
        ),
        ("[engine]\nmlock = 1", "engine.mlock must be true or false"),
        ("[engine]\nkv_type = 'f8'", "engine.kv_type must be one of f32, f16, bf16, q8_0"),
        ("[engine]\ntensor_split = [3, -1]", "engine.tensor_split must be a list of numbers from 0"),
        ("[engine]\ntensor_split = [nan]", "engine.tensor_split"),
        (f"[engine]\ntensor_split = [{'9' * 400}]", "engine.tensor_split"),
        ("[engine]\nslots = 1979-05-27", "engine.slots must be a whole number"),
        ("[server]\nport = ", "not valid TOML"),
        ("[server]\nport = 1\nport = 2\n\n", "line 3"),
        (f"[server]\nport = {'9' * 5000}", "too long or too deep"),
        (f"[server]\nallowed_hosts = {'[' * 5000}", "too deep"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(data_dir: Path, text: str, says: str) -> None:
    assert says in refusal(data_dir, text)


def test_a_long_value_is_shown_shortened(data_dir: Path) -> None:
    assert len(refusal(data_dir, f"[server]\nport = '{'x' * 10_000}'")) < 300 + len(str(data_dir))


def test_a_whole_number_is_taken_for_a_number(data_dir: Path) -> None:
    found = written(data_dir, "[server]\ndrain_seconds = 5\n[engine]\ntensor_split = [1, 2]")
    assert repr((found.server.drain_seconds, found.engine.tensor_split)) == "(5.0, (1.0, 2.0))"


def test_a_file_that_cannot_be_read_is_refused(data_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no settings file"):
        config.load(data_dir, tmp_path / "absent.toml", environ={})
    (data_dir / "config.toml").mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load(data_dir, environ={})
    (data_dir / "config.toml").rmdir()
    (data_dir / "config.toml").write_bytes(b"[server]\nhost = '\xff'")
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load(data_dir, environ={})


def test_an_empty_data_directory_is_no_default() -> None:
    with pytest.raises(ConfigError, match="--data-dir"):
        config.load("", environ={})


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_somebody_elses_data_directory_is_refused(tmp_path: Path) -> None:
    """Never read as if it were empty: the settings in it would be skipped without a word."""
    closed = Path("/tmp") / f"appliance-test-{os.getpid()}"
    closed.mkdir(mode=0o700)
    load = "import os; from appliance import config; os.setuid(65534); config.load(os.environ['CLOSED'])"
    environ = {**os.environ, "CLOSED": str(closed), "PYTHONPATH": str(config.CHECKOUT)}
    try:
        done = subprocess.run([sys.executable, "-c", load], env=environ, capture_output=True, text=True, timeout=60)
    finally:
        shutil.rmtree(closed)
    assert DataDirError.__name__ in done.stderr and "closed to this user" in done.stderr


@given(st.sampled_from(config.settings()), st.one_of(st.integers(), st.floats(), st.booleans(), st.text(), st.none()))
def test_any_value_is_kept_exactly_or_refused_in_one_line(setting: config.Setting, value: Any) -> None:
    try:
        kept = config.override(config.Config(Path("/d")), {setting.name: value}, "test")
    except ConfigError as error:
        assert "\n" not in error.message and setting.name in error.message
        return
    section, key = setting.name.rsplit(".", 1)
    of = kept.plans[section.removeprefix("plans.")] if section.startswith("plans.") else getattr(kept, section)
    found = getattr(of, key)
    assert found == value and isinstance(found, setting.type)


@given(st.text(max_size=20))
def test_what_show_prints_is_toml(text: str) -> None:
    try:
        kept = config.override(config.Config(Path("/d")), {"server.host": text}, "test")
    except ConfigError:
        return
    shown = dict((name, value) for name, value, _ in config.show(kept))["server.host"]
    assert "\n" not in shown
    assert tomllib.loads(f"v = {shown}")["v"] == text


# ── plans ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_section_changes_a_plan_or_adds_one(data_dir: Path) -> None:
    loaded = written(data_dir, "[plans.community]\nper_minute = 30\n[plans.lab]\nconcurrent = 4\nper_month = 0\n")
    assert list(loaded.plans) == ["community", "professional", "enterprise", "lab"]
    assert loaded.plans["community"] == config.PlanSettings(per_minute=30)
    assert loaded.plans["lab"] == config.PlanSettings(concurrent=4, per_month=0)
    assert loaded.plans["enterprise"] == config.PLANS["enterprise"]
    assert ("plans.lab.concurrent", "4", f"file {data_dir / 'config.toml'}") in config.show(loaded)


def test_the_environment_changes_a_plan_and_adds_one(data_dir: Path) -> None:
    variables = {"APPLIANCE_PLANS__COMMUNITY__PER_HOUR": "500", "APPLIANCE_PLANS__LAB__PER_MINUTE": "7"}
    loaded = config.load(data_dir, environ=variables)
    assert loaded.plans["community"].per_hour == 500 and loaded.plans["lab"].per_minute == 7


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[plans.community]\nper_minute = -1\n", "plans.community.per_minute must be a whole number from 1 to"),
        ("[plans.community]\nper_minute = 0\n", "plans.community.per_minute must be"),
        ("[plans.community]\nper_month = 1e30\n", "plans.community.per_month must be"),
        ("[plans.community]\nconcurrent = 2.5\n", "plans.community.concurrent must be"),
        ("[plans.community]\nweight = nan\n", "plans.community.weight must be"),
        ("[plans.community]\nper_second = 1\n", "there is no setting plans.community.per_second"),
        ('[plans."A b"]\nper_minute = 1\n', "there is no setting plans.A b.per_minute"),
        ("plans = 3\n", "plans are sections"),
        ("[plans]\ncommunity = 3\n", "plans.community is a section"),
        ("[limits]\nturn_seconds = -1\n", "limits.turn_seconds must be"),
        ("[retention]\ncall_days = 0\n", "retention.call_days must be"),
    ],
)
def test_a_limit_that_makes_no_sense_is_refused(data_dir: Path, text: str, told: str) -> None:
    assert told in refusal(data_dir, text)
