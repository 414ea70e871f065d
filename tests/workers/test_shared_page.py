"""The page of shared memory: whatever happens to its processes, its limits add up to no more than
the total.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.workers.shared_page import LATE, SharedPage, State
from tests.support.clock import FakeClock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WORKERS = 3
STEPS = 1500
ACTIONS = ("settle", "settle", "enter", "leave", "give", "give", "kill", "resize")


class Killed(BaseException):
    """The process was killed between two stores."""


class WatchedPage(SharedPage):
    """A page that calls *after* each store of a number that decides about places."""

    def __init__(self, *args: Any, after: Callable[[], None]) -> None:
        self._after: Callable[[], None] = lambda: None
        super().__init__(*args)
        self._after = after

    def _put(self, *args: Any) -> None:
        super()._put(*args)
        self._after()

    def _add_given(self, *args: Any) -> None:
        super()._add_given(*args)
        self._after()


class World:
    """The parent, and workers of which each is a gate's limit and how many are inside."""

    def __init__(self, page: SharedPage, total: int, rng: random.Random) -> None:
        self.rng, self.total = rng, total
        self.parent = WatchedPage(page.fd, after=self.check)
        self.limits: dict[int, int] = {}
        self.inside: dict[int, int] = {}
        self.pages: dict[int, WatchedPage] = {}
        self.ceiling = total
        # The stores after which the process that stores is killed; beyond: it lives.
        self.stores_left = 0
        for slot in range(WORKERS):
            self.start(slot)

    def check(self) -> None:
        page, bound = self.parent, self.parent.bound
        places = [page.places(slot) for slot in range(page.slots)]
        assert min(places) >= 0
        # Each worker may raise its gate in just this moment to what the page says.
        limits = [max(self.limits.get(slot, 0), has) for slot, has in enumerate(places)]
        assert sum(limits) <= bound
        # Only a resize may raise the bound, and not above the total that it asks for.
        assert bound <= self.ceiling
        self.stores_left -= 1
        if self.stores_left == 0:
            raise Killed

    def setter(self, slot: int) -> Callable[[int], None]:
        def set_limit(limit: int) -> None:
            self.limits[slot] = limit
            self.check()

        return set_limit

    def start(self, slot: int) -> None:
        self.limits[slot] = self.inside[slot] = 0
        self.pages[slot] = WatchedPage(self.parent.fd, slot, after=self.check)
        self.pages[slot].settle(self.setter(slot))

    def end(self, slot: int) -> None:
        """End the process of *slot*, at once."""
        self.pages.pop(slot).close()
        del self.limits[slot], self.inside[slot]

    def replace(self, slot: int) -> None:
        """End the process of *slot*, and start it again in a slot that is free: there, or in
        another one.
        """
        self.end(slot)
        free = [slot for slot in range(self.parent.slots) if slot not in self.pages]
        other = self.rng.choice(free)
        if other != slot:
            self.start(other)
            self.parent.retire(slot, self.rng.choice(list(self.pages)))
        else:
            self.parent.reaped(slot)
            self.start(slot)

    def step(self) -> None:
        self.ceiling = self.parent.bound
        slot = self.rng.choice(list(self.pages))
        page = self.pages[slot]
        match self.rng.choice(ACTIONS):
            case "settle":
                self.may_die(slot, lambda: page.settle(self.setter(slot)))
            case "enter":
                self.inside[slot] += self.inside[slot] < self.limits[slot]
                page.tell(inside=self.inside[slot], waiting=0)
            case "leave":
                self.inside[slot] -= self.inside[slot] > 0
                page.tell(inside=self.inside[slot], waiting=0)
            case "give" if (places := page.places(slot)) > 0:
                to = self.rng.choice([other for other in range(page.slots) if other != slot])
                count = self.rng.randint(1, places)
                self.may_die(slot, lambda: page.give(to, count, self.setter(slot)))
            case "kill":
                self.replace(slot)
            case "resize":
                if self.rng.random() < 0.3:
                    self.total = self.rng.randint(WORKERS, 40)
                self.ceiling = max(self.ceiling, self.total)
                self.parent.resize(self.total, self.rng.sample(list(self.pages), k=WORKERS - 1))

    def may_die(self, slot: int, action: Callable[[], None]) -> None:
        """Do *action*; once in four the process is killed after one of its first stores."""
        self.stores_left = self.rng.randint(1, 3) if self.rng.random() < 0.25 else 0
        try:
            action()
        except Killed:
            self.stores_left = 0
            self.replace(slot)
        self.stores_left = 0


@pytest.fixture
def page() -> Iterator[SharedPage]:
    page = SharedPage.create(WORKERS, 20)
    yield page
    page.close()
    os.close(page.fd)


@pytest.mark.parametrize("seed", range(20))
def test_the_limits_never_add_up_to_more_than_the_total(page: SharedPage, seed: int) -> None:
    world = World(page, 20, random.Random(seed))

    for _ in range(STEPS):
        world.step()

    # Once all have settled, no place was lost, and none was made.
    world.ceiling = max(world.parent.bound, world.total)
    for _ in range(3 * WORKERS):
        pay_all(world)
        settle_all(world)
        world.parent.resize(world.total, list(world.pages))
        settle_all(world)
    assert world.parent.bound == sum(world.limits.values()) == world.total
    for opened in (*world.pages.values(), world.parent):
        opened.close()


def settle_all(world: World) -> None:
    for slot, page in world.pages.items():
        page.settle(world.setter(slot))


def pay_all(world: World) -> None:
    """Let who has places give them to who owes some."""
    for slot, page in world.pages.items():
        for other in world.pages:
            if other != slot and (count := min(page.owed(other), page.places(slot))) > 0:
                page.give(other, count, world.setter(slot))
    for slot in range(world.parent.slots):
        if slot not in world.pages:
            world.parent.retire(slot, next(iter(world.pages)))


def test_a_total_that_rises_again_waits_for_those_that_have_still_to_pay(page: SharedPage) -> None:
    workers = [SharedPage(page.fd, slot) for slot in range(WORKERS)]
    limits = [0] * WORKERS

    def settle(slot: int) -> None:
        workers[slot].settle(lambda limit: limits.__setitem__(slot, limit))

    for slot in range(WORKERS):
        settle(slot)
    assert limits == [7, 7, 6]

    assert page.resize(11, [0])
    assert not page.resize(14, [1])
    settle(1)
    assert limits == [7, 7, 6]
    settle(0)
    assert (limits, page.owed(0)) == ([0, 7, 6], 2)
    assert not page.resize(14, [1])
    settle(1)
    assert limits == [0, 8, 6]
    workers[1].give(0, 2, lambda limit: limits.__setitem__(1, limit))
    settle(0)
    assert page.resize(14, [1])
    settle(1)
    assert (limits, page.owed(0), page.bound) == ([0, 8, 6], 0, 14)
    for worker in workers:
        worker.close()


def test_a_worker_that_is_killed_and_started_again_has_the_same_places(page: SharedPage) -> None:
    first, second = SharedPage(page.fd, 0), SharedPage(page.fd, 1)
    first.settle(ignore)
    first.give(1, 3, ignore)
    second.tell(inside=5, waiting=2)
    second.tell_connections(9)

    second.close()
    page.reaped(1)

    assert page.places(1) == page.free(1) == 7 + 3
    assert (page.waiting(1), page.connections()[1]) == (0, 0)
    again = SharedPage(page.fd, 1)
    limits: list[int] = []
    again.settle(limits.append)
    assert limits == [10]
    for worker in (first, again):
        worker.close()


def test_a_replaced_process_leaves_its_places_and_its_debt_to_its_heir(page: SharedPage) -> None:
    old, new = SharedPage(page.fd, 0), SharedPage(page.fd, WORKERS)
    old.settle(ignore)
    old.give(1, 5, ignore)
    page.resize(14, [0])  # it has 2 left, and owes 6

    page.retire(0, WORKERS)
    new.settle(ignore)

    assert page.places(0) == page.places(WORKERS) == 0
    assert (page.owed(0), page.owed(WORKERS), page.free(WORKERS)) == (0, 4, -4)
    assert page.bound == 7 + 6 + 5
    for worker in (old, new):
        worker.close()


def test_nobody_gives_what_it_has_not(page: SharedPage) -> None:
    worker = SharedPage(page.fd, 0)
    worker.settle(ignore)

    with pytest.raises(ValueError, match="8 places to give, of 7"):
        worker.give(1, 8, ignore)
    worker.close()


def test_a_worker_serves_while_its_beat_is_fresh(page: SharedPage) -> None:
    clock = FakeClock()
    workers = [SharedPage(page.fd, slot, clock) for slot in range(2)]
    for worker in workers:
        worker.beat(State.SERVING, 0)
    observer = SharedPage(page.fd, clock=clock)
    assert observer.turning(State.SERVING) == [0, 1]

    clock.advance(LATE * 0.9)
    workers[1].beat(State.SERVING, 0)
    clock.advance(LATE * 0.2)
    assert observer.turning(State.SERVING) == [1]
    workers[1].beat(State.LEAVING, 0)
    assert observer.turning(State.SERVING) == []
    for opened in (*workers, observer):
        opened.close()


# Processes. Each gives places to the others for a moment, and says that it has been there.
GIVER = """
import sys, time, random
from aioserver.workers.shared_page import SharedPage
fd, slot, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
page, rng = SharedPage(fd, slot), random.Random(slot)
limit = [0]
def set_limit(places): limit[0] = places
end = time.monotonic() + seconds
while time.monotonic() < end:
    page.settle(set_limit)
    if limit[0] > 0:
        page.give(rng.choice([one for one in range(3) if one != slot]), rng.randint(1, limit[0]), set_limit)
    if rng.random() < 0.02:
        time.sleep(0.0002)
page.settle(set_limit)
"""
# Two processes write numbers into two cells, whose halves are equal, and each looks at that of the
# other.
HAMMER = """
import mmap, sys, time
own, other, count = map(int, sys.argv[2:])
cells = memoryview(mmap.mmap(int(sys.argv[1]), 4096)).cast("q")
torn = 0
cells[own] = 1 << 32 | 1
started = time.monotonic()
while not cells[other]:
    assert time.monotonic() < started + 30, "the other process did not start"
for at in range(count):
    half = at & 0x7FFFFFFF
    cells[own] = half << 32 | half
    number = cells[other]
    torn += number >> 32 != number & 0xFFFFFFFF
sys.exit(torn > 0)
"""


def started(script: str, page: int, *arguments: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", script, str(page), *map(str, arguments)], pass_fds=[page]
    )


def test_an_observer_never_sees_limits_that_add_up_to_more(page: SharedPage) -> None:
    workers = [started(GIVER, page.fd, slot, 0.4) for slot in range(WORKERS)]
    seen = set()
    while any([worker.poll() is None for worker in workers]):  # noqa: C419 - reap all
        limits, bound = page.collect()
        assert sum(limits) <= bound == 20
        seen.add(tuple(limits))
    assert len(seen) > 1

    for slot, worker in enumerate(workers):
        assert worker.wait() == 0
        SharedPage(page.fd, slot).close()
    assert sum(page.places(slot) for slot in range(page.slots)) == 20


def test_a_number_is_never_torn(page: SharedPage) -> None:
    os.ftruncate(page.fd, 4096)
    # Side by side in one line of the cache, which the two processes take from each other.
    first, other = (
        started(HAMMER, page.fd, *cells, 400_000) for cells in ((100, 101), (101, 100))
    )

    assert (first.wait(), other.wait()) == (0, 0)


def ignore(_limit: int) -> None:
    """Set the limit of no gate."""


def test_a_debt_is_paid_once_however_late_the_debtor_looks() -> None:
    page = SharedPage.create(2, 20)
    limits = {0: 0, 1: 0}
    slots = {number: SharedPage(page.fd, number) for number in (0, 1)}
    setters = {number: partial(limits.__setitem__, number) for number in (0, 1)}
    for number, slot in slots.items():
        slot.settle(setters[number])
    slots[1].give(0, 10, setters[1])
    slots[0].settle(setters[0])
    assert limits == {0: 20, 1: 0}

    page.resize(12, [0, 1])
    slots[0].settle(setters[0])
    assert slots[0].owed(1) == 4
    slots[0].give(1, 4, setters[0])

    # The debtor has not looked yet.
    assert slots[0].owed(1) == 0
    slots[1].settle(setters[1])
    assert limits == {0: 12, 1: 0}
    assert slots[0].owed(1) == 0
    for slot in slots.values():
        slot.close()
    page.close()
    os.close(page.fd)
