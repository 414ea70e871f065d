"""An instance of a run as a member of the cluster: the real parts, over the run's own shared
server.
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, TypeVar, cast

from aioserver.limits.fixed_share import Scope
from aioserver.wings.cluster.answers.peer_network import CONNECT, Gone, PeerNetwork, Unreachable
from aioserver.wings.cluster.limits.grants import State
from aioserver.wings.cluster.membership import ConnectionClasses, Membership
from tests.simulation.dials import draw_dial
from tests.simulation.shared_server import (
    NAME,
    URL,
    SimulatedConnection,
    SimulatedStore,
    SimulatedSubscription,
)
from tests.simulation.transport import FakeSocket, Transport

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from aioserver.wings.cluster.answers.remote_streams import RemoteStreams
    from aioserver.wings.cluster.redis_commands import RedisCommands
    from tests.simulation.network import Listener
    from tests.simulation.shared_server import SharedServer

    P = TypeVar("P", bound=asyncio.Protocol)


# Seconds between two looks at a connection on which nothing arrives; at the second one the kernel
# has noticed it, as TCP's keepalive does.
KEEPALIVE = 1.5


class SimulatedNetwork(PeerNetwork):
    """The ways of instance *number*, called *name*, to the other ones."""

    def __init__(self, server: SharedServer, number: int, name: str) -> None:
        self._shared, self._number, self._name = server, number, name
        self._dice = random.Random(f"network {name}")
        self._listener: Listener | None = None

    async def listen(self, make: Callable[[], asyncio.Protocol]) -> None:
        """Accept connections."""
        self._listener = self._shared.loop.network.listen(make, self._number)
        self._shared.ports[self._name] = self._listener.port

    async def dial(self, name: str, make: Callable[[], P]) -> tuple[asyncio.Transport, P]:
        """Return a new connection to the instance *name*.

        Raises:
            Gone: nobody listens there.
        """
        if (port := self._shared.ports.get(name)) is None:
            raise Gone(name)
        dial = draw_dial(
            self._shared.faults.links, self._dice, owner=self._number, patience=CONNECT
        )
        address = FakeSocket(("127.0.0.1", port), dial)
        made: list[P] = []

        def note() -> P:
            made.append(make())
            return made[0]

        loop = self._shared.loop
        try:
            async with asyncio.timeout(CONNECT):
                transport, _protocol = await loop.network.connect(note, address)
        except ConnectionRefusedError as exc:
            raise Gone(name) from exc
        except TimeoutError:
            raise Unreachable("no connection in time") from None
        assert isinstance(transport, Transport)
        if (dial.there.black_hole_at, dial.back.black_hole_at) != (None, None):
            self._keep_alive(transport, lost=False)
        return transport, made[0]

    def _keep_alive(self, near: Transport, *, lost: bool) -> None:
        """End the connection of *near* some seconds after a way of it has been *lost*."""
        if near.dead:
            return
        if lost:
            near.abort()
            near.peer.abort()
            return
        lost = near.lost_in_black_hole or near.peer.lost_in_black_hole
        self._shared.loop.call_later(KEEPALIVE, partial(self._keep_alive, near, lost=lost))

    def forget(self, token: str) -> None:
        """Do nothing: there is no file."""

    def close(self) -> None:
        """Accept nothing any more."""
        if self._listener is not None:
            self._listener.close()


class Member(Membership):
    """Instance *number*, which shares *server* with the others.

    *left_over* has how many places of each limit it had when it was alone, as far as they did not
    end since.
    """

    def __init__(self, server: SharedServer, number: int, fixed: tuple[int, int] | None) -> None:
        self.server = server
        self.number = number
        self.left_over: dict[str, int] = defaultdict(int)
        # How often it was alone.
        self.alone = 0
        self.known: RemoteStreams | None = None
        name = f"i{number}"
        classes = ConnectionClasses(
            renewals=partial(SimulatedConnection, server, number),
            words=SimulatedSubscription,
            commands=lambda _url: cast("RedisCommands", SimulatedStore(server, number, name)),
        )
        # Instances that know how many they are, are the workers of one host, and share
        # connections. None waits until the server gives something: what begins before is a part of
        # the simulation.
        scope = None if fixed is None else Scope("host", *fixed)
        self.network = SimulatedNetwork(server, number, name)
        super().__init__(
            URL, NAME, name, self.network, fixed, scope=scope, classes=classes, patient=False
        )
        server.join(number, self.leases)

    def streams(self) -> RemoteStreams:
        """Return what knows the streams of other instances."""
        self.known = super().streams()
        return self.known

    def held(self) -> dict[str, int]:
        """Return what is read at other instances, and here of theirs."""
        assert self.known is not None
        stats = self.known.stats()
        return {"links": stats.links, "tunnels": stats.tunnels}

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
