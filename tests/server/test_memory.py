"""The memory of a load goes back once it is over: when, and what of it."""

from __future__ import annotations

import asyncio
import gc
import sys

from aioserver.server.memory import (
    BUSY,
    LOOK,
    MOST_CONNECTIONS,
    WHEN_IDLE,
    IdleMemory,
)
from tests.support.virtual_loop import run_virtually

# Seconds within which every time has come.
ALL_TIMES = LOOK * (max(WHEN_IDLE) + 10)


class Work:
    """The work of a server: answers that run, connections, and the CPU time that it has used."""

    def __init__(self) -> None:
        self.running = self.connections = 0
        self.cpu = 0.0

    def memory(self) -> IdleMemory:
        loop = asyncio.get_running_loop()
        return IdleMemory(loop, lambda: self.running, lambda: self.connections, lambda: self.cpu)


def test_memory_is_given_back_some_times_after_a_load() -> None:
    async def main() -> tuple[int, int, int, int]:
        work = Work()
        memory = work.memory()
        await asyncio.sleep(ALL_TIMES)
        before = memory.times
        work.cpu += 2 * BUSY * LOOK
        await asyncio.sleep(2 * LOOK)
        soon = memory.times
        await asyncio.sleep(2 * LOOK)
        first = memory.times
        await asyncio.sleep(ALL_TIMES)
        memory.close()
        return before, soon, first, memory.times

    assert run_virtually(main()) == (0, 0, 1, len(WHEN_IDLE))


def test_nothing_is_done_while_answers_run() -> None:
    async def main() -> list[int]:
        work = Work()
        memory = work.memory()
        work.running = 3
        await asyncio.sleep(ALL_TIMES)
        times = [memory.times]
        work.running = 0
        await asyncio.sleep(ALL_TIMES)
        times.append(memory.times)
        memory.close()
        return times

    assert run_virtually(main()) == [0, len(WHEN_IDLE)]


def test_nothing_is_done_while_many_clients_are_connected() -> None:
    async def main() -> list[int]:
        work = Work()
        memory = work.memory()
        work.cpu += 1.0
        work.connections = MOST_CONNECTIONS + 1
        await asyncio.sleep(ALL_TIMES)
        times = [memory.times]
        work.cpu += 1.0
        work.connections = MOST_CONNECTIONS
        await asyncio.sleep(ALL_TIMES)
        times.append(memory.times)
        memory.close()
        return times

    assert run_virtually(main()) == [0, len(WHEN_IDLE)]


def test_a_closed_one_does_nothing_more() -> None:
    async def main() -> int:
        work = Work()
        memory = work.memory()
        work.cpu += 1.0
        await asyncio.sleep(LOOK)
        memory.close()
        await asyncio.sleep(ALL_TIMES)
        return memory.times

    assert run_virtually(main()) == 0


async def test_objects_that_have_ended_are_not_kept_for_later_ones() -> None:
    memory = Work().memory()
    numbers = [(number, number) for number in range(4000)]
    numbers.clear()
    kept = sys.getallocatedblocks()

    memory.give_back()

    memory.close()
    # Python keeps 2,000 tuples of a length.
    assert kept - sys.getallocatedblocks() > 1500


def test_what_the_next_tick_has_left_behind_goes_as_well() -> None:
    async def main() -> int:
        work = Work()
        memory = work.memory()
        await asyncio.sleep(ALL_TIMES)
        full: list[str] = []
        count = lambda phase, info: full.extend([phase] * (info["generation"] == 2))  # noqa: E731
        gc.callbacks.append(count)
        try:
            work.cpu += 2 * BUSY * LOOK
            await asyncio.sleep(ALL_TIMES)
        finally:
            gc.callbacks.remove(count)
        memory.close()
        return full.count("start")

    assert run_virtually(main()) >= 2 * len(WHEN_IDLE)
