"""A member on the top level of a body, and its place in the bytes.

A body goes on as it came. If one value on its top level must be replaced, its place in the bytes
is searched for. If a key occurs there several times, the place is that of the last value, which
decoders read: a request must not be served by another value than the checked value.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from msgspec import Raw

from aioserver.errors import InvalidRequest
from aioserver.protocol.json_body import ABSENT

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# Places in one body, on all its levels, where a key with one value may be, and where one with a
# long value may.
MAX_PLACES, MAX_LONG_PLACES = 10_000, 100
_SPACE = rb"[ \t\r\n]*"
_COLON = re.compile(_SPACE + b":" + _SPACE)
_START = re.compile(_SPACE + rb"\{" + _SPACE)
_COMMA_AFTER = re.compile(_SPACE + b"," + _SPACE)
# One of these bytes follows each value in an object or an array.
_VALUE_ENDS = b",}] \t\r\n"
# Keys that are checked one by one.
_FEW = 1000
# Bytes at the beginning and at the end of a value that are compared first.
_EDGE = 4096


class Place(NamedTuple):
    """The place of a member in a body: its key, its value, and the value's end."""

    key: int
    value: int
    end: int


class Member:
    """A member of the top level, by its *name*, which is ASCII without anything to escape."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.key = b'"%b"' % name.encode()
        # The key with each of its letters as it is, or escaped.
        self._escaped_key = b'"%b"' % b"".join(
            rb"(?:%c|\\u00%x[%x%c])" % (letter, letter >> 4, letter & 15, b"%X" % (letter & 15))
            for letter in name.encode()
        )
        # The beginnings of the letters' escapes.
        self._escapes = {b"\\u00%x" % (letter >> 4) for letter in name.encode()}
        fields: Sequence[tuple[str, type, object]] = (("value", Raw, ABSENT),)
        shape = msgspec.defstruct("Shape", fields, gc=False, rename={"value": name})
        self._decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(shape)

    def value(self, data: bytes) -> bytes:
        """Return the value in *data*, a JSON object, as it is written; empty if there is none."""
        return bytes(self._decoder.decode(data).value)

    def place(self, data: bytes) -> Place | None:
        """Return the member's place in *data*, a JSON object; None if there is none.

        Raises:
            InvalidRequest: as `find`.
        """
        value = self.value(data)
        return self.find(data, value) if value else None

    def find(self, data: bytes, value: bytes) -> Place:
        """Return the place of the member whose *value* was returned by `value`, and is not empty.

        Raises:
            InvalidRequest: it may be in more than MAX_PLACES, or MAX_LONG_PLACES.
        """
        escaped = any(escape in data for escape in self._escapes)
        if not escaped and (start := data.find(self.key)) == data.rfind(self.key):
            # The key occurs nowhere else in the body, at any depth.
            colon = _COLON.match(data, start + len(self.key))
            assert colon is not None, "a key, since the body has it on its top level"
            return Place(start, colon.end(), colon.end() + len(value))
        places: list[Place] = []
        for number, (start, begin) in enumerate(self._starts(data, value[:_EDGE], escaped), 1):
            end = begin + len(value)
            if (
                data.startswith(value[-_EDGE:], end - min(_EDGE, len(value)))
                # A number may be the beginning of a longer one.
                and data[end : end + 1] in _VALUE_ENDS
                and (len(value) <= _EDGE or data.startswith(value, begin))
            ):
                places.append(Place(start, begin, end))
            # Comparing a long value everywhere would take the square of its length.
            limit = MAX_PLACES if len(value) <= _EDGE else MAX_LONG_PLACES
            if number > limit:
                raise InvalidRequest(
                    f"more than {limit} keys {self.name} in one body", param=self.name
                )
        if len(places) == 1:
            return places[0]
        # Each of them gets its number as its value; the decoder then shows which one it reads.
        parts: list[bytes | memoryview] = []
        end, view = 0, memoryview(data)
        for number, place in enumerate(places):
            parts += (view[end : place.value], b"%d" % number)
            end = place.end
        numbered = b"".join((*parts, view[end:]))
        return places[int(self.value(numbered))]

    def _starts(self, data: bytes, edge: bytes, escaped: bool) -> Iterator[tuple[int, int]]:
        """Yield the beginnings of the key and of its value, for each place where the value begins
        with *edge*.

        A quote inside a string is escaped, so each match is a key, though perhaps a nested one.
        """
        if escaped or data.count(self.key) > _FEW:
            key = self._escaped_key if escaped else self.key
            pattern = key + _COLON.pattern + b"(?=%b)" % re.escape(edge)
            for match in re.finditer(pattern, data):
                yield match.start(), match.end()
            return
        # A search for bytes takes a tenth of a pattern's time.
        start = -1
        while (start := data.find(self.key, start + 1)) >= 0:
            colon = _COLON.match(data, start + len(self.key))
            if colon is not None and data.startswith(edge, colon.end()):
                yield start, colon.end()

    def insert(self, data: bytes, pieces: Sequence[bytes]) -> bytes:
        """Return *data*, which has no such member, with one in front, whose value is made of
        *pieces*.
        """
        match = _START.match(data)
        assert match is not None, "the body is an object"
        start = match.end()
        comma = b"" if data.startswith(b"}", start) else b","
        return b"".join((data[:start], self.key, b":", *pieces, comma, memoryview(data)[start:]))

    @staticmethod
    def extent(data: bytes, place: Place) -> tuple[int, int]:
        """Return the bytes to remove from *data* so that it lacks the member at *place*: from, to."""
        start, end = place.key, place.end
        if (comma := _COMMA_AFTER.match(data, end)) is not None:
            return start, comma.end()
        # Without a comma after it, its comma is the last one before it, unless it is the only
        # member.
        before = data.rfind(b",", 0, start)
        alone = before < 0 or data[before + 1 : start].strip(b" \t\r\n")
        return (start if alone else before), end

    def check_absent(self, data: bytes) -> None:
        """Check that *data* lacks this member, which was removed from it.

        Raises:
            InvalidRequest: there is another one.
        """
        # If the key does not occur, however it is written, there is nothing to read.
        if (self.key in data or b"\\u00" in data) and self.value(data):
            raise InvalidRequest(f"several keys {self.name} in one body", param=self.name)
