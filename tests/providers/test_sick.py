"""A sick provider comes back by time: how soon, what it costs meanwhile, and what it costs while it
stays sick.
"""

from __future__ import annotations

from math import inf

import pytest

from aioserver.providers.breaker import Breaker
from tests.support.outage import NeverOpen
from tests.support.sick_provider import (
    BEGINS,
    FALLBACK,
    PRIMARY,
    ByCount,
    Run,
    outage,
)

# Seconds within which nine of ten requests have the provider again, beside the time of so many
# requests; attempts a second at a dead one at most.
SECONDS, REQUESTS, MOST = 12.0, 20, 2.0
# As many as take a second; the table of tests/support/sick_provider.py has more.
OUTAGES = [
    *((down, rate) for down in (20.0, 60.0) for rate in (0.2, 0.5, 1.0, 2.0, 20.0)),
    *((600.0, rate) for rate in (0.2, 0.5, 2.0)),
]
MANY = [(down, rate) for down in (20.0, 60.0, 600.0) for rate in (5.0, 100.0, 300.0)]


def check(down: float, rate: float, seed: int) -> None:
    run = outage(rate, down, seed=seed)

    assert run.back(BEGINS + down) <= SECONDS + REQUESTS / rate
    dead = [at for at in run.attempts if run.died_at < at < BEGINS + down]
    # The first few are less than the seconds they are counted in.
    assert len(dead) <= MOST * (BEGINS + down - run.died_at) + 1 or not dead


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(("down", "rate"), OUTAGES)
def test_after_an_outage_it_has_its_requests_back_soon(
    down: float, rate: float, seed: int
) -> None:
    check(down, rate, seed)


@pytest.mark.stress
@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize(("down", "rate"), MANY)
def test_after_an_outage_it_has_many_requests_back_soon(
    down: float, rate: float, seed: int
) -> None:
    check(down, rate, seed)


def test_by_count_alone_it_would_take_minutes() -> None:
    down, rate = 20.0, 2.0

    assert outage(rate, down, ByCount).back(BEGINS + down) > 100.0
    assert outage(0.5, down, ByCount).back(BEGINS + down) == inf


@pytest.mark.parametrize("rate", [2.0, 20.0])
@pytest.mark.parametrize("fails", [0.3, 0.5, 0.6, 0.8, 0.95, 1.0])
def test_while_it_fails_no_request_waits_longer_than_without_a_breaker(
    fails: float, rate: float
) -> None:
    seconds = 1200.0 / rate

    run = Run(rate, seconds, lambda _now: fails).play()

    without = Run(rate, seconds, lambda _now: fails, NeverOpen).play()
    assert run.delay <= without.delay + 0.01
    assert run.share(PRIMARY, FALLBACK) == without.share(PRIMARY, FALLBACK) == 1.0


@pytest.mark.parametrize("rate", [1.0, 10.0])
@pytest.mark.parametrize("fails", [0.6, 0.8, 0.95])
@pytest.mark.parametrize("other", [0.5, 0.8, 0.95])
def test_where_the_fallback_fails_too_hardly_less_is_answered(
    other: float, fails: float, rate: float
) -> None:
    seconds = 3000.0 / rate
    least = 0.95 if max(other, fails) <= 0.8 else 0.7

    run = Run(rate, seconds, lambda _now: fails, other=other).play()

    without = Run(rate, seconds, lambda _now: fails, NeverOpen, other=other).play()
    assert run.share(PRIMARY, FALLBACK) >= least * without.share(PRIMARY, FALLBACK) > 0


def test_the_same_seed_gives_the_same_run() -> None:
    assert outage(2.0, 20.0).answered == outage(2.0, 20.0).answered
    assert outage(2.0, 20.0).answered != outage(2.0, 20.0, Breaker, seed=2).answered
