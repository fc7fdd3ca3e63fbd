"""What a text stream emits is exactly the text before its earliest stop string, however the bytes are cut."""

from __future__ import annotations

import time

from hypothesis import example, given
from hypothesis import strategies as st

from appliance.engine.text import TextStream

LETTERS = st.text(st.sampled_from("abé🙂\n"), max_size=30)
STOPS = st.lists(st.text(st.sampled_from("abé🙂\n"), min_size=1, max_size=6), max_size=4)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(c % (len(data) + 1) for c in cuts), len(data)]
    return [data[a:b] for a, b in zip(edges, edges[1:], strict=False)]


def emitted(stream: TextStream, parts: list[bytes]) -> str:
    return "".join([stream.feed(p) for p in parts] + [stream.finish()])


def before_stop(text: str, stops: list[str]) -> str:
    return text[: min((text.find(s) for s in stops if s in text), default=len(text))]


@given(LETTERS, STOPS, st.lists(st.integers(0, 1_000), max_size=40))
@example("abab", ["abc", "ba"], [])
@example("aaaab", ["aaab"], [1, 2, 3, 4])
@example("ababac", ["abac"], [1, 2, 3, 4, 5])
@example("abc", ["abcd", "bc"], [1, 2])
def test_emits_the_text_before_the_earliest_stop_string(text: str, stops: list[str], cuts: list[int]) -> None:
    stream = TextStream(stops)
    assert emitted(stream, pieces(text.encode(), cuts)) == before_stop(text, stops)
    assert stream.stopped == any(s in text for s in stops)
    if stream.stopped:
        assert stream.feed(b"more") + stream.finish() == ""


@given(st.binary(max_size=40), st.lists(st.integers(0, 1_000), max_size=40))
def test_any_bytes_decode_as_a_whole_decode_would(data: bytes, cuts: list[int]) -> None:
    assert emitted(TextStream(), pieces(data, cuts)) == data.decode("utf-8", "replace")


@given(LETTERS, STOPS)
def test_holds_back_no_more_than_may_be_a_stop_string(text: str, stops: list[str]) -> None:
    stream = TextStream(stops)
    shown = ""
    for i, character in enumerate(text):
        shown += stream.feed(character.encode())
        if stream.stopped:
            break
        held = text[len(shown) : i + 1]
        assert not held or any(s.startswith(held) or held.startswith(s) or s in held for s in stops)


def test_a_stop_string_over_several_tokens_shows_at_no_time() -> None:
    stream = TextStream(["STOP"])
    assert [stream.feed(p) for p in (b"ok S", b"T", b"O", b"x S", b"TO", b"P!")] == ["ok ", "", "", "STOx ", "", ""]
    assert stream.stopped


def test_a_code_point_over_several_tokens_is_shown_once_it_is_whole() -> None:
    stream = TextStream()
    assert [stream.feed(bytes([b])) for b in "🙂".encode()] == ["", "", "", "🙂"]


def test_the_stop_string_that_begins_first_wins_over_the_one_that_is_complete_first() -> None:
    stream = TextStream(["abcd", "bc"])
    assert stream.feed(b"xabc") == "x"
    assert not stream.stopped  # "abcd" may still come, and would begin earlier
    assert stream.feed(b"d") == ""
    assert stream.stopped


def test_an_end_in_the_middle_settles_what_was_pending() -> None:
    pending = TextStream(["abcd", "bc"])
    assert pending.feed(b"xabc") + pending.finish() == "xa"
    assert pending.stopped
    harmless = TextStream(["abcd"])
    assert harmless.feed(b"xabc") + harmless.finish() == "xabc"
    assert not harmless.stopped


def test_the_cost_of_a_token_does_not_grow_with_the_text_or_the_stop_string() -> None:
    stop = "a" * 100_000 + "b"
    stream = TextStream([stop, *(f"{i}-never" for i in range(15))])
    started = time.perf_counter()
    for _ in range(20_000):
        stream.feed(b"aaaa")
    assert time.perf_counter() - started < 5  # quadratic work would take minutes
