"""The pace: the property of any window, and what a provider says of its limits."""

from __future__ import annotations

from itertools import pairwise
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aioserver.providers.capacity import JITTER, MAX_COOLING, Pace
from aioserver.providers.rate_headers import duration
from tests.support.clock import FakeClock

NINES = "9" * 5000


def started(pace: Pace, clock: FakeClock, gaps: list[float]) -> list[float]:
    """When requests have started that came after *gaps*, each as soon as it might."""
    times = []
    for gap in gaps:
        clock.now += gap
        clock.now += pace.delay()
        assert pace.delay() <= 1e-6
        pace.start()
        times.append(clock.now)
    return times


@given(
    per_minute=st.integers(1, 100_000),
    burst=st.integers(1, 50),
    gaps=st.lists(st.one_of(st.just(0.0), st.floats(0, 5)), min_size=1, max_size=60),
)
@settings(max_examples=200)
def test_no_window_has_more_than_its_share_and_the_burst(
    per_minute: int, burst: int, gaps: list[float]
) -> None:
    clock = FakeClock()
    times = started(Pace(per_minute, burst, clock), clock, gaps)
    for first, begin in enumerate(times):
        for last in range(first, len(times)):
            span = times[last] - begin
            assert last - first + 1 <= span * per_minute / 60 + burst + 1e-6


def test_after_a_rest_the_burst_starts_at_once_and_then_one_each_step() -> None:
    clock = FakeClock()
    times = started(Pace(600, 5, clock), clock, [0.0] * 8)
    assert [round(at - times[0], 3) for at in times] == [0, 0, 0, 0, 0, 0.1, 0.2, 0.3]


def test_a_saved_up_hour_is_one_burst() -> None:
    clock = FakeClock()
    pace = Pace(60, 3, clock)
    clock.now += 3600
    assert pace.left == 3
    times = started(pace, clock, [0.0] * 4)
    assert [round(at - times[0], 3) for at in times] == [0, 0, 0, 1]
    assert pace.left == 0


@pytest.mark.parametrize("taken", [0, 2, 5, 9])
def test_a_request_behind_others_starts_after_them(taken: int) -> None:
    clock = FakeClock()
    pace = Pace(600, 3, clock)
    for _ in range(taken):
        pace.start()
    delays = [pace.delay(ahead) for ahead in range(6)]

    times = started(pace, clock, [0.0] * 6)

    assert delays == pytest.approx([at - 1000.0 for at in times], abs=1e-6)


def test_another_pace_goes_on_from_what_has_started() -> None:
    clock = FakeClock()
    pace = Pace(60, 1, clock)
    pace.start()
    assert pace.delay() == pytest.approx(1.0)
    pace.apply(600, 1)
    clock.now += pace.delay()
    pace.start()
    assert pace.delay() == pytest.approx(0.1)
    assert pace.per_minute == 600


@pytest.mark.parametrize("asked", [0.0, 3.0, 1e9, -5.0])
def test_a_provider_that_wants_a_rest_gets_it_up_to_a_bound(asked: float) -> None:
    clock = FakeClock()
    pace = Pace(600, 5, clock)

    pace.cool_down(asked)

    wait = min(max(asked, 0.0), MAX_COOLING)
    assert wait <= pace.delay() <= wait * (1 + JITTER)
    assert pace.cooling == pytest.approx(pace.delay())
    assert (pace.left == 0) == (wait > 0)


def test_after_a_rest_it_goes_on_at_half_its_pace_for_as_long_again() -> None:
    clock = FakeClock()
    pace = Pace(600, 1, clock)
    pace.cool_down(10.0)
    times = started(pace, clock, [0.0] * 200)
    gaps = [round(b - a, 3) for a, b in pairwise(times)]
    assert set(gaps) == {0.2, 0.1}
    assert gaps == sorted(gaps, reverse=True)
    assert 40 <= gaps.count(0.2) <= 60


@given(
    per_minute=st.integers(60, 10_000),
    burst=st.integers(1, 50),
    asked=st.floats(0.1, 200),
    begun=st.integers(0, 60),
)
@settings(max_examples=100)
def test_nothing_starts_in_a_rest_and_no_burst_behind_it(
    per_minute: int, burst: int, asked: float, begun: int
) -> None:
    clock = FakeClock()
    pace = Pace(per_minute, burst, clock)
    started(pace, clock, [0.0] * begun)
    told_at = clock.now

    pace.cool_down(asked)
    behind = [pace.delay(ahead) for ahead in range(10)]
    times = started(pace, clock, [0.0] * 10)

    wait = min(asked, MAX_COOLING)
    assert times[0] >= told_at + wait - 1e-6
    step = 60 / per_minute
    gaps = [b - a for a, b in pairwise(times)]
    assert min(gaps) >= step - 1e-6
    assert gaps[0] >= min(2 * step, wait) - 1e-6
    assert behind == pytest.approx([at - told_at for at in times], rel=0.01, abs=step * 10)


def test_starts_that_are_left_are_spread_until_the_reset() -> None:
    clock = FakeClock()
    pace = Pace(6000, 1, clock)
    pace.learn({"x-ratelimit-remaining-requests": "10", "x-ratelimit-reset-requests": "5s"})
    times = started(pace, clock, [0.0] * 30)
    gaps = [round(b - a, 3) for a, b in pairwise(times)]
    assert gaps[:10] == [0.5] * 10
    assert set(gaps[10:]) == {0.01}


@pytest.mark.parametrize("kind", ["requests", "tokens"])
def test_nothing_left_is_a_rest_before_the_429(kind: str) -> None:
    clock = FakeClock()
    pace = Pace(6000, 5, clock)
    pace.learn({f"x-ratelimit-remaining-{kind}": "0", f"x-ratelimit-reset-{kind}": "1m0.5s"})
    assert pace.delay() == pytest.approx(60.5)


@pytest.mark.parametrize(
    ("left", "reset"),
    [
        ("14370", "2m59.56s"),  # Groq's day: more than we would ask
        ("-1", "1s"),
        ("nan", "1s"),
        ("inf", "1s"),
        ("x", "1s"),
        ("", "1s"),
        ("0", "-1"),
        ("0", "inf"),
        ("0", "soon"),
        ("0", ""),
        ("0", "0s"),
        ("10", "99999h"),
        ("10", "1800000000"),  # a date
        ("1", "nan"),
        ("10", "1e400"),
    ],
)
def test_headers_that_make_no_sense_change_nothing(left: str, reset: str) -> None:
    clock = FakeClock()
    pace = Pace(600, 1, clock)
    pace.learn({"x-ratelimit-remaining-requests": left, "x-ratelimit-reset-requests": reset})
    pace.start()
    assert pace.delay() == pytest.approx(0.1)


@pytest.mark.parametrize(
    "reset", ["24h", "24h0m1s", "99999h", "86401", "1800000000", "1e400", NINES]
)
@pytest.mark.parametrize("kind", ["requests", "tokens"])
def test_nothing_left_for_days_is_a_rest_as_long_as_any(kind: str, reset: str) -> None:
    clock = FakeClock()
    pace = Pace(6000, 5, clock)
    assert pace.learn({f"x-ratelimit-remaining-{kind}": "0", f"x-ratelimit-reset-{kind}": reset})
    assert pace.delay() == pytest.approx(MAX_COOLING)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("48h", 172_800.0),
        ("1s", 1.0),
        ("6m0s", 360.0),
        ("17ms", 0.017),
        ("2m59.56s", 179.56),
        ("1h2m3s", 3723.0),
        ("12", 12.0),
        ("0.5", 0.5),
        (" 3s ", 3.0),
        ("", None),
        ("s", None),
        ("-3s", None),
        ("3x", None),
        ("1s1s", None),
        ("-1", None),
        ("1e400", inf),
    ],
)
def test_durations(text: str, seconds: float | None) -> None:
    parsed = duration(text)
    assert parsed == (None if seconds is None else pytest.approx(seconds))


# Tokens.


@given(
    per_minute=st.integers(600, 1_000_000),
    costs=st.lists(st.integers(1, 5_000), min_size=1, max_size=60),
)
@settings(max_examples=100)
def test_no_window_has_more_tokens_than_its_share_the_bucket_and_one_start(
    per_minute: int, costs: list[int]
) -> None:
    clock = FakeClock()
    pace = Pace(1_000_000, 1000, clock, tokens_per_minute=per_minute)
    spent: list[tuple[float, int]] = []
    for cost in costs:
        clock.now += pace.delay()
        assert pace.delay() <= 1e-6
        pace.start()
        pace.charge(cost)
        spent.append((clock.now, cost))
    for first, (begin, _) in enumerate(spent):
        for last in range(first, len(spent)):
            tokens = sum(cost for _, cost in spent[first : last + 1])
            share = (spent[last][0] - begin) * per_minute / 60
            assert tokens <= share + per_minute / 6 + spent[last][1] + 1e-3


def test_expected_tokens_are_corrected_by_the_real_cost() -> None:
    clock = FakeClock()
    pace = Pace(6000, 100, clock, tokens_per_minute=600)  # ten a second, a bucket of a hundred
    pace.charge(300)
    assert pace.delay() == pytest.approx(20.0)
    assert pace.left == 0
    pace.charge(-150)
    assert pace.delay() == pytest.approx(5.0)
    pace.charge(-10_000)
    assert pace.delay() == 0.0
    assert pace.left > 0


def test_without_a_limit_tokens_cost_nothing() -> None:
    pace = Pace(6000, 100, FakeClock())
    pace.charge(10**9)
    assert pace.delay() == 0.0


def test_one_head_cannot_stop_a_provider_for_hours() -> None:
    clock = FakeClock()
    pace = Pace(600, 5, clock)
    pace.learn({"x-ratelimit-remaining-requests": "2", "x-ratelimit-reset-requests": "23h51m"})
    pace.start()
    assert pace.delay() <= MAX_COOLING

    clock.now += 1.0
    pace.learn({"x-ratelimit-remaining-requests": "100000", "x-ratelimit-reset-requests": "1m"})
    assert pace.delay() <= 0.5 + 1e-6  # there is more left than it said before


def test_a_rest_that_another_instance_was_asked_for_is_kept_and_not_told_again() -> None:
    clock = FakeClock()
    rests: list[float] = []
    pace = Pace(600, 5, clock, on_cooling=rests.append)

    pace.told_cooling(7.0)
    rested = pace.cooling
    pace.cool_down(9.0)
    pace.cool_down(2 * MAX_COOLING)
    pace.cool_down(0.0)

    assert 7.0 <= rested <= 7.0 * (1 + JITTER)
    assert rests == [9.0, MAX_COOLING]


def bucket(
    kind: str, left: object, limit: object, reset: str = "2026-01-01T00:01:00Z"
) -> dict[str, str]:
    """What Anthropic says a minute before a bucket is full."""
    name = f"anthropic-ratelimit-{kind}"
    now = {"date": "Thu, 01 Jan 2026 00:00:00 GMT"}
    return {
        f"{name}-remaining": str(left),
        f"{name}-limit": str(limit),
        f"{name}-reset": reset,
    } | now


def test_a_bucket_that_fills_lowers_the_pace_to_what_comes_in() -> None:
    clock = FakeClock()
    pace = Pace(6000, 1, clock)

    assert not pace.learn(bucket("requests", 10, 60))

    times = started(pace, clock, [0.0] * 4)
    assert [round(at - times[0], 3) for at in times] == [0, 1, 2, 3]


def test_an_empty_bucket_stops_the_starts_until_there_is_something_in_it() -> None:
    for kind, seconds in (
        ("requests", 1.0),
        ("tokens", 6.0),
        ("input-tokens", 6.0),
        ("output-tokens", 6.0),
    ):
        clock = FakeClock()
        pace = Pace(6000, 1, clock)
        other = bucket("requests", 60, 60) if kind not in {"requests", "tokens"} else {}

        assert pace.learn({**other, **bucket(kind, 0, 60)})
        assert pace.delay() == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("left", "limit", "reset"),
    [
        ("x", 60, "2026-01-01T00:01:00Z"),
        (-1, 60, "2026-01-01T00:01:00Z"),
        (NINES, 60, "2026-01-01T00:01:00Z"),
        (5, 60, "soon"),
        (5, 60, "2026-01-01T00:01:00"),
        (5, 60, "9999-99-99T00:01:00Z"),
        (5, 60, "2025-01-01T00:01:00Z"),
        (5, 60, ""),
    ],
)
def test_nonsense_about_a_bucket_changes_nothing(left: object, limit: object, reset: str) -> None:
    clock = FakeClock()
    pace = Pace(6000, 1, clock)

    assert not pace.learn(bucket("requests", left, limit, reset))

    times = started(pace, clock, [0.0] * 3)
    assert times[-1] - times[0] == pytest.approx(0.02)


@pytest.mark.parametrize("limit", ["", "x", "0", NINES, "4"])
def test_without_a_plausible_limit_what_is_left_is_spread_until_the_reset(limit: str) -> None:
    clock = FakeClock()
    pace = Pace(6000, 1, clock)

    pace.learn(bucket("requests", 6, limit))

    times = started(pace, clock, [0.0] * 3)
    assert times[-1] - times[0] == pytest.approx(20.0)
