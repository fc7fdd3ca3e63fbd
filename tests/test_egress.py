"""Prompts leave the box where an administrator allows it, and never else: one appliance in front of another.

The other one stands for Groq and for a named server; what reaches it is counted there.
"""

from __future__ import annotations

import json
import re
import socketserver
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.box import Box, events, wait_until

PLANS = ("COMMUNITY", "PROFESSIONAL", "ENTERPRISE")
CHAT = "/v1/chat/completions"


@dataclass
class Pair:
    """`front` asks `other`, as Groq and as `second`."""

    front: Box
    other: Box
    strict: str = ""  # a key of the front's whose prompts never leave

    def reached(self) -> int:
        """Completions that the other one was asked for."""
        metrics = self.other.get("/metrics", key=None).body.decode()
        found = re.findall(rf'appliance_calls_total{{endpoint="(?:/openai)?{CHAT}",status="\d+"}} (\d+)', metrics)
        return sum(map(int, found))

    def allow(self, prompts: str) -> None:
        account = json.loads(self.front.command("account", "list", "--json").stdout)[0]["name"]
        self.front.command("account", "set-egress", account, "--prompts", prompts)

    def key(self, *options: str) -> str:
        account = json.loads(self.front.command("account", "list", "--json").stdout)[0]["name"]
        words = ("key", "create", "--account", account, "--name", "k", "--scope", "llm", "--json", *options)
        made: str = json.loads(self.front.command(*words).stdout)["key"]
        return made

    def rows(self, *options: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.front.command("egress", "--json", *options).stdout)
        return found


class Breaking(socketserver.StreamRequestHandler):
    """A server that says one word and is gone."""

    def handle(self) -> None:
        while self.rfile.readline().strip():
            pass
        word = json.dumps({"choices": [{"index": 0, "delta": {"content": "never whole"}}]}).encode()
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: " + word + b"\n\n")


@pytest.fixture(scope="module")
def breaking() -> Iterator[int]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Breaking) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, breaking: int) -> Iterator[Pair]:
    with Box.start(tmp_path_factory.mktemp("other")) as other:
        key_file = tmp_path_factory.mktemp("keys") / "second"
        key_file.touch(0o600)
        key_file.write_text(f"{other.key}\n")
        settings = {
            "GROQ_API_KEY": other.key,
            "APPLIANCE_GROQ__BASE_URL": f"http://127.0.0.1:{other.port}/openai/v1",
            "APPLIANCE_GROQ__MODEL": "tiny",
            "APPLIANCE_PROVIDERS__SECOND__BASE_URL": f"http://127.0.0.1:{other.port}/v1",
            "APPLIANCE_PROVIDERS__SECOND__MODEL": "tiny",
            "APPLIANCE_PROVIDERS__SECOND__KEY_FILE": str(key_file),
            "APPLIANCE_PROVIDERS__BREAKING__BASE_URL": f"http://127.0.0.1:{breaking}/v1",
            "APPLIANCE_PROVIDERS__BREAKING__MODEL": "m",
            "APPLIANCE_ENGINE__SLOTS": "1",
        } | {f"APPLIANCE_PLANS__{plan}__FALLBACK_WAIT_SECONDS": "0" for plan in PLANS}
        with Box.start(tmp_path_factory.mktemp("front"), **settings) as front:
            made = Pair(front, other)
            made.strict = made.key("--prompts", "never")
            yield made


@pytest.fixture(autouse=True)
def nothing_allowed(pair: Pair) -> None:
    pair.allow("never")


@pytest.fixture
def busy(pair: Pair) -> Iterator[None]:
    """Prompts may overflow; and the front's only slot is taken, by a call whose length is known from one before it."""
    pair.allow("if-saturated")
    pair.front.chat(max_tokens=30, provider="local")
    with pair.front.stream(max_tokens=8_000, ignore_eos=True, provider="local") as stream:
        assert stream.recv(100)
        wait_until(lambda: bool(pair.front.ready()["running"] == 1))
        yield
        assert pair.front.ready()["running"] == 1, "it was busy all the time"
    wait_until(lambda: bool(pair.front.ready()["running"] == 0))


@pytest.mark.parametrize("name", ["groq", "second"])
def test_a_named_server_answers_where_that_is_allowed_and_it_is_written_down(pair: Pair, name: str) -> None:
    pair.allow("allowed")
    before, known = pair.reached(), len(pair.rows())
    answer = pair.front.chat("My secret", provider=name, temperature=0)
    assert (answer.json["provider"], answer.json["model"]) == (name, "tiny")
    assert answer.headers["x-served-by"] == f"{name}/tiny" and "x-fallback-reason" not in answer.headers
    assert answer.json["text"] == pair.other.chat("My secret", temperature=0).json["text"]
    assert pair.reached() == before + 1
    wait_until(lambda: len(pair.rows()) == known + 1)
    row = pair.rows()[-1]
    assert row["destination"] == f"{name} 127.0.0.1:{pair.other.port}" and row["reason"] == "asked"
    assert row["request_id"] == answer.headers["x-request-id"]
    assert row["bytes_out"] > 50 and row["bytes_in"] > 500 and "secret" not in json.dumps(row)
    assert "My secret" not in pair.front.log.read_text()
    own = pair.front.get("/api/egress").json
    assert own["prompts"] == "allowed" and own["rows"][-1]["bytes_out"] == row["bytes_out"]
    usage = pair.front.get("/api/usage").json["month"]
    assert usage["prompt_tokens"] > 0


def test_a_stream_from_elsewhere_is_passed_on(pair: Pair) -> None:
    pair.allow("allowed")
    answer = pair.front.chat(provider="second", stream=True, temperature=0, max_tokens=2_000)
    *deltas, done = events(answer.body)
    assert len(deltas) > 3 and "".join(d["delta"] for d in deltas) == done["text"]
    assert (done["provider"], done["usage"]["completion_tokens"]) == ("second", 2_000)
    assert answer.headers["x-served-by"] == "second/tiny"


def test_openais_route_passes_on_too(pair: Pair) -> None:
    pair.allow("allowed")
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5, "provider": "groq"}
    answer = pair.front.request("POST", CHAT, body)
    assert answer.json["provider"] == "groq" and answer.headers["x-served-by"] == "groq/tiny"


def test_what_breaks_off_is_answered_here_unless_something_of_it_was_said(pair: Pair) -> None:
    pair.allow("allowed")
    whole = pair.front.chat(provider="breaking")
    assert whole.json["provider"] == "local" and whole.headers["x-fallback-reason"] == "unavailable"
    assert "never whole" not in whole.json["text"] and whole.json["usage"]["completion_tokens"] == 8
    refused = pair.front.chat(provider="breaking", fallback=False)
    assert refused.status == 503 and "breaking" in refused.json["error"]
    *words, error = events(pair.front.chat(provider="breaking", stream=True).body)
    assert words == [{"delta": "never whole"}] and error["code"] == "SERVICE_UNAVAILABLE"


def test_a_model_elsewhere_has_its_own_names(pair: Pair) -> None:
    pair.allow("allowed")
    for path, extra in ((CHAT, {}), ("/v1/responses", {"input": "Hello"}), ("/v1/messages", {"max_tokens": 5})):
        body = {"model": "llama3-70b-8192", "messages": [{"role": "user", "content": "Hello"}], "provider": "second"}
        answer = pair.front.request("POST", path, body | extra)
        assert answer.status == 200 and answer.headers["x-served-by"] == "second/tiny", path
        here = pair.front.request("POST", path, body | extra | {"provider": "local"})
        assert here.status == 404, path


def test_nothing_leaves_where_it_is_not_allowed_even_from_a_busy_box(pair: Pair, busy: None) -> None:
    before = pair.reached()
    overflown = pair.front.chat()
    assert overflown.json["provider"] == "groq" and overflown.headers["x-fallback-reason"] == "saturated"
    assert pair.reached() == before + 1, "the control: what may leave does"
    for name in ("groq", "second"):
        refused = pair.front.chat(provider=name, fallback=False, key=pair.strict)
        assert refused.status == 403 and "set-egress" in refused.json["error"]
    waiting = [pair.front.stream(max_tokens=5, provider="local")]
    for name in ("auto", "groq", "second"):
        with pytest.raises(TimeoutError):  # it waits its turn here
            pair.front.chat(provider=name, key=pair.strict, timeout=0.3)
    assert pair.reached() == before + 1
    for one in waiting:
        one.close()


def test_a_box_that_has_time_keeps_what_may_only_overflow(pair: Pair) -> None:
    pair.allow("if-saturated")
    before = pair.reached()
    answer = pair.front.chat(provider="groq")
    assert answer.json["provider"] == "local" and answer.headers["x-fallback-reason"] == "policy"
    assert pair.front.chat().json["provider"] == "local" and pair.reached() == before


def test_a_key_may_be_narrower_than_its_account_and_never_wider(pair: Pair) -> None:
    wide = pair.key("--prompts", "allowed")
    pair.allow("allowed")
    assert pair.front.chat(provider="second", key=pair.strict).json["provider"] == "local"
    assert pair.front.chat(provider="second", key=wide).json["provider"] == "second"
    pair.allow("never")
    assert pair.front.chat(provider="second", key=wide).json["provider"] == "local"


def test_the_metrics_know_the_servers_elsewhere(pair: Pair) -> None:
    metrics = pair.front.get("/metrics", key=None).body.decode()
    assert 'appliance_provider_available{provider="groq"} 1.0' in metrics
    assert 'appliance_provider_available{provider="second"} 1.0' in metrics
    pair.allow("allowed")
    pair.front.chat(provider="second")
    assert 'appliance_completions_total{provider="second"}' in pair.front.get("/metrics", key=None).body.decode()


def test_the_ledger_can_be_asked_by_day_and_account(pair: Pair) -> None:
    pair.allow("allowed")
    pair.front.chat(provider="second")
    wait_until(lambda: len(pair.rows()) > 0)
    assert pair.rows("--since", "2020-01-01") == pair.rows()
    assert pair.rows("--since", "2999-01-01") == []
    pair.front.command("account", "create", "quiet", "--plan", "community")
    assert pair.rows("--account", "quiet") == []
    table = pair.front.command("egress").stdout
    assert f"second 127.0.0.1:{pair.other.port}" in table and re.search(r"20\d\d-\d\d-\d\d", table)
    assert pair.front.get("/api/egress?since=2999-01-01").json["rows"] == []
    for wrong in ("yesterday", "2026-13-01", "2026-1-1", "%D9%A1234-01-01"):
        assert pair.front.get(f"/api/egress?since={wrong}").status == 400


def test_unknown_providers_and_policies_are_refused(pair: Pair) -> None:
    answer = pair.front.chat(provider="openai")
    assert answer.status == 400 and "auto, local, groq, breaking, second" in answer.json["error"]
    account = json.loads(pair.front.command("account", "list", "--json").stdout)[0]["name"]
    failed = pair.front.command("account", "set-egress", account, "--prompts", "sometimes", check=False)
    assert failed.returncode == 2 and "if-saturated" in failed.stderr


def test_what_is_allowed_is_in_the_audit_log(pair: Pair) -> None:
    pair.allow("if-saturated")
    last = json.loads(pair.front.command("audit", "list", "--json").stdout)[-1]
    assert last["what"] == "account.set-egress" and "if-saturated" in json.dumps(last)


def test_without_a_key_groq_is_not_configured(box: Box) -> None:
    assert box.chat(provider="groq").headers["x-fallback-reason"] == "not-configured"
    refused = box.chat(provider="groq", fallback=False)
    assert refused.status == 503 and "not configured" in refused.json["error"]


def test_a_key_that_others_can_read_stops_the_start(tmp_path: Path) -> None:
    key_file = tmp_path / "key"
    key_file.write_text("gsk_secret")
    key_file.chmod(0o644)
    with Box.start(tmp_path / "box") as running:
        running.command("status")
    with Box.serve(tmp_path / "box", APPLIANCE_GROQ__KEY_FILE=str(key_file)) as refused:
        assert refused.process.wait(30) == 3
        log = refused.log.read_text()
        assert "groq.key_file" in log and "gsk_secret" not in log
    with Box.serve(tmp_path / "box", APPLIANCE_PROVIDERS__X__MODEL="m") as refused:
        assert refused.process.wait(30) == 3 and "providers.x.base_url must be set" in refused.log.read_text()
