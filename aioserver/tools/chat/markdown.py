"""Draws an answer as Markdown with rich, an optional package, while it comes.

Incomplete Markdown (CommonMark 0.31) is cut into blocks which later text cannot change: all but
the last one of its whole lines. These are printed once and scroll away as any output. The last
block is drawn below them, and redrawn when more of it comes, at most each DRAW_INTERVAL. If it is
taller than the terminal, only its end is shown until it is finished. So the work for an answer
grows with its length and not with its square.

A block that exceeds a bound is cut, too: a list in front of an item; each further piece of a code
block or a table repeats its first lines. As a result, a link whose address is defined in another
block is shown as it is written, and emphasis ends where a paragraph is cut.

The output of rich is made safe for the terminal once more: `&#13;`, and `%1b` in a link, become
control characters only there. HTML is text (else `List<String>` would lose its half), and links
are written out, so that a person sees where a link leads.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Self

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

    from markdown_it.token import Token
    from rich.console import ConsoleOptions, RenderResult

# The last block is redrawn some ten times a second, so it is bounded.
MAX_CHARACTERS = 4096
# Seconds.
DRAW_INTERVAL = 0.08
# Seconds after which a wait shows its duration, since nothing else may ever come; and seconds of
# silence in the middle of an answer after which the same is shown.
LONG, SILENCE = 2.0, 5.0
# HTML is text; rich itself leaves HTML out, and fails at a lone `</kbd>`.
PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])


class Block(NamedTuple):
    """A document of its own. *joined*: it continues the block before it, without a blank line
    between.
    """

    source: str
    joined: bool = False


class Blocks:
    """Text in, finished blocks out.

    Always: the finished blocks and `last` together are the text so far; each further piece of a
    code block or a table repeats its first lines. No block is larger than the bound and these
    lines.
    """

    def __init__(self) -> None:
        self._rest = self._opening = ""
        self._joined = False

    @property
    def last(self) -> Block:
        """The block that is not finished yet."""
        return Block(self._opening + self._rest, self._joined)

    def take(self, text: str) -> list[Block]:
        """Add *text*; return the blocks that it finishes."""
        self._rest += text
        finished: list[Block] = []
        while True:
            whole = self._rest[: self._rest.rfind("\n", 0, MAX_CHARACTERS) + 1]
            source = self._opening + whole
            tokens = [token for token in PARSER.parse(source) if token.map]
            starts = [token.map[0] for token in tokens if not token.level and token.map]
            opening: str | None = None
            if len(starts) < 2:
                if len(self._rest) <= MAX_CHARACTERS:
                    return finished
                # The items of a list, or the paragraphs of a quotation.
                parts = [token.map[0] for token in tokens if token.level == 1 and token.map]
                if parts and parts[-1] > starts[0] and tokens[0].type != "table_open":
                    starts.append(parts[-1])
                    opening = ""
                else:
                    opening = _opening(tokens, source)
            lines = source.split("\n")
            ends = [sum(len(line) + 1 for line in lines[:start]) for start in starts[1:]]
            if not ends:
                space = self._rest.rfind(" ", 1, MAX_CHARACTERS) + 1
                ends = [len(source) if whole else len(self._opening) + (space or MAX_CHARACTERS)]
                source = self._opening + self._rest
            for begin, end in itertools.pairwise((0, *ends)):
                finished.append(Block(source[begin:end], self._joined))
                self._joined = False
            self._rest = self._rest[ends[-1] - len(self._opening) :]
            self._opening, self._joined = opening or "", opening is not None


def _opening(tokens: list[Token], source: str) -> str | None:
    """Return the lines that must precede a piece which continues the block *source*, whose
    *tokens* have their lines in it; None if that block has ended.
    """
    if tokens and (last := tokens[-1]).type == "fence":
        assert last.map is not None
        # A closed code block has two lines more than its code.
        if last.map[1] - last.map[0] < last.content.count("\n") + 2:
            return f"{last.markup}{last.info}\n"
        return "" if last.level else None
    if source.endswith("\n\n"):
        return None
    if tokens and tokens[0].type == "table_open":
        return "".join(source.splitlines(keepends=True)[:2])
    return ""


class _Code(markdown.CodeBlock):
    """Code without a frame: a frame would part the pieces of a long one, and be copied with it."""

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
        self._blocks = Blocks()
        self._taken = ""
        self._anything = False
        # The current wait, and since when, if that is shown; and its line as drawn.
        self._note, self._line = "", ""
        self._since = float("inf")
        # The time of the last text.
        self._heard = float("inf")
        self._drawing: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._live.start()
        self._drawing = asyncio.create_task(self._draw_on())
        return self

    async def __aexit__(self, *_exc: object) -> None:
        assert self._drawing is not None
        self._drawing.cancel()
        await asyncio.wait([self._drawing])
        self._note, self._heard = "", float("inf")
        self._draw(end=True)
        self._live.stop()
        await super().__aexit__()

    def text(self, piece: str) -> None:
        """Add *piece*, and draw it soon.

        Raises:
            OSError: the terminal could not be written.
        """
        self._note = ""
        if self._plain:
            self._draw()
            super().text(piece)
            return
        self._heard = time.monotonic()
        self._taken += safe(piece)
        if self._drawing is not None and self._drawing.done():
            self._drawing.result()

    def note(self, text: str, *, progress: bool = False) -> None:
        """Show *text* on a line below the answer, until more of the answer comes."""
        self._note = printable(text)
        self._since = float("inf") if progress else time.monotonic()
        self._draw()

    async def _draw_on(self) -> None:
        while True:
            await asyncio.sleep(DRAW_INTERVAL)
            self._draw()

    def _draw(self, *, end: bool = False) -> None:
        """Print the finished blocks in place of what was shown, and show the last block below
        them.
        """
        line, taken, self._taken = self._wait(), self._taken, ""
        if not (end or taken or line != self._line):
            return
        self._line = line
        # At the end the last line counts as whole.
        finished = self._blocks.take(f"{taken}\n" if end else taken)
        if end:
            finished.append(self._blocks.last)
            self._blocks = Blocks()
        drawn: list[Segment] = []
        for block in finished:
            drawn += _joined(self._drawn(block))
            self._anything = bool(drawn) or self._anything
        if drawn:
            self._console.print(Segments(drawn), end="")
        else:
            self._live.refresh()

    def _wait(self) -> str:
        """Return the line of the current wait."""
        now = time.monotonic()
        if (silence := now - self._heard) >= SILENCE and not self._note:
            return f"nothing has come for {silence:.0f} s; Ctrl-C stops the answer"
        long = self._note and now - self._since >= LONG
        return f"{self._note} ({now - self._since:.0f} s)" if long else self._note

    def __rich_console__(self, console: Console, _options: ConsoleOptions) -> RenderResult:
        """Draw the end of the last block, and the current wait.

        One line stays free: a full screen would scroll, and lines that scrolled away cannot be
        replaced.
        """
        room = max(1, console.height - 1 - bool(self._line))
        yield Segments(_joined(self._drawn(self._blocks.last)[-room:]))
        if self._line:
            yield Text(self._line, no_wrap=True, overflow="crop", end="")

    def _drawn(self, block: Block) -> list[list[Segment]]:
        """Return the lines of *block*, after a blank one below another block."""
        if not block.source.strip():
            return []
        options = self._console.options.update(height=None)
        rendered = self._console.render_lines(AnswerMarkdown(block.source), options, pad=False)
        lines = [_safe_line(line) for line in rendered]
        if not block.source.lstrip().startswith(("```", "~~~")):
            # rich puts blank lines around lists, quotes and tables; blank lines of code belong to
            # the code.
            while lines and not lines[-1]:
                lines.pop()
            while lines and not lines[0]:
                del lines[0]
        return [[], *lines] if self._anything and not block.joined else lines


def _joined(lines: list[list[Segment]]) -> list[Segment]:
    return [segment for line in lines for segment in (*line, Segment.line())]


def _safe_line(segments: list[Segment]) -> list[Segment]:
    """Return a line without control functions that are not rich's own, and without the trailing
    spaces that rich adds, which a person would copy.
    """
    clean = [
        Segment(safe(segment.text).replace("\n", " ").replace("\t", " "), segment.style)
        for segment in segments
        if not segment.control
    ]
    while clean and not clean[-1].text.rstrip():
        clean.pop()
    if clean:
        clean[-1] = Segment(clean[-1].text.rstrip(), clean[-1].style)
    return clean
