"""`GET /openapi.json`: OpenAPI 3.1 of every route, from the table of endpoints and the types that the handlers use."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Protocol

import msgspec
from msgspec import Struct

from appliance import __version__
from appliance.api.render import Family, family

REFERENCE = "#/components/schemas/{name}"
REFUSALS = ("401", "403", "404", "429", "500", "503")
_PARAMETER = re.compile(r"\{(\w+)(?::\w+)?\}")


class Described(Protocol):
    """What a row of the table of endpoints says."""

    @property
    def method(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def aliases(self) -> tuple[str, ...]: ...
    @property
    def handler(self) -> Any: ...
    @property
    def scope(self) -> str | None: ...
    @property
    def body(self) -> type[Struct] | None: ...
    @property
    def reply(self) -> type[Struct] | None: ...
    @property
    def query(self) -> tuple[str, ...]: ...
    @property
    def queues(self) -> bool: ...


class SeedError(Struct):
    """An error of `/llm` and `/api`."""

    success: Literal[False]
    error: str
    code: str
    request_id: str
    retry_after: int | None = None


class OpenAIErrorBody(Struct):
    message: str
    type: str
    param: str | None
    code: str


class OpenAIError(Struct):
    """An error of `/v1`."""

    error: OpenAIErrorBody
    request_id: str


class AnthropicErrorBody(Struct):
    type: str
    message: str


class AnthropicError(Struct):
    """An error of `/v1/messages`."""

    type: Literal["error"]
    error: AnthropicErrorBody
    request_id: str


ERRORS: dict[Family, type[Struct]] = {"seed": SeedError, "openai": OpenAIError, "anthropic": AnthropicError}


def document(endpoints: Iterable[Described]) -> dict[str, Any]:
    """The whole document as JSON types."""
    rows = list(endpoints)
    types = [*dict.fromkeys(t for row in rows for t in (row.body, row.reply) if t is not None), *ERRORS.values()]
    references, schemas = msgspec.json.schema_components(types, ref_template=REFERENCE)
    refer = dict(zip(types, references, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for row in rows:
        for path in (row.path, *row.aliases):
            paths.setdefault(_PARAMETER.sub(r"{\1}", path), {})[row.method.lower()] = _operation(row, path, refer)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Appliance", "version": __version__, "license": {"name": "Apache-2.0"}},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "key": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "An API key, oai_ and 32 letters or digits.",
                },
                "x-api-key": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
            },
        },
    }


def _operation(row: Described, path: str, refer: Mapping[type[Struct], Any]) -> dict[str, Any]:
    described = (row.handler.__doc__ or "").strip().split("\n")[0]
    answer: dict[str, Any] = {"description": "The answer."}
    if row.reply is not None:
        answer["content"] = {"application/json": {"schema": refer[row.reply]}}
        if row.queues:
            answer["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    found: dict[str, Any] = {"summary": described, "responses": {"200": answer}}
    errors = REFUSALS if row.scope is not None else ("404", "429", "503")
    error = {"description": "A refusal.", "content": {"application/json": {"schema": refer[ERRORS[family(path)]]}}}
    found["responses"] |= {status: error for status in (*(("400",) if row.body else ()), *errors)}
    if row.body is not None:
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": refer[row.body]}}}
    if row.scope is not None:
        found["security"] = [{"key": []}] + ([{"x-api-key": []}] if family(path) == "anthropic" else [])
        found["x-scope"] = row.scope
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in _PARAMETER.findall(path)
    ] + [{"name": name, "in": "query", "schema": {"type": "string"}} for name in row.query]
    return found | ({"parameters": parameters} if parameters else {})
