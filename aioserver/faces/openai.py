"""OpenAI's API: the official SDKs work unchanged with `base_url` pointed at `/v1`.

The body goes on as it came, only `model` is replaced where it names a provider; the provider's
events come back byte for byte, each as soon as it arrives. The head of a streamed answer goes out
with the provider's first bytes, so that until then a fault has its HTTP status; after
`ping_interval` of silence it goes out alone, and heartbeat comments follow. A fault after the head
is one error event, then the end: never a silent end, never a false `[DONE]`.
"""

from __future__ import annotations

import asyncio
import hashlib
from typing import TYPE_CHECKING, Any

import orjson
from aiohttp import web

from aioserver.auth.callers import CALLER
from aioserver.errors import InvalidRequest, ModelNotFound, StreamNotFound
from aioserver.faces import context, http
from aioserver.faces.ready import ReadyResponse, ReadyStream, fits
from aioserver.faces.streaming import follow
from aioserver.gateway.router import Request
from aioserver.protocol.messages import MAX_ID_CHARACTERS
from aioserver.providers.request import ProviderRequest
from aioserver.streams.cursor import ConditionReader
from aioserver.streams.formats import RAW

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from aioserver.config import settings
    from aioserver.faces.admission import BodyHold
    from aioserver.gateway.router import Route
    from aioserver.providers.request import Answer
    from aioserver.streams.stream import Stream

PATHS = ("chat/completions", "completions", "embeddings", "responses")
STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


def prepare_for(path: str) -> Callable[[web.Request, BodyHold], Any]:
    """The first step of the handler for *path*, below `/v1`."""

    async def prepare(request: web.Request, hold: BodyHold) -> Request:
        app = request.app
        body, fields = await http.read_json(
            request, hold, app[context.SETTINGS].chat.websocket.max_message_size
        )
        if not isinstance(fields, dict):
            raise InvalidRequest("the body must be a JSON object")
        model, streamed = fields.get("model"), fields.get("stream")
        if model is not None and (not isinstance(model, str) or not model):
            raise InvalidRequest("model must be a string", param="model")
        if streamed is not None and not isinstance(streamed, bool):
            raise InvalidRequest("stream must be true or false", param="stream")
        key = request.headers.get("Idempotency-Key")
        if key is not None and (len(key) > MAX_ID_CHARACTERS or not key.isprintable() or not key):
            raise InvalidRequest(
                f"Idempotency-Key must have 1 to {MAX_ID_CHARACTERS} printable characters"
            )
        route = app[context.ROUTER].route(model)
        if path == "embeddings":
            route.pinned = (
                True  # vectors of a fallback's model mean nothing beside those of this one
            )
        caller = request[CALLER].on_behalf_of(fields.get("user"))
        asked = ProviderRequest(
            path,
            body_maker(body, fields, route),
            streamed=bool(streamed) and path != "embeddings",
            caller=caller,
            model=route.model,
        )
        stored = path == "responses" and (
            fields.get("store") is True or fields.get("background") is True
        )
        digest = digest_of(path, body) if key else b""
        return Request(route, asked, "openai", http.request_id(request), key, digest, stored)

    return prepare


def digest_of(path: str, body: bytes) -> bytes:
    """Return what tells a repeated request from a conflicting one."""
    return hashlib.sha256(path.encode() + b"\0" + body).digest()


def body_maker(
    body: bytes, fields: dict[str, Any], route: Route
) -> Callable[[settings.Provider], bytes]:
    """The body for a provider: as it came, or with the model that the route or the provider says.

    It is kept for as long as the answer runs: one of the two, since pictures make them large.
    """
    given = fields if route.renamed else body

    def made(provider: settings.Provider) -> bytes:
        asked = provider.name == route.provider.name
        if asked and isinstance(given, bytes):
            return given
        model = (asked and route.model) or provider.model  # a fallback uses its own
        told = orjson.loads(given) if isinstance(given, bytes) else given
        try:
            return orjson.dumps({**told, "model": model})
        except TypeError:  # orjson reads 1,024 levels, but writes 254
            raise InvalidRequest("the body is nested too deeply") from None

    return made


async def serve(request: web.Request, prepared: Request) -> web.StreamResponse:
    """The second step: the answer."""
    gateway = request.app[context.GATEWAY]
    if prepared.provider_request.streamed:
        return await follow_stream(request, gateway.relay(prepared))
    return _whole(request, await gateway.call(prepared))


def _whole(request: web.Request, answer: Answer) -> web.StreamResponse:
    fields = {
        "x-aioserver-provider": answer.provider,
        "x-aioserver-attempts": str(answer.attempts),
        **answer.headers,
    }
    fields["Content-Type"] = answer.content_type
    if answer.status == 200 and fits(request):
        return ReadyResponse(answer.body, fields)
    return web.Response(status=answer.status, body=answer.body, headers=fields)


async def follow_stream(
    request: web.Request, stream: Stream, after: int = 0
) -> web.StreamResponse:
    """The answer in *stream*, behind event *after*."""
    gateway = request.app[context.GATEWAY]
    opening = ConditionReader(stream, _begun)
    gateway.lifetime.reader_added(stream)
    try:
        interval = request.app[context.SETTINGS].chat.websocket.ping_interval
        timer = asyncio.get_running_loop().call_later(interval, opening.stop_waiting)
        try:
            await opening.reached
        finally:
            timer.cancel()
        if stream.ended and not stream.answered:
            raise stream.error or StreamNotFound("this answer was cancelled")
        response = _streamed_response(request, stream)
        await follow(request, response, stream, after, RAW, begun=opening.leave)
        return response
    finally:
        opening.leave()
        if not stream.readers:
            gateway.lifetime.reader_removed(stream)


def _begun(stream: Stream) -> bool:
    """Whether the answer's head can be decided: the provider's first bytes, or an end without any."""
    return stream.ended or bool(stream.entries and stream.entries[-1].data)


def _streamed_response(request: web.Request, stream: Stream) -> web.StreamResponse:
    headers = {**STREAM_HEADERS, **stream.details.headers}
    if stream.details.provider:
        headers["x-aioserver-provider"] = stream.details.provider
        headers["x-aioserver-attempts"] = str(stream.details.attempts)
    if fits(request):
        return ReadyStream(request, headers)
    response = web.StreamResponse(headers=headers)
    http.last_of_connection(request, response, streamed=True)
    return response


def _models(app: web.Application) -> Iterator[dict[str, Any]]:
    for name, provider in app[context.ROUTER].providers.items():
        if not provider.settings.usable:
            continue
        given = provider.settings
        yield _model(name, name)
        for model in dict.fromkeys((given.model, *given.models)):
            yield _model(f"{name}/{model}", name)


def _model(name: str, owner: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": owner}


async def models(request: web.Request) -> web.Response:
    """`GET /v1/models`: the usable providers and their models; no provider is asked."""
    return web.json_response({"object": "list", "data": list(_models(request.app))})


async def model(request: web.Request) -> web.Response:
    """`GET /v1/models/{id}`."""
    name = request.match_info["id"]
    for one in _models(request.app):
        if one["id"] == name or one["id"].partition("/")[2] == name:
            return web.json_response(one)
    raise ModelNotFound(f"no model {name[:64]!r} is configured", param="model")
