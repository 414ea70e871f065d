"""The deadlines of one request: when it must have started, and when its answer must have ended.

A request without such options has no deadline and no timer. With them it keeps a single timer,
which cancels the task that waits or works for it. So the timer bounds every wait, and the
provider's connection is closed at once. A wait that is known to be too long does not begin: a
refusal that says when the request could start (`AioserverError.timed`) becomes a deadline error if
that time is too late. An estimate never ends a wait.
"""

from __future__ import annotations

import asyncio
from contextlib import AbstractContextManager, nullcontext
from math import inf
from typing import TYPE_CHECKING, NamedTuple, Self

from aioserver.errors import AioserverError, AnswerTooLate, DeadlineExceeded
from aioserver.limits.resource import RETRY_AFTER
from aioserver.provider_errors import ProviderFault

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from aioserver.protocol.request_headers import RequestOptions

# Seconds by which a timer may be early.
ROUNDING = 0.002
# Stands for the `Guard` of a request without a deadline.
NO_GUARD: AbstractContextManager[object] = nullcontext()


class Wait(NamedTuple):
    """The wait of a request: its object in words, and an estimate in seconds."""

    text: str
    eta: float = 0.0


class Deadline:
    """The deadlines of a request with *request_options* that came in at *arrived*.

    *start_by* and *deadline* are times of the loop's clock, inf if there is none. *started* says
    that the first attempt was sent; *start_by* no longer counts then. *wait* is the present wait,
    None if it is not known. *cut* says that *deadline* has ended the answer.
    """

    __slots__ = ("_request_options", "cut", "deadline", "start_by", "started", "wait")

    def __init__(self, arrived: float, request_options: RequestOptions) -> None:
        self._request_options = request_options
        self.start_by = arrived + request_options.start_within
        self.deadline = arrived + request_options.deadline
        self.started = self.cut = False
        self.wait: Wait | None = None

    def queued(self, place: str, position: int, eta: float) -> None:
        """Note that the request has this *position* at *place*."""
        self.wait = Wait(f"position {position} at {place}", eta)

    def telling(
        self, place: str, on_position: Callable[[int, float], None] | None
    ) -> Callable[[int, float], None]:
        """Return a callback that records the position at *place*, and passes it on to
        *on_position*.
        """

        def told(position: int, eta: float) -> None:
            self.queued(place, position, eta)
            if on_position is not None:
                on_position(position, eta)

        return told

    @property
    def next(self) -> float:
        """The time at which the request ends, unless it starts or ends before."""
        return self.deadline if self.started else min(self.start_by, self.deadline)

    @property
    def left(self) -> float:
        """The seconds until then, negative once it has passed."""
        return self.next - asyncio.get_running_loop().time()

    def start(self, name: str) -> None:
        """Record that an attempt is sent to *name* now.

        Raises:
            DeadlineExceeded: the deadline has passed.
        """
        if self.left < 0:
            raise self.exceeded()
        self.started = True
        self.wait = Wait(f"{name} was answering")

    def exceeded(self, text: str = "", retry_after: float | None = None) -> DeadlineExceeded:
        """Return the deadline error of the request; *text* gives the reason, if that is not the
        present wait.
        """
        wait, request_options = self.wait or Wait(""), self._request_options
        reason = f": {text or wait.text}" if text or wait.text else ""
        if self.started:
            return AnswerTooLate(
                f"the answer had not ended after {request_options.deadline:g} s{reason}"
            )
        low, high = RETRY_AFTER
        error = DeadlineExceeded(
            f"could not start within {min(request_options.start_within, request_options.deadline):g} s{reason}",
            retry_after=retry_after or min(high, max(low, wait.eta)),
        )
        if request_options.deadline < request_options.start_within:
            error.bound = AnswerTooLate.bound
        return error

    def refused(self, error: AioserverError) -> DeadlineExceeded | None:
        """Return the deadline error that replaces the refusal *error*, if the request would be too
        late otherwise; None if it would not.
        """
        fault = error if isinstance(error, ProviderFault) else None
        if fault is not None and fault.backoff:
            return self.exceeded(f"{error.message}; the next attempt in {fault.backoff:.1f} s")
        # A provider's own refusal stands; it is not turned into a deadline error.
        if fault is not None and fault.attempt_outcome:
            return None
        if self.left <= ROUNDING and fault is not None:
            # The deadline has ended its wait at a provider.
            return self.exceeded()
        if not error.timed:
            return None
        after = error.retry_after
        if after is None or after <= self.left:
            return None
        return self.exceeded(f"{error.message}; it could start in {after:.1f} s", after)


class Guard:
    """Cancels the body of its `with` at the *deadline* of its request, unless that is *over*.

    Always: no timer is left after the `with`, and a task that somebody else has cancelled stays
    cancelled. *count* is called with each error that is raised.

    Raises:
        DeadlineExceeded: the deadline has passed, or a refusal means that it will.
    """

    __slots__ = ("_cancelling", "_count", "_deadline", "_error", "_over", "_task", "_timer")

    def __init__(
        self,
        deadline: Deadline,
        count: Callable[[DeadlineExceeded], None],
        over: Callable[[], bool] = bool,
    ) -> None:
        self._deadline, self._count, self._over = deadline, count, over
        self._error: DeadlineExceeded | None = None
        self._timer: asyncio.TimerHandle | None = None
        task = asyncio.current_task()
        assert task is not None
        self._task, self._cancelling = task, task.cancelling()

    def __enter__(self) -> Self:
        if self._deadline.left < 0:
            error = self._deadline.exceeded()
            self._count(error)
            raise error
        self._watch()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        task, late = self._task, self._error
        # A task that ends with an error keeps its traceback, which refers to this object.
        # References from here would keep the task alive in turn, and all that its request holds.
        del self._task, self._error, _traceback
        error: DeadlineExceeded | None = None
        if late is not None:
            others = task.uncancel() > self._cancelling
            if kind is asyncio.CancelledError and not others:
                error = late
        if isinstance(exc, DeadlineExceeded):
            error = exc
        elif isinstance(exc, AioserverError):
            error = self._deadline.refused(exc)
        if error is None:
            return
        self._count(error)
        if error is exc:
            return
        try:
            raise error from None
        finally:
            del task, late, error, exc

    def _watch(self) -> None:
        if (moment := self._deadline.next) < inf:
            self._timer = asyncio.get_running_loop().call_at(moment, self._expire, moment)

    def _expire(self, moment: float) -> None:
        self._timer = None
        deadline = self._deadline
        if deadline.next > moment:
            # The request has started in time.
            self._watch()
            return
        if self._over():
            return
        self._error, deadline.cut = deadline.exceeded(), deadline.started
        self._task.cancel()
