"""text/event-stream under every cut of the bytes, against WHATWG HTML 9.2.6 written down
plainly.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aioserver.protocol.eventstream import (
    BOM,
    HEARTBEAT,
    EventTooLong,
    ServerEvent,
    Splitter,
    count,
    count_named,
    each,
    having,
    parse,
    with_lf,
    write,
)
from tests.support.event_streams import Parser, check, pieces

ENDS = (b"\n", b"\r\n", b"\r")


@pytest.mark.parametrize(
    ("data", "cuts"),
    [
        (b"data: a\r\n\r\ndata: b\r\n\r\n", [8, 10]),  # between CR and LF
        (b"data: a\r\rdata: b\r\r", [9]),
        (b"data: a\n\n\n\ndata: b\n\n\ndata: c\n\n", []),
        (b"data: a\n\r", []),
        (b"id: 1\nid: a\0b\ndata: a\n\nid\ndata\n\n", []),
        (b"data: a\n\ndata: b\r\rdata: c\n\n", []),
        # The first ends with LF alone.
        (b"data: a\r\n\r\ndata: b\n\n\ndata: c\r\n\r\n", [20]),
        (b"data: a\rdata: b\n\ndata: c\r\rdata: d\r\n\r\n", [18, 27]),
        (BOM + b"data: a\n\n", [1, 2]),
        (BOM + BOM + b"data :no\nData: no\n data: no\n:data: no\ndata:\t\nretry: 10\n\n", []),
    ],
)
def test_every_cut_gives_the_events_of_the_standard(data: bytes, cuts: list[int]) -> None:
    """The fuzz target `event_stream` has any bytes in any pieces."""
    check(data, pieces(data, cuts))
    check(data, [data[at : at + 1] for at in range(len(data))])


@pytest.mark.parametrize("end", ENDS)
def test_every_single_cut_of_a_real_stream_is_the_same(end: bytes) -> None:
    lines = (
        b": OPENROUTER PROCESSING",
        b"",
        "data: é😀".encode(),
        b"data:second line",
        b"id: 1",
        b"",
        b"event: error",
        b'data: {"error":{}}',
        b"",
        b"data: [DONE]",
        b"",
    )
    data = BOM + b"".join(line + end for line in lines)

    for at in range(len(data) + 1):
        check(data, [data[:at], data[at:]])
    assert parse(data[3:]) == [
        ServerEvent("é😀\nsecond line".encode(), b"", b"1"),
        ServerEvent(b'{"error":{}}', b"error"),
        ServerEvent(b"[DONE]"),
    ]


def test_a_block_without_its_blank_line_is_no_event() -> None:
    parser = Parser()

    assert parser.feed(b"data: half\n") == []
    assert parser.pending == b"data: half\n"


# Bounds.


def drip(splitter: Splitter, part: bytes) -> None:
    for _ in range(5000):
        splitter.feed(part)


@pytest.mark.parametrize("start", [b"data: ", b": ", b"", b"data: a\n\ndata: "])
@pytest.mark.parametrize("size", [1, 700, 4000])
def test_a_line_without_an_end_is_refused(start: bytes, size: int) -> None:
    splitter = Splitter(3000)
    splitter.feed(start)

    with pytest.raises(EventTooLong, match="more than 3000 bytes"):
        drip(splitter, b"x" * size)


def test_many_small_events_in_one_read_are_no_long_event() -> None:
    block = b"data: x\n\n" * 1000

    assert Splitter(100).feed(block) == block
    assert len(Parser(100).feed(block)) == 1000


def test_an_event_of_just_the_bound_passes() -> None:
    event = b"data: " + b"x" * 94 + b"\n\n"

    assert Splitter(100).feed(event) == event
    with pytest.raises(EventTooLong):
        Splitter(99).feed(event)


@pytest.mark.timeout(10)
@pytest.mark.parametrize("end", ENDS)
def test_a_long_event_in_small_reads_costs_no_second_look(end: bytes) -> None:
    splitter = Splitter()
    splitter.feed(b"data: a" + end + end)

    for _ in range(5_000):
        splitter.feed(b"x" * 180)

    # Looked at from its start at each read, this takes half a minute.
    assert len(splitter.feed(end + end)) == 900_000 + 2 * len(end)


# Writing.


def test_written_events_are_read_again() -> None:
    data = b'{"a":"\\n"}'

    assert write(data) == b'data: {"a":"\\n"}\n\n'
    assert write(data, event="chunk") == b'event: chunk\ndata: {"a":"\\n"}\n\n'
    assert parse(write(data, event="chunk")) == [ServerEvent(data, b"chunk")]


def test_a_heartbeat_is_no_event() -> None:
    assert Parser().feed(HEARTBEAT) == []
    assert count(HEARTBEAT) == 0


PARTS = (
    *(b"data: {}\n\n", b": x\n\n", b"\n", b"event: a\ndata: b\n\n", b"data:", b"\r\n"),
    *(b"id: 1\n\n", b"x\n\n\n"),
)


@given(st.lists(st.sampled_from(PARTS)))
def test_events_one_by_one_are_those_of_the_block(parts: list[bytes]) -> None:
    block = b"".join(parts)

    assert list(each(block)) == parse(block)
    assert list(each(block, backwards=True)) == parse(block)[::-1]


NAMED = (*PARTS, *[b"event: a\ndata: {}\n\n", b"event: b\ndata: {1}\n\n"] * 4)


@given(st.lists(st.sampled_from(NAMED)))
def test_named_events_are_counted_together_where_each_is_one(parts: list[bytes]) -> None:
    block = b"".join(parts)
    named = bool(parts) and all(
        part.startswith(b"event:") and part.endswith(b"}\n\n") for part in parts
    )

    assert count_named(block) == (len(parts) if named else 0)


@given(st.lists(st.sampled_from(NAMED)))
def test_events_with_a_mark_are_found_in_their_order(parts: list[bytes]) -> None:
    block, marks = with_lf(b"".join(parts)), (b"{}", b"event: b", b"1")

    places = list(having(block, marks))

    expected = [part for part in block.split(b"\n\n") if any(mark in part for mark in marks)]
    assert [block[place].strip(b"\n") for place in places] == [each.strip() for each in expected]
    assert all(block[place].endswith(b"\n\n") or place.stop == len(block) for place in places)
