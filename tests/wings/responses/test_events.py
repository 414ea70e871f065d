"""A response that breaks off, in its own events."""

from __future__ import annotations

import random

import orjson
import pytest

from aioserver.errors import InternalError
from aioserver.protocol import eventstream
from aioserver.protocol.eventstream import parse
from aioserver.wings.responses.events import RUN_OVERHEAD, ResponseEvents

NAMED = b"event: response.output_text.delta\ndata: %b\n\n"


def test_a_response_nested_deeper_than_can_be_written_breaks_off_without_it() -> None:
    deep = b'{"id":"r1","output":[],"metadata":' + b'{"a":' * 300 + b"1" + b"}" * 301
    event = b'{"type":"response.created","sequence_number":0,"response":' + deep + b"}"
    errors = ResponseEvents()
    errors.note(b"data: " + event + b"\n\n", 1)
    assert errors.response is not None

    (failed,) = parse(errors.render(InternalError("what happened")))

    content = orjson.loads(failed.data)
    assert content["sequence_number"] == 1
    assert content["response"]["status"] == "failed"
    assert content["error"]["code"] == "internal_error"


def test_a_response_of_any_depth_is_shown_as_it_came_and_its_status_can_be_another() -> None:
    for depth in (1, 300, 900):
        deep = b'{"a": ' * depth + b"1.50" + b"}" * depth
        response = b'{"id":"r1", "status": "in_progress","metadata":%b}' % deep
        events = ResponseEvents()
        events.note(b'data: {"sequence_number":0,"response":%b}\n\n' % response, 1)

        assert events.newest() == response
        assert events.newest("cancelled") == (
            b'{"id":"r1","status":"cancelled","metadata":%b}' % deep
        )


def test_what_is_remembered_of_events_that_follow_each_other_does_not_grow() -> None:
    events = ResponseEvents()
    before = events.size
    for number in range(10_000):
        events.note(b'data: {"type":"x","sequence_number":%d}\n\n' % number, 2 + number)

    assert events.size - before <= RUN_OVERHEAD
    assert events.event_before(7_000, 10_001) == 7_002


def test_an_event_without_a_number_among_others_is_not_sent_again() -> None:
    events = ResponseEvents()
    events.note(b'data: {"sequence_number":1}\n\ndata: {}\n\ndata: {"sequence_number":3}\n\n', 2)

    assert events.event_before(1, 4) == 3
    assert events.event_before(2, 4) == 3


def test_what_is_remembered_is_counted() -> None:
    events = ResponseEvents()
    response = b'{"id":"r1","text":"%b"}' % (b"x" * 10_000)
    events.note(b'data: {"sequence_number":0,"response":%b}\n\n' % response, 2)
    assert events.size >= 10_000
    before = events.size
    for number in range(1, 101):  # a provider that does not count as it should
        events.note(b'data: {"sequence_number":%d}\n\n' % (2 * number), 2 + number)

    assert events.size - before == 100 * RUN_OVERHEAD


def test_without_a_response_there_is_none_to_show() -> None:
    events = ResponseEvents()
    assert events.newest() is None
    events.note(b'data: {"sequence_number":0,"response":null}\n\n', 1)
    assert events.newest() is events.newest("cancelled") is None


@pytest.mark.parametrize("seed", range(4))
def test_events_that_come_together_are_remembered_as_single_ones(seed: int) -> None:
    dice = random.Random(seed)
    for _ in range(500):
        number, events = 0, list[bytes]()
        for _ in range(dice.randint(1, 8)):
            # Most have the next number.
            number += dice.choice((1,) * 20 + (0, 2))
            member = dice.choice(
                (b',"delta":"a"',) * 12
                + (b"", b',"response":{"id":"a"}', b',"response":1', b',"x":{"sequence_number":9}')
            )
            form = dice.choice((NAMED,) * 30 + (b"data: %b\n\n", b"event: a\r\ndata: %b\r\n\r\n"))
            events.append(form % (b'{"sequence_number":%d%b}' % (number, member)))
            events += [dice.choice((b": c\n\n", NAMED % b"{}"))] * (dice.random() < 0.03)
            if dice.random() < 0.03:
                number += 1
                events.append(b': "sequence_number":%d,\n\n' % number)
            if dice.random() < 0.05:
                # One event has two such numbers, and the next one has none.
                two = b'{"sequence_number":%d,"x":{"sequence_number":%d,"y":1}}'
                events += [NAMED % (two % (number + 1, number + 2)), NAMED % b'{"y":1}']
                number += 2
        together, apart = ResponseEvents(), ResponseEvents()

        together.note(b"".join(events), 2)
        numbered = 2
        for event in events:
            apart.note(event, numbered)
            numbered += eventstream.count(event)

        assert together.state() == apart.state()
