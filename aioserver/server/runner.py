"""Runs the application on our connections, under the HTTP limits of the configuration.

aiohttp's runner starts and ends the application, and finds the handler of a request. The
connections, and the sockets on which they are accepted, are ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from typing import TYPE_CHECKING

from aiohttp import web

from aioserver.server import listener
from aioserver.server.connection import LAST_CALL, ConnectionServer
from aioserver.server.connections import FAREWELL, accept_peers, arguments_of, options_of
from aioserver.server.middleware import Dispatcher

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence
    from collections.abc import Set as AbstractSet

    from aioserver.config.settings import Chat
    from aioserver.server.app import Server
    from aioserver.server.listener import Balance, Listening, Site


# Seconds beside LAST_CALL for the requests that arrive during a connection's last call.
LAST_REQUESTS = 0.3
# Seconds for anything that aiohttp itself may leave behind, after `end`.
SHUTDOWN = 1.0
# Seconds between two checks of the queues, the handshakes and the answers of a former process.
LOOK = 0.1


class Runner:
    """Listens, and runs the application of *server* on our connections; *setup* comes first.

    *balance* decides when this process accepts, where several serve the same sockets.
    """

    def __init__(self, server: Server, balance: Balance | None = None) -> None:
        self._owner = server
        self._balance = balance
        self._application = web.AppRunner(server.app)
        self._server: ConnectionServer | None = None
        # The number of answers that `end` has cut.
        self.cut = 0

    async def setup(self) -> None:
        """Start the application, and make the server of its connections."""
        await self._application.setup()
        plain = self._application.server
        assert plain is not None
        handler = Dispatcher(self._owner.app, plain.request_handler, self._owner.middleware)
        make = ConnectionServer if self._balance is None else self._balance.server
        self._server = make(handler, **arguments_of(self._owner.context))
        await accept_peers(self._owner.wings, self._owner.context, handler)

    async def listen(self, inherited: Sequence[socket.socket] = ()) -> list[Listening]:
        """Listen where the configuration says, or on the *inherited* sockets: see
        `listener.listen`.

        Raises:
            OSError: the address is in use, or is not one of this machine.
        """
        context, balance = self._owner.context, self._balance
        chat = context.settings.chat
        listening = await listener.listen(
            self.server,
            chat.websocket,
            inherited=inherited,
            balance=balance,
            handshakes=None if self._owner.tls is None else self._owner.tls.handshakes,
        )
        self._owner.listening.extend(entry.sock for entry in listening)
        if balance is not None:
            balance.start(lambda: context.admission.gate.waiting)
        return listening

    def apply(self, chat: Chat) -> None:
        """Use the limits of *chat* for connections that are accepted from now on."""
        connections = self.server
        connections.apply(options_of(chat.websocket))
        connections.send_timeout = chat.streams.send_timeout

    async def retire(self, stop: asyncio.Event) -> None:
        """Accept no more connections, since other processes do, and otherwise serve until nothing
        runs or waits here, `replace_timeout` is over, or *stop* is set; `end` follows.

        An idle connection ends; any other connection ends with its answers. No request is refused:
        requests on open connections are served, and waiting requests get their turn, for half of
        `shutdown_timeout` at least.
        """
        context, owner, connections = self._owner.context, self._owner, self.server
        context.lifecycle.former_since = time.time()
        context.monitor.incident(
            "shutdown", "this process is replaced by another one", severity="info"
        )
        await self._stop_accepting()
        # A connection that is accepted in this iteration of the event loop is known after it.
        await asyncio.sleep(0)
        loop = asyncio.get_running_loop()
        began = loop.time()
        if (tls := owner.tls) is not None:
            # After its handshake each is a connection, which is about to bring a request.
            grace = context.settings.chat.websocket.shutdown_timeout
            await until_empty(lambda: not tls.handshakes, grace / 2, stop)
        owner.retire()
        connections.drain(silent=True)
        await _pause(stop, LAST_CALL + LAST_REQUESTS)
        # Only now: a load balancer asks on a kept connection, and must be told that this address
        # is ready, as the siblings are.
        context.lifecycle.ready = False

        def over() -> bool:
            if self._done():
                return True
            # Read each time, since a reload may change them.
            settings, passed = context.settings.chat.websocket, loop.time() - began
            return passed >= settings.replace_timeout and not (
                owner.waiting and passed < settings.shutdown_timeout / 2
            )

        await until_empty(over, math.inf, stop)

    async def end(self, *, at_once: bool = False) -> None:
        """Stop serving in good order; call it before `cleanup`.

        *at_once*: the port is given up without `drain_delay`, since it was given up before, or
        another server may be waiting for it.

        First the server is not ready, but still takes work (`drain_delay`). Then it accepts no
        more connections. Where other instances of a cluster serve, it continues like a former
        process, for `shutdown_timeout`. Otherwise it refuses new work: waiting requests are
        refused, idle connections close, and answers without a reader end. The other answers have
        `shutdown_timeout` to finish, and each connection ends with its last response. Background
        answers have that time, too, if other instances can continue to keep them. Answers that
        are left after that end with `server_shutdown`, within FAREWELL seconds.

        WebSockets close here, and not in aiohttp's own shutdown: once that begins, aiohttp drops
        all incoming data, and each close handshake would last for its whole timeout.
        """
        context, connections = self._owner.context, self.server
        settings = context.settings.chat.websocket
        grace = settings.shutdown_timeout
        if not context.lifecycle.retired.is_set():
            context.lifecycle.ready = False
            context.monitor.incident("shutdown", "the server is stopping", severity="info")
            if settings.drain_delay and not at_once:
                await asyncio.sleep(settings.drain_delay)
            await self._stop_accepting()
            # A connection that is accepted in this iteration of the event loop is known after it.
            await asyncio.sleep(0)
            connections.drain()
            sharing = self._owner.sharing
            if not at_once and sharing is not None and await sharing.others_serve():
                # Other instances answer clients that come back, so no request has to be refused
                # here.
                self._owner.retire()
                grace -= await until_empty(self._done, grace, asyncio.Event())
        self._owner.drain()
        began = asyncio.get_running_loop().time()
        await connections.wait_closed(grace)
        for wing in self._owner.wings:
            await wing.finish(grace - (asyncio.get_running_loop().time() - began))
        grace -= asyncio.get_running_loop().time() - began
        await context.gateway.finish_background(grace)
        self.cut = context.gateway.running
        await context.gateway.close()
        await connections.disconnect(FAREWELL)
        if self._owner.tls is not None:
            self._owner.tls.close()

    def _done(self) -> bool:
        """Return whether nothing runs or waits here."""
        owner = self._owner
        return not (owner.context.gateway.running or owner.waiting or self.server.active)

    async def cleanup(self) -> None:
        """Release everything; call `end` before."""
        await self._stop_accepting()
        if self._balance is not None:
            self._balance.close()
        if self._server is not None:
            # A connection that is accepted in this iteration of the event loop is known after it.
            await asyncio.sleep(0)
            self._server.pre_shutdown()
            await self._server.shutdown(SHUTDOWN)
        await self._application.cleanup()

    async def _stop_accepting(self) -> None:
        if self._balance is not None:
            await self._balance.end()
        for site in tuple(self.sites):
            await site.stop()

    @property
    def sites(self) -> AbstractSet[Site]:
        """The sites on which connections are accepted."""
        return set() if self._server is None else self._server.sites

    @property
    def server(self) -> ConnectionServer:
        """The server of the connections."""
        assert self._server is not None, "`setup` makes it"
        return self._server


async def until_empty(empty: Callable[[], bool], most: float, stop: asyncio.Event) -> float:
    """Wait until a queue is *empty* at two checks, LOOK seconds apart, *most* seconds are over, or
    *stop* is set. Return how long that took.

    A request that got its turn just before the first check is in no queue, and may join the next
    one.
    """
    loop = asyncio.get_running_loop()
    began = loop.time()
    before = False
    # No queue signals that it is empty, and this happens once in the life of a process.
    while loop.time() - began < most and not stop.is_set():
        now = empty()
        if now and before:
            break
        before = now
        await _pause(stop, LOOK)
    return loop.time() - began


async def _pause(stop: asyncio.Event, seconds: float) -> None:
    """Wait for *seconds*, or until *stop* is set."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await stop.wait()
