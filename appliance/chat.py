"""The chat service: which provider answers a completion, and the whole answer where nobody streams. Knows no HTTP.

Every completion may be answered here. It leaves the box only where the caller's policy for prompts permits it: because
the caller named a provider elsewhere, or because it would have to wait here for longer than its plan says. That is
decided before the first chunk; whoever fails before its first chunk is followed by the next who may answer, and two
models' texts are never put together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Protocol

from appliance.errors import ApplianceError, BadRequest, Draining, Forbidden, InternalError, Unavailable
from appliance.messages import Chunk, CompletionRequest, FinishReason, Meter, Prompts, TokenLogprob, Usage
from appliance.providers.base import Provider

OVERFLOW = "groq"  # who helps out
CALMED = 0.5  # share of the wait from which a box that was too busy is so no longer


@dataclass(frozen=True, slots=True)
class Answer:
    """A started completion: who answers, and the chunks to come (close them to stop). `reason` says why it is not the
    one who was asked for; empty where it is."""

    provider: str
    model: str
    chunks: AsyncGenerator[Chunk]
    meter: Meter = field(default_factory=Meter)  # right once the chunks have ended or were closed
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished choice of a completion."""

    text: str
    finish_reason: FinishReason
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] = ()
    stop: str = ""  # the stop string that ended it


@dataclass(frozen=True, slots=True)
class Wish:
    """Who may answer: the `provider` that was named, whether another may, whether `prompts` may leave the box, and
    how long one waits here for it, in seconds."""

    provider: str = "auto"
    fallback: bool = True
    prompts: Prompts = "never"
    patience: float = 10.0
    key_id: str = ""


class Local(Provider, Protocol):
    """The provider of this box."""

    def wait(self) -> float:
        """Seconds until a new completion is begun; infinite while there is no model."""
        ...


class Elsewhere(Provider, Protocol):
    """A provider outside of the box."""

    @property
    def destination(self) -> str: ...
    @property
    def refusal(self) -> Unavailable | None: ...


Note = Callable[[CompletionRequest, Wish, Elsewhere, str], None]  # of what left the box, at the end of an exchange


class Chat:
    """Routes completions to providers."""

    def __init__(
        self, local: Local, others: Mapping[str, Elsewhere] | None = None, note: Note = lambda *about: None
    ) -> None:
        self._local = local
        self._others = dict(others or {})
        self._note = note
        self._busy: set[float] = set()  # the patiences that were exceeded last
        self.started: Counter[str] = Counter()  # completions by provider

    def available(self) -> dict[str, bool]:
        """Which servers elsewhere may be asked now."""
        return {name: other.refusal is None for name, other in self._others.items()}

    async def begin(
        self, request: CompletionRequest, wish: Wish, on_try: Callable[[Answer], None] = lambda answer: None
    ) -> tuple[Answer, Chunk]:
        """An answer with its first chunk; `on_try` is told of every try before it begins, since one that fails, or that
        nobody waits for, has costs too. Raises BadRequest, Forbidden, or Unavailable when nobody who may answer can; of
        several reasons the first."""
        refused: ApplianceError | None = None
        for provider, reason in self._route(request, wish):
            try:
                return await self._start(provider, request, wish, reason, on_try)
            except ApplianceError as error:
                here = provider is self._local
                if here and (isinstance(error, Draining) or not isinstance(error, Unavailable)):
                    raise
                refused = refused or error
        assert refused is not None
        raise refused

    def _route(self, request: CompletionRequest, wish: Wish) -> Iterator[tuple[Provider, str]]:
        """Who may answer, in order, and why if it is not who was asked for."""
        local = _only_here(request)
        if wish.provider == "local" or (wish.provider == "auto" and (local or not wish.fallback)):
            yield self._local, ""
        elif wish.provider == "auto":
            yield from self._overflowing(wish)
        else:
            yield from self._named(wish, local)

    def _overflowing(self, wish: Wish) -> Iterator[tuple[Provider, str]]:
        other = self._others.get(OVERFLOW) if wish.prompts != "never" else None
        if other is not None and other.refusal is None and self._is_busy(wish.patience):
            yield other, "saturated"
            yield self._local, ""
        else:
            yield self._local, ""
            if other is not None:
                yield other, "unavailable"

    def _named(self, wish: Wish, only_here: str) -> Iterator[tuple[Provider, str]]:
        other, why = self._others.get(wish.provider), ""
        if other is None:
            if wish.provider != OVERFLOW:
                names = ", ".join(["auto", "local", OVERFLOW, *(n for n in self._others if n != OVERFLOW)])
                raise BadRequest(f"There is no provider {wish.provider[:40]!r}; there are {names}.", param="provider")
            why = "not-configured"
        elif not self._may_leave(wish):
            why = "policy"
        elif only_here:
            why = "unsupported"
        if other is not None and not why:
            yield other, ""
            why = "unavailable"
        if wish.fallback:
            yield self._local, why
        elif why == "policy":
            raise Forbidden(
                f"Prompts of this account, or of this key, may not go to {wish.provider} (policy: {wish.prompts}). An "
                "administrator sets the account's with `appliance account set-egress`, a key's when it is made."
            )
        elif why == "unsupported":
            raise BadRequest(f"{only_here} is answered by the local model only.", param=only_here)
        elif why == "not-configured":
            raise Unavailable("Groq is not configured on this box, and the request allows no other provider.")

    def _may_leave(self, wish: Wish) -> bool:
        """Whether prompts may go to who was named; what may only overflow goes to one, and from a busy box."""
        overflows = wish.prompts == "if-saturated" and wish.provider == OVERFLOW
        return wish.prompts == "allowed" or (overflows and self._is_busy(wish.patience))

    def _is_busy(self, patience: float) -> bool:
        """Whether a call would wait for too long here; a box that was too busy is so until the wait has halved, so that
        calls do not go to and fro."""
        busy = self._local.wait() > patience * (CALMED if patience in self._busy else 1.0)
        (self._busy.add if busy else self._busy.discard)(patience)
        return busy

    async def _start(
        self,
        provider: Provider,
        request: CompletionRequest,
        wish: Wish,
        reason: str,
        on_try: Callable[[Answer], None],
    ) -> tuple[Answer, Chunk]:
        request = replace(request, meter=Meter())
        model, chunks = provider.model_for(request), provider.complete(request)
        if provider is not self._local:
            chunks = self._noted(chunks, request, wish, self._others[provider.name], reason)
        answer = Answer(provider.name, model, chunks, request.meter, reason)
        on_try(answer)
        try:
            first = await anext(chunks)
        except StopAsyncIteration:
            raise InternalError("The answer ended early.") from None
        self.started[provider.name] += 1
        return answer, first

    async def _noted(
        self, chunks: AsyncGenerator[Chunk], request: CompletionRequest, wish: Wish, other: Elsewhere, reason: str
    ) -> AsyncGenerator[Chunk]:
        """The chunks; at their end, whatever it is, what has left the box is noted."""
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    yield chunk
        finally:
            if request.meter.bytes_out:
                self._note(request, wish, other, reason or "asked")


def _only_here(request: CompletionRequest) -> str:
    """The field of a request that no server elsewhere can be relied on to honour; empty when there is none."""
    asked = {
        "prompt": request.prompt is not None,
        "n": request.n > 1,
        "logprobs": request.logprobs is not None,
        "logit_bias": bool(request.sampling.logit_bias),
        "ignore_eos": request.ignore_eos,
    }
    return next((name for name, is_asked in asked.items() if is_asked), "")


async def collect(first: Chunk, chunks: AsyncGenerator[Chunk], n: int = 1) -> list[Completion]:
    """All `n` choices, whole; the usage of each is that of all."""
    texts: list[list[str]] = [[] for _ in range(n)]
    logprobs: list[list[TokenLogprob]] = [[] for _ in range(n)]
    finished: list[FinishReason] = ["stop"] * n
    usage, stops = Usage(0, 0), [""] * n
    chunk = first
    while True:
        texts[chunk.index].append(chunk.text)
        logprobs[chunk.index] += chunk.logprobs
        finished[chunk.index] = chunk.finish_reason or finished[chunk.index]
        stops[chunk.index] = chunk.stop or stops[chunk.index]
        usage = chunk.usage or usage
        try:
            chunk = await anext(chunks)
        except StopAsyncIteration:
            break
    return [Completion("".join(texts[i]), finished[i], usage, tuple(logprobs[i]), stops[i]) for i in range(n)]
