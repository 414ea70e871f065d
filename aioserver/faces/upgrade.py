"""A WebSocket from its handshake (RFC 6455, 4.2) to the end of its connection, with its counted
place.

The socket waits for its place in a task of its own, since it has to go on reading.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Self

from aiohttp import hdrs

from aioserver.auth.callers import CALLER
from aioserver.auth.guard import selectable_protocols
from aioserver.errors import AioserverError, ServerAtCapacity, UpgradeRequired, public
from aioserver.faces.admission import MAX_REFUSED_CLOSING
from aioserver.faces.client_messages import ClientMessages, Upgraded
from aioserver.faces.intake import client_headers
from aioserver.faces.socket import MAX_WAITING_BYTES
from aioserver.protocol.request_headers import request_options_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp import web

    from aioserver.faces.admission import Admission
    from aioserver.faces.context import Context
    from aioserver.faces.socket import Socket
    from aioserver.limits.resource import Grant

logger = logging.getLogger("aioserver.connections")


class SocketPlace:
    """The place of *socket*: taken at once, or awaited while the socket's reader goes on.

    Within its `with`, exactly one of the socket's `entered` and `refused` is called, or neither if
    the `with` ends earlier. At its end the place is given back, or the wait is cancelled.
    """

    __slots__ = ("_admission", "_over", "_place", "_socket", "_task")

    def __init__(self, admission: Admission, socket: Socket) -> None:
        self._admission = admission
        self._socket = socket
        self._place: Grant | None = None
        self._task: asyncio.Task[Grant] | None = None
        self._over = False

    def __enter__(self) -> Self:
        self._place = self._admission.try_enter()
        try:
            if self._place is not None:
                self._socket.entered(self._place)
            else:
                socket = self._socket
                wait = self._admission.wait(socket.face, socket.caller.name, socket.show_position)
                self._task = asyncio.ensure_future(wait)
                self._task.add_done_callback(self._settle)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        self._over = True
        if self._place is not None:
            self._place.release()
        if self._task is not None:
            self._task.cancel()

    def _settle(self, task: asyncio.Task[Grant]) -> None:
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            self._place = task.result()
            if self._over:
                self._place.release()
                return
            try:
                self._socket.entered(self._place)
            except Exception as exc:  # noqa: BLE001 - logged below, and sent to the client
                error = exc
        if error is not None and not self._over:
            if not isinstance(error, AioserverError):
                logger.error("bug in a socket's wait", exc_info=error)
                self._admission.metrics.bugs.note(error)
            self._socket.refused(public(error))


async def serve(
    context: Context,
    request: web.Request,
    kind: type[Socket],
    make: Callable[..., Socket] | None = None,
) -> web.StreamResponse:
    """Serve one socket of this *kind* from the handshake to the end of its connection. *make*
    makes the socket if its constructor needs further arguments.

    Raises:
        UpgradeRequired: *request* is no handshake.
        InvalidRequest, ConcurrencyExceeded, ServerAtCapacity: the handshake is refused.
    """
    admission = context.admission
    if "websocket" not in request.headers.get(hdrs.UPGRADE, "").lower():
        error = UpgradeRequired(
            f"this is the WebSocket: upgrade, or POST {context.settings.chat.sse.endpoint}"
        )
        error.protocol = "websocket"
        raise error
    quota = await admission.connect(kind.face, request[CALLER])
    try:
        if admission.refused_closing >= MAX_REFUSED_CLOSING:
            raise ServerAtCapacity("too many refused sockets are still closing", retry_after=5.0)
        ws, messages, socket = await _upgrade(context, request, kind, make or kind)
        context.sockets.add(socket)
        try:
            messages.start(socket)
            with SocketPlace(admission, socket):
                await socket.read()
        finally:
            context.sockets.discard(socket)
            await socket.finish()
        return ws
    finally:
        if quota is not None:
            quota.disconnect()


async def _upgrade(
    context: Context, request: web.Request, kind: type[Socket], make: Callable[..., Socket]
) -> tuple[Upgraded, ClientMessages, Socket]:
    """Do the handshake.

    A function of its own, so that its variables are freed: an idle socket keeps each frame of its
    task.
    """
    admission, request_options = context.admission, request_options_of(request.headers)
    headers = client_headers(context, request)
    limit = context.settings.chat.websocket.max_message_size
    messages = ClientMessages(admission.hold, limit)
    messages.room = MAX_WAITING_BYTES
    ws = Upgraded(
        messages,
        autoping=False,
        autoclose=False,
        compress=False,
        # Decoded text may take four bytes a character, which is four times the size of the
        # message.
        decode_text=False,
        protocols=selectable_protocols(request, kind.protocols),
        # aiohttp refuses a message of exactly `max_msg_size`.
        max_msg_size=limit + 1,
    )
    payload_writer = await ws.prepare(request)
    # The headers are sent, and would otherwise be kept for the hours of the connection.
    ws.headers.clear()
    assert request.transport is not None
    drain = payload_writer.drain
    socket = make(
        context, request[CALLER], ws, messages, request.transport, drain, headers, request_options
    )
    return ws, messages, socket
