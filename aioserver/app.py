"""What lives as long as the server, and the routes.

Each owner is made and closed by one generator in `cleanup_ctx`, in this order; aiohttp closes them
in the reverse one:

    providers (and the simulator of `demo`) → router → streams, conversations → gateway → wheel
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from aiohttp import web

from aioserver import keys, prometheus
from aioserver.auth import Origins
from aioserver.conversations import Conversations
from aioserver.errors import ServerShutdown
from aioserver.faces import http, openai, pages, responses, sse, status, websocket
from aioserver.faces.admission import Admission, counted
from aioserver.fastpath import Outbox
from aioserver.gateway import Gateway
from aioserver.lag import LoopLag
from aioserver.metrics import Metrics
from aioserver.monitor import Monitor
from aioserver.providers.provider import Provider
from aioserver.records import Records
from aioserver.router import Router
from aioserver.store import Streams
from aioserver.wheel import Wheel

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aioserver.settings import Settings

logger = logging.getLogger("aioserver.app")

WHEEL_GRAIN = 20  # visits are late by a twentieth of the ping interval at most


def build(settings: Settings) -> web.Application:
    """The application; everything that needs an event loop is made when it starts."""
    given = settings.chat.websocket
    origins = Origins(given.allow_origins, credentials=given.allow_credentials)
    metrics = Metrics(settings.llm.providers)
    shield, dress = http.front(given, origins, metrics)
    app = web.Application(middlewares=[shield], client_max_size=given.max_message_size)
    app.on_response_prepare.append(dress)
    app[keys.SETTINGS] = settings
    app[keys.ORIGINS] = origins
    app[keys.LIFE] = keys.Life()
    app[keys.SOCKETS] = set()
    app[keys.METRICS] = metrics
    app[keys.REGISTRY] = prometheus.registry(app)
    app[keys.ADMISSION] = admission = Admission(given.concurrency, metrics)
    app.cleanup_ctx.extend((_owners, _readiness))
    _route(app, settings, admission)
    return app


def _route(app: web.Application, settings: Settings, admission: Admission) -> None:
    sse_endpoint = settings.chat.sse.endpoint
    one = f"{sse_endpoint}/{{request_id}}"
    app.add_routes(
        [
            web.get(settings.chat.websocket.endpoint, websocket.handler),
            web.post(sse_endpoint, counted(admission, "sse", sse.prepare, sse.start)),
            web.get(sse_endpoint, sse.listing),
            web.get(one, counted(admission, "sse", sse.prepare_resume, sse.resume, sse.busy)),
            web.delete(one, sse.cancel),
            *(
                web.post(
                    f"/v1/{path}",
                    counted(admission, "openai", openai.prepare_for(path), openai.serve),
                )
                for path in openai.PATHS
            ),
            web.get(
                "/v1/responses/{id}",
                counted(admission, "openai", responses.prepare, responses.retrieve),
            ),
            web.post("/v1/responses/{id}/cancel", responses.cancel),
            web.get("/v1/models", openai.models),
            web.get("/v1/models/{id:.+}", openai.model),
            *(web.get(path, status.health) for path in ("/health", "/healthz", "/livez")),
            *(web.get(path, status.ready) for path in ("/ready", "/readyz")),
            web.get("/metrics", status.metrics),
            web.get("/stats", status.stats),
            web.get("/events", status.events, allow_head=False),
            *pages.routes(),
        ]
    )


async def _owners(app: web.Application) -> AsyncIterator[None]:
    settings = app[keys.SETTINGS]
    chat = settings.chat
    bounds = chat.streams
    metrics = app[keys.METRICS]
    async with AsyncExitStack() as stack:
        providers: dict[str, Provider] = {}
        for name, given in settings.llm.providers.items():
            base_url = given.base_url
            if given.simulated:
                base_url = await _simulated(stack)
            provider = Provider(
                given,
                base_url,
                max_response_bytes=bounds.max_response_bytes,
                meter=metrics.providers[name],
            )
            stack.push_async_callback(provider.close)
            providers[name] = provider
            _tell(provider)
        app[keys.ROUTER] = router = Router(providers, settings.llm.active, settings.llm.fallbacks)
        app[keys.STREAMS] = streams = Streams(
            max_stream_bytes=bounds.max_stream_bytes, max_kept_bytes=bounds.max_kept_bytes
        )
        service = chat.service
        conversations = Conversations(service.context, service.repository.persistence)
        app[keys.LAG] = lag = LoopLag(asyncio.get_running_loop(), metrics.loop_lag)
        stack.callback(lag.close)
        records = Records(metrics, lag)
        app[keys.GATEWAY] = gateway = Gateway(
            router, streams, conversations, service, bounds, records
        )
        stack.push_async_callback(gateway.close)
        app[keys.OUTBOX] = Outbox(asyncio.get_running_loop())
        grain = min(1.0, chat.websocket.ping_interval / WHEEL_GRAIN)
        app[keys.WHEEL] = wheel = Wheel(asyncio.get_running_loop(), grain)
        stack.callback(wheel.close)
        app[keys.MONITOR] = monitor = Monitor(app)
        stack.callback(monitor.close)
        yield


async def _simulated(stack: AsyncExitStack) -> str:
    """Start the simulator in this process; its module is loaded by who needs it."""
    from aioserver.providers.simulator import Simulator  # noqa: PLC0415 - start-up time

    simulator = await stack.enter_async_context(Simulator(keep=0))
    return simulator.base_url


async def _readiness(app: web.Application) -> AsyncIterator[None]:
    limits = app[keys.SETTINGS].chat.websocket.concurrency
    logger.info(
        "connection limits: max_connections=%d connection_queue_size=%d queue_timeout=%s",
        limits.max_connections,
        limits.connection_queue_size,
        limits.queue_timeout,
    )
    app[keys.LIFE].ready = True
    yield
    app[keys.LIFE].ready = False


def _tell(provider: Provider) -> None:
    limits = provider.settings.http_client
    missing = provider.settings.missing_key
    if missing is not None:
        logger.info("provider %s is off: %s is not set", provider.name, missing)
        return
    logger.info(
        "provider %s: max_connections=%d max_keepalive=%d concurrent_requests=%d "
        "requests_per_minute=%d queue_size=%d",
        provider.name,
        limits.max_connections,
        limits.max_keepalive,
        limits.concurrent_requests,
        limits.requests_per_minute,
        limits.queue_size,
    )


async def end(app: web.Application) -> None:
    """Refuse new work, send the waiting away, end what runs. Called before the runner's cleanup.

    WebSockets are closed here since aiohttp drops all incoming data once its own shutdown begins:
    a close handshake would then wait for its whole timeout.
    """
    app[keys.LIFE].ready = False
    app[keys.MONITOR].incident("shutdown", "the server is stopping", severity="info")
    app[keys.LIFE].stopping.set()
    app[keys.ADMISSION].gate.close(ServerShutdown("the server is stopping", retry_after=5.0))
    sockets: list[websocket.Socket] = [*app[keys.SOCKETS]]
    async with asyncio.TaskGroup() as group:
        for one in sockets:
            if not one.busy:
                group.create_task(one.stop())
        group.create_task(
            app[keys.GATEWAY].drain(app[keys.SETTINGS].chat.websocket.shutdown_timeout)
        )
    await app[keys.GATEWAY].close()
    async with asyncio.TaskGroup() as group:
        for one in sockets:
            group.create_task(one.stop())
