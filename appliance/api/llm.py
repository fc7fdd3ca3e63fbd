"""`POST /llm/chat`: the seed's chat call. Reads and checks the body, calls the chat service, renders JSON or events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from functools import partial
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response

from appliance.api.answers import Exchange
from appliance.api.body import read_json
from appliance.api.fields import ANY_JSON_OBJECT, Asker, ProviderName, stops
from appliance.api.render import json_reply
from appliance.api.services import Services
from appliance.chat import Answer
from appliance.errors import BadRequest
from appliance.messages import Chunk, CompletionRequest, FinishReason, Message, Role, Usage


class MessageBody(Struct, forbid_unknown_fields=True):
    """One turn."""

    role: Role
    content: str


class JsonSchema(Struct, forbid_unknown_fields=True):
    """OpenAI's wrapper around a schema; `strict` is always on here."""

    schema: dict[str, Any]
    name: str = ""
    description: str = ""
    strict: bool = True


class ResponseFormat(Struct, forbid_unknown_fields=True):
    """`{"type":"json_schema","json_schema":{"schema":{…}}}`, the same without the inner wrapper, or a plain kind."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema: dict[str, Any] | None = None

    def constraint(self) -> dict[str, Any] | None:
        """The schema that the answer must match, if any."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return ANY_JSON_OBJECT
        schema = self.json_schema.schema if self.json_schema else self.schema
        if schema is None:
            raise BadRequest('response_format of type "json_schema" needs json_schema.schema.')
        return schema


class ChatBody(Struct, forbid_unknown_fields=True):
    """The request of `/llm/chat`."""

    messages: Annotated[list[MessageBody], Meta(min_length=1, max_length=10_000)]
    provider: ProviderName | None = None
    model: Annotated[str, Meta(max_length=200)] | None = None
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=1_000)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    stop: str | list[str] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stream: bool = False
    response_format: ResponseFormat | None = None
    fallback: bool = True
    ignore_eos: bool = False


class UsageBody(Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int


class ChatReply(Struct):
    """The seed's reply with additive fields."""

    text: str
    provider: str
    model: str
    usage: UsageBody
    finish_reason: FinishReason
    request_id: str


class Delta(Struct):
    delta: str


class Done(Struct, kw_only=True):
    """The last event of a stream."""

    done: bool = True
    text: str
    provider: str
    model: str
    usage: UsageBody
    finish_reason: FinishReason
    request_id: str


async def chat(request: Request, services: Services) -> Response:
    """Answers one chat completion."""
    body = await read_json(request, ChatBody, services.config.server.max_body_bytes)
    asker = Asker.of(request, services)
    exchange = Exchange(request, services, completion_request(body, asker), body.provider, body.fallback)
    if body.stream:
        return await exchange.stream(partial(_events, asker.request_id))
    answer, [done] = await exchange.whole()
    usage = usage_body(done.usage)
    reply = ChatReply(done.text, answer.provider, answer.model, usage, done.finish_reason, asker.request_id)
    return json_reply(reply)


def completion_request(body: ChatBody, asker: Asker) -> CompletionRequest:
    """What the chat service is asked."""
    return asker.completion(
        body,
        [Message(m.role, m.content) for m in body.messages],
        max_tokens=body.max_tokens,
        stop=stops(body.stop),
        json_schema=body.response_format.constraint() if body.response_format else None,
        ignore_eos=body.ignore_eos,
    )


def usage_body(usage: Usage) -> UsageBody:
    return UsageBody(usage.prompt_tokens, usage.completion_tokens, usage.total_tokens, usage.cached_tokens)


async def _events(request_id: str, answer: Answer, chunks: AsyncIterator[Chunk]) -> AsyncGenerator[bytes]:
    """A delta per chunk, and the whole answer at the end."""
    texts: list[str] = []
    async for chunk in chunks:
        if chunk.text:
            texts.append(chunk.text)
            yield _event(Delta(chunk.text))
        if chunk.usage is not None:
            assert chunk.finish_reason is not None
            usage, text = usage_body(chunk.usage), "".join(texts)
            yield _event(
                Done(
                    text=text, provider=answer.provider, model=answer.model, usage=usage,
                    finish_reason=chunk.finish_reason, request_id=request_id,
                )
            )  # fmt: skip


def _event(body: Struct) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"
