"""The sinks that read each event of a chat completion: their common part, the sink of faces that
show frames, and the common part of bridges.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Generic

from aioserver.protocol import eventstream
from aioserver.protocol.bridging.chunks import C
from aioserver.protocol.openai import TEXT_START, BadEvent, Shape, is_content, learn
from aioserver.providers.error_mapping import event_fault
from aioserver.providers.sinks import TEXT_STEP, StreamSink, complete
from aioserver.streams import entries
from aioserver.streams.fast_path import MAX_CHUNK_BYTES

if TYPE_CHECKING:
    from aioserver.protocol.bridging.chunks import ChunkReader
    from aioserver.protocol.openai import Reading
    from aioserver.streams.contracts import Path
    from aioserver.streams.stream import Stream

# Events of an answer from which its shape is learned; some providers repeat no shape at all.
MAX_SHAPE_SAMPLES = 4


class ReadingSink(StreamSink):
    """Reads each event of a chat completion, and appends the events that it makes of it.

    *reading* has the state of this attempt alone. Once the shape of the provider's events is
    known, an event of that shape need not be read.
    """

    def __init__(self, stream: Stream, reading: Reading) -> None:
        super().__init__(stream, is_content)
        self._reading = reading
        self._shape: Shape | None = None
        self._samples_left = MAX_SHAPE_SAMPLES

    def fast(self) -> Path | None:
        """Return the path; the stream's only once the shape of the provider's events is known, and
        while the next one may have a text and nothing else.
        """
        if self._shape is None or not self._splitter.idle or not self._reading.plain:
            return super().fast()
        return self._stream.open_fast_path(self._shape)

    @property
    def _complete_without_mark(self) -> bool:
        return self._reading.finish_reason is not None

    def _take(self, block: bytes) -> bool:
        stream, read = self._stream, self._reading.read
        if stream.path is not None:
            # The texts that it has forwarded come before these events in the log.
            stream.close_fast_path()
        parts: list[bytes] = []
        try:
            for event in eventstream.parse(block):
                if event.data == b"[DONE]":
                    self._over = True
                    break
                # Without data it is not an event (WHATWG HTML 9.2.6): it keeps the connection
                # alive.
                if event.data:
                    parts += read(event.data) if stream.answered_at else self._begin(event.data)
        finally:
            self._append(parts)
        if self._over:
            if not stream.answered_at:
                # An empty answer is an answer.
                self._append(self._open())
            self._complete()
        elif self._samples_left and len(parts) == 1 and self._may_be_text(parts[0]):
            self._samples_left -= 1
            self._shape = learn(block, self._reading) or self._shape
        return not self._over

    def _begin(self, data: bytes) -> list[bytes]:
        """Return the events made of *data*, the data of an event before the first content: none,
        if it is part of the preamble.

        Raises:
            BadEvent, ErrorEvent: see `Reading.read`.
        """
        parts = self._reading.read(data)
        if parts or self._is_content(data) or not self._wait():
            return [*self._open(), *parts]
        return parts

    def _open(self) -> list[bytes]:
        """Return the events before the first content, which is next."""
        self._commit()
        return []

    @abstractmethod
    def _may_be_text(self, part: bytes) -> bool:
        """Return whether an event that became *part* may have had a text and nothing else."""

    @abstractmethod
    def _append(self, parts: list[bytes]) -> None:
        """Append *parts*."""

    def _count_text(self) -> None:
        """Count the bytes that its reading keeps for the log, whenever they have grown by a step."""
        size, stream = self._reading.size, self._stream
        if size - stream.text_bytes > TEXT_STEP:
            stream.text_bytes = size
            stream.recount()


class ChatSink(ReadingSink):
    """Reads the provider's events and appends their `chunk` objects to a log."""

    def _may_be_text(self, part: bytes) -> bool:
        return part.startswith(TEXT_START)

    def _append(self, parts: list[bytes]) -> None:
        if parts:
            self._stream.append(entries.CHUNK, parts, more=self._over)
            self._count_text()

    def _complete(self) -> None:
        complete_chat(self._stream, self._reading)


class BridgingSink(ReadingSink, Generic[C]):
    """Reads the provider's chunks, and appends events of another API, which *writer* makes."""

    def __init__(self, stream: Stream, writer: ChunkReader[C]) -> None:
        super().__init__(stream, writer)
        self._writes = writer
        # Whether the first chunk has come, which has the model's name.
        self._named = False

    def feed(self, data: bytes) -> bool:
        """Append the events for *data*, as `StreamSink.feed`."""
        writer, shape, stream = self._writes, self._shape, self._stream
        if stream.path is not None:
            # It notes the events that it has forwarded, before the writer makes more.
            stream.close_fast_path()
        if (
            shape is not None
            and self._splitter.idle
            and writer.plain
            and len(data) <= MAX_CHUNK_BYTES
            and (text := shape.text_in(data)) is not None
        ):
            # Most reads are one text.
            try:
                self._append_texts(writer.add_text(text), 1)
            except BadEvent as exc:
                raise event_fault(exc) from exc
            return True
        return super().feed(data)

    def _take(self, block: bytes) -> bool:
        writer, shape = self._writes, self._shape
        self._stream.close_fast_path()
        if shape is not None and writer.plain and (texts := shape.texts_in(block)):
            events: list[bytes] = []
            try:
                # Events before a fault stay.
                events.extend(map(writer.add_text, texts))
            finally:
                self._append_texts(b"".join(events), len(events))
            return True
        return super()._take(block)

    def _begin(self, data: bytes) -> list[bytes]:
        if not self._named:
            self._named = True
            self._writes.note_model(data)
        return super()._begin(data)

    def _may_be_text(self, part: bytes) -> bool:  # noqa: ARG002 - the writer knows better
        return self._writes.plain

    @abstractmethod
    def _finish(self) -> list[bytes]:
        """Return the events that end the answer.

        Raises:
            BadEvent: the answer is not complete.
        """

    def _complete(self) -> None:
        self._stream.close_fast_path()
        try:
            events = self._finish()
        except BadEvent as exc:
            raise event_fault(exc) from exc
        self._over = True
        self._close(events)
        self._stream.outcome.usage = self._writes.usage
        complete(self._stream)

    def _close(self, events: list[bytes]) -> None:
        """Append *events*, which end the answer, and end the log."""
        if events:
            self._stream.close_with(b"".join(events), len(events))

    def _append_texts(self, data: bytes, count: int) -> None:
        """Append *data*, *count* events of one text each, which need no check; *count* is 0 if the
        first was a fault.
        """
        if not count:
            return
        stream = self._stream
        stream.events.note_run(stream.last + 1, self._writes.sequence - count, count)
        stream.forward(data, count)
        self._count_text()


def complete_chat(stream: Stream, reading: Reading) -> None:
    """End the log of *stream* well, with the metadata that the provider has sent."""
    stream.outcome.usage = reading.usage
    complete(stream, finish_reason=reading.finish_reason, usage=reading.usage)
