"""The nouns that all layers share: what is asked, what is answered, and who asks. No behaviour beyond properties."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant"]
Scope = Literal["full", "read", "llm", "workflow"]
FinishReason = Literal["stop", "length"]
Lane = Literal["interactive", "batch"]
Prompts = Literal["never", "if-saturated", "allowed"]  # may they leave the box?
Nature = Literal["model", "guide", "placeholder"]

PROMPTS: tuple[Prompts, ...] = ("never", "if-saturated", "allowed")  # each allows more than the one before
SCOPES: tuple[Scope, ...] = ("full", "read", "llm", "workflow")
# What has to be said of a model that is no real one, wherever it answers.
NOTES: dict[Nature, str] = {
    "model": "",
    "guide": "This is the built-in guide, a small model that knows only this appliance. "
    "Load a real one with `appliance models add FILE` and `appliance models use NAME`.",
    "placeholder": "This is a placeholder with random weights, whose answers are noise. "
    "Load a real model with `appliance models add FILE` and `appliance models use NAME`.",
}


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; `content` is plain text."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """What a key may use at most, where that is less than its account's plan; None: as the account."""

    minute: int | None = None  # calls
    hour: int | None = None
    month: int | None = None
    concurrent: int | None = None
    tokens_per_day: int | None = None


AS_ACCOUNT = KeyLimits()


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is calling: a key that was found valid, and the account that pays."""

    account_id: str
    account_name: str
    plan: str
    key_id: str
    scope: Scope
    limits: KeyLimits = AS_ACCOUNT
    lineage: str = ""  # under which the limits of the key are counted
    prompts: Prompts = "never"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. `temperature` 0 is greedy; `top_k` 0, `top_p` 1, `min_p` 0 and penalties 0/1 switch off.

    Penalties follow the usual definitions: `repeat_penalty` divides positive and multiplies negative logits of
    tokens among the last `penalty_last_n`; `frequency_penalty` and `presence_penalty` are subtracted, as OpenAI does.
    """

    temperature: float = 0.7
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    penalty_last_n: int = 64
    seed: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class Meter:
    """What a completion has taken, told by its provider at its end, however that came; `seconds` of the engine."""

    asked: int = 0  # tokens of the prompt, told before the first chunk
    bytes_out: int = 0  # that left the box for it
    bytes_in: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """One completion, as a provider takes it."""

    messages: tuple[Message, ...]  # empty where `prompt` is given
    account: str  # namespace of the prefix cache and unit of fairness
    sampling: Sampling = field(default_factory=Sampling)
    weight: float = 1.0  # the plan's share under contention
    max_tokens: int | None = None  # None: 1,024 or what fits
    stop: tuple[str, ...] = ()
    json_schema: dict[str, Any] | None = None
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None  # None: none; k: the chosen token's and the k likeliest alternatives'
    lane: Lane = "interactive"
    own_prefix: int = 0  # how many leading messages are the appliance's own (shared cache root)
    prompt: str | tuple[int, ...] | None = None  # text or tokens to be continued as they are, without a template
    model: str = ""  # that was asked for; only servers elsewhere may have several
    said: frozenset[str] = frozenset()  # fields of the sampling that the request itself set
    request_id: str = ""
    meter: Meter = field(default_factory=Meter, compare=False)


@dataclass(frozen=True, slots=True)
class Usage:
    """Model tokens of one completion; `cached_tokens` of the prompt were not computed again."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's text, bytes and natural-log probability under the unmodified distribution, with alternatives."""

    token: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """One piece of an answer. The last one of a choice has `finish_reason`, and the `stop` string where one ended it;
    the last of all has `usage`."""

    text: str = ""
    index: int = 0
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    stop: str = ""
