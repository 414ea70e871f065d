"""Origins (RFC 6454): the web pages that may connect, change something, and read our answers
(Fetch: CORS).
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from aioserver.errors import OriginNotAllowed

if TYPE_CHECKING:
    from collections.abc import Mapping


class Origins:
    """The pages of `allow_origins`, and our own.

    CORS does not protect WebSockets: a browser opens them to any host. Nor does it stop a request
    without a preflight: the page cannot read the answer, but the request takes effect. `check`
    refuses both if another page sends them.
    """

    def __init__(self, allowed: tuple[str, ...], *, credentials: bool) -> None:
        self.apply(allowed, credentials=credentials)

    def apply(self, allowed: tuple[str, ...], *, credentials: bool) -> None:
        """Allow the pages of *allowed* from now on; open connections stay."""
        self._any = "*" in allowed
        self._allowed = frozenset(origin.rstrip("/").lower() for origin in allowed)
        self._credentials = credentials

    def allows(self, origin: str, host: str | None, *, secure: bool = False) -> bool:
        """Return whether a page of *origin* may use this server; our own pages (same host and
        port) may. *secure*: whether the request came over TLS.
        """
        return self._any or self.trusts(origin, host, secure=secure)

    def trusts(self, origin: str, host: str | None, *, secure: bool = False) -> bool:
        """Return whether a cookie counts in a request from *origin*: our own, or one in
        `allow_origins`.

        A browser adds the cookie by itself, so "*" is not enough. SameSite takes other ports for
        the same site, so every page on this machine could chat as the person who has logged in
        here. If we serve TLS, a page that came in plain text does not count as our own: an
        attacker on the way may have written it.
        """
        if origin.rstrip("/").lower() in self._allowed:
            return True
        try:
            parts = urlsplit(origin)
        # "http://[" is not a valid address.
        except ValueError:
            return False
        netloc = parts.netloc.lower()
        if secure and parts.scheme != "https":
            return False
        return bool(netloc) and host is not None and netloc == host.lower()

    def check(self, headers: Mapping[str, str], *, secure: bool = False) -> None:
        """Refuse a handshake, or a request that changes something, of a page that may not connect.

        A request without `Origin` does not come from a page, and passes: browsers send the header
        with each handshake and with each method but GET and HEAD. The origin `null` (a sandboxed
        frame, a file) counts as another page.

        Raises:
            OriginNotAllowed: the page is neither ours nor allowed.
        """
        origin = headers.get("Origin")
        if origin is not None and not self.allows(origin, headers.get("Host"), secure=secure):
            raise OriginNotAllowed(
                "this page may not connect: add its origin to chat.websocket.allow_origins"
            )

    def cors(self, headers: Mapping[str, str], *, secure: bool = False) -> dict[str, str]:
        """Return the CORS headers of the response to a request with these *headers*."""
        origin = headers.get("Origin")
        if origin is None or not origin.isprintable() or not origin.isascii():
            return {}
        if not self.allows(origin, headers.get("Host"), secure=secure):
            return {"Vary": "Origin"}
        cors = {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}
        if self._credentials:
            cors["Access-Control-Allow-Credentials"] = "true"
        return cors
