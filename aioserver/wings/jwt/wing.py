"""Tokens as a wing."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, ClassVar

from aioserver.faces.wing import Routes, Wing
from aioserver.wings.jwt import issuers
from aioserver.wings.jwt.issuers import Issuers
from aioserver.wings.jwt.token_callers import TokenCallers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from contextlib import AsyncExitStack

    from aioserver.auth.callers import Caller
    from aioserver.config.settings import Settings
    from aioserver.faces.context import Context
    from aioserver.faces.wing import Core


def _end_refused(context: Context) -> None:
    """Close the connections and answers of callers whose token is not accepted any more."""
    access = context.access

    def refused(caller: Caller) -> bool:
        return access.current(caller) is None

    for open_socket in tuple(context.sockets):
        if refused(open_socket.caller):
            open_socket.revoke()
    for quota in access.quotas().values():
        quota.end_watchers(refused)


class JwtWing(Wing):
    """The callers that show a token of an issuer."""

    name: ClassVar = "jwt"
    _issuers: Issuers

    def faults(self, settings: Settings) -> Iterable[str]:
        """Yield what `auth.jwt` lacks."""
        return issuers.faults(settings.auth)

    @staticmethod
    def before_workers(settings: Settings) -> None:
        """Import the packages for tokens, if any are accepted."""
        if settings.auth is not None and settings.auth.jwt is not None:
            import_module("aioserver.wings.jwt.issuer")

    async def open(self, core: Core, stack: AsyncExitStack) -> None:
        """Make the callers of tokens, and begin to fetch the keys of their issuer.

        Raises:
            ConfigurationError: a file of keys cannot be used.
        """
        callers = self.callers = TokenCallers()
        self._issuers = Issuers(callers, core.watched)
        stack.push_async_callback(self._issuers.close)
        self._issuers.prepare(core.settings.auth)()

    async def serve(self, context: Context) -> Routes:
        """Let the monitor show when keys cannot be fetched, and end the work of tokens with
        withdrawn keys.
        """
        self._issuers.serve(context.monitor, partial(_end_refused, context))
        return Routes()

    def prepare(self, settings: Settings) -> Callable[[], None]:
        """Return the function that accepts the tokens of *settings*.

        Raises:
            ConfigurationError: a file of keys cannot be used.
        """
        return self._issuers.prepare(settings.auth)
