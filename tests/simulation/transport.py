"""One end of a connection in memory, as an asyncio transport.

What one end writes goes to its kernel buffer while there is room, and to the buffer of the
transport otherwise; it arrives after the latency, in pieces that are cut and joined at random, and
leaves the kernel buffer when the other end's protocol has got it. So writes block, `pause_writing`
is called and watchdogs fire as they do on sockets.

`dials.Faults` has what a connection may suffer. Each connection draws from dice of its own, so
that a run stays the same for the others when one client is left out of it.
"""

from __future__ import annotations

import asyncio
import collections
import socket
from typing import TYPE_CHECKING, Any

from tests.simulation.clock import Clock

if TYPE_CHECKING:
    import random
    from collections.abc import Iterable
    from contextvars import Context

    from tests.simulation.dials import Dial, Faults
    from tests.simulation.network import Listener, Network

# asyncio's own limits of a transport's buffer.
HIGH_WATER = 64 * 1024
# Seconds after which a kernel gives up what nobody takes, once the program has closed. The server
# must not need it for its clients.
USER_TIMEOUT = 15.0
# Bytes of a full segment on Ethernet.
SEGMENT = 1460


class FakeSocket:
    """The address of a connection, where a library asks for its socket."""

    family = socket.AF_INET
    type = socket.SOCK_STREAM
    proto = socket.IPPROTO_TCP

    def __init__(self, address: tuple[str, int], dial: Dial | None = None) -> None:
        self.address = address
        self.dial = dial

    def fileno(self) -> int:
        return -1

    def setsockopt(self, *_args: Any) -> None:
        """Do nothing: a reset comes with `abort`, and the rest changes nothing here."""

    def getsockopt(self, _level: int, _name: int, size: int = 0) -> int | bytes:
        """Know nothing: each number is 0."""
        return bytes(size) if size else 0

    def getpeername(self) -> tuple[str, int]:
        return self.address

    def getsockname(self) -> tuple[str, int]:
        return self.address

    def close(self) -> None:
        """Do nothing: the transport closes."""


class Transport(asyncio.Transport):
    """One end of a connection.

    Always: bytes arrive in the order in which they were written, or not at all, and then nothing
    after them.

    What it does runs in *context*. *owner* is the instance that it belongs to, -1 if to none;
    *listener* is that which was dialled, None at the listener's own end.
    """

    peer: Transport
    protocol: asyncio.Protocol

    def __init__(
        self,
        network: Network,
        dice: random.Random,
        faults: Faults,
        address: tuple[str, int],
        context: Context,
    ) -> None:
        super().__init__(
            {"peername": address, "sockname": ("127.0.0.1", 1), "socket": FakeSocket(address)},
        )
        self.context = context
        self.owner = -1
        self.listener: Listener | None = None
        self._network = network
        self._loop = network.loop
        self._dice = dice
        self._faults = faults
        # What the kernel has not taken yet.
        self._buffer = bytearray()
        # Bytes in the kernel, on their way, or not read by the other end.
        self._under_way = 0
        self._sent = 0
        # When the last byte that was sent will have arrived.
        self._due = 0.0
        self.lost_in_black_hole = False
        self._high, self._low = HIGH_WATER, HIGH_WATER // 4
        self._writing_paused = False
        self._reading = True
        self._inbox: collections.deque[bytes | None] = collections.deque()
        self._closing = False
        self._eof_wanted = False
        self.dead = False
        # The bytes that the program has written so far, and that its protocol has got.
        self.written = self.received = 0
        # When the protocol got something last, when something was written, and when reading, or
        # writing, went on.
        self.heard_at = self.spoke_at = self.resumed_at = Clock.now
        # Since when the buffer has not shrunk, if there is anything in it; when it became too
        # large last, and when it was closed.
        self.stuck_since = self.paused_at = self.closed_at = Clock.now

    # What the transport is asked.

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self.protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        assert isinstance(protocol, asyncio.Protocol)
        self.protocol = protocol

    def is_closing(self) -> bool:
        return self._closing

    def is_reading(self) -> bool:
        return self._reading and not self._closing

    def get_write_buffer_size(self) -> int:
        return len(self._buffer)

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._low, self._high

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._ensure_alive()
        if high is None:
            high = HIGH_WATER if low is None else 4 * low
        self._high, self._low = high, high // 4 if low is None else low
        self._look_at_buffer()

    @property
    def writing_paused(self) -> bool:
        """Whether the protocol was told not to write."""
        return self._writing_paused

    def can_write_eof(self) -> bool:
        return True

    def _ensure_alive(self) -> None:
        """Raise RuntimeError, as uvloop does, if the protocol has been told that the connection is
        lost.
        """
        if self.dead:
            raise RuntimeError("the transport is closed")

    # Reading.

    def pause_reading(self) -> None:
        self._reading = False

    def resume_reading(self) -> None:
        if not self._reading and not self._closing:
            self._reading = True
            self.resumed_at = Clock.now
            self._loop.call_soon(self._deliver, context=self.context)

    # Writing.

    def write(self, data: Any) -> None:
        self._ensure_alive()
        if self._closing or self._eof_wanted:
            return
        if not self._buffer:
            self.stuck_since = Clock.now
        self._buffer += data
        self.written += len(data)
        self.spoke_at = Clock.now
        self._send()
        self._look_at_buffer()

    def writelines(self, list_of_data: Iterable[Any]) -> None:
        self.write(b"".join(list_of_data))

    def write_eof(self) -> None:
        self._ensure_alive()
        self._eof_wanted = True
        if not self._buffer:
            self._transmit(None)

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            self.closed_at = Clock.now
            if not self._buffer:
                self._loop.call_soon(self._end, None, context=self.context)
            elif self.owner < 0 or self.listener is not None:
                self._loop.call_later(USER_TIMEOUT, self._reset, context=self.context)

    def abort(self) -> None:
        self._closing = True
        self._loop.call_soon(self._reset, context=self.context)

    def _send(self) -> None:
        """Give the kernel what it has room for.

        As kernels do, it waits until there is room for a segment, for half of what it can hold, or
        for all that is left (RFC 1122, 4.2.3.4). Otherwise pieces that were cut would never grow
        again: a long answer would end as single bytes, each of which takes the latency of the
        link.
        """
        kernel = self._faults.kernel
        while self._buffer:
            room = kernel - self._under_way
            if room < min(len(self._buffer), SEGMENT, kernel // 2):
                break
            piece = bytes(self._buffer[:room])
            del self._buffer[:room]
            self.stuck_since = Clock.now
            self._under_way += len(piece)
            self._transmit(piece)
        if not self._buffer:
            if self._closing:
                self._loop.call_soon(self._end, None, context=self.context)
            elif self._eof_wanted:
                self._transmit(None)

    def _look_at_buffer(self) -> None:
        """Tell the protocol whether it may write."""
        if self._closing or self.dead:
            return
        size = len(self._buffer)
        if size > self._high and not self._writing_paused:
            self._writing_paused = True
            self.paused_at = Clock.now
            self.protocol.pause_writing()
        elif size <= self._low and self._writing_paused:
            self._writing_paused = False
            self.resumed_at = Clock.now
            self.protocol.resume_writing()

    def _transmit(self, piece: bytes | None) -> None:
        """Let *piece* arrive; None is the end of what is sent."""
        faults, now = self._faults, Clock.now
        size = 0 if piece is None else len(piece)
        before, self._sent = self._sent, self._sent + size
        if faults.reset_at is not None and self._sent > faults.reset_at:
            self._loop.call_soon(self._reset, context=self.context)
            return
        if faults.black_hole_at is not None and self._sent > faults.black_hole_at:
            self.lost_in_black_hole = True
        if self.lost_in_black_hole:
            return
        self._due = max(self._due, now) + faults.latency * self._dice.uniform(0.5, 2.0)
        self._due += size / faults.bandwidth
        if faults.stall_at is not None and before <= faults.stall_at < self._sent:
            self._due += faults.stall_seconds
        self._loop.call_exactly_at(self._due, self.peer.arrive, piece, context=self.peer.context)

    # Arriving.

    def arrive(self, piece: bytes | None) -> None:
        """Take what the other end has sent; None is its end."""
        if self.dead:
            if piece is not None and not self.peer.dead:
                # Nobody is here: the other end is told so.
                self.peer.lose(ConnectionResetError(104, "reset by peer"))
            return
        if piece is not None and len(piece) > 1 and self._dice.random() < 0.2:
            cut = self._dice.randrange(1, len(piece))
            self._inbox += (piece[:cut], piece[cut:])
        elif piece is not None and self._inbox and self._inbox[-1] and self._dice.random() < 0.5:
            self._inbox[-1] += piece
        else:
            self._inbox.append(piece)
        self._deliver()

    def _deliver(self) -> None:
        while self._inbox and self._reading and not self.dead and not self._closing:
            piece = self._inbox.popleft()
            if piece is None:
                if not self.protocol.eof_received():
                    self.close()
                return
            self.received += len(piece)
            self.heard_at = Clock.now
            self.peer.taken(len(piece))
            self.protocol.data_received(piece)

    def taken(self, size: int) -> None:
        """Note that the other end has read *size* bytes."""
        self._under_way -= size
        if self._buffer and not self.dead:
            self._send()
            self._look_at_buffer()

    # The end.

    def _end(self, error: Exception | None) -> None:
        """End in good order: everything was sent, and the other end hears of the end after it."""
        if not self.dead:
            unread = bool(self._inbox)
            self.lose(error)
            if unread:
                # As a kernel does that has bytes nobody will read.
                self.peer.lose_soon()
            else:
                self._transmit(None)

    def _reset(self) -> None:
        if not self.dead:
            self.lose(None if self._closing else ConnectionResetError(104, "reset"))
            if not self.lost_in_black_hole:
                self.peer.lose_soon()

    def lose_soon(self) -> None:
        """Learn of a reset by the other end, after the latency."""
        error = ConnectionResetError(104, "reset by peer")
        latency = self.peer._faults.latency  # noqa: SLF001
        self._loop.call_exactly_at(Clock.now + latency, self.lose, error, context=self.context)

    def vanish(self) -> None:
        """Be closed by the kernel, as the process has been killed: its protocol hears nothing of
        it.
        """
        if not self.dead:
            self._forget()
            if not self.lost_in_black_hole:
                self.peer.lose_soon()

    def lose(self, error: Exception | None) -> None:
        """Be lost."""
        if not self.dead:
            self._forget()
            self.protocol.connection_lost(error)

    def _forget(self) -> None:
        self.dead = self._closing = True
        self._buffer.clear()
        self._inbox.clear()
        self._network.open.discard(self)
        if self.listener is not None:
            self.listener.dialled.discard(self)
