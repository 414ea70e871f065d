"""Answers that wait for a place that another answer of their client gives back."""

from __future__ import annotations

import asyncio

import pytest

from aioserver.client.transport import Room
from tests.support.waiting import ticks

LONG = 1000.0


async def waiting(room: Room, count: int) -> list[asyncio.Task[bool]]:
    tasks = [asyncio.create_task(room.wait(room.ticket(), LONG)) for _ in range(count)]
    await ticks()
    return tasks


async def left(tasks: list[asyncio.Task[bool]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def test_a_place_lets_the_one_ask_that_came_first() -> None:
    room = Room()
    late_ticket = [room.ticket() for _ in range(2)][1]
    early, second = await waiting(room, 2)
    late = asyncio.create_task(room.wait(late_ticket, LONG))
    await ticks()

    room.give_back()

    assert await late, "its ticket is the oldest"
    assert not early.done()
    room.give_back()
    assert await early
    await left([second])


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_place_goes_to_the_next_one_where_the_first_one_has_gone(when: str) -> None:
    room = Room()
    first, second, third = await waiting(room, 3)

    if when == "before":
        first.cancel()
    room.give_back()
    first.cancel()

    assert await second
    assert first.cancelled()
    assert not third.done()
    await left([third])


async def test_without_a_place_the_time_decides() -> None:
    room = Room()

    assert not await room.wait(room.ticket(), 0.01)
    room.give_back()
    assert not await room.wait(room.ticket(), 0.01), "there was nobody to ask"
