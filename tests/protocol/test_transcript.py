"""What an answer has said, and the events of another one that goes on with it."""

from __future__ import annotations

import json
import random
from typing import Any

import orjson
import pytest

from aioserver.protocol import eventstream
from aioserver.protocol.eventstream import Splitter
from aioserver.protocol.openai import BadEvent, ErrorEvent, Reading
from aioserver.protocol.seam import Onward, SeamBroken
from aioserver.protocol.transcript import (
    COUNT_BYTES,
    DONE,
    FOLD_BYTES,
    MAX_TRANSCRIPT,
    ChatRest,
    ChatTranscript,
    ReadTranscript,
    Rest,
    Tokens,
)

ANSWERS = 200
PIECES = ("ha ", "0", "\n", "| a | b |\n", '"', "\\", "ü", "👍🏽", "Once upon a time, ", "<&>")


def chunk(ident: str = "c1", model: str = "m1", finish: str | None = None, **delta: Any) -> bytes:
    choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
    frame = {"id": ident, "object": "chat.completion.chunk", "created": 7, "model": model}
    return eventstream.write(orjson.dumps({**frame, "choices": choices}))


def answer(text: str, chance: random.Random, ident: str = "c1") -> bytes:
    """Return the events of an answer that says *text*, in the habits that providers have."""
    events = [chunk(ident, role="assistant", content="")]
    place = 0
    while place < len(text):
        size = chance.randint(1, 12)
        events.append(chunk(ident, content=text[place : place + size]))
        place += size
        if chance.random() < 0.05:
            events.append(b": keep-alive\n\n")
    events.append(chunk(ident, finish="stop"))
    usage = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
    events.append(eventstream.write(orjson.dumps({"id": ident, "choices": [], "usage": usage})))
    return b"".join(events) + DONE


def text_of(data: bytes) -> str:
    text = ""
    for event in eventstream.parse(data):
        if event.data != b"[DONE]":
            for choice in json.loads(event.data)["choices"]:
                text += choice["delta"].get("content") or ""
    return text


def rewritten(rest: Rest, seam: Onward, data: bytes, chance: random.Random) -> bytes:
    """Return what is shown of an answer in *data*, which comes in reads of any size."""
    splitter, shown, start = Splitter(), [], 0
    while start < len(data):
        end = start + chance.randint(1, 200)
        for event in eventstream.parse(splitter.feed(data[start:end])):
            text, content = rest.take(event.data)
            passed = seam.feed(text)
            if content is not None:
                passed += seam.close()
            shown += [rest.text(passed)] if passed else []
            shown += [rest.event(content)] if content is not None else []
        start = end
    return b"".join(shown)


def test_answer_cut_anywhere_goes_on_without_a_character_lost_or_doubled() -> None:
    continued = 0
    for seed in range(ANSWERS):
        chance = random.Random(seed)
        text = "".join(chance.choices(PIECES, k=chance.randint(1, 60)))
        sent = answer(text, chance)
        # In an event, in a character, at a comment, in the preamble.
        transcript, splitter = ChatTranscript(), Splitter()
        first = splitter.feed(sent[: chance.randint(1, sent.index(b'"stop"'))])
        transcript.add(first)
        if not (before := transcript.text()):
            assert text_of(first) == ""
            continue
        assert text.startswith(before)
        other = answer(text[len(before) :], chance, "c2")
        try:
            shown = rewritten(transcript.rest(Tokens(5, 2)), Onward(before), other, chance)
        except SeamBroken:
            assert text[len(before) :].startswith(before[:32]), seed
            continue
        continued += 1
        assert text_of(first + shown) == text, seed
        events = [orjson.loads(event.data) for event in eventstream.parse(shown)[:-1]]
        assert {event["id"] for event in events} == {"c1"}
        assert not any("role" in choice["delta"] for e in events for choice in e["choices"])
        assert shown.count(b'"finish_reason":"stop"') == 1
        assert shown.endswith(DONE)
        assert events[-1]["usage"] == {
            "prompt_tokens": 10,
            "completion_tokens": 5,
            "total_tokens": 15,
        }
    assert continued > ANSWERS / 2


def test_text_that_was_kept_does_not_depend_on_when_it_is_read() -> None:
    chance = random.Random(1)
    text = "".join(chance.choices(PIECES, k=30_000))
    data = answer(text, chance)[: -len(DONE)]
    data = data[: data.index(b'"stop"')].rpartition(b"\n\n")[0] + b"\n\n"
    once, often, splitter = ChatTranscript(), ChatTranscript(), Splitter()
    once.add(data)
    for start in range(0, len(data), 999):
        if block := splitter.feed(data[start : start + 999]):
            often.add(block)
            assert len(often.blocks) < FOLD_BYTES + COUNT_BYTES + 2000

    assert len(data) > 4 * FOLD_BYTES
    assert text.startswith(once.text() or "-")
    assert often.text() == once.text()


@pytest.mark.parametrize(
    "event",
    [
        chunk(tool_calls=[{"index": 0, "id": "a"}]),
        chunk(refusal="no"),
        chunk(audio={"id": "a"}),
        chunk(annotations=[{"type": "url"}]),
        chunk(something="new"),
        chunk(finish="length"),
        chunk(reasoning="hm"),
        chunk(
            content="\ud83d".encode("utf-8", "surrogatepass").decode("utf-8", "replace")
        ).replace("�".encode() * 3, rb"\ud83d"),
        eventstream.write(b"[]"),
        eventstream.write(b"{"),
    ],
)
def test_answer_with_more_than_text_is_not_continued(event: bytes) -> None:
    transcript = ChatTranscript()
    transcript.add(chunk(content="some text"))
    transcript.add(event)

    assert transcript.text() is None
    transcript.add(chunk(content="more"))
    assert transcript.text() is None


def test_text_may_follow_reasoning() -> None:
    transcript = ChatTranscript()
    transcript.add(chunk(role="assistant", content=None, tool_calls=[], refusal=None))
    transcript.add(chunk(reasoning_content="let me see"))

    assert transcript.text() == ""

    transcript.add(chunk(content="some text", reasoning_content=None))
    assert transcript.text() == "some text"


def test_text_beyond_the_bound_is_not_kept() -> None:
    transcript = ChatTranscript()
    for _ in range(MAX_TRANSCRIPT // 1000 + 2):
        transcript.add(chunk(content="x" * 1000))

    assert transcript.text() is None
    assert transcript.size < FOLD_BYTES + COUNT_BYTES + 2000


def test_dropped_text_is_gone_and_stays_so() -> None:
    transcript = ChatTranscript()
    transcript.add(chunk(content="some text"))
    transcript.drop()
    transcript.add(chunk(content="more"))

    assert transcript.text() is None
    assert transcript.size == 0


def test_reading_has_its_text_and_forgets_half_a_character() -> None:
    reading = Reading(max_text_bytes=0)
    transcript = ReadTranscript(reading)
    reading.read(b'{"choices":[{"delta":{"content":"some \\ud83d"}}]}')

    assert transcript.text() == "some "
    transcript.rest(Tokens())
    assert not reading.half

    reading.read(b'{"choices":[{"delta":{"tool_calls":[{"index":0}]}}]}')
    assert transcript.text() is None


def test_halves_of_a_character_are_joined_behind_the_seam() -> None:
    rest = ChatRest(Tokens())
    text, _ = rest.take(b'{"choices":[{"delta":{"content":"a\\ud83d"}}]}')
    more, _ = rest.take(b'{"choices":[{"delta":{"content":"\\ude00b"}}]}')
    lone, content = rest.take(b'{"choices":[{"delta":{},"finish_reason":"stop"}]}')

    assert text + more + lone == "a😀b"
    assert content is not None


def test_tool_calls_of_the_rest_are_shown_as_they_are_and_its_reasoning_is_not() -> None:
    rest = ChatRest(Tokens(), {"id": "c1", "created": 3})
    assert rest.take(chunk("c2", reasoning="hm")[6:]) == ("", None)
    calls = [{"index": 0, "id": "a", "function": {"name": "f", "arguments": "{}"}}]
    _, content = rest.take(chunk("c2", role="assistant", tool_calls=calls)[6:])

    assert content is not None
    written = orjson.loads(eventstream.parse(rest.event(content))[0].data)
    assert written["id"] == "c1"
    assert written["created"] == 3
    assert written["choices"][0]["delta"] == {"tool_calls": calls}


def test_usage_of_the_rest_is_the_sum_wherever_it_stands() -> None:
    rest = ChatRest(Tokens(10, 20))
    usage = b'{"prompt_tokens":1,"completion_tokens":2,"total_tokens":3}'
    _, plain = rest.take(b'{"choices":[],"usage":%b}' % usage)
    _, groq = rest.take(
        b'{"choices":[{"delta":{},"finish_reason":"stop"}],"x_groq":{"usage":%b}}' % usage
    )

    total = {"prompt_tokens": 11, "completion_tokens": 22, "total_tokens": 33}
    assert plain is not None
    assert plain["usage"] == total
    assert groq is not None
    assert groq["x_groq"]["usage"] == total


def test_error_and_garbage_are_no_rest() -> None:
    rest = ChatRest(Tokens())

    with pytest.raises(ErrorEvent):
        rest.take(b'{"error":{"message":"no"}}')
    for data in (b"[]", b"{", b'"text"'):
        with pytest.raises(BadEvent):
            rest.take(data)
