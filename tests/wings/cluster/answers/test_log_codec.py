"""A log as bytes, and an error as a part of a message: whole however it is cut, and bounded."""

from __future__ import annotations

import pytest

from aioserver import provider_errors
from aioserver.errors import AioserverError, InternalError
from aioserver.provider_errors import ProviderFault, ProviderRefused
from aioserver.streams.entries import CHUNK, COMPLETE, Entry, TextEntry
from aioserver.streams.stream import Stream
from aioserver.telemetry.outcome import Outcome
from aioserver.wings.cluster.answers import log_codec
from aioserver.wings.cluster.answers.peer_messages import (
    MAX_READ,
    MAX_SENT,
    Attach,
    Block,
    Credit,
    Malformed,
    Publication,
    decode,
    encode,
)

CLASSES = sorted(set(provider_errors.subclasses(AioserverError)), key=lambda cls: cls.__name__)


def log() -> tuple[Stream, bytes]:
    stream = Stream("r1", "anybody", window=30.0, max_bytes=1 << 20)
    stream.append(CHUNK, [b'{"a":1}', b'{"a":2}'])
    stream.append(CHUNK, data=b"data: 1\n\ndata: 2\n\n", count=2)
    stream.add_entry(TextEntry(5, 3, b'a"b"c"'))
    stream.end(COMPLETE, {}, data=b"data: [DONE]\n\n")
    pieces, index = log_codec.pack(*log_codec.facts_of(stream, 0)), 0
    while (item := log_codec.next_item(stream, index, 0)) is not None:
        index, more = item
        pieces += more
    return stream, b"".join(pieces)


def read(data: bytes, size: int) -> list[tuple[log_codec.Head, bytes]]:
    assembler = log_codec.Assembler()
    return [
        item
        for start in range(0, len(data), size)
        for item in assembler.feed(data[start : start + size])
    ]


def test_a_log_is_the_same_under_every_cut() -> None:
    stream, data = log()
    whole = read(data, len(data))

    kinds = [type(head) for head, _body in whole]
    assert kinds == [
        log_codec.Facts,
        log_codec.Part,
        log_codec.Part,
        log_codec.Part,
        log_codec.End,
    ]
    frames = [
        frame
        for head, body in whole
        if isinstance(head, log_codec.Part)
        for frame in stream.frames(log_codec.entry_of(head, body))
    ]
    assert frames == [f for entry in stream.entries[:-1] for f in stream.frames(entry)]
    for size in range(1, len(data)):
        assert read(data, size) == whole


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_the_rest_of_an_entry_has_the_events_that_are_left(kind: int) -> None:
    stream, _data = log()
    entry = stream.entries[kind]
    frames = stream.frames(entry)

    for skip in range(1, entry.count):
        rest = log_codec.rest_of(stream, entry, entry.first + skip - 1)
        assert rest is not None
        assert (rest.first, rest.count) == (entry.first + skip, entry.count - skip)
        assert list(stream.frames(rest)) == list(frames[skip:])
    assert log_codec.rest_of(stream, entry, entry.first - 1) is entry
    assert log_codec.rest_of(stream, entry, entry.first + entry.count - 1) is None


@pytest.mark.parametrize("start", [0, 8, 9, 11])
def test_what_is_no_log_is_malformed(start: int) -> None:
    _stream, data = log()
    broken = bytearray(data)
    broken[start] ^= 0xFF

    with pytest.raises(Malformed):
        read(bytes(broken), len(broken))


def test_an_item_that_is_too_large_is_malformed_before_it_comes() -> None:
    with pytest.raises(Malformed):
        list(log_codec.Assembler().feed(b"\xff\xff\xff\xff\x00\x00\x00\x01"))


@pytest.mark.parametrize("passed", [None, (422, b'{"error":{}}')])
@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_error_looks_the_same_at_another_instance(
    cls: type[AioserverError], passed: tuple[int, bytes] | None
) -> None:
    if issubclass(cls, ProviderRefused):
        error: AioserverError = cls("why", 422, b'{"error":{}}', "theirs")
    else:
        error = cls("why", retry_after=2.5, param="model")
    error.paid = True
    if isinstance(error, ProviderFault):
        error.request_outcome = Outcome("p", "m", 3, {"x-ratelimit": "1"})
        error.provider_answer = passed

    other = log_codec.unpack_fault(log_codec.pack_fault(error))

    assert type(other) is cls
    assert "theirs" not in str(other)
    assert other.body() == error.body()
    assert (other.headers(), other.as_chunk()) == (error.headers(), error.as_chunk())
    assert other.http_status == error.http_status
    assert other.provider_answer == error.provider_answer


def test_an_error_that_is_unknown_here_is_an_internal_one() -> None:
    fault = log_codec.pack_fault(InternalError("x"))
    fault.kind = "SystemExit"

    assert type(log_codec.unpack_fault(fault)) is InternalError


def test_messages_go_out_in_bounded_publications() -> None:
    messages = [Block(1, number, b"x" * (1 << 15)) for number in range(40)]

    publications = encode("a", [Credit(1, 2), *messages])

    assert len(publications) > 4
    assert max(map(len, publications)) < MAX_SENT + (1 << 16)
    read_back = [message for data in publications for message in decode(data).messages]
    assert read_back == [Credit(1, 2), *messages]


def test_half_a_publication_is_malformed() -> None:
    for cut in range(40):
        (data,) = encode("a", [Attach(1, "c", "r" * 40, 0, None, b"d", False, 5)])
        assert decode(data) == Publication(
            "a", [Attach(1, "c", "r" * 40, 0, None, b"d", False, 5)]
        )

        with pytest.raises(Malformed):
            decode(data[:cut])


def test_a_publication_that_is_too_large_is_malformed() -> None:
    with pytest.raises(Malformed):
        decode(b"\x90" * (MAX_READ + 1))


def test_an_entry_is_counted_as_at_its_owner() -> None:
    stream, data = log()
    entries: list[Entry] = [
        log_codec.entry_of(head, body)
        for head, body in read(data, 7)
        if isinstance(head, log_codec.Part)
    ]

    assert [entry.size for entry in entries] == [entry.size for entry in stream.entries[:-1]]
