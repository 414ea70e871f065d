"""The tokens of a provider: all instances together spend no more than one would, and not much
less.
"""

from __future__ import annotations

from functools import partial

import pytest

from aioserver.limits.gcra import ROUNDING
from aioserver.providers.capacity import TOKEN_BURST
from aioserver.wings.cluster.limits.shared_tokens import SharedTokens
from tests.support import cluster_simulation
from tests.support.cluster_simulation import Asker, Instance, Load, Simulation

IDLE = Load(rate=0.0)
PER_MINUTE = 60_000
RATE = PER_MINUTE / 60
# What the dearest request costs.
MOST = 2000


class Spender(Asker):
    """Requests of an instance that wait for nothing but the tokens; each lasts for a while, and
    costs another number of tokens than was expected.
    """

    def __init__(self, simulation: Simulation, instance: Instance, load: float) -> None:
        super().__init__(simulation, instance)
        self.load, self.waiting = load, 0
        # When something was started, and what it has cost in the end.
        self.spent: list[tuple[float, int]] = []
        self.tokens: SharedTokens | None = None
        self.tokens = SharedTokens(
            instance.leases,
            "T:provider",
            1 / RATE,
            TOKEN_BURST,
            lambda: simulation.now,
            on_slots=self.serve,
        )
        self.arrive()

    def arrive(self) -> None:
        wait = self.simulation.chance.expovariate(self.load or 1.0)
        self.simulation.later(wait, self.arrive, self.instance)
        if self.load:
            self.waiting = min(1000, self.waiting + 1)
            self.serve()

    def serve(self) -> None:
        tokens, chance = self.tokens, self.simulation.chance
        while tokens is not None and self.waiting:
            if (delay := tokens.delay()) > ROUNDING:
                self.look_again(delay)
                return
            self.waiting -= 1
            cost = chance.randrange(10, MOST)
            expected = chance.randrange(10, MOST)
            tokens.take(expected / RATE)
            self.spent.append((self.simulation.now, cost))
            correction = (cost - expected) / RATE
            self.simulation.later(
                chance.uniform(0.1, 3.0), partial(self.end, correction), self.instance
            )

    def end(self, correction: float) -> None:
        assert self.tokens is not None
        self.tokens.take(correction)
        self.serve()


def spending(seed: int, *loads: float, delay: float = 0.0005) -> tuple[Simulation, list[Spender]]:
    simulation = Simulation(seed, delay=delay)
    spenders = [Spender(simulation, simulation.add(IDLE), load) for load in loads]
    simulation.advance(30.0)
    for each in spenders:
        each.spent.clear()
    return simulation, spenders


def spent_by(spenders: list[Spender]) -> list[tuple[float, int]]:
    return sorted(spent for each in spenders for spent in each.spent)


def excess(spent: list[tuple[float, int]]) -> float:
    """By how many tokens the worst window exceeds the rate and the burst."""
    return cluster_simulation.excess(spent, RATE) - TOKEN_BURST * RATE


# What runs when a window begins or ends may cost more, or less, than was expected: so many of each
# instance at once, at the dearest. And each may owe for one request.
def allowed(instances: int) -> float:
    return instances * MOST * 8


@pytest.mark.parametrize("loads", [(5.0, 5.0, 5.0), (10.0, 0.0, 0.0), (10.0, 1.0, 0.2)])
@pytest.mark.parametrize("delay", [0.0005, 0.03])
def test_all_instances_together_spend_what_one_would(
    loads: tuple[float, ...], delay: float
) -> None:
    simulation, spenders = spending(1, *loads, delay=delay)
    calls = simulation.calls

    simulation.advance(60.0)

    spent = spent_by(spenders)
    total = sum(cost for _, cost in spent)
    print(f"{total / (60 * RATE):.3f} of the rate, {excess(spent):.0f} tokens beyond the burst")
    assert 0.9 * 60 * RATE <= total <= 60 * RATE + TOKEN_BURST * RATE + allowed(len(loads))
    assert excess(spent) <= allowed(len(loads))
    assert simulation.calls - calls < 60 * 25 * len(loads)


@pytest.mark.parametrize("instances", [1, 3])
def test_the_burst_of_a_provider_that_is_new_is_there_at_once(instances: int) -> None:
    simulation = Simulation(6)
    new, *_others = [Spender(simulation, simulation.add(IDLE), 0.0) for _ in range(instances)]
    simulation.advance(10.0)

    new.waiting = 1000
    new.serve()
    simulation.advance(0.05)

    expected = sum(cost for _, cost in new.spent)
    assert expected >= 0.5 * TOKEN_BURST * RATE
    assert excess(spent_by([new])) <= allowed(1)


def test_an_instance_that_owes_nothing_asks_nobody() -> None:
    simulation, spenders = spending(2, 0.0, 0.0)
    for each in spenders:
        assert each.tokens is not None
        each.tokens.delay()
    calls = simulation.calls

    simulation.advance(20.0)

    # The beats of two instances.
    assert simulation.calls - calls <= 2 * 20 / 2 + 4


def test_a_killed_instance_frees_its_part_for_the_others() -> None:
    simulation, spenders = spending(3, 10.0, 10.0, 10.0)
    spenders[0].instance.kill()
    simulation.advance(10.0)
    for each in spenders:
        each.spent.clear()

    simulation.advance(60.0)

    spent = spent_by(spenders)
    assert not spenders[0].spent
    assert sum(cost for _, cost in spent) >= 0.9 * 60 * RATE
    assert excess(spent) <= allowed(2)


@pytest.mark.parametrize("fault", ["away", "emptied", "put back"])
def test_a_server_that_is_away_or_forgets_gives_no_second_burst(fault: str) -> None:
    simulation, spenders = spending(4, 10.0, 10.0, 10.0)
    simulation.keep()
    simulation.advance(5.0)
    if fault == "away":
        simulation.pause()
        simulation.advance(20.0)
        simulation.go_on()
    elif fault == "emptied":
        simulation.empty()
    else:
        simulation.roll_back()

    simulation.advance(40.0)

    spent = spent_by(spenders)
    assert sum(cost for _, cost in spent) >= 0.7 * (spent[-1][0] - spent[0][0]) * RATE
    assert excess(spent) <= allowed(3)


def test_what_is_taken_back_may_be_spent_elsewhere() -> None:
    simulation, (one, other) = spending(5, 0.0, 0.0)
    assert one.tokens is not None
    one.tokens.take(40.0)
    one.waiting = 1
    one.serve()
    simulation.advance(1.0)
    assert not one.spent, "it owes for more than the burst"

    one.tokens.take(-40.0)
    simulation.advance(5.0)
    other.waiting = 1
    other.serve()
    simulation.advance(5.0)

    assert len(other.spent) == 1
