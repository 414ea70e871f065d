"""What becomes of a provider's answer: sinks that turn its bytes into a log, or into a body.

`EventSink` keeps the provider's bytes, whole events at a time, for the OpenAI face. `ChatSink`
reads each event and appends `chunk` objects, for the faces that show frames. `BodySink` keeps a
body that is not streamed, up to a bound. Which end is a good one is decided here:

    [DONE], or response.completed / incomplete / failed      the end
    the body ends after a finish_reason                      the end, a [DONE] is put to it
    an event that is no JSON                                 ProviderBadResponse
    an error object                                          ProviderError, or what its code says;
                                                             nothing behind it passes
    the body ends otherwise                                  ProviderDisconnected
    there is no body                                         ProviderBadResponse
"""

from __future__ import annotations

import contextlib
import re
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
    learn,
    usage_of,
)
from aioserver.provider_errors import (
    ProviderAuthError,
    ProviderBadResponse,
    ProviderDisconnected,
    ProviderFault,
)
from aioserver.providers.error_mapping import error_object_fault, event_fault
from aioserver.streams import entries

if TYPE_CHECKING:
    from aioserver.streams.stream import Path, Stream

MAX_LESSONS = 4  # events of an answer from which its shape is learned
DONE = b"data: [DONE]\n\n"
# A quote inside a JSON string is escaped, so these are never text that a model has written.
# Plain searches, not regular expressions: these look at every byte that passes.
_FINISH, _FINISH_SPACED = b'"finish_reason":"', b'"finish_reason": "'
_ERROR = b'"error"'
_USAGE = b'"usage"'
_RESPONSE_END = re.compile(rb'"type" ?: ?"response\.(?:completed|incomplete|failed)"')
NO_END = "the provider's stream ended without a finish_reason and without its end mark"


class BodySink:
    """Collects a body of at most *max_bytes*."""

    def __init__(self, max_bytes: int) -> None:
        self._parts: list[bytes] = []
        self._size = 0
        self._max = max_bytes

    @property
    def body(self) -> bytes:
        """What has come."""
        return b"".join(self._parts)

    def feed(self, data: bytes) -> bool:
        """A part.

        Raises:
            ProviderBadResponse: more than *max_bytes*.
        """
        self._size += len(data)
        if self._size > self._max:
            raise ProviderBadResponse(f"an answer of more than {self._max} bytes")
        self._parts.append(data)
        return True

    def end(self) -> None:
        """The body is whole."""

    def fast(self) -> None:
        """None: all of it is collected."""


class EventSink:
    """Appends the provider's bytes, as they are, to a log: one entry for each read."""

    def __init__(self, stream: Stream, *, responses: bool) -> None:
        self._stream = stream
        self._splitter = eventstream.Splitter()
        self._responses = responses
        self._named = not responses
        self._finished = False
        self._begun = False

    def feed(self, data: bytes) -> bool:
        """Append the events that are whole now; False at the provider's end.

        Raises:
            ProviderFault: its first event is an error object; a later one passes, and is the end.
            ProviderBadResponse: an event that is no JSON, as far as `_sound` can tell.
        """
        self._begun = True
        try:
            block = self._splitter.feed(data)
        except EventTooLong as exc:
            raise event_fault(exc) from exc
        if not block:
            return True
        find = block.find  # not `in`: for bytes that costs more than twice as much
        done, ended, fault = b"", False, None
        if self._responses:
            ended = _RESPONSE_END.search(block) is not None
            if ended:
                self._stream.details.usage = _usage_in(block)
            if not self._named:
                self._named = True
                self._name(block)
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
            block, fault = self._before_error(block)
        broken = not _sound(block)
        if broken:
            block = self._before_broken(block)
        self._append(block, more=ended or broken or fault is not None)
        if broken:
            raise ProviderBadResponse("the provider sent an event that is not JSON")
        if fault is not None:
            event, stream = fault[0], self._stream
            error = error_object_fault(fault[1])
            if not stream.answered or isinstance(error, ProviderAuthError):
                raise error  # of our key nothing is shown
            self._append(event, more=True)
            stream.error = error
            stream.end(entries.ERROR, error.as_chunk())  # its own event has been passed on
            return False
        if ended:
            self._complete(done)
        return not ended

    def end(self) -> None:
        """The body ended without a `[DONE]`.

        Raises:
            ProviderDisconnected: and without a finish_reason.
            ProviderBadResponse: and nothing had come at all.
        """
        if not self._finished:
            raise _no_end(self._begun)
        self._complete(DONE)

    def fast(self) -> Path | None:
        """The stream's, while no event is half read; what follows the finish may have the usage."""
        if self._responses or self._finished or not self._splitter.idle:
            return None
        return self._stream.open_fast_path()

    def _append(self, block: bytes, *, more: bool) -> None:
        if block:
            number = eventstream.count(block)
            if number:  # comments alone pass, uncounted
                self._stream.mark_answered()
            self._stream.forward(block, number, more=more)

    def _name(self, block: bytes) -> None:
        """Let a response be found by the id that its provider has given it."""
        for event in eventstream.parse(block):
            with contextlib.suppress(orjson.JSONDecodeError, KeyError, TypeError):
                alias = orjson.loads(event.data)["response"]["id"]
                if isinstance(alias, str) and alias:
                    self._stream.add_alias(alias)
                    return

    @staticmethod
    def _before_error(block: bytes) -> tuple[bytes, tuple[bytes, Any] | None]:
        """What comes before an event that is an error object, and that event with its object.

        Nothing comes behind it: what the provider sends there, [DONE] too, ends no good answer.
        """
        events = eventstream.split(block)
        for number, event in enumerate(events):
            if (fault := _error_in(event)) is not None:
                return b"".join(events[:number]), (event, fault)
        return block, None

    @staticmethod
    def _before_broken(block: bytes) -> bytes:
        """What comes before the first event that is not sound."""
        events = eventstream.split(block)
        good = next(at for at, event in enumerate(events) if not _sound(event))
        return b"".join(events[:good])

    def _complete(self, done: bytes) -> None:
        stream = self._stream
        stream.end(
            entries.COMPLETE,
            {"metadata": {"provider": stream.details.provider, "model": stream.details.model}},
            data=done,
        )


class ChatSink:
    """Reads the provider's events and appends their `chunk` objects to a log."""

    def __init__(self, stream: Stream, reading: Reading) -> None:
        self._stream = stream
        self._reading = reading
        self._splitter = eventstream.Splitter()
        self._begun = False
        self._shape: Shape | None = None
        self._lessons = MAX_LESSONS  # left: some providers repeat nothing

    def feed(self, data: bytes) -> bool:
        """Append what the events that are whole now say; False at the provider's end."""
        chunks: list[bytes] = []
        ended = False
        self._begun = True
        self._stream.close_fast_path()  # what was said before this is noted before it
        try:
            block = self._splitter.feed(data)
            for event in eventstream.parse(block):
                if event.data == b"[DONE]":
                    ended = True
                    break
                if not event.data:
                    continue  # no event (WHATWG HTML 9.2.6): it keeps a connection alive
                chunks += self._reading.read(event.data)
                self._stream.mark_answered()  # also where it says nothing yet: no second try from here on
        except (EventTooLong, BadEvent, ErrorEvent) as exc:
            raise event_fault(exc) from exc
        finally:
            if chunks:
                self._stream.append(entries.CHUNK, chunks, more=ended)
        if ended:
            complete(self._stream, self._reading)
        elif self._lessons and len(chunks) == 1 and chunks[0].startswith(TEXT_START):
            self._lessons -= 1
            self._shape = learn(block, self._reading) or self._shape
        return not ended

    def end(self) -> None:
        """The body ended without a `[DONE]`.

        Raises:
            ProviderDisconnected: and without a finish_reason.
            ProviderBadResponse: and nothing had come at all.
        """
        if self._reading.finish_reason is None:
            raise _no_end(self._begun)
        complete(self._stream, self._reading)

    def fast(self) -> Path | None:
        """The stream's, once the shape of the provider's events is known."""
        if self._shape is None or not self._splitter.idle:
            return None
        return self._stream.open_fast_path(self._shape)


def complete(stream: Stream, reading: Reading) -> None:
    """Append the `complete` event with what the provider said of its answer."""
    stream.details.usage = reading.usage
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


def _sound(block: bytes) -> bool:
    """Whether the events of a block can be JSON objects: `{…}`, in UTF-8.

    What is between the braces is not looked at. A truncated event is found this way and half a
    character, which is what happens; to parse each event is 0.5 µs of the 12 that it costs in all.
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


def _no_end(begun: bool) -> ProviderFault:
    if begun:
        return ProviderDisconnected(NO_END)
    return ProviderBadResponse("the provider's stream is empty")


def _done_line(block: bytes) -> int:
    """Where the line `data: [DONE]` begins, -1 where there is none."""
    at = -1
    while (at := block.find(b"[DONE]", at + 1)) >= 0:
        line = block[max(0, at - 8) : at].rstrip(b" ")
        if line.endswith((b"\ndata:", b"\rdata:")) or line == b"data:":
            return block.rindex(b"data:", 0, at)
    return -1


def _usage_in(block: bytes) -> dict[str, Any] | None:
    """The usage that the events report: of a chunk, or of the response in an event."""
    for event in reversed(eventstream.parse(block)):
        try:
            said = orjson.loads(event.data)
        except orjson.JSONDecodeError:
            continue
        if (usage := usage_of(said)) is not None:
            return usage
    return None


def _error_in(block: bytes) -> Any:
    """The error object of an event that is one, None where there is none."""
    for event in eventstream.parse(block):
        try:
            answer = orjson.loads(event.data)
        except orjson.JSONDecodeError:
            continue
        if isinstance(answer, dict) and answer.get("error"):
            return answer["error"]
    return None
