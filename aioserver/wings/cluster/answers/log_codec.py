"""The encoding of a log as bytes, for other instances and for Redis.

A log is a sequence of items. Each has a head, which is msgpack, and a body, which is copied as it
is:

    length of the head, length of the body (two 32-bit numbers, big endian), head, body

    Facts*, then Part* End, or Whole End

An item may be as large as an event. It may come in several pieces, from which a reader assembles
it. Errors are encoded here, too, so that a client gets the same error at every instance.
"""

from __future__ import annotations

import struct
from time import monotonic
from typing import TYPE_CHECKING

import msgspec

from aioserver import provider_errors
from aioserver.errors import AioserverError, InternalError
from aioserver.protocol import eventstream
from aioserver.provider_errors import ProviderFault, ProviderRefused
from aioserver.providers.request import Answer
from aioserver.streams.contracts import PLAIN_EVENTS
from aioserver.streams.entries import CHUNK, Entry, TextEntry
from aioserver.telemetry.outcome import Outcome
from aioserver.wings.cluster.answers.peer_messages import Fault, Malformed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from aioserver.providers.api import Api
    from aioserver.streams.stream import Stream

# Bytes of one item: more than any answer that is kept by default.
MAX_ITEM_BYTES = 1 << 28
_LENGTHS = struct.Struct(">II")


class Facts(msgspec.Struct, array_like=True, tag=1):
    """The facts of an answer beside its events.

    *after* is the event after which this reader gets the log, *last* the newest event now. *runs*
    come from `AnswerEvents.state`, and the body of the item is the newest event that it remembers;
    None if it remembers no event.
    """

    after: int
    last: int
    end_status: bytes
    answered: bool
    whole: bool
    provider: str
    model: str
    path: str
    conversation_id: str | None
    attempts: int
    headers: dict[str, str]
    runs: list[tuple[int, int, int]] | None = None
    # The ids by which the log is found, and what distinguishes its request from another one.
    request_id: str = ""
    alias: str | None = None
    digest: bytes = b""


class Part(msgspec.Struct, array_like=True, tag=2):
    """An entry: its *frames*, or the bytes of the provider in the body.

    If *texts* is set, the body has only texts.
    """

    first: int
    count: int
    status: bytes
    texts: bool
    frames: list[bytes]


class Whole(msgspec.Struct, array_like=True, tag=3):
    """An answer that was not streamed; its body is the item's."""

    status: int
    headers: dict[str, str]
    content_type: str
    provider: str
    attempts: int


class End(msgspec.Struct, array_like=True, tag=4):
    """The last event."""

    number: int
    status: bytes
    frames: list[bytes]
    fault: Fault | None


Head = Facts | Part | Whole | End
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Head)


def pack(head: Head, body: bytes = b"") -> list[bytes]:
    """Return an item as the pieces of which it consists; *body* is not copied."""
    encoded = _encoder.encode(head)
    start = _LENGTHS.pack(len(encoded), len(body)) + encoded
    return [start, body] if body else [start]


class Assembler:
    """Assembles items from bytes that come in any pieces.

    Always: it keeps only the bytes of the one item that is not complete.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()

    @property
    def size(self) -> int:
        """The bytes that are kept."""
        return len(self._buffer)

    def feed(self, data: bytes) -> Iterator[tuple[Head, bytes]]:
        """Add *data*, and yield the items that are complete.

        Raises:
            Malformed: the bytes are not items.
        """
        buffer = self._buffer
        buffer += data
        start = 0
        try:
            while len(buffer) - start >= _LENGTHS.size:
                head_size, body_size = _LENGTHS.unpack_from(buffer, start)
                if head_size + body_size > MAX_ITEM_BYTES:
                    raise Malformed(f"an item of {head_size + body_size} bytes")
                head_start = start + _LENGTHS.size
                body_start = head_start + head_size
                end = body_start + body_size
                if len(buffer) < end:
                    break
                try:
                    head = _decoder.decode(memoryview(buffer)[head_start:body_start].tobytes())
                except (msgspec.MsgspecError, RecursionError) as exc:
                    raise Malformed(str(exc)) from exc
                body = bytes(memoryview(buffer)[body_start:end])
                start = end
                yield head, body
        finally:
            del buffer[:start]


def facts_of(stream: Stream, after: int) -> tuple[Facts, bytes]:
    """Return the facts of *stream* now, and the body of their item."""
    outcome = stream.outcome
    runs, newest = stream.events.state() or (None, b"")
    return Facts(
        after,
        stream.last,
        stream.end_status,
        stream.answered,
        stream.whole is not None,
        outcome.provider,
        outcome.model,
        stream.api.path if stream.api is not None else "",
        stream.conversation_id,
        outcome.attempts,
        dict(outcome.headers),
        runs,
        stream.request_id,
        stream.alias,
        stream.digest,
    ), newest


def take_facts(stream: Stream, facts: Facts, body: bytes, apis: Mapping[str, Api]) -> None:
    """Set *facts* in *stream*; *apis* are the APIs by their paths."""
    outcome = stream.outcome
    stream.api = api = apis.get(facts.path)
    stream.conversation_id = facts.conversation_id
    outcome.provider, outcome.model = facts.provider, facts.model
    outcome.attempts, outcome.headers = facts.attempts, facts.headers
    if facts.answered and not stream.answered:
        stream.answered_at = monotonic()
    if facts.runs is not None and api is not None:
        if stream.events is PLAIN_EVENTS:
            stream.events = api.events()
        stream.events.restore(facts.runs, body)
    stream.recount()


def rest_of(stream: Stream, entry: Entry, after: int) -> Entry | None:
    """Return the part of *entry* after event *after*; None if it is empty."""
    skip = after + 1 - entry.first
    if skip <= 0:
        return entry
    if skip >= entry.count:
        return None
    data = b"".join(eventstream.split(entry.data)[skip:]) if entry.data else b""
    frames = None if data else stream.frames(entry)[skip:]
    return Entry(
        entry.first + skip, entry.count - skip, entry.status, data, frames, entry.received_at
    )


def entry_item(entry: Entry) -> list[bytes]:
    """Return *entry* as an item."""
    if isinstance(entry, TextEntry):
        return pack(Part(entry.first, entry.count, entry.status, True, []), entry.texts)
    frames = list(entry.frames or ())
    return pack(Part(entry.first, entry.count, entry.status, False, frames), entry.data)


def entry_of(part: Part, body: bytes) -> Entry:
    """Return the entry that *part* and its *body* encode."""
    if part.texts:
        return TextEntry(part.first, part.count, body, monotonic())
    status = CHUNK if part.status == CHUNK else part.status
    return Entry(part.first, part.count, status, body, part.frames or None, monotonic())


def end_item(stream: Stream, entry: Entry) -> list[bytes]:
    """Return *entry*, the last event of *stream*, as an item."""
    fault = None if stream.error is None else pack_fault(stream.error)
    return pack(End(entry.first, entry.status, list(entry.frames or ()), fault), entry.data)


def whole_item(answer: Answer) -> list[bytes]:
    """Return *answer* as an item."""
    outcome = answer.outcome
    headers = dict(outcome.headers)
    head = Whole(answer.status, headers, answer.content_type, outcome.provider, outcome.attempts)
    return pack(head, answer.body)


def answer_of(stream: Stream, whole: Whole, body: bytes) -> Answer:
    """Return the answer that *whole* and its *body* encode, and set its outcome in *stream*."""
    outcome = stream.outcome
    outcome.provider, outcome.attempts, outcome.headers = (
        whole.provider,
        whole.attempts,
        whole.headers,
    )
    return Answer(whole.status, body, whole.content_type, outcome)


def next_item(stream: Stream, index: int, skip: int) -> tuple[int, list[bytes]] | None:
    """Return the item of the entry at *index*, counted from the start of the log, and the index
    after it.

    The reader has *skip* events at the start of this entry already. Return None if the log has no
    such entry yet.
    """
    at = index - stream.offset
    if not 0 <= at < len(stream.entries):
        return None
    entry, last = stream.entries[at], stream.offset + len(stream.entries) - 1
    if stream.ended and index == last:
        return index + 1, end_item(stream, entry)
    if isinstance(stream.whole, Answer):
        if not stream.ended:
            # The end follows at once, and the item is then sent with it.
            return None
        # The reader makes the events from the body.
        return last, whole_item(stream.whole)
    rest = rest_of(stream, entry, entry.first - 1 + skip)
    return index + 1, entry_item(rest or entry)


_CLASSES = {cls.__name__: cls for cls in provider_errors.subclasses(AioserverError)}


def pack_fault(error: AioserverError) -> Fault:
    """Return *error* as a part of a message."""
    fault = Fault(
        type(error).__name__, error.message, error.retry_after, error.param, paid=error.paid
    )
    if isinstance(error, ProviderFault) and (outcome := error.request_outcome) is not None:
        fault.provider, fault.attempts = outcome.provider, outcome.attempts
        fault.provider_headers = dict(outcome.headers)
    if isinstance(error, ProviderRefused):
        fault.status, fault.body = error.provider_status, error.provider_body
    if isinstance(error, ProviderFault) and error.provider_answer is not None:
        fault.status, fault.body = error.provider_answer
        fault.passed = True
    return fault


def unpack_fault(fault: Fault) -> AioserverError:
    """Return the error that *fault* encodes, or an `InternalError` if its class is unknown here."""
    cls = _CLASSES.get(fault.kind)
    if cls is None or not issubclass(cls, AioserverError):
        return InternalError("internal error")
    if issubclass(cls, ProviderRefused):
        # The text of the exception lacks the reason that the provider gave, as at the owner.
        text = f"{fault.provider or 'a provider'} answered {fault.status}"
        refused = cls(text, fault.status, fault.body)
        refused.message = fault.message
        refused.retry_after, refused.param = fault.retry_after, fault.param
        error: AioserverError = refused
    else:
        error = cls(fault.message, retry_after=fault.retry_after, param=fault.param)
    error.paid = fault.paid
    # The owner has counted the error already.
    error.counted = True
    if isinstance(error, ProviderFault):
        if fault.provider:
            error.request_outcome = Outcome(
                fault.provider, "", fault.attempts, fault.provider_headers
            )
        if fault.passed:
            error.provider_answer = fault.status, fault.body
    return error
