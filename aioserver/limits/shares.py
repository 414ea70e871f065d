"""What each owner keeps of something that all of them share, within one bound.

Where room has to be made, the owner that keeps most makes it, with its oldest things first: so no
owner pushes out what another keeps, as long as that one keeps less. It is max-min fairness of what
stays (Bertsekas and Gallager, "Data Networks", 1992, 6.5.2), found by taking from the largest
share until the rest fits.
"""

from __future__ import annotations

from collections import OrderedDict
from heapq import heapify, heappop, heapreplace
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator

O = TypeVar("O")  # noqa: E741 - an owner
K = TypeVar("K")
V = TypeVar("V")


class Shares(Generic[O]):
    """The sizes of what owners keep, added up.

    Always: `total` is their sum; an owner that keeps nothing is not remembered.
    """

    __slots__ = ("_sizes", "total")

    def __init__(self) -> None:
        self._sizes: dict[O, int] = {}
        self.total = 0

    def __len__(self) -> int:
        return len(self._sizes)

    def of(self, owner: O) -> int:
        """Return what *owner* keeps."""
        return self._sizes.get(owner, 0)

    def add(self, owner: O, size: int) -> None:
        """Count another *size* that *owner* keeps; a negative one is kept no longer."""
        self.total += size
        kept = self._sizes.get(owner, 0) + size
        if kept:
            self._sizes[owner] = kept
        else:
            self._sizes.pop(owner, None)

    def largest_first(self) -> Iterator[O]:
        """Yield the owner that keeps most, again and again, for the caller to take from it.

        An owner from which nothing was taken is not yielded again. To begin takes time for each
        owner, to go on does not: so whoever evicts should make room for a while at once.
        """
        heap = [(-size, number, owner) for number, (owner, size) in enumerate(self._sizes.items())]
        heapify(heap)
        while heap:
            size, number, owner = heap[0]
            yield owner
            if 0 < (left := self.of(owner)) < -size:
                heapreplace(heap, (-left, number, owner))
            else:
                heappop(heap)


class ByOwner(Generic[O, K, V]):
    """Things with keys, each of an owner, whose things are in the order in which they were put.

    Each change takes the same time, however many there are.
    """

    __slots__ = ("_owned", "_size")

    def __init__(self) -> None:
        self._owned: dict[O, OrderedDict[K, V]] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def of(self, owner: O) -> OrderedDict[K, V]:
        """Return what *owner* has, the oldest first; it is not to be changed."""
        return self._owned.get(owner) or OrderedDict()

    def put(self, owner: O, key: K, value: V) -> V | None:
        """Let *owner* have *value* as its newest; return what it has had under *key*, if any."""
        former = self.pop(owner, key)
        self._owned.setdefault(owner, OrderedDict())[key] = value
        self._size += 1
        return former

    def pop(self, owner: O, key: K) -> V | None:
        """Take away what *owner* has under *key*, and return it; None if there is nothing."""
        owned = self._owned.get(owner)
        if owned is None or key not in owned:
            return None
        value = owned.pop(key)
        self._size -= 1
        if not owned:
            del self._owned[owner]
        return value
