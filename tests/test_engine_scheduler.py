"""The scheduler, the radix index, the cell table and the fairness counters, without a model.

`Simulator` is the other side of the scheduler's contract: it performs every step on a plain dictionary of sequence ids,
refuses what the real cache would refuse, and counts cells its own way.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from appliance.engine.cells import CellTable
from appliance.engine.density import densest, move, runs
from appliance.engine.fairness import WaitingLine
from appliance.engine.parking import Parking, Prefix
from appliance.engine.prefixes import PrefixIndex, common_prefix
from appliance.engine.scheduler import (
    Copy,
    Forget,
    Limits,
    Operation,
    Park,
    Restore,
    Scheduler,
    Step,
    Truncate,
)
from appliance.engine.sequence import Sequence, Status
from appliance.errors import Saturated

UNIFIED = Limits(
    slots=4, ids=8, capacity=256, per_sequence=256, unified=True, batch=64, ubatch=64, queue=1_000, park_after=256
)
SPLIT = replace(UNIFIED, ids=4, per_sequence=64, unified=False)


def ints(*values: int) -> NDArray[np.int32]:
    return np.array(values, np.int32)


def prompt(length: int, start: int = 1) -> NDArray[np.int32]:
    return np.arange(start, start + length, dtype=np.int32)


class Simulator:
    """A cache of (token, origin) cells per id; the same origin object in two ids is one shared cell."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.scheduler = Scheduler(limits)
        self.cache: dict[int, list[tuple[int, object]]] = {}
        self.memory: dict[int, list[int]] = {}  # the tokens of what is parked
        self.restored = 0
        self.idles = True  # copies a prefix before every step in which nothing runs
        self.now = 0.0
        self.first_output: dict[Sequence, int] = {}
        self.steps = 0

    def used(self) -> int:
        if not self.limits.unified:
            return sum(map(len, self.cache.values()))
        return len({id(cell) for row in self.cache.values() for _, cell in row})

    def step(self, budget: int = 64) -> Step:
        self.now += 1.0
        self.steps += 1
        if self.idles:
            copy = self.scheduler.copy_idle()
            if copy is not None:
                self._operate(copy)
        step = self.scheduler.schedule(self.now, budget)
        for op in step.operations:
            self._operate(op)
        assert self.scheduler.cells.used == self.used()
        self._check()
        for call in step.calls:
            self._decode(call)
        return step

    def _operate(self, operation: Operation) -> None:
        match operation:
            case Copy(source, target, count):
                assert not self.cache.get(target), "copied onto an id in use"
                cells = self.cache[source][:count]
                assert len(cells) == count
                self.cache[target] = list(cells) if self.limits.unified else [(t, object()) for t, _ in cells]
            case Truncate(slot, count):
                del self.cache[slot][count:]
            case Park(slot, number):
                assert self.limits.unified and number not in self.memory
                self.memory[number] = [t for t, _ in self.cache[slot]]
            case Forget(number):
                del self.memory[number]
            case Restore(number, slot, count):
                assert not self.cache.get(slot), "restored onto an id in use"
                self.cache[slot] = [(t, object()) for t in self.memory[number]]
                assert self.used() <= self.limits.capacity, "no cells for the whole of it"
                del self.cache[slot][count:]
                self.restored += 1

    def _decode(self, call: list) -> None:  # type: ignore[type-arg]
        slots = [p.sequence.slot for p in call]
        assert slots == sorted(set(slots)), "a sequence id twice, or not ascending, in one call"
        assert sum(p.count for p in call) <= self.limits.batch
        for part in call:
            row = self.cache.setdefault(part.sequence.slot, [])
            assert len(row) == part.start, "positions with a hole"
            row += [(int(t), object()) for t in part.sequence.tokens[part.start : part.start + part.count]]
            assert len(row) <= self.limits.per_sequence
        if self.limits.unified:
            assert self.used() <= self.limits.capacity
        self.scheduler.complete(call)
        for part in call:
            sequence = part.sequence
            assert [t for t, _ in self.cache[sequence.slot]] == sequence.tokens[: sequence.computed].tolist()
            if part.output:
                assert sequence.computed == sequence.length
                self.first_output.setdefault(sequence, self.steps)
                sequence.append(int(sequence.length * 7 % 50 + 100 * sequence.number))
                if not sequence.remaining:
                    self.scheduler.finish(sequence)

    def _check(self) -> None:
        slots = [s.slot for s in self.scheduler.running]
        assert len(set(slots)) == len(slots) <= self.limits.slots
        assert not set(slots) & set(self.scheduler.retained)
        assert sum(map(len, self.memory.values())) == self.scheduler.parking.tokens <= self.limits.parked
        assert set(self.memory) == set(self.scheduler.parking)

    def run(self, sequences: list[Sequence], most: int = 5_000) -> None:
        for _ in range(most):
            if all(s.status is Status.FINISHED for s in sequences):
                return
            self.step()
        raise AssertionError(f"somebody starves: {[s for s in sequences if s.status is not Status.FINISHED]}")


def sequence(tokens: NDArray[np.int32], new: int = 8, account: str = "a", **kwargs: float) -> Sequence:
    return Sequence(tokens, account=account, limit=len(tokens) + new, **kwargs)  # type: ignore[arg-type]


@st.composite
def workloads(draw: st.DrawFn) -> list[tuple[int, Sequence]]:
    """(arrival step, sequence): prompts share prefixes within and between accounts."""
    found = []
    for _ in range(draw(st.integers(1, 14))):
        family, shared, own = draw(st.integers(0, 2)), draw(st.integers(0, 40)), draw(st.integers(1, 20))
        tokens = np.concatenate(
            [prompt(shared, 1000 * family), np.array(draw(st.lists(st.integers(0, 3), min_size=own, max_size=own)))]
        )
        account = draw(st.sampled_from("abc"))
        one = Sequence(
            tokens.astype(np.int32),
            account=account,
            limit=min(64, len(tokens) + draw(st.integers(1, 30))),
            weight={"a": 1.0, "b": 2.0, "c": draw(st.sampled_from([1.0, 4.0]))}[account],
            lane=draw(st.sampled_from(["interactive", "batch"])),
            own_prefix=draw(st.sampled_from([0, min(8, len(tokens))])),
        )
        found.append((draw(st.integers(0, 25)), one))
    return found


@given(
    workload=workloads(),
    unified=st.booleans(),
    capacity=st.sampled_from([64, 96, 256]),
    parked=st.sampled_from([0, 50, 200]),
    idles=st.booleans(),
    budget=st.integers(1, 64),
    cancels=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 13)), max_size=4),
)
@settings(max_examples=200, deadline=None)
def test_no_id_twice_no_token_lost_cells_exact_nobody_starves(
    workload: list[tuple[int, Sequence]],
    unified: bool,
    capacity: int,
    parked: int,
    idles: bool,
    budget: int,
    cancels: list[tuple[int, int]],
) -> None:
    limits = replace(UNIFIED, capacity=capacity, per_sequence=capacity, parked=parked) if unified else SPLIT
    sim = Simulator(limits)
    sim.idles = idles
    finished_early = set()
    for at in range(2_000):
        for arrival, one in workload:
            if arrival == at:
                sim.scheduler.submit([one])
        for when, index in cancels:
            if when == at and index < len(workload) and workload[index][0] <= at:
                sim.scheduler.finish(workload[index][1])
                finished_early.add(workload[index][1])
        sim.step(budget)
        if at > 40 and all(s.status is Status.FINISHED for _, s in workload):
            break
    for _, one in workload:
        assert one.status is Status.FINISHED, f"{one} starves"
        assert one.length == one.limit or one in finished_early
    assert len(sim.scheduler.line) == 0 and not sim.scheduler.running
    sim.scheduler._evict_all()
    sim.step()
    assert sim.scheduler.cells.used == 0


def test_a_prompt_is_shared_from_a_sequence_that_is_still_running() -> None:
    sim = Simulator(UNIFIED)
    first = sequence(prompt(40), new=50)
    sim.scheduler.submit([first])
    sim.step()
    second = sequence(np.concatenate([prompt(40), ints(9, 9)]), new=2)
    sim.scheduler.submit([second])
    sim.step()
    assert first.status is Status.RUNNING
    assert second.cached_tokens == 40


def test_followers_wait_for_the_prefix_that_is_being_computed() -> None:
    sim = Simulator(replace(UNIFIED, capacity=512, per_sequence=512))
    group = [sequence(np.concatenate([prompt(100), ints(200 + i)])) for i in range(4)]
    sim.scheduler.submit(group)
    sim.step(budget=64)
    assert [s.status for s in group] == [Status.RUNNING] + [Status.WAITING] * 3
    sim.run(group)
    assert [s.cached_tokens for s in group] == [0, 100, 100, 100]


def test_accounts_never_share_but_the_appliances_own_prefix_is_shared() -> None:
    sim = Simulator(UNIFIED)
    mine = sequence(prompt(40), account="a")
    theirs = sequence(prompt(40), account="b")
    sim.scheduler.submit([mine])
    sim.run([mine])
    sim.scheduler.submit([theirs])
    sim.run([theirs])
    assert theirs.cached_tokens == 0
    own = Sequence(prompt(40, 500), account="a", limit=45, own_prefix=20)
    sim.scheduler.submit([own])
    sim.run([own])
    other = Sequence(prompt(40, 500), account="b", limit=45, own_prefix=20)
    sim.scheduler.submit([other])
    sim.run([other])
    assert other.cached_tokens == 20  # the control: sharing does happen where it is allowed


def test_kv_pressure_evicts_then_preempts_the_lowest_weight_and_everybody_finishes() -> None:
    sim = Simulator(UNIFIED)
    rich = [sequence(prompt(10, 100 * i), new=100, account="rich", weight=4.0) for i in (1, 2)]
    poor = [sequence(prompt(10, 100 * i), new=100, account="poor", weight=1.0) for i in (3, 4)]
    sim.scheduler.submit(rich + poor)
    sim.run(rich + poor)
    assert sim.scheduler.preemptions > 0
    assert all(s.times_preempted == 0 for s in rich)
    assert all(s.length == s.limit for s in rich + poor)


def test_a_newcomer_preempts_the_account_that_holds_everything() -> None:
    sim = Simulator(replace(UNIFIED, capacity=2_048, per_sequence=2_048))
    hogs = [sequence(prompt(20, 100 * i), new=300, account="a") for i in range(1, 21)]
    sim.scheduler.submit(hogs)
    for _ in range(10):
        sim.step()
    assert len(sim.scheduler.running) == 4
    guest = sequence(prompt(5, 9_000), account="b")
    sim.scheduler.submit([guest])
    arrived = sim.steps
    while guest not in sim.first_output:
        sim.step()
    assert sim.first_output[guest] - arrived <= 2
    sim.run([*hogs, guest])
    assert all(s.length == s.limit for s in hogs)


def test_preemption_for_fairness_does_not_go_back_and_forth() -> None:
    sim = Simulator(replace(UNIFIED, capacity=2_048, per_sequence=2_048))
    many = [sequence(prompt(20, 100 * i + 1), new=100, account=f"account {i % 5}") for i in range(20)]
    sim.scheduler.submit(many)
    sim.run(many)
    assert 0 < sim.scheduler.preemptions and max(s.times_preempted for s in many) <= 2


def test_interactive_goes_before_batch() -> None:
    sim = Simulator(replace(UNIFIED, slots=1))
    batch = [Sequence(prompt(5, 100 * i), account="a", limit=10, lane="batch") for i in range(3)]
    quick = Sequence(prompt(5, 900), account="a", limit=10, lane="interactive")
    sim.scheduler.submit([*batch, quick])
    sim.run([*batch, quick])
    assert sim.first_output[quick] < min(sim.first_output[b] for b in batch)


def test_weights_divide_the_service() -> None:
    sim = Simulator(replace(UNIFIED, slots=1, ids=4))
    heavy = [sequence(prompt(5, 100 * i), new=10, account="heavy", weight=4.0) for i in range(1, 13)]
    light = [sequence(prompt(5, 100 * i), new=10, account="light", weight=1.0) for i in range(21, 33)]
    sim.scheduler.submit(light + heavy)
    sim.run(heavy)
    done = sum(s.status is Status.FINISHED for s in light)
    assert 2 <= done <= 4  # a quarter of heavy's twelve


def test_waiters_expire_at_their_deadline_and_preempted_ones_do_not() -> None:
    sim = Simulator(replace(UNIFIED, slots=1))
    running = sequence(prompt(5), new=100)
    late = sequence(prompt(5, 50), deadline=3.0)
    sim.scheduler.submit([running, late])
    expired = [s for _ in range(5) for s in sim.step().expired]
    assert expired == [late]
    sim.scheduler.preempt(running)
    running.deadline = 0.0
    assert sim.step().expired == []


def test_the_waiting_line_is_bounded_and_all_or_nothing() -> None:
    scheduler = Scheduler(replace(UNIFIED, slots=1, queue=2))
    scheduler.submit([sequence(prompt(5)) for _ in range(3)])
    with pytest.raises(Saturated):
        scheduler.submit([sequence(prompt(5))])
    assert len(scheduler.line) == 3


def test_retained_prefixes_that_a_longer_one_contains_are_dropped() -> None:
    sim = Simulator(replace(UNIFIED, capacity=1_024, per_sequence=1_024))
    turns = prompt(20)
    for _ in range(5):
        one = sequence(turns, new=5)
        sim.scheduler.submit([one])
        sim.run([one])
        turns = np.concatenate([one.tokens, ints(7, 7, 7)])
    assert len(sim.scheduler.retained) == 1


def test_when_the_cache_says_full_prefixes_go_first_then_a_sequence() -> None:
    sim = Simulator(UNIFIED)
    old = sequence(prompt(30, 500), new=3)
    sim.scheduler.submit([old])
    sim.run([old])
    two = [sequence(prompt(30), new=50), sequence(prompt(30, 100), new=50)]
    sim.scheduler.submit(two)
    sim.step()
    assert sim.scheduler.retained
    assert sim.scheduler.kv_full() and not sim.scheduler.retained and len(sim.scheduler.running) == 2
    assert sim.scheduler.kv_full() and len(sim.scheduler.running) == 1
    assert not sim.scheduler.kv_full()
    sim.run(two)


def test_a_rebuilt_context_computes_everything_again() -> None:
    sim = Simulator(UNIFIED)
    some = [sequence(prompt(30, 100 * i), new=30) for i in range(3)]
    sim.scheduler.submit(some)
    for _ in range(8):
        sim.step()
    before = [s.tokens.tolist() for s in some]
    sim.scheduler.reset()
    sim.cache.clear()
    sim.run(some)
    assert all(s.tokens.tolist()[: len(b)] == b for s, b in zip(some, before, strict=True))


def test_a_prefix_that_costs_others_attention_is_parked_and_comes_back() -> None:
    sim = Simulator(replace(UNIFIED, capacity=2_000, per_sequence=2_000, parked=500))
    sim.idles = False
    chat = sequence(prompt(60), new=8)
    sim.scheduler.submit([chat])
    sim.run([chat])
    assert list(sim.scheduler.retained) and not len(sim.scheduler.parking)
    other = sequence(prompt(30, 900), new=UNIFIED.park_after + 20, account="b")
    sim.scheduler.submit([other])
    for _ in range(UNIFIED.park_after // 2):
        sim.step()
    assert sim.scheduler.retained, "it has not cost that much yet"
    sim.run([other])
    assert len(sim.scheduler.parking) and chat.account not in {p.namespace for p in sim.scheduler.retained.values()}
    stranger = sequence(prompt(60), new=8, account="c")
    again = sequence(np.concatenate([chat.tokens, ints(7, 7)]), new=8)
    sim.scheduler.submit([stranger, again])
    sim.run([stranger, again])
    assert sim.restored == 1 and again.cached_tokens == chat.length - 1  # the last token was never computed
    assert stranger.cached_tokens == 0, "what is parked belongs to its account"


def test_a_long_prompt_of_others_parks_at_once() -> None:
    sim = Simulator(replace(UNIFIED, capacity=2_000, per_sequence=2_000, batch=1_000, parked=500))
    sim.idles = False
    chat, long = sequence(prompt(60)), sequence(prompt(UNIFIED.park_after + 1, 500), account="b")
    sim.scheduler.submit([chat])
    sim.run([chat])
    sim.scheduler.submit([long])
    step = sim.step(budget=1_000)
    assert [type(op) for op in step.operations] == [Park, Truncate], "before the step that would pay for it"


def test_what_an_idle_box_has_copied_leaves_without_delay_and_a_follow_up_needs_no_copy() -> None:
    sim = Simulator(replace(UNIFIED, capacity=2_000, per_sequence=2_000, batch=1_000, parked=500))
    chat, long = sequence(prompt(60)), sequence(prompt(UNIFIED.park_after + 1, 500), account="b")
    finished(sim, chat)
    sim.step()
    assert len(sim.memory) == 1 and list(sim.scheduler.retained), "it lies in both"
    sim.scheduler.submit([long])
    assert [type(op) for op in sim.step(budget=1_000).operations] == [Truncate], "it was copied before"
    sim.run([long])
    again = sequence(np.concatenate([chat.tokens, ints(7)]))
    finished(sim, again)
    assert sim.restored == 1 and again.cached_tokens == chat.length - 1

    sim = Simulator(replace(UNIFIED, capacity=2_000, per_sequence=2_000, batch=1_000, parked=500))
    first = sequence(prompt(60))
    finished(sim, first)
    sim.step()
    copies = set(sim.memory)
    follow_up = sequence(np.concatenate([first.tokens[: first.length - 1], ints(7)]))
    finished(sim, follow_up)
    assert follow_up.cached_tokens == first.length - 1 and sim.restored == 0
    assert copies and not copies & set(sim.memory), "what went on as another prefix is not kept twice"


def test_a_copy_outlives_its_sequence_id_and_gives_way_before_what_lies_nowhere_else() -> None:
    limits = replace(UNIFIED, ids=3, capacity=2_000, per_sequence=2_000, parked=200, park_after=10_000)
    sim = Simulator(limits)
    chats = [sequence(prompt(40, 100 * i), account=f"x{i}") for i in range(3)]
    for chat in chats:
        finished(sim, chat)
        sim.step()  # idles: a copy
    assert len(sim.memory) == 3 and len(sim.scheduler.retained) == 3
    finished(sim, sequence(prompt(40, 900), account="y"))
    assert len(sim.memory) == 3, "its id was taken, its copy stays"
    again = sequence(np.concatenate([chats[0].tokens, ints(7)]), account="x0")
    finished(sim, again)
    assert again.cached_tokens == chats[0].length - 1 and sim.restored == 1

    parking = Parking(100)
    alone, both = Prefix("a", prompt(10)), Prefix("b", prompt(10))
    parking.put(alone)
    both.copy = parking.put(both)
    assert parking.first_to_go() == both.copy
    parking.remove(both.copy)
    assert parking.first_to_go() != both.copy


def test_only_interactive_prompts_that_can_be_read_stretch_the_goal() -> None:
    sim = Simulator(replace(UNIFIED, slots=2))
    first = sequence(prompt(40))
    sim.scheduler.submit([first, sequence(prompt(30, 500)), sequence(prompt(30, 700)), sequence(prompt(30, 800))])
    assert sim.scheduler.readers == 2, "no more than there are slots"
    batch = Simulator(UNIFIED)
    batch.scheduler.submit([sequence(prompt(40), lane="batch")])  # type: ignore[arg-type]
    assert batch.scheduler.readers == 0


def test_little_of_a_long_parked_prefix_is_not_worth_bringing_back() -> None:
    sim = Simulator(replace(UNIFIED, capacity=2_000, per_sequence=2_000, parked=500))
    long = sequence(prompt(200))
    sim.scheduler.submit([long])
    sim.run([long])
    sim.scheduler._evict_all()
    little = sequence(np.concatenate([prompt(30), prompt(30, 900)]))
    sim.scheduler.submit([little])
    sim.run([little])
    assert sim.restored == 0 and little.cached_tokens == 0


def test_of_prefixes_that_are_nearly_alike_one_is_parked() -> None:
    sim = Simulator(replace(UNIFIED, capacity=2_000, per_sequence=2_000, parked=2_000))
    alike = [sequence(np.concatenate([prompt(200), prompt(5, 1_000 * i)])) for i in range(1, 4)]
    sim.scheduler.submit(alike)
    sim.run(alike)
    assert len(sim.scheduler.retained) == 3
    sim.scheduler._evict_all()
    sim.step()
    assert len(sim.scheduler.parking) == 1
    another = sequence(np.concatenate([prompt(200), prompt(5, 9_000)]))
    sim.scheduler.submit([another])
    sim.run([another])
    assert another.cached_tokens == 200


def finished(sim: Simulator, *sequences: Sequence) -> None:
    sim.scheduler.submit(list(sequences))
    sim.run(list(sequences))


def test_what_main_memory_cannot_take_stays_where_it_is() -> None:
    sim = Simulator(replace(UNIFIED, capacity=2_000, per_sequence=2_000, parked=100, park_after=16))
    long = sequence(prompt(300))
    finished(sim, long)
    finished(sim, sequence(prompt(40, 900), new=60, account="b"))
    assert long.account in {p.namespace for p in sim.scheduler.retained.values()}, "there was room for it"
    again = sequence(np.concatenate([long.tokens, ints(1, 2)]))
    finished(sim, again)
    assert again.cached_tokens > 290


def test_a_parked_prefix_that_has_no_room_does_not_block_who_fits_without_it() -> None:
    sim = Simulator(replace(UNIFIED, capacity=500, per_sequence=500, parked=1_000))
    finished(sim, sequence(prompt(300)))
    sim.scheduler._evict_all()
    neighbour = sequence(prompt(200, 900), new=200, account="b")
    sim.scheduler.submit([neighbour])
    sim.step()
    waiter = sequence(prompt(100), new=4)
    sim.scheduler.submit([waiter])
    for _ in range(8):
        sim.step()
    assert waiter.status is not Status.WAITING and neighbour.status is Status.RUNNING
    sim.run([waiter, neighbour])


def test_a_prefix_is_parked_although_an_unusable_one_begins_alike() -> None:
    sim = Simulator(replace(UNIFIED, capacity=4_000, per_sequence=4_000, parked=4_000, batch=4_000))
    finished(sim, sequence(prompt(1_000)))
    sim.scheduler._evict_all()
    short = sequence(np.concatenate([prompt(200), prompt(10, 9_000)]))
    finished(sim, short)
    sim.scheduler._evict_all()
    again = sequence(np.concatenate([short.tokens, ints(1)]))
    finished(sim, again)
    assert again.cached_tokens >= 210


def test_a_burst_brings_a_parked_prefix_back_once() -> None:
    sim = Simulator(replace(UNIFIED, capacity=4_000, per_sequence=4_000, parked=4_000, batch=4_000))
    finished(sim, sequence(prompt(400)))
    sim.scheduler._evict_all()
    finished(sim, *(sequence(np.concatenate([prompt(400), prompt(5, 1_000 * i)])) for i in range(1, 4)))
    assert sim.restored == 1


def test_in_streams_whatever_runs_lies_together_soon() -> None:
    sim = Simulator(replace(SPLIT, slots=16, ids=16, per_sequence=200, batch=512))
    lengths = [5, 60, 5, 60, 60, 5, 5, 60, 60, 5, 60, 5, 5, 60, 60, 5]
    crowd = [sequence(prompt(20 + i, 50 * i), new=new, account=f"x{i % 3}") for i, new in enumerate(lengths)]
    sim.scheduler.submit(crowd)
    while sum(s.status is Status.RUNNING for s in crowd) > 8 or not sim.scheduler.running:
        sim.step()
    for _ in range(8):
        sim.step()
    slots = [s.slot for s in sim.scheduler.running]
    assert len(slots) == 8 and len(runs(slots)) == 1, sorted(slots)
    late = sequence(prompt(20, 2_000), new=20)
    sim.scheduler.submit([late])
    sim.step()
    assert len(runs(s.slot for s in sim.scheduler.running)) == 1, "whoever comes lies beside them"
    sim.run([*crowd, late])
    again = [sequence(np.concatenate([s.tokens, ints(1)]), new=6, account=s.account) for s in crowd[::3]]
    sim.scheduler.submit(again)
    for _ in range(4):
        sim.step(256)
    assert len(runs(s.slot for s in sim.scheduler.running)) == 1
    sim.run(again)
    assert all(s.cached_tokens >= s.n_prompt - 2 for s in again), "they find their prefixes, although these had to move"


def test_in_streams_the_latest_chat_keeps_its_prefix_when_its_gap_is_closed() -> None:
    sim = Simulator(replace(SPLIT, slots=8, ids=8, per_sequence=200, batch=512))
    finished(sim, *(sequence(prompt(30, 100 * i), new=2, account=f"x{i}") for i in range(8)))  # every id is used
    chats = [sequence(prompt(40, 3_000 + 100 * i), new=new) for i, new in enumerate([90, 10, 90])]
    sim.scheduler.submit(chats)
    while chats[1].status is not Status.FINISHED:
        sim.step(512)
    for _ in range(3):
        sim.step(512)
    assert len(runs(s.slot for s in sim.scheduler.running)) == 1, "its gap is closed"
    again = sequence(np.concatenate([chats[1].tokens, ints(1)]), new=2)
    sim.scheduler.submit([again])
    sim.run([again, chats[0], chats[2]])
    assert again.cached_tokens == chats[1].length - 1


def test_a_gap_is_closed_from_the_smaller_side() -> None:
    assert runs([5, 1, 2, 7, 6]) == [[1, 2], [5, 6, 7]]
    assert move([1, 2, 5, 6, 7]) == (1, 4) and move([1, 2, 3, 6]) == (6, 4)
    assert move([3, 4, 5]) is None and move([]) is None
    assert densest([0, 9, 4], {3, 5}) == 4 and densest([7, 0], set()) == 7


def test_in_streams_a_short_match_does_not_cost_a_long_chat_its_prefix() -> None:
    sim = Simulator(replace(SPLIT, capacity=4_000, per_sequence=1_000))
    long = sequence(prompt(300), own_prefix=20)
    finished(sim, long)
    finished(sim, sequence(np.concatenate([prompt(20), prompt(20, 900)]), account="b", own_prefix=20))
    again = sequence(np.concatenate([long.tokens, ints(1)]))
    finished(sim, again)
    assert again.cached_tokens > 290


def test_with_a_sliding_window_only_whole_prefixes_are_taken() -> None:
    sim = Simulator(replace(UNIFIED, capacity=2_000, per_sequence=2_000, window=100))
    long = sequence(prompt(300))
    finished(sim, long)
    part = sequence(np.concatenate([prompt(200), ints(7, 7)]))
    finished(sim, part)
    assert part.cached_tokens == 0, "what has left the window may be gone"
    whole = sequence(np.concatenate([long.tokens[: long.length - 1], ints(8)]))
    finished(sim, whole)
    assert whole.cached_tokens == long.length - 1


def test_after_a_rebuild_nobody_has_waited_too_long() -> None:
    sim = Simulator(UNIFIED)
    one = sequence(prompt(30), new=30, deadline=5.0)
    sim.scheduler.submit([one])
    sim.step()
    sim.now = 50.0
    sim.scheduler.reset()
    sim.cache.clear()
    assert sim.step().expired == []
    sim.run([one])


def test_the_least_recently_used_leaves_main_memory_first() -> None:
    parking = Parking(100)
    first, second = (parking.put(Prefix("a", prompt(40))) for _ in range(2))
    assert parking.too_full_for(Prefix("a", prompt(40))) and not parking.takes(Prefix("a", prompt(101)))
    parking.use(first)
    assert list(parking) == [second, first] and parking.tokens == 80 and second < first < 0
    parking.remove(second)
    assert list(parking) == [first] and parking.tokens == 40


# ── cells ────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(
    st.lists(
        st.tuples(st.sampled_from(["append", "share", "cut"]), st.integers(0, 3), st.integers(0, 3), st.integers(0, 9)),
        max_size=60,
    )
)
def test_cells_agree_with_sets(operations: list[tuple[str, int, int, int]]) -> None:
    table = CellTable(64, unified=True, per_sequence=64)
    rows: dict[int, list[object]] = {i: [] for i in range(4)}
    for kind, a, b, n in operations:
        if kind == "append" and len({id(c) for r in rows.values() for c in r}) + n <= 64 and len(rows[a]) + n <= 64:
            table.append(a, n)
            rows[a] += [object() for _ in range(n)]
        elif kind == "share" and not rows[b] and a != b and n and len(rows[a]) >= n:
            table.share(a, b, n)
            rows[b] = rows[a][:n]
        elif kind == "cut":
            table.truncate(a, n)
            del rows[a][n:]
        assert table.used == len({id(c) for r in rows.values() for c in r})
        assert [table.length(i) for i in range(4)] == [len(rows[i]) for i in range(4)]
        assert table.held_by([0, 1]) == len({id(c) for i in (0, 1) for c in rows[i]})


def test_cells_refuse_what_does_not_fit() -> None:
    table = CellTable(8, unified=True, per_sequence=8)
    table.append(0, 6)
    with pytest.raises(ValueError, match="cannot grow"):
        table.append(1, 3)
    table.append(1, 2)
    assert table.free == 0


# ── the radix index ──────────────────────────────────────────────────────────────────────────────────────────────


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=8),
    st.lists(st.integers(0, 2), min_size=1, max_size=12),
    st.sets(st.integers(0, 7)),
)
def test_the_index_finds_the_longest_prefix(rows: list[list[int]], wanted: list[int], removed: set[int]) -> None:
    index = PrefixIndex()
    for holder, row in enumerate(rows):
        index.insert("a", ints(*row), holder)
    for holder in removed:
        index.remove(holder)
    expected = {
        holder: n
        for holder, row in enumerate(rows)
        if holder not in removed and (n := common_prefix(ints(*row), ints(*wanted)))
    }
    found = list(index.match("a", ints(*wanted)))
    assert dict(found) == expected and len(found) == len(expected)
    assert [n for _, n in found] == sorted((n for _, n in found), reverse=True)
    ends = {h for h, n in expected.items() if n == len(rows[h])}
    assert set(index.ends_within("a", ints(*wanted))) == ends
    assert not list(index.match("b", ints(*wanted)))


def test_the_index_extends_a_holder() -> None:
    index = PrefixIndex()
    index.insert("a", ints(1, 2, 3), 0)
    index.insert("a", ints(1, 2, 9), 1)
    index.insert("a", ints(1, 2, 3, 4, 5), 0)
    assert list(index.match("a", ints(1, 2, 3, 4, 5))) == [(0, 5), (1, 2)]
    index.remove(0)
    assert list(index.match("a", ints(1, 2, 3, 4, 5))) == [(1, 2)]


# ── fairness counters ────────────────────────────────────────────────────────────────────────────────────────────


def test_an_account_that_comes_back_gets_no_credit_for_idleness() -> None:
    line = WaitingLine()
    busy, back = sequence(prompt(5), account="busy"), sequence(prompt(5), account="back")
    line.arrive(busy)
    line.charge(busy, 500)
    line.arrive(back)
    assert line.counter("back") == 500
    assert [s.account for s in line.order({"busy": 1})] == ["back", "busy"]


def test_place_counts_turns() -> None:
    line = WaitingLine()
    a = [sequence(prompt(5), account="a") for _ in range(10)]
    b = [sequence(prompt(5), account="b") for _ in range(2)]
    batch = Sequence(prompt(5), account="c", limit=9, lane="batch")
    for one in [*a, *b, batch]:
        line.arrive(one)
    assert line.place(b[0]) == 2
    assert line.place(a[9]) == 12
    assert line.place(batch) == 13
