"""Members of the top level: found, added and taken out in the bytes, as a decoder reads the
body.
"""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from aioserver.errors import InvalidRequest
from aioserver.protocol.model_body import MAX_LONG_PLACES, Member, Place

INPUT, PREVIOUS = Member("input"), Member("previous_response_id")

KEYS = st.sampled_from(["input", "previous_response_id", 'in"put', "a", ""])
VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.sampled_from(["input", '"input":1', "é"])
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=3)),
    max_leaves=8,
)
OBJECTS = st.dictionaries(KEYS, VALUES, max_size=4)


def written(content: Any, indent: int | None, *, escaped: bool) -> bytes:
    text = json.dumps(content, indent=indent, ensure_ascii=False)
    return (
        text.replace('"inp', r'"\u0069np').replace('"prev', r'"p\u0072ev') if escaped else text
    ).encode()


def place_of(member: Member, data: bytes) -> Place:
    place = member.place(data)
    assert place is not None
    return place


@settings(max_examples=40)
@given(OBJECTS, st.sampled_from([None, 0, 2]), st.booleans())
def test_a_member_is_found_whatever_is_around_it(
    content: dict[str, Any], indent: int | None, escaped: bool
) -> None:
    data = written(content, indent, escaped=escaped)
    value = INPUT.value(data)
    if "input" not in content:
        assert value == b""
        added = INPUT.insert(data, (b"[", b"1]"))
        assert json.loads(added) == {"input": [1], **content}
        return

    place = INPUT.find(data, value)

    assert data[place.value : place.end] == value
    replaced = data[: place.value] + b"7" + data[place.end :]
    assert json.loads(replaced) == {**content, "input": 7}


@settings(max_examples=40)
@given(OBJECTS, st.sampled_from([None, 0, 2]), st.booleans())
def test_a_member_is_taken_out(content: dict[str, Any], indent: int | None, escaped: bool) -> None:
    assume("previous_response_id" in content)

    data = written(content, indent, escaped=escaped)
    start, stop = PREVIOUS.extent(data, place_of(PREVIOUS, data))
    rest = data[:start] + data[stop:]

    PREVIOUS.check_absent(rest)

    del content["previous_response_id"]
    assert json.loads(rest) == content


def test_white_space_without_end_hides_no_comma() -> None:
    for text in ('{"a":1,%s"previous_response_id":2}', '{%s"previous_response_id":2%s}'):
        data = text.replace("%s", " " * 10_000).encode()

        start, stop = PREVIOUS.extent(data, place_of(PREVIOUS, data))

        assert json.loads(data[:start] + data[stop:]) == ({"a": 1} if "a" in text[:3] else {})


def test_a_member_that_is_still_there_is_noticed() -> None:
    with pytest.raises(InvalidRequest, match="several keys previous_response_id"):
        PREVIOUS.check_absent(b'{"previous_response_id":1}')


def test_the_last_of_several_is_the_one_that_is_found() -> None:
    data = b'{"input":[1],"a":{"input":[1]},"input":[1],"b":0}'

    place = INPUT.find(data, INPUT.value(data))

    assert data[place.key :] == b'"input":[1],"b":0}'


@pytest.mark.parametrize(
    "data",
    [
        b'{"a":{"input":12},"input":1}',
        b'{"a":[{"input":1.5}, {"input":1e3}],"input" : 1 ,"b":0}',
        b'{"input":10,"input":1}',
        rb'{"a":{"input":12},"\u0069nput":1}',
    ],
)
def test_a_number_is_told_from_longer_ones_that_begin_with_it(data: bytes) -> None:
    place = INPUT.find(data, INPUT.value(data))

    replaced = data[: place.value] + b"[]" + data[place.end :]
    assert json.loads(replaced) == {**json.loads(data), "input": []}


@pytest.mark.parametrize("others", [1, 50, MAX_LONG_PLACES + 1])
def test_a_long_value_is_told_from_others_that_begin_in_the_same_way(others: int) -> None:
    start = b"0," * 5000
    other = b'{"input":[%b1]},' % start
    data = b'{"x":[%b0],"input":[%b2]}' % (other * others, start)
    value = INPUT.value(data)

    if others > MAX_LONG_PLACES:
        with pytest.raises(InvalidRequest, match=f"more than {MAX_LONG_PLACES} keys input"):
            INPUT.find(data, value)
    else:
        place = INPUT.find(data, value)
        assert (place.key, place.end) == (data.rindex(b'"input"'), len(data) - 1)


def test_a_hostile_body_costs_no_more_than_its_size() -> None:
    nested = b'{"input":%b1%b}' % (b'[{"input":' * 400, b"}]" * 400)
    many = b'{"a":[%b0],"input":[%b0]}' % (b'{"input":0},' * 100_000, b"1," * 100_000)
    tracemalloc.start()
    for body in (nested, many):
        value = INPUT.value(body)
        assert INPUT.find(body, value).end == len(body) - 1

    assert tracemalloc.get_traced_memory()[1] < 10 * len(many)
    tracemalloc.stop()
