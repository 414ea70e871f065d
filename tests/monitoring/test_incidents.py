"""Incidents: the first is sent at once, those of the quiet time behind it are gathered."""

from __future__ import annotations

from typing import Any

import pytest

from aioserver.monitoring.incidents import (
    DENIED_BURST,
    DENIED_TICKS,
    FAULTS,
    GATHERED,
    LAG_LIMIT,
    QUIET,
    TEXTS,
    Detector,
)
from aioserver.monitoring.interval import (
    ATTEMPTS,
    DENIED,
    EVENTS,
    KEY_REFUSED,
    REJECTIONS,
    REQUESTS,
    SLOW_CLIENTS,
    Interval,
    Total,
)
from aioserver.providers.breaker import CLOSED, OPEN, TRIAL
from aioserver.telemetry.metrics import ATTEMPTS as OUTCOMES


def interval(growth: dict[Total, float], *, lag_max: float = 0.0) -> Interval:
    return Interval(growth, {}, lag=0.0, lag_max=lag_max, cpu=0.0, tasks=0)


def texts(
    detector: Detector,
    now: float,
    growth: dict[Total, float] | None = None,
    *,
    lag_max: float = 0.0,
    breakers: dict[str, str] | None = None,
) -> list[str]:
    """The texts of the incidents of one tick."""
    providers: Any = {name: {"breaker": state} for name, state in (breakers or {}).items()}
    happened = detector.detect(now, interval(growth or {}, lag_max=lag_max), providers)
    return [incident["text"] for incident in happened]


def test_first_incident_is_told_at_once_and_what_follows_is_added_up() -> None:
    detector, full = Detector(), Total(REJECTIONS, "server_at_capacity")

    first = texts(detector, 100.0, {full: 2})
    quiet = [texts(detector, 100.0 + second, {full: 3}) for second in range(1, 10)]
    after = texts(detector, 100.0 + QUIET)
    never = texts(detector, 1000.0)

    assert first == ["2 refused: server_at_capacity"]
    assert quiet == [[]] * 9
    assert after == ["27 refused: server_at_capacity"]
    assert never == []


def test_quiet_time_of_one_subject_does_not_silence_another() -> None:
    detector = Detector()
    texts(detector, 100.0, {Total(ATTEMPTS, "timeout", "groq"): 1})

    told = texts(
        detector,
        101.0,
        {
            Total(ATTEMPTS, "timeout", "groq"): 1,
            Total(ATTEMPTS, "tls", "groq"): 1,
            Total(ATTEMPTS, "timeout", "other"): 1,
        },
    )

    assert told == ["groq: 1 x tls", "other: 1 x timeout"]


@pytest.mark.parametrize(
    "total",
    [
        Total(REQUESTS),
        Total(EVENTS, provider="groq"),
        Total(DENIED),
        *(Total(ATTEMPTS, outcome, "groq") for outcome in OUTCOMES if outcome not in FAULTS),
    ],
    ids=str,
)
def test_ordinary_events_are_no_incident(total: Total) -> None:
    assert texts(Detector(), 100.0, {total: DENIED_BURST - 1}) == []


def test_breaker_is_told_when_it_opens_and_when_it_closes() -> None:
    detector = Detector()

    told = [
        texts(detector, float(tick), breakers={"groq": state, "other": CLOSED})
        for tick, state in enumerate((CLOSED, OPEN, OPEN, TRIAL, OPEN, CLOSED, CLOSED))
    ]

    opened, closed = ["groq fails: its breaker has opened"], ["groq answers again"]
    assert told == [[], opened, [], [], [], closed, []]


def test_provider_that_is_configured_again_begins_with_a_closed_breaker() -> None:
    detector = Detector()
    texts(detector, 100.0, breakers={"groq": OPEN})
    texts(detector, 101.0, breakers={})

    assert texts(detector, 102.0, breakers={"groq": CLOSED}) == []


def test_denied_requests_of_some_ticks_together_are_one_burst() -> None:
    detector = Detector()

    told = [texts(detector, float(tick), {Total(DENIED): 1}) for tick in range(DENIED_TICKS)]

    assert told[:-1] == [[]] * (DENIED_TICKS - 1)
    assert told[-1][0].startswith(f"{DENIED_BURST} requests denied")


def test_worst_lag_of_the_quiet_time_is_told_and_not_the_sum() -> None:
    detector = Detector()

    first = texts(detector, 100.0, lag_max=0.2)
    for second, lag_max in enumerate((0.3, 0.5, LAG_LIMIT), 101):
        assert texts(detector, float(second), lag_max=lag_max) == []
    after = texts(detector, 100.0 + QUIET)

    assert first == ["the event loop was 200 ms late"]
    assert after == ["the event loop was 500 ms late"]


@pytest.mark.parametrize(
    ("total", "kind", "severity"),
    [
        (Total(REJECTIONS, "server_at_capacity"), "rejections", "warning"),
        (Total(SLOW_CLIENTS), "slow_client", "warning"),
        (Total(KEY_REFUSED, provider="groq"), "provider_auth", "error"),
        (Total(ATTEMPTS, "http_5xx", "groq"), "provider_faults", "warning"),
        (Total(ATTEMPTS, "connect_error", "groq"), "provider_faults", "error"),
    ],
)
def test_incident_says_its_kind_its_severity_and_its_provider(
    total: Total, kind: str, severity: str
) -> None:
    (incident,) = Detector().detect(100.0, interval({total: 1}), {})

    assert (incident["kind"], incident["severity"]) == (kind, severity)
    assert incident["provider"] == total.provider
    assert incident["time"] > 1e9


def test_every_kind_that_is_gathered_has_a_text() -> None:
    assert TEXTS.keys() == {*GATHERED.values(), "auth", "loop_lag"}
