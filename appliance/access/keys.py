"""The form of an API key: `oai_` and 32 of `[A-Za-z0-9]`. Making, checking, hashing and showing one; no storage.

Only the SHA-256 of the whole key is ever kept: 32 random characters are 190 bits, so that a plain hash is enough.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import string
from collections.abc import Sequence

PREFIX = "oai_"
LENGTH = 32
_ALPHABET = string.ascii_letters + string.digits
_SHAPE = re.compile(r"oai_[A-Za-z0-9]{32}", re.ASCII)
_BEARER = re.compile(rb"bearer[ \t]+([!-~]+)[ \t]*", re.IGNORECASE)


def generate() -> str:
    """A new key."""
    return PREFIX + "".join(secrets.choice(_ALPHABET) for _ in range(LENGTH))


def looks_like_key(text: str) -> bool:
    """Whether `text` has exactly the shape of a key; checked before anything is hashed."""
    return _SHAPE.fullmatch(text) is not None


def digest(key: str) -> bytes:
    """SHA-256 of the whole key, 32 bytes."""
    return hashlib.sha256(key.encode()).digest()


def display(key: str) -> tuple[str, str]:
    """The prefix (with four characters) and the last four, by which people tell keys apart."""
    return key[: len(PREFIX) + 4], key[-4:]


def bearer(values: Sequence[bytes]) -> str | None:
    """The credential of the `Authorization` header values; None unless there is exactly one bearer."""
    if len(values) != 1 or (match := _BEARER.fullmatch(values[0])) is None:
        return None
    return match[1].decode("ascii")
