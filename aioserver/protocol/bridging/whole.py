"""A whole chat completion, read for a bridge.

A large one is read in pieces (protocol/json_body.py), and what stands in it is written as the
chunks of a stream would be: a text in slices, calls and logprobs a few at a time. So no step takes
long, and what nobody reads is skipped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import orjson
from msgspec import Raw

from aioserver.errors import InvalidJson, InvalidRequest
from aioserver.protocol import json_body
from aioserver.protocol.bridging.chunks import REASONING_FIELDS, C, ChunkReader
from aioserver.protocol.bridging.reading import is_string, members
from aioserver.protocol.json_body import ABSENT, null, pause, sound
from aioserver.protocol.openai import BadEvent
from aioserver.protocol.whole_answer import string_pieces

if TYPE_CHECKING:
    from collections.abc import Iterator

# Bytes of a chat completion that is read at all; those of models that exist are a hundredth of it,
# as a rule.
MAX_WHOLE_BYTES = 1 << 24
# Bytes of one that is read in one step, or of what stands in it.
STEP_BYTES = 1 << 16
# Elements of a list that are written in one step: choices, parts of a content, calls, logprobs.
STEP_ELEMENTS = 64


class _Answer(msgspec.Struct, gc=False):
    model: Raw = ABSENT
    choices: Raw = ABSENT
    usage: Raw = ABSENT
    error: Raw = ABSENT


class _Choice(msgspec.Struct, gc=False):
    index: Raw = ABSENT
    message: Raw = ABSENT
    delta: Raw = ABSENT
    finish_reason: Raw = ABSENT
    stop_reason: Raw = ABSENT
    logprobs: Raw = ABSENT


class _Message(msgspec.Struct, gc=False):
    reasoning_content: Raw = ABSENT
    reasoning: Raw = ABSENT
    content: Raw = ABSENT
    refusal: Raw = ABSENT
    tool_calls: Raw = ABSENT
    function_call: Raw = ABSENT


class _Call(msgspec.Struct, gc=False):
    id: Raw = ABSENT
    function: Raw = ABSENT


class _Function(msgspec.Struct, gc=False):
    name: Raw = ABSENT
    arguments: Raw = ABSENT


class _Logprobs(msgspec.Struct, gc=False):
    content: Raw = ABSENT


_ANSWER = msgspec.json.Decoder(_Answer)
_CHOICE = msgspec.json.Decoder(_Choice)
_MESSAGE = msgspec.json.Decoder(_Message)
_CALL = msgspec.json.Decoder(_Call)
_FUNCTION = msgspec.json.Decoder(_Function)
_LOGPROBS = msgspec.json.Decoder(_Logprobs)


async def read_whole(body: bytes, writer: ChunkReader[C]) -> None:
    """Have *writer* read *body*, a whole answer, in steps.

    Raises:
        BadEvent: *body* is no chat completion.
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
            raise BadEvent("the provider's answer is no chat completion") from None
        await pause()
    if writer.finish_reason is None and not writer.begun:
        raise BadEvent("the provider's answer is no chat completion")


async def _read(body: bytes, writer: ChunkReader[C]) -> None:
    """Read *body*, in steps."""
    answer = await json_body.decoding(_ANSWER, body, "the answer")
    # A larger one is none that anybody would read.
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
    for batch in _batches(answer.choices):
        for raw in batch:
            try:
                choice = await json_body.decoding(_CHOICE, memoryview(raw), "a choice")
            except InvalidRequest:
                continue
            index = b"0" if choice.index is ABSENT else bytes(memoryview(choice.index)[:16])
            if index == b"%d" % writer.choice_index:
                await _read_choice(choice, writer)
        await pause()


async def _read_choice(choice: _Choice, writer: ChunkReader[C]) -> None:
    raw = choice.message if null(choice.delta) or _size(choice.delta) <= 2 else choice.delta
    if not null(raw):
        try:
            message = await json_body.decoding(_MESSAGE, memoryview(raw), "a message")
        except InvalidRequest:
            message = _Message()
        await _read_message(message, choice.logprobs, writer)
    if not null(choice.finish_reason) and _size(choice.finish_reason) <= STEP_BYTES:
        ending = members((b"finish_reason", choice.finish_reason))
        if is_string(choice.stop_reason) and _size(choice.stop_reason) <= STEP_BYTES:
            ending += members((b"stop_reason", choice.stop_reason))
        writer.read(_chunk(b"", ending))


async def _read_message(message: _Message, logprobs: Raw, writer: ChunkReader[C]) -> None:
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
        for batch in _batches(content):
            for part in _joined(batch):
                writer.read(_chunk(b'"content":[%b]' % part))
                await pause()
            await pause()
    if writer.logprobs and not null(logprobs):
        try:
            tokens = (await json_body.decoding(_LOGPROBS, memoryview(logprobs), "")).content
        except InvalidRequest:
            tokens = ABSENT
        for batch in _batches(tokens):
            for part in _joined(batch):
                writer.add_logprobs(orjson.loads(b"[%b]" % part))
                await pause()
            await pause()
    if is_string(message.refusal):
        await _write_text("refusal", message.refusal, writer)
    for batch in _batches(message.tool_calls):
        for part in _joined(batch):
            if len(part) <= STEP_BYTES:
                writer.read(_chunk(b'"tool_calls":[%b]' % part))
            else:
                await _write_call(part, writer)
            await pause()
        await pause()
    called = not null(message.tool_calls) and _size(message.tool_calls) > 2
    if not (called or null(message.function_call)) and _size(message.function_call) > 2:
        # The form before there were tools; llama-cpp-python sends both.
        await _write_call(b'{"index":0,"function":%b}' % bytes(message.function_call), writer)


async def _write_text(name: str, raw: Raw, writer: ChunkReader[C]) -> None:
    """Write the text *raw*, in slices."""
    text = bytes(raw)
    for piece in await string_pieces(text):
        writer.read(_chunk(b'"%b":"%b"' % (name.encode(), text[piece])))
        await pause()


async def _write_call(raw: bytes, writer: ChunkReader[C]) -> None:
    """Write one call, whose arguments may be long."""
    try:
        call = await json_body.decoding(_CALL, raw, "a call")
        function = await json_body.decoding(_FUNCTION, memoryview(call.function), "a function")
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
    for piece in await string_pieces(text):
        more = b'{"function":{"arguments":"%b"}}' % text[piece]
        writer.read(_chunk(b'"tool_calls":[%b]' % more))
        await pause()


def _chunk(delta: bytes, further: bytes = b"") -> bytes:
    return b'{"choices":[{"index":0,"delta":{%b}%b}]}' % (delta, further)


def _batches(raw: Raw) -> Iterator[list[Raw]]:
    """Yield the elements of the list that *raw* is, at most STEP_ELEMENTS at a time.

    A batch may be empty.
    """
    if null(raw) or bytes(memoryview(raw)[:1]) != b"[":
        return
    for found in json_body.elements(bytes(raw)):
        yield []
        for start in range(0, len(found), STEP_ELEMENTS):
            yield found[start : start + STEP_ELEMENTS]


def _joined(batch: list[Raw]) -> Iterator[bytes]:
    """Yield the elements of *batch*, joined, but those alone that are large."""
    small: list[bytes] = []
    for raw in batch:
        if _size(raw) > STEP_BYTES // 2:
            if small:
                yield b",".join(small)
            small = []
            yield bytes(raw)
        else:
            small.append(bytes(raw))
            if sum(map(len, small)) > STEP_BYTES // 2:
                yield b",".join(small)
                small = []
    if small:
        yield b",".join(small)


def _size(raw: Raw) -> int:
    return len(memoryview(raw))
