"""Troubles: what is told of a provider, and since when."""

from __future__ import annotations

from typing import Any

import pytest

from aioserver.monitoring.troubles import Troubles, span


def snapshot(now: float, **silent: Any) -> Any:
    """As much of a snapshot as troubles are found in."""
    state = {"longest": 0.0, "stalled": 0, "unanswered": 0, "under_way": 0, **silent}
    return {"time": now, "providers": {"groq": {"silent": state, "trouble": None}}}


def looked(troubles: Troubles, now: float, **silent: Any) -> Any:
    """The trouble that is found."""
    state = snapshot(now, **silent)
    troubles.look(state)
    return state["providers"]["groq"]["trouble"]


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
    assert looked(Troubles(), 1000.0, longest=6.7, **silent)["text"] == text


@pytest.mark.parametrize("silent", [{}, {"under_way": 25}, {"stalled": 9, "under_way": 19}])
def test_silence_in_few_answers_is_theirs(silent: dict[str, int]) -> None:
    assert looked(Troubles(), 1000.0, longest=60.0, **silent) is None


def test_trouble_that_lasts_keeps_its_beginning() -> None:
    troubles = Troubles()
    all_silent = {"stalled": 2, "under_way": 2}

    first = looked(troubles, 1000.0, longest=6.0, **all_silent)
    later = looked(troubles, 1010.0, longest=3.0, **all_silent)
    over = looked(troubles, 1011.0)
    again = looked(troubles, 1020.0, longest=5.0, **all_silent)

    assert [first["since"], later["since"], again["since"]] == [994.0, 994.0, 1015.0]
    assert later["detail"] == "It began 16 s ago"
    assert over is None


def test_spans_are_said_as_people_say_them() -> None:
    assert [span(seconds) for seconds in (-1, 0.9, 6.7, 119, 121, 7199, 7201)] == [
        *("0 s", "0 s", "6 s", "119 s", "2 min", "119 min", "2 h")
    ]
