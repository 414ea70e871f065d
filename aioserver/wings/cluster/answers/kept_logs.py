"""Logs that have ended and are handed over: an instance that stops stores them in Redis. The first
instance that is asked for such a log adopts it, as a stream of its own.

A log is stored as bytes (`KeptLog`, in msgpack), for the rest of its window.
"""

from __future__ import annotations

from heapq import heappop, heapreplace
from math import ceil
from time import monotonic
from typing import TYPE_CHECKING

import msgspec

from aioserver.errors import ServerShutdown
from aioserver.protocol.whole_answer import text_pieces
from aioserver.providers.request import Answer
from aioserver.streams.contracts import PLAIN_EVENTS
from aioserver.streams.entries import CHUNK, NO_TEXT, Entry, TextEntry, WholeEntry
from aioserver.streams.store import ended_at, owner_of
from aioserver.wings.cluster.answers.faults import Fault, error_of, fault_of

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator, Mapping

    from aioserver.auth.callers import Caller
    from aioserver.providers.request import Api
    from aioserver.streams.store import StreamStore
    from aioserver.streams.stream import Stream

# Bytes of all logs that one instance hands over at most.
MAX_BYTES = 1 << 26


class KeptEntry(msgspec.Struct, array_like=True):
    """An entry: its *frames*, or the bytes of the provider in *data*; *texts* says that these are
    only texts.
    """

    first: int
    count: int
    status: bytes
    data: bytes
    frames: list[bytes] | None
    texts: bool

    def entry(self) -> Entry:
        """Return the entry."""
        if self.texts:
            return TextEntry(self.first, self.count, self.data, monotonic())
        status = CHUNK if self.status == CHUNK else self.status
        return Entry(self.first, self.count, status, self.data, self.frames, monotonic())


class KeptAnswer(msgspec.Struct, array_like=True):
    """An answer that was not streamed, of which the entries before the last one are made."""

    status: int
    content_type: str
    body: bytes


class KeptLog(msgspec.Struct, array_like=True):
    """A log, and the facts about its answer beside the events.

    It is found by *request_id* and *alias*. *path* is that of its API, and *after* the event before
    the first one that is kept. *runs* and *newest* come from `AnswerEvents.state`; None if it
    remembers no event. *last* is the event with which it has ended.
    """

    request_id: str
    alias: str | None
    digest: bytes
    conversation_id: str | None
    provider: str
    model: str
    attempts: int
    headers: dict[str, str]
    answered: bool
    path: str
    runs: list[tuple[int, int, int]] | None
    newest: bytes
    after: int
    entries: list[KeptEntry]
    whole: KeptAnswer | None
    last: KeptEntry
    fault: Fault | None


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(KeptLog)


# Handing over.


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


def names_of(stream: Stream) -> list[str]:
    """Return the ids by which the log of *stream*, which has ended, is to be found. If the end of
    the server has cut its answer, its request id must be free for a new one.
    """
    cut = isinstance(stream.error, ServerShutdown)
    return [name for name in (None if cut else stream.request_id, stream.alias) if name]


def log_of(stream: Stream) -> bytes:
    """Return the log of *stream*, which has ended, as bytes."""
    stream.close_fast_path()
    outcome, names, error = stream.outcome, names_of(stream), stream.error
    runs, newest = stream.events.state() or (None, b"")
    *entries, last = stream.entries
    whole = None
    if isinstance(answer := stream.whole, Answer):
        entries, whole = [], KeptAnswer(answer.status, answer.content_type, answer.body)
    return _encoder.encode(
        KeptLog(
            names[0],
            names[1] if names[1:] else None,
            stream.digest,
            stream.conversation_id,
            outcome.provider,
            outcome.model,
            outcome.attempts,
            dict(outcome.headers),
            stream.answered,
            "" if stream.api is None else stream.api.path,
            runs,
            newest,
            stream.first - 1,
            [_kept(entry) for entry in entries],
            whole,
            _kept(last),
            None if error is None else fault_of(error),
        )
    )


def _kept(entry: Entry) -> KeptEntry:
    if isinstance(entry, TextEntry):
        return KeptEntry(entry.first, entry.count, entry.status, entry.texts, None, texts=True)
    frames = None if entry.frames is None else list(entry.frames)
    return KeptEntry(entry.first, entry.count, entry.status, entry.data, frames, texts=False)


# Adopting.


def read(log: bytes) -> KeptLog | None:
    """Return the log that was handed over as these bytes; None if they are not one."""
    try:
        return _decoder.decode(log)
    except (msgspec.MsgspecError, RecursionError):
        return None


async def entries_of(kept: KeptLog) -> list[Entry]:
    """Return the entries of *kept* before the last one, in steps."""
    if kept.whole is None:
        return [each.entry() for each in kept.entries]
    body = kept.whole.body
    pieces = await text_pieces(body) or (NO_TEXT,)
    return [WholeEntry(number, body, piece, monotonic()) for number, piece in enumerate(pieces, 1)]


def adopt(
    kept: KeptLog,
    entries: Iterable[Entry],
    store: StreamStore,
    caller: Caller,
    name: str,
    seconds: float,
    apis: Mapping[str, Api],
) -> Stream:
    """Return a stream of *caller* in *store* that has the log *kept*, with its *entries*, and is
    found by *name* for another *seconds*, as its former owner would keep it.

    *apis* are the APIs by their paths.

    Raises:
        ServerAtCapacity: there is no room for it.
    """
    names = [each for each in (kept.request_id, kept.alias) if each is not None]
    if name not in names or any(store.find(caller, each) is not None for each in names):
        # Another answer has got its other id meanwhile.
        names = [name]
    # Streams are forgotten by their windows: those of whole seconds are few.
    stream = store.open(names[0], caller, window=ceil(seconds), digest=kept.digest)
    if names[1:]:
        stream.alias = names[1]
        store.add_alias(stream, names[1])
    _fill(stream, kept, entries, apis.get(kept.path))
    return stream


def _fill(stream: Stream, kept: KeptLog, entries: Iterable[Entry], api: Api | None) -> None:
    outcome, whole = stream.outcome, kept.whole
    outcome.provider, outcome.model = kept.provider, kept.model
    outcome.attempts, outcome.headers = kept.attempts, kept.headers
    stream.api, stream.conversation_id, stream.last = api, kept.conversation_id, kept.after
    if kept.answered:
        stream.answered_at = monotonic()
    if kept.runs is not None and api is not None:
        if stream.events is PLAIN_EVENTS:
            stream.events = api.events()
        stream.events.restore(kept.runs, kept.newest)
    if whole is not None:
        stream.whole = Answer(whole.status, whole.body, whole.content_type, outcome)
    stream.recount()
    for entry in entries:
        stream.add_entry(entry)
    stream.end_with(kept.last.entry(), None if kept.fault is None else error_of(kept.fault))
