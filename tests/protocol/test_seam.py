"""The seam of a continued answer: what is found to be the rest of a text, and what is not."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

from aioserver.protocol.seam import (
    ANCHOR,
    BEGINNING,
    CLOSING,
    MAX_CHECKED,
    Anchored,
    Onward,
    SeamBroken,
    anchor_of,
    provable,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

TEXTS = 3_000
# Texts that repeat themselves, within themselves and at any cut.
PIECES = (
    *(
        "ha ",
        "0",
        "\n",
        "| a | b |\n",
        "| --- | --- |\n",
        "}\n",
        "    return\n",
        "ha",
        "ü",
        "👍🏽",
    ),
    *("Once upon a time there was a king. ", "Once upon a time there was a king who slept. "),
)
NIGHT = "It was a dark and stormy night; the rain fell in torrents."


def repetitive(chance: random.Random) -> str:
    few = chance.sample(PIECES, chance.randint(1, 4))
    return "".join(chance.choices(few, k=chance.randint(1, 40)))


def cuts(count: int) -> Iterator[tuple[int, random.Random, str, str]]:
    """Yield so many seeds with their chance, what was said of a text that repeats itself, and its
    rest.
    """
    for seed in range(count):
        chance = random.Random(seed)
        text = repetitive(chance)
        cut = chance.randint(1, len(text))
        yield seed, chance, text[:cut], text[cut:]


def pieces_of(text: str, chance: random.Random) -> list[str]:
    cuts = sorted(chance.choices(range(len(text) + 1), k=chance.randint(0, 8)))
    return [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]


def passed(seam: Onward | Anchored, text: str, chance: random.Random) -> str:
    return "".join([seam.feed(piece) for piece in pieces_of(text, chance)]) + seam.close()


def test_truthful_rest_of_a_text_that_repeats_itself_is_neither_cut_nor_doubled() -> None:
    refused = 0
    for seed, chance, said, rest in cuts(TEXTS):
        try:
            shown = passed(Onward(said), rest, chance)
        except SeamBroken:
            # It repeats its beginning at the cut: nothing was shown, and somebody else is asked.
            assert rest.startswith(said[:BEGINNING]), seed
            refused += 1
            continue
        # The one text that is taken for another repeats its whole beginning at the cut.
        if shown != rest:
            assert rest.startswith(said), seed
            assert provable(said), seed
            refused += 1

    assert refused < TEXTS / 100


def test_engine_that_begins_anew_is_cut_at_the_seam_or_shows_nothing() -> None:
    found = 0
    for seed, chance, said, rest in cuts(TEXTS):
        if not provable(said):
            continue
        found += 1
        seam = Onward(said)
        assert passed(seam, said + rest, chance) == rest, seed
        assert seam.repeated, seed

    assert found > TEXTS / 20


def test_engine_that_begins_anew_and_says_something_else_shows_nothing() -> None:
    for seed in range(200):
        chance = random.Random(seed)
        place = chance.randint(BEGINNING, len(NIGHT) - 1)
        seam = Onward(NIGHT)
        text = NIGHT[:place] + "\x00" + NIGHT[place:]
        shown: list[str] = []
        with pytest.raises(SeamBroken):
            shown.extend(seam.feed(piece) for piece in pieces_of(text, chance))

        assert "".join(shown) == ""


def test_what_begins_like_the_answer_for_less_than_its_beginning_passes_whole() -> None:
    seam = Onward(NIGHT)

    assert seam.feed(NIGHT[: BEGINNING - 1]) == ""
    assert seam.feed("!") == NIGHT[: BEGINNING - 1] + "!"
    assert seam.repeated is False


def test_answer_that_begins_anew_and_ends_too_early_is_no_rest() -> None:
    seam = Onward(NIGHT)
    seam.feed(NIGHT[:-1])

    with pytest.raises(SeamBroken):
        seam.close()


def test_short_end_that_was_held_back_passes_with_the_finish() -> None:
    seam = Onward(NIGHT)

    assert seam.feed("It was") == ""
    assert seam.close() == "It was"


def test_text_that_is_too_short_or_repeats_its_beginning_proves_nothing() -> None:
    assert not provable("x" * (BEGINNING - 1))
    assert not provable("ha " * 40)
    assert not provable("It was a dark and stormy night; " * 2)
    assert provable("It was a dark and stormy night; the rain fell.")
    assert Onward("ha " * 40).feed("ha ha ha ") == "ha ha ha "


def test_engine_known_to_repeat_is_cut_however_short_the_text_is() -> None:
    for seed, chance, said, rest in cuts(1000):
        assert passed(Onward(said, repeats=True), said + rest, chance) == rest, seed


def test_comparing_what_is_said_again_is_bounded() -> None:
    said = "".join(map(str, range(40_000)))
    seam = Onward(said)

    for start in range(0, MAX_CHECKED - 1000, 1000):
        assert seam.feed(said[start : start + 1000]) == ""
    start = MAX_CHECKED // 1000 * 1000
    with pytest.raises(SeamBroken):
        seam.feed(said[start - 1000 : start + 1000])


def test_anchor_that_comes_again_is_dropped_and_what_follows_is_the_rest() -> None:
    anchored = 0
    for seed, chance, said, rest in cuts(TEXTS):
        if not (anchor := anchor_of(said)):
            assert not said[-ANCHOR:].strip(), seed
            continue
        anchored += 1
        space = chance.choice(["", "\n", "  "])
        assert passed(Anchored(anchor), space + anchor + rest, chance) == rest, seed
        with pytest.raises(SeamBroken):
            passed(Anchored(anchor), f"Sure: {anchor}{rest}", chance)

    assert anchored > TEXTS / 2


def test_anchor_begins_with_a_word_and_has_no_brackets() -> None:
    said = "x" * 30 + " " + "some words that stand in front of " + "y" * 40

    assert anchor_of(said) == "front of " + "y" * 40 or anchor_of(said).split()[0] in said.split()
    assert anchor_of("short") == "short"
    assert anchor_of("z" * 100) == "z" * ANCHOR
    assert anchor_of(f"in {CLOSING} brackets") == ""
    assert anchor_of(" \n") == ""


def test_reply_without_the_anchor_is_no_rest() -> None:
    for reply in ("", "  ", "the an", "something else"):
        with pytest.raises(SeamBroken):
            passed(Anchored("the anchor"), reply, random.Random(1))
