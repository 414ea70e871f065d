"""The supervisor of the workers: who is started, told, replaced and killed, and when. No process
runs.
"""

from __future__ import annotations

import logging
import random
import signal
from signal import SIGABRT, SIGHUP, SIGINT, SIGKILL, SIGTERM

import pytest

from aioserver.workers.supervisor import (
    FIRST_PAUSE,
    HAND_OVER,
    LAST_WORDS,
    LONGEST_PAUSE,
    RELOAD_TIMEOUT,
    SHORT_LIFE,
    START_TIMEOUT,
    UNKILLABLE,
    Supervisor,
    Timeouts,
)
from tests.support.clock import FakeClock

PERIOD = 20.0
END = 35.0
REPLACED = 600.0
TIMEOUTS = Timeouts(END, REPLACED)
QUICK = Timeouts(END, 60.0)
READY = {"READY": "1", "STATUS": "1 of 5 connections, 0 waiting"}
BEAT = {"WATCHDOG": "1"}


class Machine:
    """Processes that exist only as numbers. `running` has their slots; `sent` what they were
    sent.
    """

    def __init__(self) -> None:
        self.running: dict[int, int] = {}
        self.sent: list[tuple[int, signal.Signals]] = []
        self.started: list[tuple[int, int]] = []
        # The deaths that each process was started with.
        self.deaths: list[tuple[str, ...]] = []
        self.full = False

    def start(self, slot: int, configuration: int, deaths: tuple[str, ...] = ()) -> int:
        if self.full:
            raise OSError(11, "Resource temporarily unavailable")
        assert slot not in self.running.values()
        self.started.append((slot, configuration))
        self.deaths.append(deaths)
        pid = 100 + len(self.started)
        self.running[pid] = slot
        return pid

    def send(self, pid: int, number: signal.Signals) -> None:
        assert pid in self.running, "not reaped yet"
        self.sent.append((self.running[pid], number))


class World:
    """A supervisor of *workers*, with its machine and its clock."""

    def __init__(self, workers: int = 2, timeouts: Timeouts = TIMEOUTS) -> None:
        self.machine = Machine()
        self.clock = FakeClock()
        self.supervisor = Supervisor(
            self.machine, workers, self.clock, period=PERIOD, timeouts=timeouts
        )
        self.supervisor.start()

    def pid(self, slot: int) -> int:
        return next(pid for pid, taken in self.machine.running.items() if taken == slot)

    @property
    def slots(self) -> list[int]:
        return sorted(self.machine.running.values())

    @property
    def sent(self) -> list[tuple[int, signal.Signals]]:
        """What was sent since the last look."""
        sent, self.machine.sent = self.machine.sent, []
        return sent

    def say(self, slot: int, message: dict[str, str]) -> None:
        self.supervisor.heard(self.pid(slot), message)
        self.supervisor.turn()

    def replace(self, *successors: int) -> None:
        """Replace all workers, by those in the slots of *successors*."""
        self.supervisor.replace(1, TIMEOUTS)
        self.supervisor.turn()
        self.serve(*successors)
        assert {number for _, number in self.sent} == {HAND_OVER}
        assert not self.supervisor.replacing

    def die(self, slot: int, code: int = -SIGKILL) -> None:
        pid = self.pid(slot)
        del self.machine.running[pid]
        self.supervisor.ended(pid, code)
        self.supervisor.turn()

    def serve(self, *slots: int) -> None:
        for slot in slots or self.slots:
            self.say(slot, READY)

    def wait(self, seconds: float, *, beating: bool = True) -> None:
        """Let *seconds* pass, in which those that run are heard of unless not *beating*."""
        end = self.clock.now + seconds
        while self.clock.now < end:
            due = self.supervisor.wake_at()
            if due is None or due <= self.clock.now:
                due = end
            self.clock.now = min(end, self.clock.now + 5.0, due)
            if beating:
                for pid in tuple(self.machine.running):
                    self.supervisor.heard(pid, {"STATUS": ""})
            self.supervisor.turn()


@pytest.fixture
def world() -> World:
    made = World()
    made.serve()
    return made


def test_every_worker_is_started_and_all_must_serve_before_the_start_is_over() -> None:
    world = World(3)
    assert world.slots == [0, 1, 2]

    world.serve(0, 1)
    assert not world.supervisor.started
    world.say(2, BEAT)

    assert world.supervisor.started, "a lost READY is made up for by the next beat"


def test_a_worker_that_lived_for_long_is_followed_at_once(world: World) -> None:
    world.wait(SHORT_LIFE)

    world.die(0)

    assert world.slots == [0, 1]


def test_workers_that_die_young_are_followed_after_pauses_that_double(world: World) -> None:
    pauses = []
    for _ in range(9):
        world.die(0)
        due = world.supervisor.wake_at()
        assert due is not None
        began = world.clock.now
        while 0 not in world.slots:
            world.clock.now += 0.25
            world.say(1, BEAT)
        pauses.append(world.clock.now - began)
        world.serve(0)

    assert pauses == [0, 0.5, 1, 2, 4, 8, 16, 30, 30]
    assert (FIRST_PAUSE, LONGEST_PAUSE) == (0.5, 30)


def test_a_long_life_forgives_the_short_ones_before_it(world: World) -> None:
    world.die(0)
    world.serve(0)
    world.die(0)
    world.wait(FIRST_PAUSE)
    world.serve(0)
    world.wait(SHORT_LIFE)

    world.die(0)

    assert world.slots == [0, 1]


def test_a_start_that_the_system_refuses_is_tried_again(world: World) -> None:
    world.machine.full = True
    world.die(0)
    assert world.slots == [1]

    world.machine.full = False
    world.wait(2.0)

    assert world.slots == [0, 1]


def test_if_no_first_worker_can_start_their_exit_code_is_that_of_all() -> None:
    world = World(2)
    world.die(0, 2)
    assert world.slots == [1], "not tried again before the other one has died of it, too"

    world.die(1, 2)

    assert world.supervisor.code == 2


def test_first_workers_that_die_of_different_things_are_tried_again() -> None:
    world = World(2)
    world.die(0, 1)
    world.die(1, -SIGKILL)
    assert world.supervisor.code is None

    world.wait(FIRST_PAUSE)

    assert world.slots == [0, 1]


def test_a_first_worker_that_fails_while_another_serves_is_tried_again() -> None:
    world = World(2)
    world.serve(1)
    world.die(0, 2)
    world.die(0, 2)

    assert world.supervisor.code is None
    world.wait(FIRST_PAUSE)
    assert world.slots == [0, 1]


def test_a_worker_that_says_nothing_for_its_period_is_aborted_and_then_killed(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.wait(PERIOD / 2, beating=False)
    world.say(1, BEAT)
    world.wait(PERIOD / 2, beating=False)
    assert world.sent == [(0, SIGABRT)]
    assert world.supervisor.alive

    world.say(1, BEAT)
    world.wait(LAST_WORDS, beating=False)
    assert world.sent == [(0, SIGKILL)]

    world.say(1, BEAT)
    world.wait(UNKILLABLE, beating=False)
    assert not world.supervisor.alive, "systemd is to end what even SIGKILL does not end"
    world.die(0)
    assert world.supervisor.alive
    assert world.slots == [0, 1]
    assert "worker 0 hangs" in caplog.text


def test_a_worker_that_does_not_get_ready_is_killed() -> None:
    world = World(2)
    world.serve(1)

    world.wait(START_TIMEOUT)

    assert world.sent == [(0, SIGABRT)]


def test_a_parent_that_was_stopped_itself_kills_nobody(world: World) -> None:
    world.supervisor.turn()
    world.clock.now += 10 * PERIOD

    world.supervisor.turn()

    assert world.sent == []


def test_a_reload_is_told_to_all_and_over_when_all_have_answered(world: World) -> None:
    world.supervisor.reload(1, TIMEOUTS)
    world.supervisor.turn()
    assert world.sent == [(0, SIGHUP), (1, SIGHUP)]

    for slot in (0, 1):
        assert world.supervisor.reloading
        world.say(slot, {"RELOADING": "1"})
        world.say(slot, READY)

    assert not world.supervisor.reloading


def test_a_worker_that_starts_during_a_reload_is_told_when_it_can_hear(world: World) -> None:
    world.die(0)
    world.supervisor.reload(1, TIMEOUTS)
    assert world.sent == [(1, SIGHUP)]

    world.serve(0)

    assert world.machine.started[-1] == (0, 0)
    assert world.sent == [(0, SIGHUP)]
    world.die(0)
    world.wait(FIRST_PAUSE)
    assert world.machine.started[-1] == (0, 1)
    world.serve(0)
    assert world.sent == []


def test_a_worker_that_never_answers_does_not_hold_up_a_reload(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.supervisor.reload(1, TIMEOUTS)
    world.say(1, {"RELOADING": "1"})
    world.say(1, READY)

    world.wait(RELOAD_TIMEOUT)

    assert not world.supervisor.reloading
    assert "worker 0 has not answered to the reload" in caplog.text


def test_a_replacement_goes_from_seat_to_seat_and_starts_before_it_ends(world: World) -> None:
    world.supervisor.replace(1, TIMEOUTS)
    world.supervisor.turn()
    assert world.slots == [0, 1, 2]
    assert world.sent == []

    world.serve(2)
    assert world.sent == [(0, HAND_OVER)]
    assert world.slots == [0, 1, 2, 3]
    world.serve(3)

    assert world.sent == [(1, HAND_OVER)]
    assert not world.supervisor.replacing
    assert world.machine.started[-2:] == [(2, 1), (3, 1)]
    world.die(0, 0)
    world.die(1, 0)
    assert world.slots == [2, 3]


def test_a_replaced_worker_that_does_not_end_in_time_is_killed(world: World) -> None:
    world.supervisor.replace(1, TIMEOUTS)
    world.supervisor.turn()
    world.serve(2, 3)
    assert world.sent == [(0, HAND_OVER), (1, HAND_OVER)]

    world.wait(REPLACED)
    assert world.sent == [], "its answers have replace_timeout"
    world.wait(END)

    assert world.sent == [(0, SIGKILL), (1, SIGKILL)]


def test_a_former_worker_that_begins_to_end_is_killed_if_it_takes_too_long(world: World) -> None:
    world.replace(2, 3)

    world.say(0, {"STOPPING": "1"})
    assert world.slots == [0, 1, 2, 3], "its successor serves already"
    world.wait(END)

    assert world.sent == [(0, SIGKILL)]


def test_a_former_worker_that_says_nothing_for_its_period_is_aborted(world: World) -> None:
    world.replace(2, 3)

    world.wait(PERIOD, beating=False)

    assert (0, SIGABRT) in world.sent


def test_a_former_worker_that_dies_is_not_started_again(world: World) -> None:
    world.replace(2, 3)

    world.die(0)
    world.wait(SHORT_LIFE)

    assert world.slots == [1, 2, 3]


def test_the_next_worker_counts_each_death_that_nobody_has_asked_for_once(world: World) -> None:
    world.wait(SHORT_LIFE)
    world.die(0, -SIGKILL)
    assert world.machine.deaths[-1] == ("signal",)
    # It does not get to count it.
    world.die(0, 1)
    world.wait(SHORT_LIFE)
    assert world.machine.deaths[-1] == ("signal",)
    world.serve()

    world.replace(2, 3)
    assert world.machine.deaths[-2:] == [(), ()]
    world.die(1, 3)
    world.wait(PERIOD, beating=False)
    world.die(2, -SIGABRT)

    assert world.machine.deaths.pop() == ("exit", "hung")


def test_a_worker_that_was_told_to_end_has_not_died(world: World) -> None:
    world.replace(2, 3)
    world.say(0, {"STOPPING": "1"})
    world.die(0, 0)
    world.wait(SHORT_LIFE)
    world.say(2, {"STOPPING": "1"})
    world.die(2, -SIGTERM)

    assert not any(world.machine.deaths)


def test_a_reload_reaches_former_workers_which_have_the_timeouts_that_they_have_read(
    world: World,
) -> None:
    world.replace(2, 3)

    world.supervisor.reload(2, Timeouts(END, 100.0))
    assert sorted(world.sent) == [(slot, SIGHUP) for slot in range(4)]
    for slot in (1, 2, 3):
        world.say(slot, {"RELOADING": "1"})
        world.say(slot, READY)
    assert world.supervisor.reloading
    world.wait(RELOAD_TIMEOUT / 2)
    world.say(1, {"STATUS": "3 answers"})

    (_, first), (said, second) = world.supervisor.former()
    assert said == "3 answers"
    assert round(first - second) == REPLACED - 100
    world.say(0, {"RELOADING": "1"})
    world.say(0, READY)
    assert not world.supervisor.reloading


def test_a_stop_ends_former_workers_with_all_others(world: World) -> None:
    world.replace(2, 3)

    world.supervisor.stop()
    assert world.sent == [(slot, SIGTERM) for slot in range(4)]
    world.wait(END)

    assert world.sent == [(slot, SIGKILL) for slot in range(4)]


@pytest.mark.parametrize("code", [2, -SIGABRT])
def test_a_successor_that_fails_is_given_up_and_its_worker_stays(
    world: World, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    world.supervisor.replace(1, TIMEOUTS)
    world.supervisor.turn()

    world.die(2, code)

    assert world.slots == [0, 1]
    assert world.sent == []
    assert not world.supervisor.replacing
    assert "the replacement is given up, and 2 workers stay as they were" in caplog.text
    world.die(0)
    assert world.machine.started[-1] == (0, 0), "with the configuration that works"


def test_a_successor_that_hangs_is_killed_and_its_worker_stays(world: World) -> None:
    world.supervisor.replace(1, TIMEOUTS)
    world.supervisor.turn()

    world.wait(START_TIMEOUT)
    assert world.sent == [(2, SIGABRT)]
    world.die(2, -SIGABRT)

    assert world.slots == [0, 1]
    assert not world.supervisor.replacing


def test_a_worker_that_dies_while_its_successor_starts_is_followed_by_that(world: World) -> None:
    world.supervisor.replace(1, TIMEOUTS)
    world.supervisor.turn()
    world.die(0)
    assert world.slots == [1, 2]

    world.serve(2)
    assert world.sent == []
    world.serve(3)

    assert world.sent == [(1, HAND_OVER)]
    assert not world.supervisor.replacing


def test_a_seat_that_has_lost_both_its_worker_and_the_successor_gets_another_one(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.supervisor.replace(1, TIMEOUTS)
    world.supervisor.turn()
    world.die(0)

    world.die(2, 2)

    assert "the replacement is given up" in caplog.text
    assert world.machine.started[-1] == (0, 0), "with the configuration that works"
    world.serve(0)
    assert world.slots == [0, 1]


def test_a_second_replacement_does_not_wait_for_the_first(world: World) -> None:
    world.replace(2, 3)

    world.replace(4, 5)

    assert world.slots == [0, 1, 2, 3, 4, 5]
    assert len(world.supervisor.former()) == 4


def test_a_third_replacement_ends_the_first_workers_and_waits_for_their_ends(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.replace(2, 3)
    world.replace(4, 5)

    world.supervisor.replace(3, TIMEOUTS)
    world.supervisor.turn()
    assert world.sent == [(0, HAND_OVER), (1, HAND_OVER)]
    assert "worker 0 has to end" in caplog.text
    assert world.slots == [0, 1, 2, 3, 4, 5], "three generations at most"
    world.die(1, 0)
    world.die(0, 0)
    world.serve(0)
    world.serve(1)

    assert world.sent == [(4, HAND_OVER), (5, HAND_OVER)]
    assert world.slots == [0, 1, 2, 3, 4, 5]
    assert not world.supervisor.replacing


def test_a_replacement_that_is_asked_for_during_one_follows_it(world: World) -> None:
    world.supervisor.replace(1, TIMEOUTS)
    world.supervisor.turn()
    world.supervisor.replace(2, TIMEOUTS)
    while world.supervisor.replacing:
        world.serve()
        for slot, number in world.sent:
            assert number is HAND_OVER
            world.die(slot, 0)

    last = dict(world.machine.started)
    assert [last[slot] for slot in world.slots] == [2, 2]


def test_a_worker_that_somebody_ends_by_a_signal_is_followed_at_once(world: World) -> None:
    world.say(0, {"STOPPING": "1"})

    assert world.slots == [0, 1, 2]
    world.serve(2)
    world.die(0, 0)
    assert world.slots == [1, 2]
    assert world.sent == []


def test_a_stop_reaches_everybody_and_ends_with_0(world: World) -> None:
    world.supervisor.replace(1, TIMEOUTS)
    world.supervisor.turn()
    world.supervisor.stop()
    assert world.sent == [(0, SIGTERM), (1, SIGTERM), (2, SIGTERM)]

    world.die(2, -SIGTERM)
    world.die(0, 0)
    assert world.supervisor.code is None
    world.die(1, 0)

    assert world.supervisor.code == 0
    assert world.slots == []


def test_a_second_stop_is_passed_on_and_ends_with_1(world: World) -> None:
    world.supervisor.stop()
    world.supervisor.stop()
    assert world.sent == [(0, SIGTERM), (1, SIGTERM), (0, SIGINT), (1, SIGINT)]
    world.supervisor.stop()
    assert world.sent == [(0, SIGKILL), (1, SIGKILL)]

    world.die(0, 1)
    world.die(1, 1)

    assert world.supervisor.code == 1


def test_workers_that_do_not_stop_are_killed(world: World) -> None:
    world.supervisor.stop()
    assert world.sent

    world.wait(END)

    assert world.sent == [(0, SIGKILL), (1, SIGKILL)]
    world.die(0)
    world.die(1)
    assert world.supervisor.code == 1


def test_strangers_that_a_process_1_reaps_and_hears_of_change_nothing(world: World) -> None:
    world.supervisor.ended(4711, 0)
    world.supervisor.heard(4711, {"STOPPING": "1"})
    world.supervisor.turn()

    assert world.slots == [0, 1]
    assert world.sent == []


def test_whatever_happens_a_seat_has_a_worker_or_will_get_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Random steps; then quiet, in which all seats must serve, one process each, all as wanted."""
    for seed in range(60):
        caplog.set_level(logging.CRITICAL)
        print(f"seed {seed}")
        rng = random.Random(seed)
        world = World(rng.choice([1, 2, 3]), QUICK)
        supervisor, number = world.supervisor, 0
        world.serve()
        for _ in range(60):
            assert len(world.slots) <= 4 * len(supervisor)
            slot = rng.choice(world.slots) if world.slots else None
            match rng.randrange(9):
                case 0 | 1 if slot is not None:
                    world.die(slot, rng.choice([0, 1, 2, -9]))
                case 2 if slot is not None:
                    world.say(slot, {"STOPPING": "1"})
                case 3:
                    number += 1
                    supervisor.reload(number, QUICK)
                case 4 if slot is not None:
                    number += 1
                    supervisor.replace(number, QUICK)
                case 5 | 6:
                    world.wait(rng.choice([0.1, 1.0, 7.0, 25.0]), beating=rng.random() < 0.9)
                case _ if slot is not None:
                    world.say(slot, rng.choice([READY, BEAT, {"RELOADING": "1"}]))
            for seat, what in world.sent:
                if (
                    seat in world.slots
                    and what in {SIGKILL, SIGABRT, HAND_OVER}
                    and (what is SIGKILL or rng.random() < 0.8)
                ):
                    world.die(seat, 0 if what is HAND_OVER else -what)
        for _ in range(200):
            if (
                len(supervisor.statuses()) == len(supervisor) == len(world.slots)
                and not supervisor.replacing
                and not supervisor.reloading
            ):
                break
            world.wait(1.0)
            for slot in world.slots:
                if slot in world.slots:
                    world.say(slot, {"RELOADING": "1"})
                    world.say(slot, READY)
            for seat, what in world.sent:
                if seat in world.slots and what in {SIGKILL, SIGABRT, HAND_OVER}:
                    world.die(seat, 0)

        assert supervisor.code is None
        assert len(supervisor.statuses()) == len(supervisor) == len(world.slots)
        assert not supervisor.replacing
        assert not supervisor.reloading
