"""OpenAI's, Groq's and Anthropic's own Python SDKs against a real process: each takes what the other says.

Their ordinary calls: plain, streamed, lists of models, parsed output, errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import groq
import openai
import pydantic
import pytest

from tests.box import Box

MODEL = "tiny"
HELLO: Any = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def client(box: Box) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{box.port}/v1", api_key=box.key, max_retries=0) as made:
        yield made


@pytest.fixture
def claude(box: Box) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=f"http://127.0.0.1:{box.port}", api_key=box.key, max_retries=0) as made:
        yield made


# ── OpenAI ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_models_are_listed_and_found(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert (model.id, model.object, model.owned_by) == (MODEL, "model", "local") and model.created > 1_700_000_000
    assert client.models.retrieve(MODEL) == model
    with pytest.raises(openai.NotFoundError, match="there is tiny") as refused:
        client.models.retrieve("meta-llama/Llama-3.3-70B")  # a slash in the name
    assert refused.value.code == "model_not_found" and refused.value.param == "model"


def test_a_chat_is_answered(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model=MODEL, messages=HELLO, max_completion_tokens=8)
    [choice] = reply.choices
    assert reply.object == "chat.completion" and reply.id.startswith("chatcmpl-") and reply.model == MODEL
    assert choice.message.role == "assistant" and choice.message.content and choice.finish_reason == "length"
    assert reply.usage and reply.usage.completion_tokens == 8
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 8
    assert reply.usage.prompt_tokens_details and reply.usage.prompt_tokens_details.cached_tokens is not None
    assert reply._request_id


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    asked: Any = {"model": MODEL, "messages": HELLO, "max_tokens": 20, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert len({(c.id, c.created, c.model, c.object) for c in chunks}) == 1
    assert all(len(c.choices) == 1 and c.usage is None for c in chunks), "clients look at choices[0]"
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content == ""
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["length"]


def test_the_usage_of_a_stream_comes_where_it_is_asked_for(client: openai.OpenAI) -> None:
    with client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=5, stream=True, stream_options={"include_usage": True}
    ) as stream:
        *others, last = stream
    assert not last.choices and last.usage and last.usage.completion_tokens == 5
    assert all(c.usage is None for c in others)


def test_several_choices_with_log_probabilities(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=6, n=3, seed=7, logprobs=True, top_logprobs=2
    )
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in reply.choices}) > 1
    for choice in reply.choices:
        assert choice.logprobs and choice.logprobs.content and len(choice.logprobs.content) == 6
        assert "".join(t.token for t in choice.logprobs.content) == choice.message.content
        for token in choice.logprobs.content:
            assert token.bytes == list(token.token.encode()) and token.logprob <= 0 and len(token.top_logprobs) == 2
            assert token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob


def test_several_choices_in_one_stream(client: openai.OpenAI) -> None:
    texts, ends = ["", ""], ["", ""]
    for chunk in client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=6, n=2, seed=7, stream=True):
        [choice] = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        ends[choice.index] += choice.finish_reason or ""
    whole = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=6, n=2, seed=7)
    assert texts == [choice.message.content for choice in whole.choices] and ends == ["length", "length"]


class Verdict(pydantic.BaseModel):
    good: bool
    mark: Literal["fine", "poor"]


def test_an_answer_is_parsed_into_a_type(client: openai.OpenAI) -> None:
    reply = client.chat.completions.parse(
        model=MODEL, messages=HELLO, response_format=Verdict, max_tokens=300, seed=1, logit_bias={"5": -1}
    )
    parsed = reply.choices[0].message.parsed
    assert isinstance(parsed, Verdict) and parsed.mark in ("fine", "poor")


def test_content_may_come_in_parts_and_developers_are_systems(client: openai.OpenAI) -> None:
    parts: Any = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
    ]
    plain: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    first, second = (
        client.chat.completions.create(model=MODEL, messages=messages, max_tokens=9, temperature=0)
        for messages in (parts, plain)
    )
    assert first.choices[0].message.content == second.choices[0].message.content


def test_a_text_is_continued(client: openai.OpenAI) -> None:
    asked: Any = {"model": MODEL, "prompt": "The river", "max_tokens": 9, "temperature": 0}
    reply = client.completions.create(**asked, logprobs=2)
    [choice] = reply.choices
    assert reply.object == "text_completion" and choice.finish_reason == "length"
    assert choice.logprobs and choice.logprobs.tokens and "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.text_offset and choice.logprobs.text_offset[:2] == [0, len(choice.logprobs.tokens[0])]
    streamed = list(client.completions.create(**asked, stream=True))
    assert "".join(c.choices[0].text for c in streamed) == choice.text
    assert streamed[-1].choices[0].finish_reason == "length"


def test_a_response_is_answered(client: openai.OpenAI) -> None:
    reply = client.responses.create(model=MODEL, input="Hello", instructions="Be brief.", max_output_tokens=9)
    assert reply.object == "response" and reply.id.startswith("resp_") and reply.model == MODEL
    assert reply.output_text and reply.status == "incomplete"
    assert reply.incomplete_details and reply.incomplete_details.reason == "max_output_tokens"
    assert reply.usage and reply.usage.output_tokens == 9
    assert reply.usage.total_tokens == reply.usage.input_tokens + 9 and reply.instructions == "Be brief."
    turns: Any = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
    ]
    again = client.responses.create(model=MODEL, input=turns, max_output_tokens=9, temperature=0)
    plain = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
        max_tokens=9,
        temperature=0,
    )
    assert again.output_text == plain.choices[0].message.content


def test_a_response_is_streamed_event_by_event(client: openai.OpenAI) -> None:
    asked: Any = {"model": MODEL, "input": "Hello", "max_output_tokens": 20, "temperature": 0}
    whole = client.responses.create(**asked)
    events = list(client.responses.create(**asked, stream=True))
    assert [e.sequence_number for e in events] == list(range(len(events)))
    kinds = [e.type for e in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert events[-1].type == "response.incomplete" and events[-1].response.output_text == text == whole.output_text


def test_a_response_is_parsed_into_a_type(client: openai.OpenAI) -> None:
    asked: Any = {"model": MODEL, "input": "Hello", "text_format": Verdict, "max_output_tokens": 300}
    assert isinstance(client.responses.parse(**asked).output_parsed, Verdict)
    with client.responses.stream(**asked) as stream:
        final = stream.until_done().get_final_response()
    assert final.status == "completed" and isinstance(final.output_parsed, Verdict)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"background": True}, "background"),
        ({"input": []}, "input"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input[0]"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0].type",
        ),
        ({"model": "gpt-5"}, "model"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    ],
)
def test_a_response_that_cannot_be_is_refused_by_name(
    client: openai.OpenAI, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        client.responses.create(**({"model": MODEL, "input": "Hello"} | fields))
    assert refused.value.param == param and refused.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "kind", "param"),
    [
        ({"model": "gpt-4o"}, openai.NotFoundError, "model"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, openai.BadRequestError, "messages[0].role"),
        ({"messages": [{"content": "x"}]}, openai.BadRequestError, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, openai.BadRequestError, "messages[0]"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            openai.BadRequestError,
            "messages[0].content[0].type",
        ),
        ({"n": 0}, openai.BadRequestError, "n"),
        ({"n": 1_000}, openai.BadRequestError, "n"),
        ({"temperature": 2.5}, openai.BadRequestError, "temperature"),
        ({"temperature": "hot"}, openai.BadRequestError, "temperature"),
        ({"logit_bias": {"5": 101}}, openai.BadRequestError, "logit_bias[...]"),
        ({"logit_bias": {"hello": 1}}, openai.BadRequestError, "logit_bias"),
        ({"stop": [""]}, openai.BadRequestError, "stop"),
        ({"stop": ["x"] * 17}, openai.BadRequestError, "stop"),
        ({"top_logprobs": 2}, openai.BadRequestError, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, openai.BadRequestError, "stream_options"),
        ({"tools": [{"type": "function"}]}, openai.BadRequestError, "tools"),
        ({"modalities": ["audio"]}, openai.BadRequestError, "modalities"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    client: openai.OpenAI, fields: dict[str, Any], kind: type[openai.APIStatusError], param: str
) -> None:
    with pytest.raises(kind) as refused:
        client.chat.completions.create(**({"model": MODEL, "messages": HELLO} | fields))
    error = refused.value
    assert (error.param, error.type) == (param, "invalid_request_error") and isinstance(error.code, str)
    assert isinstance(error.body, dict) and error.body["message"].endswith(".") and error.request_id


def test_a_prompt_that_does_not_fit_says_by_how_much(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "word " * 100_000}])
    assert refused.value.code == "context_length_exceeded"
    assert isinstance(refused.value.body, dict)
    assert refused.value.body["n_prompt_tokens"] > refused.value.body["n_ctx"] > 0


def test_unknown_fields_are_ignored(client: openai.OpenAI) -> None:
    more: Any = {
        "store": True,
        "metadata": {"a": "b"},
        "service_tier": "flex",
        "parallel_tool_calls": True,
        "user": "me",
    }
    assert client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=2, **more).choices


def test_wrong_keys_paths_and_methods_have_openais_form(client: openai.OpenAI, box: Box) -> None:
    with pytest.raises(openai.AuthenticationError) as refused:
        client.with_options(api_key="oai_" + "x" * 32).models.list()
    assert (refused.value.code, refused.value.type) == ("invalid_api_key", "authentication_error")
    with pytest.raises(openai.NotFoundError) as missing:
        client.get("/images/generations", cast_to=object)
    assert missing.value.type == "invalid_request_error"
    answer = box.get("/v1/chat/completions")
    assert answer.status == 405 and answer.headers["allow"] == "POST" and answer.json["error"]["code"] == "bad_request"
    answer = box.request("POST", "/v1/chat/completions", b"{", headers={"Content-Type": "application/json"})
    assert answer.status == 400 and answer.json["error"]["type"] == "invalid_request_error"
    answer = box.request("POST", "/v1/chat/completions", b"x", headers={"Content-Type": "text/plain"})
    assert answer.status == 415 and answer.json["error"]["message"]


def test_limits_are_told_as_openai_tells_them(client: openai.OpenAI) -> None:
    headers = client.models.with_raw_response.list().headers
    assert headers["x-ratelimit-limit-requests"] == headers["X-RateLimit-Limit"]
    assert headers["x-ratelimit-remaining-requests"] == headers["X-RateLimit-Remaining"]
    assert headers["x-ratelimit-reset-requests"].removesuffix("s").isdigit()


# ── Groq ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_groqs_sdk_is_answered(box: Box) -> None:
    with groq.Groq(base_url=f"http://127.0.0.1:{box.port}", api_key=box.key, max_retries=0) as client:
        assert [model.id for model in client.models.list().data] == [MODEL]
        reply = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=4)
        assert reply.choices[0].message.content
        stream = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=4, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        with pytest.raises(groq.NotFoundError) as refused:
            client.chat.completions.create(model="llama3-70b-8192", messages=HELLO)
        assert isinstance(refused.value.body, dict) and refused.value.body["error"]["code"] == "model_not_found"


# ── Anthropic ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_message_is_answered(claude: anthropic.Anthropic) -> None:
    reply = claude.messages.create(model=MODEL, max_tokens=8, messages=HELLO, system="Be brief.")
    [block] = reply.content
    assert reply.type == "message" and reply.role == "assistant" and block.type == "text" and block.text
    assert reply.stop_reason == "max_tokens" and reply.stop_sequence is None
    assert reply.usage.output_tokens == 8
    counted = claude.messages.count_tokens(model=MODEL, messages=HELLO, system="Be brief.")
    assert counted.input_tokens == reply.usage.input_tokens + (reply.usage.cache_read_input_tokens or 0)


def test_a_message_stream_is_put_together(claude: anthropic.Anthropic) -> None:
    asked: Any = {"model": MODEL, "max_tokens": 12, "messages": HELLO, "extra_body": {"temperature": 0}}
    whole = claude.messages.create(**asked)
    with claude.messages.stream(**asked) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert [b.text for b in whole.content if b.type == "text"] == [text]
    assert (
        [b.text for b in final.content if b.type == "text"] == [text]
        and final.stop_reason == "max_tokens"
        and final.usage.output_tokens == 12
    )


def test_a_stop_sequence_is_named(claude: anthropic.Anthropic) -> None:
    whole = claude.messages.create(model=MODEL, max_tokens=30, messages=HELLO, extra_body={"temperature": 0})
    assert whole.content[0].type == "text"
    stop = whole.content[0].text[5:8]
    reply = claude.messages.create(
        model=MODEL,
        max_tokens=30,
        messages=HELLO,
        stop_sequences=["never said", stop],
        extra_body={"temperature": 0},
    )
    assert (reply.stop_reason, reply.stop_sequence) == ("stop_sequence", stop)
    assert reply.content[0].type == "text" and stop not in reply.content[0].text


def test_refusals_have_anthropics_form(claude: anthropic.Anthropic, box: Box) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        claude.messages.create(model="claude", max_tokens=8, messages=HELLO)
    assert isinstance(missing.value.body, dict) and missing.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.BadRequestError, match="text, not image"):
        image: Any = [{"role": "user", "content": [{"type": "image", "source": {}}]}]
        claude.messages.create(model=MODEL, max_tokens=8, messages=image)
    with pytest.raises(anthropic.AuthenticationError):
        claude.with_options(api_key="oai_" + "x" * 32).messages.create(model=MODEL, max_tokens=8, messages=HELLO)
    body = {"model": MODEL, "messages": HELLO}
    answer = box.request("POST", "/v1/messages", body)
    assert answer.status == 400 and "max_tokens" in answer.json["error"]["message"]
    assert answer.json["type"] == "error" and answer.json["request_id"]


@pytest.mark.parametrize(
    ("headers", "bearer", "status"),
    [
        ({"X-Api-Key": "{key}"}, False, 200),
        ({"X-Api-Key": "{key}"}, True, 200),
        ({}, True, 200),
        ({"X-Api-Key": "oai_" + "x" * 32}, True, 401),
        ({"X-Api-Key": "oai_" + "x" * 32}, False, 401),
        ({"X-Api-Key": ""}, True, 401),
    ],
)
def test_the_key_may_come_in_anthropics_header(box: Box, headers: dict[str, str], bearer: bool, status: int) -> None:
    given = {name: value.format(key=box.key) for name, value in headers.items()}
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 2}
    key = box.key if bearer else None
    assert box.request("POST", "/v1/messages", body, key=key, headers=given).status == status
    elsewhere = box.request("POST", "/v1/chat/completions", body, key=key, headers=given).status
    assert elsewhere == (200 if bearer else 401), "nowhere else"
