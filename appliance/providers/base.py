"""The interface of every provider."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from appliance.messages import Chunk, CompletionRequest


class Provider(Protocol):
    """Answers completions under `name`."""

    @property
    def name(self) -> str: ...

    def model_for(self, request: CompletionRequest) -> str:
        """Name of the model that would answer. Raises ModelNotReady when there is none."""
        ...

    def complete(self, request: CompletionRequest) -> AsyncGenerator[Chunk]:
        """The answer piece by piece; the last chunk carries the usage. Closing the generator ends the work. At the
        end, whatever it was, `request.meter` says what the completion has taken.

        Raises ApplianceError, before the first chunk whenever it can be known by then.
        """
        ...
