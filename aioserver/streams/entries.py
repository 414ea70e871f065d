"""What a log consists of: one event, or several in a row that came together.

A log holds for minutes what went by in microseconds, so an entry keeps the fewest and the smallest
objects that its events can be made from again:

    Entry   frames, made once for all readers; or a block as the provider sent it
    TextEntry   the mere texts of a run of events that say nothing else
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import orjson

from aioserver.protocol import eventstream, messages

if TYPE_CHECKING:
    from collections.abc import Sequence

ENTRY_OVERHEAD = 200  # bytes of Python objects per entry, counted so that tiny events are bounded
PROCESSING, CHUNK = b"processing", b"chunk"
COMPLETE, ERROR, CANCELLED = b"complete", b"error", b"cancelled"


class Entry:
    """*count* events, the first of which is number *first*, all of one *status*.

    *data* are the provider's own bytes (whole events); *frames* are the events as frames' JSON.
    A log has the one or the other, after who asked for it. *at*: monotonic, when it was read,
    the last of it.
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
        """The frames of the provider's bytes, one for each event.

        They are made anew each time: kept, they would double the log.
        """
        events = [event.data for event in eventstream.parse(self.data)]
        if len(events) != self.count:
            events = [self.data]  # a whole answer, no event stream
        return [
            messages.frame(head, number, self.status, _raw_chunk(data))
            for number, data in enumerate(events, self.first)
        ]


class TextEntry(Entry):
    """`chunk` events that say a text each.

    *texts*: as between a JSON string's quotes, each with the closing one, which no text contains
    unescaped.
    """

    __slots__ = ("texts",)

    def __init__(self, first: int, count: int, texts: bytes, received_at: float = 0.0) -> None:
        super().__init__(first, count, CHUNK, b"", None, received_at)
        self.texts = texts
        self.size += len(texts)

    def make_frames(self, head: bytes) -> Sequence[bytes]:
        """The frames, made anew each time."""
        texts = self.texts.split(b'"')[:-1]
        return [
            messages.text_frame(head, number, text + b'"')
            for number, text in enumerate(texts, self.first)
        ]


def _raw_chunk(data: bytes) -> bytes:
    """A provider's event as the `chunk` of a frame, whatever it says: one event, one frame."""
    try:
        choice = orjson.loads(data)["choices"][0]
        text = (choice.get("delta") or choice["message"])["content"]
    except (orjson.JSONDecodeError, KeyError, IndexError, TypeError, AttributeError):
        text = ""
    text = text if isinstance(text, str) else ""
    return orjson.dumps({"type": "text", "data": text, "metadata": {}})
