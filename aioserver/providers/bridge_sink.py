"""The sink of a chat completion that becomes a response: the provider's chunks become its events in the log.

The log has the bytes that a provider with responses of its own would have sent, so that everything behind it, the faces, the
resume by `starting_after`, the memory of the last response object, works as for those. An answer ends as sinks.py says
of chat completions, and the response with it: well with `response.completed` or `response.incomplete`, or with the
`response.failed` that a fault has on every face of this API.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from aioserver.protocol.openai import BadEvent
from aioserver.protocol.responses import ResponseEvents
from aioserver.providers.error_mapping import event_fault
from aioserver.providers.response_sink import remember
from aioserver.providers.sinks import ReadingSink, complete

if TYPE_CHECKING:
    from aioserver.protocol.bridge.events import ResponseWriter
    from aioserver.streams.stream import Stream


class BridgeSink(ReadingSink):
    """Reads the provider's chunks, and appends the events of a response to a log.

    No event of the provider is one of the log, so there is no fast path.
    """

    def __init__(self, stream: Stream, writer: ResponseWriter) -> None:
        super().__init__(stream, writer)
        self._writer = writer

    def _take(self, block: bytes) -> bool:
        writer = self._writer
        if self._shape is not None and writer.plain:
            text = self._shape.text_in(block)
            if text is not None:
                self._append_text(writer.add_text(text))
                return True
        return super()._take(block)

    def _begin(self, data: bytes) -> list[bytes]:
        events = [*self._writer.begin(data), *super()._begin(data)]
        self._stream.add_alias(self._writer.response_id)
        return events

    def _may_be_text(self, part: bytes) -> bool:  # noqa: ARG002 - the writer knows better
        return self._writer.plain

    def _complete(self) -> None:
        """Append the events that end the response, and end the log.

        Raises:
            ProviderBadResponse: the answer is not complete.
        """
        stream, writer = self._stream, self._writer
        try:
            # A `[DONE]` may be all that has come.
            events = [] if stream.answered else self._begin(b"{}")
            events += writer.finish(int(time.time()))
        except BadEvent as exc:
            raise event_fault(exc) from exc
        self._append(events)
        stream.details.usage = writer.usage
        complete(stream)

    def _append(self, parts: list[bytes]) -> None:
        block = b"".join(parts)
        remember(self._stream, block)
        self._stream.forward(block, len(parts), more=self._over)
        self._count_text()

    def _append_text(self, event: bytes) -> None:
        """Append the event of a text, about which there is nothing to be found out."""
        stream = self._stream
        form = stream.details.error_format
        if isinstance(form, ResponseEvents):
            form.note_sequence(stream.last + 1, self._writer.sequence - 1)
        stream.forward(event, 1)
        self._count_text()
