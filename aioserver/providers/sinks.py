"""The sinks of answers: the common part of streamed answers, whichever API their provider speaks,
and the sinks of chat completions.

This file is one concept: how the bytes of an answer become the events of a log, and how an answer
may end.

A sink gets the bytes of an answer as they come, and fills a log. All of them cut the bytes into
whole events (text/event-stream, WHATWG HTML 9.2) and end the log; they differ in what an event
means:

    StreamSink
        PassingSink         keeps the provider's bytes: one entry for each read
            EventSink       chat completions, for the OpenAI face; they end with `[DONE]`, which is
                            added if it is missing after a finish_reason;
                            an event of the usage alone is left out where we have asked for it
            ResponseSink    responses (wings/responses/sinks.py)
            MessageSink     messages of Anthropic's API (wings/anthropic/sink.py)
        ReadingSink         reads each event, and keeps what it makes of it (reading_sinks.py)
            ChatSink        chat completions as `chunk` objects, for the faces that show frames
                            (reading_sinks.py)
            BridgeSink      chat completions as the events of a response (wings/responses/sinks.py)

The *preamble* of an answer is what comes before its content (a role, an id). It is held, and
appended together with the first content, byte for byte: until then another attempt may follow, and
the client would see a second preamble. `Api.content` decides what is content. Comments in front of
any event pass at once.

A body that is not streamed is collected, up to a bound (`BodySink`). How an answer may end:

    its end mark                           well; the API defines that event
    the body ends after a finish_reason    well, for chat completions and messages, however it
                                           ends: nothing is missing but the end mark, which is added
    an event that is not JSON              ProviderBadResponse
    an event that reports an error         ProviderError, or the fault that its code means; nothing
                                           after it passes
    the body ends otherwise                ProviderDisconnected
    there is no body                       ProviderBadResponse
"""

from __future__ import annotations

import asyncio
import re
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import orjson

from aioserver.protocol import eventstream
from aioserver.protocol.eventstream import EventTooLong, Splitter
from aioserver.protocol.openai import BadEvent, ErrorEvent, bounded, is_content, usage_of
from aioserver.protocol.parts import escaped, may_finish
from aioserver.protocol.tokens import tiered
from aioserver.protocol.transcript import loaded
from aioserver.provider_errors import (
    ProviderAuthError,
    ProviderBadResponse,
    ProviderDisconnected,
    ProviderFault,
    ReadTimeout,
)
from aioserver.providers.error_mapping import error_object_fault, event_fault
from aioserver.streams import entries
from aioserver.streams.fast_path import ERROR_NAME

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aioserver.protocol.parts import Choices
    from aioserver.streams.contracts import Held, HoldingPath, Path
    from aioserver.streams.stream import Stream


# The bounds of a held preamble; beyond them it is shown, and no other attempt follows.
MAX_HELD_BYTES, MAX_HELD_EVENTS = 1 << 16, 256
# The end mark of chat completions.
DONE = b"data: [DONE]\n\n"
# What stands between the contents of two events of one line.
BETWEEN = b"}\n\ndata: {"
# The most bytes beside a log that are not counted yet: of a text, or of what is held.
TEXT_STEP = 4096
# The faults that do not matter after the finish of an answer, which is complete then.
BREAKS = (ProviderDisconnected, ReadTimeout, ProviderBadResponse)


class StreamSink(ABC):
    """Fills a log with the events of an answer, as its provider streams them.

    *is_content* says whether an event with this data is content, or only a preamble to it.

    Always: an entry holds whole events only; nothing is appended after an error or an end; no event
    is in the log before the first content, unless the preamble was let go.
    """

    # The part that is missing if the body ends too early.
    end_mark: ClassVar[str] = "a finish_reason and without its end mark"

    def __init__(self, stream: Stream, is_content: Callable[[bytes], bool]) -> None:
        self._stream = stream
        self._is_content = is_content
        # Whether the answer is over, so that readers are notified of what is appended now together
        # with the end of the log.
        self._over = False
        # Seconds for which a preamble is held at most, and the timer of that; None: until there is
        # content.
        self.patience: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._splitter = Splitter(stream.max_bytes)
        # The path of what holds events, if anything does.
        self._holding_path: HoldingPath | None = None

    @property
    def progress(self) -> int:
        """A number that grows with what the provider sends."""
        return self._stream.last + self._splitter.unseen

    @property
    def kept_pieces(self) -> int:
        """How many pieces of the answer have come that are not shown."""
        return self._splitter.unseen

    def hold(self, splitter: Splitter, path: HoldingPath) -> None:
        """Get events from *splitter*, which keeps some of them back: those that take *path*. An id
        that a client may need comes with these.
        """
        self._splitter, self._holding_path, self.patience = splitter, path, None

    def feed(self, data: bytes) -> bool:
        """Append the events that are whole now; return False at the end of the answer.

        Raises:
            ProviderFault: an event is too long, is not JSON, or reports an error that the log does
                not end with.
        """
        try:
            block = self._splitter.feed(data)
            return not block or self._take(block)
        except (EventTooLong, BadEvent, ErrorEvent) as exc:
            raise event_fault(exc) from exc

    def take(self, block: bytes) -> None:
        """Append the events of *block*, which its splitter has kept back and which have no end.

        Raises:
            ProviderFault: as `feed`.
        """
        try:
            self._take(block)
        except (BadEvent, ErrorEvent) as exc:
            raise event_fault(exc) from exc

    def end(self) -> None:
        """Complete the log, since the body ended without an end mark.

        Raises:
            ProviderDisconnected: the answer was not complete.
            ProviderBadResponse: the body was empty, or what has come is no answer.
        """
        if not self._splitter.begun:
            raise ProviderBadResponse("the provider's stream is empty")
        if finished := self._splitter.finish():
            self.take(finished)
        if not self._complete_without_mark or self._splitter.held:
            raise ProviderDisconnected(f"the provider's stream ended without {self.end_mark}")
        self._over = True
        self._add_mark()
        self._complete()

    def broken(self, fault: Exception) -> bool:
        """Return whether the answer is complete although it breaks off now with *fault*, since
        only its end mark was missing. The log is completed then.
        """
        if not isinstance(fault, BREAKS) or self._stream.ended:
            return False
        try:
            self.end()
        except ProviderFault:
            return False
        return True

    def fast(self) -> Path | None:
        """Return the path by which the next event may go: that of the stream, or of what holds
        it. None if this sink has to see it.
        """
        path = self._holding_path
        return path if path is not None and path.ready else None

    def let_go(self) -> None:
        """Show the preamble that is held, if there is one: no other attempt follows."""
        self._timer = None

    def forget(self) -> None:
        """Drop what is held: nothing more comes; a second call does nothing."""
        self._stop_timer()

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

    def _wait(self) -> bool:
        """Return whether a preamble may be held for longer; it is let go when it is time."""
        if self.patience is not None and self._timer is None:
            if self.patience <= 0:
                return False
            self._timer = asyncio.get_running_loop().call_later(self.patience, self.let_go)
        return True

    def _commit(self) -> None:
        """Note the first content, which is appended next: no other attempt follows."""
        if self._timer is not None:
            self._stop_timer()
        self._stream.mark_answered()

    def _stop_timer(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    def _add_mark(self) -> None:  # noqa: B027 - as a rule, `_complete` does
        """Append the end mark that has not come, where it is no part of `_complete`."""

    def _complete(self) -> None:
        """End the log well."""
        complete(self._stream)


class PassingSink(StreamSink):
    """Appends the provider's bytes, as they are, to a log: one entry for each read."""

    # The blocks of the preamble that are held, and how many events they have.
    _held: Sequence[bytes] = ()
    _held_events = 0
    # Whether the answer has ended well by an event that is to be shown.
    _closes = False

    def let_go(self) -> None:
        """Show the preamble that is held."""
        super().let_go()
        if self._held and not self._stream.ended:
            self._show(self._release())

    def forget(self) -> None:
        """Drop the preamble that is held."""
        super().forget()
        if self._held:
            self._drop_held()

    def _take(self, block: bytes) -> bool:
        events, named, broken = plain_events(block), 0, False
        if not events:
            named = _named_events(block)
            if not named and not _plausible(block):
                block, broken = before_broken(block), True
        shown, ended, error = self._up_to_end(block, events)
        if ended or error or broken:
            self._over, self._closes = True, not (error or broken)
        if shown:
            if shown is block:
                events = events or named
            elif events:
                events = shown.count(BETWEEN) + 1
            if not self._stream.answered_at and (released := self._hold(shown)) is not shown:
                shown, events = released, 0
            self._show(shown, events)
        if not self._over:
            return True
        if error:
            fault = self._fault(error)
            if not self._stream.answered or isinstance(fault, ProviderAuthError):
                # Another attempt may follow; and an error about our key is never shown.
                raise fault
            if self._stream.transcript is not None:
                # Another attempt may say the rest; else this event is the end.
                fault.event = error
                raise fault
            self._end_with_error(error, fault)
            return False
        if not ended:
            raise ProviderBadResponse("the provider sent an event that is not JSON")
        if not self._stream.answered_at:
            if (failure := self._failure(self._held)) is not None:
                raise failure
            # An answer without content is one.
            self._show(self._release())
        self._complete()
        return False

    @abstractmethod
    def _up_to_end(self, block: bytes, plain: int = 0) -> tuple[bytes, bool, bytes]:
        """Return the events of *block* that pass, whether they end the answer well, or else the
        event that reports an error.

        The events behind either end are dropped: a good end after an error would be none. *plain*
        is the number of its `plain_events`.
        """

    def _failure(self, held: Sequence[bytes]) -> ProviderFault | None:  # noqa: ARG002 - as a rule, none
        """Return the fault that the end of an answer without content means, with *held*, its last
        events; None if that is a good end.
        """
        return None

    @abstractmethod
    def _fault(self, event: bytes) -> ProviderFault:
        """Return the fault that *event* reports."""

    def _end_with_error(self, event: bytes, fault: ProviderFault) -> None:
        """End the log with *fault*, which the provider has reported in *event*."""
        end_with_error(self._stream, event, fault)

    def _hold(self, block: bytes) -> bytes:
        """Return what is to be shown now that *block* has come: nothing, as long as there is no
        content.
        """
        count, content = 0, False
        for event in eventstream.each(block):
            count += 1
            # Without data it is no event (WHATWG HTML 9.2.6).
            if event.data and self._is_content(event.data):
                content = True
                break
        if not count and not self._held:
            # Comments in front of any event.
            return block
        self._held = (*self._held, block)
        self._held_events += count
        if content:
            return self._release()
        size = sum(map(len, self._held))
        if size > MAX_HELD_BYTES or self._held_events > MAX_HELD_EVENTS or not self._wait():
            return self._release()
        if size - self._stream.text_bytes > TEXT_STEP:
            self._count_held(size)
        return b""

    def _release(self) -> bytes:
        """Return what is held, as a part of the answer from now on."""
        held = b"".join(self._held)
        self._drop_held()
        self._commit()
        return held

    def _drop_held(self) -> None:
        self._held, self._held_events = (), 0
        if self._stream.text_bytes:
            self._count_held(0)

    def _count_held(self, size: int) -> None:
        """Count for the log that *size* bytes are held beside it."""
        self._stream.text_bytes = size
        self._stream.recount()

    def _show(self, block: bytes, events: int = 0) -> None:
        """Append *block*, unless it is empty; it has so many *events*, or 0 if that is not known."""
        if block:
            events = events or eventstream.count(block)
            if self._closes:
                self._stream.close_with(block, events)
            else:
                self._stream.forward(block, events, more=self._over)


def complete(stream: Stream, data: bytes = b"", **metadata: object) -> None:
    """End the log of *stream* well: with *data* for the faces that pass on bytes, and this
    *metadata* for the others.
    """
    outcome = stream.outcome
    metadata |= {"provider": outcome.provider, "model": outcome.model}
    if outcome.seams:
        metadata["seams"] = [seam.described() for seam in outcome.seams]
    if outcome.held_for is not None and outcome.attempts > 1:
        metadata["attempts"] = outcome.attempts
    if outcome.turn_read is not None and (lost := outcome.find_loss()) is not None and lost.text:
        # No event: a comment, for those who read an event stream.
        stream.append(entries.CHUNK, data=f": cache {lost.text}\n\n".encode(), count=0, more=True)
    stream.finish({"metadata": metadata}, data)


def end_with_error(stream: Stream, event: bytes, fault: ProviderFault) -> None:
    """End the log of *stream*, which has the provider's bytes, with *fault*: by its own *event*,
    which passes.
    """
    stream.forward(event, 1, more=True)
    stream.error = fault
    # Without `data`, since that event is it.
    stream.end(entries.ERROR, fault.as_chunk())


def plain_events(block: bytes) -> int:
    """Return how many events *block* has before a `[DONE]` at its end, if each is one line of data
    that is plausible; 0 otherwise.

    Most blocks are like that, however many events there are: they are looked at together.
    """
    objects = block.removesuffix(DONE)
    if (
        not objects.startswith(b"data: {")
        or not objects.endswith(b"}\n\n")
        or objects.find(b"\r") >= 0
        or not (objects.isascii() or eventstream.utf8(objects))
    ):
        return 0
    # With many matches this takes a third of the time of three counts.
    parts = objects.split(BETWEEN)
    rest = b"".join(parts)
    # No line ends but those between two events and at the end.
    return len(parts) if rest.find(b"\n") == len(rest) - 2 else 0


def plausible(block: bytes) -> bool:
    """Return whether the events of a block may be JSON objects: `{…}`, in UTF-8.

    The bytes between the braces are not parsed. This finds truncated events and half characters,
    the faults that occur; parsing each event would take 0.5 µs of the 12 that an event costs in
    all.
    """
    return plain_events(block) > 0 or _named_events(block) > 0 or _plausible(block)


def _named_events(block: bytes) -> int:
    """Return what `plain_events` does, for events with a name and a line of data."""
    count = eventstream.count_named(block)
    return count if count and (block.isascii() or eventstream.utf8(block)) else 0


def _plausible(block: bytes) -> bool:
    """Return what `plausible` does, by each event."""
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


_USAGE, _DELTA = b'"usage"', b'"delta"'
# An event says that it has no choice by the member that this finds, and this matches.
_CHOICES, _NO_CHOICES = b'"choices"', re.compile(rb'"choices"\s*:\s*\[\s*\]')
# How most events with a text begin it.
_TEXTS = b'"delta":{"content":"', b'"delta": {"content": "'


class EventSink(PassingSink):
    """Appends the events of a chat completion to a log."""

    # Whether a finish_reason has come, and no more of another choice since.
    _finished = False
    # The choices, if several were asked for: the finish of one is not that of another.
    choices: Choices | None = None

    def __init__(
        self,
        stream: Stream,
        is_content: Callable[[bytes], bool] = is_content,
        *,
        hides_usage: bool = False,
    ) -> None:
        super().__init__(stream, is_content)
        # Whether an event that has nothing but the usage is left out: no client has asked for it.
        self._hides_usage = hides_usage

    def fast(self) -> Path | None:
        """Return the path; not the stream's after a finish_reason, since usage may follow, nor
        where every event may begin a choice.
        """
        if self._finished or self.choices is not None or not self._splitter.idle:
            return super().fast()
        return self._stream.open_fast_path()

    @property
    def _complete_without_mark(self) -> bool:
        return self._finished and (self.choices is None or not self.choices.open)

    def _hold(self, block: bytes) -> bytes:
        for mark in _TEXTS:
            at = block.find(mark)
            if at >= 0 and not block.startswith(b'"', at + len(mark)):
                # That is content, whatever is in front of it, and nothing has to be parsed.
                if not self._held:
                    self._commit()
                    return block
                self._held = (*self._held, block)
                return self._release()
        return super()._hold(block)

    def _up_to_end(self, block: bytes, plain: int = 0) -> tuple[bytes, bool, bytes]:
        if plain:
            # No other line than the last may be the end mark.
            if ended := block.endswith(DONE):
                block = block[: -len(DONE)]
        elif ended := (start := _done_line(block)) >= 0:
            block = block[:start]
        # Not `in`: for bytes that costs more than twice as much. From the end, where it is.
        odd, at = escaped(block), -1
        usage = odd or block.rfind(_USAGE) >= 0
        if usage and self._hides_usage:
            at = -1 if odd else _no_choices(block, len(block))
            if odd or at >= 0:
                block = self._without_usage(block, at, plain)
        if at < 0 or not ended:
            if odd or may_finish(block) or (self._finished and block.rfind(_DELTA) >= 0):
                self._finished = finished(block, before=self._finished)
            if usage and at < 0 and self._finished:
                self._stream.outcome.usage = usage_in(block) or self._stream.outcome.usage
        if self.choices is not None:
            for event in eventstream.each(block):
                self.choices.note(event.data)
        if odd or block.find(ERROR_NAME) >= 0:
            block, error = before_error(block)
            return block, ended and not error, error
        return block, ended, b""

    def _without_usage(self, block: bytes, at: int, plain: int) -> bytes:
        """Return *block* without the events that have nothing but the usage; note the last one.

        The last event without a choice says that *at* this index; -1: names may have escapes.
        *plain*: as in `_up_to_end`.
        """
        outcome = self._stream.outcome
        if at < 0 or (not plain and block.find(b"\r") >= 0):
            outcome.usage = usage_in(block) or outcome.usage
            return b"".join(
                each
                for each in eventstream.pieces(block)
                if (at >= 0 and each.find(_USAGE) < 0) or only_usage(each) is None
            )
        last: dict[str, Any] | None = None
        # What follows the last of them.
        rest = block
        while at >= 0:
            # -1 + 2: there is no blank line in front.
            start = block.rfind(b"\n\n", 0, at) + 2
            start = start if start > 1 else 0
            end = block.find(b"\n\n", at) + 2
            end = end if end > 1 else len(block)
            usage = (
                _only_usage(block[start + 6 : end - 2]) if plain else only_usage(block[start:end])
            )
            if usage is not None:
                after = block[end:]
                if last is None:
                    last, rest = bounded(usage), after
                block = block[:start] + after
            at = _no_choices(block, start) if block.rfind(_USAGE, 0, start) >= 0 else -1
        if rest and rest.find(_USAGE) >= 0:
            last = usage_in(rest) or last
        outcome.usage = last or outcome.usage
        return block

    def _fault(self, event: bytes) -> ProviderFault:
        return error_object_fault((error_in(event) or {}).get("error"))

    def _complete(self) -> None:
        complete(self._stream, DONE)


def _no_choices(block: bytes, end: int) -> int:
    """Return where *block*, before *end*, says last that an event has no choice; or -1."""
    at = block.rfind(_CHOICES, 0, end)
    while at >= 0 and _NO_CHOICES.match(block, at) is None:
        at = block.rfind(_CHOICES, 0, at)
    return at


def only_usage(event: bytes) -> dict[str, Any] | None:
    """Return the usage in *event*; None if it has none, or has anything else for a client."""
    return _only_usage(b"".join([part.data for part in eventstream.parse(event)]))


def _only_usage(data: bytes) -> dict[str, Any] | None:
    """Return what `only_usage` does, for an event with this *data*."""
    try:
        content = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(content, dict) or content.get("choices") != [] or content.get("error"):
        return None
    usage = content.get("usage")
    return tiered(usage, content) if isinstance(usage, dict) else None


def before_error(block: bytes, kind: str = "") -> tuple[bytes, bytes]:
    """Return the events of *block* before the first that reports an error, and that event; b"" if
    none does.

    *kind* is that of `error_in`.
    """
    events = eventstream.split(block)
    for number, event in enumerate(events):
        if error_in(event, kind) is not None:
            return b"".join(events[:number]), event
    return block, b""


def error_in(event: bytes, kind: str = "") -> dict[str, Any] | None:
    """Return the content of *event* if it reports an error; otherwise None.

    The event has an error object; or, with *kind*, it is an event of that type.
    """
    for part in eventstream.parse(event):
        try:
            content = orjson.loads(part.data)
        except orjson.JSONDecodeError:
            continue
        if isinstance(content, dict) and (
            content.get("error") or (kind and content.get("type") == kind)
        ):
            return content
    return None


def finished(block: bytes, *, before: bool) -> bool:
    """Return whether the last event of *block* that has any content has a finish_reason.

    Without such an event, as *before*. Where an answer has several choices, one of them may end
    while another goes on.
    """
    # It is in the last event, as a rule.
    start = block.rfind(b"\n\n", 0, -2) + 2
    start = start if start > 1 else 0
    if block.startswith(b"data: {", start) and block.find(b"\n", start) == len(block) - 2:
        finish = _finish(block[start + 6 : -2])
        if finish is not None:
            return finish
    for event in eventstream.each(block, backwards=True):
        if event.data.startswith(b"{"):
            finish = _finish(event.data)
            if finish is not None:
                return finish
    return before


def _finish(data: bytes) -> bool | None:
    """Return whether an event with this *data* has a finish_reason; None if it has no content of a
    choice.
    """
    try:
        choices = loaded(data).get("choices")
    except BadEvent:
        # Whatever it is.
        return False
    if not isinstance(choices, list) or not choices:
        return None
    reasons = [choice.get("finish_reason") for choice in choices if isinstance(choice, dict)]
    if any(isinstance(reason, str) and reason for reason in reasons):
        return True
    return any(isinstance(reason, str) for reason in reasons) if is_content(data) else None


def usage_in(block: bytes) -> dict[str, Any] | None:
    """Return the usage in the last event of *block* that has one; None if no event has.

    It is the usage of a chunk, or of the response in an event.
    """
    for event in eventstream.each(block, backwards=True):
        if event.data.find(_USAGE) < 0 and not escaped(event.data):
            continue
        try:
            content = orjson.loads(event.data)
        except orjson.JSONDecodeError:
            continue
        if (usage := usage_of(content)) is not None:
            return bounded(usage)
    return None


def _done_line(block: bytes) -> int:
    """Return the index at which the line `data: [DONE]` begins, -1 if there is none."""
    index = -1
    while (index := block.find(b"[DONE]", index + 1)) >= 0:
        line = block[max(0, index - 8) : index].rstrip(b" ")
        if line.endswith((b"\ndata:", b"\rdata:")) or line == b"data:":
            return block.rindex(b"data:", 0, index)
    return -1


# Check each event as `plausible` does.
SMALL_PART_BYTES = 1024


class BodySink:
    """Collects a body.

    Always: it holds at most *max_bytes*, which *held* counts; they cost little more in memory, in
    however many parts they come.
    """

    def __init__(self, max_bytes: int, held: Held | None = None) -> None:
        if held is not None and held.size:
            held.reset()
        self._held = held
        self._parts: list[bytes | bytearray] = []
        # The bytes that have come so far.
        self.progress = 0
        self._max_bytes = max_bytes

    @property
    def body(self) -> bytes:
        """The bytes that have come so far."""
        return b"".join(self._parts)

    def feed(self, data: bytes) -> bool:
        """Keep a part of the body.

        Raises:
            ProviderBadResponse: the body has more than *max_bytes*.
            ServerAtCapacity: all that is kept would be more than `max_kept_bytes`.
        """
        size = len(data)
        if self._held is not None:
            self._held.grow(size)
        self.progress += size
        if self.progress > self._max_bytes:
            raise ProviderBadResponse(f"an answer of more than {self._max_bytes} bytes")
        parts = self._parts
        if parts and size < SMALL_PART_BYTES:
            last = parts[-1]
            if isinstance(last, bytearray):
                last += data
            else:
                parts.append(bytearray(data))
        else:
            # As a rule a body comes in one part, which is never copied.
            parts.append(data)
        return True

    def end(self) -> None:
        """Do nothing: the body is complete."""

    def broken(self, _fault: Exception) -> bool:
        """Return False: half a body is none."""
        return False

    def fast(self) -> None:
        """Return None: every part is collected."""
