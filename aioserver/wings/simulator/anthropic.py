"""The answers of the simulated model in the form of Anthropic's Messages API. No I/O.

They have the words of the other answers (shapes.py), and so do the errors. In a stream, the first
block begins with a `ping`, as Anthropic sends it. With `thinking` enabled the answer begins with a
block of it. A request is refused if Anthropic would refuse it in its version of the API (`check`).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import orjson
from aiohttp import web

from aioserver.wings.simulator.model import BadRequest
from aioserver.wings.simulator.shapes import SLICES, event, in_one_piece, streamed, words_of
from aioserver.wings.simulator.tools import COUNT_TOKENS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from aioserver.wings.simulator.model import ParsedRequest
    from aioserver.wings.simulator.shapes import Answer

_THOUGHT = "I am only simulated, so I think of nothing."
_SIGNATURE = "c2ltdWxhdGVk"
PING = b'event: ping\ndata: {"type":"ping"}\n\n'
# Types of errors by HTTP status. None of these constants is the server's: a value that a test
# shares with the code that it tests proves nothing.
_TYPES = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}
_EMPTY_THOUGHT = {"thinking": "", "signature": ""}
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


def answer(request: ParsedRequest, ident: str, count: int = 0) -> Answer:
    """Build the answer to *request*, with ids made from *ident*, of *count* tokens, as
    `shapes.answer` does.
    """
    if request.endpoint == COUNT_TOKENS:
        return _with_forms(in_one_piece({"input_tokens": request.prompt_tokens}, SLICES))
    words, cut = words_of(request, count)
    blocks = [*_thinking(request), _block(request, ident, "".join(words))]
    reason = "max_tokens" if cut else "tool_use" if request.call else "end_turn"
    usage = {
        # In this API, cached tokens are no part of the input.
        "input_tokens": request.prompt_tokens - request.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": request.cached_tokens,
        "output_tokens": len(words),
        "service_tier": "standard",
    }
    message: dict[str, Any] = {
        "id": f"msg_{ident}",
        "type": "message",
        "role": "assistant",
        "model": request.model,
        "content": blocks,
        "stop_reason": reason,
        "stop_sequence": None,
        "usage": usage,
    }
    if not request.stream:
        return _with_forms(in_one_piece(message, len(words)))
    begun = {**message, "content": [], "stop_reason": None, "usage": {**usage, "output_tokens": 1}}
    return _with_forms(_events(request, words, begun, reason))


def _events(
    request: ParsedRequest, words: Sequence[str], begun: dict[str, Any], reason: str
) -> Answer:
    opening = [_event("message_start", message=begun)]
    thoughts = _thinking(request)
    for index, block in enumerate(thoughts):
        opening += [
            _event("content_block_start", index=index, content_block={**block, **_EMPTY_THOUGHT}),
            _delta(index, "thinking_delta", thinking=block["thinking"]),
            _delta(index, "signature_delta", signature=block["signature"]),
            _event("content_block_stop", index=index),
        ]
    index = len(thoughts)
    block = _block(request, begun["id"].removeprefix("msg_"), "")
    opening += [_event("content_block_start", index=index, content_block=block), PING]
    template = _delta(index, "text_delta", text="\0")
    if request.call:
        template = _delta(index, "input_json_delta", partial_json="\0")
    delta = {"stop_reason": reason, "stop_sequence": None}
    closing = [
        _event("content_block_stop", index=index),
        _event("message_delta", delta=delta, usage={"output_tokens": len(words)}),
    ]
    return streamed(opening, words, template, closing, _event("message_stop"))


def _thinking(request: ParsedRequest) -> list[dict[str, Any]]:
    """Return the block of thinking, if *request* wants one."""
    thinking = request.body.get("thinking")
    if not isinstance(thinking, dict) or thinking.get("type") != "enabled":
        return []
    return [{"type": "thinking", "thinking": _THOUGHT, "signature": _SIGNATURE}]


def _block(request: ParsedRequest, ident: str, text: str) -> dict[str, Any]:
    """Return the block that has the words of the answer; *text* is "" as long as it is empty."""
    if not request.call:
        return {"type": "text", "text": text}
    return {
        "type": "tool_use",
        "id": f"toolu_{ident}",
        "name": request.call.name,
        "input": _arguments(text),
    }


def _arguments(text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        # There are none yet, or `max_tokens` has cut them.
        return {}


def _event(kind: str, **fields: Any) -> bytes:
    return event({"type": kind, **fields}, kind)


def _delta(index: int, kind: str, **fields: str) -> bytes:
    return _event("content_block_delta", index=index, delta={"type": kind, **fields})


def _with_forms(plain: Answer) -> Answer:
    """Return *plain* with this API's keep-alive events and errors."""
    return dataclasses.replace(plain, idle=PING, error_event=error_event)


def error_event(status: int, message: str) -> bytes:
    """Encode an error as an event."""
    return b"event: error\ndata: %b\n\n" % error(status, message)


def error(status: int, message: str) -> bytes:
    """Return an error body as Anthropic writes it."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    content = {"type": kind, "message": message}
    return orjson.dumps({"type": "error", "error": content, "request_id": "req_simulated"})


def translated(response: web.StreamResponse) -> web.StreamResponse:
    """Return *response*; if it is an error of OpenAI's API, return the same error of this API."""
    if isinstance(response, web.Response) and isinstance(response.body, bytes):
        body = response.body
        if body.startswith(b'{"error"') and response.content_type == "application/json":
            status = response.status if response.status >= 400 else 500
            response.body = error(status, orjson.loads(body)["error"]["message"])
    return response
