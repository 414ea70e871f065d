"""The output of an answer: unchanged to a pipe, and without control functions to a terminal.

ECMA-48 control functions are removed from any text before a terminal gets it. A terminal obeys any
sequence that follows an ESC or a C1 control character: the sequence can falsify the screen, set
the title, and make some terminals type. Bidirectional overrides (UAX #9) show a text in another
order than it has.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from typing import TextIO

# C0 but tab and line feed, DEL, C1; line and paragraph separator, bidirectional embeddings,
# overrides and isolates; halves of a surrogate pair, which no encoding has.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
REPLACEMENT = "\ufffd"


def safe(text: str) -> str:
    """Return *text* in which each character that a terminal obeys is a replacement character.

    Lines end with LF: a carriage return, which lets a terminal write over its line, is removed.
    """
    return _UNSAFE.sub(REPLACEMENT, text.replace("\r", ""))


class Display:
    """Writes one answer to *out* inside an `async with`, each piece at once. On a *terminal*
    control characters are replaced.

    Its methods, and the end of the block, raise an OSError if *out* cannot be written.
    """

    def __init__(self, out: TextIO, *, terminal: bool) -> None:
        self._out = out
        self._terminal = terminal
        self._last = "\n"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        # The next output in a terminal or a file begins a line.
        if self._last != "\n":
            self._out.write("\n")
        self._out.flush()

    def text(self, piece: str) -> None:
        """Show the next piece of the text."""
        if self._terminal:
            piece = safe(piece)
        if piece:
            self._out.write(piece)
            self._out.flush()
            self._last = piece[-1]

    def note(self, text: str, *, progress: bool = False) -> None:
        """Show *text*, which names the current wait, until the answer begins, if a line can be
        replaced.

        *progress*: the text itself shows that something happens.
        """
