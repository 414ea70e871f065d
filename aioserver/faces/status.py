"""What an orchestrator asks: does it live, does it take work; and the state in short."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from aioserver import __version__, keys


async def health(request: web.Request) -> web.Response:
    """200 while the process lives, full house or not."""
    gate = request.app[keys.ADMISSION].gate
    return web.json_response(
        {
            "status": "healthy",
            "version": __version__,
            "connections": {"active": gate.inside, "limit": gate.limit, "waiting": gate.waiting},
        }
    )


async def ready(request: web.Request) -> web.Response:
    """200 where new work is welcome, else 503."""
    if not request.app[keys.LIFE].ready:
        reason = "starting or stopping"
    elif not request.app[keys.ROUTER].usable:
        reason = "no provider is usable"
    else:
        return web.json_response({"status": "ready"})
    return web.json_response(
        {"status": "not ready", "reason": reason}, status=503, headers={"Retry-After": "1"}
    )


def overview(app: web.Application) -> dict[str, Any]:
    """Version, connections against limits, answers under way and kept, each pool."""
    gate = app[keys.ADMISSION].gate.stats()
    streams = app[keys.STREAMS].stats()
    providers = {}
    for name, provider in app[keys.ROUTER].providers.items():
        state = provider.stats()
        providers[name] = {
            "usable": state.usable,
            "in_flight": state.queue.inside,
            "limit": state.queue.limit,
            "waiting": state.queue.waiting,
            "pool": {
                "open": state.pool.open,
                "idle": state.pool.idle,
                "limit": state.pool.limit,
            },
        }
    return {
        "name": "aioserver",
        "version": __version__,
        "active_provider": app[keys.ROUTER].active.name,
        "connections": {
            "active": gate.inside,
            "limit": gate.limit,
            "waiting": gate.waiting,
            "queue_size": gate.queue_size,
        },
        "streams": {
            "running": streams.running,
            "detached": app[keys.GATEWAY].lifetime.detached,
            "max_detached": app[keys.SETTINGS].chat.streams.max_detached,
            "finished": streams.finished,
            "bytes": streams.bytes,
            "max_bytes": streams.max_bytes,
        },
        "providers": providers,
        "endpoints": {
            "websocket": app[keys.SETTINGS].chat.websocket.endpoint,
            "sse": app[keys.SETTINGS].chat.sse.endpoint,
            "openai": "/v1",
        },
    }
