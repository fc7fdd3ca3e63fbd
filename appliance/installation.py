"""Making a data directory into an appliance: key, database, first account, administrator, key and model.

Safe to repeat and to resume: what is there stays, and secrets are made and shown only once.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import string
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from appliance import tinymodel
from appliance.access import keys as key_form
from appliance.catalog import Catalog
from appliance.config import CHECKOUT, Config
from appliance.errors import DataDirError, ModelError
from appliance.store import accounts, keys, users
from appliance.store.database import Store
from appliance.store.keyfile import ENVIRONMENT, MasterKey, create_key_file, read_key

ACCOUNT, PLAN, ADMINISTRATOR = "default", "enterprise", "admin"
GUIDE = CHECKOUT / "models" / "appliance-guide.gguf"
PLACEHOLDER = "tiny-placeholder"
ORIGIN = "init"  # who made the first key


@dataclass(frozen=True, slots=True)
class Initialised:
    """What `init` made; the secrets are here and nowhere else. Empty when everything was there already."""

    created: bool
    account: str = ""
    user: str = ""
    password: str = field(default="", repr=False)
    key: str = field(default="", repr=False)


def initialise(config: Config, environ: Mapping[str, str]) -> Initialised:
    """Makes what is missing. Raises DataDirError, KeyFileError or ModelError. The caller holds the directory's lock.

    What can fail comes first and the secrets last: whoever gets none has to be able to call this again.
    """
    make_data_dir(config.models_dir)
    with _open_or_create(config, environ) as store:
        _choose_model(config.models_dir)
        return _first_account(store)


def make_data_dir(path: Path) -> None:
    """The directory, for nobody else's eyes; one that is there keeps its mode (`doctor` minds). Raises DataDirError."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise DataDirError(f"The directory {path} cannot be made: {error.strerror}.") from error


def _open_or_create(config: Config, environ: Mapping[str, str]) -> closing[Store]:
    """Never a new database for a lost key, and never a new key for an existing database."""
    if config.database.exists():
        return closing(Store.open(config.database, read_key(config.key_file, environ)))
    return closing(Store.create(config.database, _key_for_new_database(config, environ)))


def _key_for_new_database(config: Config, environ: Mapping[str, str]) -> MasterKey:
    path = config.key_file
    if environ.get(ENVIRONMENT):
        return read_key(path, environ)
    if path.is_file() and path.stat().st_size == 0:
        path.unlink()  # a beginning that was cut off: an empty file has never been anybody's key
    return read_key(path, environ) if path.exists() else create_key_file(path)


def _first_account(store: Store) -> Initialised:
    """Account, key and administrator, in this order: a beginning that was cut off has no administrator, and is begun
    again. A key from it has been shown to nobody, and is ended."""
    if users.listing(store):
        return Initialised(created=False)
    for lost in keys.listing(store):
        if lost.created_by == ORIGIN:
            keys.revoke(store, lost.id)
    found = accounts.listing(store)
    account = found[0] if found else accounts.create(store, ACCOUNT, PLAN)
    raw, password = key_form.generate(), _password()
    new = keys.NewKey(key_form.digest(raw), *key_form.display(raw))
    keys.create(store, account.id, "first key", "full", new, ORIGIN)
    users.create(store, ADMINISTRATOR, password, "administrator", account.id)
    return Initialised(True, account.name, ADMINISTRATOR, password, raw)


def _password() -> str:
    """119 random bits that survive shells and double clicks."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(20))


def _choose_model(models_dir: Path) -> None:
    """The built-in guide, until there is a real model; where it was not shipped, a model of random weights."""
    catalog = Catalog(models_dir)
    if catalog.chosen() is not None:
        return
    name = GUIDE.stem if GUIDE.exists() else PLACEHOLDER
    if not any(entry.name == name for entry in catalog.entries()):
        if name == PLACEHOLDER:
            _add_placeholder(catalog, models_dir)
        else:
            _add_guide(catalog)
    catalog.choose(name)


def _add_guide(catalog: Catalog) -> None:
    """A copy of the shipped file, which has to be the one that was shipped. Raises ModelError."""
    shipped = json.loads((GUIDE.parent / "manifest.json").read_text())["models"]
    digest = hashlib.sha256(GUIDE.read_bytes()).hexdigest()
    if digest not in {entry["sha256"] for entry in shipped if entry["name"] == GUIDE.stem}:
        raise ModelError(f"The built-in model {GUIDE} is not the one that was shipped: fetch it again, or delete it.")
    catalog.add(GUIDE, name=GUIDE.stem, copy=True)


def _add_placeholder(catalog: Catalog, models_dir: Path) -> None:
    path = models_dir / f"{PLACEHOLDER}.gguf"
    tinymodel.write(path)
    catalog.add(path, name=PLACEHOLDER)
