"""Batching changes nothing: every logit vector computed in company equals a lone replay of the same history.

Through real llama.cpp, on an F32 model with F32 KV and flash attention off, so that only the batch's shape is left as
noise (measured ≤ 1.2e-5). The workload shares prefixes, preempts, recomputes and cancels, and asserts that it did. The
test proves itself: a dropped cell, a shifted position and a foreign block are injected, and each must be seen.
"""

from __future__ import annotations

import queue
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from llama_cpp import llama_cpp as lib
from numpy.typing import NDArray

from appliance.config import EngineSettings
from appliance.engine.engine import Engine
from appliance.engine.model import Context, ContextFactory, Model, make_context
from appliance.engine.request import Event, Generate, Ticket
from appliance.engine.sequence import Sequence
from appliance.messages import Chunk, Sampling

TOLERANCE = 1e-4
EXACT = EngineSettings(slots=4, context=512, kv_type="f32", flash_attention="off", batch=64, ubatch=64, threads=2)


@dataclass
class Recorder:
    """Every row that was sampled, by sequence and history length."""

    rows: dict[Sequence, dict[int, NDArray[np.float32]]] = field(default_factory=lambda: defaultdict(dict))

    def __call__(self, sequence: Sequence, row: NDArray[np.float32]) -> None:
        self.rows[sequence][sequence.length] = row.copy()


class Faulty(Context):
    """After the first long copy something in the target is wrong."""

    fault = ""
    hits = 0

    def __init__(self, model: Model, settings: EngineSettings, *, ids: int, unified: bool) -> None:
        super().__init__(model, settings, ids=ids, unified=unified)
        self.seen = np.zeros((ids, self.n_ctx), np.int32)  # which token each id holds at each position

    def decode(self, n: int) -> int:
        self.seen[self.sequence_ids[:n], self.positions[:n]] = self.tokens[:n]
        return super().decode(n)

    def copy(self, source: int, target: int, count: int) -> None:
        super().copy(source, target, count)
        self.seen[target] = self.seen[source]
        foreign = (self.seen[:, 8:16] != self.seen[target, 8:16]).any(axis=1)
        others = [int(s) for s in np.flatnonzero(foreign) if self.length(int(s)) > 24]
        if count < 24 or type(self).hits or not others:
            return
        type(self).hits += 1
        if self.fault == "dropped cell":
            lib.llama_memory_seq_rm(self._memory, target, 10, 11)
        elif self.fault == "shifted position":
            lib.llama_memory_seq_rm(self._memory, target, 11, 12)
            lib.llama_memory_seq_add(self._memory, target, 10, 11, 1)
        elif self.fault == "foreign block":
            lib.llama_memory_seq_rm(self._memory, target, 8, 16)
            lib.llama_memory_seq_cp(self._memory, others[0], target, 8, 16)


def faulty(kind: str) -> tuple[type[Faulty], ContextFactory]:
    cls = type("Injected", (Faulty,), {"fault": kind, "hits": 0})

    def factory(model: Model, settings: EngineSettings, ids: int, unified: bool) -> Context:
        made: Context = cls(model, settings, ids=ids, unified=unified)
        return made

    return cls, factory


def run_company(
    path: Path, settings: EngineSettings, factory: ContextFactory = make_context
) -> tuple[Recorder, dict[str, float | int | str | bool]]:
    """Three waves in which account a fills every slot, b needs one, and one request is cancelled; rows and counters."""
    recorder = Recorder()
    engine = Engine(path, settings, context_factory=factory, observer=recorder)
    random = np.random.default_rng(5)
    vocabulary = engine.model.n_tokens

    def text(n: int) -> NDArray[np.int32]:
        return random.integers(0, 250, n).astype(np.int32) % vocabulary

    try:
        shared = {"a": text(60), "b": text(40)}
        for wave in range(3):
            open_requests: list[tuple[Ticket, queue.SimpleQueue[Event]]] = []
            for i in range(6):
                account = "b" if i in (3, 4) else "a"
                events: queue.SimpleQueue[Event] = queue.SimpleQueue()
                request = Generate(
                    np.concatenate([shared[account], text(3 + 11 * (i + wave))]),
                    account=account,
                    sampling=Sampling(temperature=1.0, seed=100 * wave + i),
                    max_tokens=60 if i < 5 else 300,  # the last one is cancelled, and must still run by then
                    ignore_eos=True,
                    n=2 if i == 1 else 1,
                )
                open_requests.append((engine.submit(request, events.put), events))
            victim, heard = open_requests.pop()
            assert isinstance(heard.get(timeout=60), Chunk)
            victim.cancel()
            for ticket, events in open_requests:
                while ticket.choices:
                    assert isinstance(events.get(timeout=60), Chunk)
        assert engine.drain(60)
        return recorder, engine.status()
    finally:
        engine.close()


def replay_deviation(path: Path, settings: EngineSettings, recorder: Recorder) -> float:
    """The largest difference between a recorded row and the same history computed alone, token by token."""
    model = Model(path, settings)
    context = Context(model, replace(settings, slots=1), ids=1, unified=True)
    worst = 0.0
    for sequence, rows in recorder.rows.items():
        context.clear()
        for position, token in enumerate(sequence.tokens[: max(rows)]):
            context.tokens[0], context.positions[0] = token, position
            context.sequence_ids[0], context.outputs[0] = 0, 1
            assert context.decode(1) == 0
            if position + 1 in rows:
                worst = max(worst, float(np.abs(context.logits(1)[0] - rows[position + 1]).max()))
    context.close()
    model.close()
    return worst


@pytest.mark.parametrize("mode", ["unified", "split"])
def test_company_changes_no_logit(tiny_f32_gguf: Path, mode: str) -> None:
    settings = replace(EXACT, kv_mode=mode, context=512 if mode == "unified" else 4 * 512)
    recorder, status = run_company(tiny_f32_gguf, settings)
    assert int(status["cancelled"]) >= 3
    assert int(status["cached_tokens"]) > 200
    assert int(status["preempted"]) > 0, "the workload must preempt and recompute"
    assert (int(status["restored"]) > 0) == (mode == "unified"), "the workload must park and bring back"
    assert sum(map(len, recorder.rows.values())) > 500
    assert replay_deviation(tiny_f32_gguf, settings, recorder) < TOLERANCE


@pytest.mark.parametrize("fault", ["dropped cell", "shifted position", "foreign block"])
def test_the_comparison_sees_every_fault(tiny_f32_gguf: Path, fault: str) -> None:
    settings = replace(EXACT, kv_mode="unified", context=1_024)
    cls, factory = faulty(fault)
    recorder, _ = run_company(tiny_f32_gguf, settings, factory)
    assert cls.hits == 1, "the fault was injected"
    assert replay_deviation(tiny_f32_gguf, settings, recorder) > TOLERANCE
