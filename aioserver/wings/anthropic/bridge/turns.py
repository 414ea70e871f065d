"""The messages of a request as those of a chat, in the order that strict engines want.

    user text, image, document    text, `image_url`, `file`; one message where several are in a row
    system, in their midst        a text of the user, between lines `<system-reminder>`
    tool_use                      a tool call of the assistant message
    tool_result                   a `tool` message; its pictures follow in the user's message
    thinking, with our signature  the reasoning of its message, if the provider has such a field
    other thinking                left out: it is another model's
    server_tool_use and results   left out, as the tools are that they belong to

Templates of many models take one system message, in front, and roles that alternate; engines want
each `tool` message directly behind its call. So a turn of the user is kept until the next of the
assistant: then come the results, in the order of the calls, and one message with all else. A call
without a result gets an empty one, and a result without a call is a text of the user.

What was said is a prefix of what is said later: nothing depends on how many turns there are.

This file is one concept: where each block goes depends on what the blocks before it have left open.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import orjson
from msgspec import Raw

from aioserver.errors import InvalidRequest
from aioserver.protocol.bridging.reading import elements, is_string, join, members, read, string
from aioserver.protocol.json_body import ABSENT, flag, null, pause
from aioserver.wings.anthropic.bridge import ids

if TYPE_CHECKING:
    from aioserver.wings.anthropic.bridge.tools import Tools

# The signature of the thinking that we have written.
SIGNATURE = "aioserver.unsigned"
# What a client writes in front of a result that is an error.
_FAILED = (b'"Error: ', b'"<tool_use_error>')
# The result of a tool that has no text, but pictures.
_SHOWN_BELOW = b'"(see the next message)"'
# The first bytes of a system block that changes with each request: an engine's prefix cache would
# be lost.
_BILLING = b'"x-anthropic-billing-header:'
_BLANK = re.compile(rb'"(?: |\\[nrtf])*+"')
# Calls whose results are awaited at most.
MAX_OPEN_CALLS = 1000
# Blocks, and bytes of them, that become parts of a message in one step.
STEP_BLOCKS, STEP_BYTES = 64, 1 << 16


class _Message(msgspec.Struct, gc=False):
    role: str
    content: Raw = ABSENT


class _Block(msgspec.Struct, gc=False):
    type: str
    text: Raw = ABSENT
    source: Raw = ABSENT
    title: Raw = ABSENT
    id: str | None = None
    name: str | None = None
    input: Raw = ABSENT
    tool_use_id: str | None = None
    content: Raw = ABSENT
    is_error: Raw = ABSENT
    thinking: Raw = ABSENT
    signature: Raw = ABSENT
    tool_name: Raw = ABSENT


class _Source(msgspec.Struct, gc=False):
    type: str
    media_type: Raw = ABSENT
    data: Raw = ABSENT
    url: Raw = ABSENT
    content: Raw = ABSENT


_MESSAGE = msgspec.json.Decoder(_Message)
_BLOCK = msgspec.json.Decoder(_Block)
_SOURCE = msgspec.json.Decoder(_Source)


class _Piece(NamedTuple):
    """A piece of a user's message: a text, a JSON string, with the white space in front of it; or
    a part that is none.
    """

    content: bytes
    between: bytes = b""
    text: bool = True


class Turns:
    """The messages of a chat, which grow message by message.

    *reasoning_field* is the name that the provider has for the reasoning of a message; empty if it
    has none. `pictures` counts what is no text, and `picture_bytes` its bytes.

    Always: a `tool` message stands directly behind its call, among others at most; one message of
    the system at most, in front; no two of one role are in a row, but for `tool`.
    """

    def __init__(self, tools: Tools, reasoning_field: str = "") -> None:
        self._tools = tools
        self._reasoning_field = reasoning_field.encode()
        self.pictures = self.picture_bytes = 0
        self._messages: list[bytes] = []
        # The messages before them, many joined as one.
        self._joined: list[bytes] = []
        self._system: list[bytes] = []
        # The turn of the user that is under way: pieces of its message, those of the pictures in
        # results, and results by the ids of the calls.
        self._pieces: list[_Piece] = []
        self._below: list[_Piece] = []
        self._results: dict[str, bytes] = {}
        # The calls of the last message of the assistant.
        self._awaited: dict[str, None] = {}
        # The message of the assistant that is under way.
        self._said: list[bytes] = []
        self._reasoning: list[bytes] = []
        self._calls: dict[str, bytes] = {}
        # Bytes and blocks since the last pause.
        self._steps = 0

    def instruct(self, raw: Raw) -> None:
        """Add *raw*, the `system` of a request: a text, or blocks of text.

        Raises:
            InvalidRequest: it is neither.
        """
        self._system += _texts(raw, "system")

    async def add(self, raw: Raw, param: str) -> None:
        """Add a message, in steps.

        Raises:
            InvalidRequest: it is none, or there is no form of it in a chat; *param* names it.
        """
        message = read(_MESSAGE, raw, param)
        param = f"{param}.content"
        if message.role == "system":
            for text in _texts(message.content, param):
                if self._begun:
                    reminder = b'"<system-reminder>\\n%b\\n</system-reminder>"' % text[1:-1]
                    self._ask(reminder, b"\\n\\n")
                else:
                    self._system.append(text)
            return
        if message.role not in {"user", "assistant"}:
            raise InvalidRequest("role must be user, assistant or system", param=param)
        between = b"\\n\\n"
        if is_string(message.content):
            self._say_or_ask(message.role, bytes(message.content), between)
            return
        for number, each in enumerate(elements(message.content, param)):
            place = f"{param}[{number}]"
            block = read(_BLOCK, each, place)
            if message.role == "assistant":
                self._add_answered(block, place, between)
            else:
                self._add_asked(block, place, between)
            between = b"\\n"
            await self._step(len(memoryview(each)))

    def finish(self) -> bytes:
        """Return all messages, joined by commas."""
        self._close_user()
        self._close_assistant()
        self._close_system()
        return b",".join((*self._joined, *self._messages))

    async def _step(self, size: int) -> None:
        self._steps += size + STEP_BYTES // STEP_BLOCKS
        if self._steps >= STEP_BYTES:
            self._steps = 0
            if self._messages:
                # So that few are left to be joined at the end.
                self._joined.append(b",".join(self._messages))
                self._messages.clear()
            await pause()

    @property
    def _begun(self) -> bool:
        """Whether there is anything but a system message."""
        return bool(self._messages or self._joined or self._pieces or self._said or self._calls)

    def _say_or_ask(self, role: str, text: bytes, between: bytes) -> None:
        if role == "user":
            self._ask(text, between)
        else:
            self._say(text, between)

    # The user's turn.

    def _add_asked(self, block: _Block, param: str, between: bytes) -> None:
        if block.type == "tool_result":
            self._add_result(block, param)
            return
        for piece in self._parts_of(block, param):
            self._add_piece(piece._replace(between=between) if piece.text else piece)

    def _ask(self, text: bytes, between: bytes) -> None:
        self._add_piece(_Piece(text, between))

    def _add_piece(self, piece: _Piece) -> None:
        if piece.content != b'""':
            self._close_assistant()
            self._pieces.append(piece)

    def _add_result(self, block: _Block, param: str) -> None:
        if not block.tool_use_id:
            raise InvalidRequest(f"{param} must have a tool_use_id", param=f"{param}.tool_use_id")
        texts: list[bytes] = []
        others: list[_Piece] = []
        if is_string(block.content):
            texts.append(bytes(block.content))
        else:
            for number, raw in enumerate(elements(block.content, f"{param}.content")):
                place = f"{param}.content[{number}]"
                for piece in self._parts_of(read(_BLOCK, raw, place), place):
                    if piece.text:
                        texts.append(piece.content)
                    else:
                        others.append(piece)
        text = join(texts, b"\\n") if texts else b'""'
        if text == b'""' and others:
            text = _SHOWN_BELOW
        if flag(block.is_error) and not text.startswith(_FAILED):
            text = b'"Error: %b' % text[1:]
        self._close_assistant()
        own = ids.own(block.tool_use_id)
        if own in self._awaited and own not in self._results:
            self._results[own] = text
            self._below += others
        else:
            self._pieces += [_Piece(text, b"\\n"), *others]

    def _parts_of(self, block: _Block, param: str) -> list[_Piece]:
        """Return the pieces of a message that a *block* of a user stands for."""
        match block.type:
            case "text":
                return [_Piece(string(block.text, f"{param}.text"), b"\\n")]
            case "image":
                return [self._image(block, param)]
            case "document":
                return self._document(block, param)
            case "search_result":
                named = [bytes(block.title)] if is_string(block.title) else []
                texts = [*named, *_texts(block.content, f"{param}.content")]
                return [_Piece(text, b"\\n") for text in texts]
            case "tool_reference":
                return [_Piece(string(block.tool_name, f"{param}.tool_name"), b"\\n")]
        if self._left_out(block):
            return []
        raise _no_form(block.type, param)

    def _image(self, block: _Block, param: str) -> _Piece:
        source = read(_SOURCE, block.source, f"{param}.source")
        if source.type == "base64" and is_string(source.data) and is_string(source.media_type):
            url = _data_url(source)
        elif source.type == "url" and is_string(source.url):
            url = bytes(source.url)
        else:
            raise _no_form(f"image of a {source.type}", param)
        return self._picture(b'{"type":"image_url","image_url":{"url":%b}}' % url)

    def _document(self, block: _Block, param: str) -> list[_Piece]:
        source = read(_SOURCE, block.source, f"{param}.source")
        if source.type == "text" and is_string(source.data):
            return [_Piece(bytes(source.data), b"\\n")]
        if source.type == "base64" and is_string(source.data) and is_string(source.media_type):
            name = bytes(block.title) if is_string(block.title) else b'"document.pdf"'
            form = b'{"type":"file","file":{"filename":%b,"file_data":%b}}'
            return [self._picture(form % (name, _data_url(source)))]
        if source.type == "content":
            if is_string(source.content):
                return [_Piece(bytes(source.content), b"\\n")]
            place = f"{param}.source.content"
            return [
                piece
                for number, raw in enumerate(elements(source.content, place))
                for piece in self._parts_of(
                    read(_BLOCK, raw, f"{place}[{number}]"), f"{place}[{number}]"
                )
            ]
        raise _no_form(f"document of a {source.type}", param)

    def _picture(self, part: bytes) -> _Piece:
        self.pictures += 1
        self.picture_bytes += len(part)
        return _Piece(part, text=False)

    # The assistant's.

    def _add_answered(self, block: _Block, param: str, between: bytes) -> None:
        match block.type:
            case "text":
                self._say(string(block.text, f"{param}.text"), between)
            case "tool_use":
                self._call(block, param)
            case "thinking":
                ours = (
                    is_string(block.signature)
                    and bytes(block.signature)[1:-1].decode("utf-8", "replace") == SIGNATURE
                )
                if ours and self._reasoning_field and is_string(block.thinking):
                    self._close_user()
                    self._reasoning.append(bytes(block.thinking))
            case "redacted_thinking":
                pass
            case _:
                if not self._left_out(block):
                    raise _no_form(block.type, param)

    def _say(self, text: bytes, between: bytes) -> None:
        if _BLANK.fullmatch(text):
            return
        self._close_user()
        if self._said:
            self._said.append(between)
        self._said.append(text[1:-1])

    def _call(self, block: _Block, param: str) -> None:
        if not block.id or not block.name:
            raise InvalidRequest(f"{param} must have an id and a name", param=param)
        self._close_user()
        own = ids.own(block.id)
        if len(self._calls) >= MAX_OPEN_CALLS:
            raise InvalidRequest(f"more than {MAX_OPEN_CALLS} calls in a turn", param=param)
        arguments = b"{}" if null(block.input) else bytes(block.input)
        self._calls[own] = b'{"id":%b,"type":"function","function":{"name":%b,"arguments":%b}}' % (
            orjson.dumps(own),
            orjson.dumps(self._tools.name_of(block.name)),
            orjson.dumps(arguments.decode()),
        )

    def _left_out(self, block: _Block) -> bool:
        """Return whether *block* belongs to a tool that ran at another provider, and note it."""
        kind = block.type
        if kind in {"server_tool_use", "mcp_tool_use"}:
            self._tools.hosted.note(block.name or kind)
            return True
        return kind.endswith("_tool_result")

    # Both.

    def _close_user(self) -> None:
        """Add the turn of the user that is under way: the results, and one message of all else."""
        pieces = self._below + self._pieces
        if not pieces and not self._results:
            return
        self._close_system()
        for own in self._awaited:
            result = self._results.get(own, b'""')
            form = b'{"role":"tool","tool_call_id":%b,"content":%b}'
            self._messages.append(form % (orjson.dumps(own), result))
        if pieces:
            self._messages.append(b'{"role":"user","content":%b}' % _content(pieces))
        self._pieces, self._below = [], []
        self._results.clear()
        self._awaited.clear()

    def _close_assistant(self) -> None:
        """Add the message of the assistant that is under way; reasoning that nothing followed is
        dropped.
        """
        reasoning, self._reasoning = self._reasoning, []
        if not self._said and not self._calls:
            return
        self._close_system()
        calls = b"[%b]" % b",".join(self._calls.values()) if self._calls else b""
        more = [(b"tool_calls", calls)]
        if reasoning:
            more.append((self._reasoning_field, join(reasoning, b"\\n")))
        text = b"".join((b'"', *self._said, b'"')) if self._said else b"null"
        self._messages.append(b'{"role":"assistant","content":%b%b}' % (text, members(*more)))
        self._awaited = dict.fromkeys(self._calls)
        self._said, self._calls = [], {}

    def _close_system(self) -> None:
        if self._system:
            text = join(self._system, b"\\n\\n")
            self._messages.append(b'{"role":"system","content":%b}' % text)
            self._system = []


def _content(pieces: list[_Piece]) -> bytes:
    """Return the content of a message of *pieces*: one text, as some engines take no other, or
    parts.
    """
    parts: list[bytes] = []
    texts: list[bytes] = []
    for piece in pieces:
        if piece.text:
            if texts:
                texts.append(piece.between)
            texts.append(piece.content[1:-1])
            continue
        if texts:
            parts.append(b'{"type":"text","text":"%b"}' % b"".join(texts))
            texts = []
        parts.append(piece.content)
    if not parts:
        return b"".join((b'"', *texts, b'"'))
    if texts:
        parts.append(b'{"type":"text","text":"%b"}' % b"".join(texts))
    return b"[%b]" % b",".join(parts)


def _texts(raw: Raw, param: str) -> list[bytes]:
    """Return the texts of *raw*, one or blocks of it, without those that are for Anthropic."""
    if null(raw):
        return []
    if is_string(raw):
        texts = [bytes(raw)]
    else:
        texts = []
        for number, each in enumerate(elements(raw, param)):
            place = f"{param}[{number}]"
            block = read(_BLOCK, each, place)
            if block.type != "text":
                raise _no_form(block.type, place)
            texts.append(string(block.text, f"{place}.text"))
    return [text for text in texts if text != b'""' and not text.startswith(_BILLING)]


def _data_url(source: _Source) -> bytes:
    return b'"data:%b;base64,%b"' % (bytes(source.media_type)[1:-1], bytes(source.data)[1:-1])


def _no_form(kind: str, param: str) -> InvalidRequest:
    message = f"{kind[:64]!r} has no form in chat completions, which are all that the provider has"
    return InvalidRequest(message, param=param)
