"""How the events of a response go to the client: by a fast path of their own, and on a WebSocket
as one frame each.
"""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING

from aioserver.errors import StreamNotFound
from aioserver.protocol import eventstream
from aioserver.protocol.eventstream import utf8
from aioserver.protocol.parts import escaped
from aioserver.streams.entries import CANCELLED, ERROR
from aioserver.streams.fast_path import ERROR_NAME, FIRST_LINES, MAX_CHUNK_BYTES, FastPath
from aioserver.streams.formats import WS_TEXT, Format, framed, ws_frame
from aioserver.wings.responses import frames

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.errors import AioserverError
    from aioserver.streams.contracts import Queued
    from aioserver.streams.cursor import Cursor
    from aioserver.streams.entries import Entry
    from aioserver.streams.fast_path import Destination
    from aioserver.streams.stream import Stream
    from aioserver.wings.responses.events import ResponseEvents

# The first bytes of a response object, and of the type of each event.
_RESPONSE = b'"response'
# The first bytes of an event that only adds to a text, and changes no remembered state.
_DELTA = re.compile(rb"event: (response\.[a-z_.]{1,64}\.delta)\ndata: \{")


class ResponsePath(FastPath):
    """Forwards events that add to a text and have the next sequence number, either unchanged or
    with their data as one frame.

    An event qualifies if its type ends with `.delta` and it has no response object. *frame* writes
    an event's data for the client; None: the client gets the provider's bytes.
    """

    __slots__ = ("_events", "_frame", "_opening", "_type")

    def __init__(
        self,
        cursor: Cursor,
        destination: Destination,
        events: ResponseEvents,
        frame: Callable[[bytes], bytes] | None,
    ) -> None:
        super().__init__(cursor, destination)
        self._events = events
        self._frame = frame
        # The first bytes of the present kind of event, up to the brace of its data, and its type.
        # At first no event matches.
        self._opening, self._type = b"\n", b""

    def forward(self, read: bytes) -> bool:
        """Forward *read*, as `FastPath.forward` does."""
        size = len(read)
        if not self.open or size > MAX_CHUNK_BYTES:
            return False
        find = read.find
        line, opening = FIRST_LINES[size], self._opening
        start, end = len(line), size - 2
        if not read.startswith(opening, start):
            match = _DELTA.match(read, start)
            if match is None:
                return False
            self._opening, self._type = opening, _ = match[0], b'"%b"' % match[1]
        begin = start + len(opening) - 1
        if (
            not read.startswith(line)
            or not read.endswith(b"}\n\n\r\n")
            # The data has two lines, so it is one event.
            or find(b"\n", begin) != end - 2
            or find(b"\r", begin) != end
            or find(ERROR_NAME, begin) >= 0
            # Most texts have no backslash.
            or (find(b"\\", begin) >= 0 and escaped(read))
            or not (read.isascii() or utf8(read))
        ):
            return False
        # The event has that type, as it must, and changes no remembered state.
        kind, found = self._type, find(_RESPONSE, begin)
        if (
            found < 0
            or not read.startswith(kind, found)
            or find(_RESPONSE, found + len(kind)) >= 0
        ):
            return False
        stream = self._stream
        if not self._events.follows(read, stream.last + 1):
            return False
        self._outbox.put(self, read if self._frame is None else self._frame(read[begin : end - 2]))
        self.forwarded_at = now = self._clock()
        if now - self.read_at > self._silence:
            self._silence = stream.record.silent(self.read_at, now)
        self.read_at = now
        stream.last += 1
        self._meter.events += 1
        return True


def response_messages(lane: str | None) -> Format:
    """Return the format of the *lane* of a WebSocket of the Responses API.

    None: the lane without a name.
    """

    def named(data: bytes) -> bytes:
        return ws_frame(WS_TEXT, frames.in_lane(data, lane or ""))

    frame = partial(ws_frame, WS_TEXT) if lane is None else named

    def render(stream: Stream, entry: Entry, skip: int) -> bytes:
        if not entry.data or skip >= entry.count:
            return b""
        # The response ended without an event of its own: at most `processing` came before.
        if entry.first <= 2 and entry.status in {ERROR, CANCELLED}:
            error = stream.error or StreamNotFound("this answer was cancelled")
            return ws_frame(WS_TEXT, frames.error(error, lane))
        return framed(frame, entry.data, skip)

    def render_error(stream: Stream, error: AioserverError, seen: int) -> bytes:
        (event,) = eventstream.parse(stream.events.render(error, seen))
        return frame(event.data)

    def render_position(_stream: Stream, queued: Queued) -> bytes:
        return ws_frame(WS_TEXT, frames.queued(lane, *queued))

    name = "responses" if lane is None else f"responses {lane}"
    return Format(name, render, None, render_error, frame, render_position)


RESPONSES = response_messages(None)
