"""The input items of a request, as messages of a chat.

    message                  what a user, the assistant or the system says; `developer` is `system`
    function_call            a tool call of the assistant
    custom_tool_call         the same, with its input as the one argument of its function
    function_call_output     its result
    custom_tool_call_output  the same
    reasoning                reasoning
    compaction               a message with the summary, if it was made here (summary.py)
    refusal                  what the assistant says: no template shows a refusal to its model

An item of a tool that ran at a provider is left out, as the tool is. Any other is a reference that
only the provider can read: it is refused by name. `Turns` decides where each of them goes
(protocol/bridging/turns.py).
"""

from __future__ import annotations

import msgspec
from msgspec import Raw

from aioserver.errors import InvalidRequest
from aioserver.protocol.bridging.reading import (
    elements,
    is_string,
    join,
    members,
    quoted,
    reading,
    string,
    untranslatable,
)
from aioserver.protocol.bridging.turns import LINE, PARAGRAPH, Piece, Turns
from aioserver.protocol.json_body import ABSENT, null
from aioserver.wings.responses.bridge.summary import summary_of
from aioserver.wings.responses.bridge.tools import CUSTOM, FUNCTION, Tools

_SYSTEM = frozenset({"system", "developer"})
_TEXTS = frozenset({"input_text", "output_text", "text", "summary_text", "reasoning_text"})
# The suffixes of the types of items that belong to tools which run at a provider.
_OF_HOSTED = ("_call", "_call_output")


class _Item(msgspec.Struct, gc=False):
    type: str | None = None
    role: str | None = None
    content: Raw = ABSENT
    call_id: str | None = None
    name: str | None = None
    namespace: str | None = None
    arguments: Raw = ABSENT
    input: Raw = ABSENT
    output: Raw = ABSENT
    encrypted_content: str | None = None


class _Part(msgspec.Struct, gc=False):
    type: str
    text: Raw = ABSENT
    refusal: Raw = ABSENT
    image_url: Raw = ABSENT
    detail: Raw = ABSENT
    file_id: Raw = ABSENT
    file_data: Raw = ABSENT
    filename: Raw = ABSENT
    input_audio: Raw = ABSENT


_ITEM = msgspec.json.Decoder(_Item)
_PART = msgspec.json.Decoder(_Part)


class ItemReader:
    """Reads input items into *turns*; *tools* are those of the request. *incomplete*: items in
    front of these may be missing, and among them the calls to which outputs belong.
    """

    def __init__(self, tools: Tools, turns: Turns, *, incomplete: bool = False) -> None:
        self._tools, self._turns, self._incomplete = tools, turns, incomplete
        # The ids of the calls so far.
        self._called: set[str] = set()

    async def add(self, raw: Raw, param: str) -> None:
        """Add an input item, in steps.

        Raises:
            InvalidRequest: *raw* is not an item, or has no form in a chat; *param* names it.
        """
        item = await reading(_ITEM, raw, param)
        match item.type:
            case None | "message":
                await self._add_message(item, param)
            case "function_call":
                self._add_call(item, FUNCTION, string(item.arguments, f"{param}.arguments"), param)
            case "custom_tool_call":
                text = string(item.input, f"{param}.input")
                arguments = await quoted(b'{"input":%b}' % text)
                self._add_call(item, CUSTOM, arguments, param)
            case "function_call_output" | "custom_tool_call_output":
                if not item.call_id:
                    raise InvalidRequest(f"{param} must have a call_id", param=f"{param}.call_id")
                if not (self._incomplete or item.call_id in self._called):
                    raise InvalidRequest(
                        f"no call in front of {param} has its call_id", param=f"{param}.call_id"
                    )
                pieces = await self._pieces(item.output, f"{param}.output")
                self._turns.answer(item.call_id, pieces)
            case "reasoning":
                for piece in await self._pieces(item.content, f"{param}.content"):
                    self._turns.think(piece.content)
            case "compaction" if summary := summary_of(item.encrypted_content or ""):
                self._turns.ask(Piece(summary, between=PARAGRAPH))
            case kind if kind.startswith("mcp_") or kind.endswith(_OF_HOSTED):
                self._tools.hosted.note(kind.partition("_call")[0])
            case kind:
                raise untranslatable(kind, f"{param}.type")
        await self._turns.step(len(memoryview(raw)))

    async def _add_message(self, item: _Item, param: str) -> None:
        role = item.role
        if role not in {"user", "assistant", *_SYSTEM}:
            raise InvalidRequest(
                "role must be user, assistant, system or developer", param=f"{param}.role"
            )
        param = f"{param}.content"
        pieces = await self._pieces(item.content, param)
        if role == "user":
            for number, piece in enumerate(pieces):
                self._turns.ask(piece if number else piece._replace(between=PARAGRAPH))
                await self._turns.step(0)
            return
        if not all(piece.text for piece in pieces):
            raise InvalidRequest(f"a message of the {role} may have only text", param=param)
        texts = [piece.content for piece in pieces]
        if role == "assistant":
            for number, text in enumerate(texts):
                self._turns.say(text, LINE if number else PARAGRAPH)
                await self._turns.step(0)
        elif texts:
            self._turns.instruct(join(texts, LINE))

    def _add_call(self, item: _Item, kind: str, arguments: bytes, param: str) -> None:
        if not item.call_id or not item.name:
            raise InvalidRequest(f"{param} must have a call_id and a name", param=param)
        name = self._tools.name_of(kind, item.name, item.namespace or "")
        self._called.add(item.call_id)
        self._turns.call(item.call_id, name, arguments, param)

    async def _pieces(self, raw: Raw, param: str) -> list[Piece]:
        """Return the pieces that *raw* stands for, a text or parts."""
        if is_string(raw):
            return [Piece(bytes(raw))]
        pieces: list[Piece] = []
        for number, each in enumerate(elements(raw, param)):
            place = f"{param}[{number}]"
            part = await reading(_PART, each, place)
            if part.type in _TEXTS:
                pieces.append(Piece(string(part.text, f"{place}.text")))
            elif part.type == "refusal":
                pieces.append(Piece(string(part.refusal, f"{place}.refusal")))
            else:
                pieces.append(Piece(_other(part, place), text=False))
            await self._turns.step(len(memoryview(each)))
        return pieces


def _other(part: _Part, param: str) -> bytes:
    """Return a part of a user's message that is no text."""
    if part.type == "input_image" and is_string(part.image_url):
        detail: bytes | Raw = part.detail
        if is_string(part.detail) and bytes(part.detail) == b'"original"':
            # Only the Responses API knows this word.
            detail = b'"high"'
        return b'{"type":"image_url","image_url":{"url":%b%b}}' % (
            bytes(part.image_url),
            members((b"detail", detail)),
        )
    if part.type == "input_file" and (is_string(part.file_data) or is_string(part.file_id)):
        fields = members(
            (b"filename", part.filename),
            (b"file_data", part.file_data),
            (b"file_id", part.file_id),
        )
        return b'{"type":"file","file":{%b}}' % fields[1:]
    if part.type == "input_audio" and not null(part.input_audio):
        return b'{"type":"input_audio","input_audio":%b}' % bytes(part.input_audio)
    hint = {
        "input_image": ": it must have an image_url",
        "input_file": ": it must have file_data",
    }.get(part.type, "")
    raise untranslatable(part.type, param, hint)
