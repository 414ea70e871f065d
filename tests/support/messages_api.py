"""What Anthropic refuses in its Messages API, by the version that a client names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aioserver.wings.simulator.model import BadRequest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aioserver.wings.simulator.model import ParsedRequest

VERSION_HEADER = "anthropic-version"
# The version of the API that has no parameters for sampling any more.
_UNSAMPLED = "2026-10-21"
_SAMPLING = ("temperature", "top_p", "top_k")


def check(request: ParsedRequest, version: str | None) -> None:
    """Check what Anthropic refuses in a *request* for this *version* of the API.

    Raises:
        BadRequest: it refuses it.
    """
    body = request.body
    messages = list(enumerate(body["messages"]))
    last = messages[-1][1]
    if _thinks(request) and last["role"] == "assistant" and not _begins_with_thought(last):
        raise BadRequest(
            f"messages.{len(messages) - 1}.content.0.type: Expected `thinking`, but found `text`."
        )
    if version != _UNSAMPLED:
        return
    for name in _SAMPLING:
        if name in body:
            raise BadRequest(f"{name}: Extra inputs are not permitted", param=name)
    for number, message in messages:
        for place, block in _blocks(message, f"messages.{number}"):
            if message["role"] == "assistant" and block.get("type") == "document":
                raise BadRequest(f"{place}: `document` blocks are not permitted here")
            inner = _blocks(block, place) if block.get("type") == "search_result" else ()
            for text_place, text in ((place, block), *inner):
                cites = text.get("type") == "text" and text.get("citations")
                if message["role"] == "user" and cites:
                    raise BadRequest(f"{text_place}.citations: Extra inputs are not permitted")


def _blocks(holder: dict[str, Any], place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the blocks in the content of *holder*, each behind its place."""
    content = holder.get("content")
    for number, block in enumerate(content if isinstance(content, list) else ()):
        if isinstance(block, dict):
            yield f"{place}.content.{number}", block


def _begins_with_thought(message: dict[str, Any]) -> bool:
    first = next(_blocks(message, ""), ("", {"type": "text"}))[1]
    return first.get("type") in ("thinking", "redacted_thinking")


def _thinks(request: ParsedRequest) -> bool:
    thinking = request.body.get("thinking")
    return isinstance(thinking, dict) and thinking.get("type") in ("enabled", "adaptive")
