"""Our connections: aiohttp's, with the HTTP limits of the configuration, our errors, and an orderly end.

aiohttp forgives a misspelled option by dropping all of them, with one log line per connection: so
they are built in one place here, and each is proven over a socket by the tests. Parser errors come
from aiohttp as text with the request's own bytes in it; `Connection` gives them our error body.

What aiohttp does between a parsed request and its handler (to look for the route, to make what it has
matched, to build the middlewares around it) is a seventh of a request. It gives the same each time
where a path has no parameters, so there it is done once: see `Direct`.

Private names of aiohttp used here, guarded by `tests/server/test_runner.py`: `_make_server`, `_kwargs`,
`_waiter`, `_make_request`, `_match_info`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from typing import TYPE_CHECKING, Any

from aiohttp import web
from aiohttp.abc import AbstractAccessLogger
from aiohttp.http_exceptions import LineTooLong
from aiohttp.web_protocol import RequestHandler
from aiohttp.web_urldispatcher import MatchInfoError

from aioserver.auth.callers import ADDRESS
from aioserver.errors import HeadersTooLarge, InternalError, InvalidRequest, UriTooLong
from aioserver.faces import context
from aioserver.faces.http import SERVER, Request, error_response, request_id
from aioserver.server.listener import limit_kernel

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aioserver.config.settings import Chat, WebSocket

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

logger = logging.getLogger("aioserver.runner")
access_logger = logging.getLogger("aioserver.access")

MAX_PATH = 200  # characters of a path in a line
MAX_HEADERS = 128  # fields of one request
LAST_CALL = 1.0  # seconds that a connection is kept which ends, for a request that is on its way
LINGERING = 1.0  # seconds an answered request's unread body is read on, so that the answer arrives


class Connection(RequestHandler):
    """aiohttp's connection, with our error bodies where its parser gives up.

    *requests*: how many it has brought; the middleware counts, for `max_keepalive_requests`. *last*:
    it ends with the answer under way.
    """

    __slots__ = ("last", "requests")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.requests = 0
        self.last = False

    @property
    def idle(self) -> bool:
        """Whether it waits for a request."""
        return self._waiter is not None and not self._waiter.done()

    def linger(self) -> None:
        """End, where the client was not told before that it will.

        Its next request may be on its way: for LAST_CALL it is still read, and answered with the end.
        """
        self.last = True
        self._loop.call_later(LAST_CALL, self._end_idle)

    def _end_idle(self) -> None:
        if self.idle:
            self.force_close()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to what is no valid request."""
        if status >= 500:
            if not isinstance(exc, ConnectionError):  # that is a client that left
                logger.error("bug in a handler", exc_info=exc)
            error: Any = InternalError("internal error")
        elif isinstance(exc, LineTooLong):
            line, limit = exc.args[:2]
            if limit == self.max_line_size and (
                limit != self.max_field_size or line.startswith(b"/")
            ):
                error = UriTooLong(f"a request line of more than {limit} bytes")
            else:
                error = HeadersTooLarge(f"a header of more than {limit} bytes")
        elif message is not None and message.startswith("Too many headers"):
            error = HeadersTooLarge(f"more than {self.max_headers} headers")
        else:
            error = InvalidRequest("this is no valid HTTP request")
        response = error_response(error)
        response.headers["Server"] = SERVER
        response.headers["x-request-id"] = request_id(request)
        response.headers["Connection"] = "close"
        response.force_close()
        return response


class Access(AbstractAccessLogger):
    """One line for each finished request; its address is the one that a trusted proxy gives.

    Without its query, and without what a client says of itself: that may be anything.
    """

    def log(self, request: web.BaseRequest, response: web.StreamResponse, time: float) -> None:
        """Write the line; *time*: seconds that it took."""
        fields = {
            "request_id": request_id(request),
            "address": request.get(ADDRESS, request.remote),
            "method": request.method,
            "path": request.raw_path.partition("?")[0][:MAX_PATH],
            "status": response.status,
            "bytes": response.body_length,
            "duration_ms": round(time * 1000, 1),
        }
        self.logger.info("access", extra={"fields": fields})


class Server(web.Server):
    """Makes our connections, and ends them.

    Once it ends, each connection ends with the answer under way; one that waits for its next request
    ends soon, one that has brought none yet may still bring it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ending = False
        self._awaited: set[web.RequestHandler] = set()
        self._gone = asyncio.Event()  # set while none is awaited

    def __call__(self) -> RequestHandler:
        """A connection, with every option or a TypeError: never with fewer, as aiohttp's would."""
        connection = Connection(self, loop=self._loop, **self._kwargs)
        connection.last = self._ending
        return connection

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        """It is gone."""
        super().connection_lost(handler, exc)
        self._awaited.discard(handler)
        if not self._awaited:
            self._gone.set()

    def apply(self, given: WebSocket) -> None:
        """Make connections by these limits from now on."""
        self._kwargs.update(_limits(given))

    def end(self) -> None:
        """Let no connection live longer than the answer under way on it."""
        self._ending = True
        for connection in self.connections:
            assert isinstance(connection, Connection)
            connection.last = True
            if connection.requests and connection.idle:
                connection.linger()

    async def answered(self, within: float, *, silent: bool = False) -> None:
        """Wait until the connections that have brought a request are gone; with *silent*, all."""
        self._awaited = {
            one
            for one in self.connections  # some of them are lost, their tasks about to end
            if one.transport is not None
            and (silent or (isinstance(one, Connection) and one.requests))
        }
        self._gone.clear()
        if self._awaited:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(within):
                    await self._gone.wait()

    async def let_go(self, within: float) -> None:
        """Close who says nothing, wait for the others' last words, abort who is still there."""
        for connection in self.connections:
            if isinstance(connection, Connection) and connection.idle:
                connection.force_close()
        await self.answered(within, silent=True)
        for connection in self.connections:
            if connection.transport is not None:
                connection.transport.abort()


class Direct:
    """The handler of all requests: at once where the path has no parameters, else aiohttp's way.

    Always: a request gets the handler, the middleware and the match that aiohttp's router would give it,
    but for an `Expect` that is not understood: aiohttp answers that itself, in front of the middleware.
    """

    def __init__(self, app: web.Application, shield: Callable[..., Any], other: Handler) -> None:
        self._app = app
        self._shield = shield
        self._other = other
        self._known: dict[tuple[str, str], tuple[web.UrlMappingMatchInfo, Handler]] = {}
        for route in app.router.routes():
            resource = route.resource
            if isinstance(resource, web.PlainResource):
                match = web.UrlMappingMatchInfo({}, route)
                match.add_app(app)
                match.freeze()
                # The first, as the router: a path that is there twice is its.
                self._known.setdefault((route.method, resource.canonical), (match, route.handler))

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        """The answer to *request*."""
        assert isinstance(request, Request)
        known = self._known.get((request.method, request.raw_path))
        if "Expect" in request.headers:
            if request.headers["Expect"].lower() == "100-continue":
                return await self._other(request)
            match = MatchInfoError(web.HTTPExpectationFailed())
            match.add_app(self._app)
            match.freeze()
            known = match, match.handler
        elif known is None:
            return await self._other(request)
        request._match_info, handler = known  # noqa: SLF001 - see the head of this file
        response: web.StreamResponse = await self._shield(request, handler)
        return response


class Runner(web.AppRunner):
    """Runs the application on our connections, under the limits of the configuration."""

    def __init__(self, app: web.Application, given: WebSocket) -> None:
        super().__init__(
            app,
            access_log_class=Access,
            handler_cancellation=True,  # or a client that has left keeps its place
            max_headers=MAX_HEADERS,
            lingering_time=LINGERING,
            auto_decompress=False,  # a compressed body is refused, not unpacked
            shutdown_timeout=1.0,  # after `let_go`: for what aiohttp itself leaves behind
            timeout_ceil_threshold=float("inf"),
            **_limits(given),
        )

    def apply(self, chat: Chat) -> None:
        """Listen and make connections by these limits from now on."""
        self._ours().apply(chat.websocket)
        for sock in self.app[context.LIFE].listening:
            limit_kernel(sock, chat.streams.send_timeout)

    async def stop(self) -> None:
        """Accept nobody any more; connections end with their answers: see `Server`."""
        for site in list(self.sites):
            await site.stop()
        await asyncio.sleep(0)  # who was accepted in this turn has a connection then
        self._ours().end()

    async def answered(self, within: float) -> None:
        """Wait for the answers under way, *within* seconds at most."""
        await self._ours().answered(within)

    async def let_go(self, within: float) -> None:
        """End every connection, by force what is left after *within* seconds."""
        await self._ours().let_go(within)

    def _ours(self) -> Server:
        assert isinstance(self.server, Server), "set up before"
        return self.server

    async def _make_server(self) -> Server:
        made = await super()._make_server()
        app = self.app
        direct = Direct(app, app[context.SHIELD], made.request_handler)
        return Server(
            direct,
            request_factory=functools.partial(app._make_request, _cls=Request),  # noqa: SLF001
            handler_cancellation=made.handler_cancellation,
            **made._kwargs,  # noqa: SLF001 - see the head of this file
        )


def _limits(given: WebSocket) -> dict[str, Any]:
    """Those options of a connection that the configuration says."""
    limits = given.concurrency.uvicorn
    return {
        "access_log": access_logger if limits.access_log else None,
        "keepalive_timeout": limits.keepalive_timeout,
        "max_line_size": limits.h11_max_request_line_size,
        "max_field_size": min(limits.h11_max_incomplete_event_size, limits.h11_max_header_size),
    }
