"""The loads of the workers of one host, in shared memory: hints, by which they balance accepted
connections.

Each worker process has a slot; there are four for each worker, since a rolling restart starts the
new process before the old one ends, and former processes keep their answers. Every cell is a
number of 8 bytes with one writer at a time: the worker of its slot, or the parent, for a slot
whose process it has reaped. Every process may read. No cell is a limit: a wrong value costs
balance, and the places of the workers are leases (wings/cluster/limits/grants.py). The page is
mapped by the parent and by all workers (a memfd); it has no lock.

A store through a memoryview of format `q` is a memcpy of 8 bytes in CPython (`PACK_SINGLE` in
Objects/memoryobject.c), which compilers turn into one store. Aligned stores of 8 bytes are atomic
on every 64-bit machine that CPython supports.
"""

from __future__ import annotations

import mmap
import os
import sys
import time
import zlib
from enum import IntEnum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

SLOTS_PER_WORKER = 4
# Seconds. A worker whose beat is later than that is blocked, or gone, and does not count for the
# mean.
LATE = 0.075
# Seconds for which the numbers of a former process that has ended are of interest.
FRESH = 10.0

_WORD: Final = 8
_NANOSECONDS = 1_000_000_000


class _Column(IntEnum):
    CONNECTIONS = 0
    BEAT = 1
    ACCEPTING = 2
    # The cluster instance of its worker, and the last one that has ended in this slot.
    INSTANCE = 3
    GONE = 4
    # Of a former process that ends: its answers that came to their end, and those that were cut.
    KEPT = 5
    CUT = 6
    # When it has told these two.
    TOLD = 7


# Cells in front of the columns: the layout, and the number of slots.
_HEAD: Final = 2
# The layout of the page, which a worker of another version than its parent's must not misread.
# Increment the number when cells get another meaning.
_LAYOUT: Final = zlib.crc32(repr((3, list(_Column), SLOTS_PER_WORKER)).encode())


class OtherLayout(Exception):
    """The page was made by another version of aioserver, whose cells mean something else."""


class Loads:
    """The page, as one process sees it.

    *fd*: the descriptor of the page, which stays open. *slot*: that of this worker; None in the
    parent and in observers. A worker's constructor takes its slot over.

    Raises:
        OtherLayout: another version of aioserver has made the page; nothing on it was touched.
    """

    def __init__(
        self, fd: int, slot: int | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.fd = fd
        self._clock = clock
        if os.pread(fd, _WORD, 0) != _LAYOUT.to_bytes(_WORD, sys.byteorder):
            raise OtherLayout("the page of this host's workers has another layout")
        self._map = mmap.mmap(fd, os.fstat(fd).st_size)
        self._cells = memoryview(self._map).cast("q")
        #: The number of slots.
        self.slots = self._cells[1]
        self._slot = slot
        if slot is not None:
            self.reaped(slot)

    @classmethod
    def create(cls, workers: int) -> Loads:
        """Make a page for *workers*; in the parent.

        Raises:
            OSError: there is no memory for it.
        """
        slots = SLOTS_PER_WORKER * workers
        size = _WORD * (_HEAD + len(_Column) * slots)
        fd = os.memfd_create("aioserver-loads")
        os.ftruncate(fd, size)
        with mmap.mmap(fd, size) as memory, memoryview(memory).cast("q") as cells:
            cells[0], cells[1] = _LAYOUT, slots
        return cls(fd)

    def close(self) -> None:
        """Release the memory; *fd* stays open. Nothing may be called after it."""
        self._cells.release()
        self._map.close()

    @property
    def slot(self) -> int:
        """The slot of this worker."""
        assert self._slot is not None, "this process has no slot"
        return self._slot

    def connections(self) -> list[int]:
        """Return the connections of each slot."""
        return self._all(_Column.CONNECTIONS)

    def accepting(self) -> list[int]:
        """Return the slots whose workers accept connections, with a beat that is no more than
        LATE.
        """
        oldest = int((self._clock() - LATE) * _NANOSECONDS)
        beats = self._all(_Column.BEAT)
        states = self._all(_Column.ACCEPTING)
        return [slot for slot, accepts in enumerate(states) if accepts and beats[slot] >= oldest]

    def in_use(self) -> set[int]:
        """Return the slots whose workers have connections, or may get some."""
        columns = self._all(_Column.CONNECTIONS), self._all(_Column.ACCEPTING)
        return {slot for slot, cells in enumerate(zip(*columns, strict=True)) if any(cells)}

    def gone(self) -> list[int]:
        """Return, for each slot, the instance whose process has ended last there; 0: none."""
        return self._all(_Column.GONE)

    def beat(self, after: float, *, accepting: bool) -> None:
        """Report that this worker's loop turns, whether it accepts, and that the next beat is in
        *after* seconds.
        """
        self._put(_Column.ACCEPTING, self.slot, int(accepting))
        self._put(_Column.BEAT, self.slot, int((self._clock() + after) * _NANOSECONDS))

    def tell_connections(self, connections: int) -> None:
        """Report the number of connections here."""
        self._put(_Column.CONNECTIONS, self.slot, connections)

    def tell_instance(self, token: int) -> None:
        """Report the cluster instance of this worker.

        *token* is not 0, and is never used by another instance.
        """
        self.tell_kept(0, 0)
        self._put(_Column.INSTANCE, self.slot, token)

    def tell_kept(self, kept: int, cut: int) -> None:
        """Report, of this former process that ends, the answers that came to their end since it
        was replaced, and those that are cut.
        """
        self._put(_Column.KEPT, self.slot, kept)
        self._put(_Column.CUT, self.slot, cut)
        self._put(_Column.TOLD, self.slot, int(self._clock() * _NANOSECONDS))

    def kept(self, slot: int) -> tuple[int, int]:
        """Return the numbers that the last process of *slot* that has ended has told within FRESH
        seconds; zeros if there are none.
        """
        if self._all(_Column.TOLD)[slot] < (self._clock() - FRESH) * _NANOSECONDS:
            return 0, 0
        return self._all(_Column.KEPT)[slot], self._all(_Column.CUT)[slot]

    def reaped(self, slot: int) -> None:
        """Note that the process of *slot* is gone."""
        if instance := self._cells[_HEAD + _Column.INSTANCE * self.slots + slot]:
            self._put(_Column.GONE, slot, instance)
        for column in (_Column.CONNECTIONS, _Column.ACCEPTING, _Column.INSTANCE):
            self._put(column, slot, 0)

    def _put(self, column: _Column, slot: int, value: int) -> None:
        self._cells[_HEAD + column * self.slots + slot] = value

    def _all(self, column: _Column) -> list[int]:
        start = _HEAD + column * self.slots
        return self._cells[start : start + self.slots].tolist()
