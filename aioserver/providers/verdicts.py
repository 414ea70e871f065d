"""Verdicts: facts about a provider that single answers have shown, bounded and short-lived.

One answer proves little: its fact may be due to its request, or over in a minute. So a verdict
counts for a while only, and the next request that could show the same checks it anew.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

K = TypeVar("K", bound="Hashable")
V = TypeVar("V")

# Seconds for which a verdict counts after the newest answer that has shown it, and for which a
# provider that refuses our key is not asked.
VERDICT_FOR = 300.0
# The most verdicts of one kind about one provider: their keys have names of models, which clients
# choose.
MAX_VERDICTS = 100


class Verdicts(Generic[K, V]):
    """The verdicts of one kind about one provider, by key.

    Always: there are at most MAX_VERDICTS; the one that was shown least recently is dropped first.
    A verdict that no answer has shown for VERDICT_FOR seconds does not count.
    """

    __slots__ = ("_clock", "_values")

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._values: OrderedDict[K, tuple[V, float]] = OrderedDict()

    def keep(self, key: K, value: V) -> bool:
        """Store *value*, which an answer has shown; return whether that is news.

        A value that was stored before is not news, even if it had expired.
        """
        known = self._values.pop(key, None)
        self._values[key] = value, self._clock() + VERDICT_FOR
        if len(self._values) > MAX_VERDICTS:
            self._values.popitem(last=False)
        return known is None or known[0] != value

    def get(self, key: K) -> V | None:
        """Return the value of *key*; None if there is none, or it has expired."""
        entry = self._values.get(key)
        return None if entry is None or entry[1] <= self._clock() else entry[0]

    def __contains__(self, key: K) -> bool:
        entry = self._values.get(key)
        return entry is not None and entry[1] > self._clock()

    def items(self) -> Iterator[tuple[K, V]]:
        """Iterate over the keys and values that count."""
        now = self._clock()
        return ((key, value) for key, (value, until) in self._values.items() if until > now)
