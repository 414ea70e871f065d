"""Start-time fair queueing: fair between callers by weight, and between the flows of one caller.

Algorithm: Goyal, Vin, Cheng, "Start-Time Fair Queueing: A Scheduling Algorithm for Integrated
Services Packet Switching Networks", SIGCOMM 1996. Each caller has a start tag: the virtual time at
which its next item starts. The caller with the smallest tag is served, and its tag grows by 1 /
weight. Virtual time is the tag that was served last. A caller that arrives starts at virtual time,
or where its last item has ended, if that is later: it gains nothing by being away for a moment,
and nobody waits for items that were never served. So a caller of weight 3 is served three times
for each time that a caller of weight 1 is, and a caller with a thousand items delays another by
one item at most.

The items of a caller belong to flows (the users of one key, for example). A caller's flows are
served round robin (Nagle, RFC 970, 1985), and a flow's items in order of arrival.

Tags are whole numbers, since their order must be exact: the length of an item in virtual time is
2520 / weight, which has no remainder for the weights 1 to 10.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

T = TypeVar("T")
# The length of an item at weight 1: the least common multiple of 1 to 10.
LENGTH = 2520
MAX_WEIGHT = 10
# Stale entries that are kept before they are swept: a sweep at each departure would cost
# O(callers).
MAX_STALE = 64


class _Caller(Generic[T]):
    """A caller with at least one item. Always: none of its flows is empty."""

    __slots__ = ("count", "flows", "length", "serial", "tag")

    def __init__(self, tag: int, weight: int, serial: int) -> None:
        self.tag = tag
        # Of two callers with the same tag, the one that arrived first is served first.
        self.serial = serial
        self.length = LENGTH // weight
        self.flows: OrderedDict[Hashable, deque[T]] = OrderedDict()
        self.count = 0

    def served_before(self, tag: int, serial: int) -> int:
        """Return how many of its items are served before an item of another caller with *tag*."""
        ahead = tag - self.tag
        if ahead < 0:
            return 0
        # All items with a smaller tag, and one with the same tag if this caller arrived first.
        items = -(-ahead // self.length)
        if self.serial < serial and ahead % self.length == 0:
            items += 1
        return min(items, self.count)

    def position_of(self, flow: Hashable, number: int) -> int:
        """Return the position among this caller's items of the *number*-th item of *flow*, from 1.

        Before it the round robin serves *number* items of each flow that is ahead of *flow*, and
        one less of each flow behind it. A flow that has no item yet is behind all others.
        """
        position, own = 0, number
        for other, items in self.flows.items():
            if other == flow:
                position += own
                number -= 1
            else:
                position += min(len(items), number)
        return position if flow in self.flows else position + own


class FairQueue(Generic[T]):
    """Items in the order in which they are to be served, *size* of them.

    Always: `_heap` has exactly one valid entry for each caller with an item (the stale entries of
    others are skipped); `_virtual` never falls while there is an item.
    """

    def __init__(self) -> None:
        self._callers: dict[Hashable, _Caller[T]] = {}
        self._heap: list[tuple[int, int, Hashable]] = []
        # For callers without an item: the virtual time at which their last one ended.
        self._ended: dict[Hashable, int] = {}
        self._virtual = 0
        self._serials = 0
        self.size = 0

    def __len__(self) -> int:
        return self.size

    def add(
        self,
        item: T,
        caller: Hashable,
        flow: Hashable,
        weight: int = 1,
        *,
        at_front: bool = False,
    ) -> None:
        """Add *item* as the last of its flow, or *at_front* of all items of its caller."""
        entry = self._callers.get(caller)
        if entry is None:
            entry = self._callers[caller] = _Caller(self._start(caller), weight, self._serials)
            self._serials += 1
            self._ended.pop(caller, None)
            self._push(caller, entry)
        # The newest weight holds: it may have changed since the caller's other items were added.
        entry.length = LENGTH // weight
        items = entry.flows.setdefault(flow, deque())
        if at_front:
            items.appendleft(item)
            entry.flows.move_to_end(flow, last=False)
        else:
            items.append(item)
        entry.count += 1
        self.size += 1

    def pop(self, gone: Callable[[T], bool]) -> T | None:
        """Remove and return the next item, or None if there is none.

        An item for which *gone* is true is dropped, at no cost to its caller.
        """
        while self.size:
            tag, serial, caller = self._heap[0]
            entry = self._callers.get(caller)
            if entry is None or (entry.tag, entry.serial) != (tag, serial):
                # The entry is stale.
                heappop(self._heap)
                continue
            flow, items = next(iter(entry.flows.items()))
            item = items.popleft()
            dropped = gone(item)
            if items and not dropped:
                entry.flows.move_to_end(flow)
            if not dropped:
                self._virtual = tag
                entry.tag += entry.length
            self._removed(caller, entry, flow)
            if not dropped:
                if entry.count:
                    heappop(self._heap)
                    self._push(caller, entry)
                return item
        return None

    def remove(self, item: T, caller: Hashable, flow: Hashable) -> bool:
        """Remove *item*; return whether it was in the queue. O(length of its flow)."""
        entry = self._callers.get(caller)
        items = entry.flows.get(flow) if entry is not None else None
        if entry is None or items is None or item not in items:
            return False
        items.remove(item)
        self._removed(caller, entry, flow)
        return True

    def clear(self) -> None:
        """Remove every item."""
        self._callers.clear()
        self.size = 0
        self._reset()

    def heads(self) -> Iterator[T]:
        """Iterate over the first item of each flow."""
        for entry in self._callers.values():
            for items in entry.flows.values():
                yield items[0]

    @property
    def weight(self) -> int:
        """The weights of the callers with an item, together. O(callers)."""
        return sum(LENGTH // entry.length for entry in self._callers.values())

    def count(self, caller: Hashable, flow: Hashable) -> int:
        """Return how many items *flow* of *caller* has."""
        entry = self._callers.get(caller)
        return len(entry.flows.get(flow, ())) if entry is not None else 0

    def position(
        self,
        caller: Hashable,
        flow: Hashable,
        number: int,
        weight: int = 1,
        *,
        at_front: bool = False,
    ) -> int:
        """Return the position in the queue of the *number*-th item of *flow*; 1 is served next.

        The item need not be in the queue yet: its position is then the one that `add` would give
        it with the same *weight* and *at_front*.
        """
        entry = self._callers.get(caller)
        if entry is None:
            own, tag, serial = 1, self._start(caller), self._serials
        else:
            own = 1 if at_front else entry.position_of(flow, number)
            tag, serial = entry.tag, entry.serial
        length = LENGTH // weight if entry is None else entry.length
        tag += (own - 1) * length
        others = [other for other in self._callers.values() if other is not entry]
        return own + sum([other.served_before(tag, serial) for other in others])

    def __iter__(self) -> Iterator[T]:
        """Iterate in the order in which the items are served if none is added or removed."""
        heap = [
            (entry.tag, entry.serial, entry.length, _round_robin(entry))
            for entry in self._callers.values()
        ]
        heapify(heap)
        while heap:
            tag, serial, length, items = heap[0]
            item = next(items, None)
            heappop(heap)
            if item is not None:
                heappush(heap, (tag + length, serial, length, items))
                yield item

    def _start(self, caller: Hashable) -> int:
        return max(self._virtual, self._ended.get(caller, 0))

    def _push(self, caller: Hashable, entry: _Caller[T]) -> None:
        if len(self._heap) > 2 * len(self._callers) + MAX_STALE:
            self._heap = [(entry.tag, entry.serial, name) for name, entry in self._callers.items()]
            heapify(self._heap)
        else:
            heappush(self._heap, (entry.tag, entry.serial, caller))

    def _removed(self, caller: Hashable, entry: _Caller[T], flow: Hashable) -> None:
        """Account for an item of *flow* that was taken out."""
        if not entry.flows[flow]:
            del entry.flows[flow]
        entry.count -= 1
        self.size -= 1
        if not entry.count:
            del self._callers[caller]
            self._ended[caller] = entry.tag
            if len(self._ended) > len(self._callers) + MAX_STALE:
                now = self._virtual
                self._ended = {name: tag for name, tag in self._ended.items() if tag > now}
        if not self.size:
            self._reset()

    def _reset(self) -> None:
        """Start over: in an empty queue no caller is ahead or behind."""
        self._heap.clear()
        self._ended.clear()
        self._virtual = self._serials = 0


def _round_robin(caller: _Caller[T]) -> Iterator[T]:
    """Iterate over the items of one caller: the next of each flow in turn."""
    flows = [iter(items) for items in caller.flows.values()]
    while flows:
        unfinished = []
        for flow in flows:
            if (item := next(flow, None)) is not None:
                yield item
                unfinished.append(flow)
        flows = unfinished
