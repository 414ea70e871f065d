"""Incidents: the first is sent at once, those of the quiet time behind it are gathered."""

from __future__ import annotations

from typing import Any, cast

import pytest

from aioserver.monitoring.alerts import of_rejections
from aioserver.monitoring.findings import (
    FAILING,
    FAULTS,
    FLAGGED,
    REJECTED,
    SILENT,
)
from aioserver.monitoring.incidents import (
    DENIED_BURST,
    DENIED_TICKS,
    LAG_LIMIT,
    MANY_FAILED,
    MANY_REJECTED,
    QUIET,
    SEVERE_LAG,
    Detector,
)
from aioserver.monitoring.interval import (
    ANSWERED,
    ATTEMPTS,
    BUGS,
    DENIED,
    EVENTS,
    KEY_REFUSED,
    REJECTIONS,
    REQUESTS,
    SEAMS,
    SLOW_CLIENTS,
    Interval,
    Total,
)
from aioserver.providers.breaker import DEAD, SICK
from aioserver.telemetry.metrics import ATTEMPTS as OUTCOMES
from aioserver.telemetry.metrics import Metrics
from tests.support.dashboard import group


def interval(growth: dict[Total, float], *, lag_max: float = 0.0) -> Interval:
    return Interval(growth, {}, lag=0.0, lag_max=lag_max, cpu=0.0, tasks=0)


def texts(
    detector: Detector,
    now: float,
    growth: dict[Total, float] | None = None,
    *,
    lag_max: float = 0.0,
) -> list[str]:
    """The texts of the incidents of one tick."""
    happened = detector.detect(now, interval(growth or {}, lag_max=lag_max), {})
    return [incident["text"] for incident in happened]


def test_first_incident_is_reported_at_once_and_what_follows_is_added_up() -> None:
    detector, full = Detector(), Total(REJECTIONS, "server_at_capacity")

    first = texts(detector, 100.0, {full: 2})
    quiet = [texts(detector, 100.0 + second, {full: 3}) for second in range(1, 10)]
    after = texts(detector, 100.0 + QUIET)
    never = texts(detector, 1000.0)

    assert first == ["2 requests were rejected in 1 s: the server was full (server_at_capacity)"]
    assert quiet == [[]] * 9
    assert after == ["27 requests were rejected in 10 s: the server was full (server_at_capacity)"]
    assert never == []


def test_a_burst_of_one_bug_is_one_incident_and_another_bug_has_its_own() -> None:
    detector = Detector()
    bug, other = Total(BUGS, "KeyError at a/b.py:1 in f"), Total(BUGS, "OSError at a/c.py:2 in g")

    first = texts(detector, 100.0, {bug: 1})
    quiet = [texts(detector, 100.0 + second, {bug: 1000}) for second in range(1, 9)]
    second = texts(detector, 109.0, {bug: 1000, other: 1})
    after = texts(detector, 100.0 + QUIET)

    assert first == ["1 request met a bug of the server in 1 s: KeyError at a/b.py:1 in f"]
    assert quiet == [[]] * 8
    assert second == ["1 request met a bug of the server in 1 s: OSError at a/c.py:2 in g"]
    assert after == ["9,000 requests met a bug of the server in 10 s: KeyError at a/b.py:1 in f"]


def test_quiet_time_of_one_subject_does_not_silence_another() -> None:
    detector = Detector()
    texts(detector, 100.0, {Total(ATTEMPTS, "timeout", "groq"): 1})

    lines = texts(
        detector,
        101.0,
        {
            Total(ATTEMPTS, "timeout", "groq"): 1,
            Total(ATTEMPTS, "tls", "groq"): 1,
            Total(ATTEMPTS, "timeout", "other"): 1,
        },
    )

    assert lines == [
        "groq failed in TLS: 1 attempt failed in 1 s",
        "other did not answer in time: 1 attempt failed in 1 s",
    ]


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


def troubled(
    detector: Detector,
    now: float,
    *providers: str,
    kind: str = SILENT,
    severity: str = "error",
) -> list[tuple[str, str]]:
    """The severities and texts of the incidents of a tick in which these providers are in
    trouble.
    """
    state: Any = {name: {"trouble": None} for name in ("groq", "other")}
    for name in providers:
        state[name]["trouble"] = {
            "kind": kind,
            "text": f"{name} is {kind}",
            "severity": severity,
            "advice": "Look.",
        }
    happened = detector.detect(now, interval({}), state)
    return [(incident["severity"], incident["text"]) for incident in happened]


def test_trouble_is_reported_when_it_begins_and_when_it_ends() -> None:
    detector = Detector()

    by_tick = [
        troubled(detector, float(now), *who)
        for now, who in enumerate(([], ["groq"], ["groq"], []))
    ]

    assert by_tick == [[], [("error", "groq is silent")], [], [("info", "groq speaks again")]]


def test_trouble_that_lasts_is_reported_once() -> None:
    detector = Detector()

    by_tick = [troubled(detector, float(now), "groq") for now in range(3 * int(QUIET))]

    assert by_tick[0] == [("error", "groq is silent")]
    assert not any(by_tick[1:])


@pytest.mark.parametrize(
    ("kind", "severity", "end"),
    [
        (DEAD, "error", "groq answers again"),
        (SICK, "error", "groq is well again"),
        (SICK, "warning", "groq is well again"),
        (SILENT, "error", "groq speaks again"),
    ],
)
def test_trouble_is_reported_as_severe_as_it_is(kind: str, severity: str, end: str) -> None:
    detector = Detector()

    begin = troubled(detector, 1.0, "groq", kind=kind, severity=severity)

    assert begin == [(severity, f"groq is {kind}")]
    assert troubled(detector, 2.0) == [("info", end)]


@pytest.mark.parametrize("kind", [FAILING, FLAGGED])
def test_trouble_whose_faults_are_told_is_not_told_again(kind: str) -> None:
    assert troubled(Detector(), 1.0, "groq", kind=kind) == []


def test_provider_that_is_configured_again_begins_without_trouble() -> None:
    detector = Detector()
    troubled(detector, 100.0, "groq", kind=DEAD)
    detector.detect(101.0, interval({}), {})

    assert troubled(detector, 102.0) == []


def test_trouble_that_comes_and_goes_is_reported_once_in_its_quiet_time() -> None:
    detector = Detector()

    by_tick = [
        troubled(detector, 100.0 + second, *(["groq"] if second % 2 == 0 else []))
        for second in range(int(QUIET))
    ]
    other = troubled(detector, 100.0 + QUIET - 1, "other")
    lasting = troubled(detector, 100.0 + QUIET, "groq", "other")

    assert by_tick[:2] == [[("error", "groq is silent")], [("info", "groq speaks again")]]
    assert not any(by_tick[2:])
    assert other == [("error", "other is silent")]
    assert lasting == [("error", "groq is silent")]


def test_denied_requests_of_some_ticks_together_are_one_burst() -> None:
    detector = Detector()

    by_tick = [texts(detector, float(tick), {Total(DENIED): 1}) for tick in range(DENIED_TICKS)]

    assert by_tick[:-1] == [[]] * (DENIED_TICKS - 1)
    assert by_tick[-1][0].startswith(f"{DENIED_BURST} requests were denied")


def test_worst_lag_of_the_quiet_time_is_reported_and_not_the_sum() -> None:
    detector = Detector()

    first = texts(detector, 100.0, lag_max=0.2)
    for second, lag_max in enumerate((0.3, 0.5, LAG_LIMIT), 101):
        assert texts(detector, float(second), lag_max=lag_max) == []
    after = texts(detector, 100.0 + QUIET)

    assert first == ["the event loop was 200 ms late"]
    assert after == ["the event loop was 500 ms late"]


@pytest.mark.parametrize(
    ("total", "number", "incident"),
    [
        (
            Total(REJECTIONS, "server_at_capacity"),
            1,
            (
                "rejections",
                "warning",
                "1 request was rejected in 1 s: the server was full (server_at_capacity)",
                "If the machine has room, raise max_connections in chat.websocket.concurrency.",
            ),
        ),
        (
            Total(SLOW_CLIENTS),
            7,
            (
                "slow_client",
                "warning",
                "slow clients dropped, which did not read what was sent: 7",
                "",
            ),
        ),
        (
            Total(BUGS, "KeyError"),
            1,
            (
                "bug",
                "error",
                "1 request met a bug of the server in 1 s: KeyError",
                "Look for the traceback in the log, and report it.",
            ),
        ),
        (
            Total(KEY_REFUSED, provider="groq"),
            2,
            (
                "provider_auth",
                "error",
                "groq refused our key, or its quota was used up (2)",
                "Check the key of groq, and the quota of its account.",
            ),
        ),
        (
            Total(ATTEMPTS, "http_5xx", "groq"),
            1,
            (
                "provider_faults",
                "warning",
                "groq answered with server errors (5xx): 1 attempt failed in 1 s",
                "Look at the log of groq, or at its status page.",
            ),
        ),
        (
            Total(ATTEMPTS, "tls", "groq"),
            3,
            (
                "provider_faults",
                "error",
                "groq failed in TLS: 3 attempts failed in 1 s",
                "Check the certificate of groq, and its base_url and ca_file.",
            ),
        ),
        (
            Total(SEAMS, "provider_disconnected", "groq"),
            2,
            (
                "seams",
                "warning",
                (
                    "groq broke off 2 answers in 1 s, continued by another attempt: "
                    "provider_disconnected"
                ),
                "",
            ),
        ),
    ],
)
def test_incident_says_what_it_is_how_severe_and_what_can_be_done(
    total: Total, number: int, incident: tuple[str, ...]
) -> None:
    (found,) = Detector().detect(100.0, interval({total: number}), {})

    assert (found["kind"], found["severity"], found["text"], found["advice"]) == incident
    assert found["provider"] == total.provider
    assert found["time"] > 1e9


FULL, OWN = Total(REJECTIONS, "server_at_capacity"), Total(REJECTIONS, "rate_limit_exceeded")
BROKEN, WORKS = Total(ATTEMPTS, "http_5xx", "groq"), Total(ATTEMPTS, "ok", "groq")


@pytest.mark.parametrize(
    ("growth", "lag_max", "severity"),
    [
        ({FULL: MANY_REJECTED}, 0.0, "error"),
        ({FULL: MANY_REJECTED - 1}, 0.0, "warning"),
        ({FULL: 1000, Total(ANSWERED): 999}, 0.0, "error"),
        ({FULL: 1000, Total(ANSWERED): 1000}, 0.0, "warning"),
        ({OWN: 1000}, 0.0, "warning"),
        ({BROKEN: MANY_FAILED}, 0.0, "error"),
        ({BROKEN: MANY_FAILED - 1}, 0.0, "warning"),
        ({BROKEN: 1000, WORKS: 999}, 0.0, "error"),
        ({BROKEN: 1000, WORKS: 1000}, 0.0, "warning"),
        ({}, LAG_LIMIT + 0.001, "warning"),
        ({}, SEVERE_LAG / 1000, "error"),
    ],
)
def test_what_most_feel_is_an_error_and_what_some_feel_is_a_warning(
    growth: dict[Total, float], lag_max: float, severity: str
) -> None:
    (incident,) = Detector().detect(100.0, interval(growth, lag_max=lag_max), {})

    assert incident["severity"] == severity


def test_what_went_well_in_the_quiet_time_counts_for_the_severity() -> None:
    detector = Detector()
    detector.detect(100.0, interval({FULL: 1}), {})
    detector.detect(101.0, interval({FULL: 50}), {})
    detector.detect(102.0, interval({Total(ANSWERED): 100}), {})

    (incident,) = detector.detect(100.0 + QUIET, interval({FULL: 50}), {})

    assert (incident["severity"], incident["text"]) == (
        "warning",
        "100 requests were rejected in 10 s: the server was full (server_at_capacity)",
    )


def test_every_code_of_a_rejection_has_its_words() -> None:
    assert REJECTED.keys() == Metrics({}).rejections.keys()
    assert of_rejections("another_code") == ("another_code", "")


def changes_of(
    detector: Detector, now: float, **groups: dict[str, Any]
) -> list[tuple[str, str, str, str | None]]:
    """The incidents of a tick in which groups are like this."""
    happened = detector.detect(now, interval({}), {}, (), cast("Any", groups))
    return [(each["kind"], each["severity"], each["text"], each["provider"]) for each in happened]


@pytest.mark.parametrize(
    ("state", "words"),
    [("dead", "is dead"), ("cooling", "cools down"), ("key_refused", "refuses our key")],
)
def test_a_member_that_is_out_of_its_groups_is_reported_and_its_return(
    state: str, words: str
) -> None:
    detector, well = Detector(), ("gpu2", "well")
    both = {"qwen": group(("gpu1", "well"), well), "smart": group(well, ("gpu1", "well"))}
    without = {"qwen": group(("gpu1", state), well), "smart": group(well, ("gpu1", state))}

    assert changes_of(detector, 1.0, **both) == []
    assert changes_of(detector, 2.0, **without) == [
        (
            "group_degraded",
            "warning",
            f"gpu1 {words}: qwen and smart go on without it",
            "gpu1",
        )
    ]
    assert changes_of(detector, 3.0, **without) == []
    assert changes_of(detector, 4.0, **both) == [
        ("group_restored", "info", "gpu1 is back in qwen and smart", "gpu1")
    ]
    # What comes and goes is reported after its quiet time.
    assert changes_of(detector, 5.0, **without) == []
    assert changes_of(detector, 6.0, **both) == []
    assert len(changes_of(detector, 2.0 + QUIET, **without)) == 1


def test_the_last_member_that_goes_out_is_an_error() -> None:
    detector = Detector()
    changes_of(detector, 1.0, qwen=group(("gpu1", "dead"), ("gpu2", "sick")))

    (last,) = changes_of(detector, 2.0, qwen=group(("gpu1", "dead"), ("gpu2", "cooling")))

    text = "gpu2 cools down: no member of qwen can start anything now"
    assert last == ("group_degraded", "error", text, "gpu2")


def test_of_a_group_of_one_and_of_one_that_is_gone_nothing_is_reported() -> None:
    detector = Detector()

    assert changes_of(detector, 1.0, fast=group(("gpu1", "dead"))) == []
    assert changes_of(detector, 2.0, qwen=group(("gpu1", "off"), ("gpu2", "well"))) == []
    assert len(changes_of(detector, 3.0, qwen=group(("gpu1", "dead"), ("gpu2", "well")))) == 1
    # A reload takes the group out while the provider is dead.
    assert changes_of(detector, 4.0) == []
    assert changes_of(detector, 5.0, qwen=group(("gpu1", "well"), ("gpu2", "well"))) == []


def test_a_provider_of_many_groups_is_one_incident() -> None:
    many = {f"g{number}": group(("gpu1", "dead"), ("gpu2", "well")) for number in range(100)}

    (only,) = changes_of(Detector(), 1.0, **many)

    assert only[2] == "gpu1 is dead: g0, g1, g2 and 97 more go on without it"
