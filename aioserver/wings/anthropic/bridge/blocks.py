"""The messages of a request, block by block, as messages of a chat.

    user text, image, document    text, `image_url`, `file`
    system, in their midst        a text of the system, in its place
    tool_use                      a tool call of the assistant
    tool_result                   its result
    thinking, with our signature  reasoning
    other thinking                left out: another model has written it
    server_tool_use and results   left out, like the tools to which they belong

`Turns` decides where each of them goes (protocol/bridging/turns.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from msgspec import Raw

from aioserver.errors import InvalidRequest
from aioserver.protocol.bridging.reading import (
    elements,
    is_string,
    quoted,
    reading,
    string,
    untranslatable,
)
from aioserver.protocol.bridging.turns import LINE, PARAGRAPH, Piece, Turns
from aioserver.protocol.json_body import ABSENT, flag, null
from aioserver.wings.anthropic import wire
from aioserver.wings.anthropic.bridge import ids

if TYPE_CHECKING:
    from aioserver.wings.anthropic.bridge.tools import Tools

# The signature of the thinking blocks that we have written.
SIGNATURE = "aioserver.unsigned"
# The first bytes of a system block that changes with each request, and would defeat an engine's
# prefix cache.
_BILLING = b'"x-anthropic-billing-header:'


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


class BlockReader:
    """Reads messages into *turns*; *tools* are those of the request."""

    def __init__(self, tools: Tools, turns: Turns) -> None:
        self._tools, self._turns = tools, turns

    async def instruct(self, raw: Raw, param: str) -> None:
        """Add *raw*, a text of the system or blocks of it, without parts that are meant for
        Anthropic.

        Raises:
            InvalidRequest: it is neither; *param* names it.
        """
        for piece in await self._pieces(raw, param):
            if not piece.text:
                raise InvalidRequest("a system message may have only text", param=param)
            if not piece.content.startswith(_BILLING):
                self._turns.instruct(piece.content)
            await self._turns.step(0)

    async def add(self, raw: Raw, param: str) -> None:
        """Add a message, in steps.

        Raises:
            InvalidRequest: *raw* is not a message, or has no form in a chat; *param* names it.
        """
        message = await reading(_MESSAGE, raw, param)
        role, content = message.role, message.content
        if role not in {"user", "assistant", "system"}:
            text = "role must be user, assistant or system"
            raise InvalidRequest(text, param=f"{param}.role")
        param = f"{param}.content"
        if role == "system":
            await self.instruct(content, param)
        elif is_string(content):
            if role == "user":
                self._turns.ask(Piece(bytes(content), PARAGRAPH))
            else:
                self._turns.say(bytes(content), PARAGRAPH)
        else:
            add = self._add_asked if role == "user" else self._add_answered
            between = PARAGRAPH
            for number, each in enumerate(elements(content, param)):
                place = f"{param}[{number}]"
                await add(await reading(_BLOCK, each, place), place, between)
                between = LINE
                await self._turns.step(len(memoryview(each)))
            return
        await self._turns.step(len(memoryview(raw)))

    async def _add_asked(self, block: _Block, param: str, between: bytes) -> None:
        if block.type != "tool_result":
            for piece in await self._of_block(block, param):
                self._turns.ask(piece._replace(between=between))
            return
        if not block.tool_use_id:
            raise InvalidRequest(f"{param} must have a tool_use_id", param=f"{param}.tool_use_id")
        pieces = await self._pieces(block.content, f"{param}.content")
        failed = flag(block.is_error) is True
        self._turns.answer(ids.own(block.tool_use_id), pieces, failed=failed)

    async def _pieces(self, raw: Raw, param: str) -> list[Piece]:
        """Return the pieces that *raw* stands for, a text or blocks."""
        if is_string(raw):
            return [Piece(bytes(raw))]
        pieces: list[Piece] = []
        for number, each in enumerate(elements(raw, param)):
            place = f"{param}[{number}]"
            pieces += await self._of_block(await reading(_BLOCK, each, place), place)
            await self._turns.step(len(memoryview(each)))
        return pieces

    async def _of_block(self, block: _Block, param: str) -> list[Piece]:
        """Return the pieces of a message that a *block* of a user stands for."""
        match block.type:
            case "text":
                return [Piece(string(block.text, f"{param}.text"))]
            case "image":
                return [await _image(block, param)]
            case "document":
                return await self._document(block, param)
            case "search_result":
                named = [Piece(bytes(block.title))] if is_string(block.title) else []
                return named + await self._pieces(block.content, f"{param}.content")
            case "tool_reference":
                return [Piece(string(block.tool_name, f"{param}.tool_name"))]
        if self._left_out(block):
            return []
        raise untranslatable(block.type, param)

    async def _document(self, block: _Block, param: str) -> list[Piece]:
        source = await reading(_SOURCE, block.source, f"{param}.source")
        if source.type == "text" and is_string(source.data):
            return [Piece(bytes(source.data))]
        if source.type == "base64" and is_string(source.data) and is_string(source.media_type):
            name = bytes(block.title) if is_string(block.title) else b'"document.pdf"'
            form = b'{"type":"file","file":{"filename":%b,"file_data":"data:%b;base64,%b}}'
            return [Piece(form % (name, *_data(source)), text=False)]
        if source.type == "content":
            return await self._pieces(source.content, f"{param}.source.content")
        raise untranslatable(f"document of a {source.type}", param)

    async def _add_answered(self, block: _Block, param: str, between: bytes) -> None:
        match block.type:
            case "text":
                self._turns.say(string(block.text, f"{param}.text"), between)
            case "tool_use":
                if not block.id or not block.name:
                    raise InvalidRequest(f"{param} must have an id and a name", param=param)
                own, name = ids.own(block.id), self._tools.name_of(block.name)
                arguments = b"{}" if null(block.input) else bytes(block.input)
                self._turns.call(own, name, await quoted(arguments), param)
            case "thinking":
                signed = bytes(block.signature) == b'"%b"' % SIGNATURE.encode()
                if signed and is_string(block.thinking):
                    self._turns.think(bytes(block.thinking))
            case "redacted_thinking" | wire.FALLBACK:
                pass
            case _:
                if not self._left_out(block):
                    raise untranslatable(block.type, param)

    def _left_out(self, block: _Block) -> bool:
        """Return whether *block* belongs to a tool that ran at another provider, and note it."""
        kind = block.type
        if kind in {"server_tool_use", "mcp_tool_use"}:
            self._tools.hosted.note(block.name or kind)
            return True
        return kind.endswith("_tool_result")


async def _image(block: _Block, param: str) -> Piece:
    source = await reading(_SOURCE, block.source, f"{param}.source")
    if source.type == "base64" and is_string(source.data) and is_string(source.media_type):
        form = b'{"type":"image_url","image_url":{"url":"data:%b;base64,%b}}'
        return Piece(form % _data(source), text=False)
    if source.type == "url" and is_string(source.url):
        form = b'{"type":"image_url","image_url":{"url":%b}}'
        return Piece(form % bytes(source.url), text=False)
    raise untranslatable(f"image of a {source.type}", param)


def _data(source: _Source) -> tuple[bytes, memoryview]:
    """Return the type of *source*, and its data to the closing quote, as they stand in a URL."""
    return bytes(source.media_type)[1:-1], memoryview(source.data)[1:]
