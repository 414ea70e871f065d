"""JSON that is sound: UTF-8, without lone surrogates.

msgspec does not check a string that it skips, so two checks come before it: for UTF-8, and for
lone surrogate escapes (`D83D` without its other half), each of which is replaced by U+FFFD. Such
an escape is half of a character that a client cut in two. Most providers refuse it, and an agent
whose history holds one could not go on.

If text is cut into pieces, none of them ends within a character, an escape or a pair of
surrogates, so each is sound by itself.
"""

from __future__ import annotations

import codecs
import re
from typing import TYPE_CHECKING

from aioserver.errors import InvalidJson
from aioserver.protocol.steps import LARGE_BYTES, pause

if TYPE_CHECKING:
    from collections.abc import Iterator

# Bytes of a piece, in which lone surrogates are replaced in 0.5 ms, if there is nothing else.
PIECE_BYTES = 1 << 15
_HIGH = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}")
# A high half without a low half behind it, or a low half without a high half before it. A high
# half never ends a pair, so the escapes beside a half decide whether it is lone, unless a
# backslash is itself escaped.
_LONE = re.compile(
    rb"\\u[dD](?:[89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F][0-9a-fA-F]{2})"
    rb"|[c-fC-F][0-9a-fA-F]{2}(?<!\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}))"
)


class NotUtf8(InvalidJson):
    """The text is not UTF-8."""


async def sound(body: bytes) -> bytes:
    """Return *body*, or a copy in which U+FFFD replaces each lone surrogate escape.

    Both have the same length. The result is UTF-8; it need not be JSON.

    Raises:
        NotUtf8: *body* is not UTF-8.
        InvalidJson: *body* has a NUL, which JSON never has.
    """
    if not body.isascii():
        _check_utf8(body)
    # Most bodies escape no character at all. Where letters are frequent, a search for one that ends
    # with them takes several times as long.
    if b"\\u" not in body or (b"\\ud" not in body and b"\\uD" not in body):
        return body
    if b"\0" in body:
        raise InvalidJson("not JSON: it has a NUL")
    return await _without_lone_surrogates(body)


def _check_utf8(body: bytes) -> None:
    # A text of the whole body could have four times its bytes.
    view, start = memoryview(body), 0
    while start < len(body):
        end = start + LARGE_BYTES
        try:
            # A character that is cut is left for the next step.
            _, read = codecs.utf_8_decode(view[start:end], "strict", end >= len(body))
        except UnicodeDecodeError as exc:
            raise NotUtf8(f"not JSON: invalid UTF-8 at byte {start + exc.start}") from None
        start += read


async def _without_lone_surrogates(body: bytes) -> bytes:
    """Return *body* without its lone surrogates; it has no NUL."""
    repaired: list[bytes] = []
    changed = 0
    for piece in pieces(body):
        # Without escaped backslashes, every backslash begins an escape.
        marked, count = _LONE.subn(rb"\\ufffd", body[piece].replace(b"\\\\", b"\0\0"))
        repaired.append(marked.replace(b"\0\0", b"\\\\") if count else body[piece])
        changed += count
        if piece.stop < len(body):
            await pause()
    return b"".join(repaired) if changed else body


def pieces(text: bytes, start: int = 0, end: int | None = None) -> Iterator[slice]:
    """Yield the pieces of *text* between *start* and *end*; the text is UTF-8 without NUL, and no
    escape is cut there.
    """
    end = len(text) if end is None else end
    while start < end:
        stop = min(end, start + PIECE_BYTES)
        if stop < end:
            stop = start + _cut(text[start:stop].replace(b"\\\\", b"\0\0"))
            while text[stop] & 0xC0 == 0x80:
                stop -= 1
        yield slice(start, stop)
        start = stop


def _cut(marked: bytes) -> int:
    """Return where *marked* may end: not within an escape, nor between the halves of a pair."""
    # A pair has 12 bytes, so an escape or a pair that is cut begins among the last 11.
    cut = marked.find(b"\\", len(marked) - 11)
    if cut < 0:
        return len(marked)
    return cut - 6 if _HIGH.fullmatch(marked, cut - 6, cut) else cut
