"""One try of one request at one provider, and the destination of each part of its answer.

    queued ──▶ started ──▶ sending ──▶ head_received ──▶ (the sink fills the log) ──▶ conclude
       └───────────┴───────────┴─────────────┴──▶ a ProviderFault, or cancelled

Between started and sending come `preparation`, which may take long, and `written`. Other kinds of
attempts replace some of these steps: for a request that is passed on (passthrough.py), or for a
wing's API. `repeats` sends the request once more in another form.

The router's loop over retries and the provider's loop over dead connections share this object: the
router makes an attempt for each try, and the provider runs it. A `ProviderRequest` (request.py) is
the question, independent of the provider that answers.

This file is one concept: the steps of an attempt, each of which another kind may replace.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

import msgspec

from aioserver.errors import LoopDetected
from aioserver.limits.deadline import Wait
from aioserver.limits.estimate import UNKNOWN_WORK
from aioserver.protocol.openai import BadEvent, ErrorEvent
from aioserver.protocol.parts import Choices
from aioserver.protocol.request_headers import PREAMBLE
from aioserver.protocol.transcript import ReadTranscript
from aioserver.provider_errors import ProviderBadResponse, ProviderFault
from aioserver.providers.backpressure import Backpressure
from aioserver.providers.error_mapping import (
    check_json,
    check_uncompressed,
    event_fault,
    matches_type,
    visible_headers,
)
from aioserver.providers.holding import Holding
from aioserver.providers.http1 import Sink
from aioserver.providers.reading_sinks import ChatSink, complete_chat
from aioserver.providers.request import Answer, ProviderRequest
from aioserver.providers.sinks import BodySink, EventSink, StreamSink
from aioserver.providers.upload import Body
from aioserver.streams import entries
from aioserver.streams.stream import Stream
from aioserver.telemetry.outcome import NO_HEADERS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence

    from aioserver.auth.callers import Caller
    from aioserver.config import settings
    from aioserver.limits.estimate import Estimate
    from aioserver.limits.resource import Resource
    from aioserver.limits.scheduler import Scheduler
    from aioserver.protocol.parts import Parts
    from aioserver.protocol.transcript import Tokens, Transcript
    from aioserver.providers.capacity import Capacity
    from aioserver.providers.http1 import RequestWriter
    from aioserver.providers.request import Api, Capabilities
    from aioserver.streams.contracts import Source
    from aioserver.telemetry.metrics import ProviderMeter

# The most bytes of the body of an answer with another status than 200.
MAX_ERROR_BYTES = 1 << 20
# Bytes of a body that are searched for pictures: a search takes some 50 µs.
MAX_SEARCHED = 1 << 18

M = TypeVar("M", bound="Capabilities")


class Estimating(Protocol):
    """The estimator of request costs at one provider (costs.py)."""

    def estimate(self, request: ProviderRequest, model: str) -> Estimate:
        """Return the estimated cost of *request*, and store it in the request."""

    def tokens_per_byte(self, model: str, caller: Caller | None = None) -> float:
        """Return the estimated tokens of a prompt for each byte of a request of *caller* for
        *model*.
        """


class AttemptedProvider(Protocol):
    """The provider, as its attempts see it: provider.py imports attempts, not the reverse."""

    name: str
    meter: ProviderMeter
    settings: settings.Provider
    max_response_bytes: int
    backpressure: Backpressure
    scheduler: Scheduler
    capacity: Capacity

    @property
    def costs(self) -> Estimating:
        """The estimator of costs there."""

    def head_received(self, attempt: Attempt) -> None:
        """Learn from the head of an answer; *attempt* has its status and headers."""

    def answered(self, attempt: Attempt) -> None:
        """Learn that the answer of *attempt* has begun."""

    def capabilities(self, kind: type[M]) -> M:
        """Return the capabilities that an API has learned about this provider."""


class Hop(Protocol):
    """The part of an attempt that continues a broken answer (gateway/continuation.py)."""

    earlier: Tokens
    # The number of text events that have come.
    heard: int

    async def body(self, body: bytes) -> bytes:
        """Return the request in *body*, changed into one for the rest."""

    def show(self, attempt: Attempt) -> None:
        """Note that some of the rest is about to be shown."""

    def sink(self, attempt: Attempt, sink: StreamSink) -> Sink:
        """Return the sink of *attempt*, which passes the rest on to *sink*."""


class Attempt(msgspec.Struct, eq=False):
    """One try of *request* at *provider*, which `Provider.run` runs once.

    Always: at most one of `answer` and `fault` is set, and neither before `conclude`. `answered`
    is set by the first content of the answer, or by the end of one that has none.

    *stream* is the log to fill; None if no log keeps the answer. *model* None: the provider's own.
    *fallback* says that another provider can be asked instead. *again* says that its request was
    sent before: it goes in front of its caller's other requests.

    After the end, `answer` has an answer that was not streamed and is passed on unread. `fault`
    says why an answer broke off after its first content. It is not raised, since the client has
    seen the beginning.
    """

    provider: AttemptedProvider
    request: ProviderRequest
    stream: Stream | None
    model: str | None = None
    fallback: bool = False
    again: bool = False
    # Whether this is a trial of a sick or dead provider, whose result the breaker does not know
    # yet; and whether it has its place, since when.
    trial: bool = False
    runs: bool = False
    began: float = 0.0
    # The tokens that the pace was charged with.
    expected_tokens: int = 0
    # Set if the attempt continues a broken answer; and the body of its request, between its
    # preparation and its sending.
    hop: Hop | None = None
    prepared: bytes | None = None
    # The body behind what `written` returns; None if `written` returns it all.
    body: Body | None = None
    # The backpressure that decides whether the exchange may pause; None for that of the provider.
    backpressure: Backpressure | None = None
    answered: bool = False
    # The pool that the request went through.
    pool: object = None
    status: int = 0
    sink: Sink | None = None
    # The splitter of the sink that holds events, if any are to be held.
    holding: Holding | None = None
    answer: Answer | None = None
    fault: ProviderFault | None = None
    headers: Mapping[str, str] = NO_HEADERS
    # The bytes of the body that was sent, the same number if they are text, and the events that
    # the log had before.
    body_bytes: int = 0
    text_bytes: int = 0
    before: int = 0

    @property
    def came(self) -> float:
        """The time at which its request first asked for a place."""
        record = self.request.record
        return record.queued_at or record.admitted_at

    def work(self) -> int:
        """Return its estimated cost for its caller's share of the provider."""
        if self.request.estimated:
            return self.provider.costs.estimate(self.request, self.asked_model).work
        return UNKNOWN_WORK

    def queued(self, resource: Resource, position: int, eta: float) -> None:
        """Tell the readers the position in the queue of *resource*, and the seconds until the
        start.
        """
        if (bound := self.request.bound) is not None:
            bound.queued(resource.name, position, eta)
        if self.stream is not None and not self.request.whole:
            self.stream.report_position(position, eta)

    def started(self) -> None:
        """Note that a place is taken."""
        if (bound := self.request.bound) is not None:
            bound.wait = Wait(f"a connection to {self.provider.name}")
        stream, provider = self.stream, self.provider
        if stream is not None:
            stream.attempt, stream.queued = self, None
            if not self.request.whole:
                stream.meter = provider.meter
                stream.append_processing()
            self.before = stream.last

    @property
    def asked_model(self) -> str:
        """The model that is asked for."""
        return self.model or self.provider.settings.model

    def goes_on(self, transcript: Transcript) -> bool:  # noqa: ARG002 - in every API but one
        """Return whether it can continue the *transcript* of another attempt."""
        return self.request.api.speaks(self.provider.settings)

    def form_of_rest(self) -> str:
        """Return the form in which it asks for the rest of another attempt's answer."""
        return self.provider.settings.continuation

    @property
    def place(self) -> str:
        """The name of the provider where it has a place."""
        return self.provider.name

    @property
    def waiting(self) -> int:
        """The number of requests that wait there for a place that others hold."""
        return self.provider.capacity.held_up

    @property
    def unread(self) -> bool:
        """Whether it goes on, after earlier attempts or a wait, with an answer that has no reader."""
        stream = self.stream
        if stream is None or stream.readers or stream.background:
            return False
        return stream.sent or self.again

    @property
    def background(self) -> bool:
        """Whether it uses a background place: its answer runs in the background."""
        return self.request.background

    @property
    def streamed(self) -> bool:
        """Whether the answer is requested as a stream of events."""
        return self.request.streamed

    def ended(self) -> None:
        """Note that the place, if there was one, was given back."""
        if self.stream is not None:
            self.stream.attempt = self.stream.queued = None

    def received_content(self) -> None:
        """Note content of the answer, which may be held: the provider has answered."""
        if not self.answered:
            self.answered = True
            self.provider.answered(self)

    def first_event(self) -> None:
        """Note the first content of the answer that is shown: no other provider is asked."""
        self.received_content()
        if self.stream is None:
            # The answer is whole, and its request is over at once.
            return
        if self.stream.transcript is None:
            self.request.let_body_go()
        else:
            self.request.forget_body()

    @property
    def says_little(self) -> bool:
        """Whether a fault of it says nothing about the provider as a whole, neither about its
        health nor about our key. A client that names servers which its request came through may
        have made the circle itself.
        """
        return self.status == LoopDetected.status and self.request.client_headers.hops

    def preparation(self) -> Awaitable[None] | None:
        """Return the steps before `written`; None if there are none."""
        return None if self.hop is None else self._prepare_rest(self.hop)

    async def _prepare_rest(self, hop: Hop) -> None:
        self.prepared = await hop.body(self.request.body(self.provider.settings, self.model))

    def repeats(self) -> bool:
        """Return whether the request must be sent again in another form, now that the answer is
        there.
        """
        return False

    def written(self, writer: RequestWriter) -> Sequence[bytes]:
        """Return the pieces to send.

        They are made late, since the settings and the model may change during a wait.
        """
        request = self.request
        return self.request_bytes(writer, request.api, request.path, self.body_to_send())

    def body_to_send(self) -> bytes:
        """Return the body of the request."""
        if (body := self.prepared) is None:
            return self.request.body(self.provider.settings, self.model)
        self.prepared = None
        return body

    def request_bytes(
        self, writer: RequestWriter, api: Api, path: str, body: bytes
    ) -> Sequence[bytes]:
        """Return the pieces of a request for *path*, that of *api*, with this *body*, and record it
        in the trace.
        """
        request = self.request
        self.body_bytes, self.text_bytes = len(body), text_bytes(body, request.pictures)
        client_headers, trace = request.client_headers, request.record.trace
        if api is not request.api:
            # The request is translated: headers of one API mean nothing in the other.
            client_headers = client_headers.without_api()
        if trace is not None:
            client_headers = trace.sending(client_headers, body)
        return writer.write(api, path, body, client_headers)

    def sending(self, exchange: Source | None = None) -> None:
        """Note that the request goes out: from here on the model may run, and cost money.

        *exchange* receives the answer.
        """
        self.request.outcome.sent = True
        # The status of an earlier exchange.
        self.status = 0
        if self.stream is not None:
            self.stream.source = exchange

    def received(self) -> None:
        """Note that nothing more comes by the exchange."""
        if self.stream is not None:
            self.stream.source = None
            if self.holding is not None:
                self.holding.drop()
            if not self.stream.answered and isinstance(self.sink, StreamSink):
                self.sink.forget()

    def head_received(self, status: int, headers: Mapping[str, str]) -> Sink:
        """Return the sink for the body that follows the head with *status* and *headers*.

        Raises:
            ProviderBadResponse: the body is compressed.
        """
        self.status, self.headers = status, headers
        request, stream = self.request, self.stream
        request.outcome.headers = visible = visible_headers(headers)
        if visible:
            # They include the headers that report what is left of its limits.
            self.provider.head_received(self)
        if stream is not None:
            if visible:
                stream.recount()
            if request.reading is not None and not stream.answered_at:
                request.reading.begin_anew()
        sink: Sink
        if status == 200 and self.streamed and matches_type(headers, "text/event-stream"):
            assert stream is not None, "a streamed answer has a log"
            sink = self.event_sink(stream)
        else:
            limit = self.max_answer_bytes if status == 200 else MAX_ERROR_BYTES
            if stream is not None and request.reading is not None:
                # The body is parsed at once, and becomes one event of the log.
                limit = min(limit, stream.max_bytes)
            held = request.count_answer() if stream is None else stream.hold()
            sink = BodySink(limit, held)
        self.sink = sink
        if "content-encoding" in headers:
            check_uncompressed(headers)
        trace = request.record.trace
        if trace is None or isinstance(sink, BodySink):
            return sink
        return trace.watch(sink)

    def event_sink(self, stream: Stream) -> Sink:
        """Return the sink for the events of the answer, which fills *stream*."""
        sink, parts = self.stream_sink(stream), self.parts
        if self.request.choices > 1 and isinstance(sink, EventSink):
            sink.choices = Choices()
        if parts is None:
            self.request.outcome.hold = PREAMBLE
        elif self.request.hold != PREAMBLE:
            on_show = None if self.hop is None else partial(self.hop.show, self)
            self.holding = Holding(
                self.request, stream, sink, parts, self.received_content, on_show
            )
            sink.hold(self.holding, self.holding)
        if self.hop is not None:
            return self.hop.sink(self, sink)
        stream.transcript = self.transcript() if self.request.keeps_body else None
        return sink

    @property
    def parts(self) -> Parts | None:
        """The parts of a turn in the provider's events, None if these cannot be held."""
        return self.request.api.parts

    def let_go(self) -> None:
        """Show what is held of the answer before its finish."""
        if self.holding is not None:
            self.holding.let_go()

    def stream_sink(self, stream: Stream) -> StreamSink:
        """Return the sink that fills *stream* with the provider's events as they were sent."""
        request = self.request
        if request.reading is not None:
            return ChatSink(stream, request.reading)
        return request.api.sink(stream)

    def transcript(self) -> Transcript | None:
        """Return the transcript of the answer that begins, by which another attempt could continue
        it; None if that is not possible.
        """
        request = self.request
        if request.reading is not None:
            return ReadTranscript(request.reading)
        kind = request.api.continues
        return None if kind is None else kind(keeps_text=request.continues)

    @property
    def max_answer_bytes(self) -> int:
        """The most bytes of a good answer that is not streamed."""
        return self.provider.max_response_bytes

    def conclude(self) -> Awaitable[None] | None:
        """Check the answer, which is complete now, and read it if it was not streamed; return the
        remaining steps.

        Raises:
            ProviderFault: the status or the body is not that of a good answer.
        """
        request, stream, sink = self.request, self.stream, self.sink
        if not isinstance(sink, BodySink):
            assert stream is not None
            if isinstance(stream.error, ProviderFault):
                self.fault = stream.error
            return None
        body, headers = sink.body, self.headers
        if self.status != 200:
            request.api.check_status(self.provider.name, self.status, headers, body)
        if self.streamed:
            raise ProviderBadResponse("the provider's answer is not an event stream")
        content = check_json(headers, body)
        reading = request.reading
        if reading is None:
            request.outcome.usage = request.api.usage(content)
            content_type = headers.get("content-type", "")
            self.answer = Answer(self.status, body, content_type, request.outcome)
            return None
        assert stream is not None, "an answer that is read has a log"
        try:
            chunks = reading.read(body)
        except (BadEvent, ErrorEvent) as exc:
            raise event_fault(exc) from exc
        stream.mark_answered()
        if chunks:
            stream.append(entries.CHUNK, chunks)
        complete_chat(stream, reading)
        return None


def text_bytes(body: bytes, pictures: bool | None) -> int:
    """Return the bytes of *body* if all of it may be text. Return 0 if it is too large to search,
    or has *pictures* or files, whose tokens are unrelated to its bytes; None: that is not known.
    """
    size = len(body)
    if size > MAX_SEARCHED:
        return 0
    if pictures is not None:
        return 0 if pictures else size
    # `base64` occurs in a `data:` URL (RFC 2397) and in Anthropic's objects.
    # Most bodies have not even its end, which is found five times as fast.
    return 0 if b"se64" in body and b"base64" in body else size
