"""What a message has said, and the events of another one that goes on with it."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from aioserver.protocol import eventstream
from aioserver.protocol.eventstream import Splitter
from aioserver.protocol.openai import BadEvent, ErrorEvent
from aioserver.protocol.seam import Onward, SeamBroken
from aioserver.protocol.transcript import Tokens
from aioserver.wings.anthropic.transcript import MessageRest, MessagesTranscript

if TYPE_CHECKING:
    from collections.abc import Iterator

ANSWERS = 200
PIECES = ("ha ", "0", "\n", "| a | b |\n", '"', "\\", "ü", "👍🏽", "Once upon a time, ", "<&>")
# What any member of an event may be.
JUNK: tuple[Any, ...] = (None, True, -1, 1.5, 10**30, "", "x", "\ud800", [], [[]], {}, {"a": []})
TOOL = {"type": "tool_use", "id": "t", "name": "f", "input": {}}


def event(kind: str, **members: Any) -> bytes:
    return eventstream.write(orjson.dumps({"type": kind, **members}), event=kind)


def start(index: int, **block: Any) -> bytes:
    return event("content_block_start", index=index, content_block=block)


def delta(index: int, **members: Any) -> bytes:
    return event("content_block_delta", index=index, delta=members)


def stop(index: int) -> bytes:
    return event("content_block_stop", index=index)


def opening(tokens: int = 7) -> bytes:
    usage = {"input_tokens": tokens, "output_tokens": 1}
    return event("message_start", message={"id": "m", "usage": usage}) + event("ping")


def ending(tokens: int = 3) -> bytes:
    reason = {"stop_reason": "end_turn", "stop_sequence": None}
    return event("message_delta", delta=reason, usage={"output_tokens": tokens}) + event(
        "message_stop"
    )


def message(text: str, chance: random.Random, *, thinks: bool, calls: bool) -> bytes:
    parts, index, place = [opening()], 0, 0
    if thinks:
        parts += [start(0, type="thinking", thinking="", signature="")]
        parts += [delta(0, type="thinking_delta", thinking="hm"), stop(0)]
        index = 1
    parts.append(start(index, type="text", text=""))
    while place < len(text):
        size = chance.randint(1, 12)
        parts.append(delta(index, type="text_delta", text=text[place : place + size]))
        place += size
        if chance.random() < 0.05:
            parts.append(event("ping"))
    parts.append(stop(index))
    if calls:
        parts += [start(index + 1, **TOOL), stop(index + 1)]
        parts.insert(-1, delta(index + 1, type="input_json_delta", partial_json="{}"))
    return b"".join(parts) + ending()


def read(data: bytes) -> tuple[str, list[dict[str, Any]]]:
    """Return the text of a message, and its blocks, as a client reads them.

    A block is begun once, is open while it is written to, and indexes have no holes.
    """
    blocks: list[dict[str, Any]] = []
    open_, over, text = -1, False, ""
    for each in eventstream.parse(data):
        content = orjson.loads(each.data)
        kind = content["type"]
        assert each.event.decode() == kind
        assert not over
        match kind:
            case "content_block_start":
                assert open_ < 0
                assert content["index"] == len(blocks)
                open_ = content["index"]
                blocks.append(content["content_block"])
            case "content_block_delta":
                assert content["index"] == open_
                text += content["delta"].get("text", "")
            case "content_block_stop":
                assert content["index"] == open_
                open_ = -1
            case "message_delta":
                assert open_ < 0
            case "message_stop":
                over = True
    return text, blocks


def shown_of(rest: MessageRest, seam: Onward, data: bytes) -> bytes:
    shown = []
    for each in eventstream.parse(data):
        text, content = rest.take(each.data)
        passed = seam.feed(text)
        if content is not None:
            passed += seam.close()
        shown += [rest.text(passed)] if passed else []
        shown += [rest.event(content)] if content is not None else []
    return b"".join(shown)


def test_message_cut_anywhere_goes_on_in_the_block_that_is_open_or_a_new_one() -> None:
    continued = 0
    for seed in range(ANSWERS):
        chance = random.Random(seed)
        text = "".join(chance.choices(PIECES, k=chance.randint(1, 40)))
        sent = message(text, chance, thinks=chance.random() < 0.3, calls=False)
        transcript, splitter = MessagesTranscript(), Splitter()
        first = splitter.feed(sent[: chance.randint(1, sent.index(b"event: message_delta"))])
        transcript.add(first)
        if (before := transcript.text()) is None:
            continue
        calls = chance.random() < 0.3
        other = message(text[len(before) :], chance, thinks=chance.random() < 0.3, calls=calls)
        try:
            shown = shown_of(transcript.rest(Tokens(7, 2)), Onward(before), other)
        except SeamBroken:
            assert text[len(before) :].startswith(before[:32]), seed
            continue
        continued += 1
        whole, blocks = read(first + shown)
        assert whole == text, seed
        assert (blocks[-1]["type"] == "tool_use") is calls
        assert b"message_start" not in shown
        assert b"thinking" not in shown
        usage = orjson.loads(eventstream.parse(shown)[-2].data)["usage"]
        assert usage == {"input_tokens": 14, "output_tokens": 5}
    assert continued > ANSWERS / 2


@pytest.mark.parametrize(
    "block",
    [
        stop(0) + start(1, **TOOL),
        stop(0) + start(1, type="thinking", thinking=""),
        delta(0, type="citations_delta", citation={}),
        stop(0) + ending(),
        event("something_new"),
    ],
)
def test_message_with_more_than_text_is_not_continued(block: bytes) -> None:
    transcript = MessagesTranscript()
    transcript.add(
        opening() + start(0, type="text", text="") + delta(0, type="text_delta", text="a")
    )
    transcript.add(block)

    assert transcript.text() is None


def test_message_cut_in_its_thoughts_is_not_continued() -> None:
    transcript = MessagesTranscript()
    transcript.add(opening() + start(0, type="thinking", thinking=""))
    transcript.add(delta(0, type="thinking_delta", thinking="hm"))

    assert transcript.text() is None


DECLINED = {"type": "fallback", "from": {"model": "a"}, "to": {"model": "b"}}


def test_block_that_names_another_model_is_none_of_what_is_said() -> None:
    transcript = MessagesTranscript()
    transcript.add(opening() + start(0, **DECLINED) + stop(0) + start(1, type="text", text="One "))
    transcript.add(stop(1) + start(2, **DECLINED) + stop(2) + start(3, type="text", text="two "))
    transcript.add(delta(3, type="text_delta", text="three "))

    assert transcript.text() == "One two three "


@pytest.mark.parametrize("first", [True, False])
def test_block_that_names_another_model_is_shown_in_the_rest_behind_its_text(first: bool) -> None:
    said = start(1, type="text", text="") + delta(1, type="text_delta", text="b") + stop(1)
    named = start(0, **DECLINED) + stop(0)
    other = opening() + (named + said if first else said + named) + ending()

    shown = shown_of(MessageRest(0, Tokens(), in_text=True), Onward("a"), other)

    begun = delta(0, type="text_delta", text="a")
    text, blocks = read(opening() + start(0, type="text", text="") + begun + shown)
    assert text == "ab"
    assert [block["type"] for block in blocks] == ["text", *([] if first else ["fallback"])]
    assert first or blocks[-1] == DECLINED


def test_passes_of_the_rest_have_what_was_said_before_as_the_first_one() -> None:
    own = {"type": "compaction", "input_tokens": 50, "output_tokens": 5}
    usage = {"input_tokens": 7, "output_tokens": 3, "iterations": [own]}
    end = event("message_delta", delta={"stop_reason": "end_turn"}, usage=usage)

    shown = shown_of(MessageRest(0, Tokens(40, 2), in_text=True), Onward("a"), opening() + end)

    [*_, last] = contents(shown)
    earlier = {"type": "message", "input_tokens": 40, "output_tokens": 2}
    counts = {"input_tokens": 47, "output_tokens": 5}
    assert last["usage"] == {**counts, "iterations": [earlier, own]}


def variants(value: Any) -> Iterator[Any]:
    """Return *value* with any one thing in it replaced, or left out."""
    yield from JUNK
    members = value.items() if isinstance(value, dict) else ()
    for name, member in members:
        rest = {other: each for other, each in members if other != name}
        yield rest
        yield from ({**rest, name: variant} for variant in variants(member))


@pytest.mark.parametrize("number", range(8))
def test_event_with_members_of_any_kind_is_shown_or_the_providers_fault(number: int) -> None:
    whole = [
        opening(),
        start(0, type="text", text="a"),
        delta(0, type="text_delta", text="b"),
        stop(0) + start(1, **TOOL),
        delta(1, type="input_json_delta", partial_json="{}"),
        stop(1),
        event("message_delta", index=1, delta={"stop_reason": "end_turn"}, usage={}),
        event("message_stop"),
    ]
    before, (content, *_), after = whole[:number], contents(whole[number]), whole[number + 1 :]
    shown = 0
    for variant in variants(content):
        odd = eventstream.write(json.dumps(variant).encode())
        seam = Onward("Once upon a time, " * 10)
        try:
            shown_of(
                MessageRest(0, Tokens(), in_text=True), seam, b"".join([*before, odd, *after])
            )
        except (BadEvent, ErrorEvent):
            continue
        shown += 1
    assert shown


def contents(data: bytes) -> list[Any]:
    return [orjson.loads(each.data) for each in eventstream.parse(data)]


def test_error_and_garbage_are_no_rest() -> None:
    rest = MessageRest(0, Tokens(), in_text=True)

    with pytest.raises(ErrorEvent):
        rest.take(b'{"type":"error","error":{"type":"overloaded_error"}}')
    for data in (b"{", b'{"type":"content_block_delta"}', b'{"type":"content_block_start"}'):
        with pytest.raises(BadEvent):
            rest.take(data)
