"""What is kept at a server that all instances share, where that server is slow or hangs."""

from __future__ import annotations

import asyncio

import pytest

from aioserver.errors import InstanceUnavailable
from aioserver.gateway.contracts.commands import KNOWN_TIMEOUT, TIMEOUT, WRITE_TIMEOUT, Commands
from aioserver.gateway.contracts.timeouts import MAX_LONGER, awaited, timeout
from tests.support.instances import MemoryStore, World
from tests.support.jumping_loop import block


class Writer:
    """Ends answers, each of which is written at the server."""

    def __init__(self) -> None:
        self.world = World()
        self.loop = asyncio.get_running_loop()
        # When the server was found to hang.
        self.hangs: list[float] = []
        self.commands = Commands(
            MemoryStore(self.world, "me"), "", lambda: self.hangs.append(self.loop.time())
        )

    async def ask(self, seconds: float) -> object:
        return await self.commands.ask(self.commands.execute("DEL", "next:a"), seconds)

    async def tell(self) -> object:
        return await self.commands.tell(self.commands.execute("DEL", "next:a"))

    async def delay(self) -> float:
        """The seconds by which the end of an answer comes later."""
        began = self.loop.time()
        await self.commands.written(self.loop.create_task(self.tell()))
        return self.loop.time() - began


@pytest.mark.virtual_time
async def test_a_server_that_hangs_delays_the_ends_of_few_answers() -> None:
    writer = Writer()
    writer.world.slow = 1000.0
    assert await writer.delay() == pytest.approx(WRITE_TIMEOUT, abs=0.01)
    await asyncio.sleep(KNOWN_TIMEOUT)

    assert [await writer.delay() for _ in range(9)] == [pytest.approx(0.0, abs=0.01)] * 9

    writer.world.slow = 0.0
    await writer.tell()
    writer.world.slow = 0.4
    assert await writer.delay() == pytest.approx(0.4, abs=0.01), (
        "it answers again, and is waited for"
    )


@pytest.mark.virtual_time
async def test_nobody_waits_for_a_server_that_hangs_until_it_has_answered_something() -> None:
    writer = Writer()
    began = writer.loop.time()
    writer.world.slow = 1000.0
    for _ in range(int(WRITE_TIMEOUT / TIMEOUT) + 1):
        assert await writer.ask(TIMEOUT) is None
    assert writer.loop.time() - began == pytest.approx(WRITE_TIMEOUT, abs=2 * TIMEOUT)
    known, calls = writer.loop.time(), writer.world.calls

    for _ in range(100):
        assert await writer.ask(KNOWN_TIMEOUT) is None
        with pytest.raises(InstanceUnavailable):
            await writer.commands.know(writer.commands.execute("DEL", "next:a"), "stream")
        await asyncio.sleep(0.01)
    # The clock has gone on only where the test has slept.
    assert writer.loop.time() - known == pytest.approx(1.0, abs=0.01)
    # One of them at a time is a probe.
    assert writer.world.calls - calls <= 2

    writer.world.slow = 0.1
    await asyncio.sleep(KNOWN_TIMEOUT)
    assert await writer.ask(KNOWN_TIMEOUT) is None
    await asyncio.sleep(0.2)
    assert await writer.ask(KNOWN_TIMEOUT) is not None


@pytest.mark.virtual_time
async def test_waits_that_have_begun_end_once_the_server_is_known_to_hang() -> None:
    writer = Writer()
    writer.world.slow = 1000.0
    began, ends = writer.loop.time(), []

    async def end(kind: str, after: float) -> None:
        await asyncio.sleep(after)
        if kind == "written":
            await writer.delay()
        elif kind == "asked":
            assert await writer.ask(KNOWN_TIMEOUT) is None
        else:
            with pytest.raises(InstanceUnavailable):
                await writer.commands.know(writer.commands.execute("DEL", "next:a"), "stream")
        ends.append(writer.loop.time() - began)

    kinds = ("written", "asked", "known")
    await asyncio.gather(*(end(kind, tenths / 10) for tenths in range(5) for kind in kinds))

    assert ends == [pytest.approx(WRITE_TIMEOUT, abs=0.02)] * 15
    assert [at - began for at in writer.hangs] == [pytest.approx(WRITE_TIMEOUT, abs=0.02)]


@pytest.mark.virtual_time
async def test_a_look_up_ends_once_the_server_is_known_to_hang_by_a_command_before_it() -> None:
    writer = Writer()
    await writer.tell()
    await asyncio.sleep(0.4)
    writer.world.slow = 1000.0
    began = writer.loop.time()
    telling = writer.loop.create_task(writer.tell())
    await asyncio.sleep(0.2)

    # Neither of them ends a wait of its own earlier.
    assert await writer.ask(KNOWN_TIMEOUT) is None

    assert writer.loop.time() - began == pytest.approx(WRITE_TIMEOUT, abs=0.01)
    telling.cancel()


@pytest.mark.virtual_time
async def test_one_answer_lets_all_others_be_awaited_as_ever() -> None:
    writer = Writer()
    writer.world.slow = 0.45
    writing = writer.loop.create_task(writer.tell())
    await asyncio.sleep(0.3)
    writer.world.slow = 0.6

    asked = writer.loop.create_task(writer.ask(KNOWN_TIMEOUT))
    began = writer.loop.time()
    await writing
    assert await asked is not None
    assert writer.loop.time() - began == pytest.approx(0.6, abs=0.02)


@pytest.mark.virtual_time
async def test_an_answer_that_came_too_late_ends_a_silence() -> None:
    writer = Writer()
    writer.world.slow = 0.1
    assert await writer.ask(TIMEOUT) is None
    await asyncio.sleep(60.0)

    writer.world.slow = 0.3
    known = writer.loop.create_task(
        writer.commands.know(writer.commands.execute("DEL", "next:a"), "stream")
    )
    assert await writer.ask(TIMEOUT) is None

    assert await known == 0


@pytest.mark.virtual_time
async def test_a_command_that_is_refused_has_been_answered() -> None:
    writer = Writer()

    async def refused() -> object:
        await writer.commands.execute("GET", "log:a")
        raise RuntimeError("OOM")

    for _ in range(2):
        assert await writer.commands.ask(refused()) is None
        await asyncio.sleep(1.0)

    assert await writer.ask(TIMEOUT) is not None


@pytest.mark.virtual_time
async def test_a_client_that_leaves_ends_no_wait_of_another() -> None:
    writer = Writer()
    writer.world.slow = 1000.0
    assert await writer.ask(TIMEOUT) is None
    leaving = writer.loop.create_task(writer.delay())
    asked = writer.loop.create_task(writer.ask(KNOWN_TIMEOUT))
    await asyncio.sleep(0.2)
    # An answer may wait in a buffer while the loop is late.
    block(0.6)
    leaving.cancel()
    await asyncio.wait([leaving])

    assert not asked.done()
    began = writer.loop.time()
    assert await asked is None
    assert writer.loop.time() - began > 0.1


@pytest.mark.virtual_time
async def test_a_slow_server_is_waited_for_though_some_do_not_wait_so_long() -> None:
    writer = Writer()
    writer.world.slow = 0.3

    for _ in range(3):
        assert await writer.ask(TIMEOUT) is None
        assert await writer.delay() == pytest.approx(0.3, abs=0.01)


async def test_time_for_which_our_loop_was_late_does_not_count() -> None:
    asyncio.get_running_loop().call_soon(block, 0.2)

    async with timeout(0.05):
        # A reply that is there passes through some turns of the event loop.
        for _ in range(5):
            await asyncio.sleep(0)


@pytest.mark.virtual_time
async def test_what_must_be_known_is_not_unknown_where_our_loop_was_late() -> None:
    loop = asyncio.get_running_loop()
    for late in (0.9, 1.1, 1.9):
        answer = loop.create_future()
        # It is there, and read once the loop goes on.
        loop.call_soon(block, late)
        loop.call_later(late + 0.001, answer.set_result, 1)

        async with timeout(1.0):
            assert await answer == 1


@pytest.mark.virtual_time
async def test_what_does_not_come_is_not_waited_for() -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()

    with pytest.raises(TimeoutError, match=r"no answer within 0\.5 s"):
        async with timeout(0.5):
            await loop.create_future()
    await awaited(loop.create_future(), 0.5)

    assert loop.time() - began == pytest.approx(1.0, abs=0.01)


@pytest.mark.virtual_time
async def test_a_loop_that_is_always_late_does_not_wait_for_ever() -> None:
    loop = asyncio.get_running_loop()
    began, over = loop.time(), False

    def late() -> None:
        block(0.07)
        if not over:
            loop.call_soon(late)

    late()
    with pytest.raises(TimeoutError):
        async with timeout(0.1):
            await asyncio.sleep(1e6)
    over = True

    # The end of a wait takes some turns of the event loop, too.
    assert MAX_LONGER < loop.time() - began < MAX_LONGER + 0.6


@pytest.mark.virtual_time
async def test_another_timeout_within_is_not_ours() -> None:
    async with timeout(9.0):
        with pytest.raises(TimeoutError, match=r"^$"):
            async with asyncio.timeout(0.1):
                await asyncio.sleep(1.0)
    with pytest.raises(TimeoutError, match="theirs"):
        async with timeout(0.1):
            raise TimeoutError("theirs")
