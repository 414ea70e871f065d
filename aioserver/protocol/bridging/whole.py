"""A whole chat completion, read for a bridge.

The content of a large one is written like the chunks of a stream: a text in slices, calls and
logprobs one by one. So no step takes long, and unneeded parts are skipped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import orjson

from aioserver.errors import InvalidJson, InvalidRequest
from aioserver.protocol import json_body
from aioserver.protocol.bridging.chunks import REASONING_FIELDS, C, ChunkReader
from aioserver.protocol.bridging.reading import is_string, members
from aioserver.protocol.json_body import ABSENT, null, raw_members
from aioserver.protocol.openai import BadEvent
from aioserver.protocol.sound import pieces, sound
from aioserver.protocol.steps import Steps, pause, pause_after

if TYPE_CHECKING:
    from msgspec import Raw

# The most bytes of a chat completion that is read at all; those of existing models usually have a
# hundredth of it.
MAX_WHOLE_BYTES = 1 << 24
# The most values in one, a bound that matters only with logprobs.
MAX_VALUES = 1_000_000
# Bytes of the answer, or of a value in it, that are read at once.
STEP_BYTES = 1 << 16


_ANSWER = raw_members("model", "choices", "usage", "error")
_CHOICE = raw_members("index", "message", "delta", "finish_reason", "stop_reason", "logprobs")
_MESSAGE = raw_members(*REASONING_FIELDS, "content", "refusal", "tool_calls", "function_call")
_CALL = raw_members("id", "function")
_FUNCTION = raw_members("name", "arguments")
_LOGPROBS = raw_members("content")


async def read_whole(body: bytes, writer: ChunkReader[C]) -> None:
    """Have *writer* read *body*, a whole answer, in steps.

    Raises:
        BadEvent: *body* is not a chat completion.
        ErrorEvent: it is an error object.
    """
    writer.in_one_piece = True
    if len(body) <= STEP_BYTES:
        writer.note_model(body)
        writer.read(body)
    else:
        try:
            await _read(await sound(body), writer)
        except (InvalidJson, InvalidRequest, msgspec.ValidationError):
            raise BadEvent("the provider's answer is not a chat completion") from None
        await pause()
    if writer.finish_reason is None and not writer.begun:
        raise BadEvent("the provider's answer is not a chat completion")


async def _read(body: bytes, writer: ChunkReader[C]) -> None:
    """Read *body*, in steps."""
    json_body.check_values(body, MAX_VALUES)
    await pause_after(body)
    answer = json_body.decode(_ANSWER, body, "the answer")
    await pause_after(body)
    # A larger value is skipped.
    error, usage, model = (
        bytes(raw) if _size(raw) <= STEP_BYTES else b"null"
        for raw in (answer.error, answer.usage, answer.model)
    )
    if not null(answer.error) and error == b"null":
        raise BadEvent("the provider sent an error of more than 64 KiB")
    head = b'{"model":%b,"error":%b,"usage":%b}' % (
        model or b"null",
        error or b"null",
        usage or b"null",
    )
    writer.note_model(head)
    writer.read(head)
    steps = Steps()
    for raw in _elements(answer.choices):
        try:
            choice = json_body.decode(_CHOICE, memoryview(raw), "a choice")
        except InvalidRequest:
            continue
        index = b"0" if choice.index is ABSENT else bytes(memoryview(choice.index)[:16])
        if index == b"%d" % writer.choice_index:
            await _read_choice(choice, writer)
        await steps.taken(_size(raw))


async def _read_choice(choice: Any, writer: ChunkReader[C]) -> None:
    raw = choice.message if null(choice.delta) or _size(choice.delta) <= 2 else choice.delta
    if not null(raw):
        try:
            message = json_body.decode(_MESSAGE, memoryview(raw), "a message")
        except InvalidRequest:
            message = json_body.decode(_MESSAGE, b"{}", "a message")
        await pause_after(memoryview(raw))
        await _read_message(message, choice.logprobs, writer)
    if not null(choice.finish_reason) and _size(choice.finish_reason) <= STEP_BYTES:
        ending = members((b"finish_reason", choice.finish_reason))
        if is_string(choice.stop_reason) and _size(choice.stop_reason) <= STEP_BYTES:
            ending += members((b"stop_reason", choice.stop_reason))
        writer.read(_chunk(b"", ending))


async def _read_message(message: Any, logprobs: Raw, writer: ChunkReader[C]) -> None:
    steps = Steps()
    for name in REASONING_FIELDS:
        raw: Raw = getattr(message, name)
        if is_string(raw) and _size(raw) > 2:
            # Some engines send it under both names.
            await _write_text(name, raw, writer)
            break
    content = message.content
    if is_string(content):
        await _write_text("content", content, writer)
    else:
        for part in _elements(content):
            writer.read(_chunk(b'"content":[%b]' % bytes(part)))
            await steps.taken(_size(part))
    if writer.logprobs and not null(logprobs):
        try:
            tokens = json_body.decode(_LOGPROBS, memoryview(logprobs), "").content
        except InvalidRequest:
            tokens = ABSENT
        for token in _elements(tokens):
            writer.add_logprobs([orjson.loads(memoryview(token))])
            await steps.taken(_size(token))
    if is_string(message.refusal):
        await _write_text("refusal", message.refusal, writer)
    for call in _elements(message.tool_calls):
        if _size(call) <= STEP_BYTES:
            writer.read(_chunk(b'"tool_calls":[%b]' % bytes(call)))
        else:
            await _write_call(bytes(call), writer)
        await steps.taken(_size(call))
    called = not null(message.tool_calls) and _size(message.tool_calls) > 2
    if not (called or null(message.function_call)) and _size(message.function_call) > 2:
        # The form from before there were tools; llama-cpp-python sends both.
        await _write_call(b'{"index":0,"function":%b}' % bytes(message.function_call), writer)


async def _write_text(name: str, raw: Raw, writer: ChunkReader[C]) -> None:
    """Write the text *raw*, in slices."""
    text = bytes(raw)
    for piece in pieces(text, 1, len(text) - 1):
        writer.read(_chunk(b'"%b":"%b"' % (name.encode(), text[piece])))
        await pause()


async def _write_call(raw: bytes, writer: ChunkReader[C]) -> None:
    """Write one call, whose arguments may be long."""
    try:
        call = json_body.decode(_CALL, raw, "a call")
        function = json_body.decode(_FUNCTION, memoryview(call.function), "a function")
    except (InvalidRequest, InvalidJson):
        return
    if not is_string(function.arguments):
        writer.read(_chunk(b'"tool_calls":[%b]' % raw))
        return
    first = b'"id":%b,"function":{"name":%b,"arguments":""}' % (
        b"null" if null(call.id) else bytes(call.id),
        b"null" if null(function.name) else bytes(function.name),
    )
    writer.read(_chunk(b'"tool_calls":[{%b}]' % first))
    text = bytes(function.arguments)
    for piece in pieces(text, 1, len(text) - 1):
        more = b'{"function":{"arguments":"%b"}}' % text[piece]
        writer.read(_chunk(b'"tool_calls":[%b]' % more))
        await pause()


def _chunk(delta: bytes, further: bytes = b"") -> bytes:
    return b'{"choices":[{"index":0,"delta":{%b}%b}]}' % (delta, further)


def _elements(raw: Raw) -> list[Raw]:
    """Return the elements of the list *raw*; none if it is not a list."""
    if null(raw) or bytes(memoryview(raw)[:1]) != b"[":
        return []
    return json_body.elements(memoryview(raw))


def _size(raw: Raw) -> int:
    return len(memoryview(raw))
