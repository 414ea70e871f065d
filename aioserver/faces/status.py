"""The operating pages: health, readiness, the state now and as it changes, and usage by caller."""

from __future__ import annotations

import asyncio
from functools import partial
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Any

import orjson
from aiohttp import web
from aiohttp.http import HttpVersion11

from aioserver import __version__
from aioserver.auth.callers import CALLER, SKEW
from aioserver.errors import Denied, InvalidRequest, RequestNotFound, ServerAtCapacity
from aioserver.faces.http import NO_STORE, REQUEST_ID
from aioserver.faces.sse import Events
from aioserver.monitoring import prometheus
from aioserver.monitoring.keys import budget_states
from aioserver.protocol import eventstream
from aioserver.streams.ending import run_all
from aioserver.streams.formats import RETRY
from aioserver.streams.writer import Writer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aioserver.auth.callers import Caller
    from aioserver.faces.context import Context

# Lets a watcher come back without a pause.
AT_ONCE = b"retry: 0\n\n"


def probes(context: Context) -> list[web.RouteDef]:
    """Return the routes for load balancers and process managers, which need no key."""
    healthy, readiness = partial(health, context), partial(ready, context)
    return [
        *(web.get(path, healthy) for path in ("/health", "/healthz", "/livez")),
        *(web.get(path, readiness) for path in ("/ready", "/readyz")),
    ]


def routes(context: Context) -> list[web.RouteDef]:
    """Return the routes for operators."""
    return [
        web.get("/metrics", partial(metrics, context)),
        web.get("/stats", partial(stats, context)),
        web.get("/events", partial(events, context), allow_head=False),
    ]


def own(context: Context) -> list[web.RouteDef]:
    """Return the routes that show each caller its own usage, and its own requests."""
    return [
        web.get("/usage", partial(usage, context)),
        web.get(f"/requests/{REQUEST_ID}", partial(ended, context)),
    ]


async def health(context: Context, _request: web.Request) -> web.Response:
    """Answer 200 while the process lives, also when no place is free.

    Where keys exist, the answer has no further content.
    """
    fields: dict[str, Any] = {"status": "healthy"}
    if not context.access.keyed:
        gate = context.admission.gate
        fields["version"] = __version__
        fields["connections"] = {
            "active": gate.inside,
            "limit": gate.limit,
            "waiting": gate.waiting,
        }
    return web.json_response(fields)


async def ready(context: Context, _request: web.Request) -> web.Response:
    """Answer 200 while new work is welcome, otherwise 503."""
    if not context.lifecycle.ready:
        reason = "starting or stopping"
    elif not context.router.usable:
        reason = "no provider is usable"
    else:
        return web.json_response({"status": "ready"})
    return web.json_response(
        {"status": "not ready", "reason": reason}, status=503, headers={"Retry-After": "1"}
    )


def overview(context: Context) -> Mapping[str, object]:
    """Return the snapshot that `/stats` shows.

    Where keys exist, it has only what a client needs.
    """
    snapshot = context.monitor.snapshot
    if context.access.keyed:
        return {"name": snapshot["name"], "endpoints": snapshot["endpoints"]}
    return snapshot


async def stats(context: Context, _request: web.Request) -> web.Response:
    """Answer with the newest snapshot as JSON."""
    body = await context.monitor.state_of_all()
    return web.Response(body=body, content_type="application/json", headers=NO_STORE)


async def usage(context: Context, request: web.Request) -> web.Response:
    """Answer with what the caller has spent today and yesterday. An admin gets all callers, and so
    does everybody if there are no keys.

    All instances have to look this up, so a request of a caller counts as a start of its key.

    Raises:
        RateLimitExceeded: `requests_per_minute` of the key is reached.
    """
    caller = request[CALLER]
    everything = caller.admin or not context.access.keyed
    if not everything and caller.quota is not None:
        await caller.quota.count()
    days, unheard = await context.monitor.days_of_all(None if everything else caller.name)
    keys = await context.monitor.keys_of_all()
    budgets = [
        {"caller": name, **key["budgets"]}
        for name, key in keys.items()
        if key["budgets"] and (everything or name == caller.name)
    ]
    # A caller with a token is not among the keys: it sees the numbers of this process.
    if caller.role and caller.quota is not None and (own := budget_states(caller.quota)):
        budgets.append({"caller": caller.name, **own})
    answer: dict[str, object] = {"days": days, "budgets": budgets}
    if unheard and everything:
        answer["unheard"] = unheard
    body = orjson.dumps(answer)
    return web.Response(body=body, content_type="application/json", headers=NO_STORE)


async def ended(context: Context, request: web.Request) -> web.Response:
    """Answer with the fields of the log line of a request that has ended. A caller gets its own
    ones, an admin those of all callers, and so does everybody if there are no keys.

    As for `usage`, a request of a caller counts as a start of its key.

    Raises:
        RateLimitExceeded: `requests_per_minute` of the key is reached.
        RequestNotFound: it is not kept, or another caller's.
    """
    caller = request[CALLER]
    everything = caller.admin or not context.access.keyed
    if not everything and caller.quota is not None:
        await caller.quota.count()
    name = None if everything else caller.name
    body = await context.monitor.ended_anywhere(name, request.match_info["request_id"])
    if body is None:
        raise RequestNotFound("no such request is among the last ones of this caller")
    return web.Response(body=body, content_type="application/json", headers=NO_STORE)


async def metrics(context: Context, _request: web.Request) -> web.Response:
    """Answer with Prometheus text."""
    headers = {"Content-Type": prometheus.CONTENT_TYPE, **NO_STORE}
    registry, others = context.registry, context.monitor.others
    if others is not None:
        families, snapshot = await others.families(), await others.state()
        monitor = context.monitor
        registry = prometheus.registry(
            lambda: families, lambda: snapshot, monitor.listening, monitor.sections
        )
    text = await prometheus.text(registry)
    return web.Response(body=text, headers=headers)


async def events(context: Context, request: web.Request) -> web.StreamResponse:
    """Answer with the state as an event stream: `history` first, then `stats` and `incident`.

    A watcher that reads nothing is disconnected as any client is. A watcher whose key is revoked,
    whose token has expired, or who is no admin any more, gets an `error` event that says so, and
    the stream ends.

    Raises:
        InvalidRequest: the interval is not 1 to 60 seconds.
        ServerAtCapacity: there are too many watchers.
    """
    quota = request[CALLER].quota or context.access.keyless
    monitor, settings = context.monitor, context.settings.chat
    every = _ticks(request.query.get("interval", "1"))
    if monitor.full:
        raise ServerAtCapacity("too many watch already", retry_after=10.0)
    response = Events(request)
    await response.prepare(request)
    if request.transport is None:
        raise ConnectionResetError("the client has left")
    writer = Writer(
        request.transport,
        request.writer.drain,
        context.outbox,
        send_timeout=settings.streams.send_timeout,
        on_drop=lambda reason: context.admission.dropped("events", reason),
        chunked=request.version >= HttpVersion11,
    )
    try:
        # This line begins the block of the first event, which `watch` sends.
        writer.send(RETRY)
        await monitor.watch_all(writer.send, every)
        with quota.held(watcher=request[CALLER]):
            await _until_the_end(context, request[CALLER])
        if not context.lifecycle.stopping.is_set():
            # Another process takes its watcher.
            writer.send(AT_ONCE)
        await writer.flush()
    except Denied as error:
        writer.send(eventstream.write(orjson.dumps(error.as_chunk()), event="error"))
        await writer.flush()
    finally:
        run_all((partial(monitor.leave, writer.send), writer.close))
    return response


async def _until_the_end(context: Context, caller: Caller) -> None:
    """Wait until the server stops, or others serve in its place.

    Raises:
        InvalidApiKey: the key or token of *caller* has expired.
    """
    left = None if caller.expires == inf else caller.expires + SKEW - monotonic()
    try:
        async with asyncio.timeout(left):
            await context.lifecycle.retired.wait()
    except TimeoutError:
        raise caller.expired() from None


def _ticks(interval: str) -> int:
    try:
        seconds = float(interval)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds <= 60:
        raise InvalidRequest("interval must be 1 to 60 seconds", param="interval")
    return round(seconds)
