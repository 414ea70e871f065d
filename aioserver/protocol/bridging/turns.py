"""The order of the messages of a chat, as strict engines want it, whatever order a client has.

Templates of many models take one system message, in front, and roles that alternate; engines want
each `tool` message directly behind its call. So neighbours of one role become one message, and a
turn of the user is kept until the next of the assistant: then come the results, in the order of
the calls, and one message with all else, first the pictures of the results. A call without a
result gets an empty one, and a result without a call is a text of the user. A later system message
is a text of the user in its place, between lines `<system-reminder>`: in front it would change what
an engine has in its prefix cache.

What was said is a prefix of what is said later: nothing depends on how many turns there are.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

import orjson

from aioserver.errors import InvalidRequest
from aioserver.protocol.bridging.reading import join, members
from aioserver.protocol.json_body import pause

if TYPE_CHECKING:
    from collections.abc import Iterable

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
# Pieces of messages, and bytes of them, that are added in one step.
STEP_PIECES, STEP_BYTES = 64, 1 << 16


class Piece(NamedTuple):
    """A piece of what a user says: a text, a JSON string, and what stands *between* it and a text
    before it; or a part that is no text, such as a picture.
    """

    content: bytes
    between: bytes = LINE
    text: bool = True


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
        self._said: list[bytes] = []
        self._reasoning: list[bytes] = []
        self._calls: list[bytes] = []
        # A `tool` message for each call of the last message of the assistant, empty until its
        # result has come, and the places of those that are empty by the ids of the calls.
        self._results: list[bytes] = []
        self._awaited: dict[str, list[int]] = {}
        # The turn of the user that is under way: the pictures of results, and pieces of its message.
        self._below: list[Piece] = []
        self._pieces: list[Piece] = []
        # Bytes and pieces since the last pause.
        self._steps = 0

    def instruct(self, text: bytes) -> None:
        """Add a *text* of the system: in front, or as one of the user if anything was said."""
        if text == EMPTY:
            return
        if not (self._messages or self._joined or self._pieces or self._speaking):
            self._system.append(text)
        else:
            reminder = b'"<system-reminder>\\n%b\\n</system-reminder>"' % text[1:-1]
            self.ask(Piece(reminder, PARAGRAPH))

    def ask(self, piece: Piece) -> None:
        """Add a *piece* of what the user says."""
        if piece.content != EMPTY:
            self._close_assistant()
            self._count(piece)
            self._pieces.append(piece)

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
            self._below += others
            for each in others:
                self._count(each)
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
        self._said.append(text[1:-1])

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
        if len(self._calls) >= MAX_OPEN_CALLS:
            raise InvalidRequest(f"more than {MAX_OPEN_CALLS} calls in a turn", param=param)
        self._awaited.setdefault(call_id, []).append(len(self._calls))
        self._results.append(_result(call_id, EMPTY))
        self._calls.append(
            b'{"id":%b,"type":"function","function":{"name":%b,"arguments":%b}}'
            % (orjson.dumps(call_id), orjson.dumps(name), arguments)
        )

    async def step(self, size: int) -> None:
        """Pause if that is due, since a piece of *size* bytes was added."""
        self._steps += size + STEP_BYTES // STEP_PIECES
        if self._steps >= STEP_BYTES:
            self._steps = 0
            if self._messages:
                # So that few are left to be joined at the end.
                self._joined.append(b",".join(self._messages))
                self._messages.clear()
            await pause()

    def finish(self) -> bytes:
        """Return all messages, joined by commas."""
        self._close_user()
        self._close_assistant()
        self._close_system()
        return b",".join((*self._joined, *self._messages))

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
        if pieces := self._below + self._pieces:
            self._messages.append(b'{"role":"user","content":%b}' % _content(pieces))
        self._results, self._awaited = [], {}
        self._below, self._pieces = [], []

    def _close_assistant(self) -> None:
        """Add the message of the assistant that is under way; reasoning that nothing followed is
        dropped.
        """
        reasoning, self._reasoning = self._reasoning, []
        if not self._speaking:
            return
        self._close_system()
        calls = b"[%b]" % b",".join(self._calls) if self._calls else b""
        thought = join(reasoning, LINE) if reasoning else b""
        text = b"".join((b'"', *self._said, b'"')) if self._said else b"null"
        more = members((b"tool_calls", calls), (self._reasoning_field, thought))
        self._messages.append(b'{"role":"assistant","content":%b%b}' % (text, more))
        self._said, self._calls = [], []

    def _close_system(self) -> None:
        if self._system:
            text = join(self._system, PARAGRAPH)
            self._messages.append(b'{"role":"system","content":%b}' % text)
            self._system = []


def _result(call_id: str, text: bytes) -> bytes:
    return b'{"role":"tool","tool_call_id":%b,"content":%b}' % (orjson.dumps(call_id), text)


def _content(pieces: list[Piece]) -> bytes:
    """Return the content of a message of *pieces*: one text, as some engines take no other, or
    parts.
    """
    parts: list[bytes] = []
    texts: list[bytes] = []
    for piece in pieces:
        if piece.text:
            if texts:
                texts.append(piece.between)
            texts.append(piece.content[1:-1])
            continue
        if texts:
            parts.append(b'{"type":"text","text":"%b"}' % b"".join(texts))
            texts = []
        parts.append(piece.content)
    if not parts:
        return b"".join((b'"', *texts, b'"'))
    if texts:
        parts.append(b'{"type":"text","text":"%b"}' % b"".join(texts))
    return b"[%b]" % b",".join(parts)
