"""An aiohttp application with a page of its own, in which the whole chat server is embedded.

    python examples/embedded.py [--port 8000] [--config config.yaml]

`/` is the chat page, `/ws/chat`, `/sse/chat` and `/v1` are the server's faces, and
`/haiku?about=rain` is ours: a handler that asks the server in the same process. What an embedded
server lacks stands at `aioserver.server.app.make_app`.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from aiohttp import web

from aioserver.client import AnswerError, Client
from aioserver.config import Configuration
from aioserver.server.app import make_app

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

CLIENT = web.AppKey("client", Client)


async def haiku(request: web.Request) -> web.StreamResponse:
    """Stream a poem to the browser, piece by piece."""
    about = request.query.get("about", "rain")
    response = web.StreamResponse(headers={"Content-Type": "text/plain; charset=utf-8"})
    answer = request.app[CLIENT].chat(f"Write a haiku about {about}.")
    try:
        # A browser that leaves ends this handler, and so the answer: nobody pays for the rest.
        async with answer:
            async for piece in answer:
                if not response.prepared:
                    await response.prepare(request)
                await response.write(piece.encode())
    except AnswerError as error:
        if response.prepared:
            raise
        return web.Response(status=503, text=f"{error.message}\n")
    return response


def make_site(configuration: Configuration, url: str) -> web.Application:
    """Return the chat server's application, with a route more.

    The client asks *url*, which is its address.
    """

    async def client_of_the_site(app: web.Application) -> AsyncIterator[None]:
        async with Client(url) as client:
            app[CLIENT] = client
            yield

    app = make_app(configuration)
    app.cleanup_ctx.append(client_of_the_site)
    app.router.add_get("/haiku", haiku)
    return app


def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--config", help="as for aioserver serve")
    options = parser.parse_args()
    configuration = Configuration.load(options.config)
    site = make_site(configuration, f"http://127.0.0.1:{options.port}")
    web.run_app(site, host="127.0.0.1", port=options.port)


if __name__ == "__main__":
    main()
