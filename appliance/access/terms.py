"""What each caller is allowed: by its plan, by its key's own narrower limits, or by a stranger's address. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv6Address, ip_address

from appliance.access.admission import Terms
from appliance.access.leases import Room
from appliance.access.plans import Plan
from appliance.access.windows import Limits, Payer
from appliance.config import LimitSettings
from appliance.messages import Caller

SITE_BITS = 64  # of an IPv6 address: what one site holds, so that it counts as one


class Tariff:
    """Says what each caller is allowed. `plans` and `limits` are replaced when the settings are read again."""

    def __init__(self, plans: Mapping[str, Plan], limits: LimitSettings) -> None:
        self.plans = plans
        self._known: dict[str, tuple[Caller, Plan, Terms]] = {}  # by key; those of revoked ones do no harm
        self.limits = limits

    def __call__(self, caller: Caller | None, ip: str, *, wrong_key: bool = False) -> Terms:
        """Callers by their plans, strangers by their addresses."""
        if caller is None:
            return self._of_stranger(ip, wrong_key)
        plan = self.plans[caller.plan]
        known = self._known.get(caller.key_id)
        if known is None or known[0] is not caller or known[1] is not plan:
            known = self._known[caller.key_id] = (caller, plan, self._of_caller(caller, plan))
        return known[2]

    def _of_caller(self, caller: Caller, plan: Plan) -> Terms:
        """The account pays for every call, and so does the key where it has limits of its own."""
        own = caller.limits
        account, key = caller.account_id, key_payer(caller.lineage or caller.key_id)
        payers = [Payer(account, Limits(plan.per_minute, plan.per_hour, plan.per_month))]
        rooms = [Room(account, plan.concurrent)]
        if (own.minute, own.hour, own.month, own.tokens_per_day) != (None, None, None, None):
            payers.append(Payer(key, Limits(own.minute, own.hour, own.month), own.tokens_per_day))
        if own.concurrent is not None:
            rooms.append(Room(key, own.concurrent))
        return Terms(tuple(payers), tuple(rooms))

    def _of_stranger(self, ip: str, wrong_key: bool) -> Terms:
        """Whoever has no valid key pays by address; a wrong one is a guess, of which there are fewer."""
        site = _site(ip)
        payers = [Payer(f"ip {site}", Limits(self.limits.strangers_per_minute))]
        if wrong_key:
            payers.append(Payer(f"guess {site}", Limits(self.limits.wrong_keys_per_minute)))
        return Terms(tuple(payers))


def key_payer(lineage: str) -> str:
    """Under which name a key of its own limits is counted."""
    return f"key {lineage}"


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
