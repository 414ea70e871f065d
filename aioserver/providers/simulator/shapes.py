"""OpenAI's JSON shapes for what the simulated model says. No I/O.

An `Asked` becomes an `Answer`: the bytes of every event of its stream, or its JSON in one piece.
The shapes are those of OpenAI's API reference (Chat, Completions, Responses, Embeddings, Models);
the official SDK parses all of them in the tests.
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

from aioserver.providers.simulator.model import (
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    RESPONSES,
    BadRequest,
    arguments,
    speech,
    tokens,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from aioserver.providers.simulator.model import Asked

DONE = b"data: [DONE]\n\n"
MODELS = ("simulated", "simulated-embedding")

_DIMENSIONS = 8  # of an embedding, where the request does not say
_SLICES = 4  # pieces that a body without tokens is cut into for the faults


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The pieces to write, in order: opening, `piece(0)` to `piece(count - 1)`, closing, end.

    Streamed, a piece is the event of one token; else it is one slice of the JSON in *whole*.
    """

    streamed: bool
    opening: Sequence[bytes]
    count: int
    piece: Callable[[int], bytes]
    closing: Sequence[bytes]
    end: bytes
    whole: bytes

    def everything(self) -> list[bytes]:
        """All the pieces."""
        return [*self.opening, *map(self.piece, range(self.count)), *self.closing, self.end]


def event(data: Mapping[str, Any], name: str = "") -> bytes:
    """One event of a stream."""
    head = f"event: {name}\n".encode() if name else b""
    return b"%bdata: %b\n\n" % (head, orjson.dumps(data))


def answer(asked: Asked, ident: str, count: int = 0) -> Answer:
    """The whole answer. *ident* makes its ids; *count* tokens, 0: as many as the text has."""
    if asked.endpoint == EMBEDDINGS:
        return _in_one_piece(_embeddings(asked), _SLICES)
    said = arguments(asked.tool, asked.text) if asked.tool else speech(asked.text, asked.turn)
    words = tokens(said)
    if count and not asked.tool:
        again = ["\n\n" + words[0], *words[1:]]
        words = (words + again * (count // len(words)))[:count]
    cut = asked.limit is not None and asked.limit < len(words)
    words = words[: asked.limit] if cut else words
    shape = {CHAT: _chat, COMPLETIONS: _completion, RESPONSES: _response}[asked.endpoint]
    return shape(asked, ident, words, cut=cut)


def _in_one_piece(whole: Mapping[str, Any], count: int) -> Answer:
    body = orjson.dumps(whole)
    size = math.ceil(len(body) / count)
    return Answer(
        streamed=False,
        opening=(),
        count=count,
        piece=lambda i: body[i * size : (i + 1) * size],
        closing=(),
        end=b"",
        whole=body,
    )


def _usage(asked: Asked, count: int) -> dict[str, Any]:
    return {
        "prompt_tokens": asked.prompt_tokens,
        "completion_tokens": count,
        "total_tokens": asked.prompt_tokens + count,
        "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
    }


def _streamed(
    opening: Sequence[bytes],
    words: Sequence[str],
    template: bytes,
    closing: Sequence[bytes],
    end: bytes,
) -> Answer:
    r"""*template* is a token's event with `"\0"` where the word goes and `"\1"` for its number."""
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


def _chat(asked: Asked, ident: str, words: Sequence[str], *, cut: bool) -> Answer:
    finish = "length" if cut else "tool_calls" if asked.tool else "stop"
    call = {"id": f"call_{ident}", "type": "function"}
    name = asked.tool["name"] if asked.tool else ""
    base: dict[str, Any] = {
        "id": f"chatcmpl-{ident}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": asked.model,
        "system_fingerprint": "fp_simulated",
    }
    usage = _usage(asked, len(words))
    text = "".join(words)
    if not asked.stream:
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if asked.tool:
            function = {"name": name, "arguments": text}
            message |= {"content": None, "tool_calls": [{**call, "function": function}]}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
        return _in_one_piece({**base, "choices": [choice], "usage": usage}, len(words))

    base["object"] = "chat.completion.chunk"
    extra = {"usage": None} if asked.usage else {}

    def chunk(delta: Mapping[str, Any], finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return event({**base, "choices": [choice], **extra})

    opening = [chunk({"role": "assistant", "content": "", "refusal": None})]
    delta: dict[str, Any] = {"content": "\0"}
    if asked.tool:
        started = {"index": 0, **call, "function": {"name": name, "arguments": ""}}
        opening = [chunk({"role": "assistant", "content": None, "tool_calls": [started]})]
        delta = {"tool_calls": [{"index": 0, "function": {"arguments": "\0"}}]}
    closing = [chunk({}, finish)]
    if asked.usage:
        closing.append(event({**base, "choices": [], "usage": usage}))
    return _streamed(opening, words, chunk(delta), closing, DONE)


def _completion(asked: Asked, ident: str, words: Sequence[str], *, cut: bool) -> Answer:
    base: dict[str, Any] = {
        "id": f"cmpl-{ident}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": asked.model,
    }
    usage = _usage(asked, len(words))
    finish = "length" if cut else "stop"

    def whole(text: str, finish: str | None) -> dict[str, Any]:
        choice = {"text": text, "index": 0, "logprobs": None, "finish_reason": finish}
        return {**base, "choices": [choice]}

    if not asked.stream:
        return _in_one_piece({**whole("".join(words), finish), "usage": usage}, len(words))
    closing = [event(whole("", finish))]
    if asked.usage:
        closing.append(event({**base, "choices": [], "usage": usage}))
    return _streamed((), words, event(whole("\0", None)), closing, DONE)


def _embeddings(asked: Asked) -> dict[str, Any]:
    given = asked.body["input"]
    inputs = [given] if isinstance(given, str) or isinstance(given[0], int) else given
    given_size = asked.body.get("dimensions")
    size = _DIMENSIONS if given_size is None else given_size
    if not isinstance(size, int) or not 1 <= size <= 4096:
        raise BadRequest("'dimensions' must be an integer of 1 to 4096.", param="dimensions")
    packed = asked.body.get("encoding_format") == "base64"
    data = [
        {"object": "embedding", "index": index, "embedding": _vector(str(item), size, packed)}
        for index, item in enumerate(inputs)
    ]
    usage = {"prompt_tokens": asked.prompt_tokens, "total_tokens": asked.prompt_tokens}
    return {"object": "list", "data": data, "model": asked.model, "usage": usage}


def _vector(text: str, size: int, packed: bool) -> list[float] | str:
    """A vector of length 1, the same for the same text."""
    noise = hashlib.shake_128(text.encode()).digest(2 * size)
    raw = [number + 0.5 for number in struct.unpack(f"<{size}h", noise)]  # never all zero
    length = math.hypot(*raw)
    vector = [number / length for number in raw]
    return base64.b64encode(struct.pack(f"<{size}f", *vector)).decode() if packed else vector


def models() -> dict[str, Any]:
    """The answer to `GET models`."""
    return {"object": "list", "data": [model(name) for name in MODELS]}


def model(name: str) -> dict[str, Any]:
    """The answer to `GET models/{name}`."""
    return {"id": name, "object": "model", "created": 1764000000, "owned_by": "aioserver"}


def _response(asked: Asked, ident: str, words: Sequence[str], *, cut: bool) -> Answer:
    text = "".join(words)
    item_id = f"fc_{ident}" if asked.tool else f"msg_{ident}"
    status = "incomplete" if cut else "completed"
    created = int(time.time())

    def item(text: str, status: str) -> dict[str, Any]:
        if asked.tool:
            call = {"call_id": f"call_{ident}", "name": asked.tool["name"], "arguments": text}
            return {"id": item_id, "type": "function_call", "status": status, **call}
        content = [_part(text)] if status != "in_progress" else []
        said = {"role": "assistant", "content": content}
        return {"id": item_id, "type": "message", "status": status, **said}

    def whole(status: str) -> dict[str, Any]:
        ended = status != "in_progress"
        usage = {
            "input_tokens": asked.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": len(words),
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": asked.prompt_tokens + len(words),
        }
        return {
            "id": f"resp_{ident}",
            "object": "response",
            "created_at": created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut and ended else None,
            "instructions": asked.body.get("instructions"),
            "max_output_tokens": asked.limit,
            "metadata": asked.body.get("metadata") or {},
            "model": asked.model,
            "output": [item(text, status)] if ended else [],
            "parallel_tool_calls": True,
            "previous_response_id": asked.body.get("previous_response_id"),
            "store": bool(asked.body.get("store", True)),
            "temperature": asked.body.get("temperature", 1.0),
            "text": {"format": {"type": "text"}},
            "tool_choice": asked.body.get("tool_choice", "auto"),
            "tools": asked.body.get("tools") or [],
            "top_p": asked.body.get("top_p", 1.0),
            "truncation": "disabled",
            "usage": usage if ended else None,
        }

    if not asked.stream:
        return _in_one_piece(whole(status), len(words))

    def named(kind: str, number: int | str, **fields: Any) -> bytes:
        name = f"response.{kind}"
        return event({"type": name, "sequence_number": number, **fields}, name)

    where = {"item_id": item_id, "output_index": 0}
    running = whole("in_progress")
    added = item("", "in_progress")
    opening = [
        named("created", 0, response=running),
        named("in_progress", 1, response=running),
        named("output_item.added", 2, output_index=0, item=added),
    ]
    if asked.tool:
        kind, done = "function_call_arguments", {"arguments": text, "name": asked.tool["name"]}
        extra: dict[str, Any] = {}
    else:
        kind, done = "output_text", {"text": text}
        where["content_index"] = 0
        extra = {"logprobs": []}
        opening.append(named("content_part.added", 3, **where, part=_part("")))
    template = named(f"{kind}.delta", "\1", **where, delta="\0", **extra)
    number = len(opening) + len(words)
    closing = [named(f"{kind}.done", number, **where, **done, **extra)]
    if not asked.tool:
        closing.append(named("content_part.done", number + 1, **where, part=_part(text)))
    number += len(closing)
    closing += [
        named("output_item.done", number, output_index=0, item=item(text, status)),
        named(status, number + 1, response=whole(status)),
    ]
    return _streamed(opening, words, template, closing, b"")


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
