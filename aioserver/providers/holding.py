"""Holding: what of a streamed turn waits for its finish, in front of the sink.

An agent acts when a call is whole, and nobody has seen what is held. So a turn that breaks off
before its finish can be asked for again, on any engine, without a seam (gateway/attempts.py):

    the word      held until the finish                        shown as it comes
    `calls`       from the first piece of a call on, all;      text and reasoning in front of it
                  structured output; signed reasoning in
                  front of anything else, until text
    `turn`        all of it                                    nothing

With `preamble` there is no such object. A tool that runs at the provider must not run twice: where
one begins, what is held is *let go*, and the rest comes as it comes. The same happens where it has
more than half of `max_stream_bytes`, or where there is no room for it.

The sinks never see an event that is dropped, so that nothing of them has to be rolled back: ids and
numbers have no holes, and this one mechanism serves all faces. What is released comes as one block.

This file is one concept: what is kept of a turn decides what may be shown of it.
"""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING

from aioserver.errors import AioserverError, ServerAtCapacity
from aioserver.protocol import eventstream
from aioserver.protocol.eventstream import EventTooLong
from aioserver.protocol.parts import Part
from aioserver.protocol.request_options import TURN
from aioserver.provider_errors import ProviderDisconnected
from aioserver.providers.error_mapping import event_fault
from aioserver.telemetry.outcome import LET_GO, LOST, RESCUED, WHOLE

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.providers.api import Api
    from aioserver.providers.request import ProviderRequest
    from aioserver.providers.sinks import StreamSink
    from aioserver.streams.contracts import Held, Path
    from aioserver.streams.stream import Stream

# Bytes by which what is held grows before it is counted.
COUNT_STEP = 4096


class Holding:
    """Keeps events of an answer of *api* in front of *sink*, which fills *stream*, as the word of
    *request* says.

    Always: what `sink` is fed is a beginning of what has come, cut between two events, unless an
    error has dropped what was held. *on_show* is called before the first of it.
    """

    def __init__(
        self, sink: StreamSink, stream: Stream, request: ProviderRequest, api: Api
    ) -> None:
        self.sink = sink
        self.on_show: Callable[[], None] | None = None
        # How many events have come that were not shown.
        self.unseen = 0
        self._stream, self._request = stream, request
        self._part, self._marks = api.part, api.held_marks
        self._splitter = eventstream.Splitter(stream.max_bytes)
        self._held = bytearray()
        self._max_held = stream.max_bytes // 2
        self._counted: Held | None = None
        self._whole = request.hold == TURN
        self._structured = request.structured
        # Whether reasoning is signed, so that it stands in one answer with its own calls alone.
        self._signed = api.signs_reasoning
        # Whether events are held now; whether it is for nothing but reasoning; and whether all
        # that comes is passed on, since the turn has a finish, or was let go.
        self._holds, self._only_reasoning, self._passes = self._whole, False, False
        self._received = False
        self._finishes = 0
        # Whether room is looked for now, for what is held; and whether who needs the room of the
        # body may have it.
        self._counting = self._spares = False
        # Since when events are held.
        self._since = 0.0
        # With what the sink has answered what was let go.
        self._fault: AioserverError | None = None
        self._ended = False

    @property
    def progress(self) -> int:
        """A number that grows with what the provider says."""
        return self.unseen + self.sink.progress

    @property
    def kept_pieces(self) -> int:
        """How many pieces of the answer have come that are still to be shown, or were dropped."""
        return self.unseen + self.sink.kept_pieces

    def feed(self, data: bytes) -> bool:
        """Pass on what may be shown; return False at the end of the answer.

        Raises:
            ProviderFault: as `StreamSink.feed`.
        """
        try:
            block = self._splitter.feed(data)
        except EventTooLong as exc:
            raise event_fault(exc) from exc
        if block and not self._passes and (self._holds or self._looks(block)):
            block = self._take(block)
        return self._feed(block) if block or self._fault or self._ended else True

    def end(self) -> None:
        """Complete the log, as `StreamSink.end`.

        Raises:
            ProviderFault: as there; the turn has no finish.
        """
        if self._held:
            raise ProviderDisconnected(f"the provider's stream ended without {self.sink.end_mark}")
        self.sink.end()

    def broken(self, fault: Exception) -> bool:
        """Return whether the answer is complete, as `StreamSink.broken`."""
        return not self._held and self.sink.broken(fault)

    def fast(self) -> Path | None:
        """Return the fast path of the sink, if nothing is held; it leaves calls to this object."""
        if self._passes:
            return self.sink.fast()
        if self._holds or not self._splitter.idle or self._structured:
            return None
        path = self.sink.fast()
        return None if path is None else GuardedPath(path, self._marks)

    def let_go(self) -> None:
        """Show what is held, before its time: no other attempt follows."""
        if not self._held or self._counting:
            return
        self._passes = True
        block = self._release(LET_GO)
        self._stream.mark_answered()
        try:
            self._ended = not self._feed(block)
        except AioserverError as fault:
            # It belongs to this answer, and not to who needs the room.
            self._fault = fault
        # Nobody can go on behind a call.
        self._stream.drop_said()

    def forget(self) -> None:
        """Drop what is held: nothing more comes; a second call does nothing."""
        if self._held:
            self._drop()
        if not self._stream.answered:
            self.sink.forget()
        if self._spares:
            # Another attempt sends it again.
            self._spares = False
            self._request.need_body()

    def _feed(self, block: bytes) -> bool:
        if self._fault is not None:
            raise self._fault
        if self._ended:
            return False
        if (on_show := self.on_show) is not None:
            self.on_show = None
            on_show()
        return self.sink.feed(block)

    def _looks(self, block: bytes) -> bool:
        """Return whether an event of *block* may be one that is held."""
        if self._structured:
            return True
        return any(block.find(mark) >= 0 for mark in self._marks)

    def _take(self, block: bytes) -> bytes:
        """Return what may be shown, now that *block* has come."""
        pieces = eventstream.pieces(block)
        shown: list[bytes] = []
        for number, piece in enumerate(pieces):
            part = self._part_of(piece)
            if part is None:
                # A comment; in front of any event that is held it passes.
                if self._held:
                    self._held += piece
                else:
                    shown.append(piece)
                continue
            if part is Part.ERROR:
                # The sink gets it alone, and ends the answer by it.
                self._drop()
                self._passes = True
                return b"".join((*shown, *pieces[number:]))
            if not self._holds:
                self._holds = self._begins(part, shown=bool(shown))
                self._only_reasoning = part is Part.REASONING
            if part > Part.PREAMBLE:
                self._note_received()
            if not self._holds:
                shown.append(piece)
                continue
            if self._only_reasoning and part in (Part.TEXT, Part.CALL):
                self._only_reasoning = False
                if part is Part.TEXT and not self._structured:
                    self._holds = False
                    shown += (self._release(), piece)
                    continue
            too_large = len(self._held) + len(piece) > self._max_held
            if self._released_by(part) or too_large:
                self._passes = True
                result = LET_GO if too_large or part is Part.HOSTED else WHOLE
                return b"".join((*shown, self._release(result), *pieces[number:]))
            self._held += piece
            self.unseen += 1
        if self._held and not self._count():
            self._passes = True
            return b"".join((*shown, self._release(LET_GO)))
        return b"".join(shown)

    def _part_of(self, piece: bytes) -> Part | None:
        """Return what *piece* brings; None if it is no event."""
        events = [event for event in eventstream.parse(piece) if event.data]
        return self._part(events[0].data) if events else None

    def _begins(self, part: Part, *, shown: bool) -> bool:
        """Return whether an event that brings *part* is held, and what follows; *shown*: something
        is in front of it in its block.
        """
        if part is Part.CALL:
            return True
        if part is Part.REASONING:
            return self._signed and not (shown or self._stream.answered)
        return part is Part.TEXT and self._structured

    def _released_by(self, part: Part) -> bool:
        """Return whether what is held is shown now that *part* has come."""
        if part is Part.FINISH:
            self._finishes += 1
            # The finish of one choice is not that of another.
            return self._finishes >= self._request.choices
        return part in (Part.HOSTED, Part.END)

    def _note_received(self) -> None:
        """Note the first content, which may be held: the provider has answered."""
        if not self._received:
            self._received = True
            self._stream.mark_received()
        if self._holds and not self._since:
            self._since = monotonic()
            # So far.
            self._stream.outcome.turn = LOST
            if not self._stream.answered:
                self._spares = True
                self._request.spare_body(self.let_go)

    def _release(self, result: str = "") -> bytes:
        """Return what is held, as a part of the answer from now on. *result* is what has become of
        the turn by that; empty if more of it may be held.
        """
        held, outcome = bytes(self._held), self._stream.outcome
        self.unseen = 0
        self._held.clear()
        self._count_nothing()
        if self._spares:
            # What is shown next says what becomes of the body.
            self._spares = False
            self._request.need_body()
        if self._since:
            outcome.turn = RESCUED if result == WHOLE and outcome.cuts else result
            outcome.held_for = max(outcome.held_for, monotonic() - self._since)
            self._since = 0.0
        return held

    def _drop(self) -> None:
        """Drop what is held: the turn has broken off."""
        self._stream.outcome.cuts += bool(self._since)
        self._since = 0.0
        self._held.clear()
        self._count_nothing()

    def _count(self) -> bool:
        """Count what is held, in steps; return False where there is no room for it."""
        size = len(self._held)
        if self._counted is None:
            self._counted = self._stream.hold()
        if self._counted is None or size - self._counted.size < COUNT_STEP:
            return True
        self._counting = True
        try:
            self._counted.grow(size - self._counted.size)
        except ServerAtCapacity:
            return False
        finally:
            self._counting = False
        return True

    def _count_nothing(self) -> None:
        if self._counted is not None:
            self._counted.reset()


class GuardedPath:
    """A fast path that leaves each read with one of these *marks* to the sink: it may have a piece
    of a call.
    """

    __slots__ = ("_marks", "_path")

    def __init__(self, path: Path, marks: tuple[bytes, ...]) -> None:
        self._path, self._marks = path, marks

    def forward(self, read: bytes) -> bool:
        """Forward *read*, as `FastPath.forward`."""
        for mark in self._marks:
            if read.find(mark) >= 0:
                return False
        return self._path.forward(read)

    def close(self) -> None:
        """Forward nothing from now on, as `FastPath.close`."""
        self._path.close()

    @property
    def read_at(self) -> float:
        """When the provider said something last, by either path."""
        return self._path.read_at

    @read_at.setter
    def read_at(self, moment: float) -> None:
        self._path.read_at = moment

    @property
    def forwarded_at(self) -> float:
        """When it has forwarded a read last."""
        return self._path.forwarded_at

    @forwarded_at.setter
    def forwarded_at(self, moment: float) -> None:
        self._path.forwarded_at = moment
