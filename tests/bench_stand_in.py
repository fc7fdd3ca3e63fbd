"""A program that takes a server's place in `test_bench.py`: real processes and sockets, no model.

`bench_stand_in.py ROLE WORDS...`: ROLE `llama-server` speaks the peer's dialect; `fair` and `unfair` take the place of
the `appliance` command: they share eight places between accounts, or serve whoever came first.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STEP = 0.002  # seconds
PLACES = 8


@dataclass(eq=False)
class Job:
    """A call: whose it is, and the tokens it still wants."""

    key: str
    left: int
    tokens: asyncio.Queue[str] = field(default_factory=asyncio.Queue)


class Places:
    """One token for every running job and step."""

    def __init__(self, fair: bool, places: int) -> None:
        self.fair = fair
        self.places = places
        self.running: list[Job] = []
        self.waiting: list[Job] = []

    def admit(self) -> None:
        """`fair`: an account without a place takes the youngest one of the others, who goes on later."""
        if self.fair:
            for job in [j for j in self.waiting if all(r.key != j.key for r in self.running)]:
                self.waiting.remove(job)
                self.waiting.insert(0, job)
                if len(self.running) == self.places:
                    self.waiting.insert(1, self.running.pop())
        while self.waiting and len(self.running) < self.places:
            self.running.append(self.waiting.pop(0))

    async def run(self) -> None:
        while True:
            await asyncio.sleep(STEP)
            self.admit()
            for job in list(self.running):
                job.left -= 1
                job.tokens.put_nowait("x")
                if not job.left:
                    self.running.remove(job)


def event(**fields: object) -> bytes:
    return b"data: " + json.dumps(fields, separators=(",", ":")).encode() + b"\n\n"


class Http:
    """Answers GET with an empty object and POST with a stream, in the peer's dialect or ours."""

    def __init__(self, places: Places, ours: bool) -> None:
        self.places = places
        self.ours = ours

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
        body = await reader.readexactly(int(fields.get("Content-Length", 0)))
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        try:
            if head.startswith("GET"):
                writer.write(b"{}")
            else:
                await self.stream(json.loads(body), fields.get("Authorization", ""), writer)
            await writer.drain()
        finally:
            writer.close()

    async def stream(self, body: dict[str, Any], key: str, writer: asyncio.StreamWriter) -> None:
        count = body["max_tokens"]
        job = Job(key, count)
        self.places.waiting.append(job)
        for _ in range(count):
            text = await job.tokens.get()
            writer.write(event(delta=text) if self.ours else event(choices=[{"delta": {"content": text}}]))
        prompt = 2 * sum(len(message["content"].split()) for message in body["messages"])
        usage = {"prompt_tokens": prompt, "completion_tokens": count}
        writer.write(event(done=True, usage=usage) if self.ours else event(choices=[], usage=usage))


async def tell(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """The admin socket's `status`."""
    await reader.readline()
    engine = {"host_ms_p50": 3.5, "host_ms_p95": 6.0, "kv_bytes": 1_000_000, "compute_bytes": 0, "load_seconds": 0.01}
    writer.write(json.dumps({"result": {"engine": engine}}).encode() + b"\n")
    await writer.drain()
    writer.close()


async def serve(role: str, words: Sequence[str]) -> None:
    def option(name: str, default: str = "") -> str:
        return words[words.index(name) + 1] if name in words else default

    places = Places(role == "fair", int(option("--slots", "64")))
    http = Http(places, ours=role != "llama-server")
    listener = await asyncio.start_server(http.answer, "127.0.0.1", int(option("--port")), backlog=128)
    if data_dir := option("--data-dir"):
        await asyncio.start_unix_server(tell, Path(data_dir) / "admin.sock")
    async with listener:
        await places.run()


def main(role: str, *words: str) -> None:
    if "--version" in words:
        print("version: 1")
    elif words[0] == "init":
        Path(words[words.index("--data-dir") + 1]).mkdir()
        print(json.dumps({"created": True, "key": "oai_first"}))
    elif words[:2] == ("account", "create"):
        print(json.dumps({"name": words[2]}))
    elif words[:2] == ("key", "create"):
        print(json.dumps({"key": "oai_second"}))
    else:
        asyncio.run(serve(role, words))


if __name__ == "__main__":
    main(*sys.argv[1:])
