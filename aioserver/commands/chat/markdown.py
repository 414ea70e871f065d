"""Draws an answer as Markdown with rich, an optional package, while it comes.

Finished blocks are printed once and scroll away as any output. The last block is drawn below them, and again when more of it
comes, at most each DRAW_INTERVAL; of one that is taller than the terminal the end is shown until it is finished.

What rich has drawn is made safe for the terminal again: `&#13;`, and `%1b` in a link, become control characters only there. HTML is
text (else `List<String>` would lose its half), and links are written out: what a person sees is where a link leads.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, ClassVar

from markdown_it import MarkdownIt
from rich import markdown
from rich.console import Console
from rich.segment import Segment, Segments
from rich.syntax import Syntax

from aioserver.commands.chat.blocks import Blocks
from aioserver.commands.chat.safe_text import safe
from aioserver.commands.chat.status import fitting

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import TextIO

    from rich.console import ConsoleOptions, RenderResult

    from aioserver.commands.chat.blocks import Block

# Seconds.
DRAW_INTERVAL = 0.08
# Lines of a terminal with room for a note.
MIN_HEIGHT = 3
# The colours that the person has chosen for the terminal, on its own background.
CODE_THEME = "ansi_dark"


class _Heading(markdown.Heading):
    """A heading at the left, whatever its level."""

    LEVEL_ALIGN: ClassVar = {}


class _Code(markdown.CodeBlock):
    """Code without a frame: a frame would part the pieces of a long one, and be copied with it."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the code, its first and last lines included even if they are blank."""
        code = self.text.plain.removesuffix("\n")
        yield Syntax(
            code, self.lexer_name, theme=self.theme, word_wrap=True, background_color="default"
        )


class AnswerMarkdown(markdown.Markdown):
    """Markdown whose HTML is text; rich leaves HTML out, and fails at a lone `</kbd>`."""

    elements: ClassVar = {
        **markdown.Markdown.elements,
        "heading_open": _Heading,
        "fence": _Code,
        "code_block": _Code,
    }

    def __init__(self, source: str) -> None:
        super().__init__("", code_theme=CODE_THEME, hyperlinks=False)
        parser = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
        self.parsed = parser.parse(source)


class MarkdownDisplay:
    """Draws one answer on *out*, a terminal. `end` must be called; only `text` and `end` raise.

    It belongs to the event loop in which it is made.
    """

    def __init__(self, out: TextIO, console: Console | None = None) -> None:
        self._out = out
        self._console = console or Console(file=out, highlight=False)
        self._blocks = Blocks()
        self._finished: list[Block] = []
        # Lines on the screen that the next drawing replaces; the cursor is in the last one.
        self._shown = 0
        self._anything = False
        self._note = ""
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._next = 0.0
        self._error: OSError | None = None

    def text(self, piece: str) -> None:
        """Add *piece*, and draw it soon.

        Raises:
            OSError: the terminal could not be written.
        """
        self._finished += self._blocks.feed(safe(piece))
        self._note = ""
        if self._error is not None:
            raise self._error
        if self._timer is None:
            self._timer = self._loop.call_at(self._next, self._draw_by_timer)

    def note(self, text: str) -> None:
        """Show *text* below what has come, until more comes."""
        if self._console.height > MIN_HEIGHT and self._timer is None:
            self._note = fitting(text, self._console.width - 1)
            self._draw_by_timer()

    def end(self) -> None:
        """Draw what is left, and leave the cursor below it.

        Raises:
            OSError: the terminal could not be written.
        """
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._error is not None:
            raise self._error
        self._note = ""
        self._finished.append(self._blocks.rest)
        self._blocks = Blocks()
        self._draw()

    def _draw_by_timer(self) -> None:
        self._timer = None
        try:
            self._draw()
        except OSError as error:
            self._error = error
        self._next = self._loop.time() + DRAW_INTERVAL

    def _draw(self) -> None:
        """Replace what was shown by the finished blocks, and show the last one below them."""
        output = self._erasure()
        for block in self._finished:
            lines = self._lines(block)
            output += "".join(f"{line}\n" for line in lines)
            self._anything = self._anything or bool(lines)
        self._finished.clear()
        # One line stays free: a full screen would scroll, and lines that scrolled away cannot be replaced.
        room = self._console.height - (2 if self._note else 1)
        last = self._lines(self._blocks.rest)[-max(1, room) :]
        if self._note:
            last.append(self._note)
        self._shown = len(last)
        self._out.write(output + "\n".join(last))
        self._out.flush()

    def _erasure(self) -> str:
        if not self._shown:
            return ""
        up = f"\x1b[{self._shown - 1}A" if self._shown > 1 else ""
        return f"\r{up}\x1b[J"

    def _lines(self, block: Block) -> list[str]:
        """Return the lines of *block* as they are sent to the terminal, after a blank one if there is a block above."""
        if not block.text.strip():
            return []
        options = self._console.options.update(height=None)
        rendered = self._console.render_lines(AnswerMarkdown(block.markdown), options, pad=False)
        lines = [self._line(line) for line in rendered]
        if not block.markdown.lstrip().startswith(("```", "~~~")):
            # rich puts blank lines around lists, quotes and tables; those of code are the code's.
            while lines and not lines[-1].strip():
                lines.pop()
            while lines and not lines[0].strip():
                del lines[0]
        return ["", *lines] if self._anything and not block.joined else lines

    def _line(self, segments: Iterable[Segment]) -> str:
        """Return one line; whatever control functions it has are rich's own."""
        clean = [
            Segment(safe(segment.text).replace("\n", " ").replace("\t", " "), segment.style)
            for segment in segments
            if not segment.control
        ]
        # rich fills lines with spaces, which a person would copy.
        while clean and not clean[-1].text.rstrip():
            clean.pop()
        if clean:
            clean[-1] = Segment(clean[-1].text.rstrip(), clean[-1].style)
        with self._console.capture() as capture:
            self._console.print(Segments(clean), end="")
        return capture.get()
