"""A real appliance in a process of its own, for tests over real sockets: init, serve, wait until ready, stop."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from appliance import tinymodel
from appliance.catalog import Catalog

APPLIANCE = [sys.executable, "-m", "appliance"]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def environment(**settings: str) -> dict[str, str]:
    """Ours, without any setting of the machine's."""
    return {k: v for k, v in os.environ.items() if not k.startswith("APPLIANCE_")} | settings


def command(
    *words: str, data_dir: Path, stdin: str = "", check: bool = True, **settings: str
) -> subprocess.CompletedProcess[str]:
    """Runs an `appliance` command to its end."""
    done = subprocess.run(
        [*APPLIANCE, *words, "--data-dir", str(data_dir)],
        input=stdin, capture_output=True, text=True, timeout=120, env=environment(**settings),
    )  # fmt: skip
    if check and done.returncode:
        raise AssertionError(f"{words} ended with {done.returncode}: {done.stderr}")
    return done


def choose_tiny(data_dir: Path) -> None:
    """Most tests want a model that goes on for as long as it may, and says so in no time: not the built-in guide."""
    models = data_dir / "models"
    tinymodel.write(models / "tiny.gguf")
    catalog = Catalog(models)
    for other in catalog.entries():
        catalog.remove(other.name)
    catalog.add(models / "tiny.gguf", name="tiny")
    catalog.choose("tiny")


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Box:
    """A running appliance; `key` is the full key that `init` printed."""

    data_dir: Path
    port: int
    key: str
    process: subprocess.Popen[bytes]
    log: Path
    settings: dict[str, str] = field(default_factory=dict)

    @classmethod
    @contextmanager
    def start(cls, data_dir: Path, *options: str, **settings: str) -> Iterator[Box]:
        made = json.loads(command("init", "--json", data_dir=data_dir, stdin="", check=True, **settings).stdout)
        if made["created"]:
            choose_tiny(data_dir)
        with cls.serve(data_dir, *options, key=made.get("key", ""), **settings) as running:
            running.wait_ready()
            yield running

    @classmethod
    @contextmanager
    def serve(cls, data_dir: Path, *options: str, key: str = "", **settings: str) -> Iterator[Box]:
        port, log = free_port(), data_dir / "server.log"
        with log.open("ab") as out:
            process = subprocess.Popen(
                [*APPLIANCE, "serve", "--data-dir", str(data_dir), "--port", str(port), *options],
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment(**settings),
            )  # fmt: skip
        running = cls(data_dir, port, key, process, log, settings)
        try:
            yield running
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    def wait_ready(self, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                if self.get("/readyz").status == 200:
                    return
            except OSError:
                pass
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the server is not ready:\n{self.log.read_text()}")
            time.sleep(0.05)

    def command(self, *words: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        return command(*words, data_dir=self.data_dir, **{**self.settings, **kwargs})

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        key: str | None = "",
        headers: dict[str, str] | None = None,
        timeout: float = 60,
    ) -> Answer:
        """One request on a connection of its own; `body` is bytes or JSON; `key` None sends none."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        sent = {"Content-Type": "application/json"} if body is not None else {}
        if key is not None:
            sent["Authorization"] = f"Bearer {key or self.key}"
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        try:
            connection.request(method, path, data, sent | (headers or {}))
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def get(self, path: str, **kwargs: Any) -> Answer:
        return self.request("GET", path, **kwargs)

    def chat(self, content: str = "Hello", path: str = "/llm/chat", **fields: Any) -> Answer:
        """One chat call with `fields` beside the message."""
        kwargs = {k: fields.pop(k) for k in ("key", "headers", "timeout") if k in fields}
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 8} | fields
        return self.request("POST", path, {k: v for k, v in body.items() if v is not ...}, **kwargs)

    def stream(self, content: str = "Hello", **fields: Any) -> socket.socket:
        """A raw socket with a streamed chat call on it, to be read or dropped."""
        body = json.dumps({"messages": [{"role": "user", "content": content}], "stream": True} | fields).encode()
        s = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        head = f"POST /llm/chat HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {self.key}\r\n"
        s.sendall(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        return s

    def ready(self) -> Any:
        return self.get("/readyz").json


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Looks again and again; fails when `condition` does not hold in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def events(answer: bytes) -> list[Any]:
    """The JSON of every `data:` line."""
    return [json.loads(line[6:]) for line in answer.decode().split("\n") if line.startswith("data: ")]
