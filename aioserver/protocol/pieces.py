"""A large body that is JSON, decoded piece by piece, so that no call of the decoder takes long.

msgspec reads a body in one call, which takes 70 ms for 16 MiB of small values, and nothing else runs meanwhile. Here the
body is cut after commas outside of its strings. A piece is put between the brackets that are open
where it begins and where it ends, and is decoded as a body of its own. The whole is JSON if, and only if, each of its
pieces is:

    {"a":[1,{"b":2,"c":3}],"model":"m"}        the body
    {"a":[1,{"b":2,"":"S"}]}                   its first piece, with what closes it
           {"a":[{"":"S","c":3}],"model":"m"}  its second one, with what opens it

`S` is a text that the piece has not. It tells the value that is open at a cut from the others, so its
place in the body is known when it ends. What is between two commas is one piece however long it is: that is a text, a number,
white space or brackets, of which a decoder reads 16 MiB in some 10 ms.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import msgspec
from msgspec import Raw

from aioserver.errors import InvalidJson, InvalidRequest
from aioserver.protocol import top_level

if TYPE_CHECKING:
    from collections.abc import Generator

T = TypeVar("T")
# Bytes that are looked through in one step, and about those of a piece.
PIECE_BYTES = 1 << 18
# Brackets between two commas: more than any decoder nests.
MAX_BRACKETS = 1 << 16
_NO_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")
_RUNS = re.compile(rb"[\[{]+|[\]}]+")
_CLOSING = bytes.maketrans(b"[{", b"]}")
_BYTE = re.compile(r"\(byte (\d+)\)")
_LIST = msgspec.json.Decoder(list[Raw])


class Site(NamedTuple):
    """Where a value stands in a body: from *start* to *end*.

    If *prefix* is set, that is only where the piece stands that has it, behind *prefix* and before *suffix*.
    """

    start: int
    end: int
    prefix: bytes | None = None
    suffix: bytes = b""


class _Cuts:
    """The cuts of *body*, in their order.

    Always: the piece from `start` on begins within the brackets `stack`, behind a comma that is outside of strings.
    """

    __slots__ = (
        "_body",
        "_brackets",
        "_scanned",
        "_within",
        "end",
        "last",
        "nested",
        "stack",
        "start",
    )

    def __init__(self, body: bytes) -> None:
        self._body = body
        self.start = self.end = 0
        # The brackets that are open at `start`, and at `end`.
        self.stack, self.nested = b"", b""
        # Whether the piece up to `end` is the last one.
        self.last = False
        # Up to where the body was looked through, whether that is within a string, and the brackets since `start`.
        self._scanned, self._within = 0, 0
        self._brackets = b""

    def advance(self) -> None:
        """Go to the piece behind this one."""
        self.start, self.stack = self.end, self.nested
        self._scanned, self._within, self._brackets = self.end, 0, b""

    def look(self) -> bool:
        """Look through PIECE_BYTES more; return whether `end` is known.

        Raises:
            InvalidJson: there are closing brackets too many, or opening ones.
        """
        piece = self._body[self._scanned : self._scanned + PIECE_BYTES]
        self.last = self._scanned + len(piece) >= len(self._body)
        if not self.last:
            # No piece ends within an escape.
            piece = piece[: len(piece) - (len(piece) - len(piece.rstrip(b"\\"))) % 2]
        marked = piece
        if b"\\" in piece:
            # Without escapes, each quote begins or ends a string. The length stays the same.
            marked = piece.replace(b"\\\\", b"  ").replace(b'\\"', b"  ")
        parts = marked.split(b'"')
        outside = range(self._within, len(parts), 2)
        if b"," in piece:
            # A piece that is long already ends as soon as it can.
            long = self._scanned > self.start
            for number in outside if long else reversed(outside):
                part = parts[number]
                comma = part.find(b",") if long else part.rfind(b",")
                if comma >= 0:
                    before = [parts[each] for each in range(self._within, number, 2)]
                    self._brackets += _brackets(b"".join((*before, part[:comma])))
                    behind = sum(map(len, parts[number + 1 :])) + len(parts) - 1 - number
                    self._cut(self._scanned + len(piece) - behind - len(part) + comma + 1)
                    return True
        self._brackets += _brackets(b"".join([parts[number] for number in outside]))
        if len(self._brackets) > MAX_BRACKETS:
            raise InvalidJson("not JSON: nested too deeply")
        self._within = (self._within + len(parts) - 1) % 2
        self._scanned += len(piece)
        if self.last:
            self.end = len(self._body)
        return self.last

    def _cut(self, end: int) -> None:
        self.end, self.last = end, False
        self.nested = _nested(self.stack, self._brackets)
        if not self.nested:
            raise InvalidJson(f"not JSON: a comma outside of any value (byte {end - 1})")


def _brackets(text: bytes) -> bytes:
    return text.translate(None, _NO_BRACKETS)


def _nested(stack: bytes, brackets: bytes) -> bytes:
    """Return the brackets that are open after *brackets*, where those of *stack* were before.

    Whether a bracket is closed by one of its own kind is for the decoder to see.

    Raises:
        InvalidJson: more are closed than were open.
    """
    # Most are closed at once. What is left is walked through by its runs.
    size = 2 * len(brackets)
    while len(brackets) < 0.9 * size:
        size = len(brackets)
        brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
    nested = bytearray(stack)
    for match in _RUNS.finditer(brackets):
        run = match[0]
        if run[0] in b"[{":
            nested += run
        elif len(run) < len(nested):
            del nested[-len(run) :]
        else:
            # Not even one that closes the whole: a comma follows.
            raise InvalidJson("not JSON: a comma outside of any value")
    return bytes(nested)


def decoding(
    decoder: msgspec.json.Decoder[T], body: bytes | memoryview, what: str
) -> Generator[None, None, T]:
    """Return what `top_level.decode` returns, in steps if *body* is large.

    All fields of the decoder's type are `Raw`. Raises the same as `top_level.decode`.
    """
    if len(body) <= top_level.STEP_BYTES:
        return top_level.decode(decoder, body, what)
    return (yield from locating(decoder, bytes(body), what))[0]


def locating(
    decoder: msgspec.json.Decoder[T], body: bytes, what: str
) -> Generator[None, None, tuple[T, dict[str, Site]]]:
    """Return what `top_level.decode` returns, and where the values of its fields stand, by their keys; in steps.

    Raises the same as `top_level.decode`.
    """
    cuts, pieces = _Cuts(body), _Pieces(decoder, body, what)
    while True:
        while not cuts.look():
            yield
        yield from pieces.take(cuts)
        if cuts.last:
            break
        yield
        cuts.advance()
    return pieces.result(), pieces.sites


class _Pieces:
    """The pieces of *body*, each decoded by *decoder*, and their values put together.

    Always: `_open` is the key of the member of the top level within which the last piece ended; empty if it is none of the
    decoder's, or there is none.
    """

    def __init__(self, decoder: msgspec.json.Decoder[Any], body: bytes, what: str) -> None:
        self._decoder, self._body, self._what = decoder, body, what
        self._view = memoryview(body)
        kind = decoder.type
        self._blank: Any = None
        # The attributes of the decoder's type, by their keys.
        self._names: dict[str, str] = {}
        if kind is not Raw:
            self._blank = kind()
            self._names = dict(
                zip(kind.__struct_encode_fields__, kind.__struct_fields__, strict=True)
            )
        self._filling = next(iter(self._names), "").encode()
        self._open, self._open_start = "", 0
        self._fault: InvalidRequest | None = None
        self._values: dict[str, Raw] = {}
        self.sites: dict[str, Site] = {}

    def take(self, cuts: _Cuts) -> Generator[None, None, None]:
        """Decode the piece that *cuts* has found, in steps.

        Raises:
            InvalidJson: it is not JSON.
        """
        start, end = cuts.start, cuts.end
        mark = _mark(self._body, start, end)
        head, prefix = _opening(cuts.stack, mark, self._open.encode(), self._filling)
        tail, suffix = (b"", b"") if cuts.last else _ending(cuts.nested, mark)
        if cuts.nested == b"{" and not cuts.last:
            # The comma goes: behind it would be another key, which no decoder need know.
            end -= 1
            if not start and self._body[:end].strip(b" \t\r\n") == b"{":
                raise InvalidJson(f"not JSON: a comma without a value (byte {end})")
        piece = self._body
        if start or suffix:
            piece = b"".join((prefix, self._view[start:end], suffix))
            if len(piece) > top_level.STEP_BYTES:
                yield
        try:
            fields = top_level.decode(self._decoder, piece, self._what)
        except InvalidJson as error:
            raise InvalidJson(_shifted(error.message, start - len(prefix))) from None
        except InvalidRequest as error:
            # It is told when the rest is known to be JSON.
            self._fault = error
            self._decoder, self._names, self._filling = top_level.ANYTHING, {}, b""
            return
        opened, opened_start = "", 0
        for key, name in self._names.items():
            raw: Raw = getattr(fields, name)
            if raw is getattr(self._blank, name):
                continue
            view = memoryview(raw)
            closes = head and key == self._open and bytes(view[: len(head)]) == head
            if tail and bytes(view[-len(tail) :]) == tail:
                opened = key
                opened_start = self._open_start if closes else end - len(view) + len(tail)
            elif closes:
                stop = start + len(view) - len(head)
                self.sites[key] = Site(self._open_start, stop)
                self._values[key] = Raw(self._view[self._open_start : stop])
            elif key.encode() != self._filling or bytes(view[: len(mark)]) != mark:
                self.sites[key] = Site(start, end, prefix, suffix)
                # The piece is not kept for the sake of a small part of it.
                self._values[key] = Raw(bytes(view))
        self._open, self._open_start = opened, opened_start

    def result(self) -> Any:
        """Return the object that all pieces are.

        Raises:
            UnknownField, InvalidRequest: as `top_level.decode`.
        """
        if self._fault is not None:
            raise self._fault
        if self._blank is None:
            return Raw(self._body)
        for key, raw in self._values.items():
            setattr(self._blank, self._names[key], raw)
        return self._blank


def _mark(body: bytes, start: int, end: int) -> bytes:
    """Return a JSON string that the piece has not."""
    mark = b'"aioserver-"'
    while body.find(mark, start, end) >= 0:
        # Each is twice as long as the one before it, so no piece has room for more than a few of them. A client
        # that knows them could fill it with thousands of numbered ones, and each would have to be looked for.
        mark = b'"aioserver%b"' % (b"-" * 2 * mark.count(b"-"))
    return mark


def _opening(
    stack: bytes, mark: bytes, key: bytes = b"", filling: bytes = b""
) -> tuple[bytes, bytes]:
    """Return what opens the value that is open at the start of a piece, and all that opens there.

    It ends in an element or a member, and a comma, so that one has to follow. *key* is that of the value, if it is
    a member, and *filling* one that the decoder knows.
    """
    if not stack:
        return b"", b""
    if stack == b"{":
        return b"", b'{"%b":%b,' % (filling, mark)
    innermost = b"[%b," if stack.endswith(b"[") else b'{"":%b,'
    head = stack[1:-1].replace(b"{", b'{"":') + innermost % mark
    if len(stack) == 1:
        return b"", head
    return head, (b'{"%b":' % key if stack.startswith(b"{") else b"[") + head


def _ending(nested: bytes, mark: bytes) -> tuple[bytes, bytes]:
    """Return what ends the value that is open at the end of a piece, and all that ends there."""
    if nested == b"{":
        return b"", b"}"
    closing = nested[::-1].translate(_CLOSING)
    last = mark if nested.endswith(b"[") else b'"":' + mark
    return last + closing[:-1], last + closing


def _shifted(message: str, by: int) -> str:
    """Return *message* with the bytes that it counts in a piece counted in the body."""
    return _BYTE.sub(lambda match: f"(byte {max(0, int(match[1]) + by)})", message)


def elements(array: bytes) -> Generator[list[Raw], None, None]:
    """Yield the elements of *array*, which is JSON, a list of them for each of its pieces; a list may be empty."""
    if len(array) <= PIECE_BYTES:
        yield _LIST.decode(array)
        return
    cuts, view = _Cuts(array), memoryview(array)
    # Where the element begins within which the last piece ended.
    start = 0
    while True:
        while not cuts.look():
            yield []
        mark = _mark(array, cuts.start, cuts.end)
        head, prefix = _opening(cuts.stack, mark)
        tail, suffix = (b"", b"") if cuts.last else _ending(cuts.nested, mark)
        piece = b"".join((prefix, view[cuts.start : cuts.end], suffix))
        if len(piece) > top_level.STEP_BYTES:
            yield []
        found = _LIST.decode(piece)
        first = len(memoryview(found[0])) if found else 0
        if cuts.stack == b"[":
            del found[0]
        elif head and (len(found) > 1 or not tail):
            found[0] = Raw(view[start : cuts.start + first - len(head)])
        if not cuts.last:
            # It is the mark, or an element that is open.
            open_size = len(memoryview(found.pop())) - len(tail)
            if not head or found:
                start = cuts.end - open_size
        yield found
        if cuts.last:
            return
        cuts.advance()
