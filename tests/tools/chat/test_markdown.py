"""An answer drawn as Markdown: what is on the screen at the end, whatever came and however it
came.
"""

from __future__ import annotations

import io
import random
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aioserver.tools.chat import markdown
from aioserver.tools.chat.markdown import AnswerConsole, DrawnDisplay
from tests.support.waiting import ticks

ROOT = Path(__file__).parents[3]
PAGES = ["README.md", "docs/faces.md", "docs/clients.md", "docs/install.md", "docs/keys.md"]
# What a display may send: colours, the cursor up, erase below.
CONTROL = re.compile(r"\x1b\[[\d;]*[mAK]|\r")
UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]")
TOKENS = (
    *("# ", "\n", "\n\n", "- ", "  ", "1. ", "```", "```python\n", "~~~\n", "> ", "| a | b |\n"),
    *("|---|---|\n", "word ", "\t", "    ", "---\n", "中"),
)
HOSTILE = (
    *(*TOKENS, "> > > > > > > ", "**", "`", "[x](http://a/%1b%5b2J)", "<http://a/%1b]0;x%07>"),
    *("<http://a/%9b2J>", "![i](http://b/%1b)", "</kbd>", "<kbd>", "<div>", "&#13;", "&#27;"),
    *("&#155;", "\x1b[2J", "\x9b2J", "\u202e", "[a]: http://x\n", "===\n", "🎉", "a" * 300),
)


def display_on(out: io.StringIO, **changes: Any) -> DrawnDisplay:
    return DrawnDisplay(out, out, console_of(out, **changes))


def console_of(out: io.StringIO, **changes: Any) -> AnswerConsole:
    settings: dict[str, Any] = {"width": 80, "height": 24, "color_system": None} | changes
    return AnswerConsole(file=out, force_terminal=True, highlight=False, **settings)


def screen(sent: str) -> list[str]:
    """The lines that a terminal of unlimited height shows in the end."""
    lines, row, column = [""], 0, 0
    for part in re.split(r"(\x1b\[[\d;]*[mAK]|\r|\n)", sent):
        if part == "\r":
            column = 0
        elif part == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif part.endswith("A") and part.startswith("\x1b"):
            row -= int(part[2:-1])
            assert row >= 0
        elif part == "\x1b[2K":
            # Lines are erased from below.
            lines[row:] = [""]
        elif not part.startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + part
            column += len(part)
    return lines


def drawn_at_once(text: str, **console: Any) -> list[str]:
    out = io.StringIO()
    shown = console_of(out, **console)
    options = shown.options.update(height=None)
    lines = shown.render_lines(markdown.AnswerMarkdown(text), options, pad=False)
    return ["".join(segment.text for segment in line).rstrip() for line in lines]


def words(lines: list[str]) -> list[str]:
    return [line.rstrip() for line in lines if line.strip()]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw in each turn of the loop, not ten times a second."""
    monkeypatch.setattr(markdown, "DRAW_INTERVAL", 0.0)
    monkeypatch.setattr(markdown, "PAUSES", 0)


def cut(text: str, *ends: int) -> list[str]:
    """The blocks of *text*, which comes in pieces that end at *ends*."""
    blocks, rest, start = list[str](), "", 0
    for end in (*sorted(ends), len(text)):
        finished, rest = markdown.split(rest + text[start:end])
        blocks, start = [*blocks, *finished], max(start, end)
    return [*blocks, rest]


@given(
    text=st.lists(st.sampled_from(TOKENS), max_size=60).map("".join),
    ends=st.lists(st.integers(0, 200), max_size=8),
)
@example(text="a\n#tag\n", ends=[3])  # half a line may still become another one
def test_blocks_are_the_text_and_do_not_depend_on_how_it_comes(text: str, ends: list[int]) -> None:
    whole = cut(text)

    assert "".join(whole) == text
    assert cut(text, *ends) == whole


@pytest.mark.parametrize(
    "blocks",
    [
        ["one\ntwo\n\n", "three\n"],
        ["one\n", "# Head\n", "two\n"],
        ["one\n", "```py\na\n\nb\n```\n", "two\n"],
        ["````\n```\n````\n", "x\n"],
        ["- a\n\n  more\n\n- b\n\n", "end\n"],
        ["1. a\n   ```\n   x\n\n   y\n   ```\n1. b\n"],
        ["- a\n", "# Head\n"],
        ["\n\n\none\n\n"],
    ],
)
def test_blocks_end_where_a_reader_expects_it(blocks: list[str]) -> None:
    assert cut("".join(blocks)) == blocks


@pytest.mark.parametrize("page", PAGES)
async def test_a_page_looks_the_same_piece_by_piece_as_at_once(page: str) -> None:
    text = (ROOT / page).read_text()
    dice = random.Random(page)
    out = io.StringIO()
    async with display_on(out, height=1000) as display:
        at = 0
        while at < len(text):
            size = dice.randint(1, 900)
            display.text(text[at : at + size])
            await ticks()
            at += size

    assert words(screen(out.getvalue())) == words(drawn_at_once(text))


async def test_nothing_that_a_model_says_reaches_the_terminal_as_a_control_function() -> None:
    dice = random.Random(17)
    for _ in range(60):
        out = io.StringIO()
        size = {"width": dice.choice([1, 2, 20, 80]), "height": dice.choice([1, 2, 24])}
        async with display_on(out, **size) as display:
            for _ in range(dice.randint(1, 40)):
                display.text(dice.choice(HOSTILE))
                if dice.random() < 0.2:
                    await ticks()

        sent = out.getvalue()

        assert not UNSAFE.search(CONTROL.sub("", sent)), sent


async def test_one_blank_line_is_between_two_blocks_and_those_of_code_stay() -> None:
    out = io.StringIO()
    async with display_on(out, height=100) as display:
        code = [f"x = {number}" if number % 3 else "" for number in range(150)]

        display.text("# Head\n\n\n- one\n- two\n\n\n> quote\n\n| a |\n|---|\n| b |\n\nend\n\n")
        display.text("\n".join(["```python", *code, "```"]))

    lines = [line.strip() for line in screen(out.getvalue())]
    assert lines[:12] == [
        "Head",
        "",
        "• one",
        "• two",
        "",
        "▌ quote",
        "",
        "a",
        "─",
        "b",
        "",
        "end",
    ]
    assert lines[13 : 13 + len(code)] == code


async def test_html_is_text() -> None:
    out = io.StringIO()
    async with display_on(out) as display:
        display.text("A `List<int>` and List<String>, <div>\n\n<p>whole</p>\n\n</kbd>")

    assert words(screen(out.getvalue())) == [
        "A List<int> and List<String>, <div>",
        "<p>whole</p>",
        "</kbd>",
    ]


async def test_a_block_taller_than_the_terminal_scrolls_nothing_away_that_is_replaced() -> None:
    out = io.StringIO()
    async with display_on(out, height=6) as display:
        for number in range(30):
            display.text(f"- item {number}\n")
            await ticks()
            ups = re.findall(r"(?:\x1b\[1A\x1b\[2K)+", out.getvalue())
            assert max(map(len, ups), default=0) < 5 * len("\x1b[1A\x1b[2K")

    assert words(screen(out.getvalue())) == [f" • item {number}" for number in range(30)]


async def test_a_note_stands_below_the_last_block_until_more_comes() -> None:
    out = io.StringIO()
    async with display_on(out, width=20) as display:
        display.text("One\n\ntwo")
        await ticks()
        display.note("nothing has come for a while")
        noted = screen(out.getvalue())
        display.text(" three")
        await ticks()
        more = screen(out.getvalue())
        display.note("nothing")

    assert noted == ["One", "", "two", "nothing has come for"]
    assert more == ["One", "", "two three"]
    assert screen(out.getvalue()) == ["One", "", "two three", ""]


async def test_a_long_answer_costs_as_much_as_its_length() -> None:
    """The number of characters sent, and not a time: each block is drawn again only while it is
    the last.
    """

    async def sent(blocks: int) -> int:
        out = io.StringIO()
        async with display_on(out) as display:
            for _ in range(blocks):
                for piece in ("Some ", "words ", "of a ", "block.\n\n"):
                    display.text(piece)
                    await ticks()
        return len(out.getvalue())

    assert await sent(200) <= 11 * await sent(20)


async def test_a_terminal_that_is_gone_is_an_error_of_the_next_piece() -> None:
    class Closable(io.StringIO):
        gone = False

        def write(self, text: str) -> int:
            if self.gone:
                raise OSError(5, "Input/output error")
            return super().write(text)

    out = Closable()
    display = await display_on(out).__aenter__()
    out.gone = True
    display.text("a")
    await ticks()

    with pytest.raises(OSError, match="Input/output"):
        display.text("b")
    with pytest.raises(OSError, match="Input/output"):
        await display.__aexit__()
