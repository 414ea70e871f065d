"""The instances of a run that share a server: their processes, which may be killed or stopped, and
what happens to them.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import warnings
from contextvars import Context
from typing import TYPE_CHECKING, Any

from tests.simulation.clock import Clock
from tests.simulation.membership import joined
from tests.simulation.network import INSTANCE
from tests.simulation.plan import DEPLOY, SERVER_EVENTS
from tests.simulation.shared_server import SharedServer
from tests.simulation.together import Together

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    from tests.simulation.instance import Instance
    from tests.simulation.loop import SimulatedLoop
    from tests.simulation.membership import Member
    from tests.simulation.world import World

# The share of runs whose clients come before the instances have joined; seconds for which those of
# the others wait.
COLD, START = 0.2, 15


class Cluster:
    """The instances of *world*, each in a context of its own, by which all that is theirs is
    known.
    """

    def __init__(self, world: World, loop: SimulatedLoop) -> None:
        plan = world.plan
        assert plan.shared is not None
        self._world = world
        self._loop = loop
        self._dice = random.Random(f"cluster {plan.seed}")
        self._plan = plan
        self.server = SharedServer(loop, random.Random(f"server {plan.seed}"), plan.shared)
        self.together = Together(self.server, loop, world.instances, world.broken)
        self._lives: dict[int, asyncio.Task[None]] = {}
        # Makes the server of an instance, behind some operations; and those that there were.
        self.make: Callable[[int, Member, list[str]], AbstractAsyncContextManager[Instance]]
        self._operations: list[str] = []
        self._retirements: set[asyncio.Task[None]] = set()
        # Those that start at the same time have different numbers, and deploys follow each other.
        self._numbers, self._deploys = itertools.count(), asyncio.Lock()

    async def start(self, rank: int) -> Instance:
        """Start one more instance, in the place *rank* of those that know how many they are."""
        number = next(self._numbers)
        started: asyncio.Future[Instance] = self._loop.create_future()
        # What it does is known by its context.
        context = Context()
        context.run(INSTANCE.set, number)
        life = self._live(number, rank, started)
        self._lives[number] = self._loop.create_task(life, context=context)
        before = len(self._operations)
        waited: set[asyncio.Future[Any]] = {started, self._lives[number]}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if not started.done():
            await self._lives[number]
        instance = started.result()
        self._world.add(instance)
        for name in self._operations[before:]:
            await instance.do(instance.operate(name, self._plan))
        return instance

    async def renew(self) -> None:
        """Wait until all have joined a server that has just begun, and gives nothing in its first
        seconds.
        """
        if self._dice.random() < COLD:
            return
        for _ in range(START):
            if all(
                not each.member.leases.standing.grace
                for each in self._world.instances
                if each.member
            ):
                return
            await asyncio.sleep(1.0)

    async def end(self) -> None:
        """End all instances, one after the other."""
        for instance in self._world.instances:
            instance.hurried.set()
        await asyncio.gather(*self._retirements)
        for instance in self._world.instances:
            if not instance.killed:
                if not instance.over.done():
                    instance.over.set_result(None)
                await self._lives[instance.number]

    async def operate(self, name: str, chosen: float) -> None:
        """Do *name*, as an operator would: stop one instance, or reload all."""
        living = [each for each in self._world.instances if not (each.killed or each.ended)]
        if name == "drain":
            if sum(not each.former for each in living) > 1:
                instance = living[int(chosen * len(living))]
                instance.hurried.set()
                self.together.trouble()
                if not instance.former:
                    await instance.do(instance.operate(name, self._plan))
                self.together.absences.append((instance.number, Clock.now))
                self.together.trouble()
                if not (instance.killed or instance.former):
                    instance.over.set_result(None)
            return
        self._operations.append(name)
        self.together.reloaded()
        await asyncio.gather(*(each.do(each.operate(name, self._plan)) for each in living))
        before = self._plan.operated(self._plan.changes).get("auth.keys", ())
        after = self._plan.operated(self._plan.changes, *self._operations).get("auth.keys", ())
        for entry in before:
            if entry not in after:
                self.together.deploys.revoked.setdefault(entry["name"], Clock.now)

    async def _deploy(self) -> None:
        """Let each instance that serves have a successor, one after the other."""
        for instance in list(self._world.instances):
            if not _serves(instance):
                continue
            if (oldest := self.together.deploys.too_old(instance.rank)) is not None:
                oldest.hurried.set()
                over: list[asyncio.Future[None]] = [self._lives[oldest.number], oldest.gone]
                await asyncio.wait(over, return_when=asyncio.FIRST_COMPLETED)
            successor = await self.start(instance.rank)
            if _serves(instance) and not successor.killed:
                instance.listener.hand_over(successor.listener)
                instance.former_since = Clock.now
                self._retirements.add(self._loop.create_task(self._retire(instance)))

    async def _retire(self, instance: Instance) -> None:
        await instance.do(self.together.deploys.retire(instance))
        if not instance.killed:
            instance.over.set_result(None)

    async def happen(self, moment: float, name: str, seconds: float) -> None:
        """Let the event *name* happen at *moment*; what lasts, lasts for some *seconds*."""
        await asyncio.sleep(moment)
        together = self.together
        together.counts[name] += 1
        if name == DEPLOY:
            async with self._deploys:
                await self._deploy()
            return
        together.trouble()
        living = [
            each
            for each in self._world.instances
            if not (each.killed or each.ended or each.stopped)
        ]
        if name in SERVER_EVENTS:
            await self.server.suffer(name, seconds)
        elif len(living) > 1:
            instance = living[int(self._dice.random() * len(living))]
            together.absences.append((instance.number, Clock.now))
            if name == "kill instance":
                self._kill(instance)
                await asyncio.sleep(seconds)
                # A former process has a successor.
                if not instance.former:
                    await self.start(instance.rank)
            elif name == "stop instance":
                await self._stop(instance, seconds)
            else:
                self.server.cut_off.add(instance.number)
                await asyncio.sleep(seconds)
                self.server.cut_off.discard(instance.number)
                self.server.reconnect(instance.number)
            together.absences.append((instance.number, Clock.now))
        together.trouble()

    def is_dead(self, task: asyncio.Task[object]) -> bool:
        """Return whether *task* is one of an instance that was killed."""
        return self._loop.absent.get(self._loop.owner_of(task), ()) is None

    def _kill(self, instance: Instance) -> None:
        assert instance.member is not None
        instance.killed = True
        # What has never begun is no mistake of anybody.
        warnings.filterwarnings("ignore", message="coroutine .* was never awaited")
        self._loop.absent[instance.number] = None
        self.together.killed[instance.member.instance] = Clock.now
        self.server.forget(instance.member.instance)
        instance.listener.close()
        instance.member.network.close()
        # It writes no more lines, and those that it owes nobody can.
        instance.server.context.usage.ledger = None
        for end in [end for end in self._world.network.open if end.owner == instance.number]:
            end.vanish()
        instance.gone.set_result(None)

    async def _stop(self, instance: Instance, seconds: float) -> None:
        instance.stopped = True
        self._loop.absent[instance.number] = []
        await asyncio.sleep(seconds)
        instance.stopped_for += seconds
        instance.stopped = False
        # Its timers are late.
        instance.before_reload()
        self._loop.go_on(instance.number)

    async def _live(self, number: int, rank: int, started: asyncio.Future[Instance]) -> None:
        fixed = (rank, self._plan.instances) if self._plan.shared.fixed else None  # type: ignore[union-attr]
        async with (
            joined(self.server, number, fixed) as member,
            self.make(number, member, self._operations) as instance,
        ):
            instance.rank = rank
            started.set_result(instance)
            await instance.over
        instance.closed = True


def _serves(instance: Instance) -> bool:
    """Return whether *instance* runs, and has no successor."""
    return not (instance.killed or instance.ended or instance.stopped or instance.former)
