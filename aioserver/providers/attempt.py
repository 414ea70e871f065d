"""One try of one request at one provider, and where each part of the answer goes.

    queued ──▶ started ──▶ sending ──▶ head ──▶ (its sink fills the log) ──▶ conclude
       └───────────┴───────────┴─────────┴──▶ a ProviderFault, or cancelled

Both loops around it see the same object: the router, which makes one for each try, and the provider,
which runs it. What a request is, whoever is asked, is a `ProviderRequest` (request.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from aioserver.protocol.openai import BadEvent, ErrorEvent, usage_of
from aioserver.provider_errors import ProviderBadResponse, ProviderFault
from aioserver.providers.error_mapping import (
    check_json,
    check_plain,
    event_fault,
    is_of,
    judge,
    passing,
)
from aioserver.providers.request import Answer
from aioserver.providers.sinks import BodySink, ChatSink, EventSink, complete
from aioserver.streams import entries

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aioserver.config import settings
    from aioserver.providers.http1 import Sink
    from aioserver.providers.request import ProviderRequest
    from aioserver.streams.stream import Stream
    from aioserver.telemetry.metrics import ProviderMeter

MAX_ERROR_BYTES = 1 << 20  # of the body of an answer with another status than 200


class AttemptedProvider(Protocol):
    """The provider, as its attempts see it."""

    name: str
    meter: ProviderMeter
    settings: settings.Provider
    max_response_bytes: int

    def heard(self, attempt: Attempt) -> None:
        """Learn from the head of an answer: its status and headers are known now."""


class Attempt:
    """One try of *request* at *provider*; run once, by `Provider.answer`.

    *stream* is the log to fill; None where nobody keeps the answer. *model* None stands for the
    provider's own. *waited* is in seconds: what earlier tries of this request have waited in the
    queue of this provider. A *retry* goes to the front of its caller's requests there. *fallback*
    says that another provider can be asked instead.

    Afterwards *answer* has a whole answer, and *usage*, *events* and *fault* what is known of how it
    ended: *fault* is an answer that broke off behind its first event, which is no exception, since
    the client has been shown it.
    """

    __slots__ = (
        "answer",
        "events",
        "expected_tokens",
        "fallback",
        "fault",
        "headers",
        "model",
        "pool",
        "provider",
        "request",
        "retry",
        "sink",
        "status",
        "stream",
        "trial",
        "usage",
        "waited",
    )

    def __init__(
        self,
        provider: AttemptedProvider,
        request: ProviderRequest,
        stream: Stream | None,
        *,
        model: str | None = None,
        waited: float = 0.0,
        retry: bool = False,
        fallback: bool = False,
    ) -> None:
        self.provider = provider
        self.request = request
        self.stream = stream
        self.model = model
        self.waited = waited
        self.retry = retry
        self.fallback = fallback
        self.trial = False  # of the breaker
        self.pool: object = None  # that the request went through
        self.expected_tokens = 0  # that the pace was charged with
        self.status = 0
        self.headers: Mapping[str, str] = {}
        self.sink: Sink | None = None
        self.answer: Answer | None = None
        self.usage: Mapping[str, Any] | None = None
        self.events = 0
        self.fault: ProviderFault | None = None

    def queued(self, position: int, eta: float) -> None:
        """Tell the readers where the request stands in the queue, and its seconds to the start."""
        if self.stream is not None:
            self.stream.report_position(position, eta)

    def started(self) -> None:
        """Note that a place is taken."""
        stream, provider = self.stream, self.provider
        if stream is not None and not self.request.whole:
            stream.meter = provider.meter
            stream.append_processing(provider.name, self.model or provider.settings.model)

    def sending(self) -> None:
        """Note that the request goes out: from here on the model may run, and cost money."""
        if self.stream is not None:
            self.stream.sent = True

    def head(self, status: int, headers: Mapping[str, str]) -> Sink:
        """Return the sink for the body behind this head.

        Raises:
            ProviderBadResponse: the body is compressed.
        """
        self.status, self.headers = status, headers
        self.provider.heard(self)
        request, stream = self.request, self.stream
        good = status == 200
        if stream is not None and not request.whole:
            stream.details.headers = passing(headers)
        sink: Sink
        if good and request.streamed and is_of(headers, "text/event-stream"):
            assert stream is not None, "a streamed answer has a log"
            if request.reading is not None:
                sink = ChatSink(stream, request.reading)
            else:
                sink = EventSink(stream, responses=request.path.endswith("responses"))
        else:
            sink = BodySink(self.provider.max_response_bytes if good else MAX_ERROR_BYTES)
        self.sink = sink
        check_plain(headers)
        return sink

    def conclude(self) -> None:
        """Judge the answer, whose last byte is here; a body that was not streamed gets its meaning.

        Raises:
            ProviderFault: the status, or the body, is that of no good answer.
        """
        request, stream, sink = self.request, self.stream, self.sink
        if not isinstance(sink, BodySink):
            assert stream is not None
            self.usage, self.events = stream.details.usage, stream.last
            self.fault = stream.error if isinstance(stream.error, ProviderFault) else None
            return
        body, headers = sink.body, self.headers
        judge(self.provider.name, self.status, headers, body)
        if request.streamed:
            raise ProviderBadResponse("the provider's answer is no event stream")
        content = check_json(headers, body)
        reading = request.reading
        if reading is None:
            self.usage = usage_of(content)
            self.answer = Answer(
                self.status,
                passing(headers),
                body,
                headers.get("content-type", ""),
                self.provider.name,
                self.usage,
            )
            return
        assert stream is not None, "an answer that is read has a log"
        try:
            chunks = reading.read(body)
        except (BadEvent, ErrorEvent) as exc:
            raise event_fault(exc) from exc
        stream.mark_answered()
        if chunks:
            stream.append(entries.CHUNK, chunks)
        complete(stream, reading)
        self.usage, self.events = reading.usage, stream.last
