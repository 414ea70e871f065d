r"""text/event-stream (WHATWG HTML 9.2), parsed and written; no I/O.

`Splitter` cuts a stream of bytes into blocks of whole events. It looks for blank lines only and
changes nothing, so that a block can be passed on as it is. `parse` returns the events of a block,
for code that needs their contents. The result does not depend on how the bytes were cut into
reads.

A blank line is two line ends in a row; a line end is LF, CRLF or CR. Almost every provider sends
LF alone, so both functions look for b"\n\n" first, and treat every kind of line end only once a CR
has been seen.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# The bound of an event, and so of a line, unless a Splitter is made with another.
MAX_EVENT_BYTES = 1 << 20
BOM = b"\xef\xbb\xbf"
# The beginnings of a chunk that a Splitter takes for a block if it ends like one. There are three:
# at first, when there may be a byte order mark; then, with anything; and when it must be searched.
_FIRST: tuple[bytes, ...] = (b"data:",)
_ANY: tuple[bytes, ...] = (b"",)
_NONE: tuple[bytes, ...] = ()

# A CR at the end of a read counts as a line end: an LF that follows then ends one more empty line.
_EOL = re.compile(rb"\r\n|\n|\r(?!\n)")
_BLANK = re.compile(rb"(?:\r\n|\n|\r(?!\n)){2,}")


class EventTooLong(ValueError):
    """An event exceeds the bound of its Splitter."""


# Not a frozen dataclass: making one takes three times as long.
class ServerEvent(NamedTuple):
    """A dispatched event.

    *data* has its lines joined by LF; *id* is None if the field was absent.
    """

    data: bytes
    event: bytes = b""
    id: bytes | None = None


class Splitter:
    """Bytes in, blocks of whole events out, byte for byte.

    Always: the bytes fed are the bytes returned and the bytes pending, except a byte order mark at
    the start; a block ends with a blank line.
    """

    __slots__ = ("_cr", "_max", "_rest", "_started", "_whole")

    # A subclass may keep whole events back: these bytes, and how many of the events have content
    # (dropped ones count as well).
    held: bytes | bytearray = b""
    unseen = 0

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        # A bytearray is extended in place: an event of megabytes comes in hundreds of reads.
        self._rest = bytearray()
        # Whether a block was searched for in bytes with a CR.
        self._cr = False
        self._started = False
        self._whole = _FIRST
        self._max = max_event_bytes

    @property
    def pending(self) -> bytes:
        """The bytes of an event that is not complete yet."""
        return bytes(self._rest)

    @property
    def begun(self) -> bool:
        """Whether any byte has come."""
        return self._started or bool(self._rest)

    @property
    def idle(self) -> bool:
        """Whether nothing is pending, and no block was searched for in bytes with a CR.

        False before the first byte.
        """
        return self._whole is _ANY

    def feed(self, chunk: bytes) -> bytes:
        """Return the events that *chunk* completes as one block, or b"" if it completes none.

        Raises:
            EventTooLong: an event, complete or not, exceeds *max_event_bytes*.
        """
        # Most reads are whole events, and are returned as they are.
        if chunk.startswith(self._whole) and chunk.endswith(b"\n\n") and len(chunk) <= self._max:
            if not self._started:
                self._started, self._whole = True, _ANY
            return chunk
        block = self._cut(chunk)
        if self._started:
            self._whole = _NONE if self._rest or self._cr else _ANY
        return block

    def finish(self) -> bytes:
        """Return the whole events that are kept back and may be shown now that no more come."""
        return b""

    def _cut(self, chunk: bytes) -> bytes:
        """Return the result of `feed`, by the blank lines in *chunk*."""
        # The rest ends with one line end at most, so no blank line begins before its last two
        # bytes.
        start = max(0, len(self._rest) - 2)
        data: bytes | bytearray = chunk
        if self._rest:
            self._rest += chunk
            data = self._rest
        if not self._started and data:
            if data[:3] != BOM[: len(data)]:
                self._started = True
            elif len(data) >= 3:
                # A byte order mark belongs to the stream, not to its first event.
                data = data[3:]
                self._started = True
        if not self._cr and b"\r" in chunk:
            self._cr = True
        if len(data) > self._max and _longest(data) > self._max:
            self._whole = _NONE
            raise EventTooLong(f"an event of more than {self._max} bytes")
        end = _last_blank(data, start) if self._cr else data.rfind(b"\n\n", start) + 2
        if end <= 1:
            if data is not self._rest:
                self._rest = bytearray(data)
            return b""
        block = bytes(data) if end == len(data) else bytes(data[:end])
        self._rest = bytearray(data[end:])
        return block


def _last_blank(data: bytes | bytearray, start: int) -> int:
    """Return the offset after the last blank line from *start* on, or 0 if there is none."""
    end = 0
    for match in _BLANK.finditer(data, start):
        end = match.end()
    return end


def _longest(data: bytes | bytearray) -> int:
    """Return the size of the longest event, complete or not, without the line ends around it."""
    return max(len(part.strip(b"\r\n")) for part in _BLANK.split(data))


def split(block: bytes) -> list[bytes]:
    """Return the events of a block as bytes, each with LF line ends and its blank line.

    A part without a `data` line, such as a comment, is not an event (WHATWG HTML 9.2.6) and is
    dropped.
    """
    block = with_lf(block)
    return [
        part.lstrip(b"\n") + b"\n\n"
        for part in block.split(b"\n\n")
        if part.startswith(b"data:")
        or (part.startswith(b"event:") and part.find(b"\ndata:") > 0)
        or _event(part) is not None
    ]


def pieces(block: bytes) -> list[bytes]:
    """Return the events of a block, and the parts that are not events, as they came: joined they
    are *block*.
    """
    ends = [match.end() for match in _BLANK.finditer(block)]
    if not ends or ends[-1] < len(block):
        ends.append(len(block))
    return [block[start:end] for start, end in pairwise((0, *ends))]


def count(block: bytes) -> int:
    """Return `len(split(block))`, without making the list."""
    if (
        block.startswith(b"data:")
        and block.find(b"\n\n") == len(block) - 2
        and block.find(b"\r") < 0
    ):
        # Usually a read brings one event.
        return 1
    blanks = block.count(b"\n\n")
    if (
        block.startswith(b"data:")
        and block.count(b"\n\ndata:") + 1 == blanks
        and b"\r" not in block
    ):
        return blanks
    return count_named(block) or len(split(block))


def count_named(block: bytes) -> int:
    """Return how many events *block* has, if each is two lines: its name, and an object as its
    data; 0 otherwise.

    Most blocks of an API that names its events are like that; many events are looked at together.
    """
    if not block.startswith(b"event: ") or not block.endswith(b"}\n\n") or block.find(b"\r") >= 0:
        return 0
    parts = block[:-3].split(b"}\n\nevent: ")
    for part in parts:
        if part.count(b"\n") != 1 or part.find(b"\ndata: {") < 0:
            return 0
    return len(parts)


# The marks of every event with data.
EVERY = (b"data",)


def having(block: bytes, marks: Sequence[bytes]) -> Iterator[slice]:
    """Yield the places of the events in *block*, which has LF line ends, that have one of *marks*."""
    end, size = 0, len(block)
    # Where each mark is next.
    places = [-1] * len(marks)
    while True:
        for number, mark in enumerate(marks):
            if places[number] < end:
                at = block.find(mark, end)
                places[number] = size if at < 0 else at
        if (at := min(places)) == size:
            return
        # -1 + 2: there is no blank line in front.
        start = block.rfind(b"\n\n", end, at) + 2
        start = start if start > 1 else end
        end = block.find(b"\n\n", at) + 2
        end = end if end > 1 else size
        yield slice(start, end)


def with_lf(block: bytes) -> bytes:
    """Return *block* with LF line ends."""
    return block if block.find(b"\r") < 0 else _EOL.sub(b"\n", block)


def parse(block: bytes) -> list[ServerEvent]:
    """Return the events of a block, parsed."""
    events = []
    for part in with_lf(block).split(b"\n\n"):
        if part.startswith(b"data: ") and b"\n" not in part:
            events.append(ServerEvent(part[6:]))
        elif (
            part.startswith(b"event: ")
            and (end := part.find(b"\ndata: ")) > 0
            and part.count(b"\n") == 1
        ):
            # The form of the Responses API and of Anthropic's: a name and a line of data.
            events.append(ServerEvent(part[end + 7 :], part[7:end]))
        elif part and (event := _event(part)) is not None:
            events.append(event)
    return events


def each(block: bytes, *, backwards: bool = False) -> Iterator[ServerEvent]:
    """Yield the events of `parse`, or in reverse order with *backwards*, for callers that need few
    of many events.
    """
    if b"\r" in block:
        events = parse(block)
        yield from reversed(events) if backwards else events
    elif backwards:
        end = len(block)
        while end > 0:
            start = block.rfind(b"\n\n", 0, max(0, end - 2)) + 2
            # -1 + 2: there is no blank line in front.
            start = start if start > 1 else 0
            yield from reversed(parse(block[start:end]))
            end = start
    else:
        start = 0
        while start < len(block):
            end = block.find(b"\n\n", start) + 2
            end = end if end > 1 else len(block)
            yield from parse(block[start:end])
            start = end


def utf8(data: bytes) -> bool:
    """Return whether *data* is valid UTF-8, as an event stream must be."""
    # For ASCII this costs a tenth of decoding.
    if data.isascii():
        return True
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _event(part: bytes) -> ServerEvent | None:
    """Parse the lines of one event; None if there is no `data` line."""
    data: list[bytes] = []
    name, id_ = b"", None
    for line in part.split(b"\n"):
        field, colon, value = line.partition(b":")
        if colon and value.startswith(b" "):
            value = value[1:]
        if field == b"data":
            data.append(value)
        elif field == b"event":
            name = value
        elif field == b"id" and b"\0" not in value:
            id_ = value
    return ServerEvent(b"\n".join(data), name, id_) if data else None


def write(data: bytes, *, event: str = "") -> bytes:
    """Return one event. *data* must be a single line, as our JSON is."""
    head = b"event: %b\n" % event.encode() if event else b""
    return b"%bdata: %b\n\n" % (head, data)


HEARTBEAT = b": keep-alive\n\n"
