"""What callers have spent: two days, bounded, and whose names come from the configuration."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from aioserver.protocol.tokens import Tokens
from aioserver.telemetry.outcome import ESTIMATE, MIXED, NOBODY, PROVIDER, AttemptCost
from aioserver.usage.sums import MAX_CHILDREN, MAX_ROWS, MAX_UNKNOWN, CallerSums, together
from tests.support.ledgers import DAY, NOON


class Wall:
    now = NOON

    def __call__(self) -> float:
        return self.now


def cost(provider: str = "p", model: str = "m", **changes: Any) -> AttemptCost:
    tokens = Tokens(10, 4, 3, 2, 1, 5, 6)
    return replace(AttemptCost(provider, model, "ok", 10, 3, "provider", tokens), **changes)


def sums_of(wall: Wall | None = None) -> CallerSums:
    sums = CallerSums(wall or Wall())
    sums.configured = {("p", "m"), ("p", "n")}
    return sums


def test_each_column_has_its_count() -> None:
    sums = sums_of()

    sums.add("web", cost(), anew=True)
    sums.add("web", cost(source=ESTIMATE), anew=False)
    sums.add("web", cost(source=MIXED), anew=True)
    sums.add("web", cost(source=NOBODY), anew=True)

    assert sums.days() == [
        {
            "day": "2026-11-28",
            "rows": [
                {
                    "caller": "web",
                    "provider": "p",
                    "model": "m",
                    "requests": 3,
                    "attempts": 4,
                    "input_tokens": 30,
                    "cached_tokens": 12,
                    "cache_write_tokens": 6,
                    "output_tokens": 9,
                    "reasoning_tokens": 3,
                    "audio_tokens": 33,
                    "estimated_tokens": 16,
                }
            ],
        },
        {"day": "2026-11-27", "rows": []},
    ]
    assert sums.today("web") == 39
    assert sums.tokens["web", "p", "m", "input"].value == 30
    assert sums.estimated["web"].value == 16


def test_yesterday_is_shown_and_the_day_before_is_not() -> None:
    wall = Wall()
    sums = sums_of(wall)
    shown = []
    for _ in range(4):
        sums.add("web", cost(), anew=True)
        wall.now += DAY
        shown.append([(day["day"], len(day["rows"])) for day in sums.days()])

    assert shown[0] == [("2026-11-29", 0), ("2026-11-28", 1)]
    wall.now += DAY
    assert [len(day["rows"]) for day in sums.days()] == [0, 0]
    assert sums.today("web") == 0
    assert sums.tokens["web", "p", "m", "input"].value == 40


@pytest.mark.parametrize("days", [-30, -1, 1, 30])
def test_a_clock_that_comes_back_finds_each_day_as_it_was(days: int) -> None:
    wall = Wall()
    sums = sums_of(wall)
    sums.add("web", cost(), anew=True)

    wall.now += days * DAY
    sums.add("web", cost(), anew=True)
    sums.add("web", cost(), anew=True)
    assert sums.today("web") == 26
    wall.now -= days * DAY
    sums.add("web", cost(), anew=True)

    assert sums.today("web") == 26
    assert sums.days()[0]["day"] == "2026-11-28"
    assert sums.tokens["web", "p", "m", "input"].value == 40


def test_names_that_clients_invent_have_bounds_and_cost_no_other_caller_its_rows() -> None:
    sums = sums_of()

    for number in range(MAX_UNKNOWN + 50):
        sums.add("web", cost(model=f"invented {number}"), anew=True)
    sums.add("other", cost(model="mine" * 1000), anew=True)

    rows = sums.days()[0]["rows"]
    assert len(rows) == MAX_UNKNOWN + 2
    [rest] = [row for row in rows if row["model"] == "other"]
    assert rest["attempts"] == 50
    assert sum(int(row["input_tokens"]) for row in rows) == 10 * (MAX_UNKNOWN + 51)
    assert max(len(str(row["model"])) for row in rows) == 200
    # Of the metric each model is a configured one, or `other`.
    assert {labels[2] for labels in sums.tokens} == {"other"}


def test_rows_and_children_have_bounds() -> None:
    sums = sums_of()
    sums.configured = {("p", f"{number}") for number in range(MAX_ROWS + 10)}

    for number in range(MAX_ROWS + 10):
        sums.add(f"{number % 7}", cost(model=f"{number}"), anew=True)

    rows = sums.days()[0]["rows"]
    assert len(rows) <= MAX_ROWS + 7
    assert sum(int(row["attempts"]) for row in rows) == MAX_ROWS + 10
    named = [labels for labels in sums.tokens if labels[0] != "other"]
    assert len(named) == MAX_CHILDREN
    counted = sum(each.value for labels, each in sums.tokens.items() if labels[3] == "input")
    assert counted == 10 * (MAX_ROWS + 10)


def test_days_of_several_instances_add_up() -> None:
    one, two, ahead = sums_of(), sums_of(), Wall()
    ahead.now += DAY
    three = sums_of(ahead)
    for sums in (one, two, three):
        sums.add("web", cost(), anew=True)
    two.add("x", cost(), anew=True)

    first, second = together([one.days(), two.days(), three.days()])

    assert (first["day"], second["day"]) == ("2026-11-29", "2026-11-28")
    assert [(row["caller"], row["input_tokens"]) for row in second["rows"]] == [
        ("web", 20),
        ("x", 10),
    ]
    assert sums_of().days("web")[0]["rows"] == []
    assert [row["caller"] for row in two.days("x")[0]["rows"]] == ["x"]


GIVEN: Any = {name: SimpleNamespace(model="m", models=("n",)) for name in ("openai", "groq")}


def spent(source: str = ESTIMATE, model: str = "m", cached: int | None = None) -> AttemptCost:
    return AttemptCost("groq", model, "ok", 3, 9, source, Tokens(cached=cached))


@pytest.mark.parametrize(
    ("source", "asked", "answered"),
    [
        (PROVIDER, "provider", "provider"),
        (MIXED, "provider", "estimate"),
        (ESTIMATE, "estimate", "estimate"),
    ],
)
def test_tokens_are_counted_by_who_has_counted_them(
    source: str, asked: str, answered: str
) -> None:
    sums = CallerSums()
    sums.apply(GIVEN, {})

    for each in (spent(source), spent(source, cached=2)):
        sums.add("web", each, anew=True)

    counters = sums.of_providers
    counted = {labels[2:]: each.value for labels, each in counters.items() if each.value}
    cached = {("cached", "provider"): 2}
    assert counted == {("input", asked): 6, ("output", answered): 18, **cached}


def test_tokens_that_nobody_knows_are_not_counted() -> None:
    sums = CallerSums()
    sums.apply(GIVEN, {})

    sums.add("web", spent(NOBODY), anew=True)

    assert not any(counter.value for counter in sums.of_providers.values())


@pytest.mark.parametrize(("model", "label"), [("m", "m"), ("n", "n"), ("evil", "other")])
def test_a_model_that_is_not_configured_is_another(model: str, label: str) -> None:
    sums = CallerSums()
    sums.apply(GIVEN, {})

    sums.add("web", spent(model=model), anew=True)

    assert sums.of_providers["groq", label, "output", "estimate"].value == 9
