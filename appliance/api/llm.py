"""`POST /llm/chat`: the seed's chat call. Reads and checks the body, calls the chat service, renders JSON or events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response

from appliance.api.answers import Exchange
from appliance.api.body import read_json
from appliance.api.services import Services
from appliance.chat import Answer
from appliance.errors import BadRequest
from appliance.messages import Caller, Chunk, CompletionRequest, FinishReason, Message, Role, Sampling, Usage

MOST_STOPS = 16
ANY_JSON_OBJECT: dict[str, Any] = {"type": "object"}


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
    provider: Annotated[str, Meta(min_length=1, max_length=40)] | None = None
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

    def stops(self) -> tuple[str, ...]:
        """The stop strings. Raises BadRequest for too many, empty or overlong ones."""
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stops) > MOST_STOPS:
            raise BadRequest(f"stop has {len(stops)} strings; at most {MOST_STOPS} are taken.")
        if any(not 0 < len(s) <= 500 for s in stops):
            raise BadRequest("Every stop string must have 1 to 500 characters.")
        return stops

    def sampling(self, defaults: Sampling) -> Sampling:
        """The defaults with what the request sets."""
        names = ("temperature", "top_p", "top_k", "min_p", "seed")
        return replace(defaults, **{n: v for n in names if (v := getattr(self, n)) is not None})


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
    request_id: str = request.state.request_id
    caller: Caller = request.state.caller
    asked = completion_request(body, caller, services.plans[caller.plan].weight, services.local.defaults, request_id)
    exchange = Exchange(request, services, asked, body.provider, body.fallback)
    if body.stream:
        return await exchange.stream(partial(_events, request_id))
    answer, [done] = await exchange.whole()
    reply = ChatReply(done.text, answer.provider, answer.model, usage_body(done.usage), done.finish_reason, request_id)
    return Response(msgspec.json.encode(reply), media_type="application/json")


def completion_request(
    body: ChatBody, caller: Caller, weight: float, defaults: Sampling, request_id: str
) -> CompletionRequest:
    """What the chat service is asked; `defaults` are the model's way of drawing."""
    return CompletionRequest(
        messages=tuple(Message(m.role, m.content) for m in body.messages),
        account=caller.account_id,
        weight=weight,
        sampling=body.sampling(defaults),
        max_tokens=body.max_tokens,
        stop=body.stops(),
        json_schema=body.response_format.constraint() if body.response_format else None,
        ignore_eos=body.ignore_eos,
        model=body.model or "",
        said=frozenset(name for name in ("temperature", "top_p") if getattr(body, name) is not None),
        request_id=request_id,
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
