"""A log whose events are shown to hooks, in parallel to its readers.

    provider → TappedLog ─▶ readers, as of any log
                   └─────▶ Tap, one for each hook ─▶ the task that shows them (hook_set.py)

A hook is no reader: it does not count for `resume_window`, pauses no provider, and holds no entry
back. Events that it has not taken yet are in a `Tap` with a bound of its own: beyond that the hook
is behind, and gets no more. Its task takes events at the hook's speed, after the readers were
notified.

Such a log has no fast path, on which only its reader would see an event.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any

from aioserver.protocol import eventstream
from aioserver.streams.entries import CHUNK, WholeEntry
from aioserver.streams.stream import Stream

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aioserver.hook import Refuse
    from aioserver.protocol.openai import Shape
    from aioserver.streams.contracts import WholeAnswer
    from aioserver.streams.entries import Entry

# Bytes by which a hook may be behind, and those of all hooks and answers together. Beyond the
# latter, the tap that is behind most is cut off.
MAX_BEHIND, MAX_BEHIND_TOGETHER = 1 << 20, 64 << 20
# Bytes that a hook takes at once.
TAKEN = 1 << 16


class Backlog:
    """The events that all hooks have not taken yet.

    Always: *bytes* is the sum of the sizes of *shown*, at most MAX_BEHIND_TOGETHER and one entry.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self.shown: set[Tap] = set()

    def grow(self, shown: Tap, size: int) -> None:
        """Count *size* bytes more of *shown*; the tap with the most bytes may lose its entries."""
        shown.size += size
        self.bytes += size
        while self.bytes > MAX_BEHIND_TOGETHER:
            max(self.shown, key=lambda shown: shown.size).fall_behind()


class Tap:
    """The events of one answer that one hook has still to be shown.

    Always: at most MAX_BEHIND bytes of entries wait in it behind the next one; nothing is added
    once it is *over*. *start* is called once, with the first content: an answer that fails before
    is shown to no hook.
    """

    def __init__(
        self,
        stream: Stream,
        backlog: Backlog,
        *,
        frames: bool,
        start: Callable[[Tap], None],
    ) -> None:
        self.stream = stream
        # The status with which the answer has ended; empty until then.
        self.end_status = b""
        self.over = self.behind = False
        self.size = 0
        # The task that shows it, once there is one.
        self.task: asyncio.Task[Refuse | None] | None = None
        # The body of an answer that was not streamed, and is in the log as pieces of its text.
        self.whole = b""
        # Called at the end of the answer.
        self._on_end: Callable[[], None] | None = None
        self._backlog, self._frames, self._start = backlog, frames, start
        self._started = False
        self._entries: deque[Entry] = deque()
        self._news = asyncio.Event()
        backlog.shown.add(self)

    def take(self, entry: Entry) -> None:
        """Take the newest entry of the log, whose readers are notified next."""
        if self.over or not (self._frames or entry.data or self.whole):
            return
        self._backlog.grow(self, entry.size)
        if self.over:
            return
        self._entries.append(entry)
        # The entry that is taken next may have any size.
        if self.size - self._entries[0].size > MAX_BEHIND:
            self.fall_behind()
        elif not self._started and self.stream.answered:
            self._started = True
            self._start(self)
        self._news.set()

    def end(self, status: bytes) -> None:
        """Note that the log has ended."""
        self.end_status = status
        if self.task is None:
            self.close()
        if self._on_end is not None:
            self._on_end()
        self._news.set()

    def at_end(self, call: Callable[[], None] | None) -> None:
        """Let *call* be called at the end of the answer, or now if it has ended; None cancels
        that.
        """
        self._on_end = call
        if call is not None and self.end_status:
            call()

    def fall_behind(self) -> None:
        """Drop all events: the hook has not taken them in time."""
        if self.over:
            return
        self.behind = True
        self.close()
        if not self._started:
            # There is no event to show, but there is a fault to report.
            self._started = True
            self._start(self)
        if self.task is not None:
            self.task.cancel()

    def close(self) -> None:
        """Take no more events; a second call does nothing."""
        self.over = True
        self._backlog.shown.discard(self)
        self._backlog.bytes -= self.size
        self.size = 0
        self._entries.clear()

    async def events(self) -> list[tuple[int, bytes]]:
        """Return the waiting events, some 64 KiB of them, each with its number; none at the end.
        Cancelling is safe.
        """
        events: list[tuple[int, bytes]] = []
        while not events:
            while not self._entries:
                if self.end_status or self.over:
                    return []
                self._news.clear()
                await self._news.wait()
            size = 0
            while self._entries and size < TAKEN:
                entry = self._entries.popleft()
                size += entry.size
                events += self._events_of(entry)
            self.size -= size
            self._backlog.bytes -= size
        return events

    def _events_of(self, entry: Entry) -> list[tuple[int, bytes]]:
        """Return the events of *entry* in the form of the face that began the answer."""
        if isinstance(entry, WholeEntry):
            body, self.whole = self.whole, b""
            return [(entry.first, body)] if body else []
        if self._frames:
            return list(enumerate(self.stream.frames(entry), entry.first))
        parsed = eventstream.parse(entry.data)
        return [(number, event.data) for number, event in enumerate(parsed, entry.first)]


class TappedLog(Stream):
    """A log whose events are also shown to hooks, those in *shown*.

    Always: its readers see the same events as with another log, in the same order and at the same
    moment.
    """

    __slots__ = ("shown",)

    def __init__(self, *names: Any, **bounds: Any) -> None:
        super().__init__(*names, **bounds)
        self.shown: tuple[Tap, ...] = ()

    def open_fast_path(self, shape: Shape | None = None) -> None:
        """Return None: on a fast path only the reader sees an event."""

    def forward(self, data: bytes, count: int, *, more: bool = False) -> None:
        """Append the provider's bytes of *count* whole events."""
        if self.transcript is not None and self.transcript.add(data):
            self.recount()
        self.append(CHUNK, data=data, count=count, more=more)

    def append_whole(self, answer: WholeAnswer, body: bytes, pieces: Sequence[slice] = ()) -> None:
        """Append *answer*, which was not streamed, and show its *body* to the hooks."""
        for shown in self.shown:
            shown.whole = body
        super().append_whole(answer, body, pieces)

    def add_entry(self, entry: Entry) -> None:
        """Add *entry*, of which the readers are still to be notified."""
        super().add_entry(entry)
        for shown in self.shown:
            shown.take(entry)

    def end_with(self, entry: Entry, error: Any = None) -> None:
        """Append *entry*, the last event, and report the end to the hooks."""
        try:
            super().end_with(entry, error)
        finally:
            for shown in self.shown:
                shown.take(entry)
                shown.end(entry.status)
            self.shown = ()
