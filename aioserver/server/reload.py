"""SIGHUP: the configuration is read again, and holds from then on, with no connection dropped.

    read and check (in a thread) → prepare what may fail → apply, in one step of the event loop

An invalid one changes nothing, and every fault is in the log. Whoever is inside, waits or runs stays
under the limits that are now in effect; a lowered limit lets nobody in until it is kept again. What
only a restart can change is named in the log, and stays as it was.
"""

from __future__ import annotations

import asyncio
import logging
import os
import stat
from dataclasses import replace
from operator import attrgetter
from typing import TYPE_CHECKING

from aioserver.config import Configuration
from aioserver.config.views import changes
from aioserver.errors import ConfigurationError
from aioserver.faces import context
from aioserver.server import preflight
from aioserver.server.app import tell_limits
from aioserver.telemetry import logs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import NoReturn

    from aiohttp import web

    from aioserver.config.settings import Auth, Settings
    from aioserver.faces.websocket import Socket
    from aioserver.server.runner import Runner
    from aioserver.server.systemd import Notifier

logger = logging.getLogger("aioserver.reload")

# Sockets, routes, processes and files that are made once.
ONLY_BY_RESTART = (
    "chat.websocket.host",
    "chat.websocket.port",
    "chat.websocket.endpoint",
    "chat.websocket.concurrency.uvicorn.backlog",
    "chat.websocket.concurrency.uvicorn.workers",
    "chat.sse.endpoint",
    "chat.service.repository.type",
    "chat.service.repository.path",
    "cluster",
)


class Reload:
    """Reads the file of *configuration* again, with the same variables, when it is asked to.

    Always: one at a time; who asks while one is under way gets another one behind it.
    """

    def __init__(
        self,
        runner: Runner,
        configuration: Configuration,
        environ: Mapping[str, str],
        *,
        hosts: Sequence[str] | None = None,
        notifier: Notifier | None = None,
    ) -> None:
        self._runner = runner
        self._hosts = hosts  # of sockets that were passed on; None: the configured one
        self._notifier = notifier
        self.source = configuration.source
        self._environ = environ
        self._began = configuration.settings  # with which sockets and routes were made
        self._now = configuration.settings
        self._asked = asyncio.Event()

    def ask(self) -> None:
        """Have it done soon."""
        self._asked.set()

    async def run(self) -> NoReturn:
        """Do what is asked for. Cancelling it in the middle leaves the old settings in effect."""
        while True:
            await self._asked.wait()
            self._asked.clear()
            if self._notifier is not None:
                self._notifier.reloading()
            await self.once()
            if self._notifier is not None:
                self._notifier.ready()

    async def once(self) -> bool:
        """Read and apply it now; whether it holds."""
        try:
            configuration = await asyncio.to_thread(self._read)
            settings = self._kept(configuration.settings)
            few_files = _room_for(settings)
            await self._runner.app[context.PROVIDERS].prepare(settings.llm)
            self._apply(settings)
            await change(self._runner.app, settings.auth)
        except ConfigurationError as exc:
            for fault in exc.faults:  # not errors, of which the log keeps one in ten seconds
                logger.warning("not applied: %s", fault)
            number = len(exc.faults)
            text = f"the configuration has {number} fault{'s' * (number > 1)}, and was not applied"
            self._end("invalid", text, "error")
            return False
        except Exception:
            logger.exception("the configuration was not applied")
            self._end("failed", "the configuration was not applied: see the log", "error")
            return False
        for warning in (*configuration.warnings, *few_files):
            logger.warning("%s", warning)
        for key in configuration.not_enforced():
            logger.warning("%s is valid, but not enforced yet", key)
        for key in ONLY_BY_RESTART:
            if attrgetter(key)(configuration.settings) != attrgetter(key)(self._began):
                logger.warning("%s has changed, and stays as it was until a restart", key)
        changed = ", ".join(changes(self._now, settings)) or "nothing has changed"
        self._now = settings
        logger.info("configuration applied: %s", changed)
        self._end("applied", f"configuration applied: {changed}", "info")
        return True

    def _end(self, outcome: str, text: str, severity: str) -> None:
        app = self._runner.app
        app[context.METRICS].reloads[outcome].value += 1
        app[context.MONITOR].incident("reload", text, severity=severity)

    def _read(self) -> Configuration:
        """The configuration as it is now.

        Raises:
            ConfigurationError: it cannot be used.
        """
        try:
            regular = stat.S_ISREG(os.stat(self.source).st_mode)  # noqa: PTH116
        except OSError:
            regular = True  # `load` says why
        if not regular:  # a pipe has given what it had, and would be waited for
            raise ConfigurationError([f"{self.source}: is no file that can be read again"])
        configuration = Configuration.load(self.source, environ=self._environ, again=True)
        hosts = self._hosts
        if hosts is None:  # what it listens on now, and what it would after a restart
            hosts = (self._began.chat.websocket.host, configuration.settings.chat.websocket.host)
        configuration.check_usable(hosts)
        return configuration

    def _kept(self, settings: Settings) -> Settings:
        """*settings* with those paths that clients are told, which stay where they are."""
        chat, began = settings.chat, self._began.chat
        websocket = replace(chat.websocket, endpoint=began.websocket.endpoint)
        return replace(settings, chat=replace(chat, websocket=websocket, sse=began.sse))

    def _apply(self, settings: Settings) -> None:
        """Put *settings* in effect. Nothing waits here: nobody sees a half of it.

        Raises:
            ConfigurationError: a `ca_file` holds no certificate; nothing has changed then.
        """
        app, chat = self._runner.app, settings.chat
        app[context.PROVIDERS].apply(
            settings.llm, max_response_bytes=chat.streams.max_response_bytes
        )
        llm = settings.llm
        app[context.ROUTER].apply(app[context.PROVIDERS].providers, llm.active, llm.fallbacks)
        app[context.SETTINGS].apply(settings)
        app[context.ADMISSION].apply(chat.websocket.concurrency)
        app[context.STREAMS].apply(
            max_stream_bytes=chat.streams.max_stream_bytes,
            max_kept_bytes=chat.streams.max_kept_bytes,
        )
        app[context.CONVERSATIONS].apply(chat.service.context, chat.service.repository.persistence)
        app[context.GATEWAY].apply(chat.service, chat.streams)
        self._runner.apply(chat)
        given = chat.websocket
        app[context.ORIGINS].apply(given.allow_origins, credentials=given.allow_credentials)
        logs.apply(settings.logging)
        if chat.websocket.concurrency != self._now.chat.websocket.concurrency:
            tell_limits(chat.websocket.concurrency)


def _room_for(settings: Settings) -> tuple[str, ...]:
    """Raise the limit of open files for *settings*, as at the start; a warning where it stays low.

    Raises:
        ConfigurationError: not even `max_connections` clients could be served.
    """
    try:
        warning = preflight.raise_file_limit(settings)
    except preflight.Unfit as unfit:
        raise ConfigurationError([str(unfit)]) from None
    return () if warning is None else (warning,)


async def change(app: web.Application, auth: Auth | None) -> frozenset[str]:
    """Use *auth* from now on, and end what those hold who may no longer come.

    Their answers end with `invalid_api_key`, their WebSockets close with 1008 `key revoked`, and their
    sessions are no longer valid. The limits of the others change in place. Cancelling this may leave
    sockets open that should be closed.

    Return the names of the callers who may no longer come; see `Access.apply`.
    """
    access = app[context.ACCESS]
    gone = access.apply(auth)
    await app[context.GATEWAY].revoke(gone)
    sockets: list[Socket] = [*app[context.SOCKETS]]
    for socket in sockets:
        caller = access.current(socket.caller)
        if caller is None:
            socket.revoke()
        else:
            socket.caller = caller
    return gone
