"""Counters: fixed labels, percentiles of the last minute, and one end for each request."""

from __future__ import annotations

from time import monotonic
from types import SimpleNamespace
from typing import Any

import pytest

from aioserver import errors, provider_errors
from aioserver.telemetry.counters import (
    Histogram,
    RecentShare,
    RecentValues,
    Share,
    quotient_of,
    sum_of,
)
from aioserver.telemetry.metrics import CANCELLED, ERROR_OUTCOMES, FACES, OK, Metrics
from aioserver.telemetry.outcome import Outcome
from aioserver.telemetry.request_log import RequestLog, RequestRecord

GIVEN: Any = {name: SimpleNamespace(model="m", models=("n",)) for name in ("openai", "groq")}


def all_errors() -> list[type[errors.AioserverError]]:
    classes, todo = [], [*errors.AioserverError.__subclasses__()]
    while todo:
        cls = todo.pop()
        todo += cls.__subclasses__()
        classes.append(cls)
    return classes


def made(kind: type[errors.AioserverError]) -> errors.AioserverError:
    if issubclass(kind, provider_errors.ProviderRefused):
        return kind("no", 404, b"{}")
    return kind("no")


class NeverLate:
    """A loop's lag: none."""

    def within(self, _since: float, _until: float) -> float:
        return 0.0

    def longest(self, _since: float) -> float:
        return 0.0


def records(metrics: Metrics) -> RequestLog:
    never: Any = NeverLate()
    return RequestLog(metrics, never)


def record(face: str = "openai", provider: str = "groq", model: str = "m") -> RequestRecord:
    return RequestRecord(
        Outcome(provider, model), face=face, request_id="r1", admitted_at=monotonic()
    )


@pytest.mark.parametrize("face", FACES)
def test_every_error_can_end_a_request(face: str) -> None:
    for kind in all_errors():
        metrics = Metrics(GIVEN)

        records(metrics).finish(record(face), made(kind))

        assert metrics.requests[face, "groq", kind.code, kind.outcome].value == 1
        assert metrics.outcomes[kind.outcome].value == 1
        assert sum(counter.value for counter in metrics.requests.values()) == 1
        rejected = metrics.rejections.get(kind.code)
        assert (rejected is not None and rejected.value == 1) == (kind.outcome == "rejected")


def test_a_bug_is_an_internal_error_and_shows_nothing_of_itself() -> None:
    metrics = Metrics(GIVEN)
    records(metrics).finish(record(), RuntimeError("the password is 1234"))
    assert metrics.requests["openai", "groq", "internal_error", "internal_error"].value == 1


def test_leaving_and_cancelling_are_told_apart() -> None:
    metrics = Metrics(GIVEN)
    request_record, other = record(), record()
    other.abandoned = True
    records(metrics).finish(request_record, None, cancelled=True)
    records(metrics).finish(other, None, cancelled=True)
    assert metrics.outcomes[CANCELLED].value == 1
    assert metrics.outcomes["client_left"].value == 1
    assert metrics.outcomes[OK].value == 0


def test_labels_are_fixed() -> None:
    metrics = Metrics(GIVEN)
    with pytest.raises(KeyError):
        metrics.requests["openai", "groq", "", "invented"]
    names = [family.name for family in metrics.families()]
    assert len(names) == len(set(names))
    for family in metrics.families():
        assert all(len(labels) == len(family.labels) for labels in family.children)


def test_a_histogram_counts_up_to_each_bound() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 2.5, 99.0):
        histogram.observe(value)
    assert histogram.counts == [2, 2, 2]
    assert histogram.sum == pytest.approx(106.5)


def test_percentiles_are_of_the_last_minute_and_of_a_thousand() -> None:
    recent = RecentValues()
    assert recent.percentiles(0.0) is None
    for number in range(100):
        recent.add(float(number), number / 100)
    percentiles = recent.percentiles(100.0)
    assert percentiles is not None
    assert percentiles["count"] == 60  # 40 to 99
    assert percentiles["p50"] == pytest.approx(0.70)
    assert percentiles["p95"] == pytest.approx(0.97)
    assert percentiles["p99"] == pytest.approx(0.99)
    recent.add(500.0, 7.0)
    assert recent.percentiles(502.5) == {
        "p50": 7.0,
        "p95": 7.0,
        "p99": 7.0,
        "count": 1,
        "age": 2.5,
    }
    for _ in range(5000):
        recent.add(501.0, 1.0)
    assert (recent.percentiles(501.0) or {})["count"] == 1000


def test_every_kind_of_error_has_an_outcome() -> None:
    outcomes = {outcome for _, outcome in ERROR_OUTCOMES}
    assert outcomes == {
        *("client_error", "rejected", "provider_error", "internal_error", "slow_client"),
        # At a deadline of the client's own.
        "cancelled",
    }


def test_a_recent_share_is_of_the_last_minute_and_keeps_few_sums() -> None:
    recent = RecentShare()
    assert recent.sums(0.0) is None

    # What is not known counts by its whole, once anything is.
    recent.add(0.0, None, 100)
    assert recent.sums(0.0) is None
    recent.add(1.0, 50, 100)
    assert recent.sums(1.0) == (50, 200)
    for second in range(2, 1000):
        recent.add(float(second), 1, 2)

    share = recent.sums(999.0)
    assert share is not None
    assert quotient_of(share) == 0.5
    # A slice counts as long as its beginning does.
    assert 2 * 55 <= share.whole <= 2 * 61
    assert recent.sums(2000.0) is None
    assert sum_of([None, Share(1, 2), Share(3, 4)]) == (4, 6)
    assert sum_of([None]) is None
    assert quotient_of(None) is quotient_of(Share(0, 0)) is None
