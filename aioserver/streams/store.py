"""The bounded store of logs, in which a caller finds its streams.

All logs together keep `max_kept_bytes`, in everything that they keep. Beyond that

    1. finished logs without a reader, and stored responses, are dropped: of the owner that
       keeps most of both, the oldest first
    2. the held events of a turn are shown before its finish, the largest first
    3. readers that are far behind are dropped, with the events that only they still need
    4. logs that run, or are still read, lose the oldest events that every reader has passed
    5. answers without a reader are ended, the oldest first
    6. new answers are refused

In each other step the owner that keeps most makes room first, in 3 and 4 with its largest log. An
owner is a key or, without keys, an address: see `owner_of`.

This file is one concept: all kept bytes are counted here, and evicted here in one order.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from math import inf
from typing import TYPE_CHECKING, Protocol, Self

import msgspec

from aioserver.auth.callers import Caller
from aioserver.errors import ServerAtCapacity
from aioserver.limits.shares import ByOwner, Shares
from aioserver.streams.stream import Stream

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from aioserver.streams.contracts import AnswerApi
    from aioserver.telemetry.outcome import Outcome

# The share of max_kept_bytes that an eviction leaves. It is below 1, since otherwise each event
# would have to search for logs to drop.
EVICTION_TARGET = 0.95
# The share of max_kept_bytes by which the logs must grow before the next search for late readers.
SEARCH_STEP = 0.01


class EvictableStore(Protocol):
    """Answers of one *api* that are kept beside the logs, such as stored responses, and may be
    dropped to make room. `StreamStore.hold` counts their bytes, for their owners.
    """

    api: AnswerApi

    def __len__(self) -> int:
        """Return the number of answers."""

    def oldest(self, owner: Hashable) -> float:
        """Return the monotonic time at which the oldest answer of *owner* was stored; infinity if
        there is none.
        """

    def drop_oldest(self, owner: Hashable) -> None:
        """Drop the oldest answer of *owner*."""

    def drop(self, caller: Caller, name: str) -> bool:
        """Let an answer of *caller* be found no longer; return whether there was one."""


class StoreStats(msgspec.Struct, frozen=True):
    """A snapshot of the store: the numbers of logs and of stored responses, those of which events
    are held and their bytes, and all bytes and their bound.
    """

    running: int
    finished: int
    responses: int
    held_answers: int
    held_bytes: int
    bytes: int
    max_bytes: int


class StoreObserver:
    """Observes the logs of a store; this class does nothing."""

    def finished(self, stream: Stream) -> None:
        """Note that *stream* has its last event."""

    def dropped(self, stream: Stream) -> None:
        """Note that *stream* is no longer kept."""

    def aliased(self, stream: Stream, alias: str) -> None:
        """Note that *stream* has *alias* as another name."""

    def crowded(self, size: int) -> None:
        """Note that running answers need *size* bytes more than there are: end some without a
        reader.
        """


NOBODY = StoreObserver()


class StreamStore:
    """Every log that a caller can find: running, or finished and kept for its window.

    Always: the bytes counted are the sum over these logs, over private ones while they run, and
    over bodies that no log has. A log is found by its caller only, and a private one never. The
    sum exceeds `max_kept_bytes` only by what running answers and their readers needed at the last
    search for room, and by SEARCH_STEP. That search left only the entries that readers in time
    have still to read, the newest event of each log that runs or is read, and what is kept beside
    its events.
    """

    def __init__(
        self, *, max_stream_bytes: int, max_kept_bytes: int, observer: StoreObserver = NOBODY
    ) -> None:
        self._max_stream_bytes = max_stream_bytes
        self._max_kept_bytes = max_kept_bytes
        self._by_name: dict[tuple[Hashable, str], Stream] = {}
        # The streams of each owner, the oldest first.
        self._owned: dict[Hashable, dict[Stream, None]] = {}
        # The oldest first, each with its owner if it counts for that: a log that is dropped with
        # its last reader does not.
        self._finished: OrderedDict[Stream, Hashable] = OrderedDict()
        self._finished_of: ByOwner[Hashable, Stream, None] = ByOwner()
        # The bytes that may be dropped to make room: finished logs, and stored responses.
        self._shares: Shares[Hashable] = Shares()
        self._running: set[Stream] = set()
        self._bytes = 0
        # The bytes from which on late readers are searched for.
        self._search_at = 0.0
        # Whether late readers are being dropped.
        self._dropping = False
        # Other stores whose answers may be dropped.
        self.evictable_stores: list[EvictableStore] = []
        self._observer = observer

    def apply(self, *, max_stream_bytes: int, max_kept_bytes: int) -> None:
        """Apply new bounds; a log keeps the `max_stream_bytes` with which it began."""
        self._max_stream_bytes, self._max_kept_bytes = max_stream_bytes, max_kept_bytes
        if self._bytes > max_kept_bytes:
            self._evict(search=True)

    def open(
        self,
        request_id: str,
        caller: Hashable,
        *,
        window: float,
        digest: bytes = b"",
        private: bool = False,
        outcome: Outcome | None = None,
        kind: type[Stream] = Stream,
    ) -> Stream:
        """Return a new log of this *kind*, for a request with this *outcome*; a *private* one
        cannot be found.

        Raises:
            ServerAtCapacity: the logs that are running fill `max_kept_bytes`.
        """
        if self._bytes >= self._max_kept_bytes and not self._evict(search=True):
            raise ServerAtCapacity(
                f"chat.streams.max_kept_bytes={self._max_kept_bytes} reached by running answers",
                retry_after=5.0,
            )
        stream = kind(
            request_id,
            caller,
            window=window,
            max_bytes=self._max_stream_bytes,
            digest=digest,
            private=private,
            outcome=outcome,
            store=self,
        )
        if not private:
            owned = self._owned.setdefault(owner_of(caller), {})
            self._by_name[caller, request_id] = stream
            owned[stream] = None
        self._running.add(stream)
        return stream

    def find(self, caller: Hashable, request_id: str) -> Stream | None:
        """Return the caller's log of this request id or alias; None if there is none."""
        return self._by_name.get((caller, request_id))

    def add_alias(self, stream: Stream, alias: str) -> None:
        """Let *stream* be found by *alias*, too, unless another stream has that name."""
        self._by_name.setdefault((stream.caller, alias), stream)
        self._observer.aliased(stream, alias)

    def owned_by(self, caller: Hashable) -> Iterator[Stream]:
        """Iterate over the caller's logs, the oldest first.

        Without keys all clients are one caller; the logs are then those of the caller's address.
        """
        return iter(tuple(self._owned.get(owner_of(caller), ())))

    def running(self) -> tuple[Stream, ...]:
        """Return the logs that have not ended, private ones included."""
        return tuple(self._running)

    def finished(self) -> tuple[Stream, ...]:
        """Return the logs that have ended and are kept, the oldest first."""
        return tuple(self._finished)

    def drop(self, stream: Stream) -> None:
        """Forget *stream*, which has ended; a second call does nothing."""
        if not (stream.extra_bytes or stream.bytes):
            return
        self._running.discard(stream)
        if not stream.private:
            self.unname(stream)
        freed = stream.forget()
        self._bytes -= freed
        if (owner := self._finished.pop(stream, None)) is not None:
            self._finished_of.pop(owner, stream)
            self._shares.add(owner, -freed)
        self._observer.dropped(stream)

    def unname(self, stream: Stream) -> None:
        """Remove the names of *stream*; a second call does nothing."""
        for name in (stream.request_id, stream.alias):
            if name is not None and self._by_name.get((stream.caller, name)) is stream:
                del self._by_name[stream.caller, name]
        owner = owner_of(stream.caller)
        if (owned := self._owned.get(owner)) is not None:
            owned.pop(stream, None)
            if not owned:
                del self._owned[owner]

    def count_bytes(self, stream: Stream, size: int) -> None:
        """Note that a log has grown by *size* bytes; negative: it has shrunk."""
        self._bytes = kept = self._bytes + size
        if stream.ended and (owner := self._finished.get(stream)) is not None:
            self._shares.add(owner, size)
        if kept > self._max_kept_bytes:
            self._evict()

    def note_end(self, stream: Stream) -> None:
        """Note that *stream* has its last event."""
        # It may be dropped already: its last reader has left at that event.
        if stream in self._running:
            self._running.discard(stream)
            owner = None
            if stream.window > 0 or not stream.readers:
                owner = owner_of(stream.caller)
                self._finished_of.put(owner, stream, None)
                self._shares.add(owner, stream.kept_bytes)
            self._finished[stream] = owner
        # The rendering of an event may be as large as the log, and is not counted.
        stream.rendered = None
        self._observer.finished(stream)
        if self._bytes > self._max_kept_bytes:
            self._evict()

    def note_unread(self) -> None:
        """Note that a log that has ended lost its last reader: it may be dropped to make room."""
        if self._bytes > self._max_kept_bytes:
            self._evict()

    def hold(self, owner: Hashable = None) -> HeldBytes:
        """Return a count, at 0, of the bytes of a body that no log has.

        *owner* is that of a stored answer; None: the bytes cannot be dropped to make room.
        """
        return HeldBytes(self, owner)

    def take(self, size: int, owner: Hashable = None) -> None:
        """Count *size* bytes of a body that no log has: see `hold`.

        Raises:
            ServerAtCapacity: there is no room for them.
        """
        self._bytes += size
        if self._bytes > self._max_kept_bytes and not self._evict(search=True):
            self._bytes -= size
            raise ServerAtCapacity(
                f"chat.streams.max_kept_bytes={self._max_kept_bytes} reached by answers",
                retry_after=5.0,
            )
        if owner is not None:
            self._shares.add(owner, size)

    def give_back(self, size: int, owner: Hashable = None) -> None:
        """Stop counting *size* bytes, which `take` has counted."""
        self._bytes -= size
        if owner is not None:
            self._shares.add(owner, -size)

    def stats(self) -> StoreStats:
        """Return a snapshot."""
        held = [size for size in map(_held_size, self._running) if size]
        return StoreStats(
            running=len(self._running),
            finished=len(self._finished),
            responses=sum(map(len, self.evictable_stores)),
            held_answers=len(held),
            held_bytes=sum(held),
            bytes=self._bytes,
            max_bytes=self._max_kept_bytes,
        )

    def _evict(self, *, search: bool = False) -> bool:
        """Make room, as the head of this file says; return whether there is room now.

        *search*: also among running logs, even if the last search has not found enough.
        """
        if self._dropping:
            # A log that was shortened counts what its fast path had not counted yet.
            return self._bytes < self._max_kept_bytes
        self._drop_unread()
        step = SEARCH_STEP * self._max_kept_bytes
        self._search_at = min(self._search_at, self._bytes + step)
        if self._bytes >= self._max_kept_bytes and (search or self._bytes >= self._search_at):
            self._dropping = True
            try:
                self._drop_said()
                self._let_go()
                self._drop_late_readers()
                self._cut_passed()
                if (excess := self._bytes - self._max_kept_bytes) >= 0:
                    self._observer.crowded(excess + 1)
            finally:
                self._dropping = False
            # If that was not enough, it is not tried again at each event.
            self._search_at = self._bytes + step
        elif self._bytes < self._max_kept_bytes:
            self._search_at = 0.0
        return self._bytes < self._max_kept_bytes

    def _drop_said(self) -> None:
        """Forget the transcripts of running answers, which are needed only if an answer breaks
        off.
        """
        for stream in self._running:
            if self._bytes < self._max_kept_bytes:
                return
            if stream.transcript is not None and stream.transcript.size:
                stream.drop_said()

    def _let_go(self) -> None:
        """Have the held events of running turns shown before their finish, the largest first."""
        for stream in sorted(self._running, key=_held_size, reverse=True):
            if self._bytes < self._max_kept_bytes or not _held_size(stream):
                return
            if stream.attempt is not None:
                stream.attempt.let_go()

    def _drop_late_readers(self) -> None:
        """Drop readers that are far behind: of finished logs first."""
        for logs in (reversed(self._finished), sorted(self._running, key=_size)):
            for stream in _of_who_keeps_most(logs):
                if self._bytes < self._max_kept_bytes:
                    return
                if stream.readers and stream.shed():
                    self._drop_unread()

    def _cut_passed(self) -> None:
        """Discard the oldest events that every reader has passed, of logs that run or are read."""
        target = self._max_kept_bytes * EVICTION_TARGET
        read = [stream for stream in self._finished if stream.readers]
        for stream in _of_who_keeps_most(sorted([*read, *self._running], key=_size)):
            if self._bytes < target:
                return
            stream.cut(int(self._bytes - target) + 1)

    def _drop_unread(self) -> None:
        """Drop finished logs without a reader, and stored responses: each time the oldest of the
        owner that keeps most of them.
        """
        target = self._max_kept_bytes * EVICTION_TARGET
        if self._bytes < target:
            return
        # For each owner that has kept most at some moment: its finished logs, the oldest last.
        logs: dict[Hashable, list[Stream]] = {}
        for owner in self._shares.largest_first():
            if owner not in logs:
                logs[owner] = [*reversed(self._finished_of.of(owner))]
            kept = self._shares.of(owner)
            # A stored response that others continue keeps its bytes as long as they do.
            while self._shares.of(owner) == kept and self._drop_oldest(owner, logs[owner]):
                pass
            if self._bytes < target:
                return

    def _drop_oldest(self, owner: Hashable, logs: list[Stream]) -> bool:
        """Drop the oldest of the finished *logs* of *owner*, sorted with the oldest last, and of
        its stored responses; return whether there was any.
        """
        while logs and logs[-1].readers:
            logs.pop()
        ended = ended_at(logs[-1]) if logs else inf
        stored_at, evictable_store = inf, None
        for each in self.evictable_stores:
            if (oldest := each.oldest(owner)) < stored_at:
                stored_at, evictable_store = oldest, each
        if evictable_store is not None and stored_at < ended:
            evictable_store.drop_oldest(owner)
        elif logs:
            self.drop(logs.pop())
        return stored_at < inf or ended < inf


def _size(stream: Stream) -> int:
    return stream.bytes


def _held_size(stream: Stream) -> int:
    return 0 if stream.held is None else stream.held.size


def _of_who_keeps_most(streams: Iterable[Stream]) -> Iterator[Stream]:
    """Yield each of *streams*, for the caller to take from it: each time the last log of the owner
    whose logs keep most.
    """
    shares: Shares[Hashable] = Shares()
    logs: dict[Hashable, list[Stream]] = {}
    for stream in streams:
        owner = owner_of(stream.caller)
        logs.setdefault(owner, []).append(stream)
        shares.add(owner, stream.kept_bytes)
    for owner in shares.largest_first():
        freed = 0
        while logs[owner] and not freed:
            stream = logs[owner].pop()
            before = stream.kept_bytes
            yield stream
            freed = before - stream.kept_bytes
        shares.add(owner, -freed)


class HeldBytes(msgspec.Struct, eq=False):
    """The bytes of one body that is collected or written, and that no log has.

    `release` gives them back, also at the end of a `with`; nothing is counted after it. *size* is
    their number.
    """

    _store: StreamStore
    _owner: Hashable = None
    size: int = 0
    _released: bool = False

    def grow(self, size: int) -> None:
        """Count another *size* bytes.

        Raises:
            ServerAtCapacity: all that is kept would be more than `max_kept_bytes`.
        """
        if not self._released:
            self._store.take(size, self._owner)
            self.size += size

    def reset(self) -> None:
        """Give the bytes back: another attempt begins anew."""
        size, self.size = self.size, 0
        self._store.give_back(size, self._owner)

    def release(self) -> None:
        """Give the bytes back for good; a second call does nothing."""
        self._released = True
        if size := self.size:
            self.size = 0
            self._store.give_back(size, self._owner)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.release()


def ended_at(stream: Stream) -> float:
    """Return the monotonic time at which *stream*, which has ended, got its last event."""
    return stream.entries[-1].received_at if stream.entries else 0.0


def owner_of(caller: Hashable) -> Hashable:
    """Return the owner of what *caller* keeps and may see: its key, or its address without keys."""
    # The name stands for the caller: its hash is cached.
    return (caller.name, caller.flow) if isinstance(caller, Caller) else caller
