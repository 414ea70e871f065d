"""A passthrough: a request that is passed on as it is, and its answer, which is handed over as it
comes.

    client ──▶ Body ──▶ upload ──▶ provider ──▶ Handover ──▶ face ──▶ client

Nothing of either is stored, and only the usage of an answer is read, if it stands near its
beginning or its end: an upload and an answer may have any size. The place is taken once the first
part of an upload has arrived, or all of it. A part waits in memory until the other side has taken
the part before it, so the slower side sets the pace of both. A client that is too slow is dropped
if a request waits for its place (backpressure.py). There is one attempt, and its faults are those
of any other: an error status has its usual meaning (error_mapping.py).
"""

from __future__ import annotations

import asyncio
import json
import re
from typing import TYPE_CHECKING, Any

import msgspec

from aioserver.protocol.json_body import ANYTHING
from aioserver.protocol.tokens import INPUT, PROMPT, TOTAL
from aioserver.providers.attempt import MAX_ERROR_BYTES, Attempt
from aioserver.providers.backpressure import Backpressure, ClientPace
from aioserver.providers.error_mapping import check_uncompressed, visible_headers
from aioserver.providers.request import Answer, Api, ProviderRequest, WordlessApi
from aioserver.providers.sinks import BodySink

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from aioserver.config import settings
    from aioserver.providers.http1 import RequestWriter, Sink
    from aioserver.providers.request import BodyMaker
    from aioserver.providers.upload import Body
    from aioserver.streams.contracts import Source

# Bytes that were handed over and not taken yet, from which on reading pauses. A read adds 256 KiB
# at most.
PAUSE_BYTES = 1 << 16
# The types of the answers that may report usage.
REPORTING = ("application/json", "text/event-stream")
# Headers of the provider that describe its body. Neither a cookie nor a redirect is among them.
BODY_HEADERS = ("content-type", "content-disposition", "content-range")

# Bytes at each end of an answer that are searched for its usage, and the most members of that name
# that are checked.
SEARCHED, MAX_USAGES = 1 << 14, 16
_USAGE = re.compile(rb'(?<!\\)"usage"[ \t\r\n]*:[ \t\r\n]*(?=\{)')
_JSON = json.JSONDecoder()


class Ends:
    """The beginning and the end of an answer: a JSON object, or events with one each."""

    def __init__(self) -> None:
        self._first = self._last = b""

    def feed(self, data: bytes) -> None:
        """Take the next part of the answer."""
        if (room := SEARCHED - len(self._first)) > 0:
            self._first += data[:room]
        self._last = (self._last + data[-SEARCHED:])[-SEARCHED:]

    def usage(self) -> dict[str, Any] | None:
        """Return the usage of the answer: that on the top level of the object, or of the last
        event that has one. None if there is none in these places.
        """
        usage: dict[str, Any]
        for usage, _, behind in reversed([*_usages(self._last)]):
            if _is_object(b'{"":0' + behind) or _is_object(b'{"":0' + behind.partition(b"\n")[0]):
                return usage
        for usage, before, _ in _usages(self._first):
            if _is_object(before + b"0}"):
                return usage
        return None


def _usages(text: bytes) -> Iterator[tuple[dict[str, Any], bytes, bytes]]:
    """Yield the last objects named `usage` in *text*, each with the text before and behind it."""
    usage: dict[str, Any]
    for match in [*_USAGE.finditer(text)][-MAX_USAGES:]:
        try:
            # Only its numbers and names matter; its other text may be decoded in any way.
            usage, end = _JSON.raw_decode(text[match.end() :].decode("latin-1"))
        except (ValueError, RecursionError):
            continue
        yield usage, text[: match.end()], text[match.end() + end :]


def _is_object(text: bytes) -> bool:
    try:
        ANYTHING.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return False
    return True


class Handover:
    """The answer to a passthrough: the provider puts its parts in, and a face takes them out.

    Always: about PAUSE_BYTES and one read wait in it; *source* is read on once they are taken.
    Nothing comes after `stop`.
    """

    def __init__(self) -> None:
        self.status = 0
        self.headers: Mapping[str, str] = {}
        # The exchange under way.
        self.source: Source | None = None
        # The object from which its usage is read; None if the answer cannot report any.
        self.ends: Ends | None = None
        self._parts: list[bytes] = []
        # A number that grows with each part.
        self.progress = 0
        self._stopped = False
        self._news: asyncio.Future[None] | None = None

    def begin(self, status: int, headers: Mapping[str, str]) -> None:
        """Note the head of a good answer."""
        self.status, self.headers = status, headers
        self._wake()

    def feed(self, data: bytes) -> bool:
        """Hand a part of the body over."""
        self._parts.append(data)
        if self.ends is not None:
            self.ends.feed(data)
        self.progress += len(data)
        if self.source is not None and sum(map(len, self._parts)) > PAUSE_BYTES:
            self.source.pause()
        self._wake()
        return True

    def end(self) -> None:
        """Do nothing: `stop` follows once the attempt has ended, for whatever reason."""

    def broken(self, _fault: Exception) -> bool:
        """Return False: half a body is not complete."""
        return False

    def fast(self) -> None:
        """Return None: every part is handed over."""

    def stop(self) -> None:
        """Note that nothing more comes."""
        self._stopped = True
        self._wake()

    async def begun(self) -> bool:
        """Wait for the head; return False if nothing comes at all. Cancelling is safe."""
        while not self.status and not self._stopped:
            await self._wait()
        return bool(self.status)

    async def take(self) -> bytes:
        """Return the bytes since the last call; empty when nothing more comes.

        Cancelling is safe.
        """
        while not self._parts and not self._stopped:
            await self._wait()
        parts, self._parts = self._parts, []
        if self.source is not None:
            self.source.resume()
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _wait(self) -> None:
        self._news = asyncio.get_running_loop().create_future()
        try:
            await self._news
        finally:
            self._news = None

    def _wake(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)


class ObjectApi(Api):
    """A path that reads or changes the provider's objects, and runs no model."""

    costs = False


# The paths at which a model reads the whole question: their cost is estimated.
READ: Mapping[str, Api] = {
    api.path: api for api in (Api("responses/compact"), WordlessApi("rerank"))
}


def api_of(method: str, path: str) -> Api:
    """Return the API of a request for *path*."""
    if method != "POST":
        return ObjectApi(path)
    return READ.get(path) or Api(path)


class PassedRequest(ProviderRequest):
    """A request that is passed on with its own method, path and body.

    *target* is its path below the provider's base URL, with its query. *upload* is a body that its
    client is still sending; without it *body* makes the body, unless *method* has none. *pace* is
    the client's, in either direction. *body_headers* are those that belong to the body. *further*:
    see `ProviderRequest`.
    """

    def __init__(
        self,
        method: str,
        target: str,
        body: BodyMaker,
        body_headers: Mapping[str, str],
        *,
        upload: Body | None = None,
        pace: ClientPace | None = None,
        **further: Any,
    ) -> None:
        path = target.partition("?")[0]
        super().__init__(api_of(method, path), body, streamed=False, **further)
        self.estimated = path in READ and self.size > 0
        self.method = method
        self.target = target
        self.upload = upload
        self.pace = ClientPace() if pace is None else pace
        self.answer = Handover()
        self._body_headers = body_headers
        self.record.target = f"{method} {path}"

    def written(
        self, writer: RequestWriter, provider: settings.Provider, model: str | None
    ) -> Sequence[bytes]:
        """Return the pieces of the request, up to the body that is uploaded."""
        own = {"Accept": "*/*", "Accept-Encoding": "identity", **self._body_headers}
        body = b""
        if self.method == "POST" and self.upload is None:
            body = self.body(provider, model)
            own["Content-Length"] = str(len(body))
        trace, client_headers = self.record.trace, self.client_headers
        if trace is not None:
            client_headers = trace.sending(client_headers)
        return writer.head(self.api, self.method, self.target, own, client_headers), body


class PassedAttempt(Attempt):
    """The one attempt of a request that is passed on."""

    def __post_init__(self) -> None:
        """Take the body that the client is still sending, if there is one."""
        self.body = self._passed.upload
        # This one always lets the exchange pause: an answer of any size must not be read ahead of
        # its client.
        self.backpressure = Backpressure(lambda: 0)

    @property
    def _passed(self) -> PassedRequest:
        request = self.request
        assert isinstance(request, PassedRequest), "the face makes it"
        return request

    @property
    def asked_model(self) -> str:
        """The model that the request names; empty if the request was not read."""
        return self.model or ""

    @property
    def says_little(self) -> bool:
        """Whether the provider has answered with a fault: it may lack the path, or our key the
        permission.
        """
        return self.status >= 300

    def written(self, writer: RequestWriter) -> Sequence[bytes]:
        """Return the pieces to send, up to the body that is uploaded."""
        return self._passed.written(writer, self.provider.settings, self.model)

    def sending(self, exchange: Source | None = None) -> None:
        """Let the face pause *exchange*, which brings the answer."""
        self._passed.answer.source = exchange
        self.provider.backpressure.watch(self._passed.pace)

    def received(self) -> None:
        """Note that nothing more comes by the exchange."""
        self._passed.answer.source = None
        self.provider.backpressure.unwatch(self._passed.pace)

    def head_received(self, status: int, headers: Mapping[str, str]) -> Sink:
        """Return the sink for the body; that of a success is handed over.

        Raises:
            ProviderBadResponse: the body is compressed.
        """
        self.status, self.headers = status, headers
        self.request.outcome.headers = visible = visible_headers(headers)
        if visible:
            # They include the headers that report the remaining requests and tokens.
            self.provider.head_received(self)
        check_uncompressed(headers)
        if 200 <= status < 300:
            # However long its body is, the provider is well, and does not get the request a second
            # time.
            self.first_event()
            self._passed.let_body_go()
            if self.request.api.costs and headers.get("content-type", "").startswith(REPORTING):
                self._passed.answer.ends = Ends()
            self._passed.answer.begin(status, headers)
            self.sink = self._passed.answer
        else:
            self.sink = BodySink(MAX_ERROR_BYTES)
        return self.sink

    def conclude(self) -> None:
        """Check the status.

        Raises:
            ProviderFault: the status is not that of a success.
        """
        if isinstance(self.sink, BodySink):
            check = self.request.api.check_status
            check(self.provider.name, self.status, self.headers, self.sink.body)
        if (ends := self._passed.answer.ends) is not None and (usage := ends.usage()) is not None:
            if TOTAL in usage and PROMPT not in usage and INPUT not in usage:
                # Some rerankers report only a total, since they write nothing.
                usage[PROMPT] = usage[TOTAL]
            self.request.outcome.usage = self.request.api.usage({"usage": usage})
        content_type = self.headers.get("content-type", "")
        self.answer = Answer(self.status, b"", content_type, self.request.outcome)


def shown_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Return those of the *headers* of a provider's success that the client gets, all of printable
    ASCII.
    """
    shown = {
        name: value
        for name in BODY_HEADERS
        if (value := headers.get(name, "")).isascii() and value.isprintable() and value
    }
    return {**visible_headers(headers), **shown}


def body_length(headers: Mapping[str, str]) -> int | None:
    """Return the length of the body that follows a head with *headers*.

    None if the body ends in another way.
    """
    length = headers.get("content-length", "")
    if "transfer-encoding" in headers or not (length.isascii() and length.isdigit()):
        return None
    return int(length)
