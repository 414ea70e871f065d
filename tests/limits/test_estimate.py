"""Estimates of tokens, learned from what providers report."""

from __future__ import annotations

import pytest

from aioserver.limits.estimate import (
    LARGEST_FIRST,
    MAX_INPUT,
    MAX_PAIRS,
    UNBOUNDED,
    Estimate,
    Estimates,
)


def learned(estimates: Estimates, times: int = 1, **changes: int | str | None) -> None:
    told: dict[str, int | str | None] = {
        "provider": "p",
        "model": "m",
        "caller": "c",
        "size": 1000,
        "prompt": 500,
        "cached": 400,
        "answer": 80,
        "events": 40,
    }
    for _ in range(times):
        estimates.learn(**{**told, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("bound", "answer"),
    [(None, UNBOUNDED), (10, 10), (32_000, LARGEST_FIRST), (0, 0)],
)
def test_first_estimate_is_a_quarter_of_the_bytes_and_what_the_request_bounds(
    bound: int | None, answer: int
) -> None:
    estimate = Estimates().before("p", "m", "c", 4000, bound)

    assert estimate == Estimate(1000, 1000, answer)
    assert estimate.tokens == 1000 + answer
    assert estimate.work == 1000 + 2 * answer


def test_averages_follow_what_is_reported_and_the_newest_weighs_an_eighth() -> None:
    estimates = Estimates()
    learned(estimates)
    # 0.25 and an eighth of the way to 0.5; of what no cache holds to 0.1.
    estimate = estimates.before("p", "m", "c", 80_000)
    assert estimate.prompt == 22_500
    assert estimate.uncached == round(80_000 * (0.25 - 0.15 / 8))
    assert estimate.answer == 80, "the first answer is all that is known"
    learned(estimates, answer=160)
    assert estimates.before("p", "m", "c", 1).answer == 90

    learned(estimates, 100)
    assert estimates.before("p", "m", "c", 1000) == Estimate(500, 100, 80)
    # Two tokens for each event.
    assert estimates.unreported("p", "m", "c", Estimate(7, 7, 9), 30) == Estimate(7, 7, 60)


def test_request_bounds_what_is_known_of_answers() -> None:
    estimates = Estimates()
    learned(estimates, 100)

    assert estimates.before("p", "m", "c", 1, 10).answer == 10
    assert estimates.before("p", "m", "c", 1, 32_000).answer == 80


def test_answer_that_broke_off_says_nothing_of_answers() -> None:
    estimates = Estimates()
    learned(estimates, 100, answer=None)

    assert estimates.before("p", "m", "c", 1000) == Estimate(500, 100, UNBOUNDED)
    assert estimates.unreported("p", "m", "c", Estimate(0, 0, 0), 30).answer == 30


def test_body_of_pictures_is_bounded_and_an_answer_has_a_token() -> None:
    estimates = Estimates()

    assert estimates.before("p", "m", "c", 1 << 30).prompt == MAX_INPUT
    assert estimates.unreported("p", "m", "c", Estimate(5, 5, 5), 0) == Estimate(5, 5, 1)


def test_others_know_nothing_of_it_and_the_oldest_pairs_go() -> None:
    estimates = Estimates()
    learned(estimates, 100)
    for other in (("q", "m", "d"), ("p", "n", "d")):
        assert estimates.before(*other, 1000) == Estimate(250, 250, UNBOUNDED)
    for number in range(MAX_PAIRS - 1):
        learned(estimates, provider=f"p{number}", caller=f"c{number}")
    assert estimates.before("p", "m", "c", 1000) == Estimate(500, 100, 80)

    learned(estimates, provider="one", caller="more")
    assert estimates.before("p", "m", "c", 1000) == Estimate(250, 250, UNBOUNDED)


@pytest.mark.parametrize(("choices", "bound", "answer"), [(50, 10, 500), (4, None, 4000)])
def test_each_of_several_choices_may_be_as_long(
    choices: int, bound: int | None, answer: int
) -> None:
    assert Estimates().before("p", "m", "c", 0, bound, choices).answer == answer


def test_averages_are_those_of_one_choice() -> None:
    estimates = Estimates()
    learned(estimates, 100, answer=400, choices=4)

    assert estimates.before("p", "m", "c", 0).answer == 100
    assert estimates.before("p", "m", "c", 0, choices=3).answer == 300


def test_a_bound_that_is_ignored_bounds_no_estimate() -> None:
    estimates = Estimates()
    learned(estimates, answer=800, bound=1)
    assert estimates.before("p", "m", "c", 0, 1).answer == 800

    learned(estimates, 100, answer=1, bound=1)
    assert estimates.before("p", "m", "c", 0, 1).answer == 1


def test_answers_that_their_bounds_have_cut_teach_no_short_answers() -> None:
    estimates = Estimates()
    learned(estimates, answer=800)
    learned(estimates, 100, answer=1, bound=1)
    assert estimates.before("p", "m", "c", 0).answer == 800

    learned(estimates, caller="new", answer=1, bound=1)
    assert estimates.before("p", "m", "new", 0).answer == UNBOUNDED


def test_what_one_caller_teaches_moves_nobody_elses_estimates() -> None:
    estimates = Estimates()
    learned(estimates, 100, caller="spaces", size=250_000, prompt=10, cached=0, events=0)
    learned(estimates, 100, caller="spaces", answer=10**6, events=1, size=0)

    assert estimates.before("p", "m", "other", 1000) == Estimate(250, 250, UNBOUNDED)
    assert estimates.tokens_per_byte("p", "m", "other") == 0.25
    assert estimates.unreported("p", "m", "other", Estimate(0, 0, 0), 7).answer == 7
    # What most callers have found counts for one that is new.
    for caller in ("a", "b", "c"):
        learned(estimates, 100, caller=caller)
    assert estimates.before("p", "m", "other", 1000) == Estimate(500, 100, UNBOUNDED)


@pytest.mark.parametrize(("size", "prompt", "counted"), [(10**5, 1, 1 / 16), (10, 10**6, 1.0)])
def test_a_byte_costs_something_and_one_token_at_most(
    size: int, prompt: int, counted: float
) -> None:
    estimates = Estimates()
    learned(estimates, 100, size=size, prompt=prompt, cached=prompt)

    assert estimates.before("p", "m", "c", 16_000).prompt == pytest.approx(
        16_000 * counted, rel=0.01
    )
    assert estimates.before("p", "m", "c", 16_000).uncached >= 0


def test_a_caller_with_a_thousand_models_pushes_out_none_of_another() -> None:
    estimates = Estimates()
    learned(estimates, 100, caller="small")
    for number in range(3 * MAX_PAIRS):
        learned(estimates, model=f"m{number}", caller="large")

    assert estimates.before("p", "m", "small", 1000) == Estimate(500, 100, 80)
    newest = estimates.before("p", f"m{3 * MAX_PAIRS - 1}", "large", 1000)
    assert newest.answer == 80
    assert estimates.before("p", "m0", "large", 1000).answer == UNBOUNDED
