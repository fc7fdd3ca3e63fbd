"""The composition root: config → store, engine, services → the ASGI app; and the life of the server process.

`Appliance` is the visible list of everything a request passes. `serve` owns the start, what signals lead to, and the
exit code.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import uvloop
from starlette.types import ASGIApp, Receive, Scope, Send

from appliance import admin, logs, secretfiles, server
from appliance.access.admission import Admission
from appliance.access.calllog import CallLog
from appliance.access.egresslog import EgressLog
from appliance.access.keyring import KeyRing
from appliance.access.ledger import Ledger
from appliance.access.plans import Plans
from appliance.access.terms import Tariff
from appliance.administration import Administration, perform, served_model
from appliance.api.access_log import AccessLog
from appliance.api.auth import Auth
from appliance.api.endpoints import Routes
from appliance.api.gate import Gate
from appliance.api.guard import Guard
from appliance.api.hosts import Hosts
from appliance.api.limits import Limits
from appliance.api.metrics import SHORTEST_TOKEN
from appliance.api.proxies import Proxies
from appliance.api.services import Services
from appliance.catalog import Catalog
from appliance.chat import Chat, Elsewhere, Wish
from appliance.config import Config, ProviderSettings, show
from appliance.errors import (
    ApplianceError,
    BadRequest,
    DataDirError,
    Draining,
    EngineBroken,
    ModelError,
)
from appliance.messages import CompletionRequest, Message, Role, Sampling
from appliance.providers.local import LocalProvider
from appliance.providers.upstream import Place, Upstream
from appliance.store.database import Store
from appliance.store.egress import Row as EgressRow
from appliance.store.keyfile import read_key
from appliance.store.lock import DataDirLock

log = logging.getLogger("appliance")

AT_ONCE = ("plans", "limits", "retention")  # sections that a running server follows
VALID_SECONDS = 0.5  # between two looks for running calls whose key is valid no longer
FORGET_SECONDS = 600.0  # between two looks for callers who have been gone for long
CLOSE_SECONDS = 0.8  # for unloading the model at the end
YOUNG_OBJECTS = 5_000  # between two collections: a call makes hundreds of objects, and almost no circles of them
SWITCH_SECONDS = 0.0005  # the decode thread waits this long at most until the event loop gives the interpreter back


class Appliance:
    """The ASGI app: every layer that a request passes, outermost last, and whether the server is draining."""

    def __init__(self, services: Services, keyring: KeyRing, gate: Gate, metrics_token: str) -> None:
        self.draining = False
        app = self._drain(Routes(services, gate))
        app = gate.watch(app)
        app = Auth(app, keyring, metrics_token)
        app = Hosts(app, services.config.server)
        app = Guard(app)
        self.limits = Limits(app, gate.admission, gate.terms_of)
        self._stack = Proxies(AccessLog(self.limits, services.calls.add), services.config.server)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self
        await self._stack(scope, receive, send)

    def _drain(self, app: ASGIApp) -> ASGIApp:
        async def admit(scope: Scope, receive: Receive, send: Send) -> None:
            if self.draining and scope["path"] != "/healthz":
                raise Draining("The server is stopping and takes no new requests.", retry_after=5)
            await app(scope, receive, send)

        return admit

    def drain(self) -> None:
        """From now on only what runs is answered."""
        self.draining = True


class Process:
    """Everything that one server process holds, and how it ends."""

    def __init__(self, config: Config, administration: Administration, reread: Callable[[], Config]) -> None:
        self.config = config
        self._reread = reread
        self.administration = administration
        self.local = LocalProvider(config.engine, on_fatal=self._engine_broke)
        self.others = upstreams(config, os.environ)
        self.egress = EgressLog(administration.store)
        self.chat = Chat(self.local, self.others, self._note_egress)
        self.ledger = Ledger(administration.store)
        self.plans = administration.plans
        administration.check_plans(self.plans)
        self.tariff = Tariff(self.plans, config.limits)
        self.gate = Gate(Admission(wait_seconds=config.limits.turn_seconds), self.ledger, self.tariff)
        self.ledger.restore(self.gate.admission.windows, time.time())
        self.calls = CallLog(administration.store, lambda: self.config.retention)
        services = Services(
            config=config,
            chat=self.chat,
            local=self.local,
            store=administration.store,
            admission=self.gate.admission,
            plans=self.plans,
            ledger=self.ledger,
            calls=self.calls,
        )
        token = secretfiles.read("server.metrics_token_file", config.server.metrics_token_file, SHORTEST_TOKEN)
        self.app = Appliance(services, administration.keyring, self.gate, token)
        self.exit_code = 0
        self._swap = threading.Lock()
        self._closing = False

    async def run(self, bound: socket.socket) -> int:
        """Serves; the model is loaded meanwhile, and everything that needs none is answered from the start."""
        self.local.attach(asyncio.get_running_loop())
        socket_path = admin.socket_path(self.config.data_dir)
        operator = admin.AdminServer(socket_path, self.operate)
        await operator.start()
        beside = [asyncio.create_task(work) for work in (self._forget(), self._cut_invalid(), self.calls.run())]
        for task in beside:
            task.add_done_callback(_tell)
        if not sys.stdin.isatty():  # else a closed terminal means the end, as for every program
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._hang_up)
        loader = threading.Thread(target=self._load, name="load", daemon=True)
        loader.start()
        host, port = bound.getsockname()[:2]
        scheme = "https" if self.config.server.tls_cert else "http"
        log.info("serving", extra={"address": f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"})
        try:
            await server.serve(self.app, self.config.server, bound, self.app.drain, self.local.cut)
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
            await operator.close()
            await self.ledger.close()
            await self.egress.close()
            for other in self.others.values():
                await other.close()
            await self.calls.flush()
            await self._end()
        return self.exit_code

    def _note_egress(self, request: CompletionRequest, wish: Wish, other: Elsewhere, reason: str) -> None:
        meter = request.meter
        row = (request.account, wish.key_id, other.destination, meter.bytes_out, meter.bytes_in, reason)
        self.egress.add(EgressRow(time.time(), *row, request.request_id))

    def reload(self) -> dict[str, Any]:
        """Reads the settings again, valid as a whole or refused as a whole; blocks. Raises ConfigError; nothing has
        changed then. Plans, limits and retention count from now on; what else has changed is named."""
        before, found = self.config, self._reread()
        with self.administration.plan_names:
            self.administration.check_plans(found.plans)
            self.plans.replace(found.plans)
        old, new = ({name: value for name, value, _ in show(config)} for config in (before, found))
        changed = [f"{name} = {value}" for name, value in new.items() if old.get(name) != value]
        changed += [f"{name} is gone" for name in old if name not in new]
        now = [line for line in changed if line.split(".")[0] in AT_ONCE]
        self.config = replace(before, plans=found.plans, limits=found.limits, retention=found.retention)
        self.tariff.limits = found.limits
        self.gate.admission.wait_seconds = found.limits.turn_seconds
        if now:
            self.administration.record("settings.reload", changed="; ".join(now))
        return {"changed": now, "after_a_restart": [line for line in changed if line not in now]}

    def _hang_up(self) -> None:
        """SIGHUP: as `appliance reload`, with the outcome in the log."""
        threading.Thread(target=self._reload_and_tell, name="reload", daemon=True).start()

    def _reload_and_tell(self) -> None:
        try:
            log.info("the settings were read again", extra=self.reload())
        except ApplianceError as error:
            log.error("the settings stay as they were: %s", error.message)

    async def _forget(self) -> None:
        while True:
            await asyncio.sleep(FORGET_SECONDS)
            self.gate.admission.forget()

    async def _cut_invalid(self) -> None:
        """Revoked and expired keys end their running calls too."""
        keyring = self.administration.keyring
        while True:
            await asyncio.sleep(VALID_SECONDS)
            now = time.time()
            self.app.limits.cut_invalid(lambda caller: keyring.holds(caller.key_id, now))  # noqa: B023

    async def _end(self) -> None:
        """Unloads the model. A load, or a long step, cannot be interrupted: then the process ends as it is, since the
        kernel frees the rest and every acknowledged write is in the database's log."""
        self._closing = True
        closer = threading.Thread(target=self._close_model, name="unload", daemon=True)
        closer.start()
        until = time.monotonic() + CLOSE_SECONDS
        while closer.is_alive() and time.monotonic() < until:
            await asyncio.sleep(0.01)
        if closer.is_alive():
            self.administration.store.close()
            logging.shutdown()
            os._exit(self.exit_code)

    def _load(self) -> None:
        with self._swap:
            if self._closing:
                return
            try:
                model = served_model(self.administration.catalog, self.config.engine.model)
                self.local.load(model.name, model.path, model.nature)
            except ModelError as error:
                log.error("no model: %s", error.message)
                self.local.fail(self._without_paths(error.message))
            except Exception:
                log.exception("the model could not be loaded")
                self.local.fail("it could not be loaded; the server's log says why")
            else:
                gc.freeze()  # what a model keeps is there to stay, and need not be looked through again
                log.info("ready", extra={"model": model.name, "nature": model.nature})

    def _without_paths(self, sentence: str) -> str:
        """What callers may know: the file's name, but not where it lies."""
        for directory in (self.config.models_dir, Path(self.config.engine.model or ".").absolute().parent):
            sentence = sentence.replace(f"{directory}{os.sep}", "")
        return sentence

    def _close_model(self) -> None:
        with self._swap:
            self.local.close()

    def _engine_broke(self, error: EngineBroken) -> None:
        """On the decode thread: the process ends by name, so that its supervisor starts a sound one."""
        log.critical(error.message)
        self.exit_code = error.exit_code
        os.kill(os.getpid(), signal.SIGTERM)

    async def operate(self, operation: str, arguments: dict[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        """One request of the admin socket."""
        if operation == "chat":
            async for part in self._chat(arguments):
                yield part
        elif operation == "status":
            leases = self.gate.admission.leases
            yield {"result": self.local.status() | {"calls_running": leases.running, "calls_in_line": len(leases)}}
        elif operation == "reload":
            yield {"result": await asyncio.to_thread(self.reload)}
        elif operation == "models.use":
            yield {"result": await asyncio.to_thread(self._use, str(arguments["name"]))}
        else:
            yield {"result": await asyncio.to_thread(perform, self.administration, operation, arguments)}

    def _use(self, name: str) -> dict[str, Any]:
        with self._swap:
            model = self.administration.catalog.resolve(name)
            self.local.use(model.name, model.path, model.nature, drain_seconds=self.config.server.drain_seconds)
            return self.administration.models_use(name)

    async def _chat(self, arguments: dict[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        async with aclosing(self.local.complete(_terminal_request(arguments, self.local.defaults))) as chunks:
            async for chunk in chunks:
                if chunk.text:
                    yield {"part": chunk.text}
        yield {"result": None}


def upstreams(config: Config, environ: Mapping[str, str]) -> dict[str, Upstream]:
    """The servers elsewhere that may be asked; Groq only with a key. Raises ConfigError for a key file that is none."""
    found = {}
    groq_key = secretfiles.read("groq.key_file", config.groq.key_file)
    groq_key = groq_key or secretfiles.checked("environment GROQ_API_KEY", environ.get("GROQ_API_KEY", ""))
    if groq_key:
        found["groq"] = Upstream(_place("groq", config.groq, groq_key))
    for name, settings in config.providers.items():
        key = secretfiles.read(f"providers.{name}.key_file", settings.key_file)
        found[name] = Upstream(_place(name, settings, key))
    return found


def _place(name: str, s: ProviderSettings, key: str) -> Place:
    pairs = (alias.split("=", 1) for alias in s.aliases)
    return Place(
        name, s.base_url, s.model, key, {old.strip(): new.strip() for old, new in pairs},
        s.connect_seconds, s.first_seconds, s.gap_seconds, s.total_seconds,
    )  # fmt: skip


def _tell(task: asyncio.Task[None]) -> None:
    """Work beside the server never ends by itself."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("work beside the server has ended", exc_info=error)


def serve(config: Config, reread: Callable[[], Config]) -> int:
    """Runs the server in the foreground; the exit code. Raises OperatorError when it cannot start. `reread` gives the
    settings as they are now."""
    logs.configure()
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.set_threshold(YOUNG_OBJECTS, 20, 50)
    server.tls_context(config.server)  # a certificate that cannot be used ends the start before anything else is done
    with _opened(config) as administration, server.bind(config.server.host, config.server.port) as bound:
        administration.reload_keys()
        process = Process(config, administration, reread)
        gc.freeze()
        return uvloop.run(process.run(bound))


@contextmanager
def local_chat(config: Config) -> Iterator[Callable[[str, dict[str, Any]], Iterator[dict[str, Any]]]]:
    """Chatting without a server: loads the model here. "chat" and "status" answer as through the admin socket."""
    with _opened(config) as administration, asyncio.Runner() as runner:
        model = served_model(administration.catalog, config.engine.model)
        local = LocalProvider(config.engine)
        local.attach(runner.get_loop())
        local.load(model.name, model.path, model.nature)

        def answer(operation: str, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
            if operation == "status":
                yield {"result": local.status()}
                return
            chunks = local.complete(_terminal_request(arguments, local.defaults))
            try:
                while (chunk := runner.run(_next(chunks))) is not None:
                    yield {"part": chunk.text}
            finally:
                runner.run(chunks.aclose())

        try:
            yield answer
        finally:
            local.close()


async def _next(chunks: AsyncGenerator[Any]) -> Any:
    return await anext(chunks, None)


@contextmanager
def _opened(config: Config) -> Iterator[Administration]:
    """The data directory, held by this process alone, and its store."""
    with ExitStack() as stack:
        stack.enter_context(DataDirLock(config.data_dir))
        if not config.database.parent.is_dir():
            raise DataDirError(f"The data directory {config.data_dir} is gone.")
        key = read_key(config.key_file)
        store = Store.open(config.database, key)
        stack.callback(store.close)
        yield Administration(store, key, Catalog(config.models_dir), KeyRing(), Plans(config.plans))


class _Turn(msgspec.Struct, forbid_unknown_fields=True):
    role: Role
    content: str


def _terminal_request(arguments: dict[str, Any], sampling: Sampling) -> CompletionRequest:
    """What `appliance chat` asks. Raises BadRequest."""
    try:
        turns = msgspec.convert(arguments.get("messages"), list[_Turn])
        most = msgspec.convert(arguments.get("max_tokens"), int | None)
    except msgspec.ValidationError as error:
        raise BadRequest("The conversation is malformed.") from error
    return CompletionRequest(
        tuple(Message(t.role, t.content) for t in turns), account="terminal", sampling=sampling, max_tokens=most
    )
