"""The bounded store of logs: every stream that can be found, by its caller.

All logs together keep `max_kept_bytes`: the oldest finished ones go first, and where the running
ones alone fill it, new answers are refused.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aioserver.errors import ServerAtCapacity
from aioserver.streams.stream import Stream

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

ENOUGH = 0.95  # of max_kept_bytes: what is left when room was made


@dataclass(frozen=True, slots=True)
class StoreStats:
    """The store at one moment."""

    running: int
    finished: int
    bytes: int
    max_bytes: int


class StreamStore:
    """Every log that can be found: running, or finished and kept for its window.

    Always: `bytes` is the sum over all its logs, and over those that are private (never found
    again) while they run; a log is found by its caller only.
    """

    def __init__(self, *, max_stream_bytes: int, max_kept_bytes: int) -> None:
        self._max_stream_bytes = max_stream_bytes
        self._max_kept_bytes = max_kept_bytes
        self._by_name: dict[tuple[Hashable, str], Stream] = {}
        self._finished: OrderedDict[Stream, None] = OrderedDict()  # the oldest first
        self._running: set[Stream] = set()
        self._bytes = 0
        self.on_finished: Callable[[Stream], None] = lambda _stream: None

    def apply(self, *, max_stream_bytes: int, max_kept_bytes: int) -> None:
        """Use new bounds for logs to come."""
        self._max_stream_bytes, self._max_kept_bytes = max_stream_bytes, max_kept_bytes

    def open(
        self,
        request_id: str,
        caller: Hashable,
        *,
        window: float,
        digest: bytes = b"",
        private: bool = False,
    ) -> Stream:
        """A new log; a *private* one cannot be found.

        Raises:
            ServerAtCapacity: the running logs alone fill `max_kept_bytes`.
        """
        if self._bytes >= self._max_kept_bytes and not self._evict():
            raise ServerAtCapacity(
                f"chat.streams.max_kept_bytes={self._max_kept_bytes} reached by running answers",
                retry_after=5.0,
            )
        stream = Stream(
            request_id,
            caller,
            window=window,
            max_bytes=self._max_stream_bytes,
            digest=digest,
            private=private,
            store=self,
        )
        self._running.add(stream)
        if not private:
            self._by_name[caller, request_id] = stream
        return stream

    def find(self, caller: Hashable, request_id: str) -> Stream | None:
        """The caller's log of that name."""
        return self._by_name.get((caller, request_id))

    def add_alias(self, stream: Stream, alias: str) -> None:
        """Let *stream* be found by *alias*, too, if nothing else is."""
        self._by_name.setdefault((stream.caller, alias), stream)

    def owned_by(self, caller: Hashable) -> Iterator[Stream]:
        """The caller's logs, the oldest first."""
        return (
            stream
            for (owner, name), stream in self._by_name.items()
            if owner == caller and name == stream.request_id
        )

    def running(self) -> tuple[Stream, ...]:
        """Those that have not ended."""
        return tuple(self._running)

    def drop(self, stream: Stream) -> None:
        """Forget a finished log."""
        self._finished.pop(stream, None)
        self._running.discard(stream)
        for name in (stream.request_id, stream.attachment.alias):
            if name is not None and self._by_name.get((stream.caller, name)) is stream:
                del self._by_name[stream.caller, name]
        self._bytes -= stream.forget()

    def count_bytes(self, stream: Stream, size: int) -> None:
        """A log has grown by *size* bytes (or shrunk)."""
        del stream
        self._bytes += size
        if self._bytes > self._max_kept_bytes:
            self._evict()

    def note_end(self, stream: Stream) -> None:
        """A log has its last event."""
        self._running.discard(stream)
        self._finished[stream] = None
        self.on_finished(stream)
        if self._bytes > self._max_kept_bytes:
            self._evict()

    def stats(self) -> StoreStats:
        """The state now."""
        return StoreStats(
            running=len(self._running),
            finished=len(self._finished),
            bytes=self._bytes,
            max_bytes=self._max_kept_bytes,
        )

    def _evict(self) -> bool:
        """Drop finished logs that nobody reads, oldest first; whether that made room.

        A little more than has to be: else each event would look again.
        """
        room, victims, freed = self._max_kept_bytes * ENOUGH, [], 0
        for stream in self._finished:
            if self._bytes - freed < room:
                break
            if not stream.readers:
                victims.append(stream)
                freed += stream.bytes
        for stream in victims:
            self.drop(stream)
        return self._bytes < self._max_kept_bytes
