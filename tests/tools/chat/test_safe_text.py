"""What is taken out of a text before a terminal gets it."""

from __future__ import annotations

import unicodedata

from aioserver.tools.chat.display import safe


def test_a_text_without_control_characters_is_as_it_was() -> None:
    text = "Tab\tand lines\nof Größe, 中文, עברית, and 👩‍👩‍👧"

    assert safe(text) == text


def test_no_control_character_is_left_but_tab_and_line_feed() -> None:
    everything = "".join(map(chr, range(0x110000)))

    left = {char for char in safe(everything) if unicodedata.category(char) in {"Cc", "Cs"}}

    assert left == {"\t", "\n"}


def test_an_escape_sequence_is_shown_and_not_obeyed() -> None:
    assert safe("a\x1b[2Jb\x9b31mc\u202ed\r\ne") == "a\ufffd[2Jb\ufffd31mc\ufffdd\ne"
