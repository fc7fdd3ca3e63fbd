"""The admin socket: the commands' way into the running server. A Unix socket for its owner and root only; one request
per connection, a JSON line each way (or several, for an answer that streams).

    → {"operation": "key.list", "arguments": {}}
    ← {"result": …}    or {"part": …} lines before it, or {"error": "…", "exit_code": 1}

Owns the socket and the lines; what an operation does is `administration`'s and `app`'s.
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

from appliance.errors import ApplianceError, BadRequest, DataDirError, ServerUnreachable

log = logging.getLogger("appliance.admin")

LONGEST_PATH = 100  # of a Unix socket's address the kernel takes 107 bytes
LONGEST_LINE = 4 * 2**20
REQUEST_SECONDS = 10.0  # a request is written at once; whoever connects and says nothing is dropped

Handler = Callable[[str, dict[str, Any]], AsyncGenerator[dict[str, Any]]]


# ── where the socket is ──────────────────────────────────────────────────────────────────────────────────────────


def socket_path(data_dir: Path) -> Path:
    """`admin.sock` in the data directory, or in its owner's run directory when that path is too long.

    It follows from the directory alone, so that root and the owner, with whatever environment, mean the same socket.
    Raises DataDirError where somebody else could listen in its place.
    """
    real = os.path.realpath(data_dir)
    path = Path(real) / "admin.sock"
    if len(os.fsencode(path)) <= LONGEST_PATH:
        return path
    try:
        owner = os.stat(real).st_uid
    except OSError:
        owner = os.geteuid()
    name = hashlib.sha256(os.fsencode(real)).hexdigest()[:16]
    return _run_directory(owner) / f"appliance-{name}.sock"


def _run_directory(owner: int) -> Path:
    """A directory of `owner` alone; the one under /tmp may have to be made yet."""
    for candidate in (Path(f"/run/user/{owner}"), Path("/run/appliance")):
        if _is_private(candidate, owner):
            return candidate
    last = Path(f"/tmp/appliance-{owner}")
    if os.path.lexists(last) and not _is_private(last, owner):
        raise DataDirError(f"{last} belongs to somebody else, who could listen there: remove it.")
    return last


def _is_private(directory: Path, owner: int) -> bool:
    """Whether `directory` is one, not a link to one, and nobody but its owner can put anything into it."""
    try:
        found = directory.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == owner and not found.st_mode & 0o022


# ── the server's end ─────────────────────────────────────────────────────────────────────────────────────────────


class AdminServer:
    """Answers on the socket from `start` to `close`. `handle` yields the parts of an answer, the last one a result."""

    def __init__(self, path: Path, handle: Handler) -> None:
        self.path = path
        self._handle = handle
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """A socket that a killed server left behind is replaced: the caller holds the data directory's lock.

        Raises DataDirError where no socket can be made.
        """
        before = os.umask(0o177)
        try:
            self._make_directory()
            self.path.unlink(missing_ok=True)
            self._server = await asyncio.start_unix_server(self._serve, str(self.path), limit=LONGEST_LINE)
        except OSError as error:
            raise DataDirError(f"The admin socket {self.path} cannot be made: {error.strerror}.") from error
        finally:
            os.umask(before)

    def _make_directory(self) -> None:
        """The one under /tmp. Somebody who is faster makes this fail, and gains nothing."""
        directory = self.path.parent
        if not directory.exists():
            directory.mkdir()
            directory.chmod(0o700)

    async def close(self) -> None:
        """Whoever still waits for an answer is cut off; safe to call twice."""
        if self._server is None:
            return
        self._server.close()
        self._server = None
        self.path.unlink(missing_ok=True)
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            if _peer(writer.get_extra_info("socket")) in (0, os.geteuid()):
                await self._answer(reader, writer)
        except (ConnectionError, TimeoutError, asyncio.CancelledError):
            log.debug("an admin connection ended early")
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            self._open.discard(task)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """The work ends with its answer, or when the other end is gone."""
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                operation, arguments = _request(await reader.readline())
        except (ValueError, RecursionError, BadRequest):  # ValueError: not JSON, or a line beyond the cap
            return await _send(writer, _error("The request on the admin socket is malformed.", BadRequest.exit_code))
        gone = asyncio.ensure_future(reader.read(1))
        work = asyncio.ensure_future(self._write_parts(operation, arguments, writer))
        try:
            await asyncio.wait({gone, work}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (gone, work):
                task.cancel()
            await asyncio.gather(gone, work, return_exceptions=True)

    async def _write_parts(self, operation: str, arguments: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        try:
            async with contextlib.aclosing(self._handle(operation, arguments)) as parts:
                async for part in parts:
                    await _send(writer, part)
        except ApplianceError as error:
            await _send(writer, _error(error.message, error.exit_code))
        except ConnectionError:
            raise
        except Exception:
            log.exception("the admin operation %s failed", operation[:50])
            await _send(writer, _error("The operation failed; see the server's log.", 1))


def _request(line: bytes) -> tuple[str, dict[str, Any]]:
    match json.loads(line):
        case {"operation": str(operation), "arguments": dict(arguments)}:
            return operation, arguments
    raise BadRequest("An operation and its arguments are expected.")


def _error(message: str, exit_code: int) -> dict[str, Any]:
    return {"error": message, "exit_code": exit_code}


async def _send(writer: asyncio.StreamWriter, part: dict[str, Any]) -> None:
    writer.write(json.dumps(part).encode() + b"\n")
    await writer.drain()


def _peer(connection: socket.socket) -> int:
    """The user id at the other end."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])


# ── the commands' end ────────────────────────────────────────────────────────────────────────────────────────────


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
    """The parts of an answer as they come; closing the iterator ends the work.

    Raises ServerUnreachable, BadRequest, and RemoteError for what the server refused.
    """
    request = json.dumps({"operation": operation, "arguments": arguments}).encode() + b"\n"
    if len(request) > LONGEST_LINE:
        raise BadRequest("This is too long for one request.")
    ended = False
    with contextlib.closing(_connect(path)) as connection:
        for part in _parts(connection, request):
            if "error" in part:
                raise RemoteError(part["error"], part["exit_code"])
            ended = ended or "result" in part
            yield part
    if not ended:
        raise ServerUnreachable("The server ended before the operation did.")


def _parts(connection: socket.socket, request: bytes) -> Iterator[dict[str, Any]]:
    """Ends early when the server does: the caller notices that the result is missing."""
    with connection.makefile("rb") as file, contextlib.suppress(ConnectionError, json.JSONDecodeError):
        connection.sendall(request)
        for line in file:
            yield json.loads(line)


def _connect(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(str(path))
        if _peer(connection) not in (0, os.geteuid(), path.parent.stat().st_uid):
            raise PermissionError
    except OSError as error:
        connection.close()
        raise ServerUnreachable(f"No server answers at {path}.") from error
    return connection
