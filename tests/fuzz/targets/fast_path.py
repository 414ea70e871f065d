"""The fast path and the slow path: the same events have the same effects on both, on each face.

The content is the body of a provider's answer. Each event is a chunk and a read of its own, so
that the fast path takes what it can.
"""

from __future__ import annotations

import re

from tests.fuzz.inputs import parts
from tests.support.road import FACES, assert_same, cut, play
from tests.support.scripted_provider import EVENT_STREAM, LAST_CHUNK, chunk
from tests.support.virtual_loop import run_virtually

WORDS = (
    *(
        b'"choices":[',
        b'"delta":{',
        b'"content":"',
        b'"finish_reason":"stop"',
        b'"usage":{}',
        b'"index":0',
    ),
    *(
        b'"choices":[{"index":0,"delta":{"content":"',
        b'"tool_calls":[{"index":0,',
        b'"reasoning":"',
        b"data:",
    ),
)
# What follows an event, or the end.
_EVENT = re.compile(rb".+?(?:\n\n|\Z)", re.DOTALL)


def run(data: bytes) -> None:
    """Compare an answer in reads of one event with the same in halves of them, and cut
    anywhere.
    """
    case = parts(data)
    face = FACES[case.choice % len(FACES)]
    chunks = [chunk(event) for event in _EVENT.findall(case.content)]
    reads = [EVENT_STREAM, *chunks, LAST_CHUNK]
    seen = run_virtually(play(face, reads))

    halves = [half for read in reads for half in (read[: len(read) // 2], read[len(read) // 2 :])]
    assert_same(face, seen, run_virtually(play(face, halves)))
    whole = b"".join(reads)
    places = [1 + (byte * (len(whole) - 1) >> 8) for byte in case.control[1:]]
    assert_same(face, seen, run_virtually(play(face, cut(whole, places))))
