"""A breaker costs no more than the fault: what clients get from a provider that fails, in virtual
time.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.support.outage import CLIENTS, RETRIES, Case, run

# At most so many attempts a second at a provider that is known to be dead.
MOST = 2.0


@pytest.mark.parametrize("retries", RETRIES)
@pytest.mark.parametrize("clients", CLIENTS)
@pytest.mark.parametrize(("rate", "least"), [(0.5, 0.9), (0.8, 0.9), (0.95, 0.7)])
def test_a_sick_provider_answers_as_much_as_without_any_breaker(
    rate: float, least: float, clients: int, retries: int
) -> None:
    case = Case(rate, clients, retries)

    share = run(case).share

    assert share >= least * run(replace(case, breaker=False)).share > 0


@pytest.mark.parametrize("fallback", [False, True])
@pytest.mark.parametrize("clients", CLIENTS)
def test_a_dead_provider_gets_two_attempts_a_second_at_most(
    clients: int, *, fallback: bool
) -> None:
    outcome = run(Case(1.0, clients, 3, fallback, requests=1000))

    assert outcome.per_second is not None, "it was found out that it is dead"
    assert 0 < outcome.per_second <= MOST
    assert outcome.share == (1.0 if fallback else 0.0)


@pytest.mark.parametrize("clients", CLIENTS)
def test_a_provider_that_answers_all_is_let_answer_all(clients: int) -> None:
    assert run(Case(0.0, clients, 0, requests=1000)).share == 1.0


@pytest.mark.parametrize("clients", CLIENTS)
@pytest.mark.parametrize("rate", [0.5, 0.95])
def test_a_fallback_answers_what_a_sick_provider_does_not(rate: float, clients: int) -> None:
    outcome = run(Case(rate, clients, 3, fallback=True, requests=1000))
    assert outcome.share == 1.0


def test_the_same_seed_gives_the_same_run() -> None:
    case = Case(0.95, 10, 3, requests=2000)
    assert run(case) == run(case) != run(replace(case, seed=2))
