"""Long mixed load on a real process: `scripts/soak`. Minutes: $APPLIANCE_SOAK_MINUTES, 10 by default."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from pathlib import Path

import pytest

from tests.box import Box, events

MINUTES = float(os.environ.get("APPLIANCE_SOAK_MINUTES", "10"))
SCHEMA = {
    "type": "object",
    "properties": {"yes": {"type": "boolean"}},
    "required": ["yes"],
    "additionalProperties": False,
}


def resident(box: Box) -> int:
    """Bytes."""
    status = Path(f"/proc/{box.process.pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) * 1_024


class Client(threading.Thread):
    """Calls of every kind, one after the other, until told to stop; some are dropped in the middle."""

    def __init__(self, box: Box, number: int, stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self.box = box
        self.draw = random.Random(number)
        self.stop = stop
        self.done = 0
        self.dropped = 0
        self.problems: list[str] = []

    def run(self) -> None:
        while not self.stop.is_set():
            try:
                self._call()
            except Exception as error:
                self.problems.append(repr(error))

    def _call(self) -> None:
        kind = self.draw.choice(("plain", "stream", "schema", "long", "drop"))
        question = f"Call {self.draw.random()} about the river. " * self.draw.randint(1, 20)
        most = self.draw.randint(1, 120)
        if kind == "drop":
            with self.box.stream(question, max_tokens=3_000, ignore_eos=True) as s:
                s.recv(self.draw.choice((1, 2_000)))
            self.dropped += 1
            return
        if kind == "schema":
            answer = self.box.chat(question, response_format={"type": "json_schema", "schema": SCHEMA}, max_tokens=60)
            assert isinstance(json.loads(answer.json["text"])["yes"], bool)
        elif kind == "stream":
            answer = self.box.chat(question, stream=True, max_tokens=most, ignore_eos=True)
            assert events(answer.body)[-1]["usage"]["completion_tokens"] == most
        else:
            answer = self.box.chat(question * (10 if kind == "long" else 1), max_tokens=most, ignore_eos=True)
            assert answer.json["usage"]["completion_tokens"] == most
        self.done += 1


@pytest.mark.soak
def test_hours_of_mixed_calls_lose_nothing_and_keep_nothing(tmp_path: Path) -> None:
    with Box.start(tmp_path, "--slots", "4") as box:
        stop = threading.Event()
        clients = [Client(box, number, stop) for number in range(8)]
        for client in clients:
            client.start()
        time.sleep(min(60.0, MINUTES * 20))  # caches are warm by then
        before = resident(box)
        time.sleep(MINUTES * 60)
        grown = resident(box) - before
        stop.set()
        for client in clients:
            client.join(120)
        assert [problem for client in clients for problem in client.problems] == []
        assert sum(client.done for client in clients) > 100 and sum(client.dropped for client in clients) > 20
        assert grown < 100e6, f"{grown / 1e6:.0f} MB more"
        deadline = time.monotonic() + 10
        while (ready := box.ready())["running"] or ready["queue"]:
            assert time.monotonic() < deadline, ready
            time.sleep(0.1)
        status = json.loads(box.command("status", "--json").stdout)
        assert status["failed"] == status["rebuilt"] == 0
