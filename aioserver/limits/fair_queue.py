"""Fair queueing by work, on three levels: classes, the callers of each, and the flows of a caller.

**Callers and flows** have virtual token counters (Sheng et al., "Fairness in Serving Large
Language Models", OSDI 2024; weighted, with predicted lengths). The waiting caller with the
smallest counter is served. Its counter grows by the estimated work of the item, divided by the
caller's weight, when the item starts, and is corrected by the error of the estimate when the item
ends. The counter that was served last is the *virtual time*. A caller that begins to wait gets it
if its own counter is smaller, as in start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996): it
saves nothing up while it is away.

    Let N be the most starts under way, U the dearest item (its work or its estimate), and E the
    largest error of an estimate. Two callers of one class that both wait throughout a span have
    then started work that differs by 2 (U + N E) at most, each divided by its weight.

The counters of two waiting callers are never further apart than U + N E: the larger one was the
smaller when it was served last. Since then it has grown by one item, and both have been corrected.
The flows of a caller share its part by the same rule, each with weight 1.

**Classes** share by weighted fair queueing (Demers, Keshav, Shenker, SIGCOMM 1989): the class whose
head would finish first in virtual time is next. So a class of weight 1 starts an item of work w
once a class of weight 19 has started 19 w beside it, and a heavy class that comes alone is first.
Classes owe each other nothing while only one of them waits. A class without a free place is passed
over, and keeps the right to one start.

Counters are whole numbers, since their order must be exact: a unit of work is 2520 / weight, which
has no remainder for the weights 1 to 10.

This file is one concept: the three levels make one order, in which items are served.
"""

from __future__ import annotations

from bisect import bisect, insort
from collections import OrderedDict
from heapq import heapify, heappop, heappush, heapreplace, nlargest
from itertools import islice
from math import lcm
from operator import itemgetter
from typing import TYPE_CHECKING, Generic, TypeVar

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence

T = TypeVar("T")
# A unit of work at weight 1: the least common multiple of 1 to 10.
LENGTH = 2520
MAX_WEIGHT = 10
# Stale entries, and counters of callers that neither wait nor run, that are kept before a sweep: a
# sweep at each departure would cost O(callers).
MAX_STALE = 64
# The classes of requests.
INTERACTIVE, BATCH = "interactive", "batch"


class _Counter:
    """The work that a caller or a flow has started, in virtual time: its *tag*.

    *waiting* and *work* are the number and the estimates of its items; *running* counts its starts
    that have not ended. Of two with one tag, the one with the smaller *serial*, the first to wait,
    is served first. *length* is a unit of its work in virtual time.
    """

    __slots__ = ("length", "running", "serial", "tag", "waiting", "work")

    def __init__(self, tag: int, length: int) -> None:
        self.tag, self.length = tag, length
        self.serial = self.waiting = self.work = self.running = 0

    def served_before(self, tag: int, serial: int) -> int:
        """Return how many of its items are served before an item of another counter with *tag*, if
        each has their mean work.
        """
        ahead = (tag - self.tag) * self.waiting
        if ahead < 0 or not self.waiting:
            return 0
        step = self.work * self.length
        items = -(-ahead // step)
        if self.serial < serial and ahead % step == 0:
            items += 1
        return min(items, self.waiting)


class _Flow(_Counter, Generic[T]):
    """A flow and its items with their work, without those at the front of its caller."""

    __slots__ = ("items",)

    def __init__(self, tag: int, length: int) -> None:
        super().__init__(tag, length)
        self.items: OrderedDict[T, int] = OrderedDict()


class _Caller(_Counter, Generic[T]):
    """A caller: its flows, and the items at its *front* by their arrival, each with its flow and
    work.
    """

    __slots__ = ("flows", "front")

    def __init__(self, tag: int, length: int) -> None:
        super().__init__(tag, length)
        self.front: list[tuple[float, int, T, Hashable, int]] = []
        self.flows: _Level[_Flow[T]] = _Level(_Flow)

    def rest(self) -> None:
        """Forget the tags of its flows, since none of its items waits or runs."""
        flows = self.flows
        if len(flows.counters) > 1:
            self.flows = _Level(_Flow)
            return
        for flow in flows.counters.values():
            flow.tag = flows.virtual
        flows.idle = len(flows.counters)

    def order(self) -> Iterator[tuple[T, int]]:
        """Iterate over its items in the order of service, each with its work."""
        ahead: dict[Hashable, int] = {}
        for _, _, item, flow, work in self.front:
            ahead[flow] = ahead.get(flow, 0) + work * LENGTH
            yield item, work
        yield from self.flows.order(lambda flow: iter(flow.items.items()), ahead)


C = TypeVar("C", bound=_Counter)


class _Level(Generic[C]):
    """Counters by name; the smallest counter that waits is next.

    Always: `_heap` has a valid entry for each counter that waits; its other entries are stale, and
    skipped. `virtual` never falls. Beside the counters that wait or run, at most MAX_STALE are
    known.
    """

    __slots__ = ("_heap", "_make", "_serials", "counters", "idle", "virtual")

    def __init__(self, make: Callable[[int, int], C]) -> None:
        self._make = make
        self.counters: dict[Hashable, C] = {}
        self._heap: list[tuple[int, int, C]] = []
        self.idle = self.virtual = self._serials = 0

    def active(self, name: Hashable, length: int = LENGTH) -> C:
        """Return the counter *name*, which is about to wait or to start."""
        counter = self.counters.get(name)
        if counter is None:
            counter = self.counters[name] = self._make(self.virtual, length)
            return counter
        if not (counter.running or counter.waiting):
            self.idle -= 1
        # The newest weight applies.
        counter.length = length
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

    def start(self, counter: C, work: int, *, in_turn: bool = True) -> None:
        """Charge *counter* with a start that had no wait; *in_turn*: no other counter of this
        level waits.
        """
        if not counter.waiting:
            counter.tag = max(counter.tag, self.virtual)
        if in_turn:
            self.virtual = max(self.virtual, counter.tag)
        counter.tag += work * counter.length
        counter.running += 1
        if counter.waiting:
            self.push(counter)

    def first(self) -> C:
        """Return the next counter; at least one counter waits."""
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
        """Charge *counter* with so much *more* in virtual time, since an item has ended."""
        counter.tag += more
        counter.running -= 1
        if more and counter.waiting:
            self.push(counter)
        if not (counter.waiting or counter.running):
            self.rests()

    def leaves(self, counter: C, work: int) -> None:
        """Take an item of so much *work* away from *counter*: it waits no longer."""
        counter.work -= work
        counter.waiting -= 1
        if not (counter.waiting or counter.running):
            self.rests()

    def push(self, counter: C) -> None:
        """Give *counter*, which waits, an entry in the heap by its tag."""
        if len(self._heap) > 2 * len(self.counters) + MAX_STALE:
            self._heap = [(c.tag, c.serial, c) for c in self.counters.values() if c.waiting]
            heapify(self._heap)
        else:
            heappush(self._heap, (counter.tag, counter.serial, counter))

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
        self, items: Callable[[C], Iterator[tuple[T, int]]], ahead: Mapping[Hashable, int]
    ) -> Iterator[tuple[T, int]]:
        """Iterate over the *items* of all counters, each with its work, in the order of service
        once some counters are charged with the work *ahead*.
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
        """Settle a counter that neither waits nor runs; forget such counters once there are too
        many. Those that are furthest ahead of virtual time are kept longest.
        """
        self.idle += 1
        if self.idle <= MAX_STALE or 2 * self.idle <= len(self.counters):
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
    """The *work* charged to the caller and the flow of an item that has started, which is
    corrected once. *_length* follows the weight at the start.
    """

    _queue: FairQueue[T] | None
    _caller: _Caller[T]
    _flow: _Flow[T]
    _length: int
    work: int

    def settle(self, cost: int | None = None) -> None:
        """Replace the estimate by the real *cost*, since the item has ended; None: the estimate
        stands.

        Effective once, however often it is called.
        """
        queue, self._queue = self._queue, None
        if queue is None:
            return
        caller, flow = self._caller, self._flow
        more = 0 if cost is None else cost - self.work
        self.work += more
        queue.callers.ends(caller, more * self._length)
        caller.flows.ends(flow, more * LENGTH)
        if not (caller.running or caller.waiting):
            caller.rest()


class FairQueue(Generic[T]):
    """The *size* items of one class, in the order of service. Each is hashable, in the queue once,
    and has an estimated cost of at least 1.
    """

    def __init__(self) -> None:
        self.callers: _Level[_Caller[T]] = _Level(_Caller)
        self.size = self.work = self._fronts = 0

    def add(
        self,
        item: T,
        caller: Hashable,
        flow: Hashable,
        weight: int,
        work: int,
        arrived: float | None = None,
    ) -> None:
        """Add *item* as the last of its flow. An item with an *arrived* time comes back: it goes
        in front of its caller's other items, in the order of arrival.
        """
        entry = self.callers.active(caller, LENGTH // weight)
        if arrived is not None:
            self._fronts += 1
            insort(entry.front, (arrived, self._fronts, item, flow, work))
        else:
            line = entry.flows.active(flow)
            line.items[item] = work
            entry.flows.waits(line, work)
        self.callers.waits(entry, work)
        self.size += 1
        self.work += work

    def start(self, caller: Hashable, flow: Hashable, weight: int, work: int) -> Charge[T]:
        """Charge *caller* and *flow* with an item that starts without having waited."""
        entry = self.callers.active(caller, LENGTH // weight)
        line = entry.flows.active(flow)
        self.callers.start(entry, work, in_turn=not self.size)
        entry.flows.start(line, work, in_turn=not entry.waiting)
        return Charge(self, entry, line, entry.length, work)

    def spend(self, caller: Hashable, weight: int, cost: int) -> None:
        """Charge *caller* with an item that has started and ended while nothing waited."""
        callers = self.callers
        entry = callers.counters.get(caller)
        if entry is None:
            entry = callers.active(caller, LENGTH // weight)
            callers.rests()
        tag = entry.tag
        if tag > callers.virtual:
            callers.virtual = tag
        else:
            tag = callers.virtual
        entry.tag = tag + cost * (LENGTH // weight)

    def head(self) -> tuple[T, int] | None:
        """Return the next item with its work, and leave it here."""
        if not self.size:
            return None
        entry = self.callers.first()
        if entry.front:
            return entry.front[0][2], entry.front[0][4]
        return next(iter(entry.flows.first().items.items()))

    def pop(self) -> tuple[T, Charge[T]]:
        """Remove the next item, and charge its caller and flow with it. There must be one."""
        entry = self.callers.first()
        flows = entry.flows
        if entry.front:
            _, _, item, flow, work = entry.front.pop(0)
            line = flows.active(flow)
            # It is served out of turn, which does not affect the turns of other flows.
            flows.start(line, work, in_turn=False)
        else:
            line = flows.first()
            item, work = line.items.popitem(last=False)
            flows.serve(line, work)
        self.size -= 1
        self.work -= work
        self.callers.serve(entry, work)
        return item, Charge(self, entry, line, entry.length, work)

    def remove(self, item: T, caller: Hashable, flow: Hashable) -> bool:
        """Remove *item* at no cost to its caller; return whether it was in the queue."""
        entry = self.callers.counters.get(caller)
        if entry is None:
            return False
        line = entry.flows.counters.get(flow)
        if line is not None and item in line.items:
            work = line.items.pop(item)
            entry.flows.leaves(line, work)
        else:
            index = next((i for i, each in enumerate(entry.front) if each[2] is item), None)
            if index is None:
                return False
            work = entry.front.pop(index)[4]
        self.size -= 1
        self.work -= work
        self.callers.leaves(entry, work)
        if not (entry.waiting or entry.running):
            entry.rest()
        return True

    def position(
        self, caller: Hashable, flow: Hashable, arrived: float | None = None, *, waits: bool
    ) -> int:
        """Estimate the position of the last item of *flow*, or of the item at the front with this
        *arrived*; the item at 1 is served next. *waits* says that it is in the queue already.
        O(callers).
        """
        entry = self.callers.counters.get(caller)
        own = 1
        if entry is not None and arrived is not None:
            own = bisect(entry.front, arrived, key=itemgetter(0)) + (not waits)
        elif entry is not None:
            line = entry.flows.counters.get(flow)
            number = (0 if line is None else line.waiting) + (not waits)
            own = len(entry.front) + entry.flows.position(line, max(1, number))
        return self.callers.position(entry, own)

    def heads(self) -> Iterator[T]:
        """Iterate over the first item of each flow, and the items at the front of each caller."""
        for entry in self.callers.counters.values():
            for each in entry.front:
                yield each[2]
            for line in entry.flows.counters.values():
                yield from islice(line.items, 1)

    @property
    def weight(self) -> int:
        """The sum of the weights of the callers with an item. O(callers)."""
        return sum(
            LENGTH // each.length for each in self.callers.counters.values() if each.waiting
        )

    def order(self) -> Iterator[tuple[T, int]]:
        """Iterate over the items, each with its work, in the order of service, if no item is added
        or removed and no estimate corrected.
        """
        return self.callers.order(_Caller.order, {})


class ClassQueue(Generic[T]):
    """Items of several classes, each in a fair queue of its own; the heaviest class is first."""

    def __init__(self, weights: Sequence[int]) -> None:
        self.queues: list[FairQueue[T]] = [FairQueue() for _ in weights]
        unit = lcm(*weights)
        self._lengths = [unit // weight for weight in weights]
        # The work that each class has started beside another waiting class, in virtual time.
        self._tags = [0 for _ in weights]
        self._virtual = self.size = 0

    def __len__(self) -> int:
        return self.size

    def add(
        self,
        index: int,
        item: T,
        caller: Hashable,
        flow: Hashable,
        weight: int,
        work: int,
        arrived: float | None = None,
    ) -> None:
        """Add *item* to class *index*, as `FairQueue.add` does."""
        queue = self.queues[index]
        if queue.size == self.size:
            # No other class waits: earlier starts do not count.
            self._virtual = 0
            self._tags = [0 for _ in self._tags]
        if not queue.size:
            self._tags[index] = max(self._tags[index], self._virtual)
        queue.add(item, caller, flow, weight, work, arrived)
        self.size += 1

    def remove(self, index: int, item: T, caller: Hashable, flow: Hashable) -> bool:
        """Remove *item* of class *index*; return whether it was in the queue."""
        removed = self.queues[index].remove(item, caller, flow)
        self.size -= removed
        return removed

    def next(self, closed: Callable[[int], bool]) -> tuple[int, T] | None:
        """Return the class and the item that are next among the classes that are not *closed*."""
        best: tuple[int, int, T] | None = None
        for index, queue in enumerate(self.queues):
            if not queue.size or closed(index):
                continue
            head = queue.head()
            assert head is not None
            finish = self._tags[index] + head[1] * self._lengths[index]
            if best is None or finish < best[0]:
                best = finish, index, head[0]
        return None if best is None else best[1:]

    def pop(self, index: int) -> tuple[T, Charge[T]]:
        """Remove the next item of class *index*, and charge its class, caller and flow."""
        item, charge = self.queues[index].pop()
        self.size -= 1
        others = [i for i, queue in enumerate(self.queues) if i != index and queue.size]
        if others:
            tags, lengths = self._tags, self._lengths
            self._virtual = max(self._virtual, tags[index])
            tags[index] += charge.work * lengths[index]
            for other in others:
                head = self.queues[other].head()
                assert head is not None
                # A class that could have been first was passed over: it is owed one start.
                tags[other] = max(tags[other], tags[index] - head[1] * lengths[other])
        return item, charge

    def position(self, index: int, own: int) -> int:
        """Estimate the position, among all items, of the *own*-th item of class *index*, if the
        items of each class have their mean work.
        """
        queue, total = self.queues[index], own
        if queue.size == self.size:
            return own
        mean = queue.work / queue.size if queue.size else 1.0
        finish = self._tags[index] + own * mean * self._lengths[index]
        for other, each in enumerate(self.queues):
            if other != index and each.size:
                step = each.work / each.size * self._lengths[other]
                total += max(0, min(each.size, int((finish - self._tags[other]) / step)))
        return total

    def order(self) -> Iterator[T]:
        """Iterate in the order of service, if every class has free places."""
        heads = []
        for index, queue in enumerate(self.queues):
            items = queue.order()
            if (first := next(items, None)) is not None:
                tag = self._tags[index] + first[1] * self._lengths[index]
                heads.append((tag, index, first[0], items))
        heapify(heads)
        while heads:
            tag, index, item, items = heads[0]
            yield item
            if (following := next(items, None)) is None:
                heappop(heads)
            else:
                tag += following[1] * self._lengths[index]
                heapreplace(heads, (tag, index, following[0], items))
