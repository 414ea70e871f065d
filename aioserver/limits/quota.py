"""The limits of one key (`auth.keys`): connections and answers at once, and new answers per
minute.

An answer counts from its beginning to its end, on whatever face, and however it ends; a request
that attaches to an answer under way begins none. A connection counts from its request or handshake
to its end, also while it waits for its place; a `max_connections` of 0 bounds nothing. The limit
per minute is a GCRA (limits/gcra.py) with a burst of a whole minute: after a rest
`requests_per_minute` answers may begin at once, then one each 60 / `requests_per_minute` seconds.
A deletion counts like the beginning of an answer, since it costs all instances a look.
A request over a limit is refused and does not wait: only the providers' queues, which are fair,
make requests wait.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

from aioserver.errors import (
    ConcurrencyExceeded,
    Denied,
    InvalidApiKey,
    PermissionDenied,
    RateLimitExceeded,
)
from aioserver.limits.gcra import Gcra

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

MINUTE = 60.0
REVOKED = "this API key is no longer valid"


class Quota:
    """The counts of one key; they outlive a change of its limits.

    Always: `running` answers were taken and not given back, and `connections` counted and not
    ended; in any span of t seconds at most `(t / 60 + 1) * requests_per_minute` are taken. Once
    `revoked`, none is taken any more.

    """

    def __init__(
        self,
        max_concurrent: int,
        requests_per_minute: int,
        clock: Callable[[], float] = time.monotonic,
        *,
        max_connections: int = 0,
    ) -> None:
        self.running = 0
        self._connections = 0
        self._max_connections = max_connections
        self.revoked = False
        self._max_concurrent = max_concurrent
        self._per_minute = requests_per_minute
        self._rate = Gcra(*minute(requests_per_minute), clock)
        # The tasks that are bound to the key, and whether they need an admin key.
        self._held: dict[asyncio.Task[object], bool] = {}
        # The cancelled ones among them, and the error that each of those raises instead.
        self._denials: dict[asyncio.Task[object], Denied] = {}

    def apply(
        self, max_concurrent: int, requests_per_minute: int, max_connections: int = 0
    ) -> None:
        """Use other limits from now on.

        Answers that run or have begun, and connections, count as before.
        """
        self._max_concurrent = max_concurrent
        self._max_connections = max_connections
        self._per_minute = requests_per_minute
        self._rate.apply(*minute(requests_per_minute))

    def take(self) -> asyncio.Future[None] | None:
        """Count an answer that begins; call `give_back` once when it has ended.

        Where other instances share the limits it may not be known yet whether the answer is within
        them. Then the result is a future, to be awaited before a provider is asked: it raises one
        of the first two errors if the answer is not. The answer is counted meanwhile; if it ends
        before that is known, the future is to be cancelled.

        Raises:
            ConcurrencyExceeded: `max_concurrent` answers run; nothing is counted.
            RateLimitExceeded: `requests_per_minute` is reached; nothing is counted.
            InvalidApiKey: the key was revoked after its request came in.
        """
        if self.revoked:
            raise InvalidApiKey(REVOKED)
        if self.running >= self._max_concurrent:
            raise ConcurrencyExceeded(
                f"{self.running} answers of this key run or wait,"
                f" at most max_concurrent={self._max_concurrent}",
                retry_after=1.0,  # nobody knows when one of them ends
            )
        if delay := self._rate.try_take():
            raise self._too_fast(delay)
        self.running += 1
        return None

    async def count(self) -> None:
        """Count a request that begins no answer in the limit per minute. Cancelling is safe.

        Raises:
            RateLimitExceeded: `requests_per_minute` is reached.
        """
        if delay := self._rate.try_take():
            raise self._too_fast(delay)

    @property
    def connections(self) -> int:
        """The connections that are counted."""
        return self._connections

    def connect(self) -> asyncio.Future[None] | None:
        """Count a connection; call `disconnect` once when it has ended.

        Where other processes share the limit, the result may be a future that is undecided, as
        that of `take`; a connection that is refused by it has ended, too.

        Raises:
            ConcurrencyExceeded: `max_connections` of the key are open or wait; nothing is counted.
        """
        if 0 < self._max_connections <= self._connections:
            raise self._too_many_connections(self._connections)
        self._connections += 1
        return None

    def disconnect(self) -> None:
        """Count a connection as ended."""
        self._connections -= 1

    def _too_many_connections(self, connections: int) -> ConcurrencyExceeded:
        return ConcurrencyExceeded(
            f"{connections} connections of this key are open or wait,"
            f" at most max_connections={self._max_connections}",
            retry_after=1.0,  # nobody knows when one of them ends
        )

    def _too_fast(self, delay: float) -> RateLimitExceeded:
        return RateLimitExceeded(
            f"requests_per_minute={self._per_minute} of this key reached", retry_after=delay
        )

    def give_back(self, *, unused: bool = False) -> None:
        """Count an answer as ended; an *unused* one never began, and does not count at all."""
        self.running -= 1
        if unused:
            self._rate.take(-self._rate.interval)

    @asynccontextmanager
    async def used(self) -> AsyncIterator[None]:
        """Count an answer for the length of the `async with`, and bind this task to the key.

        Raises:
            AioserverError: as `take` and `held`.
        """
        undecided = self.take()
        try:
            with self.held():
                if undecided is not None:
                    await undecided
                yield
        finally:
            self.give_back()

    @contextmanager
    def held(self, *, admin: bool = False) -> Iterator[None]:
        """Bind this task to the key: a revocation cancels what it does inside the `with`.

        If the task needs an *admin* key, it is also cancelled when the key is demoted.

        Raises:
            InvalidApiKey: the key was revoked meanwhile.
            PermissionDenied: the key was demoted meanwhile.
        """
        task = asyncio.current_task()
        assert task is not None
        self._held[task] = admin
        try:
            yield
        except asyncio.CancelledError:
            denial = self._denials.get(task)
            if denial is not None and task.uncancel() == 0:
                raise denial from None
            # Not the key alone has cancelled the task.
            raise
        finally:
            del self._held[task]
            self._denials.pop(task, None)

    def revoke(self) -> None:
        """Cancel every task that is bound to the key, and refuse every new answer."""
        self.revoked = True
        for task in self._held:
            self._cancel(task, InvalidApiKey(REVOKED))

    def demote(self) -> None:
        """Cancel the tasks that need an admin key, since the key is no longer one."""
        for task, admin in self._held.items():
            if admin:
                self._cancel(task, PermissionDenied("this key is no longer an admin key"))

    def _cancel(self, task: asyncio.Task[object], denial: Denied) -> None:
        if task not in self._denials:
            self._denials[task] = denial
            task.cancel()


def minute(requests: int) -> tuple[float, float]:
    """Return the interval and the tolerance of *requests* a minute; after a rest all may start at
    once.
    """
    interval = MINUTE / requests
    return interval, (requests - 1) * interval
