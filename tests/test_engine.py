"""The engine through real llama.cpp: what a request gets, what it never gets, and what happens when things break."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from appliance import tinymodel
from appliance.config import EngineSettings
from appliance.engine.engine import Engine
from appliance.engine.grammar import SchemaCompiler
from appliance.engine.model import Context, Model
from appliance.engine.request import Event, Generate, Ticket
from appliance.engine.sampling import Sampler
from appliance.engine.sequence import Sequence
from appliance.errors import (
    ApplianceError,
    BadRequest,
    Draining,
    EngineBroken,
    InternalError,
    ModelError,
    PromptTooLong,
    QueueTimeout,
    Saturated,
)
from appliance.messages import Chunk, FinishReason, Sampling, TokenLogprob, Usage

SETTINGS = EngineSettings(slots=4, context=2_048, threads=2)
GREEDY = Sampling(temperature=0)


class Heard:
    """Collects what one request hears."""

    def __init__(self) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def chunk(self) -> Chunk:
        event = self.events.get(timeout=60)
        if isinstance(event, ApplianceError):
            raise event
        return event

    def all(self, n: int = 1) -> list[Chunk]:
        """Every chunk until `n` choices are finished."""
        chunks: list[Chunk] = []
        while sum(c.finish_reason is not None for c in chunks) < n:
            chunks.append(self.chunk())
        return chunks


def text_of(chunks: list[Chunk], index: int = 0) -> str:
    return "".join(c.text for c in chunks if c.index == index)


@contextmanager
def running(path: Path, settings: EngineSettings = SETTINGS, **kwargs: Any) -> Iterator[Engine]:
    engine = Engine(path, settings, **kwargs)
    try:
        yield engine
    finally:
        engine.close()


def tokens(engine: Engine, text: str) -> NDArray[np.int32]:
    return np.array(engine.model.tokenize(text.encode(), add_special=True, parse_special=False), np.int32)


def ask(engine: Engine, text: str = "The machine in the corner", **kwargs: Any) -> tuple[Ticket, Heard]:
    heard = Heard()
    kwargs.setdefault("sampling", GREEDY)
    kwargs.setdefault("ignore_eos", True)
    return engine.submit(Generate(tokens(engine, text), **kwargs), heard.events.put), heard


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.002)


def test_an_answer_comes_in_pieces_with_usage_at_the_end(tiny_gguf: Path) -> None:
    with running(tiny_gguf) as engine:
        ticket, heard = ask(engine, max_tokens=20)
        chunks = heard.all()
        assert len(chunks) > 3 and text_of(chunks)
        last: tuple[FinishReason | None, Usage | None] = (chunks[-1].finish_reason, chunks[-1].usage)
        assert last == ("length", Usage(len(ticket.request.tokens), 20, 0))


def test_greedy_answers_do_not_depend_on_the_company(tiny_f32_gguf: Path) -> None:
    exact = replace(SETTINGS, kv_type="f32", flash_attention="off")
    with running(tiny_f32_gguf, exact) as engine:
        prompts = [f"Question {i}: what does the river say" for i in range(6)]
        alone = [text_of(ask(engine, p, max_tokens=30)[1].all()) for p in prompts]
        together = [text_of(h.all()) for _, h in [ask(engine, p, max_tokens=30) for p in prompts]]
        assert together == alone
        assert len(set(alone)) > 1


def test_a_seed_repeats_and_choices_share_the_prompt(tiny_gguf: Path) -> None:
    sampling = Sampling(temperature=1.0, seed=3)
    with running(tiny_gguf) as engine:
        once = ask(engine, "A long enough prompt " * 12, max_tokens=20, n=3, sampling=sampling)[1].all(3)
        texts = [text_of(once, i) for i in range(3)]
        assert len(set(texts)) == 3
        assert int(engine.status()["cached_tokens"]) >= 2 * 32
        assert [c.usage for c in once if c.usage] == [once[-1].usage]
        assert once[-1].usage is not None and once[-1].usage.completion_tokens == 60


def test_stop_strings_end_the_answer_and_never_leak(tiny_gguf: Path) -> None:
    with running(tiny_gguf) as engine:
        whole = text_of(ask(engine, max_tokens=60)[1].all())
        stop = whole[20:26]
        chunks = ask(engine, max_tokens=60, stop=("never there", stop))[1].all()
        assert chunks[-1].finish_reason == "stop"
        assert text_of(chunks) == whole[: whole.index(stop)]


def test_an_end_token_ends_the_answer_and_is_not_text(tiny_gguf: Path) -> None:
    with running(tiny_gguf) as engine:
        eos = engine.model.eos
        heard = ask(
            engine, max_tokens=60, ignore_eos=False, sampling=Sampling(temperature=0, logit_bias=((eos, 1e6),))
        )[1]
        chunks = heard.all()
        assert (text_of(chunks), chunks[-1].finish_reason) == ("", "stop")
        ignoring = Sampling(temperature=0, logit_bias=((eos, 100.0),))
        assert ask(engine, max_tokens=9, sampling=ignoring)[1].all()[-1].finish_reason == "length"


def test_generation_ends_with_length_where_the_context_ends(tiny_gguf: Path) -> None:
    with running(tiny_gguf, replace(SETTINGS, context=256)) as engine:
        ticket, heard = ask(engine)
        last = heard.all()[-1]
        assert last.finish_reason == "length" and last.usage is not None
        assert last.usage.total_tokens == 256
        assert ticket.request.max_tokens is None


def test_a_prompt_over_the_context_is_refused_with_both_numbers(tiny_gguf: Path) -> None:
    with running(tiny_gguf, replace(SETTINGS, context=256)) as engine:
        with pytest.raises(PromptTooLong) as caught:
            ask(engine, "much too long " * 200)
        assert caught.value.context_tokens == 255 < caught.value.prompt_tokens
        with pytest.raises(BadRequest, match="max_tokens is 257"):
            ask(engine, max_tokens=257)
        with pytest.raises(BadRequest, match="no tokens"):
            engine.submit(Generate(np.empty(0, np.int32)), print)


def test_a_schema_holds_the_answer(tiny_gguf: Path) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}, "ok": {"type": "boolean"}},
        "required": ["n", "ok"],
        "additionalProperties": False,
    }
    with running(tiny_gguf) as engine:
        compiled = SchemaCompiler(engine.model).compile(schema)
        for seed in range(5):
            sampling = Sampling(temperature=1.0, seed=seed)
            chunks = ask(engine, schema=compiled, sampling=sampling, ignore_eos=False, max_tokens=400)[1].all()
            assert chunks[-1].finish_reason == "stop"
            answer = json.loads(text_of(chunks))
            assert isinstance(answer["n"], int) and isinstance(answer["ok"], bool)


def test_logprobs_name_the_chosen_token_and_alternatives(tiny_gguf: Path) -> None:
    with running(tiny_gguf) as engine:
        chunks = ask(engine, max_tokens=10, logprobs=3)[1].all()
        entries: list[TokenLogprob] = [e for c in chunks for e in c.logprobs]
        assert len(entries) == 10
        for entry in entries:
            assert len(entry.top) == 3 and entry.top[0] == (entry.token, entry.logprob)  # greedy: the likeliest
            assert entry.logprob <= 0


def test_cancelling_frees_the_cells_at_the_next_step(tiny_gguf: Path) -> None:
    with running(tiny_gguf) as engine:
        ticket, heard = ask(engine, "Please tell me everything " * 8, max_tokens=1_500)
        heard.chunk()
        assert engine.metrics.running == 1 and engine.metrics.kv_used > 0  # it was held
        before = engine.metrics.steps
        ticket.cancel()
        wait_until(lambda: engine.metrics.running == 0)
        assert engine.metrics.steps <= before + 3
        assert engine.metrics.cancelled == 1
        ticket.cancel()  # again does nothing
        while not heard.events.empty():
            assert not isinstance(heard.events.get(), ApplianceError)
        assert ticket.usage.completion_tokens < 1_500


def test_a_waiting_request_can_be_cancelled(tiny_gguf: Path) -> None:
    with running(tiny_gguf, replace(SETTINGS, slots=1)) as engine:
        first, heard = ask(engine, max_tokens=1_500)
        heard.chunk()
        second, _ = ask(engine, max_tokens=5)
        wait_until(lambda: engine.metrics.waiting == 1)
        second.cancel()
        wait_until(lambda: engine.metrics.waiting == 0)
        assert engine.metrics.running == 1
        first.cancel()


def test_the_waiting_line_is_bounded_and_has_a_deadline(tiny_gguf: Path) -> None:
    settings = replace(SETTINGS, slots=1, queue_limit=1, queue_seconds=0.3)
    with running(tiny_gguf, settings) as engine:
        first, heard = ask(engine, max_tokens=1_900)
        heard.chunk()
        _, waits = ask(engine, max_tokens=5)
        wait_until(lambda: engine.metrics.waiting == 1)
        _, refused = ask(engine, max_tokens=5)
        with pytest.raises(Saturated) as full:
            refused.chunk()
        assert full.value.retry_after is not None and full.value.retry_after >= 1
        with pytest.raises(QueueTimeout) as late:
            waits.chunk()
        assert late.value.retry_after is not None and late.value.retry_after >= 1
        first.cancel()


class Broken(Context):
    """Fails on demand, as a context does whose device is gone."""

    codes: list[int]

    def decode(self, n: int) -> int:
        if self.codes:
            code = self.codes.pop(0)
            if code < -900:
                raise RuntimeError("injected")
            return code
        return super().decode(n)


def breaking(codes: list[int]) -> Callable[[Model, EngineSettings, int, bool], Context]:
    Broken.codes = codes

    def factory(model: Model, settings: EngineSettings, ids: int, unified: bool) -> Context:
        return Broken(model, settings, ids=ids, unified=unified)

    return factory


def test_a_broken_context_is_rebuilt_and_nobody_loses_anything(tiny_gguf: Path) -> None:
    with running(tiny_gguf) as engine:
        expected = text_of(ask(engine, max_tokens=40)[1].all())
    codes: list[int] = []
    with running(tiny_gguf, context_factory=breaking(codes)) as engine:
        ticket, heard = ask(engine, max_tokens=40)
        first = heard.chunk()
        codes.append(-3)
        assert first.text + text_of(heard.all()) == expected
        assert engine.metrics.rebuilt == 1


def test_a_second_break_ends_the_process_by_name(tiny_gguf: Path) -> None:
    fatal: queue.SimpleQueue[EngineBroken] = queue.SimpleQueue()
    codes = [-3, -3]
    with running(tiny_gguf, context_factory=breaking(codes), on_fatal=fatal.put) as engine:
        _, heard = ask(engine, max_tokens=40)
        with pytest.raises(InternalError):
            heard.all()
        assert fatal.get(timeout=30).exit_code == 70
        with pytest.raises(Draining):
            ask(engine)


def test_a_context_that_cannot_be_made_again_ends_the_process_by_name(tiny_gguf: Path) -> None:
    fatal: queue.SimpleQueue[EngineBroken] = queue.SimpleQueue()
    codes: list[int] = []
    make = breaking(codes)
    made: list[Context] = []

    def once(model: Model, settings: EngineSettings, ids: int, unified: bool) -> Context:
        if made:
            raise ModelError("no memory")
        made.append(make(model, settings, ids, unified))
        return made[0]

    with running(tiny_gguf, context_factory=once, on_fatal=fatal.put) as engine:
        _, heard = ask(engine, max_tokens=500)
        heard.chunk()
        codes.append(-3)
        with pytest.raises(InternalError):
            heard.all()
        assert fatal.get(timeout=30).exit_code == 70


def test_a_choice_that_fails_takes_its_siblings_along_and_nobody_else(tiny_gguf: Path) -> None:
    """The second choice would be computed in the same step, after the first has failed."""
    spoilt: list[Sequence] = []

    def spoil(sequence: Sequence, row: NDArray[np.float32]) -> None:
        if sequence.account == "spoilt" and sequence.length > sequence.n_prompt + 3:
            spoilt.append(sequence)
            row[:] = np.nan

    with running(tiny_gguf, replace(SETTINGS, slots=2), observer=spoil) as engine:
        _, other = ask(engine, "Somebody else", account="other", max_tokens=60)
        _, heard = ask(engine, account="spoilt", max_tokens=50, n=2)
        with pytest.raises(InternalError):
            heard.all(2)
        assert spoilt and other.all()[-1].finish_reason == "length"
        _, again = ask(engine, account="fine", max_tokens=5)
        assert again.all()[-1].finish_reason == "length"


def test_cutting_ends_everybody_with_an_error_and_the_engine_lives(tiny_gguf: Path) -> None:
    with running(tiny_gguf, replace(SETTINGS, slots=1)) as engine:
        _, runs = ask(engine, max_tokens=1_500)
        runs.chunk()
        _, waits = ask(engine, max_tokens=5)
        engine.cut()
        for heard in (runs, waits):
            with pytest.raises(Draining):
                heard.all()
        assert ask(engine, max_tokens=5)[1].all()[-1].finish_reason == "length"


def test_without_a_limit_1024_tokens_come(tiny_gguf: Path) -> None:
    with running(tiny_gguf) as engine:
        usage = ask(engine, max_tokens=None)[1].all()[-1].usage
        assert usage is not None and usage.completion_tokens == 1_024


def test_rows_drawn_in_parallel_threads_are_those_drawn_one_by_one(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn again from the same rows: which sequences share a batch, and so their rows' last bits, is up to time."""
    used: list[str] = []
    rows: dict[Sequence, list[NDArray[np.float32]]] = {}

    class Pool(ThreadPoolExecutor):
        def __init__(self, workers: int, name: str) -> None:
            super().__init__(workers, name)
            used.append(name)

    def record(sequence: Sequence, row: NDArray[np.float32]) -> None:
        rows.setdefault(sequence, []).append(row.copy())

    monkeypatch.setattr("appliance.engine.model.physical_cores", lambda: 8)
    monkeypatch.setattr("appliance.engine.engine.PARALLEL_DRAWS", 2)
    monkeypatch.setattr("appliance.engine.engine.ThreadPoolExecutor", Pool)
    sampling = Sampling(temperature=1.0, seed=9)
    with running(tiny_gguf, observer=record) as engine:
        for heard in [ask(engine, f"{i} once", max_tokens=40, sampling=sampling)[1] for i in range(4)]:
            heard.all()
        ends = engine.model.end_tokens
    assert used == ["sample"] and len(rows) == 4
    for sequence, seen in rows.items():
        sampler, (before, drawn) = Sampler(sampling), np.split(sequence.tokens, [-40])
        assert len(seen) == 40
        for n, row in enumerate(seen):
            row[ends] = -np.inf
            assert sampler.draw(row, np.concatenate([before, drawn[:n]])) == drawn[n]


def test_the_wait_is_estimated_from_what_was_measured(tiny_gguf: Path) -> None:
    with running(tiny_gguf, replace(SETTINGS, slots=1, queue_seconds=0.3)) as engine:
        assert engine.expected_wait() == 0.0
        first, heard = ask(engine, max_tokens=1_900)
        heard.chunk()
        engine.metrics.service_seconds = 2.0
        waits = [ask(engine, max_tokens=5)[1] for _ in range(3)]
        wait_until(lambda: engine.metrics.waiting == 3)
        assert engine.expected_wait() == pytest.approx(4 * 2.0, rel=0.01)
        for number, late in enumerate(waits, 1):
            with pytest.raises(QueueTimeout, match=f"number {number} in line"):
                late.chunk()
        first.cancel()


def test_an_exception_in_the_loop_fails_what_ran_and_the_engine_lives(tiny_gguf: Path) -> None:
    codes: list[int] = []
    with running(tiny_gguf, context_factory=breaking(codes)) as engine:
        _, heard = ask(engine, max_tokens=500)
        heard.chunk()
        codes.append(-999)
        with pytest.raises(InternalError):
            heard.all()
        assert ask(engine, max_tokens=5)[1].all()[-1].finish_reason == "length"


def test_no_cells_is_a_scheduling_event(tiny_gguf: Path) -> None:
    codes: list[int] = []
    with running(tiny_gguf, context_factory=breaking(codes)) as engine:
        some = [ask(engine, f"{i} tell me", max_tokens=60) for i in range(3)]
        some[0][1].chunk()
        codes += [1, 1]
        for _, heard in some:
            assert heard.all()[-1].finish_reason == "length"
        assert engine.metrics.failed == 0


class Forgetful(Context):
    """Brings nothing back."""

    asked = 0

    def load(self, sequence: int, state: NDArray[np.uint8]) -> bool:
        Forgetful.asked += 1
        return False


@pytest.mark.parametrize("factory", [Context, Forgetful])
def test_a_parked_prefix_comes_back_or_is_computed_again(tiny_gguf: Path, factory: type[Context]) -> None:
    Forgetful.asked = 0

    def make(model: Model, settings: EngineSettings, ids: int, unified: bool) -> Context:
        return factory(model, settings, ids=ids, unified=unified)

    with running(tiny_gguf, context_factory=make) as engine:
        question = "What stands on the old bridge? " * 3
        first = text_of(ask(engine, question, account="a", max_tokens=20)[1].all())
        _, other = ask(engine, "Another account", account="b", max_tokens=600)
        wait_until(lambda: engine.status()["parked"] == 1 and engine.status()["retained"] == 0)
        assert int(engine.status()["parked_bytes"]) > 0
        ticket, heard = ask(engine, question, account="a", max_tokens=20)
        assert text_of(heard.all()) == first
        assert other.all()[-1].finish_reason == "length", "nobody else has lost anything"
        status = engine.status()
        if factory is Forgetful:
            assert (Forgetful.asked, status["restored"], status["failed"]) == (1, 0, 0)
        else:
            assert status["restored"] == 1 and ticket.cached_tokens > 20


def test_an_error_belongs_to_the_request_that_caused_it(tiny_gguf: Path) -> None:
    spoiled: list[int] = []

    def spoil(sequence: Any, row: NDArray[np.float32]) -> None:
        if sequence.account == "unlucky":
            spoiled.append(sequence.number)
            row[:] = np.nan

    with running(tiny_gguf, observer=spoil) as engine:
        good = [ask(engine, f"{i} tell me", max_tokens=50) for i in range(3)]
        _, bad = ask(engine, max_tokens=50, account="unlucky")
        with pytest.raises(InternalError):
            bad.all()
        assert spoiled
        assert all(h.all()[-1].finish_reason == "length" for _, h in good)


def test_draining_finishes_what_runs_and_takes_nothing_new(tiny_gguf: Path) -> None:
    with running(tiny_gguf) as engine:
        _, heard = ask(engine, max_tokens=200)
        heard.chunk()
        done = threading.Event()
        threading.Thread(target=lambda: done.set() if engine.drain(60) else None).start()
        wait_until(lambda: engine._draining)
        with pytest.raises(Draining):
            ask(engine)
        assert heard.all()[-1].finish_reason == "length"
        assert done.wait(10)


def test_closing_answers_everybody(tiny_gguf: Path) -> None:
    engine = Engine(tiny_gguf, replace(SETTINGS, slots=1))
    _, runs = ask(engine, max_tokens=1_900)
    _, waits = ask(engine, max_tokens=1_900)
    runs.chunk()
    engine.close()
    engine.close()
    for heard in (runs, waits):
        with pytest.raises(Draining):
            heard.all()


def test_an_idle_engine_does_nothing(tiny_gguf: Path) -> None:
    with running(tiny_gguf) as engine:
        ask(engine, max_tokens=5)[1].all()
        wait_until(lambda: not engine.metrics.running)
        time.sleep(0.1)
        before, spent = engine.metrics.steps, time.process_time()
        time.sleep(0.5)
        assert engine.metrics.steps == before
        assert time.process_time() - spent < 0.25  # a spinning thread would take all of the half second


def test_a_model_that_was_made_for_embeddings_is_refused_with_a_sentence(tmp_path: Path) -> None:
    tinymodel.write(tmp_path / "embedding.gguf", embedding=True)
    with pytest.raises(ModelError, match="not a text-generating"):
        Engine(tmp_path / "embedding.gguf", SETTINGS)


def test_a_file_that_is_no_model_is_refused_with_a_sentence(tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(ModelError, match="cannot load"):
        Engine(bad, SETTINGS)
