"""The chat page, the dashboard and their assets, which are read once, at the start.

`/` is the chat page for browsers, and JSON for programs.
"""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

from aiohttp import web

from aioserver.faces.status import overview

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from importlib.resources.abc import Traversable

    from aioserver.faces.context import Context

# The files that are served, by their suffix.
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
    assets = dict(_files_in(files("aioserver.faces").joinpath("assets")))
    chat = assets.pop("chat/index.html")
    dashboard = assets.pop("dashboard/index.html")

    async def index(request: web.Request) -> web.Response:
        accept = request.headers.get("Accept", "")
        if "text/html" in accept:
            return _response(".html", chat)
        return web.json_response(overview(context))

    return [
        web.get("/", index),
        web.get("/dashboard", _serving("index.html", dashboard)),
        *(web.get(f"/assets/{name}", _serving(name, body)) for name, body in assets.items()),
    ]


def _files_in(folder: Traversable, path: str = "") -> Iterator[tuple[str, bytes]]:
    """Yield path and content of each file that is served."""
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _files_in(entry, f"{path}{entry.name}/")
        elif entry.name.endswith(tuple(TYPES)):
            yield path + entry.name, entry.read_bytes()


def _serving(name: str, body: bytes) -> Callable[[web.Request], Awaitable[web.Response]]:
    suffix = name[name.rindex(".") :]

    async def asset(_request: web.Request) -> web.Response:
        return _response(suffix, body)

    return asset


def _response(suffix: str, body: bytes) -> web.Response:
    return web.Response(body=body, content_type=TYPES[suffix], charset="utf-8", headers=HEADERS)
