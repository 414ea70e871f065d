"""HTTP/1.1 with a provider: requests as bytes, and the bytes of answers parsed.

httptools (llhttp) parses; `ResponseParser` keeps what it says. One object lives as long as its connection: a
parser for each answer would cost as much as the parsing, and leave a reference cycle behind for the
garbage collector, which is then a seventh of a request.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Protocol

import httptools
from yarl import URL

from aioserver import __version__
from aioserver.provider_errors import ProviderBadResponse

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aioserver.config import settings
    from aioserver.streams.stream import Path

# Headers that frame a body; a configured header of these names is never sent.
FRAMING = frozenset({"connection", "content-length", "transfer-encoding"})
MAX_HEAD_BYTES = 65_536  # of an answer's head, interim answers included


class RequestWriter:
    """Writes requests to the API at *base_url*.

    *absolute* says that a plain proxy gets them: the request line is then an absolute URL, and the proxy
    wants to see *proxy_headers*. The head of each path is made once: only the body and its length differ between two requests.
    """

    def __init__(
        self,
        settings: settings.Provider,
        base_url: str,
        *,
        absolute: bool,
        proxy_headers: Mapping[str, str],
    ) -> None:
        self._settings = settings
        self._base = URL(base_url)
        self._absolute = absolute
        self._proxy_headers = proxy_headers
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
        target = str(url) if self._absolute else url.raw_path_qs
        lines = [
            f"POST {target} HTTP/1.1",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        return "\r\n".join([*lines, "Content-Length: "]).encode("latin-1")


class Sink(Protocol):
    """Where an answer's body goes. Called from `data_received`; may raise AioserverError."""

    def feed(self, data: bytes) -> bool:
        """A part of the body, never empty. False: no more is wanted, the answer is complete."""

    def end(self) -> None:
        """The body is whole."""

    def fast(self) -> Path | None:
        """The way by which the next chunk may pass this sink, if there is one."""


class ResponseParser:
    """One answer after the other: `begin`, then `feed` until it is `whole`.

    Where an answer did not end well the connection is closed, and this with it.
    """

    __slots__ = (
        "_head_bytes",
        "_header_bytes",
        "_headers",
        "_interim",
        "_on_head",
        "_parser",
        "between",
        "framed",
        "keep",
        "on_chunk_complete",
        "on_chunk_header",
        "parts",
        "sink",
        "surplus",
        "whole",
    )

    def __init__(self) -> None:
        # Not empty: the parser stands between two chunks. Kept by C functions, since it calls them
        # for every chunk; it looks them up when it is made.
        self.between: list[bool] = []
        self.on_chunk_header = self.between.clear
        self.on_chunk_complete = functools.partial(self.between.append, True)
        self._parser = httptools.HttpResponseParser(self)
        self._on_head: Callable[[int, Mapping[str, str]], Sink] | None = None
        self._headers: dict[str, str] = {}
        self.parts: list[bytes] = []

    def begin(self, on_head: Callable[[int, Mapping[str, str]], Sink]) -> None:
        """Another answer; *on_head* says where its body goes once its head is whole."""
        self._on_head = on_head
        self._head_bytes = 0  # that came before the head was whole, some of the body perhaps
        self._header_bytes = 0
        self._interim = False
        self.between.clear()
        self.framed = False  # the body has a length, or comes in chunks
        self.whole = False
        self.keep = False  # the provider wants to keep the connection
        self.surplus = False  # something came behind the answer
        self.parts = []  # of the body, that the sink has not got
        self.sink: Sink | None = None  # set once there is a head

    def forget(self) -> None:
        """The answer is over: hold nothing of it."""
        self._on_head = self.sink = None

    @property
    def begun(self) -> bool:
        """Whether anything of an answer has come."""
        return self._head_bytes > 0

    def feed(self, data: bytes) -> None:
        """Bytes from the provider: the body goes to `parts`.

        Raises:
            ProviderBadResponse: not HTTP; `surplus`, where the answer was whole before.
            ProviderFault: of *on_head*.
        """
        if self.sink is None:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as exc:
            self.surplus = True
            if not self.whole:  # what follows a whole answer is not ours to judge
                fault = ProviderBadResponse("the provider's answer is not HTTP")
                ours = exc.__context__  # where a callback of ours raised
                raise ours or fault from None
        if not data.endswith(b"\r\n"):
            self.between.clear()  # inside the next chunk's first line, perhaps
        if self._header_bytes > MAX_HEAD_BYTES or (
            self.sink is None and self._head_bytes > MAX_HEAD_BYTES
        ):
            raise _head_too_long()

    # What httptools calls, from feed_data.

    def on_message_begin(self) -> None:
        """A head begins; after a whole answer it is one that nobody asked for."""
        if self.whole:
            self.surplus = True
        else:
            self._headers = {}

    def on_status(self, reason: bytes) -> None:
        """A part of what nobody reads; it counts."""
        self._header_bytes += len(reason)

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header; of repeated ones the last counts. Or a trailer, which nobody reads."""
        if self.whole:
            return
        self._header_bytes += len(name) + len(value) + 4  # ": " and the line's end
        if self.sink is None:
            self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """The head is whole: ask where the body goes."""
        if self.whole:
            return
        if self._header_bytes > MAX_HEAD_BYTES:
            raise _head_too_long()
        status = self._parser.get_status_code()
        self._interim = 100 <= status < 200
        if self._interim:
            if status == 101:
                raise ProviderBadResponse("the provider switched the protocol")
            return
        headers = self._headers
        self.framed = (
            "content-length" in headers
            or "chunked" in headers.get("transfer-encoding", "").lower()
            or status in {204, 304}
        )
        assert self._on_head is not None
        self.sink = self._on_head(status, headers)

    def on_body(self, body: bytes) -> None:
        """A part of the body, the chunks' framing undone."""
        if not self.whole:
            self.parts.append(body)

    def on_message_complete(self) -> None:
        """The answer is whole, unless it was an interim one."""
        if not self._interim and not self.whole:
            self.whole = True
            self.keep = self._parser.should_keep_alive()


def _head_too_long() -> ProviderBadResponse:
    return ProviderBadResponse(f"a head of more than {MAX_HEAD_BYTES} bytes")
