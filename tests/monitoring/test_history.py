"""The history: series of numbers, with gaps where there was none."""

from __future__ import annotations

from typing import Any

from aioserver.monitoring.history import HISTORY, Past


def snapshot(time: float, **providers: int) -> Any:
    """Return the parts of a snapshot that the history reads."""
    return {
        "time": time,
        "connections": {"active": 3, "waiting": 0, "rejected_per_second": 0.5},
        "requests": {"per_second": 2.0},
        "tokens_per_second": 7.5,
        "first_token": None if time < 2 else {"p50": 0.1, "p95": 0.25},
        "loop": {"lag_max": 0.002},
        "providers": {
            name: {
                "in_flight": in_flight,
                "waiting": 1,
                "pool": {"open": 2, "idle": 0},
                "tokens_per_second": 1.5,
            }
            for name, in_flight in providers.items()
        },
    }


def test_history_has_the_values_of_each_tick() -> None:
    past = Past()
    past.add(snapshot(1.25, one=4))
    past.add(snapshot(2.25, one=5))

    assert past.times == [1.25, 2.25]
    assert past.series == {
        "active": [3, 3],
        "waiting": [0, 0],
        "rejected_per_second": [0.5, 0.5],
        "requests_per_second": [2, 2],
        "tokens_per_second": [7.5, 7.5],
        "first_token_p50": [None, 0.1],
        "first_token_p95": [None, 0.25],
        "lag_max": [0.002, 0.002],
    }
    assert past.of_provider("one") == {
        "in_flight": [4, 5],
        "waiting": [1, 1],
        "pool_open": [2, 2],
        "pool_idle": [0, 0],
        "tokens_per_second": [1.5, 1.5],
    }


def test_whole_numbers_are_shown_as_such() -> None:
    past = Past()
    past.add(snapshot(1.0, one=4))

    assert str(past.of_provider("one")["in_flight"]) == "[4]"


def test_a_provider_has_gaps_where_it_was_not_configured() -> None:
    past = Past()
    past.add(snapshot(1.0))
    past.add(snapshot(2.0, one=4))
    past.add(snapshot(3.0))
    past.add(snapshot(4.0, one=6))

    assert past.of_provider("one")["in_flight"] == [None, 4, None, 6]


def test_history_ends_after_ten_minutes_and_with_it_a_provider_that_is_gone() -> None:
    past = Past()
    past.add(snapshot(0.0, one=1, gone=1))
    for tick in range(1, HISTORY + 1):
        past.add(snapshot(float(tick), one=tick))

    assert past.times == [float(tick) for tick in range(1, HISTORY + 1)]
    assert past.of_provider("one")["in_flight"] == list(range(1, HISTORY + 1))
    past.add(snapshot(HISTORY + 1.0, one=0, gone=7))
    assert past.of_provider("gone")["in_flight"] == [None] * (HISTORY - 1) + [7]
