"""The fast path of the Responses API has no effect of its own, as that of the other faces: see
test_fast_path.py.
"""

from __future__ import annotations

import os
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aioserver.protocol import eventstream
from aioserver.streams.fast_path import MAX_CHUNK_BYTES
from tests.support.road import (
    RESPONSES_FACES,
    Road,
    assert_same,
    cut,
    joined,
    play,
    play_bytes,
    taking,
)
from tests.support.scripted_provider import EVENT_STREAM, LAST_CHUNK, chunk
from tests.support.waiting import ticks

EXAMPLES = int(os.environ.get("EXAMPLES", "10"))  # more by hand
DELTA = "response.output_text.delta"
RESPONSE = {"id": "resp_1", "object": "response", "status": "in_progress", "output": []}


def event(kind: str, number: int | None, *, name: str | None = None, **fields: Any) -> bytes:
    """An event of a response; *name* is that of its `event` line."""
    content = {"type": kind, **({} if number is None else {"sequence_number": number}), **fields}
    return b"event: %b\ndata: %b\n\n" % ((name or kind).encode(), orjson.dumps(content))


def delta(number: int | None, text: str = "word ", **fields: Any) -> bytes:
    return event(DELTA, number, item_id="msg_1", delta=text, **fields)


CREATED = event("response.created", 0, response=RESPONSE)


def hidden(event: bytes, name: bytes) -> bytes:
    """*event* with an escape for the second letter of this *name* of a member."""
    return event.replace(b'"%b"' % name, b'"%b\\u00%02x%b"' % (name[:1], name[1], name[2:]), 1)


def completed(number: int) -> bytes:
    return event("response.completed", number, response={**RESPONSE, "status": "completed"})


def reads_of(*events: bytes) -> list[bytes]:
    return [EVENT_STREAM, *map(chunk, events), LAST_CHUNK]


@pytest.mark.parametrize("face", RESPONSES_FACES)
@pytest.mark.parametrize("text", ["a", "Grüße 😀", '"error" \\"', "}\n\n", "x" * 1500])
async def test_parts_of_a_text_are_taken(face: str, text: str) -> None:
    deltas = [delta(number, text) for number in range(1, 5)]
    reads = reads_of(CREATED, *deltas, completed(5))

    with taking() as taken:
        seen = await play(face, reads)

    # The first one ends the preamble.
    assert taken == [*map(chunk, deltas[1:])]
    assert_same(face, seen, await play_bytes(face, b"".join(reads)))
    if face == "responses":
        assert seen.body == b"".join((CREATED, *deltas, completed(5)))
    else:
        for data in (CREATED, *deltas, completed(5)):
            assert eventstream.parse(data)[0].data[:-1] in seen.body


@pytest.mark.parametrize("face", RESPONSES_FACES)
async def test_the_first_event_after_the_head_is_looked_at_for_the_id(face: str) -> None:
    with taking() as taken:
        await play(face, reads_of(delta(0), delta(1), delta(2), delta(3), delta(4), completed(5)))

    # MAX_ID_SAMPLES of them.
    assert len(taken) == 1


OTHERS = {
    "a number twice": delta(2),
    "a number left out": delta(4),
    "no number": delta(None),
    "a number as a text": event(DELTA, None, sequence_number="3"),
    "a large number": event(DELTA, None, sequence_number=10**18),
    "two numbers": delta(3, nested={"sequence_number": 4}),
    "blanks": b'event: %b\ndata: {"type": "%b", "sequence_number": 3, "delta": "x"}\n\n'
    % (DELTA.encode(), DELTA.encode()),
    "a response object": delta(3, response={**RESPONSE, "model": "m"}),
    "an error": delta(3, error={"code": "bad", "message": "no"}),
    "an error with an escape": hidden(delta(3, error={"code": "bad", "message": "no"}), b"error"),
    "a response with an escape": hidden(delta(3, response={"id": "resp_2"}), b"response"),
    "a number with an escape": hidden(delta(4), b"sequence_number"),
    "a second type with an escape": delta(3, error=0).replace(
        b'"error":0', rb'"typ\u0065":"error","code":"bad"'
    ),
    "an end under another name": event("response.completed", 3, name=DELTA),
    "an error under another name": event("error", 3, name=DELTA, code="bad", message="no"),
    "another kind of part": event("response.reasoning_summary_text.delta", 3, delta="why"),
    "no part of a text": event("response.output_item.added", 3, item={}),
    "two events": delta(3) + delta(4),
    "two lines of data": b'event: %b\ndata: {"a":\ndata: 1}\n\n' % DELTA.encode(),
    "a comment": b": still here\n\n",
    "a comment in front": b": still here\n\n" + delta(3),
    "no name": b'data: {"type":"%b","sequence_number":3}\n\n' % DELTA.encode(),
    "CRLF": delta(3).replace(b"\n", b"\r\n"),
    "no JSON": b"event: %b\ndata: {no\n\n" % DELTA.encode(),
    "no UTF-8": b'event: %b\ndata: {"delta":"\xff"}\n\n' % DELTA.encode(),
    "a long text": delta(3, "x" * MAX_CHUNK_BYTES),
    "[DONE]": b"data: [DONE]\n\n",
}


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("name", OTHERS)
async def test_anything_between_parts_has_the_same_effect_on_both_ways(
    name: str, ended: bool
) -> None:
    other = OTHERS[name]
    number = other.count(b"data: {")
    reads = reads_of(
        *(CREATED, delta(1), delta(2), other),
        *(delta(3 + number), delta(4 + number), *[completed(5 + number)] * ended),
    )

    for face in RESPONSES_FACES:
        assert_same(face, await play(face, reads), await play_bytes(face, b"".join(reads)))


@settings(max_examples=EXAMPLES)
@given(
    st.lists(st.sampled_from([*OTHERS.values(), *(delta(n) for n in range(1, 9))]), max_size=8),
    st.lists(st.integers(0, 3000), max_size=6),
)
async def test_every_answer_is_the_same_however_it_comes(
    events: list[bytes], places: list[int]
) -> None:
    reads = reads_of(CREATED, delta(1), *events, completed(9))
    data = b"".join(reads)

    for face in RESPONSES_FACES:
        whole = await play_bytes(face, data)
        assert_same(face, await play(face, reads), whole)
        assert_same(face, await play(face, cut(data, [p for p in places if p < len(data)])), whole)


@pytest.mark.parametrize("face", RESPONSES_FACES)
async def test_an_end_in_the_same_turn_has_the_next_number(face: str) -> None:
    async with Road(face) as road:
        await road.say(EVENT_STREAM, chunk(CREATED), chunk(delta(1)))
        with taking() as taken:
            road.hear(chunk(delta(2)), chunk(delta(3)))
            road.protocol.connection_lost(None)
            await road.over()
        await ticks()

    assert len(taken) == 2
    body = joined(road.socket.written) if face == "responses" else road.socket.written
    assert b'"response.failed","sequence_number":4' in body
    assert body.index(b'"sequence_number":3') < body.index(b'"response.failed"')
