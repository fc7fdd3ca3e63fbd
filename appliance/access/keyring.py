"""The keys that are valid now, in memory, found by the hash of the whole key. Whoever changes keys replaces it."""

from __future__ import annotations

import hmac
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address

from appliance.access.keys import digest, looks_like_key
from appliance.messages import Caller


@dataclass(frozen=True, slots=True)
class Entry:
    """A key's hash, whom it names, when it ends (epoch seconds; None: never), and from where it may be used."""

    digest: bytes
    caller: Caller
    expires: int | None = None
    networks: tuple[IPv4Network | IPv6Network, ...] = ()  # none: from everywhere


class KeyRing:
    """Replaced as a whole, so that a look-up never sees half a change."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._entries: tuple[dict[bytes, Entry], dict[str, Entry]] = ({}, {})  # by hash, and by id
        self._lock = threading.Lock()
        self.replace(entries)

    def __len__(self) -> int:
        return len(self._entries[0])

    def replace(self, entries: Iterable[Entry]) -> None:
        """From now on these keys are valid, and no others."""
        found = list(entries)
        self._entries = ({e.digest: e for e in found}, {e.caller.key_id: e for e in found})

    def reload(self, load: Callable[[], Iterable[Entry]]) -> None:
        """Replaces the keys by what `load` reads; one after the other, so that an older state never comes last."""
        with self._lock:
            self.replace(load())

    def holds(self, key_id: str, now: float) -> bool:
        """Whether a key that was found before is still valid."""
        entry = self._entries[1].get(key_id)
        return entry is not None and (entry.expires is None or now < entry.expires)

    def find(self, key: str | None, now: float, ip: str) -> Caller | None:
        """Whom `key` names; None for a missing, malformed, unknown, revoked or expired one, or from elsewhere."""
        if key is None or not looks_like_key(key):
            return None
        hashed = digest(key)
        entry = self._entries[0].get(hashed)
        if entry is None or not hmac.compare_digest(entry.digest, hashed):
            return None
        if entry.expires is not None and now >= entry.expires:
            return None
        return entry.caller if not entry.networks or _within(ip, entry.networks) else None


def _within(ip: str, networks: tuple[IPv4Network | IPv6Network, ...]) -> bool:
    try:
        address = ip_address(ip)
    except ValueError:  # a Unix socket's peer has none
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return any((mapped or address) in network for network in networks)
