"""One server of a run, with its runner, its listener and its configuration file."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from contextvars import copy_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aioserver.config import Configuration
from aioserver.config.faults import ConfigurationError
from aioserver.server.app import open_server
from aioserver.server.connections import FAREWELL
from aioserver.server.reload import Reload
from aioserver.server.runner import Runner
from tests.simulation.book import Book
from tests.simulation.clock import Clock
from tests.simulation.configuration import write_issuer_keys
from tests.simulation.network import INSTANCE
from tests.support.members import wings_of
from tests.support.server import configured, write
from tests.support.stored_responses import questions_in, stored_in

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    from aioserver.server.app import Server
    from tests.simulation.membership import Member
    from tests.simulation.network import Listener, Network
    from tests.simulation.plan import Plan

# Seconds by which a stop may be late: connections that end are read for a second, and aborted
# after another.
LATE = 3.0


class Instance:
    """Server *number* of a run; *member*: what it shares with the others, None if nothing.

    *ended*: whether it was told to stop; *killed*: whether nothing of it runs any more; *closed*:
    whether its process has ended. *broken* is called with each promise that it breaks.
    """

    def __init__(
        self,
        number: int,
        server: Server,
        runner: Runner,
        reload: Reload,
        listener: Listener,
        changes: dict[str, Any],
        base_url: str,
        broken: Callable[[str], None],
        member: Member | None = None,
    ) -> None:
        self.member = member
        self.killed = self.closed = self.stopped = False
        # Its place among those that know how many they are.
        self.rank = number
        # Seconds for which it was stopped.
        self.stopped_for = 0.0
        self.context = copy_context()
        # Done when its process is to end, and when nothing of it runs any more.
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.number = number
        self.server = server
        self.runner = runner
        self.listener = listener
        self.ended = False
        # When it was replaced, 0.0 if it was not; set when its answers have to end.
        self.former_since, self.hurried = 0.0, asyncio.Event()
        self.before_reload: Callable[[], None] = lambda: None
        self._reload = reload
        self._changes = changes
        self._base_url = base_url
        self._broken = broken

    @property
    def former(self) -> bool:
        """Whether it has a successor, and accepts nothing."""
        return self.former_since > 0

    def held(self) -> dict[str, int]:
        """Return what requests hold, without zeros."""
        context = self.server.context
        streams = self.server.streams.stats()
        counts = {
            "places": context.admission.gate.inside,
            "waiting": context.admission.gate.waiting,
            "slots": context.admission.gate.slots,
            "tickets": len(context.admission.scheduler.waiting),
            "body bytes": context.admission.body_bytes,
            "running": streams.running,
            "kept": streams.finished,
            "kept bytes": streams.bytes,
            "sockets": len(context.sockets),
            "lent": context.admission.lent,
            "detached": context.gateway.lifetime.detached,
            "background": context.gateway.lifetime.background,
            "answers": context.gateway.running,
            "stored responses": streams.responses,
            "responses of lanes": len(stored_in(self.server).held._held),  # noqa: SLF001 - no snapshot has it
        }
        counts["attempts"] = context.usage.running
        counts["questions"] = len(questions_in(self.server))
        for name, provider in context.router.providers.items():
            stats = provider.stats()
            counts[f"{name} places"] = stats.queue.inside
            counts[f"{name} waiting"] = stats.queue.waiting
            counts[f"{name} background"] = sum(stats.background)
            counts[f"{name} slots"] = sum(part.slots for part in provider.capacity.parts)
            counts[f"{name} trials"] = provider.health.breaker._trials  # noqa: SLF001 - as below
            counts[f"{name} busy"] = stats.pool.open - stats.pool.idle
            counts[f"{name} connections"] = provider.pools.gate.inside
        for name, group in context.router.groups.items():
            counts[f"{name} waiting"] = group.waiting
        for name, quota in context.access.quotas().items():
            counts[f"{name} answers"] = quota.running
            counts[f"{name} waiting at its key"] = len(quota.queue)
            counts[f"{name} slots"] = quota.resource.slots
            counts[f"{name} tokens"] = quota.budget.reserved
            counts[f"{name} connections"] = quota.connections
        if self.member is not None:
            counts |= self.member.held()
        if self.ended:
            # A server that has stopped forgets no answer: its process ends.
            del counts["kept"], counts["kept bytes"], counts["stored responses"]
        return {name: count for name, count in counts.items() if count}

    async def do(self, work: Coroutine[Any, Any, None]) -> None:
        """Let the process itself do *work*; return if it is killed meanwhile."""
        task = asyncio.get_running_loop().create_task(work, context=self.context.copy())
        await asyncio.wait({task, self.gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()

    async def operate(self, name: str, plan: Plan) -> None:
        """Do *name*, as an operator of *plan* would."""
        if name == "drain":
            await self.end()
        if self.ended:
            return
        self._changes = plan.operated(self._changes, name)
        write(self._base_url, self._changes, Path(self._reload.source))
        self.before_reload()
        if not await self._reload.once():
            try:
                Configuration.load(Path(self._reload.source), environ={})
            except ConfigurationError as error:
                self._broken(f"the configuration was not applied: {error}")

    async def end(self) -> None:
        """Stop, as on a signal."""
        if self.ended:
            return
        self.ended = True
        settings = self.server.context.settings.chat.websocket
        promised = (
            (0.0 if self.former else settings.drain_delay) + settings.shutdown_timeout + FAREWELL
        )
        began = Clock.now
        await self.runner.end()
        if Clock.now - began > promised + LATE + self.stopped_for:
            self._broken(f"the stop took {Clock.now - began:.1f} s instead of {promised} s")


@asynccontextmanager
async def running(
    number: int,
    network: Network,
    changes: dict[str, Any],
    base_url: str,
    folder: Path,
    broken: Callable[[str], None],
    member: Member | None = None,
) -> AsyncIterator[Instance]:
    """Run server *number*, whose provider is at *base_url*, until the end of the block; *member*:
    see `Instance`.
    """
    token = INSTANCE.set(number)
    try:
        changes = dict(changes)
        write_issuer_keys(changes, folder)
        configuration = configured(base_url, changes, folder / f"config-{number}.yaml")
        async with open_server(configuration.settings, wings=wings_of(member)) as server:
            # What `usage.path` would open writes a real file.
            roles = changes.get("auth.jwt", {}).get("limits", ())
            names = {"", *(entry["name"] for entry in changes.get("auth.keys", ()))}
            names |= {f"jwt:{role}" for role in roles}
            server.context.usage.ledger = Book(broken, names)  # type: ignore[assignment]
            runner = Runner(server)
            await runner.setup()
            assert runner.server is not None
            listener = network.listen(runner.server, number)
            reload = Reload(server, runner, configuration, {})
            instance = Instance(
                number, server, runner, reload, listener, dict(changes), base_url, broken, member
            )
            try:
                yield instance
            finally:
                await instance.end()
                await runner.cleanup()
    finally:
        INSTANCE.reset(token)
