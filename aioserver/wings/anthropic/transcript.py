"""The transcript of an answer of Anthropic's Messages API, and how another answer continues it
(protocol/transcript.py).

The text behind the seam goes to the open block, or to a new one if the answer broke off between
two. All other blocks of the second answer come behind that, with the next indexes. A `fallback`
block is no part of the text; a `fallback` block in front of the second answer's text is left out.
"""

from __future__ import annotations

from typing import Any

from aioserver.protocol import eventstream
from aioserver.protocol.openai import BadEvent, ErrorEvent, without_halves
from aioserver.protocol.transcript import (
    Halves,
    PassedTranscript,
    Rest,
    Tokens,
    loaded,
    summed,
    written,
)
from aioserver.wings.anthropic import wire

_START, _DELTA, _STOP = "content_block_start", "content_block_delta", "content_block_stop"
_BLOCK = frozenset({_START, _DELTA, _STOP})
_TEXT = "text"
_THOUGHTS = frozenset({"thinking", "redacted_thinking"})
# The kind of a block that the rest is without.
_LEFT_OUT = "left out"
# Deltas of thoughts, and of text.
_THINKING = frozenset({"thinking_delta", "signature_delta"})
_TEXT_DELTA = "text_delta"
_OPENING = frozenset({"message_start", "ping"})


class MessagesTranscript(PassedTranscript):
    """The transcript of a message whose events pass."""

    def __init__(self, *, keeps_text: bool = True) -> None:
        super().__init__(keeps_text=keeps_text)
        # The index of the newest block, and whether it is open.
        self._index = -1
        self._in_text = False

    def text(self) -> str | None:
        """Return the text, as `Transcript.text`; None if it is empty: reasoning is signed."""
        return super().text() or None

    def rest(self, earlier: Tokens) -> MessageRest:
        """Return the writer of the rest, as `Transcript.rest`."""
        return MessageRest(self._index, earlier, in_text=self._in_text)

    def _read(self, event: bytes) -> None:
        content = wire.content_of(event)
        match content.get("type"):
            case "message_start" | "ping":
                pass
            case "content_block_start":
                block = content["content_block"]
                self._index, kind = content["index"], block["type"]
                self._in_text = kind == _TEXT
                wordless = kind == wire.FALLBACK or (kind in _THOUGHTS and not self._text)
                if kind != _TEXT and not wordless:
                    raise BadEvent("more than text")
                self._text += block.get("text", "").encode()
            case "content_block_delta":
                delta = content["delta"]
                if self._in_text and delta["type"] == _TEXT_DELTA:
                    self._text += delta["text"].encode()
                    self._events += 1
                elif self._in_text or delta["type"] not in _THINKING:
                    raise BadEvent("more than text")
            case "content_block_stop":
                self._in_text = False
            case _:
                raise BadEvent("the answer has a finish")


class MessageRest(Rest):
    """Takes the events of a message apart, and writes them behind those of another one.

    *index* is that of the other one's newest block; *in_text*: this is a block of text, and open.
    """

    def __init__(self, index: int, earlier: Tokens, *, in_text: bool) -> None:
        self._index = index
        self._in_text = in_text
        self._earlier = earlier
        self._asked: dict[str, Any] = {}
        # By index in this answer: the kinds of its open blocks; and for shown blocks without text,
        # their indexes behind the seam.
        self._kinds: dict[object, object] = {}
        self._indexes: dict[object, int] = {}
        self._halves = Halves()
        # Whether a text has come.
        self._heard = False

    def take(self, data: bytes) -> tuple[str, dict[str, Any] | None]:
        """Return the text of an event, and its remainder, as `Rest.take`."""
        content = loaded(data)
        kind = content.get("type")
        if kind == "error" or isinstance(content.get("error"), dict):
            raise ErrorEvent(content.get("error"))
        try:
            if kind in _OPENING:
                self._asked |= wire.usage_in(content)
                return "", None
            if kind == _START:
                return self._start(content)
            if kind == _DELTA:
                return self._delta(content)
            if kind == _STOP:
                own = self._kinds.pop(content["index"], None)
                return "", None if own == _LEFT_OUT else content
        except (KeyError, TypeError, AttributeError):
            raise BadEvent("the provider sent an event without its members") from None
        if not isinstance(kind, str):
            raise BadEvent("the provider sent an event without a type")
        if kind == "message_delta":
            # Counts that are left out have not changed.
            usage = self._asked | wire.usage_in(content)
            asked, answered = self._earlier
            counts = {"input_tokens": asked, "output_tokens": answered}
            content["usage"] = summed(usage, counts)
            if isinstance(iterations := content["usage"].get("iterations"), list):
                content["usage"]["iterations"] = [{"type": "message", **counts}, *iterations]
        return self._halves.join("", last=True), content

    def text(self, text: str) -> bytes:
        """Return the event of a *text*, in the open block, or in a new one."""
        opening = b""
        if not self._in_text:
            self._in_text, self._index = True, self._index + 1
            block = {"type": _TEXT, "text": ""}
            opening = _event({"type": _START, "index": self._index, "content_block": block})
        delta = {"type": _TEXT_DELTA, "text": text}
        return opening + _event({"type": _DELTA, "index": self._index, "delta": delta})

    def event(self, content: dict[str, Any]) -> bytes:
        """Return the remainder of an event, as `Rest.event`, in or behind the block of text."""
        kind = content["type"]
        own = content["index"] if kind in _BLOCK else None
        if kind == _STOP and own not in self._indexes:
            return self._closing()
        closing = b"" if kind == _DELTA else self._closing()
        if kind == _START:
            self._index += 1
            self._indexes[own] = self._index
        if own in self._indexes:
            content["index"] = self._indexes[own]
        return closing + _event(content)

    def _start(self, content: dict[str, Any]) -> tuple[str, dict[str, Any] | None]:
        block = content["content_block"]
        kind = block["type"]
        if kind in _THOUGHTS or (kind == wire.FALLBACK and not self._heard):
            kind = _LEFT_OUT
        self._kinds[content["index"]] = kind
        if kind == _TEXT:
            return self._halves.join(block.get("text", ""), last=False), None
        return "", None if kind == _LEFT_OUT else content

    def _delta(self, content: dict[str, Any]) -> tuple[str, dict[str, Any] | None]:
        delta, kind = content["delta"], self._kinds.get(content["index"])
        if kind == _TEXT and delta["type"] == _TEXT_DELTA:
            self._heard = True
            return self._halves.join(delta["text"], last=False), None
        # A citation refers to a text that has begun elsewhere.
        return "", None if kind in {_TEXT, _LEFT_OUT} else content

    def _closing(self) -> bytes:
        """Return the end of the block of text, if one is open."""
        if not self._in_text:
            return b""
        self._in_text = False
        return _event({"type": _STOP, "index": self._index})


def _event(content: dict[str, Any]) -> bytes:
    return eventstream.write(written(content), event=without_halves(content["type"]))
