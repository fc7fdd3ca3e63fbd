"""Administering a running appliance, over real sockets and with the real commands: plans, keys, users, usage, logs."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.box import APPLIANCE, Box, command, environment, events, wait_until

FULL = "full"
LONG = 3_000  # tokens of an answer that is still running when the test is done with it
TOKEN = "a-token-of-the-monitoring-0123456789"


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    folder = tmp_path_factory.mktemp("operations")
    (folder / "metrics.token").write_text(TOKEN + "\n")
    (folder / "metrics.token").chmod(0o600)
    quick = {"APPLIANCE_SERVER__STREAM_HEADER_HOLD_SECONDS": "0.1"}
    proxy = {"APPLIANCE_SERVER__TRUSTED_PROXIES": "127.0.0.1"}  # so that tests may come from other addresses
    token = {"APPLIANCE_SERVER__METRICS_TOKEN_FILE": str(folder / "metrics.token")}
    with Box.start(folder / "data", **quick, **proxy, **token) as running:
        yield running


def made(box: Box, *words: str, **kwargs: Any) -> Any:
    return json.loads(box.command(*words, "--json", **kwargs).stdout)


def new_key(box: Box, account: str, *options: str, scope: str = FULL, plan: str = "professional") -> dict[str, Any]:
    """A key of a new account."""
    made(box, "account", "create", account, "--plan", plan)
    key: dict[str, Any] = made(box, "key", "create", "--account", account, "--name", "n", "--scope", scope, *options)
    return key


def refused(box: Box, *words: str, code: int = 1) -> str:
    done = box.command(*words, check=False)
    assert done.returncode == code, done.stderr
    return done.stderr


def room_in_the_minute(seconds: float) -> None:
    if (left := 60 - time.time() % 60) < seconds:
        time.sleep(left + 0.1)


# ── plans ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_another_plan_counts_from_the_next_call_on(box: Box) -> None:
    key = new_key(box, "grows", plan="community")["key"]
    assert box.chat("Hi", max_tokens=1, key=key).headers["x-ratelimit-limit"] == "20"
    assert made(box, "account", "set-plan", "grows", "professional")["plan"] == "professional"
    assert box.chat("Hi", max_tokens=1, key=key).headers["x-ratelimit-limit"] == "60"
    assert "the plans are" in refused(box, "account", "set-plan", "grows", "gold")
    assert "no account" in refused(box, "account", "set-plan", "nobody", "community")


def test_reload_takes_settings_as_a_whole_or_not_at_all(box: Box) -> None:
    key = new_key(box, "reloads", plan="community")["key"]
    settings = box.data_dir / "config.toml"
    settings.write_text("[plans.community]\nper_minute = 33\n[server]\nport = 1234\n[plans.lab]\nper_minute = 5\n")
    printed = made(box, "reload")
    assert "plans.community.per_minute = 33" in printed["changed"] and "plans.lab.per_minute = 5" in printed["changed"]
    assert printed["after_a_restart"] == [], "the port is an option's"
    assert box.chat("Hi", max_tokens=1, key=key).headers["x-ratelimit-limit"] == "33"
    made(box, "account", "create", "lab", "--plan", "lab")

    for wrong, told in (
        ("[plans.community]\nper_minute = 44\n[limits]\nturn_seconds = -3\n", "limits.turn_seconds"),
        ("[plans.community]\nper_minute = 44\n", "lab"),  # an account has it
        ("nonsense", "TOML"),
    ):
        settings.write_text(wrong)
        assert told in refused(box, "reload", code=3)
        assert box.chat("Hi", max_tokens=1, key=key).headers["x-ratelimit-limit"] == "33"

    settings.write_text("[plans.community]\nper_minute = 44\n[plans.lab]\nper_minute = 5\n[engine]\nslots = 3\n")
    box.process.send_signal(signal.SIGHUP)
    wait_until(lambda: box.chat("Hi", max_tokens=1, key=key).headers["x-ratelimit-limit"] == "44")
    assert "engine.slots = 3" in box.log.read_text()
    settings.unlink()
    made(box, "account", "set-plan", "lab", "community")
    made(box, "reload")


def test_a_plan_that_an_account_has_and_the_settings_do_not_name_ends_the_start(tmp_path: Path) -> None:
    lab = {"APPLIANCE_PLANS__LAB__PER_MINUTE": "5"}
    with Box.start(tmp_path, **lab) as box:
        made(box, "account", "create", "lab", "--plan", "lab")
    with Box.serve(tmp_path) as box:
        assert box.process.wait(20) == 3
        assert "plan lab" in box.log.read_text()


# ── keys ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_revoked_key_ends_its_running_stream_and_its_next_call(box: Box) -> None:
    key, other = new_key(box, "leaves"), new_key(box, "stays")
    streams = [_stream(box, k["key"]) for k in (key, other)]
    for s in streams:
        _read_until(s, b'"delta"')
    started = time.monotonic()
    made(box, "key", "revoke", key["id"])
    acknowledged = time.monotonic()
    assert box.chat("Hi", max_tokens=1, key=key["key"]).status == 401
    rest = _to_the_end(streams[0])
    ended = time.monotonic() - acknowledged
    assert events(rest[rest.index(b"data:") :])[-1]["code"] == "UNAUTHORIZED"
    assert ended <= 2 and started < acknowledged
    assert _read_until(streams[1], b'"delta"'), "the control: another key's stream goes on"
    for s in streams:
        s.close()


def test_a_disabled_account_ends_a_call_that_is_no_stream_too(box: Box) -> None:
    key = new_key(box, "pauses")
    body = json.dumps({"messages": [{"role": "user", "content": "Go on"}], "max_tokens": LONG}).encode()
    with socket.create_connection(("127.0.0.1", box.port), timeout=60) as s:
        head = f"POST /llm/chat HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key['key']}\r\n"
        s.sendall(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: made(box, "status")["calls_running"] > 0)
        made(box, "account", "disable", "pauses")
        assert b" 401 " in _read_until(s, b"\r\n")
    assert box.chat("Hi", max_tokens=1, key=key["key"]).status == 401
    made(box, "account", "enable", "pauses")
    assert box.chat("Hi", max_tokens=1, key=key["key"]).status == 200


def test_a_key_ends_by_itself(box: Box) -> None:
    tomorrow = (datetime.now(UTC) + timedelta(days=1)).strftime("%Y-%m-%d")
    key = new_key(box, "ends", "--expires", tomorrow)
    end = datetime.fromtimestamp(key["expires"], UTC)
    assert end - timedelta(days=1) == datetime.strptime(tomorrow, "%Y-%m-%d").replace(tzinfo=UTC), "the day's end"
    assert box.chat("Hi", max_tokens=1, key=key["key"]).status == 200
    for wrong in ("yesterday", "-3d", "2020-02-30"):
        words = ("key", "create", "--account", "ends", "--name", "n", "--scope", FULL, "--expires", wrong)
        assert "is no time" in refused(box, *words, code=2)
    past = ("key", "create", "--account", "ends", "--name", "n", "--scope", FULL, "--expires", "2020-01-01")
    assert "future" in refused(box, *past)
    far = (*past[:-1], "9999-12-31")
    assert "hundred years" in refused(box, *far) and box.command("key", "list").returncode == 0


def test_a_key_works_from_its_networks_alone(box: Box) -> None:
    key = new_key(box, "inside", "--network", "10.1.0.0/16", "--network", "2001:db8::/32")["key"]
    assert box.chat("Hi", max_tokens=1, key=key).status == 401
    for address, status in (("10.1.2.3", 200), ("2001:db8::1", 200), ("10.2.0.1", 401)):
        answer = box.chat("Hi", max_tokens=1, key=key, headers={"X-Forwarded-For": address})
        assert answer.status == status, address
    words = ("key", "create", "--account", "inside", "--name", "n", "--scope", FULL)
    assert "a network looks like" in refused(box, *words, "--network", "10.1.0.0/33")


def test_a_key_has_narrower_limits_and_its_successor_goes_on_with_them(box: Box) -> None:
    old = new_key(box, "narrow", "--per-month", "3")
    headers = [box.chat("Hi", max_tokens=1, key=old["key"]).headers for _ in range(2)]
    assert [h["x-ratelimit-remaining"] for h in headers] == ["2", "1"] and headers[0]["x-ratelimit-limit"] == "3"
    new = made(box, "key", "rotate", old["id"], "--overlap", "1d")
    assert new["replaces"] == old["id"] and abs(new["ends"] - time.time() - 86_400) < 60
    assert box.chat("Hi", max_tokens=1, key=new["key"]).status == 200, "the third"
    for key in (old, new):
        answer = box.chat("Hi", max_tokens=1, key=key["key"])
        assert (answer.status, answer.json["code"]) == (429, "MONTHLY_LIMIT_EXCEEDED")
        assert answer.headers["x-should-retry"] == "false"
    again = made(box, "key", "rotate", new["id"], "--overlap", "0")
    assert box.chat("Hi", max_tokens=1, key=new["key"]).status == 401
    assert box.chat("Hi", max_tokens=1, key=again["key"]).status == 429
    assert "rotated already" in refused(box, "key", "rotate", old["id"])


def test_tokens_per_day_hold_and_outlive_a_restart(tmp_path: Path) -> None:
    with Box.start(tmp_path) as box:
        key = new_key(box, "counted", "--tokens-per-day", "60")
        first = box.chat("Hi", max_tokens=40, key=key["key"], ignore_eos=True)
        usage = first.json["usage"]
        assert first.status == 200 and usage["completion_tokens"] == 40
        second = box.chat("Hi", max_tokens=40, key=key["key"], ignore_eos=True)
        assert second.status == 200, "it began below its limit"
        refusal = box.chat("Hi", max_tokens=1, key=key["key"])
        assert refusal.status == 429 and "tokens per day" in refusal.json["error"]
        shown = [refusal.headers[f"x-ratelimit-{name}"] for name in ("window", "limit", "remaining")]
        assert shown == ["day", "60", "0"]
        assert 1 <= refusal.json["retry_after"] <= 86_400
    with Box.serve(tmp_path) as box:
        box.wait_ready()
        assert box.chat("Hi", max_tokens=1, key=key["key"]).status == 429
        other = new_key(box, "another")
        assert box.chat("Hi", max_tokens=1, key=other["key"]).status == 200, "the control"


def test_what_an_aborted_stream_took_is_counted(box: Box) -> None:
    key = new_key(box, "aborts")["key"]
    s = _stream(box, key)
    _read_until(s, b'"delta"')
    time.sleep(0.2)
    s.close()
    wait_until(lambda: _usage(box, key)["month"]["completion_tokens"] > 0)
    assert 0 < _usage(box, key)["month"]["completion_tokens"] < LONG


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_whatever_is_wrong_with_a_key_is_told_in_the_same_words(box: Box) -> None:
    made_key = new_key(box, "probed")
    key = made_key["key"]
    digest = hashlib.sha256(key.encode()).hexdigest()
    good = f"Authorization: Bearer {key}"
    heads = {
        "none": "",
        "sql": "Authorization: Bearer ' or 1=1 --",
        "unicode": "Authorization: Bearer oai_\u00fc\u00fc",
        "hash": f"Authorization: Bearer {digest}",
        "shorter": f"Authorization: Bearer {key[:-1]}",
        "other scheme": f"Authorization: Basic {key}",
        "no scheme": f"Authorization: {key}",
        "twice": f"{good}\r\n{good}",
        "another too": f"{good}\r\nAuthorization: Bearer oai_{'x' * 32}",
        "cookie": f"Cookie: api_key={key}",
        "own header": f"X-Api-Key: {key}",
        "id": f"Authorization: Bearer {made_key['id']}",
    }
    told = {}
    for n, (name, head) in enumerate(heads.items()):
        answer = _raw(box, "GET", "/api/usage", f"{head}\r\n" if head else "", f"198.51.100.{n}")
        body = json.loads(answer.partition(b"\r\n\r\n")[2])
        told[name] = (answer[9:12], body["error"], body["code"])
    assert set(told.values()) == {(b"401", "Missing or invalid API key", "UNAUTHORIZED")}, told
    assert _raw(box, "GET", f"/api/usage?api_key={key}", "", "198.51.100.90")[9:12] == b"401"
    assert _raw(box, "GET", "/api/usage", f"{good}\r\n", "198.51.100.91")[9:12] == b"200", "the control"
    for head, status in (("Authorization: Bearer oai_\0", b"400"), (f"Authorization: Bearer {'x' * 10**6}", b"431")):
        assert _raw(box, "GET", "/api/usage", f"{head}\r\n", "198.51.100.92")[9:12] == status


@pytest.mark.parametrize(
    "path",
    ["//api/usage", "/api%2fusage", "/api/usage;x", "/api/usage/", "/api/./usage", "/API/usage", "/api/usage%00"],
)
def test_a_path_is_its_only_spelling(box: Box, path: str) -> None:
    key = new_key(box, f"spells {path.encode().hex()}")["key"]
    answer = _raw(box, "GET", path, f"Authorization: Bearer {key}\r\n", "198.51.100.93")
    assert answer[9:12] in (b"404", b"400"), answer


def test_a_method_is_what_the_request_line_says(box: Box) -> None:
    key = new_key(box, "overrides")["key"]
    for name in ("X-HTTP-Method-Override", "X-Method-Override", "X-HTTP-Method"):
        answer = box.get("/llm/chat", key=key, headers={name: "POST"})
        assert answer.status == 405 and answer.headers["allow"] == "POST"


def test_unknown_scopes_and_plans_are_refused(box: Box) -> None:
    words = ("key", "create", "--account", "default", "--name", "n", "--scope")
    assert "admin" in refused(box, *words, "admin", code=2)
    assert "the plans are" in refused(box, "account", "create", "x", "--plan", "' or 1=1")
    for option in ("--per-minute", "--concurrent", "--tokens-per-day"):
        refused(box, *words, "llm", option, "-1", code=2)


def _raw(box: Box, method: str, path: str, head: str, ip: str) -> bytes:
    with socket.create_connection(("127.0.0.1", box.port), timeout=20) as s:
        request = (
            f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nX-Forwarded-For: {ip}\r\n{head}Connection: close\r\n\r\n"
        )
        with contextlib.suppress(ConnectionError):
            s.sendall(request.encode("latin-1"))
        got = b""
        with contextlib.suppress(ConnectionError):
            while piece := s.recv(65_536):
                got += piece
    return got


# ── usage ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_usage_is_ones_own_and_counts_as_a_call(box: Box) -> None:
    key, other = new_key(box, "counts"), new_key(box, "counts too")
    room_in_the_minute(10)
    took = [box.chat("Hi", max_tokens=5, key=key["key"]).json["usage"] for _ in range(3)]
    found = _usage(box, key["key"])
    assert (found["account"], found["plan"]) == ("counts", "professional")
    assert found["windows"]["minute"]["limit"] == 60 and found["windows"]["minute"]["used"] == 4
    assert found["windows"]["month"]["remaining"] == 10_000 - 4
    assert found["month"]["calls"] == 4 and found["month"]["engine_seconds"] > 0
    for name in ("prompt_tokens", "completion_tokens", "cached_tokens"):
        assert found["month"][name] == sum(usage[name] for usage in took)
    [day] = found["days"]
    assert day["day"] == datetime.now(UTC).strftime("%Y-%m-%d") and day["calls"] == 4
    assert found["forecast"]["sentence"]
    assert _usage(box, other["key"])["month"]["calls"] == 1
    for scope, status in (("read", 200), ("llm", 403), ("workflow", 403)):
        words = ("key", "create", "--account", "counts", "--name", scope, "--scope", scope)
        assert box.get("/api/usage", key=made(box, *words)["key"]).status == status
    assert box.get("/api/v1/usage", key=key["key"]).status == 200
    assert box.get("/api/usage", key=None).status == 401


def test_the_command_shows_the_same_usage_of_all(box: Box) -> None:
    key = new_key(box, "tables")
    took = [box.chat("Hi", max_tokens=5, key=key["key"]).json["usage"] for _ in range(2)]
    wait_until(lambda: len([r for r in made(box, "usage", "--account", "tables") if r["provider"]]) == 1)
    rows = made(box, "usage", "--account", "tables")
    assert sum(r["calls"] for r in rows) == 2 and {r["key_id"] for r in rows} == {key["id"]}
    assert sum(r["completion_tokens"] for r in rows) == sum(u["completion_tokens"] for u in took)
    table = list(csv.DictReader(io.StringIO(box.command("usage", "--csv").stdout)))
    assert sum(int(r["calls"]) for r in table if r["account"] == "tables") == 2
    assert len({r["account"] for r in table}) > 1
    assert "tables: At this pace" in box.command("usage", "--account", "tables").stderr
    assert made(box, "usage", "--month", "2020-01") == []
    assert "is no month" in refused(box, "usage", "--month", "2020-13", code=2)


# ── logs and metrics ─────────────────────────────────────────────────────────────────────────────────────────────


def test_the_log_of_calls_says_who_called_what_and_no_more(box: Box) -> None:
    key = new_key(box, "logged")
    secret = "what nobody may read"
    said = box.request(
        "POST", f"/llm/chat?secret={secret.replace(' ', '-')}", key=key["key"],
        body={"messages": [{"role": "user", "content": secret}], "max_tokens": 1}, headers={"X-Request-Id": "mine-1"},
    )  # fmt: skip
    assert said.status == 200 and box.get("/nowhere", key=key["key"]).status == 404
    wait_until(lambda: len(made_lines(box, "--account", "logged")) == 2)
    rows = made_lines(box, "--account", "logged")
    assert [(r["endpoint"], r["status"], r["key_id"]) for r in rows] == [
        ("/llm/chat", 200, key["id"]),
        ("-", 404, key["id"]),
    ]
    assert rows[0]["request_id"] == "mine-1" and rows[0]["ip"] == "127.0.0.1" and rows[0]["ms"] > 0
    assert "secret" not in json.dumps(rows) and "nobody" not in json.dumps(rows)
    assert len(made_lines(box, "-n", "1")) == 1
    shown = box.command("logs", "--account", "logged").stdout
    assert "/llm/chat" in shown and key["id"] in shown
    listed = made(box, "key", "list")
    assert next(k for k in listed if k["id"] == key["id"])["last_used"] >= time.time() - 30


def test_following_the_log_shows_calls_as_they_come(box: Box) -> None:
    key = new_key(box, "followed")
    words = [*APPLIANCE, "logs", "--follow", "-n", "0", "--account", "followed", "--data-dir", str(box.data_dir)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment()) as follower:
        assert follower.stdout
        time.sleep(1)
        for _ in range(2):
            box.chat("Hi", max_tokens=1, key=key["key"])
            assert "/llm/chat" in follower.stdout.readline()
        follower.send_signal(signal.SIGINT)
        assert follower.wait(10) == 130


def made_lines(box: Box, *words: str) -> list[Any]:
    return [json.loads(line) for line in box.command("logs", "--json", *words).stdout.splitlines()]


def test_metrics_are_for_this_machine_and_for_whoever_has_the_token(box: Box) -> None:
    key = new_key(box, "measured", plan="community")["key"]
    room_in_the_minute(10)
    answers = [box.chat("Hi", max_tokens=1, key=key).status for _ in range(21)]
    assert answers.count(429) == 1
    shown = box.get("/metrics", key=None)
    assert shown.status == 200 and shown.headers["content-type"].startswith("text/plain; version=0.0.4")
    values = dict(line.rsplit(" ", 1) for line in shown.body.decode().splitlines() if not line.startswith("#"))
    assert float(values['appliance_calls_total{endpoint="/llm/chat",status="429"}']) >= 1
    assert float(values['appliance_refusals_total{reason="minute"}']) >= 1
    assert float(values['appliance_completions_total{provider="local"}']) >= 20
    for name in ("leases", "engine_running", "engine_generated_tokens_total", "store_commits_total", "store_wal_bytes"):
        assert float(values[f"appliance_{name}"]) >= 0
    elsewhere = {"X-Forwarded-For": "192.0.2.7"}
    assert box.get("/metrics", key=None, headers=elsewhere).status == 404
    assert box.get("/metrics", key=TOKEN[:-1] + "x", headers=elsewhere).status == 404
    assert box.get("/metrics", key=None, headers={"Via": "1.1 gateway"}).status == 404
    assert [box.get("/metrics", key=TOKEN, headers=elsewhere).status for _ in range(30)] == [200] * 30, "no guess"


@pytest.mark.parametrize("content", ["", "short", "two words that are long", "ümlaut-in-a-long-token", TOKEN])
def test_a_token_that_is_no_secret_ends_the_start(tmp_path: Path, content: str) -> None:
    file = tmp_path / "token"
    file.write_text(content)
    file.chmod(0o644 if content == TOKEN else 0o600)
    command("init", data_dir=tmp_path / "data")
    with Box.serve(tmp_path / "data", APPLIANCE_SERVER__METRICS_TOKEN_FILE=str(file)) as box:
        assert box.process.wait(20) == 3
        assert "metrics_token_file" in box.log.read_text()


# ── accounts, users, audit ───────────────────────────────────────────────────────────────────────────────────────


def test_users_are_made_changed_and_disabled_with_their_keys(box: Box) -> None:
    made(box, "account", "create", "people", "--plan", "community")
    anna = made(box, "user", "create", "anna", "--account", "people", stdin="a long password\n")
    assert (anna["role"], anna["disabled"]) == ("member", None) and "password" not in json.dumps(anna)
    assert made(box, "user", "create", "root2", "--administrator", stdin="a long password\n")["role"] == "administrator"
    assert "already" in refused_in(box, "a long password\n", "user", "create", "anna", "--account", "people")
    assert "10 to 1,000" in refused_in(box, "short\n", "user", "create", "ben", "--account", "people")
    assert "member of an account" in refused_in(box, "a long password\n", "user", "create", "ben", code=2)
    made(box, "user", "passwd", "anna", stdin="another password\n")
    assert made(box, "user", "disable", "anna")["disabled"] is not None
    assert {u["name"]: u["disabled"] is not None for u in made(box, "user", "list")}["anna"] is True


def refused_in(box: Box, stdin: str, *words: str, code: int = 1) -> str:
    done = box.command(*words, stdin=stdin, check=False)
    assert done.returncode == code, done.stderr
    return done.stderr


def test_an_account_is_exported_and_deleted_and_leaves_numbers(box: Box, tmp_path: Path) -> None:
    key = new_key(box, "goes")
    made(box, "user", "create", "gone user", "--account", "goes", stdin="a long password\n")
    assert box.chat("Hi", max_tokens=3, key=key["key"]).status == 200
    wait_until(lambda: len(made_lines(box, "--account", "goes")) == 1)
    file = tmp_path / "goes.json"
    box.command("account", "export", "goes", str(file))
    found = json.loads(file.read_text())
    assert found["account"]["name"] == "goes" and [u["name"] for u in found["users"]] == ["gone user"]
    assert found["keys"][0]["id"] == key["id"] and len(found["calls"]) == 1 and found["usage"]
    assert key["key"] not in file.read_text() and "hash" not in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    assert "overwrites nothing" in refused(box, "account", "export", "goes", str(file), code=2)

    assert box.command("account", "delete", "goes", check=False, stdin="n\n").returncode == 130
    assert box.chat("Hi", max_tokens=1, key=key["key"]).status == 200, "it was not confirmed"
    made(box, "account", "delete", "goes", "--yes")
    assert box.chat("Hi", max_tokens=1, key=key["key"]).status == 401
    assert "goes" not in [a["name"] for a in made(box, "account", "list")]
    assert "gone user" not in box.command("user", "list").stdout and key["id"] not in box.command("key", "list").stdout
    assert found["account"]["id"] in [r["account"] for r in made(box, "usage")]
    assert "no account" in refused(box, "usage", "--account", "goes")
    made(box, "account", "create", "goes", "--plan", "community")  # the name is free


def test_deleting_the_first_account_leaves_its_administrator_and_init_makes_no_other(tmp_path: Path) -> None:
    command("init", data_dir=tmp_path)
    command("account", "create", "other", "--plan", "community", data_dir=tmp_path)
    command("account", "delete", "default", "--yes", data_dir=tmp_path)
    users = json.loads(command("user", "list", "--json", data_dir=tmp_path).stdout)
    assert [(u["name"], u["account_id"]) for u in users] == [("admin", None)]
    assert json.loads(command("init", "--json", data_dir=tmp_path).stdout)["created"] is False
    assert json.loads(command("key", "list", "--json", data_dir=tmp_path).stdout) == []


def test_every_act_is_in_the_audit_log_and_the_chain_holds(box: Box) -> None:
    key = new_key(box, "audited")
    made(box, "key", "revoke", key["id"])
    rows = made(box, "audit", "list")
    assert [r["what"] for r in rows][-3:] == ["account.create", "key.create", "key.revoke"]
    assert {"settings.reload", "account.export", "account.delete", "user.create"} <= {r["what"] for r in rows}
    assert key["key"] not in json.dumps(rows)
    found = made(box, "audit", "verify")
    assert found["rows"] == len(rows) and found["broken"] is None


def _usage(box: Box, key: str) -> Any:
    return box.get("/api/usage", key=key).json


def _stream(box: Box, key: str) -> socket.socket:
    return Box(box.data_dir, box.port, key, box.process, box.log).stream("Go on", max_tokens=LONG)


def _read_until(s: socket.socket, mark: bytes) -> bytes:
    got = b""
    while mark not in got:
        piece = s.recv(65_536)
        assert piece, f"it ended: {got[-300:]!r}"
        got += piece
    return got


def _to_the_end(s: socket.socket) -> bytes:
    got = b""
    while b"0\r\n\r\n" not in got and (piece := s.recv(65_536)):
        got += piece
    return got
