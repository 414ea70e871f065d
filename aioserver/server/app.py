"""The server as an object: everything with the lifetime of the server, and the routes of its
application.

`open_server` makes all of it, in this order, and closes it in reverse order:

    wings → providers → router → streams → gateway → monitor → faces

Its changes while it runs are in reload.py, and its end is in runner.py. This file is one concept:
which objects are made, in which order, and from which others.

Private names of aiohttp used here, where it has them: `_handle`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from aiohttp import hdrs, web
from aiohttp.typedefs import Middleware

from aioserver.auth.access import Access
from aioserver.auth.guard import Guard, Policy
from aioserver.auth.keys import quota_of
from aioserver.auth.origins import Origins
from aioserver.auth.sessions import Sessions
from aioserver.config.faults import ConfigurationError
from aioserver.faces import openai, pages, passthrough, session, sse, status, websocket
from aioserver.faces.admission import Admission
from aioserver.faces.context import Context, CurrentSettings, Lifecycle
from aioserver.faces.form import Forms
from aioserver.faces.http import Request
from aioserver.faces.wing import Core, Routes, Wing
from aioserver.files.watched_files import WatchedFiles
from aioserver.gateway.contracts.sharing import Sharing
from aioserver.gateway.gateway import Gateway
from aioserver.gateway.request import shutdown_error
from aioserver.gateway.router import Router
from aioserver.limits.budget import day_of
from aioserver.limits.scheduler import Scheduler
from aioserver.limits.timer_wheel import TimerWheel
from aioserver.monitoring import prometheus
from aioserver.monitoring.keys import key_states
from aioserver.monitoring.monitor import Monitor
from aioserver.monitoring.snapshot import Sources
from aioserver.monitoring.usage import UsageSection
from aioserver.providers.health import ALONE
from aioserver.providers.registry import ProviderRegistry
from aioserver.server.certificates import ListenerTls, TlsSection, open_tls
from aioserver.server.connections import FAREWELL, accept_peers
from aioserver.server.middleware import Border
from aioserver.server.wings import WINGS, faults, open_wings
from aioserver.streams.lifetime import Lifetime
from aioserver.streams.outbox import Outbox
from aioserver.streams.store import StreamStore
from aioserver.telemetry.ended_requests import EndedRequests
from aioserver.telemetry.loop_lag import LoopLag
from aioserver.telemetry.metrics import Metrics
from aioserver.telemetry.request_log import RequestLog, RequestRecord
from aioserver.usage.accounting import Usage
from aioserver.usage.ledger_reader import spent

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from aiohttp.typedefs import Handler

    from aioserver.config import Configuration
    from aioserver.config.settings import Concurrency, Llm, Settings
    from aioserver.faces.admission import ShareDoor
    from aioserver.limits.fixed_share import Scope
    from aioserver.server.wings import Plugged
    from aioserver.streams.stream import Stream

logger = logging.getLogger("aioserver.app")

# Pings are at most a twentieth of their interval late.
WHEEL_GRAIN = 20
# The most names of models in one log line.
ROUTES_OF_A_LINE = 20


class Server(msgspec.Struct, frozen=True, kw_only=True):
    """A running server. Its faces may use *context*; only server/ needs the rest.

    *listening*: the sockets on which it listens; the runner fills the list. *tls* is the TLS of
    these sockets; None if they are plain. *sharing* is the state shared with other instances; None
    if it is the only one.
    """

    app: web.Application
    middleware: Middleware
    context: Context
    provider_registry: ProviderRegistry
    streams: StreamStore
    watched: WatchedFiles
    tls: ListenerTls | None
    wings: Sequence[Wing]
    sharing: Sharing | None
    lag: LoopLag
    listening: list[socket.socket]

    @property
    def waiting(self) -> int:
        """The number of connections and requests that wait for a place: at the door, or for their
        key or a provider.
        """
        providers = self.provider_registry.providers.values()
        queues = sum(provider.stats().queue.waiting for provider in providers)
        keys = sum(quota.resource.waiting for quota in self.context.access.quotas().values())
        return self.context.admission.gate.waiting + keys + queues

    def retire(self) -> None:
        """End idle sockets and watchers, now and from now on, each where nothing runs on it."""
        self.context.lifecycle.retired.set()
        if self.sharing is not None:
            self.sharing.retire()
        for open_socket in tuple(self.context.sockets):
            open_socket.drain()

    def drain(self) -> None:
        """Refuse new work: waiting requests, idle sockets and answers without a reader end."""
        context = self.context
        context.lifecycle.ready = False
        context.lifecycle.stopping.set()
        context.admission.close(shutdown_error)
        context.gateway.drain()
        for quota in context.access.quotas().values():
            quota.refuse(shutdown_error)
        self.retire()


@asynccontextmanager
async def open_server(
    settings: Settings,
    app: web.Application | None = None,
    *,
    session_secret: bytes | None = None,
    share_door: ShareDoor | None = None,
    scope: Scope | None = None,
    private_server: str | None = None,
    worker: int | None = None,
    wings: Sequence[Callable[[], Wing]] = WINGS,
) -> AsyncIterator[Server]:
    """Make the server, and add its routes to *app*, or to a new application. Close it at the end.

    *app* must not be frozen yet. *session_secret* signs browser sessions; by default it is new.
    *share_door* shares the places in front of the handlers with other processes, unless a wing
    does; see `Admission`. *scope*, *private_server*: see `Core`. *worker* is the slot of this
    process among those that share a configuration. *wings* are the features beside the core.

    Raises:
        ConfigurationError: a provider cannot be used as it is configured.
    """
    app = web.Application() if app is None else app
    made = [wing() for wing in wings]
    if unfit := list(faults(settings, made)):
        raise ConfigurationError(unfit)
    loop, metrics = asyncio.get_running_loop(), Metrics(settings.llm.providers)
    current = CurrentSettings(settings)
    listening: list[socket.socket] = []
    plugged: Plugged | None = None

    def report(kind: str, text: str) -> None:
        context.monitor.incident(kind, text)

    def aliased(stream: Stream, alias: str) -> None:
        if plugged is not None and plugged.instances is not None:
            plugged.instances.aliased(stream, alias)

    lifetime = Lifetime(settings.chat.streams, aliased)
    async with AsyncExitStack() as stack:
        # Closed last: it is told of answers to the end.
        usage = _open_usage(Usage(worker=worker, bugs=metrics.bugs), settings, loop, stack)
        watched = WatchedFiles(report)
        stack.push_async_callback(watched.close)
        tls = open_tls(current, metrics, watched, stack)
        core = Core(
            settings=settings,
            metrics=metrics,
            loop=loop,
            scheduler=Scheduler(loop),
            streams=lifetime.store,
            watched=watched,
            scope=scope,
            private_server=private_server,
        )
        plugged = await open_wings(made, core, stack)
        access = await _make_access(core, plugged, Sessions(session_secret))
        answering = await _open_answering(core, plugged, lifetime, usage, stack)
        context = _open_context(
            core, plugged, answering, access, share_door, current, tls, listening, stack
        )
        server = Server(
            app=app,
            middleware=await _add_faces(app, context, plugged),
            context=context,
            provider_registry=answering.provider_registry,
            streams=lifetime.store,
            watched=watched,
            tls=tls,
            sharing=plugged.sharing,
            wings=plugged.wings,
            lag=answering.lag,
            listening=listening,
        )
        _begin(server)
        try:
            yield server
        finally:
            context.lifecycle.ready = False


def _open_usage(
    usage: Usage, settings: Settings, loop: asyncio.AbstractEventLoop, stack: AsyncExitStack
) -> Usage:
    """Return *usage* with its ledger open, which *stack* closes."""
    stack.callback(usage.close)
    usage.prepare(settings.usage)()
    usage.sweep_in(loop)
    return usage


async def _make_access(core: Core, plugged: Plugged, sessions: Sessions) -> Access:
    """Return the access rules; the budgets go on as the ledger knows them."""
    scope, sharing = core.scope, plugged.sharing
    if sharing is not None:
        await sharing.agree_on_sessions(sessions)
    make_quota = partial(
        quota_of if sharing is None else sharing.make_quota, scheduler=core.scheduler
    )
    access = Access(core.settings.auth, sessions, make_quota, plugged.callers)
    if scope is not None and sharing is None:
        access.part_of = scope.share
    await begin_budgets(access, core.settings)
    return access


def _make_admission(core: Core, plugged: Plugged, share_door: ShareDoor | None) -> Admission:
    """Return the places in front of the handlers; *share_door* shares them, unless a wing does."""
    chat, sharing = core.settings.chat, plugged.sharing
    return Admission(
        chat.websocket.concurrency,
        core.metrics,
        chat.streams.send_timeout,
        core.scheduler,
        share_door if sharing is None else sharing.share_door,
        forms=Forms(form for wing in plugged.wings for form in wing.forms()),
    )


class _Answering(msgspec.Struct, frozen=True, kw_only=True):
    """The objects that answer requests, on any face; *hop* is this server's name in requests to
    providers.
    """

    hop: str
    lifetime: Lifetime
    usage: Usage
    provider_registry: ProviderRegistry
    router: Router
    lag: LoopLag
    ended: EndedRequests[RequestRecord]
    gateway: Gateway


async def _open_answering(
    core: Core, plugged: Plugged, lifetime: Lifetime, usage: Usage, stack: AsyncExitStack
) -> _Answering:
    """Make the objects that answer requests; *stack* closes them.

    Raises:
        ConfigurationError: a provider cannot be used as it is configured.
    """
    chat, llm, sharing = core.settings.chat, core.settings.llm, plugged.sharing
    # The workers of one parent are one server.
    hop = secrets.token_hex(4) if core.scope is None else core.scope.host
    provider_registry = ProviderRegistry(
        core.metrics,
        None if sharing is None else sharing.share_provider,
        (lambda _name: ALONE) if sharing is None else sharing.observe,
        plugged.simulator,
        lifetime,
        usage,
        hop,
        scheduler=core.scheduler,
    )
    stack.push_async_callback(provider_registry.close)
    provider_registry.watch(core.watched)
    await provider_registry.prepare(llm)
    provider_registry.apply(llm, max_response_bytes=chat.streams.max_response_bytes)
    router = Router(
        provider_registry.providers,
        llm,
        alone=sharing is None,
        hooks=plugged.hooks,
        caches=plugged.caches,
    )
    lag = LoopLag(core.loop, core.metrics.loop_lag)
    stack.callback(lag.close)
    for wing in plugged.wings:
        stack.push_async_callback(wing.leave)
    request_log = RequestLog(core.metrics, lag, plugged.tracer)
    gateway = Gateway(
        router,
        lifetime,
        plugged.histories,
        chat.service,
        chat.streams,
        request_log,
        plugged.instances,
        plugged.hooks,
    )
    stack.push_async_callback(gateway.close)
    return _Answering(
        hop=hop,
        lifetime=lifetime,
        usage=usage,
        provider_registry=provider_registry,
        router=router,
        lag=lag,
        ended=request_log.ended,
        gateway=gateway,
    )


def _open_context(
    core: Core,
    plugged: Plugged,
    answering: _Answering,
    access: Access,
    share_door: ShareDoor | None,
    current: CurrentSettings,
    tls: ListenerTls | None,
    listening: Sequence[socket.socket],
    stack: AsyncExitStack,
) -> Context:
    """Make the context of faces, with its monitor; *stack* closes it."""
    chat, metrics, usage, router = current.chat, core.metrics, answering.usage, answering.router
    lifecycle, gateway = Lifecycle(), answering.gateway
    admission = _make_admission(core, plugged, share_door)
    origins = Origins(chat.websocket.allow_origins, credentials=chat.websocket.allow_credentials)
    wheel = TimerWheel(core.loop, min(1.0, chat.websocket.ping_interval / WHEEL_GRAIN))
    stack.callback(wheel.close)
    sources = Sources(
        chat=lambda: current.chat,
        metrics=metrics,
        usage=usage,
        gate=admission.gate,
        streams=core.streams,
        running=lambda: gateway.running,
        lifetime=answering.lifetime,
        router=router,
        lag=answering.lag,
        ended=answering.ended,
        ready=lambda: lifecycle.ready and router.usable,
        former_since=lambda: lifecycle.former_since,
        listening=listening,
        keys=lambda: key_states(access.keys, usage.sums),
        sections=[
            UsageSection(usage),
            TlsSection(tls, metrics.handshakes),
            *(section for wing in plugged.wings for section in wing.sections()),
        ],
        endpoints={face: path for wing in plugged.wings for face, path in wing.endpoints.items()},
    )
    monitor = Monitor(sources)
    stack.callback(monitor.close)
    apis = (*openai.APIS, *(api for wing in plugged.wings for api in wing.apis()))
    return Context(
        settings=current,
        lifecycle=lifecycle,
        access=access,
        origins=origins,
        guard=Guard(access, origins),
        admission=admission,
        gateway=gateway,
        apis={api.path: api for api in apis},
        router=router,
        hop=answering.hop,
        outbox=Outbox(core.loop),
        wheel=wheel,
        sockets=set(),
        metrics=metrics,
        tracer=plugged.tracer,
        usage=usage,
        monitor=monitor,
        registry=prometheus.registry(monitor.families, monitor.fresh, listening, sources.sections),
    )


async def _add_faces(app: web.Application, context: Context, plugged: Plugged) -> Middleware:
    """Add the routes of all faces to *app*, and the middleware in front of them; return the
    middleware.
    """
    border = Border(context.settings, context.guard, context.origins, context.admission)
    app.middlewares.append(border.handle)
    app.on_response_prepare.append(border.add_headers)
    _add_routes(app, context, [await wing.serve(context) for wing in plugged.wings])
    return border.handle


def _begin(server: Server) -> None:
    """Let *server*, which is complete, take requests."""
    context = server.context
    log_limits(context.settings.chat.websocket.concurrency)
    log_routes(context.settings.llm)
    context.lifecycle.ready = True
    server.watched.begin()
    # Otherwise `/stats` would show `ready` as false for a second.
    context.monitor.tick()


async def begin_budgets(access: Access, settings: Settings) -> None:
    """Start the budgets of the day, the week and the month at the sums that the ledger has for them.

    If instances share the budgets, the shared count may be higher, and holds. A worker that has a
    part of each limit starts at its part of the total.
    """
    path, tokens = settings.usage.path, access.tokens
    quotas = access.keys.quotas()
    periods = {period for quota in quotas.values() for period in quota.budget.periods}
    if tokens is not None:
        periods.update(tokens.periods)
    if path is None or not periods:
        return
    now = time.time()
    days = {period.setting: day_of(period.since(now)) for period in periods}
    sums = await asyncio.to_thread(spent, Path(path), days, day_of(now))
    parts = {
        name: {setting: access.part_of(used) for setting, used in used_by.items()}
        for name, used_by in sums.items()
    }
    for name, part in parts.items():
        if name in quotas:
            quotas[name].budget.begin(part)
    if tokens is not None:
        tokens.begin(now, parts)


def make_app(configuration: Configuration) -> web.Application:
    """Return the whole server as an application, for tests and for programs that embed it.

    The application starts and ends with the runner that runs it, aiohttp's or another:

        web.run_app(make_app(Configuration.load("config.yaml")), port=8000)

    Routes may be added to it before; where keys exist, those are for admins. The application must
    be the main one: as a sub-application it has no routes, since they are made when it starts.

    An embedded server lacks what `aioserver serve` does around the application:

    - the limits of our connections: `keepalive_timeout`, `max_keepalive_requests`, `backlog`, the
      number of headers, and timeouts in the kernel. The runner's own limits hold instead, also for
      the sizes of the request line and the headers, where they are lower than the configured ones;
      requests that aiohttp cannot parse get its own error bodies;
    - host, port, the access log and the log's format, which are the program's business;
    - signals: the configuration is not read again, and at the end there is neither `drain_delay`
      nor `shutdown_timeout`: answers that still run end with `server_shutdown`.
    """

    async def lifetime(app: web.Application) -> AsyncIterator[None]:
        async with open_server(configuration.settings, app) as server:
            # Without it, answers that run here are found nowhere else.
            if (handle := getattr(app, "_handle", None)) is not None:
                await accept_peers(server.wings, server.context, handle)
            app.on_shutdown.append(partial(_end_embedded, server))
            yield

    # With handler cancellation, a client that has left gives its place back at once.
    app = web.Application(middlewares=[_adopt], handler_args={"handler_cancellation": True})
    app.cleanup_ctx.append(lifetime)
    return app


@web.middleware
async def _adopt(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn a request of another runner into one of ours, which has two more attributes."""
    request.__class__ = Request
    return await handler(request)


async def _end_embedded(server: Server, _app: web.Application) -> None:
    """End all answers and sockets; otherwise the runner would wait a minute for them."""
    server.drain()
    await server.context.gateway.close()
    for wing in server.wings:
        await wing.finish(FAREWELL)


def _add_routes(app: web.Application, context: Context, wings: Sequence[Routes]) -> None:
    websockets = [
        *websocket.routes(context),
        *(route for routes in wings for route in routes.websockets),
    ]
    paths = {socket.path for socket in websockets}
    table: dict[Policy, list[web.RouteDef]] = {
        Policy.KEY: [
            *websockets,
            *sse.routes(context),
            *openai.routes(context),
            *status.own(context),
            *(route for routes in wings for route in routes.key),
            # It takes all paths below `/v1` that no other face has.
            *passthrough.routes(context),
        ],
        Policy.ADMIN: status.routes(context),
        Policy.OPEN: [
            *(route for routes in wings for route in routes.open),
            *status.probes(context),
            *session.routes(context),
            *pages.routes(context),
        ],
    }
    for policy, routes in table.items():
        for route in app.add_routes(routes):
            assert route.resource is not None
            # HEAD, which comes with a GET, is another route of the same resource.
            context.guard.policies.update(dict.fromkeys(route.resource, policy))
            if route.method == hdrs.METH_GET and route.resource.canonical in paths:
                context.guard.websockets.add(route)


def log_limits(limits: Concurrency) -> None:
    """Log how many clients there may be."""
    logger.info(
        "connection limits: max_connections=%d connection_queue_size=%d queue_timeout=%s",
        limits.max_connections,
        limits.connection_queue_size,
        limits.queue_timeout,
    )


def log_routes(llm: Llm) -> None:
    """Log which models go to other providers than the active one by their name alone."""
    for providers, models in llm.bare_routes().items():
        names = ", ".join(providers)
        for first in range(0, len(models), ROUTES_OF_A_LINE):
            line = ", ".join(models[first : first + ROUTES_OF_A_LINE])
            logger.info("by name alone go to %s: %s", names, line)
