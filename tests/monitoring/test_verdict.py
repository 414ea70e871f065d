"""The verdict: of what is true the worst, with its numbers, what is felt of it, and what to do."""

from __future__ import annotations

from typing import Any

import pytest

from aioserver.monitoring.alerts import INSTEAD, Alerts
from aioserver.monitoring.findings import FINDINGS, OF_PROVIDERS, REJECTED
from aioserver.monitoring.interval import ANSWERED, ATTEMPTS, FAILED, REJECTIONS, Interval, Total
from aioserver.monitoring.verdict import RECENT, Verdicts
from tests.support.dashboard import CROWDED, QUEUEING, TOKEN, group, provider, snapshot

SILENT = {"longest": 6.4, "stalled": 25, "unanswered": 0, "under_way": 25}
FULL, ANSWERS = Total(REJECTIONS, "provider_queue_full"), Total(ANSWERED)
OWN, PLACES = Total(REJECTIONS, "rate_limit_exceeded"), Total(REJECTIONS, "server_at_capacity")


def state(changes: dict[str, Any]) -> Any:
    """The snapshot of an idle server, with *changes* by path."""
    stats = snapshot()
    stats["providers"]["other"] = provider()
    for path, value in changes.items():
        at = stats
        *way, last = path.split("__")
        for step in way:
            at = at[step]
        at[last] = value
    return stats


def interval(growth: dict[Total, float] | None = None, *, lag_max: float = 0.0) -> Interval:
    return Interval(growth or {}, {}, lag=0.0, lag_max=lag_max, cpu=0.0, tasks=0)


def judged(
    changes: dict[str, Any], growth: dict[Total, float] | None = None, *, lag_max: float = 0.0
) -> Any:
    """The verdict on one tick of a server, whose troubles are found first, as the monitor does
    it.
    """
    stats, tick = state(changes), interval(growth, lag_max=lag_max)
    Alerts().observe(stats, tick)
    return Verdicts().observe(stats, tick)


def failing(name: str = "groq", **outcomes: int) -> dict[Total, float]:
    return {Total(ATTEMPTS, outcome, name): number for outcome, number in outcomes.items()}


VERDICTS: dict[str, tuple[dict[str, Any], dict[Total, float], str, str, str]] = {
    "open": ({"connections__active": 3}, {}, "ok open", "Open", "Room for 97 more"),
    "nearly full": (
        {"connections__active": 97},
        {},
        "warning busy",
        "Nearly full",
        "Room for 3 more",
    ),
    "a queue": (
        {"connections__active": 40, **QUEUEING},
        {},
        "warning busy",
        "Busy",
        "Room for 60 more, but 35 requests wait for groq, the longest for 3.2 s",
    ),
    "a full provider": (
        {"connections__active": 40, "providers__groq__in_flight": 20},
        {},
        "warning busy",
        "Busy",
        "Room for 60 more, but all 20 places of groq are taken",
    ),
    "a pool that is exhausted": (
        {"providers__groq__pool__waiting": 1},
        {},
        "warning busy",
        "Busy",
        "Room for 100 more, but 1 request waits for a connection to groq",
    ),
    "a refused key": (
        {"providers__groq__flagged": True},
        {},
        "error trouble",
        "Key refused",
        "groq refuses our key, or its quota is used up",
    ),
    "a provider that rests": (
        {"providers__groq__pace__cooling": 12.0},
        {},
        "warning busy",
        "Busy",
        "Room for 100 more, but groq cools down for 12 s more, as it asked",
    ),
    "full": (
        CROWDED,
        {},
        "warning full",
        "Full",
        "40 connections wait for a place, the longest for 2.1 s; all 100 are taken",
    ),
    "just full": (
        {"connections__active": 100},
        {},
        "warning full",
        "Full",
        "All 100 places are taken, and nobody waits yet",
    ),
    "rejecting most": (
        CROWDED,
        {PLACES: 5700, ANSWERS: 300},
        "error rejecting",
        "Rejecting",
        "5,700 requests were rejected in 10 s: the server was full (server_at_capacity)",
    ),
    "rejecting some": (
        CROWDED,
        {PLACES: 300, ANSWERS: 5700},
        "warning rejecting",
        "Rejecting",
        "300 requests were rejected in 10 s: the server was full (server_at_capacity)",
    ),
    "rejecting one caller": (
        {},
        {OWN: 500},
        "warning rejecting",
        "Rejecting",
        (
            "500 requests were rejected in 10 s:"
            " a client asked more often than it may (rate_limit_exceeded)"
        ),
    ),
    "rejecting for two reasons": (
        {},
        {OWN: 1, PLACES: 2},
        "warning rejecting",
        "Rejecting",
        (
            "3 requests were rejected in 10 s, 2 of them since the server was full "
            "(server_at_capacity)"
        ),
    ),
    "a broken provider": (
        {},
        failing(http_5xx=9),
        "error trouble",
        "Failing",
        "groq answers with server errors (5xx): 9 of 9 attempts failed in the last minute",
    ),
    "a provider that breaks some": (
        {},
        failing(disconnected=9, ok=11),
        "warning trouble",
        "Failing",
        "groq breaks off its answers: 9 of 20 attempts failed in the last minute",
    ),
    "a provider that breaks some, whose queue is full": (
        {},
        {**failing(disconnected=9, ok=11), FULL: 600},
        "error rejecting",
        "Failing",
        "groq breaks off its answers: 9 of 20 attempts failed in the last minute",
    ),
    "a provider that has stalled, in a full server": (
        {**CROWDED, "providers__groq__silent": SILENT},
        {PLACES: 100},
        "error rejecting",
        "Stalled",
        "groq has said nothing for 6 s in 25 answers",
    ),
    "a dead provider": (
        {"providers__groq__state": "dead", "providers__groq__next_try": 2.5},
        failing(connect_error=57, ok=3),
        "error trouble",
        "Dead",
        "groq cannot be reached: 57 of 60 attempts failed in the last minute; it is left alone",
    ),
    "another provider in trouble": (
        {},
        failing("other", tls=9),
        "error trouble",
        "Failing",
        "other fails in TLS: 9 of 9 attempts failed in the last minute",
    ),
    "another provider in trouble while clients are rejected": (
        {},
        {**failing("other", tls=9), PLACES: 20},
        "error rejecting",
        "Rejecting",
        "20 requests were rejected in 10 s: the server was full (server_at_capacity)",
    ),
    "no key": (
        {"providers__groq__usable": False},
        {},
        "error trouble",
        "Not usable",
        "The active provider groq is not usable",
    ),
    "few files": (
        {**CROWDED, "process__open_fds": 1000, "process__max_fds": 1024},
        {},
        "error trouble",
        "Out of files",
        "1,000 of 1,024 file descriptors are open",
    ),
    "a bug that many met": (
        {"bugs__last_minute": 93, "providers__groq__state": "dead"},
        {PLACES: 20},
        "error trouble",
        "Bug",
        "93 requests met a bug of the server in the last minute",
    ),
    "a bug that one met": (
        {"bugs__last_minute": 1},
        {},
        "error trouble",
        "Bug",
        "1 request met a bug of the server in the last minute",
    ),
    "not ready": (
        {"ready": False},
        {},
        "error closed",
        "Not ready",
        "Starting or stopping: new requests are rejected",
    ),
    "nobody usable": (
        {"ready": False, "providers__groq__usable": False, "providers__other__usable": False},
        {},
        "error closed",
        "Not ready",
        "No provider is usable: nobody gets an answer",
    ),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_verdict_is_the_worst_that_is_true(name: str) -> None:
    changes, growth, level, word, text = VERDICTS[name]

    verdict = judged(changes, growth)

    assert f"{verdict['level']} {verdict['state']}" == level
    assert (verdict["word"], verdict["text"]) == (word, text)


def test_late_loop_is_reported_for_some_ticks() -> None:
    verdicts, stats = Verdicts(), state({})

    late = verdicts.observe(stats, interval(lag_max=0.8))
    later = [verdicts.observe(stats, interval())["word"] for _ in range(RECENT)]

    assert (late["word"], late["level"]) == ("Slow", "warning")
    assert late["text"] == "Room for 100 more, but the event loop was 800 ms late"
    assert later == ["Slow"] * (RECENT - 1) + ["Open"]


def test_what_was_rejected_is_counted_over_the_last_ticks() -> None:
    verdicts, stats = Verdicts(), state({})

    texts = [verdicts.observe(stats, interval({FULL: 600}))["text"] for _ in range(RECENT + 5)]
    over = [verdicts.observe(stats, interval())["word"] for _ in range(RECENT)]

    assert [text.partition(" ")[0] for text in texts[:2]] == ["600", "1,200"]
    assert {text.partition(" ")[0] for text in texts[RECENT - 1 :]} == {"6,000"}
    assert over == ["Rejecting"] * (RECENT - 1) + ["Open"]


def test_trouble_comes_with_what_is_felt_of_it_and_what_to_do() -> None:
    changes = {**QUEUEING, "providers__groq__silent": SILENT}
    growth = {FULL: 6248.0, Total(FAILED): 12.0}

    verdict = judged(changes, growth)

    assert verdict["detail"] == (
        "It began 6 s ago. 35 requests wait for groq, the longest for 3.2 s; 12 answers failed in "
        "10 s; 6,248 requests were rejected in 10 s: the queue of a provider was full "
        "(provider_queue_full)."
    )
    assert verdict["advice"].startswith("Look at the log and the load of groq;")
    assert verdict["about"] == "groq"


def test_a_bug_comes_with_what_else_is_wrong_and_what_to_do() -> None:
    bug = {"bugs__last_minute": 93}

    verdict = judged(bug, {PLACES: 20.0, **failing(http_5xx=9)})

    assert verdict["detail"] == (
        "groq answers with server errors (5xx): 9 of 9 attempts failed in the last minute."
        " 20 requests were rejected in 10 s: the server was full (server_at_capacity)."
        " 0 of 100 places are taken, 0 answers under way."
    )
    assert (verdict["advice"], verdict["about"]) == (FINDINGS["bug"].remedy, "bug")
    assert judged({**bug, "ready": False})["detail"] == f"{VERDICTS['a bug that many met'][4]}."


def test_rejections_come_with_where_it_is_crowded_and_what_to_do() -> None:
    verdict = judged({**CROWDED, **QUEUEING}, {PLACES: 57.0, **failing("other", tls=9)})

    assert verdict["detail"] == (
        "100 of 100 places are taken, 0 answers under way."
        " 35 requests wait for groq, the longest for 3.2 s; 20 of its 20 places are taken."
        " other fails in TLS: 9 of 9 attempts failed in the last minute."
    )
    assert verdict["advice"] == FINDINGS["full"].remedy.format(name="groq")


def test_more_places_are_advised_where_no_provider_is_the_limit() -> None:
    more_places = REJECTED["server_at_capacity"].remedy

    assert judged(CROWDED, {PLACES: 57.0})["advice"] == more_places
    assert judged(CROWDED)["advice"] == more_places
    assert judged({**CROWDED, **QUEUEING})["advice"] == FINDINGS["full"].remedy.format(name="groq")
    assert judged(QUEUEING, {OWN: 57.0})["advice"] == REJECTED["rate_limit_exceeded"].remedy


def test_queue_that_the_pace_makes_is_reported_as_such() -> None:
    pace = {"per_minute": 3500, "left": 0, "cooling": 0.0}
    changes = {
        **CROWDED,
        **QUEUEING,
        "providers__groq__in_flight": 1,
        "providers__groq__pace": pace,
    }

    assert judged(changes)["detail"].startswith(
        "35 requests wait for groq, the longest for 3.2 s; its pace of 3,500 a minute is used up."
    )


def test_nothing_is_said_of_latency_while_nothing_is_answered() -> None:
    fresh = {"connections__active": 3, "first_token": {**TOKEN, "age": 0.4}}
    latency = "Half of the answers begin within 210 ms, 95 % within 500 ms."

    assert judged(fresh)["detail"] == (
        f"3 of 100 places are taken, 0 answers under way. {latency}"
    )
    assert judged({**CROWDED, **fresh})["detail"].endswith(latency)
    assert "begin" not in judged({"first_token": {**TOKEN, "age": 30.0}})["detail"]
    assert "begin" not in judged(fresh, failing(http_5xx=9))["detail"]


def test_every_verdict_on_trouble_has_its_advice_and_its_word() -> None:
    words = set()
    for changes, growth, _, word, _ in VERDICTS.values():
        verdict = judged(changes, growth)
        if verdict["level"] == "error" and verdict["text"] != VERDICTS["not ready"][4]:
            assert verdict["advice"], verdict
        words.add(word)

    assert {row.word for row in OF_PROVIDERS.values()} - words == {"Sick"}


def test_the_verdict_speaks_of_a_group_only_when_no_member_can_start_anything() -> None:
    dead = {"state": "dead", "next_try": 1.0}
    gpus = {
        "active_group": "qwen",
        "providers__gpu1": provider(active=True, **dead),
        "providers__gpu2": provider(),
        "providers__groq__active": False,
    }

    healthy = judged({**gpus, "groups__qwen": group(("gpu1", "well"), ("gpu2", "well"))})
    assert "qwen" not in healthy["text"]
    one_dead = judged({**gpus, "groups__qwen": group(("gpu1", "dead"), ("gpu2", "well"))})
    assert (one_dead["level"], one_dead["word"], one_dead["about"]) == ("warning", "Dead", "gpu1")
    assert "the other members of qwen are asked instead" in one_dead["detail"]
    assert INSTEAD not in one_dead["advice"]

    both_sick = {**gpus, "providers__gpu1": provider(active=True, state="sick")}
    sick = judged(
        {**both_sick, "groups__qwen": group(("gpu1", "sick"), ("gpu2", "sick"))},
        failing("gpu1", connect_error=9),
    )
    assert (sick["level"], sick["about"]) == ("error", "gpu1")
    assert "are asked instead" not in sick["detail"]

    closed = group(("gpu1", "dead"), ("gpu2", "key_refused"), waiting=3, oldest_wait=4.0)
    out = judged({**gpus, "groups__qwen": closed})
    assert (out["level"], out["word"], out["about"]) == ("error", "Group out", "qwen")
    assert out["text"] == (
        "No member of qwen can start anything: gpu1 is dead and gpu2 refuses our key"
    )
    assert "3 requests wait for qwen, the longest for 4.0 s" in out["detail"]

    other = judged({**gpus, "active_group": None, "groups__qwen": closed})
    assert (other["level"], other["word"]) == ("error", "Dead")
    aside = {**gpus, "active_group": None, "providers__gpu1": provider(**dead)}
    assert judged({**aside, "groups__qwen": closed})["word"] == "Group out"
    assert judged({**aside, "groups__qwen": closed})["level"] == "warning"


def test_a_group_that_cools_down_is_a_warning_that_says_for_how_long() -> None:
    pace = {"per_minute": 100, "left": 0, "cooling": 12.3}
    changes = {
        "active_group": "qwen",
        "providers__gpu1": provider(active=True, pace=pace),
        "providers__gpu2": provider(pace=pace),
        "groups__qwen": group(("gpu1", "cooling"), ("gpu2", "cooling")),
    }

    verdict = judged(changes)

    assert (verdict["level"], verdict["about"]) == ("warning", "qwen")
    assert verdict["text"] == (
        "No member of qwen can start anything: "
        "gpu1 cools down for 12 s more and gpu2 cools down for 12 s more"
    )


def test_a_group_of_one_is_its_provider() -> None:
    changes = {
        "providers__gpu1": provider(state="dead", next_try=1.0),
        "groups__fast": group(("gpu1", "dead")),
    }

    verdict = judged(changes)

    assert (verdict["word"], verdict["about"]) == ("Dead", "gpu1")
