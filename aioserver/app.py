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

from aioserver import keys, prometheus
from aioserver.auth import Doors, Origins, pepper_of
from aioserver.conversations import Conversations
from aioserver.faces import door, http, openai, pages, responses, sse, status, websocket
from aioserver.faces.admission import Admission, counted
from aioserver.faces.door import Guard, Policy
from aioserver.fastpath import Outbox
from aioserver.gateway import Gateway, stopping
from aioserver.lag import LoopLag
from aioserver.metrics import Metrics
from aioserver.monitor import Monitor
from aioserver.providers.roster import Roster
from aioserver.records import Records
from aioserver.router import Router
from aioserver.store import Streams
from aioserver.wheel import Wheel

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aioserver.runner import Runner
    from aioserver.settings import Concurrency, Settings

logger = logging.getLogger("aioserver.app")

WHEEL_GRAIN = 20  # visits are late by a twentieth of the ping interval at most
FAREWELL = 2.0  # seconds for the last words to clients, once nothing runs any more


def build(settings: Settings) -> web.Application:
    """The application; everything that needs an event loop is made when it starts."""
    given = settings.chat.websocket
    origins = Origins(given.allow_origins, credentials=given.allow_credentials)
    metrics = Metrics(settings.llm.providers)
    in_effect = keys.InEffect(settings)
    doors = Doors(settings.auth, pepper_of(settings.llm))
    guard = Guard(doors, origins)
    shield, dress = http.front(in_effect, guard, origins, metrics)
    app = web.Application(middlewares=[shield], client_max_size=given.max_message_size)
    app.on_response_prepare.append(dress)
    app[keys.SETTINGS] = in_effect
    app[keys.ORIGINS] = origins
    app[keys.DOORS] = doors
    app[keys.GUARD] = guard
    app[keys.SHIELD] = shield
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
            web.get("/session", door.session),
            web.post("/session", door.log_in),
            web.delete("/session", door.log_out),
            *pages.routes(),
        ],
    }
    for policy, routes in table.items():
        for route in app.add_routes(routes):
            assert route.resource is not None
            # HEAD, which comes with a GET, is another route of its resource.
            app[keys.GUARD].policies.update(dict.fromkeys(route.resource, policy))


async def _owners(app: web.Application) -> AsyncIterator[None]:
    settings = app[keys.SETTINGS]
    chat = settings.chat
    bounds = chat.streams
    metrics = app[keys.METRICS]
    async with AsyncExitStack() as stack:
        app[keys.ROSTER] = roster = Roster(metrics)
        stack.push_async_callback(roster.close)
        await roster.prepare(settings.llm)
        roster.apply(settings.llm, max_response_bytes=bounds.max_response_bytes)
        app[keys.ROUTER] = router = Router(
            roster.providers, settings.llm.active, settings.llm.fallbacks
        )
        app[keys.STREAMS] = streams = Streams(
            max_stream_bytes=bounds.max_stream_bytes, max_kept_bytes=bounds.max_kept_bytes
        )
        service = chat.service
        app[keys.CONVERSATIONS] = conversations = Conversations(
            service.context, service.repository.persistence
        )
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


async def _readiness(app: web.Application) -> AsyncIterator[None]:
    tell_limits(app[keys.SETTINGS].chat.websocket.concurrency)
    app[keys.LIFE].ready = True
    app[keys.MONITOR].tick()  # or `/stats` would deny it for a second
    yield
    app[keys.LIFE].ready = False


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
    life, gateway, given = app[keys.LIFE], app[keys.GATEWAY], app[keys.SETTINGS].chat.websocket
    life.ready = False
    app[keys.MONITOR].incident("shutdown", "the server is stopping", severity="info")
    if given.drain_delay:
        await asyncio.sleep(given.drain_delay)
    await runner.stop()
    life.stopping.set()
    app[keys.ADMISSION].gate.close(stopping)
    gateway.drain()
    sockets: list[websocket.Socket] = [*app[keys.SOCKETS]]
    for socket in sockets:
        socket.leave()
    await runner.answered(given.shutdown_timeout)
    await gateway.close()
    await runner.let_go(FAREWELL)
