"""Serves a request at once if its connection is idle, without aiohttp's loop of that connection.

That loop (`RequestHandler.start`) is a task that waits for the next request. If it is woken for a
request, starts another task for the request and is woken again at the end, a request that is not
streamed costs a twentieth more of CPU time. Here the loop sleeps on, and the task of the request
begins within `data_received`. The loop is woken for everything that is not one ordinary request:
requests that arrive together, a request that the parser refuses, and a change of the protocol
(WebSockets).

Private names of aiohttp used here, where it has them: `_ErrInfo`, `_close`, `_force_close`,
`_handle_request`, `_keepalive`, `_keepalive_handle`, `_keepalive_timeout`, `_lingering_time`,
`_logging_enabled`, `_loop`, `_manager`, `_messages`, `_next_keepalive_close_time`, `_parser`,
`_process_keepalive`, `_reading_paused`, `_request_factory`, `_request_handler`, `_task`,
`_task_handler`, `_upgraded`, `_waiter`. An aiohttp without them serves every request by its own
loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from aiohttp.http import StreamWriter
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web import RequestPayloadError
from aiohttp.web_protocol import RequestHandler

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from aiohttp import StreamReader
    from aiohttp.http import RawRequestMessage


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
