"""The scheduler: the one place where tickets wait until a resource that they bid for has a place.

    enter ──▶ a grant at once
      └─────▶ waits ──▶ a grant │ refused │ its deadline │ it has left
                ▲         │
                └─ again ─┘      a retry, a failover, a provider that is away

A request asks for its resources in order. The first is its key, whose grant it holds until its
answer has ended. Then it asks for any of the providers that may answer, and holds that grant for
one attempt. At each step it stands in the queues of all its bids, and leaves all of them at the
moment at which it starts at one. A ticket that comes back keeps its first arrival, and the time
that it has waited.

Nothing here blocks, and no call is re-entrant: resources whose queue has changed are noted, and
served one after the other.

This file is one concept: a wait, from when a ticket enters to its one end.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from math import inf
from typing import TYPE_CHECKING, cast

from aioserver.limits.gcra import ROUNDING
from aioserver.limits.resource import NOBODY, Grant, Reason, Resource, Ticket

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Sequence

    from aioserver.limits.resource import Bid, PositionCallback

# Seconds between two reports of positions.
REPORT_INTERVAL = 1.0
# Entries of bids that have left, which stay in the heap of later bids before they are swept.
MAX_STALE = 64


class Scheduler:
    """Starts tickets in the order of their resources' queues, and ends those whose deadline has
    come.

    Always: a ticket waits for one set of bids at most, and its wait ends once. Once it has ended,
    the ticket stands in no queue, has no timer, and takes no slot unless its resource keeps it;
    after `close` it holds nothing. No resource has a place for a queued ticket that could be next.

    One event loop owns one scheduler. Callbacks that resources were given must not raise.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        # The waiting tickets, in the order in which they began to wait.
        self.waiting: dict[Ticket, None] = {}
        # Resources whose queue must be looked at.
        self._dirty: dict[Resource, None] = {}
        self._serving = False
        # The bids that join later, by time, and those of them that have left.
        self._later: list[tuple[float, int, Bid]] = []
        self._entries = 0
        self._later_timer: asyncio.TimerHandle | None = None
        self._later_at = inf
        self._report_timer: asyncio.TimerHandle | None = None

    def time(self) -> float:
        """Return the time of its clock, in seconds."""
        return self._loop.time()

    # The calls of a request.

    def enter(
        self, ticket: Ticket, bids: Sequence[Bid], on_position: PositionCallback | None = None
    ) -> Grant | None:
        """Return the first free grant, in the order of *bids*; otherwise let *ticket* wait, and
        return None: call `granted` next. While it waits, its position is reported as by `listen`.

        Raises:
            BaseException: every bid was refused; the error is the refusal that may pass soonest.
        """
        for bid in bids:
            if not bid.not_before and (grant := bid.resource.try_start(ticket, bid.cost)):
                try:
                    if ticket.slot is not None:
                        self._free_slot_unless(ticket, grant, keeps=bid.parked)
                except BaseException:
                    grant.cancel()
                    raise
                ticket.won, ticket.queued = bid, False
                return grant
        ticket.queued = True
        return self._wait(ticket, bids, on_position)

    async def wait(
        self, ticket: Ticket, bids: Sequence[Bid], on_position: PositionCallback | None = None
    ) -> Grant:
        """Return a grant of one of *bids*, as `enter` and `granted`. Cancelling is safe."""
        grant = self.enter(ticket, bids, on_position)
        return await self.granted(ticket) if grant is None else grant

    async def granted(self, ticket: Ticket) -> Grant:
        """Return the grant that *ticket* waits for. Cancelling is safe.

        Raises:
            BaseException: it was refused; the resource that it left last made the error.
        """
        try:
            if ticket.outcome is None:
                ticket.woken = self._loop.create_future()
                await ticket.woken
        except BaseException:
            # A grant that came in this turn of the loop is passed on.
            self.leave(ticket)
            raise
        finally:
            ticket.woken = None
        return _outcome(ticket)

    def listen(self, ticket: Ticket, on_position: PositionCallback) -> None:
        """Report the position of *ticket*, if it waits, to *on_position*: each second, and at once
        if its report has changed since it began to wait.
        """
        known, ticket.reported = ticket.on_position is not None, None
        ticket.on_position = on_position
        if ticket in self.waiting:
            if known:
                self._tell(ticket)
            self._report_later()

    def leave(self, ticket: Ticket) -> None:
        """End the wait of *ticket*, if it waits; a grant that its task has not read is cancelled."""
        outcome, ticket.outcome = ticket.outcome, None
        if isinstance(outcome, Grant):
            outcome.cancel()
        elif ticket in self.waiting:
            self._end(ticket)
        ticket.free_slot()

    def close(self, ticket: Ticket) -> None:
        """End *ticket*: its wait, and each grant that it still holds, as unused."""
        self.leave(ticket)
        while ticket.grants:
            next(reversed(ticket.grants)).cancel()

    def join(self, ticket: Ticket, bid: Bid) -> None:
        """Let *ticket*, if it still waits, bid for one more resource, provided that it may wait
        there.
        """
        if ticket not in self.waiting:
            return
        now = self._loop.time()
        bid.ticket, bid.index = ticket, bid.resource.index(ticket)
        bid.resource.ask()
        try:
            bid.resource.admit(bid, now, room=True)
        except Exception:  # noqa: BLE001 - it waits elsewhere
            return
        if ticket.slot is None and bid.not_before <= now:
            if bid.resource.room(ticket.kind) <= 0:
                return
            self._take_slot(ticket, bid.resource)
        ticket.bids = [*ticket.bids, bid]
        self._expire_at(ticket)
        self._begin([bid], now)

    def withdraw(self, bid: Bid, error: Callable[[], BaseException]) -> None:
        """Withdraw *bid*; if that was its ticket's last bid, the ticket ends with *error*."""
        self._withdraw(bid, error)

    def suspend(self, grant: Grant, kind: str) -> None:
        """Give *grant* back for a while, and keep a slot of the class *kind* in its queue; the
        ticket is of this class from now on. `wait` for the same resource takes it again.

        Raises:
            BaseException: the class has no room.
        """
        ticket, resource = grant.ticket, grant.resource
        if resource.class_room(kind) <= 0:
            raise resource.refusal(Reason.FULL, resource.bid(ticket), resource.retry_after())
        ticket.kind = kind
        self._take_slot(ticket, resource)
        grant.release()

    # The calls of a resource's owner.

    def serve(self, resource: Resource) -> None:
        """Start the next tickets of *resource*: it has more places, or its rate has changed."""
        self._dirty[resource] = None
        self._serve_all()

    def resize(self, resource: Resource, capacity: int) -> None:
        """Set another capacity, after a reload or by a supply. Grants that are held stay."""
        if capacity != resource.places.limit:
            resource.places.resize(capacity)
            for limit, each in zip(resource.limits, resource.classes, strict=True):
                if limit is not None and each.places is not None:
                    limit.resize(each.places(capacity))
        self.serve(resource)

    def refuse(
        self,
        resource: Resource,
        error: Callable[[], BaseException],
        which: Callable[[Bid], bool] = lambda _bid: True,
    ) -> None:
        """Withdraw the bids for *resource* for which *which* holds; tickets without another bid
        end, each with an *error* of its own.
        """
        for ticket in list(self.waiting):
            for bid in [each for each in ticket.bids if _leads_to(each, resource)]:
                if (bid.standing or bid.parked) and which(bid):
                    bid.resource.refused += resource.closed is None
                    self._withdraw(bid, error)

    def recover(self, resource: Resource) -> None:
        """Let parked tickets return now to the queue of *resource*, and to the queues of the
        resources within it.
        """
        parked = [each[2] for each in self._later if each[2].parked]
        for bid in parked:
            if _leads_to(bid, resource) and _comes(bid):
                bid.not_before = 0.0
                self._come(bid)
        self.serve(resource)

    def shut(
        self, resource: Resource, error: Callable[[], BaseException], *, finishes: bool = False
    ) -> None:
        """Refuse all waiting and future tickets of *resource*, each with an error of its own. With
        *finishes*, tickets that continue an answer are still admitted.
        """
        resource.close(error, finishes=finishes)
        self.refuse(resource, error, lambda bid: not (finishes and bid.ticket.goes_on))
        self.serve(resource)

    # Waiting.

    def _wait(
        self, ticket: Ticket, bids: Sequence[Bid], on_position: PositionCallback | None
    ) -> Grant | None:
        assert ticket not in self.waiting, "it waits once at a time"
        now = self._loop.time()
        # A bid that only rests takes no slot; a new bid that joins later has its room like the
        # others.
        need = [bid for bid in bids if bid.not_before <= now or not bid.rests]
        for bid in bids:
            bid.resource.ask()
        if ticket.slot is not None and not any(_leads_to(bid, ticket.slot) for bid in bids):
            # It does not return to the resource where it had a slot.
            ticket.free_slot()
        room = ticket.slot is not None or not need or _have_room(ticket, need)
        joined, errors = _admit(ticket, bids, now, room=room)
        own = [] if ticket.slot is not None else [bid for bid in joined if bid in need]
        if room and own and not _have_room(ticket, own):
            # The room was at a resource that has refused its bid.
            errors.clear()
            joined, errors = _admit(ticket, bids, now, room=False)
            own = [bid for bid in joined if bid in need]
        if not joined:
            ticket.free_slot()
            refusal = min(errors)[2]
            errors.clear()
            try:
                raise refusal
            finally:
                # Its traceback leads to this frame.
                del refusal
        errors.clear()
        ticket.bids, ticket.on_position = joined, on_position
        self.waiting[ticket] = None
        try:
            if own:
                self._take_slot(ticket, self._roomiest(ticket, own).resource)
            self._begin(joined, now)
            if ticket in self.waiting:
                self._expire_at(ticket)
                if ticket.on_position is not None:
                    self._report_first(ticket)
        except BaseException:
            self.leave(ticket)
            raise
        if ticket in self.waiting:
            return None
        return _outcome(ticket)

    def _begin(self, bids: Sequence[Bid], now: float) -> None:
        """Let *bids* join the queues, now or later."""
        for bid in bids:
            if bid.not_before > now:
                if bid.parked:
                    _outermost(bid).away[bid] = None
                self._entries += 1
                heappush(self._later, (bid.not_before, self._entries, bid))
                self._look_at(bid.not_before)
            else:
                bid.resource.stand(bid)
                self._dirty[bid.resource] = None
        self._serve_all()

    def _come(self, bid: Bid) -> None:
        """Let *bid*, whose time has come, join the queue."""
        ticket, resource = bid.ticket, bid.resource
        _outermost(bid).away.pop(bid, None)
        if (error := resource.look(bid)) is not None:
            resource.refused += 1
            self._withdraw(bid, lambda: error)
            return
        if (grant := resource.try_start(ticket, bid.cost)) is not None:
            ticket.won = bid
            self._end(ticket, grant, keeps=bid.parked)
            return
        if ticket.slot is None:
            resource.ask()
            if resource.room(ticket.kind) <= 0:
                full = resource.refusal(Reason.FULL, bid, resource.retry_after())
                self._withdraw(bid, lambda: full)
                return
            self._take_slot(ticket, resource)
        resource.stand(bid)
        self.serve(resource)
        if ticket.on_position is not None and ticket in self.waiting:
            self._report_first(ticket)

    def _serve_all(self) -> None:
        """Serve the resources whose queue has changed, unless a caller further up does."""
        if self._serving:
            return
        self._serving = True
        try:
            while self._dirty:
                self._serve(self._dirty.popitem()[0])
        finally:
            self._serving = False

    def _serve(self, resource: Resource) -> None:
        if resource.timer is not None:
            resource.timer.cancel()
            resource.timer = None
        while (bid := resource.next()) is not None and self._start(bid):
            pass
        if resource.queue.size and resource.supply is not None:
            resource.supply.changed()

    def _start(self, bid: Bid) -> bool:
        """Start *bid*, the next one at its resource, or refuse it; return whether another one may
        start.
        """
        resource, ticket = bid.resource, bid.ticket
        grant: Grant | None = None
        outer = resource.within
        try:
            grant = resource.start(bid)
            if grant is not None and outer is None:
                ticket.won = bid
                self._end(ticket, grant, keeps=bid.parked)
                return True
        except Exception as error:  # noqa: BLE001 - a bug: it is raised in the task that waits
            if grant is not None:
                grant.cancel(serve=False)
            if ticket in self.waiting:
                self._end(ticket, error)
            return True
        if grant is None or outer is None:
            return self._start_later(bid)
        # It goes on to the outer resource, before its caller's other tickets.
        bid.inner, bid.front, bid.resource = grant, True, outer
        bid.index = outer.index(ticket)
        if ticket.slot is resource:
            ticket.slot = outer
            resource.take_slots(ticket.kind, -1)
        outer.stand(bid)
        self.serve(outer)
        return True

    def _start_later(self, bid: Bid) -> bool:
        """Try again when the rate allows *bid* to start; refuse it if that is too late."""
        resource, now = bid.resource, self._loop.time()
        assert resource.rate is not None
        if (delay := resource.rate.delay(bid.cost)) == inf:
            return False
        if now + delay > bid.until + ROUNDING:
            # The bid was in time when it began to wait, and is too late now.
            late = resource.refusal(Reason.SLOW, bid, delay)
            self._withdraw(bid, lambda: late)
            return True
        resource.timer = self._loop.call_at(now + delay, self.serve, resource)
        return False

    # Ends.

    def _end(
        self, ticket: Ticket, outcome: Grant | BaseException | None = None, *, keeps: bool = False
    ) -> None:
        """End the wait of *ticket*: with a grant, with an error, or since its task has left.
        *keeps*: it was parked, and may have to come back.
        """
        del self.waiting[ticket]
        now, bids, ticket.bids = self._loop.time(), ticket.bids, ()
        if ticket.timer is not None:
            ticket.timer.cancel()
            ticket.timer = None
        for bid in bids:
            self._take_away(bid, now)
        if ticket.slot is not None:
            if isinstance(outcome, Grant):
                self._free_slot_unless(ticket, outcome, keeps=keeps)
            else:
                ticket.free_slot()
        # The position callback refers to the waiting task.
        ticket.outcome, ticket.reported, ticket.on_position = outcome, None, None
        if ticket.woken is not None and not ticket.woken.done():
            ticket.woken.set_result(None)
        self._serve_all()

    def _take_away(self, bid: Bid, now: float) -> None:
        """Remove *bid* from all queues, and record how long it has waited; call `_serve_all` next."""
        ticket, resource = bid.ticket, bid.resource
        if now > bid.since:
            if ticket.waited is None:
                ticket.waited = {}
            ticket.waited[resource] = ticket.waited.get(resource, 0.0) + now - bid.since
        _outermost(bid).away.pop(bid, None)
        if resource.drop(bid):
            # The next ticket may cost less, and the timer is that of the head.
            self._dirty[resource] = None
        if (inner := bid.inner) is not None:
            bid.inner = None
            self._dirty[inner.resource] = None
            inner.cancel(serve=False)
        # A bid must not keep its ticket alive: an entry for later stays until its time.
        bid.ticket = NOBODY

    def _withdraw(self, bid: Bid, error: Callable[[], BaseException]) -> None:
        """Withdraw *bid*; if that was its ticket's last bid, the ticket ends with *error*."""
        ticket = bid.ticket
        if not _waits(bid):
            return
        rest = [each for each in ticket.bids if each is not bid]
        if not rest:
            self._refuse(ticket, error)
            return
        ticket.bids = rest
        self._take_away(bid, self._loop.time())
        if ticket.slot is not None and not any(_leads_to(each, ticket.slot) for each in rest):
            ticket.free_slot()
            kept = self._roomiest(ticket, rest)
            queue = kept.resource
            if queue.room(ticket.kind) <= 0:
                # Its slot was in another queue.
                self._refuse(ticket, lambda: queue.refusal(Reason.FULL, kept, queue.retry_after()))
                return
            self._take_slot(ticket, queue)
        self._expire_at(ticket)
        self._serve_all()

    def _refuse(self, ticket: Ticket, error: Callable[[], BaseException]) -> None:
        """End the wait of *ticket* with *error*."""
        try:
            self._end(ticket, error())
        except Exception as bug:  # noqa: BLE001 - it is raised in the task that waits
            self._end(ticket, bug)

    def _expire_at(self, ticket: Ticket) -> None:
        """Set the timer for the earliest deadline of the bids."""
        when = min(bid.until for bid in ticket.bids)
        if ticket.timer is not None:
            ticket.timer.cancel()
        ticket.timer = self._loop.call_at(when, self._expire, ticket) if when < inf else None

    def _expire(self, ticket: Ticket) -> None:
        ticket.timer = None
        now = self._loop.time()
        overdue = now >= ticket.deadline - ROUNDING
        for bid in list(ticket.bids):
            # The ticket may have started elsewhere when another bid was withdrawn.
            if _waits(bid) and (overdue or bid.until <= now + ROUNDING):
                reason = Reason.DEADLINE if overdue else Reason.LATE
                late = bid.resource.refusal(reason, bid, bid.resource.retry_after())
                self._withdraw(bid, lambda late=late: late)  # type: ignore[misc]
        if ticket.bids and ticket.timer is None:
            self._expire_at(ticket)

    # Slots.

    def _take_slot(self, ticket: Ticket, resource: Resource) -> None:
        ticket.slot = resource
        resource.take_slots(ticket.kind)
        if resource.within is not None:
            resource.within.take_slots(ticket.kind)

    def _free_slot_unless(self, ticket: Ticket, grant: Grant, *, keeps: bool) -> None:
        """Give the slot back, unless *ticket* has started there and *keeps* it or is a trial: then
        it may have to come back.
        """
        slot, resource = ticket.slot, grant.resource
        assert slot is not None
        there = slot is resource or slot.within is resource
        if not (there and (keeps or resource.keeps())):
            ticket.free_slot()

    def _roomiest(self, ticket: Ticket, bids: Sequence[Bid]) -> Bid:
        return max(bids, key=lambda bid: bid.resource.room(ticket.kind))

    # Later.

    def _look_at(self, when: float) -> None:
        timer = self._later_timer
        if timer is None or when < self._later_at:
            if timer is not None:
                timer.cancel()
            # Not every timer knows its time.
            self._later_at = when
            self._later_timer = self._loop.call_at(when, self._come_all)

    def _come_all(self) -> None:
        self._later_timer = None
        now = self._loop.time()
        if len(self._later) > MAX_STALE + 2 * len(self.waiting):
            self._later = [each for each in self._later if _comes(each[2])]
            heapify(self._later)
        while self._later and self._later[0][0] <= now + ROUNDING:
            bid = heappop(self._later)[2]
            if _comes(bid):
                self._come(bid)
        if self._later:
            self._look_at(self._later[0][0])

    # Reports.

    def _report_first(self, ticket: Ticket) -> None:
        for bid in ticket.bids:
            if bid.standing and bid.at is None:
                resource, position = bid.resource, bid.resource.first_position(bid)
                bid.at = position, resource.eta(position, bid.index, position)
        self._tell(ticket)
        self._report_later()

    def _report_later(self) -> None:
        if self._report_timer is None:
            when = self._loop.time() + REPORT_INTERVAL
            self._report_timer = self._loop.call_at(when, self._report)

    def _report(self) -> None:
        self._report_timer = None
        listeners = [ticket for ticket in self.waiting if ticket.on_position is not None]
        resources = {bid.resource: None for ticket in listeners for bid in ticket.bids}
        for resource in resources:
            for bid, position, eta in resource.positions():
                bid.at = position, eta
        for ticket in listeners:
            self._tell(ticket)
        if listeners:
            self._report_later()

    def _tell(self, ticket: Ticket) -> None:
        """Report the best of the ticket's positions. The estimate of its start takes all resources
        to serve it in parallel.
        """
        known = [bid for bid in ticket.bids if bid.at is not None and bid.standing]
        if not known or ticket.on_position is None:
            return
        places = [cast("tuple[int, float]", bid.at) for bid in known]
        best = min(range(len(known)), key=lambda index: places[index][0])
        etas = [eta for _, eta in places]
        eta = 1 / sum(1 / each for each in etas) if all(etas) else 0.0
        news = known[best].resource, places[best][0], eta
        if ticket.reported != news:
            ticket.reported = news
            try:
                ticket.on_position(*news)
            except Exception as error:  # noqa: BLE001 - it is raised in the task that waits
                if ticket in self.waiting:
                    self._end(ticket, error)


def _have_room(ticket: Ticket, bids: Sequence[Bid]) -> bool:
    """Return whether a queue of *bids* has room for *ticket*."""
    return any(bid.resource.room(ticket.kind) > 0 for bid in bids)


def _admit(
    ticket: Ticket, bids: Sequence[Bid], now: float, *, room: bool
) -> tuple[list[Bid], list[tuple[float, int, BaseException]]]:
    """Return those of *bids* that may wait, if there is *room* for *ticket*, and the refusals of
    the others, each behind its `Retry-After` and its number.
    """
    joined: list[Bid] = []
    errors: list[tuple[float, int, BaseException]] = []
    for bid in bids:
        bid.ticket, bid.index = ticket, bid.resource.index(ticket)
        try:
            bid.resource.admit(bid, now, room=room)
        except Exception as error:  # noqa: BLE001 - the caller raises one of them
            errors.append((getattr(error, "retry_after", None) or 0.0, len(errors), error))
        else:
            joined.append(bid)
    return joined, errors


def _outcome(ticket: Ticket) -> Grant:
    """Return the grant by which the wait of *ticket* has ended, or raise its error; the outcome is
    delivered once.
    """
    outcome, ticket.outcome = ticket.outcome, None
    if isinstance(outcome, Grant):
        return outcome
    assert outcome is not None
    try:
        raise outcome
    finally:
        # Its traceback leads to this frame.
        del outcome


def _outermost(bid: Bid) -> Resource:
    """Return the resource that *bid* leads to: the outermost one around the one it waits for."""
    return bid.resource.within or bid.resource


def _leads_to(bid: Bid, resource: Resource) -> bool:
    """Return whether *bid* waits for *resource*, or for one within it."""
    return bid.resource is resource or bid.resource.within is resource


def _comes(bid: Bid) -> bool:
    """Return whether *bid*, which was to join later, still will."""
    return not bid.standing and _waits(bid)


def _waits(bid: Bid) -> bool:
    """Return whether the ticket of *bid* still waits by that bid."""
    return bid.ticket is not NOBODY and bid in bid.ticket.bids
