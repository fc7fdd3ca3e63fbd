"""One generation inside the engine: its tokens, how many of them are computed, and where they lie. State only."""

from __future__ import annotations

import itertools
from enum import Enum, auto

import numpy as np
from numpy.typing import NDArray

from appliance.messages import Lane

_numbers = itertools.count(1)


class Status(Enum):
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class Sequence:
    """`tokens[:computed]` are in the KV cache under the context's sequence id `slot`; the rest is still to be computed.

    A running sequence with one uncomputed token decodes; with more it prefills (also after a preemption, when what it
    had generated is computed again).
    """

    __slots__ = (
        "_tokens", "account", "admitted", "arrived", "cached_tokens", "computed", "deadline", "first_token",
        "lane", "length", "limit", "n_prompt", "number", "own_prefix", "slot", "status", "times_preempted", "weight",
    )  # fmt: skip

    def __init__(
        self,
        prompt: NDArray[np.int32],
        *,
        account: str,
        limit: int,
        weight: float = 1.0,
        lane: Lane = "interactive",
        own_prefix: int = 0,
        arrived: float = 0.0,
        deadline: float = float("inf"),
    ) -> None:
        self.number = next(_numbers)
        self.account = account
        self.weight = weight
        self.lane: Lane = lane
        self.own_prefix = own_prefix  # leading prompt tokens that are the appliance's own
        self.n_prompt = len(prompt)
        self.limit = limit  # most tokens, prompt included
        self.arrived = arrived
        self.deadline = deadline
        self.admitted = 0.0
        self.first_token = 0.0
        self.status = Status.WAITING
        self.slot = -1
        self.computed = 0
        self.cached_tokens = 0  # of the prompt, found computed when first admitted
        self.times_preempted = 0
        self.length = len(prompt)
        self._tokens = np.empty(len(prompt) + 64, np.int32)
        self._tokens[: len(prompt)] = prompt

    def __repr__(self) -> str:
        return f"<Sequence {self.number} {self.status.name} {self.computed}/{self.length} slot {self.slot}>"

    @property
    def tokens(self) -> NDArray[np.int32]:
        """Prompt and generated tokens, shape (length,)."""
        return self._tokens[: self.length]

    @property
    def prompt(self) -> NDArray[np.int32]:
        return self._tokens[: self.n_prompt]

    @property
    def pending(self) -> int:
        """Tokens that are still to be computed."""
        return self.length - self.computed

    @property
    def generated(self) -> int:
        return self.length - self.n_prompt

    @property
    def remaining(self) -> int:
        """Tokens it may still generate."""
        return self.limit - self.length

    def append(self, token: int) -> None:
        """Adds a generated token."""
        if self.length == len(self._tokens):
            grown = np.empty(min(2 * self.length, max(self.limit, self.length) + 1), np.int32)
            grown[: self.length] = self._tokens
            self._tokens = grown
        self._tokens[self.length] = token
        self.length += 1
