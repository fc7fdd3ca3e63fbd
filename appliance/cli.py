"""The `appliance` command. Reads words, calls one operation, prints; errors become one sentence on stderr and an exit code.

An operation runs in the server when one is running (through its admin socket), else here, under the directory's lock.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from appliance import __version__, admin, config, doctor, errors, installation, tls
from appliance.access.keyring import KeyRing
from appliance.access.plans import PLANS
from appliance.administration import Administration, perform
from appliance.catalog import Catalog
from appliance.config import Config
from appliance.errors import AlreadyRunning, ApplianceError, NotInitialised, OperatorError
from appliance.messages import SCOPES
from appliance.store import backup
from appliance.store.database import Store
from appliance.store.keyfile import read_key
from appliance.store.lock import DataDirLock


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
            click.echo(f"appliance: {error.message}", err=True)
            sys.exit(error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            click.echo(err=True)
            sys.exit(130)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except Exception as error:
            if os.environ.get("APPLIANCE_DEBUG"):
                traceback.print_exc()
            click.echo(f"appliance: an unexpected error: {error} (APPLIANCE_DEBUG=1 shows where)", err=True)
            sys.exit(1)


@click.group(cls=_Group, epilog=_exit_codes(), context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """A language model for a whole team on its own box."""


def _common(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that every command takes."""
    function = click.option("--data-dir", metavar="D", help="the data directory")(function)
    return click.option("--config", "config_file", metavar="F", help="the settings file")(function)


_json = click.option("--json", "as_json", is_flag=True, help="print JSON")


@contextmanager
def _administration(settings: Config) -> Iterator[Administration]:
    """The store, opened here: no server is running. Raises NotInitialised, AlreadyRunning and what the store raises."""
    _need_initialised(settings)
    with DataDirLock(settings.data_dir), ExitStack() as stack:
        key = read_key(settings.key_file)
        store = Store.open(settings.database, key)
        stack.callback(store.close)
        yield Administration(store, key, Catalog(settings.models_dir), KeyRing())


def _need_initialised(settings: Config) -> None:
    if not settings.database.exists():
        raise NotInitialised(f"There is no appliance in {settings.data_dir}: run `appliance init` first.")


def _operate(settings: Config, operation: str, **arguments: Any) -> Any:
    """One operation, in the running server or here."""
    socket = admin.socket_path(settings.data_dir)
    if admin.reachable(socket):
        return admin.call(socket, operation, arguments)
    with _administration(settings) as administration:
        return perform(administration, operation, arguments)


# ── the appliance ────────────────────────────────────────────────────────────────────────────────────────────────


@main.command()
@_common
@_json
def init(config_file: str | None, data_dir: str | None, as_json: bool) -> None:
    """Makes the data directory, its master key, the database, the first account, administrator and key."""
    settings = config.load(data_dir, config_file)
    if admin.reachable(admin.socket_path(settings.data_dir)):
        made = installation.Initialised(created=False)
    else:
        installation.make_data_dir(settings.data_dir)
        with DataDirLock(settings.data_dir):
            made = installation.initialise(settings, os.environ)
    if as_json:
        values = {"account": made.account, "user": made.user, "password": made.password, "key": made.key}
        click.echo(json.dumps({"created": made.created, **(values if made.created else {})}))
    elif made.created:
        click.echo(f"The appliance is in {settings.data_dir}. These two secrets are shown this once:\n")
        click.echo(f"  administrator  {made.user}\n  password       {made.password or '(unchanged)'}")
        click.echo(f"  account        {made.account}\n  key            {made.key}")
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
    from appliance import app  # brings llama.cpp and the server, which no other command needs

    settings = config.load(data_dir, config_file)
    for name, value in options.items():
        section = "server" if name in ("host", "port") else "engine"
        if value is not None:
            settings = config.override(settings, {f"{section}.{name}": value}, f"option --{name}")
    _need_initialised(settings)
    return app.serve(settings)


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
    found = doctor.examine(settings, running=admin.reachable(admin.socket_path(settings.data_dir)))
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
@click.option("--plan", required=True, type=click.Choice(list(PLANS)))
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
    _print_table(rows, ("id", "name", "plan", "email", "created", "disabled"), as_json)


@main.group()
def key() -> None:
    """API keys."""


@key.command(name="create")
@_common
@click.option("--account", required=True, metavar="NAME")
@click.option("--name", required=True, metavar="N", help="what the key is for")
@click.option("--scope", required=True, type=click.Choice(SCOPES))
@_json
def key_create(config_file: str | None, data_dir: str | None, as_json: bool, **values: Any) -> None:
    """Makes a key and prints it, this once."""
    made = _operate(config.load(data_dir, config_file), "key.create", **values)
    _print(made, as_json)
    if not as_json:
        click.echo("The key is shown this once; it cannot be recovered.", err=True)


@key.command(name="list")
@_common
@_json
def key_list(config_file: str | None, data_dir: str | None, as_json: bool) -> None:
    """Lists the keys, revoked ones too."""
    rows = _operate(config.load(data_dir, config_file), "key.list")
    _print_table(rows, ("id", "account", "name", "scope", "prefix", "last_four", "created", "revoked"), as_json)


@key.command(name="revoke")
@_common
@click.argument("key_id", metavar="ID")
@_json
def key_revoke(config_file: str | None, data_dir: str | None, as_json: bool, key_id: str) -> None:
    """Ends a key: its next call fails."""
    _print(_operate(config.load(data_dir, config_file), "key.revoke", key_id=key_id), as_json)


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
    _print_table(rows, ("name", "size", "template", "licence", "placeholder", "chosen", "file"), as_json)


@models.command(name="add")
@_common
@click.argument("file", type=click.Path())
@click.option("--name", help="how to call it; default: the file's name")
@click.option("--copy", is_flag=True, help="copy the file into the data directory")
@_json
def models_add(config_file: str | None, data_dir: str | None, as_json: bool, file: str, **values: Any) -> None:
    """Checks, hashes and records a GGUF file."""
    _print(
        _operate(config.load(data_dir, config_file), "models.add", file=str(Path(file).absolute()), **values), as_json
    )


@models.command(name="use")
@_common
@click.argument("name")
@_json
def models_use(config_file: str | None, data_dir: str | None, as_json: bool, name: str) -> None:
    """Chooses the model; a running server drains, unloads and loads, and keeps the old one if that fails."""
    _print(_operate(config.load(data_dir, config_file), "models.use", name=name), as_json)


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
    socket = admin.socket_path(settings.data_dir)
    with ExitStack() as stack:
        if admin.reachable(socket):
            answer: Callable[[dict[str, Any]], Iterator[dict[str, Any]]] = lambda a: admin.stream(socket, "chat", a)  # noqa: E731
        else:
            from appliance import app  # as in `serve`

            answer = stack.enter_context(app.local_chat(settings))
        _converse(answer, prompt, max_tokens)


def _converse(answer: Callable[[dict[str, Any]], Iterator[dict[str, Any]]], prompt: str | None, max_tokens: int | None) -> None:  # fmt: skip
    """One answer for a prompt or piped input; otherwise turn after turn, until Ctrl-D."""
    once = prompt is not None or not sys.stdin.isatty()
    messages: list[dict[str, str]] = []
    while True:
        if prompt is None:
            try:
                prompt = input("> ") if not once else sys.stdin.read()
            except EOFError:
                click.echo()
                return
        if prompt.strip():
            messages.append({"role": "user", "content": prompt})
            text = _show_answer(answer({"messages": messages, "max_tokens": max_tokens}), stoppable=not once)
            messages.append({"role": "assistant", "content": text})
        if once:
            return
        prompt = None


def _show_answer(parts: Iterator[dict[str, Any]], *, stoppable: bool) -> str:
    """Prints the answer as it comes; Ctrl-C ends it, and the conversation goes on if `stoppable`."""
    texts: list[str] = []
    try:
        for part in parts:
            if "part" in part:
                texts.append(part["part"])
                click.echo(part["part"], nl=False)
                sys.stdout.flush()
    except KeyboardInterrupt:
        if not stoppable:
            raise
    finally:
        close = getattr(parts, "close", None)
        if close:
            close()
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
    made = tls.self_signed(settings.data_dir / "tls", extra_names=settings.server.allowed_hosts, force=force)
    _print({"tls_cert": str(made.certificate), "tls_key": str(made.key), "names": list(made.names)}, as_json)


@main.command(name="backup")
@_common
@click.argument("file", type=click.Path())
@_json
def backup_command(config_file: str | None, data_dir: str | None, as_json: bool, file: str) -> None:
    """Writes a backup, and proves it: opened, decrypted, integrity-checked and counted."""
    _print(_operate(config.load(data_dir, config_file), "backup", file=str(Path(file).absolute())), as_json)


@main.command()
@_common
@click.argument("file", type=click.Path())
@_json
def restore(config_file: str | None, data_dir: str | None, as_json: bool, file: str) -> None:
    """Puts a proved backup in place of the database; the old one is kept beside it. The server must be stopped."""
    settings = config.load(data_dir, config_file)
    if admin.reachable(admin.socket_path(settings.data_dir)):
        raise AlreadyRunning("The server is running: stop it, restore, and start it again.")
    installation.make_data_dir(settings.data_dir)
    with DataDirLock(settings.data_dir):
        report = backup.restore(Path(file), settings.database, read_key(settings.key_file))
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
    if name in ("created", "revoked", "disabled", "expires", "last_used") and isinstance(value, int):
        return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M:%S")
    if isinstance(value, (dict, list)):
        return json.dumps(value)
    return {None: "-", True: "yes", False: "no"}.get(value, str(value)) if value is None or isinstance(value, bool) else str(value)  # fmt: skip
