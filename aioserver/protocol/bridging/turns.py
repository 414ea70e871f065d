"""The order of the messages of a chat, as strict engines want it, whatever order a client has.

Templates of many models take one system message, in front, and roles that alternate; engines want
each `tool` message directly behind its call. So neighbours of one role become one message, and a
turn of the user is kept until the next of the assistant: then come the results, in the order of
the calls, and one message with all else, first the pictures of the results. A call without a
result gets an empty one, and a result without a call is a text of the user. A later system message
is a text of the user in its place, between lines `<system-reminder>`: in front it would change
what an engine has in its prefix cache.

What was said is a prefix of what is said later: nothing depends on how many turns there are.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

import orjson

from aioserver.errors import InvalidRequest
from aioserver.protocol.bridging.reading import LARGE_BYTES, join, members
from aioserver.protocol.steps import Steps, pause

if TYPE_CHECKING:
    from collections.abc import Iterable

    # What messages are joined of.
    Bytes = bytes | memoryview

# What stands between two texts of one message, and between those of two: JSON, without quotes.
LINE, PARAGRAPH = b"\\n", b"\\n\\n"
EMPTY = b'""'
# What a client writes in front of a result that is an error.
_FAILED = (b'"Error: ', b'"<tool_use_error>')
# The result of a tool that has no text, but pictures.
_SHOWN_BELOW = b'"(see the next message)"'
_BLANK = re.compile(rb'"(?: |\\[nrtf])*+"')
# Calls whose results are awaited at most, which is more than a model makes at once.
MAX_OPEN_CALLS = 1000


class Piece(NamedTuple):
    """A piece of what a user says: a text, a JSON string, and what stands *between* it and a text
    before it; or a part that is no text, such as a picture.
    """

    content: bytes
    between: bytes = LINE
    text: bool = True


class _Content:
    """The content of a message of the user, which grows piece by piece: one text, as some engines
    take no other, or a list of parts. It is joined of bytes that are written as they come.
    """

    __slots__ = ("_joined", "_listed", "_within_text")

    def __init__(self) -> None:
        self._joined: list[Bytes] = []
        self._within_text = self._listed = False

    def __bool__(self) -> bool:
        """Whether there is anything in it."""
        return bool(self._joined)

    def add(self, piece: Piece) -> None:
        """Add *piece*."""
        if piece.text:
            if self._within_text:
                self._joined.append(piece.between)
            else:
                self._joined += (b",", b'{"type":"text","text":"')
                self._within_text = True
            self._joined.append(_inner(piece.content))
        else:
            self._end_text()
            self._joined += (b",", piece.content)
            self._listed = True

    def finish(self, first: list[Bytes]) -> list[Bytes]:
        """Return what it is joined of, with the parts *first* in front, each behind a comma."""
        self._end_text()
        if self._listed or first:
            return [b"[", *(first + self._joined)[1:], b"]"]
        return [b'"', *self._joined[2:-1], b'"']

    def _end_text(self) -> None:
        if self._within_text:
            self._joined.append(b'"}')
            self._within_text = False


class Turns:
    """The messages of a chat, which grow piece by piece.

    *reasoning_field* is the name that the provider has for the reasoning of a message; empty if it
    has none. `pictures` counts what is no text, and `picture_bytes` its bytes. Texts are JSON
    strings.

    Always: a `tool` message stands directly behind its call, among others at most; one message of
    the system at most, in front; no two of one role are in a row, but for `tool`.
    """

    def __init__(self, reasoning_field: str = "") -> None:
        self._reasoning_field = reasoning_field.encode()
        self.pictures = self.picture_bytes = 0
        self._messages: list[bytes] = []
        # The messages before them, many joined as one.
        self._joined: list[bytes] = []
        # Texts of the system, until anything else comes.
        self._system: list[bytes] = []
        # The message of the assistant that is under way.
        self._said: list[Bytes] = []
        self._reasoning: list[bytes] = []
        self._calls: list[bytes] = []
        # A `tool` message for each call of the last message of the assistant, empty until its
        # result has come, and the places of those that are empty by the ids of the calls.
        self._results: list[bytes] = []
        self._awaited: dict[str, list[int]] = {}
        # The turn of the user that is under way: the pictures of results, and what else it says.
        self._below: list[Bytes] = []
        self._asked = _Content()
        self._steps = Steps()

    def instruct(self, text: bytes) -> None:
        """Add a *text* of the system: in front, or as one of the user if anything was said."""
        if text == EMPTY:
            return
        if not (self._messages or self._joined or self._asked or self._speaking):
            self._system.append(text)
        else:
            reminder = b'"<system-reminder>\\n%b\\n</system-reminder>"' % text[1:-1]
            self.ask(Piece(reminder, PARAGRAPH))

    def ask(self, piece: Piece) -> None:
        """Add a *piece* of what the user says."""
        if piece.content != EMPTY:
            self._close_assistant()
            self._count(piece)
            self._asked.add(piece)

    def answer(self, call_id: str, pieces: Iterable[Piece], *, failed: bool = False) -> None:
        """Add the result of the call *call_id*; *failed*: it is an error."""
        texts = [piece.content for piece in pieces if piece.text]
        others = [piece for piece in pieces if not piece.text]
        text = join(texts, LINE) if texts else EMPTY
        if text == EMPTY and others:
            text = _SHOWN_BELOW
        if failed and not text.startswith(_FAILED):
            text = b'"Error: %b' % text[1:]
        self._close_assistant()
        places = self._awaited.get(call_id)
        if places:
            self._results[places.pop(0)] = _result(call_id, text)
            for each in others:
                self._count(each)
                self._below += (b",", each.content)
        else:
            for each in (Piece(text), *others):
                self.ask(each)

    def say(self, text: bytes, between: bytes = LINE) -> None:
        """Add a *text* of the assistant."""
        if _BLANK.fullmatch(text):
            return
        self._close_user()
        if self._said:
            self._said.append(between)
        self._said.append(_inner(text))

    def think(self, text: bytes) -> None:
        """Add a *text* of the assistant's reasoning, which belongs to what it says or calls with
        it, or next.
        """
        if self._reasoning_field and text != EMPTY:
            self._reasoning.append(text)

    def call(self, call_id: str, name: str, arguments: bytes, param: str) -> None:
        """Add a call of the function *name* by the assistant; its *arguments* are a JSON string.

        Raises:
            InvalidRequest: there are too many; *param* names it.
        """
        self._close_user()
        number = len(self._results)
        if number >= MAX_OPEN_CALLS:
            raise InvalidRequest(f"more than {MAX_OPEN_CALLS} calls in a turn", param=param)
        self._awaited.setdefault(call_id, []).append(number)
        self._results.append(_result(call_id, EMPTY))
        form = b'%b{"id":%b,"type":"function","function":{"name":%b,"arguments":'
        head = form % (b"," if number else b"", orjson.dumps(call_id), orjson.dumps(name))
        # Megabytes of arguments are not copied more often than need be.
        self._calls += (head, arguments, b"}}")

    async def step(self, size: int) -> None:
        """Pause if that is due, since a piece of *size* bytes was added."""
        if self._steps.over(size):
            if self._messages:
                # So that few are left to be joined at the end.
                self._joined.append(b",".join(self._messages))
                self._messages.clear()
            await pause()

    def finish(self) -> list[bytes]:
        """Return all messages, and commas between them."""
        self._close_user()
        self._close_assistant()
        self._close_system()
        messages = (*self._joined, *self._messages)
        return [part for message in messages for part in (b",", message)][1:]

    @property
    def _speaking(self) -> bool:
        """Whether a message of the assistant is under way."""
        return bool(self._said or self._calls)

    def _count(self, piece: Piece) -> None:
        if not piece.text:
            self.pictures += 1
            self.picture_bytes += len(piece.content)

    def _close_user(self) -> None:
        """Add the turn of the user that is under way: the results, and one message of all else."""
        if self._speaking:
            return
        self._close_system()
        self._messages += self._results
        if self._below or self._asked:
            content = self._asked.finish(self._below)
            self._messages.append(b"".join((b'{"role":"user","content":', *content, b"}")))
        self._results, self._awaited = [], {}
        self._below, self._asked = [], _Content()

    def _close_assistant(self) -> None:
        """Add the message of the assistant that is under way; reasoning that nothing followed is
        dropped.
        """
        reasoning, self._reasoning = self._reasoning, []
        if not self._speaking:
            return
        self._close_system()
        parts: list[Bytes] = [b'{"role":"assistant","content":']
        parts += (b'"', *self._said, b'"') if self._said else (b"null",)
        if self._calls:
            parts += (b',"tool_calls":[', *self._calls, b"]")
        thought = join(reasoning, LINE) if reasoning else b""
        parts.append(members((self._reasoning_field, thought)))
        parts.append(b"}")
        self._messages.append(b"".join(parts))
        self._said, self._calls = [], []

    def _close_system(self) -> None:
        if self._system:
            text = join(self._system, PARAGRAPH)
            self._messages.append(b'{"role":"system","content":%b}' % text)
            self._system = []


def _result(call_id: str, text: bytes) -> bytes:
    return b'{"role":"tool","tool_call_id":%b,"content":%b}' % (orjson.dumps(call_id), text)


def _inner(text: bytes) -> Bytes:
    """Return *text* without its quotes; a large one is not copied."""
    return text[1:-1] if len(text) < LARGE_BYTES else memoryview(text)[1:-1]
