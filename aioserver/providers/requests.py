"""The bytes of a request to a provider; the head of each path is made once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from yarl import URL

from aioserver import __version__

if TYPE_CHECKING:
    from aioserver.config import settings
    from aioserver.providers.pool import Pool

FRAMING = frozenset({"connection", "content-length", "transfer-encoding"})  # ours, never given


class Requests:
    """Requests to the API at *base_url*, by way of *pool*."""

    def __init__(self, given: settings.Provider, base_url: str, pool: Pool) -> None:
        self._settings = given
        self._base = URL(base_url)
        self._forwards = pool.forwards
        self._proxy_headers = pool.proxy_headers()
        self._heads: dict[str, bytes] = {}

    def make(self, path: str, body: bytes) -> bytes:
        """The request for *path*, below the base URL, whole."""
        head = self._heads.get(path)
        if head is None:
            head = self._heads[path] = self._head(path)
        return b"%b%d\r\n\r\n%b" % (head, len(body), body)

    def _head(self, path: str) -> bytes:
        """The head of every request for *path*, up to the number behind Content-Length."""
        url = self._base.with_path(f"{self._base.path.rstrip('/')}/{path}")
        headers = {
            "Host": url.authority.rpartition("@")[2],
            "User-Agent": f"aioserver/{__version__}",
            "Accept": "application/json, text/event-stream",
            "Accept-Encoding": "identity",
            "Content-Type": "application/json",
        }
        if self._settings.api_key is not None:
            headers["Authorization"] = f"Bearer {self._settings.api_key.reveal()}"
        given = {**self._settings.headers, **self._proxy_headers}
        replaced = {name.lower() for name in given}
        headers = {name: value for name, value in headers.items() if name.lower() not in replaced}
        headers |= {name: value for name, value in given.items() if name.lower() not in FRAMING}
        target = str(url) if self._forwards else url.raw_path_qs
        lines = [
            f"POST {target} HTTP/1.1",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        return "\r\n".join([*lines, "Content-Length: "]).encode("latin-1")
