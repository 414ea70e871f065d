"""A network in memory: listeners, connections, and what goes wrong on them.

A connection has two ends, each an asyncio transport. What one end writes goes to its kernel buffer while
there is room, and to the buffer of the transport otherwise; it arrives after the latency, in pieces that are
cut and joined at random, and leaves the kernel buffer when the other end's protocol has got it. So writes
block, `pause_writing` is called and watchdogs fire as they do on sockets.

`Faults` has what one connection may suffer. Each connection draws from dice of its own, so that a run stays
the same for the others when one client is left out of it.
"""

from __future__ import annotations

import asyncio
import collections
import random
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Factory = Callable[[], asyncio.Protocol]

FIRST_PORT = 10_000
# asyncio's own limits of a transport's buffer.
HIGH_WATER = 64 * 1024
# Seconds after which a kernel gives up what nobody takes, once the program has closed (TCP_USER_TIMEOUT).
USER_TIMEOUT = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What happens to one direction of a connection. Bytes are counted from its beginning.

    *reset_at*: the connection is reset when so many bytes were sent. *stall_at*: then nothing arrives for
    *stall_seconds*. *black_hole_at*: from then on nothing arrives, and nobody is told. *latency* is in seconds,
    *bandwidth* in bytes a second; *kernel* bytes are taken from the transport before it buffers.
    """

    latency: float = 0.0002
    bandwidth: float = 1e8
    kernel: int = 1 << 17
    reset_at: int | None = None
    stall_at: int | None = None
    stall_seconds: float = 0.0
    black_hole_at: int | None = None


GOOD = Faults()


@dataclass(frozen=True, slots=True)
class Dial:
    """How one connection is made: its dice, the faults of both directions, and what its listener does.

    *accept_after*: seconds until the listener accepts it (its queue is full so long). *refused*: it does not.
    """

    dice: random.Random
    there: Faults = GOOD
    back: Faults = GOOD
    accept_after: float = 0.0
    refused: bool = False


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

    def getsockopt(self, *_args: Any) -> int:
        return 0

    def getpeername(self) -> tuple[str, int]:
        return self.address

    def getsockname(self) -> tuple[str, int]:
        return self.address

    def close(self) -> None:
        """Do nothing: the transport closes."""


class Listener:
    """What `create_server` returns: a port on which *factory* makes the protocols of connections."""

    def __init__(self, network: Network, port: int, factory: Factory) -> None:
        self._network = network
        self.port = port
        self.factory = factory
        self.sockets = [FakeSocket(("127.0.0.1", port))]

    def close(self) -> None:
        self._network.listeners.pop(self.port, None)

    async def wait_closed(self) -> None:
        """Return: connections that are open stay open, as after a `close` of asyncio's server."""

    def is_serving(self) -> bool:
        return self.port in self._network.listeners


class Network:
    """All listeners and connections of a run."""

    def __init__(self, dice: random.Random) -> None:
        self.loop: asyncio.AbstractEventLoop
        self.listeners: dict[int, Listener] = {}
        self.made = 0
        # The ends of the connections that are open.
        self.open: set[Transport] = set()
        self._dice = dice
        self._ports = FIRST_PORT

    def listen(self, factory: Factory) -> Listener:
        """Return a listener on a new port, whose connections get protocols from *factory*."""
        self._ports += 1
        listener = self.listeners[self._ports] = Listener(self, self._ports, factory)
        return listener

    async def connect(
        self, factory: Factory, sock: FakeSocket
    ) -> tuple[asyncio.Transport, asyncio.Protocol]:
        """Connect to the listener at the address of *sock*.

        Raises:
            ConnectionRefusedError: nobody listens there, or the dial is refused.
        """
        dial = sock.dial or Dial(random.Random(self._dice.random()))
        await asyncio.sleep(dial.there.latency + dial.accept_after)
        listener = self.listeners.get(sock.address[1])
        if listener is None or dial.refused:
            raise ConnectionRefusedError(111, "refused")
        self.made += 1
        near = Transport(self, dial.dice, dial.there, sock.address)
        far = Transport(self, dial.dice, dial.back, ("127.0.0.1", 40_000 + self.made % 20_000))
        near.peer, far.peer = far, near
        near.protocol, far.protocol = factory(), listener.factory()
        self.open |= {near, far}
        far.protocol.connection_made(far)
        near.protocol.connection_made(near)
        return near, near.protocol


class Transport(asyncio.Transport):
    """One end of a connection.

    Always: bytes arrive in the order in which they were written, or not at all, and then nothing after them.
    """

    peer: Transport
    protocol: asyncio.Protocol

    def __init__(
        self, network: Network, dice: random.Random, faults: Faults, address: tuple[str, int]
    ) -> None:
        sock = FakeSocket(address)
        super().__init__(
            {"peername": address, "sockname": ("127.0.0.1", 1), "socket": sock},
        )
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
        self._lost_in_black_hole = False
        self._high, self._low = HIGH_WATER, HIGH_WATER // 4
        self._writing_paused = False
        self._reading = True
        self._inbox: collections.deque[bytes | None] = collections.deque()
        self._closing = False
        self._eof_wanted = False
        self.dead = False

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
        if high is None:
            high = HIGH_WATER if low is None else 4 * low
        self._high, self._low = high, high // 4 if low is None else low
        self._look_at_buffer()

    def can_write_eof(self) -> bool:
        return True

    # Reading.

    def pause_reading(self) -> None:
        self._reading = False

    def resume_reading(self) -> None:
        if not self._reading and not self._closing:
            self._reading = True
            self._loop.call_soon(self._deliver)

    # Writing.

    def write(self, data: Any) -> None:
        if self._closing or self.dead or self._eof_wanted:
            return
        self._buffer += data
        self._send()
        self._look_at_buffer()

    def writelines(self, list_of_data: Iterable[Any]) -> None:
        self.write(b"".join(list_of_data))

    def write_eof(self) -> None:
        self._eof_wanted = True
        if not self._buffer:
            self._transmit(None)

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            if not self._buffer:
                self._loop.call_soon(self._end, None)
            else:
                self._loop.call_later(USER_TIMEOUT, self._reset)

    def abort(self) -> None:
        self._closing = True
        self._buffer.clear()
        self._loop.call_soon(self._reset)

    def _send(self) -> None:
        """Give the kernel what it has room for."""
        while self._buffer and (room := self._faults.kernel - self._under_way) > 0:
            piece = bytes(self._buffer[:room])
            del self._buffer[:room]
            self._under_way += len(piece)
            self._transmit(piece)
        if not self._buffer:
            if self._closing:
                self._loop.call_soon(self._end, None)
            elif self._eof_wanted:
                self._transmit(None)

    def _look_at_buffer(self) -> None:
        """Tell the protocol whether it may write."""
        if self._closing or self.dead:
            return
        size = len(self._buffer)
        if size > self._high and not self._writing_paused:
            self._writing_paused = True
            self.protocol.pause_writing()
        elif size <= self._low and self._writing_paused:
            self._writing_paused = False
            self.protocol.resume_writing()

    def _transmit(self, piece: bytes | None) -> None:
        """Let *piece* arrive; None is the end of what is sent."""
        faults, now = self._faults, self._loop.time()
        size = 0 if piece is None else len(piece)
        before, self._sent = self._sent, self._sent + size
        if faults.reset_at is not None and self._sent > faults.reset_at:
            self._loop.call_soon(self._reset)
            return
        if faults.black_hole_at is not None and self._sent > faults.black_hole_at:
            self._lost_in_black_hole = True
        if self._lost_in_black_hole:
            return
        self._due = max(self._due, now) + faults.latency * self._dice.uniform(0.5, 2.0)
        self._due += size / faults.bandwidth
        if faults.stall_at is not None and before <= faults.stall_at < self._sent:
            self._due += faults.stall_seconds
        self._loop.call_at(self._due, self.peer.arrive, piece)

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
            self.peer.taken(len(piece))
            self.protocol.data_received(piece)

    def taken(self, size: int) -> None:
        """Note that the other end has read *size* bytes."""
        self._under_way -= size
        if not self.dead:
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
            if not self._lost_in_black_hole:
                self.peer.lose_soon()

    def lose_soon(self) -> None:
        """Learn of a reset by the other end, after the latency."""
        error = ConnectionResetError(104, "reset by peer")
        self._loop.call_later(self.peer._faults.latency, self.lose, error)  # noqa: SLF001

    def lose(self, error: Exception | None) -> None:
        """Be lost."""
        if not self.dead:
            self.dead = self._closing = True
            self._buffer.clear()
            self._inbox.clear()
            self._network.open.discard(self)
            self.protocol.connection_lost(error)
