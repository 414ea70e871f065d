"""The common parts of the HTTP handlers: the id of a request, writing an error,
announcing an end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import hdrs, web
from aiohttp.http import HttpVersion11

from aioserver.auth.guard import peer_of
from aioserver.faces.form import OPENAI
from aioserver.protocol.request_headers import log_id_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aioserver.errors import AioserverError
    from aioserver.faces.form import Form

# Headers of responses that must not be stored.
NO_STORE = {"Cache-Control": "no-store"}
# Segments of a route's path that are ids, which may have any character. aiohttp's own pattern
# matches no brace.
ID, REQUEST_ID = "{id:[^/]+}", "{request_id:[^/]+}"
# Prefixes of the names of headers in which a provider tells of its limits.
PROVIDERS_LIMITS = ("x-ratelimit-", "anthropic-ratelimit-")
# The value of the header `Server`.
SERVER = "aioserver"


class Request(web.Request):
    """aiohttp's request with three attributes of ours; server/connections.py makes every request
    one.

    *known_id* is the id of the request for logs, which the middleware sets. *started* is the
    response whose head was sent, or is about to be sent. *limits* returns the headers that report
    the limits of the client's key; it is None if the key has no budget.
    """

    ATTRS = web.Request.ATTRS | frozenset(["known_id", "limits", "started"])

    known_id: str = ""
    started: web.StreamResponse | None = None
    limits: Callable[[], dict[str, str]] | None = None

    @property
    def secure(self) -> bool:
        """Whether the client speaks TLS, also with another instance that has passed this on."""
        peer = peer_of(self)
        return super().secure if peer is None else peer.secure


def request_id(request: web.BaseRequest) -> str:
    """Return the id of *request* for logs: see `log_id_of`."""
    assert isinstance(request, Request)
    if not request.known_id:
        request.known_id = log_id_of(request.headers)
    return request.known_id


def with_limits(request: Request, headers: Mapping[str, str]) -> Mapping[str, str]:
    """Return *headers* of a response. If the client's key has a budget, the limits of the key
    replace those of the provider.
    """
    if request.limits is None:
        return headers
    kept = {
        name: value
        for name, value in headers.items()
        if not name.lower().startswith(PROVIDERS_LIMITS)
    }
    return kept | request.limits()


def last_on_connection(request: web.BaseRequest) -> bool:
    """Return whether the connection ends with this response.

    The answer is False on connections of another server, in which the application is embedded.
    """
    return getattr(request.protocol, "last", False)


def error_response(
    error: AioserverError, request: web.BaseRequest | None = None, form: Form = OPENAI
) -> web.Response:
    """Return *error* as an HTTP response to *request*, in the *form* that its client knows."""
    headers = error.headers()
    log_id = ""
    if form.id_header and request is not None:
        log_id = request_id(request)
        headers.setdefault(form.id_header, log_id)
    headers["Content-Type"] = "application/json"
    if error.force_close:
        # A client that sends `Upgrade` must name it in `Connection`, too (RFC 9110, 7.8).
        headers["Connection"] = "upgrade, close" if "Upgrade" in headers else "close"
    response = web.Response(
        status=form.status(error), body=form.error(error, log_id), headers=headers
    )
    if error.force_close:
        response.force_close()
    return response


def announce_close(
    request: web.Request, response: web.StreamResponse, *, streamed: bool = False
) -> None:
    """Announce in the head of *response* that the connection ends with it, if it does.

    The client may have asked for that (RFC 9112, 9.6). The connection of an HTTP/1.0 client ends
    with a *streamed* body in any case: the body has neither chunks nor a length, so only the close
    ends it.
    """
    if (
        last_on_connection(request)
        or not request.keep_alive
        # A client that never got its `100 Continue` may send the body next, or another request in
        # its place.
        or (hdrs.EXPECT in request.headers and not request.content.is_eof())
        or (streamed and request.version < HttpVersion11)
    ):
        # A refused upgrade names its header in `Connection`, too.
        if "close" not in response.headers.get("Connection", ""):
            response.headers["Connection"] = "close"
        response.force_close()
