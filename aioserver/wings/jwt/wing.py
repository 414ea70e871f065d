"""Tokens as a wing: their callers, and the issuer whose tokens are accepted now.

A reload may name another issuer, with other keys.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

from aioserver.config.faults import ConfigurationError
from aioserver.faces.wing import Routes, Wing
from aioserver.wings.jwt.token_callers import TokenCallers

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
    from contextlib import AsyncExitStack

    from aioserver.auth.callers import Caller
    from aioserver.config.settings import Auth, Jwt, Settings
    from aioserver.faces.context import Context
    from aioserver.faces.wing import Core
    from aioserver.wings.jwt.issuer import Issuer

# The packages of the extra `jwt`, and their oldest versions: PyJWT's fixed five advisories.
NEEDED = {"PyJWT": (2, 13), "cryptography": (3, 4)}


def faults(
    auth: Auth | None, needed: Mapping[str, tuple[int, int]] = MappingProxyType(NEEDED)
) -> Iterator[str]:
    """Yield which of the *needed* packages are missing, if *auth* accepts tokens."""
    if auth is None or auth.jwt is None:
        return
    # Only needed with tokens; its import brings a reader of archives.
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415

    for package, least in needed.items():
        wanted = f"{package}>={'.'.join(map(str, least))}"
        try:
            there = version(package)
        except PackageNotFoundError:
            yield f"auth.jwt: {wanted} is not installed (pip install '.[jwt]' in the clone)"
            continue
        numbers = tuple(int(part) for part in there.split(".")[:2] if part.isdigit())
        if numbers < least:
            yield f"auth.jwt: {wanted} is needed, and {there} is installed (the extra jwt)"


class JwtWing(Wing):
    """The callers that show a token, and the present issuer of their tokens.

    Always: at most one issuer fetches.
    """

    name: ClassVar = "jwt"
    _callers: TokenCallers
    _jwt: Jwt | None = None
    _issuer: Issuer | None = None
    # None: the faces do not exist yet.
    _context: Context | None = None

    def faults(self, settings: Settings) -> Iterable[str]:
        """Yield what `auth.jwt` lacks."""
        return faults(settings.auth)

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
        self.callers = self._callers = TokenCallers()
        core.watched.add("jwt", self._files, self._read)
        stack.push_async_callback(self._close)
        self.prepare(core.settings)()

    async def serve(self, context: Context) -> Routes:
        """Let the monitor show when keys cannot be fetched, and end the work of tokens with
        withdrawn keys.
        """
        self._context = context
        return Routes()

    def prepare(self, settings: Settings) -> Callable[[], None]:
        """Return the function that accepts the tokens of *settings*.

        Raises:
            ConfigurationError: a file of keys cannot be used.
        """
        jwt = None if settings.auth is None else settings.auth.jwt
        if jwt is None:
            return partial(self._use, None, None)
        old = self._jwt
        if old and (jwt.jwks_url, jwt.jwks_file) == (old.jwks_url, old.jwks_file):
            return partial(self._use, jwt, self._issuer)
        # Without tokens the packages may be missing.
        from aioserver.wings.jwt import issuer as keys  # noqa: PLC0415

        fetch: Callable[[], Awaitable[bytes]] = partial(keys.from_url, str(jwt.jwks_url))
        present = None
        if jwt.jwks_file is not None:
            fetch = partial(keys.from_file, jwt.jwks_file)
            try:
                present = keys.keys_in(jwt.jwks_file)
            except (OSError, ValueError) as exc:
                why = str(exc)
                if isinstance(exc, OSError):
                    why = f"cannot be read: {exc.strerror or type(exc).__name__}"
                raise ConfigurationError([f"auth.jwt.jwks_file: {why}"]) from None
        issuer = keys.Issuer(fetch, self._report, on_withdrawn=self._end_refused)
        if present is not None:
            issuer.use(present)
        return partial(self._use, jwt, issuer)

    async def _close(self) -> None:
        if self._issuer is not None:
            await self._issuer.close()

    def _use(self, jwt: Jwt | None, issuer: Issuer | None) -> None:
        former, self._jwt = self._issuer, jwt
        if issuer is former:
            return
        self._issuer = issuer
        self._callers.use_issuer(issuer)
        if former is not None:
            former.stop()
        if issuer is not None:
            issuer.look()

    def _files(self) -> tuple[str, ...]:
        jwt = self._jwt
        return () if jwt is None or jwt.jwks_file is None else (jwt.jwks_file,)

    def _read(self) -> Callable[[], None] | None:
        """Return the function that puts the keys of the file in effect; called in a thread."""
        issuer, files = self._issuer, self._files()
        if issuer is None or not files:
            return None
        from aioserver.wings.jwt import issuer as keys  # noqa: PLC0415

        return partial(issuer.use, keys.keys_in(files[0]))

    def _report(self, text: str, severity: str) -> None:
        if self._context is not None:
            self._context.monitor.incident("jwt", text, severity=severity)

    def _end_refused(self) -> None:
        """Close the connections and answers of callers whose token is not accepted any more."""
        if self._context is None:
            return
        access = self._context.access

        def refused(caller: Caller) -> bool:
            return access.current(caller) is None

        for open_socket in tuple(self._context.sockets):
            if refused(open_socket.caller):
                open_socket.revoke()
        for quota in access.quotas().values():
            quota.end_watchers(refused)
