"""No caller starves: start-time fair queueing bounds how far two callers who both wait may be apart.

The theorem (Goyal, Vin and Cheng, "Start-Time Fair Queueing", SIGCOMM 1996, theorem 1): in any time in which the
callers f and m both have requests that wait, with n_f and n_m of them served and the weights w_f and w_m,

    |n_f / w_f - n_m / w_m| <= 1 / w_f + 1 / w_m

It holds at every instant, whatever the server's speed, so it is checked at each start.
"""

# ruff: noqa: SLF001 - the queue of a gate shows no start

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from aioserver.limits.fair_queue import LENGTH

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from aioserver.limits.fair_queue import FairQueue
    from aioserver.limits.gate import Gate


@dataclass(slots=True)
class _Pair:
    """Two callers that both wait: how far the first is ahead, and how far it was at most and at least."""

    ahead: Fraction = Fraction(0)
    most: Fraction = Fraction(0)
    least: Fraction = Fraction(0)


class _Followed:
    """A queue whose starts are followed. Always: there is a pair for any two callers that both wait."""

    def __init__(self, queue: FairQueue[Any], broken: Callable[[str], None]) -> None:
        self._queue = queue
        self._pop = queue.pop
        self._removed = queue._removed
        self._broken = broken
        self.pairs: dict[tuple[Hashable, Hashable], _Pair] = {}
        self._popping = False
        queue.pop = self.pop  # type: ignore[method-assign]
        queue._removed = self.removed  # type: ignore[method-assign]

    def pop(self, gone: Callable[[Any], bool]) -> Any:
        """Note which caller is served."""
        callers = {name: entry.length for name, entry in self._queue._callers.items()}
        self._popping = True
        try:
            item = self._pop(gone)
        finally:
            self._popping = False
        if item is None or len(callers) < 2:
            return item
        served = item.caller
        for other, length in callers.items():
            if other == served:
                continue
            names = (served, other) if repr(served) < repr(other) else (other, served)
            pair = self.pairs.setdefault(names, _Pair())
            step = Fraction(callers[served], LENGTH)
            pair.ahead += step if names[0] == served else -step
            pair.most = max(pair.most, pair.ahead)
            pair.least = min(pair.least, pair.ahead)
            bound = step + Fraction(length, LENGTH)
            if pair.most - pair.least > bound:
                apart = float(pair.most - pair.least)
                self._broken(
                    f"{names[0]!r} and {names[1]!r} are {apart:.2f} apart, at most {bound}"
                )
                pair.most = pair.least = pair.ahead
        self._forget_idle()
        return item

    def removed(self, caller: Hashable, entry: Any, flow: Hashable) -> None:
        """Note a request that was taken out of the queue."""
        self._removed(caller, entry, flow)
        if not self._popping and caller not in self._queue._callers:
            self._forget_idle()

    def _forget_idle(self) -> None:
        callers = self._queue._callers
        for names in [pair for pair in self.pairs if not callers.keys() >= set(pair)]:
            del self.pairs[names]


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
