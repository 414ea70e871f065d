"""The page of shared memory on which the workers of one host share the places of
`max_connections`.

This file is one concept: the layout of the page and each step that changes it hold one invariant.

Each worker process has a **slot**, and its gate has a limit of its own. Places move from slot to
slot, so that nobody is refused in one worker while another one has room. The page is mapped by the
parent and by all workers (a memfd, or an unlinked file); it has no lock, and nothing on it waits.

**The cells.** Every cell is a number of 8 bytes with exactly one writer at a time: the worker of
its slot, or the parent, for a slot whose process it has reaped. Anybody may read. Each slot has

    target        places that the configuration gives it; written by the parent alone
    base          how much of that is in effect; moves towards `target`
    given[i][j]   places that slot i has ever given to slot j; only grows
    limit         the limit of its gate; for observers
    state, beat, inside, waiting, connections     what its siblings and the pages know of it
    instance, gone   which instance of the cluster its worker is, and which one that ended last was

**Places.** A slot *i* has `places(i) = base(i) + Σj given[j][i] - Σj given[i][j]`.

To give k places, a worker first lowers its own gate by k and then adds k to one cell. A worker
raises its gate only after it has read such a cell. In between the places are nobody's. Therefore

    Σ limits <= Σ places <= Σ base <= Σ max(base, target) = the bound

holds at every moment, also between any two stores, and with each store seen by the others however
late: a stale cell holds fewer given places, never more. No store depends on a cell that somebody
else writes meanwhile, which is why there is no lock, and why a process may be killed anywhere: the
worker that is started again in its slot reads the cells and has exactly the places of the dead
one.

**A rolling restart** needs slots of its own, so there are two for each worker. The new worker's
slot begins with nothing; a worker that ends gives away each place that is free; what is left when
its process is gone is moved by the parent (`retire`). **A reload** that changes `max_connections`
changes the targets (`resize`). A raised target is in effect at the next beat of its worker. A
lowered one is paid with the places that the worker has, the rest with those that it gets. The
parent raises no target before the bound has room for it, so the bound is never above the larger
one of two totals.

**What it relies on.** A store through a memoryview of format `q` is a memcpy of 8 bytes in CPython
(`PACK_SINGLE` in Objects/memoryobject.c), which compilers turn into one store; aligned stores of 8
bytes are atomic on every 64-bit machine that CPython supports. `tests/workers/test_shared_page.py`
looks for torn numbers. The order in which stores of *different* cells are seen does not matter,
see above.

A reader of many cells that needs them all at one moment collects them twice, until two collections
are equal (Afek et al., "Atomic Snapshots of Shared Memory", 1993, the simple case): see `collect`.
"""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
import time
import zlib
from enum import IntEnum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# Each worker has two slots: a rolling restart starts the new process before the old one ends.
SLOTS_PER_WORKER = 2
# Seconds. A worker whose beat is later than that is blocked, or gone: it counts for no mean, and
# is given nothing.
LATE = 0.075
# Seconds. A worker whose beat is later than that will not give a place soon, though it may have
# one.
BUSY = 1.0
# Reads that `collect` tries. Two of them are equal unless places move all the time.
MAX_COLLECTIONS = 1000

# Keys with a `max_connections` of their own that each slot's table has room for.
MAX_KEYS = 1024

_WORD: Final = 8
# Words: a digest and a count for each key.
_TABLE: Final = 2 * MAX_KEYS
_NO_KEYS: Final = memoryview(bytes(_WORD * _TABLE)).cast("q")
_NANOSECONDS = 1_000_000_000


class State(IntEnum):
    """What the worker of a slot does.

    *DRAINING*: it accepts no more connections, but still serves those that it has. *LEAVING*: it
    lets in nobody any more, and gives its places away.
    """

    ABSENT = 0
    SERVING = 1
    DRAINING = 2
    LEAVING = 3


class _Column(IntEnum):
    TARGET = 0
    BASE = 1
    LIMIT = 2
    STATE = 3
    BEAT = 4
    INSIDE = 5
    WAITING = 6
    CONNECTIONS = 7
    INSTANCE = 8
    GONE = 9


# Cells in front of the columns: the layout, and the number of slots.
_HEAD: Final = 2
# The layout of the page, which a worker of another version than its parent's must not misread.
# Count up the number where cells get another meaning.
_LAYOUT: Final = zlib.crc32(repr((1, list(_Column), SLOTS_PER_WORKER, MAX_KEYS)).encode())


class OtherLayout(Exception):
    """The page was made by another version of aioserver, whose cells mean something else."""


class SharedPage:
    """The page, as one process sees it.

    Always: `0 <= places(i)`, and the sum of all limits is at most the bound, see the head of this
    file.

    *fd*: the descriptor of the page, which stays open. *slot*: that of this worker; None in the
    parent and in observers. A worker's constructor takes its slot over: whatever the last process
    left there is put in order.

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
        self._given = _HEAD + len(_Column) * self.slots
        self._tables = self._given + self.slots * self.slots
        starts = (self._tables + slot * _TABLE for slot in range(self.slots))
        self._key_tables = [self._cells[start : start + _TABLE] for start in starts]
        self._slot = slot
        if slot is not None:
            self.reaped(slot)

    @classmethod
    def create(cls, workers: int, max_connections: int) -> SharedPage:
        """Make a page for *workers*, whose first slots share *max_connections* evenly; in the
        parent.

        Raises:
            OSError: there is no memory for it.
        """
        slots = SLOTS_PER_WORKER * workers
        size = _WORD * (_HEAD + len(_Column) * slots + slots * slots + slots * _TABLE)
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create("aioserver-page")
        else:
            with tempfile.TemporaryFile() as file:
                fd = os.dup(file.fileno())
        os.ftruncate(fd, size)
        with mmap.mmap(fd, size) as memory, memoryview(memory).cast("q") as cells:
            cells[0], cells[1] = _LAYOUT, slots
        page = cls(fd)
        page.resize(max_connections, range(workers))
        for slot in range(workers):
            page._put(_Column.BASE, slot, page._get(_Column.TARGET, slot))
        return page

    def close(self) -> None:
        """Let go of the memory; *fd* stays open. Nothing may be called after it."""
        for view in (*self._key_tables, self._cells):
            view.release()
        self._map.close()

    @property
    def slot(self) -> int:
        """The slot of this worker."""
        assert self._slot is not None, "this process has no slot"
        return self._slot

    # What anybody may ask.

    def places(self, slot: int) -> int:
        """Return how many places *slot* has."""
        received, given = self._moved(slot)
        return self._get(_Column.BASE, slot) + received - given

    def owed(self, slot: int) -> int:
        """Return how many places of a lowered total *slot* has still to pay.

        What it was given and has not seen yet is on its way: it will pay with that, and must not
        be given it twice.
        """
        unseen = max(0, self.places(slot) - self._get(_Column.LIMIT, slot))
        return max(0, self._get(_Column.BASE, slot) - self._get(_Column.TARGET, slot) - unseen)

    def inside(self, slot: int) -> int:
        """Return how many places of *slot* are taken."""
        return self._get(_Column.INSIDE, slot)

    def waiting(self, slot: int) -> int:
        """Return how many clients wait in *slot*."""
        return self._get(_Column.WAITING, slot)

    def free(self, slot: int) -> int:
        """Return how many more clients *slot* could let in; below 0: it has let in too many for a
        lowered total.
        """
        return self.places(slot) - self.inside(slot) - self.owed(slot)

    def turning(self, *states: State, late: float = LATE) -> list[int]:
        """Return the slots whose workers are in one of *states*, with a beat that is at most
        *late* seconds late.
        """
        oldest = int((self._clock() - late) * _NANOSECONDS)
        beats = self._all(_Column.BEAT)
        return [
            slot
            for slot, state in enumerate(self._all(_Column.STATE))
            if state in states and beats[slot] >= oldest
        ]

    def siblings(self, late: float = LATE) -> list[int]:
        """Return the slots of the other workers that let clients in; *late*: see `turning`."""
        slots = self.turning(State.SERVING, State.DRAINING, late=late)
        return [slot for slot in slots if slot != self._slot]

    def connections(self) -> list[int]:
        """Return the connections of each slot."""
        return self._all(_Column.CONNECTIONS)

    def room(self) -> int:
        """Return how many more clients the siblings of this worker could let in, or a busy one
        among them soon.
        """
        return sum(max(0, self.free(slot)) for slot in self.siblings(late=BUSY))

    def wanted(self, reserve: int) -> bool:
        """Return whether some sibling has fewer than *reserve* places free, or clients that wait:
        roughly, but quickly.
        """
        limits, insides = self._all(_Column.LIMIT), self._all(_Column.INSIDE)
        waiting, states = self._all(_Column.WAITING), self._all(_Column.STATE)
        return any(
            State.ABSENT < states[slot] < State.LEAVING
            and slot != self._slot
            and limits[slot] - insides[slot] - waiting[slot] < reserve
            for slot in range(self.slots)
        )

    def gone(self) -> list[int]:
        """Return of each slot the instance whose process has ended last there; 0: none."""
        return self._all(_Column.GONE)

    def key_table(self, slot: int) -> memoryview[int]:
        """Return the table of *slot* for key_counts.py; only its worker writes it."""
        return self._key_tables[slot]

    @property
    def bound(self) -> int:
        """What the limits of all gates can add up to, at most."""
        targets, bases = self._all(_Column.TARGET), self._all(_Column.BASE)
        return sum(map(max, targets, bases))

    def collect(self) -> tuple[list[int], int]:
        """Return the limits of all gates, and the bound, as they were at one moment.

        Raises:
            TimeoutError: places move so often that no such moment was met.
        """
        before: list[int] = []
        for _ in range(MAX_COLLECTIONS):
            cells = self._cells[: self._tables].tolist()
            moving = cells[: _HEAD + _Column.STATE * self.slots] + cells[self._given :]
            if moving == before:
                targets, bases, limits = (
                    cells[self._at(column, 0) : self._at(column, self.slots)]
                    for column in (_Column.TARGET, _Column.BASE, _Column.LIMIT)
                )
                return limits, sum(map(max, targets, bases))
            before = moving
        raise TimeoutError("places move all the time")

    # What the worker of this slot does.

    def beat(self, state: State, after: float) -> None:
        """Say that this worker's loop turns, what it does, and that the next beat is *after* so
        many seconds.
        """
        self._put(_Column.STATE, self.slot, state)
        self._put(_Column.BEAT, self.slot, int((self._clock() + after) * _NANOSECONDS))

    def tell(self, *, inside: int, waiting: int) -> None:
        """Say how many places are taken here, and how many clients wait."""
        self._put(_Column.INSIDE, self.slot, inside)
        self._put(_Column.WAITING, self.slot, waiting)

    def tell_instance(self, token: int) -> None:
        """Say which instance of the cluster this worker is.

        *token* is not 0, and no other one ever has it.
        """
        self._put(_Column.INSTANCE, self.slot, token)

    def tell_connections(self, connections: int) -> None:
        """Say how many connections there are here."""
        self._put(_Column.CONNECTIONS, self.slot, connections)

    def settle(self, set_limit: Callable[[int], None]) -> None:
        """Call *set_limit* with the places of this slot, if its gate has another limit now.

        A target that has changed comes into effect, as far as there are places for it.
        """
        slot = self.slot
        base, places = self._get(_Column.BASE, slot), self.places(slot)
        change = max(self._get(_Column.TARGET, slot) - base, -places)
        if places + change != self._get(_Column.LIMIT, slot):
            self._limit(places + change, set_limit)
        if change:
            # Not before the gate is lowered: the parent may give what is not in `base` to others.
            self._put(_Column.BASE, slot, base + change)

    def give(self, to: int, count: int, set_limit: Callable[[int], None]) -> None:
        """Give *count* places to the slot *to*.

        *set_limit* lowers the limit of this worker's gate.

        Raises:
            ValueError: this slot has not so many places.
        """
        places = self.places(self.slot)
        if not 0 < count <= places:
            raise ValueError(f"{count} places to give, of {places}")
        # In this order: in between the places are nobody's, in the other one they would be of
        # both.
        self._limit(places - count, set_limit)
        self._add_given(self.slot, to, count)

    def _limit(self, limit: int, set_limit: Callable[[int], None]) -> None:
        set_limit(limit)
        self._put(_Column.LIMIT, self.slot, limit)

    # What the parent does.

    def resize(self, max_connections: int, slots: Sequence[int]) -> bool:
        """Share a changed total among *slots*, those that serve.

        Return whether that was possible at once.

        Otherwise call it again a little later: a slot has still to pay for an earlier, lower
        total.
        """
        targets = self._all(_Column.TARGET)
        change = max_connections - sum(targets)
        possible = max(0, min(change, max_connections - self.bound)) if change > 0 else change
        each, rest = divmod(possible, len(slots))
        for rank, slot in enumerate(slots):
            if step := each + (rank < rest):
                self._put(_Column.TARGET, slot, targets[slot] + step)
        return possible == change

    def reaped(self, slot: int) -> None:
        """Note that the process of *slot* is gone. Its places stay there for the next one."""
        self._put(_Column.STATE, slot, State.ABSENT)
        if instance := self._get(_Column.INSTANCE, slot):
            self._put(_Column.GONE, slot, instance)
            self._put(_Column.INSTANCE, slot, 0)
        for column in (_Column.LIMIT, _Column.INSIDE, _Column.WAITING, _Column.CONNECTIONS):
            self._put(column, slot, 0)
        self.key_table(slot)[:] = _NO_KEYS

    def retire(self, slot: int, heir: int) -> None:
        """Note that the process of *slot* is gone, and move all its places to the slot *heir*.

        For a process that another one has replaced, or that is not started again soon. A process
        that is started in *slot* later begins without a place, and is given some by its siblings.
        """
        self.reaped(slot)
        base, target = self._get(_Column.BASE, slot), self._get(_Column.TARGET, slot)
        # What the dead one had not put in effect: first off its own target, so that the bound
        # never rises.
        self._put(_Column.TARGET, slot, base)
        self._put(_Column.TARGET, heir, self._get(_Column.TARGET, heir) + target - base)
        if places := self.places(slot):
            self._add_given(slot, heir, places)

    # The cells.

    def _at(self, column: _Column, slot: int) -> int:
        return _HEAD + column * self.slots + slot

    def _get(self, column: _Column, slot: int) -> int:
        return self._cells[_HEAD + column * self.slots + slot]

    def _put(self, column: _Column, slot: int, value: int) -> None:
        self._cells[_HEAD + column * self.slots + slot] = value

    def _all(self, column: _Column) -> list[int]:
        start = _HEAD + column * self.slots
        return self._cells[start : start + self.slots].tolist()

    def _moved(self, slot: int) -> tuple[int, int]:
        """Return how many places *slot* has ever received, and how many it has given."""
        row = self._given + slot * self.slots
        given = self._cells[row : row + self.slots].tolist()
        received = self._cells[self._given + slot : self._tables : self.slots].tolist()
        return sum(received), sum(given)

    def _add_given(self, slot: int, to: int, count: int) -> None:
        at = self._given + slot * self.slots + to
        self._cells[at] += count
