"""What lives as long as the server, and the routes.

Each owner is made and closed by one generator in `cleanup_ctx`, in this order; aiohttp closes them
in the reverse one:

    providers (and the simulator of `demo`) → router → streams, conversations → gateway → wheel

How it all changes while it runs is told in reload.py, how it ends in `end`.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from aiohttp import web

from aioserver.auth.access import Access
from aioserver.auth.guard import Guard, Policy
from aioserver.auth.keys import pepper_of
from aioserver.auth.origins import Origins
from aioserver.faces import context, openai, pages, responses, session, sse, status, websocket
from aioserver.faces.admission import Admission, counted
from aioserver.gateway.conversations import Conversations
from aioserver.gateway.gateway import Gateway, shutdown_error
from aioserver.gateway.router import Router
from aioserver.limits.timer_wheel import TimerWheel
from aioserver.monitoring import prometheus
from aioserver.monitoring.monitor import Monitor
from aioserver.monitoring.snapshot import Sources
from aioserver.providers.registry import ProviderRegistry
from aioserver.server.middleware import front
from aioserver.streams.fast_path import Outbox
from aioserver.streams.store import Streams
from aioserver.telemetry.loop_lag import LoopLag
from aioserver.telemetry.metrics import Metrics
from aioserver.telemetry.request_log import RequestLog

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aioserver.config.settings import Concurrency, Settings
    from aioserver.server.runner import Runner

logger = logging.getLogger("aioserver.app")

WHEEL_GRAIN = 20  # visits are late by a twentieth of the ping interval at most
FAREWELL = 2.0  # seconds for the last words to clients, once nothing runs any more


def build(settings: Settings) -> web.Application:
    """The application; everything that needs an event loop is made when it starts."""
    given = settings.chat.websocket
    origins = Origins(given.allow_origins, credentials=given.allow_credentials)
    metrics = Metrics(settings.llm.providers)
    in_effect = context.InEffect(settings)
    access = Access(settings.auth, pepper_of(settings.llm))
    guard = Guard(access, origins)
    middleware, add_headers = front(in_effect, guard, origins, metrics)
    app = web.Application(middlewares=[middleware], client_max_size=given.max_message_size)
    app.on_response_prepare.append(add_headers)
    app[context.SETTINGS] = in_effect
    app[context.ORIGINS] = origins
    app[context.ACCESS] = access
    app[context.GUARD] = guard
    app[context.SHIELD] = middleware
    app[context.LIFE] = context.Life()
    app[context.SOCKETS] = set()
    app[context.METRICS] = metrics
    app[context.ADMISSION] = admission = Admission(given.concurrency, metrics)
    app.cleanup_ctx.extend((_owners, _readiness))
    _route(app, settings, admission)
    return app


def _route(app: web.Application, settings: Settings, admission: Admission) -> None:
    sse_endpoint = settings.chat.sse.endpoint
    one = f"{sse_endpoint}/{{request_id}}"
    table: dict[Policy, list[web.AbstractRouteDef]] = {
        Policy.KEY: [
            web.get(settings.chat.websocket.endpoint, websocket.handler, allow_head=False),
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
                allow_head=False,  # its body is not aiohttp's, which would leave it away
            ),
            web.post("/v1/responses/{id}/cancel", responses.cancel),
            web.get("/v1/models", openai.models),
            web.get("/v1/models/{id:.+}", openai.model),
        ],
        Policy.ADMIN: [
            web.get("/metrics", status.metrics),
            web.get("/stats", status.stats),
            web.get("/events", status.events, allow_head=False),
        ],
        Policy.OPEN: [
            *(web.get(path, status.health) for path in ("/health", "/healthz", "/livez")),
            *(web.get(path, status.ready) for path in ("/ready", "/readyz")),
            web.get("/session", session.session),
            web.post("/session", session.log_in),
            web.delete("/session", session.log_out),
            *pages.routes(),
        ],
    }
    for policy, routes in table.items():
        for route in app.add_routes(routes):
            assert route.resource is not None
            # HEAD, which comes with a GET, is another route of its resource.
            app[context.GUARD].policies.update(dict.fromkeys(route.resource, policy))


async def _owners(app: web.Application) -> AsyncIterator[None]:
    settings = app[context.SETTINGS]
    chat = settings.chat
    bounds = chat.streams
    metrics = app[context.METRICS]
    async with AsyncExitStack() as stack:
        app[context.PROVIDERS] = registry = ProviderRegistry(metrics)
        stack.push_async_callback(registry.close)
        await registry.prepare(settings.llm)
        registry.apply(settings.llm, max_response_bytes=bounds.max_response_bytes)
        app[context.ROUTER] = router = Router(
            registry.providers, settings.llm.active, settings.llm.fallbacks
        )
        app[context.STREAMS] = streams = Streams(
            max_stream_bytes=bounds.max_stream_bytes, max_kept_bytes=bounds.max_kept_bytes
        )
        service = chat.service
        app[context.CONVERSATIONS] = conversations = Conversations(
            service.context, service.repository.persistence
        )
        app[context.LAG] = lag = LoopLag(asyncio.get_running_loop(), metrics.loop_lag)
        stack.callback(lag.close)
        records = RequestLog(metrics, lag)
        app[context.GATEWAY] = gateway = Gateway(
            router, streams, conversations, service, bounds, records
        )
        stack.push_async_callback(gateway.close)
        app[context.OUTBOX] = Outbox(asyncio.get_running_loop())
        grain = min(1.0, chat.websocket.ping_interval / WHEEL_GRAIN)
        app[context.WHEEL] = wheel = TimerWheel(asyncio.get_running_loop(), grain)
        stack.callback(wheel.close)
        life = app[context.LIFE]
        sources = Sources(
            settings=settings,
            metrics=metrics,
            gate=app[context.ADMISSION].gate,
            streams=streams,
            lifetime=gateway.lifetime,
            router=router,
            lag=lag,
            ready=lambda: life.ready and router.usable,
            listening=life.listening,
        )
        app[context.MONITOR] = monitor = Monitor(sources)
        stack.callback(monitor.close)
        app[context.REGISTRY] = prometheus.registry(sources, monitor.fresh)
        yield


async def _readiness(app: web.Application) -> AsyncIterator[None]:
    tell_limits(app[context.SETTINGS].chat.websocket.concurrency)
    app[context.LIFE].ready = True
    app[context.MONITOR].tick()  # or `/stats` would deny it for a second
    yield
    app[context.LIFE].ready = False


def tell_limits(limits: Concurrency) -> None:
    """Log how many clients there may be."""
    logger.info(
        "connection limits: max_connections=%d connection_queue_size=%d queue_timeout=%s",
        limits.max_connections,
        limits.connection_queue_size,
        limits.queue_timeout,
    )


async def end(runner: Runner) -> None:
    """Refuse new work, send the waiting away, let what runs finish or end it. Before the cleanup.

    In this order: not ready, while work is still taken (`drain_delay`); nobody new is let in, who
    waits or does nothing is sent away, answers that nobody reads end; the others have
    `shutdown_timeout`, and each connection ends with its last answer; what is left then is told so.
    All of it takes FAREWELL more at most.

    WebSockets are closed here since aiohttp drops all incoming data once its own shutdown begins:
    a close handshake would then wait for its whole timeout.
    """
    app = runner.app
    life, gateway, given = (
        app[context.LIFE],
        app[context.GATEWAY],
        app[context.SETTINGS].chat.websocket,
    )
    life.ready = False
    app[context.MONITOR].incident("shutdown", "the server is stopping", severity="info")
    if given.drain_delay:
        await asyncio.sleep(given.drain_delay)
    await runner.stop()
    life.stopping.set()
    app[context.ADMISSION].gate.close(shutdown_error)
    gateway.drain()
    sockets: list[websocket.Socket] = [*app[context.SOCKETS]]
    for socket in sockets:
        socket.leave()
    await runner.answered(given.shutdown_timeout)
    await gateway.close()
    await runner.let_go(FAREWELL)
