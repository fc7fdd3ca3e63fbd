"""The keys that are valid now, in memory, found by the hash of the whole key. Whoever changes keys replaces it."""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from dataclasses import dataclass

from appliance.access.keys import digest, looks_like_key
from appliance.messages import Caller


@dataclass(frozen=True, slots=True)
class Entry:
    """A key's hash, whom it names, and when it ends (epoch seconds; None: never)."""

    digest: bytes
    caller: Caller
    expires: int | None = None


class KeyRing:
    """Replaced as a whole, so that a look-up never sees half a change."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._entries: dict[bytes, Entry] = {}
        self.replace(entries)

    def __len__(self) -> int:
        return len(self._entries)

    def replace(self, entries: Iterable[Entry]) -> None:
        """From now on these keys are valid, and no others."""
        self._entries = {entry.digest: entry for entry in entries}

    def find(self, key: str | None, now: float) -> Caller | None:
        """Whom `key` names; None for a missing, malformed, unknown, revoked or expired one."""
        if key is None or not looks_like_key(key):
            return None
        hashed = digest(key)
        entry = self._entries.get(hashed)
        if entry is None or not hmac.compare_digest(entry.digest, hashed):
            return None
        return entry.caller if entry.expires is None or now < entry.expires else None
