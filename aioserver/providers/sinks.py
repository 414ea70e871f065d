"""Sinks, which make events of a log, or a body, from the bytes of a provider's answer.

`EventSink` keeps the provider's bytes (text/event-stream, WHATWG HTML 9.2), whole events at a time,
for the OpenAI face. `ChatSink` reads each event and appends `chunk` objects, for the faces that show
frames. Anthropic's events (message_sink.py) and bodies that are not streamed (body_sink.py) go elsewhere. How an answer may end:

    [DONE], or response.completed / incomplete / failed      well
    the body ends after a finish_reason                      well; a [DONE] is added
    an event that is not JSON                                ProviderBadResponse
    an error object                                          ProviderError, or the fault that its code means; nothing after
                                                             it passes, and a response gets a response.failed
    the body ends otherwise                                  ProviderDisconnected
    there is no body                                         ProviderBadResponse
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import orjson

from aioserver.protocol import eventstream
from aioserver.protocol.eventstream import EventTooLong
from aioserver.protocol.openai import (
    TEXT_START,
    BadEvent,
    ErrorEvent,
    Reading,
    Shape,
    bounded,
    learn,
    usage_of,
)
from aioserver.protocol.responses import ENDS, up_to_end
from aioserver.provider_errors import (
    ProviderAuthError,
    ProviderBadResponse,
    ProviderDisconnected,
    ProviderFault,
)
from aioserver.providers.error_mapping import error_object_fault, event_fault
from aioserver.streams import entries

if TYPE_CHECKING:
    from aioserver.streams.contracts import Path
    from aioserver.streams.stream import Stream

# Events of an answer from which its shape is learned; some providers repeat no shape at all.
MAX_SHAPE_SAMPLES = 4
# Events of a response in which its id is looked for.
MAX_ID_SAMPLES = 4
# Bytes of an answer's text that are not counted yet, at most.
TEXT_STEP = 4096
DONE = b"data: [DONE]\n\n"
# A quote inside a JSON string is escaped, so these are never text that a model has written. They are
# looked for with `find` and not with a regular expression, since every byte that passes is searched.
_FINISH, _FINISH_SPACED = b'"finish_reason":"', b'"finish_reason": "'
_ERROR = b'"error"'
_USAGE = b'"usage"'
NO_END_MESSAGE = "the provider's stream ended without a finish_reason and without its end mark"


class EventSink:
    """Appends the provider's bytes, as they are, to a log: one entry for each read.

    Always: an entry holds whole events only; nothing is appended after an error or an end.

    *responses* says that the events are those of the Responses API, not chat completions.
    """

    def __init__(self, stream: Stream, *, responses: bool) -> None:
        self._stream = stream
        self._splitter = eventstream.Splitter(stream.max_bytes)
        self._responses = responses
        # Events in which the provider's id of a response is still looked for.
        self._id_samples_left = MAX_ID_SAMPLES if responses else 0
        # Whether a finish_reason has come.
        self._finished = False
        self._begun = False

    @property
    def progress(self) -> int:
        """The number of the newest event in the log."""
        return self._stream.last

    def feed(self, data: bytes) -> bool:
        """Append the events that are whole now; return False at the end of the answer.

        Raises:
            ProviderFault: the first event is an error object, or a later event is one about our key. Any
                other error object ends the log.
            ProviderBadResponse: an event is too long, or is not JSON, as far as `plausible` can tell.
        """
        self._begun = True
        try:
            block = self._splitter.feed(data)
        except EventTooLong as exc:
            raise event_fault(exc) from exc
        if not block:
            return True
        # Not `in`: for bytes that costs more than twice as much.
        find = block.find
        done, ended, error_event = b"", False, None
        if self._responses:
            block, ended = up_to_end(block)
            if ended:
                self._stream.details.usage = _usage_in(block)
        else:
            if find(b"[DONE]") >= 0 and (start := _done_line(block)) >= 0:
                ended = True
                done = DONE
                block = block[:start]
            if not self._finished:
                self._finished = find(_FINISH) >= 0 or find(_FINISH_SPACED) >= 0
            if self._finished and find(_USAGE) >= 0:
                self._stream.details.usage = _usage_in(block) or self._stream.details.usage
        if find(_ERROR) >= 0:
            block, error_event = self._before_error(block)
        broken = not plausible(block)
        if broken:
            block = before_broken(block)
        self._append(block, more=ended or broken or error_event is not None, ended=ended)
        if broken:
            raise ProviderBadResponse("the provider sent an event that is not JSON")
        if error_event is not None:
            event, content = error_event
            # OpenAI's Responses API has events that are error objects themselves.
            fault = error_object_fault(content.get("error") or content)
            if not self._stream.answered or isinstance(fault, ProviderAuthError):
                # An error about our key is never shown.
                raise fault
            self._end_with_error(event, content.get("type"), fault)
            return False
        if ended:
            self._complete(done)
        return not ended

    def end(self) -> None:
        """Complete the log, since the body ended without a `[DONE]`.

        Raises:
            ProviderDisconnected: there was no finish_reason either.
            ProviderBadResponse: the body was empty.
        """
        if not self._finished:
            raise early_end(self._begun)
        self._complete(DONE)

    def fast(self) -> Path | None:
        """Return the stream's fast path: not before the id of a response, nor after a finish_reason: usage may follow."""
        slow = self._finished or self._id_samples_left or not self._splitter.idle
        if slow or (self._responses and self._stream.details.error_format is None):
            return None
        return self._stream.open_fast_path()

    def _end_with_error(self, event: bytes, kind: object, fault: ProviderFault) -> None:
        """End the log with *fault*, which the provider has reported in *event*, whose type is *kind*.

        The one error that all clients of the Responses API take for an end is `response.failed`. It
        replaces an *event* without a type, and follows any other.
        """
        stream = self._stream
        end = not self._responses or kind in ENDS
        if end or isinstance(kind, str):
            self._append(event, more=True)
        if not end:
            stream.fail(fault)
            return
        stream.error = fault
        # Without `data`: the provider's own event has been passed on.
        stream.end(entries.ERROR, fault.as_chunk())

    def _append(self, block: bytes, *, more: bool, ended: bool = False) -> None:
        if block:
            stream = self._stream
            if self._id_samples_left:
                self._add_response_id(block)
            if self._responses and (form := stream.details.error_format) is not None:
                size = form.size
                form.note(block, stream.last + 1)
                if form.size != size:
                    stream.recount()
                if ended and stream.attachment.on_complete is not None:
                    stream.attachment.on_complete()
            count = eventstream.count(block)
            # Comments alone pass, and are not counted.
            if count:
                stream.mark_answered()
            stream.forward(block, count, more=more)

    def _add_response_id(self, block: bytes) -> None:
        """Let the stream be found by the id that the provider has given to the response, too."""
        for event in eventstream.parse(block)[: self._id_samples_left]:
            self._id_samples_left -= 1
            with contextlib.suppress(orjson.JSONDecodeError, KeyError, TypeError):
                response_id = orjson.loads(event.data)["response"]["id"]
                if isinstance(response_id, str) and response_id:
                    self._stream.add_alias(response_id)
                    self._id_samples_left = 0
                    return

    def _before_error(self, block: bytes) -> tuple[bytes, tuple[bytes, dict[str, Any]] | None]:
        """Return the events before the first that reports an error, and (that event, its content).

        The events after it are dropped, [DONE] too, which would mean a good end.
        """
        events = eventstream.split(block)
        for number, event in enumerate(events):
            if (content := _reporting(event, responses=self._responses)) is not None:
                return b"".join(events[:number]), (event, content)
        return block, None

    def _complete(self, done: bytes) -> None:
        stream = self._stream
        stream.end(
            entries.COMPLETE,
            {"metadata": {"provider": stream.details.provider, "model": stream.details.model}},
            data=done,
        )


class ChatSink:
    """Reads the provider's events and appends their `chunk` objects to a log.

    Always: nothing is appended after an error or an end.
    """

    def __init__(self, stream: Stream, reading: Reading) -> None:
        self._stream = stream
        self._reading = reading
        self._splitter = eventstream.Splitter(stream.max_bytes)
        self._begun = False
        self._shape: Shape | None = None
        self._samples_left = MAX_SHAPE_SAMPLES

    @property
    def progress(self) -> int:
        """The number of the newest event in the log."""
        return self._stream.last

    def feed(self, data: bytes) -> bool:
        """Append the chunks of the events that are whole now; return False at the end of the answer.

        Raises:
            ProviderFault: an event is an error object, is not JSON, or is too long.
        """
        chunks: list[bytes] = []
        ended = False
        self._begun = True
        # The texts that the fast path has passed on come before these events in the log.
        self._stream.close_fast_path()
        try:
            block = self._splitter.feed(data)
            for event in eventstream.parse(block):
                if event.data == b"[DONE]":
                    ended = True
                    break
                if not event.data:
                    # Not an event (WHATWG HTML 9.2.6): it keeps the connection alive.
                    continue
                chunks += self._reading.read(event.data)
                # Also if the event has no text yet: from here on there is no second attempt.
                self._stream.mark_answered()
        except (EventTooLong, BadEvent, ErrorEvent) as exc:
            raise event_fault(exc) from exc
        finally:
            if chunks:
                self._stream.append(entries.CHUNK, chunks, more=ended)
                count_text(self._stream, self._reading)
        if ended:
            complete(self._stream, self._reading)
        elif self._samples_left and len(chunks) == 1 and chunks[0].startswith(TEXT_START):
            self._samples_left -= 1
            self._shape = learn(block, self._reading) or self._shape
        return not ended

    def end(self) -> None:
        """Complete the log, since the body ended without a `[DONE]`.

        Raises:
            ProviderDisconnected: there was no finish_reason either.
            ProviderBadResponse: the body was empty.
        """
        if self._reading.finish_reason is None:
            raise early_end(self._begun)
        complete(self._stream, self._reading)

    def fast(self) -> Path | None:
        """Return the stream's fast path, once the shape of the provider's events is known.

        There is none while half a character waits for its other half.
        """
        if self._shape is None or not self._splitter.idle or self._reading.half:
            return None
        return self._stream.open_fast_path(self._shape)


def count_text(stream: Stream, reading: Reading) -> None:
    """Count the text of *reading* for *stream*, which both keep, once it has grown by a step."""
    size = reading.size
    if size - stream.details.text_bytes > TEXT_STEP:
        stream.details.text_bytes = size
        stream.recount()


def complete(stream: Stream, reading: Reading) -> None:
    """Append the `complete` event, with the metadata that the provider has sent."""
    stream.details.usage = reading.usage
    if (keep := stream.attachment.on_complete) is not None:
        keep()
    stream.end(
        entries.COMPLETE,
        {
            "metadata": {
                "finish_reason": reading.finish_reason,
                "usage": reading.usage,
                "provider": stream.details.provider,
                "model": stream.details.model,
            }
        },
    )


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


def early_end(begun: bool) -> ProviderFault:
    """Return the fault of a stream that ended without its end mark; *begun*: anything has come."""
    if begun:
        return ProviderDisconnected(NO_END_MESSAGE)
    return ProviderBadResponse("the provider's stream is empty")


def _done_line(block: bytes) -> int:
    """Return the index at which the line `data: [DONE]` begins, -1 if there is none."""
    index = -1
    while (index := block.find(b"[DONE]", index + 1)) >= 0:
        line = block[max(0, index - 8) : index].rstrip(b" ")
        if line.endswith((b"\ndata:", b"\rdata:")) or line == b"data:":
            return block.rindex(b"data:", 0, index)
    return -1


def _usage_in(block: bytes) -> dict[str, Any] | None:
    """Return the usage in the last event that has one; None if no event has.

    It is the usage of a chunk, or of the response in an event.
    """
    for event in reversed(eventstream.parse(block)):
        try:
            content = orjson.loads(event.data)
        except orjson.JSONDecodeError:
            continue
        if (usage := usage_of(content)) is not None:
            return bounded(usage)
    return None


def _reporting(event: bytes, *, responses: bool) -> dict[str, Any] | None:
    """Return the content of *event* if it reports an error; otherwise None.

    It has an error object, or is one: an event of the type `error`, among the events of *responses*.
    """
    for part in eventstream.parse(event):
        try:
            content = orjson.loads(part.data)
        except orjson.JSONDecodeError:
            continue
        if isinstance(content, dict) and (
            content.get("error") or (responses and content.get("type") == "error")
        ):
            return content
    return None
