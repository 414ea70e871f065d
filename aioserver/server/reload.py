"""SIGHUP: the configuration is read again and put in effect, with no connection dropped.

    read and check (in a thread) → prepare what may fail → apply, in one step of the event loop

A change of `auth.keys_file` is noticed without a signal; then only the keys are read again.

A configuration with a fault changes nothing, and every fault is logged. Connections and answers
that have a place, wait or run stay, under the limits that are now in effect: a lowered limit
admits no further request until usage is below it. A setting that only a restart can change is
named in the log, and stays as it was.
"""

from __future__ import annotations

import asyncio
import logging
import os
import stat
from dataclasses import replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

from aioserver.config import Configuration, keys_file
from aioserver.config.faults import ConfigurationError
from aioserver.config.views import changes
from aioserver.server import preflight
from aioserver.server.app import begin_budgets, log_limits, log_routes
from aioserver.server.wings import faults
from aioserver.telemetry import logs

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
    from typing import NoReturn

    from aioserver.config.settings import Auth, ClientKey, Settings
    from aioserver.server.app import Server
    from aioserver.server.runner import Runner
    from aioserver.server.systemd import Notifier

logger = logging.getLogger("aioserver.reload")

TLS = "chat.websocket.tls"
# Settings that only a restart changes, as their sockets, routes, processes and files are made once.
ONLY_BY_RESTART = (
    "chat.websocket.host",
    "chat.websocket.port",
    # Whether the section exists; its content may change.
    TLS,
    "chat.websocket.endpoint",
    "chat.websocket.concurrency.uvicorn.backlog",
    "chat.websocket.concurrency.uvicorn.workers",
    "chat.sse.endpoint",
    "chat.service.repository.type",
    "chat.service.repository.path",
    "chat.service.repository.persistence.enabled",
    "cluster",
    "tracing",
)
# The most names of keys in one log line.
NAMES = 20


class Reload:
    """Reads the file of *configuration* again, with the same environment, whenever a reload is
    requested.

    Always: one reload runs at a time; `ask` during a reload causes another one after it.

    *hosts*: the addresses of inherited sockets; None if the server listens on the configured one.
    *share_out* returns this process's share of the settings among several processes; it is None if
    the process serves alone.
    """

    def __init__(
        self,
        server: Server,
        runner: Runner,
        configuration: Configuration,
        environ: Mapping[str, str],
        *,
        hosts: Sequence[str] | None = None,
        notifier: Notifier | None = None,
        share_out: Callable[[Settings], Settings] | None = None,
    ) -> None:
        self._server = server
        self._runner = runner
        self._hosts = hosts
        self._notifier = notifier
        self._share_out = share_out
        self.source = configuration.source
        self._environ = environ
        # The settings with which sockets and routes were made.
        self._at_start = configuration.settings
        # The settings in effect: of all processes together, and of this one.
        self._whole = self._current = configuration.settings
        if share_out is not None:
            self._current = share_out(self._current)
        self._asked = asyncio.Event()
        server.watched.add("keys_file", self._keys_files, self._read_keys)

    def ask(self) -> None:
        """Request a reload."""
        self._asked.set()

    async def run(self) -> NoReturn:
        """Run the requested reloads, for ever.

        Cancelling one before it is applied leaves the old settings in effect.
        """
        while True:
            await self._asked.wait()
            self._asked.clear()
            if self._notifier is not None:
                self._notifier.reloading()
            await self.once()
            if self._notifier is not None:
                self._notifier.ready()

    async def once(self) -> bool:
        """Read the configuration and apply it now. Return whether it is in effect."""
        try:
            configuration = await asyncio.to_thread(
                read_again, self.source, self._environ, self._hosts, self._at_start
            )
            whole = settings = self._with_fixed_paths(configuration.settings)
            if self._share_out is not None:
                settings = self._share_out(whole)
            # In a thread, since the kernel may take some time for a larger table.
            few_files = await asyncio.to_thread(_make_room_for_files, settings)
            await self._server.provider_registry.prepare(settings.llm)
            use_ledger = await asyncio.to_thread(
                self._server.context.usage.prepare, settings.usage
            )
            self._apply(settings)
            changed = ", ".join(changes(self._current, settings)) or "nothing has changed"
            self._whole, self._current = whole, settings
            use_ledger()
            await apply_auth(self._server, settings.auth)
            await begin_budgets(self._server.context.access, settings)
            # The file names may have changed, and the result replaces that of an earlier check
            # which took effect while the configuration was read.
            await self._server.watched.look(again=True)
        except ConfigurationError as exc:
            # Logged as warnings, since the log writes errors of one place in the code only once in
            # ten seconds.
            for fault in exc.faults:
                logger.warning("not applied: %s", fault)
            number = len(exc.faults)
            text = f"the configuration has {number} fault{'s' * (number > 1)}, and was not applied"
            self._report("invalid", text, "error")
            return False
        except Exception:
            logger.exception("the configuration was not applied")
            self._report("failed", "the configuration was not applied: see the log", "error")
            return False
        for warning in few_files:
            logger.warning("%s", warning)
        # The parent logs the rest once for all workers.
        if self._share_out is None:
            log_remarks(configuration)
            for key in only_by_restart(configuration.settings, self._at_start):
                logger.warning("%s has changed, and stays as it was until a restart", key)
        logger.info("configuration applied: %s", changed)
        self._report("applied", f"configuration applied: {changed}", "info")
        return True

    def _keys_files(self) -> tuple[str, ...]:
        auth = self._whole.auth
        return () if auth is None or auth.keys_file is None else (auth.keys_file,)

    def _read_keys(self) -> Callable[[], Awaitable[None]] | None:
        """Return the function that puts the current keys of the file in effect; None if they
        already are.

        Raises:
            ConfigurationError: the file cannot be used.
        """
        auth = self._whole.auth
        if auth is None or auth.keys_file is None:
            return None
        keys = keys_file.read(Path(auth.keys_file), auth.keys or ())
        return None if keys == auth.file_keys else partial(self._apply_keys, auth, keys)

    async def _apply_keys(self, auth: Auth, keys: tuple[ClientKey, ...]) -> None:
        """Put the *keys* of a file in effect, unless *auth* has been replaced meanwhile: the new
        configuration brings a check of its own.
        """
        if self._whole.auth is not auth:
            return
        context = self._server.context
        self._whole = replace(self._whole, auth=replace(auth, file_keys=keys))
        settings = self._whole if self._share_out is None else self._share_out(self._whole)
        self._current = settings
        context.settings.apply(settings)
        await apply_auth(self._server, settings.auth)
        await begin_budgets(context.access, settings)
        changed = _changed(auth.file_keys, keys)
        logger.info("keys of %s applied: %s", auth.keys_file, changed)
        text = f"keys of {auth.keys_file} applied: {changed}"
        context.monitor.incident("keys_file", text, severity="info")

    def _report(self, outcome: str, text: str, severity: str) -> None:
        context = self._server.context
        context.metrics.reloads[outcome].value += 1
        context.monitor.incident("reload", text, severity=severity)

    def _with_fixed_paths(self, settings: Settings) -> Settings:
        """Return *settings* with the paths of the faces unchanged: clients use them."""
        chat, began = settings.chat, self._at_start.chat
        websocket = replace(chat.websocket, endpoint=began.websocket.endpoint)
        return replace(settings, chat=replace(chat, websocket=websocket, sse=began.sse))

    def _apply(self, settings: Settings) -> None:
        """Put *settings* in effect. It never waits, so that no request sees only a part of them.

        Raises:
            ConfigurationError: a `ca_file` holds no certificate; nothing has changed then.
        """
        server, context = self._server, self._server.context
        chat, llm = settings.chat, settings.llm
        if unfit := list(faults(settings, server.wings)):
            raise ConfigurationError(unfit)
        prepared = [wing.prepare(settings) for wing in server.wings]
        server.provider_registry.apply(llm, max_response_bytes=chat.streams.max_response_bytes)
        context.router.apply(server.provider_registry.providers, llm)
        context.settings.apply(settings)
        context.admission.apply(chat.websocket.concurrency, chat.streams.send_timeout)
        for put_in_effect in prepared:
            put_in_effect()
        context.gateway.apply(chat.service, chat.streams)
        self._runner.apply(chat)
        context.origins.apply(
            chat.websocket.allow_origins, credentials=chat.websocket.allow_credentials
        )
        logs.apply(settings.logging)
        if chat.websocket.concurrency != self._current.chat.websocket.concurrency:
            log_limits(chat.websocket.concurrency)
        if llm.bare_routes() != self._current.llm.bare_routes():
            log_routes(llm)


def _changed(old: Iterable[ClientKey], new: Iterable[ClientKey]) -> str:
    """Return the names of the keys that differ between two lists, as a text."""
    before, after = {key.name: key for key in old}, {key.name: key for key in new}
    added = [name for name in after if name not in before]
    removed = [name for name in before if name not in after]
    others = [name for name in after if name in before and after[name] != before[name]]
    parts = [
        f"{word} {', '.join(names[:NAMES])}{', …' if len(names) > NAMES else ''}"
        for word, names in (("new", added), ("revoked", removed), ("changed", others))
        if names
    ]
    return "; ".join(parts) or "nothing has changed"


def read_again(
    source: str, environ: Mapping[str, str], hosts: Sequence[str] | None, at_start: Settings
) -> Configuration:
    """Return the configuration as it is in the file *source* now.

    *hosts*: the addresses of inherited sockets; None if the server listens on the one of
    *at_start*.

    Raises:
        ConfigurationError: the configuration cannot be used.
    """
    try:
        regular = stat.S_ISREG(os.stat(source).st_mode)  # noqa: PTH116
    except OSError:
        # `load` then reports the reason.
        regular = True
    # A pipe has already been read to its end, and a second read would block.
    if not regular:
        raise ConfigurationError([f"{source}: is no file that can be read again"])
    configuration = Configuration.load(source, environ=environ, again=True)
    # The address on which it listens now, and the one on which it would after a restart.
    if hosts is None:
        hosts = (at_start.chat.websocket.host, configuration.settings.chat.websocket.host)
    configuration.check_usable(hosts)
    return configuration


def log_remarks(configuration: Configuration) -> None:
    """Log the warnings of *configuration* for its author."""
    for warning in configuration.warnings:
        logger.warning("%s", warning)


def only_by_restart(
    settings: Settings, began: Settings, keys: Sequence[str] = ONLY_BY_RESTART
) -> Iterator[str]:
    """Yield those of *keys* whose settings differ from those with which the server *began*."""
    return (key for key in keys if _fixed(settings, key) != _fixed(began, key))


def _fixed(settings: Settings, key: str) -> object:
    """Return the part of the setting *key* that only a restart changes."""
    value: object = attrgetter(key)(settings)
    return value is not None if key == TLS else value


def _make_room_for_files(settings: Settings) -> tuple[str, ...]:
    """Raise the limit of open files for *settings*, and enlarge their table, as at the start.
    Return warnings.

    Raises:
        ConfigurationError: not even `max_connections` clients could be served.
    """
    try:
        warning = preflight.raise_file_limit(settings)
    except preflight.Unfit as unfit:
        raise ConfigurationError([str(unfit)]) from None
    preflight.make_room_for_files(settings)
    return () if warning is None else (warning,)


async def apply_auth(server: Server, auth: Auth | None) -> frozenset[str]:
    """Put *auth* in effect, and end the work of callers that are no longer admitted.

    Their answers end with `invalid_api_key`, their WebSockets close with 1008 `key revoked`, and
    their sessions are no longer valid. The limits of the others change in place. Cancelling this
    may leave sockets open that should be closed.

    Return the names of the callers that are no longer admitted; see `Access.apply`.
    """
    context = server.context
    revoked = context.access.apply(auth)
    await context.gateway.revoke(revoked)
    for open_socket in tuple(context.sockets):
        caller = context.access.current(open_socket.caller)
        if caller is None:
            open_socket.revoke()
        else:
            open_socket.admit(caller)
    return revoked
