"""The top level of a body that is JSON (RFC 8259), decoded without building what is below it.

msgspec reads a body once, which validates all of it, and gives the values that are wanted as the bytes
that stand for them (`Raw`). The rest is skipped, so a body of millions of small values costs no object
for any of them. Two checks come before, since msgspec looks into no string that it skips: `sound`
makes sure of UTF-8, and writes U+FFFD in place of each lone surrogate escape (`D83D` without its other
half). Such an escape is the remains of a character that a client cut in two. Most providers
refuse it, and an agent whose history holds one could not go on.

What takes long comes in steps: the generators here yield between two of them, so that their caller can
let an event loop run, or go on (`at_once`).
"""

from __future__ import annotations

import codecs
import re
from typing import TYPE_CHECKING, TypeVar

import msgspec
import orjson
from msgspec import Raw

from aioserver.errors import InvalidJson, InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Generator

T = TypeVar("T")
# Bytes that are checked in one step.
STEP_BYTES = 1 << 20
# Bytes in which lone surrogates are replaced in one step, 10 ms if they have nothing else.
PIECE_BYTES = 1 << 18
ABSENT = Raw(b"")
# How msgspec names a key that its type has not.
_UNKNOWN = re.compile(r"Object contains unknown field `(.*?)`(?: - at `.*`)?", re.DOTALL)
ANYTHING = msgspec.json.Decoder(Raw)
_HIGH = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}")
# A high half that no low half follows, or a low half that follows no high half. A high half is never the
# second of a pair, so its neighbours say all, if no backslash is itself escaped.
_LONE = re.compile(
    rb"\\u[dD](?:[89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F][0-9a-fA-F]{2})"
    rb"|[c-fC-F][0-9a-fA-F]{2}(?<!\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}))"
)


class NotUtf8(InvalidJson):
    """The text is not UTF-8."""


class UnknownField(InvalidRequest):
    """An object has a key that its type does not have; `param` is that key."""


def at_once(steps: Generator[None, None, T]) -> T:
    """Take all *steps*, and return their result."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            result: T = stop.value
            return result


def simple(body: bytes) -> bool:
    """Return whether *body* is short, and `sound` returns it as it is."""
    if len(body) > STEP_BYTES or not body.isascii():
        return False
    # Most bodies have no escaped character at all.
    return b"\\u" not in body or (b"\\ud" not in body and b"\\uD" not in body)


def sound(body: bytes) -> Generator[None, None, bytes]:
    """Return *body*, or a copy in which each lone surrogate escape is that of U+FFFD.

    Both have the same length. The result is UTF-8; it need not be JSON.

    Raises:
        NotUtf8: *body* is not UTF-8.
        InvalidJson: *body* has a NUL, which stands nowhere in JSON.
    """
    if not body.isascii():
        yield from _check_utf8(body)
    # Nearly no body has an escaped surrogate.
    if b"\\ud" not in body and b"\\uD" not in body:
        return body
    if b"\0" in body:
        raise InvalidJson("not JSON: a NUL")
    return (yield from _without_lone_surrogates(body))


def _check_utf8(body: bytes) -> Generator[None, None, None]:
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
            yield


def _without_lone_surrogates(body: bytes) -> Generator[None, None, bytes]:
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
            yield
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
    """Return the string that *raw* is; None if it is none, or is written in more than *max_bytes*."""
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


def _word(raw: Raw) -> bytes:
    # One byte more than `false` tells a longer value from it.
    return bytes(memoryview(raw)[:6])
