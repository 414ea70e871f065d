"""A whole chat completion as a whole response, read at once or in pieces."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from aioserver.protocol import sound
from aioserver.protocol.bridging import whole as bridge
from aioserver.protocol.openai import BadEvent, ErrorEvent
from aioserver.protocol.steps import STEP_VALUES, at_once
from aioserver.wings.responses.bridge.output import Frame
from aioserver.wings.responses.bridge.request import chat_request
from aioserver.wings.responses.bridge.whole import WholeWriter, whole_response
from tests.support.response_events import check_response

NOW = 1_764_000_000
PATCH: Any = {"type": "custom", "name": "apply_patch", "description": "Edits files."}
LONG = 'a "b" \\ \n é \U0001f600 ' * 40
TOKEN = {"token": "é", "logprob": -0.5, "top_logprobs": [{"token": "e", "logprob": -1.5}]}


def new_writer(max_bytes: int = 1 << 20) -> WholeWriter:
    asked = {"model": "m", "input": "Hello", "tools": [PATCH], "top_logprobs": 1}
    request = at_once(chat_request(orjson.dumps(asked)))
    return WholeWriter(request, Frame("resp_1", NOW, "m", request.repeated), max_bytes)


def whole(body: bytes, writer: WholeWriter | None = None) -> bytes:
    return at_once(whole_response(body, writer or new_writer(), NOW))


def answer(message: Any, **further: Any) -> bytes:
    choice = {"index": 0, "message": message, "finish_reason": "stop", **further}
    # An estimate of the usage counts the commas between logprobs, too.
    usage = {"prompt_tokens": 1, "completion_tokens": 2}
    choices = [{}, 7, {"index": 1}, choice]
    return orjson.dumps({"model": "m-1", "choices": choices, "usage": usage, "x": [{}] * 50})


def tool(name: str, arguments: Any, **further: Any) -> dict[str, Any]:
    return {**further, "type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge, "STEP_BYTES", 200)
    monkeypatch.setattr(sound, "PIECE_BYTES", 64)


def test_a_whole_answer_is_a_whole_response() -> None:
    message = {
        "role": "assistant",
        "content": "Well",
        "reasoning_content": "Hm",
        "tool_calls": [
            {"id": "c0", "type": "function", "function": {"name": "f", "arguments": "{}"}},
            {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}},
        ],
    }
    content = {
        "object": "chat.completion",
        "model": "m-1",
        "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
    }

    response = orjson.loads(whole(orjson.dumps(content)))
    check_response(response)

    assert [item["type"] for item in response["output"]] == [
        "reasoning",
        "message",
        "function_call",
        "function_call",
    ]
    assert response["usage"]["total_tokens"] == 3
    assert (response["model"], response["status"]) == ("m-1", "completed")


@pytest.mark.parametrize("body", [b"[]", b"{}", b'{"choices":[]}', b'{"choices":[{}]}', b"no"])
def test_what_is_no_chat_completion_is_a_fault(body: bytes) -> None:
    with pytest.raises(BadEvent):
        whole(body)


def test_an_error_object_is_a_fault() -> None:
    with pytest.raises(ErrorEvent):
        whole(b'{"error":{"message":"no"}}')


MESSAGES: dict[str, Any] = {
    "a text": {"content": LONG},
    "thoughts and a text": {"content": LONG, "reasoning_content": LONG, "reasoning": LONG},
    "thoughts alone": {"content": None, "reasoning": LONG},
    "a refusal": {"content": "", "refusal": LONG},
    "parts": {"content": [{"type": "text", "text": LONG}, 1, {"type": "text", "text": "b"}] * 5},
    "calls": {"content": LONG, "tool_calls": [tool("f", LONG, id=f"c{n}") for n in range(5)]},
    "calls without ids": {"tool_calls": [tool("f", LONG), tool("g", "{}"), tool("h", "")]},
    "calls with indices": {"tool_calls": [tool("f", LONG, index=n, id=f"c{n}") for n in range(3)]},
    "calls with one id": {"tool_calls": [tool("f", LONG, id="c") for _ in range(5)]},
    "calls with one index": {"tool_calls": [tool("f", LONG, index=0) for _ in range(5)]},
    "a custom tool": {"tool_calls": [tool("apply_patch", orjson.dumps({"input": LONG}).decode())]},
    "arguments that are an object": {"tool_calls": [tool("f", {"a": LONG}, id="c")]},
    "no list of calls": {"content": LONG, "tool_calls": {"a": 1}},
    "the old form of a call": {"function_call": {"name": "f", "arguments": LONG}},
    "nothing": {"content": None},
    "no message": LONG,
}


@pytest.mark.parametrize("name", MESSAGES)
@pytest.mark.parametrize("reason", ["stop", "length", None])
def test_an_answer_that_is_read_in_pieces_is_the_same_response(
    name: str, reason: str | None, request: pytest.FixtureRequest
) -> None:
    # Of a content in parts, each would have them when it is read at once.
    logprobs = None if name == "parts" else {"content": [TOKEN] * 7}
    body = answer(MESSAGES[name], finish_reason=reason, logprobs=logprobs)

    def outcome() -> bytes | str:
        try:
            return whole(body)
        except BadEvent as fault:
            return str(fault)

    expected = outcome()
    request.getfixturevalue("small_steps")

    assert outcome() == expected
    if isinstance(expected, bytes):
        check_response(orjson.loads(expected))


@pytest.mark.parametrize("arguments", ['{"a":1}', orjson.dumps({"a": LONG}).decode()])
@pytest.mark.parametrize("same", [{"id": "f:0"}, {"index": 0}, {"id": "f:0", "index": 0}, {}])
@pytest.mark.parametrize("steps", ["one step", "small_steps"])
def test_each_call_of_a_whole_answer_is_one_whatever_it_has_in_common_with_others(
    same: dict[str, Any], arguments: str, steps: str, request: pytest.FixtureRequest
) -> None:
    if steps == "small_steps":
        request.getfixturevalue(steps)
    names = ["f", "g", "f"]
    calls = [tool(name, arguments, **same) for name in names]
    calls.insert(2, tool("h", arguments, id="another"))

    response = orjson.loads(whole(answer({"content": None, "tool_calls": calls})))

    assert [(item["name"], item["arguments"]) for item in response["output"]] == [
        (name, arguments) for name in ("f", "g", "h", "f")
    ]


@pytest.mark.usefixtures("small_steps")
def test_a_lone_surrogate_in_a_large_answer_becomes_a_replacement_character() -> None:
    body = answer({"content": "a" * 300}).replace(b"aaa", rb"\ud83d", 1)

    response = orjson.loads(whole(body))

    assert response["output"][0]["content"][0]["text"] == "\ufffd" + "a" * 297


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("body", [b"[%b]", b'{"a":%b}', b'{"choices":[{}],"a":%b', b"\xff%b"])
def test_a_large_body_that_is_no_chat_completion_is_a_fault(body: bytes) -> None:
    with pytest.raises(BadEvent, match="not a chat completion"):
        whole(body % (b"[%b1]" % (b"1," * 300)))


def test_an_answer_of_very_many_values_is_read_in_steps() -> None:
    message = {"content": "x", "tool_calls": [tool("f", "{}", id=f"c{n}") for n in range(1000)]}
    body = answer(message, logprobs={"content": [TOKEN] * 2000})

    steps = [*whole_response(body, new_writer(1 << 24), NOW).__await__()]

    assert len(steps) > 3000 / STEP_VALUES


@pytest.mark.usefixtures("small_steps")
def test_a_large_answer_of_too_many_values_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge, "MAX_VALUES", 100)
    body = answer({"content": "x"})

    assert whole(body.replace(b",{}" * 10, b"", 1))
    with pytest.raises(BadEvent, match="not a chat completion"):
        whole(body.replace(b"{}]}", b"{}%b]}" % (b",{}" * 100)))


def test_a_large_answer_is_bounded_in_what_is_kept_of_it() -> None:
    with pytest.raises(BadEvent, match="more than 100000 bytes"):
        whole(answer({"content": "x" * 100_000}), new_writer(100_000))
