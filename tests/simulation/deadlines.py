"""Every wait is ended by its deadline: looked at twice a second, from inside and from the network.

The deadlines are taken from the settings, and the time of a wait from its beginning, not from the
server's own timers. After a reload old waits may keep old deadlines: it is looked at again once
they must be over.
"""

# ruff: noqa: SLF001 - no snapshot shows the waits

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from aioserver.limits.quota import MAX_WAIT
from aioserver.limits.write_watchdog import LOOKS
from aioserver.providers.exchange import Exchange
from aioserver.wings.cluster.limits.leased import GRACE, LeasedCapacity
from tests.simulation.clock import Clock
from tests.simulation.configuration import BATCH_PATIENCE
from tests.simulation.slowness import HELD_UP, Slowness
from tests.simulation.transport import Transport

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aioserver.limits.resource import Resource
    from aioserver.providers.provider import Provider
    from tests.simulation.instance import Instance
    from tests.simulation.network import Network

# Seconds by which the end of a wait may be late: its timer fires at once, and its task runs then.
LATE = 0.01
# How many times as long as others an answer in the background waits.
BACKGROUND_PATIENCE = 10
# Seconds for which a request that returns from its key waits for a place.
RETURN_WAIT = MAX_WAIT
# Longer than any deadline that a reload changes.
OLD_DEADLINES = 60.0


class Deadlines:
    """Calls *broken* with each wait of *instance* that lasts longer than the settings allow."""

    def __init__(
        self, instance: Instance, network: Network, broken: Callable[[str], None]
    ) -> None:
        self._instance = instance
        self._server = instance.server
        self._network = network
        self._broken = broken
        self._slowness: dict[str, Slowness] = {}
        # From when on all that waits has the deadlines of the settings.
        self.settled_at = 0.0

    def reloaded(self) -> None:
        """Note that the settings are about to change."""
        self.settled_at = Clock.now + OLD_DEADLINES
        self._slowness.clear()

    def look(self) -> None:
        """Look at all waits."""
        if Clock.now < self.settled_at:
            return
        context = self._server.context
        settings = context.settings
        gate = context.admission.gate
        longest = settings.chat.websocket.concurrency.queue_timeout
        if isinstance(gate.supply, LeasedCapacity):
            # A place of another worker may be on its way.
            longest = max(longest, GRACE)
        # Those that return have waited at their keys, and may do so for as long here.
        self._look_at_waits(gate, (longest, RETURN_WAIT), "a place")
        for name, quota in context.access.quotas().items():
            self._look_at_waits(quota.resource, (MAX_WAIT,), name)
        for provider in context.router.providers.values():
            self._look_at_provider(provider)
            self._look_at_slow(provider)
        self._look_at_writes(settings.chat.streams.send_timeout)
        if not self._instance.ended:
            self._look_at_kept()

    def _look_at_waits(
        self,
        resource: Resource,
        longest: Sequence[float],
        what: str,
        background: float = 0.0,
    ) -> None:
        """Look at those that have waited longest of each class, which wait so many seconds, and
        those in the *background* so many.
        """
        for queue, most in zip(resource.queue.queues, longest, strict=True):
            # The first of each flow has waited longest, but for those that came back.
            for bid in queue.heads():
                # One in the background has waited for a place of its part before.
                longer = max(most, background) if bid.inner is not None else most
                if (waited := Clock.now - bid.began()) > longer + LATE:
                    self._broken(f"a wait of {waited:.2f} s for {what}, at most {longer} s")
                elif Clock.now > bid.ticket.deadline + LATE:
                    self._broken(f"a wait for {what} after the deadline of its request")

    def _look_at_provider(self, provider: Provider) -> None:
        limits = provider.settings.http_client
        patience = limits.queue_timeout, BATCH_PATIENCE * limits.queue_timeout
        longest = BACKGROUND_PATIENCE * limits.queue_timeout
        for part in provider.capacity.parts:
            background = part.within is not None
            times = (longest, longest) if background else patience
            self._look_at_waits(part, times, provider.name, longest)
            for bid in part.away:
                most = times[bid.index] if bid.resource is part else longest
                parked = Clock.now - bid.began()
                if parked > most + LATE:
                    self._broken(f"parked for {parked:.2f} s at {provider.name}")
        what = f"a connection to {provider.name}"
        self._look_at_waits(provider.pools.gate, (limits.pool_timeout,), what)
        for connection in provider.pools.in_use:
            exchange = connection.protocol.exchange
            if exchange is None:
                continue
            assert isinstance(exchange, Exchange)
            transport = exchange.protocol.transport
            assert isinstance(transport, Transport)
            if exchange._done.done():
                continue
            if exchange._written:
                quiet = Clock.now - max(
                    transport.heard_at, transport.spoke_at, transport.resumed_at
                )
                # Bytes that the kernel has taken may be sent much later than they were written.
                if transport.is_reading() and quiet > limits.read_timeout + LATE:
                    self._broken(f"{provider.name} has been silent for {quiet:.2f} s")
            elif transport.writing_paused:
                stuck = Clock.now - max(transport.stuck_since, transport.paused_at)
                if stuck > limits.write_timeout * (1 + 1 / LOOKS) + LATE:
                    self._broken(f"a request has been stuck for {stuck:.2f} s")

    def _look_at_slow(self, provider: Provider) -> None:
        """Look at clients that are too slow for what is passed on."""
        slowness = self._slowness.get(provider.name)
        if slowness is None:
            slowness = self._slowness[provider.name] = Slowness(provider)
        slowness.look()
        if slowness.waited > HELD_UP and slowness.slow:
            self._broken(
                f"a request waits for {provider.name} for {slowness.waited:.2f} s, where "
                f"{slowness.slow} clients are too slow"
            )

    def _look_at_writes(self, send_timeout: float) -> None:
        """Look at what clients do not read."""
        longest = send_timeout * (1 + 1 / LOOKS) + LATE
        for end in self._network.open:
            if end.owner != self._instance.number or end.listener is not None or not end._buffer:
                continue
            # A write is watched from when it blocks, and any rest from when it is closed.
            began = end.closed_at if end._closing else end.paused_at
            stuck = Clock.now - max(end.stuck_since, began)
            if (end.writing_paused or end._closing) and stuck > longest:
                self._broken(f"{len(end._buffer)} bytes have been stuck for {stuck:.2f} s")

    def _look_at_kept(self) -> None:
        """Look at the ended answers, which are forgotten after their windows unless somebody reads
        them.
        """
        lifetime = self._server.context.gateway.lifetime
        for window, kept in lifetime._kept.items():
            # The next one that is due, unless all were dropped since the last look.
            for stream, due in islice(kept.items(), 1):
                if not stream.readers and Clock.now > due + max(window, 1.0) + LATE:
                    self._broken(f"an answer is kept for {Clock.now - due:.2f} s too long")
