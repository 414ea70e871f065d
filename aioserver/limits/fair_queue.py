"""Who of those who wait is next: fair between callers by weight, and between the lines of one.

Start-time fair queueing (Goyal, Vin, Cheng, "Start-Time Fair Queueing: A Scheduling Algorithm for
Integrated Services Packet Switching Networks", SIGCOMM 1996) over callers. Each has a tag, that of
its next turn; the smallest is served, and a turn puts the caller's tag ahead by 1 / weight. Virtual
time is the tag served last. Who comes starts there, or where its last turn has ended, if that is
later: it gains nothing by being away for a moment, and nobody is made to wait for turns that were
not taken. So a caller of weight 3 has three turns for one of weight 1, and one with a thousand
requests delays another by a turn at most.

Within a caller its lines take turns in a circle (round robin: Nagle, RFC 970, 1985), and a line is
in the order of coming.

Tags are whole numbers, since their order is to be exact: a turn is 2520 / weight, which has no
remainder for the weights 1 to 10.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

T = TypeVar("T")
TURN = 2520  # the least common multiple of 1 to 10
MAX_WEIGHT = 10
SPARE = 64  # entries of what is cleared away only now and then


class _Caller(Generic[T]):
    """One caller with somebody waiting. Always: no line of it is empty."""

    __slots__ = ("count", "lines", "serial", "step", "tag")

    def __init__(self, tag: int, weight: int, serial: int) -> None:
        self.tag = tag
        self.serial = serial  # of two with one tag the first comer is first
        self.step = TURN // weight
        self.lines: OrderedDict[Hashable, deque[T]] = OrderedDict()
        self.count = 0

    def turns_before(self, tag: int, serial: int) -> int:
        """How many of its own have their turn before one of another caller that has this tag."""
        ahead = tag - self.tag
        if ahead < 0:
            return 0
        turns = -(-ahead // self.step)  # those with a smaller tag
        if self.serial < serial and ahead % self.step == 0:
            turns += 1
        return min(turns, self.count)

    def place_of(self, line: Hashable, number: int) -> int:
        """Which turn of the caller's the *number*-th of *line* gets: as many come of each line.

        One less of those lines that stand behind it in the circle. A line that is not there is
        behind all others.
        """
        position, mine = 0, number
        for other, waiting in self.lines.items():
            if other == line:
                position += mine
                number -= 1
            else:
                position += min(len(waiting), number)
        return position if line in self.lines else position + mine


class FairQueue(Generic[T]):
    """Those who wait, in the order of their turns.

    Always: `_heap` has an entry for each caller with somebody waiting, and for no caller two that
    count; `_virtual` never falls while somebody waits.
    """

    def __init__(self) -> None:
        self._callers: dict[Hashable, _Caller[T]] = {}
        self._heap: list[tuple[int, int, Hashable]] = []
        self._ended: dict[Hashable, int] = {}  # where the last turn of one who waits no more ended
        self._virtual = 0
        self._serials = 0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(
        self, one: T, caller: Hashable, line: Hashable, weight: int = 1, *, first: bool = False
    ) -> None:
        """*one* waits, as the last of its line, or as the *first* of its caller."""
        known = self._callers.get(caller)
        if known is None:
            known = self._callers[caller] = _Caller(self._start(caller), weight, self._serials)
            self._serials += 1
            self._ended.pop(caller, None)
            self._push(caller, known)
        known.step = TURN // weight  # the newest holds: it may have changed since the others came
        waiting = known.lines.setdefault(line, deque())
        if first:
            waiting.appendleft(one)
            known.lines.move_to_end(line, last=False)
        else:
            waiting.append(one)
        known.count += 1
        self._count += 1

    def pop(self, gone: Callable[[T], bool]) -> T | None:
        """Take out who is next. Those who are *gone* are left out, and cost their caller no turn."""
        while self._count:
            tag, serial, caller = self._heap[0]
            known = self._callers.get(caller)
            if known is None or (known.tag, known.serial) != (tag, serial):
                heappop(self._heap)  # it has left since
                continue
            line, waiting = next(iter(known.lines.items()))
            one = waiting.popleft()
            left = gone(one)
            if waiting and not left:
                known.lines.move_to_end(line)
            if not left:
                self._virtual = tag
                known.tag += known.step
            self._took(caller, known, line)
            if not left:
                if known.count:
                    heappop(self._heap)
                    self._push(caller, known)
                return one
        return None

    def remove(self, one: T, caller: Hashable, line: Hashable) -> bool:
        """*one* waits no more; False: it did not."""
        known = self._callers.get(caller)
        waiting = known.lines.get(line) if known is not None else None
        if known is None or waiting is None or one not in waiting:
            return False
        waiting.remove(one)
        self._took(caller, known, line)
        return True

    def clear(self) -> None:
        """Nobody waits any more."""
        self._callers.clear()
        self._count = 0
        self._rest()

    def heads(self) -> Iterator[T]:
        """The first of each line."""
        for known in self._callers.values():
            for waiting in known.lines.values():
                yield waiting[0]

    def count(self, caller: Hashable, line: Hashable) -> int:
        """How many wait in that line."""
        known = self._callers.get(caller)
        return len(known.lines.get(line, ())) if known is not None else 0

    def position(
        self,
        caller: Hashable,
        line: Hashable,
        number: int,
        weight: int = 1,
        *,
        first: bool = False,
    ) -> int:
        """Where the *number*-th of that line stands, or would; 1 is who is next.

        *first*: where one would that comes as its caller's first.
        """
        known = self._callers.get(caller)
        if known is None:
            own, tag, serial = 1, self._start(caller), self._serials
        else:
            own = 1 if first else known.place_of(line, number)
            tag, serial = known.tag, known.serial
        step = TURN // weight if known is None else known.step
        tag += (own - 1) * step
        others = [one for one in self._callers.values() if one is not known]
        return own + sum([other.turns_before(tag, serial) for other in others])

    def __iter__(self) -> Iterator[T]:
        """All who wait, in the order of their turns if nobody comes or goes."""
        heap = [(one.tag, one.serial, one.step, _circle(one)) for one in self._callers.values()]
        heapify(heap)
        while heap:
            tag, serial, step, waiting = heap[0]
            one = next(waiting, None)
            heappop(heap)
            if one is not None:
                heappush(heap, (tag + step, serial, step, waiting))
                yield one

    def _start(self, caller: Hashable) -> int:
        return max(self._virtual, self._ended.get(caller, 0))

    def _push(self, caller: Hashable, known: _Caller[T]) -> None:
        if len(self._heap) > 2 * len(self._callers) + SPARE:  # most of it has left
            self._heap = [(one.tag, one.serial, name) for name, one in self._callers.items()]
            heapify(self._heap)
        else:
            heappush(self._heap, (known.tag, known.serial, caller))

    def _took(self, caller: Hashable, known: _Caller[T], line: Hashable) -> None:
        """One of *line* was taken out."""
        if not known.lines[line]:
            del known.lines[line]
        known.count -= 1
        self._count -= 1
        if not known.count:
            del self._callers[caller]
            self._ended[caller] = known.tag
            if len(self._ended) > len(self._callers) + SPARE:
                now = self._virtual
                self._ended = {name: tag for name, tag in self._ended.items() if tag > now}
        if not self._count:
            self._rest()

    def _rest(self) -> None:
        """Nobody waits: what was before does not matter any more."""
        self._heap.clear()
        self._ended.clear()
        self._virtual = self._serials = 0


def _circle(caller: _Caller[T]) -> Iterator[T]:
    """Who waits of one caller: one of each line in turn."""
    lines = [iter(line) for line in caller.lines.values()]
    while lines:
        still = []
        for line in lines:
            if (one := next(line, None)) is not None:
                yield one
                still.append(line)
        lines = still
