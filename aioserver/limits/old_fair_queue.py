"""Fair queueing by work: virtual token counters, for callers by weight, and for the flows of each.

This file is one concept: counters, the two levels at which they count, and the items whose order
they are.

Algorithm: Sheng, Cao, Li, Zhu, Li, Zhuo, Gonzalez, Stoica, "Fairness in Serving Large Language
Models", OSDI 2024, the weighted one with predicted lengths. Each caller has a counter. Of those
with an item that waits, the one with the smallest counter is served. Its counter grows by the
estimated work of the item, divided by the caller's weight, when the item starts, and is corrected
by the error of the estimate when it ends. So a caller whose requests are fifty times as dear gets
a fiftieth of the starts, a caller of weight 3 gets three times the work of a caller of weight 1,
and a thousand waiting items delay another caller by one item at most.

What work is, callers decide, by one rule: the tokens of a prompt, and twice those of the answer,
which are the paper's factors; what comes from a cache is no work (Cao et al., "Locality-aware Fair
Scheduling in LLM Serving", 2025, arXiv 2501.14312).

A caller that begins to wait gets the counter that was served last (the *virtual time*) if its own
is smaller: it saves nothing up while it is away. The paper takes the smallest counter of those
that wait; ours is that of start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996), it is the
same but for corrections, and needs no search. Virtual time never falls, though counters may. A
start without a wait is charged in the same way. One that has ended before anybody waited is charged
to its caller by what it has cost, and to no flow: the flows of a caller begin level when its items
wait, but for those that run.

    With N starts under way at most, U the dearest item (its work or its estimate) and E the
    largest error of an estimate, two callers that both wait throughout a span have started work
    that differs by 2 (U + N E) at most, each divided by its weight.

It holds since the counters of two that wait are never further apart than U + N E: the one that is
ahead was the smaller one when it was served last, and has grown since by one item, and both by
corrections of what ran then. The flows of a caller (the users of one key, for example) share what
it gets by the same rule, each with weight 1.

Counters are whole numbers, since their order must be exact: a unit of work is 2520 / weight, which
has no remainder for the weights 1 to 10.

    charge = queue.start(caller, flow, weight, work)      # without a wait
    queue.spend(caller, weight, cost)                     # the same, and it has ended already
    queue.add(item, caller, flow, weight, work)           # with one
    item, charge = queue.pop(gone)
    charge.settle(cost)                                   # what it has cost, once it has ended
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from heapq import heapify, heappop, heappush, heapreplace, nlargest
from itertools import islice
from types import MappingProxyType
from typing import TYPE_CHECKING, Generic, TypeVar

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Mapping

T = TypeVar("T")
# A unit of work at weight 1: the least common multiple of 1 to 10.
LENGTH = 2520
MAX_WEIGHT = 10
# Stale entries, and counters of callers that neither wait nor run, that are kept before they are
# swept: a sweep at each departure would cost O(callers).
MAX_STALE = 64
# The classes of requests: each waits in a queue of its own (limits/gate.py).
INTERACTIVE, BATCH = "interactive", "batch"
NOTHING: Mapping[Hashable, int] = MappingProxyType({})


class _Counter:
    """What a caller or a flow has started, in virtual time: its *tag*.

    *waiting* and *work* are the number and the estimates of its items, *running* counts its starts
    that have not ended. Of two with the same tag the one that began to wait first is served first:
    its *serial* is smaller. *length* is a unit of its work in virtual time.
    """

    __slots__ = ("length", "running", "serial", "tag", "waiting", "work")

    def __init__(self, tag: int, length: int) -> None:
        self.tag = tag
        self.length = length
        self.serial = self.waiting = self.work = self.running = 0

    def served_before(self, tag: int, serial: int) -> int:
        """Return how many of its items are served before one of another counter with *tag*, if
        each has their mean work.
        """
        ahead = (tag - self.tag) * self.waiting
        if ahead < 0 or not self.waiting:
            return 0
        # All items with a smaller tag, and one with the same tag if this counter comes first.
        step = self.work * self.length
        items = -(-ahead // step)
        if self.serial < serial and ahead % step == 0:
            items += 1
        return min(items, self.waiting)


class _Flow(_Counter, Generic[T]):
    """A flow: its items, but for those at the front of its caller, each with its work."""

    __slots__ = ("items",)

    def __init__(self, tag: int, length: int) -> None:
        super().__init__(tag, length)
        self.items: OrderedDict[T, int] = OrderedDict()


class _Caller(_Counter, Generic[T]):
    """A caller: the items at its *front*, each with its flow and work, and its flows.

    The first of the front is the one that came first, as *times* has them.
    """

    __slots__ = ("flows", "front", "times")

    def __init__(self, tag: int, length: int) -> None:
        super().__init__(tag, length)
        self.front: dict[T, tuple[Hashable, int, tuple[float, int]]] = {}
        self.times: list[tuple[tuple[float, int], T]] = []
        self.flows: _Turns[_Flow[T]] = _Turns(_Flow)

    def put_in_front(self, item: T, flow: Hashable, work: int, came: tuple[float, int]) -> None:
        """Let *item* stand at the front, behind those that *came* before it."""
        self.front[item] = flow, work, came
        insort(self.times, (came, item), key=_time)

    def take_from_front(self, item: T) -> tuple[Hashable, int]:
        """Let *item* stand at the front no more; return its flow and work."""
        flow, work, came = self.front.pop(item)
        del self.times[bisect_left(self.times, came, key=_time)]
        return flow, work

    def rest(self) -> None:
        """Forget what its flows have started, since nothing of it waits or runs: none of them is
        ahead of another one then.
        """
        flows = self.flows
        if len(flows.counters) > 1:
            self.flows = _Turns(_Flow)
            return
        for flow in flows.counters.values():
            flow.tag = flows.virtual
        flows.idle = len(flows.counters)

    def order(self) -> Iterator[tuple[T, int]]:
        """Iterate over its items in their order, each with its work."""
        ahead: dict[Hashable, int] = {}
        for _, item in self.times:
            flow, work, _ = self.front[item]
            ahead[flow] = ahead.get(flow, 0) + work * LENGTH
            yield item, work
        yield from self.flows.order(lambda flow: iter(flow.items.items()), ahead)


def _time(place: tuple[tuple[float, int], object]) -> tuple[float, int]:
    return place[0]


C = TypeVar("C", bound=_Counter)


class _Turns(Generic[C]):
    """Counters by name, of which the smallest one that waits is next.

    Always: `_heap` has a valid entry for each counter that waits (others in it are stale, and
    skipped); `virtual` never falls; at most MAX_STALE counters more than those that wait or run
    are known.
    """

    __slots__ = ("_heap", "_make", "_serials", "counters", "idle", "virtual")

    def __init__(self, make: Callable[[int, int], C]) -> None:
        self._make = make
        self.counters: dict[Hashable, C] = {}
        self._heap: list[tuple[int, int, C]] = []
        # How many counters neither wait nor run.
        self.idle = 0
        self._serials = 0
        self.virtual = 0

    def active(self, name: Hashable, length: int = LENGTH) -> C:
        """Return the counter *name*, which is about to wait or to start."""
        counter = self.counters.get(name)
        if counter is None:
            return self.made(name, length)
        if not (counter.running or counter.waiting):
            self.idle -= 1
        # The newest weight holds.
        counter.length = length
        return counter

    def made(self, name: Hashable, length: int = LENGTH) -> C:
        """Return a new counter, which is about to wait or to start."""
        counter = self.counters[name] = self._make(self.virtual, length)
        return counter

    def waits(self, counter: C, work: int) -> None:
        """Let *counter* wait with one more item of so much *work*."""
        counter.work += work
        counter.waiting += 1
        if counter.waiting == 1:
            counter.tag = max(counter.tag, self.virtual)
            counter.serial = self._serials
            self._serials += 1
            self.push(counter)

    def start(self, counter: C, work: int) -> None:
        """Charge *counter*, none of whose items waits, with a start."""
        self.virtual = max(self.virtual, counter.tag)
        counter.tag = self.virtual + work * counter.length
        counter.running += 1

    def start_early(self, counter: C, work: int) -> None:
        """Charge *counter* with a start that comes before its turn, which says nothing of the
        turns of others: virtual time stays.
        """
        if not counter.waiting:
            counter.tag = max(counter.tag, self.virtual)
        counter.tag += work * counter.length
        counter.running += 1
        if counter.waiting:
            self.push(counter)

    def first(self) -> C:
        """Return the next counter; there is one that waits."""
        while True:
            tag, serial, counter = self._heap[0]
            if counter.waiting and (counter.tag, counter.serial) == (tag, serial):
                return counter
            heappop(self._heap)

    def serve(self, counter: C, work: int) -> None:
        """Charge *counter*, the next, with the start of an item that waited."""
        counter.work -= work
        counter.waiting -= 1
        self.virtual = max(self.virtual, counter.tag)
        counter.tag += work * counter.length
        counter.running += 1
        if counter.waiting:
            self.push(counter)

    def ends(self, counter: C, more: int) -> None:
        """Charge *counter* with so much *more* in virtual time, since a start has ended."""
        counter.tag += more
        counter.running -= 1
        if more and counter.waiting:
            self.push(counter)
        if not (counter.waiting or counter.running):
            self.rests()

    def leaves(self, counter: C, work: int) -> None:
        """Take an item of so much *work* away from *counter*, which waits for it no more."""
        counter.work -= work
        counter.waiting -= 1
        if not (counter.waiting or counter.running):
            self.rests()

    def push(self, counter: C) -> None:
        """Give *counter*, which waits, an entry in the heap by its tag."""
        if len(self._heap) > 2 * len(self.counters) + MAX_STALE:
            self._heap = [
                (each.tag, each.serial, each) for each in self.counters.values() if each.waiting
            ]
            heapify(self._heap)
        else:
            heappush(self._heap, (counter.tag, counter.serial, counter))

    def clear(self) -> None:
        """Forget what waits, and all counters but those that run."""
        self._heap.clear()
        self.idle = 0
        self.counters = {name: each for name, each in self.counters.items() if each.running}
        for counter in self.counters.values():
            counter.waiting = counter.work = 0

    def position(self, counter: C | None, number: int) -> int:
        """Return the position of the *number*-th item of *counter*, which need not wait yet, if
        the items of each counter have their mean work.
        """
        tag, serial = self.virtual, self._serials
        if counter is not None and counter.waiting:
            serial = counter.serial
            tag = counter.tag + (number - 1) * counter.work * counter.length // counter.waiting
        elif counter is not None:
            tag = max(tag, counter.tag)
        others = [each for each in self.counters.values() if each is not counter]
        return number + sum([other.served_before(tag, serial) for other in others])

    def order(
        self,
        items: Callable[[C], Iterator[tuple[T, int]]],
        ahead: Mapping[Hashable, int] = NOTHING,
    ) -> Iterator[tuple[T, int]]:
        """Iterate over the *items* of all counters in the order in which they are served, each
        with its work, once some counters were charged with what lies *ahead*.
        """
        heap = [
            (each.tag + ahead.get(name, 0), each.serial, each.length, items(each))
            for name, each in self.counters.items()
            if each.waiting
        ]
        heapify(heap)
        while heap:
            tag, serial, length, some = heap[0]
            item = next(some, None)
            if item is None:
                heappop(heap)
            else:
                heapreplace(heap, (tag + item[1] * length, serial, length, some))
                yield item

    def rests(self) -> None:
        """Account for a counter that neither waits nor runs any more."""
        self.idle += 1
        if self.idle > MAX_STALE:
            self.sweep()

    def sweep(self) -> None:
        """Forget counters that neither wait nor run, if they are the most.

        One at virtual time is as good as none. Of many, those that are furthest ahead are kept.
        """
        if 2 * self.idle <= len(self.counters):
            return
        kept, ahead = {}, {}
        for name, each in self.counters.items():
            if each.waiting or each.running:
                kept[name] = each
            elif each.tag > self.virtual:
                ahead[name] = each
        furthest = nlargest(MAX_STALE // 2, ahead, key=lambda name: ahead[name].tag)
        self.idle = len(furthest)
        self.counters = kept | {name: ahead[name] for name in furthest}


class Charge(msgspec.Struct, Generic[T], eq=False):
    """What the caller and the flow of an item that has started are charged with: *work*, which is
    corrected once. *length* is by the weight at the start.
    """

    _queue: FairQueue[T] | None
    _caller: _Caller[T]
    _flow: _Flow[T]
    length: int
    work: int

    def settle(self, cost: int | None = None) -> None:
        """Replace the estimate by the *cost*, since the item has ended; None: by nothing else.

        Effective once, however often it is called.
        """
        queue, self._queue = self._queue, None
        if queue is None:
            return
        caller, flow = self._caller, self._flow
        more = 0 if cost is None else cost - self.work
        self.work += more
        queue.callers.ends(caller, more * self.length)
        caller.flows.ends(flow, more * LENGTH)
        if not (caller.running or caller.waiting):
            # What its flows have started is forgotten.
            caller.rest()


class FairQueue(Generic[T]):
    """Items in the order in which they are to be served, *size* of them, which are estimated to
    cost so much *work*; each is hashable, and in it once.

    Always: the counters of a caller are known while it waits or runs, and those of at most
    MAX_STALE others.
    """

    def __init__(self) -> None:
        self.callers: _Turns[_Caller[T]] = _Turns(_Caller)
        self.size = 0
        self.work = 0
        # How many items have been put at a front: of two that came at once the first is first.
        self._fronts = 0

    def __len__(self) -> int:
        return self.size

    def add(
        self,
        item: T,
        caller: Hashable,
        flow: Hashable,
        weight: int = 1,
        work: int = 1,
        *,
        came: float | None = None,
    ) -> None:
        """Add *item* as the last of its flow; or, if it *came* then, and comes back, in front of
        its caller's other items, among which the one that came first is first.

        It is estimated to cost so much *work*, 1 at least.
        """
        entry = self.callers.active(caller, LENGTH // weight)
        if came is not None:
            self._fronts += 1
            entry.put_in_front(item, flow, work, (came, self._fronts))
        else:
            line = entry.flows.active(flow)
            line.items[item] = work
            entry.flows.waits(line, work)
        self.callers.waits(entry, work)
        self.size += 1
        self.work += work

    def start(self, caller: Hashable, flow: Hashable, weight: int = 1, work: int = 1) -> Charge[T]:
        """Charge *caller* and *flow* with an item that starts without a wait; nothing waits."""
        entry = self.callers.active(caller, LENGTH // weight)
        line = entry.flows.active(flow)
        self.callers.start(entry, work)
        entry.flows.start(line, work)
        return Charge(self, entry, line, entry.length, work)

    def spend(self, caller: Hashable, weight: int, cost: int) -> None:
        """Charge *caller* with an item that has started, and has ended, while nothing waited."""
        callers, length = self.callers, LENGTH // weight
        entry = callers.counters.get(caller)
        if entry is None:
            entry = callers.made(caller, length)
            callers.rests()
        tag = entry.tag
        if tag > callers.virtual:
            callers.virtual = tag
        else:
            tag = callers.virtual
        entry.tag = tag + cost * length

    def pop(self, gone: Callable[[T], bool]) -> tuple[T, Charge[T]] | None:
        """Remove the next item, and charge its caller and flow with it; return None if there is
        none.

        An item for which *gone* is true is dropped, at no cost to its caller.
        """
        if self.head(gone) is None:
            return None
        callers = self.callers
        entry = callers.first()
        flows = entry.flows
        if entry.front:
            item = entry.times[0][1]
            flow, work = entry.take_from_front(item)
            line = flows.active(flow)
            flows.start_early(line, work)
        else:
            line = flows.first()
            item, work = line.items.popitem(last=False)
            flows.serve(line, work)
        self.size -= 1
        self.work -= work
        callers.serve(entry, work)
        return item, Charge(self, entry, line, entry.length, work)

    def head(self, gone: Callable[[T], bool]) -> T | None:
        """Return the next item, and leave it here; None if there is none.

        An item for which *gone* is true is dropped, at no cost to its caller.
        """
        while self.size:
            entry = self.callers.first()
            if entry.front:
                item = entry.times[0][1]
                if not gone(item):
                    return item
                _, work = entry.take_from_front(item)
            else:
                line = entry.flows.first()
                item = next(iter(line.items))
                if not gone(item):
                    return item
                _, work = line.items.popitem(last=False)
                entry.flows.leaves(line, work)
            self._left(entry, work)
        return None

    def remove(self, item: T, caller: Hashable, flow: Hashable) -> bool:
        """Remove *item*; return whether it was in the queue."""
        entry = self.callers.counters.get(caller)
        if entry is None:
            return False
        if item in entry.front:
            _, work = entry.take_from_front(item)
        else:
            line = entry.flows.counters.get(flow)
            if line is None or item not in line.items:
                return False
            work = line.items.pop(item)
            entry.flows.leaves(line, work)
        self._left(entry, work)
        return True

    def clear(self) -> None:
        """Remove every item."""
        self.callers.clear()
        for entry in self.callers.counters.values():
            entry.front.clear()
            entry.times.clear()
            entry.flows.clear()
            for line in entry.flows.counters.values():
                line.items.clear()
        self.size = self.work = 0

    def heads(self) -> Iterator[T]:
        """Iterate over the first item of each flow, and those at the front of a caller."""
        for entry in self.callers.counters.values():
            yield from entry.front
            for line in entry.flows.counters.values():
                yield from islice(line.items, 1)

    @property
    def weight(self) -> int:
        """The weights of the callers with an item, together. O(callers)."""
        counters = self.callers.counters.values()
        return sum(LENGTH // entry.length for entry in counters if entry.waiting)

    def count(self, caller: Hashable, flow: Hashable) -> int:
        """Return how many items *flow* of *caller* has, but for those at the caller's front."""
        entry = self.callers.counters.get(caller)
        line = entry.flows.counters.get(flow) if entry is not None else None
        return line.waiting if line is not None else 0

    def position(
        self,
        caller: Hashable,
        flow: Hashable,
        number: int,
        *,
        came: float | None = None,
    ) -> int:
        """Estimate the position in the queue of the *number*-th item of *flow*, or of the one at
        the front that *came* then; 1 is served next. O(callers).

        It is true where all items of each caller and flow cost the same. The item need not be in
        the queue yet: its position is then the one that `add` would give it with the same *came*.
        """
        callers = self.callers
        entry = callers.counters.get(caller)
        own = 1
        if entry is not None and came is not None:
            own += bisect_left(entry.times, (came, 0), key=_time)
        elif entry is not None:
            own = len(entry.front) + entry.flows.position(entry.flows.counters.get(flow), number)
        return callers.position(entry, own)

    def __iter__(self) -> Iterator[T]:
        """Iterate in the order in which the items are served if none is added or removed, and no
        estimate corrected.
        """
        return (item for item, _ in self.callers.order(_Caller.order))

    def _left(self, entry: _Caller[T], work: int) -> None:
        """Account for an item of *entry* that has left without a start."""
        self.size -= 1
        self.work -= work
        self.callers.leaves(entry, work)
        if not (entry.waiting or entry.running):
            entry.rest()
