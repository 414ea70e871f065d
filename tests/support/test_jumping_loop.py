"""Time jumps where nothing works, and goes as the machine's does where something does."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import TYPE_CHECKING, TypeVar

from tests.support.jumping_loop import JumpingLoop, block

if TYPE_CHECKING:
    from collections.abc import Coroutine

T = TypeVar("T")
LONG = 1000.0


def run(main: Coroutine[None, None, T]) -> T:
    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        return runner.run(main)


def test_a_wait_is_over_at_once_and_as_long_as_it_was_to_be() -> None:
    async def wait() -> float:
        began = time.monotonic()
        await asyncio.sleep(LONG)
        return time.monotonic() - began

    began = time.monotonic()
    assert LONG <= run(wait()) < LONG + 1
    assert time.monotonic() - began < LONG


def test_timers_are_due_in_their_order() -> None:
    async def wait() -> list[float]:
        order: list[float] = []

        async def note(after: float) -> None:
            await asyncio.sleep(after)
            order.append(after)

        await asyncio.gather(*map(note, (300.0, 100.0, 200.0)))
        return order

    assert run(wait()) == [100.0, 200.0, 300.0]


def test_no_timeout_comes_before_what_a_thread_does() -> None:
    async def wait() -> None:
        async with asyncio.timeout(LONG):
            await asyncio.to_thread(time.sleep, 0.05)

    run(wait())


def test_no_timeout_comes_before_what_another_process_does() -> None:
    async def wait() -> int:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", "import time; time.sleep(0.05)")
        )
        async with asyncio.timeout(LONG):
            return await process.wait()

    assert run(wait()) == 0


def test_no_timeout_comes_before_bytes_that_are_on_their_way() -> None:
    async def wait() -> int:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(await reader.readexactly(1 << 20))
            writer.close()

        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            async with asyncio.timeout(LONG):
                writer.write(b"x" * (1 << 20))
                size = len(await reader.read(-1))
            writer.close()
            await writer.wait_closed()
            return size

    assert run(wait()) == 1 << 20


def test_a_blocked_loop_is_late() -> None:
    async def late() -> float:
        loop = asyncio.get_running_loop()
        due = loop.time() + 1.0
        lag: asyncio.Future[float] = loop.create_future()
        loop.call_at(due, lambda: lag.set_result(loop.time() - due))
        block(5.0)
        return await lag

    assert 4.0 <= run(late()) < 5.0
