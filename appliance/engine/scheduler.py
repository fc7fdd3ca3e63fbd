"""What the next step computes. Pure: decides on counts and hands out a `Step`; the engine performs it on the context.

Per step: expire waiters, admit by fairness (sharing prefixes, also of running sequences), decode every running
sequence, and prefill prompts under a token budget. KV pressure is a scheduling event: retained prefixes go first, then
the youngest sequence of the lowest weight is preempted and computed again later. In one pool, a retained prefix that
costs the others more attention than a copy does is parked in main memory. Owns the sequence ids of the context; knows
no sampling, text or threads.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from itertools import islice

from appliance.engine.cells import CellTable
from appliance.engine.density import densest, move
from appliance.engine.fairness import OUTPUT_COST, PROMPT_COST, WaitingLine
from appliance.engine.parking import NOBODY, Parking, Prefix
from appliance.engine.prefixes import PrefixIndex
from appliance.engine.sequence import Sequence, Status
from appliance.errors import Saturated

SHARED_ROOT = ""  # namespace of the prefixes that the appliance itself owns
FOLLOW_GAIN = 32  # tokens worth waiting for, that a running prefill will have computed
RETAIN_AT_LEAST = 16  # shorter prefixes are not worth a sequence id, or bringing back
DISTINCT = 8  # a prefix is worth a copy when at least one part in so many is in no other
WHOLE = 4  # a parked prefix comes back whole, so at least one part in so many must be of use
HEADROOM = 64  # cells kept for the growth of a sequence, when another one asks to be admitted
WORTH_MOVING = 16  # tokens that a sequence may still generate; with fewer a gap is soon closed by its end
FREE = 8  # a prefix that can go without a copy goes after so small a part of the rows that others wait for
LOOK_AHEAD = 8  # waiters that may pass one which does not fit
LOOK_AHEAD_SECONDS = 2.0  # after which nobody passes it any more


@dataclass(frozen=True, slots=True)
class Limits:
    """What the context offers: `ids` sequence ids, `capacity` cells, at most `per_sequence` tokens for one sequence."""

    slots: int
    ids: int
    capacity: int
    per_sequence: int
    unified: bool
    batch: int
    ubatch: int
    queue: int
    can_share: bool = True  # recurrent models keep no cells: nothing to share or to retain
    window: int = 0  # of sliding-window attention; cells that have left it may be gone
    parked: int = 0  # tokens that main memory takes
    park_after: int = 16  # rows of others that a retained prefix may cost attention
    parks: int = 256  # most prefixes that are parked for that in one step
    mixed: bool = False  # decodes and prompts share a call, see `Engine._limits`


@dataclass(frozen=True, slots=True)
class Copy:
    """The empty `target` gets the first `count` tokens of `source`."""

    source: int
    target: int
    count: int


@dataclass(frozen=True, slots=True)
class Truncate:
    """`slot` keeps its first `count` tokens."""

    slot: int
    count: int


@dataclass(frozen=True, slots=True)
class Park:
    """Main memory gets the whole of `slot` under `number`; the slot keeps it."""

    slot: int
    number: int


@dataclass(frozen=True, slots=True)
class Restore:
    """The empty `slot` gets what is parked under `number`, and keeps the first `count` tokens."""

    number: int
    slot: int
    count: int


@dataclass(frozen=True, slots=True)
class Forget:
    """What is parked under `number` is not needed any more."""

    number: int


Operation = Copy | Truncate | Park | Restore | Forget


@dataclass(frozen=True, slots=True)
class Slice:
    """`count` tokens of `sequence` from `start`; `output` asks for the logits of the last one."""

    sequence: Sequence
    start: int
    count: int
    output: bool


@dataclass(slots=True)
class Step:
    """Cache operations in order, then one decode call per list of slices (ascending sequence ids)."""

    operations: list[Operation] = field(default_factory=list)
    calls: list[list[Slice]] = field(default_factory=list)
    expired: list[Sequence] = field(default_factory=list)


class Scheduler:
    """Decides; see the module. Call `schedule`, perform the step, then `complete`; or `kv_full` when it did not fit."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.line = WaitingLine()
        self.running: list[Sequence] = []  # in order of admission
        self.retained: OrderedDict[int, Prefix] = OrderedDict()  # by sequence id, least recently used first
        self.parking = Parking(limits.parked if limits.unified and limits.can_share else 0)
        self.cells = CellTable(limits.capacity, unified=limits.unified, per_sequence=limits.per_sequence)
        self.preemptions = 0
        self._index = PrefixIndex()
        self._free_ids = set(range(limits.ids))
        self._operations: list[Operation] = []
        self._blocked_since: float | None = None  # since when the first in line does not fit

    # ── arrivals and departures ──────────────────────────────────────────────────────────────────────────────────

    def submit(self, sequences: list[Sequence]) -> None:
        """The choices of one request join the line, or `Saturated` is raised and none does."""
        if len(self.line) + len(sequences) > self.limits.queue + self.idle_slots:
            raise Saturated(f"The waiting line is full ({len(self.line)} requests wait).", retry_after=5)
        for sequence in sequences:
            self.line.arrive(sequence)

    @property
    def idle_slots(self) -> int:
        return self.limits.slots - len(self.running)

    def finish(self, sequence: Sequence, *, retain: bool = True) -> None:
        """`sequence` is done, cancelled or failed; its computed tokens stay as a cached prefix if `retain`."""
        if sequence.status is Status.FINISHED:
            return
        if sequence.status is Status.RUNNING:
            self._release(sequence, retain=retain)
        else:
            self.line.take(sequence)
        sequence.status = Status.FINISHED
        self.line.leave(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Back to the head of its account's line; what it computed stays retained until the cells are needed."""
        self._release(sequence, retain=True)
        sequence.status = Status.WAITING
        sequence.times_preempted += 1
        self.preemptions += 1
        self.line.put_back(sequence)

    def reset(self) -> None:
        """The context was rebuilt empty: everything that ran waits again, in its old order. Nothing is parked."""
        for sequence in reversed(self.running):
            sequence.status, sequence.computed, sequence.slot = Status.WAITING, 0, -1
            sequence.times_preempted += 1
            self.line.put_back(sequence)
        self.running.clear()
        self.retained.clear()
        self.parking = Parking(self.parking.capacity)
        self.cells = CellTable(self.limits.capacity, unified=self.limits.unified, per_sequence=self.limits.per_sequence)
        self._index = PrefixIndex()
        self._free_ids = set(range(self.limits.ids))
        self._operations.clear()

    # ── one step ─────────────────────────────────────────────────────────────────────────────────────────────────

    def schedule(self, now: float, budget: int) -> Step:
        """The next step; `budget` is the most prompt tokens it may compute. One without calls: nothing to do."""
        step = Step(expired=self._expire(now))
        self._admit(now)
        self._close_gap()
        decoding = [s for s in self.running if s.pending == 1]
        self._make_cells(len(decoding))
        decoding = [s for s in decoding if s.status is Status.RUNNING]
        slices = [Slice(s, s.computed, 1, True) for s in decoding]
        prefills = self._prefills(budget, len(decoding))
        self._charge_retained(sum(part.count for part in slices + prefills))
        step.operations, self._operations = self._operations, []
        step.calls = self._calls(slices, prefills)
        return step

    @property
    def readers(self) -> int:
        """Interactive sequences whose prompts are read now, or will be at once."""
        reading = sum(s.pending > 1 and s.lane != "batch" for s in self.running)
        if self._blocked_since is not None:
            return reading
        return reading + min(sum(s.lane != "batch" for s in self.line), self.idle_slots)

    def copy_idle(self) -> Park | None:
        """When nothing runs: one more retained prefix is copied to main memory, if there is room to spare, so that it
        can leave the cache without delay when others come. None: all are."""
        if self.running:
            return None
        for slot, prefix in self.retained.items():
            if prefix.copy in self.parking or self.parking.too_full_for(prefix) or not self._is_distinct(prefix, slot):
                continue
            prefix.copy = self.parking.put(prefix)
            return Park(slot, prefix.copy)
        return None

    def complete(self, call: list[Slice]) -> None:
        """One decode call of the step was computed."""
        for part in call:
            part.sequence.computed += part.count
            self.cells.append(part.sequence.slot, part.count)
            if part.output:
                self.line.charge(part.sequence, OUTPUT_COST)

    def kv_full(self) -> bool:
        """llama.cpp found no cells although the table has some: give back what can be; False when nothing is left."""
        if self.retained:
            self._evict()
            return True
        victim = self._victim()
        if victim is not None and len(self.running) > 1:
            self.preempt(victim)
            self._evict_all()
            return True
        return False

    # ── admission ────────────────────────────────────────────────────────────────────────────────────────────────

    def _expire(self, now: float) -> list[Sequence]:
        late = [s for s in self.line if s.deadline <= now and not s.times_preempted]
        for sequence in late:
            self.finish(sequence)
        return late

    def _admit(self, now: float) -> None:
        """Admits waiters in fair order until nobody fits. Who waits for a prefix that is being computed is passed."""
        progress = bool(len(self.line))
        if not progress:
            self._blocked_since = None
        displaced: set[Sequence] = set()  # whoever gave way in this round does not come back in it
        while progress:
            progress = False
            passed = 0
            for sequence in islice(self.line.order(self._per_account()), 4 * self.limits.slots):
                if sequence in displaced or self._leader(sequence) is not None:
                    continue
                if self._try_admit(sequence, now, displaced):
                    self._blocked_since = None if not passed else self._blocked_since
                    progress = True
                    break
                passed += 1
                if passed == 1:
                    self._blocked_since = self._blocked_since or now
                too_long = self._blocked_since is not None and now - self._blocked_since > LOOK_AHEAD_SECONDS
                if not self.idle_slots or passed > LOOK_AHEAD or too_long:
                    break

    def _try_admit(self, sequence: Sequence, now: float, displaced: set[Sequence]) -> bool:
        source, shared = self._source(sequence)
        if not (self.idle_slots and self._fits(sequence, source, shared)):
            victim = self._fairness_victim(sequence)
            if victim is None:
                return False
            self.preempt(victim)
            displaced.add(victim)
            source, shared = self._source(sequence)  # the victim may be it, and is retained now
            if not self._fits(sequence, source, shared):
                return False
        self.line.take(sequence)
        self._place(sequence, source, shared)
        sequence.status = Status.RUNNING
        sequence.admitted = now
        self.running.append(sequence)
        if not sequence.times_preempted:
            sequence.cached_tokens = shared
            self.line.charge(sequence, PROMPT_COST * (sequence.n_prompt - shared))
        return True

    def _source(self, sequence: Sequence) -> tuple[int, int]:
        """The best prefix that there is room for: a parked one comes back whole."""
        source, shared = self._best_prefix(sequence)
        if source in self.parking and not self._fits(sequence, source, shared):
            return self._best_prefix(sequence, parked=False)
        return source, shared

    def _best_prefix(self, sequence: Sequence, *, parked: bool = True) -> tuple[int, int]:
        """Holder and length of the longest computed common prefix; at least the last token is left to compute."""
        best_id, best, best_worth = NOBODY, 0, 0
        for holder, matched in self._matches(sequence):
            is_parked = holder in self.parking
            length = self.parking.length(holder) if is_parked else self.cells.length(holder)
            available = min(matched, length, sequence.length - 1)
            if is_parked and not (parked and self._is_of_use(available, holder)):
                continue
            if self.limits.window and length >= self.limits.window and available < length:
                continue  # of what has left the window, nothing can be taken
            worth = available - (RETAIN_AT_LEAST if is_parked else 0)  # bringing it back costs a little
            if worth > best_worth:
                best_id, best, best_worth = holder, available, worth
        return best_id, best

    def _is_of_use(self, matched: int, number: int) -> bool:
        """Whether so much of a parked prefix is worth bringing back the whole."""
        return matched * WHOLE >= self.parking.length(number)

    def _matches(self, sequence: Sequence) -> list[tuple[int, int]]:
        if not self.limits.can_share:
            return []
        found = list(self._index.match(sequence.account, sequence.tokens))
        if sequence.own_prefix:
            found += self._index.match(SHARED_ROOT, sequence.tokens[: sequence.own_prefix])
        return found

    def _leader(self, sequence: Sequence) -> Sequence | None:
        """A running prefill that will soon hold much more of this prompt than is computed now: worth waiting for."""
        if not any(s.pending > 1 for s in self.running):
            return None
        _, available = self._best_prefix(sequence)
        prefilling = {s.slot: s for s in self.running if s.pending > 1}
        for holder, matched in self._matches(sequence):
            leader = prefilling.get(holder)
            if leader and min(matched, leader.length, sequence.length - 1) >= available + FOLLOW_GAIN:
                return leader
        return None

    def _fits(self, sequence: Sequence, source: int, shared: int) -> bool:
        """Whether the cells for the rest of `sequence`, and some growth for everybody, are free or can be freed."""
        if not self.limits.unified:
            return True
        growth = sum(min(s.remaining + 1, HEADROOM) + s.pending for s in self.running)
        own = sequence.length - shared
        if source in self.parking:  # comes back whole, into cells of its own
            own = max(sequence.length, self.parking.length(source))
        needed = own + min(sequence.remaining, HEADROOM) + growth
        if needed <= self.cells.free:
            return True
        if not self.running:
            return True  # alone it fits: longer prompts were refused before
        kept = [s.slot for s in self.running] + ([source] if source in self.retained else [])
        return needed <= self.limits.capacity - self.cells.held_by(kept)

    def _place(self, sequence: Sequence, source: int, shared: int) -> None:
        """Gives `sequence` an id with its shared prefix in it."""
        if source in self.retained:
            self.retained.move_to_end(source)
            self.retained[source].rows = 0
            if self.retained[source].copy in self.parking:
                self.parking.use(self.retained[source].copy)
        whole = source in self.retained and shared == self.cells.length(source)
        slot = self._choose_id(keep=source, whole=whole)
        if slot == source or (whole and self.limits.unified):
            self._take_over(sequence, source, shared)
        else:
            sequence.slot = self._take_id(slot, keep=source)
            if source in self.parking:
                self._restore(source, sequence.slot, shared)
            elif shared:
                self._operations.append(Copy(source, sequence.slot, shared))
                self.cells.share(source, sequence.slot, shared)
                if whole:
                    self._drop(source)  # it has moved
        sequence.computed = shared
        if self.limits.can_share:
            self._register(sequence)

    def _restore(self, number: int, slot: int, count: int) -> None:
        """The parked prefix comes back; that there can be room for it `_fits` has found."""
        while self.cells.free < self.parking.length(number):
            self._drop(next(iter(self.retained)))
        self.parking.use(number)
        self._operations.append(Restore(number, slot, count))
        self.cells.append(slot, count)

    def _take_over(self, sequence: Sequence, slot: int, shared: int) -> None:
        """The retained prefix itself becomes the sequence's: in split streams that saves the copy, and what is used
        as a whole need not be kept a second time."""
        self._forget_copy(self.retained.pop(slot))
        self._index.remove(slot)
        self._truncate(slot, shared)
        sequence.slot = slot

    def _choose_id(self, keep: int, *, whole: bool) -> int:
        """For a new sequence: the lowest free id, else the least recently used retained one; in split streams of all
        of these the one that keeps the batch whole, which may be `keep` itself where its `whole` prefix is used."""
        candidates = sorted(self._free_ids) or [slot for slot in self.retained if slot != keep]
        if self.limits.unified:
            return candidates[0] if candidates else keep
        others = [slot for slot in self.retained if slot not in candidates and (slot != keep or whole)]
        first = [keep] if whole else []  # what need not move is preferred
        return densest([*first, *candidates, *others] or [keep], {s.slot for s in self.running})

    def _take_id(self, slot: int, keep: int) -> int:
        """Makes `slot` free, and takes it. In streams, what is retained there moves to another id: to a free one, else
        to that of the least recently used prefix but `keep`."""
        if slot in self.retained and not self.limits.unified and not self._free_ids:
            self._drop(next((other for other in self.retained if other != keep), slot))
        if slot in self.retained and not self.limits.unified:
            self._displace(slot)
        elif slot in self.retained:
            self._drop(slot)
        self._free_ids.remove(slot)
        return slot

    def _displace(self, slot: int) -> None:
        """A retained prefix makes room for a running sequence, and goes far from those that run."""
        running = [s.slot for s in self.running] or [slot]
        target = max(self._free_ids, key=lambda free: min(abs(free - one) for one in running))
        self._free_ids.remove(target)
        prefix, length = self.retained[slot], self.cells.length(slot)
        self._operations.append(Copy(slot, target, length))
        self.cells.share(slot, target, length)
        self._index.remove(slot)
        self._truncate(slot, 0)
        self._free_ids.add(slot)
        self.retained = OrderedDict((target if s == slot else s, p) for s, p in self.retained.items())
        self._hold(prefix, target)

    def _close_gap(self) -> None:
        """In split streams: moves one running sequence towards the others, where one that ended has left a gap."""
        if self.limits.unified or not self.limits.can_share:
            return
        found = move(s.slot for s in self.running)
        if found is None:
            return
        source, target = found
        sequence = next(s for s in self.running if s.slot == source)
        if sequence.remaining < WORTH_MOVING:
            return
        sequence.slot = self._take_id(target, keep=source)
        if sequence.computed:
            self._operations.append(Copy(source, target, sequence.computed))
            self.cells.share(source, target, sequence.computed)
        self._index.remove(source)
        self._truncate(source, 0)
        self._free_ids.add(source)
        self._register(sequence)

    def _register(self, sequence: Sequence) -> None:
        self._index.insert(sequence.account, sequence.tokens, sequence.slot)
        if sequence.own_prefix:
            self._index.insert(SHARED_ROOT, sequence.prompt[: sequence.own_prefix], sequence.slot)

    # ── room ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _make_cells(self, needed: int) -> None:
        """Frees cells for `needed` tokens: retained prefixes first, then whoever is youngest at the lowest weight."""
        while self.limits.unified and self.cells.free < needed:
            if self.retained:
                self._evict()
            elif (victim := self._victim()) is not None and len(self.running) > 1:
                needed -= victim.pending == 1
                self.preempt(victim)
            else:
                return

    def _victim(self) -> Sequence | None:
        """Under KV pressure: the batch lane before the interactive one, the lowest weight, then the youngest."""
        return min(self.running, key=lambda s: (s.lane != "batch", s.weight, -s.admitted, -s.number), default=None)

    def _fairness_victim(self, waiter: Sequence) -> Sequence | None:
        """The youngest sequence of the account furthest above its share, if `waiter`'s stays below it after the swap.

        The swap must not invite its own reversal: the loser, one sequence poorer, still has at least as much per
        weight as the winner, one richer.
        """
        per_account = self._per_account()
        loads = {s.account: per_account[s.account] / s.weight for s in self.running}
        richest = max(loads, key=lambda a: loads[a], default=None)
        if richest is None or richest == waiter.account:
            return None
        victim = max((s for s in self.running if s.account == richest), key=lambda s: (s.admitted, s.number))
        after = (per_account[richest] - 1) / victim.weight
        return victim if after >= (per_account[waiter.account] + 1) / waiter.weight else None

    def _per_account(self) -> Counter[str]:
        return Counter(s.account for s in self.running)

    def _release(self, sequence: Sequence, *, retain: bool) -> None:
        """Takes `sequence` off its id; the id becomes a retained prefix or is free."""
        self.running.remove(sequence)
        slot, computed = sequence.slot, sequence.computed
        sequence.slot, sequence.computed = -1, 0
        self._index.remove(slot)
        if not (retain and self.limits.can_share and computed >= RETAIN_AT_LEAST):
            self._truncate(slot, 0)
            self._free_ids.add(slot)
            return
        prefix = Prefix(sequence.account, sequence.tokens[:computed].copy(), min(sequence.own_prefix, computed))
        for other in list(self._index.ends_within(prefix.namespace, prefix.tokens)):
            if other in self.retained:
                self._forget_copy(self.retained[other])
                self._drop(other)
            elif other in self.parking:
                self._forget(other)
        self._hold(prefix, slot)
        self.retained[slot] = prefix

    def _hold(self, prefix: Prefix, holder: int) -> None:
        self._index.insert(prefix.namespace, prefix.tokens, holder)
        if prefix.own:
            self._index.insert(SHARED_ROOT, prefix.tokens[: prefix.own], holder)

    def _charge_retained(self, rows: int) -> None:
        """In one pool every row of a step looks at every cell: whatever has cost that much too often is parked."""
        if not self.limits.unified:
            return
        for prefix in self.retained.values():
            prefix.rows += rows
        parks = self.limits.parks
        for slot, prefix in list(self.retained.items()):
            if prefix.rows <= self.limits.park_after // FREE or not self.parking.takes(prefix):
                continue
            if prefix.copy in self.parking or not self._is_distinct(prefix, slot):
                self._evict(slot)
            elif prefix.rows > self.limits.park_after and parks:
                parks -= 1
                self._evict(slot)

    def _evict(self, slot: int | None = None) -> None:
        """A retained prefix, the least recently used one by default, leaves the cache: for main memory if it may."""
        if slot is None:
            slot = next(iter(self.retained))
        prefix = self.retained[slot]
        if prefix.copy not in self.parking and self.parking.takes(prefix) and self._is_distinct(prefix, slot):
            while self.parking.too_full_for(prefix):
                self._forget(self.parking.first_to_go())
            prefix.copy = self.parking.put(prefix)
            self._operations.append(Park(slot, prefix.copy))
        self._drop(slot)

    def _is_distinct(self, prefix: Prefix, slot: int) -> bool:
        """Whether enough of a retained prefix is held by nobody else."""
        return self._own_tokens(prefix, slot) * DISTINCT >= len(prefix.tokens)

    def _own_tokens(self, prefix: Prefix, slot: int) -> int:
        """Tokens of a retained prefix beyond the longest beginning that somebody else holds, too."""
        longest = 0
        for holder, matched in self._index.match(prefix.namespace, prefix.tokens):
            if holder != slot and (holder not in self.parking or self._is_of_use(matched, holder)):
                longest = max(longest, matched)
        return len(prefix.tokens) - longest

    def _drop(self, slot: int) -> None:
        """A retained prefix leaves the cache; main memory's copy, if there is one, takes its place."""
        prefix = self.retained.pop(slot)
        self._index.remove(slot)
        if prefix.copy in self.parking:
            self._hold(prefix, prefix.copy)
            self.parking.use(prefix.copy)
            prefix.copy = NOBODY
        self._truncate(slot, 0)
        self._free_ids.add(slot)

    def _forget(self, number: int) -> None:
        """A parked prefix is gone for good."""
        self.parking.remove(number)
        self._index.remove(number)
        self._operations.append(Forget(number))

    def _forget_copy(self, prefix: Prefix) -> None:
        if prefix.copy in self.parking:
            self._forget(prefix.copy)

    def _evict_all(self) -> None:
        while self.retained:
            self._evict()

    def _truncate(self, slot: int, count: int) -> None:
        if self.cells.length(slot) > count:
            self.cells.truncate(slot, count)
            self._operations.append(Truncate(slot, count))

    # ── the batch ────────────────────────────────────────────────────────────────────────────────────────────────

    def _prefills(self, budget: int, n_decoding: int) -> list[Slice]:
        """Prompt chunks under the budget: the least served account first, within it the shortest remainder."""
        prefilling = [s for s in self.running if s.pending > 1]
        prefilling.sort(key=lambda s: (s.lane == "batch", self.line.counter(s.account), s.pending, s.number))
        left = max(0, min(budget, self.limits.batch - n_decoding))
        slices: list[Slice] = []
        for sequence in prefilling:
            if sequence.status is not Status.RUNNING or left <= 0:
                continue
            count = min(sequence.pending, left)
            if self.limits.unified:
                count = min(count, self._cells_for_prefill(count, n_decoding, slices))
            if count > 0 and sequence.status is Status.RUNNING:
                left -= count
                slices.append(Slice(sequence, sequence.computed, count, count == sequence.pending))
        return slices

    def _cells_for_prefill(self, count: int, n_decoding: int, planned: list[Slice]) -> int:
        """How many of `count` cells there are beside what the step already needs, after evicting retained prefixes."""
        reserved = n_decoding + sum(s.count for s in planned)
        while self.cells.free < reserved + count and self.retained:
            self._evict()
        if self.cells.free <= reserved and not reserved and len(self.running) > 1:
            self._make_cells(1)  # prefills alone have filled the cache: one of them gives way
        return self.cells.free - reserved

    def _calls(self, decoding: list[Slice], prefills: list[Slice]) -> list[list[Slice]]:
        """All in one call, or decodes and prompts apart: see `Limits.mixed`."""
        groups = [decoding + prefills] if self.limits.mixed else [decoding, prefills]
        return [sorted(g, key=lambda s: s.sequence.slot) for g in groups if g]
