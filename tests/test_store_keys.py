"""Keys that end, are bound to networks, have limits of their own, or are rotated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from appliance.errors import BadRequest, Conflict, NotFound
from appliance.messages import KeyLimits
from appliance.store import accounts, audit, keys
from appliance.store.database import Store
from appliance.store.ids import now
from appliance.store.keyfile import MasterKey
from appliance.store.keys import NewKey


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(Store.create(tmp_path / "appliance.db", MasterKey.generate())) as made:
        yield made


@pytest.fixture
def account(store: Store) -> str:
    return accounts.create(store, "team", "community").id


OLD, NEW, THIRD = (NewKey(letter * 32, "oai_abcd", "wxyz") for letter in (b"o", b"n", b"t"))
NARROW = KeyLimits(minute=5, concurrent=1, tokens_per_day=10_000)


def test_what_a_key_is_given_comes_back_and_reaches_the_ring(store: Store, account: str) -> None:
    soon = now() + 100
    made = keys.create(store, account, "app", "llm", OLD, "anna", expires=soon, networks=["10.0.0.0/8"], limits=NARROW)
    assert (made.expires, made.networks, made.limits, made.successor) == (soon, ("10.0.0.0/8",), NARROW, None)
    [valid] = keys.valid(store)
    assert (valid.digest, valid.expires, valid.networks) == (OLD.digest, soon, ("10.0.0.0/8",))
    assert valid.caller.limits == NARROW and valid.caller.key_id == made.id


def test_a_rotated_key_goes_on_for_the_overlap_and_its_successor_is_like_it(store: Store, account: str) -> None:
    made = keys.create(store, account, "app", "llm", OLD, "anna", networks=["10.0.0.0/8"], limits=NARROW)
    old, new = keys.rotate(store, made.id, NEW, 3_600, by="bert")
    assert old.expires is not None and 3_595 <= old.expires - now() <= 3_600
    assert (old.successor, new.expires, new.created_by) == (new.id, None, "bert")
    assert old.lineage == new.lineage == made.id, "its use counts on"
    assert {k.caller.lineage for k in keys.valid(store)} == {made.id}
    _, third = keys.rotate(store, new.id, THIRD, 0)
    assert third.lineage == made.id
    assert (new.account_id, new.name, new.scope, new.networks, new.limits) == (
        *(old.account_id, old.name, old.scope, old.networks),
        old.limits,
    )
    assert {k.digest for k in keys.valid(store)} == {OLD.digest, NEW.digest, THIRD.digest}
    assert audit.listing(store)[2].about == {"key": made.id, "successor": new.id, "ends": old.expires}
    with pytest.raises(Conflict):
        keys.rotate(store, made.id, NewKey(b"4" * 32, "", ""), 60)
    assert len(keys.listing(store)) == 3, "a refused rotation leaves nothing"


def test_a_rotation_never_lengthens_a_life(store: Store, account: str) -> None:
    soon = now() + 60
    made = keys.create(store, account, "app", "llm", OLD, "anna", expires=soon)
    old, new = keys.rotate(store, made.id, NEW, 86_400)
    assert old.expires == new.expires == soon == audit.listing(store)[-1].about["ends"]


def test_a_key_that_has_ended_cannot_be_rotated(store: Store, account: str) -> None:
    made = keys.create(store, account, "app", "llm", OLD, "anna")
    keys.revoke(store, made.id)
    with pytest.raises(Conflict):
        keys.rotate(store, made.id, NEW, 60)
    with pytest.raises(NotFound):
        keys.rotate(store, "key_nowhere", NEW, 60)


@pytest.mark.parametrize(
    "given",
    [
        {"expires": 1},
        {"networks": ["10.0.0.1/8"]},
        {"networks": ["everywhere"]},
        {"networks": ["10.0.0.0/33"]},
        {"limits": KeyLimits(minute=0)},
        {"limits": KeyLimits(concurrent=-1)},
        {"limits": KeyLimits(tokens_per_day=10**13)},
    ],
)
def test_what_makes_no_sense_is_refused(store: Store, account: str, given: dict[str, object]) -> None:
    with pytest.raises(BadRequest):
        keys.create(store, account, "app", "llm", OLD, "anna", **given)  # type: ignore[arg-type]
    assert keys.listing(store) == []


@pytest.mark.parametrize("overlap", [-1, 91 * 86_400])
def test_an_overlap_has_bounds(store: Store, account: str, overlap: int) -> None:
    made = keys.create(store, account, "app", "llm", OLD, "anna")
    with pytest.raises(BadRequest, match="90 days"):
        keys.rotate(store, made.id, NEW, overlap)


def test_the_last_use_is_noted_and_never_goes_back(store: Store, account: str) -> None:
    made = keys.create(store, account, "app", "llm", OLD, "anna")
    for at in (100, 50, 200, 150):
        store.write(lambda db, at=at: keys.used(db, made.id, at)).result()  # type: ignore[misc]
    assert keys.by_id(store, made.id).last_used == 200
