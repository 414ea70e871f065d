"""The guard in front of every handler: it decides whether a request may call its route, and for
which caller.

Every route has a policy in the table that server/app.py fills; a route without one is for admins.
The decision depends only on the route that was matched: neither on the path nor on the `Host`. A
request presents its key in one of these ways:

    Authorization: Bearer <key>              RFC 6750
    x-api-key: <key>, api-key: <key>         as the SDKs of Anthropic and Azure send it
    Sec-WebSocket-Protocol: aioserver, aioserver.key.<key>
                                             a browser can set no other header of a WebSocket;
                                             `aioserver` is the protocol that is then selected
    Sec-WebSocket-Protocol: realtime, openai-insecure-api-key.<key>
                                             the same in OpenAI's form
    Cookie: aioserver_session=…              the result of `POST /session` for a key; it counts only
                                             in a request of our own page, or of one that
                                             `allow_origins` names

The value of such a header may be a guess: it is compared, and never shown or logged. A key may
come in several of these headers, but a request with two keys is refused, since each would mean
another caller.

A server may have no keys, and a page may send some requests without a preflight (Fetch, 4.10),
such as a POST without a body. So on every route the guard checks the `Origin` before the key, for
each upgrade and each method that may change something.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from aiohttp import hdrs, web
from multidict import istr

from aioserver.auth.callers import ADDRESS, CALLER, Caller, anonymous
from aioserver.errors import (
    Denied,
    InvalidApiKey,
    InvalidRequest,
    MethodNotAllowed,
    MissingApiKey,
    OriginNotAllowed,
    PermissionDenied,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from aiohttp.web_urldispatcher import AbstractRoute

    from aioserver.auth.access import Access
    from aioserver.auth.callers import Peer
    from aioserver.auth.origins import Origins

COOKIE = "aioserver_session"
KEY_HEADERS = ("x-api-key", "api-key")
# The subprotocol that is selected, if the client offers it.
SUBPROTOCOL = "aioserver"
KEY_PROTOCOL = "aioserver.key."
# The beginnings of a subprotocol with a key: ours, and OpenAI's.
KEY_PROTOCOLS = (KEY_PROTOCOL, "openai-insecure-api-key.")
# Cookies of this name that are tried: another path or host may have set one as well.
MAX_SESSIONS = 4
# Methods that change nothing (RFC 9110, 9.2.1).
SAFE_METHODS = frozenset({hdrs.METH_GET, hdrs.METH_HEAD, hdrs.METH_OPTIONS, hdrs.METH_TRACE})
# The methods of requests that another instance may pass on.
PASSED_METHODS = frozenset({hdrs.METH_GET, hdrs.METH_HEAD, hdrs.METH_POST})
KEY_NEEDED = (
    "this server wants an API key: "
    f"Authorization: Bearer, {', '.join(KEY_HEADERS)}, or log in on its page"
)


class Policy(Enum):
    """The callers that may call a route, if keys exist."""

    OPEN = "anybody: it holds no data"
    KEY = "every caller with a key"
    ADMIN = "callers whose key has `admin`"


class Guard:
    """Checks each request before its handler.

    Always: a route that is not in *policies* needs an admin key, and no foreign page changes
    anything by any route. Keys are read only if keys exist, and forwarded addresses only if
    proxies are trusted: otherwise a request costs a few look-ups.
    """

    def __init__(self, access: Access, origins: Origins) -> None:
        self.policies: dict[AbstractRoute, Policy] = {}
        # The routes of WebSockets among them.
        self.websockets: set[AbstractRoute] = set()
        self._access = access
        self._origins = origins

    def admit(self, request: web.Request, known: Caller | None = None) -> Caller | None:
        """Admit *request*, and set `request[CALLER]`, except on an open route when keys exist.

        Return that caller if it has a key. *known* is the caller, if it was determined already.

        Raises:
            Undecided: its token waits for a key of the issuer; call this again then.
            Denied: the request may not call its route; no handler may see it. The same
                holds for AuthUnavailable and ServerAtCapacity, with a token.
        """
        access, headers = self._access, request.headers
        keyed, address = access.keyed, None
        if (peer := peer_of(request)) is not None:
            if request.method not in PASSED_METHODS:
                raise MethodNotAllowed("instances pass on no request of this method")
            request[ADDRESS] = address = peer.address
        elif access.proxies.trusted:
            request[ADDRESS] = address = access.proxies.address(request.remote, headers)
        if not keyed and (hosts := access.hosts) is not None:
            host = headers.get(hdrs.HOST)
            if host not in hosts.known:
                hosts.check(host)
        if hdrs.ORIGIN in headers and (
            request.method not in SAFE_METHODS or hdrs.UPGRADE in headers
        ):
            self._origins.check(headers, secure=request.secure)
        if not keyed:
            request[CALLER] = anonymous(request.remote if address is None else address)
            return None
        match = request.match_info
        # The path does not exist, or not with this method: none of our handlers will run.
        if match.http_exception is not None:
            return None
        policy = self.policies.get(match.route, Policy.ADMIN)
        if policy is Policy.OPEN:
            return None
        caller = known or self.caller_by_key(request) or self.caller_by_session(request)
        if policy is Policy.ADMIN and not caller.admin:
            raise PermissionDenied("this key may chat, but not watch: it is not an admin key")
        request[CALLER] = caller
        return caller

    def caller_by_session(self, request: web.Request) -> Caller:
        """Return the caller whose session is in the cookie of *request*.

        Raises:
            MissingApiKey: the request has no session.
            SessionEnded: no session in the cookie is valid.
            Undecided, AuthUnavailable, ServerAtCapacity: as `Access.resume`.
            OriginNotAllowed: the page that sent the request may not use a session.
        """
        fault: Denied = MissingApiKey(KEY_NEEDED)
        for session in _sessions(request.headers.getall(hdrs.COOKIE, ())):
            self.check_page(request)
            try:
                return self._access.resume(session)
            except InvalidApiKey as ended:
                fault = ended
        raise fault

    def caller_by_key(self, request: web.Request) -> Caller | None:
        """Return the caller whose key is in the headers of *request*; None if there is no key.

        Raises:
            InvalidApiKey: no caller has the key, or the request has several keys.
            Undecided, PermissionDenied, AuthUnavailable, ServerAtCapacity: as `Access.caller`.
        """
        headers, sent = request.headers, None
        sources = [_bearers(headers.getall(hdrs.AUTHORIZATION, ()))]
        if not headers.keys().isdisjoint(OTHER_SOURCES):
            sources += [find(headers.getall(name, ())) for name, find in OTHER_SOURCES.items()]
        for keys in sources:
            if len(keys) > 1 or (keys and sent is not None and sent != keys[0]):
                raise InvalidApiKey("more than one API key")
            if keys:
                sent = keys[0]
        return None if sent is None else self._access.caller(sent.encode("utf-8", "surrogatepass"))

    def check_page(self, request: web.Request) -> None:
        """Refuse a request that another page makes a browser send with its cookie (CSRF).

        Raises:
            OriginNotAllowed: the page is neither ours nor one in `allow_origins`.
        """
        origin = request.headers.get(hdrs.ORIGIN)
        host = request.headers.get("Host")
        if origin is not None and not self._origins.trusts(origin, host, secure=request.secure):
            raise OriginNotAllowed("this page may not use the session: see allow_origins")


def peer_of(request: web.BaseRequest) -> Peer | None:
    """Return the client of *request* if another instance of the cluster has passed it on; None if
    the client has sent it here.
    """
    return getattr(request.protocol, "peer", None)


def offered_protocols(request: web.Request) -> list[str]:
    """Return the subprotocols that a WebSocket handshake offers (RFC 6455, 11.3.4)."""
    return _protocols(request.headers.getall(hdrs.SEC_WEBSOCKET_PROTOCOL, ()))


def selectable_protocols(request: web.Request, others: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return the subprotocol to select of those that a handshake offers; never the one with its
    key.

    It is SUBPROTOCOL or, if that is not offered, the first offered one of *others*.

    Raises:
        InvalidRequest: the client offers only a key, and no other protocol: aiohttp would log the
            whole offer.
    """
    offered = offered_protocols(request)
    if SUBPROTOCOL in offered:
        return (SUBPROTOCOL,)
    for protocol in offered:
        if protocol in others:
            return (protocol,)
    if offered_keys(offered):
        names = " or ".join((SUBPROTOCOL, *others))
        raise InvalidRequest(f"offer the subprotocol {names} beside the one with the key")
    return ()


def offered_keys(protocols: Iterable[str]) -> list[str]:
    """Return the API keys among the subprotocols that a WebSocket handshake offers."""
    return [
        protocol.removeprefix(start)
        for protocol in protocols
        for start in KEY_PROTOCOLS
        if protocol.startswith(start)
    ]


def _protocols(headers: Iterable[str]) -> list[str]:
    return [protocol.strip() for header in headers for protocol in header.split(",")]


def _bearers(headers: Iterable[str]) -> list[str]:
    """Return the keys in the Authorization headers; a header of another scheme is ignored."""
    keys = []
    for header in headers:
        scheme, _, key = header.strip().partition(" ")
        if scheme.lower() == "bearer":
            keys.append(key.strip())
    return keys


def _keys(headers: Iterable[str]) -> list[str]:
    """Return the keys in headers that hold only a key; an empty header is ignored."""
    return [key for header in headers if (key := header.strip())]


def _keys_offered(headers: Iterable[str]) -> list[str]:
    return offered_keys(_protocols(headers))


# The headers beside Authorization that may have a key, as multidict looks for them, each with the
# function that extracts keys from its values.
OTHER_SOURCES: dict[str, Callable[[Iterable[str]], list[str]]] = {
    **{istr(name): _keys for name in KEY_HEADERS},
    hdrs.SEC_WEBSOCKET_PROTOCOL: _keys_offered,
}


def _sessions(headers: Iterable[str]) -> list[str]:
    """Return the values of our cookie, MAX_SESSIONS at most."""
    sessions = []
    for header in headers:
        for cookie in header.split(";"):
            name, _, value = cookie.strip().partition("=")
            if name == COOKIE:
                sessions.append(value.strip())
    return sessions[:MAX_SESSIONS]
