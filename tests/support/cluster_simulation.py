"""A cluster in virtual time: instances (`Leases`), the script of their renewal between them, and
every fault that there is.

Nothing of it is asynchronous: an instance is a state machine, and the simulation carries its
calls. A call may arrive, be lost, be answered late or never. An instance may be killed, or
stopped: then nothing of it runs, its requests keep their places, and what came meanwhile comes in
any order when it goes on. The server may be killed, emptied, paused, or put back to an earlier
state.

After each step `check` asserts the invariants of wings/cluster/limits/grants.py and
wings/cluster/limits/leases.py.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import random
from abc import ABC, abstractmethod
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING

from aioserver.wings.cluster.limits.grants import State
from aioserver.wings.cluster.limits.lease_messages import SECOND, TIMES, Times
from aioserver.wings.cluster.limits.leases import Leases
from tests.support.renew_script import Script, Stale, decode_request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from aioserver.wings.cluster.limits.shared_budget import SharedBudget

NAME = "p:provider"


@dataclass
class Load:
    """Requests of an instance: so many each second, each for so many seconds."""

    rate: float = 100.0
    seconds: float = 0.2
    patience: float = 30.0


class Instance:
    """One instance, which uses places of one limit."""

    def __init__(self, simulation: Simulation, number: int, load: Load) -> None:
        self.simulation = simulation
        self.number = number
        self.load = load
        self.inside = 0
        self.waiting: deque[float] = deque()
        self.starts = 0
        self.longest_wait = 0.0
        self.alive, self.stopped, self.connected = True, False, True
        # What came while the process was stopped.
        self.missed: list[Callable[[], None]] = []
        # Its places when its last lease was over, as far as they did not end since, and its share.
        self.left_over = 0
        self.call = 0
        self.timer = 0
        self.leases = Leases(
            f"i{number}",
            fixed=simulation.fixed_share(number),
            times=simulation.times,
            clock=lambda: simulation.now,
            on_due=self.arm,
            on_state=self.changed,
            ask=self.ask,
            later=lambda seconds, action: simulation.later(seconds, action, self),
        )
        self.grant = self.leases.hold(NAME, simulation.limit, self)
        self.arm()
        if load.rate:
            self.arrive_later()

    # What `Leases` asks.

    @property
    def wanting(self) -> int:
        return len(self.waiting)

    @property
    def ready(self) -> int:
        return len(self.waiting)

    @property
    def weight(self) -> int:
        return 1

    def resize(self, places: int) -> None:
        if hasattr(self, "grant"):
            self.serve()

    def starve(self) -> None:
        pass

    def changed(self, old: State, new: State, _why: str) -> None:
        if State.ALONE in (old, new):
            self.left_over = self.inside
        self.simulation.states.append((self.simulation.now, self.number, new))

    # Requests.

    def arrive_later(self) -> None:
        chance = self.simulation.chance
        self.simulation.later(chance.expovariate(self.load.rate), self.arrive, self)

    def arrive(self) -> None:
        self.arrive_later()
        self.waiting.append(self.simulation.now)
        self.serve()
        if self.waiting:
            self.grant.wait_begins()

    def serve(self) -> None:
        self.leases.check()
        now = self.simulation.now
        while self.waiting and self.inside < self.grant.granted:
            arrived = self.waiting.popleft()
            if now - arrived > self.load.patience:
                continue
            self.longest_wait = max(self.longest_wait, now - arrived)
            self.inside += 1
            self.simulation.in_flight += 1
            self.starts += 1
            chance = self.simulation.chance
            seconds = self.load.seconds * chance.uniform(0.5, 1.5)
            self.simulation.later(seconds, self.end, self)

    def end(self) -> None:
        self.grant.place_ends()
        self.inside -= 1
        self.simulation.in_flight -= 1
        self.left_over = min(self.left_over, self.inside)
        self.serve()

    # Calls.

    def arm(self) -> None:
        self.timer += 1
        timer = self.timer
        if hasattr(self, "leases"):
            wait = max(0.0, self.leases.due - self.simulation.now)
            if wait < 1e9:
                self.simulation.later(wait, lambda: self.due(timer), self)

    def due(self, timer: int) -> None:
        if timer != self.timer or self.leases.busy or self.leases.left:
            return
        self.call += 1
        call = self.call
        simulation = self.simulation
        request = self.leases.request(simulation.run)
        simulation.calls += 1
        simulation.later(self.leases.times.bound, lambda: self.give_up(call), self)
        simulation.send(self, call, request)

    def give_up(self, call: int) -> None:
        if call == self.call and self.leases.busy:
            self.call += 1
            self.leases.failed("no answer")

    def answered(self, call: int, answer: bytes) -> None:
        if call == self.call and self.leases.busy:
            self.call += 1
            self.leases.answered(answer)

    def refused(self, call: int) -> None:
        if call == self.call and self.leases.busy:
            self.call += 1
            self.leases.failed("refused")

    # Questions of budgets.

    def ask(self, budget: SharedBudget) -> None:
        """Send the question of *budget*, in its turn."""
        self.simulation.later(0.0, lambda: self.question(budget), self)

    def question(self, budget: SharedBudget) -> None:
        simulation, answers = self.simulation, list[bytes | None]()

        def answered(answer: bytes | None) -> None:
            answers.append(answer)
            if len(answers) == 1:
                # A connection without an answer is closed.
                self.connected = answer is not None
                budget.answered(answer)

        simulation.later(self.leases.times.bound, lambda: answered(None), self)
        if self.connected or (simulation.reaches(self) and not simulation.paused):
            simulation.questions += 1
            simulation.carry(self, budget.question(simulation.run), answered)

    # Faults.

    def kill(self) -> None:
        self.alive = False
        self.simulation.in_flight -= self.inside
        self.inside = 0

    def stop(self) -> None:
        self.stopped = True

    def go_on(self) -> None:
        self.stopped = False
        missed, self.missed = self.missed, []
        self.simulation.chance.shuffle(missed)
        for each in missed:
            each()


@dataclass
class Simulation:
    """The cluster. *delay* is that of a message; *loss* the share of those that are lost."""

    seed: int
    limit: int = 20
    delay: float = 0.0005
    loss: float = 0.0
    times: Times = TIMES
    fixed: int = 0
    now: float = 1000.0
    instances: list[Instance] = field(default_factory=list)
    states: list[tuple[float, int, State]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._numbers = itertools.count()
        self.script = Script()
        self.snapshot = self.script.snapshot()
        self.up, self.paused = True, False
        self.runs = itertools.count(1)
        self.run = "run0"
        self.inbox: list[Callable[[], None]] = []
        # Instances whose messages do not get through.
        self.cut_off: set[int] = set()
        self.calls = self.messages = self.questions = 0
        self.in_flight = self.peak = 0
        # When the server was last put back.
        self.rolled_back = -1e9
        self.area = 0.0
        self._since = self.now
        self.on_step: Callable[[], None] = lambda: None

    def fixed_share(self, number: int) -> tuple[int, int] | None:
        return (number % self.fixed, self.fixed) if self.fixed else None

    def add(self, load: Load) -> Instance:
        instance = Instance(self, next(self._numbers), load)
        self.instances.append(instance)
        return instance

    # Time.

    def later(
        self, seconds: float, action: Callable[[], None], instance: Instance | None = None
    ) -> None:
        """Do *action* in *seconds*, as a part of *instance*: not if it is dead, and later if it is
        stopped.
        """

        def act() -> None:
            if instance is None or (instance.alive and not instance.stopped):
                action()
            elif instance.alive:
                instance.missed.append(act)

        heapq.heappush(self._events, (self.now + seconds, next(self._order), act))

    def advance(self, seconds: float) -> None:
        end = self.now + seconds
        while self._events and self._events[0][0] <= end:
            when, _, action = heapq.heappop(self._events)
            self.area += (when - self._since) * self.in_flight
            self.now = self._since = max(self.now, when)
            action()
            self.peak = max(self.peak, self.in_flight)
            self.on_step()
        self.area += (end - self._since) * self.in_flight
        self.now = self._since = end

    def mean(self, seconds: float) -> float:
        """Advance, and return how many requests were in flight on average."""
        before, self.peak = self.area, 0
        self.advance(seconds)
        return (self.area - before) / seconds

    # The server.

    def reaches(self, instance: Instance) -> bool:
        """Whether the calls of *instance* get through."""
        return not (self.loss or instance.stopped or instance.number in self.cut_off)

    def send(self, instance: Instance, call: int, request: bytes) -> None:
        chance = self.chance
        if chance.random() < self.loss or instance.number in self.cut_off:
            return
        run = self.run

        def arrive() -> None:
            if not self.up or run != self.run:
                # The connection was that of another process.
                self.later(self.delay, lambda: instance.refused(call), instance)
            elif self.paused:
                self.inbox.append(arrive)
            else:
                self._renew(instance, call, request)

        self.later(self.delay * chance.uniform(0.5, 1.5), arrive)

    def _renew(self, instance: Instance, call: int, request: bytes) -> None:
        delay = self.delay * self.chance.uniform(0.5, 1.5)
        try:
            answer, wakes = self.script.renew(request, round(self.now * SECOND))
        except Stale:
            self.later(delay, lambda: instance.refused(call), instance)
            return
        if decode_request(request).bye:
            assert not instance.inside, "it has left with requests inside"
        for name, words in wakes.items():
            other = next(each for each in self.instances if each.leases.instance == name)
            self.messages += 1
            if self.chance.random() >= self.loss and other.number not in self.cut_off:
                self.later(delay, functools.partial(other.leases.woken, words), other)
        if self.chance.random() >= self.loss and instance.number not in self.cut_off:
            self.later(delay, lambda: instance.answered(call, answer), instance)

    def carry(
        self, instance: Instance, question: bytes, answered: Callable[[bytes | None], None]
    ) -> None:
        """Carry the *question* of a budget."""
        chance, run = self.chance, self.run
        if chance.random() < self.loss or instance.number in self.cut_off:
            return

        def arrive() -> None:
            answer: bytes | None = None
            if self.up and self.paused and run == self.run:
                self.inbox.append(arrive)
                return
            if self.up and run == self.run:
                with suppress(Stale):
                    answer = self.script.call("budget.lua", question, round(self.now * SECOND))
            if chance.random() >= self.loss and instance.number not in self.cut_off:
                delay = self.delay * chance.uniform(0.5, 1.5)
                self.later(delay, lambda: answered(answer), instance)

        self.later(self.delay * chance.uniform(0.5, 1.5), arrive)

    def kill_server(self) -> None:
        self.up = False
        self.inbox.clear()
        self.script = Script()
        self.paused = False

    def start_server(self) -> None:
        self.up = True
        self.run = f"run{next(self.runs)}"
        self._connected()

    def empty(self) -> None:
        self.script = Script()

    def pause(self) -> None:
        self.paused = True

    def go_on(self) -> None:
        self.paused = False
        inbox, self.inbox = self.inbox, []
        # They came on several connections.
        self.chance.shuffle(inbox)
        for each in inbox:
            each()

    def keep(self) -> None:
        """Keep the state, to come back to it."""
        self.snapshot = self.script.snapshot()

    def roll_back(self) -> None:
        """Go on with the state that was kept, in another process: what a replica that lags
        does.
        """
        self.script.restore(self.snapshot)
        self.rolled_back = self.now
        self.start_server()

    def _connected(self) -> None:
        for each in self.instances:
            wake = functools.partial(each.leases.woken, [""])
            self.later(self.chance.uniform(0.0, 0.5), wake, each)

    # What has to hold.

    def check(self) -> None:
        """Raise an AssertionError if an invariant is broken."""
        living = [each for each in self.instances if each.alive]
        world = self.script.world
        holders = self.script.holders(NAME)
        for each in living:
            assert each.inside >= 0
            grant = each.grant
            assert 0 <= grant.granted <= self.limit
            # `_standing`: the property would look at the clock.
            standing = each.leases.standing
            if world and each.leases.epoch != world["epoch"] and not self.reaches(each):
                # It uses what it had in a world that is gone, and the server cannot know.
                each.left_over = max(each.left_over, each.inside)
            valid = standing.state is not State.ALONE and self.now < each.leases.lease_end
            if valid and world and each.leases.epoch == world["epoch"]:
                known = holders.get(each.leases.instance, 0)
                answered = each.leases.lease_end - self.times.lease + self.times.margin
                if self.rolled_back < answered and grant.granted:
                    ends, *_ = self.script.members[each.leases.instance]
                    assert ends / SECOND >= each.leases.lease_end
                    assert known >= grant.granted, (each.number, known, grant.granted)
        # Instances whose lease was over while they ran may still have so many, or their share.
        excess = 0
        for each in living:
            if each.leases.standing.state is State.ALONE or each.stopped:
                excess += max(each.left_over, each.inside, each.grant.share)
            else:
                excess += each.left_over
        assert self.in_flight <= self.limit + excess, (self.in_flight, excess)


class Asker(ABC):
    """Requests that wait for what several instances share; `serve` starts those that may."""

    def __init__(self, simulation: Simulation, instance: Instance) -> None:
        self.simulation, self.instance = simulation, instance
        self._timer = 0

    @abstractmethod
    def serve(self) -> None:
        """Start those that may."""

    def look_again(self, delay: float) -> None:
        """Serve in *delay* seconds, and not when that was to be before."""
        self._timer += 1
        timer = self._timer
        self.simulation.later(
            delay, lambda: self.serve() if timer == self._timer else None, self.instance
        )


def excess(taken: Iterable[tuple[float, float]], rate: float) -> float:
    """By how much of what was *taken*, in the order of its moments, the worst span exceeds *rate*."""
    worst, lowest, total = 0.0, inf, 0.0
    for moment, amount in taken:
        lowest = min(lowest, total - moment * rate)
        total += amount
        worst = max(worst, total - moment * rate - lowest)
    return worst
