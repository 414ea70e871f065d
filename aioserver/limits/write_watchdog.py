"""A watchdog over a socket that does not accept what is written to it.

A blocked write is never cancelled: aiohttp's drain waits on one shared future, and cancelling it
once breaks every later write on that connection. Instead the watchdog looks from time to time at
what the peer has taken. When it is gone, the watchdog calls *alarm*, which aborts the transport,
and the blocked write ends by itself. The watchdog runs only while a write is blocked.

*Progress* is what the peer has acknowledged (`tcpi_bytes_acked` of `TCP_INFO`), and not what has
left the transport's buffer: the kernel takes from there in steps of 64 KiB and more. Where the
kernel does not know, as for UNIX sockets, it is what has left both buffers (`SIOCOUTQ`).

*Slow, not gone.* What a peer has acknowledged lies in its own kernel until its program reads it.
Once that is full, its window is shut, and opens only when a whole buffer of it has been read: over
loopback that is 128 KiB, for which a program that reads 4 KiB a second needs half a minute. Until
then it looks exactly like a program that reads nothing. So a peer is gone once it has taken
nothing for the timeout, and for as long as a program that reads a least number of bytes within
each timeout could still be busy with what the peer may not have read. That is at most all that it
has acknowledged, and counts up to MOST_UNREAD.

A peer that does not even answer to what is sent to it again is gone after the timeout alone.
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

# Looks per timeout: the alarm comes at most a quarter of the timeout late.
LOOKS = 4
# Bytes that a client reads at least within `send_timeout`: 0.8 KiB a second, as shipped.
CLIENT_BYTES = 1 << 13
# Bytes that a provider reads at least within `write_timeout`: 13 KiB a second, as shipped.
PROVIDER_BYTES = 1 << 17
# Bytes at most that count as taken and perhaps not read.
MOST_UNREAD = 1 << 18
# Bytes of `struct tcp_info` up to `tcpi_bytes_acked`, which Linux has since 4.1, and the offsets
# of `tcpi_retransmits`, `tcpi_probes`, `tcpi_backoff`, `tcpi_rto`, `tcpi_last_data_sent`,
# `tcpi_last_ack_recv` and `tcpi_bytes_acked`.
TCP_INFO_BYTES = 128
RETRANSMITS, PROBES, BACKOFF, RTO, LAST_SENT, LAST_ACK, ACKED = 2, 3, 4, 8, 44, 56, 120


class Peer(NamedTuple):
    """What the kernel knows of the other end of a connection.

    *taken*: the bytes that it has acknowledged, 0 if that is not known. *waiting*: the bytes that
    wait for it, in the transport and in the kernel. *unread*: how many at most it has taken, while
    its program has not read them. *silent*: its `silence`, 0.0 if that is not known.
    """

    taken: int
    waiting: int
    unread: int
    silent: float


def peer_of(transport: asyncio.WriteTransport) -> Peer:
    """Return what is known of the other end of *transport*."""
    buffered, sock = transport.get_write_buffer_size(), transport.get_extra_info("socket")
    if sock is None:
        return Peer(0, buffered, 0, 0.0)
    try:
        queued = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4))
        kernels = int.from_bytes(queued, sys.byteorder)
        if sock.family == socket.AF_UNIX:
            # What its program has not read is in our buffer there.
            return Peer(0, buffered + kernels, kernels, 0.0)
        if sys.platform == "linux":
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
            if len(info) == TCP_INFO_BYTES:
                (taken,) = struct.unpack_from("=Q", info, ACKED)
                return Peer(taken, buffered + kernels, taken, silence(info))
    except (OSError, ValueError):
        # The connection is lost, or the system does not know.
        return Peer(0, buffered, 0, 0.0)
    return Peer(0, buffered + kernels, 0, 0.0)


def silence(info: bytes) -> float:
    """Return the seconds for which a peer has left unanswered what was sent to it again, more than
    once; otherwise 0.0. *info*: a `struct tcp_info` of Linux.

    A connection may have rested for hours before, so its last acknowledgement says little. The
    kernel doubles its timeout at each retransmission (RFC 6298, 5.5), and at each probe of a shut
    window: the timeout of now says how long the earlier ones took together. It ends at 120 s, so
    that more than 240 s are not seen.
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
        # The timeout itself stays, and no probe counts as data. Before the first unanswered probe
        # the peer has answered.
        unanswered = min(120.0, timeout / 1e6 * 2.0**backoff) * (1 - 2.0 ** (1 - probes))
    return float(min(last_ack / 1000, unanswered))


def patience(timeout: float, unread: int, least: int) -> float:
    """Return the seconds for which a peer may be busy, of which *unread* bytes may be unread.

    *least*: the bytes that it reads at least within *timeout*.
    """
    return timeout * max(1.0, unread / least)


class WriteWatchdog:
    """Calls *alarm* once when the peer of *transport* is gone: see the head of this file.

    Always: nothing is written to the transport while it is watched. The watchdog ends by itself
    when the buffer is empty.
    """

    __slots__ = (
        "_alarm",
        "_handle",
        "_least",
        "_loop",
        "_period",
        "_progress",
        "_stalled",
        "_timeout",
        "_transport",
    )

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
        # Looks in a row at which the peer had taken nothing.
        self._stalled = 0
        self._handle: asyncio.TimerHandle | None = loop.call_later(self._period, self._look)

    def stop(self) -> None:
        """End the watch: no alarm from now on."""
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
    """Return whether the peer has not answered for *timeout* seconds, though it was written to."""
    return peer_of(transport).silent >= timeout


def reset(transport: asyncio.Transport) -> None:
    """Reset the connection, whatever is still to be written."""
    sock = transport.get_extra_info("socket")
    if sock is not None and not transport.is_closing():
        # A reset: otherwise the kernel would keep its bytes for a peer that reads nothing.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def watch_rest(transport: asyncio.Transport, timeout: float) -> None:
    """Abort *transport*, to which nothing is written any more, if its peer does not read the rest.

    Its close() would wait for that peer for ever. What the kernel alone has then, it gives up by
    itself, after some minutes.
    """
    if transport.get_write_buffer_size():
        WriteWatchdog(asyncio.get_running_loop(), transport, timeout, transport.abort)
