"""The log of one answer.

A stream is an append-only log of events, numbered 1, 2, 3 … without gaps: `processing`, `chunk`*,
then one of `complete`, `error` and `cancelled`. One producer appends, at the provider's speed; any
number of readers follow, each with a cursor of its own. The log is the only buffer: there is no
queue per client and no copy per reader, and so a slow reader costs the others nothing.

An entry (entries.py) may hold several events. For faces that pass on the provider's bytes, a block
is kept as it came; for faces that show frames, the events are kept as frames, made once for all
readers. Events that the fast path forwards are in the log at the latest when the path is closed:
see `close_fast_path`.

A log is bounded. Beyond `max_stream_bytes` its oldest entries are discarded, though never its
newest; a reader that has not seen them yet is dropped, and skips no event silently. Where no
client can come back (`window` 0), an entry is discarded once every reader has passed it, and the
provider is read no faster than the client reads (flow.py).

This file is one concept: each method holds the same invariant, that of the entries and of what is counted.
"""

from __future__ import annotations

from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

import orjson

from aioserver.protocol import frames as protocol_frames
from aioserver.streams.details import STREAM_OVERHEAD, AnswerDetails, Attachment, headers_size
from aioserver.streams.ending import run_all
from aioserver.streams.entries import (
    CHUNK,
    COMPLETE,
    ERROR,
    NO_TEXT,
    PROCESSING,
    Entry,
    WholeEntry,
    frames_of,
    locate,
    processing,
)
from aioserver.streams.flow import due, regulate
from aioserver.streams.retention import discard, late
from aioserver.telemetry.metrics import NO_METER
from aioserver.telemetry.outcome import Outcome
from aioserver.telemetry.request_log import NO_RECORD

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from aioserver.errors import AioserverError
    from aioserver.protocol.openai import Shape
    from aioserver.streams.contracts import Attempt, Path, Reader, Source, Store
    from aioserver.streams.details import WholeAnswer


class Stream:
    """The log of one answer.

    Always: `entries` have no gaps, from event `first` to event `last`; nothing is appended once
    `ended`; `bytes` is the sum of the entries' sizes, and `extra_bytes` what is kept beside them.

    *window* is the time, in seconds, that the log lives without a reader, and after its end. A
    *private* log is read only by the client that asked for it, and cannot be found; unless it is a
    mirror (mirror.py) it has the provider's bytes. The attributes that an event touches are here, the others in `details` and
    `attachment`.
    """

    __slots__ = (
        "_store",
        "answered_at",
        "attachment",
        "attempt",
        "bytes",
        "caller",
        "details",
        "end_status",
        "ended",
        "entries",
        "error",
        "extra_bytes",
        "head",
        "last",
        "max_bytes",
        "meter",
        "offset",
        "outcome",
        "path",
        "private",
        "readers",
        "record",
        "rendered",
        "request_id",
        "source",
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
        outcome: Outcome | None = None,
        store: Store | None = None,
    ) -> None:
        self.request_id = request_id
        self.caller = caller
        self.window = window
        self.private = private
        self.details = AnswerDetails()
        self.attachment = Attachment(digest)
        # Not a deque: an empty one takes 700 bytes.
        self.entries: list[Entry] = []
        # The number of discarded entries: the index of entries[0], counted from the start.
        self.offset = 0
        self.last = 0
        self.bytes = 0
        self.readers: list[Reader] = []
        # The fast path, from when it is opened until anything else looks at the log.
        self.path: Path | None = None
        # The newest entry and, by the name of a format, its rendering that several readers share.
        self.rendered: tuple[Entry, dict[str, bytes]] | None = None
        self.ended = False
        self.end_status = b""
        # The error with which the stream ended.
        self.error: AioserverError | None = None
        # What has become of its request so far.
        self.outcome = Outcome() if outcome is None else outcome
        # The attempt that has a place at a provider, if any.
        self.attempt: Attempt | None = None
        # The exchange that fills the log, while it is under way.
        self.source: Source | None = None
        # The monotonic time of the provider's first event; no other attempt is made after it.
        self.answered_at = 0.0
        # The provider's meter, which counts the events.
        self.meter = NO_METER
        # The record of the request that began this stream.
        self.record = NO_RECORD
        self.head = protocol_frames.frame_head(request_id)
        self.max_bytes = max_bytes
        self.extra_bytes = 0
        self._store = store
        self.recount()

    @property
    def first(self) -> int:
        """The number of the oldest event that is kept; last + 1 if none is."""
        self.close_fast_path()
        return self.entries[0].first if self.entries else self.last + 1

    @property
    def answered(self) -> bool:
        """Whether an event of a provider has come."""
        return self.answered_at > 0

    @property
    def sent(self) -> bool:
        """Whether a request was sent to a provider: from then on the answer costs money."""
        return self.outcome.sent

    @property
    def place(self) -> str:
        """The provider at which it has a place now; empty while it waits, for a place or for a retry."""
        return "" if self.attempt is None else self.attempt.place

    def mark_answered(self) -> None:
        """Note that an event of a provider has come, before it is appended."""
        if not self.answered_at:
            self.answered_at = now = monotonic()
            self.record.answered(now)
            if self.attempt is not None:
                self.attempt.first_event()

    def add_alias(self, alias: str) -> None:
        """Let this stream be found by *alias*, too; a private one is not found at all."""
        if self.attachment.alias is None and not self.private and self._store is not None:
            self.attachment.alias = alias
            self._store.add_alias(self, alias)

    def add_reader(self, reader: Reader) -> None:
        """Let *reader* follow from now on."""
        self.readers.append(reader)
        self.close_fast_path()

    def remove_reader(self, reader: Reader) -> None:
        """Let *reader* follow no longer."""
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
        """Add events of one *status* and notify the readers, unless *more* is about to be added.

        The events are *chunks*, the `chunk` object of each as JSON; or they are *data*, the
        provider's own bytes of *count* whole events.
        """
        self.close_fast_path()
        first, frames = self.last + 1, None
        if chunks:
            frames, count = frames_of(self.head, first, status, chunks), len(chunks)
        self.add_entry(Entry(first, count, status, data, frames, monotonic()))
        if status is CHUNK:
            self.meter.events += self.last + 1 - first
        if not more:
            self.notify()

    def append_whole(self, answer: WholeAnswer, body: bytes, pieces: Sequence[slice] = ()) -> None:
        """Append *answer*, which was not streamed, as events with the *pieces* of its text, and keep it."""
        self.details.whole = answer
        self.recount()
        for piece in pieces or (NO_TEXT,):
            self.add_entry(WholeEntry(self.last + 1, body, piece, monotonic()))
        self.notify()

    def close_fast_path(self) -> None:
        """Close the fast path, so that the log has all that was forwarded.

        This is always done before anything reads `entries` or adds to them.
        """
        if (path := self.path) is not None:
            self.path = None
            path.close()

    def append_forwarded(self, entry: Entry) -> None:
        """Add *entry*, which the only reader got by its fast path; `last` counts it already."""
        self.entries.append(entry)
        self._grow(entry.size)

    def recount(self) -> None:
        """Count what is kept beside the entries: to be called when it has changed."""
        outcome = self.outcome
        size = STREAM_OVERHEAD + 3 * len(self.head) + len(outcome.model) + self.details.size
        if outcome.headers:
            size += headers_size(outcome.headers)
        if self.error is not None:
            size += self.error.size
        grown, self.extra_bytes = size - self.extra_bytes, size
        if grown and self._store is not None:
            self._store.count_bytes(self, grown)

    @property
    def kept_bytes(self) -> int:
        """The bytes that count for `max_kept_bytes`: the entries, and what is kept beside them."""
        return self.bytes + self.extra_bytes

    def shed(self) -> bool:
        """Discard all but the newest entry, and drop late readers; return whether there were any."""
        self.close_fast_path()
        if not any(late(self.entries, self.offset, reader) for reader in self.readers):
            return False
        self._discard(len(self.entries) - 1)
        return True

    def trim(self) -> None:
        """Discard entries beyond `max_stream_bytes`; if no client can come back, those passed.

        In the latter case the source pauses, or goes on, as the readers have read.
        """
        if self.bytes > self.max_bytes or self.window <= 0:
            self._discard()
            if due(self):
                self._regulate()

    def note_passed(self) -> None:
        """Note that a reader which was behind has passed entries."""
        if self.window <= 0:
            self._discard()
            self._regulate()

    def _regulate(self) -> None:
        if self.source is not None and self.window <= 0 and not self.ended:
            regulate(self.source, self)

    def forward(self, data: bytes, count: int, *, more: bool = False) -> None:
        """Append the provider's bytes of *count* whole events.

        The bytes are not kept if nobody else can find the log and its only reader writes them at
        once: the effect is that of an append after which every reader has passed the entry.
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
        """Return the fast path of the only reader, if that reader has passed all entries.

        Without a *shape* the path forwards the provider's bytes, and the log keeps none of them.
        """
        self.close_fast_path()
        if not self.answered_at or len(self.readers) != 1:
            return None
        if shape is None and (not self.private or self.entries):
            return None
        self.path = self.readers[0].open_fast_path(shape)
        return self.path

    def append_processing(self) -> None:
        """Append event 1: a place at a provider is taken. Later attempts only change `outcome`."""
        if self.last:
            return
        self.recount()
        outcome, conversation = self.outcome, self.details.conversation_id
        self.append(PROCESSING, [processing(outcome.provider, outcome.model, conversation)])

    def finish(self, chunk: Mapping[str, Any], data: bytes = b"") -> None:
        """End the log well, once its keeper has kept the answer: now, or in `finished`, if that takes a while."""
        # The kept part of the answer has the texts that the fast path has passed on, too.
        self.close_fast_path()
        keeper = self.attachment.keeper
        kept = None if keeper is None else keeper.keep(self)
        if kept is None:
            self.end(COMPLETE, chunk, data=data)
        else:
            self.attachment.ending = kept, chunk, data
            self.notify()

    async def finished(self) -> None:
        """Wait until the answer is kept, if the log is to end then, and end it. Cancelling leaves it without an end."""
        if (ending := self.attachment.ending) is not None:
            kept, chunk, data = ending
            await kept
            self.end(COMPLETE, chunk, data=data)
            self.attachment.ending = None

    def end(self, status: bytes, chunk: Mapping[str, Any], *, data: bytes = b"") -> None:
        """Append the last event, and notify the readers and the store."""
        self.append_end(status, orjson.dumps(chunk), data)

    def append_end(self, status: bytes, chunk: bytes, data: bytes = b"") -> None:
        """Append the last event as `end` does, its *chunk* already JSON.

        If this raises after the event is in the log, all has been done nevertheless: each reader is notified.
        """
        self.close_fast_path()
        number = self.last + 1
        frames = [protocol_frames.frame(self.head, number, status, chunk)]
        self.end_with(Entry(number, 1, status, data, frames, monotonic()))

    def end_with(self, entry: Entry) -> None:
        """Append *entry*, the last event, as `append_end` does."""
        assert not self.ended, "nothing follows the end of a stream"
        self.entries.append(entry)
        self.last, self.ended, self.end_status = entry.first, True, entry.status
        # The producer is done with its text.
        self.details.text_bytes = 0
        notices = [reader.notify for reader in self.readers]
        run_all(
            (partial(self._grow, entry.size), self.recount, *notices, self.trim, self.tell_end)
        )

    def fail(self, error: AioserverError) -> None:
        """Append *error* as the last event, for both kinds of face: as a frame, and as bytes."""
        self.error = error
        self.end(ERROR, error.as_chunk(), data=self.details.final_error(error, self.last + 1))

    def report_position(self, position: int, eta: float) -> None:
        """Tell the readers the position in the provider's queue, and the estimated wait in seconds."""
        for reader in tuple(self.readers):
            reader.report_position(position, eta)

    def locate(self, after: int) -> tuple[int, int]:
        """Return where a reader goes on after event *after*: an entry's index, and the events to skip.

        Raises:
            ResumeGap: events after *after* are no longer kept, or *after* does not exist yet.
        """
        self.close_fast_path()
        index, skip = locate(self.entries, self.last, after)
        return self.offset + index, skip

    def frames(self, entry: Entry) -> Sequence[bytes]:
        """Return the frames of *entry*, one for each event."""
        return entry.frames or entry.make_frames(self.head)

    def forget(self) -> int:
        """Drop all entries and the whole answer; return the bytes that were counted."""
        self.close_fast_path()
        freed, self.bytes, self.extra_bytes = self.kept_bytes, 0, 0
        self.offset += len(self.entries)
        self.entries.clear()
        self.details.whole = self.rendered = None
        return freed

    def notify(self) -> None:
        """Notify the readers of what was added."""
        # Several readers are copied: one that leaves while it is notified would hide the next.
        for reader in self.readers if len(self.readers) < 2 else tuple(self.readers):
            reader.notify()
        self.trim()

    def tell_end(self) -> None:
        """Tell the store that the log has ended."""
        if self._store is not None:
            self._store.note_end(self)

    def add_entry(self, entry: Entry) -> None:
        """Add *entry*, of which the readers are still to be notified."""
        assert not self.ended, "nothing follows the end of a stream"
        self.last += entry.count
        self.entries.append(entry)
        self._grow(entry.size)

    def _grow(self, size: int) -> None:
        self.bytes += size
        if self._store is not None:
            self._store.count_bytes(self, size)

    def _discard(self, count: int = 0) -> None:
        """Discard the oldest *count* entries, those passed, and what is beyond `max_stream_bytes`."""
        if freed := discard(self, count):
            self._grow(-freed)
            for reader in tuple(self.readers):
                if reader.next_index < self.offset:
                    reader.drop()
