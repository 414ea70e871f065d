"""Anthropic's Messages API: its paths, its errors, and the meaning of its events.

    POST messages                an answer, as one object or as events
    POST messages/count_tokens   the tokens that such a request would have

The events of a streamed answer: `message_start`, then for each block of its content a
`content_block_start`, `content_block_delta`*, `content_block_stop`, then `message_delta` and
`message_stop`, its end. `ping` may stand anywhere, and has no meaning. An `error` is an end, too.

An error is `{"type": "error", "error": {"type": "…", "message": "…"}, "request_id": "…"}`, in an
event as in the body of an HTTP answer. Ours has our code beside its type. Where our other faces
answer 503, the status is 529 here, `overloaded_error`: Anthropic's programs know it, and slow
down.
"""

from __future__ import annotations

import re
from itertools import chain
from typing import TYPE_CHECKING, Any

import msgspec
import orjson

from aioserver.protocol import eventstream
from aioserver.protocol.openai import only_names
from aioserver.protocol.parts import Parts
from aioserver.streams.contracts import AnswerEvents

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from aioserver.errors import AioserverError

MESSAGES, COUNT_TOKENS = "messages", "messages/count_tokens"
# The header with the version of the API that a client speaks; Anthropic demands it.
VERSION_HEADER = "anthropic-version"
VERSION = "2023-06-01"
# The prefix of headers that belong to the API, and are passed on to the provider.
HEADERS = "anthropic-"
PING = b'event: ping\ndata: {"type":"ping"}\n\n'
# Error types by HTTP status; any other status below 500 is an invalid_request_error, and any above
# an api_error.
TYPES = {
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
# The HTTP status that a type of error stands for, in an event.
STATUSES = {name: status for status, name in TYPES.items()} | {"invalid_request_error": 400}
OVERLOADED = 529
STOPPED = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
# The block between the words of a model that has declined and those of the next one.
FALLBACK = "fallback"
_STOP, _ERROR = b'"message_stop"', b'"error"'
_TOKENS = ("input_tokens", "cache_creation_input_tokens", "output_tokens")
_COUNTS = (*_TOKENS, "cache_read_input_tokens")
_SPEAKING = re.compile(r"/v1/messages(?:/.*)?", re.DOTALL)


class _Block(msgspec.Struct, gc=False):
    type: str = ""
    citations: msgspec.Raw = msgspec.Raw(b"[]")
    content: msgspec.Raw = msgspec.Raw(b"")


class _Message(msgspec.Struct, gc=False):
    role: str
    content: msgspec.Raw


class _Question(msgspec.Struct, gc=False):
    messages: list[_Message]
    temperature: msgspec.Raw = msgspec.Raw(b"")
    top_p: msgspec.Raw = msgspec.Raw(b"")
    top_k: msgspec.Raw = msgspec.Raw(b"")


_QUESTION = msgspec.json.Decoder(_Question)
_BLOCKS = msgspec.json.Decoder(list[_Block])


def refused_since_2026(body: bytes) -> bool:
    """Return whether the API refuses *body*, a request, from its version of 2026 on: it samples, or
    has a document of the assistant's or a text of the user's with citations.
    """
    try:
        question = _QUESTION.decode(body)
        return any(map(bytes, (question.temperature, question.top_p, question.top_k))) or any(
            map(_removed, question.messages)
        )
    except msgspec.MsgspecError:
        return True


def _removed(message: _Message) -> bool:
    blocks = _blocks(message.content)
    if message.role == "assistant":
        return any(block.type == "document" for block in blocks)
    found = [_blocks(block.content) for block in blocks if block.type == "search_result"]
    return any(
        block.type == "text" and bytes(block.citations) not in {b"[]", b"null"}
        for block in chain(blocks, *found)
    )


def _blocks(content: msgspec.Raw) -> list[_Block]:
    """Return the blocks of *content*; none if it is a text."""
    return _BLOCKS.decode(content) if bytes(content).startswith(b"[") else []


def speaks(path: str, headers: Mapping[str, str]) -> bool:
    """Return whether a client that asks for *path* with *headers* expects this API's answers, and
    errors.
    """
    if _SPEAKING.fullmatch(path) is not None:
        return True
    return path.startswith("/v1/") and VERSION_HEADER in headers


def http_status(error: AioserverError) -> int:
    """Return the HTTP status of *error* for a client of this API."""
    if error.provider_answer is not None:
        return error.provider_answer[0]
    return OVERLOADED if error.http_status == 503 else error.http_status


def type_of(status: int) -> str:
    """Return the type of an error with this HTTP *status*."""
    return TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")


def error_body(error: AioserverError, request_id: str = "") -> bytes:
    """Return *error* as the JSON of a body or an event.

    A provider's own error passes unchanged.
    """
    if error.provider_answer is not None:
        return error.provider_answer[1]
    content = {"type": type_of(http_status(error)), "message": error.message, "code": error.code}
    body: dict[str, Any] = {"type": "error", "error": content}
    if request_id:
        body["request_id"] = request_id
    return orjson.dumps(body)


class MessageErrors(AnswerEvents):
    """The form of an error between the events of a streamed answer: an event `error`."""

    __slots__ = ()

    def render(self, error: AioserverError, seen: int | None = None) -> bytes:  # noqa: ARG002
        """Return *error* as an event."""
        return eventstream.write(error_body(error), event="error")


def ending(block: bytes) -> bool:
    """Return whether *block*, whole events or one, may have an event that ends the answer."""
    # Not `in`, which for bytes costs more than twice as much.
    return block.find(_STOP) >= 0 or block.find(_ERROR) >= 0


def content_of(event: bytes) -> dict[str, Any]:
    """Return the object in *event*, one event; empty if there is none."""
    for part in eventstream.parse(event):
        try:
            content = orjson.loads(part.data)
        except orjson.JSONDecodeError:
            continue
        if isinstance(content, dict):
            return content
    return {}


def is_content(data: bytes) -> bool:
    """Return whether an event with *data* is content. A preamble is not: the message as it begins,
    a `ping`, a text or a thinking block without a word, a block that names another model, an end.
    """
    try:
        event = orjson.loads(data)
    except orjson.JSONDecodeError:
        return True
    if not isinstance(event, dict):
        return True
    kind, block = event.get("type"), event.get("content_block")
    if kind == "content_block_start" and isinstance(block, dict):
        opened = block.get("type")
        opens = opened in ("text", "thinking")
        return opened != FALLBACK and (not opens or not only_names(block, {"type"}))
    return kind not in ("message_start", "content_block_stop", "ping")


def stops(content: Mapping[str, Any]) -> bool:
    """Return whether an event with this *content* has the reason why the message stops: only its
    end mark is missing then.
    """
    delta = content.get("delta")
    if content.get("type") != "message_delta" or not isinstance(delta, dict):
        return False
    return isinstance(delta.get("stop_reason"), str)


def _words(content: dict[str, Any]) -> Iterator[str]:
    """Yield the type of the block, or of the delta, in an event with this *content*, or its own."""
    inner = content.get("content_block") or content.get("delta") or {}
    yield "stop_reason" if stops(content) else inner.get("type") or content["type"]


# The input of a tool follows its block.
PARTS = Parts(
    (b'_use"', b"thinking"),
    re.compile(rb"event: content_block_delta\ndata: \{"),
    _words,
    re.compile(
        "(?P<PREAMBLE>message_start|message_delta|ping|content_block_stop|text|input_json_delta"
        "|fallback)"
        "|(?P<REASONING>(?:redacted_)?thinking(?:_delta)?|signature_delta)"
        r"|(?P<CALL>tool_use)|(?P<HOSTED>\w+_tool_(?:use|result))"
        "|(?P<FINISH>stop_reason)|(?P<END>message_stop)|(?P<ERROR>error)"
    ),
    signs_reasoning=True,
    plain=b'event: content_block_delta\ndata: {"type":"content_block_delta",',
)


def usage_in(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the usage in an event or a whole answer, without its unknown counts; empty if there
    is none.

    `message_start` has it in its message. The usage of `message_delta` replaces it: its counts are
    of the whole answer.
    """
    message = content.get("message")
    usage = (message if isinstance(message, dict) else content).get("usage")
    if not isinstance(usage, dict):
        return {}
    return {name: value for name, value in usage.items() if value is not None}


def billed(usage: dict[str, Any]) -> dict[str, Any]:
    """Return *usage* with all tokens that are billed: the sum of its `iterations`, if it has them.

    The counts beside these lack what a compaction, an advisor and a model that declined have cost.
    An iteration that has written nothing is a model that declined at once, which is not billed.
    """
    iterations = usage.get("iterations")
    if not isinstance(iterations, list):
        return usage
    paid = [each for each in iterations if isinstance(each, dict) and each.get("output_tokens")]
    numbers = {
        name: [count for each in paid if type(count := each.get(name)) is int] for name in _COUNTS
    }
    return {**usage, **{name: sum(counts) for name, counts in numbers.items() if counts}}


def with_total(usage: dict[str, Any]) -> dict[str, Any]:
    """Return *usage* with the `total_tokens` that count for a pace; tokens read from a cache do
    not count.
    """
    counts = [usage[name] for name in _TOKENS if isinstance(usage.get(name), int)]
    return {**usage, "total_tokens": sum(counts)} if counts else usage


def user_of(metadata: bytes) -> str:
    """Return the `user_id` in the *metadata* of a request, "" if there is none."""
    try:
        content = orjson.loads(metadata)
    except orjson.JSONDecodeError:
        return ""
    user = content.get("user_id") if isinstance(content, dict) else None
    return user if isinstance(user, str) else ""


def thinks(thinking: bytes) -> bool:
    """Return whether the *thinking* of a request lets the model think."""
    try:
        content = orjson.loads(thinking)
    except orjson.JSONDecodeError:
        return False
    return isinstance(content, dict) and content.get("type") in ("enabled", "adaptive")
