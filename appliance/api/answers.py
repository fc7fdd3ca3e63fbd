"""A completion behind one request: begins when its turn has come, ends when the client is gone or its key is cut.

What all families of routes share; each brings the request to be asked, and the writer of its own events.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace
from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from appliance.api.limits import Turn
from appliance.api.render import error_event
from appliance.api.services import Services
from appliance.api.streams import EventStream, while_connected
from appliance.chat import Answer, Completion, Wish, collect
from appliance.errors import ApplianceError, InternalError, Unavailable
from appliance.messages import Caller, Chunk, CompletionRequest
from appliance.store.usage import Spent

PLACE_SECONDS = 0.5  # how often a waiting stream looks at its place in line

First = asyncio.Future[tuple[Answer, Chunk]]
Writer = Callable[[Answer, AsyncIterator[Chunk]], AsyncGenerator[bytes]]


class Exchange:
    """One request's way to its answer: the completion that is asked for, and the provider that is named."""

    def __init__(
        self,
        request: Request,
        services: Services,
        asked: CompletionRequest,
        provider: str | None = None,
        fallback: bool = True,
    ) -> None:
        self._request = request
        self._services = services
        self.asked = asked
        self._turn: Turn = request.state.turn
        caller: Caller = request.state.caller
        patience = services.plans[caller.plan].fallback_wait
        self._wish = Wish(provider or "auto", fallback, caller.prompts, patience, caller.key_id)

    async def whole(self) -> tuple[Answer, list[Completion]]:
        """Every choice, at its end. Raises ClientDisconnect when nobody waits for it any more."""
        return await while_connected(self._request.receive, self._collected())

    async def stream(self, write: Writer) -> Response:
        """What `write` makes of the chunks, as events. Waits a moment for the first chunk, so that a refusal is still
        a real status: it raises here."""
        settings = self._services.config.server
        first = asyncio.ensure_future(self._first())
        await while_connected(self._request.receive, _settle(first, settings.stream_header_hold_seconds))
        return EventStream(self._events(first, write), settings.ping_seconds, {})

    async def _begin(self, reason: str = "") -> tuple[Answer, Chunk]:
        await self._turn.wait()
        answer, first = await self._services.chat.begin(self.asked, self._wish, self._note)
        answer = replace(answer, reason=answer.reason or reason)
        self._turn.told = _told(answer)
        return answer, first

    def _note(self, answer: Answer) -> None:
        """What every try takes is what the call has taken."""
        self._turn.spent.append(partial(_spent, answer))

    async def _collected(self) -> tuple[Answer, list[Completion]]:
        """An answer of a server elsewhere that breaks off is answered here instead: nothing of it has been said yet."""
        with self._turn.working():
            answer, first = await self._begin()
            try:
                async with aclosing(answer.chunks):
                    return answer, await collect(first, answer.chunks, self.asked.n)
            except Unavailable:
                if answer.provider == self._services.local.name or not self._wish.fallback:
                    raise
            self._wish = replace(self._wish, provider=self._services.local.name)
            answer, first = await self._begin("unavailable")
            async with aclosing(answer.chunks):
                return answer, await collect(first, answer.chunks, self.asked.n)

    async def _first(self) -> tuple[Answer, Chunk]:
        with self._turn.working():
            return await self._begin()

    async def _events(self, first: First, write: Writer) -> AsyncGenerator[bytes]:
        """The place in line as comments, then what `write` yields; an error becomes the last event."""
        said = False
        try:
            async for comment in self._places(first):
                yield comment
            answer, chunk = await first
            with self._turn.working():
                async for event in write(answer, _all(chunk, answer.chunks)):
                    said = True
                    yield event
        except ApplianceError as error:
            if error.status >= 500 and not said:
                self._turn.end(give_back=True)  # as where the status could still say so
            yield error_event(error, self._request.state.request_id, self._request.url.path)
        finally:
            await _abandon(first)

    async def _places(self, first: First) -> AsyncGenerator[bytes]:
        """What the account's line looks like to a call that waits in it, whenever that has changed."""
        said = None
        while not first.done() and (place := self._turn.place()) is not None:
            if place != said:
                said = place
                yield b": queued, place %d, about %d s\n\n" % place
            await asyncio.wait({first}, timeout=PLACE_SECONDS)


async def _all(chunk: Chunk, others: AsyncGenerator[Chunk]) -> AsyncGenerator[Chunk]:
    """The chunks to the last one, which has the usage."""
    while chunk.usage is None:
        yield chunk
        try:
            chunk = await anext(others)
        except StopAsyncIteration:
            raise InternalError("The answer ended early.") from None
    yield chunk


async def _settle(first: First, seconds: float) -> None:
    try:
        await asyncio.wait({first}, timeout=seconds)
        if first.done():
            first.result()
    except BaseException:
        await _abandon(first)
        raise


async def _abandon(first: First) -> None:
    """Ends an answer, whether it has begun or not."""
    first.cancel()
    [found] = await asyncio.gather(first, return_exceptions=True)
    if not isinstance(found, BaseException):
        await found[0].chunks.aclose()


def _told(answer: Answer) -> list[tuple[bytes, bytes]]:
    """The headers that say who answers, and why another than was asked for."""
    served = f"{answer.provider}/{answer.model}".encode("ascii", "replace")
    return [(b"x-served-by", served)] + ([(b"x-fallback-reason", answer.reason.encode())] if answer.reason else [])


def _spent(answer: Answer) -> Spent:
    m = answer.meter
    return Spent(answer.provider, answer.model, m.prompt_tokens, m.completion_tokens, m.cached_tokens, m.seconds)
