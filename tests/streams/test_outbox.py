"""The outbox: the writes of one iteration of the event loop go out together."""

from __future__ import annotations

import asyncio

import pytest

from aioserver.streams.outbox import Outbox
from tests.support.waiting import patience, ticks

pytestmark = pytest.mark.both_loops


class Socket:
    """What it is told to write, in a list that sockets share."""

    def __init__(self, name: str, written: list[tuple[str, bytes]]) -> None:
        self.name = name
        self.written = written

    def write(self, data: bytes) -> None:
        self.written.append((self.name, data))

    def abort(self) -> None:
        self.written.append((self.name, b"aborted"))


class BrokenSocket(Socket):
    """One that cannot be written to."""

    def write(self, data: bytes) -> None:
        raise MemoryError(f"no room for {len(data)} bytes")


async def test_all_that_one_iteration_writes_goes_out_at_its_end_in_its_order() -> None:
    written: list[tuple[str, bytes]] = []
    outbox = Outbox(asyncio.get_running_loop())
    first, second = Socket("first", written), Socket("second", written)

    outbox.put(first, b"1")
    done = outbox.send(second, b"2")
    outbox.put(first, b"3")
    assert not written
    assert not done.done()
    await done

    assert written == [("first", b"1"), ("second", b"2"), ("first", b"3")]
    outbox.put(first, b"4")
    await ticks(1)
    assert written[3:] == [("first", b"4")]


async def test_a_sender_that_waits_no_longer_keeps_no_other_waiting() -> None:
    written: list[tuple[str, bytes]] = []
    outbox = Outbox(asyncio.get_running_loop())
    sockets = [Socket(name, written) for name in "abc"]

    async def send(socket: Socket) -> None:
        await outbox.send(socket, b"whole")

    tasks = [asyncio.ensure_future(send(socket)) for socket in sockets]
    await ticks(1)
    tasks[1].cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)

    assert [type(outcome) for outcome in outcomes] == [
        type(None),
        asyncio.CancelledError,
        type(None),
    ]
    assert [name for name, _ in written] == ["a", "b", "c"]


async def test_a_flush_before_the_end_of_the_iteration_writes_nothing_twice() -> None:
    written: list[tuple[str, bytes]] = []
    outbox = Outbox(asyncio.get_running_loop())
    done = outbox.send(Socket("a", written), b"1")
    outbox.flush()
    assert done.done()
    outbox.put(Socket("b", written), b"2")
    await ticks()
    assert written == [("a", b"1"), ("b", b"2")]


async def test_a_write_that_fails_costs_its_own_socket_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    written: list[tuple[str, bytes]] = []
    outbox = Outbox(asyncio.get_running_loop())
    sockets = Socket("a", written), BrokenSocket("b", written), Socket("c", written)

    async with asyncio.timeout(patience(5)):
        await asyncio.gather(*(outbox.send(socket, b"whole") for socket in sockets))

    assert written == [("a", b"whole"), ("b", b"aborted"), ("c", b"whole")]
    assert [record.message for record in caplog.records] == ["bug in a write"]
