"""Whatever happens to instances, calls and the server: no more is in flight than the limit, and what those cut off had."""

from __future__ import annotations

import random
from functools import partial
from typing import TYPE_CHECKING

import pytest

from aioserver.cluster.holding import State
from tests.support.cluster_simulation import Load, Simulation

if TYPE_CHECKING:
    from collections.abc import Callable

START = 10.0


def make(seed: int, *loads: float, seconds: float = 0.2, **options: float) -> Simulation:
    """Instances with so many requests a second each, after START seconds."""
    simulation = Simulation(seed, **options)  # type: ignore[arg-type]
    simulation.on_step = simulation.check
    for load in loads:
        simulation.add(Load(load, seconds))
    simulation.advance(START)
    return simulation


def any_faults(seed: int, steps: int) -> None:
    """Run random faults, and then see that all comes back to work."""
    chance = random.Random(seed)
    limit = chance.choice((1, 2, 3, 8, 20, 50))
    simulation = Simulation(
        seed,
        limit=limit,
        delay=chance.choice((0.0003, 0.005, 0.03, 0.15)),
        loss=chance.choice((0.0, 0.0, 0.01, 0.1)),
        fixed=chance.choice((0, 0, 3)),
    )
    simulation.on_step = simulation.check
    rates = (0.5, 5.0, 20.0, 60.0)
    lengths = (0.05, 0.3, 2.0, 10.0)
    for _ in range(3):
        simulation.add(Load(chance.choice(rates), chance.choice(lengths)))
    pauses = (0.0, 0.1, 0.5, 1.0, 2.5, 4.0, 9.0)
    for _ in range(steps):
        simulation.advance(chance.choice(pauses) * chance.random())
        living = [each for each in simulation.instances if each.alive]
        one = chance.choice(living)
        actions: list[Callable[[], object]] = [
            simulation.empty,
            simulation.pause,
            simulation.go_on,
            simulation.kill_server,
            simulation.start_server,
            simulation.keep,
            simulation.roll_back,
            one.stop,
            one.go_on,
            partial(simulation.cut_off.add, one.number),
            simulation.cut_off.clear,
            one.shares.leave,
        ]
        if len(living) > 1:
            actions.append(one.kill)
        if len(living) < 5 and not simulation.fixed:
            actions.append(partial(simulation.add, Load(chance.choice(rates), 0.3)))
        chance.choice(actions)()
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
    simulation.advance(40.0)
    assert simulation.in_flight <= simulation.limit
    starving = []
    for each in simulation.instances:
        if each.alive:
            assert each.shares.left or each.shares.state is State.JOINED
            if not each.shares.standing.leaving:
                starving.append((each, each.starts))
    # Each of them has a turn, though one of 15 s may be before it for each other instance.
    simulation.advance(10.0 + 15.0 * len(starving) / min(simulation.limit, 4))
    for each, starts in starving:
        assert each.starts > starts or not each.waiting, each.number


@pytest.mark.parametrize("seed", range(40))
def test_no_fault_breaks_an_invariant(seed: int) -> None:
    any_faults(seed, 12)


@pytest.mark.stress
@pytest.mark.timeout(3600)
def test_no_fault_breaks_an_invariant_in_many_runs() -> None:
    for _ in range(3000):
        seed = random.randrange(10**9)
        print("seed", seed)
        any_faults(seed, 20)
