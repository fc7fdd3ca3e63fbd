"""The tables, as ordered migrations that are recorded and never edited after a release. Times are UTC epoch seconds."""

from __future__ import annotations

from sqlite_utils import Database, Migrations

migrations = Migrations("appliance")


@migrations()
def m001_accounts_users_keys(db: Database) -> None:
    """Who pays, who signs in, and what calls."""
    db.execute("""
        create table accounts (
            id text primary key,
            name text not null unique collate nocase,
            plan text not null,
            email text,
            created integer not null,
            disabled integer
        ) strict
    """)
    db.execute("""
        create table users (
            id text primary key,
            account_id text references accounts(id),
            name text not null unique collate nocase,
            role text not null check (role in ('administrator', 'member')),
            password_hash text not null,
            created integer not null,
            disabled integer
        ) strict
    """)
    db.execute("""
        create table keys (
            id text primary key,
            account_id text not null references accounts(id),
            name text not null,
            scope text not null check (scope in ('full', 'read', 'llm', 'workflow')),
            hash blob not null unique,
            prefix text not null,
            last_four text not null,
            created integer not null,
            created_by text not null,
            expires integer,
            last_used integer,
            revoked integer
        ) strict
    """)
    db.execute("create index keys_by_account on keys(account_id)")


@migrations()
def m002_audit(db: Database) -> None:
    """What administrators did; see `audit` for the chain."""
    db.execute("""
        create table audit (
            number integer primary key,
            at integer not null,
            who text not null,
            what text not null,
            about text not null,
            hash blob not null
        ) strict
    """)


@migrations()
def m003_usage(db: Database) -> None:
    """What was called; see `usage`."""
    db.execute("""
        create table windows (
            payer text not null,
            window text not null,
            start integer not null,
            calls integer not null,
            primary key (payer, window)
        ) strict, without rowid
    """)
    db.execute("""
        create table usage (
            account_id text not null,
            day integer not null,
            key_id text not null,
            endpoint text not null,
            provider text not null,
            model text not null,
            calls integer not null,
            prompt_tokens integer not null,
            completion_tokens integer not null,
            cached_tokens integer not null,
            seconds real not null,
            primary key (account_id, day, key_id, endpoint, provider, model)
        ) strict, without rowid
    """)


@migrations()
def m004_narrower_keys(db: Database) -> None:
    """Keys of their own limits and networks; who takes a rotated one's place, and whose limits it inherits."""
    for column in ("networks text", "limits text", "successor text references keys(id)", "lineage text"):
        db.execute(f"alter table keys add column {column}")


@migrations()
def m005_calls(db: Database) -> None:
    """The log of calls; `whole` until its address is shortened."""
    db.execute("""
        create table calls (
            number integer primary key,
            at real not null,
            method text not null,
            endpoint text not null,
            status integer not null,
            ip text not null,
            whole integer not null default 1,
            request_id text not null,
            key_id text,
            account_id text,
            ms real not null
        ) strict
    """)
    db.execute("create index calls_by_time on calls(at)")
    db.execute("create index calls_of_account on calls(account_id, number)")
    db.execute("create index calls_with_whole_address on calls(at) where whole = 1")


@migrations()
def m006_deleted_accounts(db: Database) -> None:
    """Accounts of which only the id is left, for what they used."""
    db.execute("alter table accounts add column deleted integer")


@migrations()
def m007_egress(db: Database) -> None:
    """What may leave the box, per account and per key, and what did."""
    db.execute("alter table accounts add column prompts text not null default 'never'")
    db.execute("alter table keys add column prompts text")  # null: as the account
    db.execute("""
        create table egress (
            number integer primary key,
            at real not null,
            account_id text not null,
            key_id text not null,
            destination text not null,
            bytes_out integer not null,
            bytes_in integer not null,
            reason text not null,
            request_id text not null
        ) strict
    """)
    db.execute("create index egress_of_account on egress(account_id, number)")
