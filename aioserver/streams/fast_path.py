r"""The fast path: one event from the provider's socket to the client's, in one call.

Most of what a gateway does is to pass an event on to the one client who waits for it, and most of
what that costs are objects: each one that an event touches is a miss in the processor's caches when
a thousand streams take turns. So where nothing else is to be done for an event it touches few: the
provider's connection, this object, the log and the client's transport.

    ConnectionProtocol.data_received → take → (the end of this turn of the loop) transport.write

*When it may be taken.* It is opened after a read that went the long way, by who knows that all of
this holds, and each of these is asked in turn (`Exchange` → the sink → `Stream` → `Writer`):

    the provider's parser stands between two chunks, and its answer goes on
    no event is half read, and one has been passed on already
    the log has one reader, and that reader has written all there is
    that reader follows nothing else, and its client takes what it is sent

Reads that go the long way begin by leaving the fast path. Whatever else could change one of these
closes it: the log, when a reader comes or goes or it ends; the writer, when it is blocked or closed
or follows another stream.

*What it takes.* One read that is one whole chunk with one whole event that is nothing special:

    FastPath   for the OpenAI face: an event `{…}` without an error and without a finish_reason. The
               chunk's framing is what our client gets, too: the bytes pass unchanged. The log is
               private and empty, and stays empty: the same as an event that was let go at once
    TextPath   for the faces that show frames: an event of the answer's `Shape`, which says a text
               and nothing else. It is appended to the log like any other

Every other form of the same bytes, every end, error and comment goes the long way, and has the same
effect there: the tests feed both with the same streams.
"""

from __future__ import annotations

import re
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple

from aioserver.protocol.eventstream import utf8
from aioserver.streams.entries import Texts

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from aioserver.protocol.openai import Shape
    from aioserver.streams.cursor import Cursor

MAX_CHUNK_BYTES = 2048  # longer reads are rare, and go the long way
MAX_RUN_BYTES = 2048  # of texts that the log does not know yet
_ERROR, _FINISH, _FINISH_SPACED = b'"error"', b'"finish_reason":"', b'"finish_reason": "'
# The first line of a read of so many bytes that is one chunk; b"\r\n", which begins none, where
# there is no such chunk.
_FIRST_LINES = [b"\r\n"] * (MAX_CHUNK_BYTES + 12)
for _size in range(1, MAX_CHUNK_BYTES):
    _line = b"%x\r\n" % _size
    _FIRST_LINES[len(_line) + _size + 2] = _line
_PLAIN = re.compile(rb'[^"\\\x00-\x1f]+')  # what means itself in a JSON string


class Outbox:
    """What the fast paths of one loop have to write: all that came in one turn goes out together.

    Writes that follow each other closely find the reader of the one before still awake, where that
    is on this machine (a proxy in front, say): waking it is a third of what a write costs.

    Always: who writes to a client without the outbox, or closes a path, flushes first.
    """

    __slots__ = ("_loop", "_waiting")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: list[tuple[FastPath, bytes]] = []

    def put(self, path: FastPath, data: bytes) -> None:
        """Write *data* to the client of *path*, at the end of this turn of the loop."""
        if not self._waiting:
            self._loop.call_soon(self.flush)
        self._waiting.append((path, data))

    def flush(self) -> None:
        """Write it now."""
        waiting, self._waiting = self._waiting, []
        for path, data in waiting:
            path.write(data)


class Client(NamedTuple):
    """To whom a path leads."""

    transport: asyncio.Transport
    outbox: Outbox
    now: Callable[[], float]  # the loop's time
    room: int  # bytes that the transport may hold
    full: Callable[[], None]  # called when it holds more
    chunked: bool  # the client gets chunks (RFC 9112, 7.1)


class FastPath:
    """The provider's bytes, unchanged.

    *last*: the loop's time when it was taken last; *read_at*: of the last read, whichever way it
    went. *_silence*: a longer one is to be noted.
    """

    __slots__ = (
        "_chunked",
        "_full",
        "_meter",
        "_now",
        "_outbox",
        "_room",
        "_silence",
        "_stream",
        "_transport",
        "cursor",
        "last",
        "open",
        "read_at",
        "shape",
    )

    def __init__(self, cursor: Cursor, client: Client, shape: Shape | None = None) -> None:
        self.open = False
        self.last = self.read_at = self._silence = 0.0
        self.cursor = cursor
        self.shape = shape
        self._stream = cursor.stream
        self._meter = cursor.stream.meter
        self._transport, self._outbox, self._now, self._room, self._full, self._chunked = client

    def take(self, read: bytes) -> bool:
        """Pass *read* on; False, with nothing done, where it has to go the long way."""
        size = len(read)
        if not self.open or size > MAX_CHUNK_BYTES:
            return False
        find = read.find  # not `in`: for bytes that costs more than twice as much
        line = _FIRST_LINES[size]
        start, end = len(line), size - 2
        if (
            not read.startswith(line)
            or not read.startswith(b"data: {", start)
            or not read.endswith(b"}\n\n\r\n")
            or find(b"\n", start) != end - 2  # one line, and so one event and no [DONE]
            or find(b"\r", start) != end
            or find(_ERROR) >= 0
            or find(_FINISH) >= 0
            or find(_FINISH_SPACED) >= 0
            or not utf8(read)
        ):
            return False
        self._outbox.put(self, read)
        self.last = now = self._now()
        if now - self.read_at > self._silence:
            self._silence = self._stream.record.silent(self.read_at, now)
        self.read_at = now
        self._stream.last += 1
        self._meter.events += 1
        return True

    def close(self) -> None:
        """Take nothing from now on."""
        self.open = False

    def write(self, data: bytes) -> None:
        """The outbox's call."""
        transport = self._transport
        if not transport.is_closing():
            transport.write(data)
            if transport.get_write_buffer_size() > self._room:
                self._full()


class TextPath(FastPath):
    """A text of the answer's shape, as an event of the log.

    Its reader has it at once; the log gets what came in a row as one entry, the mere texts, so that
    an event leaves no object behind.

    Always: `_texts` are those of the last events of the stream, and not in its entries.
    """

    __slots__ = ("_before", "_behind", "_head", "_text", "_texts")

    def __init__(
        self, cursor: Cursor, client: Client, shape: Shape, text: Callable[..., bytes]
    ) -> None:
        super().__init__(cursor, client, shape)
        self._before = shape.prefix
        self._behind = shape.suffix + b"\r\n"
        self._head = cursor.stream.head
        self._text = text
        self._texts = bytearray()  # each with its closing quote, which no plain text contains

    def take(self, read: bytes) -> bool:
        """As of `FastPath`."""
        size = len(read)
        if not self.open or size > MAX_CHUNK_BYTES:
            return False
        before, behind = self._before, self._behind
        line = _FIRST_LINES[size]
        begin, stop = len(line) + len(before), size - len(behind)
        if (
            begin >= stop
            or not read.startswith(line)
            or not read.startswith(before, len(line))
            or not read.endswith(behind)
            or _PLAIN.fullmatch(read, begin, stop) is None
        ):
            return False
        text = read[begin : stop + 1]
        if not utf8(text):
            return False
        self._texts += text
        stream = self._stream
        stream.last = number = stream.last + 1
        self._meter.events += 1
        data = self._text(self._head, number, text)
        self._outbox.put(self, b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)
        self.last = now = self._now()
        if now - self.read_at > self._silence:
            self._silence = stream.record.silent(self.read_at, now)
        self.read_at = now
        if len(self._texts) > MAX_RUN_BYTES:
            self._keep()
        return True

    def close(self) -> None:
        """As of `FastPath`; the log has all that was taken."""
        self.open = False
        if self._texts:
            self._keep()

    def _keep(self) -> None:
        texts, self._texts = bytes(self._texts), bytearray()
        stream, count = self._stream, texts.count(b'"')
        assert self.shape is not None
        self.shape.reading.note(texts.replace(b'"', b"").decode(), len(texts) - count)
        self.cursor.at += 1
        stream.append_passed(Texts(stream.last - count + 1, count, texts, monotonic()))
        stream.trim()
