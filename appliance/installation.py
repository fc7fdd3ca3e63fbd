"""Making a data directory into an appliance: key, database, first account, administrator, key and model.

Safe to repeat and to resume: what is there stays, and secrets are made and shown only once.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from appliance import tinymodel
from appliance.access import keys as key_form
from appliance.catalog import Catalog
from appliance.config import Config
from appliance.errors import DataDirError
from appliance.store import accounts, keys, users
from appliance.store.database import Store
from appliance.store.keyfile import ENVIRONMENT, MasterKey, create_key_file, read_key

ACCOUNT, PLAN, ADMINISTRATOR = "default", "enterprise", "admin"
PLACEHOLDER = "tiny"


@dataclass(frozen=True, slots=True)
class Initialised:
    """What `init` made; the secrets are here and nowhere else. All None when everything was there already."""

    created: bool
    account: str | None = None
    user: str | None = None
    password: str | None = None
    key: str | None = None


def initialise(config: Config, environ: Mapping[str, str]) -> Initialised:
    """Makes what is missing. Raises DataDirError or KeyFileError. The caller holds the directory's lock."""
    _make_directory(config.models_dir)
    with _open_or_create(config, environ) as store:
        made = _first_account(store)
    _make_placeholder(config.models_dir)
    return made


def make_data_dir(path: Path) -> None:
    """The data directory itself, for nobody else's eyes. Raises DataDirError."""
    _make_directory(path)


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise DataDirError(f"The data directory {path} cannot be made: {error.strerror}.") from error


class _Opened:
    """A store for a `with` block."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def __enter__(self) -> Store:
        return self.store

    def __exit__(self, *exc: object) -> None:
        self.store.close()


def _open_or_create(config: Config, environ: Mapping[str, str]) -> _Opened:
    """Never a new database for a lost key, and never a new key for an existing database."""
    if config.database.exists():
        return _Opened(Store.open(config.database, read_key(config.key_file, environ)))
    return _Opened(Store.create(config.database, _key_for_new_database(config, environ)))


def _key_for_new_database(config: Config, environ: Mapping[str, str]) -> MasterKey:
    if environ.get(ENVIRONMENT) or config.key_file.exists():
        return read_key(config.key_file, environ)
    return create_key_file(config.key_file)


def _first_account(store: Store) -> Initialised:
    """Account, administrator and key; a beginning that was cut off is completed. Nothing if there is a key already."""
    if keys.listing(store):
        return Initialised(created=False)
    found = accounts.listing(store)
    account = found[0] if found else accounts.create(store, ACCOUNT, PLAN)
    password = None
    if not users.listing(store):
        password = secrets.token_urlsafe(15)
        users.create(store, ADMINISTRATOR, password, "administrator", account.id)
    raw = key_form.generate()
    new = keys.NewKey(key_form.digest(raw), *key_form.display(raw))
    keys.create(store, account.id, "first key", "full", new, "init")
    return Initialised(True, account.name, ADMINISTRATOR, password, raw)


def _make_placeholder(models_dir: Path) -> None:
    """A model of random weights, until there is a real one."""
    catalog = Catalog(models_dir)
    if catalog.chosen() is not None:
        return
    path = models_dir / f"{PLACEHOLDER}.gguf"
    if not any(entry.name == PLACEHOLDER for entry in catalog.entries()):
        tinymodel.write(path)
        catalog.add(path, name=PLACEHOLDER)
    catalog.choose(PLACEHOLDER)
