"""How our connections are made: their options, their access log, and those of other instances."""

from __future__ import annotations

import asyncio
import functools
import logging
from typing import TYPE_CHECKING, Any

from aiohttp.abc import AbstractAccessLogger

from aioserver.auth.callers import ADDRESS
from aioserver.faces.http import Request, request_id
from aioserver.gateway.contracts.instances import FORWARDED
from aioserver.server.connection import Connection, ConnectionServer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from aiohttp import web

    from aioserver.auth.callers import Peer
    from aioserver.config.settings import WebSocket
    from aioserver.faces.context import Context
    from aioserver.faces.wing import Wing

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

access_logger = logging.getLogger("aioserver.access")

# Characters of a path in a log line.
MAX_PATH = 200
# Header fields of one request.
MAX_HEADERS = 128
# Bytes of a body that wait in its connection; at twice that the client is stopped, and one read
# adds 256 KiB.
READ_BUFFER = 1 << 16
# Seconds for which the unread body of an answered request is still read, so that the response
# arrives.
LINGERING = 1.0
# Seconds for the last responses and close frames, after the last answer has ended.
FAREWELL = 2.0


class AccessLogger(AbstractAccessLogger):
    """Logs a line for each finished request, with the address that a trusted proxy gives.

    The query and the User-Agent are left out: both may hold anything.
    """

    def log(self, request: web.BaseRequest, response: web.StreamResponse, time: float) -> None:
        """Write the line; *time*: the seconds that the request took."""
        fields = {
            "request_id": request_id(request),
            "address": request.get(ADDRESS, request.remote),
            "method": request.method,
            "path": request.raw_path.partition("?")[0][:MAX_PATH],
            "status": response.status,
            "bytes": response.body_length,
            "duration_ms": round(time * 1000, 1),
        }
        if (owner := request.get(FORWARDED)) is not None:
            fields["forwarded"] = owner
        self.logger.info("access", extra={"fields": fields})


# The options of a connection that no setting decides. A compressed body is refused, not unpacked.
FIXED: dict[str, Any] = {
    "access_log_class": AccessLogger,
    "max_headers": MAX_HEADERS,
    "lingering_time": LINGERING,
    "auto_decompress": False,
    "read_bufsize": READ_BUFFER,
    "timeout_ceil_threshold": float("inf"),
}


async def accept_peers(wings: Sequence[Wing], context: Context, handler: Handler) -> None:
    """Let *wings* bring requests that other instances pass on, each to *handler*; they also end
    the connections of those.
    """
    arguments = arguments_of(context)
    # The instance that passes a request on has it in its own access log.
    arguments["options"] |= {"access_log": None}
    peers = ConnectionServer(handler, **arguments)

    def accept(peer: Peer) -> Connection:
        connection = peers()
        connection.peer = peer
        return connection

    for wing in wings:
        await wing.listen(accept)


def arguments_of(context: Context) -> dict[str, Any]:
    """Return the arguments of a `ConnectionServer`."""
    return {
        "options": FIXED | options_of(context.settings.chat.websocket),
        "request_factory": functools.partial(Request, loop=asyncio.get_running_loop()),
        "metrics": context.metrics,
        "forms": context.admission.forms,
        "send_timeout": context.settings.chat.streams.send_timeout,
    }


def options_of(settings: WebSocket) -> dict[str, Any]:
    """Return the options of a connection that the configuration decides; FIXED has the others."""
    limits = settings.concurrency.uvicorn
    return {
        "access_log": access_logger if limits.access_log else None,
        "keepalive_timeout": limits.keepalive_timeout,
        "max_line_size": limits.h11_max_request_line_size,
        "max_field_size": min(limits.h11_max_incomplete_event_size, limits.h11_max_header_size),
    }
