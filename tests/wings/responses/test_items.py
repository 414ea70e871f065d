"""Items of the Responses API as bytes: joined, told apart, and put in front of a request's own."""

from __future__ import annotations

import json
import tracemalloc
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aioserver.errors import InvalidRequest, RequestTooLarge
from aioserver.protocol.steps import at_once
from aioserver.wings.responses import items as response_items
from aioserver.wings.responses.items import (
    MAX_COMMAS,
    Page,
    continued,
    input_items,
    joined,
    paging,
    replayable,
    response_parts,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

few = settings(max_examples=40)
TEXTS = st.text(max_size=8)
ITEMS = st.lists(
    st.fixed_dictionaries(
        {"content": st.one_of(TEXTS, st.lists(TEXTS, max_size=2))},
        optional={
            "id": st.one_of(st.none(), TEXTS),
            "type": st.sampled_from(["message", "function_call"]),
            "input": TEXTS,
            "role": st.sampled_from(["user", "assistant"]),
        },
    ),
    max_size=5,
)


def dumped(content: Any, indent: int | None = None) -> bytes:
    return json.dumps(content, indent=indent).encode()


def items_in(*pieces: bytes) -> Any:
    return json.loads(b"[%b]" % joined(pieces))


def listed(pieces: list[tuple[str, bytes]], **options: Any) -> Page | None:
    options = {"newest_first": False, "limit": 100, "after": None, **options}
    return at_once(paging(pieces, **options))


@few
@given(ITEMS, ITEMS, st.sampled_from([None, 0, 2]), st.booleans())
def test_a_conversation_stands_in_front_of_the_input(
    before: list[Any], own: list[Any], indent: int | None, named_first: bool
) -> None:
    fields: dict[str, Any] = {"previous_response_id": "r1", "model": "m", "input": own}
    if not named_first:
        fields = dict(reversed(fields.items()))
    history = [input_items(dumped({"input": before}, indent))]

    body = at_once(continued(dumped(fields, indent), history, 1 << 20))

    assert json.loads(body) == {"model": "m", "input": before + own}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('{"input":"a \\"b\\""}', [{"type": "message", "role": "user", "content": 'a "b"'}]),
        ('{"input":[]}', []),
        ('{"input": [ {"a":1} , 2 ] }', [{"a": 1}, 2]),
        ("{}", []),
        ('{"input":null}', []),
        ('{"input":{"a":1}}', []),
    ],
)
def test_an_input_is_a_list_of_items(body: str, expected: list[Any]) -> None:
    assert items_in(input_items(body.encode())) == expected


def test_a_request_that_continues_two_responses_is_refused() -> None:
    body = b'{"previous_response_id":"a","input":"q","previous_response_id":"b"}'

    with pytest.raises(InvalidRequest, match="several keys previous_response_id"):
        at_once(continued(body, [], 1 << 20))


def test_what_is_put_together_is_bounded_before_it_is_made() -> None:
    history = [b'{"a":"%b"}' % (b"x" * 1000)]
    body = b'{"input":"q"}'
    size = len(at_once(continued(body, history, 2000)))

    assert at_once(continued(body, history, size))
    with pytest.raises(RequestTooLarge, match=f"more than {size - 1} bytes"):
        at_once(continued(body, history, size - 1))


def test_of_a_conversation_that_is_too_long_no_more_is_read_than_fits() -> None:
    read: list[bytes] = []

    def history() -> Iterator[bytes]:
        for number in range(1000):
            read.append(b'{"a":%d}' % number)
            yield read[-1]

    with pytest.raises(RequestTooLarge):
        at_once(continued(b'{"input":"q"}', history(), 200))

    assert len(b",".join(read[:-1])) < 200


def test_a_large_body_is_continued_in_steps() -> None:
    text = "x" * (1 << 20)
    body = dumped({"model": "m", "previous_response_id": "r1", "input": text})
    history = [dumped({"role": "user", "content": text})] * 8

    assert len([*continued(body, history, 1 << 24).__await__()]) > 8


@few
@given(ITEMS, st.dictionaries(st.sampled_from(["model", "usage", "output"]), TEXTS))
def test_a_response_is_the_sum_of_its_parts(output: list[Any], further: dict[str, str]) -> None:
    response = {**further, "id": "r1", "status": "completed", "output": output}

    parts = response_parts(dumped(response))

    assert parts is not None
    assert (parts.id, parts.status) == ("r1", "completed")
    assert json.loads(parts.head + parts.output + parts.tail) == response
    assert items_in(parts.output) == output


@few
@given(
    st.lists(st.tuples(st.sampled_from("abc"), ITEMS), max_size=4),
    st.integers(1, 6),
    st.booleans(),
)
def test_pages_are_the_whole_list(
    conversation: list[tuple[str, list[Any]]], limit: int, newest_first: bool
) -> None:
    pieces, expected = [], []
    for number, (name, items) in enumerate(conversation):
        # Within a conversation an id stands for one item.
        named = [
            {**item, "id": f"own_{number}_{place}"} if item.get("id") else item
            for place, item in enumerate(items)
        ]
        pieces.append((f"{name}{number}", joined(map(dumped, named))))
        expected += named
    whole = listed(pieces)
    assert whole is not None
    if newest_first:
        pieces.reverse()
        expected.reverse()

    seen: list[Any] = []
    after, more = None, True
    while more:
        page = listed(pieces, limit=limit, after=after, newest_first=newest_first)
        assert page is not None
        assert len(page.items) <= limit
        seen += [json.loads(bytes(item)) for item in page.items]
        more, after = page.more, page.last_id

    assert len(seen) == len(expected)
    assert len({item["id"] for item in seen}) == len(seen)
    for item, original in zip(seen, expected, strict=True):
        assert item["id"] == (original.get("id") or item["id"])
        assert item["type"] == original.get("type", "message")
    in_order = [json.loads(bytes(item)) for item in whole.items]
    assert seen == (in_order[::-1] if newest_first else in_order)


@pytest.mark.parametrize("newest_first", [False, True])
def test_a_list_in_which_an_id_is_repeated_has_an_end(newest_first: bool) -> None:
    pieces = [("r", joined([b'{"id":"a"}'] * 4))]
    after, pages = None, 0
    while True:
        page = listed(pieces, limit=1, after=after, newest_first=newest_first)
        assert page is not None
        after, pages = page.last_id, pages + 1
        if not page.more:
            break

    assert pages == 4


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (rb"\ud83d", rb"\ufffd"),
        (rb"\ud83d\ude00", rb"\ud83d\ude00"),
        ("\N{GRINNING FACE}".encode(), "\N{GRINNING FACE}".encode()),
        (b"\xff", None),
        (b"\0", None),
    ],
)
def test_what_no_provider_would_take_back_is_not_kept(text: bytes, kept: bytes | None) -> None:
    parts = response_parts(b'{"id":"r","status":"completed","output":["%b \\ud800"]}' % text)

    if kept is None:
        assert parts is None
    else:
        assert parts is not None
        assert parts.output == rb'"%b \ufffd"' % kept


def test_an_item_that_is_not_there_begins_no_page() -> None:
    assert listed([("r", b'{"id":"a"}')], after="b") is None
    assert listed([], after="b") is None
    last = listed([("r", b'{"id":"a"}')], after="a")
    assert last is not None
    assert last == Page([], None, None, more=False)


def test_what_is_no_item_is_listed_as_it_is() -> None:
    page = listed([("r", b'1,"a",[{}],null,{"type":7,"id":7}')])

    assert page is not None
    assert [json.loads(bytes(item)) for item in page.items[:4]] == [1, "a", [{}], None]
    assert json.loads(bytes(page.items[4]))["id"] == page.last_id


@pytest.mark.parametrize("pieces", [50, 1])
def test_a_page_of_a_long_list_comes_in_steps(pieces: int) -> None:
    piece = b"{}," * (50_000 // pieces - 1) + b"{}"
    steps = paging([("r", piece)] * pieces, newest_first=True, limit=9, after="x")

    assert sum(1 for _ in steps.__await__()) >= 49


def test_very_many_items_cost_no_more_than_their_size() -> None:
    many = b"{}," * MAX_COMMAS * 3 + b'{"type":"reasoning"}'
    response = b'{"id":"r","status":"completed","output":[%b]}' % many
    tracemalloc.start()

    assert replayable(many, same_provider=True) is many
    assert response_parts(response) is None
    with pytest.raises(InvalidRequest, match="too many items"):
        listed([("r", many)])

    assert tracemalloc.get_traced_memory()[1] < len(many)
    tracemalloc.reset_peak()
    separated = response_items.separate(b"1," * MAX_COMMAS + b"1")
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    del separated
    tracemalloc.stop()
