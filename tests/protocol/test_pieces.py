"""Bodies that are decoded in pieces: as at once, wherever the cuts are, and in steps of a bounded
size.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import Raw

from aioserver.errors import AioserverError, InvalidJson, InvalidRequest
from aioserver.protocol import json_body
from aioserver.protocol.json_body import ABSENT, MAX_PLACES, Member, UnknownField, at_once
from aioserver.protocol.model_body import ModelBody, reading

if TYPE_CHECKING:
    from collections.abc import Callable

LARGE = 4 << 20


class Fields(msgspec.Struct):
    model: Raw = ABSENT
    tools: Raw = ABSENT
    options: Raw = Raw(b"{}")


class Strict(Fields, forbid_unknown_fields=True):
    pass


FIELDS, STRICT = msgspec.json.Decoder(Fields), msgspec.json.Decoder(Strict)
DECODERS: list[msgspec.json.Decoder[Any]] = [FIELDS, STRICT]
SPACES = st.sampled_from(["", "", " ", "\n"])
SCALARS = st.sampled_from(
    ["0", "null", "-1.5e3", '"m"', '"a,b"', '"\\""', '"\\\\"', '"[{,"', '""', '"\\u00e9"', '"é"']
)
KEYS = st.sampled_from(
    ['"model"', '"tools"', '"options"', '"x"', '""', '"a\\"b"', '"mod\\u0065l"']
)


def lists(inner: st.SearchStrategy[str], opening: str, closing: str) -> st.SearchStrategy[str]:
    return st.builds(
        lambda space, items: f"{opening}{space}{f'{space},'.join(items)}{space}{closing}",
        SPACES,
        st.lists(inner, max_size=4),
    )


def objects(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    pairs = st.builds(lambda key, space, value: f"{key}{space}:{value}", KEYS, SPACES, inner)
    return lists(pairs, "{", "}")


VALUES = st.recursive(
    SCALARS, lambda inner: lists(inner, "[", "]") | objects(inner), max_leaves=20
)


def outcome(decode: Callable[[], Any]) -> object:
    try:
        fields = decode()
    except AioserverError as error:
        return type(error), getattr(error, "param", None)
    return {name: bytes(getattr(fields, name)) for name in Fields.__struct_fields__}


def check(text: str, size: int) -> None:
    """Check that *text* is decoded in pieces of *size* as it is at once."""
    body = text.encode()
    for decoder in DECODERS:
        expected = outcome(partial(json_body.decode, decoder, body, "it"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(json_body, "STEP_BYTES", 0)
            patch.setattr(json_body, "PIECE_BYTES", size)
            in_pieces = outcome(lambda: at_once(json_body.decoding(decoder, body, "it")))  # noqa: B023
        assert in_pieces == expected


@given(objects(VALUES) | VALUES, st.sampled_from([2, 3, 7, 20]))
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_no_cut_changes_what_is_read(text: str, size: int) -> None:
    check(text, size)


@given(
    objects(VALUES),
    st.sampled_from(["", ",", "{", "}", "[", "]", '"', "\\", ":", "1", " "]),
    st.integers(0, 1000),
    st.integers(0, 1),
    st.sampled_from([2, 3, 7, 20]),
)
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_no_cut_makes_json_of_what_is_none(
    text: str, slip: str, place: int, lost: int, size: int
) -> None:
    place %= len(text)
    check(text[:place] + slip + text[place + lost :], size)


@pytest.mark.parametrize(
    "text",
    [
        *('{"a":1,}', "{,}", '{,"a":1}', '{"a":1,,"b":2}', '{"a":[1,]}', '{"a":[,1]}', '{"a":1},'),
        *('{"a":[1,2}}', '{"a":{"b":1,"c":2]}', "1,2", '{"a":1}{"b":1,"c":2}', '{"a":[1,2]'),
        *(
            '{"a":1]],"b":2}',
            "[1,2]]",
            '{"a":"1,2}',
            '{"a":1 "b":2,"c":3}',
            '{"a":[1,2]],"b":[3,4]}',
        ),
    ],
)
@pytest.mark.parametrize("size", [2, 3, 5, 50])
def test_what_is_no_json_is_refused_wherever_it_is_cut(text: str, size: int) -> None:
    check(text, size)
    with pytest.raises(InvalidJson):
        json_body.decode(FIELDS, text.encode(), "it")


def test_the_value_that_counts_is_the_last_one_though_others_span_pieces() -> None:
    for text in (
        '{"model":[1,2,3,4],"model":[[1],2]}',
        '{"model":5,"model":{"a":1,"b":[2,3]},"x":[1,2]}',
        '{"model":{"a":1,"b":2},"tools":[3,4,{"c":5,"d":6}],"model":7}',
    ):
        for size in range(2, 40):
            check(text, size)


def test_the_bytes_in_an_error_are_counted_from_the_start_of_the_body(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    body = b'{"a":[%b' % (b"1," * 500) + b"nul]}"
    with pytest.raises(InvalidJson) as whole:
        json_body.decode(FIELDS, body, "it")
    monkeypatch.setattr(json_body, "STEP_BYTES", 0)
    monkeypatch.setattr(json_body, "PIECE_BYTES", 64)

    with pytest.raises(InvalidJson) as in_pieces:
        at_once(json_body.decoding(FIELDS, body, "it"))

    assert in_pieces.value.message == whole.value.message


def test_an_unknown_field_is_named_after_the_rest_was_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(json_body, "STEP_BYTES", 0)
    monkeypatch.setattr(json_body, "PIECE_BYTES", 16)
    body = b'{"x":1,"y":[%b2]}' % (b"1," * 20)

    with pytest.raises(UnknownField):
        at_once(json_body.decoding(STRICT, body, "it"))
    with pytest.raises(InvalidJson):
        at_once(json_body.decoding(STRICT, body[:-2] + b"}", "it"))


@given(lists(VALUES, "[", "]"), st.sampled_from([2, 3, 7, 20]))
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_the_elements_of_an_array_are_those_of_its_pieces(text: str, size: int) -> None:
    body = text.encode()
    expected = [bytes(each) for each in msgspec.json.decode(body, type=list[Raw])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_body, "PIECE_BYTES", size)
        elements = [bytes(each) for batch in json_body.elements(body) for each in batch]

    assert elements == expected


# Large bodies.


def filled(head: bytes, filling: bytes, tail: bytes) -> bytes:
    return head + filling * ((LARGE - len(head) - len(tail)) // len(filling)) + tail


HOSTILE = {
    "empty objects": (b'{"model":"m","x":[', b"{},", b"0]}"),
    "numbers": (b'{"model":"m","x":[', b"1,", b"0]}"),
    "saws": (b'{"model":"m","x":[', b"[" * 400 + b"]" * 400 + b",", b"0]}"),
    "the same key": (b"{", b'"model":"x",', b'"model":"m"}'),
    "keys that nobody knows": (b"{", b'"":0,', b'"model":"m"}'),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_call_of_a_decoder_gets_more_than_a_piece(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    decode = json_body.decode

    def counted(decoder: Any, body: bytes, what: str) -> Any:
        sizes.append(len(body))
        return decode(decoder, body, what)

    monkeypatch.setattr(json_body, "decode", counted)
    body = filled(*HOSTILE[name])

    steps = [*reading(body).__await__()]
    read = at_once(reading(body))

    assert max(sizes) < 2 * json_body.PIECE_BYTES
    assert len(steps) >= LARGE // json_body.PIECE_BYTES
    assert read.model == "m"


def test_what_has_no_comma_is_one_piece_however_long_it_is() -> None:
    text = b"a\\n" * (1 << 20)
    for tail in (b'","model":"m"}', b'", "x": [1, 2], "model" : "m" }'):
        body = b'{"messages":"%b%b' % (text, tail)

        assert at_once(reading(body)).model == "m"


def test_a_small_body_is_decoded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_body, "locating", None)
    body = b'{"model":"m","x":[%b0]}' % (b"1," * 1000)

    assert [*json_body.decoding(FIELDS, body, "it").__await__()] == []
    assert at_once(reading(body)).model == "m"


@pytest.mark.parametrize(
    "body",
    [
        b'{"x":[%b{"model":"m"}],"model":"m"}',
        b'{"model":"m","x":[%b{"model":"m"}]}',
        b'{"model":"a","x":[%b0],"model" : "m" , "y":{"model":"m"}}',
        b'{"x":[%b0],"mod\\u0065l":"m"}',
    ],
)
def test_the_model_of_a_large_body_is_replaced_where_it_stands(body: bytes) -> None:
    body %= b'"\\\\","model",' * (1 << 17)
    read = at_once(reading(body))
    at_once_read = ModelBody(body)

    assert read.with_model("other") == at_once_read.with_model("other")
    assert read.with_model("other") != body


def test_a_member_that_spans_pieces_is_found_where_it_stands() -> None:
    long = b'[%b{"a":1}]' % (b"1," * (1 << 20))
    for body in (b'{"x":1,"input" : %b,"y":2}' % long, b'{"y":"}","\\u0069nput":%b}' % long):
        place = at_once(Member("input").finding(body))

        assert place is not None
        assert body[place.value : place.end] == long
        assert body[place.key : place.value].rstrip(b": ").endswith(b'nput"')
    assert at_once(Member("output").finding(body)) is None


def test_more_keys_than_can_be_told_apart_are_refused_in_one_piece(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(json_body, "STEP_BYTES", 0)
    monkeypatch.setattr(json_body, "PIECE_BYTES", 1 << 18)
    body = b'{"x":[%b0],"model":"m","y":0}' % (b'{"model":"m"},' * (MAX_PLACES + 1))
    read = at_once(reading(body))

    with pytest.raises(InvalidRequest, match="keys model in one body"):
        read.with_model("other")


class Searched(bytes):
    """A body that counts how often something was looked for in it."""

    searches = 0

    def find(self, *where: Any) -> int:
        self.searches += 1
        return super().find(*where)


def test_a_client_that_knows_the_marks_has_few_of_them_looked_for() -> None:
    # All the marks that a piece may get: each one that was found in it gives way to the next.
    mark, known = json_body._mark, b""  # noqa: SLF001 - from outside, only its time can be seen
    for _ in range(18):
        known += mark(known, 0, len(known))
    body = Searched(known)

    assert mark(body, 0, len(body)) not in known
    assert body.searches <= len(body).bit_length(), (
        "not as many as the marks that there is room for"
    )
