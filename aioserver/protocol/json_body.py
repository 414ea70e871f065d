"""A JSON body (RFC 8259), read without making objects for the values below its top level.

msgspec reads a body in one call, which validates all of it, and returns the wanted values as their
bytes (`Raw`). The rest is skipped, so a body of millions of small values costs no object for any
of them. 16 MiB are usually read in some 10 ms, and in 70 ms at most. UTF-8 is checked before
(sound.py).

If the elements of a list become objects, millions of them would cost thirty times the bytes. So
only a body with a bounded number of values is read in this way: see `check_values`.
"""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec
import orjson
from msgspec import Raw

from aioserver.errors import InvalidJson, InvalidRequest
from aioserver.protocol.steps import LARGE_BYTES

T = TypeVar("T")
ABSENT = Raw(b"")
# How msgspec names a key that its type does not have.
_UNKNOWN = re.compile(r"Object contains unknown field `(.*?)`(?: - at `.*`)?", re.DOTALL)
ANYTHING = msgspec.json.Decoder(Raw)
_LIST = msgspec.json.Decoder(list[Raw])


def raw_members(*names: str) -> msgspec.json.Decoder[Any]:
    """Return the decoder of an object with the members *names*, whose values stay bytes.

    A member that the object lacks is ABSENT, and all others are skipped.
    """
    fields = [(name, Raw, ABSENT) for name in names]
    return msgspec.json.Decoder(msgspec.defstruct("Members", fields, gc=False))


# Values that may be read one by one: in any body, and in a body with MIN_VALUE_BYTES for each. An
# element of a list costs 56 bytes.
FEW_VALUES, MAX_VALUES = 100_000, 500_000
MIN_VALUE_BYTES = 6
# Bytes whose values are counted at once.
COUNTED_BYTES = 1 << 18
# A value follows each of these, except in empty brackets.
_BEFORE_VALUES = b",[{"
_NEITHER_NOR_QUOTES = bytes(byte for byte in range(256) if byte not in b'"' + _BEFORE_VALUES)


class UnknownField(InvalidRequest):
    """An object has a key that its type does not have; `param` is that key."""


def decode(decoder: msgspec.json.Decoder[T], body: bytes | memoryview, what: str) -> T:
    """Return the object in *body*, as *decoder* reads it; *what* names it in errors.

    Raises:
        InvalidJson: *body* is not JSON, or is nested more deeply than the stack allows.
        UnknownField: the object has a key that the decoder's type forbids. The rest of a
            large body need not be JSON.
        InvalidRequest: *body* is JSON, but not an object.
    """
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as exc:
        fault = str(exc)
    except msgspec.DecodeError as exc:
        raise InvalidJson(f"not JSON: {exc}") from None
    except RecursionError:
        raise InvalidJson("not JSON: nested too deeply") from None
    unknown = _UNKNOWN.fullmatch(fault)
    # msgspec has stopped at the wrong type, and has not read the rest. A large body is not read
    # twice for that.
    if decoder is not ANYTHING and (unknown is None or len(body) <= LARGE_BYTES):
        decode(ANYTHING, body, what)
    if unknown is not None:
        name = unknown[1][:64]
        raise UnknownField(f"unknown field in {what}: {name}", param=name)
    raise InvalidRequest(f"{what} must be a JSON object")


def text(raw: Raw, max_bytes: int | None = None) -> str | None:
    """Return the string *raw*.

    None if it is not a string, or is written in more than *max_bytes*.
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
    """Return the boolean *raw*; None if it is not one."""
    if raw is ABSENT:
        return None
    word = _word(raw)
    return True if word == b"true" else False if word == b"false" else None


def count(raw: Raw) -> int | None:
    """Return the number *raw*, of 1 to 18 digits; None if it is anything else."""
    if raw is ABSENT:
        return None
    # One byte more than the longest number distinguishes a longer one from it.
    digits = bytes(memoryview(raw)[:19])
    return int(digits) if digits.isdigit() and len(digits) < 19 else None


def lenient_count(raw: Raw) -> int | None:
    """Return the number that a lenient engine reads from *raw*, which may be a text, a fraction or
    `true`; None if there is none.
    """
    if raw is ABSENT:
        return None
    written = bytes(memoryview(raw)[:32]).strip(b'" ')
    try:
        return int(float(1 if written == b"true" else written))
    except (ValueError, OverflowError):
        return None


def _word(raw: Raw) -> bytes:
    # One byte more than `false` distinguishes a longer value from it.
    return bytes(memoryview(raw)[:6])


def check_values(body: bytes, limit: int = 0) -> None:
    """Check that *body*, which is JSON, has at most *limit* values; without a limit, that they can
    be read one by one.

    Raises:
        InvalidRequest: it has more. Without a limit: more than MAX_VALUES, or more than
            FEW_VALUES of fewer than MIN_VALUE_BYTES each on the average.
    """
    limit = limit or min(MAX_VALUES, max(FEW_VALUES, len(body) // MIN_VALUE_BYTES))
    # A value takes at least two bytes, with the comma or bracket before it.
    if len(body) <= 2 * limit:
        return
    # This also counts bytes within strings, so that few bodies take the slow way.
    if sum(body.count(byte) for byte in _BEFORE_VALUES) <= limit:
        return
    count, start, within = 0, 0, 0
    while start < len(body) and count <= limit:
        piece = body[start : start + COUNTED_BYTES]
        # No piece ends within an escape.
        piece = piece[: len(piece) - (len(piece) - len(piece.rstrip(b"\\"))) % 2]
        start += len(piece)
        # Without escapes, each quote begins or ends a string.
        plain = piece.replace(b"\\\\", b"").replace(b'\\"', b"")
        parts = plain.translate(None, _NEITHER_NOR_QUOTES).split(b'"')
        count += sum(map(len, parts[within::2]))
        within = (within + len(parts) - 1) % 2
    if count > limit:
        raise InvalidRequest(f"more than {limit} values in {len(body)} bytes of JSON")


def elements(array: bytes | memoryview) -> list[Raw]:
    """Return the elements of *array*, which is JSON, and whose values have been checked."""
    return _LIST.decode(array)
