"""The door: who may call which route, and the session that a browser gets for its key.

Every route has a policy in the table that `app.py` fills; one without is for admins. It is decided on
the route that was matched and on nothing else in the request: neither its path nor its Host. A key
comes as `Authorization: Bearer`, as a subprotocol of a WebSocket (browsers can set no header there:
`aioserver.key.<key>`, beside `aioserver`, which is the one that is taken), or as the cookie that
`POST /session` gives for one. A cookie counts only where it comes from our own page or a named one.

Whatever stands in these headers is somebody's guess: it is compared, and never shown or logged.
"""

from __future__ import annotations

import contextlib
import logging
from enum import Enum
from typing import TYPE_CHECKING, Any

from aiohttp import hdrs, web

from aioserver.auth.callers import ADDRESS, CALLER, SESSION_SECONDS, Caller, anonymous
from aioserver.errors import (
    Denied,
    InvalidApiKey,
    InvalidRequest,
    MissingApiKey,
    OriginNotAllowed,
    PermissionDenied,
)
from aioserver.faces import context, http
from aioserver.telemetry.logs import RateLimit

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aiohttp.web_urldispatcher import AbstractRoute

    from aioserver.auth.callers import Doors, Origins
    from aioserver.config.settings import Auth
    from aioserver.faces.websocket import Socket

logger = logging.getLogger("aioserver.door")

COOKIE = "aioserver_session"
SUBPROTOCOL = "aioserver"
KEY_PROTOCOL = "aioserver.key."
MAX_SESSIONS = 4  # cookies of this name that are looked at: another path or host may have set one
MAX_LOGIN_BYTES = 1 << 14
LINES_PER_SECOND = 5  # of one reason: guessing makes no flood
WANTED = "this server wants an API key: Authorization: Bearer, or log in on its page"
NO_STORE = {"Cache-Control": "no-store"}


class Policy(Enum):
    """Who may call a route where keys exist."""

    OPEN = "anybody: it holds no data"
    KEY = "who has a key"
    ADMIN = "who has a key with `admin`"


class Guard:
    """Looks at each request before its handler.

    Always: a route that is not in *policies* wants an admin key. A key is looked for only where
    keys exist, an address only where proxies are trusted: else a request costs two look-ups.
    """

    def __init__(self, doors: Doors, origins: Origins) -> None:
        self.policies: dict[AbstractRoute, Policy] = {}
        self._doors = doors
        self._origins = origins
        self._lines = RateLimit(LINES_PER_SECOND)

    def admit(self, request: web.Request) -> None:
        """Let *request* in: `request[CALLER]` is then who asks, except on an open route with keys.

        Raises:
            Denied: it may not, and no handler sees it.
        """
        doors, address = self._doors, request.remote
        if doors.proxies:
            request[ADDRESS] = address = doors.proxies.address(address, request.headers)
        if not doors.keyed:
            if doors.hosts is not None:
                doors.hosts.check(request.headers.get("Host"))
            request[CALLER] = anonymous(address)
            return
        match = request.match_info
        if match.http_exception is not None:
            return  # no such path, or not with this method: nobody is called
        policy = self.policies.get(match.route, Policy.ADMIN)
        if policy is Policy.OPEN:
            return
        caller = self.caller(request)
        if policy is Policy.ADMIN and not caller.admin:
            raise PermissionDenied("this key may chat, but not watch: it is no admin key")
        request[CALLER] = caller

    def caller(self, request: web.Request) -> Caller:
        """Who asks, by the key or the session in *request*.

        Raises:
            MissingApiKey: there is none.
            InvalidApiKey: it is nobody's, or there are several.
            As `resumed`.
        """
        return self.presented(request) or self.resumed(request)

    def resumed(self, request: web.Request) -> Caller:
        """Whose session is in *request*.

        Raises:
            MissingApiKey: there is none.
            SessionEnded: it is nobody's now.
            OriginNotAllowed: it comes from a page that may not use it.
        """
        fault: Denied = MissingApiKey(WANTED)
        for session in _sessions(request.headers.getall(hdrs.COOKIE, ())):
            self.check_page(request)
            try:
                return self._doors.keys.resumed(session)
            except InvalidApiKey as ended:
                fault = ended
        raise fault

    def presented(self, request: web.Request) -> Caller | None:
        """Whose key is in *request*; None: there is none in its headers.

        Raises:
            InvalidApiKey: as `caller`.
        """
        headers = request.headers
        found = _bearers(headers.getall(hdrs.AUTHORIZATION, ()))
        if not found and hdrs.SEC_WEBSOCKET_PROTOCOL in headers:
            found = _offered(headers.getall(hdrs.SEC_WEBSOCKET_PROTOCOL))
        if len(found) > 1:
            raise InvalidApiKey("more than one API key")
        if not found:
            return None
        return self._doors.keys.caller(found[0].encode("utf-8", "surrogatepass"))

    def check_page(self, request: web.Request) -> None:
        """Refuse what a browser adds by itself where another page makes it do so (CSRF).

        Raises:
            OriginNotAllowed: neither our own page nor a named one.
        """
        origin = request.headers.get(hdrs.ORIGIN)
        if origin is not None and not self._origins.trusts(origin, request.headers.get("Host")):
            raise OriginNotAllowed("this page may not use the session: see allow_origins")

    def refused(self, request: web.Request, error: Denied) -> None:
        """One line of whom was refused, and why; never what was tried."""
        if not logger.isEnabledFor(logging.WARNING):
            return
        if (suppressed := self._lines.allow(error.reason)) < 0:
            return
        resource = request.match_info.route.resource
        fields: dict[str, Any] = {
            "request_id": http.request_id(request),
            "reason": error.reason,
            "code": error.code,
            "route": resource.canonical if resource is not None else "",
            "address": request.get(ADDRESS, request.remote),
        }
        if suppressed:
            fields["suppressed"] = suppressed
        logger.warning("access refused", extra={"fields": fields})


def _bearers(given: Iterable[str]) -> list[str]:
    """The keys in the Authorization headers; another scheme is somebody else's business."""
    found = []
    for one in given:
        scheme, _, key = one.strip().partition(" ")
        if scheme.lower() == "bearer":
            found.append(key.strip())
    return found


def _offered(given: Iterable[str]) -> list[str]:
    """The keys among the subprotocols that a WebSocket offers."""
    return [
        one.removeprefix(KEY_PROTOCOL) for one in _listed(given) if one.startswith(KEY_PROTOCOL)
    ]


def _listed(given: Iterable[str]) -> list[str]:
    return [part.strip() for one in given for part in one.split(",")]


def _sessions(given: Iterable[str]) -> list[str]:
    """The values of our cookie."""
    found = []
    for one in given:
        for part in one.split(";"):
            name, _, value = part.strip().partition("=")
            if name == COOKIE:
                found.append(value.strip())
    return found[:MAX_SESSIONS]


def subprotocols(request: web.Request) -> tuple[str, ...]:
    """What a WebSocket may be told was taken of what it offered: never its key.

    Raises:
        InvalidRequest: a key, and nothing to take beside it: aiohttp would log the whole offer.
    """
    offered = _listed(request.headers.getall(hdrs.SEC_WEBSOCKET_PROTOCOL, ()))
    if SUBPROTOCOL in offered:
        return (SUBPROTOCOL,)
    if _offered(offered):
        raise InvalidRequest(f"offer the subprotocol {SUBPROTOCOL} beside {KEY_PROTOCOL}…")
    return ()


# The session.


def _about(request: web.Request, caller: Caller | None) -> web.Response:
    """Whether a key is needed, and whose session this is."""
    told = {
        "key_required": request.app[context.DOORS].keyed,
        "name": caller.name if caller is not None else None,
        "admin": caller is not None and caller.admin,
    }
    return web.json_response(told, headers=NO_STORE)


async def session(request: web.Request) -> web.Response:
    """`GET /session`: for a page that is to know whether to ask for a key; never an error.

    It looks at the cookie alone: no key can be tried here without being counted.
    """
    caller: Caller | None = None
    if request.app[context.DOORS].keyed:
        with contextlib.suppress(Denied):
            caller = request.app[context.GUARD].resumed(request)
    return _about(request, caller)


async def log_in(request: web.Request) -> web.Response:
    """`POST /session`: a cookie for the key in the body (`{"key": …}`) or in Authorization."""
    app = request.app
    doors, guard = app[context.DOORS], app[context.GUARD]
    guard.check_page(request)  # nobody is logged in by another page, with a key of its own
    if not doors.keyed:
        return _about(request, None)
    caller = guard.presented(request)  # a session is not made of a session: it would never end
    if caller is None:
        caller = doors.keys.caller(await _key_in_body(request))
    response = _about(request, caller)
    response.set_cookie(
        COOKIE,
        doors.keys.session(caller),
        max_age=SESSION_SECONDS,
        path="/",
        httponly=True,
        samesite="Strict",
        secure=request.secure or doors.proxies.secure(request.remote, request.headers) or None,
    )
    return response


async def _key_in_body(request: web.Request) -> bytes:
    if not request.body_exists:
        raise MissingApiKey(WANTED)
    with request.app[context.ADMISSION].hold() as hold:
        _, fields = await http.read_json(request, hold, MAX_LOGIN_BYTES)
    key = fields.get("key") if isinstance(fields, dict) else None
    if not isinstance(key, str):
        raise InvalidRequest('the body must be {"key": "…"}', param="key")
    if not key.strip():
        raise MissingApiKey(WANTED)
    return key.strip().encode()


async def log_out(request: web.Request) -> web.Response:
    """`DELETE /session`: forget the cookie; also where there is none."""
    request.app[context.GUARD].check_page(request)
    response = web.Response(status=204, headers=NO_STORE)
    response.del_cookie(COOKIE, path="/", httponly=True, samesite="Strict")
    return response


async def change(app: web.Application, given: Auth | None) -> frozenset[str]:
    """Use *given* from now on: who may no longer come is shown out.

    Answers of theirs end with `invalid_api_key`, their WebSockets close with 1008 `key revoked`, their
    sessions are dead. Limits change in place. Cancelling leaves sockets open that should be closed.

    Returns the names whose key is no longer valid; see `Doors.apply`.
    """
    doors = app[context.DOORS]
    gone = doors.apply(given)
    await app[context.GATEWAY].revoke(gone)
    sockets: list[Socket] = [*app[context.SOCKETS]]
    for socket in sockets:
        renewed = doors.renewed(socket.caller)
        if renewed is None:
            socket.revoke()
        else:
            socket.caller = renewed
    return gone
