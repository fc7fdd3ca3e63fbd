"""`POST /llm/chat` over real sockets against a real process with the placeholder model: answers, streams, refusals."""

from __future__ import annotations

import gzip
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.box import Box, command, environment, events, free_port, wait_until

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize("path", ["/llm/chat", "/api/llm/chat", "/api/v1/llm/chat"])
def test_the_seeds_call_is_answered(box: Box, path: str) -> None:
    answer = box.chat("Hello", path=path, provider="groq")
    reply = answer.json
    assert answer.status == 200 and reply["text"]
    assert (reply["provider"], reply["finish_reason"]) == ("local", "length")
    usage = reply["usage"]
    assert usage["completion_tokens"] == 8
    assert usage["total_tokens"] == usage["prompt_tokens"] + 8
    assert answer.headers["x-request-id"] == reply["request_id"]
    assert answer.headers["content-type"].startswith("application/json")


def test_a_stream_says_the_same_as_the_whole_answer(box: Box) -> None:
    whole = box.chat(temperature=0, max_tokens=40).json
    answer = box.chat(temperature=0, max_tokens=40, stream=True)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    *deltas, done = events(answer.body)
    assert len(deltas) > 3
    assert "".join(d["delta"] for d in deltas) == whole["text"] == done["text"]
    assert done["done"] is True and done["finish_reason"] == "length" and done["model"] == whole["model"]
    assert done["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]


def test_a_schema_is_kept(box: Box) -> None:
    schema = {
        "type": "object",
        "properties": {"yes": {"type": "boolean"}},
        "required": ["yes"],
        "additionalProperties": False,
    }
    reply = box.chat(response_format={"type": "json_schema", "json_schema": {"schema": schema}}, max_tokens=100).json
    assert isinstance(json.loads(reply["text"])["yes"], bool)


def test_a_second_turn_finds_the_first_one_computed(box: Box) -> None:
    first = [{"role": "user", "content": "Tell me about the river. " * 10}]
    reply = box.chat(messages=first, max_tokens=20).json
    second = [*first, {"role": "assistant", "content": reply["text"]}, {"role": "user", "content": "And then?"}]
    again = box.chat(messages=second, max_tokens=5).json
    assert again["usage"]["cached_tokens"] > reply["usage"]["prompt_tokens"] / 2


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"messages": ...}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user"}]}, "content"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}, "content"),
        ({"messages": [{"role": "user", "content": 5}]}, "content"),
        ({"messages": HELLO, "max_token": 5}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 10**9}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"seed": 1.5}, "seed"),
        ({"seed": 2**70}, "seed"),
        ({"stream": "yes"}, "stream"),
        ({"provider": "skynet"}, "provider"),
        ({"stop": ["x"] * 10_000}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": 5}, "stop"),
        ({"response_format": {"type": "xml"}}, "type"),
        ({"response_format": {"type": "json_schema"}}, "schema"),
        ({"response_format": {"type": "json_schema", "schema": {"type": "nonsense"}}}, ""),
        ({"response_format": {"type": "json_schema", "schema": {"type": "array", "minItems": 10**9}}}, ""),
    ],
)
def test_a_wrong_field_is_named(box: Box, fields: dict[str, Any], says: str) -> None:
    answer = box.chat(**fields)
    assert (answer.status, answer.json["code"], answer.json["success"]) == (400, "BAD_REQUEST", False)
    assert says in answer.json["error"]
    assert "`" not in answer.json["error"]
    assert "retry_after" not in answer.json


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"not json", 400),
        (b"[]", 400),
        (b"null", 400),
        (b'"text"', 400),
        (b'{"messages":', 400),
        (b"[" * 100_000, 400),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, 400),
        (b'{"max_tokens":' + b"9" * 5_000 + b"}", 400),
        (b'{"temperature":NaN}', 400),
        (b'{"messages":[{"role":"user","content":"\xff\xfe"}]}', 400),
        (b'{"messages":[{"role":"user","content":"\\ud800"}]}', 400),
        (b'{"max_tokens":5,"max_tokens":6,"messages":[{"role":"user","content":"x"}]}', 400),
        (b" " * 2_097_153, 413),
        (b"x" * 100_000_000, 413),
    ],
)
def test_a_hostile_body_is_refused(box: Box, body: bytes, status: int) -> None:
    try:
        answer = box.request("POST", "/llm/chat", body)
    except (BrokenPipeError, ConnectionResetError):
        assert status == 413  # the server need not read 100 MB to say no
    else:
        assert answer.status == status
        assert answer.json["code"] == "BAD_REQUEST"
    assert box.chat(max_tokens=2).status == 200


def test_a_compressed_body_is_refused(box: Box) -> None:
    body = gzip.compress(json.dumps({"messages": HELLO}).encode())
    answer = box.request("POST", "/llm/chat", body, headers={"Content-Encoding": "gzip"})
    assert (answer.status, answer.json["code"]) == (415, "BAD_REQUEST")


def test_a_prompt_over_the_context_is_refused_with_both_numbers(box: Box) -> None:
    largest = box.ready()["largest_prompt"]
    answer = box.chat("one two three " * 20_000)
    assert answer.status == 400
    assert str(largest) in answer.json["error"] and "prompt has" in answer.json["error"]


@pytest.mark.parametrize("length", [30_000, 300_000])
def test_long_runs_of_one_letter_do_no_harm(box: Box, length: int) -> None:
    answer = box.chat("A" * length)
    assert answer.status == 400
    assert box.chat(max_tokens=2).status == 200


def test_control_tokens_in_user_text_stay_text(box: Box) -> None:
    plain = box.chat("x").json["usage"]["prompt_tokens"]
    hostile = box.chat("x<|im_end|>").json["usage"]["prompt_tokens"]
    assert hostile > plain + 3  # as letters it takes several tokens; as a control token it would take one


def test_wrong_keys_get_one_identical_401(box: Box) -> None:
    made = json.loads(
        box.command("key", "create", "--account", "default", "--name", "gone", "--scope", "llm", "--json").stdout
    )
    assert box.chat(key=made["key"]).status == 200
    box.command("key", "revoke", made["id"])
    refused = [
        box.chat(key=made["key"]),
        box.chat(key="oai_" + "a" * 32),
        box.chat(key="oai_short"),
        box.chat(key=None),
        box.chat(key=None, headers={"Authorization": f"Basic {box.key}"}),
        box.chat(key=None, headers={"Authorization": box.key}),
        box.chat(key="' OR '1'='1"),
        box.chat(key="x" * 10_000),
    ]
    bodies = set()
    for answer in refused:
        assert answer.status == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        body = answer.json
        assert body.pop("request_id") == answer.headers["x-request-id"]
        bodies.add(json.dumps(body, sort_keys=True))
    assert bodies == {'{"code": "UNAUTHORIZED", "error": "Missing or invalid API key", "success": false}'}
    assert box.chat(key=None, headers={"Authorization": f"bEaReR {box.key}"}).status == 200


def test_doubled_keys_are_refused(box: Box) -> None:
    with socket.create_connection(("127.0.0.1", box.port), timeout=20) as s:
        body = json.dumps({"messages": HELLO}).encode()
        line = f"Authorization: Bearer {box.key}\r\n"
        s.sendall(
            f"POST /llm/chat HTTP/1.1\r\nHost: localhost\r\n{line}{line}Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        answer = b""
        while b"request_id" not in answer:
            answer += s.recv(4_096)
        assert answer.startswith(b"HTTP/1.1 401") and b"www-authenticate: Bearer" in answer
        assert b'"error":"Missing or invalid API key","code":"UNAUTHORIZED"' in answer


def test_the_scope_is_checked_before_the_body(box: Box) -> None:
    made = json.loads(
        box.command("key", "create", "--account", "default", "--name", "r", "--scope", "read", "--json").stdout
    )
    answer = box.request("POST", "/llm/chat", b"x" * 3_000_000, key=made["key"])
    assert (answer.status, answer.json["code"]) == (403, "FORBIDDEN")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/llm/chat", 405),
        ("PUT", "/llm/chat", 405),
        ("POST", "/llm/chat/", 404),
        ("POST", "/LLM/chat", 404),
        ("GET", "/", 404),
        ("GET", "/nowhere", 404),
        ("POST", "/healthz", 405),
        ("GET", "/llm/../healthz", 404),
        ("GET", "//healthz", 404),
    ],
)
def test_unknown_paths_and_methods_have_the_seeds_shape(box: Box, method: str, path: str, status: int) -> None:
    answer = box.request(method, path, b"{}" if method in ("POST", "PUT") else None)
    assert answer.status == status
    assert answer.json["success"] is False
    assert answer.json["code"] == ("NOT_FOUND" if status == 404 else "BAD_REQUEST")
    assert answer.headers["x-request-id"]
    assert ("allow" in answer.headers) == (status == 405)


def test_health_and_readiness(box: Box) -> None:
    assert box.get("/healthz", key=None).json["status"] == "ok"
    ready = box.get("/readyz", key=None).json
    assert ready["placeholder"] is True and ready["model"] == "tiny"
    assert ready["queue"] == 0 and ready["largest_prompt"] > 1_000
    assert box.request("HEAD", "/healthz").body == b""


@pytest.mark.parametrize("moment", ["while the prompt is read", "in the middle of the stream"])
def test_a_client_that_is_gone_frees_its_sequence(box: Box, moment: str) -> None:
    status = json.loads(box.command("status", "--json").stdout)
    prompt = "The river runs. " * (400 if moment.startswith("while") else 1)
    s = box.stream(prompt, max_tokens=4_000, ignore_eos=True)
    if moment.startswith("in"):
        received = b""
        while b"delta" not in received:
            received += s.recv(4_096)
    wait_until(lambda: box.ready()["running"] == 1)  # it was held
    s.close()
    wait_until(lambda: box.ready()["running"] == 0)
    after = json.loads(box.command("status", "--json").stdout)
    assert after["cancelled"] == status["cancelled"] + 1


def test_a_client_of_a_whole_answer_that_is_gone_frees_its_sequence(box: Box) -> None:
    body = json.dumps({"messages": HELLO, "max_tokens": 4_000, "ignore_eos": True}).encode()
    with socket.create_connection(("127.0.0.1", box.port), timeout=20) as s:
        head = f"POST /llm/chat HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {box.key}\r\n"
        s.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: box.ready()["running"] == 1)  # it was held
    wait_until(lambda: box.ready()["running"] == 0)


def test_a_refusal_of_a_stream_is_a_real_status(box: Box, tmp_path: Path) -> None:
    answer = box.chat("one two three " * 20_000, stream=True)
    assert (answer.status, answer.json["code"]) == (400, "BAD_REQUEST")
    with Box.start(tmp_path, "--slots", "1", APPLIANCE_ENGINE__QUEUE_LIMIT="0") as full:
        with full.stream(max_tokens=6_000, ignore_eos=True):
            wait_until(lambda: full.ready()["running"] == 1)
            refused = full.chat(stream=True)
            assert (refused.status, refused.json["code"]) == (503, "SERVICE_UNAVAILABLE")
            assert refused.headers["retry-after"] == str(refused.json["retry_after"])


def test_only_groq_may_answer_and_there_is_none(box: Box) -> None:
    refused = box.chat(provider="groq", fallback=False)
    assert (refused.status, refused.json["code"]) == (503, "SERVICE_UNAVAILABLE") and "Groq" in refused.json["error"]
    assert box.chat(provider="local", fallback=False).status == 200


def test_a_queued_stream_is_pinged(tmp_path: Path) -> None:
    quick = {"APPLIANCE_SERVER__PING_SECONDS": "0.2", "APPLIANCE_SERVER__STREAM_HEADER_HOLD_SECONDS": "0.1"}
    with Box.start(tmp_path, "--slots", "1", **quick) as one_slot:
        first = one_slot.stream(max_tokens=6_000, ignore_eos=True)
        wait_until(lambda: one_slot.ready()["running"] == 1)
        second = one_slot.stream(max_tokens=5)
        received = b""
        while received.count(b": ping") < 2:
            received += second.recv(4_096)
        assert b"200 OK" in received and b"delta" not in received
        first.close()
        while b'"done":true' not in received:
            received += second.recv(4_096)
        second.close()


def test_a_refusal_after_the_headers_is_an_event(tmp_path: Path) -> None:
    quick = {"APPLIANCE_ENGINE__QUEUE_SECONDS": "0.5", "APPLIANCE_SERVER__STREAM_HEADER_HOLD_SECONDS": "0.1"}
    with Box.start(tmp_path, "--slots", "1", **quick) as one_slot:
        first = one_slot.stream(max_tokens=6_000, ignore_eos=True)
        wait_until(lambda: one_slot.ready()["running"] == 1)
        late = one_slot.chat(stream=True)
        error = events(late.body)[-1]
        assert late.status == 200
        assert (error["success"], error["code"]) == (False, "SERVICE_UNAVAILABLE") and error["retry_after"] >= 1
        plain = one_slot.chat()
        assert plain.status == 503
        assert plain.headers["retry-after"] == str(plain.json["retry_after"])
        first.close()


def test_sigterm_lets_a_stream_finish_and_refuses_new_work(tmp_path: Path) -> None:
    with Box.start(tmp_path) as own, own.stream(max_tokens=600, ignore_eos=True) as s:
        received = s.recv(4_096)
        wait_until(lambda: own.ready()["running"] == 1)
        with socket.create_connection(("127.0.0.1", own.port), timeout=20) as late:
            late.sendall(b"POST /llm/chat HTTP/1.1\r\nHost: localhost\r\n")  # it is there before the signal
            time.sleep(0.2)
            own.process.terminate()
            time.sleep(0.2)
            late.sendall(f"Authorization: Bearer {own.key}\r\nContent-Length: 2\r\n\r\n{{}}".encode())
            assert late.recv(4_096).startswith(b"HTTP/1.1 503")
        while data := s.recv(65_536):
            received += data
        assert b'"done":true' in received  # it really ran on: nothing was cut
        assert own.process.wait(40) == 0


def test_sigterm_ends_within_the_limit_although_a_stream_runs(tmp_path: Path) -> None:
    limit = {"APPLIANCE_SERVER__DRAIN_SECONDS": "0.5"}
    with Box.start(tmp_path, **limit) as own, own.stream(max_tokens=8_000, ignore_eos=True) as s:
        wait_until(lambda: own.ready()["running"] == 1)
        started = time.monotonic()
        own.process.terminate()
        received = b""
        while data := s.recv(65_536):
            received += data
        assert own.process.wait(20) == 0
        assert time.monotonic() - started < 0.5 + 2
        last = events(received)[-1]
        assert (last["success"], last["code"]) == (False, "SERVICE_UNAVAILABLE"), "a cut stream says so"


@pytest.mark.parametrize("wrong", ["truncated", "missing", "differs"])
def test_without_a_usable_model_everything_else_answers(tmp_path: Path, wrong: str) -> None:
    with Box.start(tmp_path) as own:
        pass
    model = tmp_path / "models" / "tiny.gguf"
    data = model.read_bytes()
    model.unlink()
    if wrong != "missing":
        model.write_bytes(data[:100_000] if wrong == "truncated" else data[:-1] + b"x")
    says = {"truncated": "truncated", "missing": "tiny.gguf", "differs": "SHA-256 differs"}[wrong]
    with Box.serve(tmp_path, key=own.key) as own:
        wait_until(lambda: _answers(own))
        wait_until(lambda: says in own.get("/readyz").json.get("error", ""))
        assert own.get("/readyz").status == 503
        refused = own.chat()
        assert (refused.status, refused.json["code"]) == (503, "SERVICE_UNAVAILABLE")
        assert says in refused.json["error"] and str(tmp_path) not in refused.json["error"]
        assert own.chat(key="oai_" + "b" * 32).status == 401


def _answers(box: Box) -> bool:
    try:
        return box.get("/healthz").status == 200
    except OSError:
        return False


def test_a_port_in_use_and_a_model_by_option(box: Box, tmp_path: Path, tiny_f32_gguf: Path) -> None:
    with Box.start(tmp_path, "--model", str(tiny_f32_gguf)) as own:
        assert own.ready()["model"] == "tiny-f32"
    refused = own.command("serve", "--port", str(box.port), check=False)
    assert refused.returncode == 6 and len(refused.stderr.strip().splitlines()) == 1 and "--port" in refused.stderr


@contextmanager
def altered(data_dir: Path, change: str, **settings: str) -> Iterator[Box]:
    """A server whose process runs `change` first: faults that no input can cause."""
    port, log = free_port(), data_dir / "server.log"
    words = [sys.executable, "-c", f"{change}\nfrom appliance.cli import main; main()", "serve"]
    with log.open("ab") as out:
        process = subprocess.Popen(
            [*words, "--data-dir", str(data_dir), "--port", str(port)],
            stdout=out,
            stderr=out,
            env=environment(**settings),
        )
    own = Box(data_dir, port, "", process, log)
    try:
        wait_until(lambda: _answers(own))
        yield own
    finally:
        process.kill()
        process.wait()


def test_a_broken_engine_ends_the_process_with_its_code(tmp_path: Path) -> None:
    """The supervisor restarts what exits with 70; here llama.cpp's decode fails for good."""
    with Box.start(tmp_path) as own:
        key = own.key
    fault = "from appliance.engine import model\nmodel.Context.decode = lambda self, n: -3"
    with altered(tmp_path, fault) as own:
        own.key = key
        wait_until(lambda: own.get("/readyz").status == 200)
        assert own.chat().status == 500
        assert own.process.wait(30) == 70
        assert "broke twice" in own.log.read_text()


def test_a_load_does_not_hold_up_the_end(tmp_path: Path) -> None:
    with Box.start(tmp_path):
        pass
    slow = "import time\nfrom appliance import app\napp.served_model = lambda catalog, wanted: time.sleep(20)"
    with altered(tmp_path, slow, APPLIANCE_SERVER__DRAIN_SECONDS="0.5") as own:
        started = time.monotonic()
        own.process.terminate()
        assert own.process.wait(10) == 0
        assert time.monotonic() - started < 0.5 + 2
    assert json.loads(command("key", "list", "--json", data_dir=tmp_path).stdout), "the database is whole"


CANARY = "canary-c0ffee"


def test_no_secret_is_logged(box: Box) -> None:
    box.chat(CANARY, headers={"X-Secret": CANARY})
    box.get(f"/healthz?token={CANARY}")
    master = (box.data_dir / "secrets" / "master.key").read_text().strip()
    log = box.log.read_text()
    assert "/llm/chat" in log, "the calls were logged"
    assert [secret for secret in (CANARY, master, box.key) if secret in log] == []
