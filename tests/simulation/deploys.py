"""Deploys: each instance gets a successor and becomes a former process, as the workers of a parent
do at SIGUSR2 (workers/supervisor.py).

    kept        an answer in a former process is cut by nothing but `replace_timeout`, a third
                deploy, and a stop
    refused     a former process refuses nothing before its end
    age         it ends within `replace_timeout` and `shutdown_timeout`
    revoked     a key that was taken away has no answer some seconds later, in any process
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aioserver.errors import ServerShutdown
from aioserver.gateway.request import shutdown_error
from aioserver.server.connections import FAREWELL
from aioserver.workers.supervisor import MOST_REPLACED
from tests.simulation.clock import Clock
from tests.simulation.network import INSTANCE
from tests.simulation.noting import noted

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from tests.simulation.instance import Instance

# Seconds by which a former process may end late; and after which a revoked key has no answer.
LATE, REVOKED = 3.0, 5.0
STOPPING = shutdown_error().message


class Deploys:
    """Looks at the former ones of *instances*, and calls *broken* with what they have broken."""

    def __init__(self, instances: Sequence[Instance], broken: Callable[[str], None]) -> None:
        self._instances = instances
        self._broken = broken
        # When each caller's key was taken away.
        self.revoked: dict[str, float] = {}

    def too_old(self, rank: int) -> Instance | None:
        """Return the former process of *rank* that has to end before another one may begin."""
        former = [
            each
            for each in self._instances
            if each.rank == rank and each.former and not (each.killed or each.closed)
        ]
        return former[0] if len(former) >= MOST_REPLACED else None

    async def retire(self, instance: Instance) -> None:
        """Let *instance* be a former process until its end, as at SIGUSR1."""
        chat = instance.server.context.settings.chat
        await instance.runner.retire(instance.hurried)
        kept, running = Clock.now - instance.former_since, instance.server.context.gateway.running
        if running and kept < chat.websocket.replace_timeout and not instance.hurried.is_set():
            self._broken(f"{running} answers are to end {kept:.2f} s after a deploy")
        await instance.end()

    def look(self) -> None:
        """Look at former processes, and at the answers of revoked keys."""
        for instance in self._instances:
            if instance.killed or instance.closed or instance.stopped:
                continue
            if instance.former:
                websocket = instance.server.context.settings.chat.websocket
                most = websocket.replace_timeout + websocket.shutdown_timeout + FAREWELL + LATE
                age = Clock.now - instance.former_since
                if age > most + instance.stopped_for:
                    self._broken(f"a process is a former one for {age:.1f} s, at most {most} s")
            # A process that stops reads no configuration any more, and ends soon.
            if self.revoked and not instance.ended:
                self._look_at_revoked(instance)

    def _look_at_revoked(self, instance: Instance) -> None:
        for stream in instance.server.streams.running():
            since = self.revoked.get(stream.caller.name)  # type: ignore[attr-defined]
            if since is not None and Clock.now > since + REVOKED + instance.stopped_for:
                name = stream.caller.name  # type: ignore[attr-defined]
                self._broken(f"{name} has an answer {Clock.now - since:.1f} s after its key's end")

    def patches(self) -> AbstractContextManager[object]:
        """Let refusals be noted, in the block."""
        return noted(ServerShutdown, "__init__", before=self._refuses)

    def _refuses(self, _error: ServerShutdown, message: str, **_more: Any) -> None:
        if message != STOPPING:
            return
        for instance in self._instances:
            if instance.number == INSTANCE.get() and instance.former and not instance.ended:
                self._broken("a former process refuses a request, or ends an answer")
