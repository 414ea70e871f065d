r"""The fast path: one event from the provider's socket to the client's, in one call.

Most of a gateway's work is to pass an event on to the one client that waits for it, and objects
are most of the cost. When a thousand streams take turns, each object that an event touches is a
miss in the processor's caches. So an ordinary event touches few objects: the provider's
connection, this object, the log, and the client's transport.

    ConnectionProtocol.data_received → forward → (the end of this loop iteration) transport.write

*When it is open.* It is opened after a read that took the slow path, if all of the following
holds. Each condition is checked by the object that knows it (`Exchange` → the sink → `Stream` →
`Writer`):

    the provider's parser is between two chunks, and the answer goes on
    no event is half read, and one has been appended already
    the log has one reader, and that reader has written all there is
    that reader's writer follows no other stream, and the client reads fast enough

A read that takes the slow path begins by closing the fast path. Every other change of these
conditions closes it, too. The log closes it when a reader comes or goes and when it ends; the
writer closes it when it is blocked or closed, and when it follows another stream.

*What it forwards.* One read that is one whole chunk with one whole event, if the event is
ordinary:

    FastPath   for the OpenAI face: an event `{…}` without an error or a finish_reason. The chunk's
               framing is what our client gets, too: the bytes pass unchanged. The log is private
               and empty, and stays empty: the effect is that of an event discarded at once. Where
               tool calls are held, no event that may have a piece of one
    TextPath   for the faces that show frames: an event of the answer's `Shape`, which has a text
               and nothing else. It is appended to the log like any other
    TranslatedPath   for a chat completion that becomes an answer of another API: an event of that
               kind, too. The log is private and empty, and stays empty

An API may have its own fast path: the `ForwardedApi` of the answer makes it
(wings/anthropic/path.py, wings/responses/path.py).

Every other form of the same bytes, every end, error and comment takes the slow path, and has the
same effect there: the tests feed both paths with the same streams.
"""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple

from aioserver.limits.write_watchdog import reset
from aioserver.protocol.bridging.chunks import ChunkReader
from aioserver.protocol.eventstream import utf8
from aioserver.protocol.openai import PLAIN, BadEvent
from aioserver.protocol.parts import CALL_MARK, ESCAPE
from aioserver.protocol.request_headers import CALLS
from aioserver.protocol.transcript import PassedTranscript
from aioserver.streams.contracts import AnswerApi
from aioserver.streams.entries import TextEntry

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from aioserver.protocol.openai import Shape
    from aioserver.streams.cursor import Cursor
    from aioserver.streams.formats import Format
    from aioserver.streams.outbox import Outbox

# Longer reads are rare, and take the slow path.
MAX_CHUNK_BYTES = 2048
# Bytes of texts that are forwarded before they are appended to the log.
MAX_RUN_BYTES = 2048
# An event with one of these takes the slow path. A quote inside a JSON string is escaped, so they
# never match text that a model has written. `find` is faster here than a regular expression, and
# every byte that passes is searched.
ERROR_NAME, FINISH, FINISH_SPACED = b'"error"', b'"finish_reason":"', b'"finish_reason": "'
# The first line of a read that is one chunk, by the size of the read. At a size that no chunk has,
# it is b"\r\n", with which no chunk begins.
FIRST_LINES = [b"\r\n"] * (MAX_CHUNK_BYTES + 12)
for _size in range(1, MAX_CHUNK_BYTES):
    _line = b"%x\r\n" % _size
    FIRST_LINES[len(_line) + _size + 2] = _line


class Destination(NamedTuple):
    """The client's socket, as a fast path needs it.

    *clock* is the loop's time. *on_full* is called when the transport buffers more than
    *max_buffered* bytes. *chunked*: the client gets chunks (RFC 9112, 7.1).
    """

    transport: asyncio.Transport
    outbox: Outbox
    clock: Callable[[], float]
    max_buffered: int
    on_full: Callable[[], None]
    chunked: bool


class FastPath:
    """Forwards the provider's bytes unchanged.

    *forwarded_at* is the loop's time of the last read that it forwarded; *read_at* is when the
    provider last sent anything, by either path. *_silence* is the longest silence noted so far, in
    seconds: only a longer one is noted.
    """

    __slots__ = (
        "_calls_wait",
        "_chunked",
        "_clock",
        "_kept",
        "_max_buffered",
        "_meter",
        "_on_full",
        "_outbox",
        "_silence",
        "_stream",
        "_transport",
        "cursor",
        "forwarded_at",
        "open",
        "read_at",
        "shape",
    )

    def __init__(
        self, cursor: Cursor, destination: Destination, shape: Shape | None = None
    ) -> None:
        self.open = False
        self.forwarded_at = self.read_at = self._silence = 0.0
        self.cursor = cursor
        self.shape = shape
        self._stream = cursor.stream
        transcript = cursor.stream.transcript
        # The transcript of what was forwarded, if it is needed: see protocol/transcript.py.
        self._kept: PassedTranscript | None = None
        if isinstance(transcript, PassedTranscript) and transcript.keeps:
            self._kept = transcript
        self._meter = cursor.stream.meter
        self._calls_wait = cursor.stream.outcome.hold == CALLS
        (
            self._transport,
            self._outbox,
            self._clock,
            self._max_buffered,
            self._on_full,
            self._chunked,
        ) = destination

    def forward(self, read: bytes) -> bool:
        """Forward *read*; return False, with nothing done, if it must take the slow path."""
        size = len(read)
        if not self.open or size > MAX_CHUNK_BYTES:
            return False
        # Not `in`: for bytes that costs more than twice as much.
        find = read.find
        line = FIRST_LINES[size]
        start, end = len(line), size - 2
        if (
            not read.startswith(line)
            or not read.startswith(b"data: {", start)
            or not read.endswith(b"}\n\n\r\n")
            # One line, and so one event, which is not [DONE].
            or find(b"\n", start) != end - 2
            or find(b"\r", start) != end
            or find(ERROR_NAME) >= 0
            or find(FINISH) >= 0
            or find(FINISH_SPACED) >= 0
            or (
                self._calls_wait
                # Not ESCAPE alone: most texts have no backslash, and one byte is found faster.
                and (find(CALL_MARK) >= 0 or (find(b"\\") >= 0 and find(ESCAPE) >= 0))
            )
            or not (read.isascii() or utf8(read))
        ):
            return False
        self._outbox.put(self, read)
        if (kept := self._kept) is not None:
            blocks = kept.blocks
            blocks += read[start:end]
            if len(blocks) > kept.mark and kept.grown():
                self._stream.recount()
        self.forwarded_at = now = self._clock()
        if now - self.read_at > self._silence:
            self._silence = self._stream.record.silent(self.read_at, now)
        self.read_at = now
        self._stream.last += 1
        self._meter.events += 1
        return True

    def close(self) -> None:
        """Stop forwarding."""
        self.open = False

    def write(self, data: bytes) -> None:
        """Write *data* to the client, unless its transport is closing: called by the outbox."""
        transport = self._transport
        if not transport.is_closing():
            transport.write(data)
            if transport.get_write_buffer_size() > self._max_buffered:
                self._on_full()

    def abort(self) -> None:
        """Reset the client's connection: called by the outbox, if `write` has failed."""
        reset(self._transport)


class TextPath(FastPath):
    """Forwards events of the answer's shape, which have a text and nothing else.

    The reader gets each event at once. The log gets a run of consecutive events as one entry,
    which has only their texts, so that an event leaves no object behind.

    *render_text* renders an event, as that of a `Format`; b"" if it must take the slow path.

    Always: `_texts` has the texts of the stream's last events, which are not in its entries yet.
    """

    __slots__ = ("_head", "_prefix", "_render_text", "_suffix", "_texts")

    def __init__(
        self,
        cursor: Cursor,
        destination: Destination,
        shape: Shape,
        render_text: Callable[[bytes, int, bytes], bytes],
    ) -> None:
        super().__init__(cursor, destination, shape)
        self._prefix = shape.prefix
        self._suffix = shape.suffix + b"\r\n"
        self._head = cursor.stream.head
        self._render_text = render_text
        # Each text with its closing quote, which no plain text contains.
        self._texts = bytearray()

    def forward(self, read: bytes) -> bool:
        """Forward *read*, as `FastPath.forward` does."""
        size = len(read)
        if not self.open or size > MAX_CHUNK_BYTES:
            return False
        prefix, suffix = self._prefix, self._suffix
        line = FIRST_LINES[size]
        begin, stop = len(line) + len(prefix), size - len(suffix)
        if (
            begin >= stop
            or not read.startswith(line)
            or not read.startswith(prefix, len(line))
            or not read.endswith(suffix)
            or PLAIN.fullmatch(read, begin, stop) is None
        ):
            return False
        text = read[begin : stop + 1]
        if not utf8(text):
            return False
        stream = self._stream
        number = stream.last + 1
        data = self._render_text(self._head, number, text)
        if not data:
            return False
        self._texts += text
        stream.last = number
        self._meter.events += 1
        self._outbox.put(self, b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)
        self.forwarded_at = now = self._clock()
        if now - self.read_at > self._silence:
            self._silence = stream.record.silent(self.read_at, now)
        self.read_at = now
        if len(self._texts) > MAX_RUN_BYTES:
            self._append_texts()
        return True

    def close(self) -> None:
        """Stop forwarding, and append to the log the texts that it does not have yet."""
        self.open = False
        if self._texts:
            self._append_texts()

    def _append_texts(self) -> None:
        texts, self._texts = bytes(self._texts), bytearray()
        stream, count = self._stream, texts.count(b'"')
        assert self.shape is not None
        self.shape.reading.note(texts.replace(b'"', b""), count)
        # The reading keeps the texts as well, for the conversation.
        stream.text_bytes = self.shape.reading.size
        stream.recount()
        self.cursor.next_index += 1
        stream.append_forwarded(TextEntry(stream.last - count + 1, count, texts, monotonic()))
        stream.trim()


class TranslatedPath(TextPath):
    """Forwards events of the answer's shape, each as *writer* translates it. The log keeps none.

    Always: `_texts` has the texts of the stream's last events, of which neither the size nor the
    sequence numbers are noted yet.
    """

    __slots__ = ("_writer",)

    def __init__(
        self, cursor: Cursor, destination: Destination, shape: Shape, writer: ChunkReader[Any]
    ) -> None:
        super().__init__(cursor, destination, shape, _translated(writer, cursor.format))
        self._writer = writer

    def _append_texts(self) -> None:
        count, self._texts = self._texts.count(b'"'), bytearray()
        stream, writer = self._stream, self._writer
        stream.events.note_run(stream.last - count + 1, writer.sequence - count, count)
        stream.text_bytes = writer.size
        stream.recount()


def _translated(writer: ChunkReader[Any], form: Format) -> Callable[[bytes, int, bytes], bytes]:
    """Return what renders a text as *writer* translates it, in *form*."""
    # A method would be in a reference cycle with its path.
    render = form.render_bytes

    def render_text(_head: bytes, _number: int, text: bytes) -> bytes:
        try:
            return render(writer.add_text(text[:-1]))
        except BadEvent:
            # The slow path raises it again.
            return b""

    return render_text


class ForwardedApi(AnswerApi):
    """An API, as fast paths see it: chat completions, and every API that is answered like them."""

    def fast_path(self, cursor: Cursor, destination: Destination) -> FastPath | None:
        """Return the path by which the provider's bytes go from *cursor* to *destination*.

        None if there is none.
        """
        return FastPath(cursor, destination) if destination.chunked else None


def new_path(cursor: Cursor, destination: Destination, shape: Shape | None) -> FastPath | None:
    """Return a path for *cursor*: for texts if there is a *shape*.

    None if its format, or its API, has none.
    """
    if shape is not None:
        if isinstance(shape.reading, ChunkReader):
            return TranslatedPath(cursor, destination, shape, shape.reading)
        render_text = cursor.format.render_text
        return None if render_text is None else TextPath(cursor, destination, shape, render_text)
    api = cursor.stream.api
    return api.fast_path(cursor, destination) if isinstance(api, ForwardedApi) else None
