"""Reading JSON bodies: what is refused, in which words, and that hostile bodies cost neither a crash nor time."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Annotated, Any, Literal

import msgspec
import pytest
from msgspec import Meta, Struct
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message

from appliance.api.body import decode, read_json
from appliance.errors import ApplianceError, BadRequest, PayloadTooLarge, UnsupportedMediaType


class Turn(Struct, forbid_unknown_fields=True):
    role: Literal["system", "user"]
    content: Annotated[str, Meta(max_length=70)]


class Body(Struct, forbid_unknown_fields=True):
    turns: Annotated[list[Turn], Meta(min_length=1, max_length=1_000)]
    most: Annotated[int, Meta(ge=1)] | None = None
    heat: Annotated[float, Meta(ge=0, le=2)] | None = None
    share: Annotated[float, Meta(gt=0, le=1)] | None = None
    stop: str | list[str] | None = None
    counts: dict[str, int] | None = None
    stream: bool = False
    schema: dict[str, Any] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None


TURNS = [{"role": "user", "content": "x"}]
TOO_LONG = "turns[0].content must be a text of at most 70 characters, "


def turn(**fields: Any) -> dict[str, Any]:
    return {"turns": [fields]}


def refusal(body: bytes | Any) -> str:
    """The sentence with which a body is refused."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(BadRequest) as caught:
        decode(data, Body)
    assert type(caught.value) is BadRequest
    assert "`" not in caught.value.message and len(caught.value.message) < 300
    caught.value.message.encode()  # no surrogate got through
    return caught.value.message


def test_a_good_body_is_read() -> None:
    body = {"turns": TURNS, "most": 5, "heat": 1, "stop": ["a"], "stream": True, "schema": {"a": [1.5, None, "\u00e4"]}}
    read = decode(json.dumps(body).encode(), Body)
    assert read == Body([Turn("user", "x")], 5, 1.0, None, ["a"], None, True, {"a": [1.5, None, "\u00e4"]}, None)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"most": "5"}, 'most must be a whole number of at least 1, not the text "5".'),
        ({"most": True}, "most must be a whole number of at least 1, not true."),
        ({"most": 1.5}, "most must be a whole number of at least 1, not 1.5."),
        ({"most": -1}, "most must be a whole number of at least 1, not -1."),
        ({"most": [5]}, "most must be a whole number of at least 1, not a list of 1."),
        ({"heat": "hot"}, 'heat must be a number from 0 to 2, not the text "hot".'),
        ({"heat": 2.5}, "heat must be a number from 0 to 2, not 2.5."),
        ({"heat": False}, "heat must be a number from 0 to 2, not false."),
        ({"share": 0}, "share must be a number above 0 and of at most 1, not 0."),
        ({"stream": None}, "stream must be true or false, not null."),
        ({"stream": 1}, "stream must be true or false, not 1."),
        ({"stop": 5}, "stop must be a text or a list, not 5."),
        ({"stop": ["a", 5]}, "stop[1] must be a text, not 5."),
        ({"counts": {"a": "b"}}, "counts[...] must be a whole number."),
        ({"schema": []}, "schema must be an object, not an empty list."),
        ({"turns": None}, "turns must be a list of 1 to 1,000 entries, not null."),
        ({"turns": []}, "turns must be a list of 1 to 1,000 entries, not an empty list."),
        ({"turns": ["x"]}, 'turns[0] must be an object, not the text "x".'),
        (turn(content="x"), 'The field "role" is missing in turns[0].'),
        ({"turns": [*TURNS, {"role": "w"}]}, 'turns[1].role must be one of system, user, not the text "w".'),
        (turn(role="user", content={}), TOO_LONG + "not an object."),
        (turn(role="user", content="x" * 71), TOO_LONG + "not a text of 71 characters."),
        (turn(role="user", content="x", name=1), 'Unknown field "name" in turns[0]; the nearest name is "content".'),
        (turn(role="user", contents=1), 'Unknown field "contents" in turns[0]; did you mean "content"?'),
        ({"heats": 1}, 'Unknown field "heats"; did you mean "heat"?'),
        ({"x` - at `$.turns[9]": 1}, 'Unknown field "x` - at `$.turns[9]"; the nearest name is "turns".'),
    ],
)  # fmt: skip
def test_a_wrong_field_is_said_in_plain_words(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadRequest) as caught:
        decode(json.dumps({"turns": TURNS} | fields).encode(), Body)
    assert caught.value.message == sentence


def test_a_missing_field_is_named() -> None:
    assert refusal({}) == 'The field "turns" is missing.'


def test_a_long_or_strange_name_is_shown_short() -> None:
    message = refusal({"turns": TURNS, "\x1b[31m" + "x" * 10_000: 1})
    assert "\x1b" not in message and '"?[31mxxx' in message


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "no body"),
        (b" \r\n ", "no body"),
        (b"hello", "not JSON"),
        (b'{"turns":', "not JSON"),
        (b'{"turns":[],}', "not JSON"),
        (b'{"turns":[]} x', "not JSON"),
        (b"{'turns':[]}", "not JSON"),
        (b'{"turns":"a\nb"}', "not JSON"),
        (b'{"turns":01}', "not JSON"),
        (b"[]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b"5", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b'\xef\xbb\xbf{"turns":[]}', "byte order mark"),
        ('{"turns":[]}'.encode("utf-16"), "not UTF-8"),
        (b'{"turns":"\xff"}', "not UTF-8"),
        (b'{"turns":"\xed\xa0\x80"}', "not UTF-8"),
        (b'{"turns":"\\ud800"}', "surrogate"),
        (b'{"\\udc00":1}', "surrogate"),
        (b'{"heat":NaN}', "NaN is not a JSON number"),
        (b'{"heat":-Infinity}', "-Infinity is not a JSON number"),
        (b'{"heat":1e999}', "too large"),
        (b'{"schema":{"maximum":1e400}}', "too large"),
        (b'{"most":' + b"9" * 41 + b"}", "at most 40"),
        (b'{"most":' + b"9" * 5_000 + b"}", "at most 40"),
        (b'{"most":-' + b"9" * 500_000 + b"}", "at most 40"),
        (b'{"most":1,"most":2}', '"most" stands twice'),
        (b'{"schema":{"a":{"b":1,"\\u0062":2}}}', '"b" stands twice'),
        (b"[" * 100_000, "deeper than 64"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "deeper than 64"),
        (b'{"a":' + b"[" * 64 + b"]" * 64 + b"}", "deeper than 64"),
    ],
    ids=lambda part: repr(part)[:40],
)
def test_what_is_not_strict_json_is_refused(body: bytes, says: str) -> None:
    assert says in refusal(body)


def test_64_levels_are_read() -> None:
    deep = b'{"turns":[{"role":"user","content":"x"}],"schema":' + b'{"a":' * 62 + b"[]" + b"}" * 62 + b"}"
    assert decode(deep, Body).schema


def test_a_number_over_a_fields_range_names_the_field() -> None:
    assert refusal({"turns": TURNS, "seed": 2**70}).startswith("seed must be a whole number from -9,2")


def test_a_pair_of_surrogates_is_a_character() -> None:
    read = decode(b'{"turns":[{"role":"user","content":"\\ud83d\\ude00"}]}', Body)
    assert read.turns[0].content == "\U0001f600"


def test_a_repeated_field_among_many_is_found_in_no_time() -> None:
    names = ",".join(f'"{i}":1' for i in range(200_000))
    started = time.monotonic()
    assert '"z" stands twice' in refusal(("{" + names + ',"z":1,"z":2}').encode())
    assert time.monotonic() - started < 2


def request(*parts: bytes, headers: dict[str, str] | None = None, gone: bool = False) -> Request:
    """A request whose body arrives in these parts; `gone`: the client goes before the end."""
    messages: list[Message] = [{"type": "http.request", "body": p, "more_body": True} for p in parts]
    messages.append({"type": "http.disconnect"} if gone else {"type": "http.request", "body": b"", "more_body": False})

    async def receive() -> Message:
        return messages.pop(0)

    named = [(k.replace("_", "-").encode(), v.encode()) for k, v in (headers or {}).items()]
    return Request({"type": "http", "method": "POST", "headers": named}, receive)


GOOD = json.dumps({"turns": TURNS}).encode()


def read(asked: Request, max_bytes: int = 1_000) -> Body:
    return asyncio.run(read_json(asked, Body, max_bytes))


@pytest.mark.parametrize(
    "kind", [None, "application/json", "Application/JSON; charset=UTF-8", 'application/json;charset="utf-8"']
)
def test_json_with_and_without_a_type_is_read(kind: str | None) -> None:
    headers = {"content_type": kind} if kind else {}
    assert read(request(GOOD[:5], GOOD[5:], headers=headers)).turns


@pytest.mark.parametrize(
    ("headers", "error", "says"),
    [
        ({"content_type": "application/x-www-form-urlencoded"}, UnsupportedMediaType, "Content-Type: application/json"),
        ({"content_type": "text/plain"}, UnsupportedMediaType, "Content-Type: application/json"),
        ({"content_type": "application/json; charset=latin-1"}, UnsupportedMediaType, "UTF-8"),
        ({"content_encoding": "gzip"}, UnsupportedMediaType, "ompressed"),
        ({"content_encoding": "identity, br"}, UnsupportedMediaType, "ompressed"),
        ({"content_length": "1001"}, PayloadTooLarge, "1,000 bytes"),
    ],
)
def test_headers_are_refused_before_the_body_is_read(
    headers: dict[str, str], error: type[ApplianceError], says: str
) -> None:
    asked = request(gone=True, headers=headers)  # reading would raise ClientDisconnect
    with pytest.raises(error, match=says):
        read(asked)


def test_a_body_over_the_cap_is_refused_while_it_is_counted() -> None:
    with pytest.raises(PayloadTooLarge):
        read(request(b" " * 600, b" " * 600, gone=True))
    assert read(request(b" " * (1_000 - len(GOOD)), GOOD)).turns


def test_a_client_that_goes_in_mid_body_is_noticed() -> None:
    with pytest.raises(ClientDisconnect):
        read(request(GOOD[:9], gone=True))


def test_a_large_body_does_not_hold_up_the_event_loop() -> None:
    names = ",".join(f'"{i}":{{}}' for i in range(400_000))
    body = f'{{"turns":[{{"role":"user","content":"x"}}],"schema":{{{names}}}}}'.encode()

    async def longest_gap() -> float:
        reading = asyncio.ensure_future(read_json(request(body), Body, len(body)))
        gap, last = 0.0, time.perf_counter()
        while not reading.done():
            await asyncio.sleep(0.001)
            now = time.perf_counter()
            gap, last = max(gap, now - last), now
        assert msgspec.structs.asdict(reading.result())["schema"]
        return gap

    started = time.perf_counter()
    gap = asyncio.run(longest_gap())
    assert gap < (time.perf_counter() - started) / 2  # on the loop, one gap would be nearly all of it
