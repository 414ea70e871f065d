"""A WebSocket from its handshake (RFC 6455, 4.2) to the end of its connection, with its counted place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aioserver.auth.callers import CALLER
from aioserver.auth.guard import selectable_protocols
from aioserver.errors import ServerAtCapacity
from aioserver.faces.admission import MAX_REFUSED_CLOSING
from aioserver.faces.client_messages import ClientMessages, Upgraded
from aioserver.faces.intake import client_headers
from aioserver.faces.socket import MAX_WAITING_BYTES
from aioserver.faces.socket_place import SocketPlace

if TYPE_CHECKING:
    from aiohttp import web

    from aioserver.faces.context import Context
    from aioserver.faces.socket import Socket


async def serve(context: Context, request: web.Request, make: type[Socket]) -> web.StreamResponse:
    """Serve one socket, made by *make*, from the handshake to the end of its connection.

    Raises:
        InvalidRequest, ConcurrencyExceeded, ServerAtCapacity: the handshake is refused.
    """
    admission = context.admission
    with admission.connect(make.face, request[CALLER]):
        if admission.refused_closing >= MAX_REFUSED_CLOSING:
            raise ServerAtCapacity("too many refused sockets are still closing", retry_after=5.0)
        ws, messages, socket = await _upgrade(context, request, make)
        context.sockets.add(socket)
        try:
            messages.start(socket)
            with SocketPlace(admission, socket):
                await socket.read()
        finally:
            context.sockets.discard(socket)
            await socket.finish()
        return ws


async def _upgrade(
    context: Context, request: web.Request, make: type[Socket]
) -> tuple[Upgraded, ClientMessages, Socket]:
    """Do the handshake. What it needs is gone after it: an idle socket keeps each frame of its task."""
    admission = context.admission
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
    return ws, messages, socket
