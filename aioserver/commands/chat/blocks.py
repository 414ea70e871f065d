"""Cuts Markdown that still comes (CommonMark 0.31) into blocks which later text cannot change.

A display draws a finished block once, and only the last one again and again, so the work for an answer grows with its length and
not with its square. A block ends

- with a blank line, but a list goes on after it with an indented line or another item;
- in front of a heading or a code fence, and behind both;
- when it is larger than a bound, with the line that it is in: a long code block is then drawn in pieces that look like one.

A list is cut in front of an item, and a later piece of a table has the table's head again. What is lost: a link whose address
is defined below the block that uses it is shown as it is written, and emphasis ends where a paragraph is cut.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# The last block is drawn again some ten times a second: 4 KiB of Markdown take some 5 ms.
MAX_CHARACTERS = 4096
MAX_LINES = 50

_FENCE = re.compile(r"(?P<indent>[ \t]*)(?P<fence>`{3,}(?=[^`]*$)|~{3,})")
_ITEM = re.compile(r"[ \t]*(?:[-*+]|\d{1,9}[.)])(?:[ \t]+|$)")
_RULER = re.compile(r" {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*\n")
_HEADING = re.compile(r" {0,3}#{1,6}(?:[ \t]|$)")


@dataclass(frozen=True, slots=True)
class Block:
    """A part of the text. *joined*: it goes on with what the block before it began, without a blank line between.

    *opening* is what a later piece of a code block or table needs in front: the line that begins it, or its head.
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

    Always: the texts of the finished blocks and of `rest` are what was fed; no block is much larger than the bounds, however
    the text was cut.
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
        """Return the head of the table in this block, with the ruler below it; "" if there is none."""
        for head, ruler in zip(self._lines, self._lines[1:], strict=False):
            if "|" in ruler and _RULER.fullmatch(ruler):
                return head + ruler
        return ""

    def _reopened_table(self) -> str:
        return self._reopened if "|" in self._reopened else ""

    def _finish(self) -> None:
        self._finished.append(Block("".join(self._lines), self._joined, self._reopened))
        self._lines, self._characters = [], 0
