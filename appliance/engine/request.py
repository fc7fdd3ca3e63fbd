"""A request inside the engine: what is asked, its choices while they run, and its sender's ticket. State only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from appliance.engine.grammar import CompiledSchema, Constraint
from appliance.engine.sampling import Sampler
from appliance.engine.sequence import Sequence
from appliance.engine.text import TextStream
from appliance.errors import ApplianceError
from appliance.messages import Chunk, Lane, Sampling, TokenLogprob, Usage

Event = Chunk | ApplianceError
Sink = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class Generate:
    """One request to the engine: `n` choices that continue `tokens`, int32 of shape (n_prompt,).

    `own_prefix` leading tokens are the appliance's own and may be shared between accounts. `logprobs` k asks for every
    token's log-probability and the k likeliest alternatives.
    """

    tokens: NDArray[np.int32]
    account: str = "local"
    weight: float = 1.0
    lane: Lane = "interactive"
    own_prefix: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    schema: CompiledSchema | None = None
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None


class Choice:
    """One of a request's continuations while it runs."""

    __slots__ = ("constraint", "generated", "index", "logprobs", "sampler", "sequence", "stream")

    def __init__(self, index: int, sequence: Sequence, request: Generate) -> None:
        self.index = index
        self.sequence = sequence
        self.sampler = Sampler(request.sampling, choice=index)
        self.stream = TextStream(request.stop)
        self.constraint: Constraint | None = request.schema.start() if request.schema else None
        self.generated = 0
        self.logprobs: list[TokenLogprob] = []  # not handed over yet

    def take_logprobs(self) -> tuple[TokenLogprob, ...]:
        taken, self.logprobs = tuple(self.logprobs), []
        return taken


class Ticket:
    """A submitted request. `cancel` frees its cells at the next step; its sink hears nothing after that."""

    __slots__ = ("_cancel", "cached_tokens", "cancelled", "choices", "completion_tokens", "place", "request", "sink")

    def __init__(self, request: Generate, sink: Sink, choices: list[Choice], cancel: Callable[[Ticket], None]) -> None:
        self.request = request
        self.sink = sink
        self.choices = {c.sequence: c for c in choices}  # that are not finished
        self.cancelled = False
        self.completion_tokens = 0  # of all choices
        self.place = 0  # in the line, when it came: about how many were to be admitted up to and including it
        self.cached_tokens = 0
        self._cancel = cancel

    @property
    def usage(self) -> Usage:
        """What was computed until now; right also after a cancellation."""
        return Usage(len(self.request.tokens), self.completion_tokens, self.cached_tokens)

    def cancel(self) -> None:
        """Safe from any thread, any number of times, also after the end."""
        if not self.cancelled:
            self.cancelled = True
            if self.choices:
                self._cancel(self)
