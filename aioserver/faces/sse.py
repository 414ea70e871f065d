"""The SSE face (WHATWG HTML 9.2): `fetch` and `EventSource`, each event with its number as `id`.

POST starts an answer, and streams it or, with `Prefer: respond-async`, says where it is; GET
follows it from any event on, so that an EventSource which reconnects by itself misses nothing;
DELETE ends it. The headers are aiohttp-sse's; its ping task is not used, since it would be a
second writer on the socket.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from aiohttp import web
from aiohttp_sse import EventSourceResponse

from aioserver.auth.callers import CALLER, Caller
from aioserver.errors import InvalidRequest, ServerAtCapacity
from aioserver.faces import context, http
from aioserver.faces.streaming import follow
from aioserver.protocol import eventstream, messages
from aioserver.streams.formats import EVENTS

if TYPE_CHECKING:
    from aiohttp.abc import AbstractStreamWriter

    from aioserver.faces.admission import BodyHold
    from aioserver.protocol.messages import Chat
    from aioserver.streams.stream import Stream

RETRY = b"retry: 2000\n\n"  # milliseconds until an EventSource comes back


class Events(EventSourceResponse):
    """aiohttp-sse's response, without its ping task."""

    def __init__(self, request: web.Request) -> None:
        super().__init__(sep="\n", allow_all_methods=True, send_timeout=None)
        http.last_of_connection(request, self, streamed=True)

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Send the head."""
        return await web.StreamResponse.prepare(self, request)


@dataclass(slots=True)
class Asked:
    """A question, read and found valid."""

    caller: Caller
    chat: Chat
    later: bool  # 202 now, the events by GET


async def prepare(request: web.Request, hold: BodyHold) -> Asked:
    """The first step of POST."""
    limit = request.app[context.SETTINGS].chat.websocket.max_message_size
    _, fields = await http.read_json(request, hold, limit)
    if not isinstance(fields, dict):
        raise InvalidRequest("the body must be a JSON object")
    request_id = messages.identifier(fields.pop("request_id", None))
    preferences = request.headers.get("Prefer", "")
    later = any(one.strip().lower() == "respond-async" for one in preferences.split(","))
    return Asked(request[CALLER], messages.chat(request_id, fields), later)


async def start(request: web.Request, asked: Asked) -> web.StreamResponse:
    """The second step of POST: the answer, or where it is."""
    app = request.app
    stream = app[context.GATEWAY].ask(asked.caller, asked.chat, face="sse")
    if not asked.later:
        return await _follow(request, stream, 0)
    if not stream.readers:
        app[context.GATEWAY].lifetime.detach(stream)
    endpoint = app[context.SETTINGS].chat.sse.endpoint
    location = f"{endpoint}/{quote(stream.request_id, safe='')}"
    body: dict[str, Any] = {"request_id": stream.request_id, "location": location}
    return web.json_response(
        body, status=202, headers={"Location": location, "Preference-Applied": "respond-async"}
    )


async def prepare_resume(request: web.Request, _hold: BodyHold) -> tuple[Stream, int]:
    """The first step of GET: which stream, and behind which event."""
    app, name = request.app, messages.identifier(request.match_info["request_id"])
    given = request.headers.get("Last-Event-ID") or request.query.get("last_event_id") or "0"
    after = messages.event_number(given)
    with app[context.METRICS].resuming():
        stream = app[context.GATEWAY].find(request[CALLER], name)
        stream.locate(after)  # a gap is told before a place is taken
    return stream, after


async def resume(request: web.Request, found: tuple[Stream, int]) -> web.StreamResponse:
    """The second step of GET; 204, which stops an EventSource, where nothing is left."""
    stream, after = found
    if stream.ended and after >= stream.last:
        return web.Response(status=204)
    if request.method == "HEAD":
        return await _head(request)
    return await _follow(request, stream, after)


async def _head(request: web.Request) -> web.StreamResponse:
    response = Events(request)
    await response.prepare(request)
    return response


async def busy(request: web.Request, error: ServerAtCapacity) -> web.StreamResponse:
    """No place for a GET: any status but 200 would stop an EventSource for good."""
    request.app[context.METRICS].count_error(error)
    response = await _head(request)
    if request.method == "HEAD":
        return response
    frame = messages.loose_frame(request.match_info["request_id"], "busy", error.as_chunk())
    await response.write(RETRY + eventstream.write(frame, event="busy"))
    return response


async def listing(request: web.Request) -> web.Response:
    """GET without an id: the caller's own streams that are kept.

    Without keys these are those of its address: all are one caller then, and who has an id has the answer.
    """
    caller = request[CALLER]
    own = [
        {
            "request_id": stream.request_id,
            "status": stream.end_status.decode() or "running",
            "last_event_id": stream.last,
            "first_event_id": stream.first,
            "readers": len(stream.readers),
        }
        for stream in request.app[context.GATEWAY].streams_of(caller)
        if _own(stream, caller)
    ]
    return web.json_response({"streams": own})


def _own(stream: Stream, caller: Caller) -> bool:
    owner: Any = stream.caller
    return bool(owner.flow == caller.flow)


async def cancel(request: web.Request) -> web.Response:
    """DELETE: end the stream for everybody; also when it has ended."""
    request_id = messages.identifier(request.match_info["request_id"])
    request.app[context.GATEWAY].cancel(request[CALLER], request_id)
    return web.Response(status=204)


async def _follow(request: web.Request, stream: Stream, after: int) -> web.StreamResponse:
    def queued(position: int, eta: float) -> bytes:
        chunk = {"position": position, "eta": round(eta, 1)}
        return eventstream.write(
            messages.loose_frame(stream.request_id, "queued", chunk), event="queued"
        )

    response = Events(request)
    try:
        await follow(request, response, stream, after, EVENTS, first=RETRY, queued=queued)
    finally:
        if not stream.readers:
            request.app[context.GATEWAY].lifetime.unread(
                stream
            )  # also where nothing was ever followed
    return response
