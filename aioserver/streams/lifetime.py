"""How long an answer lives that nobody reads, and one that has ended.

A stream without a reader whose request has not been sent ends at once. One that was sent goes on for
its window ("detached") and is then cancelled; a window of 0 ends it at once. There are `max_detached`
detached streams at most, and the oldest one at a provider is cancelled when a request has to wait
there: what nobody reads never costs somebody who waits. What has ended is kept for its window.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.config import settings
    from aioserver.streams.store import StreamStore
    from aioserver.streams.stream import Stream


class Lifetime:
    """Told who reads what, it ends and forgets streams in time.

    Always: a stream in `_detached` runs, was sent, has no reader, and has a timer.
    """

    def __init__(
        self, streams: StreamStore, bounds: settings.Streams, cancel: Callable[[Stream], None]
    ) -> None:
        self._streams = streams
        self._bounds = bounds
        self._cancel = cancel
        self._loop = asyncio.get_running_loop()
        self._detached: OrderedDict[Stream, None] = OrderedDict()
        self._kept: deque[tuple[float, Stream]] = deque()  # the first to be forgotten in front
        self._sweeper: asyncio.TimerHandle | None = None
        self._draining = False
        streams.on_finished = self._finished

    @property
    def detached(self) -> int:
        """How many streams run without a reader."""
        return len(self._detached)

    def apply(self, bounds: settings.Streams) -> None:
        """Use new bounds; a stream keeps the window that it began with."""
        self._bounds = bounds
        self._bound()

    def drain(self) -> None:
        """From now on what nobody reads ends at once."""
        self._draining = True
        for stream in self._streams.running():
            if not stream.readers:
                self.end(stream)

    def reader_added(self, stream: Stream) -> None:
        """*stream* has a reader (again)."""
        self._attach(stream)

    def reader_removed(self, stream: Stream) -> None:
        """A reader of *stream* has left; called after it was taken out of `readers`."""
        if stream.readers:
            return
        if stream.ended:
            if stream.window <= 0:
                self._streams.drop(stream)
        elif not stream.sent or stream.window <= 0 or self._draining:
            self.end(stream)
        else:
            self.detach(stream)

    def detach(self, stream: Stream) -> None:
        """Let *stream* run without a reader, for its window."""
        if stream.ended or stream in self._detached:
            return
        self._detached[stream] = None
        stream.attachment.timer = self._loop.call_later(stream.window, self.end, stream)
        self._bound()

    def end(self, stream: Stream, *, abandoned: bool = True) -> None:
        """Cancel *stream*, whoever reads it; *abandoned*: since nobody does."""
        self._attach(stream)
        stream.attachment.abandoned = abandoned
        self._cancel(stream)

    def make_room(self, provider: str) -> None:
        """Cancel the oldest stream without a reader at *provider*, where a request waits now."""
        for stream in self._detached:
            if stream.details.provider == provider:
                self.end(stream)
                return

    def close(self) -> None:
        """Forget nothing any more."""
        if self._sweeper is not None:
            self._sweeper.cancel()

    def _bound(self) -> None:
        while len(self._detached) > self._bounds.max_detached:
            self.end(next(iter(self._detached)))

    def _attach(self, stream: Stream) -> None:
        self._detached.pop(stream, None)
        if stream.attachment.timer is not None:
            stream.attachment.timer.cancel()
            stream.attachment.timer = None

    def _finished(self, stream: Stream) -> None:
        self._attach(stream)
        if stream.window > 0:
            self._kept.append((self._loop.time() + stream.window, stream))
            if self._sweeper is None:
                self._sweeper = self._loop.call_later(stream.window, self._sweep)
        elif not stream.readers:
            self._streams.drop(stream)

    def _sweep(self) -> None:
        """Forget what was kept for its window. One timer for all."""
        self._sweeper = None
        now = self._loop.time()
        while self._kept and self._kept[0][0] <= now:
            _, stream = self._kept.popleft()
            if stream.readers:  # a slow reader is still at it
                self._kept.append((now + max(stream.window, 1.0), stream))
            else:
                self._streams.drop(stream)
        if self._kept:
            self._sweeper = self._loop.call_later(max(0.05, self._kept[0][0] - now), self._sweep)
