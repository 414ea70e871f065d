"""The parts of a turn: the kinds of content that one event of a streamed answer can have.

A *turn* is one answer of a model to an agent: its reasoning, its text, its calls of tools, and a
finish. The part of an event decides whether it is held (providers/holding.py). An API reduces an
event to *words*, such as the members of a delta or the type of a block. An event with several
parts counts as the last one in the order of `Part`; an unknown word is text, so that it is shown
as it comes.
"""

from __future__ import annotations

import re
from contextlib import suppress
from enum import IntEnum, auto
from typing import TYPE_CHECKING, Any, NamedTuple

from aioserver.protocol.openai import BadEvent
from aioserver.protocol.transcript import loaded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


class Part(IntEnum):
    """The content of an event."""

    # A role, an id, the beginning or the end of a block, a comment.
    PREAMBLE = auto()
    REASONING = auto()
    TEXT = auto()
    # A call of a tool that the client runs; a tool that runs at the provider, or its result.
    CALL = auto()
    HOSTED = auto()
    # Nothing of the turn is missing but the end mark; the end mark itself.
    FINISH = auto()
    END = auto()
    # The turn has failed, or the event is not JSON.
    ERROR = auto()


class Parts(NamedTuple):
    """How an API writes the parts of a turn.

    Each event that `calls` holds has one of *marks*, or is `escaped`. An event that begins with
    *opening*, up to the brace of its data, and has no finish only continues the parts that earlier
    events have begun. *words* yields the words of an event's content, and *pattern* has a group for each part,
    by which it matches a word as a whole. *signs_reasoning*: reasoning is signed or encrypted, so
    that it must stay with the content behind it. An event of two lines that begins with
    *plain* begins no part: while nothing is held, it passes.
    """

    marks: tuple[bytes, ...]
    opening: re.Pattern[bytes]
    words: Callable[[dict[str, Any]], Iterable[str]]
    pattern: re.Pattern[str]
    signs_reasoning: bool = False
    plain: bytes | None = None

    def part(self, data: bytes) -> Part:
        """Return the part of an event with this *data*; without data it is a comment."""
        if not data:
            return Part.PREAMBLE
        if data.strip() == b"[DONE]":
            return Part.END
        try:
            content = loaded(data)
        except BadEvent:
            return Part.ERROR
        if content.get("error"):
            return Part.ERROR
        try:
            matches = [self.pattern.fullmatch(word) for word in self.words(content)]
        except (AttributeError, TypeError):
            return Part.TEXT
        found = (Part[str(match.lastgroup)] if match else Part.TEXT for match in matches)
        return max(found, default=Part.PREAMBLE)


class Choices:
    """The choices of a chat completion that have *begun*, and those *open*: without a finish yet.

    Always: a choice is open again when content of it follows its finish.
    """

    def __init__(self) -> None:
        self.begun: set[object] = set()
        self.open: set[object] = set()

    def note(self, data: bytes) -> None:
        """Note the choices in an event with this *data*, as far as they are choices."""
        try:
            content = loaded(data)
        except BadEvent:
            return
        with suppress(AttributeError, TypeError):
            for choice in content.get("choices") or ():
                index = choice.get("index")
                words = set(_chat_words({"choices": [choice]}))
                if "finish_reason" in words:
                    self.open.discard(index)
                elif words - {"role"} or index not in self.begun:
                    self.open.add(index)
                self.begun.add(index)


def _chat_words(content: dict[str, Any]) -> Iterator[str]:
    """Yield the members with a value in the choices of a chunk, and in their deltas."""
    for choice in content.get("choices") or ():
        for name in ("finish_reason", "text"):
            if choice.get(name):
                yield name
        for name, value in (choice.get("delta") or {}).items():
            if value:
                yield name


# JSON may write any letter as an escape (RFC 8259, 7): these are those of a small one, `_` and `.`.
# That of a sign like `<` or `é`, which some engines always write so, is none of them.
_LETTER = re.compile(rb"\\u00(?:2[eE]|5[fF]|[67])")
# The name of a finish, and how engines write that there is none yet.
FINISH = b"finish_reason"
UNFINISHED = (b'finish_reason":null', b'finish_reason": null')


def escaped(block: bytes) -> bool:
    """Return whether *block* may have a letter of an API's word as an escape."""
    # Most texts have no backslash, and one byte is found faster than several.
    return block.find(b"\\") >= 0 and _LETTER.search(block) is not None


def may_finish(block: bytes) -> bool:
    """Return whether an event of *block*, which is not `escaped`, may have a finish_reason."""
    at = block.find(FINISH)
    while at >= 0:
        if not block.startswith(UNFINISHED, at):
            return True
        at = block.find(FINISH, at + 1)
    return False


# `"tool_calls"` and `"function_call"` both have this.
CALL_MARK = b"_call"
CHAT_PARTS = Parts(
    (CALL_MARK,),
    re.compile(rb"data: \{"),
    _chat_words,
    re.compile(
        "(?P<PREAMBLE>role)|(?P<REASONING>reasoning(?:_content|_details)?)"
        "|(?P<CALL>tool_calls|function_call)|(?P<FINISH>finish_reason)"
    ),
)
