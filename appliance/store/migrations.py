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
