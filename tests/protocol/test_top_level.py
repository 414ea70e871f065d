"""The top level of a body: what is refused, what is replaced, and how much is done in one step."""

from __future__ import annotations

import json
import random
import re
import sys
import tracemalloc
from typing import TYPE_CHECKING

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec import Raw

from aioserver.errors import InvalidJson, InvalidRequest
from aioserver.protocol import client_frames, json_body, model_body
from aioserver.protocol import sound as soundness
from aioserver.protocol.json_body import ABSENT, MAX_VALUES, UnknownField, check_values
from aioserver.protocol.sound import NotUtf8, sound
from aioserver.protocol.steps import at_once
from aioserver.wings.responses import frames as response_frames
from tests.support.commands import TOO_DEEP

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

MIB = 1 << 20


class Thing(msgspec.Struct, forbid_unknown_fields=True):
    a: Raw = ABSENT


THING = msgspec.json.Decoder(Thing)
# What a body may have in one string, and cuts of it.
TOKENS = (
    *(rb"\ud83d", rb"\ude00", rb"\uD83D", rb"\uDE00", rb"\\", rb"\n", b"a", b"ud83d"),
    *("é".encode(), rb"\u0041", rb"\"", rb"\ufffd"),
)


def by_one(body: bytes) -> bytes:
    """Replace lone surrogates escape by escape."""

    def replaced(match: re.Match[bytes]) -> bytes:
        escape = match[0]
        lone = len(escape) == 6 and escape[2:3] in b"dD" and escape[3:4] in b"89abABcdefCDEF"
        return rb"\ufffd" if lone else escape

    pair = rb"\\u[dD][89abAB]..\\u[dD][c-fC-F].."
    return re.sub(pair + rb"|\\u....|\\.", replaced, body, flags=re.DOTALL)


@pytest.mark.parametrize("piece", [32, 33, 40, 1 << 18])
def test_only_lone_surrogates_are_replaced_wherever_a_piece_ends(
    piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soundness, "PIECE_BYTES", piece)
    dice = random.Random(piece)
    for _ in range(1000):
        body = b"".join(dice.choices(TOKENS, k=dice.randrange(1, 40)))

        assert at_once(sound(body)) == by_one(body), body


def test_a_body_without_lone_surrogates_is_itself() -> None:
    for body in (b"{}", "é😀".encode(), rb'"\ud83d\ude00"', rb'"\\ud83d"'):
        assert at_once(sound(body)) is body


@pytest.mark.parametrize("step", [4, 5, 7, MIB])
def test_utf8_is_checked_across_steps(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soundness, "LARGE_BYTES", step)
    good = "aé€😀".encode() * 5

    assert at_once(sound(good)) is good
    for bad in (good + b"\xff", good[:-1], b"\xed\xa0\x80", b"\xc0\x80" + good):
        with pytest.raises(NotUtf8):
            at_once(sound(bad))


def test_a_nul_is_no_json() -> None:
    with pytest.raises(InvalidJson):
        at_once(sound(b'"\\ud800\0"'))


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"nul", b'{"a":NaN}', b'{"x":Infinity}', b'{"a":-Infinity}', b'{"a":01}'),
        *(b'{"a":1,}', b'{"a":[1,]}', b'{"a":1}}', b'{"a":"\n"}', b'{"a":"\\x"}', b"[1"),
        *(b'\xef\xbb\xbf{"a":1}', b"[" * TOO_DEEP, b'{"a":' * TOO_DEEP, b'{"x":1, "b":tru}'),
        b'{"a":' + b"[" * TOO_DEEP + b"]" * TOO_DEEP + b"}",
        b'{"x":' + b"[" * TOO_DEEP + b"]" * TOO_DEEP + b"}",
    ],
    ids=lambda body: repr(body[:20]),
)
def test_what_is_no_json_is_refused_wherever_it_is(body: bytes) -> None:
    with pytest.raises(InvalidJson, match="not JSON"):
        json_body.decode(THING, body, "the body")


def test_json_of_another_shape_is_an_invalid_request() -> None:
    for body in (b"[]", b"1", b'"a"', b"null", b"1e999", b"1" * 5000):
        with pytest.raises(InvalidRequest, match="the body must be a JSON object"):
            json_body.decode(THING, body, "the body")
    with pytest.raises(UnknownField, match="unknown field in the body: b") as caught:
        json_body.decode(THING, b'{"a":1,"b":2}', "the body")
    assert caught.value.param == "b"
    with pytest.raises(UnknownField) as caught:
        json_body.decode(THING, b'{"%b":2}' % (b"x" * 100_000), "the body")
    assert caught.value.param == "x" * 64


def test_a_large_question_that_is_no_json_is_told_so_though_it_has_an_unknown_field() -> None:
    body = b'{"request_id":"r","unknown":0,"text":"%b","model":tru}' % (b"x" * 2 * MIB)

    with pytest.raises(InvalidJson):
        at_once(client_frames.reading_question(body))
    with pytest.raises(InvalidRequest, match="unknown field in payload: unknown"):
        at_once(client_frames.reading_question(body.replace(b"tru", b'""')))


def test_the_last_of_several_keys_counts_however_it_is_written() -> None:
    fields = json_body.decode(THING, rb'{"a":1,"\u0061":2,"a":3,"\u0061":4}', "the body")

    assert bytes(fields.a) == b"4"


# Work and memory.


SIZE = 4 * MIB
HOSTILE = {
    "objects": b"{}," * (SIZE // 3),
    "lists": b"[]," * (SIZE // 3),
    "numbers": b"1," * (SIZE // 2),
    "keys": b'{"a":1},' * (SIZE // 8),
    "lone surrogates": b'"' + rb"\ud83d" * (SIZE // 6) + b'",',
    "text": b'"' + "😀é".encode() * (SIZE // 6) + b'",',
}


def model_of(filling: bytes) -> Coroutine[object, None, object]:
    return model_body.reading(b'{"model":"m","x":[' + filling + b"0]}")


def chat_of(filling: bytes) -> Coroutine[object, None, object]:
    return client_frames.parsing(
        b'{"action":"chat","request_id":"r","payload":{"messages":[{"role":"user","x":['
        + filling
        + b"0]}]}}"
    )


def response_of(filling: bytes) -> Coroutine[object, None, object]:
    return response_frames.parsing(
        b'{"type":"response.create","stream_id":"a","model":"m","input":[' + filling + b"0]}"
    )


def question_of(filling: bytes) -> Coroutine[object, None, object]:
    """Its last field is none that a question has."""
    messages = b'[{"role":"user","x":[' + filling + b"0]}]"
    return client_frames.reading_question(
        b'{"request_id":"r","messages":' + messages + b',"unknown":0}'
    )


BODIES = (model_of, chat_of, response_of)


@pytest.mark.parametrize("steps_of", BODIES)
@pytest.mark.parametrize("filling", HOSTILE)
def test_a_body_costs_less_than_three_times_its_bytes(
    steps_of: Callable[[bytes], Coroutine[object, None, object]], filling: str
) -> None:
    steps = steps_of(HOSTILE[filling])
    tracemalloc.start()
    try:
        at_once(steps)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    # The body itself is there already; one that is repaired is there twice.
    assert peak < (3.1 if filling == "lone surrogates" else 2.1) * SIZE


@pytest.mark.parametrize("steps_of", [*BODIES, question_of])
@pytest.mark.parametrize("filling", HOSTILE)
def test_a_large_body_is_decoded_once_in_one_step(
    steps_of: Callable[[bytes], Coroutine[object, None, object]], filling: str
) -> None:
    """What is decoded may be the whole body, and others are served before it is decoded again."""
    steps, decoded = steps_of(HOSTILE[filling]).__await__(), 0
    most = 0

    def count(_frame: object, event: str, called: object) -> None:
        nonlocal decoded
        owner = getattr(called, "__self__", None)
        decoded += event == "c_call" and isinstance(owner, msgspec.json.Decoder)

    ended = False
    while not ended:
        decoded = 0
        sys.setprofile(count)
        try:
            next(steps)
        except (StopIteration, InvalidRequest):
            ended = True
        finally:
            sys.setprofile(None)
        most = max(most, decoded)

    assert most == 1


def test_lone_surrogates_are_replaced_in_steps() -> None:
    steps = sound(HOSTILE["lone surrogates"])

    assert sum(1 for _ in steps.__await__()) >= SIZE // soundness.PIECE_BYTES


# Values that are read one by one.


@pytest.mark.parametrize("size", [2, 3, 7, 1 << 18])
def test_values_are_counted_outside_of_strings_only(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_body, "COUNTED_BYTES", size)
    texts = ["", ",,,[[,", '\\",",{\\', '"', '\\\\",', "\\" * 5]

    # The list itself is one of them.
    check_values(json.dumps(texts[:3]).encode(), 3)
    check_values(json.dumps(texts[3:]).encode(), 3)
    with pytest.raises(InvalidRequest, match="more than 3 values in"):
        check_values(json.dumps(texts[:4]).encode(), 3)


@example([[[[1]]]])
@settings(max_examples=30)
@given(st.recursive(st.none() | st.text(',[{"\\a'), lambda inner: st.lists(inner, min_size=1)))
def test_as_many_values_as_are_allowed_pass_and_no_more(value: object) -> None:
    def count(value: object) -> int:
        return 1 + (sum(map(count, value)) if isinstance(value, list) else 0)

    # The whole is no element, and neither its comma nor its bracket counts for it.
    values = count(value) - 1
    body = json.dumps(value).encode()

    check_values(body, values)
    if values > 1:
        with pytest.raises(InvalidRequest):
            check_values(body, values - 1)


def test_megabytes_of_text_have_few_values_whatever_is_in_it() -> None:
    text = ',{"a":[1,2,3]},' * (SIZE // 30)

    check_values(json.dumps([{"role": "user", "content": text}]).encode())


@pytest.mark.parametrize("filling", ["objects", "lists", "numbers", "keys"])
def test_too_many_values_are_refused(filling: str) -> None:
    with pytest.raises(InvalidRequest, match=f"more than {MAX_VALUES} values in"):
        check_values(b"[%b0]" % HOSTILE[filling])
