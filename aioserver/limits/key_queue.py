"""The queue of one key: requests that wait for a limit of their own key, before they ask for
anything that is everybody's.

This file is one concept, above 400 lines: a turn and the queue in which it waits pass it to each
other, step by step.

A request that waits here has no place at a provider. Which one is next is decided by the fair queue
among the users of the key (limits/fair_queue.py); the first of them alone asks for a place, a start
of the minute and tokens, so that a small request does not overtake a large one for ever.
"""

from __future__ import annotations

import asyncio
from math import inf
from typing import TYPE_CHECKING

import msgspec

from aioserver.errors import AioserverError, ConcurrencyExceeded, RateLimitExceeded
from aioserver.limits.old_fair_queue import FairQueue

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from aioserver.limits.budget import Reservation
    from aioserver.limits.old_fair_queue import Charge

# Seconds that a request may wait at its key: the timeout of the SDKs themselves.
MAX_WAIT = 600.0
# Seconds between two reports to those that want to know their position.
POSITION_INTERVAL = 1.0
# The weight of the newest interval between two starts in their moving average.
SMOOTHING = 0.2


class Turn(msgspec.Struct, eq=False):
    """One answer that counts for a key, from `Quota.begin` to `end`.

    Always: what it has taken of the key's limits is given back once, however often `end` is called,
    and whether the answer waits, is undecided, runs or was refused.

    Its first two arguments are those of the key's quota, and *on_wait* is what `waits` calls.
    *tokens* is the estimate that is reserved, *flow* the user for whom it waits, and *work* what it
    counts for in the fair queue.
    """

    _queue: KeyQueue
    _give_back: Callable[..., None]
    tokens: int
    flow: Hashable
    work: int
    _on_wait: Callable[[], None] | None = None
    reservation: Reservation | None = None
    # What its user is charged with in the queue of its key, if the key has one.
    charge: Charge[Turn] | None = None
    on_position: Callable[[int, float], None] | None = None
    reported: tuple[int, float] | None = None
    # Its position when it began to wait.
    position: int = 0
    # The moment of the loop's clock at which its wait ends.
    until: float = inf
    # The moment at which all its waits have to be over, if it waits.
    latest: float = inf
    # The seconds for which it has waited in the queue of its key.
    waited: float = 0.0
    waiting: bool = False
    over: bool = False
    _began: float = 0.0
    _timer: asyncio.TimerHandle | None = None
    # Whether it counts for the key.
    _taken: bool = False
    # What other instances have to say first; and what its own task waits for.
    _undecided: asyncio.Future[None] | None = None
    _decision: asyncio.Future[None] | None = None

    @property
    def decision(self) -> asyncio.Future[None] | None:
        """A call that is made once it is known whether the answer may begin; None if it may."""
        return self._undecided if self._decision is None else self._decision

    async def decided(self, on_position: Callable[[int, float], None] | None = None) -> None:
        """Wait until the answer may begin. Cancelling is safe; `end` follows in any case.

        *on_position* is called with its position in the queue of its key, and the seconds until
        its start, by an estimate: now, and again each second if they have changed.

        Raises:
            AioserverError: it may not.
        """
        if (decision := self.decision) is None:
            return
        if self.waiting and on_position is not None:
            self.on_position = on_position
            self._queue.report_first(self)
        try:
            await decision
        finally:
            self.on_position = None
            # A refusal is in this future, and its traceback leads to this frame.
            if decision.done():
                self._decision = None
            del decision

    def took(self, undecided: asyncio.Future[None] | None) -> None:
        """Note that the answer counts for its key, once it is *undecided* no longer."""
        self._taken = True
        self._undecided = undecided

    def give_back(self) -> None:
        """Give back what was taken for it, since it could not begin."""
        reservation, self.reservation = self.reservation, None
        charge, self.charge = self.charge, None
        if reservation is not None:
            reservation.release()
        if charge is not None:
            charge.settle(0)
        self._taken, self._undecided = False, None
        self._give_back(unused=True)

    def waits(self) -> None:
        """Call *on_wait*, once: it waits for longer than until others have decided.

        Raises:
            AioserverError: it may not.
        """
        on_wait, self._on_wait = self._on_wait, None
        if on_wait is not None:
            on_wait()

    def stands(self, until: float, on_late: Callable[[Turn], None]) -> None:
        """Note that it waits *until* a moment of the loop's clock, or for MAX_WAIT, after which
        *on_late* is called.
        """
        loop = asyncio.get_running_loop()
        self._began = loop.time()
        self._decision = loop.create_future()
        self._timer = loop.call_later(MAX_WAIT, on_late, self)
        self.until, self.waiting = until, True
        self.latest = self._began + MAX_WAIT

    def starts(self) -> None:
        """Note that its wait is over, and that it counts for its key."""
        self._leaves()
        conclude(self._decision)

    def refuse(self, error: AioserverError) -> None:
        """Note that its wait is over, and that it may not begin."""
        self._leaves()
        conclude(self._decision, error)

    def end(self, spent: int = 0, work: int = 0, *, unused: bool = False) -> None:
        """Count the answer as ended, whose attempts have cost *spent* tokens and so much *work*; an
        *unused* one never began. A second call does nothing.
        """
        if self.over:
            return
        self.over = True
        if self.waiting:
            self._queue.leave(self)
            self._leaves()
        if self._decision is not None:
            self._decision.cancel()
        if self._undecided is not None:
            # First, or it would be given back as one that has a place.
            self._undecided.cancel()
        if self.charge is not None:
            self.charge.settle(work)
        if self.reservation is not None:
            self.reservation.settle(spent)
        if self._taken:
            self._give_back(unused=unused)
        elif self.reservation is not None:
            self._queue.serve()

    def _leaves(self) -> None:
        self.waiting = False
        self.waited = asyncio.get_running_loop().time() - self._began
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class KeyQueue:
    """The requests that wait at one key, in the order in which they start.

    Always: nobody waits while the first could start; at most one that has left the queue is still
    undecided.

    *start* counts an answer for the key: see `Quota.start`. *late* makes the error of one whose
    wait is over.
    """

    def __init__(
        self,
        start: Callable[[Turn], asyncio.Future[None] | None],
        late: Callable[[Turn], AioserverError],
    ) -> None:
        self._start = start
        self._late = late
        self._queue: FairQueue[Turn] = FairQueue()
        # The first one, while other instances have a say in whether it starts.
        self._undecided: Turn | None = None
        self._serving = False
        self._start_timer: asyncio.TimerHandle | None = None
        self._position_timer: asyncio.TimerHandle | None = None
        # The smoothed seconds between two starts while somebody waits, and when the newest was.
        self._interval, self._started_at = 1.0, 0.0
        # The seconds until the first may start, where only time keeps it.
        self._delay = 0.0

    def __len__(self) -> int:
        """Return how many requests wait, the undecided one included."""
        return self._queue.size + (self._undecided is not None)

    def in_front(self) -> int:
        """Return how many requests wait, and have not asked for a place yet."""
        return self._queue.size

    def first_tokens(self) -> int:
        """Return the estimate of the first request that waits, and has not asked for a place yet; 0
        if there is none.
        """
        first = self._queue.head(_present) if self._queue.size and not self._undecided else None
        return 0 if first is None else first.tokens

    def position(self, flow: Hashable) -> int:
        """Return the position that another request of *flow* would have."""
        number = self._queue.count(flow, None) + 1
        undecided = self._undecided is not None
        return self._queue.position(flow, None, number) + undecided

    def eta(self, position: int) -> float:
        """Estimate the seconds until the request at *position* starts."""
        return max(position * self._interval, self._delay)

    def charge(self, turn: Turn) -> None:
        """Charge its user with *turn*, which starts without a wait."""
        turn.charge = self._queue.start(turn.flow, None, work=turn.work)

    def add(self, turn: Turn, until: float) -> None:
        """Let *turn* wait *until* a moment of the loop's clock: what comes later is refused at
        once. Whoever has set that moment ends the wait.
        """
        if not len(self):
            self._started_at = asyncio.get_running_loop().time()
        turn.position = self.position(turn.flow)
        turn.stands(until, self._refuse_late)
        self._queue.add(turn, turn.flow, None, work=turn.work)
        self.serve()

    def hold(self, turn: Turn, until: float, undecided: asyncio.Future[None]) -> None:
        """Let *turn*, which nobody waits in front of, wait for what other instances decide: it
        starts, or waits *until* a moment of the loop's clock, as after `add`.
        """
        turn.position = 1
        turn.stands(until, self._refuse_late)
        turn.took(undecided)
        self._ask(turn, undecided)

    def leave(self, turn: Turn) -> None:
        """Let *turn* wait no longer."""
        if self._undecided is turn:
            self._undecided = None
        else:
            self._queue.remove(turn, turn.flow, None)
        self.serve()

    def serve(self) -> None:
        """Start what may start now: called when a limit has changed, or something has ended."""
        if self._serving:
            return
        if self._start_timer is not None:
            self._start_timer.cancel()
            self._start_timer = None
        self._serving = True
        try:
            while self._queue.size and self._undecided is None and self._start_first():
                pass
        finally:
            self._serving = False

    def refuse(self, error: Callable[[], AioserverError]) -> None:
        """Refuse every request that waits, each with an error of its own."""
        waiting = list(self._queue)
        self._queue.clear()
        if (undecided := self._undecided) is not None:
            self._undecided = None
            waiting.append(undecided)
        for turn in waiting:
            turn.refuse(error())

    def report_first(self, turn: Turn) -> None:
        """Report the position of *turn* when it began to wait, and start the reports to all. One
        about which others decide hears of it if that takes a while.
        """
        if self._undecided is not turn:
            self._tell(turn, turn.position)
        if self._position_timer is None:
            loop = asyncio.get_running_loop()
            self._position_timer = loop.call_later(POSITION_INTERVAL, self._report)

    def _start_first(self) -> bool:
        """Start the first request, or refuse it; return False if it has to wait."""
        turn = self._queue.head(_present)
        assert turn is not None
        error: AioserverError | None = None
        undecided = None
        try:
            undecided = self._start(turn)
        except ConcurrencyExceeded:
            self._delay = 0.0
            return False
        except RateLimitExceeded as exc:
            self._delay = delay = exc.delay or exc.retry_after or 0.0
            loop = asyncio.get_running_loop()
            if loop.time() + delay <= turn.until:
                self._start_timer = loop.call_later(delay, self.serve)
                return False
            # What was in time when it began to wait comes too late now.
            error = exc
        except AioserverError as exc:
            error = exc
        if error is not None:
            self._queue.remove(turn, turn.flow, None)
            turn.refuse(error)
            return True
        popped = self._queue.pop(_present)
        assert popped is not None
        _, turn.charge = popped
        now = asyncio.get_running_loop().time()
        self._interval += SMOOTHING * (min(60.0, now - self._started_at) - self._interval)
        self._started_at, self._delay = now, 0.0
        turn.took(undecided)
        if undecided is None:
            turn.starts()
        else:
            self._ask(turn, undecided)
        return True

    def _ask(self, turn: Turn, undecided: asyncio.Future[None]) -> None:
        """Let others decide about *turn*, the first one."""
        self._undecided = turn
        undecided.add_done_callback(lambda future: self._decide(turn, future))

    def _decide(self, turn: Turn, undecided: asyncio.Future[None]) -> None:
        """Start *turn*, about which other instances have decided."""
        if self._undecided is not turn:
            # It has ended, or was refused.
            return
        self._undecided = None
        error = None if undecided.cancelled() else undecided.exception()
        if isinstance(error, ConcurrencyExceeded | RateLimitExceeded):
            # Others were faster: it goes on waiting.
            turn.give_back()
            self._put_back(turn)
        elif isinstance(error, AioserverError):
            turn.refuse(error)
        else:
            turn.starts()
        self.serve()

    def _put_back(self, turn: Turn) -> None:
        """Let *turn* wait as the first one."""
        try:
            turn.waits()
        except AioserverError as error:
            turn.refuse(error)
        else:
            self._queue.add(turn, turn.flow, None, work=turn.work, came=-inf)

    def _refuse_late(self, turn: Turn) -> None:
        error = self._late(turn)
        turn.refuse(error)
        self.leave(turn)

    def _tell(self, turn: Turn, position: int) -> None:
        place = position, self.eta(position)
        if turn.on_position is not None and turn.reported != place:
            turn.reported = place
            turn.on_position(*place)

    def _report(self) -> None:
        self._position_timer = None
        waiting = [*self._queue] if self._undecided is None else [self._undecided, *self._queue]
        listeners = False
        for position, turn in enumerate(waiting, 1):
            listeners = listeners or turn.on_position is not None
            self._tell(turn, position)
        if listeners:
            loop = asyncio.get_running_loop()
            self._position_timer = loop.call_later(POSITION_INTERVAL, self._report)


def conclude(decision: asyncio.Future[None] | None, error: Exception | None = None) -> None:
    """Let *decision*, if it is not done, have *error*, or no result."""
    if decision is None or decision.done():
        return
    if error is None:
        decision.set_result(None)
    else:
        decision.set_exception(error)
        # The client may have left.
        decision.exception()


def _present(_turn: Turn) -> bool:
    """Return False: whoever ends leaves the queue at once."""
    return False
