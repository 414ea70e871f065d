"""A body that is JSON (RFC 8259), read without building what is below its top level.

This file is one concept, and long: how a body is decoded, how a large one is decoded piece by
piece, and where one of its values stands in its bytes. Each of the three needs the two others'
rules of what the body is.

msgspec reads a body once, which validates all of it, and gives the values that are wanted as the
bytes that stand for them (`Raw`). The rest is skipped, so a body of millions of small values costs
no object for any of them. Two checks come before, since msgspec looks into no string that it
skips: `sound` makes sure of UTF-8, and writes U+FFFD in place of each lone surrogate escape
(`D83D` without its other half). Such an escape is the remains of a character that a client cut in
two. Most providers refuse it, and an agent whose history holds one could not go on.

What takes long comes in steps: coroutines `pause` between two of them. Awaited in a task, a pause
lets the event loop run; `at_once` needs no loop, and passes over the pauses.

A large body: msgspec reads a body in one call, which takes 70 ms for 16 MiB of small values, and
nothing else runs meanwhile. Here the body is cut after commas outside of its strings. A piece is
put between the brackets that are open where it begins and where it ends, and is decoded as a body
of its own. The whole is JSON if, and only if, each of its pieces is:

    {"a":[1,{"b":2,"c":3}],"model":"m"}        the body
    {"a":[1,{"b":2,"":"S"}]}                   its first piece, with what closes it
           {"a":[{"":"S","c":3}],"model":"m"}  its second one, with what opens it

`S` is a text that the piece has not. It tells the value that is open at a cut from the others, so
its place in the body is known when it ends. What is between two commas is one piece however long
it is: that is a text, a number, white space or brackets, of which a decoder reads 16 MiB in some
10 ms.

A member: a body goes on as it came. Where one value on its top level has to be another, its place
in the bytes is looked for. If a key stands there several times, that is the last of them, the one
that decoders read: a request must not be served by another value than the one that was checked.
"""

from __future__ import annotations

import codecs
import re
import types
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar, cast

import msgspec
import orjson
from msgspec import Raw

from aioserver.errors import InvalidJson, InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Coroutine, Generator, Iterator, Sequence

T = TypeVar("T")
# Bytes that are checked in one step.
STEP_BYTES = 1 << 20
# Bytes that are looked through in one step, and about those of a piece. Lone surrogates are
# replaced in 10 ms, if there is nothing else.
PIECE_BYTES = 1 << 16
ABSENT = Raw(b"")
# How msgspec names a key that its type has not.
_UNKNOWN = re.compile(r"Object contains unknown field `(.*?)`(?: - at `.*`)?", re.DOTALL)
ANYTHING = msgspec.json.Decoder(Raw)
_HIGH = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}")
# A high half that no low half follows, or a low half that follows no high half. A high half is
# never the second of a pair, so its neighbours say all, if no backslash is itself escaped.
_LONE = re.compile(
    rb"\\u[dD](?:[89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F][0-9a-fA-F]{2})"
    rb"|[c-fC-F][0-9a-fA-F]{2}(?<!\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}))"
)


class NotUtf8(InvalidJson):
    """The text is not UTF-8."""


class UnknownField(InvalidRequest):
    """An object has a key that its type does not have; `param` is that key."""


@types.coroutine
def pause() -> Generator[None]:
    """Let the event loop run, as `asyncio.sleep(0)` does, before the next step."""
    yield


def at_once(steps: Coroutine[object, None, T]) -> T:
    """Take all *steps*, which wait for nothing but `pause`, and return their result."""
    while True:
        try:
            steps.send(None)
        except StopIteration as stop:
            result: T = stop.value
            return result


def simple(body: bytes) -> bool:
    """Return whether *body* is short, and `sound` returns it as it is."""
    if len(body) > STEP_BYTES or not body.isascii():
        return False
    # Most bodies have no escaped character at all.
    return b"\\u" not in body or (b"\\ud" not in body and b"\\uD" not in body)


async def sound(body: bytes) -> bytes:
    """Return *body*, or a copy in which each lone surrogate escape is that of U+FFFD.

    Both have the same length. The result is UTF-8; it need not be JSON.

    Raises:
        NotUtf8: *body* is not UTF-8.
        InvalidJson: *body* has a NUL, which stands nowhere in JSON.
    """
    if not body.isascii():
        await _check_utf8(body)
    # Nearly no body has an escaped surrogate.
    if b"\\ud" not in body and b"\\uD" not in body:
        return body
    if b"\0" in body:
        raise InvalidJson("not JSON: a NUL")
    return await _without_lone_surrogates(body)


async def _check_utf8(body: bytes) -> None:
    view, start = memoryview(body), 0
    while start < len(body):
        end = start + STEP_BYTES
        try:
            # A character that is cut is left for the next step.
            _, read = codecs.utf_8_decode(view[start:end], "strict", end >= len(body))
        except UnicodeDecodeError as exc:
            raise NotUtf8(f"not JSON: no UTF-8 at byte {start + exc.start}") from None
        start += read
        if start < len(body):
            await pause()


async def _without_lone_surrogates(body: bytes) -> bytes:
    """Return *body* without its lone surrogates; it has no NUL.

    Pieces are taken one by one, none of which ends within an escape or a pair. In a piece, escaped
    backslashes become NULs, so that every backslash that is left begins an escape.
    """
    pieces: list[bytes] = []
    start, changed = 0, False
    while start < len(body):
        piece = body[start : start + PIECE_BYTES]
        marked = piece.replace(b"\\\\", b"\0\0")
        if start + len(piece) < len(body):
            marked = marked[: _cut(marked)]
        repaired, count = _LONE.subn(rb"\\ufffd", marked)
        if count:
            changed = True
            pieces.append(repaired.replace(b"\0\0", b"\\\\"))
        else:
            pieces.append(piece[: len(marked)])
        start += len(marked)
        if start < len(body):
            await pause()
    return b"".join(pieces) if changed else body


def _cut(marked: bytes) -> int:
    """Return where *marked* may end: not within an escape, nor between the halves of a pair."""
    # A pair has 12 bytes, so an escape or a pair that is cut begins among the last 11.
    cut = marked.find(b"\\", len(marked) - 11)
    if cut < 0:
        return len(marked)
    return cut - 6 if _HIGH.fullmatch(marked, cut - 6, cut) else cut


def decode(decoder: msgspec.json.Decoder[T], body: bytes | memoryview, what: str) -> T:
    """Return the object in *body*, as *decoder* reads it; *what* names it in errors.

    Raises:
        InvalidJson: *body* is not JSON, or is nested more deeply than the stack allows.
        UnknownField: the object has a key that the decoder's type forbids.
        InvalidRequest: *body* is JSON, but no object.
    """
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as exc:
        fault = str(exc)
    except msgspec.DecodeError as exc:
        raise InvalidJson(f"not JSON: {exc}") from None
    except RecursionError:
        raise InvalidJson("not JSON: nested too deeply") from None
    if decoder is not ANYTHING:
        # msgspec has stopped where the type is wrong, and has not seen the rest.
        decode(ANYTHING, body, what)
    if (match := _UNKNOWN.fullmatch(fault)) is not None:
        name = match[1][:64]
        raise UnknownField(f"unknown field in {what}: {name}", param=name)
    raise InvalidRequest(f"{what} must be a JSON object")


def text(raw: Raw, max_bytes: int | None = None) -> str | None:
    """Return the string that *raw* is.

    None if it is none, or is written in more than *max_bytes*.
    """
    if raw is ABSENT:
        return None
    view = memoryview(raw)
    if view[0] != 0x22 or (max_bytes is not None and len(view) > max_bytes):
        return None
    value: str = orjson.loads(view)
    return value


def null(raw: Raw) -> bool:
    """Return whether *raw* is absent or null."""
    return raw is ABSENT or _word(raw) == b"null"


def flag(raw: Raw) -> bool | None:
    """Return the boolean that *raw* is; None if it is none."""
    if raw is ABSENT:
        return None
    word = _word(raw)
    return True if word == b"true" else False if word == b"false" else None


def count(raw: Raw) -> int | None:
    """Return the number of 1 to 18 digits that *raw* is; None if it is anything else."""
    if raw is ABSENT:
        return None
    # One byte more than the longest tells a longer number from it.
    digits = bytes(memoryview(raw)[:19])
    return int(digits) if digits.isdigit() and len(digits) < 19 else None


def meant(raw: Raw) -> int | None:
    """Return the number that *raw* is for an engine that takes a text, a fraction or `true` for
    one; None if it is none.
    """
    if raw is ABSENT:
        return None
    written = bytes(memoryview(raw)[:32]).strip(b'" ')
    try:
        return int(float(1 if written == b"true" else written))
    except (ValueError, OverflowError):
        return None


def _word(raw: Raw) -> bytes:
    # One byte more than `false` tells a longer value from it.
    return bytes(memoryview(raw)[:6])


# Brackets between two commas: more than any decoder nests.
MAX_BRACKETS = 1 << 16
_NO_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")
_RUNS = re.compile(rb"[\[{]+|[\]}]+")
_CLOSING = bytes.maketrans(b"[{", b"]}")
_BYTE = re.compile(r"\(byte (\d+)\)")
_LIST = msgspec.json.Decoder(list[Raw])


class Site(NamedTuple):
    """Where a value stands in a body: from *start* to *end*.

    If *prefix* is set, that is only where the piece stands that has it, behind *prefix* and before
    *suffix*.
    """

    start: int
    end: int
    prefix: bytes | None = None
    suffix: bytes = b""


class _Cuts:
    """The cuts of *body*, in their order.

    Always: the piece from `start` on begins within the brackets `stack`, behind a comma that is
    outside of strings.
    """

    def __init__(self, body: bytes) -> None:
        self._body = body
        self.start = self.end = 0
        # The brackets that are open at `start`, and at `end`.
        self.stack, self.nested = b"", b""
        # Whether the piece up to `end` is the last one.
        self.last = False
        # Up to where the body was looked through, whether that is within a string, and the
        # brackets since `start`.
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


async def decoding(decoder: msgspec.json.Decoder[T], body: bytes | memoryview, what: str) -> T:
    """Return what `decode` returns, in steps if *body* is large.

    All fields of the decoder's type are `Raw`. Raises the same as `decode`.
    """
    if len(body) <= STEP_BYTES:
        return decode(decoder, body, what)
    return (await locating(decoder, bytes(body), what))[0]


async def locating(
    decoder: msgspec.json.Decoder[T], body: bytes, what: str
) -> tuple[T, dict[str, Site]]:
    """Return what `decode` returns, and where the values of its fields stand, by their keys; in
    steps.

    Raises the same as `decode`.
    """
    cuts, pieces = _Cuts(body), _Pieces(decoder, body, what)
    while True:
        while not cuts.look():
            await pause()
        await pieces.take(cuts)
        if cuts.last:
            break
        await pause()
        cuts.advance()
    return pieces.result(), pieces.sites


class _Pieces:
    """The pieces of *body*, each decoded by *decoder*, and their values put together.

    Always: `_open` is the key of the member of the top level within which the last piece ended;
    empty if it is none of the decoder's, or there is none.
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

    async def take(self, cuts: _Cuts) -> None:
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
            if len(piece) > STEP_BYTES:
                await pause()
        try:
            fields = decode(self._decoder, piece, self._what)
        except InvalidJson as error:
            raise InvalidJson(_shifted(error.message, start - len(prefix))) from None
        except InvalidRequest as error:
            # It is told when the rest is known to be JSON.
            self._fault = error
            self._decoder, self._names, self._filling = ANYTHING, {}, b""
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
            UnknownField, InvalidRequest: as `decode`.
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
        # Each is twice as long as the one before it, so no piece has room for more than a few of
        # them. A client that knows them could fill it with thousands of numbered ones, and each
        # would have to be looked for.
        mark = b'"aioserver%b"' % (b"-" * 2 * mark.count(b"-"))
    return mark


def _opening(
    stack: bytes, mark: bytes, key: bytes = b"", filling: bytes = b""
) -> tuple[bytes, bytes]:
    """Return what opens the value that is open at the start of a piece, and all that opens there.

    It ends in an element or a member, and a comma, so that one has to follow. *key* is that of the
    value, if it is a member, and *filling* one that the decoder knows.
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


def elements(array: bytes) -> Iterator[list[Raw]]:
    """Yield the elements of *array*, which is JSON, a list of them for each of its pieces.

    A list may be empty.
    """
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
        if len(piece) > STEP_BYTES:
            yield []
        decoded = _LIST.decode(piece)
        first = len(memoryview(decoded[0])) if decoded else 0
        if cuts.stack == b"[":
            del decoded[0]
        elif head and (len(decoded) > 1 or not tail):
            decoded[0] = Raw(view[start : cuts.start + first - len(head)])
        if not cuts.last:
            # It is the mark, or an element that is open.
            open_size = len(memoryview(decoded.pop())) - len(tail)
            if not head or decoded:
                start = cuts.end - open_size
        yield decoded
        if cuts.last:
            return
        cuts.advance()


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
        """Return the value in *data*, as it is written; empty if there is none.

        Raises:
            InvalidJson, InvalidRequest: *data* is no object.
        """
        return bytes(decode(self._decoder, data, "the body").value)

    async def reading(self, data: bytes) -> bytes:
        """Return what `value` returns, in steps if *data* is large."""
        return bytes((await decoding(self._decoder, data, "the body")).value)

    async def finding(self, data: bytes) -> Place | None:
        """Return where the member stands, in steps if *data* is large; None: there is none.

        Raises:
            InvalidJson: *data* is not JSON.
            InvalidRequest: it is no object, or as `find`.
        """
        if len(data) <= STEP_BYTES:
            value = self.value(data)
            return self.find(data, value) if value else None
        fields, sites = await locating(self._decoder, data, "the body")
        if fields.value is ABSENT:
            return None
        return self.place(data, sites[self.name], bytes(fields.value))

    def place(self, data: bytes, site: Site, value: bytes) -> Place:
        """Return where the member stands in *data* whose *value* was found at *site*.

        Raises:
            InvalidRequest: as `find`, in the piece of that site.
        """
        if site.prefix is None:
            # No name of ours has a quote in it, nor a backslash before its end.
            quote = data.rindex(b'"', 0, site.start)
            return Place(data.rindex(b'"', 0, quote), site.start, site.end)
        piece = b"".join((site.prefix, memoryview(data)[site.start : site.end], site.suffix))
        place, shift = self.find(piece, value), site.start - len(site.prefix)
        return Place(place.key + shift, place.value + shift, place.end + shift)

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

    async def check_absent(self, data: bytes) -> None:
        """Make sure that *data* lacks this member, which was taken out of it, in steps if it is
        large.

        Raises:
            InvalidRequest: there is another one.
        """
        # Without the key, however it is written, there is nothing to read.
        if (self.key in data or b"\\u00" in data) and await self.reading(data):
            raise InvalidRequest(f"several keys {self.name} in one body", param=self.name)
