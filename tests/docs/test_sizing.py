"""The table of sizes in docs/scaling.md is what docs/sizing.py makes, and its numbers hold where
the queue is played.
"""

from __future__ import annotations

import heapq
import importlib.util
import random
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
_spec = importlib.util.spec_from_file_location("sizing", DOCS / "sizing.py")
assert _spec is not None
assert _spec.loader is not None
sizing = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sizing)


def test_table_is_that_of_the_program() -> None:
    assert sizing.main(["--check"]) == 0


def test_a_stale_table_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "scaling.md"
    page.write_text((DOCS / "scaling.md").read_text().replace("| 1,000 |", "| 1,001 |"))
    monkeypatch.setattr(sizing, "PAGE", page)

    assert sizing.main(["--check"]) == 1
    assert sizing.main([]) == 0
    assert page.read_text() == (DOCS / "scaling.md").read_text()


def play(rate: float, seconds: float, places: int, starts: int) -> list[float]:
    """Return how long each of so many answers waits for one of *places*: arrivals and lengths are
    exponential.
    """
    generator = random.Random(1)
    # When each place is free again.
    free = [0.0] * places
    now, waits = 0.0, []
    for _ in range(starts):
        now += generator.expovariate(rate)
        begin = max(now, free[0])
        heapq.heapreplace(free, begin + generator.expovariate(1 / seconds))
        waits.append(begin - now)
    return waits[starts // 10 :]


@pytest.mark.parametrize("clients", [100, 1_000, 10_000])
def test_one_answer_in_a_hundred_waits_at_most_and_none_for_longer_than_people_do(
    clients: int,
) -> None:
    asked, tokens, speed = sizing.ASKED
    size = sizing.size(clients, asked, tokens, speed)

    waits = play(size.rate, tokens / speed, size.concurrent_requests, 100_000)

    assert sum(wait > 0 for wait in waits) / len(waits) < 1.5 * sizing.WAITING
    assert max(waits) < sizing.PATIENCE


@pytest.mark.parametrize("running", [0.5, 3.3, 33.3, 333.3])
def test_places_are_the_fewest_with_which_so_few_wait(running: float) -> None:
    places = sizing.places_for(running)

    assert sizing.waiting(running, places) <= sizing.WAITING
    assert places == 1 or sizing.waiting(running, places - 1) > sizing.WAITING
    waits = play(running / 6, 6, places, 200_000)
    part = sum(wait > 0 for wait in waits) / len(waits)
    assert part == pytest.approx(sizing.waiting(running, places), rel=0.5, abs=0.002)
