"""Reads a JSON body: size first, then type and encoding, then one strict parser, then the endpoint's struct.

Strict means: UTF-8, at most 64 levels, no NaN, no duplicate keys, no lone surrogates, no numbers of hundreds of digits.
Every refusal is one plain sentence; `wording` has those about fields.
"""

from __future__ import annotations

import asyncio
import codecs
import json
import math
import re
from typing import Any, NoReturn, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from appliance.api.wording import place, quoted, sentence
from appliance.errors import BadRequest, PayloadTooLarge, UnsupportedMediaType

T = TypeVar("T", bound=msgspec.Struct)

DEEPEST = 64
MOST_DIGITS = 40
OFF_THE_LOOP = 65_536  # bytes from which decoding goes to a thread


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
        raise BadRequest(sentence(str(error), value, struct), param=place(str(error))) from None


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
    if body.startswith(codecs.BOM_UTF8):
        raise BadRequest("The body begins with a byte order mark: send plain UTF-8.")
    try:
        value = _JSON.decode(body.decode("utf-8"))
    except UnicodeDecodeError:
        raise BadRequest("The body is not UTF-8.") from None
    except RecursionError:
        raise BadRequest(f"The JSON is nested deeper than {DEEPEST} levels.") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise BadRequest(f"The body is not JSON: {error.msg.lower()} at {where}.") from None
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
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise BadRequest(f"The field {quoted(twice)} stands twice in one object.")
    return found


def _no_constant(name: str) -> NoReturn:
    raise BadRequest(f"{name} is not a JSON number.")


def _whole(digits: str) -> int:
    # Python itself refuses some thousand digits, with another error; fields have tighter ranges of their own.
    if len(digits) > MOST_DIGITS:
        raise BadRequest(f"A whole number has {len(digits):,} characters; at most {MOST_DIGITS} are read.")
    return int(digits)


def _fraction(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise BadRequest(f"The number {digits[:20]} is too large.")
    return number


_JSON = json.JSONDecoder(
    object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=_whole, parse_float=_fraction
)


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > DEEPEST:
            raise BadRequest(f"The JSON is nested deeper than {DEEPEST} levels.")
        level = [
            child
            for node in level
            if isinstance(node, (dict, list))
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, (dict, list))
        ]
