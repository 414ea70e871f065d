"""The answers of the simulated model, as JSON in OpenAI's shapes. No I/O.

A `ParsedRequest` becomes an `Answer`: the bytes of every event of its stream, or its JSON in one
piece. The shapes are those of OpenAI's API reference (Chat, Completions, Responses, Embeddings,
Models); in the tests the official SDK parses all of them.

This file is one concept: the shape of an answer, by the requested path.
"""

from __future__ import annotations

import base64
import hashlib
import math
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from aioserver.wings.simulator.model import (
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    NESTED_TOO_DEEPLY,
    RESPONSES,
    BadRequest,
    error,
    rest,
    speech,
    tokens,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from aioserver.wings.simulator.model import ParsedRequest
    from aioserver.wings.simulator.tools import Call

DONE = b"data: [DONE]\n\n"
COMMENT = b": OPENROUTER PROCESSING\n\n"
MODELS = ("simulated", "simulated-embedding")

# Dimensions of an embedding, unless the request names a number.
_DIMENSIONS = 8
# The number of pieces of a body without tokens, for faults that count tokens.
SLICES = 4


def _error_event(status: int, message: str) -> bytes:
    return b"data: %b\n\n" % error(status, message)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The pieces to write, in order: opening, `piece(0)` to `piece(count - 1)`, closing, end.

    In a stream a piece is the event of one token; otherwise it is one slice of the JSON in
    *whole*. *idle* keeps a connection alive, and *error_event* makes the event of an error with a
    status and a message.
    """

    streamed: bool
    opening: Sequence[bytes]
    count: int
    piece: Callable[[int], bytes]
    closing: Sequence[bytes]
    end: bytes
    whole: bytes
    idle: bytes = COMMENT
    error_event: Callable[[int, str], bytes] = _error_event

    def everything(self) -> list[bytes]:
        """Return all pieces in order."""
        return [*self.opening, *map(self.piece, range(self.count)), *self.closing, self.end]


def event(data: Mapping[str, Any], name: str = "") -> bytes:
    """Encode one event of a stream."""
    head = f"event: {name}\n".encode() if name else b""
    return b"%bdata: %b\n\n" % (head, _written(data))


def _written(data: Mapping[str, Any]) -> bytes:
    """Return *data* as JSON.

    Raises:
        BadRequest: *data* repeats a part of the request that is nested too deeply.
    """
    try:
        return orjson.dumps(data)
    except orjson.JSONEncodeError:
        # orjson reads 1,024 levels, but writes 254.
        raise BadRequest(NESTED_TOO_DEEPLY) from None


def answer(request: ParsedRequest, ident: str, count: int = 0) -> Answer:
    """Build the answer to *request*, with ids made from *ident*.

    The answer has *count* tokens; for 0, as many as its text.

    Raises:
        BadRequest: the dimensions of an embedding are not an integer from 1 to 4096, or *request*
            is nested too deeply.
    """
    if request.endpoint == EMBEDDINGS:
        return in_one_piece(_embeddings(request), SLICES)
    words, cut = words_of(request, count)
    shape = {CHAT: _chat, COMPLETIONS: _completion, RESPONSES: _response}[request.endpoint]
    return shape(request, ident, words, cut=cut)


def words_of(request: ParsedRequest, count: int = 0) -> tuple[list[str], bool]:
    """Return the tokens of the answer to *request*, and whether its `max_tokens` have cut it.

    *count*: as `answer`.
    """
    prescribed = request.call.arguments if request.call else request.words
    words = tokens(speech(request.text, request.turn) if prescribed is None else prescribed)
    if count and prescribed is None:
        repetition = ["\n\n" + words[0], *words[1:]]
        words = (words + repetition * (count // len(words)))[:count]
    if request.said and prescribed is None:
        words = tokens(rest("".join(words), request))
    cut = request.max_tokens is not None and request.max_tokens < len(words)
    return (words[: request.max_tokens] if cut else words), cut


def in_one_piece(whole: Mapping[str, Any], count: int) -> Answer:
    """Make an answer of *whole*, as JSON in *count* slices."""
    body = _written(whole)
    size = math.ceil(len(body) / max(1, count))
    return Answer(
        streamed=False,
        opening=(),
        count=count,
        piece=lambda i: body[i * size : (i + 1) * size],
        closing=(),
        end=b"",
        whole=body,
    )


def _usage(request: ParsedRequest, count: int) -> dict[str, Any]:
    return {
        "prompt_tokens": request.prompt_tokens,
        "completion_tokens": count,
        "total_tokens": request.prompt_tokens + count,
        "prompt_tokens_details": {"cached_tokens": request.cached_tokens, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": min(request.reasoning_tokens, count),
            "audio_tokens": 0,
        },
    }


def streamed(
    opening: Sequence[bytes],
    words: Sequence[str],
    template: bytes,
    closing: Sequence[bytes],
    end: bytes,
) -> Answer:
    r"""Make a stream of one event for each word.

    *template* is such an event with `"\0"` for the word and, where events are numbered, `"\1"` for
    the number.
    """
    head, tail = template.rsplit(b'"\\u0000"', 1)
    lead, _, head = head.rpartition(b'"\\u0001"') if b'"\\u0001"' in head else (b"", b"", head)
    numbered = bool(lead)
    total = len(words)
    dumps = orjson.dumps
    first = len(opening)

    def piece(i: int) -> bytes:
        number = b"%d" % (first + i) if numbered else b""
        return lead + number + head + dumps(words[i % total]) + tail

    return Answer(
        streamed=True,
        opening=opening,
        count=total,
        piece=piece,
        closing=closing,
        end=end,
        whole=b"",
    )


def _chat(request: ParsedRequest, ident: str, words: Sequence[str], *, cut: bool) -> Answer:
    finish = "length" if cut else "tool_calls" if request.call else "stop"
    base: dict[str, Any] = {
        "id": f"chatcmpl-{ident}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": request.model,
        "system_fingerprint": "fp_simulated",
    }
    usage = _usage(request, len(words))
    text = "".join(words)
    if not request.stream:
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if request.call:
            calls = [_chat_call(request.call, ident, text)]
            message |= {"content": None, "tool_calls": calls}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
        return in_one_piece({**base, "choices": [choice], "usage": usage}, len(words))

    base["object"] = "chat.completion.chunk"
    extra = {"usage": None} if request.include_usage else {}

    def chunk(delta: Mapping[str, Any], finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return event({**base, "choices": [choice], **extra})

    opening = [chunk({"role": "assistant", "content": "", "refusal": None})]
    delta: dict[str, Any] = {"content": "\0"}
    if request.call:
        started = {"index": 0, **_chat_call(request.call, ident, "")}
        opening = [chunk({"role": "assistant", "content": None, "tool_calls": [started]})]
        part = (
            {"custom": {"input": "\0"}} if request.call.free else {"function": {"arguments": "\0"}}
        )
        delta = {"tool_calls": [{"index": 0, **part}]}
    closing = [chunk({}, finish)]
    if request.include_usage:
        closing.append(event({**base, "choices": [], "usage": usage}))
    return streamed(opening, words, chunk(delta), closing, DONE)


def _chat_call(call: Call, ident: str, text: str) -> dict[str, Any]:
    identity = {"id": f"call_{ident}", "type": "custom" if call.free else "function"}
    if call.free:
        return {**identity, "custom": {"name": call.name, "input": text}}
    return {**identity, "function": {"name": call.name, "arguments": text}}


def _completion(request: ParsedRequest, ident: str, words: Sequence[str], *, cut: bool) -> Answer:
    base: dict[str, Any] = {
        "id": f"cmpl-{ident}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": request.model,
    }
    usage = _usage(request, len(words))
    finish = "length" if cut else "stop"

    def whole(text: str, finish: str | None) -> dict[str, Any]:
        choice = {"text": text, "index": 0, "logprobs": None, "finish_reason": finish}
        return {**base, "choices": [choice]}

    if not request.stream:
        return in_one_piece({**whole("".join(words), finish), "usage": usage}, len(words))
    closing = [event(whole("", finish))]
    if request.include_usage:
        closing.append(event({**base, "choices": [], "usage": usage}))
    return streamed((), words, event(whole("\0", None)), closing, DONE)


def _embeddings(request: ParsedRequest) -> dict[str, Any]:
    texts = request.body["input"]
    # A text may be a list of token numbers.
    inputs = [texts] if isinstance(texts, str) or isinstance(texts[0], int) else texts
    dimensions = request.body.get("dimensions")
    size = _DIMENSIONS if dimensions is None else dimensions
    if not isinstance(size, int) or not 1 <= size <= 4096:
        raise BadRequest("'dimensions' must be an integer of 1 to 4096.", param="dimensions")
    packed = request.body.get("encoding_format") == "base64"
    data = [
        {"object": "embedding", "index": index, "embedding": _vector(str(item), size, packed)}
        for index, item in enumerate(inputs)
    ]
    usage = {"prompt_tokens": request.prompt_tokens, "total_tokens": request.prompt_tokens}
    return {"object": "list", "data": data, "model": request.model, "usage": usage}


def _vector(text: str, size: int, packed: bool) -> list[float] | str:
    """Return a vector of length 1, the same for the same text; *packed*: in base64."""
    noise = hashlib.shake_128(text.encode()).digest(2 * size)
    # + 0.5: a vector of zeros has no direction.
    raw = [number + 0.5 for number in struct.unpack(f"<{size}h", noise)]
    length = math.hypot(*raw)
    vector = [number / length for number in raw]
    return base64.b64encode(struct.pack(f"<{size}f", *vector)).decode() if packed else vector


def models(names: Sequence[str] = ()) -> dict[str, Any]:
    """Return the answer to `GET models`, with *names*, or those of the simulator."""
    return {"object": "list", "data": [model(name) for name in names or MODELS]}


def model(name: str) -> dict[str, Any]:
    """Return the answer to `GET models/{name}`."""
    return {"id": name, "object": "model", "created": 1764000000, "owned_by": "aioserver"}


# The fields of a request that its response repeats, with their values in a response to a request
# without them.
_REPEATED: dict[str, Any] = {
    "frequency_penalty": 0.0,
    "instructions": None,
    "max_tool_calls": None,
    "metadata": {},
    "presence_penalty": 0.0,
    "prompt_cache_key": None,
    "reasoning": {"effort": None, "summary": None},
    "safety_identifier": None,
    "service_tier": "default",
    "temperature": 1.0,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "top_logprobs": 0,
    "top_p": 1.0,
}


def repeated(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a response that repeat those of the request *body*."""
    values = {}
    for name, default in _REPEATED.items():
        value = body.get(name)
        if value is None:
            value = default
        elif isinstance(value, dict) and isinstance(default, dict):
            value = {**default, **value}
        values[name] = value
    return values


def _response(request: ParsedRequest, ident: str, words: Sequence[str], *, cut: bool) -> Answer:
    text = "".join(words)
    call = request.call
    status = "incomplete" if cut else "completed"
    created = int(time.time())

    def item(text: str, status: str) -> dict[str, Any]:
        return _output_item(call, ident, text, status)

    def whole(status: str) -> dict[str, Any]:
        ended = status != "in_progress"
        usage = {
            "input_tokens": request.prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": request.cached_tokens,
                "cache_write_tokens": 0,
            },
            "output_tokens": len(words),
            "output_tokens_details": {
                "reasoning_tokens": min(request.reasoning_tokens, len(words))
            },
            "total_tokens": request.prompt_tokens + len(words),
        }
        return {
            "id": f"resp_{ident}",
            "object": "response",
            "created_at": created,
            "completed_at": created if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut and ended else None,
            "max_output_tokens": request.max_tokens,
            "model": request.model,
            "output": [item(text, status)] if ended else [],
            "parallel_tool_calls": True,
            "previous_response_id": request.body.get("previous_response_id"),
            "store": bool(request.body.get("store", True)),
            "tools": [
                {"strict": True, **tool} if tool.get("type") == "function" else tool
                for tool in request.body.get("tools") or ()
            ],
            "truncation": "disabled",
            "usage": usage if ended else None,
            **repeated(request.body),
        }

    if not request.stream:
        return in_one_piece(whole(status), len(words))

    running, added = whole("in_progress"), item("", "in_progress")
    position = {"item_id": added["id"], "output_index": 0}
    opening = [
        _response_event("created", 0, response=running),
        _response_event("in_progress", 1, response=running),
        _response_event("output_item.added", 2, output_index=0, item=added),
    ]
    extra: dict[str, Any] = {}
    if call and call.free:
        kind, done = "custom_tool_call_input", {"input": text}
    elif call:
        kind, done = "function_call_arguments", {"arguments": text, "name": call.name}
    else:
        kind, done = "output_text", {"text": text}
        position["content_index"] = 0
        extra = {"logprobs": []}
        opening.append(_response_event("content_part.added", 3, **position, part=_part("")))
    template = _response_event(f"{kind}.delta", "\1", **position, delta="\0", **extra)
    number = len(opening) + len(words)
    closing = [_response_event(f"{kind}.done", number, **position, **done, **extra)]
    if not call:
        closing.append(
            _response_event("content_part.done", number + 1, **position, part=_part(text))
        )
    number += len(closing)
    closing += [
        _response_event("output_item.done", number, output_index=0, item=item(text, status)),
        _response_event(status, number + 1, response=whole(status)),
    ]
    return streamed(opening, words, template, closing, b"")


def _response_event(kind: str, number: int | str, **fields: Any) -> bytes:
    name = f"response.{kind}"
    return event({"type": name, "sequence_number": number, **fields}, name)


def _output_item(call: Call | None, ident: str, text: str, status: str) -> dict[str, Any]:
    """Return the one item of a response: a *call* with *text* as its arguments, or a message."""
    if call is None:
        content = [_part(text)] if status != "in_progress" else []
        return {
            "id": f"msg_{ident}",
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": content,
        }
    identity = {
        "id": f"{'ctc' if call.free else 'fc'}_{ident}",
        "call_id": f"call_{ident}",
        "name": call.name,
        "status": status,
    }
    if call.free:
        return {**identity, "type": "custom_tool_call", "input": text}
    return {**identity, "type": "function_call", "arguments": text}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
