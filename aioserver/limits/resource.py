"""A resource: a number of slots that can be used at once, and the tickets that wait for them.

Connection slots, a key and a provider are resources. They differ in their arguments and not in
their class. The arguments are the capacity, the classes of tickets with the places of each, an
optional rate (starts or tokens per minute, the trials of a dead provider), and the texts of
refusals.

A resource may be *within* another one: the background slots of a provider are half of its slots. A
ticket that is granted an inner slot goes on to the outer resource, in front of its caller's other
tickets, and both grants are released together.

The capacity has one owner: our settings, which a reload replaces, or a *supply*, which shares one
limit among several processes. The owner calls `Scheduler.resize`. Nothing inherits from a
resource.

The queue is bounded by *slots*. A ticket takes one slot when it begins to wait, at one of the
resources that it bids for, and keeps it until it starts or leaves, whichever queues it stands in
meanwhile.

This file is one concept: the capacity, the grants and the waiting tickets of a resource are one
count.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Hashable, Sequence
from enum import Enum
from math import inf
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

import msgspec

from aioserver.limits.fair_queue import BATCH, INTERACTIVE, Charge, ClassQueue

if TYPE_CHECKING:
    from collections.abc import Iterator

    # It is called with the resource, the position there, and the estimated seconds until the start.
    PositionCallback = Callable[["Resource", int, float], None]

# The bounds in seconds of every estimate of when to come back.
RETRY_AFTER = (1.0, 60.0)
# The weight of the newest interval between two freed places in their moving average, and its bound.
SMOOTHING, LONGEST = 0.2, 60.0


class Reason(Enum):
    """Why a ticket is refused: the queue is full, it has waited too long, the rate is too slow for
    its deadline, or its own deadline has come.
    """

    FULL = "full"
    LATE = "late"
    SLOW = "slow"
    DEADLINE = "deadline"


class Class(NamedTuple):
    """A kind of ticket at a resource. *weight* is its share of the work while others wait. *places*
    returns how many places of a capacity it may use (None: all). *room* is its part of the queue.
    It waits for at most *patience* times `queue_timeout` (inf: until its deadline).
    """

    name: str
    weight: int = 1
    places: Callable[[int], int] | None = None
    room: float = 1.0
    patience: float = 1.0


def all_but_a_tenth(capacity: int) -> int:
    """Return the places of batch: all but a tenth, at least one, of two places or more."""
    return capacity - max(1, capacity // 10) if capacity > 1 else capacity


def half(capacity: int) -> int:
    """Return the places of answers in the background: half, at least one."""
    return max(1, capacity // 2) if capacity > 0 else 0


ONE_CLASS = (Class(INTERACTIVE),)
# Batch has a twentieth of the work while both wait.
BOTH_CLASSES = (Class(INTERACTIVE, 19), Class(BATCH, 1, all_but_a_tenth, 0.5, 10.0))


class Rate(Protocol):
    """A limit on the rate of starts, or on their cost: the pace of a provider with the trials of
    its breaker, or the starts and tokens of a key.
    """

    def delay(self, cost: int, ahead: int = 0) -> float:
        """Return the seconds until a start of *cost* is allowed with so many others *ahead*; inf:
        until `Scheduler.serve` is called.
        """

    def try_take(self, cost: int) -> object:
        """Count a start if it is allowed now, and return what was taken; None: it is not allowed.
        True: there is nothing to settle.
        """

    def settle(self, taken: object, spent: int | None) -> None:
        """Correct *taken*, once, to the tokens *spent*; None: it was not used at all."""


class Supply:
    """The part that shares one limit among several processes. It calls `Scheduler.resize` with the
    places that this process may use. Methods that a subclass does not override do nothing.
    """

    def check(self) -> None:
        """Lower the capacity if the grant of places has expired. It is called before each start."""

    def asked(self) -> None:
        """Set `Resource.elsewhere` and `Resource.grace`: a ticket cannot start at once, and is
        about to be queued or refused.
        """

    def changed(self) -> None:
        """Note that a ticket waits that cannot start, or has left without a start."""

    def freed(self) -> None:
        """Note that a place is about to become free: the supply may give it to another process."""

    def apply(self, limit: int) -> None:
        """Set another limit for all processes together."""

    def leave(self) -> None:
        """Take no more places; each place held is given back as its use ends."""

    def share(self, size: int) -> int:
        """Return this process's share of *size*, a number that is not lent between processes."""
        return size


class QueueStats(msgspec.Struct, frozen=True):
    """A snapshot of a resource; *oldest_wait* in seconds. *batch_waiting* of the *waiting* tickets
    are batch.
    """

    inside: int
    limit: int
    waiting: int
    queue_size: int
    oldest_wait: float
    refused: int
    batch_waiting: int = 0


class Places(msgspec.Struct, eq=False):
    """Places, of which *inside* are taken, and the rate at which they become free while all are
    taken.
    """

    limit: int
    clock: Callable[[], float]
    inside: int = 0
    interval: float = 1.0
    # When the last place was taken, or, while all are taken, when one became free last.
    full_since: float = 0.0

    def resize(self, limit: int) -> None:
        """Set the number of places; those that are taken stay taken."""
        if self.inside < self.limit:
            self.full_since = self.clock()
        self.limit = limit

    def take(self) -> None:
        """Take a place."""
        if self.inside + 1 == self.limit:
            self.full_since = self.clock()
        self.inside += 1

    def free(self) -> None:
        """Give a place back."""
        # Below the limit no ticket had to wait for the place, so its interval does not count.
        if self.inside >= self.limit:
            now = self.clock()
            newest = min(LONGEST, now - self.full_since)
            self.interval += SMOOTHING * (newest - self.interval)
            self.full_since = now
        self.inside -= 1

    def eta(self, position: int) -> float:
        """Estimate the seconds until so many places have become free."""
        return position * self.interval if self.inside >= self.limit else 0.0


class Ticket(msgspec.Struct, eq=False):
    """One request: its caller, and how long it may wait.

    Always: it waits for one set of bids at most, and that wait ends once, with a grant or an
    error. `Scheduler.close` releases all its grants.

    *kind* names its class. *work* is the estimate that is charged to its caller; 0: *estimate*
    returns it, and is called once a ticket waits. *arrived* is a time of the clock: a ticket that
    comes back stands where it would have stood. A ticket that *goes_on* continues an answer, and
    may enter while a resource closes. A *patient* one waits until its *deadline*, whatever the
    resource says.
    """

    caller: Hashable = None
    flow: Hashable = None
    weight: int = 1
    work: int = 1
    kind: str = ""
    arrived: float = 0.0
    deadline: float = inf
    goes_on: bool = False
    patient: bool = False
    estimate: Callable[[], int] | None = None
    # The grants that it holds.
    grants: dict[Grant, None] = msgspec.field(default_factory=dict)
    # The resource in whose queue its slot is, and the seconds that it has waited at each resource.
    slot: Resource | None = None
    waited: dict[Resource, float] | None = None
    # Its bids while it waits; *outcome* is how the wait has ended, until its task has read it.
    bids: Sequence[Bid] = ()
    timer: asyncio.TimerHandle | None = None
    woken: asyncio.Future[None] | None = None
    outcome: Grant | BaseException | None = None
    # The bid by which it has started last, and whether that bid had to wait.
    won: Bid | None = None
    queued: bool = False
    # What hears of its position while it waits, and the report that it heard last.
    on_position: PositionCallback | None = None
    reported: tuple[Resource, int, float] | None = None

    def cost(self) -> int:
        """Return its estimated work."""
        if not self.work:
            self.work = 1 if self.estimate is None else self.estimate()
        return self.work

    def waited_at(self, resource: Resource) -> float:
        """Return the seconds that it has waited at *resource*, and then at the resource that
        *resource* is within.
        """
        seconds, waited = 0.0, self.waited
        place: Resource | None = resource
        while waited and place is not None:
            seconds += waited.get(place, 0.0)
            place = place.within
        return seconds

    def free_slot(self) -> None:
        """Give its slot back: its request does not return."""
        if (resource := self.slot) is not None:
            self.slot = None
            resource.take_slots(self.kind, -1)
            if resource.within is not None:
                resource.within.take_slots(self.kind, -1)

    @property
    def left(self) -> bool:
        """Whether its task was cancelled, and has not run since."""
        return self.woken is not None and self.woken.cancelled()


# The ticket of a bid that does not wait yet, or no longer.
NOBODY = cast("Ticket", None)


class Bid(msgspec.Struct, eq=False):
    """A ticket's wish for one *resource*, where it counts *cost* for the rate.

    It joins the queue at *not_before*, a time of the clock. A bid that comes back stands in
    *front* of its caller's others. A *parked* bid waits for the resource to recover, and joins at
    once when `Scheduler.recover` is called. *movable* says that the request can go elsewhere.
    """

    resource: Resource
    cost: int = 0
    not_before: float = 0.0
    front: bool = False
    parked: bool = False
    movable: bool = False
    # Set while it waits: its ticket, and the ticket's class; since when and until when it waits;
    # its entry in the queue, with the seconds until its start; and its grant within the resource.
    ticket: Ticket = NOBODY
    index: int = 0
    since: float = 0.0
    until: float = 0.0
    standing: bool = False
    at: tuple[int, float] | None = None
    inner: Grant | None = None

    @property
    def rests(self) -> bool:
        """Whether it was queued before, and now waits only for *not_before*."""
        return self.front and not self.parked

    def began(self) -> float:
        """Return the start of its wait, as if its ticket's earlier waits there had come just
        before.
        """
        asked = self.resource if self.inner is None else self.inner.resource
        return self.since - self.ticket.waited_at(asked)


class Grant(msgspec.Struct, eq=False):
    """One use of a resource, which *ticket* holds until its end. It ends once, however often
    `release` or `cancel` is called.
    """

    _resource: Resource | None
    ticket: Ticket
    index: int = 0
    # The cost that the rate has counted, and the charge of the caller.
    taken: object = True
    charge: Charge[Bid] | None = None
    # The grant of a resource within this one.
    inner: Grant | None = None

    @property
    def resource(self) -> Resource:
        """The resource that granted it. It must not have ended."""
        assert self._resource is not None
        return self._resource

    def release(self, work: int | None = None, spent: int | None = None) -> None:
        """End it. Its request has cost so much *work* and has *spent* so many tokens; None: as
        estimated.
        """
        if (resource := self._resource) is not None:
            self._resource = None
            if spent is not None and self.taken is not True:
                resource.settle(self.taken, spent)
            resource.leave(self, work)

    def cancel(self, *, serve: bool = True) -> None:
        """End it unused: it costs nothing. Without *serve*, the caller must serve the next
        ticket.
        """
        if (resource := self._resource) is not None:
            self._resource = None
            if self.taken is not True:
                resource.settle(self.taken, None)
            resource.leave(self, 0, serve=serve)


class Resource:
    """Bounded in its capacity, in its queue, and in the time that a ticket waits; fair between
    callers. The scheduler drives it.

    Always: `inside` is at most the capacity, and the grants of each class are at most the places
    of the class, unless these were lowered since; no ticket waits while the next one could start.

    *refuse* makes the error of a refusal from its reason, the seconds after which to come back,
    and the bid. *serve* is called when a place has become free. *keeps* says whether tickets that
    start now keep their slots, since they are trials and may have to come back. *look* returns an
    error for a bid that joins later, if it can no longer be served. *reopens* estimates the
    seconds until a rate opens, if the rate itself does not know. *within* is the outer resource, if
    there is one. A queue of size 0 admits no ticket. All tickets of a *bare* resource have one
    caller that is never charged, and the holder of a place gives it back: `Scheduler.close` does
    not know of it. If places can be held by *idle* connections, the time between two freed places
    counts only while a ticket waits.
    """

    def __init__(
        self,
        name: str,
        capacity: int,
        *,
        queue_size: int,
        queue_timeout: float,
        refuse: Callable[[Reason, float, Bid], BaseException],
        serve: Callable[[Resource], None],
        clock: Callable[[], float],
        keeps: Callable[[], bool] = bool,
        look: Callable[[Bid], BaseException | None] = lambda _bid: None,
        reopens: Callable[[], float] = lambda: RETRY_AFTER[0],
        classes: Sequence[Class] = ONE_CLASS,
        rate: Rate | None = None,
        within: Resource | None = None,
        supply: Supply | None = None,
        bare: bool = False,
        idle: bool = False,
    ) -> None:
        self.name, self.queue_size, self.queue_timeout = name, queue_size, queue_timeout
        self.refuse, self.serve, self.clock, self.keeps = refuse, serve, clock, keeps
        self.look, self.reopens = look, reopens
        self.classes, self.rate, self.within = classes, rate, within
        self.supply, self.bare, self.idle = supply, bare, idle
        # Places that may be free in other processes, by which the queue may be longer; and the
        # seconds for which a ticket may wait that would otherwise be refused at once.
        self.elsewhere, self.grace = 0, 0.0
        # Makes the error for all arrivals after `close`, except those that go on with an answer if
        # it *finishes* answers.
        self.closed: Callable[[], BaseException] | None = None
        self.finishes = False
        # The number of refused tickets.
        self.refused = 0
        # The bids that are parked and not in the queue.
        self.away: dict[Bid, None] = {}
        # Fires when the head may start.
        self.timer: asyncio.TimerHandle | None = None
        self.places = Places(capacity, clock)
        # The places of each class, None for all.
        self.limits = [each.places and Places(each.places(capacity), clock) for each in classes]
        self._indices = {each.name: index for index, each in enumerate(classes)}
        self.queue: ClassQueue[Bid] = ClassQueue([each.weight for each in classes])
        # Grants that had no wait while no ticket waited: their callers are charged once a ticket
        # waits, or else at their end. Without a queue they are never charged.
        self._early: dict[Grant, None] = {}
        # The slots that are taken, of all and of each class.
        self.slots, self.class_slots = 0, [0 for _ in classes]

    def attach(self, supply: Supply | None) -> None:
        """Take the capacity from *supply* from now on; None: from our own settings."""
        self.supply = supply

    def close(self, error: Callable[[], BaseException], *, finishes: bool) -> None:
        """Refuse all arrivals from now on; see `Scheduler.shut`."""
        self.closed, self.finishes = error, finishes

    @property
    def inside(self) -> int:
        """The number of grants that have not ended."""
        return self.places.inside

    @property
    def limit(self) -> int:
        """The present capacity."""
        return self.places.limit

    @property
    def waiting(self) -> int:
        """The number of tickets that wait here, parked ones included."""
        return self.queue.size + len(self.away)

    def index(self, ticket: Ticket) -> int:
        """Return the class index of *ticket* here."""
        return self._indices.get(ticket.kind, 0)

    # Starts.

    def try_start(self, ticket: Ticket, cost: int = 0) -> Grant | None:
        """Return a grant if a place is free and no ticket waits for it."""
        if self.supply is not None:
            self.supply.check()
        places, queue = self.places, self.queue
        if places.inside >= places.limit or self.closed is not None:
            return None
        if queue.size and queue.queues[0].size:
            return None
        index, limit = 0, None
        if ticket.kind and (index := self.index(ticket)):
            limit = self.limits[index]
            if queue.size and any(each.size for each in queue.queues[1 : index + 1]):
                return None
            if limit is not None and limit.inside >= limit.limit:
                return None
        taken: object = True
        if self.rate is not None and (taken := self.rate.try_take(cost)) is None:
            return None
        outer: Grant | None = None
        if self.within is not None and (outer := self.within.try_start(ticket, cost)) is None:
            if taken is not True:
                self.settle(taken, None)
            return None
        grant = Grant(self, ticket, index, taken)
        try:
            if queue.size:
                grant.charge = self._charge(grant)
            elif self.queue_size and not self.bare:
                self._early[grant] = None
            if (inside := places.inside + 1) == places.limit:
                places.full_since = places.clock()
            if limit is not None:
                limit.take()
        except BaseException:
            self._early.pop(grant, None)
            if taken is not True:
                self.settle(taken, None)
            if outer is not None:
                outer.cancel()
            raise
        places.inside = inside
        if outer is not None:
            outer.inner = grant
            return outer
        if not self.bare:
            ticket.grants[grant] = None
        return grant

    def next(self) -> Bid | None:
        """Return the bid that is next, if there is a place for it."""
        if self.supply is not None:
            self.supply.check()
        queue, places = self.queue, self.places
        while queue.size and places.inside < places.limit:
            found = queue.next(self._is_closed)
            if found is None:
                return None
            if not found[1].ticket.left:
                return found[1]
            # The task of the ticket was cancelled in this turn of the loop: it is passed over.
            self.drop(found[1])
        return None

    def start(self, bid: Bid) -> Grant | None:
        """Start *bid*, the next one; return None if the rate does not allow it."""
        taken: object = True
        if self.rate is not None and (taken := self.rate.try_take(bid.cost)) is None:
            return None
        places, limit = self.places, self.limits[bid.index]
        inside, of_class = places.inside, 0 if limit is None else limit.inside
        try:
            _, charge = self.queue.pop(bid.index)
            bid.standing = False
            if self.bare:
                charge.settle()
            places.take()
            if limit is not None:
                limit.take()
        except BaseException:
            places.inside = inside
            if limit is not None:
                limit.inside = of_class
            if taken is not True:
                self.settle(taken, None)
            raise
        grant = Grant(self, bid.ticket, bid.index, taken)
        if self.bare:
            return grant
        grant.charge, grant.inner, bid.inner = charge, bid.inner, None
        if self.within is None:
            bid.ticket.grants[grant] = None
        return grant

    def settle(self, taken: object, spent: int | None) -> None:
        """Settle what the rate has *taken* for a start."""
        assert self.rate is not None
        self.rate.settle(taken, spent)

    def leave(self, grant: Grant, work: int | None, *, serve: bool = True) -> None:
        """Take *grant* back; its request has cost so much *work*; None: as estimated."""
        places = self.places
        if self.supply is not None:
            self.supply.freed()
        ticket, index = grant.ticket, grant.index
        if grant.charge is not None:
            grant.charge.settle(work)
        elif grant in self._early:
            # It had no wait, and no ticket has waited since.
            del self._early[grant]
            cost = ticket.cost() if work is None else work
            self.queue.queues[index].spend(ticket.caller, ticket.weight, cost)
        if index and (limit := self.limits[index]) is not None:
            limit.free()
        if places.inside >= places.limit and (self.queue.size or not self.idle):
            places.free()
        else:
            places.inside -= 1
        if self.within is None and not self.bare:
            del ticket.grants[grant]
            if grant.inner is not None:
                grant.inner.release(work)
        if serve and self.queue.size:
            self.serve(self)

    def _is_closed(self, index: int) -> bool:
        limit = self.limits[index]
        return limit is not None and limit.inside >= limit.limit

    def _charge(self, grant: Grant) -> Charge[Bid]:
        ticket = grant.ticket
        queue = self.queue.queues[grant.index]
        return queue.start(ticket.caller, ticket.flow, ticket.weight, ticket.cost())

    # The queue.

    def class_room(self, kind: str) -> int:
        """Return how many more slots the class *kind* may take, however full the queue is."""
        index = self._indices.get(kind, 0)
        return math.ceil(self.queue_size * self.classes[index].room) - self.class_slots[index]

    def room(self, kind: str) -> int:
        """Return for how many more tickets of the class *kind* there is room in the queue."""
        room = min(self.queue_size - self.slots, self.class_room(kind)) + self.elsewhere
        return room if self.within is None else min(room, self.within.room(kind))

    def ask(self) -> None:
        """Let the supply report places that may be free in other processes."""
        if self.supply is not None:
            self.supply.asked()
        if self.within is not None:
            self.within.ask()

    def take_slots(self, kind: str, count: int = 1) -> None:
        """Count so many more slots of the class *kind* as taken."""
        self.slots += count
        self.class_slots[self._indices.get(kind, 0)] += count

    def admit(self, bid: Bid, now: float, *, room: bool) -> None:
        """Set until when *bid* may wait here, if there is *room* for its ticket.

        Raises:
            BaseException: made by *refuse*; it may not wait, or could not start in time.
        """
        ticket, patience = bid.ticket, self.patience(bid.ticket, bid.index)
        if self.closed is not None and not (ticket.goes_on and self.finishes):
            raise self.closed()
        if ticket.deadline <= now:
            raise self.refusal(Reason.DEADLINE, bid, self.retry_after())
        # A ticket of an inner resource has waited at the outer one as well, each time it went on.
        seconds = patience - ticket.waited_at(self)
        if not room or seconds <= 0:
            if self.grace <= 0:
                raise self._no_wait(bid, seconds, patience)
            seconds = self.grace
        # A rest before a retry is no wait for the resource.
        bid.since = max(now, bid.not_before) if bid.rests else now
        bid.until = min(bid.since + seconds, ticket.deadline)
        left = bid.until - now
        delay = bid.not_before - now
        # The exact position takes a look at all callers; that of the last ticket often suffices.
        if self.rate is not None and self.rate.delay(bid.cost, self.queue.size) > left:
            delay = max(delay, self.rate.delay(bid.cost, self.first_position(bid) - 1))
        if left < delay < inf:
            raise self.refusal(Reason.SLOW, bid, delay)

    def patience(self, ticket: Ticket, index: int) -> float:
        """Return the seconds for which *ticket* may wait here, in the class at *index*."""
        patience = inf if ticket.patient else self.classes[index].patience
        return patience * self.queue_timeout if patience < inf else inf

    def _no_wait(self, bid: Bid, seconds: float, patience: float) -> BaseException:
        if seconds <= 0 < patience:
            return self.refusal(Reason.LATE, bid, self.retry_after())
        if (
            not self.queue_size
            and not self.queue.size
            and self.rate is not None
            and self.places.inside < self.places.limit
        ):
            # The queue has no slots: the refusal names the rate, which is what is missing.
            return self.refusal(Reason.SLOW, bid, self.rate.delay(bid.cost))
        return self.refusal(Reason.FULL, bid, self.retry_after())

    def no_wait(self, ticket: Ticket, cost: int = 0) -> BaseException:
        """Return the error of *ticket*, which could not start, at a resource without a queue."""
        if self.closed is not None:
            return self.closed()
        return self._no_wait(self.bid(ticket, cost), 0.0, 0.0)

    def bid(self, ticket: Ticket, cost: int = 0) -> Bid:
        """Return a bid of *ticket*, for the text of a refusal."""
        return Bid(self, cost, ticket=ticket, index=self.index(ticket))

    def refusal(self, reason: Reason, bid: Bid, seconds: float) -> BaseException:
        """Count a refusal, and return its error; *seconds* inf: the time to come back is unknown."""
        self.refused += 1
        return self.refuse(reason, self.retry_after() if seconds == inf else seconds, bid)

    def stand(self, bid: Bid) -> None:
        """Let *bid* wait in the queue."""
        for grant in self._early:
            grant.charge = self._charge(grant)
        self._early.clear()
        if self.idle and not self.queue.size:
            self.places.full_since = self.clock()
        ticket = bid.ticket
        bid.standing = True
        arrived = ticket.arrived if bid.front else None
        queue = self.queue
        work = ticket.cost()
        queue.add(bid.index, bid, ticket.caller, ticket.flow, ticket.weight, work, arrived)

    def drop(self, bid: Bid) -> bool:
        """Take *bid* out of the queue; return whether it was there."""
        if not bid.standing:
            return False
        bid.standing = False
        self.queue.remove(bid.index, bid, bid.ticket.caller, bid.ticket.flow)
        if self.supply is not None:
            self.supply.changed()
        return True

    # Reports.

    def first_position(self, bid: Bid) -> int:
        """Estimate the position of *bid*, which is in the queue or about to join it."""
        ticket, queue = bid.ticket, self.queue
        if not queue.size:
            return 1
        arrived = ticket.arrived if bid.front else None
        own = queue.queues[bid.index].position(
            ticket.caller, ticket.flow, arrived, waits=bid.standing
        )
        return queue.position(bid.index, own)

    def eta(self, position: int, index: int = 0, own: int = 0) -> float:
        """Estimate the seconds until the ticket at *position* starts, the *own*-th of its class."""
        wait = self.places.eta(position)
        if (limit := self.limits[index]) is not None:
            wait = max(wait, limit.eta(own))
        if self.rate is not None:
            delay = self.rate.delay(0, position - 1)
            wait = max(wait, delay if delay < inf else self.reopens())
        return wait

    def retry_after(self) -> float:
        """Return the seconds until one more ticket may find a place, with jitter: the refused
        clients are not to come back at once.
        """
        low, high = RETRY_AFTER
        estimate = self.eta(self.queue.size + 1)
        return min(high, max(low, estimate) * random.uniform(1.0, 1.5))  # noqa: S311 - jitter

    def positions(self) -> Iterator[tuple[Bid, int, float]]:
        """Iterate over the waiting bids, each with its position and the seconds until its start."""
        own = [0 for _ in self.classes]
        for position, bid in enumerate(self.queue.order(), 1):
            own[bid.index] += 1
            yield bid, position, self.eta(position, bid.index, own[bid.index])

    def stats(self) -> QueueStats:
        """Return a snapshot."""
        heads = [bid for queue in self.queue.queues for bid in queue.heads()]
        oldest = min((bid.began() for bid in (*heads, *self.away)), default=None)
        batch = self._indices.get(BATCH)
        return QueueStats(
            inside=self.places.inside,
            limit=self.places.limit,
            waiting=self.waiting,
            queue_size=self.queue_size,
            oldest_wait=0.0 if oldest is None else self.clock() - oldest,
            refused=self.refused,
            batch_waiting=0 if batch is None else self.queue.queues[batch].size,
        )
