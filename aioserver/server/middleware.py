"""The middleware in front of every handler, and the border at which an error becomes a response.

It counts the requests of a connection, and checks what aiohttp does not: the version of HTTP, the
`Host`, the limits of the request line and of the header block. It asks the guard, and answers CORS
preflights (Fetch, 3.2) and `OPTIONS *`. A signal of aiohttp's adds the headers that every response
has.

For a path without parameters the handler is always the same: `Dispatcher` finds it once.

Private names of aiohttp used here, where it has them: `_match_info`.
"""

from __future__ import annotations

import asyncio
import logging
from functools import lru_cache, partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from aiohttp import HttpVersion10, HttpVersion11, hdrs, web

from aioserver.auth.callers import ADDRESS
from aioserver.auth.tokens import Undecided
from aioserver.errors import (
    AioserverError,
    Denied,
    ExpectationFailed,
    HeadersTooLarge,
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    OriginNotAllowed,
    RequestTooLarge,
    UpgradeRequired,
    UriTooLong,
    VersionNotSupported,
)
from aioserver.faces import whole
from aioserver.faces.http import (
    PROVIDERS_LIMITS,
    SERVER,
    Request,
    announce_close,
    error_response,
    request_id,
)
from aioserver.faces.passthrough import API
from aioserver.faces.ready import HIGH_WATER
from aioserver.protocol.addresses import host_name
from aioserver.protocol.request_headers import log_id_of
from aioserver.provider_errors import ProviderFault
from aioserver.providers.error_mapping import VISIBLE_HEADERS
from aioserver.server import paths
from aioserver.server.connection import Connection
from aioserver.telemetry.ended_requests import MAX_NAME
from aioserver.telemetry.logs import RateLimit
from aioserver.tracebacks import forget_frames

if TYPE_CHECKING:
    from collections.abc import Awaitable, Collection

    from aiohttp.typedefs import Handler, Middleware

    from aioserver.auth.callers import Caller
    from aioserver.auth.guard import Guard
    from aioserver.auth.origins import Origins
    from aioserver.faces.admission import Admission
    from aioserver.faces.context import CurrentSettings
    from aioserver.faces.form import Forms


logger = logging.getLogger("aioserver.faces.http")
refusals_logger = logging.getLogger("aioserver.refusals")

# The headers that a page of another origin may read, beside those of the provider.
EXPOSED = (
    *("x-request-id", "x-aioserver-provider", "x-aioserver-attempts", "location"),
    *("x-aioserver-hold", "x-aioserver-cache"),
    *("retry-after", "retry-after-ms", "x-should-retry", "request-id"),
)
METHODS = "GET, POST, DELETE, OPTIONS"
VERSIONS = (HttpVersion11, HttpVersion10)
# Characters of a request line beside its method and its target.
LINE_REST = len(" HTTP/1.1 ")
# Log lines about refused requests, for each reason: guessing keys must not flood the log.
REFUSALS_PER_SECOND = 5


class Dispatcher:
    """The handler of all requests of *app*: the handler of its route behind the *middleware* if
    the path has no parameters, and otherwise *router*, which is aiohttp's.

    Always: a request gets the handler and the match that aiohttp's router would give it.
    """

    def __init__(self, app: web.Application, router: Handler, middleware: Middleware) -> None:
        self._router, self._middleware = router, middleware
        self._found: dict[tuple[str, str], tuple[web.UrlMappingMatchInfo, Handler]] = {}
        if not hasattr(web.Request, "_match_info"):
            return
        for route in app.router.routes():
            if isinstance(route.resource, web.PlainResource):
                match = web.UrlMappingMatchInfo({}, route)
                match.add_app(app)
                match.freeze()
                # The first of two routes with one path counts, as for the router.
                key = route.method, route.resource.canonical
                self._found.setdefault(key, (match, route.handler))

    def __call__(self, request: web.Request) -> Awaitable[web.StreamResponse]:
        """Return the awaitable response to *request*."""
        if hdrs.EXPECT in request.headers:
            return _expecting(self._router, self._middleware, request)
        found = self._found.get((request.method, request.raw_path))
        if found is None:
            return self._router(request)
        request._match_info, handler = found  # noqa: SLF001 - see the head of this file
        return self._middleware(request, handler)


class Border:
    """The steps between aiohttp and every handler, as the methods of one middleware.

    `handle` is the middleware; `add_headers` handles the signal `on_response_prepare`.
    """

    def __init__(
        self, settings: CurrentSettings, guard: Guard, origins: Origins, admission: Admission
    ) -> None:
        self._settings, self._guard, self._origins = settings, guard, origins
        self._admission, self._metrics = admission, admission.metrics
        self._forms, self._refusals = admission.forms, RateLimit(REFUSALS_PER_SECOND)

    @web.middleware
    async def handle(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answer *request* by *handler*, or by the error that speaks against it."""
        assert isinstance(request, Request)
        protocol = request.protocol
        # Where the application is embedded, the connection is another server's, without our limit.
        connection = protocol if isinstance(protocol, Connection) else None
        request.known_id = log_id_of(request.headers)
        try:
            self._check_head(request, connection)
            try:
                caller = self._guard.admit(request)
            except Undecided as undecided:
                caller = self._guard.admit(request, await undecided.caller())
            response = self._own_response(request, caller) or await handler(request)
        except (ConnectionError, asyncio.CancelledError):
            # The client left, perhaps while its response began: aiohttp ends the connection.
            request.started = None
            raise
        except Exception as error:  # noqa: BLE001 - the border of all handlers
            response = self._response_of(request, error)
        # aiohttp's responses know their request until they are written; the two would hold each
        # other.
        started, request.started = request.started, None
        if started is not None and started is not response:
            if request.transport is not None:
                # A second head would be taken for a part of the first one's body.
                request.transport.abort()
            return started
        if not response.prepared:
            announce_close(request, response)
            if isinstance(response, web.Response) and _large(response):
                timeout, drop = self._admission.send_timeout, self._admission.dropped
                try:
                    await whole.write(request, response, timeout, drop, "http")
                finally:
                    request.started = None
        elif connection is not None and connection.last and response.keep_alive:
            # The head is sent already, and did not say that the connection ends.
            connection.close_soon()
        return response

    def _own_response(self, request: Request, caller: Caller | None) -> web.Response | None:
        """Return the response to a request of *caller* that no handler sees, None if one does."""
        if caller is not None and caller.quota is not None and caller.quota.budget.limited:
            # The response tells of them.
            request.limits = partial(self._forms.of(request).limits, caller.quota)
        if hdrs.UPGRADE in request.headers:
            self._check_upgrade(request)
        if request.method == hdrs.METH_OPTIONS:
            if "Access-Control-Request-Method" in request.headers:
                return self._preflight(request)
            if request.raw_path == "*":
                return web.Response(status=204, headers={"Allow": METHODS})
        return None

    def _response_of(self, request: web.Request, error: Exception) -> web.StreamResponse:
        """Return *error* as a response, and count it unless that was done with its record."""
        form = self._forms.of(request)
        if isinstance(error, AioserverError):
            # An error of a request that has a record is counted with that record.
            recorded = isinstance(error, ProviderFault) and error.request_outcome is not None
            if not error.counted and not recorded:
                self._metrics.count_error(error)
            if isinstance(error, Denied):
                self._log_refusal(request, error)
            response = error_response(error, request, form)
            forget_frames(error)
            return response
        if isinstance(error, web.HTTPException):
            fault, methods = _translated(error, request, self._forms)
            self._metrics.count_error(fault)
            response = error_response(fault, request, form)
            if methods:
                response.headers["Allow"] = ", ".join(sorted(methods))
            return response
        fields = {"request_id": request_id(request)}
        logger.error("bug in a handler", exc_info=error, extra={"fields": fields})
        self._metrics.bugs.note(error)
        return error_response(InternalError("internal error"), request, form)

    def _check_head(self, request: web.Request, connection: Connection | None) -> None:
        limits = self._settings.chat.websocket.concurrency.uvicorn
        if connection is not None:
            connection.begin(request)
            if connection.requests >= limits.max_keepalive_requests:
                connection.last = True
        if request.version not in VERSIONS:
            if request.version < HttpVersion10:
                raise InvalidRequest("the request line has no version of HTTP")
            raise VersionNotSupported("this server speaks HTTP/1.1 and HTTP/1.0")
        if not _well_formed(request.headers.get(hdrs.HOST, "")):
            raise InvalidRequest("the Host header is no name with or without a port")
        codings = request.headers.get(hdrs.TRANSFER_ENCODING)
        if codings is not None and (request.version < HttpVersion11 or not codings.strip()):
            # RFC 9112, 6.1: two servers could read this body differently.
            raise InvalidRequest("Transfer-Encoding is empty, or in a request of HTTP/1.0")
        line = len(request.method) + len(request.raw_path) + LINE_REST
        if line > (limit := limits.h11_max_request_line_size):
            raise UriTooLong(f"a request line of {line} bytes, at most {limit}")
        headers = request.raw_headers
        # The 4 bytes are ": " and the line's end.
        head = sum(map(len, chain.from_iterable(headers))) + 4 * len(headers)
        if head > (limit := limits.h11_max_header_size):
            raise HeadersTooLarge(f"{head} bytes of headers, at most {limit}")

    def _check_upgrade(self, request: web.Request) -> None:
        """Refuse a handshake where there is no WebSocket.

        Other upgrades are ignored (RFC 9110, 7.8).
        """
        protocols = ",".join(request.headers.getall(hdrs.UPGRADE)).split(",")
        if all(protocol.strip().lower() != "websocket" for protocol in protocols):
            return
        match = request.match_info
        # Where the application is embedded, the program's own routes decide for themselves.
        ours = match.http_exception is not None or match.route in self._guard.policies
        if ours and match.route not in self._guard.websockets:
            endpoint = self._settings.chat.websocket.endpoint
            raise UpgradeRequired(
                f"there is no WebSocket at this path: it is at {endpoint}, "
                "that of responses at /v1/responses"
            )

    def _log_refusal(self, request: web.Request, error: Denied) -> None:
        """Log which request was refused, and why; never the key that it presented."""
        if not refusals_logger.isEnabledFor(logging.WARNING):
            return
        if (left_out := self._refusals.allow(error.reason)) is None:
            return
        resource = request.match_info.route.resource
        fields: dict[str, Any] = {
            "request_id": request_id(request),
            "reason": error.reason,
            "code": error.code,
            "method": request.method,
            "route": resource.canonical if resource is not None else "",
            "address": request.get(ADDRESS, request.remote),
        }
        if error.setting:
            header = "Origin" if isinstance(error, OriginNotAllowed) else "Host"
            fields[header.lower()] = request.headers.get(header, "")[:MAX_NAME]
            fields["setting"] = error.setting
        refusals_logger.warning("access refused", extra={"fields": fields | left_out})

    def _preflight(self, request: web.Request) -> web.Response:
        """Answer a CORS preflight; a browser takes the missing `Allow-Origin` for a refusal."""
        origin = request.headers.get("Origin")
        host = request.headers.get("Host")
        if origin is not None and not self._origins.allows(origin, host, secure=request.secure):
            self._log_refusal(
                request, OriginNotAllowed("a preflight of a page that may not connect")
            )
        return _preflight(request)

    async def add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        """Add the headers that every response has to *response*, which is about to begin."""
        assert isinstance(request, Request)
        request.started = response
        headers = response.headers
        if request.limits is not None:
            for name in [name for name in headers if name.lower().startswith(PROVIDERS_LIMITS)]:
                del headers[name]
            headers.update(request.limits())
        headers["Server"] = SERVER
        headers["x-request-id"] = request_id(request)
        if "Origin" in request.headers:
            headers.update(self._origins.cors(request.headers, secure=request.secure))
            # By name: with credentials, CORS takes "*" for a header of that name.
            passed = (name.lower() for name in headers if name.lower().startswith(VISIBLE_HEADERS))
            names = dict.fromkeys((*EXPOSED, *passed))
            headers["Access-Control-Expose-Headers"] = ", ".join(names)


async def _expecting(
    handler: Handler, middleware: Middleware, request: web.Request
) -> web.StreamResponse:
    """Return the response of *handler*, which is aiohttp's. If aiohttp refuses the `Expect` in
    front of the *middleware*, the refusal goes through the middleware as well.
    """
    try:
        return await handler(request)
    except (web.HTTPExpectationFailed, UnicodeEncodeError):
        # aiohttp's refusal repeats the header, which may have any bytes.
        return await middleware(request, _refuse)


async def _refuse(_request: web.Request) -> web.StreamResponse:
    raise web.HTTPExpectationFailed


@lru_cache(maxsize=256)
def _well_formed(host: str) -> bool:
    """Return whether *host* may be the value of a `Host` header. It is empty if the target of a
    request has no host (RFC 9112, 3.2).
    """
    return not host or host_name(host) is not None


def _large(response: web.Response) -> bool:
    """Return whether aiohttp would have to wait for the client before the kernel has all of
    *response*.
    """
    body = response.body
    return isinstance(body, bytes | bytearray) and len(body) > HIGH_WATER


def _preflight(request: web.Request) -> web.Response:
    headers = {
        "Access-Control-Allow-Methods": METHODS,
        "Access-Control-Max-Age": "600",
    }
    requested = request.headers.get("Access-Control-Request-Headers", "")
    if requested.isascii() and requested.isprintable():
        headers["Access-Control-Allow-Headers"] = requested
    return web.Response(headers=headers)


def _translated(
    exc: web.HTTPException, request: web.Request, forms: Forms
) -> tuple[AioserverError, Collection[str]]:
    """Return our error for aiohttp's *exc*, and the methods that the path has, for 405."""
    methods: Collection[str] = ()
    if request.method == hdrs.METH_CONNECT:
        return MethodNotAllowed("this server is no proxy"), METHODS.split(", ")
    if exc.status in {404, 405}:
        if request.rel_url.raw_path.startswith(API):
            methods = paths.methods(request)
        elif isinstance(exc, web.HTTPMethodNotAllowed):
            methods = exc.allowed_methods
        if methods:
            return MethodNotAllowed(f"{request.method} is not for this path"), methods
        return paths.not_found(request, forms), ()
    if exc.status == 413:
        return RequestTooLarge("the body is too large"), ()
    if exc.status == 417:
        return ExpectationFailed("Expect must be 100-continue"), ()
    return InvalidRequest(exc.reason), ()
