"""What one key may use: so many answers at once, so many new ones a minute (`auth.keys`).

An answer is counted where it begins, on whatever face, and until it has ended, however it ends; who
attaches to one that is there begins none. The minute is a GCRA (ITU-T I.371) whose burst is the whole
minute: after a rest `requests_per_minute` may begin at once, then one each 60 / n seconds. What is over
a limit is refused and not made to wait: waiting is the providers' queues', which are fair.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from aioserver.errors import (
    ConcurrencyExceeded,
    Denied,
    InvalidApiKey,
    PermissionDenied,
    RateLimitExceeded,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MINUTE = 60.0
ROUNDING = 1e-9  # of a minute's worth of additions
REVOKED = "this API key is no longer valid"


class Quota:
    """The counts of one key; they outlive a change of its limits.

    Always: `running` answers were taken and not given back; in any span of t seconds at most
    `(t / 60 + 1) * requests_per_minute` are taken. Once `revoked`, nothing is given any more.
    """

    def __init__(
        self,
        max_concurrent: int,
        requests_per_minute: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.running = 0
        self.revoked = False
        self._clock = clock
        self._due = 0.0  # the theoretical arrival time: never more than a minute ahead
        self._held: dict[asyncio.Task[object], bool] = {}  # and whether it wants an admin
        self._why: dict[asyncio.Task[object], Denied] = {}  # those of them that were told to end
        self.apply(max_concurrent, requests_per_minute)

    def apply(self, max_concurrent: int, requests_per_minute: int) -> None:
        """Use other limits from now on; what runs, and what has begun, counts as before."""
        self._most = max_concurrent
        self._per_minute = requests_per_minute
        self._step = MINUTE / requests_per_minute

    def take(self) -> None:
        """Begin an answer; `give_back` is to be called once when it has ended.

        Raises:
            ConcurrencyExceeded, RateLimitExceeded: over a limit; nothing is counted then.
            InvalidApiKey: the key was revoked since its request came in.
        """
        if self.revoked:
            raise InvalidApiKey(REVOKED)
        if self.running >= self._most:
            raise ConcurrencyExceeded(
                f"{self.running} answers of this key run or wait, at most max_concurrent={self._most}",
                retry_after=1.0,  # nobody knows when one of them ends
            )
        now = self._clock()
        due = max(self._due, now) + self._step
        if (ahead := due - now - MINUTE) > ROUNDING:
            raise RateLimitExceeded(
                f"requests_per_minute={self._per_minute} of this key reached", retry_after=ahead
            )
        self._due = due
        self.running += 1

    def give_back(self, *, unused: bool = False) -> None:
        """An answer has ended, or (*unused*) never began, and counts for nothing."""
        self.running -= 1
        if unused:
            self._due -= self._step

    @contextmanager
    def used(self) -> Iterator[None]:
        """An answer that this task makes: taken, held and given back.

        Raises:
            As `take` and `held`.
        """
        self.take()
        try:
            with self.held():
                yield
        finally:
            self.give_back()

    @contextmanager
    def held(self, *, admin: bool = False) -> Iterator[None]:
        """Bind this task to the key: a revocation ends what it does inside.

        So does, of what only an *admin* may do, that the key is no admin key any more.

        Raises:
            InvalidApiKey: the key was revoked meanwhile.
            PermissionDenied: it is no admin key any more.
        """
        task = asyncio.current_task()
        assert task is not None
        self._held[task] = admin
        try:
            yield
        except asyncio.CancelledError:
            why = self._why.get(task)
            if why is not None and task.uncancel() == 0:
                raise why from None
            raise  # nobody has told it to end, or somebody else wants that as well
        finally:
            del self._held[task]
            self._why.pop(task, None)

    def revoke(self) -> None:
        """The key is no longer valid: end what is held for it, give nothing more."""
        self.revoked = True
        for task in self._held:
            self._end(task, InvalidApiKey(REVOKED))

    def demote(self) -> None:
        """The key is no admin key any more: end what is held for an admin."""
        for task, admin in self._held.items():
            if admin:
                self._end(task, PermissionDenied("this key is no admin key any more"))

    def _end(self, task: asyncio.Task[object], why: Denied) -> None:
        if task not in self._why:
            self._why[task] = why
            task.cancel()
