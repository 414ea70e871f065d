"""Who asks, and from which page.

Without keys all clients are one caller: ids are names within it. Fairness still looks at the
client's address, and at OpenAI's `user` where a request has one.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from aioserver.errors import OriginNotAllowed

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose streams and conversations.

    *line*: in which of its lines it stands at a provider; *priority*: its weight there, 1 to 10.
    """

    name: str = ""
    line: str = field(default="", compare=False)
    priority: int = field(default=1, compare=False)

    def on_behalf_of(self, user: object) -> Caller:
        """The same caller, in the line of one of its users."""
        if isinstance(user, str) and user:
            return replace(self, line=f"{self.line}\0{user[:128]}")
        return self


@functools.lru_cache(maxsize=4096)
def anonymous(address: str | None) -> Caller:
    """A client without a key."""
    return Caller("", address or "")


class Origins:
    """The pages that may open a WebSocket and read our answers (`allow_origins`).

    CORS never guards a WebSocket: its handshake is refused here, before the upgrade.
    """

    def __init__(self, allowed: tuple[str, ...], *, credentials: bool) -> None:
        self.apply(allowed, credentials=credentials)

    def apply(self, allowed: tuple[str, ...], *, credentials: bool) -> None:
        """From now on these may; who is connected stays."""
        self._any = "*" in allowed
        self._allowed = frozenset(origin.rstrip("/").lower() for origin in allowed)
        self._credentials = credentials

    def allows(self, origin: str, host: str | None) -> bool:
        """Whether a page of *origin* may; our own pages (same host and port) always may."""
        if self._any or origin.rstrip("/").lower() in self._allowed:
            return True
        try:
            own = urlsplit(origin).netloc.lower()
        except ValueError:  # "http://[": no address
            return False
        return bool(own) and host is not None and own == host.lower()

    def check(self, headers: Mapping[str, str]) -> None:
        """Refuse a handshake from a page that may not; who sends no Origin is no browser.

        Raises:
            OriginNotAllowed: said before the upgrade.
        """
        origin = headers.get("Origin")
        if origin is not None and not self.allows(origin, headers.get("Host")):
            raise OriginNotAllowed("this page may not connect: see chat.websocket.allow_origins")

    def cors(self, headers: Mapping[str, str]) -> dict[str, str]:
        """The CORS headers of an answer to a request with these *headers*."""
        origin = headers.get("Origin")
        if origin is None or not origin.isprintable() or not origin.isascii():
            return {}
        if not self.allows(origin, headers.get("Host")):
            return {"Vary": "Origin"}
        cors = {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}
        if self._credentials:
            cors["Access-Control-Allow-Credentials"] = "true"
        return cors
