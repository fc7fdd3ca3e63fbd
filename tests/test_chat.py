"""Who answers: policy, patience and failures decide, before the first chunk; and what of it is noted."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import pytest

from appliance.chat import Answer, Chat, Elsewhere, Wish
from appliance.errors import (
    ApplianceError,
    BadRequest,
    Draining,
    Forbidden,
    ModelNotReady,
    PromptTooLong,
    Saturated,
    Unavailable,
)
from appliance.messages import Chunk, CompletionRequest, Message, Sampling, Usage

REQUEST = CompletionRequest((Message("user", "Hello"),), "acc")


class Scripted:
    """A provider that says its name, or fails; `after` so many chunks."""

    def __init__(self, name: str, error: ApplianceError | None = None, after: int = 0) -> None:
        self.name = name
        self.error = error
        self.after = after
        self.asked = 0
        self.closed = 0
        self.seconds = 0.0
        self.refusal: Unavailable | None = None
        self.destination = f"{name} there.test"

    def model_for(self, request: CompletionRequest) -> str:
        return f"model of {self.name}"

    def wait(self) -> float:
        return self.seconds

    async def complete(self, request: CompletionRequest) -> AsyncGenerator[Chunk]:
        self.asked += 1
        request.meter.bytes_out += 100
        try:
            for n in range(3):
                if self.error is not None and n == self.after:
                    raise self.error
                request.meter.bytes_in += 10
                yield Chunk(self.name)
            yield Chunk("", 0, "stop", Usage(1, 3))
        finally:
            self.closed += 1


class Stage:
    """A chat service between three scripted providers, and what it noted."""

    def __init__(self, *, configured: bool = True) -> None:
        self.local, self.groq, self.other = Scripted("local"), Scripted("groq"), Scripted("other")
        self.noted: list[tuple[str, int, int, str]] = []
        others: dict[str, Elsewhere] = {"groq": self.groq, "other": self.other} if configured else {}
        self.chat = Chat(self.local, others, self._note)

    def _note(self, request: CompletionRequest, wish: Wish, other: Elsewhere, reason: str) -> None:
        self.noted.append((other.destination, request.meter.bytes_out, request.meter.bytes_in, reason))

    def ask(self, **wish: Any) -> tuple[Answer, str]:
        async def all() -> tuple[Answer, str]:
            answer, first = await self.chat.begin(REQUEST, Wish(**wish))
            return answer, first.text + "".join([chunk.text async for chunk in answer.chunks])

        return asyncio.run(all())

    def served(self, **wish: Any) -> tuple[str, str]:
        """Who answered, and why if it is another than was asked for; one model's text is never in another's."""
        answer, text = self.ask(**wish)
        assert text == answer.provider * 3 and answer.model == f"model of {answer.provider}"
        return answer.provider, answer.reason


@pytest.mark.parametrize("prompts", ["never", "if-saturated", "allowed"])
def test_who_has_time_answers_here(prompts: str) -> None:
    stage = Stage()
    assert stage.served(prompts=prompts) == ("local", "")
    assert stage.served(prompts=prompts, provider="local") == ("local", "")
    assert stage.groq.asked == 0 and stage.noted == []


def test_a_busy_box_overflows_where_that_is_allowed() -> None:
    stage = Stage()
    stage.local.seconds = 10.5
    assert stage.served(prompts="if-saturated") == ("groq", "saturated")
    assert stage.served(prompts="allowed") == ("groq", "saturated")
    assert stage.served(prompts="if-saturated", patience=30) == ("local", "")
    assert stage.noted == [("groq there.test", 100, 30, "saturated")] * 2
    for wish in (
        {"prompts": "never"},
        {"provider": "local", "prompts": "allowed"},
        {"fallback": False, "prompts": "allowed"},
    ):
        assert stage.served(**wish) == ("local", ""), "stays, however long it takes"
    assert len(stage.noted) == 2


def test_calls_do_not_go_to_and_fro() -> None:
    stage = Stage()
    for seconds, who in ((9.9, "local"), (10.1, "groq"), (9.0, "groq"), (5.1, "groq"), (4.9, "local"), (9.0, "local")):
        stage.local.seconds = seconds
        assert stage.served(prompts="if-saturated")[0] == who, seconds


def test_without_a_model_here_the_other_answers_where_that_is_allowed() -> None:
    stage = Stage()
    stage.local.seconds, stage.local.error = math.inf, ModelNotReady("It is being loaded.")
    assert stage.served(prompts="if-saturated") == ("groq", "saturated")
    with pytest.raises(ModelNotReady):
        stage.served(prompts="never")
    stage.local.seconds, stage.local.error = 0.0, Saturated("The line is full.")
    assert stage.served(prompts="allowed") == ("groq", "unavailable")


def test_a_request_that_is_wrong_is_wrong_here_and_goes_nowhere() -> None:
    stage = Stage()
    stage.local.error = PromptTooLong(9, 5)
    with pytest.raises(PromptTooLong):
        stage.served(prompts="allowed")
    assert stage.groq.asked == 0


@pytest.mark.parametrize("name", ["groq", "other"])
def test_a_provider_is_named_where_that_is_allowed(name: str) -> None:
    stage = Stage()
    assert stage.served(provider=name, prompts="allowed") == (name, "")
    assert stage.served(provider=name, prompts="allowed", fallback=False) == (name, "")
    assert stage.noted == [(f"{name} there.test", 100, 30, "asked")] * 2
    assert stage.served(provider=name, prompts="never") == ("local", "policy")
    assert stage.served(provider=name, prompts="if-saturated") == ("local", "policy")
    stage.local.seconds = 11
    overflows = ("groq", "") if name == "groq" else ("local", "policy")  # only one helps out
    assert stage.served(provider=name, prompts="if-saturated") == overflows
    with pytest.raises(Forbidden, match="set-egress"):
        stage.served(provider=name, prompts="never", fallback=False)
    assert len(stage.noted) == 2 + (name == "groq")


def test_what_is_not_there_cannot_be_named() -> None:
    stage = Stage(configured=False)
    assert stage.served(provider="groq", prompts="allowed") == ("local", "not-configured")
    with pytest.raises(Unavailable, match="not configured"):
        stage.served(provider="groq", prompts="allowed", fallback=False)
    with pytest.raises(BadRequest, match="auto, local, groq"):
        stage.served(provider="openai")
    with pytest.raises(BadRequest, match="auto, local, groq, other"):
        Stage().served(provider="openai", fallback=False)


def test_who_fails_before_a_word_is_followed_by_the_next() -> None:
    stage = Stage()
    stage.groq.error = Unavailable("groq did not answer as it should.")
    assert stage.served(provider="groq", prompts="allowed") == ("local", "unavailable")
    with pytest.raises(Unavailable, match="did not answer"):
        stage.served(provider="groq", prompts="allowed", fallback=False)
    stage.local.seconds = 11
    assert stage.served(prompts="if-saturated") == ("local", "")
    assert [row[1:] for row in stage.noted] == [(100, 0, "asked"), (100, 0, "asked"), (100, 0, "saturated")]
    stage.local.error = Saturated("The line is full.")
    with pytest.raises(Unavailable, match="did not answer"):
        stage.served(prompts="if-saturated")


@pytest.mark.parametrize(
    ("field", "value"),
    [("n", 2), ("prompt", "Once"), ("logprobs", 0), ("ignore_eos", True), ("logit_bias", ((5, 1.0),))],
)
def test_what_only_this_box_can_do_goes_nowhere_else(field: str, value: Any) -> None:
    stage = Stage()
    stage.local.seconds = 11
    sampling = Sampling(logit_bias=value) if field == "logit_bias" else Sampling()
    request = replace(REQUEST, sampling=sampling) if field == "logit_bias" else replace(REQUEST, **{field: value})
    for wish in (Wish(prompts="allowed"), Wish("groq", prompts="allowed")):
        answer, _ = asyncio.run(stage.chat.begin(request, wish))
        assert answer.provider == "local"
    with pytest.raises(BadRequest) as refused:
        asyncio.run(stage.chat.begin(request, Wish("groq", fallback=False, prompts="allowed")))
    assert refused.value.param == field and stage.groq.asked == 0
    assert stage.served(prompts="allowed") == ("groq", "saturated"), "the control"


def test_a_server_that_stops_sends_nobody_elsewhere() -> None:
    stage = Stage()
    stage.local.error = Draining("The server is stopping.", retry_after=5)
    with pytest.raises(Draining):
        stage.served(prompts="allowed")
    assert stage.groq.asked == 0


def test_every_try_is_told_before_it_begins() -> None:
    stage = Stage()
    stage.groq.error, told = Unavailable("groq did not answer as it should."), list[str]()

    async def begin() -> None:
        wish = Wish("groq", prompts="allowed")
        await stage.chat.begin(REQUEST, wish, lambda answer: told.append(f"{answer.provider} {stage.local.asked}"))

    asyncio.run(begin())
    assert told == ["groq 0", "local 0"]


def test_a_provider_that_has_no_room_is_not_even_tried() -> None:
    stage = Stage()
    stage.local.seconds, stage.groq.refusal = 11, Unavailable("groq has no room.")
    assert stage.served(prompts="if-saturated") == ("local", "") and stage.groq.asked == 0


def test_after_a_word_an_error_is_an_error() -> None:
    stage = Stage()
    stage.groq.error, stage.groq.after = Unavailable("groq did not answer as it should."), 2

    async def read() -> list[str]:
        answer, first = await stage.chat.begin(REQUEST, Wish("groq", prompts="allowed"))
        texts = [first.text]
        with pytest.raises(Unavailable):
            async for chunk in answer.chunks:
                texts.append(chunk.text)
        return texts

    assert asyncio.run(read()) == ["groq", "groq"] and stage.local.asked == 0
    assert stage.noted == [("groq there.test", 100, 20, "asked")]


def test_an_answer_that_is_left_alone_is_closed_and_noted() -> None:
    stage = Stage()

    async def leave() -> None:
        answer, _ = await stage.chat.begin(REQUEST, Wish("groq", prompts="allowed"))
        assert stage.noted == [], "not at its end yet"
        await answer.chunks.aclose()

    asyncio.run(leave())
    assert stage.groq.closed == 1 and stage.noted == [("groq there.test", 100, 10, "asked")]


def test_each_try_has_a_meter_of_its_own() -> None:
    stage = Stage()
    stage.groq.error = Unavailable("groq did not answer as it should.")
    answer, _ = stage.ask(provider="groq", prompts="allowed")
    assert answer.provider == "local" and answer.meter.bytes_out == 100 and REQUEST.meter.bytes_out == 0
