"""The admin socket: the commands' way into the running server. A Unix socket for its owner and root only; one request
per connection, a JSON line each way (or several, for an answer that streams).

    → {"operation": "key.list", "arguments": {}}
    ← {"result": …}    or {"part": …} lines before it, or {"error": "…", "exit_code": 1}
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import socket
import stat
import struct
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

from appliance.errors import ApplianceError, ServerUnreachable

log = logging.getLogger("appliance.admin")

LONGEST_PATH = 100  # of a Unix socket's address the kernel takes 107 bytes
LONGEST_LINE = 4 * 2**20

Handler = Callable[[str, dict[str, Any]], AsyncGenerator[dict[str, Any]]]


def socket_path(data_dir: Path) -> Path:
    """`admin.sock` in the data directory, or in the user's run directory when that path is too long."""
    path = data_dir / "admin.sock"
    if len(os.fsencode(path)) <= LONGEST_PATH:
        return path
    name = hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:16]
    return _run_directory() / f"appliance-{name}.sock"


def _run_directory() -> Path:
    """A directory of ours alone; under /tmp only when it really is."""
    for candidate in (os.environ.get("XDG_RUNTIME_DIR"), f"/run/user/{os.geteuid()}", "/run/appliance"):
        if candidate and os.access(candidate, os.W_OK | os.X_OK) and len(candidate) < 60:
            return Path(candidate)
    own = Path(f"/tmp/appliance-{os.geteuid()}")
    own.mkdir(mode=0o700, exist_ok=True)
    found = own.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise ServerUnreachable(f"{own} is not a directory of this user alone; set XDG_RUNTIME_DIR.")
    return own


class AdminServer:
    """Answers on the socket from `start` to `close`. `handle` yields the parts of an answer, the last one a result."""

    def __init__(self, path: Path, handle: Handler) -> None:
        self.path = path
        self._handle = handle
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """A socket that a killed server left behind is replaced: the caller holds the data directory's lock."""
        self.path.unlink(missing_ok=True)
        before = os.umask(0o177)
        try:
            self._server = await asyncio.start_unix_server(self._serve, str(self.path), limit=LONGEST_LINE)
        finally:
            os.umask(before)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self.path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if _peer(writer.get_extra_info("socket")) in (0, os.geteuid()):
                await self._answer(reader, writer)
        except (ConnectionError, asyncio.LimitOverrunError, ValueError):
            log.debug("an admin connection ended early")
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = json.loads(await reader.readline())
        gone = asyncio.ensure_future(reader.read())
        work = asyncio.ensure_future(self._write_parts(request, writer))
        await asyncio.wait({gone, work}, return_when=asyncio.FIRST_COMPLETED)
        for task in (gone, work):
            task.cancel()
        await asyncio.gather(gone, work, return_exceptions=True)

    async def _write_parts(self, request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        try:
            async with contextlib.aclosing(
                self._handle(str(request["operation"]), dict(request["arguments"]))
            ) as parts:
                async for part in parts:
                    writer.write(json.dumps(part).encode() + b"\n")
                    await writer.drain()
        except ApplianceError as error:
            writer.write(json.dumps({"error": error.message, "exit_code": error.exit_code}).encode() + b"\n")
        except Exception:
            log.exception("an admin operation failed")
            writer.write(
                json.dumps({"error": "The operation failed; see the server's log.", "exit_code": 1}).encode() + b"\n"
            )
        await writer.drain()


def _peer(connection: socket.socket) -> int:
    """The user id at the other end."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])


class RemoteError(ApplianceError):
    """An error that the server reported, with the exit code it has there."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def reachable(path: Path) -> bool:
    """Whether a server answers at `path`."""
    try:
        _connect(path).close()
    except ServerUnreachable:
        return False
    return True


def call(path: Path, operation: str, arguments: dict[str, Any]) -> Any:
    """The result of an operation on the running server. Raises ServerUnreachable or RemoteError."""
    result = None
    for part in stream(path, operation, arguments):
        result = part.get("result", result)
    return result


def stream(path: Path, operation: str, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The parts of an answer as they come; closing the iterator ends the work. Raises ServerUnreachable or RemoteError."""
    with contextlib.closing(_connect(path)) as connection, connection.makefile("rwb") as file:
        file.write(json.dumps({"operation": operation, "arguments": arguments}).encode() + b"\n")
        file.flush()
        ended = False
        for line in file:
            part = json.loads(line)
            if "error" in part:
                raise RemoteError(part["error"], part["exit_code"])
            ended = ended or "result" in part
            yield part
        if not ended:
            raise ServerUnreachable("The server ended before the operation did.")


def _connect(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(str(path))
    except OSError as error:
        connection.close()
        raise ServerUnreachable(f"No server answers at {path}.") from error
    return connection
