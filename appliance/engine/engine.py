"""The decode thread: takes requests, runs the scheduler's steps on the context, samples, hands texts over each step.

Owns the only thread that touches the context, and the life of every request from `submit` to its last chunk. Knows
token ids and plain text; rendering prompts is `prompt.py`, deciding is `scheduler.py`, drawing is `sampling.py`.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from appliance.config import EngineSettings
from appliance.engine import model as llama
from appliance.engine.budget import PrefillBudget
from appliance.engine.metrics import Metrics, StepTimes
from appliance.engine.model import Context, ContextFactory, Model
from appliance.engine.request import Choice, Event, Generate, Sink, Ticket
from appliance.engine.sampling import log_probabilities
from appliance.engine.scheduler import (
    Copy,
    Forget,
    Limits,
    Operation,
    Park,
    Restore,
    Scheduler,
    Slice,
    Truncate,
)
from appliance.engine.sequence import Sequence, Status
from appliance.errors import (
    ApplianceError,
    BadRequest,
    Draining,
    EngineBroken,
    InternalError,
    PromptTooLong,
    QueueTimeout,
)
from appliance.messages import Chunk, FinishReason, TokenLogprob

log = logging.getLogger("appliance.engine")

DEFAULT_MAX_TOKENS = 1_024
UNIFIED_UP_TO = 8  # slots for which one pool is as fast as streams on a GPU, too
COPY_AFTER = 0.2  # seconds without work: whoever asks at once must not wait for a copy
HEALTHY_STEPS = 1_000  # after which a broken context counts as the first again
# Rows of others that look at a retained prefix until parking it was cheaper. On a CPU a cell costs a row about 0.2 us;
# parking it 6 us where the cells lie in a row, and 80 us where they were taken in turns with 31 others, for a model of
# 23 KB a cell. A GPU reads its own memory a hundred times faster than it copies to the host.
CPU_PARK_AFTER, GPU_PARK_AFTER = 128, 4_096
PARALLEL_DRAWS = 16  # rows from which the sampling pool pays

Dispatch = Callable[[list[tuple[Sink, Event]]], None]
Observer = Callable[[Sequence, NDArray[np.float32]], None]


class Engine:
    """Continuous batching for one model. `submit` from any thread; `dispatch` calls the sinks, once per step."""

    def __init__(
        self,
        path: Path,
        settings: EngineSettings,
        *,
        dispatch: Dispatch | None = None,
        on_fatal: Callable[[EngineBroken], None] | None = None,
        context_factory: ContextFactory = llama.make_context,
        observer: Observer | None = None,
    ) -> None:
        started = time.monotonic()
        self.settings = settings
        self.model = Model(path, settings)
        self._dispatch = dispatch or _call_sinks
        self._on_fatal = on_fatal
        self._observer = observer
        self._make_context = context_factory
        self._unified = self._choose_kv_mode()
        self._ids = self._count_ids()
        try:
            self._context = context_factory(self.model, settings, self._ids, self._unified)
        except BaseException:
            self.model.close()
            raise
        self._scheduler = Scheduler(self._limits(self._context))
        self._budget = PrefillBudget(
            settings.inter_token_ms / 1e3,
            batch=self._context.n_batch,
            ubatch=self._context.n_ubatch,
            fixed=settings.prefill_budget,
        )
        self.max_sequence = min(self._context.n_ctx_seq, self.model.n_ctx_train or self._context.n_ctx_seq)
        self.metrics = Metrics()
        self.load_seconds = time.monotonic() - started
        self._parked: dict[int, NDArray[np.uint8]] = {}  # by number, for the scheduler
        self._tickets: dict[Sequence, Ticket] = {}
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._outbox: list[tuple[Sink, Event]] = []
        self._stopping = False
        self._draining = False
        self._idle = threading.Event()
        self._idle.set()
        self._last_decode_end: float | None = None
        self._quiet_since: float | None = None  # when there began to be nothing to compute
        self._steps_since_rebuild = HEALTHY_STEPS
        self._consecutive_errors = 0
        workers = min(8, llama.physical_cores() // 2)
        self._pool = ThreadPoolExecutor(workers, "sample") if workers > 2 else None
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)
        self._thread.start()

    # ── for any thread ───────────────────────────────────────────────────────────────────────────────────────────

    @property
    def largest_prompt(self) -> int:
        """Tokens of the longest prompt that leaves room for one token of answer."""
        return self.max_sequence - 1

    def submit(self, request: Generate, sink: Sink) -> Ticket:
        """Queues `request`. Raises PromptTooLong, BadRequest or Draining at once; all later errors reach `sink`."""
        if self._draining or self._stopping:
            raise Draining("The server is stopping and takes no new requests.", retry_after=5)
        if not len(request.tokens):
            raise BadRequest("The prompt has no tokens.")
        if len(request.tokens) > self.largest_prompt:
            raise PromptTooLong(len(request.tokens), self.largest_prompt)
        if request.max_tokens is not None and request.max_tokens > self.max_sequence:
            raise BadRequest(
                f"max_tokens is {request.max_tokens}; this model's context takes {self.max_sequence} here."
            )
        now = time.monotonic()
        limit = min(self.max_sequence, len(request.tokens) + (request.max_tokens or DEFAULT_MAX_TOKENS))
        choices = [Choice(i, self._sequence(request, limit, now), request) for i in range(request.n)]
        ticket = Ticket(request, sink, choices, lambda t: self._post(lambda: self._cancel(t)))
        self._idle.clear()
        self._post(lambda: self._enqueue(ticket))
        return ticket

    def cut(self) -> None:
        """Ends what runs and what waits with an error, at the next step: there is no more time."""
        self._post(lambda: self._fail_all(_stopped()))

    def drain(self, seconds: float) -> bool:
        """Takes no new requests and waits for the accepted ones; False if some are left after `seconds`."""
        self._draining = True
        return self._idle.wait(seconds)

    def close(self) -> None:
        """Fails what is left, ends the thread, frees context and model. Safe to call twice."""
        self._stopping = True
        self._wake.set()
        if self._thread is not threading.current_thread():
            self._thread.join()
        if self._pool:
            self._pool.shutdown()
        self._parked.clear()
        self._context.close()
        self.model.close()

    def status(self) -> dict[str, float | int | str | bool]:
        """Counters, sizes in bytes and tokens, and quantiles of the latest steps."""
        buffers = self._context.buffers
        return {
            **self.metrics.snapshot(),
            "slots": self.settings.slots,
            "kv_mode": "unified" if self._unified else "split",
            "kv_cells": self._context.n_ctx,
            "largest_prompt": self.largest_prompt,
            "model_bytes": self.model.size,
            "weights_bytes": self.model.loaded_bytes,
            "kv_bytes": buffers.get("kv", 0),
            "parked_bytes": self.metrics.parked_tokens * buffers.get("kv", 0) // self._context.n_ctx,
            "compute_bytes": buffers.get("compute", 0) + buffers.get("output", 0),
            "load_seconds": round(self.load_seconds, 3),
            "wait_seconds": round(self.expected_wait(), 3),
        }

    def expected_wait(self) -> float:
        """Seconds until a new request is admitted, from the line before it and the measured time of a request."""
        waiting = self.metrics.waiting + (1 if self.metrics.running >= self.settings.slots else 0)
        return waiting * self.metrics.service_seconds / self.settings.slots

    # ── building ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _choose_kv_mode(self) -> bool:
        """True for one pool. On a GPU a pool costs every row the cells of all others; a CPU skips masked cells."""
        if self.settings.kv_mode != "auto":
            return self.settings.kv_mode == "unified"
        return not self._on_gpu or self.settings.slots <= UNIFIED_UP_TO

    @property
    def _on_gpu(self) -> bool:
        return bool(llama.describe_backend()["gpu_offload"]) and self.settings.gpu_layers != 0

    def _count_ids(self) -> int:
        """Ids for the slots and, in a pool where they cost nothing, as many for retained prefixes."""
        if not self._unified or not self.model.can_share:
            return self.settings.slots
        return min(llama.MAX_SEQUENCES, max(2 * self.settings.slots, self.settings.slots + 16))

    def _limits(self, context: Context) -> Limits:
        return Limits(
            slots=self.settings.slots,
            ids=self._ids,
            capacity=context.n_ctx,
            per_sequence=context.n_ctx_seq,
            unified=self._unified,
            batch=context.n_batch,
            ubatch=context.n_ubatch,
            queue=self.settings.queue_limit,
            can_share=self.model.can_share,
            # In a split cache their lengths differ, so llama.cpp would compute them apart anyway. On a GPU the decodes
            # ride along with the prompts' pass over the weights. A CPU's attention computes whole tiles from 64 rows
            # on, masked or not: 32 decodes with 64 prompt tokens took 343 ms in one call, and 211 ms in two.
            mixed=self._unified and self._on_gpu,
            window=self.model.window,
            park_after=GPU_PARK_AFTER if self._on_gpu else CPU_PARK_AFTER,
            parks=1 if self._on_gpu else 4,  # every run of cells in every layer waits for the GPU once
            parked=self._parking_room(context),
        )

    def _parking_room(self, context: Context) -> int:
        """Tokens that main memory takes."""
        if self._on_gpu and self.settings.flash_attention == "off":
            return 0  # V lies transposed, and would travel number by number
        return self.settings.parked_mb * 2**20 * context.n_ctx // max(1, context.buffers.get("kv", 0))

    def _sequence(self, request: Generate, limit: int, now: float) -> Sequence:
        return Sequence(
            request.tokens,
            account=request.account,
            limit=limit,
            weight=request.weight,
            lane=request.lane,
            own_prefix=request.own_prefix,
            arrived=now,
            deadline=now + self.settings.queue_seconds,
        )

    # ── the loop ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        while not self._stopping:
            try:
                if not self._step():
                    self._rest()
                self._consecutive_errors = 0
            except EngineBroken as error:
                self._end(error)
                return
            except Exception:
                log.exception("the engine's step failed; its sequences end, the engine goes on")
                self._recover()
        self._read_inbox()
        self._fail_all(_stopped())
        self._publish()

    def _step(self) -> bool:
        """Schedule, compute, sample, hand over. False when there was nothing to compute."""
        self._read_inbox()
        scheduler = self._scheduler
        n_decoding = sum(s.pending == 1 for s in scheduler.running)
        step = scheduler.schedule(time.monotonic(), self._budget.tokens(n_decoding, scheduler.readers))
        for sequence in step.expired:
            self._fail(sequence, self._waited_too_long(sequence))
        if step.operations or not step.calls:
            self._measure()
            self._publish()
        if not all(map(self._operate, step.operations)):
            self._lose_cache()
            return True
        for call in step.calls:
            # Whose request has failed meanwhile, as the other choice of an answer, is not computed any more.
            alive = [part for part in call if part.sequence.status is Status.RUNNING]
            if alive and not self._compute(alive):
                break
        self._measure()
        return bool(step.calls)

    def _operate(self, operation: Operation) -> bool:
        """Performs one operation on the cache; False when it and our accounts differ."""
        match operation:
            case Copy(source, target, count):
                self._context.copy(source, target, count)
            case Truncate(slot, count):
                self._context.truncate(slot, count)
            case Park(slot, number):
                self._parked[number] = self._context.save(slot)
            case Forget(number):
                del self._parked[number]
            case Restore(number, slot, count):
                if not self._context.load(slot, self._parked[number]):
                    return False
                self._context.truncate(slot, count)
                self.metrics.restored += 1
        return True

    def _compute(self, call: list[Slice]) -> bool:
        """One decode call and the tokens it yields; False when it must be planned anew."""
        rows = self._fill(call)
        self._quiet_since = None
        self._publish()  # now, since whoever takes it needs the interpreter, which the computation does not
        started = time.monotonic()
        code = self._context.decode(rows)
        ended = time.monotonic()
        if code == llama.NO_CELLS:
            if not self._scheduler.kv_full():
                self._fail_call(call, InternalError("The KV cache has no room for this request."))
            return False
        if code == llama.INVALID:
            self._isolate(call)
            return False
        if code != llama.DECODED:
            self._rebuild(code)
            return False
        self._count(call, started, ended)
        self._scheduler.complete(call)
        outputs = [part.sequence for part in call if part.output]
        if outputs:
            self._accept(outputs, self._context.logits(len(outputs)))
        return True

    def _fill(self, call: list[Slice]) -> int:
        """Writes the slices into the batch arrays; the number of rows."""
        context, at = self._context, 0
        for part in call:
            end = at + part.count
            context.tokens[at:end] = part.sequence.tokens[part.start : part.start + part.count]
            context.positions[at:end] = np.arange(part.start, part.start + part.count)
            context.sequence_ids[at:end] = part.sequence.slot
            context.outputs[at:end] = 0
            context.outputs[end - 1] = part.output
            at = end
        return at

    def _count(self, call: list[Slice], started: float, ended: float) -> None:
        outputs = decoding = prefill = 0
        for part in call:
            outputs += part.output
            if part.output and part.count == 1:
                decoding += 1
            else:
                prefill += part.count
        host = started - self._last_decode_end if self._last_decode_end is not None else None
        self._last_decode_end = ended
        self._budget.observe(decoding, prefill, ended - started)
        self._steps_since_rebuild += 1
        self.metrics.steps += 1
        self.metrics.prompt_tokens += prefill
        self.metrics.recent.append(StepTimes(outputs, prefill, ended - started, host))

    def _accept(self, sequences: list[Sequence], logits: NDArray[np.float32]) -> None:
        """Draws one token per row and moves every choice on. An error belongs to the choice that caused it."""
        for sequence, token in zip(sequences, self._draw(sequences, logits), strict=True):
            ticket = self._tickets.get(sequence)
            if ticket is None:  # another choice of the request has just failed
                continue
            if isinstance(token, ApplianceError):
                self._fail(sequence, token)
                continue
            try:
                self._advance(ticket, sequence, token)
            except ApplianceError as error:
                self._fail(sequence, error)
            except Exception:
                log.exception("a token could not be processed")
                self._fail(sequence, InternalError("The answer could not be continued."))

    def _draw(self, sequences: list[Sequence], logits: NDArray[np.float32]) -> list[int | ApplianceError]:
        if self._pool and len(sequences) >= PARALLEL_DRAWS:
            return list(self._pool.map(self._draw_one, sequences, logits))
        return [self._draw_one(sequence, row) for sequence, row in zip(sequences, logits, strict=True)]

    def _draw_one(self, sequence: Sequence, row: NDArray[np.float32]) -> int | ApplianceError:
        if self._observer:
            self._observer(sequence, row)
        ticket = self._tickets[sequence]
        choice, request = ticket.choices[sequence], ticket.request
        try:
            if request.logprobs is not None:
                row_before = row.copy()
            if request.ignore_eos and choice.constraint is None:
                row[self.model.end_tokens] = -np.inf
            allowed = choice.constraint.mask() if choice.constraint else None
            token = choice.sampler.draw(row, sequence.tokens, allowed)
            if request.logprobs is not None:
                choice.logprobs.append(self._logprob(row_before, token, request.logprobs))
            return token
        except ApplianceError as error:
            return error
        except Exception:
            log.exception("a token could not be drawn")
            return InternalError("The answer could not be continued.")

    def _logprob(self, row: NDArray[np.float32], token: int, alternatives: int) -> TokenLogprob:
        chosen, likeliest = log_probabilities(row, [token], alternatives)
        pieces = self.model.token_bytes
        return TokenLogprob(pieces[token], chosen[0], tuple((pieces[i], p) for i, p in likeliest))

    def _advance(self, ticket: Ticket, sequence: Sequence, token: int) -> None:
        """One drawn token of one choice: its text, and the end if it is one."""
        choice = ticket.choices[sequence]
        choice.generated += 1
        ticket.completion_tokens += 1
        self.metrics.generated_tokens += 1
        if choice.constraint:
            choice.constraint.accept(token)
        if not ticket.request.ignore_eos and self.model.ends(token):
            return self._finish(ticket, choice, "stop")
        sequence.append(token)
        text = choice.stream.feed(self.model.token_bytes[token])
        if choice.stream.stopped or (choice.constraint and choice.constraint.is_finished):
            return self._finish(ticket, choice, "stop", text)
        if not sequence.remaining:
            return self._finish(ticket, choice, "length", text)
        if text or choice.logprobs:
            self._outbox.append((ticket.sink, Chunk(text, choice.index, logprobs=choice.take_logprobs())))
        return None

    def _finish(self, ticket: Ticket, choice: Choice, reason: FinishReason, text: str = "") -> None:
        """The last chunk of a choice, with the usage if it is the request's last."""
        sequence = choice.sequence
        if not choice.index:
            ticket.cached_tokens = sequence.cached_tokens
        del ticket.choices[sequence]
        self._drop(sequence)
        self._observe_service(time.monotonic() - sequence.admitted)
        usage = None if ticket.choices else ticket.usage
        self.metrics.finished += usage is not None
        self.metrics.cached_tokens += sequence.cached_tokens
        text += choice.stream.finish()
        stop = choice.stream.stop if choice.stream.stopped else ""
        self._outbox.append((ticket.sink, Chunk(text, choice.index, reason, usage, choice.take_logprobs(), stop)))

    # ── arrivals and departures, on the decode thread ────────────────────────────────────────────────────────────

    def _post(self, command: Callable[[], None]) -> None:
        self._inbox.append(command)
        self._wake.set()

    def _read_inbox(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    def _enqueue(self, ticket: Ticket) -> None:
        sequences = list(ticket.choices)
        for sequence in sequences:
            self._tickets[sequence] = ticket
        try:
            self._scheduler.submit(sequences)
        except ApplianceError as error:
            error.retry_after = max(1, math.ceil(self.expected_wait()))
            for sequence in sequences:
                del self._tickets[sequence]
            self._outbox.append((ticket.sink, error))
        else:
            ticket.place = self._scheduler.line.place(sequences[0])

    def _cancel(self, ticket: Ticket) -> None:
        self.metrics.cancelled += bool(ticket.choices)
        for sequence in list(ticket.choices):
            self._drop(sequence)
        ticket.choices.clear()

    def _drop(self, sequence: Sequence, *, retain: bool = True) -> None:
        """The sequence leaves the engine; what it computed stays as a prefix."""
        if self._tickets.pop(sequence, None):
            self._scheduler.finish(sequence, retain=retain)

    def _fail(self, sequence: Sequence, error: ApplianceError) -> None:
        """Ends the whole request of `sequence` with `error`; others are not touched."""
        ticket = self._tickets.get(sequence)
        if ticket is None:
            return
        for one in list(ticket.choices):
            self._drop(one, retain=not isinstance(error, InternalError))  # whose cells may be what is wrong
        ticket.choices.clear()
        self.metrics.failed += 1
        self._outbox.append((ticket.sink, error))

    def _fail_call(self, call: list[Slice], error: ApplianceError) -> None:
        for part in call:
            self._fail(part.sequence, error)

    def _fail_all(self, error: ApplianceError) -> None:
        for sequence in list(self._tickets):
            self._fail(sequence, error)

    def _waited_too_long(self, sequence: Sequence) -> QueueTimeout:
        waited = round(time.monotonic() - sequence.arrived)
        wait = max(1, math.ceil(self.expected_wait()))
        ticket = self._tickets.get(sequence)
        place = f", at first as number {ticket.place} in line" if ticket else ""
        return QueueTimeout(
            f"The request waited {waited} s for a free place{place}; a new one waits about {wait} s.", retry_after=wait
        )

    # ── handing over, resting ────────────────────────────────────────────────────────────────────────────────────

    def _publish(self) -> None:
        """One hand-over with everything new."""
        if self._outbox:
            batch, self._outbox = self._outbox, []
            self._dispatch(batch)
        if not self._tickets and not self._inbox:
            self._idle.set()
            if self._inbox:  # somebody has come between the two
                self._idle.clear()

    def _measure(self) -> None:
        scheduler, metrics = self._scheduler, self.metrics
        metrics.waiting = len(scheduler.line)
        metrics.running = len(scheduler.running)
        metrics.kv_used = scheduler.cells.used
        metrics.retained = len(scheduler.retained)
        metrics.parked, metrics.parked_tokens = len(scheduler.parking), scheduler.parking.tokens
        metrics.preempted = scheduler.preemptions

    def _observe_service(self, seconds: float) -> None:
        old = self.metrics.service_seconds
        self.metrics.service_seconds = old + 0.1 * (seconds - old) if old else seconds

    def _rest(self) -> None:
        """Nothing to compute: sleep until a command comes, or a waiter's deadline; after a while, time to copy what
        may have to go later."""
        now = time.monotonic()
        self._last_decode_end = None
        self._quiet_since = self._quiet_since or now
        until = [s.deadline - now for s in self._scheduler.line]
        if now - self._quiet_since < COPY_AFTER:
            until.append(self._quiet_since + COPY_AFTER - now)
        elif not self._inbox and (copy := self._scheduler.copy_idle()):
            self._operate(copy)
            return
        self._wake.clear()
        if not self._inbox and not self._stopping:
            self._wake.wait(max(0.0, min(until)) if until else None)

    # ── when things break ────────────────────────────────────────────────────────────────────────────────────────

    def _isolate(self, call: list[Slice]) -> None:
        """llama.cpp refused the batch and restored its state: a sequence out of step with the cache fails alone."""
        guilty = [p for p in call if p.sequence.slot < 0 or self._context.length(p.sequence.slot) != p.start]
        log.error("an invalid batch; sequences out of step: %s", guilty)
        error = InternalError("The answer could not be continued.")
        self._fail_call(guilty or call, error)

    def _rebuild(self, code: int) -> None:
        """The context is broken: a new one computes everything again; the second time in a row the process must end."""
        log.error("llama_decode failed with %d; the context is rebuilt", code)
        if self._steps_since_rebuild < HEALTHY_STEPS:
            raise EngineBroken(f"The model's context broke twice (llama_decode returned {code}).")
        self._steps_since_rebuild = 0
        self.metrics.rebuilt += 1
        self._context.close()
        try:
            self._context = self._make_context(self.model, self.settings, self._ids, self._unified)
        except ApplianceError as error:
            raise EngineBroken(f"The model's context cannot be made again: {error.message}") from error
        self._reset()

    def _lose_cache(self) -> None:
        """The cache and our accounts of it differ, which nobody must pay for: everything is computed again."""
        log.error("a parked prefix did not come back; the cache is emptied")
        self._context.clear()
        self._reset()

    def _reset(self) -> None:
        self._parked.clear()
        self._scheduler.reset()

    def _recover(self) -> None:
        """After an exception in the loop: fail what ran (the second time in a row: what waits, too); empty cache."""
        self._consecutive_errors += 1
        error = InternalError("The engine failed while computing this answer.")
        for sequence in list(self._tickets):
            if sequence in self._scheduler.running or self._consecutive_errors > 1:
                self._fail(sequence, error)
        self._context.clear()
        self._reset()
        self._publish()

    def _end(self, error: EngineBroken) -> None:
        self._stopping = True
        self._read_inbox()
        self._fail_all(InternalError("The engine broke; the server restarts."))
        self._publish()
        if self._on_fatal:
            self._on_fatal(error)


def _stopped() -> Draining:
    return Draining("The server stopped before the answer was complete.", retry_after=5)


def _call_sinks(batch: list[tuple[Sink, Event]]) -> None:
    for sink, event in batch:
        sink(event)
