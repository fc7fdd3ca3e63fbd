"""What the bodies of several families of routes have in common, and what it means to the chat service."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from msgspec import Meta, Struct
from starlette.requests import Request

from appliance.api.services import Services
from appliance.errors import BadRequest
from appliance.messages import Caller, CompletionRequest, Message, Sampling

MOST_STOPS = 16
ANY_JSON_OBJECT: dict[str, Any] = {"type": "object"}
ProviderName = Annotated[str, Meta(min_length=1, max_length=40)]

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed", "frequency_penalty", "presence_penalty")


class AskingBody(Struct, kw_only=True):
    """Every body of `/v1` that asks for a completion; the last two fields are ours."""

    model: Annotated[str, Meta(min_length=1)] | None = None
    provider: ProviderName | None = None
    fallback: bool = True


@dataclass(frozen=True, slots=True)
class Asker:
    """Who asks, and how the model here draws where a request says nothing."""

    account: str
    weight: float
    defaults: Sampling
    request_id: str

    @classmethod
    def of(cls, request: Request, services: Services) -> Asker:
        caller: Caller = request.state.caller
        weight = services.plans[caller.plan].weight
        return cls(caller.account_id, weight, services.local.defaults, request.state.request_id)

    def completion(self, body: Any, messages: Sequence[Message], **fields: Any) -> CompletionRequest:
        """What the chat service is asked: `fields`, and those of the body that mean the same everywhere."""
        drawn = {name: value for name in _SAMPLING if (value := getattr(body, name, None)) is not None}
        said = frozenset(drawn)
        if drawn.get("top_p") == 0:  # OpenAI's way of saying greedy
            drawn |= {"temperature": 0.0, "top_p": 1.0}
        return CompletionRequest(
            messages=tuple(messages),
            account=self.account,
            weight=self.weight,
            sampling=replace(self.defaults, **drawn),
            said=said,
            model=body.model or "",
            request_id=self.request_id,
            **fields,
        )


def stops(given: str | Sequence[str] | None, field: str = "stop") -> tuple[str, ...]:
    """The stop strings. Raises BadRequest for too many, empty or overlong ones."""
    found = (given,) if isinstance(given, str) else tuple(given or ())
    if len(found) > MOST_STOPS:
        raise BadRequest(f"{field} has {len(found)} strings; at most {MOST_STOPS} are taken.", param=field)
    if any(not 0 < len(s) <= 500 for s in found):
        raise BadRequest("Every stop string must have 1 to 500 characters.", param=field)
    return found
