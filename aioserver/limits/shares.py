"""What each owner keeps of something that all of them share, within one bound.

Where room can be made, the owner that keeps most makes it, with its oldest things first: so no
owner pushes out what another keeps, as long as that one keeps less. It is max-min fairness of what
stays (Bertsekas and Gallager, "Data Networks", 1992, 6.5.2), found by taking from the largest
share until the rest fits.

Where nothing may be taken away, the owner that keeps most is refused first: each may keep so many
times what is free (Choudhury, Hahne, "Dynamic Queue Length Thresholds for Shared-Memory Packet
Switches", IEEE/ACM Transactions on Networking, 1998). So some room is always left for an owner that
keeps nothing, and an owner that is alone has most of it.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from heapq import heapify, heappop, heapreplace
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator

O = TypeVar("O")  # noqa: E741 - an owner
K = TypeVar("K")
V = TypeVar("V")
# How many times what is free an owner may keep where nothing is taken away: two thirds of all for
# one that is alone.
EASE = 2
# The part of all that is taken away at once where there is no room, since to begin takes time: one
# of so many.
MADE = 16


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


class Bounded(ByOwner[O, K, V]):
    """At most *limit* such things of all owners together: where there is no room, the owner that
    has most loses those that it has put first.
    """

    __slots__ = ("_limit", "_shares")

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = limit
        self._shares: Shares[O] = Shares()

    def put(self, owner: O, key: K, value: V) -> V | None:
        """Let *owner* have *value* as its newest, as `ByOwner.put`; `make_room` comes before it
        where the key is new.
        """
        former = super().put(owner, key, value)
        self._shares.add(owner, 1)
        return former

    def pop(self, owner: O, key: K) -> V | None:
        """Take away what *owner* has under *key*, as `ByOwner.pop`."""
        size = len(self)
        value = super().pop(owner, key)
        if len(self) < size:
            self._shares.add(owner, -1)
        return value

    def used(self, owner: O, key: K) -> V | None:
        """Return what *owner* has under *key*, as its newest from now on; None if there is
        nothing.
        """
        try:
            owned = self._owned[owner]
            owned.move_to_end(key)
        except KeyError:
            return None
        return owned[key]

    def make_room(self) -> list[tuple[O, K]]:
        """Make room for one thing more, and some, if there is none; return what was taken away."""
        taken: list[tuple[O, K]] = []
        if len(self) < self._limit:
            return taken
        for owner in self._shares.largest_first():
            key = next(iter(self.of(owner)))
            self.pop(owner, key)
            taken.append((owner, key))
            if len(self) < self._limit and len(taken) * MADE >= self._limit:
                break
        return taken


class Places(Shares[O]):
    """The places that owners have of *limit*, which none of them has to give back.

    Always: no more are taken than there are, unless *limit* was lowered since; an owner that waits
    could not take one. Whoever waits and has fewest is next.
    """

    __slots__ = ("_waiting", "limit")

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self._waiting: dict[O, deque[asyncio.Future[None]]] = {}

    def allows(self, owner: O) -> bool:
        """Return whether *owner* may take one more."""
        return self.of(owner) < EASE * (self.limit - self.total)

    async def take(self, owner: O) -> None:
        """Take a place for *owner*, and wait for it if need be; `give_back` follows. Cancelling is
        safe.
        """
        if owner not in self._waiting and self.allows(owner):
            self.add(owner, 1)
            return
        line = self._waiting.setdefault(owner, deque())
        turn = asyncio.get_running_loop().create_future()
        line.append(turn)
        try:
            await turn
        except BaseException:
            if turn.done() and not turn.cancelled():
                self.give_back(owner)
            elif turn in line:
                # Otherwise it was passed over already.
                line.remove(turn)
                if not line:
                    del self._waiting[owner]
            raise

    def give_back(self, owner: O) -> None:
        """Give back a place of *owner*; the next one that waits has it."""
        self.add(owner, -1)
        while self._waiting:
            # In the order in which they began to wait, where some have as many.
            owner = min(self._waiting, key=self.of)
            if not self.allows(owner):
                return
            line = self._waiting[owner]
            turn = line.popleft()
            if not line:
                del self._waiting[owner]
            if not turn.done():
                self.add(owner, 1)
                turn.set_result(None)
