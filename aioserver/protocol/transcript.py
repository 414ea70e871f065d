"""The transcript of an answer so far, and its continuation by another answer: chat completions.

An answer that breaks off after text can be continued (gateway/continuation.py). For that its text
is kept as its readers have seen it, with everything that later events depend on:

    Transcript              the text, and what events behind the seam take over
        PassedTranscript    of an answer whose bytes pass: its events are kept as they come, and
                            read at each 64 KiB, or when the text is needed
            ChatTranscript  of chat completions
        ReadTranscript      of an answer whose events a `Reading` reads anyway
    Rest                    takes the events of the other answer apart, each into its text and the
                            remainder, and writes them as the first answer would have gone on:
                            without a second role, with its id, and with the usage of both
        ChatRest            of chat completions

This file is one concept: the kept part of an answer decides how another one continues it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from aioserver.protocol import eventstream
from aioserver.protocol.openai import (
    SILENT,
    BadEvent,
    ErrorEvent,
    Reading,
    bounded,
    learn,
    load_with_surrogates,
    says_more,
    without_halves,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aioserver.protocol.openai import Shape

# Bytes of events that are kept before they are read.
FOLD_BYTES = 1 << 16
# The most bytes of a text that can be continued.
MAX_TRANSCRIPT = 1 << 18
# Bytes by which the kept part may grow before it is counted.
COUNT_BYTES = 1 << 13
# Events of an answer from which its shape is learned.
MAX_SHAPE_SAMPLES = 4
DONE = b"data: [DONE]\n\n"
_REASONING = SILENT - {"role", "content"}
# The members of a chunk that belong to the answer and not to its model.
_IDENTITY = ("id", "created")


class Tokens(NamedTuple):
    """The tokens that attempts have cost: those of their prompts, and those of their answers."""

    asked: int = 0
    answered: int = 0


class Transcript(ABC):
    """The transcript of an answer so far, as its readers have seen it."""

    # Whether its request is known to allow a continuation.
    checked: bool = False

    @property
    @abstractmethod
    def size(self) -> int:
        """The bytes that are kept for it alone."""

    @property
    @abstractmethod
    def events(self) -> int:
        """The number of events with text, as far as `text` has read them."""

    @abstractmethod
    def text(self) -> str | None:
        """Return the text, if the answer can go on behind it; None otherwise.

        It cannot if anything but text, perhaps after reasoning, was shown, if the answer has a
        finish, or if the text has more than MAX_TRANSCRIPT bytes. The text is empty if nothing but
        reasoning was shown, which another attempt does not go on with.
        """

    @abstractmethod
    def rest(self, earlier: Tokens) -> Rest:
        """Return the object that writes the rest; *earlier* are the tokens of all attempts so far."""

    def add(self, block: bytes) -> bool:  # noqa: ARG002 - of some it is kept elsewhere
        """Keep *block*, whole events that are shown now; return whether `size` has grown so much
        that it must be counted again.
        """
        return False

    def drop(self) -> None:  # noqa: B027 - of some nothing is kept
        """Forget everything: the answer can no longer be continued."""


class PassedTranscript(Transcript):
    """The transcript of an answer whose bytes pass.

    Always: `blocks` has the events that were not read yet, at most FOLD_BYTES of them and one
    block. Without *keeps_text* all is forgotten once there is a text.
    """

    def __init__(self, *, keeps_text: bool = True) -> None:
        self._max_text = MAX_TRANSCRIPT if keeps_text else 0
        # The whole events; the fast path adds to them.
        self.blocks = bytearray()
        # UTF-8.
        self._text = bytearray()
        self._events = 0
        self._lost = False
        # The bytes in `blocks` above which the kept part must be counted again.
        self.mark = COUNT_BYTES

    @property
    def size(self) -> int:
        """The number of kept bytes."""
        return len(self.blocks) + len(self._text)

    @property
    def events(self) -> int:
        """The number of events with text."""
        return self._events

    @property
    def keeps(self) -> bool:
        """Whether it needs the events to come."""
        if not self._max_text:
            self._fold()
        return not self._lost

    def add(self, block: bytes) -> bool:
        """Keep *block*, events that pass now, as `Transcript.add`."""
        self.blocks += block
        return len(self.blocks) > self.mark and self.grown()

    def grown(self) -> bool:
        """Return True, since `blocks` has more than `mark`; the events are read if there are many."""
        if len(self.blocks) > FOLD_BYTES:
            self._fold()
        self.mark = len(self.blocks) + COUNT_BYTES
        return True

    def text(self) -> str | None:
        """Return the text, as `Transcript.text`."""
        self._fold()
        return None if self._lost else self._text.decode()

    def drop(self) -> None:
        """Forget everything, as `Transcript.drop`."""
        self._lost = True
        # Cleared and not replaced, since the fast path adds to this very object.
        self.blocks.clear()
        self._text = bytearray()

    def _fold(self) -> None:
        """Read the events that were not read yet."""
        block = bytes(self.blocks)
        self.blocks.clear()
        if self._lost or not block:
            return
        try:
            for event in eventstream.split(block):
                self._read(event)
            over = len(self._text) > self._max_text
        except (BadEvent, ValueError, AttributeError, TypeError):
            # For example half of a character that the provider has cut in two.
            over = True
        if over:
            self.drop()

    @abstractmethod
    def _read(self, event: bytes) -> None:
        """Read *event*, and add its text.

        Raises:
            BadEvent, ValueError, AttributeError, TypeError: the answer cannot be continued
                after it.
        """


class ChatTranscript(PassedTranscript):
    """The transcript of a chat completion whose bytes pass."""

    def __init__(self, *, keeps_text: bool = True) -> None:
        super().__init__(keeps_text=keeps_text)
        self._head: dict[str, Any] = {}
        self._shape: Shape | None = None
        self._samples_left = MAX_SHAPE_SAMPLES if keeps_text else 0

    def rest(self, earlier: Tokens) -> ChatRest:
        """Return the object that writes the rest, as `Transcript.rest`."""
        return ChatRest(earlier, self._head)

    def _read(self, event: bytes) -> None:
        if self._shape is not None:
            plain = self._shape.text_in(event)
            if plain is not None:
                self._text += plain
                self._events += 1
                return
        for part in eventstream.parse(event):
            text = self._text_of(part.data)
            if text and self._samples_left:
                self._samples_left -= 1
                self._shape = learn(event, Reading()) or self._shape
            self._text += text.encode()
            self._events += bool(text)

    def _text_of(self, data: bytes) -> str:
        content = loaded(data)
        if not self._head:
            self._head = {name: content[name] for name in _IDENTITY if name in content}
        text = ""
        for choice in content.get("choices") or ():
            delta = choice.get("delta") or {}
            own = delta.get("content")
            if says_more(delta) or choice.get("finish_reason") is not None:
                raise BadEvent("more than text")
            if isinstance(own, str) and own:
                if choice.get("index", 0):
                    raise BadEvent("more than one choice")
                text += own
            elif self._text and any(delta.get(name) for name in _REASONING):
                raise BadEvent("reasoning behind text")
        return text


class ReadTranscript(Transcript):
    """The transcript of an answer whose events *reading* reads."""

    # The sink counts the reading.
    size = 0

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        reading.max_text_bytes = max(reading.max_text_bytes, MAX_TRANSCRIPT + 1)

    @property
    def events(self) -> int:
        """The number of events with text."""
        return self._reading.texts

    def text(self) -> str | None:
        """Return the text, as `Transcript.text`."""
        reading = self._reading
        if not reading.only_text or reading.finish_reason is not None:
            return None
        return reading.text if reading.size <= MAX_TRANSCRIPT else None

    def rest(self, earlier: Tokens) -> ChatRest:
        """Return the object that writes the rest, as `Transcript.rest`."""
        # Half characters that were not shown belong to an answer that has ended.
        self._reading.half.clear()
        return ChatRest(earlier, index=self._reading.choice_index)


class Rest(ABC):
    """Takes the events of another answer apart, and writes them as those of the first one."""

    @abstractmethod
    def take(self, data: bytes) -> tuple[str, dict[str, Any] | None]:
        """Return the text of an event with this *data*, and its remaining content, to be written
        behind that text; None if nothing remains.

        Raises:
            BadEvent: it is not an event of this API.
            ErrorEvent: it reports an error.
        """

    @abstractmethod
    def text(self, text: str) -> bytes:
        """Return the event of a *text*; `take` must have been called before."""

    @abstractmethod
    def event(self, content: dict[str, Any]) -> bytes:
        """Return the remaining content of `take` as an event, once the text before it is written.

        Raises:
            BadEvent: it is nested too deeply.
        """


class ChatRest(Rest):
    """Takes the chunks of a chat completion apart.

    The chunks behind the seam have the members of *head* from the first answer, and a usage with
    the *earlier* tokens added. Only the text of the choice with this *index* counts.
    """

    def __init__(
        self, earlier: Tokens, head: Mapping[str, Any] | None = None, index: int = 0
    ) -> None:
        self._head = head or {}
        self._usage = {
            "prompt_tokens": earlier.asked,
            "completion_tokens": earlier.answered,
            "total_tokens": earlier.asked + earlier.answered,
        }
        self._index = index
        # The members of the newest chunk beside its choices and its usage.
        self._frame: dict[str, Any] = {}
        self._halves = Halves()

    def take(self, data: bytes) -> tuple[str, dict[str, Any] | None]:
        """Return the text of a chunk, and its remaining content, as `Rest.take`."""
        if data.strip() == b"[DONE]":
            return "", {}
        content = loaded(data)
        if error := content.get("error"):
            raise ErrorEvent(error)
        content |= self._head
        usage = content.pop("usage", None)
        choices = content.pop("choices", None) or []
        self._frame = {name: value for name, value in content.items() if name != "x_groq"}
        text, remaining = "", []
        for choice in choices if isinstance(choices, list) else ():
            delta = choice.get("delta") if isinstance(choice, dict) else None
            if not isinstance(delta, dict):
                continue
            own = delta.get("content")
            if isinstance(own, str) and choice.get("index", 0) == self._index:
                text += own
            if says_more(delta) or choice.get("finish_reason") is not None:
                more = {name: value for name, value in delta.items() if name not in SILENT}
                remaining.append({**choice, "delta": more})
        text = self._halves.join(text, last=bool(remaining))
        # Some send a usage with each chunk: only that of the last one counts.
        if remaining or (usage is not None and not text and not choices) or "x_groq" in content:
            content["choices"] = remaining
            if isinstance(usage, dict):
                content["usage"] = summed(usage, self._usage)
            _add_to_groq(content, self._usage)
            return text, content
        return text, None

    def event(self, content: dict[str, Any]) -> bytes:
        """Return the remaining content of a chunk, as `Rest.event`; the end mark if it is empty."""
        return eventstream.write(written(content)) if content else DONE

    def text(self, text: str) -> bytes:
        """Return the chunk of a *text*."""
        choice = {"index": self._index, "delta": {"content": text}, "finish_reason": None}
        return eventstream.write(written({**self._frame, "choices": [choice]}))


class Halves:
    """Joins the halves of characters that a provider has split over two texts."""

    def __init__(self) -> None:
        self._half = ""

    def join(self, text: str, *, last: bool) -> str:
        """Return *text* with the half that came before it; a half at its end is kept, unless it is
        the *last*.
        """
        text, self._half = self._half + text, ""
        if text and not last and "\ud800" <= text[-1] <= "\udbff":
            text, self._half = text[:-1], text[-1]
        joined: str = without_halves(text)
        return joined


def loaded(data: bytes) -> dict[str, Any]:
    """Return the object in *data*.

    Raises:
        BadEvent: *data* is not an object.
    """
    try:
        content = orjson.loads(data)
    except orjson.JSONDecodeError:
        content = load_with_surrogates(data)
    if not isinstance(content, dict):
        raise BadEvent("the provider sent an event that is not an object")
    return content


def written(content: Mapping[str, Any]) -> bytes:
    """Return *content* as JSON, with U+FFFD for halves of characters.

    Raises:
        BadEvent: it is nested too deeply.
    """
    try:
        return orjson.dumps(content)
    except orjson.JSONEncodeError:
        pass
    try:
        return orjson.dumps(without_halves(content))
    except (orjson.JSONEncodeError, RecursionError):
        raise BadEvent("the provider's event is nested too deeply") from None


def summed(usage: dict[str, Any], earlier: Mapping[str, int]) -> dict[str, Any]:
    """Return *usage* with the tokens of *earlier* added, under their names."""
    counted = bounded(usage)
    return counted | {
        name: count + number
        for name, count in earlier.items()
        if isinstance(number := counted.get(name, 0), int)
    }


def _add_to_groq(content: dict[str, Any], earlier: Mapping[str, int]) -> None:
    """Add the tokens of *earlier* to the usage in Groq's place, if *content* has it there."""
    groq = content.get("x_groq")
    if isinstance(groq, dict) and isinstance(usage := groq.get("usage"), dict):
        content["x_groq"] = {**groq, "usage": summed(usage, earlier)}
