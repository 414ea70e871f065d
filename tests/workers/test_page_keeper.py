"""The parent's side of the shared page."""

from __future__ import annotations

import os
import random
import time

import pytest

from aioserver.workers.page_keeper import RESIZE_AGAIN, PageKeeper
from aioserver.workers.shared_page import SharedPage


class Places:
    """The gate of a worker, as its page needs it."""

    def __init__(self, page: SharedPage) -> None:
        self.page, self.limit = page, 0
        page.settle(self.set_limit)

    def set_limit(self, limit: int) -> None:
        self.limit = limit


def worker(keeper: PageKeeper, slot: int, pid: int) -> Places:
    """Start the process *pid* in *slot*."""
    keeper.starting(slot)
    keeper.started(slot, pid)
    return Places(SharedPage(keeper.fd, slot))


@pytest.fixture
def keeper() -> PageKeeper:
    return PageKeeper(2, 10)


def settled(*places: Places) -> list[int]:
    for each in places:
        each.page.settle(each.set_limit)
    return [each.limit for each in places]


def test_a_killed_workers_places_are_those_of_its_successor_in_either_slot(
    keeper: PageKeeper,
) -> None:
    first, second = worker(keeper, 0, 100), worker(keeper, 1, 101)
    assert settled(first, second) == [5, 5]
    first.page.give(1, 2, first.set_limit)
    assert settled(first, second) == [3, 7]

    keeper.reaped(100)
    again = worker(keeper, 0, 102)
    assert settled(again, second) == [3, 7]

    keeper.reaped(102)
    other = worker(keeper, 2, 103)
    assert settled(other, second) == [3, 7]


def test_a_successor_begins_without_a_place_and_has_all_once_the_former_is_gone(
    keeper: PageKeeper,
) -> None:
    former, sibling = worker(keeper, 0, 100), worker(keeper, 1, 101)
    assert settled(former, sibling) == [5, 5]

    successor = worker(keeper, 2, 102)
    assert settled(successor) == [0]
    former.page.give(2, 3, former.set_limit)
    assert settled(former, successor, sibling) == [2, 3, 5]
    keeper.reaped(100)

    assert settled(successor, sibling) == [5, 5]


def test_a_process_that_is_no_worker_changes_nothing(keeper: PageKeeper) -> None:
    first = worker(keeper, 0, 100)

    keeper.reaped(4711)

    assert settled(first) == [5]


def test_a_lower_total_is_paid_before_a_higher_one_is_in_effect(keeper: PageKeeper) -> None:
    first, second = worker(keeper, 0, 100), worker(keeper, 1, 101)
    settled(first, second)

    keeper.resize(4)
    assert keeper.resize_at is None
    keeper.resize(20)
    assert keeper.resize_at is not None
    assert keeper.resize_at <= time.monotonic() + RESIZE_AGAIN

    for _ in range(4):
        settled(first, second)
        keeper.resize(20)
    assert sum(settled(first, second)) == 20
    assert keeper.resize_at is None


def test_a_total_that_comes_while_no_worker_lives_waits_for_one(keeper: PageKeeper) -> None:
    keeper.resize(30)
    assert keeper.resize_at is not None

    first, second = worker(keeper, 0, 100), worker(keeper, 1, 101)
    keeper.resize(30)

    assert sum(settled(first, second)) == 30


@pytest.mark.parametrize("seed", range(20))
def test_limits_never_exceed_the_total_whatever_starts_and_ends(seed: int) -> None:
    chance, total, pids = random.Random(seed), 12, iter(range(1, 10_000))
    keeper = PageKeeper(3, total)
    alive: dict[int, tuple[int, Places]] = {}

    def start(slot: int) -> None:
        if all(each != slot for each, _places in alive.values()):
            pid = next(pids)
            alive[pid] = slot, worker(keeper, slot, pid)

    def end(pid: int) -> None:
        _slot, places = alive.pop(pid)
        places.page.close()
        keeper.reaped(pid)

    for rank in range(3):
        start(rank)
    for _ in range(300):
        step = chance.choice(("start", "end", "beat", "give"))
        pid = chance.choice(list(alive)) if alive else 0
        if step == "start" or not alive:
            start(chance.randrange(6))
        elif step == "end":
            end(pid)
        elif step == "beat":
            settled(alive[pid][1])
        else:
            slot, places = alive[pid]
            to = chance.choice([each for each, _places in alive.values()])
            if to != slot and places.limit:
                places.page.give(to, 1, places.set_limit)
        assert sum(places.limit for _slot, places in alive.values()) <= total

    for rank in range(3):
        if not {rank, rank + 3} & {slot for slot, _places in alive.values()}:
            start(rank)
    assert sum(settled(*(places for _slot, places in alive.values()))) == total
    os.close(keeper.fd)
