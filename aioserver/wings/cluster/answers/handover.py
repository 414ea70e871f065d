"""The hand-over of ended logs: an instance that stops stores them in Redis, where others read them.

A log is stored as bytes (log_codec.py), for the rest of its window.
"""

from __future__ import annotations

from heapq import heappop, heapreplace
from time import monotonic
from typing import TYPE_CHECKING, Any

from aioserver.errors import ResumeGap, ServerShutdown, StreamNotFound
from aioserver.protocol.whole_answer import text_pieces
from aioserver.streams.entries import NO_TEXT, WholeEntry
from aioserver.streams.store import ended_at, owner_of
from aioserver.wings.cluster.answers import log_codec
from aioserver.wings.cluster.answers.peer_messages import Malformed

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping

    from aioserver.gateway.contracts.instances import Start
    from aioserver.providers.api import Api
    from aioserver.streams.entries import Entry
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
    pieces = log_codec.pack(facts, body)
    index = stream.offset
    while (item := log_codec.next_item(stream, index, 0)) is not None:
        index, more = item
        pieces += more
    return b"".join(pieces)


async def fill(
    stream: Stream,
    log: bytes,
    start: Start,
    on_accept: Callable[[], None],
    apis: Mapping[str, Api],
) -> None:
    """Fill the mirror *stream* with a *log* that was handed over, from *start* on.

    *apis* are the APIs by their paths.

    Raises:
        StreamNotFound: the stored bytes are not a log.
        ResumeGap: the log does not have the events after *start*.
    """
    try:
        items = list(log_codec.Assembler().feed(log))
    except Malformed as exc:
        raise StreamNotFound("this answer is not kept any more") from exc
    heads = [head for head, _body in items]
    if (
        not heads
        or not isinstance(heads[0], log_codec.Facts)
        or not isinstance(heads[-1], log_codec.End)
    ):
        raise StreamNotFound("this answer is not kept any more")
    (facts, newest), items = (heads[0], items[0][1]), items[1:]
    log_codec.take_facts(stream, facts, newest, apis)
    after = _after(stream, facts, start)
    stream.last = after
    on_accept()
    entries: list[Entry] = []
    for head, body in items:
        match head:
            case log_codec.Part():
                entries.append(log_codec.entry_of(head, body))
            case log_codec.Whole():
                stream.whole = log_codec.answer_of(stream, head, body)
                stream.recount()
                pieces = await text_pieces(body) or (NO_TEXT,)
                entries += [
                    WholeEntry(number, body, piece, monotonic())
                    for number, piece in enumerate(pieces, 1)
                ]
            case log_codec.End():
                _end(stream, after, entries, head, body)
                return


def _after(stream: Stream, facts: log_codec.Facts, start: Start) -> int:
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
    return after


def _end(
    stream: Stream, after: int, entries: list[Entry], end: log_codec.End, body: bytes
) -> None:
    error: Any = None if end.fault is None else log_codec.unpack_fault(end.fault)
    if after >= end.number:
        stream.stop(end.status)
        return
    last = log_codec.entry_of(log_codec.Part(end.number, 1, end.status, False, end.frames), body)
    for entry in entries:
        if (part := log_codec.rest_of(stream, entry, after)) is not None:
            stream.add_entry(part)
    stream.notify()
    stream.end_with(last, error)
