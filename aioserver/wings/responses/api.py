"""OpenAI's Responses API as providers speak it: the meaning of its events, and which of them take
the fast path.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aioserver.providers.request import Api
from aioserver.wings.responses.events import PARTS, ResponseEvents, is_content
from aioserver.wings.responses.path import ResponsePath, response_messages
from aioserver.wings.responses.sinks import ResponseSink

if TYPE_CHECKING:
    from aioserver.streams.cursor import Cursor
    from aioserver.streams.fast_path import Destination, FastPath
    from aioserver.streams.formats import Format
    from aioserver.streams.stream import Stream


class ResponsesApi(Api):
    """The path of requests for responses."""

    bounds = ("max_output_tokens",)
    parts = PARTS

    def sink(self, stream: Stream) -> ResponseSink:
        """Return the sink that fills *stream* with the events of a response."""
        return ResponseSink(stream, self.content)

    def content(self, event: bytes) -> bool:
        """Return whether an event of a streamed response is content, and not only a preamble."""
        return is_content(event)

    def events(self) -> ResponseEvents:
        """Return the memory of the events of a response to come."""
        return ResponseEvents()

    def messages(self, lane: str | None) -> Format:
        """Return the format of responses on a *lane* of a WebSocket."""
        return response_messages(lane)

    def fast_path(self, cursor: Cursor, destination: Destination) -> FastPath | None:
        """Return the path by which events go from *cursor* to *destination*.

        None if there is none.
        """
        events, frame = cursor.stream.events, cursor.format.frame
        if not isinstance(events, ResponseEvents) or (frame is None and not destination.chunked):
            return None
        return ResponsePath(cursor, destination, events, frame)


RESPONSES = ResponsesApi("responses")
