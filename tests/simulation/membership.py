"""An instance of a run as a member of the cluster: the real parts, over the run's own shared server."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from aioserver.gateway.commands import Commands
from aioserver.wings.cluster.grants import State
from aioserver.wings.cluster.leases import Shares
from aioserver.wings.cluster.limits import SharedLimits
from aioserver.wings.cluster.renewer import Settler
from aioserver.wings.cluster.wing import LEAVE_TIMEOUT, Membership
from tests.simulation.shared_server import (
    SimulatedBus,
    SimulatedConnection,
    SimulatedStore,
    SimulatedSubscription,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aioserver.streams.store import StreamStore
    from aioserver.wings.cluster.remote_streams import RemoteStreams
    from tests.simulation.shared_server import SharedServer


class _Settler(Settler):
    """Carries the calls over the run's own network."""

    def __init__(self, shares: Shares, server: SharedServer, number: int) -> None:
        super().__init__(shares, "redis://127.0.0.1", "simulation")
        self.connection = SimulatedConnection(server, number, shares.times.bound)  # type: ignore[assignment]
        self.subscription = SimulatedSubscription()  # type: ignore[assignment]


class Member(Membership):
    """Instance *number*, which shares *server* with the others.

    *left_over* has how many places of each limit it had when it was alone, as far as they did not end since.
    """

    def __init__(self, server: SharedServer, number: int, fixed: tuple[int, int] | None) -> None:
        self.server = server
        self.number = number
        self.instance = f"i{number}"
        self.left_over: dict[str, int] = defaultdict(int)
        # How often it was alone.
        self.alone = 0
        self.shares = Shares(
            self.instance,
            fixed=fixed,
            on_state=self._state_changed,
            on_told=lambda *told: self.limits.told(*told),
        )
        self.limits = SharedLimits(self.shares)
        self.shares.on_members = self.limits.instances_changed
        self.settler = _Settler(self.shares, server, number)
        self.bus = SimulatedBus(server, number, self.instance)  # type: ignore[assignment]
        self.commands = Commands(SimulatedStore(server, number, self.instance), "")
        self.known: RemoteStreams | None = None
        self.address = "simulation"
        self._incidents = None
        self._joined = asyncio.Event()
        # It does not wait until the server gives something: what begins before is a part of the simulation.
        self._fixed = True
        self._streams = None
        server.join(number, self.shares)

    def streams(self, store: StreamStore) -> RemoteStreams:
        """Return what knows the streams of other instances."""
        self.known = super().streams(store)
        return self.known

    async def close(self) -> None:
        """Tell the others that nothing is inside any more."""
        await self.settler.leave(LEAVE_TIMEOUT)
        await self.settler.close()
        self.server.forget(self.instance)

    def held(self) -> dict[str, int]:
        """Return what is read at other instances, and here of theirs."""
        assert self.known is not None
        stats = self.known.stats()
        return {"claims": stats.claims, "links": stats.links, "mirrors": stats.mirrors}

    def _state_changed(self, old: State, new: State, why: str) -> None:
        if State.ALONE in (old, new):
            for name, holding in self.shares._holdings.items():  # noqa: SLF001 - no snapshot has it
                self.left_over[name] = max(0, holding.user.inside)
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
