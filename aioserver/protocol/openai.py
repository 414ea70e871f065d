"""OpenAI's chat objects: text, reasoning, tool calls, finish reason, usage and errors.

The delta of a `chat.completion.chunk`, or the message of a whole `chat.completion`, becomes the
`chunk` objects of our frames. They are JSON already, since each is rendered once and shared by all
readers:

    {"type":"text","data":"Hel","metadata":{}}

This file is one concept: the meaning of each part of such an object.
"""

from __future__ import annotations

import contextlib
import json
import re
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec
import orjson

from aioserver.protocol.eventstream import utf8
from aioserver.protocol.tokens import tiered

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

TEXT = b'{"type":"text","data":%b,"metadata":{}}'
TEXT_START = TEXT.partition(b"%b")[0]
REASONING = b'{"type":"reasoning","data":%b,"metadata":{}}'
TOOL_CALLS = b'{"type":"tool_calls","data":%b,"metadata":{}}'


# The most bytes of a usage as JSON; only the counts of a larger one are kept.
MAX_USAGE_BYTES = 16_384
TOKEN_COUNTS = (
    *("prompt_tokens", "completion_tokens", "total_tokens"),
    *("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"),
)
# A surrogate, escaped in JSON. A pair of them is one character beyond U+FFFF (RFC 8259, 7).
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


# Characters that stand for themselves in a JSON string.
PLAIN = re.compile(rb'[^"\\\x00-\x1f]+')


# A text that comes in pieces: a field of the delta, or (index, holder, field) in a tool call.
TextPlace: TypeAlias = str | tuple[int, str, str]
TEXTS = ("content", "reasoning_content", "reasoning")
# The fields of a delta that, beside text and reasoning, carry no content.
SILENT = frozenset({*TEXTS, "role", "reasoning_details"})
TOOL_TEXTS = (("function", "arguments"), ("custom", "input"))
# The most halves that are kept, which is more than the tool calls that a model makes at once.
MAX_HALVES = 256


class BadEvent(ValueError):
    """An event or a whole answer is not a chat object."""


class ErrorEvent(Exception):
    """An event or a whole answer is an error object: *error*, as it was sent."""

    def __init__(self, error: object) -> None:
        super().__init__("an error object")
        self.error = error


class Reading:
    """The parts of one answer that were read so far. `text` is for the conversation's history.

    Always: the text costs its bytes in memory, in however many events it came; it is kept in one
    buffer and not as a list of pieces, each of which would be an object.

    Some providers split a surrogate pair over two events. *half* keeps the first half of such a
    pair, by the text of the `delta` in which it came, until the second half comes. If none comes,
    U+FFFD replaces it.
    """

    __slots__ = (
        "_text",
        "choice_index",
        "finish_reason",
        "half",
        "max_text_bytes",
        "only_text",
        "texts",
        "usage",
    )

    def __init__(self, choice_index: int = 0, max_text_bytes: int = 1 << 22) -> None:
        self.choice_index, self.max_text_bytes = choice_index, max_text_bytes
        self.finish_reason: str | None = None
        self.usage: dict[str, Any] | None = None
        self.half: dict[TextPlace, str] = {}
        # Whether only text has come, perhaps after reasoning; and in how many events.
        self.only_text, self.texts = True, 0
        # UTF-8.
        self._text = bytearray()

    @property
    def plain(self) -> bool:
        """Whether the next event may have a text and nothing else, and need not be read."""
        return not self.half

    def begin_anew(self) -> None:
        """Forget everything: an attempt has failed, and another attempt follows."""
        self.finish_reason = self.usage = None
        self.half.clear()
        self._text.clear()
        self.only_text, self.texts = True, 0

    def read(self, data: bytes) -> list[bytes]:
        """Return the `chunk` objects of one provider event, or of a whole answer.

        Raises:
            BadEvent: *data* is not JSON, not an object, or nested too deeply.
            ErrorEvent: *data* has an error object.
        """
        try:
            return self._read(data)
        except orjson.JSONEncodeError:
            # orjson reads 1,024 levels, but writes 254.
            raise BadEvent("the provider's event is nested too deeply") from None

    @property
    def text(self) -> str:
        """The text that has come so far."""
        return self._text.decode()

    @property
    def size(self) -> int:
        """The approximate bytes of the text in UTF-8, and in memory."""
        return len(self._text)

    def note(self, text: bytes, count: int = 1) -> None:
        """Keep *text*, whole characters in UTF-8, of *count* events, unless `max_text_bytes` are
        kept already.
        """
        self.texts += count
        if len(self._text) < self.max_text_bytes:
            self._text += text

    def _read(self, data: bytes) -> list[bytes]:
        try:
            answer, surrogates = orjson.loads(data), False
        except orjson.JSONDecodeError:
            answer, surrogates = load_with_surrogates(data), True
        if not isinstance(answer, dict):
            raise BadEvent("the provider sent an event that is not an object")
        if error := answer.get("error"):
            raise ErrorEvent(error)
        if (usage := usage_of(answer)) is not None:
            # Raises if orjson cannot write the usage as the `complete` event has it: two levels
            # deeper.
            written = orjson.dumps([[usage]])
            self.usage = usage if len(written) <= MAX_USAGE_BYTES else bounded(usage)
        chunks: list[bytes] = []
        choices = answer.get("choices")
        if not isinstance(choices, list):
            return chunks
        for choice in choices:
            if isinstance(choice, dict) and choice.get("index", 0) == self.choice_index:
                if surrogates or self.half:
                    choice = self._join_halves(choice)  # noqa: PLW2901 - the same choice, repaired
                self._choice(choice, chunks)
        return chunks

    def _join_halves(self, choice: dict[str, Any]) -> dict[str, Any]:
        """Return *choice* without lone surrogates.

        A first half at the end of a text is kept in `half`.

        A half that was kept goes before the next text of its field, or before the finish.
        """
        name = "delta" if choice.get("delta") else "message"
        delta = choice.get(name)
        fields = dict(delta) if isinstance(delta, dict) else {}
        last = isinstance(choice.get("finish_reason"), str)
        for key in TEXTS:
            text = fields.get(key)
            text = text if isinstance(text, str) else ""
            if text or (last and key in self.half):
                fields[key] = self._join(key, text, last)
        calls = fields.get("tool_calls")
        joined = [
            self._join_call(call, number, last)
            for number, call in enumerate(calls if isinstance(calls, list) else ())
        ]
        if last:
            # No further text comes for these.
            joined += self._lone_halves()
        if joined:
            fields["tool_calls"] = joined
        try:
            repaired: dict[str, Any] = without_halves({**choice, name: fields})
        except RecursionError:
            raise BadEvent("the provider's event is nested too deeply") from None
        return repaired

    def _join(self, place: TextPlace, text: str, last: bool) -> str:
        """Return *text* with the half before it; a half at its end is kept, unless *last*."""
        text = self.half.pop(place, "") + text
        if not last and len(self.half) < MAX_HALVES and "\ud800" <= text[-1] <= "\udbff":
            self.half[place], text = text[-1], text[:-1]
        return text

    def _join_call(self, call: Any, number: int, last: bool) -> Any:
        """Return *call*, a piece of the tool call *number*, with its halves joined."""
        if not isinstance(call, dict) or not isinstance(index := call.get("index", number), int):
            return call
        joined = dict(call)
        for holder, key in TOOL_TEXTS:
            part = call.get(holder)
            if isinstance(part, dict) and isinstance(text := part.get(key), str) and text:
                joined[holder] = {**part, key: self._join((index, holder, key), text, last)}
        return joined

    def _lone_halves(self) -> list[dict[str, Any]]:
        """Return the halves that are left, each as a piece of its tool call."""
        pieces: list[dict[str, Any]] = []
        for place, half in self.half.items():
            assert not isinstance(place, str), (
                "the halves in the delta's own texts have been joined"
            )
            index, holder, key = place
            pieces.append({"index": index, holder: {key: half}})
        self.half.clear()
        return pieces

    def _choice(self, choice: dict[str, Any], chunks: list[bytes]) -> None:
        delta = choice.get("delta") or choice.get("message")
        if isinstance(delta, dict):
            if (len(delta) > 1 or "content" not in delta) and says_more(delta):
                self.only_text = False
            reasoning = delta.get("reasoning_content") or delta.get("reasoning")
            if isinstance(reasoning, str) and reasoning:
                chunks.append(REASONING % orjson.dumps(reasoning))
                if self._text:
                    self.only_text = False
            text = delta.get("content")
            if isinstance(text, str) and text:
                chunks.append(TEXT % orjson.dumps(text))
                self.note(text.encode())
            if tool_calls := delta.get("tool_calls"):
                chunks.append(TOOL_CALLS % orjson.dumps(tool_calls))
        reason = choice.get("finish_reason")
        if isinstance(reason, str):
            self.finish_reason = reason


def load_with_surrogates(data: bytes) -> Any:
    """Return the JSON in *data*, which orjson has refused, perhaps only because of lone
    surrogates.

    Lone surrogates are valid JSON (RFC 8259, 8.2), and stay in the texts that are returned.

    Raises:
        BadEvent: *data* is not JSON for Python's json module either.
    """
    if _SURROGATE.search(data) is not None:
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(data.decode())
    raise BadEvent("the provider sent an event that is not JSON")


def without_halves(value: Any) -> Any:
    """Return *value* with its surrogate pairs joined, and U+FFFD for each lone surrogate."""
    match value:
        case str() if not value.isascii():
            # Not `utf-16-le`: its first use imports it, which fails if no descriptor is free.
            return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        case dict():
            return {without_halves(key): without_halves(item) for key, item in value.items()}
        case list():
            return [without_halves(item) for item in value]
    return value


class Shape(msgspec.Struct):
    """The bytes that a provider repeats around each text of an answer.

    Consider the events that begin with *prefix*, end with *suffix*, and have between them only
    characters that stand for themselves in a JSON string. They differ in their texts alone, so
    they need not be parsed. *prefix* goes from `data: ` to the text's opening quote, *suffix* from
    its closing quote to the blank line. *reading* is that of the answer.
    """

    prefix: bytes
    suffix: bytes
    reading: Reading

    def text_in(self, event: bytes) -> bytes | None:
        """Return the text in *event*, as it stands in JSON.

        None if *event* is of another shape, or not UTF-8.
        """
        begin, stop = len(self.prefix), len(event) - len(self.suffix)
        if (
            begin >= stop
            or not event.startswith(self.prefix)
            or not event.endswith(self.suffix)
            or PLAIN.fullmatch(event, begin, stop) is None
        ):
            return None
        text = event[begin:stop]
        return text if utf8(text) else None

    def texts_in(self, block: bytes) -> list[bytes]:
        """Return the texts in *block*, whole events, as they stand in JSON; none if one of these
        is of another shape, or not UTF-8.
        """
        if not block.endswith(self.suffix):
            return []
        # No text has the quote with which the suffix begins, and no prefix the line break at its
        # end.
        begin = len(self.prefix)
        events = block.split(self.suffix)
        events.pop()
        for event in events:
            if not (event.startswith(self.prefix) and PLAIN.fullmatch(event, begin)):
                return []
        return [event[begin:] for event in events] if utf8(block) else []


def learn(event: bytes, reading: Reading) -> Shape | None:
    """Return the shape of *event*, part of the answer of *reading*.

    None if *event* has more than a text.

    The place of the text is proved: *event* with another text in that place must read as that
    text.
    """
    if (
        not event.startswith(b"data: {")
        or event.find(b"\n") != len(event) - 2
        or event.find(b"\r") >= 0
    ):
        return None
    text = _only_text(event[6:-2], reading)
    if text is None:
        return None
    prefix, written, suffix = event.rpartition(orjson.dumps(text))
    probe = orjson.dumps(f"<{text}>")
    if not written or _only_text((prefix + probe + suffix)[6:-2], reading) != f"<{text}>":
        return None
    return Shape(prefix + b'"', b'"' + suffix, reading)


def _only_text(data: bytes, reading: Reading) -> str | None:
    """Return the text of an event that has nothing else; None for any other."""
    fresh = Reading(reading.choice_index)
    try:
        chunks = fresh.read(data)
    except (BadEvent, ErrorEvent):
        return None
    more = fresh.finish_reason is not None or fresh.usage is not None
    return fresh.text if len(chunks) == 1 and fresh.size and not more else None


def says_more(delta: Mapping[str, Any]) -> bool:
    """Return whether *delta* has more than a role, a text and reasoning."""
    return not only_names(delta, SILENT)


def is_content(data: bytes) -> bool:
    """Return whether an event of a streamed chat completion, which has *data*, is content.
    Otherwise it is a preamble: a role, an empty text, or an event without choices, such as that of
    the usage.

    Everything that is not known as a preamble is content, also data that are not JSON.
    """
    try:
        answer = orjson.loads(data)
    except orjson.JSONDecodeError:
        return True
    if not isinstance(answer, dict):
        return True
    choices = answer.get("choices")
    if not choices:
        return False
    if not isinstance(choices, list):
        return True
    for choice in choices:
        delta = choice.get("delta") if isinstance(choice, dict) else None
        if (
            not isinstance(delta, dict)
            or not only_names(delta, _ROLE)
            or not only_names(choice, _CHOICE)
        ):
            return True
    return False


# The fields that may have a value in a choice, and in its delta, before there is content.
_CHOICE, _ROLE = ("delta", "index"), ("role",)


def only_names(fields: Mapping[str, object], names: Collection[str]) -> bool:
    """Return whether only the *fields* with these *names* have a value in an object: the others
    are null or empty.
    """
    for name, value in fields.items():
        # A number is a value, even 0.
        if (value or not (value is None or isinstance(value, str | list | dict))) and (
            name not in names
        ):
            return False
    return True


def usage_of(answer: object) -> dict[str, Any] | None:
    """Return the usage in a chunk, a whole answer or an event of a response, with its tier.

    Groq's chunks have the usage in `x_groq`, Kimi's in the last choice, events of the Responses
    API in `response`.
    """
    if not isinstance(answer, dict):
        return None
    if isinstance(usage := answer.get("usage"), dict):
        return tiered(usage, answer)
    choices = answer.get("choices")
    last = choices[-1] if isinstance(choices, list) and choices else None
    for holder in (answer.get("x_groq"), last, answer.get("response")):
        if isinstance(holder, dict) and isinstance(usage := holder.get("usage"), dict):
            return tiered(tiered(usage, holder), answer)
    return None


def bounded(usage: dict[str, Any]) -> dict[str, Any]:
    """Return *usage*, or only its counts if it has more than MAX_USAGE_BYTES as JSON."""
    try:
        if len(orjson.dumps(usage)) <= MAX_USAGE_BYTES:
            return usage
    except orjson.JSONEncodeError:
        # orjson reads 1,024 levels, but writes 254.
        pass
    return {name: usage[name] for name in TOKEN_COUNTS if isinstance(usage.get(name), int)}


def error_codes(error: object) -> set[int | str]:
    """Return the code and the type in an error object; a code of three digits becomes a number."""
    if not isinstance(error, dict):
        return set()
    codes: set[int | str] = set()
    for code in (error.get("code"), error.get("type")):
        if isinstance(code, int) or (isinstance(code, str) and re.fullmatch("[0-9]{3}", code)):
            codes.add(int(code))
        elif isinstance(code, str):
            codes.add(code)
    return codes
