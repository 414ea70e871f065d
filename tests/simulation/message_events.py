"""The events of one message, as a client reads them, each checked when it comes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tests.simulation.truth import Violation

if TYPE_CHECKING:
    from tests.simulation.truth import Reading

# For the kind of a block, that of its deltas, and the members in which both have their text.
DELTAS = {
    "text": {"text_delta": ("text", "text")},
    "thinking": {
        "thinking_delta": ("thinking", "thinking"),
        "signature_delta": ("signature", "signature"),
    },
    "tool_use": {"input_json_delta": ("partial_json", "input")},
}
TOKENS = ("input_tokens", "output_tokens")
# The end of a message that its provider has stopped without a word of why.
EARLY = "stopped early"


class MessageReading:
    """What a client has read of a message; its text goes to *reading*, None if it is no matter.

    Always, or `Violation` is raised: one block is open at most, indices have no gap, each delta
    fits its block, no block is empty, and nothing comes behind the end.
    """

    def __init__(self, reading: Reading | None) -> None:
        self.reading = reading
        self.message: dict[str, Any] = {}
        self.events = 0
        self.end = ""
        self._open: dict[str, Any] | None = None
        self._finished = False

    @property
    def blocks(self) -> list[dict[str, Any]]:
        """The blocks so far."""
        return self.message["content"]  # type: ignore[no-any-return]

    def take(self, event: dict[str, Any]) -> None:
        """Take one event."""
        kind = event["type"]
        if kind == "ping":
            return
        if self.end:
            raise Violation(f"{kind} behind the end of a message: {self.end}")
        self.events += 1
        if kind == "error":
            self.end = f"error: {event['error'].get('code') or event['error']['type']}"
        elif kind == "message_start":
            self._start(event["message"])
        elif not self.message:
            raise Violation(f"{kind} in front of message_start")
        elif kind == "content_block_start":
            self._begin(event)
        elif kind in {"content_block_delta", "content_block_stop"}:
            if self._open is None or event["index"] != len(self.blocks) - 1:
                raise Violation(f"{kind} of block {event['index']}, which is not open")
            if kind == "content_block_stop":
                check_block(self._open)
                self._open = None
            else:
                self._grow(self._open, event["delta"])
        elif kind == "message_delta":
            if self._finished or self._open is not None:
                raise Violation("message_delta where a block is open, or twice")
            self._finished = True
            self.message |= event["delta"]
            self.message["usage"] |= event["usage"]
        elif kind == "message_stop":
            if self._finished:
                self.finish(self.message)
            elif self.reading is not None and self.reading.question.may_end_early:
                # A provider's own end in the middle of its answer, which passes as it came.
                self.end = EARLY
            else:
                raise Violation("message_stop without message_delta")
        else:
            raise Violation(f"an unknown event: {kind}")

    def finish(self, message: dict[str, Any]) -> None:
        """Note the end of *message*, which is whole."""
        self.message, self.end = message, "complete"
        if message["stop_reason"] is None or not all(message["usage"][name] for name in TOKENS):
            raise Violation(f"a message that ends with {message['stop_reason']}, or no tokens")
        calls = [block for block in message["content"] if block["type"] == "tool_use"]
        if message["stop_reason"] == "end_turn" and calls:
            raise Violation("a turn that ends with a call")
        for block in calls:
            if isinstance(block["input"], str):
                block["input"] = _arguments(block["input"], message["stop_reason"])

    def _start(self, message: dict[str, Any]) -> None:
        if self.message:
            raise Violation("a message that begins twice")
        if message["content"] or not message["usage"]["input_tokens"]:
            raise Violation(f"a message that begins with {message}")
        self.message = message

    def _begin(self, event: dict[str, Any]) -> None:
        if self._open is not None or self._finished:
            raise Violation("a block that begins where one is open, or behind the last")
        if event["index"] != len(self.blocks):
            raise Violation(f"block {event['index']} behind {len(self.blocks)}")
        self._open = dict(event["content_block"])
        if self._open["type"] == "tool_use":
            self._open["input"] = ""
        self.blocks.append(self._open)

    def _grow(self, block: dict[str, Any], delta: dict[str, Any]) -> None:
        fields = DELTAS[block["type"]]
        if delta["type"] not in fields:
            raise Violation(f"{delta['type']} in a block of {block['type']}")
        member, field = fields[delta["type"]]
        block[field] += delta[member]
        if block["type"] == "text" and self.reading is not None:
            self.reading.add(delta[member])


def check_block(block: dict[str, Any]) -> None:
    """Check a block that has ended.

    Raises:
        Violation: it is empty, or lacks what it must have.
    """
    kind = block["type"]
    if kind in {"text", "thinking"} and not block[kind].strip():
        raise Violation(f"a block of {kind} that is empty")
    if kind == "thinking" and not block["signature"]:
        raise Violation("a thinking without a signature")
    if kind == "tool_use" and not (block["id"] and block["name"]):
        raise Violation(f"a call without an id or a name: {block}")


def _arguments(text: str, reason: str) -> Any:
    try:
        return json.loads(text or "{}")
    except ValueError:
        if reason != "max_tokens":
            raise Violation(f"arguments that are not whole: {text}") from None
        return {}
