"""The order of the messages of a chat, as strict engines require it, whatever the client's order.

Templates of many models take one system message, in front, and roles that alternate; engines want
each `tool` message directly behind its call. So adjacent messages of one role become one message.
A user's turn is held until the assistant's next turn: first come the results, in the order of the
calls, and then one message with everything else, the pictures of the results first. A call without
a result gets an empty one, and a result without a call becomes a text of the user. A later system
message becomes a text of the user in its place, between lines `<system-reminder>`: in front it
would change the prefix that an engine has cached.

Earlier messages are a prefix of later ones: nothing depends on the number of turns.
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

    # The pieces of which messages are joined.
    Bytes = bytes | memoryview

# The separators between two texts of one message, and between those of two messages: JSON, without
# quotes.
LINE, PARAGRAPH = b"\\n", b"\\n\\n"
EMPTY = b'""'
# The beginnings by which clients mark a result as an error.
_FAILED = (b'"Error: ', b'"<tool_use_error>')
# The result of a tool that has no text, but pictures.
_SHOWN_BELOW = b'"(see the next message)"'
_BLANK = re.compile(rb'"(?: |\\[nrtf])*+"')
# The most calls that await results, which is more than a model makes at once.
MAX_OPEN_CALLS = 1000


class Piece(NamedTuple):
    """A piece of a user's message: a text, as a JSON string, with the separator *between* it and
    the text before it; or another part, such as a picture.
    """

    content: bytes
    between: bytes = LINE
    text: bool = True


class _Content:
    """The content of a user's message, which grows piece by piece: one text, since some engines
    take nothing else, or a list of parts. It is joined of bytes that are written as they come.
    """

    __slots__ = ("_joined", "_listed", "_within_text")

    def __init__(self) -> None:
        self._joined: list[Bytes] = []
        self._within_text = self._listed = False

    def __bool__(self) -> bool:
        """Whether it is not empty."""
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
        """Return its pieces, with the parts *first* in front, each behind a comma."""
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

    *reasoning_field* is the provider's name for the reasoning of a message; empty if it has none.
    `pictures` counts the parts that are not text, and `picture_bytes` their bytes. Texts are JSON
    strings.

    Always: a `tool` message stands directly behind its call, with at most other `tool` messages
    between; at most one system message, in front; no two adjacent messages of one role, except
    `tool`.
    """

    def __init__(self, reasoning_field: str = "") -> None:
        self._reasoning_field = reasoning_field.encode()
        self.pictures = self.picture_bytes = 0
        self._messages: list[bytes] = []
        # The messages before them, many joined as one.
        self._joined: list[bytes] = []
        # Texts of the system, until another message comes.
        self._system: list[bytes] = []
        # The message of the assistant that is under way.
        self._said: list[Bytes] = []
        self._reasoning: list[bytes] = []
        self._calls: list[bytes] = []
        # A `tool` message for each call of the last message of the assistant, empty until its
        # result has come; and, by the ids of the calls, the places of the empty ones.
        self._results: list[bytes] = []
        self._awaited: dict[str, list[int]] = {}
        # The user's turn that is under way: the pictures of results, and its other parts.
        self._below: list[Bytes] = []
        self._asked = _Content()
        self._steps = Steps()

    def instruct(self, text: bytes) -> None:
        """Add a *text* of the system: in front, or as a user's text if there were messages before."""
        if text == EMPTY:
            return
        if not (self._messages or self._joined or self._asked or self._speaking):
            self._system.append(text)
        else:
            reminder = b'"<system-reminder>\\n%b\\n</system-reminder>"' % text[1:-1]
            self.ask(Piece(reminder, PARAGRAPH))

    def ask(self, piece: Piece) -> None:
        """Add a *piece* of a user's message."""
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
        """Add a *text* of the assistant's reasoning, which belongs to its present or next message
        or call.
        """
        if self._reasoning_field and text != EMPTY:
            self._reasoning.append(text)

    def call(self, call_id: str, name: str, arguments: bytes, param: str) -> None:
        """Add a call of the function *name* by the assistant; its *arguments* are a JSON string.

        Raises:
            InvalidRequest: there are too many calls; *param* names this one.
        """
        self._close_user()
        number = len(self._results)
        if number >= MAX_OPEN_CALLS:
            raise InvalidRequest(f"more than {MAX_OPEN_CALLS} calls in a turn", param=param)
        self._awaited.setdefault(call_id, []).append(number)
        self._results.append(_result(call_id, EMPTY))
        form = b'%b{"id":%b,"type":"function","function":{"name":%b,"arguments":'
        head = form % (b"," if number else b"", orjson.dumps(call_id), orjson.dumps(name))
        # Megabytes of arguments must be copied as rarely as possible.
        self._calls += (head, arguments, b"}}")

    async def step(self, size: int) -> None:
        """Pause if that is due, since a piece of *size* bytes was added."""
        if self._steps.over(size):
            if self._messages:
                # Joining now leaves few pieces for the end.
                self._joined.append(b",".join(self._messages))
                self._messages.clear()
            await pause()

    def finish(self) -> list[bytes]:
        """Return all messages, with commas between them."""
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
        """Add the user's turn: the results, and one message with everything else."""
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
        """Add the assistant's message; reasoning without one after it is dropped."""
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
    """Return *text* without its quotes; a large text is not copied."""
    return text[1:-1] if len(text) < LARGE_BYTES else memoryview(text)[1:-1]
