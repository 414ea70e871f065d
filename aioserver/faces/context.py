"""The inventory of app state: everything that lives as long as the server, one typed key a line.

What a key names stays the same object: who holds it sees what a reload has changed in it.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from aiohttp import web

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from prometheus_client import CollectorRegistry

    from aioserver.auth.access import Access
    from aioserver.auth.guard import Guard
    from aioserver.auth.origins import Origins
    from aioserver.config.settings import Settings
    from aioserver.faces.admission import Admission
    from aioserver.faces.websocket import Socket
    from aioserver.gateway.conversations import Conversations
    from aioserver.gateway.gateway import Gateway
    from aioserver.gateway.router import Router
    from aioserver.limits.timer_wheel import TimerWheel
    from aioserver.monitoring.monitor import Monitor
    from aioserver.providers.registry import ProviderRegistry
    from aioserver.streams.fast_path import Outbox
    from aioserver.streams.store import Streams
    from aioserver.telemetry.loop_lag import LoopLag
    from aioserver.telemetry.metrics import Metrics

SETTINGS: web.AppKey[InEffect] = web.AppKey("settings")
ORIGINS: web.AppKey[Origins] = web.AppKey("origins")
ACCESS: web.AppKey[Access] = web.AppKey("access")
SHIELD: web.AppKey[Callable[..., Any]] = web.AppKey("shield")
GUARD: web.AppKey[Guard] = web.AppKey("guard")
ADMISSION: web.AppKey[Admission] = web.AppKey("admission")
WHEEL: web.AppKey[TimerWheel] = web.AppKey("wheel")
STREAMS: web.AppKey[Streams] = web.AppKey("streams")
PROVIDERS: web.AppKey[ProviderRegistry] = web.AppKey("providers")
ROUTER: web.AppKey[Router] = web.AppKey("router")
CONVERSATIONS: web.AppKey[Conversations] = web.AppKey("conversations")
GATEWAY: web.AppKey[Gateway] = web.AppKey("gateway")
OUTBOX: web.AppKey[Outbox] = web.AppKey("outbox")
SOCKETS: web.AppKey[set[Socket]] = web.AppKey("sockets")
LAG: web.AppKey[LoopLag] = web.AppKey("lag")
METRICS: web.AppKey[Metrics] = web.AppKey("metrics")
REGISTRY: web.AppKey[CollectorRegistry] = web.AppKey("registry")
MONITOR: web.AppKey[Monitor] = web.AppKey("monitor")
LIFE: web.AppKey[Life] = web.AppKey("life")


class InEffect:
    """The settings that hold now, section by section; a reload puts others in their place."""

    def __init__(self, settings: Settings) -> None:
        self.apply(settings)

    def apply(self, settings: Settings) -> None:
        """From now on these hold."""
        self.chat = settings.chat
        self.llm = settings.llm
        self.auth = settings.auth
        self.cluster = settings.cluster
        self.logging = settings.logging


class Life:
    """*ready*: it takes work: not while it starts, nor from the moment that *stopping* tells of."""

    def __init__(self) -> None:
        self.ready = False
        self.stopping = asyncio.Event()
        self.listening: list[socket.socket] = []
