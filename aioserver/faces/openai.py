"""OpenAI's API: the official SDKs work unchanged with their `base_url` set to our `/v1`.

The body is passed on as it came, with two exceptions: `model` is replaced if it names a provider,
and a lone surrogate is replaced by U+FFFD. The provider's events come back byte for byte, each as
soon as it arrives. The head of a streamed answer is sent with the provider's first bytes, so that
a fault before them has its HTTP status. After `ping_interval` of silence the head is sent alone,
and heartbeat comments follow. A fault after the head is one error event, then the end: an answer
never ends silently, and never with a false `[DONE]`.
"""

from __future__ import annotations

import asyncio
import hashlib
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

from aiohttp import web

from aioserver.errors import StreamNotFound
from aioserver.faces import http, models, whole
from aioserver.faces.admission import CountedHandler
from aioserver.faces.intake import (
    begin_visit,
    caller_of,
    client_headers,
    end_visit,
    idempotency_key,
    read_model_body,
)
from aioserver.faces.ready import HIGH_WATER, ReadyResponse, ReadyStream, fits
from aioserver.faces.streaming import follow, write_ended
from aioserver.gateway.request import Request, kept_answer
from aioserver.gateway.stream_usage import UsageAttempt
from aioserver.protocol.eventstream import HEARTBEAT
from aioserver.protocol.request_headers import HOLD, PREAMBLE
from aioserver.providers.attempt import Attempt
from aioserver.providers.request import CHAT, Api, CompletionsApi, ProviderRequest, WordlessApi
from aioserver.streams.cursor import ConditionReader
from aioserver.streams.ending import run_all
from aioserver.streams.formats import RAW

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aioserver.config import settings
    from aioserver.errors import AioserverError
    from aioserver.faces.admission import BodyHold
    from aioserver.faces.context import Context
    from aioserver.protocol.model_body import ModelBody
    from aioserver.providers.request import Answer
    from aioserver.streams.contracts import Queued
    from aioserver.streams.stream import Stream

EMBEDDINGS = WordlessApi("embeddings")
APIS: tuple[Api, ...] = (CHAT, CompletionsApi("completions"), EMBEDDINGS)
STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


class Dialect(NamedTuple):
    """The differences between the APIs whose answers pass as the provider's bytes.

    *face* is the name of their face. *heartbeat* is written into a stream after each
    `ping_interval` of silence; while the request waits, the result of *render_wait* is written
    instead. The id of a request is also in the header *id_header* if the provider has sent none.
    """

    face: str
    heartbeat: bytes
    id_header: str = ""
    render_wait: Callable[[Queued], bytes] | None = None


OPENAI = Dialect("openai", HEARTBEAT, render_wait=attrgetter("comment"))


def routes(context: Context) -> list[web.RouteDef]:
    """Return the routes of this face."""
    serving = partial(serve, context)
    return [
        *(
            web.post(
                f"/v1/{api.path}",
                CountedHandler(
                    context.admission,
                    OPENAI.face,
                    prepare_for(context, api),
                    serving,
                    broken=partial(broken, api),
                ).handle,
            )
            for api in APIS
        ),
        web.get("/v1/models", partial(models.listing, context)),
        web.get("/v1/models/{id:.+}", partial(models.model, context)),
    ]


def prepare_for(
    context: Context, api: Api
) -> Callable[[web.Request, BodyHold], Awaitable[Request]]:
    """Return the function that prepares a POST to the path of *api*, below `/v1`."""

    async def prepare(request: web.Request, hold: BodyHold) -> Request:
        assert isinstance(request, http.Request)
        limit = context.settings.chat.websocket.max_message_size
        body, data = await read_model_body(request, hold, limit)
        if (key := idempotency_key(request)) is not None:
            await context.gateway.claim(request, key, data)
        caller, streamed = caller_of(request, body.user), body.streamed
        route = context.router.route(body.model, caller=caller, body=body.data)
        if api is EMBEDDINGS:
            # Vectors of a fallback's model cannot be compared with those of the model that was
            # asked for.
            route.pinned, streamed = True, False
        provider_request = ProviderRequest(
            api,
            partial(body_for, body),
            streamed=streamed,
            caller=caller,
            model=route.model,
            hold=hold,
            client_headers=client_headers(context, request),
            size=len(body.data),
            allowed=api.allowed(body),
            usage_options=body.usage_options,
        )
        return Request(
            route,
            provider_request,
            OPENAI.face,
            request.known_id,
            key,
            digest_of(api.path, data) if key else b"",
            make_attempt=UsageAttempt if streamed and body.usage_options is not None else Attempt,
        )

    return prepare


def broken(api: Api, _request: web.Request, error: AioserverError, _last: bytes) -> bytes:
    """Return *error*, with which another instance breaks off an answer of *api*, as an event."""
    return api.events().render(error)


def digest_of(path: str, body: bytes) -> bytes:
    """Return a hash that tells a repeated request from a different one of the same key."""
    return hashlib.sha256(path.encode() + b"\0" + body).digest()


def body_for(body: ModelBody, provider: settings.Provider, model: str | None) -> bytes:
    """Return *body* for a provider and a model: the client's own bytes, or the same with another
    model.
    """
    wanted = model or provider.model
    return body.data if wanted == body.model else body.with_model(wanted)


async def serve(
    context: Context, request: web.Request, prepared: Request, dialect: Dialect = OPENAI
) -> web.StreamResponse:
    """Answer a POST; with an `Idempotency-Key`, from the kept answer.

    Raises:
        AioserverError: as `follow_stream`, `write_kept` and `Gateway.call`.
        ConnectionError: as `whole.write`.
    """
    gateway, asked = context.gateway, prepared.provider_request
    if asked.streamed:
        return await follow_stream(context, request, gateway.relay(prepared), dialect=dialect)
    if prepared.resumable:
        return await write_kept(context, request, gateway.keep(prepared), dialect)
    asked.hold_answer = gateway.hold
    try:
        answer = await gateway.call(prepared)
        response = response_of(request, answer, dialect)
        # The answer is held in memory while a slow client reads it.
        timeout, drop = context.admission.send_timeout, context.admission.dropped
        await whole.write(request, response, timeout, drop, dialect.face)
        return response
    finally:
        asked.let_answer_go()


async def write_kept(
    context: Context, request: web.Request, stream: Stream, dialect: Dialect = OPENAI
) -> web.StreamResponse:
    """Write the whole answer that *stream* keeps, or will keep.

    Raises:
        AioserverError: as `kept_answer`.
        ConnectionError: as `whole.write`.
    """
    visit = begin_visit(context, request, stream)
    try:
        async with kept_answer(stream, context.gateway.lifetime) as answer:
            response = response_of(request, answer, dialect)
            timeout, drop = context.admission.send_timeout, context.admission.dropped
            await whole.write(request, response, timeout, drop, dialect.face)
            return response
    finally:
        if visit is not None:
            end_visit(visit, stream)


def response_of(request: web.Request, answer: Answer, dialect: Dialect) -> web.StreamResponse:
    """Return *answer*, which was not streamed, as a response."""
    outcome = answer.outcome
    headers = {
        "x-aioserver-provider": outcome.provider,
        "x-aioserver-attempts": str(outcome.attempts),
        **outcome.headers,
        "Content-Type": answer.content_type,
    }
    lost = outcome.cache_lost if outcome.turn_read is None else outcome.find_loss()
    if lost is not None and lost.text:
        headers["x-aioserver-cache"] = lost.text
    if dialect.id_header:
        headers.setdefault(dialect.id_header, http.request_id(request))
    if answer.status == 200 and fits(request):
        return ReadyResponse(answer.body, headers)
    return web.Response(status=answer.status, body=answer.body, headers=headers)


async def follow_stream(
    context: Context,
    request: web.Request,
    stream: Stream,
    after: int = 0,
    dialect: Dialect = OPENAI,
) -> web.StreamResponse:
    """Answer with the events of *stream* after event *after*.

    Raises:
        ResumeGap: those events are no longer kept.
        AioserverError: the stream ended before the provider's first bytes.
    """
    gateway = context.gateway
    opening = ConditionReader(stream, _begun)
    gateway.lifetime.reader_added(stream)
    try:
        interval = context.settings.chat.websocket.ping_interval
        timer = asyncio.get_running_loop().call_later(interval, opening.stop_waiting)
        try:
            await opening.reached
        finally:
            timer.cancel()
        if stream.ended and not shown(stream):
            raise stream.error or StreamNotFound("this answer was cancelled")
        response = _streamed_response(request, stream, dialect)
        if isinstance(response, ReadyResponse):
            await write_ended(context, request, response, stream, dialect.face)
            return response
        await follow(
            context,
            request,
            response,
            stream,
            after,
            RAW,
            opening=opening,
            heartbeat=dialect.heartbeat,
            render_wait=dialect.render_wait,
        )
        return response
    finally:
        if opening in stream.readers:
            run_all((opening.leave, partial(gateway.lifetime.reader_removed, stream)))


def _begun(stream: Stream) -> bool:
    """Return whether the head can be sent: the provider's first bytes are there, or the stream has
    ended without any.
    """
    return stream.ended or bool(stream.entries and stream.entries[-1].data)


def shown(stream: Stream) -> bool:
    """Return whether *stream*, which has ended, has content to show beside its end."""
    return stream.answered or any(entry.data for entry in stream.entries[:-1])


def _streamed_response(
    request: web.Request, stream: Stream, dialect: Dialect
) -> web.StreamResponse:
    outcome = stream.outcome
    headers = {**STREAM_HEADERS, **outcome.headers}
    if dialect.id_header:
        headers.setdefault(dialect.id_header, http.request_id(request))
    if outcome.provider:
        headers["x-aioserver-provider"] = outcome.provider
        headers["x-aioserver-attempts"] = str(outcome.attempts)
    if outcome.hold not in ("", PREAMBLE):
        headers[HOLD] = outcome.hold
    if fits(request):
        all_kept = stream.ended and stream.private and not stream.offset
        if all_kept and stream.bytes <= HIGH_WATER:
            events = b"".join([entry.data for entry in stream.entries])
            return ReadyResponse(events, headers, chunked=True)
        return ReadyStream(request, headers)
    response = web.StreamResponse(headers=headers)
    http.announce_close(request, response, streamed=True)
    return response
