"""A translation of the chunks of a chat completion into the content of a message, as simple as can
be: it shares no code with the bridge, and looks at all of the answer at once.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(slots=True)
class Transcript:
    """A text or a thinking in a row."""

    kind: str
    text: str


@dataclass(slots=True)
class Called:
    """A call."""

    id: str
    name: str
    arguments: str = ""


def message_content(chunks: Sequence[Any], *, thinking: bool) -> list[dict[str, Any]]:
    """The content of the message that *chunks* mean, or a whole answer; its calls have the ids of the
    engine, and in chunks an index.
    """
    pieces = [piece for chunk in chunks for piece in _pieces(chunk)]
    calls: dict[int, Called] = {}
    order: list[Transcript | Called] = []
    waiting: list[tuple[Transcript | Called, str]] = []
    current: Called | None = None

    def place(item: Transcript | Called, more: str) -> Called | None:
        """Add *item*, and return it if it is a call that is not whole yet."""
        if isinstance(item, Called):
            if item not in order:
                order.append(item)
            item.arguments += more
            return None if _whole(item.arguments) else item
        if item.kind == "text" or thinking:
            order.append(item)
        return None

    for kind, piece in pieces:
        if kind == "call":
            index = piece["index"]
            if index not in calls:
                calls[index] = Called(piece.get("id") or "", piece["function"]["name"])
            entry: tuple[Transcript | Called, str] = (
                calls[index],
                piece["function"].get("arguments") or "",
            )
        else:
            entry = Transcript(kind, piece), ""
        if current is not None and entry[0] is not current:
            waiting.append(entry)
            continue
        current = place(*entry)
        while current is None and waiting:
            head = waiting.pop(0)
            if isinstance(head[0], Called):
                # All that has come of this call follows at once.
                own = [more for item, more in waiting if item is head[0]]
                waiting = [each for each in waiting if each[0] is not head[0]]
                current = place(head[0], head[1] + "".join(own))
            else:
                current = place(*head)
    for item, more in waiting:
        place(item, more)
    return _rendered(order)


def _pieces(chunk: Any) -> list[tuple[str, Any]]:
    pieces: list[tuple[str, Any]] = []
    for choice in chunk.get("choices", ()):
        delta = choice.get("delta") or choice.get("message") or {}
        thought = delta.get("reasoning_content") or delta.get("reasoning")
        if thought:
            pieces.append(("thinking", thought))
        if delta.get("content"):
            pieces.append(("text", delta["content"]))
        called = delta.get("tool_calls") or ()
        pieces += [("call", {"index": number, **call}) for number, call in enumerate(called)]
    return pieces


def _whole(arguments: str) -> bool:
    try:
        json.loads(arguments)
    except ValueError:
        return False
    return True


def _rendered(order: Sequence[Transcript | Called]) -> list[dict[str, Any]]:
    """The blocks: neighbours of one kind are one, and white space begins none."""
    blocks: list[dict[str, Any]] = []
    before, before_kind = "", ""
    for item in order:
        if isinstance(item, Called):
            content = json.loads(item.arguments) if _whole(item.arguments) else {}
            blocks.append({"type": "tool_use", "id": item.id, "name": item.name, "input": content})
            before = ""
            continue
        if blocks and blocks[-1]["type"] == item.kind:
            blocks[-1][item.kind] += item.text
            continue
        before = item.text if item.kind != before_kind else before + item.text
        before_kind = item.kind
        if before.strip():
            blocks.append({"type": item.kind, item.kind: before})
            before = ""
    return blocks


def check_order(said: Sequence[dict[str, Any]]) -> None:
    """Check that *said*, the messages of a chat, is what the strictest engine takes."""
    roles = [message["role"] for message in said]
    assert "system" not in roles[1:]
    awaited: list[str] = []
    previous = ""
    for message in said:
        if message["role"] == "tool":
            assert message["tool_call_id"] == awaited.pop(0)
            previous = "tool"
            continue
        assert not awaited
        assert message["role"] != previous
        previous = message["role"]
        awaited = [call["id"] for call in message.get("tool_calls", ())]
