"""OpenAI's API under `/v1`: what its clients send, and exactly what they expect back. Decides nothing by itself.

Unknown fields are ignored, as OpenAI's clients send many; a known one that cannot be honoured is refused by name. The
forms are those of OpenAI's reference and of its SDKs of August 2026.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from appliance.api.answers import Exchange
from appliance.api.body import read_json
from appliance.api.fields import ANY_JSON_OBJECT, Asker, AskingBody, stops
from appliance.api.render import json_reply
from appliance.api.services import Services
from appliance.chat import Answer, Completion
from appliance.errors import BadRequest, ModelNotFound
from appliance.messages import Chunk, CompletionRequest, FinishReason, Message, Role, TokenLogprob, Usage

STARTED = int(time.time())  # clients want a date of each model; a file's own says nothing
USUAL_COMPLETION = 16  # tokens of a plain completion that names no number, as OpenAI's
MOST_CHOICES, MOST_TOP = 16, 20
LEAST_LOGPROB = -9999.0
DONE = b"data: [DONE]\n\n"
B = TypeVar("B", bound=AskingBody)
ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


# ── models ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class ModelBody(Struct):
    """One model."""

    id: str
    created: int = msgspec.field(default_factory=lambda: STARTED)
    owned_by: str = "local"
    object: str = "model"


class ModelsReply(Struct):
    data: list[ModelBody]
    object: str = "list"


async def models(request: Request, services: Services) -> Response:
    """The models that answer here."""
    return json_reply(ModelsReply([ModelBody(name) for name in _names(services)]))


async def model(request: Request, services: Services) -> Response:
    """One of them; its name may hold slashes."""
    return json_reply(ModelBody(_named(services, request.path_params["name"])))


def _names(services: Services) -> list[str]:
    """Raises ModelNotReady while there is none."""
    return [services.local.loaded.name]


def _named(services: Services, name: str) -> str:
    names = _names(services)
    if name not in names:
        there = ", ".join(names)
        raise ModelNotFound(f"There is no model {name[:100]!r} here; there is {there}.", param="model")
    return name


def known_model(services: Services, name: str | None, provider: str | None = None) -> None:
    """Raises ModelNotFound for a `name` that no model here has. A `provider` elsewhere has its own names, and while
    none is loaded here, the chat service says so, or asks one elsewhere."""
    if name is not None and services.local.ready and provider in (None, "auto", "local"):
        _named(services, name)


# ── what is asked ────────────────────────────────────────────────────────────────────────────────────────────────────


class Part(Struct):
    """One part of a message's content."""

    type: str
    text: str = ""


class MessageBody(Struct):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None


class JsonSchema(Struct):
    """OpenAI's wrapper around a schema; `strict` is always on here."""

    schema: dict[str, Any] = msgspec.field(default_factory=lambda: ANY_JSON_OBJECT)


class ResponseFormat(Struct):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(Struct):
    include_usage: bool = False


class SamplingBody(AskingBody, kw_only=True):
    """What chat and plain completions have in common, besides what they ask about."""

    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | list[str] | None = None
    n: Annotated[int, Meta(ge=1, le=MOST_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # ours, and those of other servers that speak this API
    top_k: Annotated[int, Meta(ge=0, le=1_000)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    ignore_eos: bool = False

    def check_stream(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise BadRequest("stream_options belongs to stream: true.", param="stream_options")

    @property
    def tells_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def completion(self, asker: Asker, messages: Sequence[Message], **fields: Any) -> CompletionRequest:
        """What the chat service is asked. Raises BadRequest."""
        self.check_stream()
        asked = asker.completion(
            self, messages, stop=stops(self.stop), n=self.n or 1, ignore_eos=self.ignore_eos, **fields
        )
        return replace(asked, sampling=replace(asked.sampling, logit_bias=tuple(self._biases())))

    def _biases(self) -> Iterable[tuple[int, float]]:
        for token, bias in (self.logit_bias or {}).items():
            if not token.isascii() or not token.isdigit() or len(token) > 9:
                raise BadRequest("logit_bias maps token numbers to biases from -100 to 100.", param="logit_bias")
            yield int(token), bias


class ChatBody(SamplingBody, kw_only=True):
    """The request of `/v1/chat/completions`."""

    messages: Annotated[list[MessageBody], Meta(min_length=1, max_length=10_000)]
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MOST_TOP)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    function_call: Any = None
    modalities: list[str] | None = None
    audio: Any = None
    web_search_options: Any = None

    def refuse_what_is_not_done(self) -> None:
        """Known fields that cannot be honoured. Raises BadRequest with the field's name."""
        for name in ("tools", "functions", "audio", "web_search_options"):
            if getattr(self, name):
                raise BadRequest(f"{name} is not supported here.", param=name)
        if self.modalities not in (None, ["text"]):
            raise BadRequest("The model here takes and gives text only.", param="modalities")
        if self.top_logprobs is not None and not self.logprobs:
            raise BadRequest("top_logprobs needs logprobs: true.", param="top_logprobs")

    def conversation(self) -> tuple[Message, ...]:
        return tuple(
            Message(_role(m, i), text_of(m.content, f"messages[{i}].content")) for i, m in enumerate(self.messages)
        )

    def schema(self) -> dict[str, Any] | None:
        wanted = self.response_format
        if wanted is None or wanted.type == "text":
            return None
        if wanted.type == "json_object":
            return ANY_JSON_OBJECT
        if wanted.json_schema is None:
            raise BadRequest(
                'response_format of type "json_schema" needs json_schema.', param="response_format.json_schema"
            )
        return wanted.json_schema.schema


def _role(message: MessageBody, i: int) -> Role:
    if message.role not in ROLES:
        raise BadRequest(
            f"The role {message.role} answers a call of a tool, and there is none.", param=f"messages[{i}]"
        )
    return ROLES[message.role]


def text_of(content: str | list[Part] | None, where: str) -> str:
    """The text of the content that stands at `where`. Raises BadRequest for parts that are no text."""
    if isinstance(content, list):
        for j, part in enumerate(content):
            if part.type not in ("text", "input_text", "output_text", "refusal"):
                kind = part.type[:30]
                raise BadRequest(f"The model here takes text, not {kind}.", param=f"{where}[{j}].type")
        return "".join(part.text for part in content)
    return content or ""


def chat_request(body: ChatBody, asker: Asker) -> CompletionRequest:
    """What the chat service is asked. Raises BadRequest."""
    body.refuse_what_is_not_done()
    return body.completion(
        asker,
        body.conversation(),
        max_tokens=body.max_completion_tokens or body.max_tokens,
        json_schema=body.schema(),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )


class CompletionBody(SamplingBody, kw_only=True):
    """The request of `/v1/completions`: one text, or the tokens of one, to be continued as it is."""

    prompt: str | list[str | int | list[int]]
    logprobs: Annotated[int, Meta(ge=0, le=MOST_TOP)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None

    def one_prompt(self) -> str | tuple[int, ...]:
        found = self.prompt
        if isinstance(found, list) and len(found) == 1 and not isinstance(found[0], int):
            [found] = found  # type: ignore[assignment]
        if isinstance(found, str):
            return found
        numbers = [token for token in found if isinstance(token, int)]
        if not found or len(numbers) != len(found):
            raise BadRequest("prompt must be one text, or one list of tokens, here.", param="prompt")
        return tuple(numbers)

    def refuse_what_is_not_done(self) -> None:
        """Known fields that cannot be honoured. Raises BadRequest with the field's name."""
        for name in ("echo", "suffix"):
            if getattr(self, name):
                raise BadRequest(f"{name} is not supported here.", param=name)
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise BadRequest("best_of is not supported here, unless it equals n.", param="best_of")


def text_request(body: CompletionBody, asker: Asker) -> CompletionRequest:
    """What the chat service is asked. Raises BadRequest."""
    body.refuse_what_is_not_done()
    most = body.max_tokens or USUAL_COMPLETION
    return body.completion(asker, (), prompt=body.one_prompt(), max_tokens=most, logprobs=body.logprobs)


# ── what is answered ─────────────────────────────────────────────────────────────────────────────────────────────────


class TopBody(Struct):
    token: str
    logprob: float
    bytes: list[int]


class LogprobBody(TopBody):
    top_logprobs: list[TopBody]


class LogprobsBody(Struct):
    content: list[LogprobBody]
    refusal: None = None


class PromptDetails(Struct):
    cached_tokens: int


class CompletionDetails(Struct):
    reasoning_tokens: int = 0


class UsageBody(Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class ReplyMessage(Struct):
    content: str | None
    role: str = "assistant"
    refusal: None = None


class ChoiceBody(Struct):
    index: int
    message: ReplyMessage
    finish_reason: FinishReason
    logprobs: LogprobsBody | None


class ChatReply(Struct):
    id: str
    created: int
    model: str
    choices: list[ChoiceBody]
    usage: UsageBody
    provider: str
    object: str = "chat.completion"


class Delta(Struct, omit_defaults=True):
    role: str = ""
    content: str | UnsetType = UNSET


class DeltaChoice(Struct):
    index: int
    delta: Delta
    finish_reason: FinishReason | None = None
    logprobs: LogprobsBody | None = None


class ChunkBody(Struct):
    """One event; `usage` null where it will come at the end, and absent where it will not."""

    id: str
    created: int
    model: str
    choices: list[DeltaChoice]
    usage: UsageBody | UnsetType | None = UNSET
    provider: str = ""
    object: str = "chat.completion.chunk"


async def begun(
    request: Request, services: Services, struct: type[B], ask: Callable[[B, Asker], CompletionRequest]
) -> tuple[B, Exchange]:
    """A body of `/v1`, and the exchange that it asks for. Raises BadRequest or ModelNotFound."""
    body = await read_json(request, struct, services.config.server.max_body_bytes)
    known_model(services, body.model, body.provider)
    asked = ask(body, Asker.of(request, services))
    return body, Exchange(request, services, asked, body.provider, body.fallback)


async def chat_completions(request: Request, services: Services) -> Response:
    """Answers one chat completion."""
    body, exchange = await begun(request, services, ChatBody, chat_request)
    about = _About.of(request, "chatcmpl")
    if body.stream:
        return await exchange.stream(partial(_chat_events, about, body.tells_usage))
    return json_reply(_chat_reply(about, *await exchange.whole()))


class LegacyLogprobs(Struct):
    """The older form; `text_offset` counts characters of the answer."""

    tokens: list[str] = []
    token_logprobs: list[float] = []
    top_logprobs: list[dict[str, float]] = []
    text_offset: list[int] = []


class TextChoice(Struct):
    index: int
    text: str
    finish_reason: FinishReason | None = None
    logprobs: LegacyLogprobs | None = None


class TextReply(Struct):
    """A plain completion, whole or one event of it."""

    id: str
    created: int
    model: str
    choices: list[TextChoice]
    usage: UsageBody | UnsetType | None = UNSET
    provider: str = ""
    object: str = "text_completion"


async def completions(request: Request, services: Services) -> Response:
    """Continues one text."""
    body, exchange = await begun(request, services, CompletionBody, text_request)
    about = _About.of(request, "cmpl")
    if body.stream:
        return await exchange.stream(partial(_text_events, about, body.tells_usage))
    answer, done = await exchange.whole()
    choices = [TextChoice(i, c.text, c.finish_reason, _legacy(c.logprobs, 0)) for i, c in enumerate(done)]
    usage = usage_body(done[0].usage)
    return json_reply(TextReply(about.id, about.created, answer.model, choices, usage, answer.provider))


async def _text_events(
    about: _About, with_usage: bool, answer: Answer, chunks: AsyncIterator[Chunk]
) -> AsyncGenerator[bytes]:
    usage = None if with_usage else UNSET
    body = TextReply(about.id, about.created, answer.model, [], usage, answer.provider)
    written: dict[int, int] = defaultdict(int)  # characters, by choice
    async for chunk in chunks:
        logprobs = _legacy(chunk.logprobs, written[chunk.index])
        written[chunk.index] += len(chunk.text)
        body.choices = [TextChoice(chunk.index, chunk.text, chunk.finish_reason, logprobs)]
        yield b"data: " + msgspec.json.encode(body) + b"\n\n"
        if chunk.usage is not None and with_usage:
            body.choices, body.usage = [], usage_body(chunk.usage)
            yield b"data: " + msgspec.json.encode(body) + b"\n\n"
    yield DONE


def _legacy(found: Sequence[TokenLogprob], offset: int) -> LegacyLogprobs | None:
    if not found:
        return None
    body = LegacyLogprobs()
    for one in found:
        token, logprob, _ = _token(one.token, one.logprob)
        body.tokens.append(token)
        body.token_logprobs.append(logprob)
        body.top_logprobs.append({t: p for t, p, _ in (_token(*other) for other in one.top)})
        body.text_offset.append(offset)
        offset += len(token)
    return body


@dataclass(frozen=True, slots=True)
class _About:
    """What all events of an answer have in common."""

    id: str
    created: int

    @classmethod
    def of(cls, request: Request, kind: str) -> _About:
        return cls(f"{kind}-{request.state.request_id.removeprefix('req_')}", int(time.time()))


def _chat_reply(about: _About, answer: Answer, done: Sequence[Completion]) -> ChatReply:
    choices = [
        ChoiceBody(i, ReplyMessage(one.text), one.finish_reason, _logprobs(one.logprobs)) for i, one in enumerate(done)
    ]
    return ChatReply(about.id, about.created, answer.model, choices, usage_body(done[0].usage), answer.provider)


async def _chat_events(
    about: _About, with_usage: bool, answer: Answer, chunks: AsyncIterator[Chunk]
) -> AsyncGenerator[bytes]:
    """Per choice: its role, its texts, its end; then the usage if that was asked for, and `[DONE]`."""
    usage = None if with_usage else UNSET
    body = ChunkBody(about.id, about.created, answer.model, [], usage, answer.provider)

    def event(*choices: DeltaChoice) -> bytes:
        body.choices = list(choices)
        return b"data: " + msgspec.json.encode(body) + b"\n\n"

    begun: set[int] = set()
    async for chunk in chunks:
        i = chunk.index
        if i not in begun:
            begun.add(i)
            yield event(DeltaChoice(i, Delta("assistant", "")))
        if chunk.text or chunk.logprobs:
            yield event(DeltaChoice(i, Delta(content=chunk.text), logprobs=_logprobs(chunk.logprobs)))
        if chunk.finish_reason is not None:
            yield event(DeltaChoice(i, Delta(), chunk.finish_reason))
        if chunk.usage is not None and with_usage:
            body.usage = usage_body(chunk.usage)
            yield event()
    yield DONE


def usage_body(usage: Usage) -> UsageBody:
    prompt, completion = PromptDetails(usage.cached_tokens), CompletionDetails()
    return UsageBody(usage.prompt_tokens, usage.completion_tokens, usage.total_tokens, prompt, completion)


def _logprobs(found: Sequence[TokenLogprob]) -> LogprobsBody | None:
    if not found:
        return None
    return LogprobsBody(
        [LogprobBody(*_token(t.token, t.logprob), [TopBody(*_token(*o)) for o in t.top]) for t in found]
    )


def _token(token: bytes, logprob: float) -> tuple[str, float, list[int]]:
    """Text, log-probability and bytes; JSON knows no minus infinity."""
    return token.decode("utf-8", "replace"), max(LEAST_LOGPROB, logprob), list(token)
