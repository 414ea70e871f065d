"""Responses that this server has stored (`store_window`): read, deleted, and their input listed,
as at OpenAI.

    GET    /v1/responses/{id}               face.py, from the log as long as there is one
    DELETE /v1/responses/{id}
    GET    /v1/responses/{id}/input_items

A deleted response is not found by its id any more, and its log is gone; a running one is
cancelled. Conversations that have continued it are not affected. Deleting needs no place: it works
in a full server.

A response that is not kept here may be kept by the provider. If the provider's account is open to
the caller (faces/passthrough.py), the request is passed on; otherwise it gets a 404.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from aioserver.auth.callers import CALLER
from aioserver.auth.guard import peer_of
from aioserver.errors import InvalidRequest, NotFound, PermissionDenied, StreamNotFound
from aioserver.faces import http, openai, passthrough, whole
from aioserver.faces.admission import CountedHandler
from aioserver.wings.responses.attempt import ResponsesCapabilities
from aioserver.wings.responses.items import Page, paging

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aioserver.faces.admission import BodyHold
    from aioserver.faces.context import Context
    from aioserver.gateway.request import Request
    from aioserver.wings.responses.stored import StoredResponse, StoredResponses

NOT_FOUND = "no such response: never seen, or kept no longer"
# The most items of one page, and the default.
MAX_ITEMS, ITEMS = 100, 20


def routes(context: Context, stored: StoredResponses) -> list[web.RouteDef]:
    """Return the routes of this part of OpenAI's API."""
    return [
        web.post(
            "/v1/responses/input_tokens",
            passing(context, prepare_question),
            expect_handler=passthrough.expect_later,
        ),
        web.delete(
            f"/v1/responses/{http.ID}",
            partial(delete, context, stored, passing(context, prepare_passed)),
        ),
        web.get(
            f"/v1/responses/{http.ID}/input_items",
            CountedHandler(
                context.admission,
                "openai",
                partial(prepare_items, context, stored),
                partial(write_items, context, stored),
            ).handle,
            # aiohttp does not write the body, and so would not leave it out for HEAD.
            allow_head=False,
        ),
    ]


def passing(
    context: Context,
    prepare: Callable[[Context, web.Request, BodyHold], Awaitable[Request]],
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """Return the handler that passes a request on, which *prepare* has prepared."""
    return CountedHandler(
        context.admission,
        passthrough.FACE,
        partial(prepare, context),
        partial(passthrough.serve, context),
    ).handle


async def prepare_question(context: Context, request: web.Request, hold: BodyHold) -> Request:
    """Prepare a question about a conversation, for a provider that has responses.

    Raises:
        NotFound: it has chat completions only.
    """
    passed = await passthrough.prepare(context, request, hold)
    provider = passed.route.provider
    if provider.capabilities(ResponsesCapabilities).bridged:
        raise NotFound(
            f"the provider {provider.name} has no /v1/responses, "
            f"so there is no {request.path} either"
        )
    return passed


async def find(stored: StoredResponses, request: web.Request) -> StoredResponse:
    """Return the stored response that the path of *request* names. The caller releases it.

    Raises:
        StreamNotFound: the caller has no such response.
    """
    response = await stored.reach(request[CALLER], request.match_info["id"])
    if response is None:
        raise StreamNotFound(NOT_FOUND)
    return response


async def write(context: Context, request: web.Request, body: bytes) -> web.StreamResponse:
    """Answer with *body*, and write it, for as long as its client needs to read it.

    Raises:
        ServerAtCapacity: all that is kept would be more than `max_kept_bytes`.
    """
    response = web.Response(body=body, content_type="application/json", charset="utf-8")
    timeout, drop = context.admission.send_timeout, context.admission.dropped
    with context.gateway.hold() as held:
        held.grow(len(body))
        await whole.write(request, response, timeout, drop, openai.OPENAI.face)
    return response


async def prepare_passed(context: Context, request: web.Request, hold: BodyHold) -> Request:
    """Prepare a request about a response that is not kept here, for the provider, which may keep
    it.

    Raises:
        StreamNotFound: no provider's account is open to its caller, or another instance has
            passed the request on.
    """
    if peer_of(request) is not None:
        raise StreamNotFound(NOT_FOUND)
    try:
        return await passthrough.prepare(context, request, hold)
    except (NotFound, PermissionDenied, web.HTTPNotFound):
        # The reason does not matter to a client that asks for a response of its own.
        raise StreamNotFound(NOT_FOUND) from None


async def delete(
    context: Context,
    stored: StoredResponses,
    passing: Callable[[web.Request], Awaitable[web.StreamResponse]],
    request: web.Request,
) -> web.StreamResponse:
    """Answer a DELETE: delete the response that is kept here, or pass the request on by *passing*.

    It counts for the rate of its key, since all instances have to search.

    Raises:
        StreamNotFound: the caller has no such response.
        RateLimitExceeded: the key has used its requests of this minute.
    """
    gateway, response_id = context.gateway, request.match_info["id"]
    if (quota := request[CALLER].quota) is not None:
        await quota.count()
    known = gateway.forget(request[CALLER], response_id)
    known = await stored.delete(request[CALLER], response_id) or known
    if gateway.instances is not None:
        known = await gateway.instances.forget(request[CALLER], response_id) or known
    if not known:
        return await passing(request)
    return web.json_response({"id": response_id, "object": "response", "deleted": True})


async def prepare_items(
    context: Context, stored: StoredResponses, request: web.Request, hold: BodyHold
) -> Request | None:
    """Prepare a list of input items. Return None, or a request to the provider if the response is
    not kept here.

    Raises:
        StreamNotFound: the caller has no such response.
    """
    try:
        response = await find(stored, request)
    except StreamNotFound:
        return await prepare_passed(context, request, hold)
    response.release()
    # Only its provider knows the earlier items.
    return None if response.whole else await prepare_passed(context, request, hold)


async def write_items(
    context: Context, stored: StoredResponses, request: web.Request, passed: Request | None
) -> web.StreamResponse:
    """Answer with a page of input items.

    Raises:
        StreamNotFound: the response has gone.
        InvalidRequest: `order`, `limit` or `after` is not valid.
    """
    if passed is not None:
        return await passthrough.serve(context, request, passed)
    response = await find(stored, request)
    try:
        page = await _page(request, response)
    finally:
        response.release()
    body = msgspec.json.encode(
        {
            "object": "list",
            "data": page.items,
            "first_id": page.first_id,
            "last_id": page.last_id,
            "has_more": page.more,
        }
    )
    return await write(context, request, body)


async def _page(request: web.Request, response: StoredResponse) -> Page:
    order = request.query.get("order", "desc")
    if order not in {"asc", "desc"}:
        raise InvalidRequest("order must be asc or desc", param="order")
    text = request.query.get("limit", str(ITEMS))
    # A longer number is too large, and int() is slow with thousands of digits.
    if not (text.isascii() and text.isdigit() and len(text) <= 3 and 1 <= int(text) <= MAX_ITEMS):
        raise InvalidRequest(f"limit must be a number from 1 to {MAX_ITEMS}", param="limit")
    pieces = response.shown()
    if order == "desc":
        pieces.reverse()
    after = request.query.get("after")
    page = await paging(pieces, newest_first=order == "desc", limit=int(text), after=after)
    if page is None:
        raise InvalidRequest("after must be the id of an item in this list", param="after")
    return page
