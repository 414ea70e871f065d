"""`/session`: a browser exchanges its API key for a cookie (RFC 6265), and may forget it again."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from aiohttp import web

from aioserver.auth.guard import COOKIE, KEY_NEEDED
from aioserver.auth.keys import SESSION_SECONDS
from aioserver.errors import Denied, InvalidRequest, MissingApiKey
from aioserver.faces import context, http

if TYPE_CHECKING:
    from aioserver.auth.callers import Caller

MAX_LOGIN_BYTES = 1 << 14
NO_STORE = {"Cache-Control": "no-store"}


async def session(request: web.Request) -> web.Response:
    """`GET /session`: tells a page whether to ask for a key; never an error.

    It looks at the cookie alone: no key can be tried here without being counted.
    """
    caller: Caller | None = None
    if request.app[context.ACCESS].keyed:
        with contextlib.suppress(Denied):
            caller = request.app[context.GUARD].caller_by_session(request)
    return _describe(request, caller)


async def log_in(request: web.Request) -> web.Response:
    """`POST /session`: a cookie for the key in the body (`{"key": …}`) or in Authorization."""
    app = request.app
    access, guard = app[context.ACCESS], app[context.GUARD]
    # Another page may not log somebody in, with a key of its own.
    guard.check_page(request)
    if not access.keyed:
        return _describe(request, None)
    # Only for a key: a session that was made of a session would never end.
    caller = guard.caller_by_key(request)
    if caller is None:
        caller = access.keys.caller(await _key_in_body(request))
    response = _describe(request, caller)
    response.set_cookie(
        COOKIE,
        access.keys.session(caller),
        max_age=SESSION_SECONDS,
        path="/",
        httponly=True,
        samesite="Strict",
        secure=request.secure or access.proxies.secure(request.remote, request.headers) or None,
    )
    return response


async def log_out(request: web.Request) -> web.Response:
    """`DELETE /session`: forget the cookie; no error where there is none."""
    request.app[context.GUARD].check_page(request)
    response = web.Response(status=204, headers=NO_STORE)
    response.del_cookie(COOKIE, path="/", httponly=True, samesite="Strict")
    return response


def _describe(request: web.Request, caller: Caller | None) -> web.Response:
    """Say whether a key is needed, and whose session this is."""
    fields = {
        "key_required": request.app[context.ACCESS].keyed,
        "name": caller.name if caller is not None else None,
        "admin": caller is not None and caller.admin,
    }
    return web.json_response(fields, headers=NO_STORE)


async def _key_in_body(request: web.Request) -> bytes:
    if not request.body_exists:
        raise MissingApiKey(KEY_NEEDED)
    with request.app[context.ADMISSION].hold() as hold:
        _, fields = await http.read_json(request, hold, MAX_LOGIN_BYTES)
    key = fields.get("key") if isinstance(fields, dict) else None
    if not isinstance(key, str):
        raise InvalidRequest('the body must be {"key": "…"}', param="key")
    if not key.strip():
        raise MissingApiKey(KEY_NEEDED)
    return key.strip().encode()
