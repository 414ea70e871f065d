"""What OpenAI's chat objects say: text, reasoning, tool calls, the reason of the end, usage.

The chunk of a `chat.completion.chunk` (and the message of a whole `chat.completion`) becomes the
`chunk` objects of our frames, already JSON, since each is rendered once and shared by all readers:

    {"type":"text","data":"Hel","metadata":{}}
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import orjson

from aioserver.provider_errors import (
    ProviderAuthError,
    ProviderBadResponse,
    ProviderError,
    ProviderFault,
    ProviderForbidden,
    ProviderRateLimited,
    ProviderRefused,
)

TEXT = b'{"type":"text","data":%b,"metadata":{}}'
TEXT_START = TEXT.partition(b"%b")[0]
REASONING = b'{"type":"reasoning","data":%b,"metadata":{}}'
TOOL_CALLS = b'{"type":"tool_calls","data":%b,"metadata":{}}'
QUOTA = "insufficient_quota"
KEY_CODES = frozenset({401, 402, QUOTA, "invalid_api_key"})  # of an error: our key's fault
BUSY_CODES = frozenset({429, 498, "rate_limit_exceeded"})


@dataclass(slots=True)
class Reading:
    """What has been read of one answer. *text* is for the conversation's history."""

    choice_index: int = 0
    max_text_bytes: int = 1 << 22
    text: list[str] = field(default_factory=list)
    text_bytes: int = 0
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None

    def read(self, data: bytes) -> list[bytes]:
        """The `chunk` objects in one provider event or whole answer.

        Raises:
            ProviderBadResponse: not JSON, or not a chat object.
            ProviderFault: an error object under HTTP 200 (`provider_error`).
        """
        try:
            return self._read(data)
        except orjson.JSONEncodeError:  # it reads 1,024 levels, but writes 254
            raise ProviderBadResponse("the provider's event is nested too deeply") from None

    def note(self, text: str, size: int) -> None:
        """Remember *text*, *size* bytes as JSON."""
        if self.text_bytes < self.max_text_bytes:
            self.text.append(text)
            self.text_bytes += size

    def _read(self, data: bytes) -> list[bytes]:
        try:
            answer = orjson.loads(data)
        except orjson.JSONDecodeError:
            raise ProviderBadResponse("the provider sent an event that is not JSON") from None
        if not isinstance(answer, dict):
            raise ProviderBadResponse("the provider sent an event that is not an object")
        if answer.get("error"):
            raise provider_error(answer["error"])
        if (usage := usage_of(answer)) is not None:
            orjson.dumps([[usage]])  # the `complete` event has it two levels down
            self.usage = usage
        chunks: list[bytes] = []
        choices = answer.get("choices")
        if not isinstance(choices, list):
            return chunks
        for choice in choices:
            if isinstance(choice, dict) and choice.get("index", 0) == self.choice_index:
                self._choice(choice, chunks)
        return chunks

    def _choice(self, choice: dict[str, Any], chunks: list[bytes]) -> None:
        delta = choice.get("delta") or choice.get("message")
        if isinstance(delta, dict):
            reasoning = delta.get("reasoning_content") or delta.get("reasoning")
            if isinstance(reasoning, str) and reasoning:
                chunks.append(REASONING % orjson.dumps(reasoning))
            text = delta.get("content")
            if isinstance(text, str) and text:
                written = orjson.dumps(text)
                chunks.append(TEXT % written)
                self.note(text, len(written) - 2)  # the quotes
            if tool_calls := delta.get("tool_calls"):
                chunks.append(TOOL_CALLS % orjson.dumps(tool_calls))
        reason = choice.get("finish_reason")
        if isinstance(reason, str):
            self.finish_reason = reason


@dataclass(slots=True)
class Shape:
    """What a provider repeats around each text of an answer, byte for byte.

    An event that begins with *before*, ends with *behind* and has between them only characters that
    mean themselves in a JSON string says what every such event says, but for its text: so it need
    not be parsed.
    """

    before: bytes  # from `data: ` to the text's opening quote
    behind: bytes  # from the closing quote to the blank line
    reading: Reading  # of the answer


def learn(event: bytes, reading: Reading) -> Shape | None:
    """The shape of *event*, one of *reading*'s answer; None where it says more than a text.

    That the text was found in its place is proved: with another text there the event must say that.
    """
    if (
        not event.startswith(b"data: {")
        or event.find(b"\n") != len(event) - 2
        or event.find(b"\r") >= 0
    ):
        return None
    said = _only_text(event[6:-2], reading)
    if said is None:
        return None
    written = orjson.dumps(said)
    before, found, behind = event.rpartition(written)
    probe = orjson.dumps(f"<{said}>")
    if not found or _only_text((before + probe + behind)[6:-2], reading) != f"<{said}>":
        return None
    return Shape(before + b'"', b'"' + behind, reading)


def _only_text(data: bytes, reading: Reading) -> str | None:
    alone = Reading(reading.choice_index)
    try:
        chunks = alone.read(data)
    except ProviderFault:
        return None  # the probe stood in another place
    more = alone.finish_reason is not None or alone.usage is not None
    return alone.text[0] if len(chunks) == len(alone.text) == 1 and not more else None


def usage_of(answer: object) -> dict[str, Any] | None:
    """The usage in a chunk, a whole answer, or an event of a response (Groq has it in `x_groq`)."""
    if not isinstance(answer, dict):
        return None
    for where in (answer, answer.get("x_groq"), answer.get("response")):
        if isinstance(where, dict) and isinstance(usage := where.get("usage"), dict):
            return usage
    return None


def provider_error(error: object) -> ProviderFault:
    """What an error object means that a provider sent under HTTP 200; its text passes, cut.

    OpenRouter's codes are the statuses that it would have sent. Text about our key does not pass.
    """
    codes = error_codes(error)
    if not codes.isdisjoint(KEY_CODES):
        return ProviderAuthError("the provider refuses our key or its quota is used up")
    if 403 in codes:
        return ProviderForbidden("the provider does not allow this")
    if not codes.isdisjoint(BUSY_CODES):
        return ProviderRateLimited("the provider limits our rate", retry_after=1.0)
    said = error.get("message") if isinstance(error, dict) else error
    text = said[:200] if isinstance(said, str) else "the provider reported an error"
    message = f"the provider reported an error: {text}"
    status = next((code for code in codes if isinstance(code, int)), 500)
    if not 400 <= status < 500 or status == 408:
        return ProviderError(message)
    told = {"message": text, "type": "invalid_request_error", "param": None, "code": status}
    return ProviderRefused(message, status, orjson.dumps({"error": told}))


def error_codes(error: object) -> set[int | str]:
    """The code and the type in an error object; a code that is a number as one."""
    if not isinstance(error, dict):
        return set()
    found: set[int | str] = set()
    for said in (error.get("code"), error.get("type")):
        if isinstance(said, int) or (isinstance(said, str) and re.fullmatch("[0-9]{3}", said)):
            found.add(int(said))
        elif isinstance(said, str):
            found.add(said)
    return found


def final_response(body: bytes) -> str | None:
    """The id in a whole `response` object that will not change any more.

    One that runs in the background is asked for again: what it said at first is not kept for that.
    """
    try:
        response = orjson.loads(body)
        name, status = response["id"], response["status"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return None
    final = status in ("completed", "incomplete", "failed", "cancelled")
    return name if final and isinstance(name, str) and name else None
