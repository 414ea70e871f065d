"""A shared rate: all instances together start no more than one would, and not much less."""

from __future__ import annotations

import itertools
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.limits.gcra import ROUNDING
from aioserver.wings.cluster.limits import keys, leases, rates
from aioserver.wings.cluster.limits.rates import SharedRate
from tests.support import cluster_simulation
from tests.support.cluster_simulation import Asker, Load, Simulation

if TYPE_CHECKING:
    from tests.support.cluster_simulation import Instance

IDLE = Load(rate=0.0)


class Paced(Asker):
    """Requests of an instance that wait for nothing but the rate."""

    def __init__(
        self,
        simulation: Simulation,
        instance: Instance,
        per_minute: int,
        burst: int,
        load: float,
        *,
        share_kept: float = rates.SHARE_KEPT,
    ) -> None:
        interval = 60.0 / per_minute
        super().__init__(simulation, instance)
        self.load, self.waiting = load, 0
        self.starts: list[float] = []
        self.rate = SharedRate(
            instance.leases,
            "P:provider",
            interval,
            (burst - 1) * interval,
            lambda: simulation.now,
            waiting=lambda: self.waiting,
            on_slots=self.serve,
            share_kept=share_kept,
        )
        self.arrive()

    def arrive(self) -> None:
        if self.load:
            wait = self.simulation.chance.expovariate(self.load)
            self.simulation.later(wait, self.arrive, self.instance)
            self.waiting += 1
            self.serve()

    def serve(self) -> None:
        # Called by the constructor of the rate as well.
        while getattr(self, "rate", None) is not None and self.waiting:
            if (delay := self.rate.delay()) > ROUNDING:
                self.look_again(delay)
                return
            self.rate.take(self.rate.interval)
            self.waiting -= 1
            self.starts.append(self.simulation.now)


def excess(starts: list[float], per_minute: int, burst: int) -> float:
    """By how many starts the worst window exceeds its share and the burst."""
    return (
        cluster_simulation.excess([(start, 1) for start in sorted(starts)], per_minute / 60)
        - burst
    )


def paced(
    seed: int, per_minute: int, burst: int, delay: float = 0.0005, **of_rate: Any
) -> tuple[Simulation, list[Paced]]:
    simulation = Simulation(seed, delay=delay)
    load = per_minute / 60.0
    all_paced = [
        Paced(simulation, simulation.add(IDLE), per_minute, burst, load, **of_rate)
        for _ in range(3)
    ]
    simulation.advance(10.0)
    return simulation, all_paced


@pytest.mark.parametrize("delay", [0.0005, 0.03])
@pytest.mark.parametrize(("per_minute", "burst"), [(60, 1), (600, 10), (6000, 50), (600, 600)])
def test_all_instances_together_keep_the_rate(per_minute: int, burst: int, delay: float) -> None:
    simulation, all_paced = paced(1, per_minute, burst, delay)
    calls = simulation.calls
    for each in all_paced:
        each.starts.clear()

    simulation.advance(10.0)

    starts = starts_of(all_paced)
    assert excess(starts, per_minute, burst) <= 0.5 + 2 * delay * per_minute / 60
    assert len(starts) >= 0.9 * per_minute / 60 * 10
    assert min(len(each.starts) for each in all_paced) >= 0.2 * len(starts)
    assert simulation.calls - calls < 3 * 10 * 25


def starts_of(all_paced: list[Paced]) -> list[float]:
    return [start for each in all_paced for start in each.starts]


@pytest.mark.parametrize("per_minute", [30_000, 100_000_000])
def test_of_a_pace_that_nobody_reaches_an_instance_asks_for_a_horizon_at_once(
    per_minute: int,
) -> None:
    simulation = Simulation(3, delay=0.0005)
    each_second = 100.0
    all_paced = [
        Paced(simulation, simulation.add(IDLE), per_minute, 1, each_second) for _ in range(2)
    ]
    simulation.advance(10.0)
    calls = simulation.calls
    for each in all_paced:
        each.starts.clear()

    simulation.advance(10.0)

    starts = len(starts_of(all_paced))
    assert starts >= 0.8 * 2 * each_second * 10
    # A call for each horizon of 0.1 s, and some where more came than before.
    assert simulation.calls - calls < 2 * 10 * 10 * 2.5


@pytest.mark.parametrize(("per_minute", "burst"), [(600, 10), (600, 600)])
def test_burst_after_a_rest_is_that_of_all_together(per_minute: int, burst: int) -> None:
    simulation, all_paced = paced(2, per_minute, burst)
    for each in all_paced:
        each.load = 0.0
        each.waiting = 0
    simulation.advance(70.0)
    before = len(starts_of(all_paced))
    burster = all_paced[0]

    burster.waiting = burst
    burster.serve()
    simulation.advance(0.5)

    started = len(starts_of(all_paced)) - before
    assert started >= 0.5 * burst
    for each in all_paced:
        each.waiting += burst
        each.serve()
    simulation.advance(10.0)
    assert excess(starts_of(all_paced), per_minute, burst) <= 0.5


@pytest.mark.parametrize("instances", [1, 3])
def test_burst_of_a_pace_that_is_new_is_there_at_once(instances: int) -> None:
    simulation, burst = Simulation(8), 100
    new, *_others = [
        Paced(simulation, simulation.add(IDLE), 600, burst, 0.0) for _ in range(instances)
    ]
    simulation.advance(10.0)

    new.waiting = burst
    new.serve()
    simulation.advance(0.2)

    assert len(new.starts) >= 0.5 * burst
    assert excess(new.starts, 600, burst) <= 0.5


@pytest.mark.parametrize("fault", ["emptied", "restarted", "put back"])
def test_a_server_that_has_forgotten_starts_allows_no_second_burst(fault: str) -> None:
    per_minute, burst = 600, 100
    # The rate of a key keeps little in hand.
    simulation, all_paced = paced(4, per_minute, burst, share_kept=keys.SHARE_KEPT)
    for each in all_paced:
        each.load = 0.0
        each.waiting = 0
    simulation.advance(20.0)
    simulation.keep()
    for each in all_paced:
        each.starts.clear()

    for each in all_paced:
        each.waiting = burst
        each.serve()
    simulation.advance(0.5)
    assert len(starts_of(all_paced)) >= 0.9 * burst
    if fault == "emptied":
        simulation.empty()
    elif fault == "restarted":
        simulation.kill_server()
        simulation.start_server()
    else:
        simulation.roll_back()
    simulation.advance(8.0)

    assert len(starts_of(all_paced)) >= 0.9 * burst + 0.8 * 8.0 * per_minute / 60
    # Each instance may begin its part of the rate anew, while it is not heard.
    assert excess(starts_of(all_paced), per_minute, burst) <= 3


def test_slots_of_an_answer_that_comes_late_are_not_used() -> None:
    per_minute, burst = 600, 2
    simulation, all_paced = paced(5, per_minute, burst)
    for each in all_paced:
        each.starts.clear()

    # They are stopped for less than a lease while they are given a slot.
    for _ in range(5):
        stopped: list[Paced] = []
        simulation.on_step = partial(stop_who_asks, all_paced, stopped)
        simulation.advance(1.0)
        simulation.on_step = lambda: None
        assert stopped
        for each in stopped:
            each.instance.go_on()
        simulation.advance(1.0)

    assert excess(starts_of(all_paced), per_minute, burst) <= 1e-3


def stop_who_asks(all_paced: list[Paced], stopped: list[Paced]) -> None:
    """Stop those that have no slot in hand, and are about to be answered."""
    for each in all_paced:
        if each not in stopped and each.instance.leases.busy and each.rate.ask_at == inf:
            each.instance.stop()
            stopped.append(each)


def test_of_a_far_server_all_slots_are_used_late() -> None:
    per_minute, burst = 600, 10
    simulation, all_paced = paced(6, per_minute, burst, delay=0.15)
    for each in all_paced:
        each.starts.clear()

    simulation.advance(20.0)

    starts = starts_of(all_paced)
    assert len(starts) >= 0.7 * per_minute / 60 * 20
    assert excess(starts, per_minute, burst) <= 1e-3


def test_starts_that_are_taken_back_are_no_second_burst() -> None:
    per_minute, burst = 600, 100
    simulation, all_paced = paced(7, per_minute, burst)
    for each in all_paced:
        each.load = 0.0
        each.waiting = 0
    simulation.advance(20.0)
    (used, *_others) = all_paced
    used.waiting = burst
    used.serve()
    simulation.advance(5.0)
    taken_back = len(used.starts)

    # Meanwhile half of them came back by themselves.
    for _ in range(taken_back):
        used.rate.take(-used.rate.interval)
    for each in all_paced:
        each.starts.clear()
        each.waiting = 2 * burst
        each.serve()
    simulation.advance(2.0)

    starts = starts_of(all_paced)
    assert len(starts) >= 0.5 * burst
    assert excess(starts, per_minute, burst) <= 0.5


@pytest.mark.parametrize("fault", ["killed", "emptied", "paused", "restarted"])
@pytest.mark.parametrize(("per_minute", "burst"), [(60, 1), (600, 10)])
def test_without_the_server_each_keeps_its_part_of_the_rate(
    per_minute: int, burst: int, fault: str
) -> None:
    simulation, all_paced = paced(3, per_minute, burst)
    faults = {
        "killed": simulation.kill_server,
        "emptied": simulation.empty,
        "paused": simulation.pause,
        "restarted": simulation.kill_server,
    }

    faults[fault]()
    simulation.advance(4.0)
    if fault == "restarted":
        simulation.start_server()
    simulation.advance(20.0)

    starts = starts_of(all_paced)
    # Each instance may begin its part of the rate anew.
    assert excess(starts, per_minute, burst) <= 3.5
    late = [start for start in starts if start > simulation.now - 15.0]
    assert len(late) >= 0.85 * per_minute / 60 * 15


def test_no_start_waits_for_a_server_that_is_known_to_hang() -> None:
    per_minute, burst = 6000, 10
    simulation, all_paced = paced(8, per_minute, burst)
    for each in all_paced:
        each.load = 0
    simulation.advance(10.0)
    simulation.pause()
    hung = simulation.now
    for each in all_paced:
        each.starts.clear()
        # Requests have waited for another answer in vain.
        each.instance.leases.hangs()
        each.waiting = 2 * per_minute
        each.serve()

    simulation.advance(1.0)

    interval = len(all_paced) * 60 / per_minute
    for each in all_paced:
        starts = [hung, *each.starts]
        pauses = [later - start for start, later in itertools.pairwise(starts)]
        assert max(pauses) <= interval + ROUNDING
    simulation.go_on()
    simulation.advance(10.0)
    assert excess(starts_of(all_paced), per_minute, burst) <= 3


def test_no_start_waits_for_longer_than_a_moment_for_a_server_that_hangs() -> None:
    per_minute, burst = 600, 10
    simulation, all_paced = paced(8, per_minute, burst)
    for each in all_paced:
        each.load = each.waiting = 0
    simulation.advance(10.0)
    simulation.pause()
    for each in all_paced:
        each.starts.clear()
        each.waiting = 2 * burst
        each.serve()
    hung = simulation.now

    simulation.advance(1.0)

    for each in all_paced:
        late = [start for start in each.starts if start > hung + leases.OVERDUE - ROUNDING]
        assert late[0] <= hung + leases.OVERDUE + 0.05
        assert len(late) >= 0.6 * (1.0 - leases.OVERDUE) * per_minute / 60 / len(all_paced)
    simulation.go_on()
    simulation.advance(10.0)
    assert excess(starts_of(all_paced), per_minute, burst) <= 3


def resting(count: int) -> tuple[Simulation, list[Paced]]:
    """Instances that have started something, and keep slots of a burst of 41."""
    simulation = Simulation(1)
    all_paced = [Paced(simulation, simulation.add(IDLE), 600, 41, 0.0) for _ in range(count)]
    simulation.advance(10.0)
    for _ in range(4):
        ask(simulation, all_paced, 2)
    return simulation, all_paced


def ask(simulation: Simulation, all_paced: list[Paced], starts: int) -> None:
    for each in all_paced:
        each.waiting += starts
        each.serve()
    simulation.advance(5.0)


def test_what_is_kept_of_a_burst_is_no_more_than_a_lowered_burst_allows() -> None:
    simulation, all_paced = resting(3)
    assert all(each.rate.available > 2 for each in all_paced)

    for each in all_paced:
        each.rate.apply(0.1, 0.1)
        each.starts.clear()
    ask(simulation, all_paced, 10)

    assert excess(starts_of(all_paced), 600, 2) <= 1


def test_more_instances_keep_no_more_of_a_burst_than_fewer() -> None:
    simulation, all_paced = resting(2)
    assert max(each.rate.available for each in all_paced) > 40 * rates.SHARE_KEPT / 8

    more = [Paced(simulation, simulation.add(IDLE), 600, 41, 0.0) for _ in range(6)]
    simulation.advance(10.0)
    ask(simulation, [*all_paced, *more], 1)

    assert max(each.rate.available for each in (*all_paced, *more)) <= 40 * rates.SHARE_KEPT / 8
