"""The SSE face (WHATWG HTML 9.2): for `fetch` and `EventSource`; each event's number is its `id`.

POST starts an answer and streams it. With `Prefer: respond-async` (RFC 7240) it returns the
answer's location instead, and the answer runs to its end in the background. GET tells how far an
answer is (polling.py), or follows it from any event on, so that an EventSource which reconnects by
itself misses nothing. DELETE ends an answer. The headers are aiohttp-sse's; its ping task is not
used, since it would be a second writer on the socket.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import msgspec
from aiohttp import web
from aiohttp_sse import EventSourceResponse
from msgspec.structs import replace

from aioserver.auth.callers import CALLER, Caller
from aioserver.faces import http, polling
from aioserver.faces.admission import BodyHold, CountedHandler
from aioserver.faces.intake import client_headers, read_body
from aioserver.faces.streaming import follow
from aioserver.gateway.contracts.instances import ASKED
from aioserver.protocol import client_frames, eventstream, frames
from aioserver.protocol.client_frames import Chat
from aioserver.streams.formats import EVENTS, RETRY
from aioserver.streams.stream import Stream

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiohttp.abc import AbstractStreamWriter

    from aioserver.errors import AioserverError
    from aioserver.faces.context import Context


def routes(context: Context) -> list[web.RouteDef]:
    """Return the routes of this face."""
    admission = context.admission
    endpoint = context.settings.chat.sse.endpoint
    stream = f"{endpoint}/{http.REQUEST_ID}"
    follow = CountedHandler(
        admission,
        "sse",
        partial(prepare_resume, context),
        partial(resume, context),
        partial(busy, context),
        broken,
    ).handle
    answer_state = CountedHandler(
        admission, "sse", partial(polling.prepare, context), partial(polling.answer, context)
    ).handle
    return [
        web.post(
            endpoint,
            CountedHandler(
                admission,
                "sse",
                partial(prepare, context),
                partial(start, context),
                broken=broken,
            ).handle,
        ),
        web.get(endpoint, partial(listing, context)),
        web.get(stream, partial(get, follow, answer_state)),
        web.delete(stream, partial(cancel, context)),
    ]


async def get(
    follow: Callable[[web.Request], Awaitable[web.StreamResponse]],
    answer_state: Callable[[web.Request], Awaitable[web.StreamResponse]],
    request: web.Request,
) -> web.StreamResponse:
    """Answer a GET with the state of an answer (*answer_state*), or with its events (*follow*)."""
    return await (answer_state if polling.wanted(request) else follow)(request)


class Events(EventSourceResponse):
    """aiohttp-sse's response, without its ping task."""

    def __init__(self, request: web.Request) -> None:
        super().__init__(sep="\n", allow_all_methods=True, send_timeout=None)
        http.announce_close(request, self, streamed=True)

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Send the head."""
        return await web.StreamResponse.prepare(self, request)


class Question(msgspec.Struct):
    """A POST, read and found valid.

    *detached*: the client gets a 202 now, and comes back for the answer, which runs in the
    background. *after* is the last event that the client has seen; above 0, the client comes back
    for the rest of a known answer.
    """

    caller: Caller
    chat: Chat | None
    hold: BodyHold
    detached: bool
    after: int
    # The answer for which the client comes back.
    stream: Stream | None = None

    def take_chat(self) -> Chat:
        """Return the chat, and drop the reference to it: it may have megabytes."""
        chat, self.chat = self.chat, None
        assert chat is not None, "a chat is taken once"
        return chat


async def prepare(context: Context, request: web.Request, hold: BodyHold) -> Question:
    """Prepare a POST."""
    limit = context.settings.chat.websocket.max_message_size
    data = await read_body(request, hold, limit)
    chat = await client_frames.reading_question(data)
    preferences = request.headers.get("Prefer", "").split(",")
    detached = any(value.strip().lower() == "respond-async" for value in preferences)
    if headers := client_headers(context, request):
        chat = replace(chat, client_headers=headers)
    hold.request_options = hold.request_options.joined(chat.request_options)
    question = Question(request[CALLER], chat, hold, detached, _last_seen(request))
    name = chat.request_id
    if question.after:
        with context.metrics.resuming():
            question.stream = await context.gateway.route(request, name, chat.digest(), data)
            # A gap is reported before a place is taken.
            question.stream.locate(question.after)
    else:
        await context.gateway.claim(request, name, data)
    return question


async def start(context: Context, request: web.Request, question: Question) -> web.StreamResponse:
    """Answer a POST with the events, or with their location.

    A client that has seen some of the events gets exactly the rest, as by GET: libraries that can
    send a body repeat their POST when they reconnect.
    """
    gateway, stream = context.gateway, question.stream
    if stream is not None:
        # It may have been evicted meanwhile.
        stream = gateway.find(question.caller, stream.request_id)
        question.chat = None
        question.hold.release()
    else:
        stream = gateway.ask(
            question.caller,
            question.take_chat(),
            face="sse",
            hold=question.hold,
            background=question.detached,
        )
    if not question.detached:
        return await resume(context, request, (stream, question.after))
    if not stream.readers:
        context.gateway.lifetime.detach(stream)
    if stream.record.trace is not None:
        # The client will follow the stream by another request.
        stream.record.trace.followed = True
    endpoint = context.settings.chat.sse.endpoint
    location = f"{endpoint}/{quote(stream.request_id, safe='')}"
    body: dict[str, Any] = {"request_id": stream.request_id, "location": location}
    return web.json_response(
        body, status=202, headers={"Location": location, "Preference-Applied": "respond-async"}
    )


def _last_seen(request: web.Request) -> int:
    """Return the number of the last event that the client has seen, 0 for none."""
    number = request.headers.get("Last-Event-ID") or request.query.get("last_event_id") or "0"
    return client_frames.event_number(number)


async def prepare_resume(
    context: Context, request: web.Request, _hold: BodyHold
) -> tuple[Stream, int]:
    """Prepare a GET: find the stream, and the event after which to follow it."""
    name = client_frames.identifier(request.match_info["request_id"])
    after = _last_seen(request)
    with context.metrics.resuming():
        stream = await context.gateway.route(request, name)
        # A gap is reported before a place is taken.
        stream.locate(after)
    return stream, after


async def resume(
    context: Context, request: web.Request, position: tuple[Stream, int]
) -> web.StreamResponse:
    """Answer a GET with the events after *position*; with 204 if the stream ends there.

    The 204 stops an EventSource, which would otherwise reconnect for ever.
    """
    stream, after = position
    if stream.ended and after >= stream.last:
        return web.Response(status=204)
    if request.method == "HEAD":
        return await _head(request)
    return await _follow(context, request, stream, after)


async def _head(request: web.Request) -> web.StreamResponse:
    response = Events(request)
    await response.prepare(request)
    return response


async def busy(
    context: Context, request: web.Request, error: AioserverError
) -> web.StreamResponse:
    """Answer a GET for which there is no place with a 200: any other status would stop an
    EventSource for good.
    """
    context.metrics.count_error(error)
    response = await _head(request)
    if request.method == "HEAD":
        return response
    frame = frames.loose_frame(request.match_info["request_id"], "busy", error.as_chunk())
    await response.write(RETRY + eventstream.write(frame, event="busy"))
    return response


def broken(request: web.Request, error: AioserverError, _last: bytes) -> bytes:
    """Return *error*, with which another instance breaks off an answer, as an event without an id:
    a client that comes back continues after the last event that it has.
    """
    frame = frames.loose_frame(request[ASKED], "error", error.as_chunk())
    return eventstream.write(frame, event="error")


async def listing(context: Context, request: web.Request) -> web.Response:
    """Answer a GET without an id with the caller's own streams that are kept.

    Without keys all clients are one caller, and an id is enough to read an answer: a client is
    therefore shown only the streams of its own address. If an instance does not answer, the list
    lacks its streams and is marked `partial`.
    """
    streams, partial = await context.gateway.listing(request[CALLER])
    return web.json_response({"streams": streams} | ({"partial": True} if partial else {}))


async def cancel(context: Context, request: web.Request) -> web.Response:
    """Answer a DELETE: end the stream for all its readers. A stream that has already ended is no
    error.
    """
    request_id = client_frames.identifier(request.match_info["request_id"])
    await context.gateway.cancel_anywhere(request[CALLER], request_id)
    return web.Response(status=204)


async def _follow(
    context: Context, request: web.Request, stream: Stream, after: int
) -> web.StreamResponse:
    response = Events(request)
    try:
        await follow(context, request, response, stream, after, EVENTS)
    finally:
        # The stream may have no reader, if its client has left before.
        if not stream.readers:
            context.gateway.lifetime.reader_removed(stream)
    return response
