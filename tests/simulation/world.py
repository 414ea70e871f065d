"""One run: the whole real server, its provider and its clients in one loop, in virtual time.

`play` returns what happened. It looks at the server whenever time is about to pass, and at the end, when
nothing may be held any more.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import tempfile
from collections import Counter, defaultdict, deque
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import aiohappyeyeballs
from aiohttp import web_app

from aioserver.config import Configuration
from aioserver.errors import ConfigurationError
from aioserver.providers.simulator.exchange import Behaviour
from aioserver.providers.simulator.server import ReceivedRequest, Simulator
from aioserver.server.app import open_server
from aioserver.server.reload import Reload
from aioserver.server.runner import Runner
from tests.simulation import clock
from tests.simulation.clients import Client
from tests.simulation.loop import SimulatedLoop
from tests.simulation.network import FakeSocket, Network
from tests.support.server import configured, write
from tests.support.virtual_loop import START

if TYPE_CHECKING:
    from collections.abc import Collection

    from aiohttp import web

    from aioserver.server.app import Server
    from tests.simulation.plan import Plan

_QUESTION = re.compile(rb"q[0-9]+(?= word)")
# Seconds after the last client until everything must be given back: the longest window, and some more.
AFTERWARDS = 120.0


@dataclass(slots=True)
class Outcome:
    """What came of a run: its *violations*, and how many clients ended in which way."""

    plan: Plan
    violations: list[str] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)
    virtual_seconds: float = 0.0
    connections: int = 0


@dataclass(slots=True)
class Call:
    """One request to the provider: the first word of its question, and whether an answer has begun."""

    question: str = ""
    begun: bool = False


CALL: ContextVar[Call] = ContextVar("CALL")


class _Received(deque[ReceivedRequest]):
    """The requests of a provider, each of which names its question in the call of its task."""

    def append(self, received: ReceivedRequest) -> None:
        match = _QUESTION.search(received.body)
        CALL.get().question = match[0].decode() if match else ""


class NotingSimulator(Simulator):
    """The simulated provider, which notes when it has begun to answer each question."""

    def __init__(self, behaviour: Behaviour, seed: int) -> None:
        super().__init__(behaviour, seed=seed)
        self.requests = _Received()
        self.begun: dict[str, list[float]] = defaultdict(list)

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        CALL.set(Call())
        return await super()._answer(request)

    def _count_token(self) -> None:
        super()._count_token()
        call = CALL.get()
        if not call.begun:
            call.begun = True
            self.begun[call.question].append(clock.Clock.now)


class World:
    """The server, and what must always hold of it."""

    def __init__(self, plan: Plan, outcome: Outcome) -> None:
        self._plan = plan
        self._outcome = outcome
        self._server: Server | None = None
        self._reloaded = False

    def broken(self, what: str) -> None:
        """Note that a promise was broken at this moment."""
        if len(self._outcome.violations) < 20:
            self._outcome.violations.append(f"at {clock.Clock.now - START:.3f} s: {what}")

    def watch(self, server: Server) -> None:
        """Look at *server* from now on."""
        self._server = server

    def look(self) -> None:
        """Check what must hold whenever nothing is about to happen in this moment."""
        server = self._server
        if server is None:
            return
        gate = server.context.admission.gate
        taken = {"connections": (gate.inside, gate.limit)}
        for name, provider in server.context.router.providers.items():
            queue = provider.stats().queue
            taken[name] = queue.inside, queue.limit
        for name, (inside, limit) in taken.items():
            if not self._reloaded and inside > limit:
                self.broken(f"{inside} of {limit} places are taken: {name}")
        if gate.waiting and gate.inside < gate.limit:
            self.broken(
                f"{gate.waiting} clients wait while {gate.limit - gate.inside} places are free"
            )
        stats = server.streams.stats()
        if stats.bytes > stats.max_bytes + SLACK:
            self.broken(f"{stats.bytes} of {stats.max_bytes} bytes are kept")
        bodies = server.context.settings.chat.websocket.concurrency.max_body_bytes
        if server.context.admission.body_bytes > bodies and not self._reloaded:
            self.broken(f"{server.context.admission.body_bytes} of {bodies} bytes of bodies")

    def held(self) -> dict[str, int]:
        """Return what requests hold, without zeros."""
        assert self._server is not None
        context = self._server.context
        counts = {
            "places": context.admission.gate.inside,
            "waiting": context.admission.gate.waiting,
            "body bytes": context.admission.body_bytes,
            "running": self._server.streams.stats().running,
            "kept": self._server.streams.stats().finished,
            "kept bytes": self._server.streams.stats().bytes,
            "sockets": len(context.sockets),
            "detached": context.gateway.lifetime.detached,
            "answers": context.gateway.running,
        }
        for name, provider in context.router.providers.items():
            stats = provider.stats()
            counts[f"{name} places"] = stats.queue.inside
            counts[f"{name} waiting"] = stats.queue.waiting
            counts[f"{name} busy"] = stats.pool.open - stats.pool.idle
        if self._plan.drains:
            # A server that has stopped forgets no answer: its process ends.
            del counts["kept"], counts["kept bytes"]
        return {name: count for name, count in counts.items() if count}

    def check_calls(self, client: Client, begun: list[float]) -> None:
        """Check that no answer of an id was asked for twice while it was kept."""
        window = self._plan.changes["chat.streams.resume_window"]
        if not client.has_id or client.question.fault:
            return
        for first, second in pairwise(begun):
            if second - first < window:
                self.broken(f"client {client.question.number} ({client.face}) was answered twice")

    async def operate(
        self, name: str, moment: float, server: Server, runner: Runner, reload: Reload, base: str
    ) -> None:
        """Do *name* at *moment*, as an operator would."""
        await asyncio.sleep(moment)
        if name == "drain":
            await runner.end()
            return
        self._reloaded = True
        changes = dict(self._plan.changes)
        if name == "reload limits":
            changes["chat.websocket.concurrency.max_connections"] = 5
            changes["llm.providers.sim.http_client.concurrent_requests"] = 2
        else:
            changes["llm.providers.sim.http_client.max_connections"] = 201
            changes["llm.providers.sim.http_client.keepalive_expiry"] = 1.0
            changes["llm.providers.sim.headers"] = {"X-New": "1"}
        write(base, changes, Path(reload.source))
        if not await reload.once():
            try:
                Configuration.load(Path(reload.source), environ={})
            except ConfigurationError as error:
                self.broken(f"the configuration was not applied: {error}")


# What may be kept beyond the bound for a moment: one piece from a provider for each answer under way.
SLACK = 1 << 20


def play(plan: Plan, only: Collection[int] | None = None) -> Outcome:
    """Run *plan*, or its clients *only*, and return what happened."""
    clock.seed(plan.seed)
    outcome = Outcome(plan)
    network = Network(random.Random(f"network {plan.seed}"))
    loop = SimulatedLoop(network)
    asyncio.set_event_loop(loop)
    faults: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _loop, context: faults.append(context))
    world = World(plan, outcome)
    loop.on_pause = world.look
    try:
        loop.run_until_complete(_run(plan, world, outcome, network, only))
        left = [task for task in asyncio.all_tasks(loop) if not task.done()]
        for task in left:
            world.broken(f"a task is left: {task.get_coro()}")
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.wait(left))
    except Exception as exc:  # noqa: BLE001 - whatever it is, it is a finding
        world.broken(f"the run failed: {exc!r}")
    finally:
        for context in faults:
            world.broken(f"{context.get('message')}: {context.get('exception')!r}")
        outcome.virtual_seconds = clock.Clock.now - START
        outcome.connections = network.made
        asyncio.set_event_loop(None)
        loop.close()
        web_app._cached_build_middleware.cache_clear()  # noqa: SLF001 - it keeps each application alive
    return outcome


async def _run(
    plan: Plan, world: World, outcome: Outcome, network: Network, only: Collection[int] | None
) -> None:
    dialers: dict[asyncio.Task[Any], Client] = {}

    async def start_connection(addr_infos: Any, **_kwargs: Any) -> FakeSocket:
        client = dialers.get(_current())
        # The server's own connections to its provider are good: the provider has faults of its own.
        return FakeSocket(addr_infos[0][4], None if client is None else client.dial())

    with mock.patch.object(aiohappyeyeballs, "start_connection", start_connection):
        await _play(plan, world, outcome, network, only, dialers)


async def _play(
    plan: Plan,
    world: World,
    outcome: Outcome,
    network: Network,
    only: Collection[int] | None,
    dialers: dict[asyncio.Task[Any], Client],
) -> None:
    dice = random.Random(f"provider {plan.seed}")
    behaviour = Behaviour(
        ttft=dice.choice((0.0, 0.2, 2.0)), interval=dice.choice((0.0, 0.03, 0.2))
    )
    with tempfile.TemporaryDirectory() as folder:
        async with NotingSimulator(behaviour, plan.seed) as simulator:
            configuration = configured(
                simulator.base_url, plan.changes, Path(folder) / "config.yaml"
            )
            async with open_server(configuration.settings) as server:
                runner = Runner(server)
                await runner.setup()
                assert runner.server is not None
                listener = network.listen(runner.server)
                world.watch(server)
                base = f"http://127.0.0.1:{listener.port}"
                reload = Reload(server, runner, configuration, {})
                clients = [
                    Client(plan, number, base)
                    for number in range(plan.clients)
                    if only is None or number in only
                ]
                tasks = {}
                for client in clients:
                    task = asyncio.ensure_future(client.run())
                    tasks[task] = dialers[task] = client
                operations = [
                    asyncio.ensure_future(
                        world.operate(name, moment, server, runner, reload, simulator.base_url)
                    )
                    for name, moment in plan.operations.items()
                ]
                await asyncio.wait(tasks)
                for task, client in tasks.items():
                    if (exc := task.exception()) is not None:
                        world.broken(f"client {client.question.number} ({client.face}): {exc!r}")
                        outcome.ends["violation"] += 1
                    else:
                        outcome.ends[client.outcome] += 1
                for client in clients:
                    world.check_calls(client, simulator.begun[client.question.name])
                if operations:
                    await asyncio.gather(*operations)
                await asyncio.sleep(AFTERWARDS)
                if held := world.held():
                    world.broken(f"still held: {json.dumps(held)}")
                if not plan.drains:
                    await runner.end()
                await runner.cleanup()
            world.watch(None)  # type: ignore[arg-type]


def _current() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task
