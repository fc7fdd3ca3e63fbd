"""Reads a JSON body: size first, then type and encoding, then one strict parser, then the endpoint's struct.

Strict means: UTF-8, at most 64 levels, no NaN, no duplicate keys, no lone surrogates, no numbers of thousands of digits.
Every refusal is one plain sentence that names the field.
"""

from __future__ import annotations

import asyncio
import difflib
import json
import re
from typing import Any, NoReturn, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from appliance.errors import BadRequest, PayloadTooLarge, UnsupportedMediaType

T = TypeVar("T", bound=msgspec.Struct)

DEEPEST = 64
OFF_THE_LOOP = 65_536  # bytes from which decoding goes to a thread

_UNKNOWN = re.compile(r"Object contains unknown field `(?P<field>.*?)`(?: - at `(?P<path>.*)`)?", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<field>.*?)`(?: - at `(?P<path>.*)`)?", re.DOTALL)
_WRONG = re.compile(r"(?P<what>.*?)(?: - at `(?P<path>.*)`)?", re.DOTALL)
_WORDS = {
    "`int`": "a whole number", "`float`": "a number", "`str`": "a text", "`bool`": "true or false",
    "`object`": "an object", "`array`": "a list", "`null`": "null",
}  # fmt: skip


async def read_json(request: Request, struct: type[T], max_bytes: int) -> T:
    """The body as `struct`. Raises BadRequest, PayloadTooLarge or UnsupportedMediaType."""
    _check_headers(request, max_bytes)
    body = await _read(request, max_bytes)
    if len(body) > OFF_THE_LOOP:
        return await asyncio.to_thread(decode, body, struct)
    return decode(body, struct)


def decode(body: bytes, struct: type[T]) -> T:
    """`body` as `struct`; see the module."""
    value = _parse(body)
    try:
        return msgspec.convert(value, struct, strict=True)
    except msgspec.ValidationError as error:
        raise BadRequest(_sentence(str(error), struct)) from None


def _check_headers(request: Request, max_bytes: int) -> None:
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise UnsupportedMediaType("Compressed bodies are not read: send the JSON as it is.")
    kind, _, parameters = request.headers.get("content-type", "application/json").partition(";")
    if kind.strip().lower() != "application/json":
        raise UnsupportedMediaType('The body must be JSON: send the header "Content-Type: application/json".')
    charset = re.search(r"charset=\"?([^\";\s]+)", parameters.lower())
    if charset and charset[1] not in ("utf-8", "utf8", "us-ascii"):
        raise UnsupportedMediaType("JSON is UTF-8: other charsets are not read.")
    if int(request.headers.get("content-length", "0")) > max_bytes:
        _too_large(max_bytes)


async def _read(request: Request, max_bytes: int) -> bytes:
    parts, size = [], 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > max_bytes:
            _too_large(max_bytes)
        if not message.get("more_body", False):
            return b"".join(parts)


def _too_large(max_bytes: int) -> NoReturn:
    # Closing spares us from reading the rest only to throw it away.
    raise PayloadTooLarge(f"The body is larger than {max_bytes:,} bytes.", headers={"Connection": "close"})


def _parse(body: bytes) -> Any:
    if not body.strip():
        raise BadRequest("The request has no body: send a JSON object.")
    try:
        value = json.loads(body.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise BadRequest("The body is not UTF-8.") from None
    except RecursionError:
        raise BadRequest(f"The JSON is nested deeper than {DEEPEST} levels.") from None
    except json.JSONDecodeError as error:
        raise BadRequest(
            f"The body is not JSON: {error.msg.lower()} at line {error.lineno}, column {error.colno}."
        ) from None
    except ValueError:
        raise BadRequest("A number in the JSON has too many digits.") from None
    _check_depth(value)
    try:
        if b"\\u" in body:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise BadRequest("The JSON holds a lone surrogate, which is no character.") from None
    if not isinstance(value, dict):
        raise BadRequest("The body must be a JSON object.")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BadRequest(f"The field {_quoted(twice)} stands twice in one object.")
    return found


def _no_constant(name: str) -> NoReturn:
    raise BadRequest(f"{name} is not a JSON number.")


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > DEEPEST + 1:
            raise BadRequest(f"The JSON is nested deeper than {DEEPEST} levels.")
        level = [
            child
            for node in level
            if isinstance(node, (dict, list))
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, (dict, list))
        ]


def _sentence(problem: str, struct: type[msgspec.Struct]) -> str:
    """msgspec's finding in plain words."""
    if match := _UNKNOWN.fullmatch(problem):
        field, at = match["field"], match["path"]
        close = difflib.get_close_matches(field, _fields(struct), 1, 0.5)
        hint = f"; did you mean {_quoted(close[0])}?" if close else "."
        return f"Unknown field {_quoted(field)}{_at(at)}{hint}"
    if match := _MISSING.fullmatch(problem):
        return f"The field {_quoted(match['field'])} is missing{_at(match['path'])}."
    match = _WRONG.fullmatch(problem)
    assert match is not None
    path = _path(match["path"]) or "The body"
    return f"{path}: {_plain(match['what'])}."


def _plain(what: str) -> str:
    for marked, words in _WORDS.items():
        what = what.replace(marked, words)
    what = what.replace(" | ", " or ").replace("`", "")
    return what[:1].lower() + what[1:300]


def _path(path: str | None) -> str:
    """`$.messages[...].role` as `messages[].role`."""
    return (path or "").removeprefix("$").removeprefix(".").replace("[...]", "[]")


def _at(path: str | None) -> str:
    return f" in {_path(path)}" if _path(path) else ""


def _fields(struct: type[msgspec.Struct]) -> list[str]:
    """The names of the struct and of those inside it."""
    schema = msgspec.json.schema(struct)
    parts = [schema, *schema.get("$defs", {}).values()]
    return [name for part in parts for name in part.get("properties", {})]


def _quoted(name: str) -> str:
    return '"' + "".join(c if c.isprintable() else "?" for c in name[:60]) + '"'
