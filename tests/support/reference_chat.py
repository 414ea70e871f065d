"""A translation of a request for a message into the messages of a chat, as simple as can be: it
shares no code with the bridge, and looks at all of the conversation at once.
"""

from __future__ import annotations

import base64
import itertools
import json
import re
from typing import Any

SIGNATURE = "aioserver.unsigned"
ENCODED = "toolu_b64_"
# What changes with each request, and is not sent on.
BILLING = "x-anthropic-billing-header:"


def chat_messages(body: dict[str, Any], reasoning_field: str = "") -> list[dict[str, Any]]:
    """The messages of a chat for *body*, whose provider has its reasoning in *reasoning_field*; ""
    if it has none.
    """
    system = [text for text in _texts(body.get("system") or "") if text]
    turns = [each for each in body["messages"] if _speaks(each)]
    while turns and turns[0]["role"] == "system":
        system += _texts(turns.pop(0)["content"])
    said: list[dict[str, Any]] = []
    if system:
        said.append({"role": "system", "content": "\n\n".join(system)})
    calls: list[str] = []
    for assistant, group in itertools.groupby(turns, lambda each: each["role"] == "assistant"):
        if assistant:
            said.append(_assistant(list(group), reasoning_field))
            calls = [call["id"] for call in said[-1].get("tool_calls", ())]
        else:
            said += _user(list(group), calls)
            calls = []
    return said


def engines_id(shown: str) -> str:
    """What the engine calls the call that a client knows as *shown*."""
    if not shown.startswith(ENCODED):
        return shown
    encoded = shown.removeprefix(ENCODED)
    return base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)).decode()


def shown_ids(own: list[str], message_id: str) -> list[str]:
    """The ids by which a client knows the calls of a message that the engine calls *own*."""
    shown: list[str] = []
    for number, each in enumerate(own):
        earlier = own[:number].count(each)
        name = f"{each}_{earlier + 1}" if earlier else each
        if not each:
            shown.append(f"toolu_{message_id.removeprefix('msg_')[:12]}_{number}")
        elif re.fullmatch("[a-zA-Z0-9_-]{1,64}", name) and not name.startswith(ENCODED):
            shown.append(name)
        else:
            written = base64.urlsafe_b64encode(name.encode()).decode().rstrip("=")
            shown.append(ENCODED + written)
    return shown


def _texts(content: Any) -> list[str]:
    texts = [content] if isinstance(content, str) else [block["text"] for block in content]
    return [text for text in texts if not text.startswith(BILLING)]


def _blocks(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _speaks(message: dict[str, Any]) -> bool:
    if message["role"] == "system":
        return any(_texts(message["content"]))
    # White space is something that a user says.
    silent = {"thinking", "redacted_thinking"}
    return any(
        block["text"].strip() or (block["text"] and message["role"] == "user")
        if block["type"] == "text"
        else block["type"] not in silent
        for block in _blocks(message)
    )


def _assistant(group: list[dict[str, Any]], reasoning_field: str) -> dict[str, Any]:
    text, calls, thoughts = "", [], []
    for message in group:
        for number, block in enumerate(_blocks(message)):
            if block["type"] == "text" and block["text"].strip():
                between = "\n" if number else "\n\n"
                text += (between if text else "") + block["text"]
            elif block["type"] == "tool_use":
                function = {"name": block["name"], "arguments": block["input"]}
                own = engines_id(block["id"])
                calls.append({"id": own, "type": "function", "function": function})
            elif block["type"] == "thinking" and block["signature"] == SIGNATURE:
                thoughts.append(block["thinking"])
    said: dict[str, Any] = {"role": "assistant", "content": text or None}
    if calls:
        said["tool_calls"] = calls
    if thoughts and reasoning_field:
        said[reasoning_field] = "\n".join(thoughts)
    return said


def _user(group: list[dict[str, Any]], calls: list[str]) -> list[dict[str, Any]]:
    results: dict[str, str] = {}
    pictures: list[dict[str, Any]] = []
    rest: list[tuple[str, str] | dict[str, Any]] = []
    for message in group:
        between = "\n\n"
        if message["role"] == "system":
            reminders = _texts(message["content"])
            rest += [
                (between, f"<system-reminder>\n{text}\n</system-reminder>") for text in reminders
            ]
            continue
        for block in _blocks(message):
            if block["type"] == "text":
                rest += [(between, block["text"])] if block["text"] else []
            elif block["type"] == "image":
                rest.append(_picture(block))
            else:
                text, shown = _result(block)
                own = engines_id(block["tool_use_id"])
                if own in calls and own not in results:
                    results[own] = text
                    pictures += shown
                else:
                    rest += [*([("\n", text)] if text else []), *shown]
            between = "\n"
    said: list[dict[str, Any]] = [
        {"role": "tool", "tool_call_id": own, "content": results.get(own, "")} for own in calls
    ]
    if rest or pictures:
        said.append({"role": "user", "content": _joined([*pictures, *rest])})
    return said


def _result(block: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    """The text of a result, and its pictures."""
    content = block.get("content", "")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    text = "\n".join(part["text"] for part in parts if part["type"] == "text")
    pictures = [_picture(part) for part in parts if part["type"] == "image"]
    if pictures and not text:
        text = "(see the next message)"
    if block.get("is_error") and not text.startswith(("Error: ", "<tool_use_error>")):
        text = f"Error: {text}"
    return text, pictures


def _picture(block: dict[str, Any]) -> dict[str, Any]:
    source = block["source"]
    url = source.get("url") or f"data:{source['media_type']};base64,{source['data']}"
    return {"type": "image_url", "image_url": {"url": url}}


def _joined(pieces: list[tuple[str, str] | dict[str, Any]]) -> Any:
    """The content of *pieces*: a text, or parts if one is no text."""
    parts: list[dict[str, Any]] = []
    for piece in pieces:
        if isinstance(piece, dict):
            parts.append(piece)
        elif parts and parts[-1]["type"] == "text":
            parts[-1]["text"] += "".join(piece)
        else:
            parts.append({"type": "text", "text": piece[1]})
    if [part["type"] for part in parts] == ["text"]:
        return parts[0]["text"]
    return parts


def with_objects(said: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages of a chat, with the arguments of their calls as objects."""
    for message in said:
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return said
