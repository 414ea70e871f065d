"""The usage of a stream that its client has not asked for: taken out of the answer, wherever reads
end, and noted.
"""

from __future__ import annotations

import random
import re
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from aioserver.provider_errors import ProviderDisconnected, ProviderError
from aioserver.providers.sinks import DONE, EventSink
from aioserver.streams.stream import Stream

if TYPE_CHECKING:
    from collections.abc import Iterable

COUNTS = {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}


def event(choices: Any, **more: Any) -> bytes:
    return b"data: %b\n\n" % orjson.dumps({"id": "c", "choices": choices, **more})


def text(content: str = "Hello", finish: str | None = None, **more: Any) -> bytes:
    delta = {"content": content} if content else {}
    return event([{"index": 0, "delta": delta, "finish_reason": finish}], **more)


ROLE = event([{"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}], usage=None)
FINISH = text("", "stop", usage=None)
USAGE = event([], usage=COUNTS)
# As Python's json writes it, with what some engines send beside it.
SPACED = (
    b'data: {"id": "c", "choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 4}}\n\n'
)
ODD = SPACED.replace(b'"choices": []', b'"choices"\t: [ ]')
ESCAPED = SPACED.replace(b'"choices"', rb'"choic\u0065s"').replace(b'"usage"', rb'"\u0075sage"')
GROQ = event([], usage=COUNTS, x_groq={"id": "r", "usage": COUNTS})
USAGES = (USAGE, SPACED, ODD, ESCAPED, GROQ)
# Events that only look like it.
FILTER = event([], prompt_filter_results=[{"prompt_index": 0}], usage=None)
BESIDE = text("x", usage=COUNTS)
QUOTED = text('"choices":[],"usage":{}')
COMMENT = b": keep-alive\n\n"


def answer(*events: bytes, hides: bool = True, cuts: Iterable[int] = ()) -> Stream:
    """The log of an answer of *events*, which are read in pieces."""
    stream = Stream("r", "anybody", window=30.0, max_bytes=1 << 22)
    sink = EventSink(stream, hides_usage=hides)
    data = b"".join(events)
    for start, end in pairwise((0, *cuts, len(data))):
        if start < end:
            sink.feed(data[start:end])
    if not stream.ended:
        fault = ProviderDisconnected("cut")
        assert sink.broken(fault) or not stream.answered or FINISH not in events
    return stream


def plain(data: bytes) -> bytes:
    """With LF for each line end, and one empty line behind each event."""
    lines = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return re.sub(rb"\n{2,}", b"\n\n", lines).lstrip(b"\n")


def shown(stream: Stream) -> bytes:
    return b"".join(entry.data for entry in stream.entries)


@pytest.mark.parametrize("usage", [*USAGES, USAGE.replace(b"\n\n", b"\r\n\r\n")])
def test_usage_is_taken_out_and_noted(usage: bytes) -> None:
    stream = answer(ROLE, text(), FINISH, usage, DONE)

    assert shown(stream) == ROLE + text() + FINISH + DONE
    assert stream.end_status == b"complete"
    assert stream.outcome.usage is not None
    assert stream.outcome.usage["completion_tokens"] == 4
    assert stream.last == 4


def test_all_else_passes_byte_for_byte() -> None:
    events = (COMMENT, FILTER, ROLE, text(usage=None), QUOTED, COMMENT, BESIDE, FINISH, DONE)
    stream = answer(*events)

    assert shown(stream) == b"".join(events)


def test_whoever_has_asked_gets_all_of_it() -> None:
    events = (ROLE, text(), FINISH, USAGE, DONE)
    stream = answer(*events, hides=False)

    assert shown(stream) == b"".join(events)
    assert stream.outcome.usage == COUNTS


def test_last_usage_counts_and_never_a_sum() -> None:
    def so_far(count: int) -> dict[str, int]:
        return {**COUNTS, "completion_tokens": count}

    growing = (text(usage=so_far(1)), text(usage=so_far(2)), text("", "stop", usage=so_far(2)))
    stream = answer(ROLE, *growing, event([], usage=so_far(3)), DONE)

    assert shown(stream) == ROLE + b"".join(growing) + DONE
    assert stream.outcome.usage == so_far(3)


@pytest.mark.parametrize("cut", ["before", "within", "behind"])
def test_answer_that_is_cut_behind_its_finish_is_whole(cut: str) -> None:
    came = {"before": b"", "within": USAGE[:20], "behind": USAGE}[cut]
    stream = answer(ROLE, text(), FINISH, came)

    assert shown(stream) == ROLE + text() + FINISH + DONE
    assert stream.error is None
    assert (stream.outcome.usage == COUNTS) == (cut == "behind")


def test_usage_alone_is_no_beginning() -> None:
    for hides in (True, False):
        stream = answer(ROLE, USAGE, hides=hides)
        assert not stream.answered

    stream = answer(USAGE, DONE)
    assert shown(stream) == DONE
    assert stream.end_status == b"complete"


def test_error_beside_a_usage_is_an_error() -> None:
    with pytest.raises(ProviderError):
        answer(ROLE, event([], usage=COUNTS, error={"code": 502, "message": "Bad gateway."}))


def test_bytes_that_pass_are_those_that_came_without_the_usage_wherever_reads_end() -> None:
    seed = random.randrange(1 << 30)
    dice = random.Random(seed)
    others = [text(), text("é \U0001f600"), QUOTED, BESIDE, COMMENT, FILTER, text(usage=None)]
    for _ in range(300):
        events = [ROLE, *dice.choices(others, k=dice.randrange(6)), text(), FINISH]
        events += dice.sample([*USAGES, COMMENT], dice.randrange(1, 4))
        ending = dice.choice([b"\n", b"\r\n"])
        wire = [each.replace(b"\n", ending) for each in (*events, DONE)]
        data = b"".join(wire)
        count = dice.choice([0, 1, 3, 20, len(data) // 2])
        cuts = sorted(dice.sample(range(1, len(data)), count))

        stream = answer(data, cuts=cuts)

        kept = [each for each in events if each not in USAGES]
        expected = b"".join(kept).replace(b"\n", ending) + DONE
        came = shown(stream)
        if ending != b"\n":
            # A read that ends between CR and LF leaves an empty line, which means nothing.
            came, expected = plain(came), plain(expected)
        assert came == expected, (seed, cuts)
