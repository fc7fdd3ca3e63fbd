"""The description of the API: every route is in it, it is made of the server's own types, and clients can read it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from appliance.api.endpoints import ENDPOINTS
from appliance.api.openapi import document
from tests.box import Box


@pytest.fixture(scope="module")
def described() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(document(ENDPOINTS)))
    return found


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def test_every_route_is_there_with_its_scope(described: dict[str, Any]) -> None:
    shown = {
        (method.upper(), path): operation.get("x-scope")
        for path, methods in described["paths"].items()
        for method, operation in methods.items()
    }
    table = {
        (row.method, path.replace("{name:path}", "{name}")): row.scope
        for row in ENDPOINTS
        for path in (row.path, *row.aliases)
    }
    assert shown == table
    assert all(op["summary"] for methods in described["paths"].values() for op in methods.values())


def test_every_reference_leads_somewhere(described: dict[str, Any]) -> None:
    found = set(references(described))
    assert len(found) > 20
    for reference in found:
        assert reference.rpartition("/")[2] in described["components"]["schemas"], reference


def test_bodies_and_errors_are_those_of_the_family(described: dict[str, Any]) -> None:
    def error(path: str, method: str) -> str:
        answer = described["paths"][path][method]["responses"]["429"]
        return str(answer["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2])

    assert error("/llm/chat", "post") == "SeedError"
    assert error("/v1/chat/completions", "post") == error("/openai/v1/models", "get") == "OpenAIError"
    assert error("/v1/messages", "post") == "AnthropicError"
    schemas = described["components"]["schemas"]
    body = described["paths"]["/llm/chat"]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    chat = schemas[body.rpartition("/")[2]]
    assert chat["required"] == ["messages"] and chat["properties"]["max_tokens"]["anyOf"][0]["minimum"] == 1
    assert chat["additionalProperties"] is False, "unknown fields are refused here"


def test_it_is_served_to_everybody(box: Box, described: dict[str, Any]) -> None:
    answer = box.get("/openapi.json", key=None)
    assert answer.status == 200 and answer.headers["content-type"] == "application/json"
    assert answer.json == described and answer.json["openapi"] == "3.1.0"
