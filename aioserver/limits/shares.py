"""Fair shares of a bounded store that several owners fill.

Where entries can be evicted, the owner that keeps most loses its oldest entries first. So no owner
pushes out the entries of an owner that keeps less. It is max-min fairness of what stays (Bertsekas
and Gallager, "Data Networks", 1992, 6.5.2), found by taking from the largest share until the rest
fits.

Where nothing can be evicted, the owner that keeps most is refused first: each may keep a multiple
of what is free. See Choudhury, Hahne, "Dynamic Queue Length Thresholds for Shared-Memory Packet
Switches", IEEE/ACM Transactions on Networking, 1998. So some room is always left for an owner that
keeps nothing, and an owner that is alone has most of it.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from heapq import heapify, heappop, heapreplace
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

O = TypeVar("O")  # noqa: E741 - an owner
K = TypeVar("K")
V = TypeVar("V")
# The multiple of the free room that an owner may keep if nothing can be evicted: two thirds of all
# for an owner that is alone.
EASE = 2
# If there is no room, at least the limit divided by this is evicted at once, since the first step
# of an eviction takes time.
EVICTED_PART = 16


class Shares(Generic[O]):
    """The sizes of what owners keep, added up.

    Always: `total` is their sum; an owner that keeps nothing is not remembered.
    """

    def __init__(self) -> None:
        self._sizes: dict[O, int] = {}
        self.total = 0

    def __len__(self) -> int:
        return len(self._sizes)

    def of(self, owner: O) -> int:
        """Return the size of everything that *owner* keeps."""
        return self._sizes.get(owner, 0)

    def add(self, owner: O, size: int) -> None:
        """Add *size* to the share of *owner*; a negative *size* subtracts."""
        self.total += size
        kept = self._sizes.get(owner, 0) + size
        if kept:
            self._sizes[owner] = kept
        else:
            self._sizes.pop(owner, None)

    def largest_first(self) -> Iterator[O]:
        """Yield, again and again, the owner that keeps most, for the caller to evict from it.

        An owner from which nothing was taken is not yielded again. The first step takes time for
        each owner, further steps do not: so an eviction should make room for a while at once.
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
    """Entries by owner and key. The entries of an owner are in the order in which they were put.

    Each change takes constant time.
    """

    def __init__(self) -> None:
        self._owned: dict[O, OrderedDict[K, V]] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def of(self, owner: O) -> OrderedDict[K, V]:
        """Return the entries of *owner*, the oldest first; do not change them."""
        return self._owned.get(owner) or OrderedDict()

    def owners(self) -> Collection[O]:
        """Return the owners that have entries."""
        return self._owned.keys()

    def put(self, owner: O, key: K, value: V) -> V | None:
        """Store *value* as the newest entry of *owner*; return the former value of *key*, if any."""
        former = self.pop(owner, key)
        self._owned.setdefault(owner, OrderedDict())[key] = value
        self._size += 1
        return former

    def pop(self, owner: O, key: K) -> V | None:
        """Remove the entry of *owner* under *key*, and return it; None if there is none."""
        owned = self._owned.get(owner)
        if owned is None or key not in owned:
            return None
        value = owned.pop(key)
        self._size -= 1
        if not owned:
            del self._owned[owner]
        return value


class Bounded(ByOwner[O, K, V]):
    """At most *limit* entries of all owners together: if there is no room, the owner that has most
    loses its oldest.
    """

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = limit
        self._shares: Shares[O] = Shares()

    def put(self, owner: O, key: K, value: V) -> V | None:
        """Store *value* as the newest entry of *owner*, as `ByOwner.put`; call `make_room` first
        if the key is new.
        """
        former = super().put(owner, key, value)
        self._shares.add(owner, 1)
        return former

    def pop(self, owner: O, key: K) -> V | None:
        """Remove the entry of *owner* under *key*, as `ByOwner.pop`."""
        size = len(self)
        value = super().pop(owner, key)
        if len(self) < size:
            self._shares.add(owner, -1)
        return value

    def used(self, owner: O, key: K) -> V | None:
        """Return the entry of *owner* under *key*, and mark it as the newest; None if there is
        none.
        """
        try:
            owned = self._owned[owner]
            owned.move_to_end(key)
        except KeyError:
            return None
        return owned[key]

    def make_room(self) -> list[tuple[O, K]]:
        """Evict some entries if there is no room for one more; return them."""
        taken: list[tuple[O, K]] = []
        if len(self) < self._limit:
            return taken
        for owner in self._shares.largest_first():
            key = next(iter(self.of(owner)))
            self.pop(owner, key)
            taken.append((owner, key))
            if len(self) < self._limit and len(taken) * EVICTED_PART >= self._limit:
                break
        return taken


class Places(Shares[O]):
    """Places, *limit* in all, that owners take and give back by themselves.

    Always: no more places are taken than there are, unless *limit* was lowered since; a waiting
    owner could not take one. The waiting owner that has fewest is next.
    """

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self._waiting: dict[O, deque[asyncio.Future[None]]] = {}

    def allows(self, owner: O) -> bool:
        """Return whether *owner* may take one more."""
        return self.of(owner) < EASE * (self.limit - self.total)

    async def take(self, owner: O) -> None:
        """Take a place for *owner*, waiting if need be; the caller must `give_back`. Cancelling is
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
        """Give a place of *owner* back; the next waiter gets it."""
        self.add(owner, -1)
        while self._waiting:
            # Among equal owners, the owner that began to wait first.
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
