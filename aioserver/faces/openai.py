"""OpenAI's API: the official SDKs work unchanged with their `base_url` set to our `/v1`.

The body is passed on as it came, but for two things: `model` is replaced where it names a provider, and
a lone surrogate by U+FFFD. The provider's events come back byte for byte, each as soon as it arrives.
The head of a streamed answer is sent with the provider's first bytes, so that a fault before them has
its HTTP status; after `ping_interval` of silence it is sent alone, and heartbeat comments follow. A
fault after the head is one error event, then the end: an answer never ends silently, and never with a
false `[DONE]`.
"""

from __future__ import annotations

import asyncio
import hashlib
from functools import partial
from typing import TYPE_CHECKING, Any

from aiohttp import web

from aioserver.auth.callers import CALLER
from aioserver.errors import InvalidRequest, StreamNotFound
from aioserver.faces import http, whole
from aioserver.faces.admission import counted
from aioserver.faces.intake import client_headers, read_body
from aioserver.faces.ready import ReadyResponse, ReadyStream, fits
from aioserver.faces.streaming import follow
from aioserver.gateway.calls import kept_answer
from aioserver.gateway.request import Request
from aioserver.limits.turns import in_turns
from aioserver.protocol import model_body
from aioserver.protocol.client_frames import MAX_ID_CHARACTERS
from aioserver.protocol.model_body import ModelBody
from aioserver.protocol.responses import ResponseEvents
from aioserver.protocol.top_level import simple
from aioserver.providers.request import ProviderRequest
from aioserver.streams.cursor import ConditionReader
from aioserver.streams.ending import run_all
from aioserver.streams.formats import RAW

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from aioserver.config import settings
    from aioserver.faces.admission import BodyHold
    from aioserver.faces.context import Context
    from aioserver.gateway.request import Route
    from aioserver.providers.request import Answer
    from aioserver.streams.stream import Stream

PATHS = ("chat/completions", "completions", "embeddings", "responses")
STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


def routes(context: Context) -> list[web.RouteDef]:
    """Return the routes of this face; those of stored responses are in responses.py."""
    serving = partial(serve, context)
    return [
        *(
            web.post(
                f"/v1/{path}",
                counted(context.admission, "openai", prepare_for(context, path), serving),
            )
            for path in PATHS
        ),
        web.get("/v1/models", partial(models, context)),
        web.get("/v1/models/{id:.+}", partial(model, context)),
    ]


def prepare_for(
    context: Context, path: str
) -> Callable[[web.Request, BodyHold], Awaitable[Request]]:
    """Return the function that prepares a POST to *path*, below `/v1`."""

    async def prepare(request: web.Request, hold: BodyHold) -> Request:
        data = await read_body(request, hold, context.settings.chat.websocket.max_message_size)
        # Steps, for which nearly no body has a use, would cost each request a coroutine.
        body = ModelBody(data) if simple(data) else await in_turns(model_body.reading(data))
        key = request.headers.get("Idempotency-Key")
        if key is not None and (len(key) > MAX_ID_CHARACTERS or not key.isprintable() or not key):
            raise InvalidRequest(
                f"Idempotency-Key must have 1 to {MAX_ID_CHARACTERS} printable characters"
            )
        route = context.router.route(body.model)
        if path == "embeddings":
            # The vectors of a fallback's model mean nothing beside those of the model that was asked for.
            route.pinned = True
        caller = request[CALLER].on_behalf_of(body.user)
        provider_request = ProviderRequest(
            path,
            body_maker(body, route),
            streamed=body.streamed and path != "embeddings",
            caller=caller,
            model=route.model,
            hold=hold,
            client_headers=client_headers(context, request),
        )
        stored = path == "responses" and (body.stored or body.background)
        digest = digest_of(path, data) if key else b""
        name = http.request_id(request)
        return Request(route, provider_request, "openai", name, key, digest, stored)

    return prepare


def digest_of(path: str, body: bytes) -> bytes:
    """Return a hash that tells a repeated request from another one of the same key."""
    return hashlib.sha256(path.encode() + b"\0" + body).digest()


def body_maker(body: ModelBody, route: Route) -> Callable[[settings.Provider], bytes]:
    """Return a function that makes the body for a provider.

    That body is the client's, or the same with the model of the route or of the provider.
    """

    def body_for(provider: settings.Provider) -> bytes:
        first = provider.name == route.provider.name
        if first and not route.renamed:
            return body.data
        # A fallback uses its own model.
        return body.with_model((first and route.model) or provider.model)

    return body_for


async def serve(context: Context, request: web.Request, prepared: Request) -> web.StreamResponse:
    """Answer a POST."""
    gateway = context.gateway
    if prepared.provider_request.streamed:
        stream = gateway.relay(prepared)
        details = stream.details
        if prepared.provider_request.path == "responses" and details.error_format is None:
            details.error_format = ResponseEvents()
        return await follow_stream(context, request, stream)
    if prepared.resumable:
        return await write_kept(context, request, gateway.keep(prepared))
    with gateway.hold() as held:
        prepared.provider_request.answer_bytes = held
        answer = await gateway.call(prepared)
        # Within the `with`: a client that reads slowly keeps the answer in memory.
        return await _write_whole(context, request, answer)


async def write_kept(context: Context, request: web.Request, stream: Stream) -> web.StreamResponse:
    """Answer with the whole answer that *stream* keeps, or will keep, and write it.

    Raises:
        AioserverError: as `kept_answer`.
    """
    async with kept_answer(stream, context.gateway.lifetime) as answer:
        return await _write_whole(context, request, answer)


async def _write_whole(
    context: Context, request: web.Request, answer: Answer
) -> web.StreamResponse:
    response = response_of(request, answer)
    await write(context, request, response)
    return response


async def write(context: Context, request: web.Request, response: web.StreamResponse) -> None:
    """Write the whole *response*, for as long as its client needs to read it.

    Raises:
        ConnectionError: as `whole.write`.
    """
    timeout = context.settings.chat.streams.send_timeout
    await whole.write(request, response, timeout, context.admission.dropped, "openai")


def response_of(request: web.Request, answer: Answer) -> web.StreamResponse:
    """Return *answer*, which was not streamed, as a response."""
    headers = {
        "x-aioserver-provider": answer.provider,
        "x-aioserver-attempts": str(answer.attempts),
        **answer.headers,
    }
    headers["Content-Type"] = answer.content_type
    if answer.status == 200 and fits(request):
        return ReadyResponse(answer.body, headers)
    return web.Response(status=answer.status, body=answer.body, headers=headers)


async def follow_stream(
    context: Context, request: web.Request, stream: Stream, after: int = 0
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
        if stream.ended and not stream.answered:
            raise stream.error or StreamNotFound("this answer was cancelled")
        response = _streamed_response(request, stream)
        await follow(context, request, response, stream, after, RAW, on_follow=opening.leave)
        return response
    finally:
        run_all((opening.leave, partial(gateway.lifetime.reader_removed, stream)))


def _begun(stream: Stream) -> bool:
    """Return whether the head can be sent: the provider's first bytes are there, or an end without any."""
    return stream.ended or bool(stream.entries and stream.entries[-1].data)


def _streamed_response(request: web.Request, stream: Stream) -> web.StreamResponse:
    headers = {**STREAM_HEADERS, **stream.details.headers}
    if stream.details.provider:
        headers["x-aioserver-provider"] = stream.details.provider
        headers["x-aioserver-attempts"] = str(stream.details.attempts)
    if fits(request):
        return ReadyStream(request, headers)
    response = web.StreamResponse(headers=headers)
    http.announce_close(request, response, streamed=True)
    return response


async def models(context: Context, _request: web.Request) -> web.Response:
    """Answer `GET /v1/models`: the usable providers and their models, without asking a provider."""
    return web.json_response({"object": "list", "data": list(_models(context))})


async def model(context: Context, request: web.Request) -> web.Response:
    """Answer `GET /v1/models/{id}`: with the provider that a request for this model goes to.

    A model that names no provider goes to the active one, which alone knows whether it has it.

    Raises:
        ModelNotFound, NoProvider: a request for this model is refused, too.
    """
    name = request.match_info["id"]
    return web.json_response(_model(name, context.router.route(name).provider.settings))


def _models(context: Context) -> Iterator[dict[str, Any]]:
    for owner, provider in context.router.providers.items():
        configured = provider.settings
        if not configured.usable:
            continue
        yield _model(owner, configured)
        for name in dict.fromkeys((configured.model, *configured.models)):
            yield _model(f"{owner}/{name}", configured)


def _model(name: str, provider: settings.Provider) -> dict[str, Any]:
    entry = {"id": name, "object": "model", "created": 0, "owned_by": provider.name}
    # No field of OpenAI's: with it the chat page says that no real model answers.
    return {**entry, "simulated": True} if provider.simulated else entry
