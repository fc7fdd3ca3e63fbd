"""A small app behind the real server and the real edge layers, run as a process by the tests of `appliance.server`.

`python -m tests.edge_app FD SETTINGS` serves on the bound socket FD with the JSON object SETTINGS as `[server]`.
Paths under /bare/ reach the app without the layers, to see what the server itself makes of a broken app.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import uvloop
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from appliance import logs, server
from appliance.api.access_log import AccessLog
from appliance.api.guard import Guard
from appliance.api.hosts import Hosts
from appliance.api.streams import EventStream
from appliance.config import ServerSettings

happened: list[str] = []  # what tests ask for at /happened


async def hello(request: Request) -> Response:
    return JSONResponse({"ok": True, "path": request.url.path, "id": request.state.request_id})


async def headers(request: Request) -> Response:
    body = await request.body()
    await asyncio.sleep(0.05)
    return JSONResponse({"headers": [[k.decode(), v.decode()] for k, v in request.scope["headers"]], "body": len(body)})


async def echo(request: Request) -> Response:
    body = await request.body()
    return JSONResponse({"bytes": len(body), "start": body[:40].decode("latin-1")})


async def ignore(request: Request) -> Response:
    """Answers without having read the body."""
    return JSONResponse({"read": 0}, status_code=403)


async def late_reader(request: Request) -> Response:
    """Reads the body only after a while, as a call does that waits for its turn first."""
    await asyncio.sleep(1.0)
    return JSONResponse({"bytes": len(await request.body())})


async def slow(request: Request) -> Response:
    """Answers after `?seconds=`; notes when it was cancelled or saw its client go."""
    seconds = float(request.query_params["seconds"])
    watcher = asyncio.ensure_future(_gone(request.receive))
    try:
        done, _ = await asyncio.wait({watcher}, timeout=seconds)
        if done:
            happened.append("slow: client gone")
    except asyncio.CancelledError:
        happened.append("slow: cancelled")
        raise
    finally:
        watcher.cancel()
    return JSONResponse({"slept": seconds})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def stream(request: Request) -> Response:
    """`?n=` events, one every `?gap=` seconds."""
    n, gap = int(request.query_params["n"]), float(request.query_params["gap"])

    async def events() -> Any:
        for i in range(n):
            yield b"data: %d\n\n" % i
            await asyncio.sleep(gap)
        yield b"data: done\n\n"

    return EventStream(events(), 15, {})


async def breaking_stream(request: Request) -> Response:
    async def events() -> Any:
        yield b"data: 1\n\n"
        raise RuntimeError("a secret of ours")

    return EventStream(events(), 15, {})


async def breaking_download(request: Request) -> Response:
    async def parts() -> Any:
        yield b"x" * 100
        raise RuntimeError("a secret of ours")

    return StreamingResponse(parts(), media_type="application/octet-stream")


async def flood(request: Request) -> Response:
    """Writes until the client is gone."""

    async def parts() -> Any:
        try:
            while True:
                yield b"x" * 65_536
        finally:
            happened.append("flood: ended")

    return StreamingResponse(parts(), media_type="application/octet-stream")


async def large(request: Request) -> Response:
    return Response(b"x" * int(request.query_params["bytes"]), media_type="application/octet-stream")


async def crash(request: Request) -> Response:
    raise RuntimeError("a secret of ours")


async def seen(request: Request) -> Response:
    return JSONResponse(happened)


ROUTES = [
    Route("/hello", hello),
    Route("/headers", headers, methods=["GET", "POST"]),
    Route("/echo", echo, methods=["POST"]),
    Route("/ignore", ignore, methods=["POST"]),
    Route("/late", late_reader, methods=["POST"]),
    Route("/slow", slow),
    Route("/stream", stream),
    Route("/breaking-stream", breaking_stream),
    Route("/breaking-download", breaking_download),
    Route("/flood", flood),
    Route("/large", large),
    Route("/crash", crash),
    Route("/happened", seen),
]


async def bare(scope: Scope, receive: Receive, send: Send) -> None:
    """Broken in the way its path says."""
    match scope["path"]:
        case "/bare/raises":
            raise RuntimeError("a secret of ours")
        case "/bare/silent":
            return
        case "/bare/half":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"half", "more_body": True})


class EdgeApp:
    """The layers in the appliance's order around the routes above."""

    def __init__(self, settings: ServerSettings) -> None:
        self._stack = AccessLog(Guard(Hosts(Router(ROUTES, redirect_slashes=False), settings)))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self
        app: Callable[[Scope, Receive, Send], Awaitable[None]] = self._stack
        await (bare if scope["path"].startswith("/bare/") else app)(scope, receive, send)

    def drain(self) -> None:
        print("draining", flush=True)


def main() -> None:
    logs.configure()
    settings = ServerSettings(**json.loads(sys.argv[2]))
    app = EdgeApp(settings)
    uvloop.run(server.serve(app, settings, socket.socket(fileno=int(sys.argv[1])), app.drain))
    print("ended", flush=True)


if __name__ == "__main__":
    main()
