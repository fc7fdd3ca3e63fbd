"""Ids of rows, and the rules for names. No SQL."""

from __future__ import annotations

import secrets
import time

from appliance.errors import BadRequest

LONGEST_NAME = 100
COMMAND_LINE = "command line"  # who acts, where it is no signed-in user


def new_id(kind: str) -> str:
    """`kind` and 96 random bits, e.g. `key_…`: not guessable, and no order to read from it."""
    return f"{kind}_{secrets.token_hex(12)}"


def now() -> int:
    """UTC epoch seconds."""
    return int(time.time())


def checked_name(name: str, what: str) -> str:
    """`name` without outer white space. Raises BadRequest unless it has 1 to 100 printable characters."""
    name = name.strip()
    if not 0 < len(name) <= LONGEST_NAME or not name.isprintable():
        raise BadRequest(f"The name of {what} must have 1 to {LONGEST_NAME} printable characters.")
    return name
