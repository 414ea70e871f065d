"""A large request is translated in steps, whatever it is large by: nothing else waits for long.

The steps are counted by what is done in them, since a busy machine tells nothing by its time.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from aioserver.wings.anthropic.bridge import request as messages
from aioserver.wings.responses.bridge import request as responses

if TYPE_CHECKING:
    from collections.abc import Coroutine

SIZE = 1 << 20
# Calls of functions, of Python's and of C's, within one step, which take 0.1 µs each.
MOST_CALLS = 3000
TEXT = "The quick — brown fox\n" * 20


def repeated(*elements: Any) -> list[Any]:
    """These elements again and again, of about SIZE bytes in all."""
    return [*elements] * (SIZE // len(orjson.dumps(elements)))


def told(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def messages_of(turns: list[Any], **further: Any) -> Coroutine[Any, Any, Any]:
    body = {"model": "m", "max_tokens": 9, "messages": turns, **further}
    return messages.chat_request(orjson.dumps(body))


def responses_of(items: list[Any], **further: Any) -> Coroutine[Any, Any, Any]:
    return responses.chat_request(orjson.dumps({"model": "m", "input": items, **further}))


def text(words: str, kind: str = "text") -> dict[str, str]:
    return {"type": kind, "text": words}


def use(name: str) -> dict[str, Any]:
    return {"type": "tool_use", "id": name, "name": "f", "input": {"x": TEXT}}


def result(name: str, content: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": name, "content": content}


NAMES = [str(number) for number in range(900)]
TOOL: dict[str, Any] = {"name": "f", "description": TEXT}
SHAPES: dict[str, Any] = {
    "messages: tiny turns": lambda: messages_of(repeated(told("a"), told("b"))),
    "messages: turns": lambda: messages_of(repeated(told(TEXT), told(TEXT))),
    "messages: blocks": lambda: messages_of(
        [{"role": "user", "content": repeated(text("x" * 600))}]
    ),
    "messages: calls": lambda: messages_of(
        [
            {"role": "assistant", "content": [use(name) for name in NAMES]},
            {"role": "user", "content": [result(name, TEXT) for name in NAMES]},
        ]
    ),
    "messages: a result of blocks": lambda: messages_of(
        [
            {"role": "assistant", "content": [use("a")]},
            {"role": "user", "content": [result("a", repeated(text("x" * 600)))]},
        ]
    ),
    "messages: system": lambda: messages_of([told("a")], system=repeated(text("x" * 600))),
    "messages: tools": lambda: messages_of(
        [told("a")], tools=repeated({**TOOL, "input_schema": {"type": "object"}})
    ),
    "responses: tiny items": lambda: responses_of(repeated(told("a"), told("b"))),
    "responses: items": lambda: responses_of(repeated(told(TEXT), told(TEXT))),
    "responses: parts": lambda: responses_of(
        [{"role": "user", "content": repeated(text("x" * 600, "input_text"))}]
    ),
    "responses: calls": lambda: responses_of(
        [
            item
            for name in NAMES
            for item in (
                {"type": "function_call", "call_id": name, "name": "f", "arguments": TEXT},
                {"type": "function_call_output", "call_id": name, "output": TEXT},
            )
        ]
    ),
    "responses: tools": lambda: responses_of(
        [told("a")], tools=repeated({**TOOL, "type": "function", "parameters": {}})
    ),
}
LARGE: dict[str, Any] = {
    "messages: arguments": lambda: messages_of(
        [
            {
                "role": "assistant",
                "content": [{**use("a"), "input": {"x": '"\n' * (SIZE // 4)}}],
            }
        ]
    ),
    "responses: input of a custom tool": lambda: responses_of(
        [
            {
                "type": "custom_tool_call",
                "call_id": "a",
                "name": "f",
                "input": '"\n' * (SIZE // 4),
            }
        ]
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_no_step_of_many_small_values_does_much(shape: str) -> None:
    steps, calls = SHAPES[shape]().__await__(), 0
    most = 0

    def count(_frame: object, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event in {"call", "c_call"}

    ended = False
    while not ended:
        calls = 0
        sys.setprofile(count)
        try:
            next(steps)
        except StopIteration:
            ended = True
        finally:
            sys.setprofile(None)
        most = max(most, calls)

    assert most < MOST_CALLS


@pytest.mark.parametrize("shape", LARGE)
def test_a_large_value_is_read_and_written_in_steps(shape: str) -> None:
    # Its quotes are looked for piece by piece, as it is written.
    assert len([*LARGE[shape]().__await__()]) > SIZE >> 16
