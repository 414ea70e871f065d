"""Alerts: what is told of a provider, and since when."""

from __future__ import annotations

from typing import Any

import pytest

from aioserver.monitoring.alerts import INSTEAD, PRESENT, WINDOW, Alerts, span
from aioserver.monitoring.findings import FAULTS, FLAGGED, OF_PROVIDERS, SILENT
from aioserver.monitoring.interval import ATTEMPTS, Interval, Total
from tests.support.dashboard import group

WELL: dict[str, Any] = {
    "state": "well",
    "next_try": None,
    "flagged": False,
    "active": True,
    "silent": {"longest": 0.0, "stalled": 0, "unanswered": 0, "under_way": 0},
}


def looked(
    troubles: Alerts,
    now: float,
    growth: dict[str, int] | None = None,
    fallbacks: tuple[str, ...] = (),
    group_of_two: dict[str, Any] | None = None,
    **changes: Any,
) -> Any:
    """The trouble of a provider with these *changes* of its state, and attempts since the last
    look.
    """
    attempts: dict[Total, float] = {
        Total(ATTEMPTS, outcome, "groq"): number for outcome, number in (growth or {}).items()
    }
    interval = Interval(attempts, {}, lag=0.0, lag_max=0.0, cpu=0.0, tasks=0)
    groq = {**WELL, **changes}
    state: Any = {
        "time": now,
        "fallbacks": [*fallbacks],
        "providers": {"groq": groq},
        "groups": {} if group_of_two is None else {"qwen": group_of_two},
        "active_group": None if group_of_two is None else "qwen",
    }
    troubles.observe(state, interval)
    return groq["trouble"]


def silent_for(longest: float, **silent: int) -> dict[str, Any]:
    return {"silent": {**WELL["silent"], "longest": longest, **silent}}


@pytest.mark.parametrize(
    ("silent", "text"),
    [
        ({"stalled": 25, "under_way": 25}, "groq has said nothing for 6 s in 25 answers"),
        ({"stalled": 1, "under_way": 2}, "groq has said nothing for 6 s in 1 answer"),
        ({"unanswered": 4, "under_way": 4}, "groq has said nothing for 6 s to 4 requests"),
        (
            {"stalled": 2, "unanswered": 1, "under_way": 3},
            "groq has said nothing for 6 s in 2 answers and to 1 request",
        ),
    ],
)
def test_silence_in_half_of_the_answers_is_the_providers(
    silent: dict[str, int], text: str
) -> None:
    assert looked(Alerts(), 1000.0, **silent_for(6.7, **silent))["text"] == text


@pytest.mark.parametrize("silent", [{}, {"under_way": 25}, {"stalled": 9, "under_way": 19}])
def test_silence_in_few_answers_is_theirs(silent: dict[str, int]) -> None:
    assert looked(Alerts(), 1000.0, **silent_for(60.0, **silent)) is None


def test_trouble_that_lasts_keeps_its_beginning() -> None:
    troubles = Alerts()
    all_silent = {"stalled": 2, "under_way": 2}

    first = looked(troubles, 1000.0, **silent_for(6.0, **all_silent))
    later = looked(troubles, 1010.0, **silent_for(3.0, **all_silent))
    over = looked(troubles, 1011.0)
    again = looked(troubles, 1020.0, **silent_for(5.0, **all_silent))

    assert [first["since"], later["since"], again["since"]] == [994.0, 994.0, 1015.0]
    assert later["detail"] == "It began 16 s ago"
    assert over is None


@pytest.mark.parametrize("ill", [{"state": "dead"}, {"state": "sick"}, {"flagged": True}])
def test_a_provider_that_is_well_again_has_no_trouble_left(ill: dict[str, Any]) -> None:
    troubles = Alerts()
    for tick in range(5):
        growth = {"connect_error": 3, "tls": 1}
        assert looked(troubles, 1000.0 + tick, growth, **ill) is not None

    assert looked(troubles, 1005.0, {"ok": 1}) is None
    assert looked(troubles, 1006.0, {"ok": 1, "connect_error": 1}) is None
    # What comes after that is another trouble.
    assert looked(troubles, 1007.0, {"connect_error": 2})["since"] == 1007.0


def test_faults_are_told_in_the_present_while_they_go_on() -> None:
    troubles = Alerts()

    def look(tick: int, **growth: int) -> Any:
        return looked(troubles, 1000.0 + tick, growth)

    assert look(0, connect_error=9) is not None
    # Nothing else is known of it.
    assert all(look(tick) is not None for tick in range(1, 30))
    assert look(30, ok=1) is None
    assert look(31, connect_error=1) is not None
    assert all(look(tick, ok=1) is not None for tick in range(32, 31 + PRESENT))
    assert look(31 + PRESENT, ok=1) is None
    sick = looked(troubles, 1050.0, {"ok": 1}, state="sick")
    assert sick["text"] == "groq failed often, and is asked last but for trials"


@pytest.mark.parametrize("outcome", FAULTS)
def test_provider_that_fails_is_reported_with_how_and_how_often(outcome: str) -> None:
    trouble = looked(Alerts(), 1000.0, {outcome: 57, "ok": 3, "cancelled": 40, "http_4xx": 9})

    assert trouble["kind"] == "failing"
    assert (
        trouble["text"]
        == f"groq {FAULTS[outcome].text}: 57 of 60 attempts failed in the last minute"
    )
    assert trouble["detail"] == "It began 0 s ago; no fallback is set"


@pytest.mark.parametrize(
    "growth",
    [
        {"cancelled": 100},
        {"http_4xx": 100, "stale": 100},
        {"http_5xx": 2},
        {"http_5xx": 9, "ok": 100},
    ],
)
def test_what_is_no_fault_of_the_provider_is_no_trouble(growth: dict[str, int]) -> None:
    assert looked(Alerts(), 1000.0, growth) is None


def test_faults_are_reported_for_a_minute() -> None:
    troubles = Alerts()
    looked(troubles, 1000.0, {"http_5xx": 5})

    looks = [looked(troubles, 1000.0 + tick) for tick in range(1, WINDOW + 1)]

    assert all(looks[:-1])
    assert looks[-1] is None


def test_provider_that_is_left_alone_is_reported_with_its_next_try_and_its_fallback() -> None:
    troubles = Alerts()
    looked(troubles, 1000.0, {"connect_error": 5}, state="dead", next_try=5.0)

    lonely = looked(troubles, 1042.0, state="dead", next_try=2.2)
    helped = looked(troubles, 1042.0, fallbacks=("other",), state="dead", next_try=0.0)
    other = looked(troubles, 1042.0, state="dead", next_try=1.0, active=False)

    assert lonely["kind"] == "dead"
    assert lonely["text"].startswith("groq cannot be reached: 5 of 5 attempts failed")
    assert lonely["detail"] == "It began 42 s ago; it is tried again in 3 s; no fallback is set"
    assert helped["detail"] == "It began 42 s ago; it is tried now; its fallback is other"
    assert other["detail"] == "It began 42 s ago; it is tried again in 1 s"


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"flagged": True, "state": "dead", "next_try": 300.0}, "key_refused"),
        ({"state": "dead", "next_try": 1.0, **silent_for(9.0, stalled=1, under_way=1)}, "dead"),
        ({"state": "sick", **silent_for(9.0, stalled=1, under_way=1)}, "silent"),
        ({"state": "sick"}, "sick"),
        ({}, "failing"),
    ],
)
def test_worst_trouble_is_reported(changes: dict[str, Any], kind: str) -> None:
    assert looked(Alerts(), 1000.0, {"timeout": 9}, **changes)["kind"] == kind


def test_trouble_that_becomes_another_one_of_the_same_faults_began_with_the_first() -> None:
    troubles = Alerts()
    kinds = ("failing", "sick", "dead", "sick")

    looks = [
        looked(
            troubles, 1000.0 + 10 * nth, {"timeout": 5}, state={"failing": "well"}.get(kind, kind)
        )
        for nth, kind in enumerate(kinds)
    ]
    silent = looked(troubles, 1040.0, **silent_for(5.0, stalled=1, under_way=1))

    assert [trouble["kind"] for trouble in looks] == [*kinds]
    assert [trouble["since"] for trouble in looks] == [1000.0] * 4
    assert silent["since"] == 1035.0


@pytest.mark.parametrize(
    ("growth", "state", "severity"),
    [
        ({"http_5xx": 5, "ok": 5}, "well", "warning"),
        ({"http_5xx": 6, "ok": 5}, "well", "error"),
        ({"http_5xx": 5, "ok": 5}, "sick", "warning"),
        ({"http_5xx": 6, "ok": 5}, "sick", "error"),
        ({"http_5xx": 5, "ok": 5}, "dead", "error"),
    ],
)
def test_trouble_is_an_error_where_most_attempts_fail(
    growth: dict[str, int], state: str, severity: str
) -> None:
    assert looked(Alerts(), 1000.0, growth, state=state)["severity"] == severity


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"flagged": True}, OF_PROVIDERS[FLAGGED].remedy),
        (silent_for(9.0, stalled=1, under_way=1), OF_PROVIDERS[SILENT].remedy),
        ({}, FAULTS["timeout"].remedy),
        ({"state": "dead", "next_try": 1.0}, FAULTS["timeout"].remedy),
    ],
)
def test_trouble_says_what_can_be_done(changes: dict[str, Any], advice: str) -> None:
    growth, remedy = {"timeout": 9}, advice.format(name="groq")

    lonely = looked(Alerts(), 1000.0, growth, **changes)
    helped = looked(Alerts(), 1000.0, growth, fallbacks=("other",), **changes)
    other = looked(Alerts(), 1000.0, growth, active=False, **changes)

    assert lonely["advice"] == f"{remedy} {INSTEAD}"
    assert [helped["advice"], other["advice"]] == [remedy, remedy]


def test_spans_are_said_as_people_say_them() -> None:
    assert [span(seconds) for seconds in (-1, 0.9, 6.7, 119, 121, 7199, 7201)] == [
        *("0 s", "0 s", "6 s", "119 s", "2 min", "119 min", "2 h")
    ]


def test_where_others_of_its_group_go_on_a_trouble_says_so() -> None:
    dead: dict[str, Any] = {"state": "dead", "next_try": 1.0}
    pair = group(("groq", "dead"), ("gpu2", "well"))

    covered = looked(Alerts(), 1000.0, group_of_two=pair, **dead)
    alone = looked(
        Alerts(), 1000.0, group_of_two=group(("groq", "dead"), ("gpu2", "cooling")), **dead
    )

    assert covered["detail"].endswith("; the other members of qwen are asked instead")
    assert INSTEAD not in covered["advice"]
    assert alone["detail"].endswith("; no fallback is set")
    assert INSTEAD in alone["advice"]
