"""The chat service: which provider answers a completion, and the whole answer where nobody streams. Knows no HTTP."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from appliance.errors import Unavailable
from appliance.messages import Chunk, CompletionRequest, FinishReason, Meter, Usage
from appliance.providers.base import Provider


@dataclass(frozen=True, slots=True)
class Answer:
    """A started completion: who answers, and the chunks to come (close them to stop)."""

    provider: str
    model: str
    chunks: AsyncGenerator[Chunk]
    meter: Meter = field(default_factory=Meter)  # right once the chunks have ended or were closed


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished completion of one choice."""

    text: str
    finish_reason: FinishReason
    usage: Usage


class Chat:
    """Routes completions to providers."""

    def __init__(self, local: Provider) -> None:
        self._local = local
        self.started: Counter[str] = Counter()  # completions by provider

    def start(self, request: CompletionRequest, *, provider: str = "auto", fallback: bool = True) -> Answer:
        """Names the provider and begins. Raises ModelNotReady, or Unavailable when the only permitted one cannot."""
        if provider == "groq" and not fallback:
            raise Unavailable("Groq is not configured on this box, and the request allows no other provider.")
        answer = Answer(self._local.name, self._local.model, self._local.complete(request), request.meter)
        self.started[answer.provider] += 1
        return answer


async def collect(chunks: AsyncGenerator[Chunk]) -> Completion:
    """The whole answer of a single-choice completion."""
    texts: list[str] = []
    finish: FinishReason = "stop"
    usage = Usage(0, 0)
    async for chunk in chunks:
        texts.append(chunk.text)
        finish = chunk.finish_reason or finish
        usage = chunk.usage or usage
    return Completion("".join(texts), finish, usage)
