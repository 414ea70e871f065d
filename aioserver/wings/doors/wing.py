"""How the doors are plugged in."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from itertools import chain
from typing import TYPE_CHECKING, ClassVar

from aioserver.faces.wing import Routes, Wing
from aioserver.wings.doors import hooks, issuers, openapi
from aioserver.wings.doors.hooks import HookSet
from aioserver.wings.doors.issuers import Issuers
from aioserver.wings.doors.section import HooksSection
from aioserver.wings.doors.token_callers import TokenCallers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from contextlib import AsyncExitStack

    from aioserver.auth.callers import Caller
    from aioserver.config.settings import Settings
    from aioserver.faces.context import Context
    from aioserver.faces.wing import Core


def _end_refused(context: Context) -> None:
    """Close what callers have open whose token is taken no more."""
    access = context.access

    def refused(caller: Caller) -> bool:
        return access.current(caller) is None

    for open_socket in tuple(context.sockets):
        if refused(open_socket.caller):
            open_socket.revoke()
    for quota in access.quotas().values():
        quota.end_watchers(refused)


class DoorsWing(Wing):
    """What stops people at the door, beside keys."""

    name: ClassVar = "doors"
    _hooks: HookSet
    _issuers: Issuers
    _section: HooksSection
    _shutdown_timeout = 0.0

    def faults(self, settings: Settings) -> Iterable[str]:
        """Return which hooks cannot be asked, and what is missing for `auth.jwt`."""
        return chain(hooks.faults(settings.hooks), issuers.faults(settings.auth))

    @staticmethod
    def before_workers(settings: Settings) -> None:
        """Import what tokens are read with, if any are taken."""
        if settings.auth is not None and settings.auth.jwt is not None:
            import_module("aioserver.wings.doors.issuer")

    async def open(self, core: Core, stack: AsyncExitStack) -> None:
        """Make the hooks and the callers of tokens, and begin to fetch the keys of their issuer.

        Raises:
            ConfigurationError: a file of keys cannot be used.
        """
        self.hooks = self._hooks = HookSet(core.settings, core.metrics)
        self._section = HooksSection(self._hooks, core.metrics)
        stack.push_async_callback(self._hooks.close)
        callers = self.callers = TokenCallers()
        self._issuers = Issuers(callers, core.watched)
        stack.push_async_callback(self._issuers.close)
        self._issuers.prepare(core.settings.auth)()
        self._note(core.settings)

    def sections(self) -> Sequence[HooksSection]:
        """Return the state of the hooks."""
        return (self._section,)

    async def serve(self, context: Context) -> Routes:
        """Let the monitor show when keys cannot be had, end what tokens of withdrawn keys have open,
        and return the route of the description of the API.
        """
        self._issuers.serve(context.monitor, partial(_end_refused, context))
        return Routes(open=openapi.routes(context))

    def prepare(self, settings: Settings) -> Callable[[], None]:
        """Return the function that asks the hooks of *settings*, and takes its tokens.

        Raises:
            ConfigurationError: a class cannot be made, or a file of keys cannot be used.
        """
        apply_hooks = self._hooks.prepare(settings)
        apply_issuer = self._issuers.prepare(settings.auth)

        def apply() -> None:
            apply_hooks()
            apply_issuer()
            self._note(settings)

        return apply

    async def leave(self) -> None:
        """Let hooks see the ends of all answers."""
        await self._hooks.finish(self._shutdown_timeout)

    def _note(self, settings: Settings) -> None:
        self._shutdown_timeout = settings.chat.websocket.shutdown_timeout
