"""The sink of a chat completion that becomes a response: the provider's chunks become its events in the log.

The log has the bytes that a provider with responses of its own would have sent, so that everything behind it, the faces, the
resume by `starting_after`, the memory of the last response object, works as for those. An answer ends as sinks.py says
of chat completions, and the response with it: well with `response.completed` or `response.incomplete`, or with the
`response.failed` that a fault has on every face of this API.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from aioserver.protocol import eventstream
from aioserver.protocol.eventstream import EventTooLong
from aioserver.protocol.openai import BadEvent, ErrorEvent, Shape, learn
from aioserver.protocol.responses import ResponseEvents
from aioserver.providers.error_mapping import event_fault
from aioserver.providers.sinks import MAX_SHAPE_SAMPLES, count_text, early_end
from aioserver.streams import entries

if TYPE_CHECKING:
    from aioserver.protocol.bridge.events import ResponseWriter
    from aioserver.streams.stream import Stream


class BridgeSink:
    """Reads the provider's chunks, and appends the events of a response to a log.

    Always: an entry holds whole events only; nothing is appended after an error or an end.
    """

    def __init__(self, stream: Stream, writer: ResponseWriter) -> None:
        self._stream = stream
        self._writer = writer
        self._splitter = eventstream.Splitter(stream.max_bytes)
        self._begun = False
        self._shape: Shape | None = None
        self._samples_left = MAX_SHAPE_SAMPLES

    @property
    def progress(self) -> int:
        """The number of the newest event in the log."""
        return self._stream.last

    def feed(self, data: bytes) -> bool:
        """Append the events of the chunks that are whole now; return False at the end of the answer.

        Raises:
            ProviderFault: a chunk is an error object, is not JSON, or is too long; so is the answer.
        """
        self._begun = True
        ended = False
        events: list[bytes] = []
        writer = self._writer
        try:
            block = self._splitter.feed(data)
            if self._shape is not None and writer.plain:
                text = self._shape.text_in(block)
                if text is not None:
                    self._append_text(writer.add_text(text))
                    return True
            for event in eventstream.parse(block):
                if event.data == b"[DONE]":
                    ended = True
                    break
                if not event.data:
                    # Not an event (WHATWG HTML 9.2.6): it keeps the connection alive.
                    continue
                events += self._read(event.data)
        except (EventTooLong, BadEvent, ErrorEvent) as exc:
            raise event_fault(exc) from exc
        finally:
            self._append(events, more=ended)
        if ended:
            self._complete()
        elif self._samples_left and len(events) == 1 and writer.plain:
            self._samples_left -= 1
            self._shape = learn(block, writer) or self._shape
        return not ended

    def end(self) -> None:
        """Complete the log, since the body ended without a `[DONE]`.

        Raises:
            ProviderDisconnected: there was no finish_reason either.
            ProviderBadResponse: the body was empty.
        """
        if self._writer.finish_reason is None:
            raise early_end(self._begun)
        self._complete()

    def fast(self) -> None:
        """Return None: no event of the provider is one of the log."""

    def _read(self, data: bytes) -> list[bytes]:
        """Return the events of one chunk; from the first one on there is no second attempt."""
        stream, writer = self._stream, self._writer
        if stream.answered:
            return writer.read(data)
        events = [*writer.begin(data), *writer.read(data)]
        self._note_begin()
        return events

    def _note_begin(self) -> None:
        self._stream.mark_answered()
        self._stream.add_alias(self._writer.response_id)

    def _complete(self) -> None:
        """Append the events that end the response, and end the log.

        Raises:
            ProviderBadResponse: the answer is not complete.
        """
        stream, writer = self._stream, self._writer
        try:
            # A `[DONE]` may be all that has come.
            events = [] if stream.answered else writer.begin(b"{}")
            events += writer.finish(int(time.time()))
        except BadEvent as exc:
            raise event_fault(exc) from exc
        self._note_begin()
        self._append(events, more=True)
        stream.details.usage = writer.usage
        if (keep := stream.attachment.on_complete) is not None:
            keep()
        metadata = {"provider": stream.details.provider, "model": stream.details.model}
        stream.end(entries.COMPLETE, {"metadata": metadata})

    def _append(self, events: list[bytes], *, more: bool = False) -> None:
        if not events:
            return
        stream = self._stream
        block = b"".join(events)
        form = stream.details.error_format
        if form is not None:
            size = form.size
            form.note(block, stream.last + 1)
            if form.size != size:
                stream.recount()
        stream.forward(block, len(events), more=more)
        count_text(stream, self._writer)

    def _append_text(self, event: bytes) -> None:
        """Append the event of a text, about which there is nothing to be found out."""
        stream = self._stream
        form = stream.details.error_format
        if isinstance(form, ResponseEvents):
            form.note_sequence(stream.last + 1, self._writer.sequence - 1)
        stream.forward(event, 1)
        count_text(stream, self._writer)
