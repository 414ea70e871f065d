"""A breaker costs no more than the fault: what clients get from a provider that fails, in virtual
time.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import pytest

from aioserver.config import settings
from aioserver.provider_errors import ProviderFault
from aioserver.providers.breaker import LONGEST_INTERVAL, NEEDED, SICK_INTERVAL, TURN
from tests.support.failing import sicken
from tests.support.outage import CLIENTS, FAILURE, RETRIES, Case, ScriptedExchange, ask, run
from tests.support.routers import router_of
from tests.support.scripted_provider import LIMITS
from tests.support.virtual_loop import virtually

if TYPE_CHECKING:
    from aioserver.gateway.router import Router

# At most so many attempts a second at a provider that is known to be dead.
MOST = 2.0


# How often it fails, the share of the answers without a breaker, and the clients and their retries.
SICK = [
    (rate, least, clients, retries)
    for rate, least in ((0.5, 0.9), (0.95, 0.7))
    for clients in CLIENTS
    for retries in RETRIES
]


# Where most attempts fail, a run takes seconds: `stress` has all.
@pytest.mark.parametrize(
    ("rate", "least", "clients", "retries", "requests"),
    [
        *((0.5, 0.9, 1, 3, 600), (0.5, 0.9, 300, 0, 1000), (0.95, 0.7, 1, 0, 1000)),
        *(pytest.param(*case, 0, marks=pytest.mark.stress) for case in SICK),
    ],
)
def test_a_sick_provider_answers_as_much_as_without_any_breaker(
    rate: float, least: float, clients: int, retries: int, requests: int
) -> None:
    case = Case(rate, clients, retries, requests=requests)

    share = run(case).share

    assert share >= least * run(replace(case, breaker=False)).share > 0


@pytest.mark.parametrize("fallback", [False, True])
@pytest.mark.parametrize("clients", CLIENTS)
def test_a_dead_provider_gets_two_attempts_a_second_at_most(
    clients: int, *, fallback: bool
) -> None:
    outcome = run(Case(1.0, clients, 3, fallback, requests=max(400, 3 * clients)))

    assert outcome.per_second is not None, "it was found out that it is dead"
    assert 0 < outcome.per_second <= MOST
    assert outcome.share == (1.0 if fallback else 0.0)


@pytest.mark.parametrize("clients", CLIENTS)
def test_a_provider_that_answers_all_is_let_answer_all(clients: int) -> None:
    assert run(Case(0.0, clients, 0, requests=400)).share == 1.0


@pytest.mark.parametrize("clients", CLIENTS)
@pytest.mark.parametrize("rate", [0.5, 0.95])
def test_a_fallback_answers_what_a_sick_provider_does_not(rate: float, clients: int) -> None:
    outcome = run(Case(rate, clients, 3, fallback=True, requests=400))
    assert outcome.share == 1.0


def test_the_same_seed_gives_the_same_run() -> None:
    case = Case(0.95, 10, 3, requests=200)
    assert run(case) == run(case) != run(replace(case, seed=2))


# A sick provider comes back by time: the rule in figures is in tests/providers/test_sick.py, and
# here it is on its way through the router.


class Pair(NamedTuple):
    """A provider that fails as it is told, one beside it, and the name of both, or None where the
    second is a fallback.
    """

    first: ScriptedExchange
    second: ScriptedExchange
    router: Router
    model: str | None

    async def ask(self) -> str:
        """The name of the provider that answers."""
        return (await ask(self.router, self.model)).outcome.provider

    async def close(self) -> None:
        for provider in (self.first, self.second):
            await provider.close()


def pair(choose: str, retries: int = 3) -> Pair:
    dice = random.Random(1)
    limits = replace(LIMITS, max_connections=1000, concurrent_requests=1000, max_retries=retries)
    first, second = (ScriptedExchange(name, limits, dice) for name in ("first", "second"))
    providers = {"first": first, "second": second}
    if choose == "fallback":
        return Pair(first, second, router_of(providers, "first", ["second"]), None)
    members = tuple(settings.Member(provider=name) for name in providers)
    both = settings.Group(members=members, choose=choose)
    return Pair(first, second, router_of(providers, "first", models={"both": both}), "both")


CHOICES = ("fallback", "ordered", "least_busy", "weighted")


@pytest.mark.parametrize("choose", CHOICES)
@virtually
async def test_a_sick_provider_is_tried_by_time_and_gets_well(choose: str) -> None:
    both = pair(choose)
    breaker = both.first.health.breaker
    sicken(breaker, asyncio.get_running_loop().time)

    assert await asyncio.gather(*(both.ask() for _ in range(3))) == ["second"] * 3
    await asyncio.sleep(SICK_INTERVAL)
    # One is under way, then two more at once.
    asked = await asyncio.gather(*(both.ask() for _ in range(4)))
    assert sorted(asked) == ["first", *["second"] * 3]
    asked = await asyncio.gather(*(both.ask() for _ in range(4)))
    assert sorted(asked) == ["first", "first", "second", "second"]

    assert breaker.state == "well"
    await both.close()


@pytest.mark.parametrize("choose", CHOICES)
@virtually
async def test_each_twentieth_request_tries_a_sick_provider(choose: str) -> None:
    both = pair(choose)
    sicken(both.first.health.breaker, asyncio.get_running_loop().time)

    # At once, and so before the time of a trial.
    asked = await asyncio.gather(*(both.ask() for _ in range(TURN)))

    assert asked.count("first") == 1
    await both.close()


@pytest.mark.parametrize("choose", CHOICES)
@virtually
async def test_a_trial_that_fails_goes_to_the_other_at_once(choose: str) -> None:
    loop = asyncio.get_running_loop()
    both = pair(choose)
    both.first.rate = 1.0
    sicken(both.first.health.breaker, loop.time)
    await asyncio.sleep(SICK_INTERVAL)
    began = loop.time()

    assert await both.ask() == "second"

    assert len(both.first.attempts) == 1
    assert both.second.attempts[0] - began <= 1.5 * FAILURE
    trials = both.first.health.breaker.trials
    assert trials is not None
    assert (trials.interval, trials.row, trials.needed) == (2 * SICK_INTERVAL, 0, NEEDED)
    await both.close()


@pytest.mark.parametrize("choose", CHOICES)
@pytest.mark.parametrize("tried", [False, True])
@virtually
async def test_where_all_others_fail_a_sick_provider_is_asked_last_with_its_retries(
    choose: str, *, tried: bool
) -> None:
    both = pair(choose, retries=1)
    both.first.rate = both.second.rate = 1.0
    sicken(both.first.health.breaker, asyncio.get_running_loop().time)
    if tried:
        await asyncio.sleep(SICK_INTERVAL)

    with pytest.raises(ProviderFault):
        await both.ask()

    # A group has one more round of all.
    rounds = 2 if choose == "fallback" else 1 + (not tried)
    assert len(both.first.attempts) == rounds + tried
    assert max(both.first.attempts) > max(both.second.attempts)
    assert both.first.health.breaker._trials == 0  # noqa: SLF001 - no snapshot has it
    await both.close()


@pytest.mark.parametrize("choose", CHOICES)
@pytest.mark.parametrize(("down", "seed"), [(20.0, 0), (200.0, 1)])
@virtually
async def test_after_an_outage_the_router_gives_it_its_requests_back(
    down: float, choose: str, seed: int
) -> None:
    rate, before, after = 2.0, 10.0, 60.0
    dice = random.Random(f"{seed} {down}")
    loop = asyncio.get_running_loop()
    both = pair(choose)
    answered: dict[float, str] = {}

    async def client() -> None:
        asked_at = loop.time()
        answered[asked_at] = await both.ask()

    began = loop.time()
    async with asyncio.TaskGroup() as group:
        while loop.time() < began + before + down + after:
            both.first.rate = float(began + before <= loop.time() < began + before + down)
            group.create_task(client())
            await asyncio.sleep(dice.expovariate(rate))

    end = began + before + down
    late = [name for at, name in sorted(answered.items()) if at > end + 12.0 + 20 / rate + 1.0]
    usual = [name for at, name in answered.items() if at < began + before - 1.0]
    share = usual.count("first") / len(usual)
    assert late.count("first") >= 0.7 * share * len(late)
    during = [at for at in both.first.attempts if began + before <= at < end]
    assert len(during) <= 60 + 2 * down / LONGEST_INTERVAL
    await both.close()
