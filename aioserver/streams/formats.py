"""The formats in which faces write the events of a log.

RAW       the provider's own bytes (the OpenAI face)
EVENTS    text/event-stream (WHATWG HTML 9.2), each event with its number as `id` (the SSE face)
MESSAGES  WebSocket text messages (RFC 6455), unfragmented and, as from a server, unmasked
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from aioserver.protocol import eventstream
from aioserver.protocol import frames as protocol_frames

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.errors import AioserverError
    from aioserver.streams.contracts import Queued
    from aioserver.streams.entries import Entry
    from aioserver.streams.stream import Stream

# The first byte of a frame: the mark of the last fragment (FIN), and the opcode.
WS_TEXT, WS_CLOSE, WS_PING, WS_PONG = 0x81, 0x88, 0x89, 0x8A

# The milliseconds that an EventSource waits before it reconnects. The line stands in the block of
# an event: alone in a block it would be an empty event to some clients (httpx-sse,
# fetch-event-source).
RETRY = b"retry: 2000\n"


class Format(NamedTuple):
    """One way to write the events of a log; *name* identifies it.

    *render* takes a stream, one of its entries, and the number of events to skip at its start.
    *render_text* renders one event that has only a text, from the head of the stream's frames, the
    event's number, and the text as JSON with its closing quote. It is None for a format that needs
    the provider's bytes. *render_error* renders an error that ends the reading after the event of
    a number, or a later one, though not the stream. *frame* writes the data of one of the
    provider's events, in formats that do so. *render_position* renders the position of a waiting
    request; None: it is not shown.
    """

    name: str
    render: Callable[[Stream, Entry, int], bytes]
    render_text: Callable[[bytes, int, bytes], bytes] | None
    render_error: Callable[[Stream, AioserverError, int], bytes]
    frame: Callable[[bytes], bytes] | None = None
    render_position: Callable[[Stream, Queued], bytes] | None = None

    def render_bytes(self, data: bytes, skip: int = 0) -> bytes:
        """Render *data*, the provider's own bytes of whole events, in a format that needs nothing
        else.

        The first *skip* events are left out.
        """
        if self.frame is None:
            return b"".join(eventstream.split(data)[skip:]) if skip else data
        return framed(self.frame, data, skip)

    def render_newest(self, stream: Stream, entry: Entry) -> bytes:
        """Render the newest *entry* of *stream*: once for all its readers in this format."""
        if len(stream.readers) < 2:
            return self.render(stream, entry, 0)
        if stream.rendered is None or stream.rendered[0] is not entry:
            stream.rendered = entry, {}
        by_format = stream.rendered[1]
        if self.name not in by_format:
            by_format[self.name] = self.render(stream, entry, 0)
        return by_format[self.name]


def framed(frame: Callable[[bytes], bytes], data: bytes, skip: int) -> bytes:
    """Return the events in *data* except the first *skip*, each as *frame* writes it."""
    events = [event.data for event in eventstream.parse(data)]
    # A [DONE] is not an event of the Responses API; some providers send one nevertheless.
    return b"".join([frame(data) for data in events[skip:] if data and data != b"[DONE]"])


def ws_frame(first_byte: int, payload: bytes) -> bytes:
    """Return a WebSocket frame (RFC 6455, 5.2), unmasked; *first_byte*: `WS_TEXT` or the like."""
    size = len(payload)
    if size < 126:
        return b"%c%c%b" % (first_byte, size, payload)
    if size < 65536:
        return b"%c\x7e%c%c%b" % (first_byte, size >> 8, size & 0xFF, payload)
    return struct.pack("!BBQ", first_byte, 127, size) + payload


def ws_payload(frame: bytes) -> bytes:
    """Return the payload of *frame*, as `ws_frame` makes it; b"" of no frame."""
    return frame[{126: 4, 127: 10}.get(frame[1], 2) :] if frame else b""


def _raw(_stream: Stream, entry: Entry, skip: int) -> bytes:
    return RAW.render_bytes(entry.data, skip) if skip else entry.data


def _raw_error(stream: Stream, error: AioserverError, seen: int) -> bytes:
    return stream.events.render(error, seen)


def _event(number: int, status: bytes, frame: bytes) -> bytes:
    return b"id: %d\nevent: %b\ndata: %b\n\n" % (number, status, frame)


def _events(stream: Stream, entry: Entry, skip: int) -> bytes:
    if not entry.count:
        # The entry is a comment.
        return entry.data
    frames = stream.frames(entry)
    status = entry.status
    if len(frames) == 1:
        if skip:
            return b""
        event = _event(entry.first, status, frames[0])
        return RETRY + event if entry.first == 1 else event
    numbered = enumerate(frames[skip:], entry.first + skip)
    return b"".join([_event(number, status, frame) for number, frame in numbered])


def _text_event(head: bytes, number: int, text: bytes) -> bytes:
    return b"id: %d\nevent: chunk\ndata: %b\n\n" % (
        number,
        protocol_frames.text_frame(head, number, text),
    )


def _error_event(stream: Stream, error: AioserverError, _seen: int) -> bytes:
    # Without an id, so that a client that comes back continues after the last event that it has.
    frame = protocol_frames.loose_frame(stream.request_id, "error", error.as_chunk())
    return eventstream.write(frame, event="error")


def _position_event(stream: Stream, queued: Queued) -> bytes:
    frame = protocol_frames.loose_frame(stream.request_id, "queued", queued.chunk)
    return eventstream.write(frame, event="queued")


def _messages(stream: Stream, entry: Entry, skip: int) -> bytes:
    frames = stream.frames(entry)
    if len(frames) == 1:
        return b"" if skip else ws_frame(WS_TEXT, frames[0])
    return b"".join([ws_frame(WS_TEXT, frame) for frame in frames[skip:]])


def _text_message(head: bytes, number: int, text: bytes) -> bytes:
    return ws_frame(WS_TEXT, protocol_frames.text_frame(head, number, text))


def _error_message(stream: Stream, error: AioserverError, _seen: int) -> bytes:
    return ws_frame(
        WS_TEXT, protocol_frames.loose_frame(stream.request_id, "error", error.as_chunk())
    )


def _position_message(stream: Stream, queued: Queued) -> bytes:
    return ws_frame(
        WS_TEXT, protocol_frames.loose_frame(stream.request_id, "queued", queued.chunk)
    )


RAW = Format("raw", _raw, None, _raw_error)
EVENTS = Format("events", _events, _text_event, _error_event, None, _position_event)
MESSAGES = Format("messages", _messages, _text_message, _error_message, None, _position_message)
