"""One run: the whole real server, or several of them, their provider and their clients in one
loop, in virtual time.

`play` returns what happened. The servers are looked at whenever time is about to pass (watch.py),
and at the end, when nothing may be held any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import random
import tempfile
import traceback
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import aiohappyeyeballs
from aiohttp import web_app

from aioserver.monitoring import snapshot
from aioserver.protocol import request_headers
from aioserver.telemetry.bugs import Bugs
from aioserver.wings.simulator import shapes
from tests.simulation import agents, clock, engine_shapes
from tests.simulation.bills import Bills
from tests.simulation.client import DIALLER, Client
from tests.simulation.cluster import Cluster
from tests.simulation.configuration import with_spare
from tests.simulation.disk import Disk
from tests.simulation.doors import Doors
from tests.simulation.grouping import PROVIDERS, Remembered
from tests.simulation.hurry import Hurry
from tests.simulation.instance import Instance, running
from tests.simulation.loop import SimulatedLoop
from tests.simulation.network import INSTANCE, Network
from tests.simulation.noting import noted, together
from tests.simulation.plan import BRIDGED, FORGETS, LACKS, MESSAGE_SETTINGS, provider_dial
from tests.simulation.prompts import Prompts
from tests.simulation.provider import Calls, NotingSimulator, note_answer
from tests.simulation.silence import be_silent
from tests.simulation.sums import Sums
from tests.simulation.transport import USER_TIMEOUT, FakeSocket, Transport
from tests.simulation.truth import Violation, speech
from tests.simulation.watch import Watch
from tests.support.history import sql
from tests.support.simulator import Behaviour
from tests.support.virtual_loop import START

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence
    from contextlib import AbstractContextManager

    from tests.simulation.membership import Member
    from tests.simulation.plan import Plan

# The address of the balancer in front of the instances, at which nobody listens.
BALANCER = ("127.0.0.1", 80)
# Seconds after the last client until everything must be given back: the longest window, and the
# answers in the background, which wait for each other with ten times the patience of others.
AFTERWARDS = 1800.0
# How a provider refuses to continue a response that it has not kept.
NO_RESPONSES = (404, "Previous response with id 'x' not found.")
NO_USAGE = {"open_fds": None, "max_fds": 1024, "rss_bytes": None}
# Violations that are noted of a run.
MOST = 20
# Steps in which a task that was killed is over.
MOST_ENDS = 20


@dataclass(slots=True)
class Outcome:
    """What came of a run: its *violations*, and how many clients ended in which way."""

    plan: Plan
    violations: list[str] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)
    virtual_seconds: float = 0.0
    connections: int = 0
    # Clients that had a place at once, at all instances together; 0 where there is one.
    most_inside: int = 0
    # How often something happened that a fault of the shared server, or of an instance, explains.
    counts: Counter[str] = field(default_factory=Counter)


class World:
    """All that a run consists of: *instances* of the server, their providers, and their clients.

    What holds of each instance is looked at by its watch (watch.py), and what holds of all
    together by *sums*.
    """

    def __init__(self, plan: Plan, outcome: Outcome, network: Network) -> None:
        self.plan = plan
        self.network = network
        self.instances: list[Instance] = []
        # What the instances share; None if nothing.
        self.cluster: Cluster | None = None
        self.calls = Calls()
        # The addresses of the providers, by name.
        self.urls: dict[str, str] = {}
        self._outcome = outcome
        self._watches: list[Watch] = []
        self._links = random.Random(f"links {plan.seed}")
        self._hurry = Hurry(self.broken, self._running)
        self.doors = Doors(plan, self.broken)
        self.sums = Sums(plan, self.instances, self.calls, self.broken)
        network.on_made = self.sums.made
        network.on_late = self._dialled_late

    def broken(self, what: str) -> None:
        """Note that a promise was broken at this moment."""
        if len(self._outcome.violations) < MOST:
            self._outcome.violations.append(f"at {clock.Clock.now - START:.3f} s: {what}")

    def _dialled_late(self, seconds: float) -> None:
        # A process that is stopped gives up late.
        if not any(each.stopped or each.stopped_for for each in self.instances):
            self.broken(f"a dial took {seconds:.2f} s")

    def add(self, instance: Instance) -> None:
        """Add *instance*, and a watch that looks at it."""
        self.instances.append(instance)
        self._watches.append(Watch(instance, self.network, self.broken))

    def look(self) -> None:
        """Check what must hold whenever nothing is about to happen in this moment."""
        for watch in self._watches:
            watch.look()
        self.sums.look()
        self._hurry.look()
        if self.cluster is not None:
            self.cluster.together.look()

    def patches(self) -> AbstractContextManager[object]:
        """Let the starts of instances that share their limits be noted, in the block, what
        attempts cost, what callers are told of their prompts, and what the members of groups are
        sent.
        """
        patches = [
            self._hurry.patches(),
            self.doors.patches(),
            noted(Bugs, "note", before=self._bug),
        ]
        patches += [Bills(self.calls, self.broken).patches(), Prompts(self.broken).patches()]
        if self.cluster is not None:
            patches.append(self.cluster.together.patches())
        if self.plan.grouping is not None:
            patches.append(Remembered(self.broken).patches())
        return together(*patches)

    def _bug(self, _bugs: Bugs, bug: BaseException) -> None:
        self.broken(f"a bug of the server: {bug!r}{_place_of(bug)}")

    def is_dead(self, task: asyncio.Task[object]) -> bool:
        """Return whether *task* is one of an instance that was killed."""
        return self.cluster is not None and self.cluster.is_dead(task)

    async def kill(self, moment: float, name: str, seconds: float) -> None:
        """Kill the process of the provider *name* at *moment*; after some *seconds* another one
        is there.
        """
        await asyncio.sleep(moment)
        port = int(self.urls[name].rpartition(":")[2].partition("/")[0])
        listener = self.network.listeners.pop(port)
        for end in list(listener.dialled):
            end.peer.abort()
        await asyncio.sleep(seconds)
        self.network.listeners[port] = listener

    def start_looking(self) -> None:
        """Look at the servers from now on, whenever time is about to pass."""
        # Of a single server there are no sums, and without deadlines nothing else to look at.
        alone = len(self._watches) == 1 and not self.plan.hurried
        self.network.loop.on_pause = self._watches[0].look if alone else self.look

    def _running(self) -> set[int]:
        """Return the numbers of the instances that run."""
        return {
            each.number
            for each in self.instances
            if not (each.killed or each.stopped or each.stopped_for)
        }

    def stop_looking(self) -> None:
        """Look at nothing any more: the servers are being closed."""
        self.network.loop.on_pause = lambda: None

    async def start_connection(self, addr_infos: Any, **_kwargs: Any) -> FakeSocket:
        """Stand for the function that connects a socket, in aiohttp's connectors."""
        address = addr_infos[0][4]
        client = DIALLER.get(None)
        if client is None:
            return FakeSocket(address, provider_dial(self.plan, self._links, INSTANCE.get()))
        if address == BALANCER:
            address = "127.0.0.1", self.balance(client).listener.port
        return FakeSocket(address, client.dial())

    def balance(self, client: Client) -> Instance:
        """Choose the instance for a connection of *client*, as a balancer in front of all
        would.
        """
        if len(self.instances) == 1:
            return self.instances[0]
        chosen = client.home if self.plan.balancer == "sticky" else client.dice.randrange(1 << 16)
        instances = self.instances
        if self.cluster is not None:
            # A balancer sends nobody to an instance that is not there.
            instances = [
                each for each in instances if not (each.killed or each.ended or each.former)
            ] or instances
        return instances[chosen % len(instances)]

    def held(self) -> dict[str, int]:
        """Return what is held by all instances together, without zeros."""
        held: Counter[str] = Counter()
        for instance in self.instances:
            if not (instance.killed or instance.closed):
                held.update(instance.held())
        return dict(held)


def play(plan: Plan, only: Collection[int] | None = None) -> Outcome:
    """Run *plan*, or its clients *only*, and return what happened."""
    clock.seed(plan.seed)
    outcome = Outcome(plan)
    network = Network(random.Random(f"network {plan.seed}"))
    loop = SimulatedLoop(network, Disk(plan.seed))
    asyncio.set_event_loop(loop)
    faults: list[dict[str, Any]] = []
    dead: list[asyncio.Task[object]] = []
    loop.set_exception_handler(lambda _loop, context: faults.append(context))
    world = World(plan, outcome, network)
    if plan.shared is not None:
        loop.follow_tasks()
        world.cluster = Cluster(world, loop)
        world.sums.together = world.cluster.together
    # What is garbage is collected at the end, when it may still complain of errors that nobody has
    # seen.
    gc.disable()
    try:
        with (
            mock.patch.object(aiohappyeyeballs, "start_connection", world.start_connection),
            # The machine is no part of a run.
            mock.patch.object(snapshot, "process_usage", return_value=NO_USAGE),
            # Those of the process have the more digits the more runs were before.
            mock.patch.object(
                request_headers, "_ids", map("0123456789ab-{:x}".format, itertools.count(1))
            ),
            mock.patch.object(shapes, "speech", speech),
            mock.patch.object(shapes, "_chat", engine_shapes.odd_chat(note_answer)),
            world.patches(),
        ):
            loop.run_until_complete(_run(world, outcome, only))
            dead = [task for task in asyncio.all_tasks(loop) if world.is_dead(task)]
            left = [
                task for task in asyncio.all_tasks(loop) if task not in dead and not task.done()
            ]
            for task in left:
                world.broken(f"a task is left: {task.get_coro()}")
                task.cancel()
            if left:
                loop.run_until_complete(asyncio.wait(left))
            for timer in _own_timers(loop):
                if world.cluster is not None and loop.is_absent(timer):
                    continue
                world.broken(f"a timer is left: {timer!r}")
            for end in network.open:
                world.broken(f"a connection is open: {end.protocol!r}")
    except Exception as exc:  # noqa: BLE001 - whatever it is, it is a finding
        world.broken(f"the run failed: {exc!r}{_place_of(exc)}")
    finally:
        if not dead:
            gc.collect()
        gc.enable()
        for context in faults:
            bug = context.get("exception")
            world.broken(f"{context.get('message')}: {bug!r}{_place_of(bug)}")
        outcome.virtual_seconds = clock.Clock.now - START
        outcome.connections = network.made
        outcome.most_inside = world.sums.most_inside
        if world.cluster is not None:
            outcome.counts = world.cluster.together.counts
        asyncio.set_event_loop(None)
        # Whatever it does, it is none of this run.
        network.on_late = lambda _seconds: None
        loop.set_exception_handler(lambda _loop, _context: None)
        _forget(dead, loop)
        loop.close()
        web_app._cached_build_middleware.cache_clear()  # noqa: SLF001 - it keeps each application alive
    return outcome


def _place_of(exc: BaseException | None) -> str:
    """Return where *exc* was raised, for a violation."""
    frames = traceback.extract_tb(None if exc is None else exc.__traceback__)
    return f", raised in {frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def _own_timers(loop: SimulatedLoop) -> Iterator[asyncio.TimerHandle]:
    """Iterate over the timers that are not of the network."""
    for timer in loop.timers():
        callback = timer._callback  # type: ignore[attr-defined]  # noqa: SLF001 - its repr says it as well
        if not isinstance(getattr(callback, "__self__", None), Transport):
            yield timer


async def _run(world: World, outcome: Outcome, only: Collection[int] | None) -> None:
    plan = world.plan
    dice = random.Random(f"provider {plan.seed}")
    behaviour = Behaviour(
        ttft=dice.choice((0.0, 0.2, 2.0)),
        interval=dice.choice((0.0, 0.03, 0.2)),
        forgets=NO_RESPONSES if plan.responses == FORGETS else None,
        responses=plan.responses not in {LACKS, BRIDGED},
    )
    async with AsyncExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        simulators = {}
        names = PROVIDERS if plan.grouping is not None else PROVIDERS[: 1 + plan.spare]
        for number, name in enumerate(names):
            # Other seeds: from the same one all would draw the same ids of responses.
            kind = plan.message_kinds[min(number, 1)]
            own = replace(behaviour, messages=kind not in {"bridged", "lacks"})
            simulators[name] = NotingSimulator(
                name, own, plan.seed + number, world.calls, plan.refuses
            )
            await stack.enter_async_context(simulators[name])
        world.urls = urls = {name: each.base_url for name, each in simulators.items()}
        changes = plan.changes
        spare = MESSAGE_SETTINGS[plan.message_kinds[1]] if plan.messages else False
        if plan.grouping is not None:
            models = plan.grouping.models
            changes = with_spare(changes, urls["spare"], "", urls["third"], models, spare)
        elif plan.spare:
            changes = with_spare(changes, urls["spare"], plan.grouped, messages=spare)

        if plan.sql:
            changes = {**changes, **sql(path / "events.db")}

        def make(number: int, member: Member | None = None, operations: Sequence[str] = ()) -> Any:
            """Run a server, behind some *operations*."""
            url, own = urls["sim"], plan.operated(changes, *operations)
            return running(number, world.network, own, url, path, world.broken, member)

        for number in range(plan.instances):
            if world.cluster is None:
                world.add(await stack.enter_async_context(make(number)))
            else:
                world.cluster.make = make
                await world.cluster.start(number)
        world.start_looking()
        if world.cluster is not None:
            await world.cluster.renew()
        await _serve(world, outcome, only)
        world.stop_looking()
        if world.cluster is not None:
            await world.cluster.end()
    # What was written last is still under way.
    await asyncio.sleep(2 * USER_TIMEOUT)


async def _serve(world: World, outcome: Outcome, only: Collection[int] | None) -> None:
    """Let all clients do what they do, and the operator; then everything must be given back."""
    plan = world.plan
    base = f"http://{BALANCER[0]}"
    clients = [
        Client(plan, number, base)
        for number in range(plan.clients)
        if only is None or number in only
    ]
    tasks = {asyncio.ensure_future(_be(world, client)): client for client in clients}
    chosen = random.Random(f"operator {plan.seed}")
    operations = [
        asyncio.ensure_future(_operate(world, name, moment, chosen.random()))
        for name, moment in plan.operations.items()
    ]
    if plan.shared is not None and world.cluster is not None:
        events = plan.shared.events
        operations += [asyncio.ensure_future(world.cluster.happen(*event)) for event in events]
    if plan.grouping is not None:
        operations += [asyncio.ensure_future(world.kill(*kill)) for kill in plan.grouping.kills]
    await asyncio.wait(tasks)
    for task, client in tasks.items():
        if (exc := task.exception()) is not None:
            world.broken(f"client {client.number} ({client.face}): {exc!r}")
            outcome.ends["violation"] += 1
            continue
        for asked in (client, client.second, *client.questions):
            if asked is not None:
                if asked.outcome:
                    outcome.ends[asked.outcome] += 1
                world.sums.check_calls(asked)
                world.sums.check_attempts(asked)
                world.sums.check_members(asked)
                world.sums.check_turns(asked)
                world.sums.check_messages(asked)
    world.sums.check_learning()
    world.doors.check(world.calls)
    agents.check(clients, world.broken)
    if operations:
        await asyncio.gather(*operations)
    for _ in range(int(AFTERWARDS)):
        if not world.held():
            break
        await asyncio.sleep(1.0)
    if held := world.held():
        world.broken(f"still held: {json.dumps(held)}")


async def _be(world: World, client: Client) -> None:
    if not client.silent:
        await client.run()
        return
    await asyncio.sleep(client.begins)
    instance = world.balance(client)
    try:
        await be_silent(client, instance.listener.port)
    except ConnectionError as exc:
        client.outcome = f"gone: {type(exc).__name__}"
    except Violation:
        # A process that is stopped ends nothing.
        if not (instance.stopped or instance.stopped_for):
            raise
        client.outcome = "silent"


async def _operate(world: World, name: str, moment: float, chosen: float) -> None:
    """Do *name* at *moment* to one of the instances, as an operator would, or to all that share
    their limits.
    """
    await asyncio.sleep(moment)
    instances = world.instances
    if world.cluster is None:
        await instances[int(chosen * len(instances))].operate(name, world.plan)
    else:
        await world.cluster.operate(name, chosen)


def _forget(dead: list[asyncio.Task[Any]], loop: SimulatedLoop) -> None:
    """Let tasks that were killed vanish: what they would do at their end has no *loop* any more."""
    # A context is left behind where its task goes while it waits for something at its end. Taken
    # first, so that the loop is not asked to close it, which it would not do any more.
    contexts = list(loop._asyncgens)  # type: ignore[attr-defined]  # noqa: SLF001
    for task in dead:
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # noqa: SLF001
        coroutine = task.get_coro()
        # From Python 3.12 on, None of a task that began and ended in one step.
        if coroutine is not None:
            _close(coroutine.close)
    for context in contexts:
        if asyncio.iscoroutine(context.ag_await):
            _close(context.ag_await.close)


def _close(close: Callable[[], object]) -> None:
    """Close what may wait for something at its end, and then for something else."""
    for _ in range(MOST_ENDS):
        with contextlib.suppress(Exception):
            close()
            break
