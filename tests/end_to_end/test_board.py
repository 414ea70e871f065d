"""The faults of tests/support/board.py, with a fallback and `continuation`, on each face: what the
client sees, and how often each provider is asked.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.board import (
    ASKED,
    AWAY,
    BROKEN,
    FAULTS,
    PARTIAL,
    PASS,
    POLICY,
    expected,
    row,
    run,
)

if TYPE_CHECKING:
    from tests.support.server import MakeServer

# The face that all others stand on has every fault; each other face those that are told apart
# there: a refusal, a verdict, an answer that breaks off, one that nobody goes on with, and a wait.
# The rest is for `stress`: one minute of virtual time is three seconds.
SHOWN = {
    *product(FAULTS.keys() - {AWAY}, ("v1 streamed", "v1 whole")),
    *product(("429 with `Retry-After`", POLICY, *BROKEN, "the first word after 20 s"), ASKED),
    *((AWAY, face) for face in ("v1 streamed", "messages whole")),
}
CELLS = [
    cell if cell in SHOWN else pytest.param(*cell, marks=pytest.mark.stress)
    for cell in product(FAULTS, ASKED)
]


# Of virtual time.
@pytest.mark.timeout(300)
@pytest.mark.virtual_time
@pytest.mark.parametrize(("name", "face"), CELLS)
async def test_each_fault_is_made_good(name: str, face: str, make_server: MakeServer) -> None:
    assert await run(name, face, make_server) == expected(name, streamed=ASKED[face][0])


def test_one_fault_alone_leaves_half_an_answer_and_the_page_says_which() -> None:
    streamed = [expected(name, streamed=True).score for name in FAULTS]
    page = (Path(__file__).parents[2] / "docs" / "rescue.md").read_text()

    assert sorted(streamed) == sorted([PASS] * (len(FAULTS) - 1) + [PARTIAL])
    for name in FAULTS:
        assert row(name, expected(name, streamed=True), expected(name, streamed=False)) in page
