"""Fairness by work, written once more as plainly as it is said, and random histories in which a
fair queue must agree with that and keep its bound: callers of any weight and their flows, costs
and wrong estimates, starts without a wait, corrections after a caller has left, and requests that
are given up.

The model has no heap, no sweep and no short cut: it looks at everybody each time.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

from aioserver.limits.fair_queue import FairQueue

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

    from aioserver.limits.fair_queue import Charge


class Job(NamedTuple):
    """A request: what it is estimated to cost, and what it does cost; it may come to the front."""

    number: int
    caller: str
    flow: int
    work: int
    cost: int
    came: float | None = None


@dataclass
class Level:
    """The rule for the callers, or for the flows of one: each name has a counter."""

    counters: dict[Hashable, Fraction] = field(default_factory=dict)
    # When each that waits has begun to.
    since: dict[Hashable, int] = field(default_factory=dict)
    last: Fraction = Fraction(0)
    waits: int = 0

    def wait(self, name: Hashable) -> None:
        if name not in self.since:
            self.since[name] = self.waits
            self.waits += 1
            self.lift(name)

    def lift(self, name: Hashable) -> None:
        self.counters[name] = max(self.counters.get(name, self.last), self.last)

    def first(self) -> Hashable:
        return min(self.since, key=lambda name: (self.counters[name], self.since[name]))

    def start(self, name: Hashable, work: Fraction, *, in_turn: bool = True) -> None:
        if name not in self.since:
            self.lift(name)
        if in_turn:
            self.last = max(self.last, self.counters[name])
        self.counters[name] += work


@dataclass
class Model:
    """A server of *places*: who waits, who runs, and whose turn it is."""

    weights: dict[str, int]
    waiting: list[Job] = field(default_factory=list)
    running: dict[Job, int] = field(default_factory=dict)
    callers: Level = field(default_factory=Level)
    flows: dict[str, Level] = field(default_factory=dict)

    def add(self, job: Job) -> None:
        self.callers.wait(job.caller)
        if job.came is not None:
            others = [other for other in self.waiting if other.came is not None]
            self.waiting.insert(sum((other.came or 0.0) <= job.came for other in others), job)
        else:
            self.waiting.append(job)
            self.flows.setdefault(job.caller, Level()).wait(job.flow)

    def next(self) -> Job:
        caller = self.callers.first()
        own = [job for job in self.waiting if job.caller == caller]
        flow = None if own[0].came is not None else self.flows[own[0].caller].first()
        return own[0] if flow is None else next(job for job in own if job.flow == flow)

    def start(self, job: Job) -> None:
        """Start *job*, the next one, or one that does not wait."""
        in_turn = not (job.came is not None and job in self.waiting)
        if job in self.waiting:
            self.waiting.remove(job)
        weight = self.running[job] = self.weights[job.caller]
        self.callers.start(job.caller, Fraction(job.work, weight))
        flows = self.flows.setdefault(job.caller, Level())
        flows.start(job.flow, Fraction(job.work), in_turn=in_turn)
        self._left(job)

    def end(self, job: Job) -> None:
        more = Fraction(job.cost - job.work)
        self.callers.counters[job.caller] += more / self.running.pop(job)
        self.flows[job.caller].counters[job.flow] += more
        self._left(job)

    def leave(self, job: Job) -> None:
        self.waiting.remove(job)
        self._left(job)

    def _left(self, gone: Job) -> None:
        own = [job for job in self.waiting if job.caller == gone.caller]
        if not own:
            self.callers.since.pop(gone.caller, None)
            if not any(job.caller == gone.caller for job in self.running):
                self.flows.pop(gone.caller, None)
        if not any(job.flow == gone.flow and job.came is None for job in own):
            self.flows.get(gone.caller, Level()).since.pop(gone.flow, None)


class Pairs:
    """How far apart what any two have started is, over any span in which both wait: *apart*."""

    def __init__(self) -> None:
        self._ahead: dict[tuple[Hashable, Hashable], tuple[Fraction, Fraction, Fraction]] = {}
        self.apart = Fraction(0)

    def started(self, name: Hashable, share: Fraction) -> None:
        """Note that *name* has started so much, divided by its weight."""
        for pair, (ahead, most, least) in self._ahead.items():
            if name in pair:
                now = ahead + (share if pair[0] == name else -share)
                furthest, nearest = max(most, now), min(least, now)
                self._ahead[pair] = now, furthest, nearest
                self.apart = max(self.apart, furthest - nearest)

    def wait(self, names: Iterable[Hashable]) -> None:
        """Note who waits now: all others begin anew."""
        known = sorted(names, key=repr)
        pairs = {(a, b) for number, a in enumerate(known) for b in known[number + 1 :]}
        nothing = Fraction(0), Fraction(0), Fraction(0)
        self._ahead = {pair: self._ahead.get(pair, nothing) for pair in pairs}


class History:
    """A random history of *seed*; `run` plays it, and *ratio* is how much of its bound it needs.

    *ratio* has that of the callers, and that of the flows within each. The weights of callers
    change at times.
    """

    def __init__(self, seed: int) -> None:
        self.dice = dice = random.Random(seed)
        self.places = dice.randint(1, 6)
        self.names = [f"caller {number}" for number in range(dice.randint(2, 5))]
        self.exact = dice.random() < 0.2
        # Now and then all cost the same: ties decide.
        self.even = dice.random() < 0.15
        self.fronts = dice.random() < 0.2
        self.model = Model({name: dice.randint(1, 10) for name in self.names})
        self.queue: FairQueue[Job] = FairQueue()
        self.charges: dict[Job, Charge[Job]] = {}
        self._made = 0
        self._pairs, self._flow_pairs = Pairs(), {name: Pairs() for name in self.names}
        # The dearest request, and the largest error of an estimate.
        self.dearest = self.error = 0

    def job(self) -> Job:
        dice = self.dice
        cost = 7 if self.even else round(10 ** dice.uniform(0, 4))
        # One that fails gives its estimate back.
        cost = 0 if dice.random() < 0.1 and not self.exact else cost
        work = max(1, cost) if self.exact or self.even else round(10 ** dice.uniform(0, 4))
        self.dearest = max(self.dearest, cost, work)
        self.error = max(self.error, abs(cost - work))
        self._made += 1
        came = dice.random() if self.fronts and dice.random() < 0.2 else None
        caller = self.names[min(dice.randrange(6), len(self.names) - 1)]
        return Job(self._made, caller, dice.randrange(3), work, cost, came)

    @property
    def bound(self) -> int:
        """How far apart two that wait may be."""
        return 2 * (self.dearest + self.places * self.error)

    @property
    def ratio(self) -> tuple[float, float]:
        """How much of the bound was needed, between callers and between flows."""
        flows = max(pairs.apart for pairs in self._flow_pairs.values())
        bound = max(1, self.bound)
        # A flow whose requests come to the front has no turns that could be fair.
        return float(self._pairs.apart / bound), 0.0 if self.fronts else float(flows / bound)

    def run(self, steps: int = 400) -> None:
        """Play it; an assertion fails where the queue and the model differ."""
        dice, model, queue = self.dice, self.model, self.queue
        pressure = dice.choice((0.8, 1.5, 4.0))
        for _ in range(steps):
            match dice.choices(("come", "end", "leave"), (pressure, 1, 0.1))[0]:
                case "come":
                    self._come(self.job())
                case "end" if model.running:
                    self._end(dice.choice(list(model.running)))
                case "leave" if model.waiting:
                    job = dice.choice(model.waiting)
                    model.leave(job)
                    assert queue.remove(job, job.caller, job.flow)
            self._serve()
            assert queue.size == len(model.waiting)
        while model.running:
            self._end(next(iter(model.running)))
            self._serve()
        assert not queue.size

    def _come(self, job: Job) -> None:
        model, queue = self.model, self.queue
        weight = model.weights[job.caller]
        if len(model.running) < self.places and not model.waiting:
            model.start(job)
            self.charges[job] = queue.start(job.caller, job.flow, weight, job.work)
            return
        model.add(job)
        queue.add(job, job.caller, job.flow, weight, job.work, job.came)

    def _end(self, job: Job) -> None:
        self.model.end(job)
        self.charges.pop(job).settle(job.cost)

    def _serve(self) -> None:
        model, queue = self.model, self.queue
        self._look()
        while model.waiting and len(model.running) < self.places:
            job = model.next()
            first, _ = next(queue.order())
            popped, self.charges[job] = queue.pop()
            assert popped == first == job
            model.start(job)
            self._pairs.started(job.caller, Fraction(job.cost, model.weights[job.caller]))
            self._flow_pairs[job.caller].started(job.flow, Fraction(job.cost))
            self._look()

    def _look(self) -> None:
        waiting = self.model.waiting
        self._pairs.wait({job.caller for job in waiting})
        for name, pairs in self._flow_pairs.items():
            pairs.wait({job.flow for job in waiting if job.caller == name})
