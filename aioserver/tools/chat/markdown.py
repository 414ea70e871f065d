"""Draws an answer as Markdown with rich, an optional package, while it comes.

Markdown that still comes (CommonMark 0.31) is cut into blocks which later text cannot change. A
finished block is printed once and scrolls away as any output. The last block is drawn below them,
and again when more of it comes, at most each DRAW_INTERVAL; of one that is taller than the
terminal the end is shown until it is finished. So the work for an answer grows with its length and
not with its square. A block ends

- with a blank line, but a list goes on after it with an indented line or another item;
- in front of a heading or a code fence, and behind both;
- when it is larger than a bound, with the line that it is in: a long code block is then drawn in
  pieces that look like one.

A list is cut in front of an item, and a later piece of a table has the table's head again. What is
lost: a link whose address is defined below the block that uses it is shown as it is written, and
emphasis ends where a paragraph is cut.

What rich has drawn is made safe for the terminal again: `&#13;`, and `%1b` in a link, become
control characters only there. HTML is text (else `List<String>` would lose its half), and links
are written out: what a person sees is where a link leads.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from markdown_it import MarkdownIt
from rich import markdown
from rich.console import Console
from rich.segment import Segment, Segments
from rich.syntax import Syntax

from aioserver.tools.chat.status import fitting, safe

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import TextIO

    from rich.console import ConsoleOptions, RenderResult

# The last block is drawn again some ten times a second: 4 KiB of Markdown take some 5 ms.
MAX_CHARACTERS = 4096
MAX_LINES = 50

_FENCE = re.compile(r"(?P<indent>[ \t]*)(?P<fence>`{3,}(?=[^`]*$)|~{3,})")
_ITEM = re.compile(r"[ \t]*(?:[-*+]|\d{1,9}[.)])(?:[ \t]+|$)")
_RULER = re.compile(r" {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*\n")
_HEADING = re.compile(r" {0,3}#{1,6}(?:[ \t]|$)")


@dataclass(frozen=True, slots=True)
class Block:
    """A part of the text. *joined*: it goes on with what the block before it began, without a
    blank line between.

    *opening* is what a later piece of a code block or table needs in front: the line that begins
    it, or its head.
    """

    text: str
    joined: bool = False
    opening: str = ""

    @property
    def markdown(self) -> str:
        """The block as a document of its own."""
        return self.opening + self.text


class Blocks:
    """Text in, finished blocks out.

    Always: the texts of the finished blocks and of `rest` are what was fed; no block is much
    larger than the bounds, however the text was cut.
    """

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._characters = 0
        # The last line, which has no end yet.
        self._line = ""
        # The opening line of the code block that the next line is in, and its fence.
        self._opening = ""
        self._fence = ""
        self._list = False
        self._after_blank = False
        self._joined = False
        self._reopened = ""
        self._finished: list[Block] = []

    @property
    def rest(self) -> Block:
        """Return the block that is not finished yet."""
        return Block("".join(self._lines) + self._line, self._joined, self._reopened)

    def feed(self, text: str) -> list[Block]:
        """Add *text*; return the blocks that it finishes."""
        self._finished = []
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._take(f"{line}\n")
        while len(self._line) > MAX_CHARACTERS:
            end = self._line.rfind(" ", 1, MAX_CHARACTERS) + 1 or MAX_CHARACTERS
            line, self._line = self._line[:end], self._line[end:]
            self._add(line)
            self._cut()
        return self._finished

    def _take(self, line: str) -> None:
        """Take a whole line into account."""
        if self._fence:
            self._add(line)
            mark = line.strip()
            if len(mark) >= len(self._fence) and not mark.strip(self._fence[0]):
                self._fence = self._opening = ""
                if not self._list:
                    self._end()
        elif not line.strip():
            self._add(line)
            self._after_blank = True
            if not self._list:
                self._end()
        else:
            self._take_words(line)
        # A list waits for its next item, but not for ever.
        if self._full(2 if self._list else 1):
            self._cut()

    def _take_words(self, line: str) -> None:
        """Take a line into account that is neither blank nor code."""
        indented = line.startswith(("  ", "\t"))
        item = _ITEM.match(line)
        if self._list and self._after_blank and not (indented or item):
            self._end()
        self._after_blank = False
        if self._list and item and not indented and self._full(1):
            self._cut()
        fence = _FENCE.match(line, item.end() if item else 0)
        inside = bool(item) or (self._list and indented)
        heading = not inside and _HEADING.match(line)
        if heading or (fence and not inside):
            self._end()
        self._add(line)
        self._list = self._list or bool(item)
        if fence:
            self._fence, self._opening = fence["fence"], line[fence.start("fence") :]
        elif heading:
            self._end()

    def _full(self, factor: int) -> bool:
        return self._characters > factor * MAX_CHARACTERS or len(self._lines) > factor * MAX_LINES

    def _add(self, line: str) -> None:
        self._lines.append(line)
        self._characters += len(line)

    def _end(self) -> None:
        """Finish the block, unless there are only blank lines in it."""
        if any(not line.isspace() for line in self._lines):
            self._finish()
            self._joined, self._reopened, self._list = False, "", False

    def _cut(self) -> None:
        """Finish a block that is too large; the next one goes on with it."""
        if self._lines:
            opening = self._opening or self._table_head() or self._reopened_table()
            self._finish()
            self._joined, self._reopened, self._list = True, opening, False

    def _table_head(self) -> str:
        """Return the head of the table in this block and its ruler; "" if there is none."""
        for head, ruler in zip(self._lines, self._lines[1:], strict=False):
            if "|" in ruler and _RULER.fullmatch(ruler):
                return head + ruler
        return ""

    def _reopened_table(self) -> str:
        return self._reopened if "|" in self._reopened else ""

    def _finish(self) -> None:
        self._finished.append(Block("".join(self._lines), self._joined, self._reopened))
        self._lines, self._characters = [], 0


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
        # One line stays free: a full screen would scroll, and lines that scrolled away cannot be
        # replaced.
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
        """Return the lines of *block* for the terminal, after a blank one below another block."""
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
