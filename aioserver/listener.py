"""The backlog-configured site: the HTTP limits, listening, and what the kernel gave.

aiohttp forgives a misspelled option by dropping all of them, with one log line per connection: so
they are built in one place here, and each is proven over a socket by the tests. Parser errors come
from aiohttp as text with the request's own bytes in it; `Connection` gives them our error body.

Private names of aiohttp used here, guarded by `tests/test_listener.py`: `_make_server`, `_kwargs`,
`_waiter`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiohttp import web
from aiohttp.http_exceptions import LineTooLong
from aiohttp.web_protocol import RequestHandler

from aioserver import keys
from aioserver.errors import HeadersTooLarge, InternalError, InvalidRequest, UriTooLong
from aioserver.faces.http import SERVER, error_response, request_id
from aioserver.kernel import accept_queue

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aioserver.settings import Chat, WebSocket

logger = logging.getLogger("aioserver.listener")
access_logger = logging.getLogger("aioserver.access")

MAX_HEADERS = 128  # fields of one request
LINGERING = 1.0  # seconds an answered request's unread body is read on, so that the answer arrives
UVLOOP_EARS = 8
KERNEL_PATIENCE = (
    1.0  # seconds by which the kernel's watch comes after ours, which logs and counts
)
MAX_NOT_SENT = 1 << 17  # bytes that the kernel keeps for a client who takes nothing; else 4 MiB
SOMAXCONN = Path("/proc/sys/net/core/somaxconn")


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


class Server(web.Server):
    """Makes our connections, and ends them.

    Once it ends, each connection ends with the answer under way; one that waits for its next request
    ends now, one that has brought none yet may still bring it.
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
                connection.force_close()

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


class Runner(web.AppRunner):
    """Runs the application on our connections, under the limits of the configuration."""

    def __init__(self, app: web.Application, given: WebSocket) -> None:
        super().__init__(
            app,
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
        for sock in self.app[keys.LIFE].listening:
            _watch(sock, chat.streams.send_timeout)

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
        return Server(
            made.request_handler,
            request_factory=made.request_factory,
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


@dataclass(frozen=True, slots=True)
class Listening:
    """One listening socket. *queue_limit*: what the kernel gave; None where it does not say."""

    host: str
    port: int
    backlog: int
    queue_limit: int | None

    @property
    def url(self) -> str:
        """The address, as a browser wants it."""
        return (
            f"http://[{self.host}]:{self.port}"
            if ":" in self.host
            else f"http://{self.host}:{self.port}"
        )


async def listen(
    runner: Runner, given: WebSocket, *, send_timeout: float = 10.0
) -> list[Listening]:
    """Listen on every address of the host, with the backlog.

    *send_timeout*: the kernel aborts a connection that takes nothing for a second more than that,
    also when all that is left to do is to close it (`TCP_USER_TIMEOUT`, inherited from the listening socket). What
    it keeps for one that takes nothing is bounded as well (`TCP_NOTSENT_LOWAT`).

    Raises:
        OSError: the address is in use, or is not ours.
    """
    backlog = given.concurrency.uvicorn.backlog
    bound: list[socket.socket] = []
    port = given.port
    loop = asyncio.get_running_loop()
    try:
        for family, address in await _addresses(loop, given.host, port):
            bound.append(_bind(family, address, port, send_timeout))
            port = port or bound[0].getsockname()[1]  # any port, but one for all addresses
    except OSError:
        for sock in bound:
            sock.close()
        raise
    listening = []
    for sock in bound:
        for ear in (sock, *(sock.dup() for _ in range(_ears(loop) - 1))):
            await web.SockSite(runner, ear, backlog=backlog).start()
        host, number = sock.getsockname()[:2]
        queue = accept_queue(sock)
        listening.append(Listening(host, number, backlog, queue.limit if queue else None))
        runner.app[keys.LIFE].listening.append(sock)
    _tell(listening)
    return listening


def _ears(loop: asyncio.AbstractEventLoop) -> int:
    """How often *loop* watches one listening socket.

    uvloop takes one connection for each watcher and turn of the loop: under load a turn is long,
    and newcomers would starve while those who are in notice nothing. asyncio takes all that wait.
    """
    return UVLOOP_EARS if type(loop).__module__.startswith("uvloop") else 1


async def _addresses(
    loop: asyncio.AbstractEventLoop, host: str, port: int
) -> Sequence[tuple[int, str]]:
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    unique = dict.fromkeys((family, str(address[0])) for family, *_, address in found)
    if host == "localhost":  # a machine may have no IPv6 though its hosts file names it
        unique = {
            key: None for key in unique if key[0] == socket.AF_INET or socket.has_dualstack_ipv6()
        }
    return list(unique)


def _bind(family: int, address: str, port: int, send_timeout: float) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _watch(sock, send_timeout)
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, MAX_NOT_SENT)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((address, port))
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


def _watch(sock: socket.socket, send_timeout: float) -> None:
    """Let the kernel abort connections made by *sock* that take nothing: see `listen`."""
    if hasattr(socket, "TCP_USER_TIMEOUT") and sock.fileno() >= 0:
        milliseconds = int((send_timeout + KERNEL_PATIENCE) * 1000)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)


def _tell(listening: Sequence[Listening]) -> None:
    for one in listening:
        given = "unknown" if one.queue_limit is None else one.queue_limit
        logger.info("listening on %s backlog=%d kernel=%s", one.url, one.backlog, given)
        if one.queue_limit is not None and one.queue_limit < one.backlog:
            logger.warning(
                "the kernel gave a queue of %d instead of backlog=%d: raise %s",
                one.queue_limit,
                one.backlog,
                "net.core.somaxconn",
            )
