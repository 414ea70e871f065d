"""Parts of a request, read by msgspec into types whose values stay bytes (`Raw`) where they are
only passed on.

Their decoders build every element of a list at once, so `check_density` comes before them: a body
of millions of empty elements would otherwise cost thirty times its bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import msgspec
from msgspec import Raw

from aioserver.errors import InvalidRequest
from aioserver.protocol import json_body
from aioserver.protocol.json_body import ABSENT, null, pause

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

T = TypeVar("T")
# Values in one body, whatever its size.
MAX_VALUES = 100_000
# Bytes that each value of a body with more values has on the average: an element of a list costs
# about 100.
MIN_VALUE_BYTES = 12
# Elements of a list that is read in one step, all but the input: more parts than a message has, or
# tools.
MAX_ELEMENTS = 4096
# Bytes of a body that are looked through in one step.
STEP_BYTES = 1 << 18


async def check_density(body: bytes) -> None:
    """Refuse a *body*, which is JSON, whose values are too many for its size.

    Raises:
        InvalidRequest: it has more than MAX_VALUES values, each of fewer than MIN_VALUE_BYTES on
            the average.
    """
    limit = max(MAX_VALUES, len(body) // MIN_VALUE_BYTES)
    # Commas within strings count here, so that the slow way is taken by few.
    if body.count(b",") <= limit:
        return
    commas, start, within = 0, 0, 0
    while start < len(body):
        piece = body[start : start + STEP_BYTES]
        # No piece ends within an escape.
        piece = piece[: len(piece) - (len(piece) - len(piece.rstrip(b"\\"))) % 2]
        start += len(piece)
        # Without escapes, each quote begins or ends a string.
        parts = piece.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
        commas += sum([part.count(b",") for part in parts[within::2]])
        within = (within + len(parts) - 1) % 2
        if commas > limit:
            raise InvalidRequest(f"more than {limit} values in a body of {len(body)} bytes")
        await pause()


def elements(raw: Raw, param: str, limit: int = MAX_ELEMENTS) -> list[Raw]:
    """Return the elements of the list that *raw* is; none if it is absent or null.

    Raises:
        InvalidRequest: it is no list, or has more than *limit* elements; *param* names it.
    """
    if null(raw):
        return []
    array = bytes(raw)
    if not array.startswith(b"["):
        raise InvalidRequest(f"{param} must be a list", param=param)
    listed: list[Raw] = []
    # Of very many, no more are read than the first ones.
    for batch in json_body.elements(array):
        listed += batch
        if len(listed) > limit:
            raise InvalidRequest(f"{param} has more than {limit} elements", param=param)
    return listed


async def for_each(raw: Raw, param: str, add: Callable[[Raw, str], Awaitable[None]]) -> None:
    """Call *add* with each element of the list that *raw* is, however long, and its name.

    Raises:
        InvalidRequest: it is no list, or an empty one; *param* names it.
    """
    array = b"[]" if null(raw) else bytes(raw)
    if not array.startswith(b"["):
        raise InvalidRequest(f"{param} must be a list", param=param)
    number = 0
    for batch in json_body.elements(array):
        for each in batch:
            await add(each, f"{param}[{number}]")
            number += 1
        await pause()
    if not number:
        raise InvalidRequest(f"{param} must have an element", param=param)


def read(decoder: msgspec.json.Decoder[T], raw: Raw, param: str) -> T:
    """Return *raw* as the type of *decoder*.

    Raises:
        InvalidRequest: it is something else, or absent; *param* names it.
    """
    if raw is ABSENT:
        raise InvalidRequest(f"{param} is missing", param=param)
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as exc:
        raise InvalidRequest(f"{param}: {exc}", param=param) from None


def string(raw: Raw, param: str) -> bytes:
    """Return *raw*, which must be a string, as the JSON that it is.

    Raises:
        InvalidRequest: it is no string; *param* names it.
    """
    if not is_string(raw):
        raise InvalidRequest(f"{param} must be a string", param=param)
    return bytes(raw)


def no_form(kind: str, param: str, hint: str = "") -> InvalidRequest:
    """Return the error of a request that has something of this *kind*, at *param*."""
    hint = hint or ", which are all that the provider has"
    return InvalidRequest(f"{kind[:64]!r} has no form in chat completions{hint}", param=param)


def is_string(raw: Raw) -> bool:
    """Return whether *raw* is a string."""
    return raw is not ABSENT and bytes(memoryview(raw)[:1]) == b'"'


def join(texts: list[bytes], between: bytes) -> bytes:
    r"""Return one JSON string of *texts*, which are JSON strings, with *between*, escaped, between
    two of them.
    """
    if len(texts) == 1:
        return texts[0]
    return b'"%b"' % between.join([text[1:-1] for text in texts])


def members(*pairs: tuple[bytes, Raw | bytes]) -> bytes:
    """Return those members of an object that are neither absent nor null, each with a comma in
    front.
    """
    return b"".join(
        [
            b',"%b":%b' % (name, bytes(raw))
            for name, raw in pairs
            if (not null(raw) if isinstance(raw, Raw) else raw)
        ]
    )
