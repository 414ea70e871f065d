"""What is asked of a house: does it live, does it take work, how full is it; now, and as it goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson
from aiohttp import web
from aiohttp.http import HttpVersion11

from aioserver import __version__
from aioserver.auth.callers import CALLER
from aioserver.errors import Denied, InvalidRequest, ServerAtCapacity
from aioserver.faces import context
from aioserver.faces.sse import RETRY, Events
from aioserver.monitoring import prometheus
from aioserver.protocol import eventstream
from aioserver.streams.writer import Writer

if TYPE_CHECKING:
    from collections.abc import Mapping

FRESH = {"Cache-Control": "no-store"}


async def health(request: web.Request) -> web.Response:
    """200 while the process lives, full house or not. Where keys exist, it says nothing more."""
    told: dict[str, Any] = {"status": "healthy"}
    if not request.app[context.ACCESS].keyed:
        gate = request.app[context.ADMISSION].gate
        told["version"] = __version__
        told["connections"] = {
            "active": gate.inside,
            "limit": gate.limit,
            "waiting": gate.waiting,
        }
    return web.json_response(told)


async def ready(request: web.Request) -> web.Response:
    """200 where new work is welcome, else 503."""
    if not request.app[context.LIFE].ready:
        reason = "starting or stopping"
    elif not request.app[context.ROUTER].usable:
        reason = "no provider is usable"
    else:
        return web.json_response({"status": "ready"})
    return web.json_response(
        {"status": "not ready", "reason": reason}, status=503, headers={"Retry-After": "1"}
    )


def overview(app: web.Application) -> Mapping[str, object]:
    """The state at this moment: what `/stats` shows; where keys exist, the addresses only."""
    snapshot = app[context.MONITOR].snapshot
    if app[context.ACCESS].keyed:
        return {"name": snapshot["name"], "endpoints": snapshot["endpoints"]}
    return snapshot


async def stats(request: web.Request) -> web.Response:
    """The state as JSON."""
    body = request.app[context.MONITOR].snapshot_json
    return web.Response(body=body, content_type="application/json", headers=FRESH)


async def metrics(request: web.Request) -> web.Response:
    """Prometheus text."""
    headers = {"Content-Type": prometheus.CONTENT_TYPE, **FRESH}
    return web.Response(body=await prometheus.text(request.app[context.REGISTRY]), headers=headers)


async def events(request: web.Request) -> web.StreamResponse:
    """The state as an event stream: `history` first, then `stats` and `incident`.

    A watcher who takes nothing is dropped as any client is; one whose key is revoked, or is no admin
    key any more, is told so.
    """
    app = request.app
    quota = request[CALLER].quota or app[context.ACCESS].keyless
    monitor, settings = app[context.MONITOR], app[context.SETTINGS].chat
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
        app[context.OUTBOX],
        send_timeout=settings.streams.send_timeout,
        on_drop=lambda why: app[context.ADMISSION].dropped("events", why),
        chunked=request.version >= HttpVersion11,
    )
    try:
        writer.send(RETRY)
        monitor.watch(writer, every)
        with quota.held(admin=True):
            await app[context.LIFE].stopping.wait()
        await writer.flush()
    except Denied as error:
        writer.send(eventstream.write(orjson.dumps(error.as_chunk()), event="error"))
        await writer.flush()
    finally:
        monitor.leave(writer)
        writer.close()
    return response


def _ticks(given: str) -> int:
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds <= 60:
        raise InvalidRequest("interval must be 1 to 60 seconds", param="interval")
    return round(seconds)
