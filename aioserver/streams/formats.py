"""How the events of a log look on the wire of each face.

RAW       the provider's own bytes (the OpenAI face)
EVENTS    text/event-stream, each with its number as `id` (the SSE face)
MESSAGES  WebSocket text messages (RFC 6455), unmasked, as from a server, and unfragmented
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from aioserver.protocol import eventstream, messages

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.streams.entries import Entry
    from aioserver.streams.stream import Stream

WS_TEXT, WS_CLOSE, WS_PING, WS_PONG = 0x81, 0x88, 0x89, 0x8A  # the last fragment, and its opcode


class Format(NamedTuple):
    """One way to write the same events.

    *render*: an entry, but for its first events, as many as the third argument says.
    *text*: one text event alone, of (the frames' head, its number, the text and its closing quote).
    """

    name: str
    render: Callable[[Stream, Entry, int], bytes]
    text: Callable[[bytes, int, bytes], bytes] | None

    def render_newest(self, stream: Stream, entry: Entry) -> bytes:
        """The newest *entry* of *stream*, rendered once for all who read it in this format."""
        if len(stream.readers) < 2:
            return self.render(stream, entry, 0)
        if stream.rendered is None or stream.rendered[0] is not entry:
            stream.rendered = entry, {}
        made = stream.rendered[1]
        if self.name not in made:
            made[self.name] = self.render(stream, entry, 0)
        return made[self.name]


def ws_frame(first: int, payload: bytes) -> bytes:
    """A WebSocket frame; *first* is its first byte."""
    size = len(payload)
    if size < 126:
        return b"%c%c%b" % (first, size, payload)
    if size < 65536:
        return b"%c\x7e%c%c%b" % (first, size >> 8, size & 0xFF, payload)
    return struct.pack("!BBQ", first, 127, size) + payload


def _raw(_stream: Stream, entry: Entry, skip: int) -> bytes:
    if not skip or not entry.data:
        return entry.data
    return b"".join(eventstream.split(entry.data)[skip:])


def _event(number: int, status: bytes, frame: bytes) -> bytes:
    return b"id: %d\nevent: %b\ndata: %b\n\n" % (number, status, frame)


def _events(stream: Stream, entry: Entry, skip: int) -> bytes:
    frames = stream.frames(entry)
    status = entry.status
    if len(frames) == 1:
        return b"" if skip else _event(entry.first, status, frames[0])
    first = entry.first + skip
    return b"".join([_event(at, status, frame) for at, frame in enumerate(frames[skip:], first)])


def _text_event(head: bytes, number: int, text: bytes) -> bytes:
    return b"id: %d\nevent: chunk\ndata: %b\n\n" % (
        number,
        messages.text_frame(head, number, text),
    )


def _messages(stream: Stream, entry: Entry, skip: int) -> bytes:
    frames = stream.frames(entry)
    if len(frames) == 1:
        return b"" if skip else ws_frame(WS_TEXT, frames[0])
    return b"".join([ws_frame(WS_TEXT, frame) for frame in frames[skip:]])


def _text_message(head: bytes, number: int, text: bytes) -> bytes:
    return ws_frame(WS_TEXT, messages.text_frame(head, number, text))


RAW = Format("raw", _raw, None)
EVENTS = Format("events", _events, _text_event)
MESSAGES = Format("messages", _messages, _text_message)
