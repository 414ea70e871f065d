"""What is looked up in a whole answer: the same as by parsing it."""

from __future__ import annotations

import json
import random
from typing import Any

import orjson
import pytest

from aioserver.protocol.sound import PIECE_BYTES, sound
from aioserver.protocol.steps import at_once
from aioserver.protocol.whole_answer import final_response, text_pieces

BIG = 10 * PIECE_BYTES
ALPHABET = 'ab "\\/\n\t\x00\x1f\x7f{}[],:é€\u2028\ud7ff\ue000😀𝄞'


def whole(content: object, **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": content}}
    return {"id": "c1", "object": "chat.completion", **more, "choices": [choice]}


def text_in(body: bytes) -> str:
    """The text of *body*; every piece of it is a string by itself."""
    pieces = [body[piece] for piece in at_once(text_pieces(body))]
    assert all(0 < len(piece) <= PIECE_BYTES for piece in pieces)
    return "".join(orjson.loads(b'"%b"' % at_once(sound(piece))) for piece in pieces)


def parsed(body: bytes) -> object:
    """The same by parsing *body*."""
    try:
        text = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        return ""
    return text if isinstance(text, str) else ""


@pytest.mark.parametrize("ascii_only", [False, True])
@pytest.mark.parametrize("indent", [None, 2])
def test_the_text_is_found_piece_by_piece(ascii_only: bool, indent: int | None) -> None:
    rng = random.Random(17)
    for size in (0, 1, 100, PIECE_BYTES, 3 * PIECE_BYTES):
        text = "".join(rng.choices(ALPHABET, k=size))
        body = json.dumps(
            whole(text, before=[{"content": text}, '"]}', 1.5e10, None]),
            ensure_ascii=ascii_only,
            indent=indent,
        ).encode()

        assert text_in(body) == text, "seed 17"


@pytest.mark.parametrize("character", ["é", "€", "😀", "\n", r"\ud83d\ude00", r"\\ud83d\\ude00"])
def test_no_piece_ends_within_a_character(character: str) -> None:
    written = character.encode() if "\\" in character else orjson.dumps(character)[1:-1]
    for filling in range(PIECE_BYTES - 13, PIECE_BYTES + 14):
        body = orjson.dumps(whole("@")).replace(b"@", b"x" * filling + written * 5)

        assert text_in(body) == parsed(body), filling


def test_lone_surrogates_become_replacement_characters() -> None:
    body = orjson.dumps(whole("@")).replace(b"@", rb"a\ud83d\ud83d\ude00\ude00b" * PIECE_BYTES)

    assert text_in(body) == "a\ufffd😀\ufffdb" * PIECE_BYTES


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff",
        b'{"choices"',
        b'{"choices":[',
        b'{"choices":[]}',
        b'{"choices":[{"message":{"content":"unended',
        b'{"choices":[{"message":{"content":"\\x"}}]}',
        b'{"choices":[{"message":{"content":"\\u12"}}]}',
        b'{"choices":[{"message":{"content":"a\nb"}}]}',
        b'{"choices":[{"message":{"content":"\xff"}}]}',
        b'{"choices":[{"message":{"content":"\xe2\x82"}}]}',
        b'{"x":"\\',
        b'{"x":[[[',
        b'{"x":]}',
        b'{"x":,"choices":[{"message":{"content":"a"}}]}',
        b'{,"choices":[{"message":{"content":"a"}}]}',
    ],
)
def test_what_is_no_answer_has_no_text(body: bytes) -> None:
    assert at_once(text_pieces(body)) == []


@pytest.mark.parametrize(
    "before",
    [
        b"[%b1]" % (b"{}," * (BIG // 3)),
        b"1" * BIG,
        b'"%b"' % (b"x" * BIG),
        b'"%b"' % (rb"\n" * (BIG // 2)),
        b" " * BIG + b"1",
        b"1" + b',"":1' * (BIG // 5),
    ],
    ids=["objects", "digits", "text", "escapes", "spaces", "keys"],
)
def test_what_stands_before_it_may_be_anything(before: bytes) -> None:
    body = (
        b'{"before":%b,"id":"r1","choices":[{"message":{"content":"%b"}}],"status":"completed"}'
        % (before, b"y" * BIG)
    )

    assert text_in(body) == "y" * BIG
    assert at_once(final_response(body)) == "r1"
