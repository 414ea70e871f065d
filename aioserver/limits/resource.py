"""A resource: something of which only so many can be used at once, and the tickets that wait for it.

Connection slots, a key and a provider are resources. They differ in their arguments and not in
their class: in capacity, in the classes of tickets and what each class may use, in an optional rate
(starts or tokens per minute, the trials of a dead provider), and in the words of their refusals.

A resource may be *within* another one: the background slots of a provider are half of its slots. A
ticket that is granted one goes on to the outer resource, in front of its caller's others, and both
are released together.

The capacity may be ours or somebody else's: a reload, or a *supply* that shares one limit among
several processes. Whoever owns it calls `Scheduler.resize`. Nothing inherits from a resource.

The queue is bounded by *slots*. A ticket takes one slot when it begins to wait, at one of the
resources that it bids for, and keeps it until it starts or leaves, wherever it stands meanwhile.

This file is one concept: what a resource has, what is granted of it, and who waits for it are one
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

# The bounds in seconds of every estimate of when to come back.
RETRY_AFTER = (1.0, 60.0)
# The weight of the newest interval between two freed places in their moving average, and its bound.
SMOOTHING, LONGEST = 0.2, 60.0


class Reason(Enum):
    """Why a ticket is refused: there is no room to wait, it has waited too long, its rate is too
    slow for its deadline, or its own deadline has come.
    """

    FULL = "full"
    LATE = "late"
    SLOW = "slow"
    DEADLINE = "deadline"


class Class(NamedTuple):
    """A kind of ticket at a resource. *weight* is its part of the work while others wait, *places*
    what it may use of a capacity (None: all), *room* its part of the queue, *patience* how many
    times as long as `queue_timeout` it waits (inf: until its deadline).
    """

    name: str
    weight: int = 1
    places: Callable[[int], int] | None = None
    room: float = 1.0
    patience: float = 1.0


def all_but_a_tenth(capacity: int) -> int:
    """Return what batch may use: all but a tenth, at least one, of two places or more."""
    return capacity - max(1, capacity // 10) if capacity > 1 else capacity


def half(capacity: int) -> int:
    """Return what answers in the background may use: half, at least one."""
    return max(1, capacity // 2) if capacity > 0 else 0


ONE_CLASS = (Class(INTERACTIVE),)
# Batch has a twentieth of the work while both wait.
BOTH_CLASSES = (Class(INTERACTIVE, 19), Class(BATCH, 1, all_but_a_tenth, 0.5, 10.0))


class Rate(Protocol):
    """How fast starts may follow each other, or how much they may spend: a provider's pace with the
    trials of its breaker; a key's starts and tokens.
    """

    def delay(self, cost: int, ahead: int = 0) -> float:
        """Return the seconds until a start of *cost* is allowed that has so many others *ahead*;
        inf: until `Scheduler.serve` is called.
        """

    def try_take(self, cost: int) -> object:
        """Count a start, if it is allowed now; return what was taken, and None if nothing was.
        True: nothing is to be settled.
        """

    def settle(self, taken: object, spent: int | None) -> None:
        """Correct, once, what was taken: so much was *spent*; None: it was not used at all."""


class Supply:
    """The part that shares one limit among several processes. It calls `Scheduler.resize` with the places
    that this process may use. What an heir does not override does nothing.
    """

    def check(self) -> None:
        """Lower the capacity if what was granted holds no more; called before each start."""

    def asked(self) -> None:
        """Set `Resource.elsewhere` and `Resource.grace`: a ticket cannot start at once, and asks
        whether it may wait.
        """

    def changed(self) -> None:
        """Hear that a ticket waits that cannot start, or has left without a start."""

    def freed(self) -> None:
        """Hear that a place is about to become free: it may be given to others."""

    def apply(self, limit: int) -> None:
        """Use another limit, which all processes have together."""

    def leave(self) -> None:
        """Take no more places: each is given back as it ends."""

    def share(self, size: int) -> int:
        """Return what this process has of *size*, which is not lent to and fro."""
        return size


class QueueStats(msgspec.Struct, frozen=True):
    """A snapshot of a resource; *oldest_wait* in seconds. Of those *waiting*, *batch_waiting* are
    batch.
    """

    inside: int
    limit: int
    waiting: int
    queue_size: int
    oldest_wait: float
    refused: int
    batch_waiting: int = 0


class Places(msgspec.Struct, eq=False):
    """Places, of which *inside* are taken, and how fast they become free while all are."""

    limit: int
    clock: Callable[[], float]
    inside: int = 0
    interval: float = 1.0
    # Since when all are taken, or when one became free last while they were.
    full_since: float = 0.0

    def resize(self, limit: int) -> None:
        """Have so many places; those that are taken stay taken."""
        if self.inside < self.limit:
            self.full_since = self.clock()
        self.limit = limit

    def take(self) -> None:
        """Take one."""
        if self.inside + 1 == self.limit:
            self.full_since = self.clock()
        self.inside += 1

    def free(self) -> None:
        """Give one back."""
        # Below the limit nobody had to wait for it, so its interval does not count.
        if self.inside >= self.limit:
            now = self.clock()
            newest = min(LONGEST, now - self.full_since)
            self.interval += SMOOTHING * (newest - self.interval)
            self.full_since = now
        self.inside -= 1

    def eta(self, position: int) -> float:
        """Estimate the seconds until so many have become free."""
        return position * self.interval if self.inside >= self.limit else 0.0


class Ticket(msgspec.Struct, eq=False):
    """One request: who asks, and until when it may wait.

    Always: it waits for one set of bids at most, which ends once: with a grant or an error. What
    it holds is released by `Scheduler.close`, wherever it is.

    *kind* names its class, *work* is what it is estimated to cost its caller's share; 0: what
    *estimate* returns, which is called once somebody waits. It *arrived* at that time of the
    clock: when it comes back, it stands where it would have stood. A ticket
    that *goes_on* with what has begun may still enter while a resource closes. *on_position* is
    called with the resource, the position there, and the seconds until the start, by an estimate.
    """

    caller: Hashable = None
    flow: Hashable = None
    weight: int = 1
    work: int = 1
    kind: str = ""
    arrived: float = 0.0
    deadline: float = inf
    goes_on: bool = False
    estimate: Callable[[], int] | None = None
    on_position: Callable[[Resource, int, float], None] | None = None
    # What it holds.
    grants: dict[Grant, None] = msgspec.field(default_factory=dict)
    # The resource in whose queue its slot is, and the seconds that it has waited at each.
    slot: Resource | None = None
    waited: dict[Resource, float] | None = None
    # While it waits; *outcome* is how the wait has ended, until its task hears of it.
    bids: Sequence[Bid] = ()
    timer: asyncio.TimerHandle | None = None
    woken: asyncio.Future[None] | None = None
    outcome: Grant | BaseException | None = None
    # The bid by which it has started last, and whether it had to wait for that.
    won: Bid | None = None
    queued: bool = False
    reported: tuple[Resource, int, float] | None = None

    def cost(self) -> int:
        """Return its work."""
        if not self.work:
            self.work = 1 if self.estimate is None else self.estimate()
        return self.work

    def free_slot(self) -> None:
        """Take no slot any more: its request does not come back."""
        if (resource := self.slot) is not None:
            self.slot = None
            resource.take_slots(self.kind, -1)
            if resource.within is not None:
                resource.within.take_slots(self.kind, -1)

    @property
    def left(self) -> bool:
        """Whether its task has given up, and has not run since."""
        return self.woken is not None and self.woken.cancelled()


# The ticket of a bid that waits no more, or not yet.
NOBODY = cast("Ticket", None)


class Bid(msgspec.Struct, eq=False):
    """A ticket's wish for one *resource*, where it counts *cost* for the rate.

    It joins the queue at *not_before*, a time of the clock. One that comes back stands in *front*
    of its caller's others. One that is *parked* waits for the resource to recover, and joins at
    once when `Scheduler.recover` is called. *movable* says that the request can go elsewhere.
    """

    resource: Resource
    cost: int = 0
    not_before: float = 0.0
    front: bool = False
    parked: bool = False
    movable: bool = False
    # Its ticket once that has bid, and the class of it; since when and until when it waits; where it
    # stands, with the seconds until its start; and its grant within the resource.
    ticket: Ticket = NOBODY
    index: int = 0
    since: float = 0.0
    until: float = 0.0
    standing: bool = False
    at: tuple[int, float] | None = None
    inner: Grant | None = None

    @property
    def rests(self) -> bool:
        """Whether it was there before, and waits for nothing but its time."""
        return self.front and not self.parked

    def began(self, resource: Resource) -> float:
        """Return since when it waits, as if its former waits at *resource* had come just before."""
        waited = self.ticket.waited
        return self.since - (0.0 if waited is None else waited.get(resource, 0.0))


class Grant(msgspec.Struct, eq=False):
    """One use of a resource, which *ticket* holds until its end. It ends once, however often
    `release` or `cancel` is called.
    """

    _resource: Resource | None
    ticket: Ticket
    index: int = 0
    # What the rate has counted, and with what its caller was charged.
    taken: object = True
    charge: Charge[Bid] | None = None
    # That of a resource within this one.
    inner: Grant | None = None

    @property
    def resource(self) -> Resource:
        """What it is a grant of. It has not ended."""
        assert self._resource is not None
        return self._resource

    def release(self, work: int | None = None, spent: int | None = None) -> None:
        """End it: its request has cost so much *work* and has *spent* so many tokens; None: what
        was estimated.
        """
        if (resource := self._resource) is not None:
            self._resource = None
            if spent is not None and self.taken is not True:
                resource.settle(self.taken, spent)
            resource.leave(self, work)

    def cancel(self, *, serve: bool = True) -> None:
        """End it as one that was not used: it has cost nothing. Unless this is to *serve* who is
        next, the caller does.
        """
        if (resource := self._resource) is not None:
            self._resource = None
            if self.taken is not True:
                resource.settle(self.taken, None)
            resource.leave(self, 0, serve=serve)


class Resource:
    """Bounded in its capacity, in its queue, and in the time that a ticket waits; fair between
    callers. The scheduler drives it.

    Always: `inside` is at most the capacity, and that of each class at most what the class may
    use, unless these were lowered since; no ticket waits while the next one could start.

    *refuse* makes the error of a refusal: its reason, the seconds after which to come back, and
    the bid. *serve* is called when a place has become free. *keeps* says whether tickets that
    start now keep their slots, since they may have to come back: they are trials. *look* returns
    the error of a bid that comes later, if something has come up against it meanwhile. *reopens*
    estimates the seconds until a rate opens where the rate itself does not know. It is a *part* of
    what it is *within*. A queue of size 0 lets nobody wait. Of a *bare* one all tickets have one
    caller, whom nobody charges, and whoever is granted a place gives it back: `Scheduler.close`
    does not know of it. Where places are taken by what may be *idle*, the time between two that
    become free counts only while somebody waits.
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
        part: Callable[[int], int] | None = None,
        supply: Supply | None = None,
        bare: bool = False,
        idle: bool = False,
    ) -> None:
        self.name, self.queue_size, self.queue_timeout = name, queue_size, queue_timeout
        self.refuse, self.serve, self.clock, self.keeps = refuse, serve, clock, keeps
        self.look, self.reopens = look, reopens
        self.classes, self.rate, self.within, self.part = classes, rate, within, part
        self.supply, self.bare, self.idle = supply, bare, idle
        # How many places may be free in other processes: so much longer may the queue be; and for
        # how many seconds a ticket may wait that would be refused at once otherwise.
        self.elsewhere, self.grace = 0, 0.0
        # Makes the error of all who come once it is shut, but for those who go on with what has
        # begun if it *finishes* that.
        self.closed: Callable[[], BaseException] | None = None
        self.finishes = False
        # How many tickets were refused.
        self.refused = 0
        # The bids that are parked, and do not stand in the queue.
        self.away: dict[Bid, None] = {}
        # Fires when the head may start.
        self.timer: asyncio.TimerHandle | None = None
        self.places = Places(capacity, clock)
        # What each class may use, None for all.
        self.limits = [each.places and Places(each.places(capacity), clock) for each in classes]
        self._indices = {each.name: index for index, each in enumerate(classes)}
        self.queue: ClassQueue[Bid] = ClassQueue([each.weight for each in classes])
        # Grants that were had without a wait while nobody waited: their callers are charged once
        # somebody waits, or else at their end. Without a queue nobody is charged.
        self._early: dict[Grant, None] = {}
        # The slots that are taken, of all and of each class.
        self.slots, self.class_slots = 0, [0 for _ in classes]
        # The resources within this one.
        self.inner: list[Resource] = []
        # Whether a start takes nothing but a place.
        self._plain = False
        self._note_plain()
        if within is not None:
            within.inner.append(self)

    def attach(self, supply: Supply | None) -> None:
        """Have the capacity from *supply* from now on; None: it is our own."""
        self.supply = supply
        self._note_plain()

    def close(self, error: Callable[[], BaseException], *, finishes: bool) -> None:
        """Refuse all who come from now on; see `Scheduler.shut`."""
        self.closed, self.finishes = error, finishes
        self._note_plain()

    def _note_plain(self) -> None:
        others = self.supply, self.closed, self.rate, self.within, *self.limits
        self._plain = self.bare and not any(others)

    @property
    def inside(self) -> int:
        """How many grants have not ended."""
        return self.places.inside

    @property
    def limit(self) -> int:
        """The capacity now."""
        return self.places.limit

    @property
    def waiting(self) -> int:
        """How many tickets wait here, those that are parked included."""
        return self.queue.size + len(self.away)

    def index(self, ticket: Ticket) -> int:
        """Return the class of *ticket* here."""
        return self._indices.get(ticket.kind, 0)

    # Starts.

    def try_start(self, ticket: Ticket, cost: int = 0) -> Grant | None:
        """Return a grant if one is free and nobody waits for it."""
        places = self.places
        if self._plain:
            if places.inside >= places.limit or self.queue.size:
                return None
            places.take()
            return Grant(self, ticket)
        if self.supply is not None:
            self.supply.check()
        queue = self.queue
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
            # Its task leaves in this turn of the loop: it is passed over.
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
        """Correct what the rate has *taken* for a start."""
        assert self.rate is not None
        self.rate.settle(taken, spent)

    def leave(self, grant: Grant, work: int | None, *, serve: bool = True) -> None:
        """Take *grant* back, whose request has cost so much *work*; None: what was estimated."""
        places = self.places
        if self._plain:
            if places.inside >= places.limit and (self.queue.size or not self.idle):
                places.free()
            else:
                places.inside -= 1
            if serve and self.queue.size:
                self.serve(self)
            return
        if self.supply is not None:
            self.supply.freed()
        ticket, index = grant.ticket, grant.index
        if grant.charge is not None:
            grant.charge.settle(work)
        elif grant in self._early:
            # It was had without a wait, and nobody has waited since.
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
        """Return how many more slots the class *kind* may have, however full the queue is."""
        index = self._indices.get(kind, 0)
        return math.ceil(self.queue_size * self.classes[index].room) - self.class_slots[index]

    def room(self, kind: str) -> int:
        """Return for how many more tickets of the class *kind* the queue has room."""
        room = min(self.queue_size - self.slots, self.class_room(kind)) + self.elsewhere
        return room if self.within is None else min(room, self.within.room(kind))

    def ask(self) -> None:
        """Have the supply say what other processes may have free."""
        if self.supply is not None:
            self.supply.asked()
        if self.within is not None:
            self.within.ask()

    def take_slots(self, kind: str, count: int = 1) -> None:
        """Count so many more slots of the class *kind* as taken."""
        self.slots += count
        self.class_slots[self._indices.get(kind, 0)] += count

    def admit(self, bid: Bid, now: float, *, room: bool) -> None:
        """Set until when *bid* may wait here, where there is *room* for its ticket.

        Raises:
            BaseException: made by *refuse*: it may not wait, or could not start in time.
        """
        ticket, patience = bid.ticket, self.classes[bid.index].patience
        if patience < inf:
            patience *= self.queue_timeout
        if self.closed is not None and not (ticket.goes_on and self.finishes):
            raise self.closed()
        if ticket.deadline <= now:
            raise self.refusal(Reason.DEADLINE, bid, self.retry_after())
        seconds = patience
        if ticket.waited is not None:
            seconds -= ticket.waited.get(self, 0.0)
        if not room or seconds <= 0:
            if self.grace <= 0:
                raise self._no_wait(bid, seconds, patience)
            seconds = self.grace
        # A rest before a retry is no wait for the resource.
        bid.since = max(now, bid.not_before) if bid.rests else now
        bid.until = min(bid.since + seconds, ticket.deadline)
        left = bid.until - now
        delay = bid.not_before - now
        # The true position costs a look at all callers: that of the last one often does.
        if self.rate is not None and self.rate.delay(bid.cost, self.queue.size) > left:
            delay = max(delay, self.rate.delay(bid.cost, self.first_position(bid) - 1))
        if left < delay < inf:
            raise self.refusal(Reason.SLOW, bid, delay)

    def _no_wait(self, bid: Bid, seconds: float, patience: float) -> BaseException:
        if seconds <= 0 < patience:
            return self.refusal(Reason.LATE, bid, self.retry_after())
        if (
            not self.queue_size
            and not self.queue.size
            and self.rate is not None
            and self.places.inside < self.places.limit
        ):
            # Nobody may wait here: the refusal names what is missing.
            return self.refusal(Reason.SLOW, bid, self.rate.delay(bid.cost))
        return self.refusal(Reason.FULL, bid, self.retry_after())

    def no_wait(self, ticket: Ticket, cost: int = 0) -> BaseException:
        """Return the error of *ticket*, which could not start, where nobody may wait."""
        if self.closed is not None:
            return self.closed()
        return self._no_wait(self.bid(ticket, cost), 0.0, 0.0)

    def bid(self, ticket: Ticket, cost: int = 0) -> Bid:
        """Return a bid of *ticket*, for the words of a refusal."""
        return Bid(self, cost, ticket=ticket, index=self.index(ticket))

    def refusal(self, reason: Reason, bid: Bid, seconds: float) -> BaseException:
        """Return the error of a ticket that is refused here, and count it; *seconds* inf: nobody
        knows when it may come back.
        """
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
        """Let *bid* wait here no more; return whether it stood here."""
        if not bid.standing:
            return False
        bid.standing = False
        self.queue.remove(bid.index, bid, bid.ticket.caller, bid.ticket.flow)
        if self.supply is not None:
            self.supply.changed()
        return True

    # Reports.

    def first_position(self, bid: Bid) -> int:
        """Estimate the position of *bid*, which stands here or is about to."""
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
        """Iterate over those that wait, each with its position and the seconds until its start."""
        own = [0 for _ in self.classes]
        for position, bid in enumerate(self.queue.order(), 1):
            own[bid.index] += 1
            yield bid, position, self.eta(position, bid.index, own[bid.index])

    def stats(self) -> QueueStats:
        """Return a snapshot."""
        heads = [bid for queue in self.queue.queues for bid in queue.heads()]
        oldest = min((bid.began(self) for bid in (*heads, *self.away)), default=None)
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
