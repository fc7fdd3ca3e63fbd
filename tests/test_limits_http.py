"""Plan limits over real sockets, against a real process."""

from __future__ import annotations

import json
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from appliance import admin
from appliance.config import LimitSettings
from tests.box import Answer, Box, events, wait_until

ROUNDS = 20
ABORTS = 1_000
WRONG_KEYS = LimitSettings().wrong_keys_per_minute
LONG = 3_000  # tokens of an answer that is still running when the test is done with it
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends a reset


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    quick = {"APPLIANCE_SERVER__STREAM_HEADER_HOLD_SECONDS": "0.1"}
    with Box.start(tmp_path_factory.mktemp("limited"), **quick) as running:
        yield running


def account(box: Box, name: str, plan: str = "community", keys: int = 1) -> list[str]:
    """A new account's keys."""
    path = admin.socket_path(box.data_dir)
    admin.call(path, "account.create", {"name": name, "plan": plan})
    arguments = {"account": name, "scope": "llm"}
    return [admin.call(path, "key.create", {**arguments, "name": f"k{i}"})["key"] for i in range(keys)]


def status(box: Box) -> dict[str, Any]:
    found: dict[str, Any] = admin.call(admin.socket_path(box.data_dir), "status", {})
    return found


def room_in_the_minute(seconds: float) -> None:
    """Waits for the next minute where this one has less left than `seconds`."""
    left = 60 - time.time() % 60
    if left < seconds:
        time.sleep(left + 0.1)


def test_of_a_hundred_parallel_calls_exactly_twenty_succeed_whatever_key_they_use(limited: Box) -> None:
    made = [account(limited, f"team {i}", keys=5) for i in range(ROUNDS)]
    with ThreadPoolExecutor(20) as pool:
        for keys in made:
            room_in_the_minute(20)
            answers: list[Answer] = list(
                pool.map(lambda i, keys=keys: limited.chat("Hi", max_tokens=1, key=keys[i % 5]), range(100))
            )
            good = [a for a in answers if a.status == 200]
            refused = [a for a in answers if a.status == 429]
            assert (len(good), len(refused)) == (20, 80), Counter(a.status for a in answers)
            left = [int(a.headers["x-ratelimit-remaining"]) for a in good]
            assert sorted(left) == list(range(20)), "every value once"
            for answer in refused:
                assert answer.json["code"] == "RATE_LIMIT_EXCEEDED" and answer.headers["x-ratelimit-remaining"] == "0"
                assert 1 <= answer.json["retry_after"] == int(answer.headers["retry-after"]) <= 60


def test_a_call_beyond_the_plans_places_waits_and_says_how_long(limited: Box) -> None:
    [key] = account(limited, "busy")
    room_in_the_minute(15)
    held = [Held(limited, key) for _ in range(2)]
    waiting = Held(limited, key, begin=False)
    wait_until(lambda: status(limited)["calls_in_line"] == 1)
    assert b": queued, place 1, about " in waiting.read_until(b" s\n")
    held[0].drop()
    assert waiting.read_until(b'"delta"')
    for one in (held[1], waiting):
        one.drop()
    wait_until(lambda: status(limited)["calls_running"] == 0)
    whole = limited.chat("Hi", max_tokens=1, key=key)
    assert whole.status == 200 and "x-queue-wait-ms" not in whole.headers, "nobody was before it"
    holds = [Held(limited, key) for _ in range(2)]
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(limited.chat, "Hi", max_tokens=1, key=key)
        wait_until(lambda: status(limited)["calls_in_line"] == 1)
        time.sleep(0.2)
        for one in holds:
            one.drop()
        assert int(late.result().headers["x-queue-wait-ms"]) >= 100


def test_whoever_guesses_keys_is_stopped_and_a_valid_key_of_the_same_address_is_not(limited: Box) -> None:
    [key] = account(limited, "next door", plan="professional")
    room_in_the_minute(10)
    guesses = [limited.chat("Hi", key="oai_" + "x" * 32).status for _ in range(WRONG_KEYS + 5)]
    assert guesses == [401] * WRONG_KEYS + [429] * 5
    assert limited.get("/healthz", key="oai_" + "y" * 32).status == 429, "nor is there a way round"
    assert limited.chat("Hi", max_tokens=1, key=key).status == limited.get("/healthz", key=key).status == 200
    assert limited.chat("Hi", key=None).status == 401, "no key at all is no guess"


class Held:
    """A streamed call on a socket of its own."""

    def __init__(self, box: Box, key: str, *, begin: bool = True) -> None:
        self.socket = Box(box.data_dir, box.port, key, box.process, box.log).stream("Go on", max_tokens=LONG)
        self.got = b""
        if begin:
            self.read_until(b'"delta"')

    def read_until(self, mark: bytes) -> bytes:
        while mark not in self.got:
            piece = self.socket.recv(65_536)
            assert piece, f"the answer ended: {self.got[-300:]!r}"
            self.got += piece
        return self.got

    def drop(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.socket.close()


def _before_headers(box: Box, key: str) -> socket.socket:
    return Box(box.data_dir, box.port, key, box.process, box.log).stream("Go on", max_tokens=LONG)


def _in_upload(box: Box, key: str) -> socket.socket:
    s = socket.create_connection(("127.0.0.1", box.port), timeout=60)
    s.sendall(
        f"POST /llm/chat HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n"
        'Content-Type: application/json\r\nContent-Length: 900\r\n\r\n{"messages":'.encode()
    )
    return s


def _in_stream(box: Box, key: str) -> socket.socket:
    return Held(box, key).socket


def _whole(box: Box, key: str) -> socket.socket:
    """No stream: the client goes while the answer is computed."""
    body = json.dumps({"messages": [{"role": "user", "content": "Go on"}], "max_tokens": LONG}).encode()
    s = socket.create_connection(("127.0.0.1", box.port), timeout=60)
    head = f"POST /llm/chat HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n"
    s.sendall(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    return s


def test_a_thousand_aborted_calls_leave_no_lease(tmp_path: Path) -> None:
    draw = random.Random(1)
    together = 25
    with Box.start(tmp_path / "box", "--slots", str(together)) as box:
        wait_until(lambda: status(box)["calls_running"] == 0)
        seen = Counter[str]()
        for batch in range(ABORTS // together):
            [key] = account(box, f"aborter {batch}", plan="enterprise")
            begin = draw.choice([_before_headers, _in_upload, _whole, _in_stream])
            with ThreadPoolExecutor(together) as pool:
                sockets = list(pool.map(lambda _, begin=begin, key=key: begin(box, key), range(together)))
            wait_until(lambda: status(box)["calls_running"] == together)  # the control: each holds its lease
            seen[begin.__name__] += together
            for s in sockets:
                if draw.random() < 0.5:
                    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                s.close()
            wait_until(lambda: status(box)["calls_running"] == 0, seconds=2)
        assert sum(seen.values()) == ABORTS and len(seen) == 4, seen
        wait_until(lambda: status(box)["running"] == 0)


def test_a_refusal_in_a_stream_is_a_status(limited: Box) -> None:
    [key] = account(limited, "streamer")
    room_in_the_minute(10)
    answers = [limited.chat("Hi", max_tokens=1, stream=True, key=key) for _ in range(21)]
    assert [a.status for a in answers] == [200] * 20 + [429]
    assert events(answers[0].body)[-1]["done"] is True
    assert [a.headers["x-ratelimit-remaining"] for a in answers[:3]] == ["19", "18", "17"]
