"""The status line: what is waited for, on the last line of a terminal, until there is something
better to show.

Text of a model or a server is made safe before it is sent to a terminal: ECMA-48 control functions
are taken out. A terminal obeys what follows an ESC or a C1 control character: it can be made to
lie about what it shows, to set its title, and some terminals to type. Bidirectional overrides (UAX
#9) show a text in another order than it has.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import time
from typing import TYPE_CHECKING, Self
from unicodedata import east_asian_width

from aioserver.tools.remote import printable

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TextIO

# C0 but tab and line feed, DEL, C1; line and paragraph separator, bidirectional embeddings,
# overrides and isolates; halves of a surrogate pair, which no encoding has.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
REPLACEMENT = "\ufffd"


def safe(text: str) -> str:
    """Return *text* without characters that a terminal obeys; each is a replacement character.

    Lines end with LF: a carriage return, which lets a terminal write over its line, is taken out.
    """
    return _UNSAFE.sub(REPLACEMENT, text.replace("\r", ""))


# Seconds. A wait that is longer says how long it is; it may be that nothing else ever comes.
LONG = 2.0
TICK = 1.0
DEFAULT_WIDTH = 80
NEVER = float("inf")
# Seconds without a word in the middle of an answer, after which that is said.
SILENCE = 5.0
# Characters of what a model thinks.
MAX_THOUGHT = 60


def can_be_drawn_on() -> bool:
    """Return whether a terminal of this name can move its cursor."""
    return os.environ.get("TERM", "") not in {"", "dumb"}


def fitting(text: str, columns: int) -> str:
    """Return as much of *text* as has room in *columns*; wide characters (UAX #11) take two."""
    for position, character in enumerate(text):
        columns -= 2 if east_asian_width(character) in {"W", "F"} else 1
        if columns < 0:
            return text[:position]
    return text


class Status:
    """A line on *err*, if that is a terminal, which says inside an `async with` what is waited for,
    and is blank again at the end.

    Once a text has come (`heard`), the last line of the terminal is the text's, and *note* is told
    how long nothing more has come: the provider may be slow, or the connection lost, and then the
    client library tries to resume the answer. Errors of the terminal cost the line and nothing
    else.
    """

    def __init__(self, err: TextIO | None, note: Callable[[str], None]) -> None:
        drawn = err is not None and err.isatty() and can_be_drawn_on()
        self._err = err if drawn else None
        self._note = note
        self._text = ""
        self._thought = ""
        # Since when the text is shown, and when a text came the last time.
        self._since = self._heard = NEVER
        self._ticking: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._ticking = asyncio.create_task(self._tick())
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self.clear()
        if self._ticking is not None:
            self._ticking.cancel()
            await asyncio.wait([self._ticking])

    def show(self, text: str, *, progress: bool = False) -> None:
        """Show *text*, of any origin. *progress*: it shows by itself that something happens."""
        self._text = printable(text)
        self._since = NEVER if progress else time.monotonic()
        self._draw()

    def think(self, piece: str) -> None:
        """Show the end of what the model thinks, of which *piece* is the newest."""
        self._thought = (self._thought + piece)[-MAX_THOUGHT:]
        self.show(f"thinking: {self._thought.lstrip()}", progress=True)

    def heard(self) -> None:
        """Show nothing, and note that a piece of the answer has come."""
        self.clear()
        self._heard = time.monotonic()

    def clear(self) -> None:
        """Show nothing, and wait for nothing."""
        self._heard, self._thought = NEVER, ""
        if self._text:
            self._text = ""
            self._write("\r\x1b[K")

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            now = time.monotonic()
            if self._text and now - self._since >= LONG:
                self._draw()
            if (seconds := now - self._heard) >= SILENCE:
                self._note(f"nothing has come for {seconds:.0f} s; Ctrl-C stops the answer")

    def _draw(self) -> None:
        if self._err is None:
            return
        seconds = time.monotonic() - self._since
        text = f"{self._text} ({seconds:.0f} s)" if seconds >= LONG else self._text
        # One column stays free: in some terminals the cursor would go to the next line.
        self._write(f"\r\x1b[K{fitting(text, self._width() - 1)}")

    def _width(self) -> int:
        try:
            return (
                self._err and os.get_terminal_size(self._err.fileno()).columns
            ) or DEFAULT_WIDTH
        except (OSError, ValueError):
            return DEFAULT_WIDTH

    def _write(self, text: str) -> None:
        if self._err is not None:
            with contextlib.suppress(OSError, ValueError):
                self._err.write(text)
                self._err.flush()
