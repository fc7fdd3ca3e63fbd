"""OpenAI's Responses API at `/v1/responses`, without state: nothing is stored, so nothing can be referred to later.

The forms are those of OpenAI's reference and of its SDKs of August 2026.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response

from appliance.api.fields import ANY_JSON_OBJECT, Asker, AskingBody
from appliance.api.openai import ROLES, Part, begun, text_of
from appliance.api.render import json_reply
from appliance.api.services import Services
from appliance.chat import Answer
from appliance.errors import BadRequest
from appliance.messages import Chunk, CompletionRequest, FinishReason, Message, Sampling, Usage

Status = Literal["in_progress", "completed", "incomplete"]


class Item(Struct):
    """One item of the input: a message."""

    type: str = "message"
    role: str = ""
    content: str | list[Part] | None = None


class Format(Struct):
    type: Literal["text", "json_object", "json_schema"] = "text"
    schema: dict[str, Any] | None = None


class TextBody(Struct):
    format: Format = msgspec.field(default_factory=Format)


class ResponsesBody(AskingBody, kw_only=True):
    """The request."""

    input: str | Annotated[list[Item], Meta(min_length=1, max_length=10_000)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Meta(ge=1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    stream: bool | None = None
    text: TextBody | None = None
    metadata: dict[str, str] | None = None
    tools: list[Any] | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None
    prompt: Any = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    include: list[str] | None = None

    def refuse_what_is_not_done(self) -> None:
        """Known fields that cannot be honoured. Raises BadRequest with the field's name."""
        for name in ("tools", "previous_response_id", "conversation", "background", "prompt", "top_logprobs"):
            if getattr(self, name):
                raise BadRequest(f"{name} is not supported here.", param=name)
        if "message.output_text.logprobs" in (self.include or ()):
            raise BadRequest("Log-probabilities are not included here.", param="include")

    def conversation_in_all(self) -> tuple[Message, ...]:
        own = (Message("system", self.instructions),) if self.instructions else ()
        if isinstance(self.input, str):
            return (*own, Message("user", self.input))
        return own + tuple(_message(item, i) for i, item in enumerate(self.input))

    def schema(self) -> dict[str, Any] | None:
        wanted = self.text.format if self.text else Format()
        if wanted.type == "text":
            return None
        if wanted.type == "json_object":
            return ANY_JSON_OBJECT
        if wanted.schema is None:
            raise BadRequest('text.format of type "json_schema" needs a schema.', param="text.format.schema")
        return wanted.schema


def _message(item: Item, i: int) -> Message:
    if item.type != "message" or item.role not in ROLES:
        raise BadRequest("The input here is messages of system, developer, user or assistant.", param=f"input[{i}]")
    return Message(ROLES[item.role], text_of(item.content, f"input[{i}].content"))


class OutputText(Struct):
    text: str = ""
    type: str = "output_text"
    annotations: list[Any] = []
    logprobs: list[Any] = []


class OutputMessage(Struct):
    id: str
    content: list[OutputText]
    status: Status = "completed"
    role: str = "assistant"
    type: str = "message"


class InputDetails(Struct):
    cached_tokens: int


class OutputDetails(Struct):
    reasoning_tokens: int = 0


class UsageBody(Struct):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class Incomplete(Struct):
    reason: str = "max_output_tokens"


class Reply(Struct, kw_only=True):
    """A response, finished or under way."""

    id: str
    created_at: int
    model: str
    provider: str
    status: Status = "in_progress"
    output: list[OutputMessage] = []
    usage: UsageBody | None = None
    incomplete_details: Incomplete | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    metadata: dict[str, str] = {}
    error: None = None
    previous_response_id: None = None
    parallel_tool_calls: bool = False
    store: bool = False
    tool_choice: str = "none"
    tools: list[Any] = []
    truncation: str = "disabled"
    text: dict[str, Any] = {}
    object: str = "response"


async def responses(request: Request, services: Services) -> Response:
    """Answers one response."""
    body, exchange = await begun(request, services, ResponsesBody, response_request)
    about = _About(request.state.request_id.removeprefix("req_"), int(time.time()), body, exchange.asked.sampling)
    if body.stream:
        return await exchange.stream(partial(_events, about))
    answer, [done] = await exchange.whole()
    return json_reply(about.finished(answer, done.text, done.finish_reason, done.usage))


def response_request(body: ResponsesBody, asker: Asker) -> CompletionRequest:
    """What the chat service is asked. Raises BadRequest."""
    body.refuse_what_is_not_done()
    most, schema = body.max_output_tokens, body.schema()
    return asker.completion(body, body.conversation_in_all(), max_tokens=most, json_schema=schema)


@dataclass(frozen=True, slots=True)
class _About:
    """What a reply says of its request."""

    id: str
    created: int
    body: ResponsesBody
    sampling: Sampling

    def begun(self, answer: Answer) -> Reply:
        wanted = self.body.text.format.type if self.body.text else "text"
        return Reply(
            id=f"resp_{self.id}", created_at=self.created, model=answer.model, provider=answer.provider,
            instructions=self.body.instructions, max_output_tokens=self.body.max_output_tokens,
            temperature=self.sampling.temperature, top_p=self.sampling.top_p, metadata=self.body.metadata or {},
            text={"format": {"type": wanted}},
        )  # fmt: skip

    def message(self, text: str | None, status: Status) -> OutputMessage:
        return OutputMessage(f"msg_{self.id}", [] if text is None else [OutputText(text)], status)

    def finished(self, answer: Answer, text: str, finish: FinishReason, usage: Usage) -> Reply:
        reply = self.begun(answer)
        reply.status = "completed" if finish == "stop" else "incomplete"
        reply.incomplete_details = None if finish == "stop" else Incomplete()
        reply.output = [self.message(text, reply.status)]
        cached, reasoned = InputDetails(usage.cached_tokens), OutputDetails()
        counts = (usage.prompt_tokens, cached, usage.completion_tokens, reasoned, usage.total_tokens)
        reply.usage = UsageBody(*counts)
        return reply


async def _events(about: _About, answer: Answer, chunks: AsyncIterator[Chunk]) -> AsyncGenerator[bytes]:
    """One message with one part, whose texts come piece by piece; every event is numbered."""
    number = 0

    def event(kind: str, **fields: Any) -> bytes:
        nonlocal number
        body = msgspec.json.encode({"type": kind, "sequence_number": number, **fields})
        number += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), body)

    item = {"item_id": f"msg_{about.id}", "output_index": 0, "content_index": 0}
    yield event("response.created", response=about.begun(answer))
    yield event("response.in_progress", response=about.begun(answer))
    yield event("response.output_item.added", output_index=0, item=about.message(None, "in_progress"))
    yield event("response.content_part.added", **item, part=OutputText())
    texts: list[str] = []
    async for chunk in chunks:
        if chunk.text:
            texts.append(chunk.text)
            yield event("response.output_text.delta", **item, delta=chunk.text, logprobs=[])
        if chunk.usage is not None:
            text = "".join(texts)
            reply = about.finished(answer, text, chunk.finish_reason or "stop", chunk.usage)
            yield event("response.output_text.done", **item, text=text, logprobs=[])
            yield event("response.content_part.done", **item, part=OutputText(text))
            yield event("response.output_item.done", output_index=0, item=reply.output[0])
            yield event(f"response.{reply.status}", response=reply)
