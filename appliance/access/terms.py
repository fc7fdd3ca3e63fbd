"""What each caller is allowed: by its plan, by its key's own narrower limits, or by a stranger's address. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv6Address, ip_address

from appliance.access.admission import Terms
from appliance.access.leases import Room
from appliance.access.plans import PLANS, Plan
from appliance.access.windows import Limits, Payer
from appliance.messages import Caller

STRANGER_CALLS = 120  # per minute and address, without a valid key
WRONG_KEYS = 20  # per minute and address
SITE_BITS = 64  # of an IPv6 address: what one site holds, so that it counts as one


def of_caller(caller: Caller, plans: Mapping[str, Plan] = PLANS) -> Terms:
    """The account pays for every call, and so does the key where it has limits of its own."""
    plan, own = plans[caller.plan], caller.limits
    account, key = caller.account_id, f"key {caller.lineage or caller.key_id}"
    payers = [Payer(account, Limits(plan.per_minute, plan.per_hour, plan.per_month))]
    rooms = [Room(account, plan.concurrent)]
    if (own.minute, own.hour, own.month) != (None, None, None):
        payers.append(Payer(key, Limits(own.minute, own.hour, own.month)))
    if own.concurrent is not None:
        rooms.append(Room(key, own.concurrent))
    return Terms(tuple(payers), tuple(rooms))


def of_stranger(ip: str, *, wrong_key: bool = False) -> Terms:
    """Whoever has no valid key pays by address; a wrong one is a guess, of which there are fewer."""
    site = _site(ip)
    payers = [Payer(f"ip {site}", Limits(STRANGER_CALLS))]
    if wrong_key:
        payers.append(Payer(f"guess {site}", Limits(WRONG_KEYS)))
    return Terms(tuple(payers))


def unlimited(caller: Caller | None, ip: str, *, wrong_key: bool = False) -> Terms:
    """Nobody is limited."""
    return Terms()


def limited(caller: Caller | None, ip: str, *, wrong_key: bool = False) -> Terms:
    """Callers by their plans, strangers by their addresses."""
    return of_caller(caller) if caller is not None else of_stranger(ip, wrong_key=wrong_key)


def _site(ip: str) -> str:
    try:
        address = ip_address(ip)
    except ValueError:  # a Unix socket's peer has none
        return ip
    if not isinstance(address, IPv6Address):
        return ip
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(IPv6Address(int(address) >> (128 - SITE_BITS) << (128 - SITE_BITS)))
