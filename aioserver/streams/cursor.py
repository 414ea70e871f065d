"""One client's cursor into one log.

A log keeps no list of what each of its readers has to get: a reader is an index into it, and what
it has not seen is rendered when its writer has room for it.
"""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING

from aioserver.errors import ResumeGap

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.protocol.openai import Shape
    from aioserver.streams.fast_path import FastPath
    from aioserver.streams.formats import Format
    from aioserver.streams.stream import Stream
    from aioserver.streams.writer import Writer


class Follower:
    """One reader of one stream: the cursor, and how its events look on this face.

    *at* is the index of the next entry, counted from the start of the log; *skip* says how many of
    its events have been seen already.
    """

    __slots__ = (
        "_queued",
        "_since",
        "_writer",
        "at",
        "finished",
        "gone",
        "look",
        "skip",
        "stream",
    )

    def __init__(
        self,
        writer: Writer,
        stream: Stream,
        after: int,
        look: Format,
        queued: Callable[[int, float], bytes] | None,
        finished: Callable[[Follower], None],
    ) -> None:
        self.stream = stream
        self.at, self.skip = stream.locate(after)
        self.finished = finished
        self.gone = False
        self._since = monotonic()
        self._writer = writer
        self.look = look
        self._queued = queued

    def take_now(self, data: bytes) -> bool:
        """Write *data*, which no log will keep, unless something has to be written before it."""
        if self._writer.write_now(data):
            self.at += 1
            return True
        return False

    def fast(self, shape: Shape | None) -> FastPath | None:
        """The writer's fast path, if this has written all there is and nothing is in its way."""
        if self.at != self.stream.offset + len(self.stream.entries):
            return None
        return self._writer.fast(self, shape)

    def poke(self) -> None:
        """The log has grown."""
        self._writer.poke(self)

    def queued(self, position: int, eta: float) -> None:
        """Pass the position in the provider's line on, where this face shows it.

        Not to a client that takes nothing: when it does, it would be an old one.
        """
        if self._queued is not None and not self._writer.blocked:
            self._writer.send(self._queued(position, eta))

    def newest(self) -> bytes:
        """The entry just appended, rendered and passed; b"" where more than it is to be taken."""
        stream = self.stream
        entries = stream.entries
        if stream.ended or self.at + 1 != stream.offset + len(entries):
            return b""
        self.at += 1
        return self.look.newest(stream, entries[-1])

    def waited(self, now: float, blocked_until: float) -> None:
        """Note how long its next event has waited for us; up to *blocked_until* it was its client.

        What was there before this reader came has waited since it came.
        """
        stream = self.stream
        index = self.at - stream.offset
        if 0 <= index < len(stream.entries):
            ready = max(stream.entries[index].at, self._since, blocked_until)
            stream.record.delay = max(stream.record.delay, now - ready)

    def stuck(self, since: float) -> None:
        """Note that its client has taken nothing *since* then."""
        record = self.stream.record
        record.stuck = max(record.stuck, monotonic() - since)

    def take(self, parts: list[bytes], room: int) -> bool:
        """Render up to about *room* bytes into *parts*; whether the cursor has caught up.

        Raises:
            ResumeGap: the log has let go of what this reader has not seen.
        """
        stream = self.stream
        entries, look = stream.entries, self.look
        index = self.at - stream.offset
        if index < 0:
            raise ResumeGap("the reader fell behind what is kept")
        end = len(entries)
        while index < end and room > 0:
            entry, skip = entries[index], self.skip
            index += 1
            if index == end and not skip:
                part = look.newest(stream, entry)
            else:
                part = look.render(stream, entry, skip)
                self.skip = 0
            parts.append(part)
            room -= len(part)
        self.at = stream.offset + index
        return index >= end
