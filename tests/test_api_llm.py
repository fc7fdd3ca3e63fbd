"""What a body of `/llm/chat` asks the chat service for."""

from __future__ import annotations

import json

import pytest

from appliance.api.body import decode
from appliance.api.fields import Asker
from appliance.api.llm import ChatBody, completion_request
from appliance.messages import CompletionRequest, Message, Sampling

DEFAULTS = Sampling()


def asked(weight: float = 1.0, **fields: object) -> CompletionRequest:
    body = {"messages": [{"role": "user", "content": "Hello"}]} | fields
    asker = Asker("acc_1", weight, DEFAULTS, "req_1")
    return completion_request(decode(json.dumps(body).encode(), ChatBody), asker)


def test_the_defaults_are_the_documented_ones() -> None:
    request = asked()
    assert request.messages == (Message("user", "Hello"),)
    assert request.sampling == Sampling(temperature=0.7, top_k=40, top_p=0.95, min_p=0.05, seed=None)
    assert (request.max_tokens, request.stop, request.json_schema, request.ignore_eos) == (None, (), None, False)
    assert (request.account, request.request_id, request.lane) == ("acc_1", "req_1", "interactive")


def test_the_plans_weight_arrives() -> None:
    assert asked(4.0).weight == 4.0


def test_every_field_arrives() -> None:
    request = asked(temperature=0, top_p=0.5, top_k=3, min_p=0, seed=-7, max_tokens=5, stop="x", ignore_eos=True)
    assert request.sampling == Sampling(temperature=0, top_p=0.5, top_k=3, min_p=0, seed=-7)
    assert (request.max_tokens, request.stop, request.ignore_eos) == (5, ("x",), True)


def test_the_models_own_way_of_drawing_is_the_default_and_no_more() -> None:
    body = decode(json.dumps({"messages": [{"role": "user", "content": "Hi"}], "top_p": 0.5}).encode(), ChatBody)
    own = Sampling(temperature=0.0, top_p=0.8, repeat_penalty=1.1)
    request = completion_request(body, Asker("acc_1", 1.0, own, "req_1"))
    assert request.sampling == Sampling(temperature=0.0, top_p=0.5, repeat_penalty=1.1)


def test_null_is_leaving_out() -> None:
    assert asked(temperature=None, max_tokens=None, stop=None, seed=None, provider=None) == asked()


@pytest.mark.parametrize(
    ("given", "schema"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_schema", "schema": {"type": "array"}}, {"type": "array"}),
        ({"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "array"}}}, {"type": "array"}),
    ],
)
def test_a_response_format_becomes_a_schema(given: object, schema: object) -> None:
    assert asked(response_format=given).json_schema == schema
