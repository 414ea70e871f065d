"""The log of one answer.

This file is one concept: the entries and their counts hold one invariant, and everything that adds
to a log, discards from it or ends it keeps that invariant here.

A stream is an append-only log of events, numbered 1, 2, 3 … without gaps: `processing`, `chunk`*,
then one of `complete`, `error` and `cancelled`. One producer appends, at the provider's speed; any
number of readers follow, each with a cursor of its own. The log is the only buffer: there is no
queue per client and no copy per reader, and so a slow reader costs the others nothing.

An entry (entries.py) may hold several events. For faces that pass on the provider's bytes, a block
is kept as it came; for faces that show frames, the events are kept as frames, made once for all
readers. In a private log `processing` is a number without an entry: its reader gets the provider's
bytes. Events that the fast path forwards are in the log at the latest when the path is closed: see
`close_fast_path`.

A log is bounded. Beyond `max_stream_bytes` its oldest entries are discarded, though never its
newest; a reader that has not seen them yet is dropped, and skips no event silently. If no client
can come back (`window` 0), an entry is discarded once every reader has passed it.

If no client can come back, the provider is also read no faster than its client reads. Otherwise a
log takes the answer at the provider's speed, so that the provider's place is soon free. With a
window of 0 that would only lose what the client has not read, so reading from the provider pauses
instead: TCP's own flow control then reaches from the client to the provider. A pause holds the
provider's place, so there is none while a request waits for it (providers/backpressure.py).
`send_timeout` ends a client that reads nothing at all.

If several processes serve together, a log stays where it was made: its instance is its *owner*. A
client that asks another instance for it is led to the owner (wing `cluster`).
"""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

import orjson

from aioserver.protocol import frames as protocol_frames
from aioserver.protocol.bridging.chunks import ChunkReader
from aioserver.streams.contracts import AT_PROVIDER, PLAIN_EVENTS, Queued
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
from aioserver.telemetry.metrics import NO_METER
from aioserver.telemetry.outcome import Outcome
from aioserver.telemetry.request_log import NO_RECORD

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Hashable, Mapping, Sequence

    from aioserver.errors import AioserverError
    from aioserver.protocol.openai import Shape
    from aioserver.protocol.transcript import Transcript
    from aioserver.streams.contracts import (
        AnswerApi,
        Attempt,
        Held,
        Path,
        Reader,
        Source,
        WholeAnswer,
    )

# Bytes of the Python objects of one stream: the log itself, the record of its request and its
# outcome.
STREAM_OVERHEAD: Final = 4096
# Bytes of Python objects per header.
HEADER_OVERHEAD = 200
# Unread bytes of a log at which reading pauses, and at which it goes on: as much as a socket's
# buffers hold, and as a writer writes at once.
PAUSE_BYTES, RESUME_BYTES = 1 << 18, 1 << 16
# With several readers: the entries between two counts of unread bytes, and the size of an entry
# that is counted at once.
CHECK_EVERY, CHECK_BYTES = 16, 1 << 12


class Store(Protocol):
    """The store of a log (store.py), as the log sees it. *stream* is always the caller."""

    def count_bytes(self, stream: Stream, size: int) -> None:
        """Note that *stream* has grown by *size* bytes; negative: it has shrunk."""

    def note_end(self, stream: Stream) -> None:
        """Note that *stream* has its last event."""

    def add_alias(self, stream: Stream, alias: str) -> None:
        """Let *stream* be found by *alias*, too, unless another stream has that name."""

    def hold(self) -> Held:
        """Return a count, at 0, of the bytes of a body that no log has."""


class Keeper(Protocol):
    """Stores the answer of a log (gateway/contracts/keeper.py), as the log sees it."""

    def identified(self, answer_id: str) -> None:
        """Note the id that the provider has given to the answer."""

    def keep(self, stream: Stream) -> Awaitable[None] | None:
        """Store the answer in *stream*, which is complete but for its last event.

        Return None if that is done already.
        """


class Stream:
    """The log of one answer.

    Always: `entries` have no gaps, from event `first` to event `last`; nothing is appended once
    `ended`; `bytes` is the sum of the entries' sizes, and `extra_bytes` what is kept beside them.

    *window* is the time, in seconds, that the log lives without a reader, and after its end. A
    *private* log is read only by the client that asked for it, and cannot be found; it has the
    provider's bytes. *digest* distinguishes a repeated request from a conflicting one.
    """

    __slots__ = (
        "_store",
        "abandoned",
        "alias",
        "answered_at",
        "api",
        "attempt",
        "background",
        "bytes",
        "caller",
        "cancel_reason",
        "cancelled_by_client",
        "closing",
        "conversation_id",
        "digest",
        "end_status",
        "ended",
        "ending",
        "entries",
        "error",
        "events",
        "extra_bytes",
        "head",
        "held",
        "keeper",
        "last",
        "max_bytes",
        "meter",
        "offset",
        "outcome",
        "path",
        "private",
        "producer",
        "queued",
        "readers",
        "record",
        "rendered",
        "request_id",
        "source",
        "text_bytes",
        "timer",
        "transcript",
        "whole",
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
        self.digest = digest
        # Not a deque: an empty one takes 700 bytes.
        self.entries: list[Entry] = []
        # The number of discarded entries: the index of entries[0], counted from the start.
        self.offset = 0
        self.last = 0
        self.bytes = 0
        self.readers: list[Reader] = []
        # The fast path, from when it is opened until anything else looks at the log.
        self.path: Path | None = None
        # The newest entry with its renderings, by the name of a format, which several readers
        # share.
        self.rendered: tuple[Entry, dict[str, bytes]] | None = None
        self.ended = False
        self.end_status = b""
        # The error with which the stream ended.
        self.error: AioserverError | None = None
        # The outcome of its request so far.
        self.outcome = Outcome() if outcome is None else outcome
        # The last reported place in which its request waits; None if it does not wait.
        self.queued: Queued | None = None
        # The attempt that has a place at a provider, if any.
        self.attempt: Attempt | None = None
        # The task that fills the log, until it has ended.
        self.producer: asyncio.Task[None] | None = None
        # The exchange that fills the log, while it is under way.
        self.source: Source | None = None
        # The monotonic time of the first content that was shown; no other attempt is made after it.
        self.answered_at = 0.0
        # The provider's meter, which counts the events.
        self.meter = NO_METER
        # The record of the request that began this stream.
        self.record = NO_RECORD
        self.head = protocol_frames.frame_head(request_id)
        self.max_bytes = max_bytes
        # The kind of answer, None if it does not come from a provider; and the state of its
        # events.
        self.api: AnswerApi | None = None
        self.events = PLAIN_EVENTS
        self.conversation_id: str | None = None
        # An answer that was not streamed, kept for a client that comes back.
        self.whole: WholeAnswer | None = None
        # The bytes of text that the producer keeps beside the log while the answer runs, or of a
        # preamble that it holds.
        self.text_bytes = 0
        # The keeper that stores the answer before the log gets its event `complete`; and that
        # event, while it waits for that.
        self.keeper: Keeper | None = None
        self.ending: tuple[Awaitable[None], Mapping[str, Any], bytes] | None = None
        # The provider's bytes that say that the answer is complete, and the number of their
        # events: no reader may see them before it is stored.
        self.closing: tuple[bytes, int] | None = None
        # The transcript of the answer so far, if another attempt could continue it.
        self.transcript: Transcript | None = None
        # Counts a body that is collected for the log, once there is one.
        self.held: Held | None = None
        # A second name by which the log is found.
        self.alias: str | None = None
        # Whether it runs to its end without a reader, within bounds of its own.
        self.background = False
        # Runs while the log is detached, and cancels it when its window is over.
        self.timer: asyncio.TimerHandle | None = None
        # Whether the log was cancelled because it had no reader.
        self.abandoned = False
        # Whether its client has cancelled it: the client has wanted the text until then.
        self.cancelled_by_client = False
        # The error with which a cancelled log ends; None if it ends with the event `cancelled`, as
        # when a reader asked for that.
        self.cancel_reason: AioserverError | None = None
        self._store = store
        # The same sum as in `recount`, for the initial state.
        self.extra_bytes = size = STREAM_OVERHEAD + 3 * len(self.head) + len(self.outcome.model)
        if store is not None:
            store.count_bytes(self, size)

    @property
    def first(self) -> int:
        """The number of the oldest event that is kept; last + 1 if none is."""
        self.close_fast_path()
        return self.entries[0].first if self.entries else self.last + 1

    @property
    def answered(self) -> bool:
        """Whether content of a provider was shown: no other is asked."""
        return self.answered_at > 0

    @property
    def sent(self) -> bool:
        """Whether a request was sent to a provider: from then on the answer costs money."""
        return self.outcome.sent

    @property
    def place(self) -> str:
        """The provider at which it has a place now; empty while it waits, for a place or for a
        retry.
        """
        return "" if self.attempt is None else self.attempt.place

    def mark_answered(self) -> None:
        """Note that content which has come from a provider is shown next: no other attempt
        follows.
        """
        if not self.answered_at:
            self.answered_at = now = monotonic()
            self.record.answered(now)
            if self.attempt is not None:
                self.attempt.first_event()

    def add_alias(self, alias: str) -> None:
        """Let this stream be found by *alias*, the provider's id of the answer, too.

        A private one is not found at all.
        """
        if self.keeper is not None:
            self.keeper.identified(alias)
        if self.alias is None and not self.private and self._store is not None:
            self.alias = alias
            self._store.add_alias(self, alias)

    def hold(self) -> Held | None:
        """Return a count for a body that is collected for the log, None without a store; it is
        released when the producer has ended.
        """
        if self.held is None and self._store is not None:
            self.held = self._store.hold()
        return self.held

    def add_reader(self, reader: Reader) -> None:
        """Let *reader* follow from now on."""
        self.readers.append(reader)
        if self.path is not None:
            self.close_fast_path()

    def remove_reader(self, reader: Reader) -> None:
        """Let *reader* follow no longer. Entries that only this reader had still to read are no
        longer unread.
        """
        self.readers.remove(reader)
        if self.path is not None:
            self.close_fast_path()
        if self.readers:
            self.trim()

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
        if self.path is not None:
            self.close_fast_path()
        first, frames = self.last + 1, None
        if chunks:
            frames, count = frames_of(self.head, first, status, chunks), len(chunks)
        self.add_entry(Entry(first, count, status, data, frames, monotonic()))
        if status is CHUNK:
            self.meter.events += count
        if not more:
            self.notify()

    def append_whole(self, answer: WholeAnswer, body: bytes, pieces: Sequence[slice] = ()) -> None:
        """Append *answer*, which was not streamed, as events with the *pieces* of its text, and
        keep it.
        """
        self.whole = answer
        self.recount()
        for piece in pieces or (NO_TEXT,):
            self.add_entry(WholeEntry(self.last + 1, body, piece, monotonic()))
        self.notify()

    def close_fast_path(self) -> None:
        """Close the fast path, so that the log has everything that was forwarded.

        Code that reads `entries`, or adds to them, must call this before.
        """
        if (path := self.path) is not None:
            self.path = None
            path.close()

    def append_forwarded(self, entry: Entry) -> None:
        """Add *entry*, which the only reader got by its fast path; `last` counts it already."""
        self.entries.append(entry)
        self._grow(entry.size)

    def recount(self, grown: int = 0) -> None:
        """Count what is kept beside the entries, and *grown* bytes of entries. To be called when
        either has changed.
        """
        outcome = self.outcome
        size = STREAM_OVERHEAD + 3 * len(self.head) + len(outcome.model) + self.text_bytes
        if self.events is not PLAIN_EVENTS:
            size += self.events.size
        if headers := outcome.headers:
            size += sum(len(name) + len(text) + HEADER_OVERHEAD for name, text in headers.items())
        if self.transcript is not None:
            size += self.transcript.size
        if self.whole is not None:
            size += self.whole.size
        if self.error is not None:
            size += self.error.size
        grown += size - self.extra_bytes
        self.extra_bytes = size
        if grown and self._store is not None:
            self._store.count_bytes(self, grown)

    @property
    def kept_bytes(self) -> int:
        """The bytes that count for `max_kept_bytes`: the entries, and the data kept
        beside them.
        """
        return self.bytes + self.extra_bytes

    def shed(self) -> bool:
        """Discard all but the newest entry, and drop late readers; return whether there were any."""
        self.close_fast_path()
        if not any(map(self._late, self.readers)):
            return False
        self._discard(len(self.entries) - 1)
        return True

    def cut(self, size: int) -> None:
        """Discard the oldest entries that every reader has passed: *size* bytes of them, or as
        much as there is.

        The newest entry stays, and so does an answer that was not streamed. The fast path may stay
        open, since its texts are newer.
        """
        entries, offset = self.entries, self.offset
        passed = [reader.next_index - offset for reader in self.readers]
        most = 0 if self.whole is not None else min([len(entries) - 1, *passed])
        count = freed = 0
        while count < most and freed < size:
            freed += entries[count].size
            count += 1
        if count:
            self._discard(count)

    def drop_said(self) -> None:
        """Forget the transcript of the answer: it will not be continued."""
        if self.transcript is not None:
            self.transcript.drop()
            self.recount()

    def trim(self) -> None:
        """Discard entries beyond `max_stream_bytes`; if no client can come back, also those that
        every reader has passed.

        In the latter case the source pauses, or goes on, according to the progress of the readers.
        """
        if self.window > 0:
            if self.bytes > self.max_bytes:
                self._discard()
        elif self.entries:
            self._discard()
            if self.source is not None and (len(self.readers) < 2 or self._due()):
                self._regulate(self.source)

    def note_passed(self) -> None:
        """Note that a reader which was behind has passed entries."""
        if self.window <= 0:
            self._discard()
            if self.source is not None:
                self._regulate(self.source)

    def forward(self, data: bytes, count: int, *, more: bool = False) -> None:
        """Append the provider's bytes of *count* whole events.

        The bytes are not kept if no other client can find the log and its only reader writes them
        at once. The effect is that of an append after which every reader has passed the entry.
        """
        if self.path is not None:
            self.close_fast_path()
        if self.transcript is not None and self.transcript.add(data):
            self.recount()
        self.meter.events += count
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
        else:
            self.add_entry(Entry(self.last + 1, count, CHUNK, data, None, monotonic()))
            if not more:
                self.notify()

    def close_with(self, data: bytes, count: int) -> None:
        """Append the provider's bytes of the last *count* events, which say that the answer is
        complete, together with the end of the log that follows, once its answer is stored.
        """
        if self.path is not None:
            self.close_fast_path()
        if self.transcript is not None and self.transcript.add(data):
            self.recount()
        self.closing = data, count

    def open_fast_path(self, shape: Shape | None = None) -> Path | None:
        """Return the fast path of the only reader, if that reader has passed all entries.

        Without a *shape* the path forwards the provider's bytes, and the log keeps none of them; nor
        does it keep a translated answer.
        """
        if self.path is not None:
            self.close_fast_path()
        if not self.answered_at or len(self.readers) != 1:
            return None
        kept = shape is not None and not isinstance(shape.reading, ChunkReader)
        if not kept and (not self.private or self.entries):
            return None
        self.path = self.readers[0].open_fast_path(shape)
        return self.path

    def append_processing(self) -> None:
        """Append event 1: a place at a provider is taken.

        Later attempts only change the outcome. In a private log it is only counted.
        """
        if self.last:
            return
        self.recount()
        if self.private:
            self.last = 1
            return
        outcome, conversation = self.outcome, self.conversation_id
        self.append(PROCESSING, [processing(outcome.provider, outcome.model, conversation)])

    def finish(self, chunk: Mapping[str, Any], data: bytes = b"") -> None:
        """End the log well, once its keeper has stored the answer: now, or in `finished`, if that
        takes a while.
        """
        if self.path is not None:
            # The stored answer must include the texts that the fast path has forwarded.
            self.close_fast_path()
        keeper = self.keeper
        kept = None if keeper is None else keeper.keep(self)
        if kept is None:
            self.end(COMPLETE, chunk, data=data)
        else:
            self.ending = kept, chunk, data
            self.notify()

    async def finished(self) -> None:
        """Wait until the answer is stored, if the log is about to end, and end it.

        Cancelling leaves it without an end.
        """
        if self.ending is not None:
            await self.ending[0]
            self.end_now()

    def end_now(self) -> None:
        """End a log that is about to end, whether its answer is stored yet or not."""
        assert self.ending is not None
        _kept, chunk, data = self.ending
        self.end(COMPLETE, chunk, data=data)
        self.ending = None

    def end(self, status: bytes, chunk: Mapping[str, Any], *, data: bytes = b"") -> None:
        """Append the last event, and notify the readers and the store.

        If this raises after the event is in the log, everything was done nevertheless: each reader
        is notified.
        """
        if self.path is not None:
            self.close_fast_path()
        closing, self.closing = self.closing, None
        if closing is not None and status is COMPLETE:
            closing_data, count = closing
            self.meter.events += count
            self.add_entry(Entry(self.last + 1, count, CHUNK, closing_data, None, monotonic()))
        number = self.last + 1
        frames = [protocol_frames.frame(self.head, number, status, orjson.dumps(chunk))]
        self.end_with(Entry(number, 1, status, data, frames, monotonic()))

    def end_with(self, entry: Entry, error: AioserverError | None = None) -> None:
        """Append *entry*, the last event, as `end` does.

        *error* is its error, if it has one.
        """
        assert not self.ended, "nothing follows the end of a stream"
        if error is not None:
            self.error = error
        self.entries.append(entry)
        self.bytes += entry.size
        self.last, self.ended, self.end_status = entry.first, True, entry.status
        # The producer is done with its text.
        self.text_bytes, self.transcript = 0, None
        self._tell_end(entry.size)

    def fail(self, error: AioserverError) -> None:
        """Append *error* as the last event, for both kinds of face: as a frame, and as bytes."""
        self.error = error
        self.end(ERROR, error.as_chunk(), data=self.final_error(error, self.last + 1))

    def final_error(self, error: AioserverError, number: int) -> bytes:
        """Return *error* as the last event of the log, whose number is *number*."""
        # The form must know of the events that it has forwarded.
        self.close_fast_path()
        data = self.events.render(error)
        self.events.note(data, number)
        return data

    def _tell_end(self, grown: int = 0) -> None:
        """Count the kept bytes, including *grown* bytes of entries, and notify everyone that the
        log has ended.
        """
        try:
            self.recount(grown)
        finally:
            try:
                run_all([reader.notify for reader in self.readers])
            finally:
                try:
                    self.trim()
                finally:
                    if self._store is not None:
                        self._store.note_end(self)

    def describe(self) -> dict[str, Any]:
        """Return the description of this stream in a list of streams."""
        return {
            "request_id": self.request_id,
            "status": self.end_status.decode() or "running",
            "last_event_id": self.last,
            "first_event_id": self.first,
            "readers": len(self.readers),
        }

    def cancel(self) -> None:
        """Cancel the task that fills the log, unless the log has ended."""
        if self.producer is not None and not self.ended:
            self.producer.cancel()

    def report_position(
        self, position: int, eta: float, at: Literal["key", "provider"] = AT_PROVIDER
    ) -> None:
        """Tell the readers the position in the queue of the provider or the key, and the estimated
        wait in seconds.
        """
        self.queued = queued = Queued(at, position, eta)
        for reader in tuple(self.readers):
            reader.report_position(queued)

    def locate(self, after: int) -> tuple[int, int]:
        """Return where a reader continues after event *after*: an entry's index, and the number of
        events to skip.

        Raises:
            ResumeGap: events after *after* are no longer kept, or *after* does not exist yet.
        """
        if self.path is not None:
            self.close_fast_path()
        if self.private and not (after or self.offset):
            # From the start: event 1 has no entry.
            return 0, 0
        index, skip = locate(self.entries, self.last, after)
        return self.offset + index, skip

    def frames(self, entry: Entry) -> Sequence[bytes]:
        """Return the frames of *entry*, one for each event."""
        return entry.frames or entry.make_frames(self.head)

    def forget(self) -> int:
        """Drop all entries and the whole answer; return the bytes that were counted."""
        if self.path is not None:
            self.close_fast_path()
        freed = self.bytes + self.extra_bytes
        self.bytes = self.extra_bytes = 0
        self.offset += len(self.entries)
        self.entries.clear()
        self.whole = self.rendered = None
        return freed

    def notify(self) -> None:
        """Notify the readers of new entries."""
        # Several readers are copied: a reader that leaves while it is notified would hide the
        # next.
        for reader in self.readers if len(self.readers) < 2 else tuple(self.readers):
            reader.notify()
        self.trim()

    def add_entry(self, entry: Entry) -> None:
        """Add *entry* without notifying the readers yet."""
        assert not self.ended, "nothing follows the end of a stream"
        self.last += entry.count
        self.entries.append(entry)
        self.bytes += entry.size
        if self._store is not None:
            self._store.count_bytes(self, entry.size)

    def _grow(self, size: int) -> None:
        self.bytes += size
        if self._store is not None:
            self._store.count_bytes(self, size)

    def _discard(self, count: int = 0) -> None:
        """Discard the oldest *count* entries, which were passed or are beyond `max_stream_bytes`."""
        entries, readers, passed = self.entries, self.readers, 0
        if self.window <= 0 and readers:
            passed = (
                readers[0].next_index
                if len(readers) == 1
                else min([reader.next_index for reader in readers])
            ) - self.offset
        if passed and passed >= len(entries):
            # Usually all of them are discarded.
            self.offset += len(entries)
            entries.clear()
            self._grow(-self.bytes)
            return
        excess = self.bytes - self.max_bytes
        if passed <= 0 and count <= 0 and excess <= 0:
            return
        least = max(count, passed)
        count = freed = 0
        while len(entries) - count > 1 or (len(entries) > count and count < least):
            if count >= least and freed >= excess:
                break
            freed += entries[count].size
            count += 1
        if count:
            late = [
                (reader, entries[max(0, reader.next_index - self.offset)].first - 1)
                for reader in (readers if count > passed else ())
                if reader.next_index < self.offset + count
            ]
            del entries[:count]
            self.offset += count
            self._grow(-freed)
            for reader, seen in late:
                reader.drop(seen)

    def _late(self, reader: Reader) -> bool:
        """Return whether *reader* is far behind: by more than it gets in one write, the newest
        entry aside.
        """
        entries = self.entries
        size, index = 0, len(entries) - 1
        while index > max(reader.next_index - self.offset, 0) and size <= RESUME_BYTES:
            index -= 1
            size += entries[index].size
        return size > RESUME_BYTES

    def _regulate(self, source: Source) -> None:
        """Pause *source*, or let it go on, by the unread bytes of a log that discards passed
        entries.
        """
        if self.ended:
            return
        # Entries that an only reader has passed are discarded already.
        unread = self.bytes if len(self.readers) < 2 else self._unread_bytes()
        # A small log pauses well before its bound, which would drop the client.
        if unread <= min(RESUME_BYTES, self.max_bytes // 8):
            source.resume()
        elif unread > min(PAUSE_BYTES, self.max_bytes // 2):
            source.pause()

    def _due(self) -> bool:
        """Return whether to count, at the newest entry, the bytes that several readers have still
        to read.

        They are counted at each CHECK_EVERY-th entry and at each large one, since a count takes
        longer the more of them are unread. The count is then late by 64 KiB at most.
        """
        entries = self.entries
        if not entries:
            return True
        number = self.offset + len(entries)
        return not number % CHECK_EVERY or entries[-1].size > CHECK_BYTES

    def _unread_bytes(self) -> int:
        """Return about how many bytes none of several readers has passed, up to PAUSE_BYTES and
        one entry.

        The reader that is ahead counts: a slow reader costs the others nothing.
        """
        entries = self.entries
        ahead = max([reader.next_index for reader in self.readers]) - self.offset
        size, index = 0, len(entries)
        while index > max(ahead, 0) and size <= PAUSE_BYTES:
            index -= 1
            size += entries[index].size
        return size
