"""Leases: never more than the limit, none lost, first come first served."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from appliance.access.leases import Lease, Leases, Room, State


def ask(leases: Leases, *rooms: Room) -> tuple[Lease, list[bool]]:
    told: list[bool] = []
    return leases.ask(rooms, lambda: told.append(True)), told


def test_beyond_the_limit_a_call_waits_and_gets_its_turn() -> None:
    leases = Leases()
    account = Room("a", 2)
    first, second = ask(leases, account)[0], ask(leases, account)[0]
    third, told = ask(leases, account)
    fourth, _ = ask(leases, account)
    assert [x.state for x in (first, second, third)] == [State.HELD, State.HELD, State.WAITING]
    assert (leases.place(third), leases.place(fourth), leases.place(first)) == (1, 2, 0)
    assert ask(leases, Room("b", 2))[0].state is State.HELD, "another account has room of its own"
    leases.end(second)
    assert third.state is State.HELD and told == [True] and fourth.state is State.WAITING
    leases.end(second)
    assert fourth.state is State.WAITING, "an ended lease ends once"


def test_one_that_waits_no_longer_makes_room_for_nobody_but_leaves_the_line() -> None:
    leases = Leases()
    account = Room("a", 1)
    held, _ = ask(leases, account)
    tired, told = ask(leases, account)
    patient, _ = ask(leases, account)
    leases.end(tired)
    assert leases.held("a") == 1 and leases.place(patient) == 1
    leases.end(held)
    assert patient.state is State.HELD and not told


def test_a_key_of_its_own_limit_holds_up_itself_but_not_its_account() -> None:
    leases = Leases()
    account, key = Room("a", 3), Room("key", 1)
    narrow, _ = ask(leases, account, key)
    second, _ = ask(leases, account, key)
    other, _ = ask(leases, account)
    assert (second.state, other.state) == (State.WAITING, State.HELD)
    assert (leases.held("a"), leases.held("key")) == (2, 1)
    leases.end(narrow)
    assert second.state is State.HELD


def test_a_limit_that_was_changed_counts_for_all_and_first_for_those_who_wait() -> None:
    leases = Leases()
    ask(leases, Room("a", 1))
    waits, told = ask(leases, Room("a", 1))
    newcomer, _ = ask(leases, Room("a", 2))
    assert waits.state is State.HELD and told == [True]
    assert newcomer.state is State.WAITING
    lowered, _ = ask(leases, Room("a", 1))
    leases.end(waits)
    assert newcomer.state is State.WAITING, "one still runs"
    assert leases.place(lowered) == 2


def test_nothing_is_kept_of_those_who_are_gone() -> None:
    leases = Leases()
    for n in range(100):
        leases.end(ask(leases, Room(f"a{n}", 1), Room(f"k{n}", 1))[0])
    assert not leases._held and not leases._limits and not leases._waiting
    ask(leases, Room("a", 1))
    assert leases._held and leases._limits, "the control: they hold something while a call runs"


class Machine(RuleBasedStateMachine):
    """Calls come, end and give up at random; two accounts, one of which has a narrower key."""

    def __init__(self) -> None:
        super().__init__()
        self.leases = Leases()
        self.all: list[Lease] = []
        self.order: list[Lease] = []  # granted, in this order
        self.a, self.b, self.key = Room("a", 2), Room("b", 3), Room("key", 1)

    @rule(which=st.sampled_from(["a", "b", "key"]))
    def come(self, which: str) -> None:
        rooms = {"a": (self.a,), "b": (self.b,), "key": (self.a, self.key)}[which]
        lease = self.leases.ask(rooms, lambda: None)
        self.all.append(lease)

    @rule(number=st.integers(0, 1_000))
    def end(self, number: int) -> None:
        if self.all:
            self.leases.end(self.all[number % len(self.all)])

    @invariant()
    def counts_are_exact_and_within_the_limits(self) -> None:
        for room in (self.a, self.b, self.key):
            held = [x for x in self.all if x.state is State.HELD and room in x.rooms]
            assert self.leases.held(room.id) == len(held) <= room.limit

    @invariant()
    def nobody_waits_who_could_run(self) -> None:
        waiting = [x for x in self.all if x.state is State.WAITING]
        assert sorted(map(id, waiting)) == sorted(map(id, self.leases))
        for lease in waiting:
            assert any(self.leases.held(room.id) >= room.limit for room in lease.rooms)

    def teardown(self) -> None:
        while running := [x for x in self.all if x.state is State.HELD]:
            for lease in running:
                self.leases.end(lease)
        assert all(lease.state is State.ENDED for lease in self.all), "everybody had a turn"
        assert not self.leases.held("a") and not self.leases.held("b") and not list(self.leases)


TestMachine = Machine.TestCase


@given(st.integers(1, 5), st.integers(1, 30))
def test_turns_are_taken_in_the_order_of_coming(limit: int, calls: int) -> None:
    leases = Leases()
    account = Room("a", limit)
    order: list[int] = []
    every = [leases.ask((account,), lambda n=n: order.append(n)) for n in range(calls)]  # type: ignore[misc]
    for lease in every:
        leases.end(lease)
    assert order == list(range(limit, calls))
