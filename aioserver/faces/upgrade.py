"""A WebSocket from its handshake (RFC 6455, 4.2) to the end of its connection, with its counted place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aioserver.auth.callers import CALLER
from aioserver.auth.guard import selectable_protocols
from aioserver.errors import ServerAtCapacity
from aioserver.faces.admission import MAX_REFUSED_CLOSING, SocketPlace
from aioserver.faces.client_messages import ClientMessages, Upgraded
from aioserver.faces.intake import client_headers
from aioserver.faces.socket import MAX_WAITING_BYTES

if TYPE_CHECKING:
    from aiohttp import web

    from aioserver.faces.context import Context
    from aioserver.faces.socket import Socket


async def serve(context: Context, request: web.Request, make: type[Socket]) -> web.StreamResponse:
    """Serve one socket, made by *make*, from the handshake to the end of its connection.

    Raises:
        InvalidRequest, ConcurrencyExceeded, ServerAtCapacity: the handshake is refused.
    """
    with context.admission.connect(make.face, request[CALLER]):
        return await _serve(context, request, make)


async def _serve(context: Context, request: web.Request, make: type[Socket]) -> web.StreamResponse:
    admission = context.admission
    if admission.refused_closing >= MAX_REFUSED_CLOSING:
        raise ServerAtCapacity("too many refused sockets are still closing", retry_after=5.0)
    limit = context.settings.chat.websocket.max_message_size
    messages = ClientMessages(admission.hold, limit)
    messages.room = MAX_WAITING_BYTES
    ws = Upgraded(
        messages,
        autoping=False,
        autoclose=False,
        compress=False,
        # Text of four bytes a character would cost four times its bytes.
        decode_text=False,
        protocols=selectable_protocols(request, make.protocols),
        # aiohttp refuses a message of exactly `max_msg_size`.
        max_msg_size=limit + 1,
    )
    payload_writer = await ws.prepare(request)
    # The headers are sent, and would be kept for hours.
    ws.headers.clear()
    assert request.transport is not None
    headers = client_headers(context, request)
    socket = make(
        context, request[CALLER], ws, messages, request.transport, payload_writer.drain, headers
    )
    context.sockets.add(socket)
    try:
        messages.start(socket)
        with SocketPlace(
            admission,
            socket.face,
            socket.caller.name,
            on_entered=socket.entered,
            on_refused=socket.refused,
            on_position=socket.show_position,
        ):
            await socket.read()
    finally:
        context.sockets.discard(socket)
        await socket.finish()
    return ws
