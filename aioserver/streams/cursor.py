"""The readers of a log: the cursor of a client, and readers that wait for a condition.

A log has no queue for each of its readers. A reader is an index into the log, and its new entries
are rendered when its writer has room for them.
"""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import TYPE_CHECKING, Protocol

from aioserver.errors import ResumeGap, SlowClient

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.protocol.openai import Shape
    from aioserver.streams.contracts import Path, Queued
    from aioserver.streams.entries import Entry
    from aioserver.streams.formats import Format
    from aioserver.streams.stream import Stream


class CursorWriter(Protocol):
    """The writer of a client's socket (writer.py), as its cursors see it."""

    @property
    def blocked(self) -> bool:
        """Whether the client is not reading at the moment."""

    def write_now(self, data: bytes) -> bool:
        """Write *data*, the next bytes of the only cursor.

        Return False, with nothing done, if something else must be written before them.
        """

    def open_fast_path(self, cursor: Cursor, shape: Shape | None) -> Path | None:
        """Return the fast path of *cursor*; None if it can have none now: see fast_path.py."""

    def notify(self, cursor: Cursor) -> None:
        """Write what *cursor* has not rendered, as soon as the client reads again."""

    def send(self, data: bytes) -> None:
        """Write a control frame or a comment."""

    def drop(self, cursor: Cursor) -> None:
        """Unfollow the stream of *cursor*, and write its `farewell` as soon as the client
        reads.
        """


class Cursor:
    """A client's progress in one stream, and the format in which the client reads it.

    *next_index* is the index of the next entry, counted from the start of the log; *skip* is the
    number of events at that entry's start that the client has seen already. *removed* is true once
    the writer no longer follows the cursor. *farewell* is the message for a client that is
    dropped.
    """

    __slots__ = (
        "_since",
        "_writer",
        "farewell",
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
        on_end: Callable[[Cursor], None],
    ) -> None:
        self.stream = stream
        self.next_index, self.skip = stream.locate(after)
        self.on_end = on_end
        self.removed = False
        self.farewell = b""
        self._since = monotonic()
        self._writer = writer
        self.format = event_format

    def write_now(self, data: bytes) -> bool:
        """Write *data*, events as the provider sent them; return False if something else must be
        written first.
        """
        if self._writer.write_now(self.format.render_bytes(data)):
            self.next_index += 1
            return True
        return False

    def open_fast_path(self, shape: Shape | None) -> Path | None:
        """Return the writer's fast path; None if anything else must be written first."""
        if self.next_index != self.stream.offset + len(self.stream.entries):
            return None
        return self._writer.open_fast_path(self, shape)

    def notify(self) -> None:
        """Let the writer write the new entries of the log."""
        self._writer.notify(self)

    def drop(self, seen: int) -> None:
        """Leave the log, and send the client an error; a second call does nothing.

        *seen* is the number of the last event before the entry that comes next.
        """
        if not self.removed:
            error = SlowClient(
                "this client reads more slowly than the answer comes, and fell behind"
            )
            self.farewell = self.format.render_error(self.stream, error, seen + self.skip)
            self.stream.record.slow_client = True
            self._writer.drop(self)

    def report_position(self, queued: Queued) -> None:
        """Write the position of the waiting request, if the format shows it.

        A client that is not reading gets no position: it would be outdated when it is read.
        """
        render = self.format.render_position
        if render is not None and not self._writer.blocked:
            self._writer.send(render(self.stream, queued))

    def render_newest(self) -> bytes:
        """Render the entry just appended and move past it.

        Return b"", with nothing done, if more than this entry is to be written, or the log has
        ended.
        """
        stream = self.stream
        entries = stream.entries
        if stream.ended or self.next_index + 1 != stream.offset + len(entries):
            return b""
        self.next_index += 1
        return self.format.render_newest(stream, entries[-1])

    def note_blocked(self, since: float) -> None:
        """Note that the client has read nothing *since* that monotonic time: events that came
        meanwhile have waited for the client.
        """
        record, self._since = self.stream.record, monotonic()
        record.client_stall = max(record.client_stall, self._since - since)

    @property
    def behind(self) -> bool:
        """Whether there is more to render."""
        if self.farewell:
            return False
        return self.next_index < self.stream.offset + len(self.stream.entries)

    def render(self, parts: list[bytes], room: int) -> int:
        """Append up to about *room* rendered bytes to *parts*; return the remaining room. If it is
        used up, there may be more to render.

        The record of the request then has the seconds that the first of these events has waited for
        this server: since it was read, since this reader came, or since the client reads again.

        Raises:
            ResumeGap: the log has discarded events that this reader has not seen.
        """
        if self.farewell:
            parts.append(self.farewell)
            return room - len(self.farewell)
        stream = self.stream
        entries, event_format, skip = stream.entries, self.format, self.skip
        index = self.next_index - stream.offset
        if index < 0:
            raise ResumeGap("the reader fell behind the events that are kept")
        end = len(entries)
        if index < end:
            record, ready = stream.record, max(entries[index].received_at, self._since)
            record.delay = max(record.delay, monotonic() - ready)
        while index < end and room > 0:
            entry = entries[index]
            index += 1
            if index == end and not skip:
                part = event_format.render_newest(stream, entry)
            else:
                part = event_format.render(stream, entry, skip)
                self.skip = skip = 0
            parts.append(part)
            room -= len(part)
        self.next_index = stream.offset + index
        return room


class ConditionReader:
    """A reader of no events, which waits until *condition* is true of its stream.

    The future *reached* is done from then on, or from `stop_waiting`. The waiter must call
    `leave`, however the wait ends.
    """

    def __init__(self, stream: Stream, condition: Callable[[Stream], bool]) -> None:
        self.next_index = stream.offset
        self.reached: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._stream = stream
        self._condition = condition
        stream.add_reader(self)
        self.notify()

    def write_now(self, _data: bytes) -> bool:
        """Return False: the log must append the entry."""
        return False

    def open_fast_path(self, _shape: Shape | None) -> None:
        """Return None: there is no client to forward to."""

    def notify(self) -> None:
        """Check whether the condition is true now."""
        if not self.reached.done() and self._condition(self._stream):
            self.reached.set_result(None)

    def drop(self, _seen: int) -> None:
        """Do nothing: this reader reads no events, so it misses no event."""

    def report_position(self, _queued: Queued) -> None:
        """Do nothing: this reader shows no position."""

    def stop_waiting(self) -> None:
        """End the wait although the condition is not true."""
        if not self.reached.done():
            self.reached.set_result(None)

    def leave(self) -> None:
        """Stop following the stream; a second call does nothing."""
        if self in self._stream.readers:
            self._stream.remove_reader(self)


class CollectingReader(ConditionReader):
    """A reader that collects all *entries* of its stream, and waits for its end."""

    def __init__(self, stream: Stream) -> None:
        self.entries: list[Entry] = []
        super().__init__(stream, lambda stream: stream.ended)

    def notify(self) -> None:
        """Collect the new entries."""
        stream = self._stream
        self.entries += stream.entries[max(0, self.next_index - stream.offset) :]
        self.next_index = stream.offset + len(stream.entries)
        super().notify()
