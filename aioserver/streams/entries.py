"""The entries of a log: each is one event, or several consecutive events that arrived together.

A log may be kept for minutes, with all of its events. An entry therefore holds the fewest and
smallest objects from which its events can be made again:

    Entry       frames, made once for all readers; or a block of bytes as the provider sent it
    TextEntry   only the texts of consecutive events that contain nothing else
    WholeEntry  a part of an answer that was not streamed, by its place in the answer
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import orjson

from aioserver.errors import ResumeGap
from aioserver.protocol import eventstream
from aioserver.protocol import frames as protocol_frames
from aioserver.protocol.sound import sound
from aioserver.protocol.steps import at_once

if TYPE_CHECKING:
    from collections.abc import Sequence

# Bytes of Python objects per entry. They are counted so that a log of tiny events is bounded, too.
ENTRY_OVERHEAD = 200
# The piece of a whole answer that has no text.
NO_TEXT = slice(0)
# The statuses of events: the first two while an answer runs, the others at its end.
PROCESSING, CHUNK = b"processing", b"chunk"
COMPLETE, ERROR, CANCELLED = b"complete", b"error", b"cancelled"


class Entry:
    """Consecutive events of one *status*: *count* of them, from event number *first* on.

    *data* is the provider's own bytes, whole events; *frames* are the events as the JSON of
    frames. The face that asked for the log decides which of the two it has; the last entry of a
    log may have both. *received_at* is the monotonic time at which its last event was read. *size*
    is in bytes and includes the overhead.
    """

    __slots__ = ("count", "data", "first", "frames", "received_at", "size", "status")

    def __init__(
        self,
        first: int,
        count: int,
        status: bytes,
        data: bytes,
        frames: Sequence[bytes] | None,
        received_at: float = 0.0,
    ) -> None:
        self.received_at = received_at
        self.first = first
        self.count = count
        self.status = status
        self.data = data
        self.frames = frames
        self.size = ENTRY_OVERHEAD + len(data) + (sum(map(len, frames)) if frames else 0)

    def make_frames(self, head: bytes) -> Sequence[bytes]:
        """Return the frames of the provider's bytes, one for each event; each begins with *head*.

        The frames are made anew each time: if they were kept, they would double the log.
        """
        events = [event.data for event in eventstream.parse(self.data)]
        return [
            protocol_frames.frame(head, number, self.status, _chunk_of(data))
            for number, data in enumerate(events, self.first)
        ]


class WholeEntry(Entry):
    """One event with a *piece* of the text of an answer that was not streamed: its place in
    *body*.

    The body is counted where it is kept, and the log never discards it for its size. Nothing is
    parsed, neither here nor for a reader: the piece is the inside of a JSON string, and is passed
    on as it is written.
    """

    __slots__ = ("_body", "_piece")

    def __init__(self, first: int, body: bytes, piece: slice, received_at: float) -> None:
        # The body, as the provider sent it, is there once.
        data = body if first == 1 else b""
        super().__init__(first, 1, CHUNK, data, None, received_at)
        self.size = ENTRY_OVERHEAD
        self._body = body
        self._piece = piece

    def make_frames(self, head: bytes) -> Sequence[bytes]:
        """Return the frame of the piece, made anew each time."""
        text = at_once(sound(self._body[self._piece]))
        return [protocol_frames.text_frame(head, self.first, text + b'"')]


class TextEntry(Entry):
    """`chunk` events that contain one text each.

    *texts* holds the texts in a row, each as written in a JSON string and followed by the closing
    quote, which no text contains unescaped.
    """

    __slots__ = ("texts",)

    def __init__(self, first: int, count: int, texts: bytes, received_at: float = 0.0) -> None:
        super().__init__(first, count, CHUNK, b"", None, received_at)
        self.texts = texts
        self.size += len(texts)

    def make_frames(self, head: bytes) -> Sequence[bytes]:
        """Return the frames of the texts, made anew each time."""
        texts = self.texts.split(b'"')[:-1]
        return [
            protocol_frames.text_frame(head, number, text + b'"')
            for number, text in enumerate(texts, self.first)
        ]


def find_event(entries: Sequence[Entry], number: int) -> int:
    """Return the index of the first entry that ends with event *number* or later."""
    low, high = 0, len(entries)
    while low < high:
        middle = (low + high) // 2
        entry = entries[middle]
        if entry.first + entry.count <= number:
            low = middle + 1
        else:
            high = middle
    return low


def locate(entries: Sequence[Entry], last: int, after: int) -> tuple[int, int]:
    """Return where a reader continues after event *after*: an index in *entries*, and the number
    of events to skip there.

    *last* is the newest event, kept or not.

    Raises:
        ResumeGap: events after *after* are no longer kept, or *after* does not exist yet.
    """
    if after > last:
        raise ResumeGap(f"event {after} does not exist yet; the newest is {last}")
    oldest = entries[0].first if entries else last + 1
    if after + 1 < oldest:
        raise ResumeGap(f"events after {after} are no longer kept; the oldest is {oldest}")
    if after + 1 == oldest:
        return 0, 0
    index = find_event(entries, after + 1)
    return index, after - entries[index].first + 1 if index < len(entries) else 0


def frames_of(head: bytes, first: int, status: bytes, chunks: Sequence[bytes]) -> list[bytes]:
    """Return the frames of events with these *chunks*, of which *first* is the first one's
    number.
    """
    return [
        protocol_frames.frame(head, number, status, chunk)
        for number, chunk in enumerate(chunks, first)
    ]


def processing(provider: str, model: str, conversation_id: str | None) -> bytes:
    """Return the `chunk` of event 1."""
    metadata: dict[str, object] = {"processing": True, "provider": provider, "model": model}
    if conversation_id is not None:
        metadata["conversation_id"] = conversation_id
    return orjson.dumps({"metadata": metadata})


def _chunk_of(data: bytes) -> bytes:
    """Return a provider's event as the `chunk` of a frame.

    Any event becomes one frame; its text is empty if the event has none.
    """
    try:
        choice = orjson.loads(data)["choices"][0]
        text = (choice.get("delta") or choice["message"])["content"]
    except (orjson.JSONDecodeError, KeyError, IndexError, TypeError, AttributeError):
        text = ""
    text = text if isinstance(text, str) else ""
    return orjson.dumps({"type": "text", "data": text, "metadata": {}})
