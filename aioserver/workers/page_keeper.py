"""The parent's side of the shared page: whose places are whose when workers start and end, and how
many there are.

Each worker has two slots (shared_page.py), of which one is used but while a worker is being
replaced. What the worker of a slot leaves there belongs to the next worker in it, or to the one in
its other slot.
"""

from __future__ import annotations

import time

from aioserver.workers.shared_page import SharedPage

# Seconds until a raised total is tried again for which workers have to give places first.
RESIZE_AGAIN = 0.1


class PageKeeper:
    """Keeps the page of *workers* workers, which have *max_connections* places together.

    Always: a slot without a process has no place, if the other slot of its worker has a process.
    """

    def __init__(self, workers: int, max_connections: int) -> None:
        self._workers = workers
        self._total = max_connections
        self._page = SharedPage.create(workers, max_connections)
        # The slots of the processes that have not been reaped.
        self._slots: dict[int, int] = {}
        # When the page is to be given a total again for which it had no room; None if it has the
        # one of the configuration.
        self.resize_at: float | None = None

    @property
    def fd(self) -> int:
        """The descriptor of the page."""
        return self._page.fd

    def starting(self, slot: int) -> None:
        """Note that a process is about to be started in *slot*."""
        sibling = self._sibling(slot)
        if sibling not in self._slots.values():
            # The places of a former worker.
            self._page.retire(sibling, slot)

    def started(self, slot: int, pid: int) -> None:
        """Note that the process *pid* is that of *slot*."""
        self._slots[pid] = slot

    def reaped(self, pid: int) -> None:
        """Note that the process *pid* is gone, which may be none of a slot."""
        if (slot := self._slots.pop(pid, None)) is None:
            return
        self._page.reaped(slot)
        if (sibling := self._sibling(slot)) in self._slots.values():
            self._page.retire(slot, sibling)

    def resize(self, max_connections: int) -> None:
        """Have *max_connections* places from now on, or as soon as workers have given what is too
        much.
        """
        self._total = max_connections
        self._resize()

    def turn(self) -> None:
        """Do what is due."""
        if self.resize_at is not None and time.monotonic() >= self.resize_at:
            self._resize()

    def _resize(self) -> None:
        slots = sorted(self._slots.values())
        done = bool(slots) and self._page.resize(self._total, slots)
        self.resize_at = None if done else time.monotonic() + RESIZE_AGAIN

    def _sibling(self, slot: int) -> int:
        """Return the other slot of the same worker."""
        return (slot + self._workers) % (2 * self._workers)
