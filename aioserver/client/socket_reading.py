"""The reading of an answer on WebSockets.

It keeps MAX_UNREAD bytes of frames. What comes beyond is dropped, and asked for again (`resume`) when the
program has read what was kept: the server keeps an answer anyway, and it is not kept twice.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

import orjson

from aioserver.client.errors import Broken, Interrupted, Refused
from aioserver.client.reading import Reading, fault_of

if TYPE_CHECKING:
    from aioserver.client.reading import Question
    from aioserver.protocol.server_frames import Frame

# Bytes of frames that wait to be read by the program, for each answer.
MAX_UNREAD = 1 << 20


class Carrier(Protocol):
    """A connection, as a reading uses it."""

    @property
    def closed(self) -> bool:
        """Whether it sends nothing any more."""

    def add(self, reading: SocketReading) -> None:
        """Let *reading* ask, or resume, on this connection."""

    def remove(self, reading: SocketReading) -> None:
        """Let *reading* go."""

    def send(
        self,
        frame: bytes,
        reading: SocketReading | None = None,
        done: asyncio.Future[None] | None = None,
    ) -> None:
        """Send *frame* when its turn comes, unless *reading* has gone by then."""


class Carriers(Protocol):
    """A transport, as a reading uses it."""

    async def connection(self, request_id: str) -> Carrier:
        """Return a connection with room for the answer *request_id*.

        Raises:
            Interrupted: there is none now.
        """

    def cancel(self, request_id: str, connection: Carrier | None) -> asyncio.Future[None] | None:
        """Cancel an answer, on its connection or on the next one."""


class SocketReading(Reading):
    """The reading of an answer on the sockets of a transport."""

    def __init__(self, transport: Carriers, question: Question) -> None:
        super().__init__(question)
        self.connection: Carrier | None = None
        # Whether the server may know the question.
        self.sent = False
        self._transport = transport
        self._frames: list[Frame] = []
        self._unread = 0
        # The interruption that came after the frames that wait.
        self._interrupted: Interrupted | None = None
        self._waiter: asyncio.Future[None] | None = None
        # Whether frames were dropped; and whether they were asked for again.
        self._behind = self._resuming = False
        self._left = False

    async def frames(self) -> list[Frame]:
        """Return the frames that have come."""
        while True:
            if self._frames:
                frames, self._frames, self._unread = self._frames, [], 0
                return frames
            if self._interrupted is not None:
                interrupted, self._interrupted = self._interrupted, None
                # Its traceback would keep what other readings had that were interrupted by it.
                raise interrupted.with_traceback(None)
            if self.connection is None:
                connection = await self._transport.connection(self.question.request_id)
                connection.add(self)
                if self._frames:
                    continue
            elif self._behind and not self._resuming:
                self._resuming = True
                self.connection.send(self.command(), self)
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    def command(self) -> bytes:
        """Return the frame that asks for what comes next."""
        if not self.last:
            return self.question.command()
        name = orjson.dumps(self.question.request_id)
        return b'{"action":"resume","request_id":%b,"payload":{"last_event_id":%d}}' % (
            name,
            self.last,
        )

    def receive(self, frame: Frame, size: int) -> None:
        """Take a frame of *size* bytes, of this answer or about the whole socket."""
        if frame.event_id is None:
            self._receive_remark(frame)
        elif self._behind and not (self._resuming and frame.event_id == self.last + 1):
            return
        elif self._unread > MAX_UNREAD:
            self._behind = True
            return
        else:
            try:
                self._count(frame)
            except Broken as broken:
                self.interrupt(broken)
                return
            self._behind = self._resuming = False
            self._unread += size
            self._frames.append(frame)
            if self.ended:
                self._detach()
        self._wake()

    def interrupt(self, interrupted: Interrupted) -> None:
        """Take the reading off its connection, and let `frames` raise."""
        self._detach()
        self._interrupted = interrupted
        self._wake()

    def leave(self) -> asyncio.Future[None] | None:
        """Read no further."""
        if self._left or self.ended:
            return None
        self._left = True
        connection = self.connection
        self._detach()
        return self._transport.cancel(self.question.request_id, connection) if self.sent else None

    def _receive_remark(self, frame: Frame) -> None:
        if frame.status == "error":
            fault = fault_of(frame)
            if fault.code == "slow_client":
                self._behind, self._resuming = True, False
            else:
                if not self.last or fault.code == "stream_not_found":
                    # There is nothing to cancel; the id may be another answer's.
                    self.sent = False
                self.interrupt(Refused(fault))
        elif frame.status == "queued":
            # It may come often, and only the newest is of interest.
            if self._frames and self._frames[-1].status == "queued":
                self._frames.pop()
            self._frames.append(frame)

    def _detach(self) -> None:
        if self.connection is not None:
            self.connection.remove(self)
            self.connection = None
        self._behind = self._resuming = False

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
