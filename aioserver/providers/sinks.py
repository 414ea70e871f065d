"""What the sinks of streamed answers share, whichever API their provider speaks.

A sink gets the bytes of an answer as they come, and fills a log. All of them cut the bytes into whole events
(text/event-stream, WHATWG HTML 9.2) and end the log; they differ in what an event means:

    StreamSink
        PassingSink         keeps the provider's bytes: one entry for each read
            EventSink       chat completions, for the OpenAI face (event_sink.py)
            ResponseSink    responses (response_sink.py)
            MessageSink     messages of Anthropic's API (message_sink.py)
        ReadingSink         reads each event, and keeps what it makes of it
            ChatSink        chat completions as `chunk` objects, for the faces that show frames (chat_sink.py)
            BridgeSink      chat completions as the events of a response (bridge_sink.py)

A body that is not streamed is collected (body_sink.py). How an answer may end:

    its end mark                            well; which event that is, the API says
    the body ends after a finish_reason     well, for chat completions
    an event that is not JSON               ProviderBadResponse
    an event that reports an error          ProviderError, or the fault that its code means; nothing after it passes
    the body ends otherwise                 ProviderDisconnected
    there is no body                        ProviderBadResponse
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from aioserver.protocol import eventstream
from aioserver.protocol.eventstream import EventTooLong
from aioserver.protocol.openai import BadEvent, ErrorEvent, Shape, learn
from aioserver.provider_errors import (
    ProviderAuthError,
    ProviderBadResponse,
    ProviderDisconnected,
    ProviderFault,
)
from aioserver.providers.error_mapping import event_fault
from aioserver.streams import entries

if TYPE_CHECKING:
    from aioserver.protocol.openai import Reading
    from aioserver.streams.contracts import Path
    from aioserver.streams.stream import Stream

# Events of an answer from which its shape is learned; some providers repeat no shape at all.
MAX_SHAPE_SAMPLES = 4
# Bytes of an answer's text that are not counted yet, at most.
TEXT_STEP = 4096


class StreamSink(ABC):
    """Fills a log with the events of an answer, as its provider streams them.

    Always: an entry holds whole events only; nothing is appended after an error or an end.
    """

    # The part that is missing if the body ends too early.
    end_mark: ClassVar[str] = "a finish_reason and without its end mark"

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._splitter = eventstream.Splitter(stream.max_bytes)
        # Whether anything has come.
        self._begun = False
        # Whether the answer is over, so that readers are notified of what is appended now together with the end of the
        # log. An attribute, since a keyword argument costs as much as two calls.
        self._over = False

    @property
    def progress(self) -> int:
        """The number of the newest event in the log."""
        return self._stream.last

    def feed(self, data: bytes) -> bool:
        """Append the events that are whole now; return False at the end of the answer.

        Raises:
            ProviderFault: an event is too long, is not JSON, or reports an error that the log does not end with.
        """
        self._begun = True
        try:
            block = self._splitter.feed(data)
            return not block or self._take(block)
        except (EventTooLong, BadEvent, ErrorEvent) as exc:
            raise event_fault(exc) from exc

    def end(self) -> None:
        """Complete the log, since the body ended without an end mark.

        Raises:
            ProviderDisconnected: the answer was not complete.
            ProviderBadResponse: the body was empty, or what has come is no answer.
        """
        if not self._begun:
            raise ProviderBadResponse("the provider's stream is empty")
        if not self._complete_without_mark:
            raise ProviderDisconnected(f"the provider's stream ended without {self.end_mark}")
        self._over = True
        self._complete()

    def fast(self) -> Path | None:
        """Return the stream's fast path, by which the next event may go; None if this sink has to see it."""
        return None

    @property
    def _complete_without_mark(self) -> bool:
        """Whether the answer is complete if the body ends now."""
        return False

    @abstractmethod
    def _take(self, block: bytes) -> bool:
        """Append the events of *block*, which are whole; return False at the end of the answer.

        Raises:
            ProviderFault, BadEvent, ErrorEvent: see `feed`.
        """

    def _complete(self) -> None:
        """End the log well."""
        complete(self._stream)


class PassingSink(StreamSink):
    """Appends the provider's bytes, as they are, to a log: one entry for each read."""

    def _take(self, block: bytes) -> bool:
        block, ended, error = self._up_to_end(block)
        broken = not plausible(block)
        if broken:
            block, ended, error = before_broken(block), False, b""
        self._over = ended or broken or bool(error)
        self._append(block)
        if broken:
            raise ProviderBadResponse("the provider sent an event that is not JSON")
        if error:
            fault = self._fault(error)
            if not self._stream.answered or isinstance(fault, ProviderAuthError):
                # Another attempt may follow; and an error about our key is never shown.
                raise fault
            self._end_with_error(error, fault)
        elif ended:
            self._complete()
        return not self._over

    @abstractmethod
    def _up_to_end(self, block: bytes) -> tuple[bytes, bool, bytes]:
        """Return the events of *block* that pass, whether they end the answer well, or else the event that reports an error.

        The events behind either end are dropped: a good end after an error would be none.
        """

    @abstractmethod
    def _fault(self, event: bytes) -> ProviderFault:
        """Return the fault that *event* reports."""

    def _end_with_error(self, event: bytes, fault: ProviderFault) -> None:
        """End the log with *fault*, which the provider has reported in *event*."""
        self._append(event)
        self._stream.error = fault
        # Without `data`: the provider's own event has been passed on.
        self._stream.end(entries.ERROR, fault.as_chunk())

    def _append(self, block: bytes) -> None:
        """Append *block*, unless it is empty."""
        if block:
            stream, count = self._stream, eventstream.count(block)
            # Comments alone pass, and are not counted.
            if count and not stream.answered_at:
                stream.mark_answered()
            stream.forward(block, count, more=self._over)


class ReadingSink(StreamSink):
    """Reads each event of a chat completion, and appends what becomes of it.

    *reading* has what was read so far. Once the shape of the provider's events is known, an event of that shape need
    not be read.
    """

    def __init__(self, stream: Stream, reading: Reading) -> None:
        super().__init__(stream)
        self._reading = reading
        self._shape: Shape | None = None
        self._samples_left = MAX_SHAPE_SAMPLES

    @property
    def _complete_without_mark(self) -> bool:
        return self._reading.finish_reason is not None

    def _take(self, block: bytes) -> bool:
        stream, read = self._stream, self._reading.read
        if stream.path is not None:
            # The texts that it has passed on come before these events in the log.
            stream.close_fast_path()
        parts: list[bytes] = []
        try:
            for event in eventstream.parse(block):
                if event.data == b"[DONE]":
                    self._over = True
                    break
                # Without data it is no event (WHATWG HTML 9.2.6): it keeps the connection alive.
                if event.data:
                    parts += read(event.data) if stream.answered_at else self._begin(event.data)
        finally:
            if parts:
                self._append(parts)
        if self._over:
            self._complete()
        elif self._samples_left and len(parts) == 1 and self._may_be_text(parts[0]):
            self._samples_left -= 1
            self._shape = learn(block, self._reading) or self._shape
        return not self._over

    def _begin(self, data: bytes) -> list[bytes]:
        """Return what becomes of the first event, which has *data*; from then on there is no second attempt.

        Raises:
            BadEvent, ErrorEvent: see `Reading.read`.
        """
        parts = self._reading.read(data)
        # Also if the event has no text yet.
        self._stream.mark_answered()
        return parts

    @abstractmethod
    def _may_be_text(self, part: bytes) -> bool:
        """Return whether an event of which *part* became may have had a text and nothing else."""

    @abstractmethod
    def _append(self, parts: list[bytes]) -> None:
        """Append *parts*, of which there is at least one."""

    def _count_text(self) -> None:
        """Count for the log what its reading keeps, once that has grown by a step."""
        size, details = self._reading.size, self._stream.details
        if size - details.text_bytes > TEXT_STEP:
            details.text_bytes = size
            self._stream.recount()


def complete(stream: Stream, data: bytes = b"", **metadata: object) -> None:
    """End the log of *stream* well: with *data* for the faces that pass on bytes, and this *metadata* for the others."""
    # The kept part of the answer has the texts that the fast path has passed on, too.
    stream.close_fast_path()
    if (keep := stream.attachment.on_complete) is not None:
        keep()
    details = stream.details
    metadata |= {"provider": details.provider, "model": details.model}
    stream.end(entries.COMPLETE, {"metadata": metadata}, data=data)


def plausible(block: bytes) -> bool:
    """Return whether the events of a block may be JSON objects: `{…}`, in UTF-8.

    The bytes between the braces are not parsed. This finds truncated events and half characters, the
    faults that occur; parsing each event would take 0.5 µs of the 12 that an event costs in all.
    """
    if (
        block.startswith(b"data: {")
        and block.endswith(b"}\n\n")
        and block.find(b"\n") == len(block) - 2
        and block.find(b"\r") < 0
        and eventstream.utf8(block)
    ):
        return True
    for event in eventstream.parse(block):
        data = event.data.strip()
        whole = data.startswith(b"{") and data.endswith(b"}") and eventstream.utf8(data)
        if data and data != b"[DONE]" and not whole:
            return False
    return True


def before_broken(block: bytes) -> bytes:
    """Return the events of *block* before the first that is not plausible."""
    events = eventstream.split(block)
    good = next(number for number, event in enumerate(events) if not plausible(event))
    return b"".join(events[:good])
