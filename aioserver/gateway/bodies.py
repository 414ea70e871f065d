"""The bodies of requests to providers: made for a chat, and told apart when they come again."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import orjson

from aioserver.errors import InvalidRequest

if TYPE_CHECKING:
    from aioserver.config import settings


def digest_of(path: str, body: bytes) -> bytes:
    """What tells a repeated OpenAI request from a conflicting one."""
    return hashlib.sha256(path.encode() + b"\0" + body).digest()


def chat_body(
    provider: settings.Provider,
    model: str | None,
    messages: list[dict[str, Any]],
    options: dict[str, Any],
    streamed: bool,
) -> bytes:
    """A chat completion's body: *options* over the provider's defaults.

    Raises:
        InvalidRequest: the options cannot be written as JSON.
    """
    body: dict[str, Any] = {"model": model or provider.model, "messages": messages}
    defaults: dict[str, Any] = {
        "temperature": provider.temperature,
        "max_tokens": None if "max_completion_tokens" in options else provider.max_tokens,
        "top_p": provider.top_p,
    }
    body |= {name: value for name, value in defaults.items() if value is not None}
    if streamed:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    try:
        return orjson.dumps(body | options)
    except orjson.JSONEncodeError as exc:
        raise InvalidRequest(f"the options cannot be sent: {exc}", param="options") from None
