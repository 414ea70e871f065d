"""The log of one answer, and its readers.

A stream is an append-only log of events, numbered 1, 2, 3 … without holes: `processing`, `chunk`*,
then one of `complete`, `error`, `cancelled`. One producer appends, at the provider's speed; any
number of readers follow, each with its own cursor. The log is the only buffer there is: no queue
per client, no copy per reader, and so a slow reader costs the others nothing.

An entry (entries.py) may hold several events. Faces that pass the provider's bytes on take a block
as it is; what is asked for by a face that shows frames is kept as frames, made once for all readers.
What a fast path passes on becomes an entry when the path is closed: see `close_fast_path`.

What is bounded: a log keeps `max_stream_bytes`, its oldest entries go first; a reader that is
behind them cannot go on (`ResumeGap`), which is said and never skipped. Where nobody can come back
(`window` 0), what every reader has passed is let go at once.
"""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

import orjson

from aioserver.errors import AioserverError, ResumeGap
from aioserver.protocol import messages
from aioserver.streams.details import AnswerDetails, Attachment
from aioserver.streams.entries import CHUNK, ERROR, PROCESSING, Entry
from aioserver.telemetry.metrics import NO_METER
from aioserver.telemetry.request_log import NO_RECORD

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from aioserver.protocol.openai import Shape


class Path(Protocol):
    """The fast path of a log's only reader (fast_path.py), as the log and the provider see it.

    *last* is the loop's time when it took a read last; *read_at* that of the last read, whichever
    way it went.
    """

    forwarded_at: float
    read_at: float

    def forward(self, read: bytes) -> bool:
        """Pass *read* on; False, with nothing done, where it has to go the long way."""

    def close(self) -> None:
        """Take nothing from now on; the log has all that was taken."""


class Reader(Protocol):
    """A reader of a log. All its methods are called synchronously and must not raise.

    *at* is the index of the first entry that it has not passed, counted from the start of the log.
    """

    next_index: int

    def write_now(self, data: bytes) -> bool:
        """Take *data* as the next entry, if that can be done at once; else it is appended."""

    def open_fast_path(self, shape: Shape | None) -> Path | None:
        """Return its fast path, where nothing is to be done before the next event."""

    def notify(self) -> None:
        """Look at the log, which has grown or ended."""

    def report_position(self, position: int, eta: float) -> None:
        """Tell that the request waits for its provider: its position, and the seconds it may take."""


class Store(Protocol):
    """The store that a log counts in (store.py)."""

    def count_bytes(self, stream: Stream, size: int) -> None:
        """Note that *stream* has grown by *size* bytes; it may have shrunk."""

    def note_end(self, stream: Stream) -> None:
        """Note that *stream* has its last event."""

    def add_alias(self, stream: Stream, alias: str) -> None:
        """Let *stream* be found by *alias*, too, if nothing else is."""


class Stream:
    """The log of one answer.

    Always: `entries` are gapless, from event `first` to event `last`; nothing is appended once
    `ended`; `bytes` is the sum of the entries' sizes.

    *window* is in seconds: how long the log lives without a reader, and after its end. A *private*
    log is read by the client that asked and found by nobody else; it has the provider's bytes.
    What an event touches stands here; the rest is in `details` and `attachment`.
    """

    __slots__ = (
        "_max_bytes",
        "_store",
        "answered_at",
        "attachment",
        "bytes",
        "caller",
        "details",
        "end_status",
        "ended",
        "entries",
        "error",
        "head",
        "last",
        "meter",
        "offset",
        "path",
        "private",
        "readers",
        "record",
        "rendered",
        "request_id",
        "sent",
        "window",
    )

    def __init__(
        self,
        request_id: str,
        caller: Hashable,
        *,
        window: float,
        max_bytes: int,
        digest: bytes = b"",
        private: bool = False,
        store: Store | None = None,
    ) -> None:
        self.request_id = request_id
        self.caller = caller
        self.window = window
        self.private = private
        self.details = AnswerDetails()
        self.attachment = Attachment(digest)
        # A list, not a deque: an empty deque takes 700 bytes.
        self.entries: list[Entry] = []
        # The entries that were let go: the index of entries[0], counted from the start.
        self.offset = 0
        self.last = 0
        self.bytes = 0
        self.readers: list[Reader] = []
        # The fast path that was opened last.
        self.path: Path | None = None
        # The newest entry, rendered by format, while several readers share it.
        self.rendered: tuple[Entry, dict[str, bytes]] | None = None
        self.ended = False
        self.end_status = b""
        # The error with which it ended.
        self.error: AioserverError | None = None
        # Whether a request was sent to a provider: leaving costs money from then on.
        self.sent = False
        # The monotonic time of the provider's first event; there is no other attempt from then on.
        self.answered_at = 0.0
        # The meter of the provider, which counts the events.
        self.meter = NO_METER
        # The record of the request that began it.
        self.record = NO_RECORD
        self.head = messages.frame_head(request_id)
        self._max_bytes = max_bytes
        self._store = store

    @property
    def first(self) -> int:
        """The number of the oldest event kept; last + 1 where there is none."""
        self.close_fast_path()
        return self.entries[0].first if self.entries else self.last + 1

    @property
    def answered(self) -> bool:
        """Whether an event of a provider is in the log."""
        return self.answered_at > 0

    def mark_answered(self) -> None:
        """Note that an event of a provider has come, before it is appended."""
        if not self.answered_at:
            self.answered_at = monotonic()
            self.record.silence = 0.0  # what was before: a head, comments, a try that failed

    def add_alias(self, alias: str) -> None:
        """Let it be found by *alias*, too; a private one is not found at all."""
        if self.attachment.alias is None and not self.private and self._store is not None:
            self.attachment.alias = alias
            self._store.add_alias(self, alias)

    def add_reader(self, reader: Reader) -> None:
        """*reader* follows from now on."""
        self.readers.append(reader)
        self.close_fast_path()

    def remove_reader(self, reader: Reader) -> None:
        """*reader* follows no more."""
        self.readers.remove(reader)
        self.close_fast_path()

    def append(
        self,
        status: bytes,
        chunks: Sequence[bytes] = (),
        *,
        data: bytes = b"",
        count: int = 1,
        more: bool = False,
    ) -> None:
        """Add events of one *status* and notify the readers; with *more* the next append does that.

        *chunks*: the events' `chunk` objects as JSON, one an event; or *data*: the provider's own
        bytes of *count* whole events.
        """
        self.close_fast_path()
        first = self.last + 1
        if chunks:
            head = self.head
            frames = [
                messages.frame(head, number, status, chunk)
                for number, chunk in enumerate(chunks, first)
            ]
            self._add(Entry(first, len(frames), status, data, frames, monotonic()))
        else:
            self._add(Entry(first, count, status, data, None, monotonic()))
        if status is CHUNK:
            self.meter.events += self.last + 1 - first
        if not more:
            for reader in self.readers if len(self.readers) < 2 else tuple(self.readers):
                reader.notify()
            self.trim()

    def close_fast_path(self) -> None:
        """Close the fast path; what it has passed on is in the log now.

        Always done before anything looks at `entries`, or puts something into them.
        """
        if (path := self.path) is not None:
            self.path = None
            path.close()

    def append_forwarded(self, entry: Entry) -> None:
        """Add what the only reader has passed by its fast path; it is counted in `last` already."""
        self.entries.append(entry)
        self._grow(entry.size)

    def count_extra_bytes(self, size: int) -> None:
        """Count *size* bytes that are kept outside the entries, until it is forgotten."""
        self._grow(size)

    def trim(self) -> None:
        """Let go what is beyond `max_stream_bytes`, or was passed where nobody can come back."""
        if self.bytes > self._max_bytes or self.window <= 0:
            self._let_go()

    def forward(self, data: bytes, count: int, *, more: bool = False) -> None:
        """Append the provider's bytes of *count* whole events.

        They are not kept where nobody else can find them and the only reader takes them at once:
        the same as an append after which everybody has passed.
        """
        self.close_fast_path()
        readers = self.readers
        if (
            self.private
            and not more
            and len(readers) == 1
            and not self.entries
            and readers[0].write_now(data)
        ):
            self.last += count
            self.offset += 1
            self.meter.events += count
        else:
            self.append(CHUNK, data=data, count=count, more=more)

    def open_fast_path(self, shape: Shape | None = None) -> Path | None:
        """The only reader's fast path, where that reader has passed all there is.

        Without a *shape* it is one for the provider's bytes, of which nothing is kept.
        """
        self.close_fast_path()
        if not self.answered_at or len(self.readers) != 1:
            return None
        if shape is None and (not self.private or self.entries):
            return None
        self.path = self.readers[0].open_fast_path(shape)
        return self.path

    def append_processing(self, provider: str, model: str) -> None:
        """Append event 1: a place at *provider* is taken. A later try keeps the first one's."""
        self.details.provider, self.details.model = provider, model
        if self.last:
            return
        metadata: dict[str, Any] = {"processing": True, "provider": provider, "model": model}
        if self.details.conversation_id is not None:
            metadata["conversation_id"] = self.details.conversation_id
        self.append(PROCESSING, [orjson.dumps({"metadata": metadata})])

    def end(self, status: bytes, chunk: Mapping[str, Any], *, data: bytes = b"") -> None:
        """Append the last event."""
        self.append_end(status, orjson.dumps(chunk), data)

    def append_end(self, status: bytes, chunk: bytes, data: bytes = b"") -> None:
        """Append the last event, its `chunk` already JSON."""
        self.close_fast_path()
        number = self.last + 1
        frames = [messages.frame(self.head, number, status, chunk)]
        self._add(Entry(number, 1, status, data, frames, monotonic()))
        self.ended = True
        self.end_status = status
        for reader in tuple(self.readers):
            reader.notify()
        self.trim()
        if self._store is not None:
            self._store.note_end(self)

    def fail(self, error: AioserverError) -> None:
        """Append the last event: *error*, as both kinds of face show it."""
        self.error = error
        self.end(ERROR, error.as_chunk(), data=b"data: %b\n\n" % error.body())

    def report_position(self, position: int, eta: float) -> None:
        """Tell the readers where the request stands in its provider's line."""
        for reader in tuple(self.readers):
            reader.report_position(position, eta)

    def locate(self, after: int) -> tuple[int, int]:
        """Where a reader that has seen event *after* goes on: (index, events of it to skip).

        Raises:
            ResumeGap: events behind *after* are no longer kept, or *after* does not exist yet.
        """
        self.close_fast_path()
        if after > self.last:
            raise ResumeGap(f"event {after} does not exist yet; the newest is {self.last}")
        if after + 1 < self.first:
            raise ResumeGap(
                f"events behind {after} are no longer kept; the oldest is {self.first}"
            )
        low, high = 0, len(self.entries)
        while low < high:  # the first entry that ends behind *after*
            middle = (low + high) // 2
            entry = self.entries[middle]
            if entry.first + entry.count - 1 <= after:
                low = middle + 1
            else:
                high = middle
        skip = after - self.entries[low].first + 1 if low < len(self.entries) else 0
        return self.offset + low, skip

    def frames(self, entry: Entry) -> Sequence[bytes]:
        """The frames of *entry*, one for each event."""
        return entry.frames or entry.make_frames(self.head)

    def forget(self) -> int:
        """Drop all entries; returns the bytes that were kept."""
        self.close_fast_path()
        freed, self.bytes = self.bytes, 0
        self.offset += len(self.entries)
        self.entries.clear()
        self.details.whole = self.rendered = None
        return freed

    def _add(self, entry: Entry) -> None:
        assert not self.ended, "nothing follows the end of a stream"
        self.last += entry.count
        self.entries.append(entry)
        self._grow(entry.size)

    def _grow(self, size: int) -> None:
        self.bytes += size
        if self._store is not None:
            self._store.count_bytes(self, size)

    def _let_go(self) -> None:
        passed = self.offset
        if self.window <= 0 and self.readers:
            passed = self.readers[0].next_index
            if len(self.readers) > 1:
                passed = min([reader.next_index for reader in self.readers])
        entries, gone, freed = self.entries, 0, 0
        while len(entries) - gone > 1 or (len(entries) > gone and self.offset + gone < passed):
            if self.offset + gone >= passed and self.bytes - freed <= self._max_bytes:
                break
            freed += entries[gone].size
            gone += 1
        if gone:
            del entries[:gone]
            self.offset += gone
            self._grow(-freed)
