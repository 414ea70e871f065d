"""Lookups in the body of a whole answer: the model's text, and whether a response is final.

Such a body may have many megabytes, and parsing it would stop the event loop for a second. Here it
is walked through in steps along a path, without building anything: what is not
on the path is skipped. A body is what a provider has sent, and need not be JSON.
"""

from __future__ import annotations

import re
from functools import cache

import orjson

from aioserver.errors import InvalidJson
from aioserver.protocol.json_body import at_once, pause, sound

# Bytes that are walked through in one step, which takes a few milliseconds at most. It is also
# about the size of a piece of text.
STEP_BYTES = 1 << 15
# Bytes of a value that is read: an id, or a status.
MAX_VALUE_BYTES = 1024
FINAL_STATUSES = ("completed", "incomplete", "failed", "cancelled")
# The patterns are possessive, and so take a time that is proportional to what they match.
_SPACE = re.compile(rb"[ \t\r\n]*+")
_INSIDE = rb'(?:[^"\\]++|\\.)*+'
_STRING = re.compile(_INSIDE, re.DOTALL)
_SCALAR = re.compile(rb'[^,"\[\]{} \t\r\n]*+')
_OPENING, _CLOSING = re.compile(rb"[\[{]*+"), re.compile(rb"[\]}]*+")
# An object or an array that has no other in it, and no string.
_LEAF = rb'\{[^"\[\]{}]*+\}|\[[^"\[\]{}]*+\]'
# The content between the brackets of an object or an array, as far as it is simple.
_CONTENT = re.compile(rb'(?:[^"\[\]{}]++|"%b"|%b)*+' % (_INSIDE, _LEAF), re.DOTALL)
_QUOTE, _BRACE, _BRACKET, _END_BRACE, _END_BRACKET = b'"{[}]'
# What may stand in a JSON string (RFC 8259, 7), as far as it is whole.
_TEXT = re.compile(rb'(?:[^"\\\x00-\x1f]++|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*+')
_LOW_HALF = re.compile(rb"\\u[dD][c-fC-F][0-9a-fA-F]{2}")


class _Missing(ValueError):
    """There is nothing at this path, or the body is not JSON."""


class _Walk:
    """A walk through *body*.

    Each method moves `place`, and pauses after about STEP_BYTES of it.
    """

    __slots__ = ("_pause_at", "body", "place")

    def __init__(self, body: bytes) -> None:
        self.body = body
        self.place = 0
        self._pause_at = STEP_BYTES

    async def find(self, *path: str | int) -> None:
        """Go to the value at *path*: the names of members, and indices of elements.

        Raises:
            _Missing: there is none.
        """
        await self._past(_SPACE)
        for part in path:
            if isinstance(part, str):
                await self._member(part)
            else:
                await self._element(part)

    async def text(self) -> list[slice]:
        """Return the pieces of the string at this place, without its quotes.

        No piece ends within a character.

        Raises:
            _Missing: there is no string, or it is not valid.
        """
        self._expect(b'"')
        body, pieces = self.body, []
        while True:
            start = self.place
            stop = self._match(_TEXT)
            if stop == start:
                break
            # A piece has the whole of a pair of surrogates, and of a character in UTF-8.
            if _LOW_HALF.match(body, stop):
                stop += 6
            while stop < len(body) and body[stop] & 0xC0 == 0x80:
                stop += 1
            piece = slice(start, stop)
            try:
                at_once(sound(body[piece]))
            except InvalidJson:
                raise _Missing from None
            pieces.append(piece)
            self.place = stop
            await self._pause_if_due()
        self._expect(b'"')
        return pieces

    async def value(self) -> object:
        """Return the scalar or the short string at this place.

        Raises:
            _Missing: it is another value.
        """
        start = self.place
        await self._skip()
        if self.place - start > MAX_VALUE_BYTES:
            raise _Missing
        try:
            return orjson.loads(self.body[start : self.place])
        except orjson.JSONDecodeError:
            raise _Missing from None

    async def _member(self, name: str) -> None:
        """Go from the start of an object to the value of its first member *name*."""
        self._expect(b"{")
        await self._past(_SPACE)
        key, others = b'"%b"' % name.encode(), _others(name)
        while True:
            # Simple members are many, or they are the large ones: no loop is needed for them.
            await self._past(others)
            # The last of them may be cut behind its comma.
            await self._past(_SPACE)
            start = self.place
            self._expect(b'"')
            await self._past(_STRING)
            self._expect(b'"')
            matches = self.place - start == len(key) and self.body.startswith(key, start)
            await self._past(_SPACE)
            self._expect(b":")
            await self._past(_SPACE)
            if matches:
                return
            await self._skip()
            await self._past(_SPACE)
            self._expect(b",")
            await self._past(_SPACE)

    async def _element(self, index: int) -> None:
        """Go from the start of an array to its element *index*."""
        self._expect(b"[")
        await self._past(_SPACE)
        for _ in range(index):
            await self._skip()
            await self._past(_SPACE)
            self._expect(b",")
            await self._past(_SPACE)

    async def _skip(self) -> None:
        """Go past the value at this place."""
        body, depth = self.body, 0
        while True:
            start = self.place
            byte = body[start] if start < len(body) else -1
            if byte == _QUOTE:
                self.place += 1
                await self._past(_STRING)
                self._expect(b'"')
            elif byte in (_BRACE, _BRACKET):
                self.place = self._match(_OPENING)
                depth += self.place - start
            elif depth and byte in (_END_BRACE, _END_BRACKET):
                self.place = min(self._match(_CLOSING), start + depth)
                depth -= self.place - start
            elif depth:
                self.place = self._match(_CONTENT)
            else:
                await self._past(_SCALAR)
            if self.place == start:
                raise _Missing
            if not depth:
                return
            if self.place >= self._pause_at:
                await self._pause_if_due()

    async def _past(self, pattern: re.Pattern[bytes]) -> None:
        """Go past what *pattern* matches, however long it is."""
        while (stop := self._match(pattern)) > self.place:
            self.place = stop
            await self._pause_if_due()

    def _match(self, pattern: re.Pattern[bytes]) -> int:
        match = pattern.match(self.body, self.place, self.place + STEP_BYTES)
        return self.place if match is None else match.end()

    def _expect(self, character: bytes) -> None:
        if not self.body.startswith(character, self.place):
            raise _Missing
        self.place += 1

    async def _pause_if_due(self) -> None:
        if self.place >= self._pause_at:
            self._pause_at = self.place + STEP_BYTES // 2
            await pause()


@cache
def _others(name: str) -> re.Pattern[bytes]:
    """Return the pattern of members that are simple, and have another name than *name*."""
    space = _SPACE.pattern
    value = rb'"%b"|[^,"\[\]{} \t\r\n]++|%b' % (_INSIDE, _LEAF)
    member = rb'(?!"%b")"%b"%b:%b(?:%b)%b,%b'
    parts = (re.escape(name).encode(), _INSIDE, space, space, value, space, space)
    return re.compile(rb"(?:%b)*+" % (member % parts), re.DOTALL)


async def text_pieces(body: bytes) -> list[slice]:
    """Return where the text of a whole chat completion stands in *body*, in pieces of STEP_BYTES
    about.

    A piece is the inside of a JSON string, as it is written; lone surrogates may be in it. There
    is none if the body has no text, or is no chat completion.
    """
    walk = _Walk(body)
    try:
        await walk.find("choices", 0, "message", "content")
        return await walk.text()
    except _Missing:
        return []


async def string_pieces(text: bytes) -> list[slice]:
    """Return the pieces of *text*, a JSON string, as `text_pieces` does; none if it is not
    valid.
    """
    try:
        return await _Walk(text).text()
    except _Missing:
        return []


async def final_response(body: bytes) -> str | None:
    """Return the id of a whole `response` object that will not change any more, or None.

    A client asks again for a response that runs in the background, so only its final state is
    kept.
    """
    try:
        walk = _Walk(body)
        await walk.find("status")
        if await walk.value() not in FINAL_STATUSES:
            return None
        walk = _Walk(body)
        await walk.find("id")
        name = await walk.value()
    except _Missing:
        return None
    return name if isinstance(name, str) and name else None
