"""An attempt to get a response (`/v1/responses`), also from a provider that has chat completions
only, or keeps no responses.

A provider without responses is recognized by its setting `responses: false`, or by its answer
(gateway/bridging.py). A 404 about a response is no such answer: then the path exists.

OpenAI's API continues a response by `previous_response_id`, which its server has kept. Many
engines have the path and keep nothing. Some answer that they do not support the field, others that
there is no such response: the request is then sent once more, with the conversation.

This file is one concept: the learned capabilities of a provider, and how an attempt uses them.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from typing import TYPE_CHECKING, Any

import orjson

from aioserver.errors import InvalidRequest, RequestTooLarge, ResponseNotFound
from aioserver.gateway.bridging import BridgedAttempt, PathCapabilities
from aioserver.protocol.bridging.transcript import BridgedTranscript
from aioserver.protocol.bridging.whole import MAX_WHOLE_BYTES
from aioserver.protocol.openai import BadEvent, ErrorEvent
from aioserver.protocol.steps import at_once
from aioserver.protocol.whole_answer import final_response, text_pieces
from aioserver.provider_errors import (
    ContextTooLong,
    ProviderRateLimited,
    ProviderRefused,
    RequestNotBridged,
)
from aioserver.providers.error_mapping import event_fault, reason_of
from aioserver.providers.request import ProviderRequest
from aioserver.providers.sinks import BodySink
from aioserver.streams.entries import COMPLETE
from aioserver.wings.responses.api import RESPONSES
from aioserver.wings.responses.bridge.events import ResponseWriter
from aioserver.wings.responses.bridge.output import Frame
from aioserver.wings.responses.bridge.request import ChatRequest, chat_request
from aioserver.wings.responses.bridge.whole import WholeWriter, whole_response
from aioserver.wings.responses.sinks import BridgeSink

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aioserver.config import settings
    from aioserver.limits.resource import Resource
    from aioserver.protocol.parts import Parts
    from aioserver.provider_errors import ProviderFault
    from aioserver.providers.request import Answer, BodyMaker
    from aioserver.providers.sinks import StreamSink
    from aioserver.streams.stream import Stream
    from aioserver.wings.responses.background import Background
    from aioserver.wings.responses.draft import Draft

logger = logging.getLogger("aioserver.providers")

# The statuses with which engines refuse to continue a response.
REFUSAL_STATUSES = frozenset({400, 404, 422, 501})
# Bytes of a refusal that are read.
MAX_READ = 1 << 16
# Patterns, compiled at the first refusal.
_SUBJECT = r"\bprevious[ _-]?response(?:_?id)?\b|\bresponse (?:with|id)\b|\bno response found"
_UNSUPPORTED = (
    r"not (?:yet )?(?:supported|implemented|allowed)|does(?: not|n't) support|unsupported|unknown"
    r"|unrecognized|unexpected|extra inputs"
)


# The key of the verdict that a provider does not keep its responses.
_KEEPS = "keeps"


class ResponsesCapabilities(PathCapabilities):
    """The knowledge of how one provider handles responses.

    Always: it `keeps` the responses that it has made, as far as is known.
    """

    def __init__(
        self, settings: settings.Provider, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(settings, clock)
        self._name = settings.name
        self.never = not settings.responses

    @property
    def keeps(self) -> bool:
        """Whether it keeps the responses that it has made, as far as is known."""
        return self._shown.get(_KEEPS) is None

    def absent(self, status: int, body: bytes) -> bool:
        """Return whether an answer means that there is no such path, as
        `PathCapabilities.absent`.
        """
        return super().absent(status, body) and not refuses_continuation(status, body)

    def learn(self, status: int, body: bytes, *, previous_id: str | None, by_id: bool) -> bool:
        """Learn from an answer with *status* and *body* whether the provider keeps responses.

        Its request named the response *previous_id*; if it named none (None), nothing is learned.
        *by_id*: the provider has made that response, and we have it. Return whether the request
        must be sent once more, as the provider does not know that response.
        """
        if previous_id is None or not refuses_continuation(status, body):
            return False
        # Refusals repeat the id, and a client could make up an id that pretends to be a part of
        # the refusal.
        none = by_id or (not _unsupported(previous_id) and supports_none(status, body))
        if none and self._shown.keep(_KEEPS, value=False):
            logger.info(
                "provider %s keeps no responses: those that continue others are asked for with the "
                "conversation",
                self._name,
            )
        return by_id


class ResponseRequest(ProviderRequest):
    """A request for a response.

    *draft* is the response to come, and the one that it continues; None if it neither continues
    nor keeps one. *patience*: seconds for which its client can wait for the id of the response,
    while the answer may still come from another provider; None: until there is content. *running*:
    how it runs in the background; None if its client waits for it. *further*: see
    `ProviderRequest`.
    """

    def __init__(
        self,
        body: BodyMaker,
        draft: Draft | None,
        *,
        patience: float | None = None,
        running: Background | None = None,
        **further: Any,
    ) -> None:
        super().__init__(RESPONSES, body, **further)
        self.draft = draft
        self.patience = patience
        self.running = running
        # Whether a hook was shown the conversation in front of the input.
        self._shown_whole = False

    async def whole_body(self, provider: settings.Provider, model: str | None) -> bytes:
        """Return the body with the conversation that it continues in front of its input, if that
        is held here.
        """
        body, draft = self.body(provider, model), self.draft
        if draft is None or draft.previous is None or not draft.previous.whole:
            return body
        try:
            whole = await draft.expand(body, provider.name)
        except RequestTooLarge:
            # The conversation is sent only by its id.
            return body
        self._shown_whole = True
        return whole

    def replace_body(self, body: BodyMaker, size: int) -> None:
        """Send the result of *body*; see `ProviderRequest`."""
        super().replace_body(body, size)
        if self._shown_whole and self.draft is not None:
            self.draft.continue_nothing()


class ResponseAttempt(BridgedAttempt):
    """One try of one request for a response."""

    capabilities = ResponsesCapabilities
    shown_path, shown_api = "/v1/responses", "responses"

    @property
    def _asked(self) -> ResponseRequest:
        request = self.request
        assert isinstance(request, ResponseRequest), "the face makes it"
        return request

    @property
    def bridged(self) -> bool:
        """Whether a chat completion is asked for."""
        running = self._asked.running
        return super().bridged or (running is not None and running.made_here)

    @property
    def background(self) -> bool:
        """Whether it uses a place of the part for the background: not if the provider is known to
        run the response by itself, and only reports its start.
        """
        running = self._asked.running
        if running is None:
            return False
        return running.streamed or running.made_here or not self._learned.present

    @property
    def streamed(self) -> bool:
        """Whether the answer is asked for as a stream of events."""
        running = self._asked.running
        passed = running is not None and not running.streamed and self._chat is None
        return self.request.streamed and not passed

    def queued(self, resource: Resource, position: int, eta: float) -> None:
        """Report the position in the queue to the readers, behind the first events of a response
        in the background.
        """
        if self._asked.running is not None and self.stream is not None:
            self._asked.running.queued(self.stream)
        super().queued(resource, position, eta)

    def started(self) -> None:
        """Note that a place is taken."""
        if self._asked.running is not None and self.stream is not None:
            self._asked.running.started(self.stream)
        super().started()

    def _own_preparation(self) -> Awaitable[None] | None:
        """Return the steps that put the continued conversation in front of its input."""
        draft = self._asked.draft
        return None if draft is None or not draft.slow else self._prepare(draft)

    async def _prepare(self, draft: Draft) -> None:
        provider = self.provider
        body = self.request.body(provider.settings, self.model)
        keeps = self._learned.keeps
        self.prepared = await draft.body_for(body, provider.name, keeps=keeps)

    @property
    def _learned(self) -> ResponsesCapabilities:
        # Looked up each time, since a reload makes another object.
        return self.provider.capabilities(ResponsesCapabilities)

    def body_to_send(self) -> bytes:
        """Return the body of the request, with the conversation that it continues.

        Raises:
            RequestTooLarge, InvalidRequest: the conversation cannot be written out.
        """
        draft, provider = self._asked.draft, self.provider
        if draft is None or self.prepared is not None:
            return super().body_to_send()
        body = self.request.body(provider.settings, self.model)
        return at_once(draft.body_for(body, provider.name, keeps=self._learned.keeps))

    def _refused(self, body: bytes) -> bool:
        """Return whether the provider does not know the response that is continued by its id."""
        draft = self._asked.draft
        return draft is not None and self._learned.learn(
            self.status, body, previous_id=draft.previous_id, by_id=draft.by_id
        )

    def stream_sink(self, stream: Stream) -> StreamSink:
        """Return the sink that fills *stream* with the events of the answer."""
        sink: StreamSink
        chat, transcript = self._chat, stream.transcript
        if chat is None:
            sink = RESPONSES.sink(stream)
        else:
            assert isinstance(chat, ChatRequest), "made here"
            writer = (
                transcript.writer
                if isinstance(transcript, BridgedTranscript) and self.hop
                else None
            )
            # The same response continues, if the answer is continued.
            if not isinstance(writer, ResponseWriter):
                writer = ResponseWriter(chat, self._frame(chat), stream.max_bytes)
            self._writer = writer
            sink = BridgeSink(stream, writer)
        # A background response that is made here has its id already.
        sink.patience = (
            self._asked.patience if chat is None or self._asked.running is None else None
        )
        return sink

    @property
    def parts(self) -> Parts | None:
        """The parts of a turn in the provider's events, as `Attempt.parts`: None for a response
        that its provider runs in the background, since its client waits for its id.
        """
        return None if self._asked.patience == 0.0 and self._chat is None else super().parts

    def conclude(self) -> Awaitable[None] | None:
        """Check the answer, and return the steps that translate it if it was not streamed.

        Raises:
            ProviderFault: as `Attempt.conclude`.
        """
        try:
            steps = super().conclude()
        except ProviderRefused as fault:
            draft, sink = self._asked.draft, self.sink
            if draft is not None and draft.unknown and isinstance(sink, BodySink):
                fault.unknown_there = refuses_continuation(self.status, sink.body)
            raise
        if self._chat is None and self.answer is not None and self.request.streamed:
            return self._keep_whole(self.answer)
        return steps

    async def _keep_whole(self, answer: Answer) -> None:
        """Keep *answer*, of a provider that runs the response by itself, in the log, in steps."""
        stream, draft = self.stream, self._asked.draft
        assert stream is not None, "a response in the background has a log"
        if draft is not None and (kept := draft.keep(answer)) is not None:
            await kept
        if (response_id := await final_response(answer.body)) is not None:
            stream.add_alias(response_id)
        pieces = await text_pieces(answer.body)
        if stream.held is not None:
            # From here on the stream counts it.
            stream.held.release()
        stream.mark_answered()
        stream.append_whole(answer, answer.body, pieces)
        stream.end(COMPLETE, {"metadata": {"provider": answer.outcome.provider}})

    def _translate_fault(self, fault: ProviderFault, body: bytes) -> None:
        if isinstance(fault, ProviderRateLimited):
            if reason := reason_of(fault.http_status, body):
                fault.message = f"{fault.message}: {reason}"
        elif isinstance(fault, ContextTooLong):
            # Codex recognizes it by this code.
            error = {
                "message": fault.reason or fault.message,
                "type": "invalid_request_error",
                "param": "input",
                "code": "context_length_exceeded",
            }
            fault.provider_body = orjson.dumps({"error": error})

    async def _translate_answer(self, answer: Answer) -> None:
        chat = self._chat
        assert isinstance(chat, ChatRequest), "made here"
        self._writer = writer = WholeWriter(chat, self._frame(chat), MAX_WHOLE_BYTES)
        body, answer.body = answer.body, b""
        try:
            answer.body = await whole_response(body, writer, int(time.time()))
        except (BadEvent, ErrorEvent) as exc:
            raise event_fault(exc) from exc

    async def _translated(self) -> ChatRequest:
        draft, provider = self._asked.draft, self.provider
        body = self.request.body(provider.settings, self.model)
        if draft is not None:
            body = await draft.bridge(body, provider.name)
        try:
            chat = await chat_request(
                body,
                previous=None if draft is None else draft.previous_id,
                reasoning_field=self._capabilities.reasoning_field,
                accepted=self._accepted,
                streamed=self._asked.running is not None,
            )
        except ResponseNotFound:
            raise
        except InvalidRequest as exc:
            raise RequestNotBridged(exc.message, param=exc.param) from None
        running, stream = self._asked.running, self.stream
        if running is not None and stream is not None:
            running.frame = self._frame(chat)
            running.started(stream)
        return chat

    def _frame(self, chat: ChatRequest) -> Frame:
        running = self._asked.running
        if running is None or running.frame is None:
            return frame_of(chat, background=running is not None)
        running.frame.model = chat.model
        return running.frame


def frame_of(chat: ChatRequest, *, background: bool = False) -> Frame:
    """Return the frame of a new response."""
    name = f"resp_{uuid.uuid4().hex}"
    return Frame(name, int(time.time()), chat.model, chat.repeated, background)


def refuses_continuation(status: int, body: bytes) -> bool:
    """Return whether an answer with this *status* and *body* refuses the `previous_response_id` of
    its request.
    """
    if status not in REFUSAL_STATUSES or len(body) > MAX_READ:
        return False
    error = _error_in(body)
    if isinstance(error, dict):
        if error.get("param") == "previous_response_id":
            return True
        error = f"{error.get('message')} {error.get('code')}"
    return isinstance(error, str) and bool(re.search(_SUBJECT, error, re.IGNORECASE))


def supports_none(status: int, body: bytes) -> bool:
    """Return whether such a refusal means that no response at all can be continued, not only this
    one.
    """
    return status == 501 or _unsupported(body.decode("utf-8", "replace"))


def _unsupported(text: str) -> bool:
    return re.search(_UNSUPPORTED, text, re.IGNORECASE) is not None


def _error_in(body: bytes) -> object:
    """Return the error that *body* has: an object or a text; other content is its own."""
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError:
        return body.decode("utf-8", "replace")
    if isinstance(content, dict):
        return content.get("error") or str(content)
    return str(content)
