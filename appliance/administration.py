"""What administrators do, once: called by the commands directly when no server runs, by the admin socket when one does.

Every operation takes plain values and returns plain values that JSON can hold.
"""

from __future__ import annotations

import inspect
import logging
import threading
import time
from collections.abc import Callable, Container, Iterable
from dataclasses import asdict, dataclass, field
from ipaddress import ip_network
from pathlib import Path
from typing import Any

from appliance.access import keys as key_form
from appliance.access.forecast import forecast
from appliance.access.keyring import Entry, KeyRing
from appliance.access.plans import Plans
from appliance.access.windows import bounds
from appliance.catalog import Catalog, Model
from appliance.errors import BadRequest, ConfigError, ModelError, NotFound, Unavailable
from appliance.messages import AS_ACCOUNT, KeyLimits
from appliance.store import accounts, audit, backup, calls, egress, keys, usage, users
from appliance.store.database import Store
from appliance.store.ids import COMMAND_LINE
from appliance.store.keyfile import MasterKey

log = logging.getLogger("appliance.administration")

MOST_EGRESS = 10_000  # rows
PAGE = 1_000  # rows of one answer
FOREVER = 1 << 40  # epoch seconds


@dataclass(frozen=True, slots=True)
class Administration:
    """The operations over an open store; `keyring` is the running server's, which hears of every change."""

    store: Store
    master_key: MasterKey
    catalog: Catalog
    keyring: KeyRing
    plans: Plans  # the settings'
    # held while an account is given a plan, and while the plans change, so that none has a plan that is gone
    plan_names: threading.Lock = field(default_factory=threading.Lock)

    def reload_keys(self) -> None:
        """The keyring holds what the store says."""
        self.keyring.reload(self._valid_keys)

    def _valid_keys(self) -> Iterable[Entry]:
        return [
            Entry(k.digest, k.caller, k.expires, tuple(map(ip_network, k.networks))) for k in keys.valid(self.store)
        ]

    def record(self, what: str, **about: str | int | None) -> None:
        """For acts outside the database, after they are done: a full disk does not undo them, so it is only logged.
        The others record themselves."""
        try:
            self.store.write(lambda db: audit.record(db, COMMAND_LINE, what, **about), durable=True).result()
        except Unavailable as error:
            log.warning("%s was done, but is not in the audit log: %s", what, error.message)

    def account_create(self, name: str, plan: str, email: str | None = None) -> dict[str, Any]:
        with self.plan_names:
            self._need_plan(plan)
            return asdict(accounts.create(self.store, name, plan, email))

    def account_list(self) -> list[dict[str, Any]]:
        return [asdict(a) for a in accounts.listing(self.store)]

    def account_set_plan(self, name: str, plan: str) -> dict[str, Any]:
        with self.plan_names:
            self._need_plan(plan)
            return self._changed(accounts.set_plan(self.store, name, plan))

    def account_set_egress(self, name: str, prompts: str) -> dict[str, Any]:
        return self._changed(accounts.set_egress(self.store, name, prompts))

    def egress(self, since: int, account: str | None = None) -> list[dict[str, Any]]:
        """The newest rows of what left the box from `since` (epoch seconds) on, oldest first."""
        account_id = accounts.by_name(self.store, account).id if account else None
        return [row._asdict() for row in egress.listing(self.store, since, MOST_EGRESS, account_id)]

    def account_disable(self, name: str) -> dict[str, Any]:
        return self._changed(accounts.set_disabled(self.store, name, True))

    def account_enable(self, name: str) -> dict[str, Any]:
        return self._changed(accounts.set_disabled(self.store, name, False))

    def account_delete(self, name: str) -> dict[str, Any]:
        return self._changed(accounts.delete(self.store, name))

    def account_export(self, name: str) -> dict[str, Any]:
        """All but the calls, of which there may be millions: those come by `calls_after`."""
        account = accounts.by_name(self.store, name)
        self.record("account.export", account=account.id)
        return {
            "account": asdict(account),
            "users": [asdict(u) for u in users.listing(self.store) if u.account_id == account.id],
            "keys": [asdict(k) for k in keys.listing(self.store) if k.account_id == account.id],
            "usage": [asdict(total) for total in usage.totals(self.store, account.id, 0, FOREVER)],
        }

    def _changed(self, account: accounts.Account) -> dict[str, Any]:
        self.reload_keys()
        return asdict(account)

    def _need_plan(self, name: str) -> None:
        if name not in self.plans:
            raise BadRequest(f"There is no plan {name[:50]!r}; the plans are {', '.join(self.plans)}.")

    def check_plans(self, plans: Container[str]) -> None:
        """Raises ConfigError unless every account's plan is among `plans`."""
        missing = {plan for plan in accounts.plans_in_use(self.store) if plan not in plans}
        if missing:
            raise ConfigError(f"Accounts have the plan {', '.join(sorted(missing))}, which the settings do not name.")

    def user_create(self, name: str, password: str, role: str, account: str | None = None) -> dict[str, Any]:
        account_id = accounts.by_name(self.store, account).id if account else None
        return asdict(users.create(self.store, name, password, role, account_id))

    def user_list(self) -> list[dict[str, Any]]:
        return [asdict(u) for u in users.listing(self.store)]

    def user_passwd(self, name: str, password: str) -> dict[str, Any]:
        return asdict(users.set_password(self.store, name, password))

    def user_disable(self, name: str) -> dict[str, Any]:
        return asdict(users.disable(self.store, name))

    def key_create(
        self,
        account: str,
        name: str,
        scope: str,
        expires: int | None = None,
        networks: list[str] | None = None,
        limits: dict[str, int] | None = None,
        prompts: str | None = None,
    ) -> dict[str, Any]:
        """This answer and `key_rotate`'s are the only ones that ever hold a key itself."""
        raw, new = _new_key()
        made = keys.create(
            self.store,
            accounts.by_name(self.store, account).id,
            name,
            scope,
            new,
            COMMAND_LINE,
            expires=expires,
            networks=networks or (),
            limits=KeyLimits(**limits) if limits else AS_ACCOUNT,
            prompts=prompts,
        )
        self.reload_keys()
        return {"key": raw, **asdict(made)}

    def key_rotate(self, key_id: str, overlap_seconds: int) -> dict[str, Any]:
        raw, new = _new_key()
        old, made = keys.rotate(self.store, key_id, new, overlap_seconds)
        self.reload_keys()
        return {"key": raw, "ends": old.expires, "replaces": old.id, **asdict(made)}

    def audit_list(self) -> list[dict[str, Any]]:
        return [{**asdict(act), "hash": act.hash.hex()} for act in audit.listing(self.store)]

    def audit_verify(self) -> dict[str, Any]:
        chain = audit.verify(self.store)
        return {"rows": chain.rows, "head": chain.head.hex(), "broken": chain.broken}

    def usage(self, first_day: int, last_day: int, account: str | None = None) -> list[dict[str, Any]]:
        """Totals of one account, or of all, by day; both days (epoch seconds) are included."""
        chosen = [accounts.by_name(self.store, account)] if account else accounts.listing(self.store, deleted=True)
        return [
            {"account": one.name, **asdict(total)}
            for one in chosen
            for total in usage.totals(self.store, one.id, first_day, last_day)
        ]

    def usage_forecast(self, account: str | None = None) -> dict[str, str]:
        """Of one account, or of all, what will become of this month's calls at this pace."""
        chosen = [accounts.by_name(self.store, account)] if account else accounts.listing(self.store)
        now = time.time()
        start = bounds("month", now)[0]
        return {
            one.name: forecast(usage.month_used(self.store, one.id, start), plan.per_month, now).sentence
            for one in chosen
            if (plan := self.plans.get(one.plan)) is not None
        }

    def calls_latest(self, most: int, account: str | None = None) -> list[dict[str, Any]]:
        """The newest rows of the log of calls, oldest first."""
        account_id = accounts.by_name(self.store, account).id if account else None
        return [{"number": n, **row._asdict()} for n, row in calls.latest(self.store, min(most, PAGE), account_id)]

    def calls_after(self, after: int, account: str | None = None) -> list[dict[str, Any]]:
        """The next rows of the log of calls beyond number `after`, a page of them."""
        account_id = accounts.by_name(self.store, account).id if account else None
        return [{"number": n, **row._asdict()} for n, row in calls.after(self.store, after, PAGE, account_id)]

    def key_list(self) -> list[dict[str, Any]]:
        return [asdict(k) for k in keys.listing(self.store)]

    def key_revoke(self, key_id: str) -> dict[str, Any]:
        revoked = keys.revoke(self.store, key_id)
        self.reload_keys()
        return asdict(revoked)

    def models_list(self) -> list[dict[str, Any]]:
        return [described(m) for m in self.catalog.entries()]

    def models_added(self, name: str) -> dict[str, Any]:
        """Records that a model was added, which the command does by itself."""
        added = next((m for m in self.catalog.entries() if m.name == name), None)
        if added is None:
            raise NotFound(f"There is no model {name[:100]!r}.")
        self.record("models.add", name=added.name, sha256=added.sha256)
        return described(added)

    def models_use(self, name: str) -> dict[str, Any]:
        """Chooses the model that the next start loads."""
        self.catalog.resolve(name)
        chosen = self.catalog.choose(name)
        self.record("models.use", name=chosen.name, sha256=chosen.sha256)
        return described(chosen)

    def models_verify(self, name: str | None = None) -> list[dict[str, Any]]:
        return [{"name": v.model.name, "good": v.good, "problem": v.problem} for v in self.catalog.verify(name)]

    def backup(self, file: str) -> dict[str, Any]:
        report = backup.backup(self.store, Path(file), self.master_key)
        self.record("backup", bytes=report.bytes)
        return {"path": str(report.path), "bytes": report.bytes, "tables": report.tables}


OPERATIONS: dict[str, Callable[..., Any]] = {
    "account.create": Administration.account_create,
    "account.list": Administration.account_list,
    "account.set-plan": Administration.account_set_plan,
    "account.set-egress": Administration.account_set_egress,
    "egress": Administration.egress,
    "account.disable": Administration.account_disable,
    "account.enable": Administration.account_enable,
    "account.delete": Administration.account_delete,
    "account.export": Administration.account_export,
    "user.create": Administration.user_create,
    "user.list": Administration.user_list,
    "user.passwd": Administration.user_passwd,
    "user.disable": Administration.user_disable,
    "audit.list": Administration.audit_list,
    "audit.verify": Administration.audit_verify,
    "usage": Administration.usage,
    "usage.forecast": Administration.usage_forecast,
    "calls.latest": Administration.calls_latest,
    "calls.after": Administration.calls_after,
    "key.rotate": Administration.key_rotate,
    "key.create": Administration.key_create,
    "key.list": Administration.key_list,
    "key.revoke": Administration.key_revoke,
    "models.list": Administration.models_list,
    "models.added": Administration.models_added,
    "models.use": Administration.models_use,
    "models.verify": Administration.models_verify,
    "backup": Administration.backup,
}


def _new_key() -> tuple[str, keys.NewKey]:
    raw = key_form.generate()
    return raw, keys.NewKey(key_form.digest(raw), *key_form.display(raw))


def perform(administration: Administration, operation: str, arguments: dict[str, Any]) -> Any:
    """The operation's result. Raises NotFound for an unknown one, BadRequest for wrong arguments, its own errors."""
    function = OPERATIONS.get(operation)
    if function is None:
        raise NotFound(f"There is no operation {operation[:50]!r}.")
    try:
        inspect.signature(function).bind(administration, **arguments)
    except TypeError as error:
        raise BadRequest(f"The arguments of {operation} are off: {error}.") from error
    return function(administration, **arguments)


def served_model(catalog: Catalog, wanted: str) -> Model:
    """The model to load: `wanted` (the setting), else the chosen one. Raises ModelError."""
    if wanted:
        return catalog.resolve(wanted)
    chosen = catalog.chosen()
    if chosen is None:
        raise ModelError("No model is chosen: run `appliance models add FILE` and `appliance models use NAME`.")
    return catalog.resolve(chosen.name)


def described(model: Model) -> dict[str, Any]:
    """A model as JSON."""
    return {
        "name": model.name,
        "file": str(model.path),
        "size": model.size,
        "sha256": model.sha256,
        "template": model.template,
        "licence": model.licence,
        "guide": model.nature == "guide",
        "placeholder": model.nature == "placeholder",
        "chosen": model.chosen,
    }
