"""A web application of a test on a port of its own."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@asynccontextmanager
async def served(app: web.Application, **options: Any) -> AsyncIterator[str]:
    """Serve *app*, with *options* of aiohttp's runner; yield its address, without a path."""
    settings = {"handler_cancellation": True, "access_log": None, "shutdown_timeout": 0.1}
    runner = web.AppRunner(app, **{**settings, **options})
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield f"http://127.0.0.1:{site.port}"
    finally:
        await runner.cleanup()
