"""The reader's side of an answer that a client reads here on a WebSocket, and whose owner is
another instance (peer_reader.py).

The owner's bytes are messages for the client's socket, and pings. Other answers share that socket,
so only whole messages are passed on: a tunnel reads the heads of the frames (RFC 6455, 5.2), and
no more.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aioserver.errors import AioserverError, ServerShutdown
from aioserver.wings.cluster.answers.greeting import END, FOUND

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.gateway.contracts.instances import PassOn
    from aioserver.streams.store import HeldBytes

# Bytes of an error.
MAX_REFUSAL = 1 << 16
GONE = "the process that has this answer is out of reach"


class SocketTunnel(asyncio.Protocol):
    """Passes the messages of an answer from its owner on to a client's socket: see `Reading`.

    Always: only whole messages are passed on, in order; *held* counts the bytes that are not; the
    owner is not read while the client reads nothing.

    *on_lost* is called when the connection to the owner has ended.
    """

    def __init__(self, held: HeldBytes, on_lost: Callable[[SocketTunnel], None]) -> None:
        # Whether the owner has the answer, once it has said so.
        self.accepted: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        # The error that the owner has sent if it does not have the answer.
        self.refusal = b""
        self.last, self.passed = b"", 0
        self._held, self._on_lost = held, on_lost
        self._pass_on: PassOn | None = None
        self._on_end: Callable[[AioserverError | None], None] | None = None
        # Bytes that are not passed on yet.
        self._kept = bytearray()
        # Whether nothing is read: nobody has begun to, or the client does not.
        self._blocked = True
        # Whether the connection to the owner has ended, and whether nothing follows here.
        self._lost = self._over = False
        self._owner: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the owner's transport."""
        # uvloop's transports are no instances of it.
        self._owner = transport  # type: ignore[assignment]

    def write(self, data: bytes) -> None:
        """Write *data* to the owner."""
        if self._owner is not None:
            self._owner.write(data)

    def data_received(self, data: bytes) -> None:
        """Pass the whole messages on."""
        if self._over:
            return
        if not self.accepted.done():
            if self.refusal or not data.startswith(FOUND):
                self.refusal += data
                if len(self.refusal) > MAX_REFUSAL:
                    self.close()
                return
            self.accepted.set_result(True)
            data = data[len(FOUND) :]
        self._kept += data
        if self._blocked:
            self._pause()
        else:
            self._flow()

    def start(self, pass_on: PassOn, on_end: Callable[[AioserverError | None], None]) -> None:
        """Pass messages on: see `Reading`."""
        self._pass_on, self._on_end = pass_on, on_end
        self._flow()

    def leave(self) -> None:
        """Pass nothing on any more, and let the owner know: see `Reading`."""
        self._over = True
        self._kept.clear()
        self._held.release()
        # The client's socket and this tunnel refer to each other.
        self._pass_on = self._on_end = None
        self.close()

    def close(self) -> None:
        """End the connection to the owner."""
        if self._owner is not None:
            self._owner.abort()

    def connection_lost(self, _exc: Exception | None) -> None:
        """Note that nothing more comes; the kept bytes are passed on first."""
        self._lost, self._owner = True, None
        if not self.accepted.done():
            self.accepted.set_result(False)
        self._on_lost(self)
        if not self._blocked:
            self._flow()

    def _flow(self) -> None:
        """Pass the whole messages on, if the client reads, and then read on."""
        if self._over or self._pass_on is None:
            return
        kept = self._kept
        end, last, over = _whole(kept)
        if end:
            messages = bytes(kept[:end])
            if not self._pass_on(messages, self._flow):
                self._blocked = True
                self._pause()
                return
            del kept[:end]
            self.last, self.passed = messages[last:], self.passed + 1
        if over or self._lost:
            self._end(None if over else ServerShutdown(GONE, retry_after=1.0))
            return
        if self._blocked:
            self._blocked = False
            if self._owner is not None and not self._owner.is_closing():
                self._owner.resume_reading()
        self._count()

    def _pause(self) -> None:
        # A transport of uvloop that is closing raises.
        if self._owner is not None and not self._owner.is_closing():
            self._owner.pause_reading()
        self._count()

    def _count(self) -> None:
        """Count what is kept; beyond `max_kept_bytes` the reading ends."""
        held, size = self._held, len(self._kept)
        if size < held.size:
            held.reset()
        # The bytes that come before the client reads are those of one read.
        if size > held.size and self._on_end is not None:
            try:
                held.grow(size - held.size)
            except AioserverError as error:
                self._end(error)

    def _end(self, error: AioserverError | None) -> None:
        on_end = self._on_end
        self.leave()
        if on_end is not None:
            on_end(error)


def _whole(data: bytearray) -> tuple[int, int, bool]:
    """Return where the whole messages in *data* end, where the last of them begins, and whether
    END follows them.
    """
    at, last, size = 0, 0, len(data)
    while size - at >= 2:
        if data[at] == END[0]:
            return at, last, True
        length, head = data[at + 1], 2
        if length >= 126:
            head = 4 if length == 126 else 10
            length = int.from_bytes(data[at + 2 : at + head])
        if size - at < head + length:
            break
        last, at = at, at + head + length
    return at, last, False
