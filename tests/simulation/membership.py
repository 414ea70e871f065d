"""An instance of a run as a member of the cluster: the real parts, over the run's own shared
server.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from aioserver.gateway.commands import Commands
from aioserver.limits.fixed_share import Scope
from aioserver.wings.cluster.grants import State
from aioserver.wings.cluster.lease_messages import TIMES
from aioserver.wings.cluster.limits import SharedLimits
from aioserver.wings.cluster.membership import LEAVE_TIMEOUT, Membership
from aioserver.wings.cluster.renewer import Renewer
from tests.simulation.shared_server import (
    SimulatedBus,
    SimulatedConnection,
    SimulatedStore,
    SimulatedSubscription,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from aioserver.wings.cluster.leases import Leases
    from aioserver.wings.cluster.peer_messages import Message
    from aioserver.wings.cluster.remote_streams import RemoteStreams
    from tests.simulation.shared_server import SharedServer


class _Renewer(Renewer):
    """Carries the calls over the run's own network."""

    def __init__(
        self,
        make_leases: Callable[[Callable[[], None]], Leases],
        server: SharedServer,
        number: int,
    ) -> None:
        super().__init__(make_leases, "redis://127.0.0.1", "simulation")
        self.connection = SimulatedConnection(server, number, self.leases.times.bound)  # type: ignore[assignment]
        self.subscription = SimulatedSubscription()  # type: ignore[assignment]


class Member(Membership):
    """Instance *number*, which shares *server* with the others.

    *left_over* has how many places of each limit it had when it was alone, as far as they did not
    end since.
    """

    def __init__(self, server: SharedServer, number: int, fixed: tuple[int, int] | None) -> None:
        self.server = server
        self.number = number
        self.instance = f"i{number}"
        self.left_over: dict[str, int] = defaultdict(int)
        # How often it was alone.
        self.alone = 0
        self._numbers, self._times = fixed, TIMES
        self.renewer = _Renewer(self._make_leases, server, number)
        self.leases = self.renewer.leases
        # Instances that know how many they are, are the workers of one host, and share
        # connections.
        scope = None if fixed is None else Scope("host", *fixed)
        self.limits = limits = SharedLimits(self.leases, scope)
        self.make_gate, self.observe = limits.make_gate, limits.observe
        self.make_quota, self.make_admission = limits.make_quota, limits.make_admission
        self.bus = None
        self.commands = Commands(SimulatedStore(server, number, self.instance), "")
        self.known: RemoteStreams | None = None
        self.address = "simulation"
        self._incidents = None
        self._joined = asyncio.Event()
        # It does not wait until the server gives something: what begins before is a part of the
        # simulation.
        self._fixed = True
        self._streams = self._totals = None
        server.join(number, self.leases)

    def _make_bus(  # type: ignore[override]
        self, *, on_message: Callable[[str, Message], None], on_deaf: Callable[[str], None]
    ) -> SimulatedBus:
        self.bus = SimulatedBus(  # type: ignore[assignment]
            self.server, self.number, self.instance, on_message=on_message, on_deaf=on_deaf
        )
        return self.bus  # type: ignore[return-value]

    def streams(self) -> RemoteStreams:
        """Return what knows the streams of other instances."""
        self.known = super().streams()
        return self.known

    async def close(self) -> None:
        """Tell the others that nothing is inside any more."""
        await self.renewer.leave(LEAVE_TIMEOUT)
        await self.renewer.close()
        self.server.forget(self.instance)

    def held(self) -> dict[str, int]:
        """Return what is read at other instances, and here of theirs."""
        assert self.known is not None
        stats = self.known.stats()
        return {"claims": stats.claims, "links": stats.links, "mirrors": stats.mirrors}

    def _state_changed(self, old: State, new: State, why: str) -> None:
        if State.ALONE in (old, new):
            for name, grant in self.leases._grants.items():  # noqa: SLF001 - no snapshot has it
                self.left_over[name] = max(0, grant.user.inside)
        self.alone += new is State.ALONE
        super()._state_changed(old, new, why)


@asynccontextmanager
async def joined(
    server: SharedServer, number: int, fixed: tuple[int, int] | None
) -> AsyncIterator[Member]:
    """Let instance *number* be a member for the length of the block."""
    member = Member(server, number, fixed)
    try:
        await member.open()
        yield member
    finally:
        await member.close()
