"""The issuer of the tokens that are accepted now. A reload may name another one, with
other keys.
"""

from __future__ import annotations

from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING

from aioserver.config.faults import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping

    from aioserver.config.settings import Auth, Jwt
    from aioserver.files.watched_files import WatchedFiles
    from aioserver.monitoring.monitor import Monitor
    from aioserver.wings.jwt.issuer import Issuer
    from aioserver.wings.jwt.token_callers import TokenCallers

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


class Issuers:
    """The present issuer, for *callers*.

    Always: at most one issuer fetches. *watched* checks the file of its keys, if they are in one.
    """

    def __init__(self, callers: TokenCallers, watched: WatchedFiles) -> None:
        self._callers = callers
        self._jwt: Jwt | None = None
        self._issuer: Issuer | None = None
        # None: the faces do not exist yet.
        self._monitor: Monitor | None = None
        self._end_withdrawn: Callable[[], None] | None = None
        watched.add("jwt", self._files, self._read)

    def prepare(self, auth: Auth | None) -> Callable[[], None]:
        """Return the function that uses the keys of the issuer that *auth* names.

        Raises:
            ConfigurationError: they are in a file that cannot be used.
        """
        jwt = None if auth is None else auth.jwt
        if jwt is None:
            return partial(self._use, None, None)
        old = self._jwt
        if old and (jwt.jwks_url, jwt.jwks_file) == (old.jwks_url, old.jwks_file):
            return partial(self._use, jwt, self._issuer)
        # Without tokens the packages may be missing.
        from aioserver.wings.jwt import issuer as keys  # noqa: PLC0415

        if jwt.jwks_file is None:
            issuer = self._make(partial(keys.from_url, str(jwt.jwks_url)))
            return partial(self._use, jwt, issuer)
        try:
            there = keys.keys_in(jwt.jwks_file)
        except OSError as exc:
            why = f"cannot be read: {exc.strerror or type(exc).__name__}"
            raise ConfigurationError([f"auth.jwt.jwks_file: {why}"]) from None
        except ValueError as exc:
            raise ConfigurationError([f"auth.jwt.jwks_file: {exc}"]) from None
        issuer = self._make(partial(keys.from_file, jwt.jwks_file))
        issuer.use(there)
        return partial(self._use, jwt, issuer)

    def serve(self, monitor: Monitor, end_withdrawn: Callable[[], None]) -> None:
        """Report failed fetches to *monitor*, and call *end_withdrawn* whenever the issuer has
        withdrawn keys.
        """
        self._monitor, self._end_withdrawn = monitor, end_withdrawn

    async def close(self) -> None:
        """Stop fetching."""
        if self._issuer is not None:
            await self._issuer.close()

    def _make(self, fetch: Callable[[], Awaitable[bytes]]) -> Issuer:
        from aioserver.wings.jwt import issuer as keys  # noqa: PLC0415

        return keys.Issuer(fetch, self._report, on_withdrawn=self._withdrawn)

    def _withdrawn(self) -> None:
        if self._end_withdrawn is not None:
            self._end_withdrawn()

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
        if self._monitor is not None:
            self._monitor.incident("jwt", text, severity=severity)
