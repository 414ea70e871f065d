"""The current keys of an issuer: fetched at the start, from time to time, and when a token names
an unknown key.

After a failed fetch the earlier keys stay valid (fail static). A token that names an unknown key
forces a fetch, but at most one fetch is forced in FORCED seconds, however many such tokens come.
Within these seconds such a token is refused if the last fetch has succeeded. Otherwise its key may
be a new key of the issuer, and the token is neither refused nor accepted: its client gets 503.
"""

from __future__ import annotations

import asyncio
import logging
import random
from math import inf
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, TypeVar

import aiohttp

from aioserver import __version__
from aioserver.errors import AuthUnavailable
from aioserver.wings.jwt.signatures import MAX_BYTES, KeySet, UselessKeys, read_keys
from aioserver.wings.jwt.token import refused

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from aioserver.errors import AioserverError
    from aioserver.wings.jwt.signatures import Key

T = TypeVar("T")
logger = logging.getLogger("aioserver.jwt")

# Seconds between two fetches, with a tenth of jitter, so that not all servers fetch at once.
INTERVAL, JITTER = 600.0, 0.1
# The least seconds between two fetches that tokens force.
FORCED = 30.0
# Seconds until a failed fetch is tried again: doubled up to the second number.
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
# Seconds for one fetch.
TIMEOUT = 5.0
# Seconds for which a request waits for a fetch, and how many may wait.
PATIENCE, MAX_WAITING = 2.0, 256
HEADERS = {
    "Accept": "application/jwk-set+json, application/json",
    "User-Agent": f"aioserver/{__version__}",
}


class Unreachable(Exception):
    """A fetch has failed; the text says why."""


class Issuer:
    """The keys of one issuer.

    Always: one fetch runs at a time; two that tokens have forced begin FORCED seconds apart; the
    present keys stay until a fetch brings another set; at most MAX_WAITING requests wait.

    *fetch* returns the set as bytes; it raises Unreachable, or the errors of `from_url` and
    `from_file`. *report* is called with a text and its severity when the keys cannot be fetched,
    and when they can be again. *on_withdrawn* is called when former keys are missing in a new set.
    """

    def __init__(
        self,
        fetch: Callable[[], Awaitable[bytes]],
        report: Callable[[str, str], None],
        clock: Callable[[], float] = monotonic,
        on_withdrawn: Callable[[], None] = lambda: None,
    ) -> None:
        self._fetch = fetch
        self._report = report
        self._on_withdrawn = on_withdrawn
        self._clock = clock
        self._keys: KeySet | None = None
        self._thumbprints = frozenset[str]()
        # The start of the fetch that has brought the keys, and of the newest fetch that a token has
        # forced.
        self._fetched_at = self._forced_at = -inf
        self._failures = 0
        self._waiting = 0
        self._fetching: asyncio.Task[None] | None = None
        # The start of the next regular fetch.
        self._due = -inf
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    def stop(self) -> None:
        """Stop fetching."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        if self._fetching is not None:
            self._fetching.cancel()

    async def close(self) -> None:
        """Stop fetching, and wait until no fetch runs."""
        task = self._fetching
        self.stop()
        if task is not None:
            await asyncio.wait([task])

    def look(self) -> None:
        """Fetch now, in the running event loop, unless a fetch runs."""
        if self._fetching is None and not self._closed:
            self._begin()

    def use(self, keys: KeySet) -> None:
        """Use *keys*, which were read just now."""
        self._arrived(keys, self._clock())

    def find(self, kid: str | None) -> Mapping[str, Key] | None:
        """Return the keys of the id *kid*, by their algorithms; None if that id is unknown.

        For *kid* None, return the keys that need not be named.
        """
        if self._keys is None:
            return None
        return self._keys.nameless if kid is None else self._keys.named.get(kid)

    def holds(self, thumbprint: str) -> bool | None:
        """Return whether the key of *thumbprint* is among the keys; None before there are any."""
        return None if self._keys is None else thumbprint in self._thumbprints

    def check_worth_waiting(self) -> None:
        """Check that waiting may bring an unknown key.

        Raises:
            TokenRefused: the key is not the issuer's, by a fetch within the last FORCED seconds.
            AuthUnavailable: no fetch runs, and none may be forced now; or too many wait.
        """
        if self._fetching is None and self._clock() < self._forced_at + FORCED:
            raise self._undecidable()
        if self._waiting >= MAX_WAITING or self._closed:
            raise self._unavailable()

    async def wait_for(self, find: Callable[[], T | None]) -> T:
        """Return the result of *find* in the keys, once a fetch has brought it.

        Raises:
            TokenRefused: it was not in the result of a fetch that has begun since, or within the
                last FORCED seconds.
            AuthUnavailable: it is unknown now whether it exists.
        """
        since = self._clock()
        self.check_worth_waiting()
        self._waiting += 1
        try:
            while (found := find()) is None:
                if self._fetched_at >= since:
                    raise refused("kid")
                if self._fetching is None:
                    if self._clock() < self._forced_at + FORCED:
                        raise self._undecidable()
                    self._forced_at = self._clock()
                    self._begin()
                left = since + PATIENCE - self._clock()
                fetching = self._fetching
                if left <= 0 or fetching is None:
                    raise self._unavailable()
                await asyncio.wait([fetching], timeout=left)
            return found
        finally:
            self._waiting -= 1

    def _undecidable(self) -> AioserverError:
        """Return the error of a token for which no fetch may be forced now."""
        known = not self._failures and self._fetched_at >= self._clock() - FORCED
        return refused("kid") if known else self._unavailable()

    def _unavailable(self) -> AuthUnavailable:
        """Return the error of a token that cannot be decided now."""
        now = self._clock()
        text = "the keys of the token's issuer cannot be fetched now"
        if self._keys is not None:
            text = "the token names a key that is not known yet"
        wait = min(self._due, self._forced_at + FORCED) - now
        return AuthUnavailable(text, retry_after=max(1.0, wait))

    def _begin(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._fetching = asyncio.get_running_loop().create_task(self._run())
        self._fetching.add_done_callback(self._ended)

    async def _run(self) -> None:
        """Fetch the keys once."""
        began = self._clock()
        try:
            async with asyncio.timeout(TIMEOUT):
                content = await self._fetch()
            keys = read_keys(content)
        except TimeoutError:
            self._failed(f"no answer within {TIMEOUT:.0f} s")
        except (Unreachable, UselessKeys) as fault:
            self._failed(str(fault))
        except (aiohttp.ClientError, OSError, ValueError) as fault:
            self._failed(type(fault).__name__)
        except Exception as bug:
            logger.exception("bug in fetching the keys of the issuer")
            self._failed(type(bug).__name__)
        else:
            self._arrived(keys, began)

    def _arrived(self, keys: KeySet, at: float) -> None:
        """Use *keys*, as they were at the moment *at*."""
        former, self._thumbprints = self._thumbprints, keys.thumbprints()
        self._keys, self._fetched_at = keys, at
        if self._failures:
            logger.info("the keys of the issuer were fetched again")
            self._report("the keys of the issuer were fetched again", "info")
        self._failures = 0
        if former - self._thumbprints:
            self._on_withdrawn()

    def _failed(self, why: str) -> None:
        self._failures += 1
        if self._failures > 1:
            return
        effect = "no token can be checked" if self._keys is None else "the known keys stay valid"
        logger.warning("the keys of the issuer cannot be fetched: %s; %s", why, effect)
        self._report(f"the keys of the issuer cannot be fetched: {why}; {effect}", "warning")

    def _ended(self, _task: asyncio.Task[None]) -> None:
        self._fetching = None
        if self._closed:
            return
        if self._failures:
            pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(self._failures - 1, 10))
        else:
            pause = INTERVAL * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311 - no secret
        self._due = self._clock() + pause
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(pause, self.look)


async def from_url(url: str) -> bytes:
    """Return the content of *url*, and no more than a set may have.

    Raises:
        Unreachable, aiohttp.ClientError, OSError, ValueError: there is no such answer.
    """
    async with (
        aiohttp.ClientSession(
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=TIMEOUT),
            connector=aiohttp.TCPConnector(limit=1, force_close=True),
            headers=HEADERS,
        ) as session,
        session.get(url, allow_redirects=False) as response,
    ):
        if response.status != 200:
            raise Unreachable(f"status {response.status}")
        content = b""
        async for data in response.content.iter_any():
            content += data
            if len(content) > MAX_BYTES:
                break
        return content


async def from_file(path: str) -> bytes:
    """Return the content of the file *path*.

    Raises:
        OSError, ValueError: it cannot be read.
    """
    return await asyncio.to_thread(_content, path)


def keys_in(path: str) -> KeySet:
    """Return the keys in the file *path*. It blocks.

    Raises:
        OSError, ValueError: the file cannot be read, or has no keys.
    """
    return read_keys(_content(path))


def _content(path: str) -> bytes:
    """Return the content of the file *path*, and no more than a set may have."""
    with Path(path).open("rb") as file:
        return file.read(MAX_BYTES + 1)
