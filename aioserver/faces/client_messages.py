"""Incoming WebSocket messages (RFC 6455, 5.2), counted frame by frame before aiohttp reads them.

aiohttp shows only whole messages. It counts neither the bytes of an unfinished message nor control
frames. `ClientMessages` therefore stands between the connection and aiohttp's reader. It reads
only the heads of the frames, and passes everything on unchanged. Always:

- at most FRAMES_PER_SECOND frames come, after a burst; control frames count, and so do parts of a
  message that are smaller than MIN_PART_BYTES;
- at most `max_message_size` bytes a second come, after a burst of twice that;
- the bytes of an unfinished message count against `max_body_bytes`. While the socket waits for its
  place they are at most `room`;
- a message is whole within BODY_TIMEOUT after its first byte;
- every frame is masked, and a close frame has a code that may be sent (RFC 6455, 5.1 and 7.4).

A fault between two frames takes effect after the messages before it: the reader gets an invalid
frame, which it refuses. Any other fault takes effect at once.

This file is one concept: all of these counts are taken from the same heads of frames.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Protocol

from aiohttp import WSCloseCode, web

from aioserver.errors import AioserverError, RateLimitExceeded, RequestTimeout
from aioserver.faces import intake
from aioserver.limits.gcra import ROUNDING, Gcra

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp.abc import AbstractStreamWriter
    from aiohttp.http_websocket import WebSocketReader

    from aioserver.faces.admission import BodyHold

# A client that sends more frames than these floods the server.
FRAMES_PER_SECOND, FRAMES_BURST = 100, 200
FRAME_INTERVAL = 1 / FRAMES_PER_SECOND
FRAME_TOLERANCE = (FRAMES_BURST - 1) * FRAME_INTERVAL
# Seconds' worth of bytes that may come at once.
BYTES_BURST = 2.0
# A part of a message with at least this many bytes does not count as a frame of a flood: browsers
# send a large message in parts of 128 KiB, whose bytes count anyway.
MIN_PART_BYTES = 1024
# The reason given when a client sends more than fits before the socket has its place.
FULL_ROOM = "too many messages before a place was free"
# Seconds after which a refused client may come back: its rates are counted by the second.
COME_BACK = 1.0
# The opcode of a close frame (RFC 6455, 5.2).
CLOSE = 8
# Bytes of a frame's head with its mask, for a length of 7, 16 and 64 bits.
HEAD, HEAD_16, HEAD_64 = 6, 8, 14
# aiohttp's reader refuses a frame with reserved bits, with 1002.
REFUSED_FRAME = b"\xf0\x80\0\0\0\0"


def sendable(code: int) -> bool:
    """Return whether a close frame may have *code* (RFC 6455, 7.4; IANA's registry for 1012 to
    1014).
    """
    return 3000 <= code < 5000 or (1000 <= code < 1015 and code not in {1004, 1005, 1006})


def too_much(text: str) -> RateLimitExceeded:
    """Return the error of a client that has sent more than it may; it includes when to
    come back.
    """
    return RateLimitExceeded(text, retry_after=COME_BACK)


class Receiver(Protocol):
    """The socket that gets the messages."""

    def break_off(self, error: AioserverError) -> None:
        """Close with *error*; nothing more can be read."""

    def client_gone(self) -> None:
        """Note that the connection is lost."""


class ClientMessages:
    """Counts what a client sends on one socket; aiohttp's connection uses it as its reader.

    Always: the reader gets whole heads and whole payloads, never a part of one; `_holds` has one
    hold for each whole message of the client, in the order of the messages. `close` must be called
    at the end of the socket.
    """

    __slots__ = (
        "_bytes",
        "_data",
        "_final",
        "_frames",
        "_head",
        "_hold",
        "_holds",
        "_left",
        "_loop",
        "_make_hold",
        "_max_bytes",
        "_over",
        "_payload",
        "_reader",
        "_receiver",
        "_timer",
        "fault",
        "room",
    )

    def __init__(self, make_hold: Callable[[], BodyHold], max_message_bytes: int) -> None:
        self._make_hold = make_hold
        self._max_bytes = max_message_bytes
        self._loop = asyncio.get_running_loop()
        self._reader: WebSocketReader | None = None
        self._receiver: Receiver | None = None
        self._frames = Gcra(FRAME_INTERVAL, FRAME_TOLERANCE)
        self._bytes = Gcra(1 / max_message_bytes, BYTES_BURST)
        # A part of a frame's head, or of a close frame. Before there is a receiver: all bytes so
        # far.
        self._head = b""
        # The number of payload bytes still to come, and the payload bytes received so far. They
        # are kept here because aiohttp would keep a list with one object for each packet, each
        # many times larger than its bytes.
        self._left = 0
        self._payload: bytearray | None = None
        # Whether the frame is a part of a message, not a control frame.
        self._data = False
        # Whether it is the last part of its message.
        self._final = False
        # Counts the message that is not finished.
        self._hold: BodyHold | None = None
        # A list, since an empty deque would double the size of this object for each idle client.
        self._holds: list[BodyHold] = []
        self._timer: asyncio.TimerHandle | None = None
        # Whether reading has ended.
        self._over = False
        # The most bytes that an unfinished message may have; None: no bound.
        self.room: int | None = None
        # The error of the frame that the reader refuses; None if aiohttp found the fault.
        self.fault: AioserverError | None = None

    def wrap(self, reader: WebSocketReader) -> ClientMessages:
        """Pass everything to *reader* from now on, in its place at the connection."""
        self._reader = reader
        return self

    def start(self, receiver: Receiver) -> None:
        """Read the bytes received so far, and report faults to *receiver*."""
        self._receiver = receiver
        early, self._head = self._head, b""
        if early:
            self.feed_data(early)

    def take_hold(self) -> BodyHold:
        """Return the hold of the next whole message, which the caller releases."""
        return self._holds.pop(0)

    def close(self) -> None:
        """Stop counting and reading."""
        self._over = True
        self._stop_timer()
        # The reader may hold megabytes of an unfinished message.
        self._reader = None
        self._head, self._payload = b"", None
        if self._hold is not None:
            self._hold.release()
        for hold in self._holds:
            hold.release()
        self._holds.clear()

    def forget_receiver(self) -> None:
        """Report a lost connection to no receiver any more."""
        self._receiver = None

    # The interface of aiohttp's reader.

    def feed_eof(self) -> None:
        """Note that the connection is lost."""
        if self._reader is not None:
            self._reader.feed_eof()
        if self._receiver is not None:
            self._receiver.client_gone()

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        """Count *data*, and pass it on. The first value is True once nothing more is read."""
        if self._over:
            return True, b""
        if self._receiver is None:
            self._head += data
            return False, b""
        if self._head:
            data, self._head = self._head + data, b""
        size, place, start, body = len(data), 0, -1, 0
        while place < size:
            if not self._left:
                start = place
                place = body = self._read_head(data, start)
                if place < 0:
                    return self._refuse(data[:start])
                if not place:
                    self._head, data = data[start:], data[:start]
                    break
            step = min(self._left, size - place)
            place += step
            self._left -= step
            self._bytes.take(step / self._max_bytes)
            if self._bytes.delay() > ROUNDING:
                error = too_much(f"more than {self._max_bytes} bytes a second")
                if start < 0:
                    # The reader is in the middle of this frame.
                    self._break_off(error)
                    return True, b""
                self.fault = error
                return self._refuse(data[:start])
            if self._data and not self._count(step):
                return True, b""
        self._watch()
        part = b""
        if self._left:
            if start < 0:
                self._payload = self._payload or bytearray()
                self._payload += data
                return False, b""
            data, part = data[:body], data[body:]
        if self._payload:
            data = self._with_payload(data)
        if part:
            self._payload = bytearray(part)
        assert self._reader is not None
        over, rest = self._reader.feed_data(data) if data else (False, b"")
        if over:
            self._end()
        return over, rest

    def _read_head(self, data: bytes, start: int) -> int:
        """Read the head of the frame at *start*, and return where its payload begins.

        Returns 0 if the head is not complete, and -1 if the frame is refused. A close frame counts
        as complete only with its payload.
        """
        have = len(data) - start
        if have < 2:
            return 0
        opcode, flag = data[start] & 0x0F, data[start + 1] & 0x7F
        if not data[start + 1] & 0x80:
            return -1
        need = HEAD if flag < 126 else HEAD_16 if flag == 126 else HEAD_64
        if opcode == CLOSE and flag < 126:
            need += flag
        if have < need:
            return 0
        length = flag if flag < 126 else int.from_bytes(data[start + 2 : start + need - 4])
        if opcode == CLOSE and flag >= 2:
            code = int.from_bytes(data[start + 6 : start + 8]) ^ int.from_bytes(
                data[start + 2 : start + 4]
            )
            if not sendable(code):
                return -1
        if (opcode or length < MIN_PART_BYTES) and self._frames.try_take():
            self.fault = too_much(f"more than {FRAMES_PER_SECOND} frames a second")
            return -1
        self._data = opcode < CLOSE
        if opcode == CLOSE:
            return start + need
        self._left = length
        if self._data:
            have = 0 if self._hold is None else self._hold.size
            if have + length > self._max_bytes:
                # The reader refuses the frame, and reads none of it.
                self._left, self._data = 0, False
                return len(data)
            self._final = data[start] >= 0x80
            if self._hold is None:
                self._hold = self._make_hold()
        return start + need

    def _count(self, size: int) -> bool:
        """Count *size* bytes of the message under way; return whether there is room for them."""
        hold = self._hold
        assert hold is not None
        try:
            hold.grow(size)
        except AioserverError as error:
            self._break_off(error)
            return False
        if self.room is not None and hold.size > self.room:
            self._break_off(too_much(FULL_ROOM))
            return False
        if self._final and not self._left:
            self._holds.append(hold)
            self._hold = None
        return True

    def _watch(self) -> None:
        """Start the deadline of an unfinished message, or end it if everything is whole."""
        if self._hold is None and not self._head and not self._left:
            self._stop_timer()
        elif self._timer is None:
            self._timer = self._loop.call_later(intake.BODY_TIMEOUT, self._late)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        self._break_off(
            RequestTimeout(f"the message was not whole within {intake.BODY_TIMEOUT} s")
        )

    def _refuse(self, before: bytes) -> tuple[bool, bytes]:
        """Let the reader read *before*, and then a frame that it refuses."""
        assert self._reader is not None
        data = self._with_payload(before)
        self._end()
        self._reader.feed_data(data + REFUSED_FRAME)
        return True, b""

    def _with_payload(self, data: bytes) -> bytes:
        """Return *data* with the payload of earlier packets in front of it, which is then no
        longer kept.
        """
        payload, self._payload = self._payload or b"", None
        return b"".join((payload, data))

    def _break_off(self, error: AioserverError) -> None:
        """Close with *error* at once; messages that were not taken are dropped."""
        assert self._receiver is not None
        assert self._reader is not None
        self._end()
        self._receiver.break_off(error)
        self._reader.feed_eof()

    def _end(self) -> None:
        self._over = True
        self._payload = None
        self._stop_timer()


class Upgraded(web.WebSocketResponse):
    """aiohttp's handshake and parser, with *messages* between them.

    It writes and closes nothing: the socket does.
    """

    def __init__(self, messages: ClientMessages, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._messages = messages

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter:
        """Do the handshake."""
        if self.prepared:
            # aiohttp asks once more when the handler has ended.
            return await super().prepare(request)
        counted: Any = _CountedRequest(request, self._messages)
        writer = await super().prepare(counted)
        assert counted.has_reader, "aiohttp gives its reader to the request's connection"
        return writer

    async def close(
        self,
        *,
        code: int = WSCloseCode.OK,  # noqa: ARG002 - aiohttp's signature
        message: bytes = b"",  # noqa: ARG002
        drain: bool = True,  # noqa: ARG002
    ) -> bool:
        """Do nothing: the socket closes the connection."""
        return False


class _CountedRequest:
    """A request whose connection gets a counted reader."""

    __slots__ = ("_messages", "_request", "has_reader")

    def __init__(self, request: web.BaseRequest, messages: ClientMessages) -> None:
        self._request, self._messages = request, messages
        self.has_reader = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)

    @property
    def protocol(self) -> _CountedRequest:
        """The connection, as far as aiohttp needs it: this object plays its part, too."""
        return self

    def set_parser(self, reader: WebSocketReader, **kwargs: Any) -> None:
        """Give the connection the reader that counts."""
        connection: Any = self._request.protocol
        connection.set_parser(self._messages.wrap(reader), **kwargs)
        self.has_reader = True

    def keep_alive(self, value: bool) -> None:
        """Pass *value* to the connection."""
        self._request.protocol.keep_alive(value)
