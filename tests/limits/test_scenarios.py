"""Random scenarios of the scheduler, and what must hold after each step."""

from __future__ import annotations

import os
import random
from collections import Counter
from math import inf
from typing import TYPE_CHECKING, cast

from aioserver.limits.gcra import ROUNDING
from aioserver.limits.resource import BOTH_CLASSES, Bid
from tests.support.resources import Refused, Spaced, World, last

if TYPE_CHECKING:
    from aioserver.limits.resource import Resource, Ticket
    from tests.support.clock import FakeTimer

SCENARIOS = int(os.environ.get("SCENARIOS", "400"))


class Scenario:
    """Random steps at some resources, and what must hold after each."""

    def __init__(self, seed: int) -> None:
        self.dice = dice = random.Random(seed)
        self.world = world = World()
        self.clock, self.scheduler = world.clock, world.scheduler
        self.key = world.resource(
            dice.randint(1, 6), queue_size=dice.choice((0, 3, 20)), rate=self.rate()
        )
        self.providers = [
            world.resource(
                dice.randint(0, 5),
                classes=BOTH_CLASSES,
                queue_size=dice.choice((1, 3, 12)),
                queue_timeout=dice.choice((2.0, 9.0, 30.0)),
                rate=self.rate(),
                keeps=lambda: False,
            )
            for _ in range(dice.randint(1, 3))
        ]
        self.inner = {
            each: world.background(each, dice.randint(1, 6))
            for each in self.providers
            if dice.random() < 0.5
        }
        self.tickets: dict[Ticket, str] = {}
        self.listening: set[Ticket] = set()

    def rate(self) -> Spaced | None:
        dice = self.dice
        if dice.random() < 0.5:
            return None
        budget = dice.choice((None, 50, 200))
        return Spaced(self.world, dice.choice((0.0, 0.1, 1.0)), budget)

    def run(self, steps: int) -> None:
        weights = {
            self.come: 8.0,
            self.end: 6.0,
            self.leave: 1.0,
            self.pass_time: 4.0,
            self.resize: 1.0,
            self.again: 2.0,
            self.join: 0.5,
            self.refuse: 0.2,
            self.slow_down: 0.3,
        }
        for step in self.dice.choices(list(weights), list(weights.values()), k=steps):
            step()
            self.settle()
            self.check()
        self.finish()

    def come(self) -> None:
        dice = self.dice
        ticket = self.world.ticket(
            dice.choice("abc"),
            dice.choice("xy"),
            weight=dice.choice((1, 1, 3)),
            work=dice.randint(1, 50),
            kind=dice.choice(("", "", "batch")),
            deadline=self.clock.now + dice.choice((inf, inf, 3.0)),
        )
        if dice.random() < 0.3:
            self.listening.add(ticket)
        self.tickets[ticket] = "key"
        self.ask(ticket, [Bid(self.key, dice.randint(1, 40))])

    def hear(self, ticket: Ticket, position: int, eta: float) -> None:
        assert ticket in self.tickets
        # More cannot wait at one resource than all that wait, and that stood there a step before.
        assert 1 <= position <= len(self.tickets) + 1
        assert 0.0 <= eta < inf

    def ask(self, ticket: Ticket, bids: list[Bid]) -> None:
        try:
            self.scheduler.enter(
                ticket,
                bids,
                (lambda _resource, position, eta: self.hear(ticket, position, eta))
                if ticket in self.listening
                else None,
            )
        except Refused:
            self.close(ticket)

    def close(self, ticket: Ticket) -> None:
        del self.tickets[ticket]
        # The key's grant has been used once a provider was asked.
        for grant in list(ticket.grants):
            if self.dice.random() < 0.7:
                grant.release(self.dice.randint(0, 60), self.dice.randint(0, 50))
        self.scheduler.close(ticket)

    def bids(self, ticket: Ticket, *, again: bool = False) -> list[Bid]:
        dice, now = self.dice, self.clock.now
        chosen = dice.sample(self.providers, dice.randint(1, len(self.providers)))
        in_background = dice.random() < 0.3
        bids = []
        for number, each in enumerate(chosen):
            delay = 0.0
            if (number or again) and dice.random() < 0.4:
                delay = now + dice.choice((0.5, 2.0))
            resource = self.inner.get(each, each) if in_background else each
            parked = again and bool(delay) and dice.random() < 0.5
            bid = Bid(resource, dice.randint(1, 30), not_before=delay, parked=parked)
            bid.front, bid.movable = again, dice.random() < 0.5
            bids.append(bid)
        return bids

    def settle(self) -> None:
        """Let the tasks of tickets go on whose waits have ended."""
        while True:
            news = [each for each in self.tickets if each.outcome is not None]
            started = [
                each
                for each, state in self.tickets.items()
                if state == "key" and each.grants and each not in news
            ]
            if not news and not started:
                return
            for ticket in (*news, *started):
                outcome, ticket.outcome = ticket.outcome, None
                if isinstance(outcome, Refused):
                    self.close(ticket)
                elif self.tickets[ticket] == "key":
                    self.tickets[ticket] = "provider"
                    self.ask(ticket, self.bids(ticket))

    def running(self) -> list[Ticket]:
        return [
            each
            for each, state in self.tickets.items()
            if state == "provider" and each.grants and each not in self.scheduler.waiting
        ]

    def end(self) -> None:
        if running := self.running():
            ticket = self.dice.choice(running)
            last(ticket).release(self.dice.randint(0, 60), self.dice.randint(0, 40))
            self.close(ticket)

    def again(self) -> None:
        if running := self.running():
            ticket = self.dice.choice(running)
            last(ticket).release(0, 0)
            self.ask(ticket, self.bids(ticket, again=True))

    def leave(self) -> None:
        if self.tickets:
            self.close(self.dice.choice(list(self.tickets)))

    def join(self) -> None:
        waiting = [each for each in self.scheduler.waiting if self.tickets[each] == "provider"]
        if waiting:
            ticket = self.dice.choice(waiting)
            new = [
                each
                for each in self.providers
                if all(bid.resource is not each for bid in ticket.bids)
                and all(bid.resource.within is not each for bid in ticket.bids)
            ]
            if new and self.dice.random() < 0.7:
                self.scheduler.join(ticket, Bid(self.dice.choice(new), 5))
            else:
                resource = self.dice.choice(ticket.bids).resource
                gone = Refused("quit", "", 0.0)
                self.scheduler.refuse(resource, lambda: gone, lambda bid: bid.ticket is ticket)

    def refuse(self) -> None:
        resource = self.dice.choice(self.providers)
        if self.dice.random() < 0.5:
            self.scheduler.refuse(resource, lambda: Refused("dead", "", 1.0))
        else:
            self.scheduler.recover(resource)

    def pass_time(self) -> None:
        self.clock.advance(self.dice.choice((0.01, 0.3, 1.5)))

    def slow_down(self) -> None:
        paced = [each for each in self.world.resources if isinstance(each.rate, Spaced)]
        if not paced:
            return
        resource = self.dice.choice(paced)
        rate = resource.rate
        assert isinstance(rate, Spaced)
        rate.next = self.clock.now + self.dice.choice((0.0, 3.0, 20.0))
        if self.dice.random() < 0.5:
            self.world.refuse_late(resource)
        self.scheduler.serve(resource)

    def resize(self) -> None:
        resource = self.dice.choice([self.key, *self.providers])
        self.scheduler.resize(resource, self.dice.randint(0, 6))
        if self.dice.random() < 0.3 and resource.queue_size:
            resource.queue_size = self.dice.randint(1, 12)

    def finish(self) -> None:
        for ticket in list(self.tickets):
            self.close(ticket)
        self.clock.advance(2.0)
        for resource in self.world.resources:
            assert resource.inside == resource.slots == resource.queue.size == 0
            assert not any(resource.class_slots)
            assert all(limit is None or limit.inside == 0 for limit in resource.limits)
            if isinstance(resource.rate, Spaced):
                assert resource.rate.reserved == 0
        assert not self.scheduler.waiting
        assert self.clock.pending == 0

    def check(self) -> None:
        slots: Counter[Resource] = Counter()
        standing: Counter[Resource] = Counter()
        inside: Counter[Resource] = Counter()
        for ticket in self.tickets:
            assert ticket.outcome is None
            if (slot := ticket.slot) is not None:
                slots[slot] += 1
                if slot.within is not None:
                    slots[slot.within] += 1
                # One that was parked keeps it while it runs.
                assert ticket in self.scheduler.waiting or ticket.grants
            if ticket.bids:
                assert ticket in self.scheduler.waiting
                assert ticket.timer is not None
                assert not cast("FakeTimer", ticket.timer).cancelled
                assert ticket.slot is not None or not any(bid.standing for bid in ticket.bids)
            for bid in ticket.bids:
                standing[bid.resource] += bid.standing
                assert bid.standing or bid.not_before > self.clock.now - ROUNDING
                assert bid.until >= max(self.clock.now, bid.since) - ROUNDING or bid.rests
            for grant in ticket.grants:
                inside[grant.resource] += 1
                if grant.inner is not None:
                    inside[grant.inner.resource] += 1
            for bid in ticket.bids:
                if bid.inner is not None:
                    inside[bid.inner.resource] += 1
        for resource in self.world.resources:
            assert resource.slots == slots[resource]
            assert resource.queue.size == standing[resource]
            assert resource.inside == inside[resource]
            self.check_order(resource)

    def check_order(self, resource: Resource) -> None:
        if not resource.queue.size or resource.inside >= resource.places.limit:
            return
        # There is a place: then each class that may have it has nobody who waits, or waits for
        # the rate.
        found = resource.next()
        if found is not None:
            assert resource.rate is not None
            delay = resource.rate.delay(found.cost)
            assert delay == inf or (
                resource.timer is not None and not cast("FakeTimer", resource.timer).cancelled
            )


def test_random_scenarios_keep_what_must_hold() -> None:
    base = int(os.environ.get("SEED", random.randrange(2**32)))
    print(f"seed {base}")
    for number in range(SCENARIOS):
        scenario = Scenario(base + number)
        try:
            scenario.run(40)
        except BaseException:
            print(f"scenario {base + number}")
            raise
