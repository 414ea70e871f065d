"""Where an answer goes: to a pipe as it is, to a terminal without what it would obey."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from aioserver.tools.chat.status import can_be_drawn_on, safe

if TYPE_CHECKING:
    from typing import TextIO


class Display(Protocol):
    """Shows one answer. `end` must be called, whatever happens."""

    def text(self, piece: str) -> None:
        """Show the next piece of the text.

        Raises:
            OSError: it could not be written.
        """

    def note(self, text: str) -> None:
        """Show *text* below what has come until more comes, where a line can be replaced."""

    def end(self) -> None:
        """Show what has not been shown, and end the line.

        Raises:
            OSError: it could not be written.
        """


class PlainDisplay:
    """Writes each piece at once. On a *terminal* control characters are taken out."""

    def __init__(self, out: TextIO, *, terminal: bool) -> None:
        self._out = out
        self._terminal = terminal
        self._last = "\n"

    def text(self, piece: str) -> None:
        """Write the next piece of the text."""
        if self._terminal:
            piece = safe(piece)
        if piece:
            self._out.write(piece)
            self._out.flush()
            self._last = piece[-1]

    def note(self, text: str) -> None:
        """Show nothing: the line belongs to the answer."""

    def end(self) -> None:
        """End the last line, if it has no end: what follows in a terminal or a file begins a
        line.
        """
        if self._last != "\n":
            self._out.write("\n")
            self._last = "\n"
        self._out.flush()


def make_display(out: TextIO) -> Display:
    """Return a display that fits *out*: Markdown on a terminal that can be drawn on, where rich is
    installed.

    It must be called in the event loop of the answer.
    """
    terminal = out.isatty()
    if terminal and can_be_drawn_on():
        try:
            from aioserver.tools.chat.markdown import MarkdownDisplay  # noqa: PLC0415 - optional

            return MarkdownDisplay(out)
        except ModuleNotFoundError:
            pass
    return PlainDisplay(out, terminal=terminal)
