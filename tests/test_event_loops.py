"""Where uvloop differs from asyncio's loop: event-loops.md beside this file has a line for each
test, and says what follows from it.
"""

from __future__ import annotations

import asyncio
import re
import socket
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import pytest
import uvloop

from tests.support.waiting import ticks, until

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

T = TypeVar("T")
PAGE = Path(__file__).with_name("event-loops.md").read_text()
# More than any kernel buffers for a connection of this machine.
LARGE = b"x" * (32 << 20)
# The versions whose `writelines` does not look whether the connection is lost (cpython's
# gh-136234).
WATCHES_FOR_GOOD = (3, 12) <= sys.version_info < (3, 13, 8)


def on_both(main: Callable[[], Coroutine[Any, Any, T]]) -> tuple[T, T]:
    """Return what *main* returns on asyncio's loop, and what on uvloop."""
    results = []
    for factory in (asyncio.SelectorEventLoop, uvloop.new_event_loop):
        with asyncio.Runner(loop_factory=factory) as runner:
            results.append(runner.run(main()))
    return results[0], results[1]


class Protocol(asyncio.Protocol):
    """A protocol that notes what its transport calls, and in which turn of the loop it is given
    bytes.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.reads: list[tuple[int, int]] = []
        self.turn = 0
        self.on_data: Callable[[], object] = int

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.calls.append("made")

    def data_received(self, data: bytes) -> None:
        self.reads.append((self.turn, len(data)))
        self.on_data()

    def eof_received(self) -> bool:
        self.calls.append("eof")
        return True

    def pause_writing(self) -> None:
        self.calls.append("pause")

    def connection_lost(self, exc: Exception | None) -> None:
        self.calls.append("lost")


class Connection:
    """A connection of the loop, and the other end as a socket: `async with Connection() as
    (transport, protocol, far)`.
    """

    async def __aenter__(self) -> tuple[asyncio.Transport, Protocol, socket.socket]:
        near, self._far = socket.socketpair()
        self._far.setblocking(False)
        loop = asyncio.get_running_loop()
        self._transport, protocol = await loop.create_connection(Protocol, sock=near)
        self._protocol = protocol
        return self._transport, protocol, self._far

    async def __aexit__(self, *_exc: object) -> None:
        self._transport.abort()
        await until(lambda: "lost" in self._protocol.calls)
        await ticks()
        self._far.close()


def raised(function: Callable[..., object], *args: Any, **kwargs: Any) -> str:
    """Return the name of what *function* raises, or nothing."""
    try:
        function(*args, **kwargs)
    except Exception as exc:  # noqa: BLE001 - that is asked
        return type(exc).__name__
    return ""


# Timers.


@pytest.mark.parametrize("delay", [-1.0, 0.0, 0.0003, 0.0004])
def test_the_handle_of_a_brief_timer_has_no_time(delay: float) -> None:
    async def ask() -> list[bool]:
        loop = asyncio.get_running_loop()
        handles = (loop.call_later(delay, int), loop.call_at(loop.time() + delay, int))
        return [hasattr(handle, "when") for handle in handles]

    assert on_both(ask) == ([True, True], [False, False])


def test_a_timer_is_rounded_to_whole_milliseconds() -> None:
    async def ask() -> list[float]:
        loop = asyncio.get_running_loop()
        seconds = []
        for delay in (0.0034, 0.0036):
            # Until no millisecond ends between the two.
            while True:
                before = loop.time()
                timer = loop.call_later(delay, int)
                timer.cancel()
                if loop.time() - before < 0.0001:
                    break
            seconds.append(round(timer.when() - before, 4))
        return seconds

    assert on_both(ask) == ([0.0034, 0.0036], [0.003, 0.004])


def test_the_time_of_the_loop_is_cut_to_whole_milliseconds() -> None:
    async def ask() -> bool:
        loop = asyncio.get_running_loop()
        times = [loop.time() * 1000 for _ in range(50)]
        assert all(at / 1000 <= time.monotonic() for at in times)
        return all(abs(at - round(at)) < 1e-4 for at in times)

    assert on_both(ask) == (False, True)


def test_timers_of_one_millisecond_fire_in_the_order_in_which_they_were_set() -> None:
    async def ask() -> set[str]:
        loop, orders = asyncio.get_running_loop(), set[str]()
        for _ in range(10):
            order = list[str]()
            now = loop.time()
            loop.call_at(now + 0.0334, order.append, "later")
            loop.call_at(now + 0.0326, order.append, "earlier")
            await until(lambda order=order: len(order) == 2)  # type: ignore[misc]
            orders.add(" ".join(order))
        return orders

    on_asyncio, on_uvloop = on_both(ask)

    assert on_asyncio == {"earlier later"}
    # A machine that is late between the two calls has the other order, too.
    assert "later earlier" in on_uvloop


def test_a_timer_of_no_time_takes_its_turn_among_callbacks() -> None:
    async def ask() -> list[str]:
        loop, order = asyncio.get_running_loop(), list[str]()
        loop.call_later(0, order.append, "timer")
        loop.call_soon(order.append, "callback")
        await ticks()
        return order

    assert on_both(ask) == (["callback", "timer"], ["timer", "callback"])


# Turns.


def test_bytes_and_timers_come_before_a_callback_that_a_callback_has_asked_for() -> None:
    async def ask() -> list[str]:
        loop, order = asyncio.get_running_loop(), list[str]()
        async with Connection() as (_, protocol, far):
            await ticks()
            protocol.on_data = partial(order.append, "bytes")
            far.send(b"x")
            loop.call_later(0.001, order.append, "timer")
            loop.call_soon(order.append, "callback")
            time.sleep(0.01)  # noqa: ASYNC251 - both are due in the next turn
            await until(lambda: len(order) == 3)
        return order

    assert on_both(ask) == (["callback", "bytes", "timer"], ["bytes", "timer", "callback"])


def test_bytes_are_read_many_times_in_one_turn() -> None:
    async def ask() -> tuple[int, bool]:
        loop = asyncio.get_running_loop()
        near, far = socket.socketpair()
        far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        far.setblocking(False)
        sent = far.send(LARGE)
        transport, protocol = await loop.create_connection(Protocol, sock=near)

        def count() -> None:
            protocol.turn += 1
            if not transport.is_closing():
                loop.call_soon(count)

        count()
        await until(lambda: sum(size for _, size in protocol.reads) == sent)
        transport.abort()
        await ticks()
        far.close()
        turns = {turn for turn, _ in protocol.reads}
        assert len(protocol.reads) > 1
        return max(size for _, size in protocol.reads), len(turns) == len(protocol.reads)

    assert on_both(ask) == ((262_144, True), (256_000, False))


def test_one_connection_is_accepted_in_one_turn() -> None:
    async def ask() -> int:
        loop, turns, turn = asyncio.get_running_loop(), list[int](), 0

        class Accepted(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                turns.append(turn)
                cast("asyncio.Transport", transport).abort()

        def count() -> None:
            nonlocal turn
            turn += 1
            if len(turns) < 8:
                loop.call_soon(count)

        server = await loop.create_server(Accepted, "127.0.0.1", 0)
        clients = [socket.create_connection(server.sockets[0].getsockname()) for _ in range(8)]
        count()
        await until(lambda: len(turns) == 8)
        await ticks()
        server.close()
        for client in clients:
            client.close()
        await ticks()
        return len(set(turns))

    assert on_both(ask) == (1, 8)


# Transports.


def test_a_write_goes_out_at_once_and_the_rest_pauses_the_protocol_on_both() -> None:
    async def ask() -> tuple[bytes, bool, list[str]]:
        async with Connection() as (transport, protocol, far):
            transport.write(b"small")
            at_once = far.recv(100)
            transport.write(LARGE)
            protocol.calls.append("written")
            waiting = 0 < transport.get_write_buffer_size() < len(LARGE)
            return at_once, waiting, list(protocol.calls)

    expected = (b"small", True, ["made", "pause", "written"])
    assert on_both(ask) == (expected, expected)


def test_whoever_writes_to_a_lost_connection_is_told() -> None:
    async def ask() -> list[str]:
        async with Connection() as (transport, protocol, _):
            transport.abort()
            # It is closing, and not lost yet.
            transport.write(b"x")
            await until(lambda: "lost" in protocol.calls)
            await ticks()
            return [
                raised(transport.write, b"x"),
                raised(transport.set_write_buffer_limits, high=0),
                raised(transport.write_eof),
            ]

    assert on_both(ask) == ([""] * 3, ["RuntimeError"] * 3)


def test_the_descriptor_of_a_closing_connection_is_not_watched_for_its_lines() -> None:
    async def ask() -> bool:
        loop = asyncio.get_running_loop()
        async with Connection() as (transport, protocol, _):
            descriptor = transport.get_extra_info("socket").fileno()
            transport.abort()
            transport.writelines([b"a", b"line"])
            await until(lambda: "lost" in protocol.calls)
            await ticks()
            return bool(loop.remove_writer(descriptor))

    of_asyncio, of_uvloop = on_both(ask)

    assert of_asyncio in (False, WATCHES_FOR_GOOD)
    assert of_uvloop is False


def test_an_aborted_connection_keeps_its_buffer_until_it_is_lost() -> None:
    async def ask() -> list[bool]:
        async with Connection() as (transport, protocol, _):
            transport.write(LARGE)
            before = transport.get_write_buffer_size()
            transport.abort()
            sizes = [transport.get_write_buffer_size()]
            await until(lambda: "lost" in protocol.calls)
            await ticks()
            sizes.append(transport.get_write_buffer_size())
            assert before
            return [size == before for size in sizes]

    assert on_both(ask) == ([False, False], [True, False])


def test_the_first_low_water_mark_is_16_bytes() -> None:
    async def ask() -> list[tuple[int, int]]:
        async with Connection() as (transport, _, _):
            limits = [transport.get_write_buffer_limits()]
            transport.set_write_buffer_limits()
            return [*limits, transport.get_write_buffer_limits()]

    usual = (16_384, 65_536)
    assert on_both(ask) == ([usual, usual], [(16, 65_536), usual])


def test_the_socket_of_a_lost_connection_raises_another_error() -> None:
    async def ask() -> str:
        async with Connection() as (transport, protocol, _):
            sock = transport.get_extra_info("socket")
            transport.abort()
            await until(lambda: "lost" in protocol.calls)
            await ticks()
            return raised(sock.setsockopt, socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    assert on_both(ask) == ("OSError", "ValueError")


def test_reading_on_after_the_end_tells_of_the_end_again() -> None:
    async def ask() -> tuple[bool, list[str]]:
        async with Connection() as (transport, protocol, far):
            far.shutdown(socket.SHUT_WR)
            await until(lambda: "eof" in protocol.calls)
            reading = transport.is_reading()
            transport.resume_reading()
            await ticks(10)
            return reading, list(protocol.calls)

    assert on_both(ask) == ((True, ["made", "eof"]), (False, ["made", "eof", "eof"]))


def test_nothing_at_all_can_be_written() -> None:
    async def ask() -> str:
        async with Connection() as (transport, _, _):
            return raised(transport.write, None)

    assert on_both(ask) == ("TypeError", "")


def test_handles_and_transports_are_no_classes_of_asyncio() -> None:
    async def ask() -> tuple[bool, bool]:
        handle = asyncio.get_running_loop().call_soon(int)
        async with Connection() as (transport, _, _):
            return isinstance(handle, asyncio.Handle), isinstance(transport, asyncio.Transport)

    assert on_both(ask) == ((True, True), (False, False))


# Names and connections.


def test_a_name_is_looked_up_in_a_thread_that_python_knows_nothing_of() -> None:
    async def ask() -> bool:
        before = set(threading.enumerate())
        await asyncio.get_running_loop().getaddrinfo("localhost", 80)
        return bool(set(threading.enumerate()) - before)

    assert on_both(ask) == (True, False)


def test_a_refused_connection_has_the_same_number_and_another_text() -> None:
    async def ask() -> tuple[bool, str]:
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            port = closed.getsockname()[1]
            with pytest.raises(ConnectionRefusedError) as refused:
                await asyncio.get_running_loop().create_connection(Protocol, "127.0.0.1", port)
        return refused.value.errno is not None, str(refused.value).partition("] ")[2].split()[0]

    assert on_both(ask) == ((True, "Connect"), (True, "Connection"))


def test_the_page_has_a_line_for_each_test() -> None:
    tests = {name for name in globals() if name.startswith("test_")}
    here = test_the_page_has_a_line_for_each_test.__name__

    assert set(re.findall(r"`(test_\w+)`", PAGE)) == tests - {here}
