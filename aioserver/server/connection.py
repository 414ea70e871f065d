"""Our connections: aiohttp's, with our error bodies, a count of their requests, and an orderly
end.

If one option is misspelled, aiohttp drops all of them, with one log line for each connection:
`__call__` therefore makes each connection with all options, and the tests prove each option over a
socket. Errors of aiohttp's parser are texts that contain the request's own bytes; `Connection`
replaces them by our body.

aiohttp's loop of a connection (`RequestHandler.start`) is a task that waits for the next request.
If it is woken for a request, starts another task for the request and is woken again at the end, a
request that is not streamed costs a twentieth more of CPU time. While a connection is idle,
`DirectRequestHandler` lets the loop sleep on, and the task of the request begins within
`data_received`. The loop is woken for everything that is not one ordinary request: requests that
arrive together, a request that the parser refuses, and a change of the protocol (WebSockets).

Private names of aiohttp used here, where it has them: `_ErrInfo`, `_close`, `_force_close`,
`_handle_request`, `_keepalive`, `_keepalive_handle`, `_keepalive_timeout`, `_lingering_time`,
`_logging_enabled`, `_loop`, `_manager`, `_messages`, `_next_keepalive_close_time`, `_parser`,
`_process_keepalive`, `_reading_paused`, `_request_factory`, `_request_handler`, `_task`,
`_task_handler`, `_upgraded`, `_waiter`. An aiohttp without them serves every request by its own
loop.

This file is one concept: a connection from its first request to its end, and the server that makes
and ends connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import ref

from aiohttp import web
from aiohttp.http import StreamWriter
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong
from aiohttp.web import RequestPayloadError
from aiohttp.web_protocol import RequestHandler

from aioserver.errors import HeadersTooLarge, InternalError, InvalidRequest, UriTooLong
from aioserver.faces.form import OPENAI
from aioserver.faces.http import SERVER, error_response, request_id
from aioserver.limits.write_watchdog import reset, watch_rest
from aioserver.streams.outbox import Outbox

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Mapping

    from aiohttp import StreamReader
    from aiohttp.http import RawRequestMessage
    from aiohttp.http_websocket import WebSocketReader

    from aioserver.auth.callers import Peer
    from aioserver.faces.form import Forms
    from aioserver.telemetry.metrics import Metrics


try:
    from aiohttp.web_protocol import _ErrInfo
except ImportError:  # an aiohttp that names it otherwise
    DIRECT = False
else:
    # Whether aiohttp has the private names; without them its own loop serves every request.
    DIRECT = all(
        hasattr(RequestHandler, name)
        for name in (
            "_close",
            "_force_close",
            "_handle_request",
            "_keepalive",
            "_keepalive_handle",
            "_keepalive_timeout",
            "_lingering_time",
            "_logging_enabled",
            "_loop",
            "_manager",
            "_messages",
            "_next_keepalive_close_time",
            "_parser",
            "_process_keepalive",
            "_reading_paused",
            "_request_factory",
            "_request_handler",
            "_task_handler",
            "_upgraded",
            "_waiter",
        )
    )

if sys.version_info >= (3, 12):
    # It runs until its first wait before this returns.
    start_task = partial(asyncio.Task, eager_start=True)
else:

    def start_task(
        coroutine: Coroutine[Any, Any, None], *, loop: asyncio.AbstractEventLoop
    ) -> asyncio.Task[None]:
        """Start a task, as `asyncio.Task` does."""
        return loop.create_task(coroutine)


class DirectRequestHandler(RequestHandler):
    """aiohttp's connection, which serves most requests without its loop.

    Always: while a request is served directly, aiohttp's loop waits for the future that was
    `_waiter`, and the connection has no `_waiter`. A connection that has one is idle.
    """

    __slots__ = ()

    def data_received(self, data: bytes) -> None:
        """Parse *data*, and serve the request that it brings."""
        waiter = self._waiter if DIRECT else None
        if waiter is None or waiter.done():
            super().data_received(data)
            return
        # Without it, aiohttp cannot wake its loop.
        self._waiter = None
        try:
            super().data_received(data)
        except BaseException:
            self._waiter = waiter
            raise
        if self._messages:
            self._begin(waiter)
        else:
            self._waiter = waiter

    def _begin(self, waiter: asyncio.Future[None]) -> None:
        """Serve the request that has arrived. If it is not an ordinary one, wake aiohttp's loop,
        which waits for *waiter*, to serve it.
        """
        messages = self._messages
        message, payload = messages[0]
        if len(messages) > 1 or self._upgraded or isinstance(message, _ErrInfo):
            waiter.set_result(None)
        else:
            messages.popleft()
            start_task(self._serve(waiter, message, payload), loop=self._loop)

    def resume_reading(self, resume_parser: bool = True) -> None:
        """Read on if reading was paused. aiohttp calls this twice for every body."""
        if not DIRECT or self._reading_paused:
            super().resume_reading(resume_parser)

    async def _serve(
        self, waiter: asyncio.Future[None], message: RawRequestMessage, payload: StreamReader
    ) -> None:
        """Serve one request as `start` does. Then give *waiter* back, so that the connection is
        idle, or end the connection.
        """
        loop, manager, parser = self._loop, self._manager, self._parser
        make_request, handler = self._request_factory, self._request_handler
        if manager is None or parser is None or make_request is None or handler is None:
            # The connection was lost before the task began.
            waiter.cancel()
            return
        loop_task, task = self._task_handler, asyncio.current_task(loop)
        assert task is not None
        self._task_handler = task
        goes_on = False
        try:
            parser.message_consumed()
            manager.requests_count += 1
            began = loop.time() if self._logging_enabled else None
            writer = StreamWriter(self, loop)
            request = make_request(message, payload, self, writer, task)
            try:
                response, reset = await self._handle_request(request, began, handler)
            finally:
                # Otherwise the task and the request would refer to each other.
                request._task = None  # type: ignore[assignment]  # noqa: SLF001 - as `start` does
            self._keepalive = bool(response.keep_alive)
            if not reset and (payload.is_eof() or await self._linger(payload)):
                goes_on = self._keepalive
        except ConnectionError as exc:
            self.log_debug("the client has left", exc_info=exc)
        except Exception as exc:  # noqa: BLE001 - the border of a request, as in `start`
            self.log_exception("bug in a connection", exc_info=exc)
            self.force_close()
        except asyncio.CancelledError:
            # A task that raised the error would keep it, and with it all frames of the request.
            self.force_close()
        except BaseException:
            self.force_close()
            raise
        finally:
            if self._task_handler is task:
                self._task_handler = loop_task
            if not goes_on or self._close or self._force_close:
                self._waiter = waiter
                self._end(waiter)
            else:
                self._next_keepalive_close_time = due = loop.time() + self._keepalive_timeout
                if self._keepalive_handle is None:
                    self._keepalive_handle = loop.call_at(due, self._process_keepalive)
                if self._messages and not waiter.done():
                    # Requests have arrived meanwhile.
                    self._begin(waiter)
                else:
                    self._waiter = waiter

    async def _linger(self, payload: StreamReader) -> bool:
        """Read the rest of a body that its handler has not read. Return whether the body is
        complete.

        If the connection closed while bytes arrive, it would be reset, perhaps before the client
        has the response.
        """
        if self._force_close or not self._lingering_time:
            return False
        with contextlib.suppress(TimeoutError, HttpProcessingError, RequestPayloadError):
            async with asyncio.timeout(self._lingering_time):
                while not payload.is_eof():
                    await payload.readany()
        return payload.is_eof()

    def _end(self, waiter: asyncio.Future[None]) -> None:
        """End the connection, and with it aiohttp's loop."""
        waiter.cancel()
        if self.transport is not None:
            self.transport.close()


logger = logging.getLogger("aioserver.runner")

# Seconds for which a connection that ends is still read: a request may be on its way.
LAST_CALL = 1.0
# Replaces the request parser of a connection that has become a WebSocket, which saves a quarter of
# an idle socket. A removed parser must not be paused either, hence `_upgraded`.
UPGRADED: dict[str, Any] = {"_parser": None, "_messages": deque(maxlen=0), "_upgraded": True}
if not all(hasattr(web.RequestHandler, name) for name in UPGRADED):
    UPGRADED = {}


class Connection(DirectRequestHandler):
    """One client's connection. *metrics* counts the requests that the parser refuses.

    *requests* is the number of requests so far, for `max_keepalive_requests`. *last*: whether the
    connection ends with the response under way. *peer*: the instance that uses it, if it is one.
    """

    __slots__ = (
        *("_body", "_outbox", "_server", "_last_task"),
        *("forms", "last", "metrics", "peer", "requests"),
    )

    def __init__(
        self,
        server: ConnectionServer,
        *,
        metrics: Metrics,
        forms: Forms,
        outbox: Outbox,
        **options: Any,
    ) -> None:
        super().__init__(server, **options)
        self._server = server
        self.metrics, self.forms = metrics, forms
        # Sends whole responses.
        self._outbox = outbox
        self.requests = 0
        self.last = False
        self.peer: Peer | None = None
        # The task of the last request, while it lives, and the body of that request.
        self._last_task: ref[asyncio.Task[Any]] | None = None
        self._body: StreamReader | None = None

    def begin(self, request: web.BaseRequest) -> None:
        """Count *request*, which the current task handles."""
        task = asyncio.current_task()
        assert task is not None
        self.requests += 1
        self._last_task, self._body = ref(task), request.content

    @property
    def idle(self) -> bool:
        """Whether no request is under way, and no body is still being read."""
        task = None if self._last_task is None else self._last_task()
        return (task is None or task.done()) and (self._body is None or self._body.is_eof())

    def connection_lost(self, exc: BaseException | None) -> None:
        """Drop the last body, which refers to this connection."""
        super().connection_lost(exc)
        self._body = None

    def set_parser(
        self, parser: WebSocketReader, data_received_cb: Callable[[], None] | None = None
    ) -> None:
        """Give all further bytes to *parser*: the connection has become a WebSocket.

        The request parser is freed, since no request follows.
        """
        super().set_parser(parser, data_received_cb)
        for name, value in UPGRADED.items():
            setattr(self, name, value)

    def send(self, data: bytes) -> asyncio.Future[None]:
        """Write *data* with everything that this iteration of the event loop writes. The future is
        done once it is written.
        """
        return self._outbox.send(self, data)

    def write(self, data: bytes) -> None:
        """Write *data*, unless the connection is lost or closing: called by the outbox."""
        transport = self.transport
        if transport is not None and not transport.is_closing():
            transport.write(data)

    def abort(self) -> None:
        """Reset the connection: called by the outbox, if `write` has failed."""
        if self.transport is not None:
            reset(self.transport)

    async def start(self) -> None:
        """Serve the requests of the connection, one after the other, and close it."""
        try:
            await super().start()
        finally:
            self._watch_rest(self.transport)

    def force_close(self) -> None:
        """Close the connection, which still sends what its transport has."""
        transport = self.transport
        super().force_close()
        self._watch_rest(transport)

    def eof_received(self) -> None:
        """Let the transport close, since the client sends nothing more.

        Bytes that are still to be sent may belong to an answer that pauses for a long time.
        """
        super().eof_received()
        self._watch_rest(self.transport)

    def _watch_rest(self, transport: asyncio.Transport | None) -> None:
        if transport is not None:
            watch_rest(transport, self._server.send_timeout)

    def close_soon(self) -> None:
        """Close, although the last response did not announce it.

        The client's next request may be on its way: for LAST_CALL it is still read, and its
        response announces that the connection ends.
        """
        self.last = True
        asyncio.get_running_loop().call_later(LAST_CALL, self._close_if_idle)

    def _close_if_idle(self) -> None:
        if self.idle:
            self.force_close()

    def log_exception(self, *_args: Any, exc_info: BaseException | None = None) -> None:
        """Log and count a bug, which a request has met outside of its handler; aiohttp's own
        logger is silent.
        """
        logger.error("bug in a connection", exc_info=exc_info)
        self.metrics.bugs.note(exc_info or RuntimeError())

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Return the response to a request that aiohttp's parser refused, or that broke
        aiohttp.
        """
        if status >= 500:
            # A ConnectionError only means that the client left.
            if not isinstance(exc, ConnectionError):
                logger.error("bug in a handler", exc_info=exc)
                # aiohttp does not pass a TimeoutError on.
                self.metrics.bugs.note(exc or TimeoutError())
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
        self.metrics.count_error(error)
        # Nothing is known of a request that the parser refused.
        form = self.forms.of(request) if status >= 500 else OPENAI
        response = error_response(error, request, form)
        response.headers["Server"] = SERVER
        response.headers["x-request-id"] = request_id(request)
        response.headers["Connection"] = "close"
        response.force_close()
        return response


class ConnectionServer(web.Server):
    """Makes the connections, with *options* of `RequestHandler`, and ends them. *sites* are the
    sockets that accept them.

    Once it drains, each connection ends with the response under way. A connection that waits for
    its next request ends soon; a connection without a request so far may still bring one.

    *send_timeout*: seconds after which a closed connection is aborted, if its client does not read
    the rest.
    """

    def __init__(
        self,
        handler: Callable[[Any], Awaitable[web.StreamResponse]],
        *,
        request_factory: Callable[..., web.BaseRequest],
        options: Mapping[str, Any],
        metrics: Metrics,
        forms: Forms,
        send_timeout: float,
    ) -> None:
        # Without the cancellation, the place of a client that has left would be held until its
        # answer ends.
        super().__init__(handler, request_factory=request_factory, handler_cancellation=True)
        self.options = dict(options)
        # Their class is in listener.py, which imports this file.
        self.sites: set[Any] = set()
        self.send_timeout = send_timeout
        self._metrics, self._forms = metrics, forms
        self._running_loop = loop = asyncio.get_running_loop()
        self._outbox = Outbox(loop)
        self._draining = False
        self._awaited: set[web.RequestHandler] = set()
        # Set while no connection's end is awaited.
        self._none_awaited = asyncio.Event()

    def __call__(self) -> Connection:
        """Return a new connection.

        Raises:
            TypeError: aiohttp does not know an option. Its own server would drop all options then.
        """
        connection = Connection(
            self,
            metrics=self._metrics,
            forms=self._forms,
            outbox=self._outbox,
            loop=self._running_loop,
            **self.options,
        )
        connection.last = self._draining
        return connection

    def handshake_begins(self) -> None:
        """Note a connection that will be made once its TLS handshake is done."""

    def handshake_ends(self) -> None:
        """Note that the handshake of a connection has ended, with any outcome."""

    def connection_lost(
        self, handler: web.RequestHandler, exc: BaseException | None = None
    ) -> None:
        """Forget a connection that is gone."""
        super().connection_lost(handler, exc)
        self._awaited.discard(handler)
        if not self._awaited:
            self._none_awaited.set()

    @property
    def active(self) -> bool:
        """Whether there is a connection that has brought a request."""
        return any(
            connection.transport is not None
            and isinstance(connection, Connection)
            and connection.requests
            for connection in self.connections
        )

    def apply(self, options: Mapping[str, Any]) -> None:
        """Make connections with *options* of `RequestHandler` from now on."""
        self.options.update(options)

    def drain(self, *, silent: bool = False) -> None:
        """Let no connection live longer than the response under way on it.

        *silent*: connections that have brought no request end as soon as connections that wait for
        their next one.
        """
        self._draining = True
        for connection in self.connections:
            assert isinstance(connection, Connection)
            connection.last = True
            if (connection.requests or silent) and connection.idle:
                connection.close_soon()

    async def wait_closed(self, seconds: float, *, silent: bool = False) -> None:
        """Wait until the connections are gone, *seconds* at most.

        Connections that have brought no request are awaited only if *silent* is set.
        """
        self._awaited = {
            connection
            # Some connections are already lost, and their tasks about to end.
            for connection in self.connections
            if connection.transport is not None
            and (silent or (isinstance(connection, Connection) and connection.requests))
        }
        self._none_awaited.clear()
        if self._awaited:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._none_awaited.wait()

    async def disconnect(self, seconds: float) -> None:
        """Close idle connections at once, and others when they are done, or by force after
        *seconds*.
        """
        for connection in self.connections:
            if isinstance(connection, Connection) and connection.idle:
                connection.force_close()
        await self.wait_closed(seconds, silent=True)
        for connection in self.connections:
            if connection.transport is not None:
                connection.transport.abort()
