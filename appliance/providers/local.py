"""The local provider: one GGUF behind the engine, with its prompt encoder. Loads, swaps and unloads the model.

Bridges threads: the engine hands over once per step, here every call gets its share in an asyncio queue of its own.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from appliance.config import EngineSettings
from appliance.engine.engine import Engine
from appliance.engine.grammar import SchemaCompiler
from appliance.engine.prompt import ChatTemplate, PromptEncoder
from appliance.engine.request import Event, Generate, Sink
from appliance.engine.sequence import Sequence
from appliance.errors import ApplianceError, BadRequest, EngineBroken, ModelNotReady
from appliance.messages import NOTES, Chunk, CompletionRequest, Message, Meter, Nature, Sampling, Usage

log = logging.getLogger("appliance.local")

TAKEN_WITHIN = 60  # seconds; what a caller is told to wait while a model is loading


@dataclass(slots=True)
class Loaded:
    """A model that answers, and what belongs to it."""

    name: str
    path: Path
    nature: Nature
    engine: Engine
    encoder: PromptEncoder
    schemas: SchemaCompiler
    sampling: Sampling

    def close(self) -> None:
        self.encoder.close()
        self.engine.close()


class LocalProvider:
    """Answers from this box. `load` and `use` block: call them on a thread."""

    name = "local"

    def __init__(self, settings: EngineSettings, on_fatal: Callable[[EngineBroken], None] | None = None) -> None:
        self._settings = settings
        self._on_fatal = on_fatal
        self._loaded: Loaded | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.state = "no model is loaded"

    # ── the model's life ─────────────────────────────────────────────────────────────────────────────────────────

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Answers go to this event loop."""
        self._loop = loop

    def load(self, name: str, path: Path, nature: Nature = "model") -> None:
        """Loads the first model. Raises ModelError; the caller then says `fail`."""
        self.state = f"the model {name} is being loaded"
        self._loaded = self._open(name, path, nature)
        self.state = "ready"

    def use(self, name: str, path: Path, nature: Nature = "model", *, drain_seconds: float = 30.0) -> None:
        """Swaps the model: drains, unloads, loads; on any failure the old one comes back, and the error is raised."""
        old, self._loaded = self._loaded, None
        self.state = f"the model {name} is being loaded"
        if old is not None:
            old.engine.drain(drain_seconds)
            old.close()
        try:
            self._loaded = self._open(name, path, nature)
        except BaseException:
            if old is not None:
                log.warning("%s does not load; %s comes back", name, old.name)
                self._loaded = self._open(old.name, old.path, old.nature)
            raise
        finally:
            self.state = "ready" if self._loaded else "no model is loaded"

    def fail(self, reason: str) -> None:
        """There is no usable model; `reason` is told to every caller."""
        self.state = reason.rstrip(".")

    def cut(self) -> None:
        """Ends every answer that is under way with an error."""
        if self._loaded:
            self._loaded.engine.cut()

    def drain(self, seconds: float) -> bool:
        return self._loaded is None or self._loaded.engine.drain(seconds)

    def close(self) -> None:
        if self._loaded:
            self._loaded.close()
            self._loaded = None

    def _open(self, name: str, path: Path, nature: Nature) -> Loaded:
        engine = Engine(path, self._settings, dispatch=self._hand_over, on_fatal=self._on_fatal)
        try:
            encoder = PromptEncoder(ChatTemplate(engine.model.chat_template, engine.model), engine.model)
        except BaseException:
            engine.close()
            raise
        if NOTES[nature]:
            log.warning("%s: %s", name, NOTES[nature])
        return Loaded(name, path, nature, engine, encoder, SchemaCompiler(engine.model), engine.model.own_sampling())

    def _hand_over(self, batch: list[tuple[Sink, Event]]) -> None:
        """Called on the decode thread, once per step."""
        if self._loop is None:
            return _call(batch)
        try:
            self._loop.call_soon_threadsafe(_call, batch)
        except RuntimeError:  # the loop is closed: nobody listens any more
            log.debug("answers for a closed event loop are dropped")

    # ── answering ────────────────────────────────────────────────────────────────────────────────────────────────

    def model_for(self, request: CompletionRequest) -> str:
        return self.loaded.name

    def wait(self) -> float:
        """Seconds until a new completion is begun, as far as can be told; infinite while there is no model."""
        return self._loaded.engine.expected_wait() if self._loaded else math.inf

    @property
    def defaults(self) -> Sampling:
        """How tokens are drawn where a request says nothing: as the model's file recommends, else as we do."""
        return self._loaded.sampling if self._loaded else Sampling()

    @property
    def ready(self) -> bool:
        return self._loaded is not None

    @property
    def loaded(self) -> Loaded:
        """The model that answers now. Raises ModelNotReady."""
        if self._loaded is None:
            raise ModelNotReady(f"The local model cannot answer: {self.state}.", retry_after=TAKEN_WITHIN)
        return self._loaded

    def status(self) -> dict[str, Any]:
        """What the engine counts, with the model's name; only `state` when none is loaded."""
        if self._loaded is None:
            return {"state": self.state}
        loaded = self._loaded
        return {
            "state": self.state,
            "model": loaded.name,
            "guide": loaded.nature == "guide",
            "placeholder": loaded.nature == "placeholder",
            **loaded.engine.status(),
        }

    async def complete(self, request: CompletionRequest) -> AsyncGenerator[Chunk]:
        """See `Provider.complete`. Closing the generator frees the request's cells at the engine's next step."""
        loaded = self.loaded
        generate = await self._encode(loaded, request)
        request.meter.asked = len(generate.tokens)
        mailbox = _Mailbox()
        ticket = loaded.engine.submit(generate, mailbox.put)
        sequences = list(ticket.choices)
        open_choices = request.n
        try:
            while open_choices:
                for event in _merge(await mailbox.take()):
                    if isinstance(event, ApplianceError):
                        raise event
                    open_choices -= event.finish_reason is not None
                    yield event
        finally:
            ticket.cancel()
            _read_meter(request.meter, ticket.usage, sequences)

    async def count(self, messages: tuple[Message, ...]) -> int:
        """Tokens of a conversation as a prompt. Raises ModelNotReady, BadRequest or PromptTooLong."""
        loaded = self.loaded
        encoded = await asyncio.wrap_future(loaded.encoder.encode(messages, **self._limits(loaded.engine)))
        return len(encoded.tokens)

    def _limits(self, engine: Engine) -> dict[str, int]:
        return {"context_tokens": engine.largest_prompt, "longest_run": self._settings.longest_run}

    async def _encode(self, loaded: Loaded, request: CompletionRequest) -> Generate:
        """Template, tokens and schema, off the event loop."""
        engine = loaded.engine
        if request.max_tokens is not None and request.max_tokens > engine.max_sequence:
            raise BadRequest(
                f"max_tokens is {request.max_tokens}; the context takes {engine.max_sequence} tokens here."
            )
        if any(token >= engine.model.n_tokens for token, _ in request.sampling.logit_bias):
            raise BadRequest(
                f"logit_bias names a token that this model does not have: it has 0 to {engine.model.n_tokens - 1}.",
                param="logit_bias",
            )
        limits = self._limits(engine)
        if request.prompt is None:
            encoding = loaded.encoder.encode(request.messages, own_prefix=request.own_prefix, **limits)
        else:
            encoding = loaded.encoder.encode_plain(request.prompt, **limits)
        prompt = await asyncio.wrap_future(encoding)
        schema = None
        if request.json_schema is not None:
            schema = await asyncio.to_thread(loaded.schemas.compile, request.json_schema)
        return Generate(
            prompt.tokens,
            account=request.account,
            weight=request.weight,
            lane=request.lane,
            own_prefix=prompt.own_prefix_tokens,
            sampling=request.sampling,
            max_tokens=request.max_tokens,
            stop=request.stop,
            schema=schema,
            ignore_eos=request.ignore_eos,
            n=request.n,
            logprobs=request.logprobs,
        )


def _read_meter(meter: Meter, usage: Usage, sequences: list[Sequence]) -> None:
    """A request that was never admitted has taken nothing."""
    admitted = [sequence.admitted for sequence in sequences if sequence.admitted]
    if admitted:
        meter.prompt_tokens, meter.completion_tokens = usage.prompt_tokens, usage.completion_tokens
        meter.cached_tokens = usage.cached_tokens
        meter.seconds = sum(time.monotonic() - since for since in admitted)


def _call(batch: list[tuple[Sink, Event]]) -> None:
    for sink, event in batch:
        sink(event)


class _Mailbox:
    """What the engine has sent one call and the call has not taken yet; both ends run on the event loop."""

    __slots__ = ("_arrived", "_events")

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._arrived = asyncio.Event()

    def put(self, event: Event) -> None:
        self._events.append(event)
        self._arrived.set()

    async def take(self) -> list[Event]:
        """Everything that came since the last time; waits for the first."""
        await self._arrived.wait()
        self._arrived.clear()
        taken, self._events = self._events, []
        return taken


def _merge(events: list[Event]) -> list[Event]:
    """Joins the texts that piled up for a slow reader, choice by choice as they came."""
    merged = events[:1]
    for event in events[1:]:
        last = merged[-1]
        if (
            isinstance(last, Chunk)
            and isinstance(event, Chunk)
            and last.index == event.index
            and not last.finish_reason
        ):
            merged[-1] = replace(event, text=last.text + event.text, logprobs=last.logprobs + event.logprobs)
        else:
            merged.append(event)
    return merged
