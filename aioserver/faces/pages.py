"""The chat page, the dashboard, their assets, and the client library for pages.

All are read once, at the start.

`/` is the chat page for browsers, and JSON for programs. `/client.js` is revalidated each time,
and the same module at `/client/VERSION.js` never changes. Pages of `allow_origins` may import
both: the middleware adds the CORS headers.
"""

from __future__ import annotations

import hashlib
import re
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from aiohttp import ETag, web

from aioserver import __version__
from aioserver.errors import NotFound
from aioserver.faces.status import overview

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aioserver.faces.context import Context

FOLDER = Path(__file__).with_name("assets")
# The files that are served, by their suffix.
TYPES = {
    ".html": "text/html",
    ".d.ts": "application/typescript",
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
    # A cache must not give a page of another origin the copy that it keeps for our own pages,
    # which has no CORS headers.
    "Vary": "Origin",
}
# One year, the longest time for which a cache may keep anything (RFC 9111, 5.2.2.1; RFC 8246).
IMMUTABLE = "public, max-age=31536000, immutable"


def routes(context: Context) -> list[web.RouteDef]:
    """Return the routes `/`, `/dashboard`, `/assets/…` and those of the client library."""
    assets = {**_assets()}
    chat = assets.pop("chat/index.html")
    dashboard = assets.pop("dashboard/index.html")
    client, types = assets.pop("client/client.js"), assets.pop("client/client.d.ts")

    async def index(request: web.Request) -> web.StreamResponse:
        accept = request.headers.get("Accept", "")
        if "text/html" in accept:
            return await chat.serve(request)
        return web.json_response(overview(context))

    async def asset(request: web.Request) -> web.StreamResponse:
        return await assets[request.match_info["path"]].serve(request)

    paths = "|".join(map(re.escape, assets))
    return [
        web.get("/", index),
        web.get("/dashboard", dashboard.serve),
        web.get("/client.js", client.serve),
        web.get("/client.d.ts", types.serve),
        web.get("/client/{version}.js", partial(versioned, client)),
        web.get(f"/assets/{{path:{paths}}}", asset),
    ]


@cache
def _assets() -> Mapping[str, Asset]:
    return {
        path.relative_to(FOLDER).as_posix(): Asset(
            path.read_bytes(), TYPES["".join(path.suffixes)]
        )
        for path in FOLDER.rglob("*.*")
        if "".join(path.suffixes) in TYPES
    }


class Asset:
    """A file that is served, of this content type, with *headers*."""

    def __init__(self, body: bytes, kind: str, headers: Mapping[str, str] = HEADERS) -> None:
        self._body, self._type, self._headers = body, kind, headers
        self._tag = ETag(hashlib.sha256(body).hexdigest()[:32])

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """Answer with the file, or with 304 to a client that has it already (RFC 9110, 13.1.2)."""
        known = request.if_none_match or ()
        response: web.Response
        if any(tag.value in (self._tag.value, "*") for tag in known):
            response = web.Response(status=304, headers=self._headers)
        else:
            response = web.Response(
                body=self._body, content_type=self._type, charset="utf-8", headers=self._headers
            )
        response.etag = self._tag
        return response


async def versioned(client: Asset, request: web.Request) -> web.StreamResponse:
    """Answer `GET /client/VERSION.js` with the module, which a cache may keep for ever.

    Raises:
        NotFound: this server has another version, which must not be sent under this address.
    """
    if request.match_info["version"] != __version__:
        raise NotFound(
            f"this server has version {__version__} of its client: it is at "
            f"/client/{__version__}.js, and at /client.js, "
            "which has whatever version the server has"
        )
    response = await client.serve(request)
    response.headers["Cache-Control"] = IMMUTABLE
    return response
