"""No caller starves: start-time fair queueing bounds how far two callers who both wait may be
apart.

The theorem (Goyal, Vin and Cheng, "Start-Time Fair Queueing", SIGCOMM 1996, theorem 1): in any
time in which the callers f and m both have requests that wait, with n_f and n_m of them served and
the weights w_f and w_m,

    |n_f / w_f - n_m / w_m| <= 1 / w_f + 1 / w_m

It holds at every instant, whatever the server's speed, so it is checked at each start.
"""

# ruff: noqa: SLF001 - the queue of a gate shows no start

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from operator import is_not
from typing import TYPE_CHECKING, Any

from aioserver.limits.fair_queue import LENGTH

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from aioserver.limits.fair_queue import FairQueue
    from aioserver.limits.gate import Gate


@dataclass(slots=True)
class _Pair:
    """Two callers that both wait: how far the first is ahead, and how far it was at most and at
    least.

    *entries* are theirs in the queue: a caller that has waited for nothing in between has another
    one.
    """

    entries: tuple[object, object]
    ahead: Fraction = Fraction(0)
    most: Fraction = Fraction(0)
    least: Fraction = Fraction(0)


class _Followed:
    """A queue whose starts are followed."""

    def __init__(self, queue: FairQueue[Any], broken: Callable[[str], None]) -> None:
        self._queue = queue
        self._pop = queue.pop
        self._broken = broken
        self.pairs: dict[tuple[Hashable, Hashable], _Pair] = {}
        queue.pop = self.pop  # type: ignore[method-assign]

    def pop(self, gone: Callable[[Any], bool]) -> Any:
        """Note which caller is served."""
        callers = dict(self._queue._callers)
        item = self._pop(gone)
        if item is None or len(callers) < 2:
            return item
        served = item.caller
        step = Fraction(callers[served].length, LENGTH)
        for other, entry in callers.items():
            # Whoever is not in the queue any more had only requests that were given up.
            if other == served or other not in self._queue._callers:
                continue
            names = (served, other) if repr(served) < repr(other) else (other, served)
            entries = callers[names[0]], callers[names[1]]
            pair = self.pairs.get(names)
            if pair is None or any(map(is_not, pair.entries, entries)):
                pair = self.pairs[names] = _Pair(entries)
            pair.ahead += step if names[0] == served else -step
            pair.most = max(pair.most, pair.ahead)
            pair.least = min(pair.least, pair.ahead)
            bound = step + Fraction(entry.length, LENGTH)
            if pair.most - pair.least > bound:
                apart = float(pair.most - pair.least)
                self._broken(
                    f"{names[0]!r} and {names[1]!r} are {apart:.2f} apart, at most {bound}"
                )
                pair.most = pair.least = pair.ahead
        return item


class Fairness:
    """Follows the queues of a server, and calls *broken* where one is not fair.

    *followed* has the gates of the queues that are followed.
    """

    def __init__(self, broken: Callable[[str], None]) -> None:
        self._broken = broken
        self.followed: dict[Gate, _Followed] = {}

    def follow(self, gate: Gate) -> None:
        """Follow the queue of *gate*, which is not among those *followed*."""
        self.followed[gate] = _Followed(gate._queue, self._broken)

    def forget(self) -> None:
        """Forget what was counted: weights may change."""
        for followed in self.followed.values():
            followed.pairs.clear()
