"""The parts of a turn: what one event of a streamed answer brings.

A *turn* is one answer of a model to an agent: its reasoning, its text, its calls of tools, and a
finish. What is held of it (providers/holding.py) depends on the part that an event brings; which
part that is, the API says (`Api.part`). An event that brings several is the one that comes last
below. Whatever is not known is text, so that it is shown as it comes.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Any

import orjson

from aioserver.protocol.openai import BadEvent, load_with_surrogates, only_names

if TYPE_CHECKING:
    from collections.abc import Mapping


class Part(IntEnum):
    """What an event brings."""

    # A role, an id, the beginning or the end of a block: nothing that is waited for.
    PREAMBLE = 0
    REASONING = 1
    TEXT = 2
    # A piece of a call of a tool that the client runs.
    CALL = 3
    # A tool that runs at the provider, or its result.
    HOSTED = 4
    # Nothing of the turn is missing but the end mark; the end mark itself.
    FINISH = 5
    END = 6
    # The turn has failed, or the event is none.
    ERROR = 7


_REASONING = ("reasoning_content", "reasoning", "reasoning_details")
_CALLS = ("tool_calls", "function_call")
# What a delta may have beside text.
_KNOWN = frozenset({"role", *_REASONING, *_CALLS})


def content_of(data: bytes) -> dict[str, Any] | None:
    """Return the object that an event with *data* has; None if it has none."""
    try:
        content = orjson.loads(data)
    except orjson.JSONDecodeError:
        try:
            content = load_with_surrogates(data)
        except BadEvent:
            return None
    return content if isinstance(content, dict) else None


def chat_part(data: bytes) -> Part:
    """Return what an event of a chat completion brings."""
    if data.strip() == b"[DONE]":
        return Part.END
    content = content_of(data)
    if content is None or content.get("error"):
        return Part.ERROR
    choices = content.get("choices")
    if not choices:
        return Part.PREAMBLE
    if not isinstance(choices, list):
        return Part.TEXT
    return max(_of_choice(each) if isinstance(each, dict) else Part.TEXT for each in choices)


def _of_choice(choice: Mapping[str, Any]) -> Part:
    if isinstance(reason := choice.get("finish_reason"), str) and reason:
        return Part.FINISH
    delta = choice.get("delta")
    if not isinstance(delta, dict):
        return Part.TEXT
    if any(delta.get(name) for name in _CALLS):
        return Part.CALL
    if not only_names(delta, _KNOWN):
        return Part.TEXT
    return Part.REASONING if any(delta.get(name) for name in _REASONING) else Part.PREAMBLE
