"""No caller starves: virtual token counters bound how far two callers who both wait may be apart.

The bound (limits/fair_queue.py): in any time in which two callers of one class both have requests
that wait, what they have started differs by 2 (U + N E) at most, each divided by its weight. N is
the most that has run at once, U the dearest request, and E the largest error of an estimate. The
same holds for two flows of one caller.

It holds at every instant, whatever the server's speed. What a start has cost is known when it has
ended, so the starts are looked at later, many at once. At once it is looked at whose turn it was,
by counters that are kept here.
"""

# ruff: noqa: SLF001 - the queue of a resource shows no start

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

from aioserver.limits.fair_queue import LENGTH

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping

    from aioserver.limits.fair_queue import Charge, FairQueue
    from aioserver.limits.resource import Resource

# Starts that are looked at together.
MANY = 500


class _Start(NamedTuple):
    """A start of *name*, which waited, as the *others* did, each since its own moment: among all
    callers, or among the flows *of* one. *early*: it came before its turn.
    """

    of: Hashable
    name: Hashable
    since: Hashable
    others: Mapping[Hashable, Hashable]
    charge: Charge[Any]
    length: int
    early: bool


@dataclass(slots=True)
class _Pair:
    """Two that both wait, each *since* then: how far the first is ahead, and how far it was at
    most and at least.
    """

    since: tuple[Hashable, Hashable]
    ahead: Fraction = Fraction(0)
    most: Fraction = Fraction(0)
    least: Fraction = Fraction(0)


class _Followed:
    """A queue whose starts are followed."""

    def __init__(self, queue: FairQueue[Any], broken: Callable[[str], None]) -> None:
        self._queue = queue
        self._pop, self._start = queue.pop, queue.start
        self._broken = broken
        self._add, self._spend = queue.add, queue.spend
        self._starts: list[_Start] = []
        # All that have started since the last look, or run, with their estimates.
        self._charges: list[tuple[Charge[Any], int]] = []
        # N, U and E until now.
        self._most_running = self._dearest = self._error = 0
        # The counters of callers, virtual time, and what of those that run is in them.
        self._tags: dict[object, int] = {}
        self._virtual = 0
        self._counted: dict[Charge[Any], int] = {}
        queue.add = self.add  # type: ignore[method-assign]
        queue.pop = self.pop  # type: ignore[method-assign]
        queue.start = self.start  # type: ignore[method-assign]
        queue.spend = self.spend  # type: ignore[method-assign]

    def add(self, item: Any, caller: Hashable, *args: Any, **kwargs: Any) -> None:
        """Note who begins to wait."""
        self._correct()
        self._add(item, caller, *args, **kwargs)
        counter = self._queue.callers.counters[caller]
        if counter.waiting == 1:
            self._tags[counter] = max(self._virtual, self._tags.get(counter, self._virtual))

    def start(self, caller: Hashable, *args: Any, **kwargs: Any) -> Charge[Any]:
        """Note a start without a wait."""
        self._correct()
        charge = self._start(caller, *args, **kwargs)
        counter = self._queue.callers.counters[caller]
        self._tags[counter] = max(self._virtual, self._tags.get(counter, self._virtual))
        self._served(counter, charge)
        return charge

    def spend(self, caller: Hashable, weight: int, cost: int) -> None:
        """Note a start without a wait that has ended before anybody waited."""
        self._correct()
        self._spend(caller, weight, cost)
        if (counter := self._queue.callers.counters.get(caller)) is not None:
            self._virtual = max(self._virtual, self._tags.get(counter, self._virtual))
            tag = self._tags.get(counter, self._virtual)
            self._tags[counter] = max(self._virtual, tag) + cost * (LENGTH // weight)

    def _correct(self) -> None:
        """Take in what has been corrected since the last look."""
        for charge, counted in list(self._counted.items()):
            self._tags[charge._caller] += (charge.work - counted) * charge._length
            if charge._queue is None:
                del self._counted[charge]

    def _served(self, counter: object, charge: Charge[Any]) -> None:
        tag = self._tags[counter]
        self._virtual = max(self._virtual, tag)
        self._tags[counter] = tag + charge.work * charge._length
        self._counted[charge] = charge.work
        self._charges.append((charge, charge.work))
        running = sum(each.running for each in self._queue.callers.counters.values())
        self._most_running = max(self._most_running, running)
        if len(self._charges) >= MANY + len(self._counted):
            self.look()

    def pop(self) -> tuple[Any, Charge[Any]]:
        """Note which caller is served, and which flow of it."""
        self._correct()
        callers = self._queue.callers
        waiting = _waiting(callers.counters)
        tags = {name: self._tags[callers.counters[name]] for name in waiting}
        lines = {name: _waiting(callers.counters[name].flows.counters) for name in waiting}
        early = {name for name in waiting if callers.counters[name].front}
        item, charge = self._pop()
        name, flow = item.ticket.caller, item.ticket.flow
        if tags[name] > min(tags.values()):
            self._broken(f"{name!r} starts at a tag of {tags[name]}, and these wait: {tags}")
        self._starts.append(
            _Start(None, name, waiting.pop(name), waiting, charge, charge._length, early=False)
        )
        flows = lines[name]
        since = flows.pop(flow, None)
        self._starts.append(
            _Start((name,), flow, since, flows, charge, LENGTH, early=name in early)
        )
        self._served(callers.counters[name], charge)
        return item, charge

    def look(self) -> None:
        """Look at the starts since the last look, and forget them."""
        # Whoever is known no more has something to be corrected for the last time, perhaps.
        self._correct()
        for charge, work in self._charges:
            self._dearest = max(self._dearest, charge.work, work)
            self._error = max(self._error, abs(charge.work - work))
        bound = 2 * (self._dearest + self._most_running * self._error)
        pairs: dict[tuple[Hashable, Hashable, Hashable], _Pair] = {}
        for start in self._starts:
            step = Fraction(start.charge.work * start.length, LENGTH)
            for other, since in start.others.items():
                first = repr(start.name) < repr(other)
                names = (start.name, other) if first else (other, start.name)
                both = (start.since, since) if first else (since, start.since)
                key = (start.of, *names)
                pair = pairs.get(key)
                if pair is None or pair.since != both or start.early:
                    pair = pairs[key] = _Pair(both)
                if start.early:
                    continue
                pair.ahead += step if first else -step
                pair.most = max(pair.most, pair.ahead)
                pair.least = min(pair.least, pair.ahead)
                if pair.most - pair.least > bound:
                    apart = float(pair.most - pair.least)
                    self._broken(
                        f"{names[0]!r} and {names[1]!r} are {apart:.0f} apart, at most {bound}"
                    )
                    pair.most = pair.least = pair.ahead
        self._starts.clear()
        # The others are corrected later.
        self._charges = [each for each in self._charges if each[0]._queue is not None]
        known = set(self._queue.callers.counters.values())
        self._tags = {each: tag for each, tag in self._tags.items() if each in known}


def _waiting(counters: Mapping[Hashable, Any]) -> dict[Hashable, Hashable]:
    """Return those of *counters* that wait, and since when each does."""
    return {name: (id(each), each.serial) for name, each in counters.items() if each.waiting}


class Fairness:
    """Follows the queues of a server, and calls *broken* where one is not fair.

    *followed* has the resources whose queues are followed.
    """

    def __init__(self, broken: Callable[[str], None]) -> None:
        self._broken = broken
        self.followed: dict[Resource, tuple[_Followed, ...]] = {}

    def follow(self, resource: Resource) -> None:
        """Follow the queues of *resource*, which is not among those *followed*."""
        queues = resource.queue.queues
        self.followed[resource] = tuple(_Followed(queue, self._broken) for queue in queues)

    def forget(self) -> None:
        """Look at what was counted, and forget it: weights may change."""
        for queues in self.followed.values():
            for followed in queues:
                followed.look()
