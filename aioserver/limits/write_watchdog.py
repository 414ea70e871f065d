"""A watchdog over a socket that does not accept what is written to it.

A blocked write is never cancelled: aiohttp's drain waits on one shared future, and cancelling it
once breaks every later write on that connection. Instead the watchdog checks from time to time how
many bytes the peer has taken. When it is gone, the watchdog calls *alarm*, which aborts the
transport, and the blocked write ends by itself. The watchdog runs only while a write is blocked.

*Progress* is the number of bytes that the peer has acknowledged (`tcpi_bytes_acked` of
`TCP_INFO`). It is not the number that has left the transport's buffer: the kernel takes from there
in steps of 64 KiB and more. If the kernel does not report it, as for UNIX sockets, progress is
what has left both buffers (`SIOCOUTQ`).

*Slow, not gone.* Bytes that a peer has acknowledged lie in its kernel until its program reads
them. Once that buffer is full, the window is shut, and opens only when a whole buffer has been
read. Over loopback it has 128 KiB, which a program that reads 4 KiB a second empties in half a
minute. Until then the peer looks exactly like a peer that reads nothing. So a peer is gone once it
has taken nothing for the timeout, and for as long as a slow program could be busy with the bytes
that it may not have read. A slow program reads a least number of bytes within each timeout. The
bytes are at most all those acknowledged, and count up to MOST_UNREAD.

A peer that does not even acknowledge retransmissions is gone after the timeout alone.
"""

from __future__ import annotations

import asyncio
import fcntl
import socket
import struct
import sys
import termios
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

# Checks per timeout: the alarm comes at most a quarter of the timeout late.
LOOKS = 4
# The fewest bytes that a client reads within `send_timeout`: 0.8 KiB a second by default.
CLIENT_BYTES = 1 << 13
# The fewest bytes that a provider reads within `write_timeout`: 13 KiB a second by default.
PROVIDER_BYTES = 1 << 17
# The most bytes that count as taken and perhaps unread.
MOST_UNREAD = 1 << 18
# Bytes of `struct tcp_info` up to `tcpi_bytes_acked`, which Linux has since 4.1, and the offsets
# of `tcpi_retransmits`, `tcpi_probes`, `tcpi_backoff`, `tcpi_rto`, `tcpi_last_data_sent`,
# `tcpi_last_ack_recv` and `tcpi_bytes_acked`.
TCP_INFO_BYTES = 128
RETRANSMITS, PROBES, BACKOFF, RTO, LAST_SENT, LAST_ACK, ACKED = 2, 3, 4, 8, 44, 56, 120


class Peer(NamedTuple):
    """The kernel's view of the other end of a connection.

    *taken*: the bytes that it has acknowledged, 0 if that is not known. *waiting*: the bytes that
    wait for it, in the transport and in the kernel. *unread*: the most bytes that it has taken and
    its program has not read. *silent*: its `silence`, 0.0 if that is not known.
    """

    taken: int
    waiting: int
    unread: int
    silent: float


def peer_of(transport: asyncio.WriteTransport) -> Peer:
    """Return the kernel's view of the other end of *transport*."""
    buffered, sock = transport.get_write_buffer_size(), transport.get_extra_info("socket")
    if sock is None:
        return Peer(0, buffered, 0, 0.0)
    try:
        queued = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4))
        kernels = int.from_bytes(queued, sys.byteorder)
        if sock.family == socket.AF_UNIX:
            # Bytes that its program has not read are in our buffer there.
            return Peer(0, buffered + kernels, kernels, 0.0)
        if sys.platform == "linux":
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
            if len(info) == TCP_INFO_BYTES:
                (taken,) = struct.unpack_from("=Q", info, ACKED)
                return Peer(taken, buffered + kernels, taken, silence(info))
    except (OSError, ValueError):
        # The connection is lost, or the system does not report it.
        return Peer(0, buffered, 0, 0.0)
    return Peer(0, buffered + kernels, 0, 0.0)


def silence(info: bytes) -> float:
    """Return the seconds for which a peer has acknowledged none of two or more retransmissions;
    otherwise 0.0. *info*: a `struct tcp_info` of Linux.

    A connection may have rested for hours before, so its last acknowledgement says little. The
    kernel doubles its timeout at each retransmission (RFC 6298, 5.5), and at each probe of a shut
    window, so the present timeout says how long the earlier ones took together. It stops at 120 s,
    so silences above 240 s are not seen.
    """
    retransmits, probes, backoff = info[RETRANSMITS], info[PROBES], info[BACKOFF]
    if retransmits + probes < 2:
        return 0.0
    (timeout,) = struct.unpack_from("=I", info, RTO)
    (last_sent,) = struct.unpack_from("=I", info, LAST_SENT)
    (last_ack,) = struct.unpack_from("=I", info, LAST_ACK)
    if retransmits:
        unanswered = timeout / 1e6 * (1 - 2.0**-retransmits) + last_sent / 1000
    else:
        # The timeout itself stays, and no probe counts as data. The peer answered until the first
        # unanswered probe.
        unanswered = min(120.0, timeout / 1e6 * 2.0**backoff) * (1 - 2.0 ** (1 - probes))
    return float(min(last_ack / 1000, unanswered))


def patience(timeout: float, unread: int, least: int) -> float:
    """Return the seconds for which a peer with *unread* bytes may still be busy.

    *least*: the fewest bytes that it reads within *timeout*.
    """
    return timeout * max(1.0, unread / least)


class WriteWatchdog:
    """Calls *alarm* once when the peer of *transport* is gone: see the head of this file.

    Always: nothing is written to the transport while it is watched. The watchdog ends by itself
    when the buffer is empty.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        transport: asyncio.WriteTransport,
        timeout: float,
        alarm: Callable[[], None],
        *,
        least: int = CLIENT_BYTES,
    ) -> None:
        self._loop = loop
        self._transport = transport
        self._timeout = timeout
        self._period = timeout / LOOKS
        self._alarm = alarm
        self._least = least
        peer = peer_of(transport)
        self._progress = peer.taken - peer.waiting
        # Checks in a row at which the peer had taken nothing.
        self._stalled = 0
        self._handle: asyncio.TimerHandle | None = loop.call_later(self._period, self._look)

    def stop(self) -> None:
        """Stop watching: no alarm comes from now on."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _look(self) -> None:
        self._handle = None
        if not self._transport.get_write_buffer_size():
            return
        peer = peer_of(self._transport)
        progress = peer.taken - peer.waiting
        self._stalled = 0 if progress > self._progress else self._stalled + 1
        self._progress = progress
        stalled, timeout = self._stalled * self._period, self._timeout
        longest = patience(timeout, min(peer.unread, MOST_UNREAD), self._least)
        if stalled >= longest or (stalled >= timeout and peer.silent >= timeout):
            self._alarm()
        else:
            self._handle = self._loop.call_later(self._period, self._look)


def vanished(transport: asyncio.WriteTransport, timeout: float) -> bool:
    """Return whether the peer has left retransmissions unanswered for *timeout* seconds."""
    return peer_of(transport).silent >= timeout


def reset(transport: asyncio.Transport) -> None:
    """Reset the connection, discarding whatever is still to be written."""
    sock = transport.get_extra_info("socket")
    if sock is not None and not transport.is_closing():
        # Linger 0 resets: otherwise the kernel would keep the bytes for a peer that reads nothing.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def watch_rest(transport: asyncio.Transport, timeout: float) -> None:
    """Abort *transport*, which gets no more writes, if its peer does not read the rest.

    Its close() would wait for that peer for ever. The kernel drops the rest of its own buffer
    after some minutes.
    """
    if transport.get_write_buffer_size():
        WriteWatchdog(asyncio.get_running_loop(), transport, timeout, transport.abort)
