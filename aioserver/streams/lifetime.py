"""The lifetime of streams: how long they run without a reader, and are kept after their end.

A stream that loses its last reader ends at once if its window is 0, or if its request has not been
sent to a provider. In the latter case it is no longer found, so that a client that comes back with
its question gets an answer. Otherwise the stream is detached: it runs on for its window and is
then cancelled. At most `max_detached` streams are detached; beyond that, the owner with most of
them loses its oldest. An answer without a reader never delays a waiting client. When a request has
to wait for a provider, the oldest detached stream with a place there is cancelled, and a stream
that loses its last reader while others wait is cancelled at once. A request that waits for its
provider to come back counts as not sent, so it ends if its client has left. A stream that has
ended is kept for its window.

A stream in the *background* runs to its end with or without readers, as its client has asked. The
client comes back for the answer later. None of the above ends it, so it has bounds of its own:
there are at most half as many as `max_detached`, and they have at most half of a provider's places
(providers/capacity.py). None of them is cancelled for another one, so the owner that has most of
them is refused first (limits/shares.py).
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from operator import attrgetter
from typing import TYPE_CHECKING

from aioserver.errors import ServerAtCapacity
from aioserver.limits.shares import Places, Shares
from aioserver.streams.store import StoreObserver, StreamStore, owner_of

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable

    from aioserver.config import settings
    from aioserver.errors import AioserverError
    from aioserver.streams.stream import Stream

# Seconds between two sweeps of the streams that have ended: one sweep removes all that are due.
MIN_SWEEP_INTERVAL = 0.05
# Seconds after which a client may retry a refused background answer: these take long.
BACKGROUND_RETRY = 15.0


class Lifetime(StoreObserver):
    """Owns the store, and ends and forgets its streams in time.

    Every reader that comes or leaves must be reported to it.

    Always: a stream in `_detached` runs, has no reader, and has a timer. Its request was sent,
    unless a client began it without reading it. A stream in `_background` runs, and is never in
    `_detached`.

    *on_alias* is called with each stream that gets another name.
    """

    def __init__(
        self,
        bounds: settings.Streams,
        on_alias: Callable[[Stream, str], None] = lambda _stream, _alias: None,
    ) -> None:
        self.store = StreamStore(
            max_stream_bytes=bounds.max_stream_bytes,
            max_kept_bytes=bounds.max_kept_bytes,
            observer=self,
        )
        self._bounds = bounds
        self._on_alias = on_alias
        # Streams that were cancelled for a waiting request, and have not given their place back.
        self._giving_way: set[Stream] = set()
        self._loop = asyncio.get_running_loop()
        # The streams that run without a reader: whether the last one has left, or none has come
        # yet.
        self._detached: OrderedDict[Stream, bool] = OrderedDict()
        # The streams that run in the background, the oldest first.
        self._background: dict[Stream, None] = {}
        self._places: Places[Hashable] = Places(_background_places(bounds))
        # Ended streams by their windows, each with the loop's time at which to forget it; the next
        # one comes first.
        self._kept: dict[float, OrderedDict[Stream, float]] = {}
        self._sweeper: asyncio.TimerHandle | None = None
        # Makes the error of a stream without a reader, once the server drains.
        self._drained: Callable[[], AioserverError] | None = None

    @property
    def detached(self) -> int:
        """The number of streams that run without a reader."""
        return len(self._detached)

    @property
    def background(self) -> int:
        """The number of streams that run in the background, or wait to."""
        return len(self._background)

    @property
    def background_window(self) -> float:
        """The seconds for which an answer of the background is kept."""
        return max(self._bounds.store_window, self._bounds.resume_window)

    def check_background(self, caller: Hashable) -> None:
        """Refuse one more background stream of *caller*, if there are too many, or it has too many
        of them.

        Raises:
            ServerAtCapacity: there are too many.
        """
        places, owner = self._places, owner_of(caller)
        if not places.allows(owner):
            own = places.of(owner)
            of_you = f", {own} of them yours" if own < places.total else ""
            raise ServerAtCapacity(
                f"{places.total} answers run in the background already{of_you}: there are at most "
                f"{places.limit}, half of chat.streams.max_detached={self._bounds.max_detached}",
                retry_after=BACKGROUND_RETRY,
            )

    def run_in_background(self, stream: Stream) -> None:
        """Let *stream*, which begins, run to its end with or without readers."""
        stream.background = True
        self._background[stream] = None
        self._places.add(owner_of(stream.caller), 1)

    async def finish_background(self, seconds: float) -> None:
        """Wait until nothing runs in the background, for *seconds* at most."""
        tasks = [stream.producer for stream in self._background if stream.producer is not None]
        if tasks and seconds > 0:
            await asyncio.wait(tasks, timeout=seconds)

    def leave_background(self, stream: Stream) -> None:
        """Treat *stream*, which does not begin, as an ordinary stream again."""
        stream.background = False
        self._ran_in_background(stream)

    def _ran_in_background(self, stream: Stream) -> None:
        """Remove *stream* from the background; a second call does nothing."""
        if stream in self._background:
            del self._background[stream]
            self._places.give_back(owner_of(stream.caller))

    def apply(self, bounds: settings.Streams) -> None:
        """Apply new bounds; a stream keeps the window with which it began."""
        self._bounds = bounds
        self._places.limit = _background_places(bounds)
        self.store.apply(
            max_stream_bytes=bounds.max_stream_bytes, max_kept_bytes=bounds.max_kept_bytes
        )
        self._enforce_max_detached()

    def drain(self, reason: Callable[[], AioserverError]) -> None:
        """End every stream without a reader, now and from now on, with an error that *reason*
        makes: its client may be about to read it, and has not cancelled it.

        A background stream has as much time as a stream with a reader.
        """
        self._drained = reason
        for stream in self.store.running():
            if not (stream.readers or stream.background):
                stream.cancel_reason = reason()
                self.end(stream)

    def reader_added(self, stream: Stream) -> None:
        """Note that *stream* has a reader, or has one again."""
        stream.record.slow_client = False
        if stream.timer is not None:
            self._leave_detached(stream)

    def reader_removed(self, stream: Stream) -> None:
        """Note that a reader of *stream* has left, after its removal from `readers`."""
        if stream.readers:
            return
        if stream.ended:
            if stream.window <= 0:
                self.store.drop(stream)
            else:
                self.store.note_unread()
        elif stream.background:
            return
        elif not stream.sent or stream.window <= 0:
            self.end(stream)
        elif self._drained is not None:
            stream.cancel_reason = self._drained()
            self.end(stream)
        else:
            self.detach(stream, left=True)

    def unsent(self, stream: Stream) -> bool:
        """Note that the request of *stream* waits, and no provider has it; return whether that ends
        the stream.
        """
        left = self._detached.get(stream, False)
        if left:
            self.end(stream)
        return left

    def detach(self, stream: Stream, *, left: bool = False) -> None:
        """Let *stream* run without a reader, for its window.

        *left* says that the last one has left.
        """
        if stream.ended or stream.background or stream in self._detached:
            return
        self._detached[stream] = left
        stream.timer = self._loop.call_later(stream.window, self.end, stream)
        self._enforce_max_detached()
        attempt = stream.attempt
        if attempt is not None:
            self.make_room(attempt.place, attempt.waiting)

    def end(self, stream: Stream, *, abandoned: bool = True) -> None:
        """Cancel *stream*, with readers or without; *abandoned*: because it has no reader."""
        self._leave_detached(stream)
        stream.abandoned, stream.cancelled_by_client = abandoned, not abandoned
        if abandoned and not (stream.sent or stream.answered or stream.background):
            # Nothing has begun. The log of it would tell a client that comes back, and has not
            # cancelled anything, that its answer was cancelled.
            self.store.unname(stream)
            stream.window = 0.0
        stream.cancel()

    def forget(self, stream: Stream) -> None:
        """Let *stream* be found no longer, and drop it once it has no reader.

        If it runs, it is cancelled.
        """
        self.end(stream, abandoned=False)
        self.store.unname(stream)
        stream.window = 0.0
        if stream.ended and not stream.readers:
            self.store.drop(stream)

    def make_room(self, provider: str, waiting: int) -> None:
        """Cancel the oldest detached streams that have a place at *provider*, where so many requests
        are *waiting*, until as many places are about to be free.
        """
        self._giving_way = {stream for stream in self._giving_way if stream.place}
        missing = waiting - sum(stream.place == provider for stream in self._giving_way)
        if missing <= 0:
            return
        for stream in [each for each in self._detached if each.place == provider][:missing]:
            self._giving_way.add(stream)
            self.end(stream)

    def close(self) -> None:
        """Stop the timer; streams that are kept after their end are then never forgotten."""
        if self._sweeper is not None:
            self._sweeper.cancel()

    def _enforce_max_detached(self) -> None:
        if (count := len(self._detached) - self._bounds.max_detached) > 0:
            self._end_largest(self._detached, count, lambda _stream: 1)

    def _leave_detached(self, stream: Stream) -> None:
        self._detached.pop(stream, None)
        if stream.timer is not None:
            stream.timer.cancel()
            stream.timer = None

    def aliased(self, stream: Stream, alias: str) -> None:
        """Note that *stream* has *alias* as another name."""
        self._on_alias(stream, alias)

    def dropped(self, stream: Stream) -> None:
        """Note that *stream* is no longer kept, perhaps for want of room."""
        for kept in self._kept.values():
            # Its window may have changed since.
            kept.pop(stream, None)

    def crowded(self, size: int) -> None:
        """End detached streams, and then background streams, to free *size* bytes: each time the
        oldest of the owner whose streams keep most.
        """
        for streams in (self._detached, self._background):
            size = self._end_largest(streams, size, attrgetter("kept_bytes"))

    def _end_largest(
        self, streams: Iterable[Stream], size: int, size_of: Callable[[Stream], int]
    ) -> int:
        """End those of *streams* that together have *size*, each measured by *size_of*: each time
        the oldest of the owner that has most. Return how much is still missing.
        """
        shares: Shares[Hashable] = Shares()
        oldest: dict[Hashable, deque[Stream]] = {}
        for stream in streams:
            owner = owner_of(stream.caller)
            oldest.setdefault(owner, deque()).append(stream)
            shares.add(owner, size_of(stream))
        for owner in shares.largest_first():
            if size <= 0:
                break
            stream = oldest[owner].popleft()
            size -= (ended := size_of(stream))
            shares.add(owner, -ended)
            if stream.background:
                # Its client has not cancelled it.
                stream.cancel_reason = ServerAtCapacity(
                    "there was no room for this answer any more", retry_after=BACKGROUND_RETRY
                )
            self.end(stream)
        return size

    def finished(self, stream: Stream) -> None:
        """Note that *stream* has its last event."""
        if stream.timer is not None:
            self._leave_detached(stream)
        if self._giving_way:
            self._giving_way.discard(stream)
        if stream.background:
            self._ran_in_background(stream)
        if stream.window > 0:
            due = self._loop.time() + stream.window
            self._kept.setdefault(stream.window, OrderedDict())[stream] = due
            self._sweep_at(due)
        elif not stream.readers:
            self.store.drop(stream)

    def _sweep_at(self, due: float) -> None:
        """Schedule the next sweep for *due*, a time of the loop, at the latest."""
        if self._sweeper is not None:
            if self._sweeper.when() <= due:
                return
            self._sweeper.cancel()
        self._sweeper = self._loop.call_at(due, self._sweep)

    def _sweep(self) -> None:
        """Forget the streams that were kept for their windows. One timer serves all of them."""
        self._sweeper = None
        now = self._loop.time()
        for window, kept in list(self._kept.items()):
            while kept and next(iter(kept.values())) <= now:
                stream, _ = kept.popitem(last=False)
                if stream.readers:
                    # A slow reader has not read the end yet: keep the stream for another window,
                    # at least 1 s.
                    kept[stream] = now + max(window, 1.0)
                else:
                    self.store.drop(stream)
            if kept:
                self._sweep_at(max(now + MIN_SWEEP_INTERVAL, next(iter(kept.values()))))
            else:
                del self._kept[window]


def _background_places(bounds: settings.Streams) -> int:
    """Return how many streams may run in the background."""
    return (bounds.max_detached + 1) // 2
