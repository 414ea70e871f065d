"""`/session`: a browser exchanges its API key for a cookie (RFC 6265), and may delete it again."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web
from msgspec import Raw

from aioserver.auth.guard import COOKIE, KEY_NEEDED
from aioserver.auth.tokens import Undecided
from aioserver.errors import AuthUnavailable, Denied, InvalidRequest, MissingApiKey
from aioserver.faces.http import NO_STORE
from aioserver.faces.intake import read_body
from aioserver.protocol import json_body
from aioserver.protocol.json_body import ABSENT
from aioserver.protocol.sound import sound
from aioserver.protocol.steps import at_once

if TYPE_CHECKING:
    from aioserver.auth.callers import Caller
    from aioserver.faces.context import Context

MAX_LOGIN_BYTES = 1 << 14


class _Login(msgspec.Struct, gc=False):
    key: Raw = ABSENT


_LOGIN = msgspec.json.Decoder(_Login)


def routes(context: Context) -> list[web.RouteDef]:
    """Return the routes of `/session`."""
    return [
        web.get("/session", partial(describe, context)),
        web.post("/session", partial(log_in, context)),
        web.delete("/session", partial(log_out, context)),
    ]


async def describe(context: Context, request: web.Request) -> web.Response:
    """Answer `GET /session`, which tells a page whether to ask for a key. A missing session is no
    error.

    Only the cookie counts: otherwise keys could be tried here without being counted.
    """
    caller: Caller | None = None
    if context.access.keyed:
        with contextlib.suppress(Denied, AuthUnavailable):
            try:
                caller = context.guard.caller_by_session(request)
            except Undecided as undecided:
                caller = await undecided.caller()
    return _description(context, caller)


async def log_in(context: Context, request: web.Request) -> web.Response:
    """Answer `POST /session`: set the cookie for the key in the body or in Authorization.

    Raises:
        MissingApiKey: the request has no key.
        InvalidApiKey: no caller has the key, or the request has several keys.
        PermissionDenied, AuthUnavailable, ServerAtCapacity: as `Access.caller`, for a token.
        OriginNotAllowed: the page that sent the request may not use a session.
        InvalidRequest: the body is not `{"key": …}`. Otherwise as `read_body`.
    """
    access, guard = context.access, context.guard
    # No other page may log a browser in with a key of its own.
    guard.check_page(request)
    if not access.keyed:
        return _description(context, None)
    # A session is not accepted here: sessions made of sessions would never end.
    try:
        caller = guard.caller_by_key(request)
        if caller is None:
            caller = access.caller(await _key_in_body(context, request))
    except Undecided as undecided:
        caller = await undecided.caller()
    session, seconds = access.session(caller)
    response = _description(context, caller)
    response.set_cookie(
        COOKIE,
        session,
        max_age=seconds,
        path="/",
        httponly=True,
        samesite="Strict",
        secure=request.secure or access.proxies.secure(request.remote, request.headers) or None,
    )
    return response


async def log_out(context: Context, request: web.Request) -> web.Response:
    """Answer `DELETE /session`: delete the cookie; no error if there is none.

    Raises:
        OriginNotAllowed: the page that sent the request may not use a session.
    """
    context.guard.check_page(request)
    response = web.Response(status=204, headers=NO_STORE)
    response.del_cookie(COOKIE, path="/", httponly=True, samesite="Strict")
    return response


def _description(context: Context, caller: Caller | None) -> web.Response:
    """Return whether a key is needed, and the caller of the session."""
    fields = {
        "key_required": context.access.keyed,
        "name": caller.name if caller is not None else None,
        "admin": caller is not None and caller.admin,
    }
    return web.json_response(fields, headers=NO_STORE)


async def _key_in_body(context: Context, request: web.Request) -> bytes:
    if not request.body_exists:
        raise MissingApiKey(KEY_NEEDED)
    with context.admission.hold() as hold:
        body = at_once(sound(await read_body(request, hold, MAX_LOGIN_BYTES)))
    key = json_body.text(json_body.decode(_LOGIN, body, "the body").key)
    if key is None:
        raise InvalidRequest('the body must be {"key": "…"}', param="key")
    if not key.strip():
        raise MissingApiKey(KEY_NEEDED)
    return key.strip().encode()
