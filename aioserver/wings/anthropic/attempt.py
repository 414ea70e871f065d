"""An attempt to get a message (`/v1/messages`), also from a provider that has chat completions
only, and the estimate of tokens if the provider does not count them.

To a provider that speaks the API, a request goes as it came, with one exception: a thinking block
that a bridge has written has a signature of ours, which the API would refuse. The rest of an
answer is requested in a form that the API takes: none begins the answer of a model that thinks.
"""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING

import orjson

from aioserver.config.llm import AUTO, BRIDGE, INSTRUCT, PREFILL
from aioserver.errors import InvalidRequest
from aioserver.gateway.bridging import BridgedAttempt, PathCapabilities
from aioserver.protocol.bridging.accepted_parameters import ALL_WORDS
from aioserver.protocol.bridging.transcript import BridgedTranscript
from aioserver.protocol.bridging.whole import MAX_WHOLE_BYTES
from aioserver.protocol.model_body import Member
from aioserver.protocol.openai import BadEvent, ErrorEvent
from aioserver.provider_errors import RequestNotBridged
from aioserver.providers.attempt import Attempt
from aioserver.providers.error_mapping import event_fault
from aioserver.providers.request import Answer
from aioserver.providers.sinks import BodySink
from aioserver.wings.anthropic import wire
from aioserver.wings.anthropic.bridge.blocks import SIGNATURE
from aioserver.wings.anthropic.bridge.events import MessageWriter
from aioserver.wings.anthropic.bridge.refused import translate
from aioserver.wings.anthropic.bridge.request import ChatRequest, ThreadContinued, chat_request
from aioserver.wings.anthropic.bridge.whole import WholeWriter, whole_message
from aioserver.wings.anthropic.history import without_thinking
from aioserver.wings.anthropic.sink import BridgeSink

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aioserver.config import settings
    from aioserver.protocol.bridging.accepted_parameters import AcceptedParameters
    from aioserver.protocol.transcript import Transcript
    from aioserver.provider_errors import ProviderFault
    from aioserver.providers.sinks import StreamSink
    from aioserver.streams.stream import Stream

# The header of a count of tokens that is an estimate.
ESTIMATED = {"x-aioserver-estimated": "input_tokens"}
_THINKING = Member("thinking")


class MessagesCapabilities(PathCapabilities):
    """The knowledge of whether one provider answers requests for messages."""

    def __init__(
        self, settings: settings.Provider, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(settings, clock)
        self.never = settings.messages == BRIDGE
        self.learns = settings.messages in {AUTO, BRIDGE}

    @property
    def messages(self) -> str | None:
        """The word in `/stats` for how they are requested."""
        if self.bridged:
            return "bridge"
        return "speaks" if self.present or not self.learns else "unknown"


class CountingCapabilities(MessagesCapabilities):
    """The knowledge of whether it counts their tokens; an engine may answer messages without
    counting them.
    """

    messages = None


class MessageAttempt(BridgedAttempt):
    """One try of one request for a message."""

    capabilities = MessagesCapabilities
    shown_path, shown_api = "/v1/messages", "messages"

    def goes_on(self, transcript: Transcript) -> bool:
        """Return whether the rest can be requested here: not if the API refuses the request in the
        version that it has, which the provider before may not have noticed.
        """
        if not super().goes_on(transcript):
            return False
        if self.bridged or self._version <= wire.VERSION:
            return True
        body = self.request.body(self.provider.settings, self.model)
        return not wire.refused_since_2026(body)

    def form_of_rest(self) -> str:
        """Return the form in which it asks for the rest: a model that thinks takes no beginning."""
        form = super().form_of_rest()
        if form != PREFILL or self.bridged:
            return form
        body = self.request.body(self.provider.settings, self.model)
        return INSTRUCT if wire.thinks(_THINKING.value(body)) else form

    @property
    def _version(self) -> str:
        """The version of the API in which the provider reads the request."""
        headers = {name.lower(): value for name, value in self.provider.settings.headers.items()}
        sent = self.request.client_headers.of_api(wire.VERSION_HEADER) or b""
        return headers.get(wire.VERSION_HEADER) or sent.decode("latin-1") or wire.VERSION

    def _own_preparation(self) -> Awaitable[None] | None:
        """Return the steps that remove our thinking blocks from the request."""
        body = self.request.body(self.provider.settings, self.model)
        if self.hop is None and body.find(SIGNATURE.encode()) < 0:
            # It is sent at once, and need not be made again.
            self.prepared = body
            return None
        return self._prepare(body)

    async def _prepare(self, body: bytes) -> None:
        if body.find(SIGNATURE.encode()) >= 0:
            body = await without_thinking(body)
        self.prepared = body if self.hop is None else await self.hop.body(body)

    def stream_sink(self, stream: Stream) -> StreamSink:
        """Return the sink that fills *stream* with the events of the answer."""
        chat, transcript = self._chat, stream.transcript
        if chat is None:
            return super().stream_sink(stream)
        assert isinstance(chat, ChatRequest), "made here"
        writer = (
            transcript.writer if isinstance(transcript, BridgedTranscript) and self.hop else None
        )
        # The same message continues, if the answer is continued.
        if not isinstance(writer, MessageWriter):
            writer = MessageWriter(chat, uuid.uuid4().hex, stream.max_bytes)
            if self.request.keeps_body:
                writer.keep_text()
        self._writer = writer
        return BridgeSink(stream, writer)

    def _translate_fault(self, fault: ProviderFault, body: bytes) -> None:
        translate(fault, body)

    async def _translated(self) -> ChatRequest:
        body = self.request.body(self.provider.settings, self.model)
        return await translated(body, self._capabilities.reasoning_field, self._accepted)

    async def _translate_answer(self, answer: Answer) -> None:
        chat = self._chat
        assert isinstance(chat, ChatRequest), "made here"
        self._writer = writer = WholeWriter(chat, uuid.uuid4().hex, MAX_WHOLE_BYTES)
        body, answer.body = answer.body, b""
        try:
            answer.body = await whole_message(body, writer)
        except (BadEvent, ErrorEvent) as exc:
            raise event_fault(exc) from exc
        self.request.outcome.usage = writer.usage


class CountAttempt(Attempt):
    """One attempt to have the tokens of a request counted.

    A provider that does not count them is not asked again: an estimate is the answer.
    """

    def conclude(self) -> Awaitable[None] | None:
        """Check the answer, and return the steps of an estimate if there can be no other.

        Raises:
            ProviderFault: as `Attempt.conclude`.
        """
        sink, learned = self.sink, self.provider.capabilities(CountingCapabilities)
        assert isinstance(sink, BodySink), "it is not streamed"
        if self.status == 200:
            learned.found(present=True)
        elif learned.absent(self.status, sink.body):
            learned.found(present=False)
            return self._estimate()
        return super().conclude()

    async def _estimate(self) -> None:
        outcome, model = self.request.outcome, self.asked_model
        body = self.request.body(self.provider.settings, self.model)
        per_byte = self.provider.costs.tokens_per_byte(model, self.request.caller)
        counted = await estimated(body, per_byte)
        outcome.headers = {**outcome.headers, **ESTIMATED}
        self.answer = Answer(200, counted, "application/json", outcome)


async def translated(
    body: bytes, reasoning_field: str, accepted: AcceptedParameters
) -> ChatRequest:
    """Return the request in *body* as one for a chat completion, as `chat_request`.

    Raises:
        RequestNotBridged: it has no form there.
    """
    try:
        return await chat_request(body, reasoning_field=reasoning_field, accepted=accepted)
    except ThreadContinued as exc:
        fault = RequestNotBridged(exc.message, param=exc.param)
        fault.provider_answer = 400, exc.answer
        raise fault from None
    except InvalidRequest as exc:
        raise RequestNotBridged(exc.message, param=exc.param) from None


async def estimated(body: bytes, tokens_per_byte: float) -> bytes:
    """Return the answer that counts the tokens of the request in *body*, as an estimate.

    Raises:
        RequestNotBridged: it has no form in chat completions.
    """
    chat = await translated(body, "", ALL_WORDS._replace(tokens_per_byte=tokens_per_byte))
    return orjson.dumps({"input_tokens": chat.asked_tokens})
