"""The readers of a log: a client's cursor into it, and one that waits for a condition.

A log keeps no list of what each of its readers has to get: a reader is an index into it, and what
it has not seen is rendered when its writer has room for it.
"""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import TYPE_CHECKING, Protocol

from aioserver.errors import ResumeGap

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.protocol.openai import Shape
    from aioserver.streams.formats import Format
    from aioserver.streams.stream import Path, Stream


class CursorWriter(Protocol):
    """The writer of a client's socket (writer.py), as its cursors see it."""

    @property
    def blocked(self) -> bool:
        """Whether the client does not take what it was sent, at the moment."""

    def write_now(self, data: bytes) -> bool:
        """Write *data*, the next bytes of the only cursor, unless something must go before it."""

    def open_fast_path(self, cursor: Cursor, shape: Shape | None) -> Path | None:
        """Return the fast path of *cursor*, the only one, if nothing is in its way."""

    def notify(self, cursor: Cursor) -> None:
        """Write what *cursor* has not rendered, as soon as the client takes it."""

    def send(self, data: bytes) -> None:
        """Write a control frame or a comment."""


class Cursor:
    """One reader of one stream: the cursor, and how its events look on this face.

    *at* is the index of the next entry, counted from the start of the log; *skip* says how many of
    its events have been seen already.
    """

    __slots__ = (
        "_render_position",
        "_since",
        "_writer",
        "format",
        "next_index",
        "on_end",
        "removed",
        "skip",
        "stream",
    )

    def __init__(
        self,
        writer: CursorWriter,
        stream: Stream,
        after: int,
        event_format: Format,
        render_position: Callable[[int, float], bytes] | None,
        on_end: Callable[[Cursor], None],
    ) -> None:
        self.stream = stream
        self.next_index, self.skip = stream.locate(after)
        self.on_end = on_end
        self.removed = False
        self._since = monotonic()
        self._writer = writer
        self.format = event_format
        self._render_position = render_position

    def write_now(self, data: bytes) -> bool:
        """Write *data*, which no log will keep, unless something has to be written before it."""
        if self._writer.write_now(data):
            self.next_index += 1
            return True
        return False

    def open_fast_path(self, shape: Shape | None) -> Path | None:
        """The writer's fast path, if this has written all there is and nothing is in its way."""
        if self.next_index != self.stream.offset + len(self.stream.entries):
            return None
        return self._writer.open_fast_path(self, shape)

    def notify(self) -> None:
        """The log has grown."""
        self._writer.notify(self)

    def report_position(self, position: int, eta: float) -> None:
        """Pass the position in the provider's line on, where this face shows it.

        Not to a client that takes nothing: when it does, it would be an old one.
        """
        if self._render_position is not None and not self._writer.blocked:
            self._writer.send(self._render_position(position, eta))

    def render_newest(self) -> bytes:
        """The entry just appended, rendered and passed; b"" where more than it is to be taken."""
        stream = self.stream
        entries = stream.entries
        if stream.ended or self.next_index + 1 != stream.offset + len(entries):
            return b""
        self.next_index += 1
        return self.format.render_newest(stream, entries[-1])

    def note_delay(self, now: float, blocked_until: float) -> None:
        """Note how long its next event has waited for us; up to *blocked_until* it was its client.

        What was there before this reader came has waited since it came.
        """
        stream = self.stream
        index = self.next_index - stream.offset
        if 0 <= index < len(stream.entries):
            ready = max(stream.entries[index].received_at, self._since, blocked_until)
            stream.record.delay = max(stream.record.delay, now - ready)

    def note_blocked(self, since: float) -> None:
        """Note that its client has taken nothing *since* then."""
        record = self.stream.record
        record.stuck = max(record.stuck, monotonic() - since)

    def render(self, parts: list[bytes], room: int) -> bool:
        """Render up to about *room* bytes into *parts*; whether the cursor has caught up.

        Raises:
            ResumeGap: the log has let go of what this reader has not seen.
        """
        stream = self.stream
        entries, event_format = stream.entries, self.format
        index = self.next_index - stream.offset
        if index < 0:
            raise ResumeGap("the reader fell behind what is kept")
        end = len(entries)
        while index < end and room > 0:
            entry, skip = entries[index], self.skip
            index += 1
            if index == end and not skip:
                part = event_format.render_newest(stream, entry)
            else:
                part = event_format.render(stream, entry, skip)
                self.skip = 0
            parts.append(part)
            room -= len(part)
        self.next_index = stream.offset + index
        return index >= end


class ConditionReader:
    """A reader that takes nothing, and waits until *condition* is true of its stream.

    *reached* is then set, for good; `stop_waiting` sets it before that. Leave with `leave`, however
    the wait ends.
    """

    def __init__(self, stream: Stream, condition: Callable[[Stream], bool]) -> None:
        self.next_index = stream.offset
        self.reached: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._stream = stream
        self._condition = condition
        stream.add_reader(self)
        self.notify()

    def write_now(self, _data: bytes) -> bool:
        """Return False: the entry is appended."""
        return False

    def open_fast_path(self, _shape: Shape | None) -> None:
        """Return None: nothing is passed on."""

    def notify(self) -> None:
        """Look whether the condition holds now."""
        if not self.reached.done() and self._condition(self._stream):
            self.reached.set_result(None)

    def report_position(self, position: int, eta: float) -> None:
        """Do nothing: nobody is shown a position."""

    def stop_waiting(self) -> None:
        """Reach the end of the wait although the condition does not hold."""
        if not self.reached.done():
            self.reached.set_result(None)

    def leave(self) -> None:
        """Read no more; a second call does nothing."""
        if self in self._stream.readers:
            self._stream.remove_reader(self)
