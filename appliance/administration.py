"""What administrators do, once: called by the commands directly when no server runs, by the admin socket when one does.

Every operation takes plain values and returns plain values that JSON can hold.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from ipaddress import ip_network
from pathlib import Path
from typing import Any

from appliance.access import keys as key_form
from appliance.access.keyring import Entry, KeyRing
from appliance.catalog import Catalog, Model
from appliance.errors import BadRequest, ModelError, NotFound, Unavailable
from appliance.store import accounts, audit, backup, keys
from appliance.store.database import Store
from appliance.store.ids import COMMAND_LINE
from appliance.store.keyfile import MasterKey

log = logging.getLogger("appliance.administration")


@dataclass(frozen=True, slots=True)
class Administration:
    """The operations over an open store; `keyring` is the running server's, which hears of every change."""

    store: Store
    master_key: MasterKey
    catalog: Catalog
    keyring: KeyRing

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
        return asdict(accounts.create(self.store, name, plan, email))

    def account_list(self) -> list[dict[str, Any]]:
        return [asdict(a) for a in accounts.listing(self.store)]

    def key_create(self, account: str, name: str, scope: str) -> dict[str, Any]:
        """The only answer that ever holds the key itself."""
        raw = key_form.generate()
        new = keys.NewKey(key_form.digest(raw), *key_form.display(raw))
        made = keys.create(self.store, accounts.by_name(self.store, account).id, name, scope, new, COMMAND_LINE)
        self.reload_keys()
        return {"key": raw, **asdict(made)}

    def key_list(self) -> list[dict[str, Any]]:
        return [asdict(k) for k in keys.listing(self.store)]

    def key_revoke(self, key_id: str) -> dict[str, Any]:
        revoked = keys.revoke(self.store, key_id)
        self.reload_keys()
        return asdict(revoked)

    def models_list(self) -> list[dict[str, Any]]:
        return [described(m) for m in self.catalog.entries()]

    def models_add(self, file: str, name: str | None = None, copy: bool = False) -> dict[str, Any]:
        return described(self.catalog.add(Path(file), name=name, copy=copy))

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
    "key.create": Administration.key_create,
    "key.list": Administration.key_list,
    "key.revoke": Administration.key_revoke,
    "models.list": Administration.models_list,
    "models.add": Administration.models_add,
    "models.use": Administration.models_use,
    "models.verify": Administration.models_verify,
    "backup": Administration.backup,
}


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
