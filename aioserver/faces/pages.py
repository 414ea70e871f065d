"""The chat page, the dashboard and their assets, which are read once, at the start.

`/` is the chat page for browsers, and JSON for programs.
"""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

from aiohttp import web

from aioserver.faces.status import overview

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aioserver.faces.context import Context

TYPES = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def routes(context: Context) -> list[web.RouteDef]:
    """Return the routes `/`, `/dashboard` and `/assets/…`."""
    assets = {
        file.name: file.read_bytes()
        for file in files("aioserver.faces").joinpath("assets").iterdir()
        if file.name.endswith(tuple(TYPES))
    }
    page = assets.pop("index.html")
    dashboard = assets.pop("dashboard.html")

    async def index(request: web.Request) -> web.Response:
        accept = request.headers.get("Accept", "")
        if "text/html" in accept:
            return _file("index.html", page)
        return web.json_response(overview(context))

    return [
        web.get("/", index),
        web.get("/dashboard", _serving("dashboard.html", dashboard)),
        *(web.get(f"/assets/{name}", _serving(name, body)) for name, body in assets.items()),
    ]


def _serving(name: str, body: bytes) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def asset(_request: web.Request) -> web.Response:
        return _file(name, body)

    return asset


def _file(name: str, body: bytes) -> web.Response:
    kind = TYPES[name[name.rindex(".") :]]
    return web.Response(body=body, content_type=kind, charset="utf-8", headers=HEADERS)
