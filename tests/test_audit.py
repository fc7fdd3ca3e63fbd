"""The audit log: every act is in it with who did it, in the act's own transaction, and no change of a row is missed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from appliance.access import keys as key_form
from appliance.access.keyring import KeyRing
from appliance.access.plans import Plans
from appliance.administration import Administration
from appliance.catalog import Catalog
from appliance.errors import Conflict
from appliance.store import accounts, audit, keys, users
from appliance.store.database import Store
from appliance.store.keyfile import MasterKey


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(Store.create(tmp_path / "appliance.db", MasterKey.generate())) as made:
        yield made


def act(store: Store) -> str:
    """An account, a user, a key and its end; the key itself."""
    raw = key_form.generate()
    account = accounts.create(store, "team", "community", by="anna")
    users.create(store, "bert", "a long password", "member", account.id, by="anna")
    new = keys.NewKey(key_form.digest(raw), *key_form.display(raw))
    made = keys.create(store, account.id, "app", "llm", new, "bert")
    keys.revoke(store, made.id, by="bert")
    keys.revoke(store, made.id, by="bert")
    return raw


def write(store: Store, sql: str, *values: Any) -> None:
    store.write(lambda db: db.execute(sql, list(values))).result()


def test_every_act_is_recorded_once_with_who_did_it_and_no_secret(store: Store) -> None:
    raw = act(store)
    rows = audit.listing(store)
    assert [(r.number, r.who, r.what) for r in rows] == [
        (1, "anna", "account.create"),
        (2, "anna", "user.create"),
        (3, "bert", "key.create"),
        (4, "bert", "key.revoke"),
    ]
    key = {"account": rows[0].about["account"], "name": "app", "scope": "llm", "prompts": None}
    assert rows[2].about == {**rows[3].about, **key}
    text = repr(rows)
    assert "team" in text and raw not in text and "password" not in text
    assert audit.verify(store) == audit.Chain(4, rows[-1].hash, None)


def test_an_act_that_fails_leaves_no_row(store: Store) -> None:
    act(store)
    with pytest.raises(Conflict):
        accounts.create(store, "team", "community")
    assert len(audit.listing(store)) == 4


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ("update audit set who = 'clara' where number = 2", 2),
        ("update audit set at = at + 1 where number = 1", 1),
        ("update audit set about = '{}' where number = 3", 3),
        ("delete from audit where number = 2", 2),
        ("delete from audit where number = 1", 1),
        ("update audit set number = 9 where number = 4", 4),
        ("update audit set hash = x'00' where number = 3", 3),
    ],
)
def test_a_changed_or_missing_row_breaks_the_chain_there(store: Store, change: str, broken: int) -> None:
    act(store)
    assert audit.verify(store).broken is None, "the control"
    write(store, change)
    found = audit.verify(store)
    assert found.broken == broken and found.rows == broken - 1


def test_rows_missing_at_the_end_show_in_length_and_head(store: Store) -> None:
    act(store)
    noted = audit.verify(store)
    write(store, "delete from audit where number = 4")
    found = audit.verify(store)
    assert found.broken is None and (found.rows, found.head) != (noted.rows, noted.head)
    assert audit.listing(store)[-1].hash == found.head


def test_an_empty_log_holds(store: Store) -> None:
    assert audit.verify(store) == audit.Chain(0, audit.FIRST, None)


def test_what_is_done_outside_the_database_stays_done_when_it_cannot_be_noted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = MasterKey.generate()
    with closing(Store.create(tmp_path / "appliance.db", key)) as store:
        administration = Administration(store, key, Catalog(tmp_path / "models"), KeyRing(), Plans())
        administration.record("backup", bytes=1)
        assert [row.what for row in audit.listing(store)] == ["backup"], "the control"
    administration.record("backup", bytes=2)  # the store is closed, and takes no more writes
    assert "backup was done, but is not in the audit log" in caplog.text
