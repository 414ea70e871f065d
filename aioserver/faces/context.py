"""The context: the objects of the server that faces may use. Their handlers are bound to it.

These objects stay the same for as long as the server lives: a reload of the configuration changes
only what is inside them.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from prometheus_client import CollectorRegistry

    from aioserver.auth.access import Access
    from aioserver.auth.callers import Caller
    from aioserver.auth.guard import Guard
    from aioserver.auth.origins import Origins
    from aioserver.config.settings import Settings
    from aioserver.faces.admission import Admission
    from aioserver.gateway.gateway import Gateway
    from aioserver.gateway.router import Router
    from aioserver.limits.timer_wheel import TimerWheel
    from aioserver.monitoring.monitor import Monitor
    from aioserver.providers.request import Api
    from aioserver.streams.outbox import Outbox
    from aioserver.telemetry.metrics import Metrics
    from aioserver.telemetry.tracer import Tracer
    from aioserver.usage.accounting import Usage


class CurrentSettings:
    """The settings in effect, section by section; a reload replaces the sections."""

    def __init__(self, settings: Settings) -> None:
        self.apply(settings)

    def apply(self, settings: Settings) -> None:
        """Put *settings* in effect."""
        self.chat = settings.chat
        self.llm = settings.llm
        self.auth = settings.auth
        self.cluster = settings.cluster
        self.logging = settings.logging


class Lifecycle:
    """Whether the server takes work, and whether it stops.

    *ready* is false until the server has started, and again from the moment when it begins to
    stop. *stopping* is set `drain_delay` seconds later, and open connections end then: until that
    moment a load balancer can send its clients elsewhere. *retired* is set with it, or before,
    where others serve in its place: from then on each connection ends when nothing runs on it.
    """

    def __init__(self) -> None:
        self.ready = False
        self.stopping = asyncio.Event()
        self.retired = asyncio.Event()
        # When another process took the place of this one, in Unix time.
        self.former_since: float | None = None


class OpenSocket(Protocol):
    """An open WebSocket, as a reload and the end of the server see it.

    *caller* has the limits of its key.
    """

    caller: Caller

    def admit(self, caller: Caller) -> None:
        """Serve the same caller with other limits: a reload has changed its key."""

    def drain(self) -> None:
        """Close as soon as no answer runs on the socket."""

    def revoke(self) -> None:
        """Close at once: its caller's key is no longer valid."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """The objects that a face may use. *tracer* is None if requests are not traced. *hop* is the
    id of this server, by which a request that comes back by way of a provider is recognized.

    Always: it is filled once, when the server starts, and never changes.
    """

    settings: CurrentSettings
    lifecycle: Lifecycle
    access: Access
    origins: Origins
    guard: Guard
    admission: Admission
    gateway: Gateway
    apis: Mapping[str, Api]
    router: Router
    hop: str
    outbox: Outbox
    wheel: TimerWheel
    sockets: set[OpenSocket]
    metrics: Metrics
    tracer: Tracer | None
    usage: Usage
    monitor: Monitor
    registry: CollectorRegistry
