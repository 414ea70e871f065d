"""What Anthropic's API refuses from its version of 2026 on, and what it still takes."""

from __future__ import annotations

from typing import Any

VERSION_OF_2026 = "2026-10-21"
_HELLO = {"role": "user", "content": "Hello"}


def _cited(**more: Any) -> dict[str, Any]:
    return {"type": "text", "text": "a", "citations": [{"type": "char_location"}], **more}


_DOCUMENT = {
    "type": "document",
    "source": {"type": "text", "data": "a", "media_type": "text/plain"},
}
_SEARCHED = {"type": "search_result", "source": "s", "title": "t", "content": [_cited()]}
# The members of a request that it has no more, and the place of them that its refusal names.
NO_MORE: list[tuple[dict[str, Any], str]] = [
    *(({name: 1}, name) for name in ("temperature", "top_p", "top_k")),
    (
        {"messages": [_HELLO, {"role": "assistant", "content": [_DOCUMENT]}, _HELLO]},
        "messages.1.content.0",
    ),
    ({"messages": [{"role": "user", "content": [_cited()]}]}, "messages.0.content.0"),
    ({"messages": [{"role": "user", "content": [_SEARCHED]}]}, "messages.0.content.0.content"),
]
# The messages that it still has.
STILL: list[dict[str, Any]] = [
    {"role": "user", "content": [_DOCUMENT, _cited(citations=[])]},
    {"role": "assistant", "content": [_cited(), {"type": "tool_use", "id": "t", "name": "f"}]},
    {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": "t", "content": [_DOCUMENT]},
            {"type": "text", "text": "Hello"},
        ],
    },
]


def has_document_of_assistant(body: dict[str, Any]) -> bool:
    """Whether the assistant shows a document in *body*."""
    return any(
        message["role"] == "assistant" and _DOCUMENT in message["content"]
        for message in body["messages"]
    )
