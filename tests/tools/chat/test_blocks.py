"""Markdown, cut into blocks while it comes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aioserver.tools.chat import markdown
from aioserver.tools.chat.markdown import MAX_CHARACTERS, Block, Blocks

TOKENS = (
    *("# ", "\n", "\n\n", "- ", "  ", "1. ", "```", "```python\n", "~~~\n", "> ", "| a | b |\n"),
    *("|---|---|\n", "word ", "\t", "    ", "---\n", "中"),
)
texts = st.lists(st.sampled_from(TOKENS), max_size=60).map("".join)


def cut(text: str, *ends: int) -> list[Block]:
    """The blocks of *text*, which is taken in pieces that end at *ends*."""
    blocks, result, start = Blocks(), [], 0
    for end in (*sorted(ends), len(text)):
        result += blocks.take(text[start:end])
        start = max(start, end)
    return [*result, blocks.last]


@given(texts, st.lists(st.integers(0, 200), max_size=8))
@settings(max_examples=300)
def test_blocks_are_the_text_and_do_not_depend_on_how_it_comes(text: str, ends: list[int]) -> None:
    whole = cut(text)
    pieces = cut(text, *ends)

    assert "".join(block.source for block in whole) == text
    assert pieces == whole


@given(texts, st.lists(st.integers(0, 200), max_size=8))
@settings(max_examples=300)
def test_where_a_large_block_is_cut_does_not_depend_on_how_it_comes(
    text: str, ends: list[int]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(markdown, "MAX_CHARACTERS", 24)

        assert cut(text, *ends) == cut(text)


@pytest.mark.parametrize(
    "block", ["```\n" + "x\n" * 2030 + "```\n", "| a |\n|---|\n" + "| b |\n" * 675 + "\n", "a\n\n"]
)
def test_what_follows_a_large_block_that_has_ended_is_no_part_of_it(block: str) -> None:
    *_, last = cut(block + "word " * 1000)

    assert last.source.startswith("word word")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one\ntwo\n\nthree\n", ["one\ntwo\n\n", "three\n"]),
        ("one\n# Head\ntwo\n", ["one\n", "# Head\n", "two\n"]),
        ("one\n```py\na\n\nb\n```\ntwo\n", ["one\n", "```py\na\n\nb\n```\n", "two\n"]),
        ("````\n```\n````\nx\n", ["````\n```\n````\n", "x\n"]),
        ("- a\n\n  more\n\n- b\n\nend\n", ["- a\n\n  more\n\n- b\n\n", "end\n"]),
        (
            "1. a\n   ```\n   x\n\n   y\n   ```\n1. b\n",
            ["1. a\n   ```\n   x\n\n   y\n   ```\n1. b\n"],
        ),
        ("- a\n# Head\n", ["- a\n", "# Head\n"]),
        ("\n\n\none\n\n", ["\n\n\none\n\n", ""]),
    ],
)
def test_blocks_end_where_a_reader_expects_it(text: str, expected: list[str]) -> None:
    blocks = [block.source for block in cut(text)]

    assert [block for block in blocks if block] == [block for block in expected if block]


@pytest.mark.parametrize(
    "line", ["word " * 10 + "\n", "- item\n", "| a | b |\n", "    x\n", "word ", "x", "> q\n"]
)
@pytest.mark.parametrize("start", ["", "```python\n", "- item\n\n  ```\n"])
def test_no_block_is_much_larger_than_the_bounds(line: str, start: str) -> None:
    blocks = cut(start + line * 4_000)

    assert max(len(block.source) for block in blocks) <= MAX_CHARACTERS + 100


def test_a_piece_of_a_long_code_block_or_table_has_its_beginning() -> None:
    code = cut("```python\n" + "x = 1\n" * 1000 + "```\nend\n")
    table = cut("| a | b |\n|---|:-:|\n" + "| 1 | 2 |\n" * 1000)

    assert [block.source[:10] for block in code] == ["```python\n"] * 2 + ["end\n"]
    assert [block.joined for block in code] == [False, True, False]
    assert len(table) > 2
    assert all(block.source.startswith("| a | b |\n|---|:-:|\n") for block in table)


def test_a_long_list_is_cut_in_front_of_an_item() -> None:
    blocks = cut("- item\n  that goes on\n" * 1000)

    assert len(blocks) > 2
    assert all(block.source.startswith("- item") for block in blocks if block.source)
