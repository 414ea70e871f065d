"""When garbage is collected: young passes at short intervals, and seldom one over older objects."""

from __future__ import annotations

import asyncio
import gc
import weakref
from typing import TYPE_CHECKING

import pytest

from aioserver.server import garbage
from tests.support.virtual_loop import run_virtually

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(
    not garbage.generational(), reason="this interpreter collects in small steps by itself"
)


class Circle:
    """Is freed by the garbage collector alone, once nobody else refers to it."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """Let the interpreter make no passes of its own."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def passes() -> Iterator[list[int]]:
    """Have the generation of each pass."""
    generations: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            generations.append(info["generation"])

    gc.callbacks.append(note)
    yield generations
    gc.callbacks.remove(note)


async def served(seconds: float) -> None:
    collector = garbage.Collector(asyncio.get_running_loop())
    await asyncio.sleep(seconds)
    collector.close()


def test_young_passes_are_never_far_apart_and_take_little_of_the_time(passes: list[int]) -> None:
    run_virtually(served(60.0))

    most, least = 60.0 / garbage.PERIOD, 60.0 / garbage.LONGEST
    assert set(passes) == {0}
    assert least - 1 <= len(passes) <= most + 1


def test_older_objects_are_looked_at_seldom(passes: list[int]) -> None:
    run_virtually(served(3.5 * garbage.OLDER))

    assert passes.count(1) == 3
    assert 2 not in passes


def test_older_objects_are_looked_at_where_many_have_come(passes: list[int]) -> None:
    circles: list[weakref.ref[Circle]] = []

    async def leave_circles() -> None:
        collector = garbage.Collector(asyncio.get_running_loop(), grown=1000)
        while passes.count(1) < 3:
            here = [Circle() for _ in range(100)]
            circles.extend(map(weakref.ref, here))
            # They outlive a young pass.
            await asyncio.sleep(2 * garbage.LONGEST)
            del here
        collector.close()

    run_virtually(leave_circles())

    assert sum(circle() is not None for circle in circles) < 1000 < len(circles)


def test_what_has_outlived_a_young_pass_is_freed_in_the_end() -> None:
    circle = Circle()
    freed = weakref.ref(circle)

    async def outlive() -> None:
        nonlocal circle
        collector = garbage.Collector(asyncio.get_running_loop())
        await asyncio.sleep(10.0)
        del circle
        await asyncio.sleep(10.0)
        assert freed() is not None
        await asyncio.sleep(garbage.OLDER)
        collector.close()

    run_virtually(outlive())

    assert freed() is None


def test_nothing_is_collected_once_it_is_closed(passes: list[int]) -> None:
    async def closed() -> None:
        collector = garbage.Collector(asyncio.get_running_loop())
        collector.close()
        await asyncio.sleep(60.0)

    run_virtually(closed())

    assert not passes
