"""The order of the messages that an engine gets over a bridge, from any conversation."""

from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import orjson
import pytest

from aioserver.protocol.steps import at_once
from aioserver.wings.anthropic.bridge import request as messages
from aioserver.wings.anthropic.bridge.blocks import SIGNATURE
from aioserver.wings.responses.bridge import request as responses
from tests.support.reference_messages import check_order

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class Transcript(NamedTuple):
    """Something in a conversation, whose *mark* is nowhere else in it; *id* is that of a call."""

    kind: str
    mark: str
    id: str = ""
    picture: bool = False


class _Chat(msgspec.Struct):
    messages: list[msgspec.Raw]


def _written(body: bytes) -> list[bytes]:
    return [bytes(raw) for raw in msgspec.json.decode(body, type=_Chat).messages]


def as_messages(conversation: Iterable[Transcript]) -> list[bytes]:
    """The messages over the bridge of Messages, each a block."""
    turns: list[dict[str, Any]] = []
    picture = {"type": "image", "source": {"type": "url", "url": "u"}}
    for said in conversation:
        text = {"type": "text", "text": said.mark}
        shown = [text, picture] if said.picture else [text]
        role, content = {
            "user": ("user", shown),
            "result": (
                "user",
                [{"type": "tool_result", "tool_use_id": said.id, "content": shown}],
            ),
            "system": ("system", [text]),
            "assistant": ("assistant", [text]),
            "call": (
                "assistant",
                [{"type": "tool_use", "id": said.id, "name": "f", "input": {"x": said.mark}}],
            ),
            "thought": (
                "assistant",
                [{"type": "thinking", "thinking": said.mark, "signature": SIGNATURE}],
            ),
        }[said.kind]
        # Half of them are blocks of the message before, if it is of the same role.
        if turns and turns[-1]["role"] == role and len(said.mark) % 2:
            turns[-1]["content"] += content
        else:
            turns.append({"role": role, "content": content})
    body = orjson.dumps({"model": "m", "max_tokens": 1, "messages": turns})
    return _written(at_once(messages.chat_request(body, reasoning_field="reasoning")).body)


def as_responses(conversation: Iterable[Transcript]) -> list[bytes]:
    """The messages over the bridge of Responses, each an item."""
    items: list[dict[str, Any]] = []
    picture = {"type": "input_image", "image_url": "u"}
    for said in conversation:
        text = {"type": "input_text", "text": said.mark}
        shown = [text, picture] if said.picture else [text]
        forms: dict[str, dict[str, Any]] = {
            "user": {"role": "user", "content": shown},
            "result": {"type": "function_call_output", "call_id": said.id, "output": shown},
            "system": {"role": "system", "content": [text]},
            "assistant": {"role": "assistant", "content": [text]},
            "call": {
                "type": "function_call",
                "call_id": said.id,
                "name": "f",
                "arguments": said.mark,
            },
            "thought": {
                "type": "reasoning",
                "content": [{"type": "reasoning_text", "text": said.mark}],
            },
        }
        items.append(forms[said.kind])
    body = orjson.dumps({"model": "m", "input": items})
    # Results whose calls may be in front of these items are taken, too.
    asked = responses.chat_request(body, reasoning_field="reasoning", incomplete=True)
    return _written(at_once(asked).body)


SHOWN = {"user", "result"}
BRIDGES = {"messages": as_messages, "responses": as_responses}
pytestmark = pytest.mark.parametrize("bridge", BRIDGES)


def conversation_of(rng: random.Random, *, orderly: bool) -> list[Transcript]:
    """A conversation, whose calls all have a result before anything else is said if *orderly*."""
    said: list[Transcript] = []
    marks = iter(range(1000))

    def add(kind: str, call: str = "") -> None:
        mark = f"<{next(marks)}{'+' * rng.randint(0, 1)}>"
        said.append(Transcript(kind, mark, call, rng.random() < 0.2))

    for turn in range(rng.randint(1, 8)):
        for _ in range(rng.randint(0, 2)):
            add(rng.choice(["user", "user", "system", "assistant", "thought"]))
        calls = [f"c{turn}-{number}" for number in range(rng.choice([0, 1, 3]))]
        for call in calls:
            add("call", call)
            if rng.random() < 0.2:
                add(rng.choice(["thought", "assistant"]))
        rng.shuffle(calls)
        if not orderly and calls and rng.random() < 0.4:
            calls[-1] = rng.choice(["none", calls[0]])
        for call in calls:
            if rng.random() < 0.3:
                add(rng.choice(["user", "system", *([] if orderly else ["thought", "assistant"])]))
            add("result", call)
    return said or [Transcript("user", "<0>")]


def texts_of(messages: Sequence[Any]) -> str:
    """All texts of *messages* that are neither results nor reasoning."""
    return "".join(
        part if isinstance(part, str) else part.get("text", "")
        for message in messages
        if message["role"] != "tool"
        for part in message["content"] or ()
    )


@pytest.mark.parametrize("seed", range(0, 600, 100))
def test_any_conversation_is_one_that_strict_engines_take(bridge: str, seed: int) -> None:
    for each in range(seed, seed + 100):
        conversation = conversation_of(random.Random(each), orderly=each % 2 == 0)
        written = BRIDGES[bridge](conversation)
        chat = [orjson.loads(message) for message in written]

        check_order(chat)
        everything = b"".join(written).decode()
        texts = [said.mark for said in conversation if said.kind not in {"call", "thought"}]
        for said in conversation:
            count = everything.count(said.mark)
            # Reasoning that nothing followed is dropped.
            assert count == 1 or (said.kind == "thought" and not count), (each, said)
        in_results = "".join(message["content"] for message in chat if message["role"] == "tool")
        outside = [mark for mark in texts if mark not in in_results]
        joined = texts_of(chat)
        assert sorted(outside, key=joined.index) == outside, (each, joined)
        pictures = [said for said in conversation if said.picture and said.kind in SHOWN]
        assert everything.count('"image_url":{"url"') == len(pictures)


def test_what_was_said_is_a_prefix_of_what_is_said_later(bridge: str) -> None:
    for seed in range(150):
        conversation = conversation_of(random.Random(seed), orderly=True)
        later = BRIDGES[bridge](conversation)
        open_calls: Counter[str] = Counter()
        for length, said in enumerate(conversation, 1):
            open_calls[said.id] += {"call": 1, "result": -1}.get(said.kind, 0)
            if any(open_calls.values()):
                # A model is asked once it has all results.
                continue
            before = BRIDGES[bridge](conversation[:length])
            assert before[:-1] == later[: len(before[:-1])], (seed, length)


def test_what_the_assistant_says_in_a_row_is_one_message(bridge: str) -> None:
    said = [Transcript(kind, kind) for kind in ("user", "assistant", "thought")]

    written = BRIDGES[bridge]([*said, Transcript("assistant", "Really")])

    assert [orjson.loads(message) for message in written] == [
        {"role": "user", "content": "user"},
        {"role": "assistant", "content": "assistant\n\nReally", "reasoning": "thought"},
    ]


def test_a_thought_alone_does_not_part_what_the_user_says(bridge: str) -> None:
    written = BRIDGES[bridge](
        [Transcript("user", "a"), Transcript("thought", "t"), Transcript("user", "bc")]
    )

    assert [orjson.loads(message) for message in written] == [
        {"role": "user", "content": "a\n\nbc"}
    ]


def test_results_follow_their_calls_in_their_order_and_pictures_come_next(bridge: str) -> None:
    asked = [Transcript("user", "go"), Transcript("call", "x", "a"), Transcript("call", "y", "b")]
    given = [
        Transcript("result", "2", "b", picture=True),
        Transcript("user", "and?"),
        Transcript("result", "1", "a"),
    ]

    chat = [orjson.loads(message) for message in BRIDGES[bridge]([*asked, *given])]

    assert [message["role"] for message in chat] == ["user", "assistant", "tool", "tool", "user"]
    assert [message["content"] for message in chat[2:4]] == ["1", "2"]
    assert chat[4]["content"] == [
        {"type": "image_url", "image_url": {"url": "u"}},
        {"type": "text", "text": "and?"},
    ]


def test_a_call_without_a_result_has_an_empty_one_and_a_late_result_is_a_text(bridge: str) -> None:
    asked = [Transcript("user", "go"), Transcript("call", "x", "a"), Transcript("call", "y", "b")]
    given = [
        Transcript("result", "1", "a"),
        Transcript("assistant", "Well"),
        Transcript("result", "2", "b"),
    ]

    chat = [orjson.loads(message) for message in BRIDGES[bridge]([*asked, *given])]

    assert chat[2:] == [
        {"role": "tool", "tool_call_id": "a", "content": "1"},
        {"role": "tool", "tool_call_id": "b", "content": ""},
        {"role": "assistant", "content": "Well"},
        {"role": "user", "content": "2"},
    ]


def test_two_calls_of_one_id_each_have_their_result(bridge: str) -> None:
    calls = [Transcript("call", mark, "a") for mark in ("x", "y")]
    results = [Transcript("result", mark, "a") for mark in ("1", "2")]

    chat = [orjson.loads(message) for message in BRIDGES[bridge]([*calls, *results])]

    assert len(chat[0]["tool_calls"]) == 2
    assert [message["content"] for message in chat[1:]] == ["1", "2"]


def test_two_hundred_results_are_one_turn(bridge: str) -> None:
    names = [str(number) for number in range(200)]
    calls = [Transcript("call", name, name) for name in names]
    results = [Transcript("result", "x" * 5000, name) for name in names]

    chat = [orjson.loads(message) for message in BRIDGES[bridge]([*calls, *results])]

    check_order(chat)
    assert len(chat) == 201
