"""The interval between two ticks: differences of totals, and rates."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from aioserver.monitoring.interval import (
    ANSWERED,
    ATTEMPTS,
    BUGS,
    EVENTS,
    MINUTE,
    REJECTIONS,
    REQUESTS,
    TASK_TICKS,
    IntervalMeter,
    Total,
)
from aioserver.telemetry.metrics import Metrics


def configured(*names: str) -> Any:
    return {name: SimpleNamespace(model="m", models=()) for name in names}


class Lag:
    """The lag of an event loop: a mean of 1 ms, and never more than 2."""

    def take(self) -> tuple[float, float]:
        return 0.001, 0.002


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(configured("groq", "other"))


@pytest.fixture
async def meter(metrics: Metrics) -> IntervalMeter:
    lag: Any = Lag()
    return IntervalMeter(metrics, lag)


async def test_only_what_has_grown_since_the_last_interval_is_in_it(
    metrics: Metrics, meter: IntervalMeter
) -> None:
    metrics.outcomes["ok"].value += 3
    metrics.rejections["server_at_capacity"].value += 2
    first = meter.measure()
    metrics.providers["groq"].attempts["timeout"].value += 1
    second = meter.measure()
    third = meter.measure()

    assert first.growth == {
        Total(REQUESTS): 3,
        Total(ANSWERED): 3,
        Total(REJECTIONS, "server_at_capacity"): 2,
    }
    assert second.growth == {Total(ATTEMPTS, "timeout", "groq"): 1}
    assert third.growth == {}
    assert (third.lag, third.lag_max) == (0.001, 0.002)
    assert third.tasks >= 1


async def test_rates_are_summed_over_details_and_over_providers(
    metrics: Metrics, meter: IntervalMeter
) -> None:
    metrics.rejections["server_at_capacity"].value += 10_000
    metrics.rejections["server_shutdown"].value += 20_000
    metrics.providers["groq"].events += 40_000
    metrics.providers["other"].events += 50_000
    measured = meter.measure()

    per_event = measured.rate(EVENTS, "groq") / 4
    assert per_event > 0
    assert measured.rate(EVENTS, "other") == pytest.approx(5 * per_event, rel=1e-3)
    assert measured.rate(EVENTS) == pytest.approx(9 * per_event, rel=1e-3)
    assert measured.rate(REJECTIONS) == pytest.approx(3 * per_event, rel=1e-3)
    assert measured.rate(REQUESTS) == 0.0


async def test_provider_of_a_reload_is_measured_from_zero(
    metrics: Metrics, meter: IntervalMeter
) -> None:
    metrics.apply(configured("new"))
    metrics.providers["new"].events += 7

    assert meter.measure().growth == {Total(EVENTS, provider="new"): 7}


async def test_bugs_are_counted_for_a_minute(metrics: Metrics, meter: IntervalMeter) -> None:
    for _ in range(3):
        metrics.bugs.note(KeyError())
    first = meter.measure()
    metrics.bugs.note(OSError())
    later = [meter.measure().bugs for _ in range(MINUTE + 1)]

    assert (first.growth, first.bugs) == ({Total(BUGS, "KeyError"): 3}, 3)
    assert later == [4] * (MINUTE - 1) + [1, 0]


async def test_tasks_are_counted_now_and_then(meter: IntervalMeter) -> None:
    before = meter.measure().tasks
    async with asyncio.TaskGroup() as group:
        sleeping = group.create_task(asyncio.sleep(60))
        tasks = [meter.measure().tasks for _ in range(TASK_TICKS)]
        sleeping.cancel()

    assert tasks == [before] * (TASK_TICKS - 1) + [before + 1]
