"""What is asked of a provider, its bytes on the wire, and an answer in one piece.

A request is made once and may be sent several times: each try of it is an `Attempt` (attempt.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from yarl import URL

from aioserver import __version__
from aioserver.auth.callers import Caller
from aioserver.telemetry.request_log import RequestRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aioserver.config import settings
    from aioserver.protocol.openai import Reading
    from aioserver.providers.pool import Pool

ANYONE = Caller()
# Headers that frame a body; a configured header of these names is never sent.
FRAMING = frozenset({"connection", "content-length", "transfer-encoding"})


class ProviderRequest:
    """One request for an answer, as every provider gets it.

    *path* is OpenAI's, below the provider's base URL. *body* makes the JSON for one provider, whose
    model may differ; it is called for each try, and what it returns is not kept. *reading* collects
    what the answer says, for a log of `chunk` objects; without it the log has the provider's bytes.
    *model* is that of the first provider asked; None stands for its configured one.
    """

    __slots__ = ("body", "caller", "model", "path", "reading", "record", "streamed")

    def __init__(
        self,
        path: str,
        body: Callable[[settings.Provider], bytes],
        *,
        streamed: bool,
        caller: Caller = ANYONE,
        model: str | None = None,
        reading: Reading | None = None,
    ) -> None:
        self.path = path
        self.body = body
        self.streamed = streamed
        self.caller = caller
        self.model = model
        self.reading = reading
        self.record = RequestRecord()

    @property
    def whole(self) -> bool:
        """Whether the answer is one body, passed on as the provider sent it."""
        return self.reading is None and not self.streamed


@dataclass(slots=True)
class Answer:
    """A body that was not streamed, and those of the provider's headers that clients may see.

    *usage*: tokens, as the provider reports them. *attempts*: requests sent for it, at all providers.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    content_type: str
    provider: str
    usage: Mapping[str, Any] | None = None
    attempts: int = 1


class RequestWriter:
    """Writes requests to the API at *base_url*, as they go over the connections of *pool*.

    The head of each path is made once: only the body and its length differ between two requests.
    """

    def __init__(self, settings: settings.Provider, base_url: str, pool: Pool) -> None:
        self._settings = settings
        self._base = URL(base_url)
        self._forwards = pool.forwards
        self._proxy_headers = pool.proxy_headers()
        self._heads: dict[str, bytes] = {}

    def write(self, path: str, body: bytes) -> bytes:
        """Return the bytes of a POST of *body* (JSON) to *path*, below the base URL."""
        head = self._heads.get(path)
        if head is None:
            head = self._heads[path] = self._head(path)
        return b"%b%d\r\n\r\n%b" % (head, len(body), body)

    def _head(self, path: str) -> bytes:
        """Return the head of every request for *path*, up to the number behind Content-Length."""
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
        configured = {**self._settings.headers, **self._proxy_headers}
        replaced = {name.lower() for name in configured}
        headers = {name: value for name, value in headers.items() if name.lower() not in replaced}
        headers |= {
            name: value for name, value in configured.items() if name.lower() not in FRAMING
        }
        target = str(url) if self._forwards else url.raw_path_qs
        lines = [
            f"POST {target} HTTP/1.1",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        return "\r\n".join([*lines, "Content-Length: "]).encode("latin-1")
