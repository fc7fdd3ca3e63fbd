"""The `appliance` command. Reads words, calls one operation, prints; an error becomes one sentence and an exit code.

An operation runs in the server when one is running (through its admin socket), else here, under the directory's lock.
Owns no rule of its own: what an operation does stands in `administration`.
"""

from __future__ import annotations

import calendar
import csv
import hashlib
import json
import os
import re
import secrets
import sys
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, TextIO
from urllib.parse import urlsplit

import click

from appliance import __version__, admin, config, doctor, errors, installation, tls
from appliance.access.keyring import KeyRing
from appliance.access.plans import Plans
from appliance.administration import Administration, described, perform
from appliance.catalog import Catalog
from appliance.config import Config
from appliance.errors import (
    AlreadyRunning,
    ApplianceError,
    BackupError,
    NotInitialised,
    OperatorError,
    ServerUnreachable,
    UsageError,
)
from appliance.messages import NOTES, PROMPTS, SCOPES
from appliance.store import backup
from appliance.store.database import Store
from appliance.store.keyfile import read_key
from appliance.store.lock import DataDirLock

BUSY_SECONDS = 5.0  # another command, or a server that is just starting, may hold the data directory this long
PORTION = 1 << 20
FOLLOW_SECONDS = 0.5
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # with these a model, or a GGUF header, could steer a terminal

Answer = Callable[[str, dict[str, Any]], Iterator[dict[str, Any]]]  # an operation's parts


def _exit_codes() -> str:
    """The table for `--help`, from the error tree."""
    lines = ["\b", "Exit codes:", "  0 done, 1 failed, 2 wrong words"]
    found = sorted({(c.exit_code, c.__doc__ or "") for c in OperatorError.__subclasses__()})
    lines += [f"  {code:<2} {text.splitlines()[0]}" for code, text in found if code > 2]
    return "\n".join([*lines, "  130 interrupted"])


class _Group(click.Group):
    """Renders our errors, in one place for all commands."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["standalone_mode"] = False
        try:
            sys.exit(super().main(*args, **kwargs) or 0)
        except click.ClickException as error:
            error.show()
            sys.exit(error.exit_code)
        except ApplianceError as error:
            _show_trace()
            click.echo(f"appliance: {error.message}", err=True)
            sys.exit(error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            click.echo(err=True)
            sys.exit(130)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except Exception as error:
            _show_trace()
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            click.echo(f"appliance: unexpected {what} (APPLIANCE_DEBUG=1 shows where)", err=True)
            sys.exit(1)


def _show_trace() -> None:
    if os.environ.get("APPLIANCE_DEBUG"):
        traceback.print_exc()


@click.group(cls=_Group, epilog=_exit_codes(), context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """A language model for a whole team on its own box."""


def _common(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that every command takes."""
    function = click.option("--data-dir", metavar="D", help="the data directory")(function)
    return click.option("--config", "config_file", metavar="F", help="the settings file")(function)


_json = click.option("--json", "as_json", is_flag=True, help="print JSON")


def _reachable(settings: Config) -> bool:
    return admin.reachable(admin.socket_path(settings.data_dir))


@contextmanager
def _administration(settings: Config) -> Iterator[Administration]:
    """The store, opened here: no server is running. Raises NotInitialised, AlreadyRunning and what the store raises."""
    _need_initialised(settings)
    with DataDirLock(settings.data_dir):
        key = read_key(settings.key_file)
        with closing(Store.open(settings.database, key)) as store:
            yield Administration(store, key, Catalog(settings.models_dir), KeyRing(), Plans(settings.plans))


@contextmanager
def _patient_lock(settings: Config) -> Iterator[None]:
    """The data directory's lock, for which another command is waited a little. Raises AlreadyRunning."""
    deadline = time.monotonic() + BUSY_SECONDS
    lock = DataDirLock(settings.data_dir)
    while True:
        try:
            lock.acquire()
            break
        except AlreadyRunning:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
    try:
        yield
    finally:
        lock.release()


def _need_initialised(settings: Config) -> None:
    if not settings.database.exists():
        raise NotInitialised(f"There is no appliance in {settings.data_dir}: run `appliance init` first.")


def _operate(settings: Config, operation: str, **arguments: Any) -> Any:
    """One operation, in the running server or here. Waits a little for whoever holds the directory without a socket."""
    _need_initialised(settings)
    socket = admin.socket_path(settings.data_dir)
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        if admin.reachable(socket):
            return admin.call(socket, operation, arguments)
        with ExitStack() as stack:
            try:
                administration = stack.enter_context(_administration(settings))
            except AlreadyRunning:
                if time.monotonic() > deadline:
                    raise
            else:
                return perform(administration, operation, arguments)
        time.sleep(0.05)


def _hand_over(settings: Config, *made: Path) -> None:
    """What root made belongs to the data directory's owner: the service that runs as this user has to read it."""
    owner = settings.data_dir.stat()
    if os.geteuid() == 0 and owner.st_uid != 0:
        for path in made:
            with suppress(FileNotFoundError):
                os.lchown(path, owner.st_uid, owner.st_gid)


# ── the appliance ────────────────────────────────────────────────────────────────────────────────────────────────


@main.command()
@_common
@_json
def init(config_file: str | None, data_dir: str | None, as_json: bool) -> None:
    """Makes the data directory, its master key, the database, the first account, administrator and key."""
    settings = config.load(data_dir, config_file)
    installation.make_data_dir(settings.data_dir)
    if _reachable(settings):
        made = installation.Initialised(created=False)
    else:
        with _patient_lock(settings):
            made = installation.initialise(settings, os.environ)
    if as_json:
        values = {"account": made.account, "user": made.user, "password": made.password, "key": made.key}
        click.echo(json.dumps({"created": made.created, **(values if made.created else {})}))
    elif made.created:
        click.echo(f"The appliance is in {settings.data_dir}. These two secrets are shown this once:\n")
        click.echo(f"  administrator  {made.user}\n  password       {made.password}")
        click.echo(f"  account        {made.account}\n  key            {made.key}\n")
        click.echo(f"Keep a copy of the master key ({settings.key_file}) elsewhere: nothing opens the data without it.")
    else:
        click.echo(f"{settings.data_dir} holds an appliance already; nothing was changed.")


@main.command()
@_common
@click.option("--host", help="address to listen on")
@click.option("--port", type=int, help="port to listen on")
@click.option("--model", help="GGUF file or model name")
@click.option("--slots", type=int, help="sequences that generate at the same time")
@click.option("--context", type=int, metavar="TOKENS", help="KV tokens in all, shared by the slots")
def serve(config_file: str | None, data_dir: str | None, **options: Any) -> int:
    """Serves until SIGTERM or Ctrl-C."""
    from appliance import app  # here: it brings llama.cpp and the server, which would slow down every other command

    def read() -> Config:
        settings = config.load(data_dir, config_file)
        for name, value in options.items():
            section = "server" if name in ("host", "port") else "engine"
            if value is not None:
                settings = config.override(settings, {f"{section}.{name}": value}, f"option --{name}")
        return settings

    settings = read()
    _need_initialised(settings)
    return app.serve(settings, read)


@main.command(name="reload")
@_common
@_json
def reload_command(config_file: str | None, data_dir: str | None, as_json: bool) -> None:
    """Lets the running server read its settings again: plans, limits and retention count at once."""
    settings = config.load(data_dir, config_file)
    _print(admin.call(admin.socket_path(settings.data_dir), "reload", {}), as_json)


@main.command()
@_common
@_json
def status(config_file: str | None, data_dir: str | None, as_json: bool) -> None:
    """What the running server's engine counts."""
    settings = config.load(data_dir, config_file)
    values = admin.call(admin.socket_path(settings.data_dir), "status", {})
    _print(values, as_json)


@main.command(name="doctor")
@_common
@_json
def doctor_command(config_file: str | None, data_dir: str | None, as_json: bool) -> int:
    """Checks this machine and this data directory; each problem with its fix. Exit 1 if anything fails."""
    settings = config.load(data_dir, config_file)
    found = doctor.examine(settings, running=_reachable(settings))
    if as_json:
        click.echo(json.dumps([f.row() for f in found]))
    else:
        for finding in found:
            click.echo(f"{finding.state.upper():4}  {finding.name:12}  {finding.sentence}")
            if finding.fix:
                click.echo(f"{'':20}Fix: {finding.fix}")
    return int(any(f.state == "fail" for f in found))


# ── accounts and keys ────────────────────────────────────────────────────────────────────────────────────────────


@main.group()
def account() -> None:
    """Accounts: who pays and is limited."""


@account.command(name="create")
@_common
@click.argument("name")
@click.option(
    "--plan", required=True, metavar="PLAN", help="community, professional, enterprise, or one of the settings"
)
@click.option("--email", metavar="E")
@_json
def account_create(config_file: str | None, data_dir: str | None, as_json: bool, **values: Any) -> None:
    """Makes an account."""
    _print(_operate(config.load(data_dir, config_file), "account.create", **values), as_json)


@account.command(name="list")
@_common
@_json
def account_list(config_file: str | None, data_dir: str | None, as_json: bool) -> None:
    """Lists the accounts."""
    rows = _operate(config.load(data_dir, config_file), "account.list")
    _print_table(rows, ("id", "name", "plan", "email", "created", "disabled", "prompts"), as_json)


@account.command(name="set-plan")
@_common
@click.argument("name")
@click.argument("plan")
@_json
def account_set_plan(config_file: str | None, data_dir: str | None, as_json: bool, **values: Any) -> None:
    """Gives an account another plan, from its next call on."""
    _print(_operate(config.load(data_dir, config_file), "account.set-plan", **values), as_json)


@account.command(name="set-egress")
@_common
@click.argument("name")
@click.option("--prompts", required=True, type=click.Choice(PROMPTS), help="whether they may leave the box")
@_json
def account_set_egress(config_file: str | None, data_dir: str | None, as_json: bool, **values: Any) -> None:
    """Says what of an account may leave the box, from its next call on."""
    _print(_operate(config.load(data_dir, config_file), "account.set-egress", **values), as_json)


@account.command(name="disable")
@_common
@click.argument("name")
@_json
def account_disable(config_file: str | None, data_dir: str | None, as_json: bool, name: str) -> None:
    """Refuses an account's keys until it is enabled again."""
    _print(_operate(config.load(data_dir, config_file), "account.disable", name=name), as_json)


@account.command(name="enable")
@_common
@click.argument("name")
@_json
def account_enable(config_file: str | None, data_dir: str | None, as_json: bool, name: str) -> None:
    """Lets a disabled account's keys work again."""
    _print(_operate(config.load(data_dir, config_file), "account.enable", name=name), as_json)


@account.command(name="export")
@_common
@click.argument("name")
@click.argument("file", type=click.Path())
@_json
def account_export(config_file: str | None, data_dir: str | None, as_json: bool, name: str, file: str) -> None:
    """Writes what is known of an account into a new JSON file: users, keys without secrets, usage, calls."""
    settings, target = config.load(data_dir, config_file), Path(file).absolute()
    found = _operate(settings, "account.export", name=name)
    try:
        with open(target, "x", opener=lambda path, flags: os.open(path, flags, 0o600)) as out:
            try:
                calls = _write_export(out, found, _calls(settings, 0, account=found["account"]["id"]))
            except BaseException:
                target.unlink()
                raise
    except OSError as error:
        raise UsageError(f"{target} cannot be written: {error.strerror}; an export overwrites nothing.") from error
    _print({"path": str(target), "keys": len(found["keys"]), "calls": calls}, as_json)


def _write_export(out: TextIO, found: dict[str, Any], calls: Iterator[dict[str, Any]]) -> int:
    """One JSON object; the calls, of which there may be millions, one by one. How many they were."""
    count = 0
    out.write(json.dumps(found, indent=1).removesuffix("\n}") + ',\n "calls": [')
    for count, call in enumerate(calls, 1):
        out.write(("," if count > 1 else "") + "\n  " + json.dumps(call))
    out.write("\n ]\n}\n")
    return count


@account.command(name="delete")
@_common
@click.argument("name")
@click.option("--yes", is_flag=True, help="do not ask")
@_json
def account_delete(config_file: str | None, data_dir: str | None, as_json: bool, name: str, yes: bool) -> None:
    """Deletes an account with its users and keys; what it used stays, as numbers."""
    if not yes:
        click.confirm(f"Delete the account {name}, its users and its keys? They cannot be brought back.", abort=True)
    _print(_operate(config.load(data_dir, config_file), "account.delete", name=name), as_json)


@main.group()
def user() -> None:
    """Users: people who sign in."""


@user.command(name="create")
@_common
@click.argument("name")
@click.option("--account", metavar="ACCOUNT", help="whose member the user is")
@click.option("--administrator", is_flag=True, help="may do everything, and needs no account")
@_json
def user_create(
    config_file: str | None, data_dir: str | None, as_json: bool, name: str, account: str | None, administrator: bool
) -> None:
    """Makes a user, and asks for the password."""
    if not administrator and account is None:
        raise UsageError("A user is a member of an account (--account NAME) or an administrator (--administrator).")
    role = "administrator" if administrator else "member"
    values = {"name": name, "password": _password(), "role": role, "account": account}
    _print(_operate(config.load(data_dir, config_file), "user.create", **values), as_json)


@user.command(name="list")
@_common
@_json
def user_list(config_file: str | None, data_dir: str | None, as_json: bool) -> None:
    """Lists the users."""
    rows = _operate(config.load(data_dir, config_file), "user.list")
    _print_table(rows, ("id", "name", "role", "account_id", "created", "disabled"), as_json)


@user.command(name="passwd")
@_common
@click.argument("name")
@_json
def user_passwd(config_file: str | None, data_dir: str | None, as_json: bool, name: str) -> None:
    """Gives a user another password, which is asked for."""
    settings = config.load(data_dir, config_file)
    _print(_operate(settings, "user.passwd", name=name, password=_password()), as_json)


@user.command(name="disable")
@_common
@click.argument("name")
@click.option("--revoke-keys", is_flag=True, help="and ends the keys that the user made")
@_json
def user_disable(config_file: str | None, data_dir: str | None, as_json: bool, name: str, revoke_keys: bool) -> None:
    """Keeps a user from signing in. Asks whether the keys that the user made shall end, too."""
    settings = config.load(data_dir, config_file)
    disabled = _operate(settings, "user.disable", name=name)
    made = [k for k in _operate(settings, "key.list") if k["created_by"] == disabled["id"] and not k["revoked"]]
    if made and not revoke_keys and sys.stdin.isatty():
        revoke_keys = click.confirm(f"{len(made)} keys were made by {name}. Revoke them?", err=True)
    for one in made if revoke_keys else ():
        _operate(settings, "key.revoke", key_id=one["id"])
    kept = [] if revoke_keys else [one["id"] for one in made]
    _print({**disabled, "keys_revoked": len(made) - len(kept), "keys_kept": kept}, as_json)


def _password() -> str:
    """From the terminal, twice and unseen, or the first line of what is piped in."""
    if sys.stdin.isatty():
        return str(click.prompt("Password", hide_input=True, confirmation_prompt=True, err=True))
    return sys.stdin.readline().rstrip("\n")


@main.group()
def key() -> None:
    """API keys."""


@key.command(name="create")
@_common
@click.option("--account", required=True, metavar="NAME")
@click.option("--name", required=True, metavar="N", help="what the key is for")
@click.option("--scope", required=True, type=click.Choice(SCOPES))
@click.option("--expires", metavar="WHEN", help="its end: a date (UTC) such as 2027-01-31, or a time such as 90d")
@click.option("--network", "networks", multiple=True, metavar="CIDR", help="from where alone it may be used")
@click.option("--per-minute", "minute", type=click.IntRange(1), metavar="N", help="calls, where the plan has more")
@click.option("--per-hour", "hour", type=click.IntRange(1), metavar="N")
@click.option("--per-month", "month", type=click.IntRange(1), metavar="N")
@click.option("--concurrent", type=click.IntRange(1), metavar="N", help="calls at the same time")
@click.option("--tokens-per-day", type=click.IntRange(1), metavar="N")
@click.option("--prompts", type=click.Choice(PROMPTS), help="whether they may leave the box, where the account's may")
@_json
def key_create(
    config_file: str | None,
    data_dir: str | None,
    as_json: bool,
    account: str,
    name: str,
    scope: str,
    expires: str | None,
    networks: tuple[str, ...],
    prompts: str | None,
    **limits: int | None,
) -> None:
    """Makes a key and prints it, this once."""
    own = {name: limit for name, limit in limits.items() if limit is not None}
    end = _end(expires) if expires else None
    values = {"account": account, "name": name, "scope": scope, "networks": list(networks), "prompts": prompts}
    made = _operate(config.load(data_dir, config_file), "key.create", **values, limits=own, expires=end)
    _print(made, as_json)
    if not as_json:
        click.echo("The key is shown this once; it cannot be recovered.", err=True)


@key.command(name="list")
@_common
@_json
def key_list(config_file: str | None, data_dir: str | None, as_json: bool) -> None:
    """Lists the keys, revoked ones too."""
    rows = _operate(config.load(data_dir, config_file), "key.list")
    columns = ("id", "account", "name", "scope", "prefix", "last_four", "created", "created_by", "last_used")
    _print_table(rows, (*columns, "expires", "networks", "limits", "prompts", "revoked"), as_json)


@key.command(name="rotate")
@_common
@click.argument("key_id", metavar="ID")
@click.option("--overlap", default="7d", show_default=True, metavar="TIME", help="how long the old key works on")
@_json
def key_rotate(config_file: str | None, data_dir: str | None, as_json: bool, key_id: str, overlap: str) -> None:
    """Makes a key in the place of another, and prints it, this once."""
    settings = config.load(data_dir, config_file)
    made = _operate(settings, "key.rotate", key_id=key_id, overlap_seconds=_seconds(overlap))
    _print(made, as_json)
    if not as_json:
        click.echo("The key is shown this once; it cannot be recovered.", err=True)


def _end(when: str) -> int:
    """Epoch seconds of an end: the end of a day in UTC, or so long from now. Raises UsageError."""
    try:
        return _day(when) + 86_400
    except UsageError:
        return int(time.time()) + _seconds(when)


def _day(text: str) -> int:
    """Epoch seconds at which a day in UTC begins. Raises UsageError."""
    try:
        return int(datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC).timestamp())
    except ValueError:
        raise UsageError(f"{text[:50]!r} is no day such as 2027-01-31.") from None


def _seconds(text: str) -> int:
    """A time such as 90d, 12h or 0. Raises UsageError."""
    found = re.fullmatch(r"(\d{1,6})([dhm]?)", text)
    if found is None or (not found[2] and found[1] != "0"):
        raise UsageError(f"{text[:50]!r} is no time; 90d, 12h and 30m are, and a date such as 2027-01-31.")
    return int(found[1]) * {"d": 86_400, "h": 3_600, "m": 60, "": 1}[found[2]]


@key.command(name="revoke")
@_common
@click.argument("key_id", metavar="ID")
@_json
def key_revoke(config_file: str | None, data_dir: str | None, as_json: bool, key_id: str) -> None:
    """Ends a key: its next call fails."""
    _print(_operate(config.load(data_dir, config_file), "key.revoke", key_id=key_id), as_json)


# ── what was called, and what was done ───────────────────────────────────────────────────────────────────────────


@main.command()
@_common
@click.option("--account", metavar="NAME", help="one account; default: all")
@click.option("--month", metavar="YYYY-MM", help="default: this one")
@click.option("--csv", "as_csv", is_flag=True, help="print CSV")
@_json
def usage(
    config_file: str | None, data_dir: str | None, as_json: bool, account: str | None, month: str | None, as_csv: bool
) -> None:
    """Calls and tokens per account, day, key and endpoint; of this month with a forecast."""
    this_month = datetime.now(UTC).strftime("%Y-%m")
    first, last = _month(month or this_month)
    settings = config.load(data_dir, config_file)
    rows = _operate(settings, "usage", first_day=first, last_day=last, account=account)
    counts = ("calls", "prompt_tokens", "completion_tokens", "cached_tokens", "seconds")
    columns = ("account", "day", "key_id", "endpoint", "provider", "model", *counts)
    for row in rows:
        row["day"] = datetime.fromtimestamp(row["day"], UTC).strftime("%Y-%m-%d")
    if as_csv:
        writer = csv.DictWriter(sys.stdout, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return
    _print_table(rows, columns, as_json)
    if not as_json and month in (None, this_month):
        for name, sentence in _operate(settings, "usage.forecast", account=account).items():
            click.echo(f"{name}: {sentence}", err=True)


def _month(text: str) -> tuple[int, int]:
    """First and last day of a month, epoch seconds. Raises UsageError."""
    try:
        first = datetime.strptime(text, "%Y-%m").replace(tzinfo=UTC)
    except ValueError as error:
        raise UsageError(f"{text[:50]!r} is no month; 2026-11 is.") from error
    days = calendar.monthrange(first.year, first.month)[1]
    return int(first.timestamp()), int(first.timestamp()) + (days - 1) * 86_400


@main.command(name="egress")
@_common
@click.option("--since", metavar="YYYY-MM-DD", help="from the beginning of that day on (UTC); default: all")
@click.option("--account", metavar="NAME", help="one account; default: all")
@_json
def egress_command(
    config_file: str | None, data_dir: str | None, as_json: bool, since: str | None, account: str | None
) -> None:
    """What has left the box: when, whose, where to, how much and why; never what."""
    begin = _day(since) if since else 0
    rows = _operate(config.load(data_dir, config_file), "egress", since=begin, account=account)
    columns = ("at", "account_id", "key_id", "destination", "bytes_out", "bytes_in", "reason", "request_id")
    _print_table(rows if as_json else [{**row, "at": int(row["at"])} for row in rows], columns, as_json)


@main.command(name="logs")
@_common
@click.option("--account", metavar="NAME", help="one account; default: all")
@click.option("-n", "most", type=click.IntRange(0, 1_000), default=100, show_default=True, help="how many")
@click.option("--follow", is_flag=True, help="go on with new calls, until Ctrl-C")
@_json
def logs_command(
    config_file: str | None, data_dir: str | None, as_json: bool, account: str | None, most: int, follow: bool
) -> None:
    """The log of calls that the database keeps: time, endpoint, status, address, key; never a body or a query."""
    settings = config.load(data_dir, config_file)
    rows = _operate(settings, "calls.latest", most=max(1, most), account=account)
    _show_calls(rows[len(rows) - most :], as_json)
    last = rows[-1]["number"] if rows else 0
    while follow:
        time.sleep(FOLLOW_SECONDS)
        if not _reachable(settings):
            continue  # nothing calls a server that does not run
        for row in _calls(settings, last, account=account):
            last = row["number"]
            _show_calls([row], as_json)


def _calls(settings: Config, after: int, account: str | None = None) -> Iterator[dict[str, Any]]:
    """Every call beyond number `after`, oldest first."""
    while rows := _operate(settings, "calls.after", after=after, account=account):
        yield from rows
        after = rows[-1]["number"]


def _show_calls(rows: list[dict[str, Any]], as_json: bool) -> None:
    """A line each."""
    for row in rows:
        at = datetime.fromtimestamp(row["at"], UTC).strftime("%Y-%m-%d %H:%M:%S")
        shown = (at, row["method"], row["endpoint"], row["status"], row["ip"], row["key_id"] or "-", row["request_id"])
        click.echo(json.dumps(row) if as_json else "  ".join(map(str, (*shown, f"{row['ms']:g} ms"))))


@main.group(name="audit")
def audit_group() -> None:
    """The log of administrative acts."""


@audit_group.command(name="list")
@_common
@_json
def audit_list(config_file: str | None, data_dir: str | None, as_json: bool) -> None:
    """Lists what administrators did, oldest first."""
    rows = _operate(config.load(data_dir, config_file), "audit.list")
    _print_table(rows, ("number", "at", "who", "what", "about"), as_json)


@audit_group.command(name="verify")
@_common
@_json
def audit_verify(config_file: str | None, data_dir: str | None, as_json: bool) -> int:
    """Follows the chain of hashes. Exit 1 if a row was changed or removed."""
    found = _operate(config.load(data_dir, config_file), "audit.verify")
    _print(found, as_json)
    return int(found["broken"] is not None)


# ── models ───────────────────────────────────────────────────────────────────────────────────────────────────────


@main.group()
def models() -> None:
    """The models of the data directory."""


@models.command(name="list")
@_common
@_json
def models_list(config_file: str | None, data_dir: str | None, as_json: bool) -> None:
    """Lists the models; the chosen one is served."""
    rows = _operate(config.load(data_dir, config_file), "models.list")
    _print_table(rows, ("name", "size", "template", "licence", "guide", "placeholder", "chosen", "file"), as_json)


@models.command(name="add")
@_common
@click.argument("file", type=click.Path())
@click.option("--name", help="how to call it; default: the file's name")
@click.option("--copy", is_flag=True, help="copy the file into the data directory")
@_json
def models_add(config_file: str | None, data_dir: str | None, as_json: bool, file: str, **values: Any) -> None:
    """Checks, hashes and records a GGUF file."""
    settings = config.load(data_dir, config_file)
    _need_initialised(settings)
    # Here also while the server runs: a service may not see homes and /tmp, and the manifest has a lock of its own.
    made = described(Catalog(settings.models_dir).add(Path(file), **values))
    _hand_over(settings, Path(made["file"]), settings.models_dir / "manifest.json")
    _operate(settings, "models.added", name=made["name"])
    _print(made, as_json)


@models.command(name="use")
@_common
@click.argument("name")
@_json
def models_use(config_file: str | None, data_dir: str | None, as_json: bool, name: str) -> None:
    """Chooses the model; a running server drains, unloads and loads, and keeps the old one if that fails."""
    settings = config.load(data_dir, config_file)
    _print(_operate(settings, "models.use", name=name), as_json)
    if settings.engine.model:
        where = settings.sources["engine.model"]
        click.echo(f"The next start serves {settings.engine.model}: {where} sets engine.model.", err=True)


@models.command(name="verify")
@_common
@click.argument("name", required=False)
@_json
def models_verify(config_file: str | None, data_dir: str | None, as_json: bool, name: str | None) -> int:
    """Hashes the files in full. Exit 9 if one is not what was added."""
    rows = _operate(config.load(data_dir, config_file), "models.verify", name=name)
    _print_table(rows, ("name", "good", "problem"), as_json)
    return 0 if all(row["good"] for row in rows) else errors.ModelError.exit_code


# ── chat ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@main.command()
@_common
@click.argument("prompt", required=False)
@click.option("--max-tokens", type=click.IntRange(1), help="most tokens of an answer")
def chat(config_file: str | None, data_dir: str | None, prompt: str | None, max_tokens: int | None) -> None:
    """Chats in the terminal: one PROMPT, or a conversation. Uses the running server, else loads the model itself."""
    settings = config.load(data_dir, config_file)
    _need_initialised(settings)
    if prompt is None and not sys.stdin.isatty():
        prompt = _piped()
    with ExitStack() as stack:
        if prompt is not None:
            first = _user(prompt)  # a prompt that is none needs no model
        answer = _answerer(settings, stack)
        _introduce(answer)
        if prompt is None:
            _converse(answer, max_tokens)
        else:
            _show_answer(answer("chat", {"messages": [first], "max_tokens": max_tokens}))


def _answerer(settings: Config, stack: ExitStack) -> Answer:
    """What answers: the running server, or a model loaded here until `stack` closes."""
    socket = admin.socket_path(settings.data_dir)
    if admin.reachable(socket):
        return lambda operation, arguments: admin.stream(socket, operation, arguments)
    from appliance import app  # as in `serve`

    return stack.enter_context(app.local_chat(settings))


def _introduce(answer: Answer) -> None:
    """What has to be known of the model, before its first word; beside the answers, so that these stay pure."""
    found = next(iter(answer("status", {})))["result"]
    for nature in ("guide", "placeholder"):
        if found.get(nature):
            click.echo(NOTES[nature], err=True)


def _piped() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError("What is piped in is not UTF-8 text.") from error


def _user(prompt: str) -> dict[str, str]:
    """A turn of the person at the terminal. Raises UsageError for one that says nothing or is no text."""
    if not prompt.strip():
        raise UsageError("There is no prompt: name one, or pipe it in.")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UsageError("The prompt is not UTF-8 text.") from error
    return {"role": "user", "content": prompt}


def _converse(answer: Answer, max_tokens: int | None) -> None:
    """Turn after turn, until Ctrl-D. A turn that fails is told and forgotten; Ctrl-C ends an answer, or a line."""
    messages: list[dict[str, str]] = []
    while (prompt := _asked()) is not None:
        if not prompt.strip():
            continue
        try:
            turns = [*messages, _user(prompt)]
            text = _show_answer(answer("chat", {"messages": turns, "max_tokens": max_tokens}), stoppable=True)
        except (AlreadyRunning, ServerUnreachable):
            raise
        except ApplianceError as error:
            click.echo(f"appliance: {error.message}", err=True)
            continue
        if text:
            messages = [*turns, {"role": "assistant", "content": text}]


def _asked() -> str | None:
    """The next line from the terminal; None at its end."""
    while True:
        try:
            return input("> ")
        except EOFError:
            click.echo()
            return None
        except KeyboardInterrupt:
            click.echo()


def _show_answer(parts: Iterator[dict[str, Any]], *, stoppable: bool = False) -> str:
    """Prints the answer as it comes; Ctrl-C ends it, quietly if `stoppable`. What was said until then."""
    texts: list[str] = []
    try:
        for part in parts:
            if text := part.get("part"):
                texts.append(text)
                click.echo(_CONTROL.sub("\ufffd", text), nl=False)
                sys.stdout.flush()
    except KeyboardInterrupt:
        if not stoppable:
            raise
    finally:
        if isinstance(parts, Generator):
            parts.close()  # the server stops generating, now and not when the garbage is collected
        if texts:
            click.echo()
    return "".join(texts)


# ── settings, certificates, backups ──────────────────────────────────────────────────────────────────────────────


@main.group(name="config")
def config_group() -> None:
    """The settings."""


@config_group.command(name="show")
@_common
@_json
def config_show(config_file: str | None, data_dir: str | None, as_json: bool) -> None:
    """Prints the effective values and where each came from."""
    rows = [
        dict(zip(("setting", "value", "source"), r, strict=True))
        for r in config.show(config.load(data_dir, config_file))
    ]
    _print_table(rows, ("setting", "value", "source"), as_json)


@main.group(name="tls")
def tls_group() -> None:
    """Certificates."""


@tls_group.command(name="self-signed")
@_common
@click.option("--force", is_flag=True, help="replace an existing certificate")
@_json
def tls_self_signed(config_file: str | None, data_dir: str | None, as_json: bool, force: bool) -> None:
    """Makes a certificate for this machine's names."""
    settings = config.load(data_dir, config_file)
    _need_initialised(settings)
    server = settings.server
    names = [*server.allowed_hosts, urlsplit(server.public_url).hostname or ""]
    made = tls.self_signed(settings.data_dir / "tls", extra_names=names, force=force)
    _hand_over(settings, made.key.parent, made.key, made.certificate)
    if as_json:
        paths = {"tls_cert": str(made.certificate), "tls_key": str(made.key)}
        click.echo(json.dumps({**paths, "names": list(made.names)}))
        return
    click.echo(f"A certificate for {', '.join(made.names)}. To use it, put into config.toml:\n")
    click.echo(f"[server]\ntls_cert = {json.dumps(str(made.certificate))}\ntls_key = {json.dumps(str(made.key))}")


@main.command(name="backup")
@_common
@click.argument("file", type=click.Path())
@_json
def backup_command(config_file: str | None, data_dir: str | None, as_json: bool, file: str) -> None:
    """Writes a backup, and proves it: opened, decrypted, integrity-checked and counted."""
    settings, target = config.load(data_dir, config_file), Path(file).absolute()
    if not _reachable(settings):
        _print(_operate(settings, "backup", file=str(target)), as_json)
        return
    if os.path.lexists(target):
        raise BackupError(f"{target} exists already; a backup overwrites nothing.")
    # The server may be a service that sees no place but its data directory: it writes there, and we fetch it.
    staged = settings.data_dir / f"backup-{secrets.token_hex(8)}.tmp"
    try:
        made = _operate(settings, "backup", file=str(staged))
        _fetch(staged, target)
    finally:
        staged.unlink(missing_ok=True)
    _print({**made, "path": str(target)}, as_json)


def _fetch(staged: Path, target: Path) -> None:
    """Copies a proved backup, and proves the copy by reading it again. Raises BackupError."""
    try:
        with open(target, "xb", opener=lambda path, flags: os.open(path, flags, 0o600)) as copy:
            try:
                _copy(staged, copy)
                if _digest(target) != _digest(staged):
                    raise BackupError(f"The backup {target} reads back differently: the disk is failing.")
            except BaseException:
                target.unlink()
                raise
    except OSError as error:
        raise BackupError(f"The backup {target} cannot be written: {error.strerror}.") from error


def _copy(source: Path, copy: BinaryIO) -> None:
    with source.open("rb") as original:
        while portion := original.read(PORTION):
            copy.write(portion)
    copy.flush()
    os.fsync(copy.fileno())


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


@main.command()
@_common
@click.argument("file", type=click.Path())
@_json
def restore(config_file: str | None, data_dir: str | None, as_json: bool, file: str) -> None:
    """Puts a proved backup in place of the database; the old one is kept beside it. The server must be stopped."""
    settings = config.load(data_dir, config_file)
    if _reachable(settings):
        raise AlreadyRunning(f"The server of {settings.data_dir} is running: stop it, restore, and start it again.")
    installation.make_data_dir(settings.data_dir)
    with DataDirLock(settings.data_dir):
        report = backup.restore(Path(file), settings.database, read_key(settings.key_file))
        _hand_over(settings, settings.database)
    _print({"path": str(settings.database), "bytes": report.bytes, "tables": report.tables}, as_json)


# ── printing ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _print(values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(values))
        return
    width = max(map(len, values))
    for name, value in values.items():
        click.echo(f"{name:{width}}  {_cell(name, value)}")


def _print_table(rows: list[dict[str, Any]], columns: tuple[str, ...], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(rows))
        return
    cells = [columns, *(tuple(_cell(c, row[c]) for c in columns) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    for row in cells:
        click.echo("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def _cell(name: str, value: Any) -> str:
    if name in ("created", "revoked", "disabled", "expires", "last_used", "ends", "at") and isinstance(value, int):
        return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M:%S")
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items() if v is not None) or "-"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "-"
    return _CONTROL.sub("\ufffd", str(value))
