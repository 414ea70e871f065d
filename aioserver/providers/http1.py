"""HTTP/1.1 with a provider (RFC 9112): requests as bytes, and the parsing of answers.

httptools (llhttp) parses, and the `ResponseParser` stores what httptools reports. It lives as long
as its connection. A parser for each answer would cost as much as the parsing, and leave a
reference cycle behind; the garbage collector would then take a seventh of a request's time.

This file is one concept: the form of a request and of its answer, byte for byte.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Protocol

import httptools
from yarl import URL

from aioserver import __version__
from aioserver.protocol.request_headers import HOP, NO_HEADERS, TRACE_HEADERS
from aioserver.provider_errors import ProviderBadResponse
from aioserver.streams.contracts import Path
from aioserver.telemetry.tracer import WatchedSink

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from aioserver.config import settings
    from aioserver.protocol.request_headers import ClientHeaders
    from aioserver.providers.request import Api

CODINGS = "transfer-encoding"
# Headers that frame a body, and the one against loops; a configured header of one of these names
# is never sent.
FRAMING_HEADERS = frozenset({"connection", "content-length", CODINGS, HOP})
# With a body that is passed on, neither are these: the body is the client's, and so is its type.
BODY_HEADERS = FRAMING_HEADERS | {"content-type", "content-encoding"}
# The most bytes of an answer's head, with the interim answers before it; and of its trailers.
MAX_HEAD_BYTES = 65_536


# Bytes of a body that are copied behind its head: one write costs less than two.
COPIED_BYTES = 1 << 15


class RequestWriter:
    """Writes the requests to the API at *base_url*.

    *absolute* says that the requests go to a plain HTTP proxy: the target is then an absolute URL
    (RFC 9112, 3.2.2), and the proxy gets *proxy_headers*. *hop* is the id of this server in the
    header that detects loops; None: the header is not sent.

    Always: two requests for one path differ only in their body, its length, and the headers of
    their client, which stand behind that length, so that the head of each path is made once. A
    header in the settings is never replaced by the client's.
    """

    def __init__(
        self,
        settings: settings.Provider,
        base_url: str,
        *,
        absolute: bool,
        proxy_headers: Mapping[str, str],
        hop: str = "",
    ) -> None:
        self._own = {HOP: hop} if hop else {}
        self._settings = settings
        self._base = URL(base_url)
        self._absolute = absolute
        self._proxy_headers = proxy_headers
        self._heads: dict[str, bytes] = {}
        # Sent unless the client's own is passed on.
        self._user_agent = f"User-Agent: aioserver/{__version__}\r\n".encode()
        if "user-agent" in {name.lower() for name in (*settings.headers, *proxy_headers)}:
            self._user_agent = b""
        self.apply(settings)

    def apply(self, settings: settings.Provider) -> None:
        """Pass on the headers of clients that *settings* name.

        The other headers stay as they are.
        """
        configured = {name.lower() for name in self._settings.headers}
        self._configured = configured
        self._passed = TRACE_HEADERS.union(settings.pass_headers) - configured | {HOP}

    def write(
        self, api: Api, path: str, body: bytes, client_headers: ClientHeaders = NO_HEADERS
    ) -> Sequence[bytes]:
        """Return the pieces of a POST of *body* (JSON) to *path*, that of *api*, which may have a
        query. A large body is a piece of its own, and not copied.
        """
        head = self._heads.get(path)
        if head is None:
            head = self._heads[path] = self._head(api, path)
        passed = self._user_agent
        if client_headers is not NO_HEADERS:
            passed = client_headers.written(self._passed, self._configured)
            if b"user-agent: " not in passed:
                passed += self._user_agent
        if api.headers:
            passed += self._missing(api.headers, passed)
        if len(body) > COPIED_BYTES:
            return b"%b%d\r\n%b\r\n" % (head, len(body), passed), body
        return (b"%b%d\r\n%b\r\n%b" % (head, len(body), passed, body),)

    def head(
        self,
        api: Api,
        method: str,
        target: str,
        own: Mapping[str, str],
        client_headers: ClientHeaders,
    ) -> bytes:
        """Return the head of a request that is passed on.

        *target* is its path below the base URL, with its query. *own* are the headers of its body,
        and those that replace the writer's.
        """
        path, question_mark, query = target.partition("?")
        passed = client_headers.written(self._passed)
        if b"user-agent: " not in passed:
            passed += self._user_agent
        begun = self._begin(api, method, path, question_mark + query, own, BODY_HEADERS)
        return b"%b\r\n%b\r\n" % (begun, passed)

    def _missing(self, headers: Mapping[str, str], passed: bytes) -> bytes:
        """Return the lines of those *headers* that neither the settings add nor *passed*, the
        client's lines, contains.
        """
        # No value has a line end, so no value can be mistaken for a name.
        lines = b"\r\n" + passed
        return b"".join(
            f"{name}: {value}\r\n".encode()
            for name, value in headers.items()
            if name not in self._configured and f"\r\n{name}: ".encode() not in lines
        )

    def _head(self, api: Api, path: str) -> bytes:
        """Return the head of every POST to *path*, up to the number after Content-Length."""
        path, question_mark, query = path.partition("?")
        own = {
            "Accept": "application/json, text/event-stream",
            "Accept-Encoding": "identity",
            "Content-Type": "application/json",
        }
        begun = self._begin(api, "POST", path, question_mark + query, own, FRAMING_HEADERS)
        return begun + b"\r\nContent-Length: "

    def _begin(
        self,
        api: Api,
        method: str,
        path: str,
        query: str,
        own: Mapping[str, str],
        never: Collection[str],
    ) -> bytes:
        """Return the first lines of a head, without the end of the last one.

        Configured headers replace those in *own*, but a header that *never* names in lower case is
        not sent.
        """
        url = self._base.with_path(f"{self._base.path.rstrip('/')}/{path}")
        headers = {"Host": url.authority.rpartition("@")[2], **own, **self._own}
        if self._settings.api_key is not None:
            headers |= api.key_headers(url.host or "", self._settings.api_key.reveal())
        configured = {
            name: value
            for name, value in {**self._settings.headers, **self._proxy_headers}.items()
            if name.lower() not in never
        }
        replaced = {name.lower() for name in configured}
        headers = {name: value for name, value in headers.items() if name.lower() not in replaced}
        headers |= configured
        target = str(url) if self._absolute else url.raw_path_qs
        lines = [
            f"{method} {target}{query} HTTP/1.1",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        return "\r\n".join(lines).encode("latin-1")


class Sink(WatchedSink[Path], Protocol):
    """The destination of an answer's body.

    Called from `data_received`. An `AioserverError` that it raises ends the exchange with this
    error. The next chunk may bypass it by its fast path.
    """


class ResponseParser:
    """Parses the answers on one connection, one after the other.

    Call `begin` before each answer, then `feed` until it is `whole`, and drop the `sink` then.
    After an answer that did not end well the connection is closed, and its parser is not used
    again.

    Always: `parts` has the body's bytes since it was last cleared; bytes after a whole answer are
    not added. `between_chunks` is empty unless the parser is between two chunks.
    """

    __slots__ = (
        "_head_bytes",
        "_headers",
        "_interim",
        "_on_head",
        "_parser",
        "_trailer_bytes",
        "between_chunks",
        "on_body",
        "on_chunk_complete",
        "on_chunk_header",
        "parts",
        "reusable",
        "sink",
        "status",
        "whole",
    )

    def __init__(self) -> None:
        # Not empty while the parser is between two chunks. C functions fill and clear it, since
        # httptools calls them for every chunk; its parser looks them up when it is made.
        self.between_chunks: list[bool] = []
        self.on_chunk_header = self.between_chunks.clear
        self.on_chunk_complete = functools.partial(self.between_chunks.append, True)
        # The parts of the body that the sink has not received yet, filled in the same way.
        self.parts: list[bytes] = []
        self.on_body = self.parts.append
        self._parser = httptools.HttpResponseParser(self)
        self._on_head: Callable[[int, Mapping[str, str]], Sink] | None = None
        self._headers: dict[str, str] = {}
        self._interim = False
        # The status of the newest answer whose head is complete.
        self.status = 0
        # Set once the head is complete.
        self.sink: Sink | None = None

    def begin(self, on_head: Callable[[int, Mapping[str, str]], Sink]) -> None:
        """Expect another answer.

        Once its head is complete, *on_head* returns the sink of its body.
        """
        self._on_head = on_head
        # Bytes that came before the head was complete; some of them may belong to the body.
        self._head_bytes = self._trailer_bytes = 0
        self.between_chunks.clear()
        # Whether the answer is complete; and whether the connection can be reused: nothing came
        # after the answer, and the provider keeps the connection open.
        self.whole = self.reusable = False

    def close(self) -> None:
        """Ignore all further callbacks, since the connection is lost.

        Otherwise this object and its parser in C, which calls it, would be in a reference cycle.
        """
        self._parser = httptools.HttpResponseParser(None)

    @property
    def begun(self) -> bool:
        """Whether any byte of an answer has come."""
        return self._head_bytes > 0

    @property
    def framed(self) -> bool:
        """Whether the body, whose head is complete, has a length, or comes in chunks."""
        headers = self._headers
        chunked = _coding(headers) == "chunked"
        return "content-length" in headers or chunked or self.status in {204, 304}

    def feed(self, data: bytes) -> None:
        """Parse bytes from the provider; those of the body go to `parts`.

        Bytes after a whole answer only clear `reusable`.

        Raises:
            ProviderBadResponse: the answer is not HTTP, or its head is too long.
            ProviderFault: raised by *on_head*.
        """
        if self.sink is None:
            size = self._head_bytes + len(data)
            if size > MAX_HEAD_BYTES:
                data = self._end_head(data)
            self._head_bytes = size
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as exc:
            self.reusable = False
            # Bytes that follow a whole answer do not make its request fail.
            if not self.whole:
                if self._interim:
                    self._check_interim()
                fault = ProviderBadResponse("the provider's answer is not HTTP")
                # Set if one of the callbacks below has raised.
                callback_error = exc.__context__
                raise callback_error or fault from None
        if self.sink is None:
            if self._interim:
                self._check_interim()
        elif self.between_chunks and not data.endswith(b"\r\n"):
            # The parser may be inside the next chunk's first line.
            self.between_chunks.clear()

    def _end_head(self, data: bytes) -> bytes:
        """Parse as much of *data* as a head may have, and return the rest.

        Raises:
            ProviderFault: the head is longer than that; or as `feed`.
        """
        room = MAX_HEAD_BYTES - self._head_bytes
        self.feed(data[:room])
        if self.sink is None:
            raise _head_too_long()
        return data[room:]

    def on_message_begin(self) -> None:
        """Begin a head (httptools calls this and the following methods from `feed_data`).

        Raises:
            ProviderBadResponse: it follows a whole answer, and was not asked for.
        """
        if self.whole:
            raise ProviderBadResponse("the provider sent another answer")
        self._headers, self._interim = {}, False

    def on_header(self, name: bytes, value: bytes) -> None:
        """Store a header: the last of those with one name, but all transfer codings.

        A trailer is counted, but not read.
        """
        if self.sink is not None:
            # The 4 bytes are ": " and the line's end.
            self._trailer_bytes += len(name) + len(value) + 4
            if self._trailer_bytes > MAX_HEAD_BYTES:
                raise _head_too_long()
            return
        key, text = name.decode("latin-1").lower(), value.decode("latin-1")
        if key == CODINGS and key in self._headers:
            text = f"{self._headers[key]}, {text}"
        self._headers[key] = text

    def on_headers_complete(self) -> None:
        """Get the sink for the body, since the head is complete."""
        status, headers = self._parser.get_status_code(), self._headers
        if status < 200 and status >= 100:
            if status == 101:
                raise ProviderBadResponse("the provider switched the protocol")
            self._interim = True
            return
        if CODINGS in headers and _coding(headers) not in {"", "chunked", "identity"}:
            # llhttp removes the last coding, and no request of ours has a `TE` that allows others.
            raise ProviderBadResponse(
                "the provider's answer has a transfer coding other than chunked"
            )
        self.status = status
        on_head, self._on_head = self._on_head, None
        assert on_head is not None
        self.sink = on_head(status, headers)

    def _check_interim(self) -> None:
        """Refuse an interim answer with a body: it has none (RFC 9112, 6.3), but llhttp reads one
        if it does not know the status.
        """
        if self.parts:
            raise ProviderBadResponse("the provider's interim answer has a body")

    def on_message_complete(self) -> None:
        """Note that the answer is whole, unless it was an interim one."""
        if self._interim:
            self._check_interim()
        else:
            self.whole, self.reusable = True, self._parser.should_keep_alive()


def _coding(headers: Mapping[str, str]) -> str:
    """Return the transfer codings of a body, in lower case; "" if it has none."""
    return headers.get(CODINGS, "").strip().lower()


def _head_too_long() -> ProviderBadResponse:
    return ProviderBadResponse(f"a head of more than {MAX_HEAD_BYTES} bytes")
