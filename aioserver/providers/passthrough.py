"""A request that is passed on as it is, and its answer, which is handed on as it comes.

    client ──▶ Body ──▶ upload ──▶ provider ──▶ Handover ──▶ face ──▶ client

Nothing of either is kept, and of an answer only its usage is read, where that stands near its
beginning or its end: an upload and an answer may have any size. The place is taken
once the first part of an upload is there, or all of it. A part waits in memory until the other
side has taken the part before it, so that the slower side sets the pace of both, except that a
client which is too slow is given up where a request waits for its place (backpressure.py). There
is one attempt, and its faults are those of any other: a status that is no success means what it
means elsewhere (error_mapping.py).
"""

from __future__ import annotations

import asyncio
import json
import re
from typing import TYPE_CHECKING, Any

import msgspec

from aioserver.protocol.json_body import ANYTHING
from aioserver.protocol.tokens import INPUT, PROMPT, TOTAL
from aioserver.providers.api import Api, WordlessApi
from aioserver.providers.attempt import MAX_ERROR_BYTES, Attempt
from aioserver.providers.backpressure import Backpressure, ClientPace
from aioserver.providers.error_mapping import check_uncompressed, visible_headers
from aioserver.providers.request import Answer, ProviderRequest
from aioserver.providers.sinks import BodySink

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from aioserver.config import settings
    from aioserver.providers.http1 import RequestWriter, Sink
    from aioserver.providers.request import BodyMaker
    from aioserver.providers.upload import Body
    from aioserver.streams.contracts import Source

# Bytes that are handed on and not taken yet, from which on nothing more is read. A read adds 256
# KiB at most.
PAUSE_BYTES = 1 << 16
# The types of the answers that may report what they have cost.
REPORTING = ("application/json", "text/event-stream")
# Headers of the provider that say what its body is. Neither a cookie nor a redirect is among them.
BODY_HEADERS = ("content-type", "content-disposition", "content-range")

# Bytes at each end of an answer in which its usage is looked for, and the members of that name that
# are looked at.
SEARCHED, MAX_USAGES = 1 << 14, 16
_USAGE = re.compile(rb'(?<!\\)"usage"[ \t\r\n]*:[ \t\r\n]*(?=\{)')
_JSON = json.JSONDecoder()


class Ends:
    """The beginning and the end of an answer: an object in JSON, or events with one each."""

    def __init__(self) -> None:
        self._first = self._last = b""

    def feed(self, data: bytes) -> None:
        """Take the next part of the answer."""
        if (room := SEARCHED - len(self._first)) > 0:
            self._first += data[:room]
        self._last = (self._last + data[-SEARCHED:])[-SEARCHED:]

    def usage(self) -> dict[str, Any] | None:
        """Return the usage of the answer: that on the top level of the object, or of the last event
        that has one. None if it reports none, or elsewhere.
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
    """Yield the last objects named `usage` in *text*, each with what stands before and behind."""
    usage: dict[str, Any]
    for match in [*_USAGE.finditer(text)][-MAX_USAGES:]:
        try:
            # It has numbers and names; what else it has may be read as it likes.
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
    """The answer to a request that is passed on: the provider puts its parts in, and a face takes
    them out.

    Always: about PAUSE_BYTES and one read wait in it; *source* is read on once they are taken.
    Nothing comes after `stop`.
    """

    def __init__(self) -> None:
        self.status = 0
        self.headers: Mapping[str, str] = {}
        # The exchange under way.
        self.source: Source | None = None
        # What its usage is read from; None if it is none that could report any.
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
        """Return False: half a body is none."""
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
        """Return what has come since the last call; empty when nothing more comes.

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
    """A path where something is asked of what the provider has, and no model runs."""

    costs = False


# The paths where a model reads the whole of a question: what it costs is estimated.
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
    client is still sending; without it the body is what *body* makes, unless *method* has none.
    *pace* is the client's, in either direction.
    *body_headers* are those that go with it. *further*: see `ProviderRequest`.
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
    ) -> bytes:
        """Return the bytes of the request, up to the body that is uploaded."""
        own = {"Accept": "*/*", "Accept-Encoding": "identity", **self._body_headers}
        body = b""
        if self.method == "POST" and self.upload is None:
            body = self.body(provider, model)
            own["Content-Length"] = str(len(body))
        trace, client_headers = self.record.trace, self.client_headers
        if trace is not None:
            client_headers = trace.sending(client_headers)
        return writer.head(self.api, self.method, self.target, own, client_headers) + body


class PassedAttempt(Attempt):
    """The one attempt of a request that is passed on."""

    def __init__(self, *names: Any, **further: Any) -> None:
        super().__init__(*names, **further)
        request = self.request
        assert isinstance(request, PassedRequest)
        self._passed = request
        # The client is still sending it, if it is there.
        self.body = request.upload
        # It always lets the exchange pause: an answer of any size must not be read ahead of its
        # client.
        self.backpressure = Backpressure(lambda: 0)

    @property
    def asked_model(self) -> str:
        """The model that is asked for; empty where nobody has read which one that is."""
        return self.model or ""

    @property
    def says_little(self) -> bool:
        """Whether the provider has answered with a fault: it may not have this path, or our key
        not the right to it.
        """
        return self.status >= 300

    def written(self, writer: RequestWriter) -> bytes:
        """Return the bytes to send, up to the body that is uploaded."""
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
        """Return the sink for the body: that of a success is handed over.

        Raises:
            ProviderBadResponse: the body is compressed.
        """
        self.status, self.headers = status, headers
        self.request.outcome.headers = visible = visible_headers(headers)
        if visible:
            # The headers of what is left of its limits are among them.
            self.provider.head_received(self)
        check_uncompressed(headers)
        if 200 <= status < 300:
            # However long its body is, the provider is well, and gets the request no second time.
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
            ProviderFault: the status is none of a success.
        """
        if isinstance(self.sink, BodySink):
            check = self.request.api.check_status
            check(self.provider.name, self.status, self.headers, self.sink.body)
        if (ends := self._passed.answer.ends) is not None and (usage := ends.usage()) is not None:
            if TOTAL in usage and PROMPT not in usage and INPUT not in usage:
                # As some rerankers have it, which write nothing.
                usage[PROMPT] = usage[TOTAL]
            self.request.outcome.usage = self.request.api.usage({"usage": usage})
        content_type = self.headers.get("content-type", "")
        self.answer = Answer(self.status, b"", content_type, self.request.outcome)


def shown_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Return those of the *headers* of a provider's success that go on to the client, all of
    printable ASCII.
    """
    shown = {
        name: value
        for name in BODY_HEADERS
        if (value := headers.get(name, "")).isascii() and value.isprintable() and value
    }
    return {**visible_headers(headers), **shown}


def body_length(headers: Mapping[str, str]) -> int | None:
    """Return the length of the body that follows a head with *headers*.

    None if it ends otherwise.
    """
    length = headers.get("content-length", "")
    if "transfer-encoding" in headers or not (length.isascii() and length.isdigit()):
        return None
    return int(length)
