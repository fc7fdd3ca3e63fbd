"""API keys: rows with the SHA-256 of a key, never the key."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from ipaddress import ip_network
from typing import Any

from appliance.errors import BadRequest, Conflict, NotFound
from appliance.messages import AS_ACCOUNT, PROMPTS, SCOPES, Caller, KeyLimits, Prompts, Scope
from appliance.store import audit
from appliance.store.database import Store
from appliance.store.ids import COMMAND_LINE, checked_name, new_id, now

LONGEST_LIFE = 36_525 * 86_400  # seconds
LONGEST_OVERLAP = 90 * 86_400  # seconds for which a rotated key may go on


@dataclass(frozen=True, slots=True)
class Key:
    """One key as it may be shown; times in epoch seconds. `networks` are CIDR, none: from everywhere."""

    id: str
    account_id: str
    account: str
    name: str
    scope: Scope
    prefix: str
    last_four: str
    created: int
    created_by: str
    expires: int | None
    last_used: int | None
    revoked: int | None
    networks: tuple[str, ...]
    limits: KeyLimits
    successor: str | None
    lineage: str  # the first key's id, under which the limits of all that replaced it are counted
    prompts: Prompts | None  # whether they may leave the box, where the account's do; None: as there


@dataclass(frozen=True, slots=True)
class NewKey:
    """What identifies a key that was just made; the key itself stays with the caller."""

    digest: bytes
    prefix: str
    last_four: str


@dataclass(frozen=True, slots=True)
class Valid:
    """A key that may be used now, as the key ring takes it."""

    digest: bytes
    caller: Caller
    expires: int | None
    networks: tuple[str, ...]


_COLUMNS = """k.id, k.account_id, a.name, k.name, k.scope, k.prefix, k.last_four, k.created, k.created_by, k.expires,
    k.last_used, k.revoked, k.networks, k.limits, k.successor,
    coalesce(k.lineage, k.id), k.prompts from keys k join accounts a on a.id = k.account_id"""


def create(
    store: Store,
    account_id: str,
    name: str,
    scope: str,
    new: NewKey,
    created_by: str,
    *,
    expires: int | None = None,
    networks: Sequence[str] = (),
    limits: KeyLimits = AS_ACCOUNT,
    prompts: str | None = None,
) -> Key:
    """Records a new key, durable when it returns. Raises BadRequest or NotFound."""
    if scope not in SCOPES:
        raise BadRequest(f"There is no scope {scope[:50]!r}; the scopes are {', '.join(SCOPES)}.")
    if prompts is not None and prompts not in PROMPTS:
        raise BadRequest(f"Prompts may be {', '.join(PROMPTS)}, not {prompts[:50]!r}.")
    key_id, name, created = new_id("key"), checked_name(name, "a key"), now()
    if expires is not None and not created < expires <= created + LONGEST_LIFE:
        raise BadRequest("A key must end in the future, within a hundred years.")
    row = [key_id, account_id, name, scope, new.digest, new.prefix, new.last_four, created, created_by, expires]
    row += [json.dumps(_checked_networks(networks)), json.dumps(_checked_limits(limits)), key_id, prompts]

    def insert(db: Any) -> None:
        if not db.execute("select 1 from accounts where id = ?", [account_id]).fetchone():
            raise NotFound("There is no such account.")
        _insert(db, row)
        audit.record(
            db, created_by, "key.create", key=key_id, account=account_id, name=name, scope=scope, prompts=prompts
        )

    store.write(insert, durable=True).result()
    return by_id(store, key_id)


def rotate(store: Store, key_id: str, new: NewKey, overlap_seconds: int, *, by: str = COMMAND_LINE) -> tuple[Key, Key]:
    """A new key of the same account, name, scope, end, networks and limits, whose use counts on; the old one ends after
    the overlap, unless it ends sooner anyway. Returns (old, new), durable. Raises NotFound, BadRequest, or Conflict for
    one that has ended."""
    old, made_id, created = by_id(store, key_id), new_id("key"), now()
    if not 0 <= overlap_seconds <= LONGEST_OVERLAP:
        raise BadRequest(f"The overlap must be 0 to {LONGEST_OVERLAP // 86_400} days.")
    row = [made_id, old.account_id, old.name, old.scope, new.digest, new.prefix, new.last_four, created, by]
    row += [old.expires, json.dumps(old.networks), json.dumps(_checked_limits(old.limits)), old.lineage, old.prompts]
    ends = min(old.expires or created + overlap_seconds, created + overlap_seconds)
    end = """update keys set expires = ?1, successor = ?2
        where id = ?3 and revoked is null and successor is null and (expires is null or expires > ?4)"""

    def replace(db: Any) -> None:
        _insert(db, row)
        if not db.execute(end, [ends, made_id, key_id, created]).rowcount:
            raise Conflict(f"The key {key_id} has ended or was rotated already.")
        audit.record(db, by, "key.rotate", key=key_id, successor=made_id, ends=ends)

    store.write(replace, durable=True).result()
    return by_id(store, key_id), by_id(store, made_id)


def _insert(db: Any, row: list[Any]) -> None:
    db.execute(
        """insert into keys (id, account_id, name, scope, hash, prefix, last_four, created, created_by, expires,
        networks, limits, lineage, prompts) values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)""",
        row,
    )


def by_id(store: Store, key_id: str) -> Key:
    """Raises NotFound."""
    row = store.read(lambda db: db.execute(f"select {_COLUMNS} where k.id = ?", [key_id]).fetchone())
    if row is None:
        raise NotFound(f"There is no key {key_id[:100]!r}.")
    return _key(row)


def listing(store: Store) -> list[Key]:
    """All keys, oldest first, revoked ones too."""
    query = f"select {_COLUMNS} order by k.created, k.rowid"
    return [_key(row) for row in store.read(lambda db: db.execute(query).fetchall())]


def _key(row: Sequence[Any]) -> Key:
    *plain, networks, limits, successor, lineage, prompts = row
    own = KeyLimits(**json.loads(limits or "{}"))
    return Key(*[*plain, tuple(json.loads(networks or "[]")), own, successor, lineage, prompts])


def revoke(store: Store, key_id: str, *, by: str = COMMAND_LINE) -> Key:
    """Ends a key for good, durable when it returns; revoking it again changes nothing. Raises NotFound."""
    by_id(store, key_id)

    def end(db: Any) -> None:
        done = db.execute("update keys set revoked = ? where id = ? and revoked is null", [now(), key_id])
        if done.rowcount:
            audit.record(db, by, "key.revoke", key=key_id)

    store.write(end, durable=True).result()
    return by_id(store, key_id)


def used(db: Any, key_id: str, at: int) -> None:
    """Notes when a key was last used; to be called inside a write, lazily."""
    db.execute("update keys set last_used = ?1 where id = ?2 and coalesce(last_used, 0) < ?1", [at, key_id])


def valid(store: Store) -> list[Valid]:
    """Every key that is neither revoked nor of a disabled account."""
    query = """select k.hash, k.account_id, a.name, a.plan, k.id, k.scope, k.limits,
        coalesce(k.lineage, k.id), a.prompts, k.prompts, k.expires, k.networks
        from keys k join accounts a on a.id = k.account_id
        where k.revoked is null and a.disabled is null"""
    found = []
    for digest, *who, limits, lineage, at_most, own, expires, networks in store.read(
        lambda db: db.execute(query).fetchall()
    ):
        prompts = min(at_most, own or at_most, key=PROMPTS.index)
        caller = Caller(*[*who, KeyLimits(**json.loads(limits or "{}")), lineage, prompts])
        found.append(Valid(bytes(digest), caller, expires, tuple(json.loads(networks or "[]"))))
    return found


def _checked_networks(networks: Sequence[str]) -> list[str]:
    """In their usual form. Raises BadRequest for what is no network."""
    try:
        return [str(ip_network(network)) for network in networks]
    except ValueError as error:
        raise BadRequest(f"{error}; a network looks like 10.0.0.0/8 or 2001:db8::/32.") from error


def _checked_limits(limits: KeyLimits) -> dict[str, int]:
    """Those that are set. Raises BadRequest for one below 1."""
    chosen = {name: value for name, value in asdict(limits).items() if value is not None}
    for name, value in chosen.items():
        if not 1 <= value <= 10**12:
            raise BadRequest(f"The limit {name} of a key must be 1 to {10**12:,}.")
    return chosen
