"""Parts of a request, which msgspec reads into types whose values stay bytes (`Raw`) if they are
only passed on.

The elements of a list are all built at once, so `check_values` of protocol/json_body.py comes
first: a body of millions of empty elements would otherwise cost thirty times its bytes.

Long work is done in steps of less than a millisecond. A value of LARGE_BYTES or more is a step
each time that it is read; a value of megabytes takes 0.3 ms for each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import msgspec
from msgspec import Raw

from aioserver.errors import InvalidRequest
from aioserver.protocol import json_body
from aioserver.protocol.json_body import ABSENT, null
from aioserver.protocol.steps import pause, pause_after

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

T = TypeVar("T")
# The most elements of a list, except for the messages and the input: more than a message has
# parts, or a request tools.
MAX_ELEMENTS = 4096
# Bytes from which on a value is read in a step of its own.
LARGE_BYTES = 1 << 16


def elements(raw: Raw, param: str, limit: int | None = MAX_ELEMENTS) -> list[Raw]:
    """Return the elements of the list *raw*; none if it is absent or null.

    Raises:
        InvalidRequest: it is not a list, or has more than *limit* elements; *param* names it.
    """
    if null(raw):
        return []
    array = memoryview(raw)
    if array[0] != ord("["):
        raise InvalidRequest(f"{param} must be a list", param=param)
    listed = json_body.elements(array)
    if limit is not None and len(listed) > limit:
        raise InvalidRequest(f"{param} has more than {limit} elements", param=param)
    return listed


async def for_each(raw: Raw, param: str, add: Callable[[Raw, str], Awaitable[None]]) -> None:
    """Call *add* with each element of the list *raw*, however long, and its name.

    Raises:
        InvalidRequest: it is not a list, or is empty; *param* names it.
    """
    listed = elements(raw, param, None)
    if not listed:
        raise InvalidRequest(f"{param} must have an element", param=param)
    await pause_after(memoryview(raw))
    for number, each in enumerate(listed):
        await add(each, f"{param}[{number}]")


async def reading(decoder: msgspec.json.Decoder[T], raw: Raw, param: str) -> T:
    """Return the result of `read`, in a step of its own if *raw* is large."""
    if len(memoryview(raw)) > LARGE_BYTES:
        await pause()
    return read(decoder, raw, param)


def read(decoder: msgspec.json.Decoder[T], raw: Raw, param: str) -> T:
    """Read *raw* as the type of *decoder*.

    Raises:
        InvalidRequest: it has another type, or is absent; *param* names it.
    """
    if raw is ABSENT:
        raise InvalidRequest(f"{param} is missing", param=param)
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as exc:
        raise InvalidRequest(f"{param}: {exc}", param=param) from None


def string(raw: Raw, param: str) -> bytes:
    """Return *raw*, which must be a string, as its JSON.

    Raises:
        InvalidRequest: it is not a string; *param* names it.
    """
    if not is_string(raw):
        raise InvalidRequest(f"{param} must be a string", param=param)
    return bytes(raw)


def untranslatable(kind: str, param: str, hint: str = "") -> InvalidRequest:
    """Return the error of a request whose element of this *kind*, at *param*, has no equivalent in
    chat completions.
    """
    hint = hint or ", which are all that the provider has"
    return InvalidRequest(f"{kind[:64]!r} has no form in chat completions{hint}", param=param)


def is_string(raw: Raw) -> bool:
    """Return whether *raw* is a string."""
    return raw is not ABSENT and bytes(memoryview(raw)[:1]) == b'"'


async def quoted(json: bytes) -> bytes:
    """Return *json* as a JSON string, in steps."""
    if len(json) <= LARGE_BYTES:
        return b'"%b"' % _escaped(json)
    parts = [b'"']
    for start in range(0, len(json), LARGE_BYTES):
        parts.append(_escaped(json[start : start + LARGE_BYTES]))
        await pause()
    parts.append(b'"')
    return b"".join(parts)


def _escaped(json: bytes) -> bytes:
    """Return *json*, whose only control characters are spaces, escaped for a string."""
    escaped = json.replace(b"\\", b"\\\\").replace(b'"', b'\\"')
    for space, written in ((b"\n", b"\\n"), (b"\r", b"\\r"), (b"\t", b"\\t")):
        escaped = escaped.replace(space, written)
    return escaped


def join(texts: list[bytes], between: bytes) -> bytes:
    r"""Return one JSON string of *texts*, which are JSON strings, with *between*, escaped, between
    two of them.
    """
    if len(texts) == 1:
        return texts[0]
    return b'"%b"' % between.join([text[1:-1] for text in texts])


def members(*pairs: tuple[bytes, Raw | bytes]) -> bytes:
    """Return the members of an object that are neither absent nor null, each with a comma in
    front.
    """
    return b"".join(
        [
            b',"%b":%b' % (name, bytes(raw))
            for name, raw in pairs
            if (not null(raw) if isinstance(raw, Raw) else raw)
        ]
    )
