"""Whole answers: the text and the id in them, found in steps of any size."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

import orjson

from aioserver.protocol.sound import sound
from aioserver.protocol.steps import at_once
from aioserver.protocol.whole_answer import final_response, text_pieces
from tests.fuzz.inputs import parts, windows

if TYPE_CHECKING:
    from collections.abc import Iterable

WORDS = (
    *(b'"choices":[{', b'"message":{', b'"content":"', b'"id":"r1"', b'"status":"completed"'),
    *(b'"content"', b"{}", b"[]", b"[[", b"}]", b": ", b",\n        ", b"\t", b"1.5e3"),
    *(rb"\ud83d\ude00", rb"\\", rb"\"", "é€😀".encode()),
)


class Found(NamedTuple):
    """What is found in one answer."""

    text: str
    response_id: str | None


def run(data: bytes) -> None:
    """Look the content up with the windows that are in use, and with small ones."""
    case = parts(data)
    body = case.content
    whole = _find(body)
    with windows(case.window):
        assert _find(body) == whole, "what is found depends on the windows"
    answer = _answer(body)
    if answer is not None:
        assert whole.text == _text(answer), "another text"


def _find(body: bytes) -> Found:
    pieces = [at_once(sound(body[piece])) for piece in at_once(text_pieces(body))]
    text = "".join([orjson.loads(b'"%b"' % piece) for piece in pieces])
    return Found(text, at_once(final_response(body)))


def _answer(body: bytes) -> object:
    """Return the answer in *body*; None if it is not JSON, or has a key twice, both of whose values
    are looked at here.
    """
    try:
        text = at_once(sound(body)).decode()
        return json.loads(text, object_pairs_hook=_distinct, parse_constant=_no_constant)
    except Exception:  # noqa: BLE001 - whatever is wrong with it
        return None


def _distinct(pairs: Iterable[tuple[str, object]]) -> dict[str, object]:
    members = list(pairs)
    content = dict(members)
    if len(content) < len(members):
        raise ValueError("a key that stands there twice")
    return content


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _text(answer: object) -> str:
    try:
        text = answer["choices"][0]["message"]["content"]  # type: ignore[index]
    except (LookupError, TypeError):
        return ""
    return text if isinstance(text, str) else ""
