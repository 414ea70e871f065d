"""Draws an answer as Markdown with rich, an optional package, while it comes.

Later text cannot change any block of Markdown (CommonMark 0.31) but the last one. So finished
blocks are printed once, and scroll away as any output. The last block is drawn below them, and
redrawn when more of it comes. If it is taller than the terminal, only its end is shown until it is
finished. As a result, a link whose address is defined in another block is shown as it is written.

The output of rich is made safe for the terminal once more: `&#13;`, and `%1b` in a link, become
control characters only there. HTML is text (else `List<String>` would lose its half), and links
are written out, so that a person sees where a link leads.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from typing import TYPE_CHECKING, ClassVar, Self

from markdown_it import MarkdownIt
from rich import markdown
from rich.console import Console
from rich.live import Live
from rich.segment import Segment, Segments
from rich.syntax import Syntax
from rich.text import Text

from aioserver.tools.chat.display import Display, safe
from aioserver.tools.remote import printable

if TYPE_CHECKING:
    from typing import TextIO

    from rich.console import ConsoleOptions, RenderResult

# Seconds between two drawings at least, and the times that a drawing took: a large block, which
# takes long to draw, is drawn less often.
DRAW_INTERVAL, PAUSES = 0.08, 10
# Seconds after which a wait shows its duration, since nothing else may ever come; and seconds of
# silence in the middle of an answer after which the same is shown.
LONG, SILENCE = 2.0, 5.0
# HTML is text; rich itself leaves HTML out, and fails at a lone `</kbd>`.
PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])


def split(text: str) -> tuple[list[str], str]:
    """Return the finished blocks of *text*, and the rest, which more text may change."""
    whole = text[: text.rfind("\n") + 1]
    starts = [token.map[0] for token in PARSER.parse(whole) if token.map and not token.level]
    ends = [0, *itertools.accumulate(len(line) + 1 for line in whole.split("\n"))]
    cuts = [0, *(ends[line] for line in starts[1:])]
    return [text[begin:end] for begin, end in itertools.pairwise(cuts)], text[cuts[-1] :]


class _Code(markdown.CodeBlock):
    """Code without a frame, which would be copied with it."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the code, its first and last lines included even if they are blank."""
        code = self.text.plain.removesuffix("\n")
        yield Syntax(
            code, self.lexer_name, theme=self.theme, word_wrap=True, background_color="default"
        )


class AnswerMarkdown(markdown.Markdown):
    """Markdown in the colours that the person has chosen for the terminal."""

    elements: ClassVar = {**markdown.Markdown.elements, "fence": _Code, "code_block": _Code}

    def __init__(self, source: str) -> None:
        super().__init__("", code_theme="ansi_dark", hyperlinks=False)
        self.parsed = PARSER.parse(source)


class AnswerConsole(Console):
    """A console whose cursor is always shown: a second signal leaves no time to restore it."""

    def show_cursor(self, show: bool = True) -> bool:  # noqa: ARG002 - rich's signature
        """Keep the cursor shown."""
        return False


class DrawnDisplay(Display):
    """Draws one answer on *screen*, a terminal, and below it the current wait. If the answer goes
    elsewhere, to *out*, only the wait is drawn.

    It belongs to the event loop of its block.
    """

    def __init__(self, out: TextIO, screen: TextIO, console: Console | None = None) -> None:
        super().__init__(out, terminal=False)
        self._plain = out is not screen
        self._console = console or AnswerConsole(file=screen, highlight=False)
        # The display itself is the renderable.
        self._live = Live(
            self,
            console=self._console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            vertical_overflow="crop",
        )
        # The text that is not printed yet, and whether any was printed above it.
        self._rest, self._printed = "", False
        # The current wait, and the time from which its duration counts, or that of a silence.
        self._note, self._since = "", math.inf
        # The text and the line of the current wait, as they were last drawn.
        self._shown = "", ""
        self._drawing: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._live.start()
        self._drawing = asyncio.create_task(self._draw_on())
        return self

    async def __aexit__(self, *_exc: object) -> None:
        assert self._drawing is not None
        self._drawing.cancel()
        await asyncio.wait([self._drawing])
        self._note, self._since = "", math.inf
        self._draw(end=True)
        self._live.stop()
        await super().__aexit__()

    def text(self, piece: str) -> None:
        """Add *piece*, and draw it soon.

        Raises:
            OSError: the terminal could not be written.
        """
        self._note, self._since = "", math.inf
        if self._plain:
            self._draw()
            super().text(piece)
            return
        self._since = time.monotonic()
        self._rest += safe(piece)
        if self._drawing is not None and self._drawing.done():
            self._drawing.result()

    def note(self, text: str, *, progress: bool = False) -> None:
        """Show *text* on a line below the answer, until more of the answer comes."""
        self._note = printable(text)
        self._since = math.inf if progress else time.monotonic()
        self._draw()

    async def _draw_on(self) -> None:
        took = 0.0
        while True:
            await asyncio.sleep(max(DRAW_INTERVAL, PAUSES * took))
            began = time.perf_counter()
            self._draw()
            took = time.perf_counter() - began

    def _draw(self, *, end: bool = False) -> None:
        """If anything has changed, print the finished blocks in place of what was shown, and show
        the last block below them. At the *end* all blocks are finished.
        """
        waited = time.monotonic() - self._since
        line = self._note
        if self._note and waited >= LONG:
            line += f" ({waited:.0f} s)"
        elif not self._note and waited >= SILENCE:
            line = f"nothing has come for {waited:.0f} s; Ctrl-C stops the answer"
        if not end and self._shown == (self._rest, line):
            return
        finished, self._rest = split(self._rest)
        if end:
            finished, self._rest = [*finished, self._rest], ""
        self._shown = self._rest, line
        lines: list[list[Segment]] = []
        for block in finished:
            lines += self._drawn(block)
            self._printed = self._printed or bool(lines)
        if lines:
            self._console.print(_joined(lines), end="")
        else:
            self._live.refresh()

    def __rich_console__(self, console: Console, _options: ConsoleOptions) -> RenderResult:
        """Draw the end of the last block, and the current wait.

        One line stays free: a full screen would scroll, and lines that scrolled away cannot be
        replaced.
        """
        rest, line = self._shown
        yield _joined(self._drawn(rest)[-max(1, console.height - 1 - bool(line)) :])
        if line:
            yield Text(line, no_wrap=True, overflow="crop", end="")

    def _drawn(self, block: str) -> list[list[Segment]]:
        """Return the lines of *block*, after a blank one below another block. They are without
        control functions that are not rich's own, and without the trailing spaces that rich adds,
        which a person would copy.
        """
        if not block.strip():
            return []
        options = self._console.options.update(height=None)
        lines: list[list[Segment]] = []
        for rendered in self._console.render_lines(AnswerMarkdown(block), options, pad=False):
            line = [
                Segment(safe(text).replace("\n", " ").replace("\t", " "), style)
                for text, style, control in rendered
                if not control
            ]
            while line and not line[-1].text.strip():
                line.pop()
            if line:
                line[-1] = Segment(line[-1].text.rstrip(), line[-1].style)
            lines.append(line)
        if not block.lstrip().startswith(("```", "~~~")):
            # rich puts blank lines around lists, quotes and tables; blank lines of code belong to
            # the code.
            while lines and not lines[-1]:
                lines.pop()
            while lines and not lines[0]:
                del lines[0]
        return [[], *lines] if self._printed else lines


def _joined(lines: list[list[Segment]]) -> Segments:
    return Segments(segment for line in lines for segment in (*line, Segment.line()))
