"""One run: the whole real server, its provider and its clients in one loop, in virtual time.

`play` returns what happened. It looks at the server whenever time is about to pass, and at the end, when
nothing may be held any more.
"""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp.connector
from aiohttp import web_app

from aioserver.config import Configuration
from aioserver.errors import ConfigurationError
from aioserver.providers.simulator.exchange import Behaviour
from aioserver.providers.simulator.server import Simulator
from aioserver.server.app import open_server
from aioserver.server.reload import Reload
from aioserver.server.runner import Runner
from tests.simulation import clock
from tests.simulation.clients import Client
from tests.simulation.loop import SimulatedLoop
from tests.simulation.network import FakeSocket, Network
from tests.simulation.truth import Violation
from tests.support.server import configured, write

if TYPE_CHECKING:
    from collections.abc import Collection

    from aiohttp import web

    from aioserver.server.app import Server
    from tests.simulation.network import Dial
    from tests.simulation.plan import Plan

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


class CountingSimulator(Simulator):
    """The simulated provider, which notes the calls for each question."""

    def __init__(self, behaviour: Behaviour, seed: int) -> None:
        super().__init__(behaviour, seed=seed, keep=0)
        # By the first word of the question: the calls that began to answer.
        self.answered: Counter[str] = Counter()

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        return await super()._answer(request)


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
            self._outcome.violations.append(f"at {clock.Clock.now - clock.START:.3f} s: {what}")

    def watch(self, server: Server) -> None:
        """Look at *server* from now on."""
        self._server = server

    def look(self) -> None:
        """Check what must hold whenever nothing is about to happen in this moment."""
        server = self._server
        if server is None:
            return
        gate = server.context.admission.gate
        gates = {"connections": gate}
        for name, provider in server.context.router.providers.items():
            gates[name] = provider._gate  # noqa: SLF001 - `stats` would cost more than the run
        for name, one in gates.items():
            if not self._reloaded and one.inside > one.limit:
                self.broken(f"{one.inside} of {one.limit} places are taken: {name}")
        if gate.waiting and gate.inside < gate.limit:
            self.broken(f"{gate.waiting} clients wait while {gate.limit - gate.inside} places are free")
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

    async def operate(self, name: str, moment: float, server: Server, runner: Runner, reload: Reload, base: str) -> None:
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
    network = Network(random.Random(f"network {plan.seed}"))  # noqa: S311 - no secret comes from it
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
        outcome.virtual_seconds = clock.Clock.now - clock.START
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
        address = addr_infos[0][4]
        client = dialers.get(_current())
        dial: Dial | None = client.dial() if client is not None else provider_dial()
        return FakeSocket(address, dial)

    dice = random.Random(f"provider {plan.seed}")  # noqa: S311 - no secret comes from it

    def provider_dial() -> Dial | None:
        return None

    aiohttp.connector.aiohappyeyeballs.start_connection = start_connection
    behaviour = Behaviour(ttft=dice.choice((0.0, 0.2, 2.0)), interval=dice.choice((0.0, 0.03, 0.2)))
    with tempfile.TemporaryDirectory() as folder:
        async with CountingSimulator(behaviour, plan.seed) as simulator:
            configuration = configured(simulator.base_url, plan.changes, Path(folder) / "config.yaml")
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
