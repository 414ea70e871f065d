"""The watch over a socket, on a clock that is moved by hand."""

from __future__ import annotations

import contextlib
import ctypes
import socket
import struct
import sys

import pytest

from aioserver.limits.write_watchdog import (
    BACKOFF,
    LAST_ACK,
    LAST_SENT,
    PROBES,
    RETRANSMITS,
    RTO,
    TCP_INFO_BYTES,
    WriteWatchdog,
    peer_of,
    silence,
    vanished,
)
from tests.support.clock import FakeClock
from tests.support.transport import FakeTransport
from tests.support.waiting import until

TIMEOUT = 8.0
# `SO_ATTACH_FILTER` and `SO_DETACH_FILTER` of Linux, which Python does not name.
ATTACH, DETACH = 26, 27
# What Linux says of a connection over loopback in `tcpi_retransmits`, `tcpi_probes`,
# `tcpi_backoff`, `tcpi_rto`, `tcpi_last_data_sent` and `tcpi_last_ack_recv`, and for how long at
# least its peer has left something unanswered. All of them rested for 12 s before the first write
# that was lost, but those whose program reads nothing, which were written to all the time.
RECORDED = {
    "has answered": ((0, 0, 0, 204_000, 0, 0), 0.0),
    "has yet to answer": ((0, 0, 0, 204_000, 100, 12_112), 0.0),
    "has lost one segment": ((1, 0, 1, 408_000, 284, 12_712), 0.0),
    "is away for a second": ((2, 0, 2, 816_000, 116, 12_960), 0.7),
    "is away for three seconds": ((3, 0, 3, 1_632_000, 1_336, 15_012), 2.7),
    "is away for 8 s": ((5, 0, 5, 6_528_000, 1_152, 20_012), 7.4),
    "is away for 30 s": ((7, 0, 7, 26_112_000, 3_184, 42_012), 29.0),
    "reads nothing, and answers": ((0, 0, 7, 212_000, 31_948, 14_444), 0.0),
    "reads nothing, and one probe was lost": ((0, 1, 6, 212_000, 19_940, 13_184), 0.0),
    "read nothing, and is away for 20 s": ((0, 2, 7, 212_000, 31_940, 25_184), 13.5),
    "read nothing, and is away for 16 s": ((0, 5, 6, 212_000, 16_196, 15_956), 12.7),
}


class Watched:
    def __init__(self, size: int = 100) -> None:
        self.clock = FakeClock()
        self.buffer = FakeTransport(held=size)
        self.alarms: list[float] = []
        self.start = self.clock.now
        self.watch = WriteWatchdog(
            self.clock.loop,
            self.buffer,
            TIMEOUT,
            lambda: self.alarms.append(self.clock.now - self.start),
        )


def test_a_buffer_that_does_not_shrink_gives_one_alarm_in_time() -> None:
    watched = Watched()

    watched.clock.advance(TIMEOUT - 0.1)
    assert watched.alarms == []
    watched.clock.advance(100.0)

    assert watched.alarms == [TIMEOUT]
    assert watched.clock.pending == 0


@pytest.mark.parametrize("stalled_at", [0.1, 1.9, 2.1, 7.9, 30.0])
def test_the_alarm_is_at_most_a_quarter_late(stalled_at: float) -> None:
    watched = Watched(1_000_000)
    while watched.clock.now - watched.start < stalled_at:
        watched.buffer.held -= 1
        watched.clock.advance(0.05)
    stalled = watched.clock.now - watched.start

    watched.clock.advance(100.0)

    (alarm,) = watched.alarms
    assert stalled + TIMEOUT * 0.74 <= alarm <= stalled + TIMEOUT * 1.25 + 0.05


def test_a_byte_now_and_then_is_progress() -> None:
    watched = Watched(1000)

    for _ in range(100):
        watched.clock.advance(TIMEOUT * 0.7)
        watched.buffer.held -= 1

    assert watched.alarms == []


def test_an_empty_buffer_ends_the_watch() -> None:
    watched = Watched()
    watched.buffer.held = 0

    watched.clock.advance(TIMEOUT)
    watched.buffer.held = 100  # somebody else's
    watched.clock.advance(100.0)

    assert watched.alarms == []
    assert watched.clock.pending == 0


def test_a_stopped_watch_gives_no_alarm() -> None:
    watched = Watched()

    watched.watch.stop()
    watched.watch.stop()
    watched.clock.advance(100.0)

    assert watched.alarms == []
    assert watched.clock.pending == 0


def test_an_alarm_may_stop_its_own_watch() -> None:
    watched = Watched()
    watch = WriteWatchdog(watched.clock.loop, watched.buffer, TIMEOUT / 2, lambda: watch.stop())

    watched.clock.advance(100.0)

    assert watched.clock.pending == 0


class Connected:
    """A watch over a socket whose other end reads when it is told to, by the machine's clock."""

    def __init__(self, pair: tuple[socket.socket, socket.socket], least: int) -> None:
        self.clock = FakeClock()
        self.buffer = FakeTransport(held=1)
        self.buffer.under, self.reader = pair
        self.buffer.under.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                self.buffer.under.send(bytes(4096))
        self.alarms: list[float] = []
        start = self.clock.now
        WriteWatchdog(
            self.clock.loop,
            self.buffer,
            TIMEOUT,
            lambda: self.alarms.append(self.clock.now - start),
            least=least,
        )


def connected(family: socket.AddressFamily) -> tuple[socket.socket, socket.socket]:
    """Two ends of a connection, the second with a small receive buffer."""
    if family == socket.AF_UNIX:
        return socket.socketpair(family)
    with socket.create_server(("127.0.0.1", 0)) as server:
        reader = socket.socket(family)
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
        reader.connect(server.getsockname())
        return server.accept()[0], reader


FAMILIES = [socket.AF_INET, socket.AF_UNIX]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_taken_and_may_be_unread_gives_more_time(family: socket.AddressFamily) -> None:
    writer, reader = pair = connected(family)
    with writer, reader:
        most = Connected(pair, 1 << 30)
        unread = peer_of(most.buffer).unread
        watched = Connected(pair, unread // 3)

        most.clock.advance(100.0)
        watched.clock.advance(2.9 * TIMEOUT)
        assert (most.alarms, watched.alarms) == ([TIMEOUT], [])
        watched.clock.advance(100.0)

    (alarm,) = watched.alarms
    assert 3 * TIMEOUT <= alarm <= 3.3 * TIMEOUT


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_other_end_takes_is_progress_though_the_buffer_stays(
    family: socket.AddressFamily,
) -> None:
    writer, reader = pair = connected(family)
    with writer, reader:
        watched = Connected(pair, 1 << 30)

        for _ in range(5):
            before = progress_of(watched.buffer)
            while progress_of(watched.buffer) == before:
                reader.recv(4096)
            watched.clock.advance(TIMEOUT * 0.9)

    assert watched.alarms == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_connection_that_is_lost_is_no_error(family: socket.AddressFamily) -> None:
    writer, reader = pair = connected(family)
    watched = Connected(pair, 1 << 30)
    writer.close()
    reader.close()

    watched.clock.advance(100.0)

    (alarm,) = watched.alarms
    assert alarm <= 1.25 * TIMEOUT


def progress_of(transport: FakeTransport) -> int:
    peer = peer_of(transport)
    return peer.taken - peer.waiting


@pytest.mark.parametrize("peer", RECORDED)
def test_silence_counts_from_the_first_write_that_is_not_answered(peer: str) -> None:
    figures, least = RECORDED[peer]
    info = bytearray(TCP_INFO_BYTES)
    info[RETRANSMITS], info[PROBES], info[BACKOFF] = figures[:3]
    for offset, figure in zip((RTO, LAST_SENT, LAST_ACK), figures[3:], strict=True):
        struct.pack_into("=I", info, offset, figure)

    assert least <= silence(bytes(info)) <= least + 0.1


@pytest.mark.real_time
@pytest.mark.skipif(sys.platform != "linux", reason="the filters are those of Linux")
async def test_a_peer_that_drops_what_comes_has_vanished_until_it_answers_again() -> None:
    # The kernel retransmits in its own time: 0.2 s, then the double.
    writer, reader = connected(socket.AF_INET)
    with writer, reader:
        transport = FakeTransport()
        transport.under = writer
        writer.send(b"taken")
        await until(lambda: peer_of(transport).waiting == 0)
        assert not vanished(transport, 0.3)

        drop_everything(reader)
        writer.send(b"dropped")
        await until(lambda: vanished(transport, 0.3), 30.0)
        assert not vanished(transport, 1000.0)

        reader.setsockopt(socket.SOL_SOCKET, DETACH, 0)
        await until(lambda: not vanished(transport, 0.3), 30.0)


def drop_everything(sock: socket.socket) -> None:
    """Make the kernel drop each segment that comes for *sock*, by a filter that accepts nothing."""
    instruction = ctypes.create_string_buffer(struct.pack("=HBBI", 0x06, 0, 0, 0))
    program = struct.pack("@HP", 1, ctypes.addressof(instruction))
    sock.setsockopt(socket.SOL_SOCKET, ATTACH, program)
