"""Holding: the part of a streamed turn that waits for its finish, in front of the sink.

An agent acts when a call is whole, and the client has not seen what is held. So a turn that breaks
off before its finish can be asked for again, from any provider, without a seam
(gateway/attempts.py):

    `hold`        held until the finish                        shown as it comes
    `calls`       everything from the first piece of a call    text and reasoning in front of it
                  on; structured output; signed reasoning
                  in front of anything else, until text
    `turn`        everything                                   nothing

With `preamble` this object does not exist. A tool that runs at the provider must not run twice:
when one begins, the held events are *let go*, and the rest of the turn passes as it comes. The same
happens when they exceed half of `max_stream_bytes`, or when there is no room for them.

A `Holding` takes the place of its sink's splitter. So the sink never sees an event that is
dropped, and none of its state has to be rolled back. While events only continue held content, as
most do, it also is the fast path of the exchange: see streams/fast_path.py.
"""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import TYPE_CHECKING

import msgspec

from aioserver.errors import AioserverError, ServerAtCapacity
from aioserver.protocol import eventstream
from aioserver.protocol.eventstream import Splitter, utf8
from aioserver.protocol.json_body import ANYTHING
from aioserver.protocol.parts import ESCAPE, Choices, Part
from aioserver.protocol.request_headers import TURN
from aioserver.protocol.transcript import loaded
from aioserver.streams.fast_path import (
    ERROR_NAME,
    FINISH,
    FINISH_SPACED,
    FIRST_LINES,
    MAX_CHUNK_BYTES,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.protocol.parts import Parts
    from aioserver.providers.request import ProviderRequest
    from aioserver.providers.sinks import StreamSink
    from aioserver.streams.contracts import Held
    from aioserver.streams.stream import Stream

# Bytes by which the held events grow before they are counted again.
COUNT_STEP = 4096


class Holding(Splitter):
    """Splits an answer to *request*, by *parts*, for *sink*, which fills *stream*.

    Always: the bytes that `feed` has returned are a prefix of the bytes that have come, cut
    between two events, unless an error has dropped the held ones. *on_content* is called when
    content has come, held or not, and *on_show* before any event is shown.
    """

    def __init__(
        self,
        request: ProviderRequest,
        stream: Stream,
        sink: StreamSink,
        parts: Parts,
        on_content: Callable[[], None],
        on_show: Callable[[], None] | None,
    ) -> None:
        super().__init__(stream.max_bytes)
        self.held: bytearray = bytearray()
        self._request, self._stream, self._sink, self._parts = request, stream, sink, parts
        self._on_content, self._on_show = on_content, on_show
        self.max_held = stream.max_bytes // 2
        # The count of held bytes, and the part of the held bytes that it includes.
        self._counted: Held | None = None
        self._counted_size = 0
        # Whether events are held now; whether only until text, as signed reasoning is; and whether
        # everything passes, since the turn has a finish, or was let go.
        self._holds, self._until_text, self._passes = request.hold == TURN, False, False
        # The choices, if there are several: the finish of one is not that of another.
        self._choices = Choices() if request.choices > 1 else None
        # While nothing is held, an event is read if it has one of these: any event, if a text may
        # have to be held, or any choice may begin or end.
        self._reads_all = request.structured or self._choices is not None
        self._marks = (b"",) if self._reads_all else parts.marks
        # An event that begins like this passes while nothing is held, if there is no seam in front.
        self._plain = None if self._reads_all or on_show is not None else parts.plain
        # Since when content is held.
        self._since = 0.0
        # The fault that the sink raised when the held events were let go.
        self._fault: AioserverError | None = None
        self._counting = False
        # As a path: see `HoldingPath`. The longest silence noted so far, in seconds.
        self.ready = False
        self._clock = asyncio.get_running_loop().time
        self.forwarded_at = self.read_at = self._silence = 0.0

    @property
    def idle(self) -> bool:
        """Whether the next event may pass by, on a fast path."""
        return super().idle and (self._passes or not (self._holds or self._reads_all))

    def feed(self, chunk: bytes) -> bytes:
        """Return the events that may be shown now, as `Splitter.feed`.

        Raises:
            EventTooLong: as there.
            BadEvent: an event is not JSON, and those before it are held.
            AioserverError: the sink has failed at events that were let go.
        """
        if self._fault is not None:
            raise self._fault
        holds, plain = self._holds, self._plain
        if (
            plain is not None
            and not holds
            and chunk.startswith(plain)
            and chunk.startswith(self._whole)
            and chunk.endswith(b"\n\n")
            and chunk.count(b"\n") == 3
            and len(chunk) <= self._max
        ):
            # As `Splitter.feed` does, without a call: each event of a text comes here.
            return chunk
        block = super().feed(chunk)
        if not (holds or self._passes):
            find = block.find
            # Not `any`, nor a method: each costs more than the searches.
            for mark in self._marks:
                if find(mark) >= 0:
                    holds = True
                    break
            else:
                # One byte is found faster, and most texts have no backslash.
                holds = find(b"\\") >= 0 and find(ESCAPE) >= 0
        if holds:
            block = self._take(block) if block else block
            self.ready = self._going_on and super().idle
        if block and self._on_show is not None:
            self._on_show()
        return block

    def finish(self) -> bytes:
        """Return the held events if each choice that has begun has its finish. The provider may
        have made fewer choices than the request asks for.
        """
        if not self.held or self._choices is None or self._choices.open:
            return b""
        if self._on_show is not None:
            self._on_show()
        return self._release(let_go=False)

    def forward(self, read: bytes) -> bool:
        """Hold *read*; return False, with nothing done, if it must take the slow path."""
        size = len(read)
        if size > MAX_CHUNK_BYTES or not self.ready:
            return False
        line = FIRST_LINES[size]
        if not (
            read.startswith(line)
            and read.endswith(b"\r\n")
            and self._goes_on(read[len(line) : -2])
        ):
            return False
        self.forwarded_at = now = self._clock()
        if now - self.read_at > self._silence:
            self._silence = self._stream.record.silent(self.read_at, now)
        self.read_at = now
        return True

    def close(self) -> None:
        """Do nothing: each read that was forwarded is held."""

    def let_go(self) -> None:
        """Show the held events before the finish: no other attempt follows."""
        if not self.held or self._counting:
            return
        self._request.let_body_go()
        block = self._release(let_go=True)
        if self._on_show is not None:
            self._on_show()
        try:
            self._sink.take(block)
        except AioserverError as fault:
            # It belongs to this answer, and not to the request that needs the room.
            self._fault = fault
        self._stream.drop_said()

    def drop(self) -> None:
        """Drop the held events, since the turn has broken off; a second call does nothing."""
        # They were paid for.
        unseen = self.unseen
        if self.held:
            self._stream.outcome.dropped = len(self.held)
        self._clear()
        self.unseen = unseen

    @property
    def _all_finished(self) -> bool:
        """Whether the finish that has come is that of the last choice."""
        choices, wanted = self._choices, self._request.choices
        return choices is None or (len(choices.begun) >= wanted and not choices.open)

    def _take(self, block: bytes) -> bytes:
        """Return the events that may be shown, now that *block* has come."""
        choices = self._choices
        if self._going_on and self._goes_on(block):
            return b""
        pieces = eventstream.pieces(block)
        shown: list[bytes] = []
        for number, piece in enumerate(pieces):
            data = b"".join(each.data for each in eventstream.parse(piece))
            part = self._parts.part(data)
            if choices is not None:
                choices.note(data)
            if part is Part.ERROR:
                if self.held:
                    # An event that is not JSON ends the attempt here: a sink that passes bytes may
                    # not notice, and would show the rest of a turn without its beginning.
                    loaded(data)
                # The sink gets it alone, and ends the answer by it.
                self.drop()
                self._pass()
                return b"".join((*shown, *pieces[number:]))
            if part is Part.CALL or (part is Part.TEXT and self._request.structured):
                self._holds, self._until_text = True, False
            elif part is Part.TEXT and self._until_text:
                shown.append(self._clear())
                self._holds = self._until_text = False
            elif part is Part.REASONING and not self._holds and self._parts.signs_reasoning:
                self._holds = self._until_text = not (shown or self._stream.answered)
            if part > Part.PREAMBLE:
                self._stream.record.answered(monotonic())
                self._on_content()
            if not self._holds:
                shown.append(piece)
                continue
            if part > Part.PREAMBLE and not self._since:
                self._since = monotonic()
                if not self._stream.answered:
                    self._request.spare_body(self.let_go)
            over = part is Part.END or (part is Part.FINISH and self._all_finished)
            full = len(self.held) + len(piece) > self.max_held
            if over or full or part is Part.HOSTED:
                released = self._release(let_go=not over)
                return b"".join((*shown, released, *pieces[number:]))
            self.held += piece
            self.unseen += part > Part.PREAMBLE
        if len(self.held) - self._counted_size >= COUNT_STEP and not self._count():
            shown.append(self._release(let_go=True))
        return b"".join(shown)

    @property
    def _going_on(self) -> bool:
        """Whether content is held, and any further event is held, too."""
        return self._since > 0 and not self._until_text and self._choices is None

    def _goes_on(self, block: bytes) -> bool:
        """Hold *block* if it is one event that only continues held content, as most are, and
        return whether it is. This costs a tenth of `_take`.
        """
        opening = self._parts.opening.match(block)
        size = len(self.held) + len(block)
        if opening is None or size > self.max_held or size - self._counted_size >= COUNT_STEP:
            return False
        # Not a regular expression: over all bytes it takes ten times as long.
        find, begin = block.find, opening.end() - 1
        if (
            not block.endswith(b"}\n\n")
            or find(b"\n", begin) != len(block) - 2
            or find(b"\r", begin) >= 0
            or find(ERROR_NAME, begin) >= 0
            or find(FINISH, begin) >= 0
            or find(FINISH_SPACED, begin) >= 0
            or find(ESCAPE, begin) >= 0
            or not (block.isascii() or utf8(block))
        ):
            return False
        try:
            # The event is not loaded as JSON: that takes ten times as long.
            ANYTHING.decode(block[begin:])
        except (msgspec.DecodeError, RecursionError):
            return False
        self.held += block
        self.unseen += 1
        return True

    def _release(self, *, let_go: bool) -> bytes:
        """Return the held events, and let everything pass from now on."""
        self._pass()
        self._stream.outcome.let_go |= let_go
        return self._clear()

    def _pass(self) -> None:
        """Let everything pass from now on."""
        self._holds, self._passes = False, True

    def _clear(self) -> bytes:
        """Hold nothing any more; return the events that were held."""
        held, outcome = bytes(self.held), self._stream.outcome
        self.held.clear()
        self.ready = False
        self.unseen = 0
        self._counted_size = 0
        if self._counted is not None:
            self._counted.reset()
        if self._since:
            outcome.held_for = max(outcome.held_for or 0.0, monotonic() - self._since)
            self._since = 0.0
            if not self._stream.answered:
                # The next part that is shown decides about the body, or another attempt sends it.
                self._request.need_body()
        return held

    def _count(self) -> bool:
        """Count the held bytes; return False if there is no room for them."""
        self._counted_size = size = len(self.held)
        self._counted = counted = self._counted or self._stream.hold()
        if counted is None:
            return True
        self._counting = True
        try:
            counted.grow(size - counted.size)
        except ServerAtCapacity:
            return False
        finally:
            self._counting = False
        return True
