"""Anthropic's Messages API under `/v1/messages`: what its clients send, and exactly what they expect back.

Unknown fields are ignored; a known one that cannot be honoured is refused by name. The forms are those of Anthropic's
reference and of its SDK of August 2026.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from functools import partial
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response

from appliance.api.body import read_json
from appliance.api.fields import Asker, AskingBody, stops
from appliance.api.openai import Part, begun, known_model, text_of
from appliance.api.render import json_reply
from appliance.api.services import Services
from appliance.chat import Answer
from appliance.errors import BadRequest
from appliance.messages import Chunk, CompletionRequest, FinishReason, Message, Usage

StopReason = Literal["end_turn", "max_tokens", "stop_sequence"]


class TurnBody(Struct):
    role: Literal["user", "assistant"]
    content: str | list[Part]


class CountBody(AskingBody, kw_only=True):
    """The request of `/v1/messages/count_tokens`, and what `/v1/messages` has in common with it."""

    model: str
    messages: Annotated[list[TurnBody], Meta(min_length=1, max_length=10_000)]
    system: str | list[Part] | None = None
    tools: list[Any] | None = None
    mcp_servers: list[Any] | None = None

    def conversation(self) -> tuple[Message, ...]:
        """Raises BadRequest for what is no text."""
        for name in ("tools", "mcp_servers"):
            if getattr(self, name):
                raise BadRequest(f"{name} is not supported here.", param=name)
        own = (Message("system", text_of(self.system, "system")),) if self.system else ()
        return own + tuple(
            Message(m.role, text_of(m.content, f"messages[{i}].content")) for i, m in enumerate(self.messages)
        )


class Format(Struct):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(Struct):
    """How the answer has to look; whatever else there is in it is ignored."""

    format: Format | None = None


class Thinking(Struct):
    type: str = "disabled"


class MessagesBody(CountBody, kw_only=True):
    """The request of `/v1/messages`."""

    max_tokens: Annotated[int, Meta(ge=1)]
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=1_000)] | None = None
    output_config: OutputConfig | None = None
    thinking: Thinking | None = None

    def schema(self) -> dict[str, Any] | None:
        wanted = self.output_config.format if self.output_config else None
        return wanted.schema if wanted else None


class TextBlock(Struct):
    text: str
    type: str = "text"
    citations: None = None


class UsageBody(Struct):
    """Tokens read from the cache are counted apart from those of the input, as there."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int = 0
    cache_creation_input_tokens: int = 0


class MessageReply(Struct):
    id: str
    model: str
    provider: str
    content: list[TextBlock]
    usage: UsageBody
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None
    role: str = "assistant"
    type: str = "message"


class CountReply(Struct):
    input_tokens: int


async def messages(request: Request, services: Services) -> Response:
    """Answers one message."""
    body, exchange = await begun(request, services, MessagesBody, message_request)
    name = f"msg_{request.state.request_id.removeprefix('req_')}"
    if body.stream:
        return await exchange.stream(partial(_events, name))
    answer, [done] = await exchange.whole()
    reason, stop = _stop(done.finish_reason, done.stop)
    usage = _usage(done.usage)
    return json_reply(MessageReply(name, answer.model, answer.provider, [TextBlock(done.text)], usage, reason, stop))


def message_request(body: MessagesBody, asker: Asker) -> CompletionRequest:
    """What the chat service is asked. Raises BadRequest."""
    if body.thinking is not None and body.thinking.type != "disabled":
        raise BadRequest("thinking is not supported here.", param="thinking")
    return asker.completion(
        body,
        body.conversation(),
        max_tokens=body.max_tokens,
        stop=stops(body.stop_sequences, "stop_sequences"),
        json_schema=body.schema(),
    )


async def count_tokens(request: Request, services: Services) -> Response:
    """How many tokens the conversation has for the model here, its template included."""
    body = await read_json(request, CountBody, services.config.server.max_body_bytes)
    known_model(services, body.model)
    return json_reply(CountReply(await services.local.count(body.conversation())))


async def _events(name: str, answer: Answer, chunks: AsyncIterator[Chunk]) -> AsyncGenerator[bytes]:
    """One message with one block of text; how much of the prompt was cached is known at the end only."""
    start = MessageReply(name, answer.model, answer.provider, [], UsageBody(answer.meter.asked, 0))
    yield _event("message_start", message=start)
    yield _event("content_block_start", index=0, content_block=TextBlock(""))
    async for chunk in chunks:
        if chunk.text:
            yield _event("content_block_delta", index=0, delta={"type": "text_delta", "text": chunk.text})
        if chunk.usage is not None:
            yield _event("content_block_stop", index=0)
            reason, stop = _stop(chunk.finish_reason or "stop", chunk.stop)
            delta = {"stop_reason": reason, "stop_sequence": stop}
            yield _event("message_delta", delta=delta, usage=_usage(chunk.usage))
    yield _event("message_stop")


def _event(kind: str, **fields: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), msgspec.json.encode({"type": kind, **fields}))


def _stop(finish: FinishReason, stop: str) -> tuple[StopReason, str | None]:
    if finish == "length":
        return "max_tokens", None
    return ("stop_sequence", stop) if stop else ("end_turn", None)


def _usage(usage: Usage) -> UsageBody:
    return UsageBody(usage.prompt_tokens - usage.cached_tokens, usage.completion_tokens, usage.cached_tokens)
