"""The limits of one key (`auth.keys`): connections and answers at once, and new answers per
minute.

An answer counts from its beginning to its end, on whatever face, and however it ends; a request
that attaches to an answer under way begins none. A connection counts from its request or handshake
to its end, also while it waits for its place; a `max_connections` of 0 bounds nothing. The limit
per minute is a GCRA (limits/gcra.py) with a burst of a whole minute: after a rest
`requests_per_minute` answers may begin at once, then one each 60 / `requests_per_minute` seconds.
A deletion counts like the beginning of an answer, since it costs all instances a look.
Tokens count by an estimate that is reserved before the start (limits/budget.py).
A request over a limit is refused, unless the key has a queue (limits/key_queue.py): it then waits,
if what it lacks can come within its time.

This file is one concept: what an answer counts is counted in all limits of its key, or in none.
"""

# ruff: noqa: SLF001 - a quota and what is bound to it are one concept

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from math import ceil, inf
from typing import TYPE_CHECKING, Any

import msgspec

from aioserver.errors import (
    ConcurrencyExceeded,
    Denied,
    InvalidApiKey,
    PermissionDenied,
    RateLimitExceeded,
    TokensExceeded,
)
from aioserver.limits.budget import Budget
from aioserver.limits.gcra import Gcra
from aioserver.limits.key_queue import MAX_WAIT, KeyQueue, Turn

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Hashable

    from aioserver.errors import AioserverError
    from aioserver.limits.budget import BudgetState, Reservation, Shortage

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
        queue_size: int = 0,
        budget: Budget | None = None,
    ) -> None:
        self.running = 0
        self.budget = Budget(clock=clock) if budget is None else budget
        self.queue = KeyQueue(self._start, self._waited_too_long)
        # How many requests may wait.
        self.queue_size = queue_size
        self._connections = 0
        self._max_connections = max_connections
        self.revoked = False
        # How many answers may run at once.
        self.limit = max_concurrent
        self._per_minute = requests_per_minute
        self._rate = Gcra(*minute(requests_per_minute), clock)
        # The tasks that are bound to the key, and the watcher of those that need an admin key.
        self._held: dict[asyncio.Task[object], object | None] = {}
        # The cancelled ones among them, and the error that each of those raises instead.
        self._denials: dict[asyncio.Task[object], Denied] = {}

    def apply(
        self,
        max_concurrent: int,
        requests_per_minute: int,
        max_connections: int = 0,
        queue_size: int = 0,
    ) -> None:
        """Use other limits from now on; those of tokens are `budget.apply`'s.

        Answers that run or have begun, and connections, count as before; those that wait go on
        waiting.
        """
        self.queue_size = queue_size
        self.limit = max_concurrent
        self._max_connections = max_connections
        self._per_minute = requests_per_minute
        self._rate.apply(*minute(requests_per_minute))
        self.serve()

    def budgets(self) -> dict[str, BudgetState]:
        """Return the budgets of the key that there are, by the names of their settings."""
        return self.budget.states()

    @property
    def starts(self) -> tuple[int, int, float]:
        """The starts of a minute, those of them that are left now, and the seconds until all are,
        if none is used.
        """
        limit, left = self._per_minute, min(self._per_minute, self._rate.available)
        return limit, left, (limit - left) * self._rate.interval

    @property
    def rested(self) -> bool:
        """Whether nothing runs, waits or is open, and a new quota in the place of this one would
        allow no more.
        """
        busy = self.running or self.connections or len(self.queue) or self._held
        return not busy and self._tokens_whole and self._rate_whole

    @property
    def _tokens_whole(self) -> bool:
        """Whether all tokens of the budgets are there."""
        return not any(state.used or state.reserved for state in self.budget.states().values())

    @property
    def _rate_whole(self) -> bool:
        """Whether all starts of a minute are there."""
        return self._rate.available >= self._per_minute

    def take_over(self, old: Quota) -> None:
        """Count what *old*, the quota of a former key of the same caller, has used and reserved."""
        self.budget.take_over(old.budget)

    def serve(self) -> None:
        """Let those begin that wait and may begin now: to be called when a limit has changed."""
        if len(self.queue):
            self.queue.serve()

    def begin(
        self,
        tokens: int = 0,
        *,
        flow: Hashable = "",
        work: int = 1,
        start_by: float = inf,
        on_wait: Callable[[], None] | None = None,
    ) -> Turn:
        """Count an answer that begins, or let it wait; call `Turn.end` once when it has ended.

        Its *tokens* are an estimate. Where it has to wait, *on_wait* is called, which may raise; it
        waits as a request of the user *flow* that costs *work*. What cannot come until *start_by*,
        a moment of the loop's clock, is not waited for; it is the caller who ends the wait then.
        `Turn.decided` is to be awaited before a provider is asked.

        Raises:
            InvalidApiKey: the key was revoked after its request came in.
            ConcurrencyExceeded, RateLimitExceeded: it is not within the limits, and cannot wait;
                nothing is counted.
        """
        turn = Turn(self.queue, self.give_back, tokens, flow, work, on_wait)
        if not len(self.queue):
            try:
                undecided = self._start(turn)
            except (ConcurrencyExceeded, RateLimitExceeded):
                if not self.queue_size:
                    raise
            else:
                if self.queue_size:
                    self.queue.charge(turn)
                    if undecided is not None:
                        until = min(start_by, asyncio.get_running_loop().time() + MAX_WAIT)
                        self.queue.hold(turn, until, undecided)
                        return turn
                turn.took(undecided)
                return turn
        try:
            self._wait(turn, start_by)
        except BaseException:
            turn.end(unused=True)
            raise
        return turn

    def _wait(self, turn: Turn, start_by: float) -> None:
        """Let *turn* wait, which could not start.

        Raises:
            AioserverError: as `begin`.
        """
        if self.revoked:
            raise InvalidApiKey(REVOKED)
        now = asyncio.get_running_loop().time()
        until = min(start_by, now + MAX_WAIT)
        if (shortage := self._shortage(turn)) is not None and now + shortage.delay > until:
            raise self.too_many_tokens(shortage)
        if len(self.queue) >= self.queue_size:
            raise ConcurrencyExceeded(
                f"{len(self.queue)} requests of this key wait already,"
                f" at most queue_size={self.queue_size}",
                retry_after=max(1.0, self.queue.eta(1)),
            )
        position = self.queue.position(turn.flow)
        if now + (delay := self._rate.delay((position - 1) * self._rate.interval)) > until:
            raise self._too_fast(delay)
        turn.waits()
        self.queue.add(turn, until)

    def _start(self, turn: Turn) -> asyncio.Future[None] | None:
        """Count the answer of *turn* in all limits, or in none.

        Raises:
            InvalidApiKey: the key was revoked.
            ConcurrencyExceeded, RateLimitExceeded: it is not within the limits.
        """
        if not self.budget.limited:
            return self.take(patient=turn.waiting)
        if self.revoked:
            raise InvalidApiKey(REVOKED)
        if self.running >= self.limit:
            raise self._too_many()
        if (shortage := self._shortage(turn)) is not None:
            raise self.too_many_tokens(shortage)
        reservation = self.budget.reserve(turn.tokens)
        try:
            undecided = self.take(patient=turn.waiting, tokens=reservation)
        except BaseException:
            reservation.release()
            raise
        turn.reservation = reservation
        return undecided

    def _shortage(self, turn: Turn) -> Shortage | None:
        return self.budget.shortage(turn.tokens) if self.budget.limited else None

    def _waited_too_long(self, _turn: Turn) -> AioserverError:
        return ConcurrencyExceeded(
            f"no place of this key was free within {MAX_WAIT:.0f} s",
            retry_after=max(1.0, self.queue.eta(1)),
        )

    @staticmethod
    def too_many_tokens(shortage: Shortage) -> TokensExceeded:
        """Return the error of a request for which there are too few tokens."""
        period, limit, used, tokens, delay = shortage
        # Codex reads the time from exactly these words; a tenth too late is not refused again.
        seconds = ceil(delay * 10) / 10
        error = TokensExceeded(
            f"{period} of this key: limit {limit}, used {used}, requested about {tokens}."
            f" Please try again in {seconds:.1f}s.",
            retry_after=seconds,
        )
        error.period, error.delay = period, delay
        return error

    def _too_many(self) -> ConcurrencyExceeded:
        return ConcurrencyExceeded(
            f"{self.running} answers of this key run or wait, at most max_concurrent={self.limit}",
            retry_after=1.0,  # nobody knows when one of them ends
        )

    def take(
        self,
        *,
        patient: bool = False,  # noqa: ARG002
        tokens: Reservation | None = None,  # noqa: ARG002
    ) -> asyncio.Future[None] | None:
        """Count an answer that begins, whose *tokens* are reserved; call `give_back` once when it
        has ended.

        Where other instances share the limits it may not be known yet whether the answer is within
        them. Then the result is a future, to be awaited before a provider is asked: it raises one
        of the first two errors if the answer is not. The answer is counted meanwhile; if it ends
        before that is known, the future is to be cancelled. That of a *patient* answer, which waits
        anyway, may be undecided for long.

        Raises:
            ConcurrencyExceeded: `max_concurrent` answers run; nothing is counted.
            RateLimitExceeded: `requests_per_minute` is reached; nothing is counted.
            InvalidApiKey: the key was revoked after its request came in.
        """
        if self.revoked:
            raise InvalidApiKey(REVOKED)
        if self.running >= self.limit:
            raise self._too_many()
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
        if len(self.queue):
            self.queue.serve()

    @asynccontextmanager
    async def used(self) -> AsyncIterator[None]:
        """Count an answer for the length of the `async with`, and bind this task to the key.

        Raises:
            AioserverError: as `begin`, `Turn.decided` and `held`.
        """
        turn = self.begin()
        try:
            with self.held():
                await turn.decided()
                yield
        finally:
            turn.end()

    def held(self, *, watcher: object | None = None) -> Held:
        """Bind this task to the key: a revocation cancels what it does inside the `with`.

        If the task needs an admin key, it works for a *watcher*, and is also cancelled when the
        key is demoted, or `end_watchers` says so. The end of the `with` raises `InvalidApiKey`
        where the key was revoked meanwhile, and `PermissionDenied` where it was demoted.
        """
        task = asyncio.current_task()
        assert task is not None
        return Held(self, task, watcher)

    def revoke(self) -> None:
        """Cancel every task that is bound to the key, and refuse every new answer."""
        self.revoked = True
        self.queue.refuse(lambda: InvalidApiKey(REVOKED))
        for task in self._held:
            self._cancel(task, InvalidApiKey(REVOKED))

    def demote(self) -> None:
        """Cancel the tasks that need an admin key, since the key is no longer one."""
        for task, watcher in self._held.items():
            if watcher is not None:
                self._cancel(task, PermissionDenied("this key is no longer an admin key"))

    def end_watchers(self, revoked: Callable[[Any], bool]) -> None:
        """Cancel the tasks that work for a watcher who is *revoked*, as if the key were."""
        for task, watcher in self._held.items():
            if watcher is not None and revoked(watcher):
                self._cancel(task, InvalidApiKey(REVOKED))

    def _cancel(self, task: asyncio.Task[object], denial: Denied) -> None:
        if task not in self._denials:
            self._denials[task] = denial
            task.cancel()


class Held(msgspec.Struct, eq=False):
    """The bond of *task* to the key of *quota*, for the length of a `with`: see `Quota.held`."""

    quota: Quota
    task: asyncio.Task[object]
    watcher: object | None

    def __enter__(self) -> None:
        self.quota._held[self.task] = self.watcher

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        quota, task = self.quota, self.task
        del quota._held[task]
        denial = quota._denials.pop(task, None) if quota._denials else None
        if denial is None or not isinstance(error, asyncio.CancelledError):
            return
        # Where not the key alone has cancelled the task, it stays cancelled.
        if task.uncancel() == 0:
            raise denial from None


def minute(requests: int) -> tuple[float, float]:
    """Return the interval and the tolerance of *requests* a minute; after a rest all may start at
    once.
    """
    interval = MINUTE / requests
    return interval, (requests - 1) * interval
