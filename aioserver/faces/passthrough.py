"""All other paths below `/v1`: requests and answers that are passed between client and provider
unchanged.

protocol/passable.py says which paths pass, and for whom. A request takes the same way as any
other, through the provider's queue, pace and pool, but neither the request nor its answer is kept.
The upload goes out while the client sends it, once FIRST_BYTES are there; the answer comes back at
the speed at which the client reads. So there is neither a retry nor a failover, and a fault after
the head of the answer cuts the connection.

Only a JSON body is read, since its `model` may name a provider, and only up to the size of a
question. The header `x-aioserver-provider` names a provider for any request.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING

from aiohttp import hdrs, web
from aiohttp.http import StreamWriter

from aioserver.auth.callers import CALLER
from aioserver.errors import (
    ExpectationFailed,
    InvalidRequest,
    NotFound,
    PermissionDenied,
)
from aioserver.faces import http, openai, whole
from aioserver.faces.admission import CountedHandler
from aioserver.faces.intake import BodyStream, caller_of, client_headers, read_start, refuse_coded
from aioserver.faces.ready import HIGH_WATER
from aioserver.gateway.request import Request
from aioserver.limits.write_watchdog import peer_of, reset
from aioserver.protocol import model_body, passable
from aioserver.protocol.passable import Passage
from aioserver.protocol.request_headers import as_sent
from aioserver.providers.backpressure import LEAST_RATE, ClientPace
from aioserver.providers.passthrough import (
    PassedAttempt,
    PassedRequest,
    api_of,
    body_length,
    shown_headers,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aioserver.config import settings
    from aioserver.faces.admission import BodyHold
    from aioserver.faces.context import Context
    from aioserver.protocol.model_body import ModelBody
    from aioserver.providers.request import BodyMaker

FACE = "other"
# The prefix of all paths of OpenAI's API.
API = "/v1/"
ROUTE_NAME = "aioserver.passthrough"
# The header by which a request names its provider.
PROVIDER = "x-aioserver-provider"
# Files of the provider's account are not content of this origin: a browser must neither run nor
# keep them.
GUARDS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; sandbox",
    "X-Content-Type-Options": "nosniff",
}


def routes(context: Context) -> list[web.RouteDef]:
    """Return the routes of this face, which match every path below `/v1` that has no handler of
    its own.
    """
    handler = CountedHandler(
        context.admission, FACE, partial(prepare, context), partial(serve, context)
    ).handle
    return [
        web.route(
            method, f"{API}{{path:.+}}", handler, name=ROUTE_NAME, expect_handler=expect_later
        )
        for method in passable.METHODS
    ]


async def expect_later(_request: web.Request) -> None:
    """Do not send `100 Continue` yet: the body is asked for once the request may pass."""


async def prepare(context: Context, request: web.Request, hold: BodyHold) -> Request:
    """Prepare a request: find out whether it passes, and where to. Only a JSON body is read.

    Raises:
        web.HTTPNotFound: the path does not pass, or not by this method.
        AioserverError: the request is not valid, or not allowed.
    """
    path, query = _path(request)
    passage = passable.passage(path)
    if passage is None or request.method not in passage.methods or not passable.sound_query(query):
        raise web.HTTPNotFound
    closed = passage is not Passage.EVERY_KEY
    openers = _openers(context, path) if closed else []
    if closed and not openers:
        _check_admin(context, request, path)
    pace = ClientPace()
    upload, body = await _take_body(context, request, hold, pace)
    model = body.model if body is not None else None
    provider = request.headers.get(PROVIDER)
    if model is None and provider is None and openers:
        provider = openers[0]
    caller = caller_of(request, None if body is None else body.user)
    written = b"{}" if body is None else body.data
    unread = model is None
    route = context.router.route(model, provider, caller=caller, body=written, unread=unread)
    # Members of a group get their own models, whether the body or the header named the group.
    name = provider if provider in context.router.groups else route.group.name
    by_group = bool(name)
    if closed and by_group:
        raise InvalidRequest(
            f"/v1/{path} belongs to one provider's account, and {name} may have several: "
            f"name the provider in {PROVIDER}"
        )
    opened = route.provider.name in openers
    if closed and not opened:
        if not route.provider.settings.account_paths:
            raise NotFound(_closed(path, route.provider.name))
        _check_admin(context, request, path)
    if closed and (not opened or passable.names_account(path)):
        # An account's object, such as the file of a batch, names models inside, which are not
        # checked here.
        context.router.route(None, route.provider.name, caller=caller, unread=True)
    if model is not None and route.model is None:
        model = route.provider.settings.model
    passed = PassedRequest(
        request.method,
        f"{path}?{query}" if query else path,
        _body_maker(body, renamed=model is not None and (provider is None or by_group)),
        _body_headers(request, upload),
        upload=upload,
        pace=pace,
        caller=caller,
        model=route.model or model,
        hold=hold,
        client_headers=client_headers(context, request),
        size=0 if body is None else len(body.data),
        allowed=(None, 1) if body is None else api_of(request.method, path).allowed(body),
    )
    return Request(route, passed, FACE, http.request_id(request), make_attempt=PassedAttempt)


async def serve(context: Context, request: web.Request, prepared: Request) -> web.StreamResponse:
    """Pass a request on, and answer with what comes back."""
    passed = prepared.provider_request
    assert isinstance(passed, PassedRequest)
    answer = passed.answer
    call = asyncio.get_running_loop().create_task(context.gateway.pass_on(prepared))

    def stop(call: asyncio.Task[None]) -> None:
        answer.stop()
        # The call may fail after this handler has ended; its exception is marked as retrieved.
        _ = call.cancelled() or call.exception()

    call.add_done_callback(stop)
    try:
        if not await answer.begun():
            await call
        return await _write(context, request, passed, call)
    finally:
        call.cancel()
        await asyncio.wait((call,))


async def _write(
    context: Context, request: web.Request, passed: PassedRequest, call: asyncio.Task[None]
) -> web.StreamResponse:
    """Write the answer to *passed*, whose head is there, while *call* receives the rest.

    Raises:
        ConnectionError: the client has left, or is dropped.
        AioserverError: the answer is not complete.
    """
    answer, provider = passed.answer, passed.outcome.provider
    headers = {
        PROVIDER: provider,
        "x-aioserver-attempts": str(passed.outcome.attempts),
        **shown_headers(answer.headers),
        **GUARDS,
    }
    if headers.get("content-type", "").startswith("text/event-stream"):
        headers["X-Accel-Buffering"] = "no"
    response = web.StreamResponse(status=answer.status, headers=headers)
    response.content_length = length = body_length(answer.headers)
    http.announce_close(request, response, streamed=length is None)
    writer = await response.prepare(request)
    transport = request.transport
    if transport is None:
        raise ConnectionResetError("the client has left")
    assert isinstance(writer, StreamWriter)
    timeout = context.settings.chat.streams.send_timeout

    def drop(reason: str) -> None:
        passed.record.slow_client = True
        context.admission.dropped(FACE, reason)

    def taken() -> int:
        return -peer_of(transport).waiting

    def give_up() -> None:
        drop(f"less than {LEAST_RATE} bytes taken a second while others waited")
        reset(transport)

    while piece := await answer.take():
        await writer.write(piece, drain=False)
        if transport.get_write_buffer_size() > HIGH_WATER:
            with passed.pace.waited_for(taken, give_up):
                await whole.drained(transport, request.writer.drain, timeout, drop)
    await call
    await response.write_eof()
    await whole.flush(transport, request.writer.drain, timeout, drop)
    return response


def _path(request: web.Request) -> tuple[str, str]:
    """Return the path below `/v1`, and the query, as they stand on the wire; an empty path if it
    is not below `/v1`.
    """
    url = request.rel_url
    if "#" in request.raw_path or not url.raw_path.startswith(API):
        return "", ""
    return url.raw_path.removeprefix(API), url.raw_query_string


def _openers(context: Context, path: str) -> list[str]:
    """Return the providers that have opened *path* to every key, the active one first."""
    active = context.router.active.name
    names = [
        name
        for name, provider in context.router.providers.items()
        if passable.below(path, provider.settings.pass_paths)
    ]
    return sorted(names, key=active.__ne__)


def _check_admin(context: Context, request: web.Request, path: str) -> None:
    """Refuse a path that names objects of a provider's account, unless a provider shares them and
    the caller may use them.

    Without keys the clients are those on this machine, all of them admins; an open server has no
    admin.

    Raises:
        NotFound, web.HTTPNotFound: no provider has `account_paths`.
        PermissionDenied: the caller is no admin.
    """
    providers = context.router.providers.values()
    if not any(provider.settings.account_paths for provider in providers):
        if passable.names_account(path):
            raise NotFound(_closed(path, context.router.active.name))
        raise web.HTTPNotFound
    access = context.access
    local = not access.keyed and access.hosts is not None
    if not (request[CALLER].admin or local):
        raise PermissionDenied(
            f"/v1/{path.partition('/')[0]} belongs to the provider's account: it needs an admin key"
        )


def _closed(path: str, provider: str) -> str:
    """Return the message for a *path* of the account of a *provider* without `account_paths`."""
    return (
        f"/v1/{path.partition('/')[0]} belongs to the provider's account: "
        f"it is passed on if llm.providers.{provider}.account_paths is true, or pass_paths has it"
    )


async def _take_body(
    context: Context, request: web.Request, hold: BodyHold, pace: ClientPace
) -> tuple[BodyStream | None, ModelBody | None]:
    """Return the stream of a body that is passed on, or the bytes of a JSON body; `(None, None)`
    without a body.

    Raises:
        AioserverError: the body may not pass.
    """
    if request.headers.get(hdrs.EXPECT, "100-continue").lower() != "100-continue":
        raise ExpectationFailed("Expect must be 100-continue")
    refuse_coded(request)
    if not request.body_exists:
        return None, None
    if request.method != "POST":
        raise InvalidRequest(f"{request.method} must have no body")
    most = context.settings.chat.websocket.max_message_size
    if request.content_type != "application/json" or (request.content_length or 0) > most:
        return BodyStream(request, hold, pace), None
    data = await read_start(request, hold, most)
    if len(data) > most:
        return BodyStream(request, hold, pace, data), None
    return None, await model_body.reading(data) if data else None


def _body_maker(body: ModelBody | None, *, renamed: bool) -> BodyMaker:
    """Return a function that makes the body for a provider and a model: the client's own bytes, or
    the same with another model.

    *renamed*: the client's model may name the provider.
    """
    if body is not None and renamed:
        return partial(openai.body_for, body)
    data = b"" if body is None else body.data

    def body_for(_provider: settings.Provider, _model: str | None) -> bytes:
        return data

    return body_for


def _body_headers(request: web.Request, upload: BodyStream | None) -> Mapping[str, str]:
    """Return the headers that describe the body, and `Accept`, which the answer depends on.

    Raises:
        InvalidRequest: one of them has a character that HTTP forbids.
    """
    headers = {}
    for name in (hdrs.CONTENT_TYPE, hdrs.ACCEPT):
        text = request.headers.get(name)
        if text is not None and (name != hdrs.CONTENT_TYPE or request.body_exists):
            value = as_sent(text)
            if value is None:
                raise InvalidRequest(f"{name} has a character that HTTP forbids")
            headers[str(name)] = value.decode("latin-1")
    if upload is not None and upload.chunked:
        headers["Transfer-Encoding"] = "chunked"
    elif upload is not None:
        headers["Content-Length"] = str(request.content_length)
    return headers
