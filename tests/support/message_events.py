"""Checks of the events of a message: they are those of Anthropic's own SDK, one block is open at a
time, and put together they are a message.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from aioserver.protocol import eventstream
from tests.support.lazily import lazily
from tests.support.response_events import check_shape

if TYPE_CHECKING:
    from collections.abc import Sequence

    import anthropic
    from pydantic import BaseModel
else:
    # By its name alone: to look for a module within it would import it.
    anthropic = lazily("anthropic")

EVENTS = {
    "message_start": "RawMessageStartEvent",
    "content_block_start": "RawContentBlockStartEvent",
    "content_block_delta": "RawContentBlockDeltaEvent",
    "content_block_stop": "RawContentBlockStopEvent",
    "message_delta": "RawMessageDeltaEvent",
    "message_stop": "RawMessageStopEvent",
}
# The kind of a delta for that of a block, its member, and that of the block.
DELTAS = {
    "text": {"text_delta": ("text", "text")},
    "thinking": {
        "thinking_delta": ("thinking", "thinking"),
        "signature_delta": ("signature", "signature"),
    },
    "tool_use": {"input_json_delta": ("partial_json", "input")},
}


def read_events(body: bytes) -> list[dict[str, Any]]:
    """The events of a message in *body*, each of them checked alone; without heartbeats."""
    events = []
    for event in eventstream.parse(body):
        content = orjson.loads(event.data)
        assert event.event.decode() == content["type"]
        if content["type"] == "ping":
            continue
        if content["type"] != "error":
            model: type[BaseModel] = getattr(anthropic.types, EVENTS[content["type"]])
            check_shape(model, content)
        events.append(content)
    return events


def check_run(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Check the *events* of a message that ends well, and return it, put together."""
    message = put_together(events)
    assert events[-1]["type"] == "message_stop"
    check_shape(anthropic.types.Message, message)
    return message


def put_together(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The message of *events*, as far as they go."""
    assert events[0]["type"] == "message_start"
    message: dict[str, Any] = orjson.loads(orjson.dumps(events[0]["message"]))
    check_usage(message["usage"])
    assert (message["content"], message["stop_reason"]) == ([], None)
    opened: dict[str, Any] | None = None
    ended = False
    for number, event in enumerate(events[1:], 2):
        match event["type"]:
            case "content_block_start":
                assert opened is None
                assert not ended
                assert event["index"] == len(message["content"])
                opened = dict(event["content_block"])
                if opened["type"] == "tool_use":
                    assert opened["input"] == {}
                    opened["input"] = ""
                message["content"].append(opened)
            case "content_block_delta":
                assert opened is not None
                assert event["index"] == len(message["content"]) - 1
                member, field = DELTAS[opened["type"]][event["delta"]["type"]]
                opened[field] += event["delta"][member]
            case "content_block_stop":
                assert opened is not None
                assert event["index"] == len(message["content"]) - 1
                _check_block(opened)
                opened = None
            case "message_delta":
                assert opened is None
                assert not ended
                ended = True
                message |= event["delta"]
                message["usage"] |= event["usage"]
                check_usage(message["usage"])
            case kind:
                assert (kind, ended, number) == ("message_stop", True, len(events))
    return message


def check_usage(usage: dict[str, Any]) -> None:
    assert usage["input_tokens"] > 0
    assert usage["output_tokens"] > 0


def _check_block(block: dict[str, Any]) -> None:
    if block["type"] == "text":
        assert block["text"].strip()
    if block["type"] == "thinking":
        assert block["thinking"].strip()
        assert block["signature"]
    if block["type"] == "tool_use":
        try:
            block["input"] = orjson.loads(block["input"] or "{}")
        except orjson.JSONDecodeError:
            # It was cut.
            block["input"] = {}
