"""Whatever happens to instances, calls and the server: no more is in flight than the limit, and
what those cut off had.
"""

from __future__ import annotations

import random
from functools import partial
from typing import TYPE_CHECKING

import pytest

from aioserver.wings.cluster.limits.grants import State
from aioserver.wings.cluster.limits.lease_messages import TIMES
from tests.support.cluster_simulation import Load, Simulation

if TYPE_CHECKING:
    from collections.abc import Callable


def cluster(chance: random.Random, delays: tuple[float, ...]) -> Simulation:
    """Three instances, of which some have more requests than there are places."""
    simulation = Simulation(
        chance.randrange(10**9),
        limit=chance.choice((1, 3, 8, 20)),
        delay=chance.choice(delays),
        fixed=chance.choice((0, 0, 3)),
    )
    simulation.on_step = simulation.check
    for _ in range(3):
        seconds = chance.choice((0.05, 0.3))
        # From a tenth of the places to more than all.
        rate = chance.choice((0.1, 0.5, 1.5)) * simulation.limit / seconds
        simulation.add(Load(min(rate, 80.0), seconds))
    simulation.advance(4.5 + 3 * chance.random())
    return simulation


def of_the_server(simulation: Simulation, chance: random.Random) -> list[Callable[[], object]]:
    """Faults of the server, each with its end some seconds later."""

    def paused() -> None:
        simulation.pause()
        later(simulation.go_on)

    def away() -> None:
        simulation.kill_server()
        later(simulation.start_server)

    def put_back() -> None:
        simulation.keep()
        simulation.later(2.0 * chance.random(), simulation.roll_back)

    def later(action: Callable[[], None]) -> None:
        length = chance.choice((0.5, 2.0, 4.0, 7.5, 12.0))
        simulation.later(length * chance.uniform(0.8, 1.2), action)

    return [paused, away, put_back, simulation.empty]


def of_instances(simulation: Simulation, chance: random.Random) -> list[Callable[[], object]]:
    """Ends of instances, and new ones."""
    living = [each for each in simulation.instances if each.alive]
    actions: list[Callable[[], object]] = []
    if len(living) > 2:
        instance = chance.choice(living)
        actions += [instance.kill, instance.leases.leave]
    if len(living) < 5 and not simulation.fixed:
        actions.append(partial(simulation.add, Load(20.0, 0.3)))
    return actions


def of_one_instance(simulation: Simulation, chance: random.Random) -> list[Callable[[], object]]:
    """Faults after which the others may have the places that it uses."""
    instance = chance.choice([each for each in simulation.instances if each.alive])
    length = chance.choice((0.5, 2.0, 7.5, 12.0))

    def stopped() -> None:
        instance.stop()
        simulation.later(length, instance.go_on)

    def cut_off() -> None:
        simulation.cut_off.add(instance.number)
        simulation.later(length, partial(simulation.cut_off.discard, instance.number))

    return [stopped, cut_off, partial(setattr, simulation, "loss", chance.choice((0.0, 0.1)))]


def server_faults(seed: int, steps: int) -> None:
    """Run faults of the server and ends of instances, with requests that end before a lease does:
    exact all the time.
    """
    chance = random.Random(seed)
    simulation = cluster(chance, (0.0003, 0.03, 0.15))
    for _ in range(steps):
        simulation.advance(chance.choice((0.1, 1.0, 5.0, 12.0)) * chance.random())
        actions = of_the_server(simulation, chance) + of_instances(simulation, chance)
        chance.choice(actions)()
        assert simulation.peak <= simulation.limit, simulation.peak
    recover(simulation)
    assert simulation.peak <= simulation.limit, simulation.peak


def any_faults(seed: int, steps: int) -> None:
    """Run any faults, and then see that all comes back to work."""
    chance = random.Random(seed)
    simulation = cluster(chance, (0.0003, 0.03, 0.15))
    for each in simulation.instances:
        each.load.seconds *= chance.choice((1.0, 10.0))
    for _ in range(steps):
        simulation.advance(chance.choice((0.1, 1.0, 5.0, 12.0)) * chance.random())
        actions = of_the_server(simulation, chance) + of_instances(simulation, chance)
        chance.choice(actions + of_one_instance(simulation, chance))()
    recover(simulation)


def recover(simulation: Simulation) -> None:
    simulation.loss = 0.0
    simulation.cut_off.clear()
    if not simulation.up:
        simulation.start_server()
    if simulation.paused:
        simulation.go_on()
    for each in simulation.instances:
        if each.alive and each.stopped:
            each.go_on()
    simulation.add(Load(50.0, 0.2))
    # The last faults end within 15 s.
    simulation.advance(15.0)
    simulation.loss = 0.0
    for each in simulation.instances:
        if each.alive and each.stopped:
            each.go_on()
    simulation.advance(20.0)
    assert simulation.in_flight <= simulation.limit
    starving = []
    for each in simulation.instances:
        if each.alive:
            assert each.leases.left or each.leases.state is State.JOINED
            if not each.leases.standing.leaving:
                starving.append((each, each.starts))
    # Each of them has a turn, though one of 15 s may be before it for each other instance.
    simulation.advance(10.0 + 15.0 * len(starving) / min(simulation.limit, 4))
    for each, starts in starving:
        assert each.starts > starts or not each.waiting, each.number


@pytest.mark.parametrize("seed", range(4))
def test_no_place_is_idle_for_longer_than_a_few_calls_take_while_somebody_waits(seed: int) -> None:
    chance = random.Random(seed)
    simulation = cluster(chance, (0.0005, 0.01))
    simulation.advance(3 * TIMES.beat)
    idle_since: float | None = None

    def check() -> None:
        nonlocal idle_since
        waiting = any(each.waiting for each in simulation.instances)
        if not waiting or simulation.in_flight >= simulation.limit:
            idle_since = None
            return
        if idle_since is None:
            idle_since = simulation.now
        # The waiter's call, the message to a holder, its call, the message to the waiter, and its
        # call again; each may have to wait for one under way, and another place may be on its way
        # meanwhile.
        assert simulation.now - idle_since < 60 * simulation.delay

    simulation.on_step = check
    simulation.advance(10.0)
    assert all(each.starts for each in simulation.instances)


@pytest.mark.parametrize("seed", [1, 2, 5])  # the others take twice as long, each
def test_no_fault_breaks_an_invariant(seed: int) -> None:
    any_faults(seed, 5)


@pytest.mark.parametrize("seed", [0, 1, 5])  # the others take twice as long, each, or more
def test_no_fault_of_the_server_lets_more_start_than_the_limit(seed: int) -> None:
    server_faults(seed, 5)


@pytest.mark.stress
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("faults", [any_faults, server_faults])
def test_no_fault_breaks_an_invariant_in_many_runs(faults: Callable[[int, int], None]) -> None:
    for _ in range(2000):
        seed = random.randrange(10**9)
        print("seed", seed)
        faults(seed, 20)
