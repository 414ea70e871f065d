"""The input items of a request as the messages of a chat.

    message                  a message; `developer` becomes `system`, which every engine knows
    function_call            a tool call of the assistant message before it, or of a new one
    custom_tool_call         the same, with its input as the one argument of its function
    function_call_output     a `tool` message; what is no text follows in a `user` message
    custom_tool_call_output  the same
    reasoning                the reasoning of the assistant message that follows, if the provider
                             has such a field

An item of a tool that ran at a provider is left out, as the tool is. Any other is a reference that
only the provider can read: it is refused by name.

System messages at the start become one message, and so do messages of the user that are in a row:
the templates of many models take no other. Codex begins with two of the user. The text of a later
system message stands where it came, in the user's message, between lines `<system-reminder>`: in
front it would change what an engine has in its prefix cache. A message that stands between a call
and its output goes behind the output, where a chat must have it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec
import orjson
from msgspec import Raw

from aioserver.errors import InvalidRequest
from aioserver.protocol.bridging.reading import (
    elements,
    is_string,
    join,
    members,
    read,
    string,
)
from aioserver.protocol.json_body import ABSENT, null
from aioserver.wings.responses.bridge.tools import CUSTOM, FUNCTION

if TYPE_CHECKING:
    from aioserver.wings.responses.bridge.tools import Tools

_SYSTEM = frozenset({"system", "developer"})
_TEXTS = frozenset({"input_text", "output_text", "text", "summary_text", "reasoning_text"})
# How the types of items end that belong to tools which run at a provider.
_OF_HOSTED = ("_call", "_call_output")
# The answer of a tool that has no text, but pictures or files.
_SHOWN_BELOW = b'"(see the next message)"'
# Calls of one request whose outputs are awaited at most, which is more than a model makes at once.
MAX_OPEN_CALLS = 1000


class _Item(msgspec.Struct, gc=False):
    type: str | None = None
    role: str | None = None
    content: Raw = ABSENT
    summary: Raw = ABSENT
    call_id: str | None = None
    name: str | None = None
    namespace: str | None = None
    arguments: Raw = ABSENT
    input: Raw = ABSENT
    output: Raw = ABSENT


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


class Messages:
    """The messages of a chat, which grow item by item.

    *reasoning_field* is the name that the provider has for the reasoning of a message; empty if it
    has none.

    Always: a `tool` message stands behind the call that it answers, with nothing but others
    between them; one message of the system at most, in front.
    """

    def __init__(self, tools: Tools, reasoning_field: str = "") -> None:
        self._tools = tools
        self._reasoning_field = reasoning_field.encode()
        # What of them is no text, and its bytes.
        self.pictures = self.picture_bytes = 0
        self._messages: list[bytes] = []
        # The messages before them, many joined as one.
        self._joined: list[bytes] = []
        # Texts of system messages, until anything else comes.
        self._system: list[bytes] = []
        # The assistant message that items are still added to.
        self._content = b""
        self._refusal = b""
        self._reasoning: list[bytes] = []
        self._calls: list[bytes] = []
        # The message of the user that is under way.
        self._user: list[_Content] = []
        # The calls without an output, and what of the user's waits for these outputs.
        self._open: set[str] = set()
        self._later: list[_Content] = []

    def instruct(self, text: bytes) -> None:
        """Add *text*, a JSON string, as the instructions in front of everything."""
        self._system.append(text)

    def ask(self, text: bytes) -> None:
        """Add *text*, a JSON string, as a message of the user."""
        self._ask(_Content(text, [], []))

    def add(self, raw: Raw, param: str) -> None:
        """Add an input item.

        Raises:
            InvalidRequest: it is none, or there is no form of it in a chat; *param* names it.
        """
        item = read(_ITEM, raw, param)
        match item.type:
            case None | "message":
                self._add_message(item, param)
            case "function_call":
                self._add_call(item, FUNCTION, string(item.arguments, f"{param}.arguments"), param)
            case "custom_tool_call":
                text = string(item.input, f"{param}.input")
                arguments = orjson.dumps((b'{"input":%b}' % text).decode())
                self._add_call(item, CUSTOM, arguments, param)
            case "function_call_output" | "custom_tool_call_output":
                self._add_output(item, param)
            case "reasoning":
                self._add_reasoning(item, param)
            case kind if kind.startswith("mcp_") or kind.endswith(_OF_HOSTED):
                self._tools.hosted.note(kind.partition("_call")[0])
            case _:
                message = (
                    f"an item {item.type[:64]!r} has no form in chat completions, which are all "
                    "that the provider has"
                )
                raise InvalidRequest(message, param=f"{param}.type")

    def finish(self) -> bytes:
        """Return all messages, joined by commas."""
        self._close_assistant()
        self._flush_later()
        self._close_user()
        self._close_system()
        return b",".join((*self._joined, *self._messages))

    def compact(self) -> None:
        """Join the messages so far, so that few are left to be joined at the end."""
        if self._messages:
            self._joined.append(b",".join(self._messages))
            self._messages.clear()

    def _add_message(self, item: _Item, param: str) -> None:
        role = item.role
        if role == "assistant":
            self._add_answer(item, param)
        elif role in _SYSTEM:
            text, _parts, others = _content(item.content, f"{param}.content")
            if others:
                raise InvalidRequest(f"a {role} message has text only", param=f"{param}.content")
            begun = self._joined or self._messages or self._user or self._later
            if not begun and not self._assistant:
                self._system.append(text)
            elif text != b'""':
                reminder = b'"<system-reminder>\\n%b\\n</system-reminder>"' % text[1:-1]
                self.ask(reminder)
        elif role == "user":
            content = _content(item.content, f"{param}.content")
            self._count(content.others)
            self._ask(content)
        else:
            raise InvalidRequest(
                "role must be user, assistant, system or developer", param=f"{param}.role"
            )

    def _count(self, others: list[bytes]) -> None:
        self.pictures += len(others)
        self.picture_bytes += sum(map(len, others))

    def _add_answer(self, item: _Item, param: str) -> None:
        if self._assistant and not self._calls:
            self._close_assistant()
        self._flush_later()
        self._close_user()
        param = f"{param}.content"
        # A text behind calls whose outputs are awaited belongs to their message.
        texts = [self._content] if self._content else []
        refusals = [self._refusal] if self._refusal else []
        if is_string(item.content):
            self._content = join([*texts, bytes(item.content)], b"\\n")
            return
        for number, raw in enumerate(elements(item.content, param)):
            part = read(_PART, raw, f"{param}[{number}]")
            if part.type in _TEXTS:
                texts.append(string(part.text, f"{param}[{number}].text"))
            elif part.type == "refusal":
                refusals.append(string(part.refusal, f"{param}[{number}].refusal"))
            else:
                raise _no_form(part.type, f"{param}[{number}]")
        self._content = join(texts, b"\\n") if texts else b"" if refusals else b'""'
        self._refusal = join(refusals, b"\\n") if refusals else b""

    def _add_call(self, item: _Item, kind: str, arguments: bytes, param: str) -> None:
        if not item.call_id or not item.name:
            raise InvalidRequest(f"{param} must have a call_id and a name", param=param)
        self._flush_later()
        self._close_user()
        self._open.add(item.call_id)
        if len(self._open) > MAX_OPEN_CALLS:
            raise InvalidRequest(
                f"more than {MAX_OPEN_CALLS} calls without an output", param=param
            )
        name = self._tools.name_of(kind, item.name, item.namespace or "")
        self._calls.append(
            b'{"id":%b,"type":"function","function":{"name":%b,"arguments":%b}}'
            % (orjson.dumps(item.call_id), orjson.dumps(name), arguments)
        )

    def _add_output(self, item: _Item, param: str) -> None:
        if not item.call_id:
            raise InvalidRequest(f"{param} must have a call_id", param=f"{param}.call_id")
        self._close_assistant()
        self._close_user()
        self._close_system()
        text, _parts, others = _content(item.output, f"{param}.output")
        if others:
            self._count(others)
            text = _SHOWN_BELOW if text == b'""' else text
            self._later.append(_Content(b'""', others, others))
        self._messages.append(
            b'{"role":"tool","tool_call_id":%b,"content":%b}' % (orjson.dumps(item.call_id), text)
        )
        self._open.discard(item.call_id)
        if not self._open:
            self._flush_later()

    def _add_reasoning(self, item: _Item, param: str) -> None:
        if not self._reasoning_field:
            return
        if self._assistant and not self._calls:
            self._close_assistant()
        text = _content(item.content, f"{param}.content").text
        if text != b'""':
            self._reasoning.append(text)

    @property
    def _assistant(self) -> bool:
        """Whether an assistant message is under way."""
        return bool(self._content or self._refusal or self._calls)

    def _ask(self, content: _Content) -> None:
        """Add *content* to what the user says, behind the outputs that are awaited."""
        self._close_assistant()
        self._close_system()
        if self._open:
            self._later.append(content)
        else:
            self._user.append(content)

    def _flush_later(self) -> None:
        self._user += self._later
        self._later = []

    def _close_user(self) -> None:
        """Add the message of the user that is under way."""
        said, self._user = self._user, []
        if not said:
            return
        if any(content.others for content in said):
            parts = [part for content in said for part in content.parts or [content.as_part]]
            written = b"[%b]" % b",".join(parts)
        else:
            # Some engines take a string only, so that is what they get where it says all.
            written = join([content.text for content in said], b"\\n\\n")
        self._messages.append(b'{"role":"user","content":%b}' % written)

    def _close_system(self) -> None:
        if self._system:
            self._messages.append(
                b'{"role":"system","content":%b}' % join(self._system, b"\\n\\n")
            )
            self._system = []

    def _close_assistant(self) -> None:
        """Add the assistant message that is under way; reasoning that no message followed is
        dropped.
        """
        reasoning, self._reasoning = self._reasoning, []
        if not self._assistant:
            return
        self._close_system()
        calls = b"[%b]" % b",".join(self._calls) if self._calls else b""
        more = [(b"refusal", self._refusal), (b"tool_calls", calls)]
        if reasoning:
            more.append((self._reasoning_field, join(reasoning, b"\\n")))
        self._messages.append(
            b'{"role":"assistant","content":%b%b}' % (self._content or b"null", members(*more))
        )
        self._content = self._refusal = b""
        self._calls = []


class _Content(NamedTuple):
    """The content of a message or of an output: *text* is that of its texts, *others* are its
    parts that are no text.

    *parts* are all of them, in their order.
    """

    text: bytes
    parts: list[bytes]
    others: list[bytes]

    @property
    def as_part(self) -> bytes:
        """Its text as a part."""
        return b'{"type":"text","text":%b}' % self.text


def _content(raw: Raw, param: str) -> _Content:
    """Return the content that *raw* is, a string or a list of parts."""
    if is_string(raw):
        return _Content(bytes(raw), [], [])
    texts: list[bytes] = []
    parts: list[bytes] = []
    others: list[bytes] = []
    for number, each in enumerate(elements(raw, param)):
        place = f"{param}[{number}]"
        part = read(_PART, each, place)
        if part.type in _TEXTS:
            text = string(part.text, f"{place}.text")
            texts.append(text)
            parts.append(b'{"type":"text","text":%b}' % text)
        else:
            others.append(_part(part, place))
            parts.append(others[-1])
    return _Content(join(texts, b"\\n") if texts else b'""', parts, others)


def _part(part: _Part, param: str) -> bytes:
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
    raise _no_form(part.type, param)


def _no_form(kind: str, param: str) -> InvalidRequest:
    hint = {
        "input_image": ": it must have an image_url",
        "input_file": ": it must have file_data",
    }.get(kind, "")
    return InvalidRequest(f"{kind[:64]!r} has no form in chat completions{hint}", param=param)
