"""A member of the top level of a body, and where it stands in the bytes.

A body goes on as it came. Where one value on its top level has to be another, its place in the
bytes is looked for. If a key stands there several times, that is the last of them, the one that
decoders read: a request must not be served by another value than the one that was checked.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

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
# The bytes of which one follows each value in an object or an array.
_VALUE_ENDS = b",}] \t\r\n"
# Keys that are looked at one by one.
_FEW = 1000
# Bytes at the beginning and at the end of a value that are compared first.
_EDGE = 4096


class _OneValue(Protocol):
    value: Raw


class Place(NamedTuple):
    """Where a member stands in a body: its key, its value, and the end of that."""

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
        # How the escape of a letter begins.
        self._escapes = {b"\\u00%x" % (letter >> 4) for letter in name.encode()}
        fields: Sequence[tuple[str, type, object]] = (("value", Raw, ABSENT),)
        shape = msgspec.defstruct("Shape", fields, gc=False, rename={"value": name})
        self._decoder = cast("msgspec.json.Decoder[_OneValue]", msgspec.json.Decoder(shape))

    def value(self, data: bytes) -> bytes:
        """Return the value in *data*, a JSON object, as it is written; empty if there is none."""
        return bytes(self._decoder.decode(data).value)

    def place(self, data: bytes) -> Place | None:
        """Return where the member stands in *data*, a JSON object; None: there is none.

        Raises:
            InvalidRequest: as `find`.
        """
        value = self.value(data)
        return self.find(data, value) if value else None

    def find(self, data: bytes, value: bytes) -> Place:
        """Return where the member is whose *value* `value` has returned, which is not empty.

        Raises:
            InvalidRequest: there are more than MAX_PLACES, or MAX_LONG_PLACES, where it may be.
        """
        escaped = any(escape in data for escape in self._escapes)
        if not escaped and (start := data.find(self.key)) == data.rfind(self.key):
            # The body has no other place where the key is, in whatever depth.
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
            # To compare a long value everywhere would take the square of its length.
            limit = MAX_PLACES if len(value) <= _EDGE else MAX_LONG_PLACES
            if number > limit:
                raise InvalidRequest(
                    f"more than {limit} keys {self.name} in one body", param=self.name
                )
        if len(places) == 1:
            return places[0]
        # Each of them gets its number as its value; the decoder then says which one it reads.
        parts: list[bytes | memoryview] = []
        end, view = 0, memoryview(data)
        for number, place in enumerate(places):
            parts += (view[end : place.value], b"%d" % number)
            end = place.end
        numbered = b"".join((*parts, view[end:]))
        return places[int(self.value(numbered))]

    def _starts(self, data: bytes, edge: bytes, escaped: bool) -> Iterator[tuple[int, int]]:
        """Yield where the key, and where its value begins, wherever that begins with *edge*.

        A quote inside a string is escaped, so what is found is a key, though perhaps a nested one.
        """
        if escaped or data.count(self.key) > _FEW:
            key = self._escaped_key if escaped else self.key
            pattern = key + _COLON.pattern + b"(?=%b)" % re.escape(edge)
            for match in re.finditer(pattern, data):
                yield match.start(), match.end()
            return
        # To look for bytes takes a tenth of the time that a pattern takes.
        start = -1
        while (start := data.find(self.key, start + 1)) >= 0:
            colon = _COLON.match(data, start + len(self.key))
            if colon is not None and data.startswith(edge, colon.end()):
                yield start, colon.end()

    def insert(self, data: bytes, pieces: Sequence[bytes]) -> bytes:
        """Return *data*, which has no such member, with one in front, whose value are the
        *pieces*.
        """
        match = _START.match(data)
        assert match is not None, "the body is an object"
        start = match.end()
        comma = b"" if data.startswith(b"}", start) else b","
        return b"".join((data[:start], self.key, b":", *pieces, comma, memoryview(data)[start:]))

    @staticmethod
    def extent(data: bytes, place: Place) -> tuple[int, int]:
        """Return the bytes that are to be taken out of *data*, so that it lacks the member at
        *place*: from, to.
        """
        start, end = place.key, place.end
        if (comma := _COMMA_AFTER.match(data, end)) is not None:
            return start, comma.end()
        # Without one after it, its comma is the last one before it, unless it is the only member.
        before = data.rfind(b",", 0, start)
        alone = before < 0 or data[before + 1 : start].strip(b" \t\r\n")
        return (start if alone else before), end

    def check_absent(self, data: bytes) -> None:
        """Make sure that *data* lacks this member, which was taken out of it.

        Raises:
            InvalidRequest: there is another one.
        """
        # Without the key, however it is written, there is nothing to read.
        if (self.key in data or b"\\u00" in data) and self.value(data):
            raise InvalidRequest(f"several keys {self.name} in one body", param=self.name)
