"""A network in memory: listeners, and the connections to them (transport.py)."""

from __future__ import annotations

import asyncio
import random
from contextvars import Context, ContextVar, copy_context
from typing import TYPE_CHECKING

from tests.simulation.dials import Dial
from tests.simulation.transport import FakeSocket, Transport

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.simulation.loop import SimulatedLoop

    Factory = Callable[[], asyncio.Protocol]

FIRST_PORT = 10_000
# Seconds by which whoever dials may give up too late.
LATE = 0.01
# The instance in whose task or callback something runs; -1: a client, or the provider.
INSTANCE: ContextVar[int] = ContextVar("INSTANCE", default=-1)


class Listener:
    """What `create_server` returns: a port on which *factory* makes the protocols of connections.

    What its connections do runs for *instance*: see `INSTANCE`.
    """

    def __init__(self, network: Network, port: int, factory: Factory, instance: int) -> None:
        self._network = network
        self.port = port
        self.factory = factory
        self.instance = instance
        self.sockets = [FakeSocket(("127.0.0.1", port))]
        # The ends of those who have dialled, while their connections are open.
        self.dialled: set[Transport] = set()

    def close(self) -> None:
        listeners = self._network.listeners
        for port in [port for port, listener in listeners.items() if listener is self]:
            del listeners[port]

    def hand_over(self, successor: Listener) -> None:
        """Let whoever dials here be accepted by *successor*, as on a socket that both share."""
        listeners = self._network.listeners
        for port in [port for port, listener in listeners.items() if listener is self]:
            listeners[port] = successor

    async def wait_closed(self) -> None:
        """Return: connections that are open stay open, as after a `close` of asyncio's server."""

    def is_serving(self) -> bool:
        return self.port in self._network.listeners

    def context(self) -> Context:
        """Return the context in which a new connection runs: nothing of whoever dials is in it."""
        context = Context()
        context.run(INSTANCE.set, self.instance)
        return context


class Network:
    """All listeners and connections of a run.

    *on_made* is called with each connection that was made: its listener, and the end of whoever
    dials. *on_late* is called with the seconds that a dial took which should have been given up
    before.
    """

    def __init__(self, dice: random.Random) -> None:
        self.loop: SimulatedLoop
        self.listeners: dict[int, Listener] = {}
        self.made = 0
        # The ends of the connections that are open.
        self.open: set[Transport] = set()
        self.on_made: Callable[[Listener, Transport], None] = lambda _listener, _near: None
        self.on_late: Callable[[float], None] = lambda _seconds: None
        self._dice = dice
        self._ports = FIRST_PORT

    def listen(self, factory: Factory, instance: int = -1) -> Listener:
        """Return a listener on a new port, whose connections get protocols from *factory*."""
        self._ports += 1
        listener = Listener(self, self._ports, factory, instance)
        self.listeners[self._ports] = listener
        return listener

    async def connect(
        self, factory: Factory, sock: FakeSocket
    ) -> tuple[asyncio.Transport, asyncio.Protocol]:
        """Connect to the listener at the address of *sock*.

        Raises:
            ConnectionRefusedError: nobody listens there, or the dial is refused.
        """
        dial = sock.dial or Dial(random.Random(self._dice.random()))
        began = self.loop.time()
        try:
            await asyncio.sleep(dial.there.latency + dial.accept_after)
        finally:
            seconds = self.loop.time() - began
            if 0 < dial.patience < seconds - LATE:
                self.on_late(seconds)
        listener = self.listeners.get(sock.address[1])
        if listener is None or dial.refused:
            raise ConnectionRefusedError(111, "refused")
        self.made += 1
        caller = (dial.address, 40_000 + self.made % 20_000)
        near = Transport(self, dial.dice, dial.there, sock.address, copy_context())
        far = Transport(self, dial.dice, dial.back, caller, listener.context())
        near.peer, far.peer = far, near
        near.owner, far.owner = dial.owner, listener.instance
        near.listener = listener
        listener.dialled.add(near)
        near.protocol, far.protocol = factory(), listener.factory()
        self.open |= {near, far}
        far.context.run(far.protocol.connection_made, far)
        near.protocol.connection_made(near)
        self.on_made(listener, near)
        return near, near.protocol
