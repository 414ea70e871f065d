"""OpenAI's responses: new ones (`POST /v1/responses`), and those that are known by their ids,
served from the log.

    POST /v1/responses               prepare_new, then as any answer of that API (faces/openai.py),
                                     or in the background (background.py): serve
    GET  /v1/responses/{id}          prepare_retrieval, retrieve
    POST /v1/responses/{id}/cancel   cancel
    POST /v1/responses/compact       compaction.py

The events of a response that was requested with `store: true` are kept for its `resume_window`,
and those of one in the background for `store_window`. A response is found by the id that the
provider gave it; a response that was not streamed is found only once it will not change any more.
`starting_after` counts as the provider does, by the `sequence_number` in its events; the log's own
numbers are not used there. A response that is stored can be read for longer (stored_face.py).

This file is one concept: a response with a log, from the request that makes it to its end, for
each way of reading it.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING

from aiohttp import web

from aioserver.auth.callers import CALLER
from aioserver.errors import InstanceUnavailable, InvalidRequest, ResumeGap, StreamNotFound
from aioserver.faces import http, openai, passthrough
from aioserver.faces.admission import CountedHandler
from aioserver.faces.intake import caller_of, client_headers, idempotency_key, read_model_body
from aioserver.faces.ready import HIGH_WATER
from aioserver.gateway.contracts.instances import Elsewhere
from aioserver.gateway.request import Request
from aioserver.protocol import eventstream
from aioserver.streams.ending import run_all
from aioserver.streams.entries import CANCELLED, COMPLETE
from aioserver.wings.responses import compaction, frames, stored_face
from aioserver.wings.responses.api import RESPONSES
from aioserver.wings.responses.attempt import (
    ResponseAttempt,
    ResponseRequest,
    ResponsesCapabilities,
    frame_of,
)
from aioserver.wings.responses.background import Background, OpeningReader, options_of
from aioserver.wings.responses.bridge.request import chat_request
from aioserver.wings.responses.draft import draft_of
from aioserver.wings.responses.events import ResponseEvents

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aioserver.auth.callers import Caller
    from aioserver.errors import AioserverError
    from aioserver.faces.admission import BodyHold
    from aioserver.faces.context import Context
    from aioserver.protocol.model_body import ModelBody
    from aioserver.protocol.request_headers import ClientHeaders
    from aioserver.streams.stream import Stream
    from aioserver.wings.responses.draft import Draft
    from aioserver.wings.responses.stored import StoredResponses


# Codex ends a response without an event for 300 s, and ignores comments. All others get comments:
# OpenAI's SDKs fail on an event before `response.created`.
CODEX = openai.OPENAI._replace(
    heartbeat=b'event: aioserver:heartbeat\ndata: {"type":"aioserver:heartbeat"}\n\n',
    render_wait=lambda queued: eventstream.write(
        frames.queued(None, *queued), event="aioserver:queued"
    ),
)


def routes(context: Context, stored: StoredResponses) -> list[web.RouteDef]:
    """Return the routes of this part of OpenAI's API."""
    writing = CountedHandler(
        context.admission,
        "openai",
        partial(route, context),
        partial(write_cancelled, context),
    ).handle
    return [
        web.post(
            "/v1/responses",
            CountedHandler(
                context.admission,
                openai.OPENAI.face,
                partial(prepare_new, context, stored),
                partial(serve, context),
                broken=broken,
            ).handle,
        ),
        web.get(
            f"/v1/responses/{http.ID}",
            CountedHandler(
                context.admission,
                "openai",
                partial(prepare_retrieval, context, stored),
                partial(retrieve, context, stored),
                broken=broken,
            ).handle,
            # aiohttp does not write the body, and so would not leave it out for HEAD.
            allow_head=False,
        ),
        web.post(
            f"/v1/responses/{http.ID}/cancel",
            partial(
                cancel,
                context,
                stored,
                writing,
                stored_face.passing(context, stored_face.prepare_passed),
            ),
        ),
        web.post(
            "/v1/responses/compact",
            CountedHandler(
                context.admission,
                passthrough.FACE,
                partial(compaction.prepare, context, stored, make_request),
                partial(compaction.serve, context),
            ).handle,
            expect_handler=passthrough.expect_later,
        ),
        *stored_face.routes(context, stored),
    ]


async def prepare_new(
    context: Context, stored: StoredResponses, request: web.Request, hold: BodyHold
) -> Request:
    """Prepare a POST of a new response.

    Raises:
        InvalidRequest: it asks for the background, and not to be stored.
    """
    limit = context.settings.chat.websocket.max_message_size
    body, data = await read_model_body(request, hold, limit)
    if body.background and body.stored is False:
        raise InvalidRequest("a response in the background must be stored", param="store")
    caller, key = request[CALLER], idempotency_key(request)
    running = await _background(context, body, caller) if body.background else None
    if key is not None:
        # Nothing is awaited between a claim and the wait for a place, or the answer.
        await context.gateway.claim(request, key, data)
    return make_request(
        context,
        body,
        face=openai.OPENAI.face,
        caller=caller_of(request, body.user),
        name=http.request_id(request),
        hold=hold,
        client_headers=client_headers(context, request),
        draft=draft_of(stored, caller, body, limit),
        key=key,
        digest=openai.digest_of(RESPONSES.path, data) if key else b"",
        running=running,
    )


async def _background(context: Context, body: ModelBody, caller: Caller) -> Background:
    """Return how the response to *body* runs in the background, in steps. It has the frame of its
    response object if it is known to be made here.
    """
    route = context.router.route(body.model, caller=caller)
    provider, frame = route.provider, None
    # The simulator ends with its process, too, and leaves the background to us.
    if provider.capabilities(ResponsesCapabilities).bridged or provider.settings.simulated:
        asked = openai.body_for(body, provider.settings, route.model)
        # Its attempts report the fault.
        with contextlib.suppress(InvalidRequest):
            chat = await chat_request(asked, previous=body.previous_response_id, incomplete=True)
            frame = frame_of(chat, background=True)
    return Background(frame, streamed=body.streamed)


async def serve(context: Context, request: web.Request, prepared: Request) -> web.StreamResponse:
    """Answer a POST of a new response. One in the background is answered as soon as it has its id,
    with its events, or with the response object as it is then.

    Raises:
        AioserverError: it has ended before it has got an id.
    """
    asked = prepared.provider_request
    assert isinstance(asked, ResponseRequest), "make_request makes it"
    running = asked.running
    if running is None or (running.streamed and not running.made_here):
        return await openai.serve(context, request, prepared, _dialect(request))
    lifetime, stream = context.gateway.lifetime, context.gateway.relay(prepared)
    opening = OpeningReader(stream, running)
    lifetime.reader_added(stream)
    try:
        await opening.reached
        if stream.ended and not openai.shown(stream):
            raise stream.error or StreamNotFound("this answer was cancelled")
        body = stream.events.newest()
    finally:
        run_all((opening.leave, partial(lifetime.reader_removed, stream)))
    if running.streamed:
        return await openai.follow_stream(context, request, stream, dialect=_dialect(request))
    if body is None:
        return await openai.write_kept(context, request, stream)
    return await stored_face.write(context, request, body)


def _dialect(request: web.Request) -> openai.Dialect:
    """Return the dialect of the client of *request*."""
    codex = request.headers.get("originator", "").startswith("codex")
    return CODEX if codex else openai.OPENAI


def make_request(
    context: Context,
    body: ModelBody,
    *,
    face: str,
    caller: Caller,
    name: str,
    hold: BodyHold,
    client_headers: ClientHeaders,
    draft: Draft | None,
    key: str | None = None,
    digest: bytes = b"",
    running: Background | None = None,
) -> Request:
    """Return the request of a client with this *body* for a response.

    *face*, *name*, *key*: as `gateway.Request`. *running*: how it runs in the background.

    Raises:
        InvalidRequest: as `options_of`.
        ModelNotFound, NoProvider: no provider can be asked for its model.
    """
    hold.request_options = hold.request_options.joined(options_of(body))
    route = context.router.route(body.model, caller=caller, body=body.data)
    provider_request = ResponseRequest(
        partial(openai.body_for, body),
        draft,
        streamed=body.streamed or running is not None,
        caller=caller,
        model=route.model,
        hold=hold,
        client_headers=client_headers,
        patience=_patience(context, body, face),
        size=len(body.data),
        allowed=RESPONSES.allowed(body),
        running=running,
    )
    # An absent `store` keeps the response at its end, but does not let it outlive a client that
    # leaves.
    stored = bool(body.stored or body.background)
    return Request(
        route,
        provider_request,
        face,
        name,
        key,
        digest,
        stored,
        running is not None,
        keeper=draft,
        make_attempt=ResponseAttempt,
    )


def _patience(context: Context, body: ModelBody, face: str) -> float | None:
    """Return the seconds for which a client can wait for its id; None: until content."""
    if body.background:
        return 0.0
    if body.stored or face != openai.OPENAI.face:
        return context.settings.chat.websocket.ping_interval
    return None


async def prepare_retrieval(
    context: Context, stored: StoredResponses, request: web.Request, hold: BodyHold
) -> tuple[Stream, int | None] | Request | None:
    """Prepare a GET: find the response, and the event after which to stream it.

    The event is None if the response is not to be streamed. The result is None alone if the
    response has no log any more, but is stored, and a request to the provider if the response is
    not kept here.
    """
    try:
        return await _in_its_log(context, request)
    except (StreamNotFound, InstanceUnavailable) as missing:
        _check_known(stored, request, missing)
        response = await stored.reach(request[CALLER], request.match_info["id"])
        if response is None:
            return await stored_face.prepare_passed(context, request, hold)
        response.release()
        if request.query.get("stream", "false") == "true":
            raise ResumeGap("the events of this response are no longer kept") from None
        return None


def _check_known(stored: StoredResponses, request: web.Request, missing: AioserverError) -> None:
    """Raise *missing* if the log of a response may be elsewhere, and it is not stored here."""
    if isinstance(missing, InstanceUnavailable) and not stored.get(
        request[CALLER], request.match_info["id"]
    ):
        raise missing


async def _in_its_log(context: Context, request: web.Request) -> tuple[Stream, int | None]:
    if request.query.get("stream", "false") != "true":
        return await route(context, request), None
    number = request.query.get("starting_after")
    # -1 is the position of a reader that has fallen behind before the first event.
    known = number in {None, "-1"} or (number.isascii() and number.isdigit() and len(number) < 19)
    if not known:
        await route(context, request)
        raise InvalidRequest("starting_after must be a sequence_number", param="starting_after")
    stream = await route(context, request)
    if stream.whole is not None:
        raise InvalidRequest("this response was not streamed", param="stream")
    return stream, 0 if number is None else event_of(stream, int(number))


async def retrieve(
    context: Context,
    stored: StoredResponses,
    request: web.Request,
    found: tuple[Stream, int | None] | Request | None,
) -> web.StreamResponse:
    """Answer a GET with the result of `prepare_retrieval`: the events after a position, or the
    response as it is now.
    """
    if found is None:
        response = await stored_face.find(stored, request)
        body = response.response()
        response.release()
        return await stored_face.write(context, request, body)
    if isinstance(found, Request):
        return await passthrough.serve(context, request, found)
    stream, after = found
    if after is not None:
        return await openai.follow_stream(context, request, stream, after, _dialect(request))
    try:
        return await write(context, request, stream)
    except StreamNotFound:
        # The log was evicted while the request waited for a place.
        return await retrieve(context, stored, request, None)


async def cancel(
    context: Context,
    stored: StoredResponses,
    writing: Callable[[web.Request], Awaitable[web.StreamResponse]],
    passing: Callable[[web.Request], Awaitable[web.StreamResponse]],
    request: web.Request,
) -> web.StreamResponse:
    """Answer `POST /v1/responses/{id}/cancel`. A response that has ended stays as it is.

    This works in a full server, too: only a large response needs a place, by *writing*, until its
    client has read it, and one of another instance, which cancels it. If the response is not kept
    here, it may be the provider's: *passing* passes the request on.

    Raises:
        StreamNotFound: there is no such response under way, or with a log.
        InstanceUnavailable: another instance may have it.
    """
    try:
        try:
            stream = await route(context, request)
        except Elsewhere:
            return await writing(request)
    except (StreamNotFound, InstanceUnavailable) as missing:
        try:
            _check_known(stored, request, missing)
        except InstanceUnavailable:
            # An answer costs money while it runs, so any instance that has it is asked to cancel it.
            await context.gateway.cancel_anywhere(request[CALLER], request.match_info["id"])
            raise
        # A stored response has ended: its provider need not know it.
        response = await stored.reach(request[CALLER], request.match_info["id"])
        if response is None:
            return await passing(request)
        body = response.response()
        response.release()
        return await stored_face.write(context, request, body)
    await context.gateway.cancel_anywhere(request[CALLER], stream.request_id)
    answer = stream.whole
    size = len(newest(stream)) if answer is None else answer.size
    if size > HIGH_WATER:
        return await writing(request)
    return await write_cancelled(context, request, stream)


async def write_cancelled(
    context: Context, request: web.Request, stream: Stream
) -> web.StreamResponse:
    """Answer as `write`, with the status that the response has now, or will have."""
    status = "" if stream.end_status == COMPLETE else "cancelled"
    return await write(context, request, stream, status)


async def write(
    context: Context, request: web.Request, stream: Stream, status: str = ""
) -> web.StreamResponse:
    """Answer with the response that *stream* keeps, as it is now, and write it.

    A *status* replaces that of a response that was streamed, or cancelled.

    Raises:
        ServerAtCapacity: all that is kept would be more than `max_kept_bytes`.
    """
    if stream.whole is not None:
        return await openai.write_kept(context, request, stream)
    if stream.end_status == CANCELLED:
        status = status or "cancelled"
    elif stream.ending is not None:
        # A client that reads that it is complete continues it, perhaps at another instance.
        status = "in_progress"
    body = newest(stream, status)
    return await stored_face.write(context, request, body)


async def route(context: Context, request: web.Request, _hold: object = None) -> Stream:
    """Return the response of the caller that the path of *request* names.

    Raises:
        Elsewhere: another instance has it.
        StreamNotFound: there is no such stream, or it is an answer of another kind, such as one of
            another face.
    """
    stream = await context.gateway.route(request, request.match_info["id"])
    if stream.api is not RESPONSES:
        raise StreamNotFound(stored_face.NOT_FOUND)
    return stream


def broken(_request: web.Request, error: AioserverError, last: bytes) -> bytes:
    """Return *error*, with which another instance breaks off a response, as the event behind the
    *last* ones; b"" if those have no sequence number.
    """
    events = ResponseEvents()
    # The sizes of chunks between them are no lines of an event.
    events.note(last, 1)
    return events.render(error) if events.last_sequence >= 0 else b""


def event_of(stream: Stream, sequence: int) -> int:
    """Return the log's number of the last event whose `sequence_number` is at most *sequence*.

    Raises:
        ResumeGap: events after *sequence* are no longer kept, or it does not exist yet.
    """
    number = stream.events.event_before(sequence, stream.last)
    if number is None:
        raise ResumeGap(f"event {sequence} does not exist yet")
    # Raises if the events after it are no longer kept.
    stream.locate(number)
    return number


def newest(stream: Stream, status: str = "") -> bytes:
    """Return the JSON of the response object that the provider sent last, with another *status* if
    one is passed.

    Raises:
        StreamNotFound: no event had a response, or *stream* is no response.
    """
    response = stream.events.newest(status)
    if response is None:
        raise StreamNotFound(stored_face.NOT_FOUND)
    return response
