"""The hand-over of ended logs: an instance that stops stores them in Redis, and whoever is asked
for one of them adopts it.

A log is stored as bytes (log_codec.py), for the rest of its window.
"""

from __future__ import annotations

from heapq import heappop, heapreplace
from math import ceil
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple

from aioserver.errors import RequestConflict, ResumeGap, ServerShutdown
from aioserver.protocol.whole_answer import text_pieces
from aioserver.streams.entries import NO_TEXT, Entry, WholeEntry
from aioserver.streams.store import ended_at, owner_of
from aioserver.wings.cluster.answers import log_codec
from aioserver.wings.cluster.answers.peer_messages import Malformed

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping

    from aioserver.auth.callers import Caller
    from aioserver.gateway.contracts.instances import Start
    from aioserver.providers.api import Api
    from aioserver.streams.store import StreamStore
    from aioserver.streams.stream import Stream

# Bytes of all logs that one instance hands over at most.
MAX_BYTES = 1 << 26


def kept_seconds(stream: Stream) -> float:
    """Return the seconds that are left of the window of *stream*, which has ended."""
    return ended_at(stream) + stream.window - monotonic()


def polled(stream: Stream) -> bool:
    """Return whether clients poll *stream* by an id that the server has made. They must learn of
    any end of it, also of an error.
    """
    return stream.background and stream.alias is not None


def chosen(streams: Iterable[Stream]) -> Iterator[tuple[Stream, float, bytes]]:
    """Yield the *streams* to hand over, each with the seconds that it is kept, and its log.

    *streams* has the newest first. The next stream is always one of the owner with the fewest bytes
    so far, so that no owner takes the room of all others.

    An answer that was cut by the end of the server is left out, so that the same request gets a new
    answer. It is included if it is polled, since its id does not come with a new request.
    """
    owned: dict[Hashable, list[Stream]] = {}
    for stream in streams:
        cut = isinstance(stream.error, ServerShutdown) and not polled(stream)
        whole = stream.ended and stream.entries and not cut
        if whole and kept_seconds(stream) > 0:
            owned.setdefault(owner_of(stream.caller), []).append(stream)
    # For each owner: the bytes of its logs so far, its number, and its streams.
    heap = [(0, number, iter(own)) for number, own in enumerate(owned.values())]
    left = MAX_BYTES
    while heap:
        size, number, own = heap[0]
        newest = next(own, None)
        log = b"" if newest is None else log_of(newest)
        if newest is None or len(log) > left:
            heappop(heap)
            continue
        left -= len(log)
        heapreplace(heap, (size + len(log), number, own))
        yield newest, kept_seconds(newest), log


def log_of(stream: Stream) -> bytes:
    """Return the log of *stream*, which has ended, as bytes."""
    stream.close_fast_path()
    facts, body = log_codec.facts_of(stream, stream.first - 1)
    if isinstance(stream.error, ServerShutdown):
        # The request id must be free for a new answer.
        facts.request_id, facts.alias = stream.alias or "", None
    pieces = log_codec.pack(facts, body)
    index = stream.offset
    while (item := log_codec.next_item(stream, index, 0)) is not None:
        index, more = item
        pieces += more
    return b"".join(pieces)


def names_of(stream: Stream) -> list[str]:
    """Return the ids by which the log of *stream*, which has ended, is to be found."""
    cut = isinstance(stream.error, ServerShutdown)
    return [name for name in (None if cut else stream.request_id, stream.alias) if name]


class KeptLog(NamedTuple):
    """A log that was handed over: its *facts* and *newest* event, its *entries*, its *whole* answer
    if it was not streamed, and its *end*.
    """

    facts: log_codec.Facts
    newest: bytes
    entries: list[Entry]
    whole: tuple[log_codec.Whole, bytes] | None
    end: log_codec.End
    last: bytes

    def fill(self, stream: Stream, after: int, apis: Mapping[str, Api]) -> None:
        """Append all events after event *after* to *stream*, which has none, and end it. *apis* are
        the APIs by their paths.
        """
        log_codec.take_facts(stream, self.facts, self.newest, apis)
        stream.last = after
        if self.whole is not None:
            head, body = self.whole
            stream.whole = log_codec.answer_of(stream, head, body)
            stream.recount()
        end = self.end
        if after >= end.number:
            stream.stop(end.status)
            return
        for entry in self.entries:
            if (part := log_codec.rest_of(stream, entry, after)) is not None:
                stream.add_entry(part)
        stream.notify()
        error = None if end.fault is None else log_codec.unpack_fault(end.fault)
        event = log_codec.Part(end.number, 1, end.status, False, end.frames)
        stream.end_with(log_codec.entry_of(event, self.last), error)


async def read(log: bytes) -> KeptLog | None:
    """Return the *log* that was handed over as these bytes; None if they are not one."""
    try:
        items = list(log_codec.Assembler().feed(log))
    except Malformed:
        return None
    if len(items) < 2:
        return None
    (facts, newest), *parts, (end, last) = items
    if not isinstance(facts, log_codec.Facts) or not isinstance(end, log_codec.End):
        return None
    entries, whole = list[Entry](), None
    for head, body in parts:
        if isinstance(head, log_codec.Part):
            entries.append(log_codec.entry_of(head, body))
        elif isinstance(head, log_codec.Whole):
            whole = head, body
            entries += [
                WholeEntry(number, body, piece, monotonic())
                for number, piece in enumerate(await text_pieces(body) or (NO_TEXT,), 1)
            ]
    return KeptLog(facts, newest, entries, whole, end, last)


def adopt(
    kept: KeptLog,
    store: StreamStore,
    caller: Caller,
    name: str,
    seconds: float,
    apis: Mapping[str, Api],
) -> Stream:
    """Return a stream of *caller* in *store* that has the log *kept*, and is found by *name* for
    another *seconds*, as its former owner would keep it.

    Raises:
        ServerAtCapacity: there is no room for it.
    """
    facts = kept.facts
    names = [each for each in (facts.request_id, facts.alias) if each is not None]
    if name not in names or any(store.find(caller, each) is not None for each in names):
        # Another answer has got its other id meanwhile.
        names = [name]
    # Streams are forgotten by their windows: a few whole seconds are few windows.
    stream = store.open(names[0], caller, window=ceil(seconds), digest=facts.digest)
    if names[1:]:
        stream.alias = names[1]
        store.add_alias(stream, names[1])
    kept.fill(stream, facts.after, apis)
    return stream


def fill_mirror(
    stream: Stream,
    kept: KeptLog,
    start: Start,
    on_accept: Callable[[], None],
    apis: Mapping[str, Api],
) -> None:
    """Fill the mirror *stream* with the log *kept*, from *start* on.

    Raises:
        RequestConflict: it belongs to another request.
        ResumeGap: it does not have the events after *start*.
    """
    facts = kept.facts
    if start.digest is not None and start.digest != facts.digest:
        raise RequestConflict("this request id is already known, with another payload")
    log_codec.take_facts(stream, facts, kept.newest, apis)
    after: int | None = start.after
    if start.sequence is not None and facts.runs is not None:
        after = stream.events.event_before(start.sequence, facts.last)
        if after is None:
            raise ResumeGap(f"event {start.sequence} does not exist yet")
    if after is None:
        after = facts.last
    if after > facts.last:
        raise ResumeGap(f"event {after} does not exist yet; the newest is {facts.last}")
    if after < facts.after:
        raise ResumeGap(
            f"events after {after} are no longer kept; the oldest is {facts.after + 1}"
        )
    stream.last = after
    on_accept()
    kept.fill(stream, after, apis)
