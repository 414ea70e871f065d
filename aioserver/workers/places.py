"""The gate of one worker among several: its places move between the workers, by way of the shared
page.

Each worker keeps RESERVE places free for clients that come next. A worker that has fewer, or whose
clients wait, is given some by the others: all that they have free where clients wait, otherwise
half of what they have beyond their own reserve. Nobody asks: what a worker needs is on the page
(`need`), and its siblings look at each beat.

Where clients wait in every worker no place is ever free. A place that ends then goes to a sibling
that has fewer places, until all have about as many; otherwise the clients of a worker that was
started again would wait for ever.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aioserver.limits.gate import Gate

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.limits.gate import Place, Waiter
    from aioserver.workers.shared_page import SharedPage

# Places that each worker keeps free if it can: clients that come together find one without waiting
# for a beat.
RESERVE = 4
# A sibling whose clients wait gets the next place that ends, rather than the own next client,
# while it has fewer places than this share of the own ones.
EVEN = 1 / 1.06
# Seconds that a client may wait for the place of a sibling which has room, where it would be
# refused at once otherwise. The sibling gives it at its next beat, in 25 ms; later only if its
# loop is late.
GRACE = 0.5


class SharedGate(Gate):
    """The gate of this worker's slot.

    Always: its limit is at most what the page says of the slot, and the page says how many are
    inside and wait.

    *share* makes the own part of a number for all workers. *on_wait* is called when a client
    waits: the next beat should be soon. The limit that the configuration gives is that of all
    workers together: the parent has put it on the page.
    """

    def __init__(
        self,
        page: SharedPage,
        share: Callable[[int], int],
        on_wait: Callable[[], None],
        _limit: int,
        *,
        queue_size: int,
        **rest: Any,
    ) -> None:
        super().__init__(0, queue_size=share(queue_size), **rest)
        self._page = page
        self._share = share
        self._on_wait = on_wait
        # Whether clients of a sibling waited at the last beat.
        self._starving = False
        page.settle(self._set_limit)

    @property
    def closed(self) -> bool:
        """Whether it takes nobody in any more."""
        return self._closed is not None

    @property
    def entered(self) -> int:
        """How many have ever entered."""
        return self._entered

    @property
    def free(self) -> int:
        """How many more may enter now."""
        return self._limit - self._inside

    def apply(self, limit: int, *, queue_size: int, queue_timeout: float) -> None:  # noqa: ARG002
        """Use new bounds, but for *limit*: the page knows it."""
        self._page.settle(self._set_limit)
        super().apply(self._limit, queue_size=self._share(queue_size), queue_timeout=queue_timeout)

    def serve(self) -> None:
        """Let in the waiters that may start now, and tell the siblings."""
        super().serve()
        self._tell()

    def move(self) -> bool:
        """Take the places that this slot was given, and give what siblings need.

        Return whether one of them starves.
        """
        page = self._page
        page.settle(self._set_limit)
        leaving = self.closed
        self._starving = False
        if not leaving and not page.wanted(RESERVE):
            return False
        needs = self._needs()
        self._starving = bool(needs) and needs[0][0] > 0
        spare = 0 if self._queue else self._limit - self._inside - page.owed(page.slot)
        for at, (need, slot) in enumerate(needs):
            if leaving:
                # All of it, evenly; the last one goes to the neediest.
                count = -(-spare // (len(needs) - at))
            elif need > 0:
                count = min(spare, need + RESERVE)
            elif need + RESERVE > 0:
                count = (spare - RESERVE) // 2
            else:
                break
            if count > 0:
                page.give(slot, count, self._set_limit)
                spare -= count
        self._pay([slot for _need, slot in needs])
        return self._starving

    def _pay(self, siblings: list[int]) -> None:
        """Pay what a sibling owes, from places that are taken, if this slot has the most places.

        A lowered total so holds at once, whoever has the clients; those that are too many stay.
        """
        page = self._page
        debtors = [slot for slot in siblings if page.owed(slot)]
        if debtors and all(page.places(slot) <= self._limit for slot in siblings):
            for slot in debtors:
                if (count := min(page.owed(slot), self._limit)) > 0:
                    page.give(slot, count, self._set_limit)

    def _needs(self) -> list[tuple[int, int]]:
        """Return how many places each sibling lacks for its clients, and its slot.

        The neediest one first.
        """
        page = self._page
        siblings = page.siblings()
        return sorted(
            ((page.waiting(slot) - page.free(slot), slot) for slot in siblings), reverse=True
        )

    def _set_limit(self, limit: int) -> None:
        raised = limit > self._limit
        self._limit = limit
        if raised:
            self.serve()
        elif self._inside >= limit:
            self._full_since = self._clock()

    def _grace(self) -> float:
        page = self._page
        page.settle(self._set_limit)
        own = self._limit - self._inside
        return GRACE if own + page.room() > self.waiting else 0.0

    def _enter(self) -> None:
        super()._enter()
        try:
            self._tell()
        except BaseException:
            self._inside -= 1
            raise

    def _leave(self) -> None:
        if self._starving and (heir := self._heir()) is not None:
            self._page.give(heir, 1, self._lower_and_leave)
        else:
            super()._leave()

    def _lower_and_leave(self, limit: int) -> None:
        self._limit = limit
        super()._leave()

    def _heir(self) -> int | None:
        """Return the slot that gets a place that ends now; None if it stays here."""
        page = self._page
        if self._inside > self._limit or page.owed(page.slot):
            return None
        needs = self._needs()
        if not needs or needs[0][0] <= 0:
            self._starving = False
            return None
        slot = needs[0][1]
        return slot if not self._queue or page.places(slot) < self._limit * EVEN - 1 else None

    def _resumed(self, waiter: Waiter[Place]) -> None:
        super()._resumed(waiter)
        self._tell()

    def _tell(self) -> None:
        waiting = len(self._queue)
        self._page.tell(inside=self._inside, waiting=waiting)
        if waiting:
            self._on_wait()
