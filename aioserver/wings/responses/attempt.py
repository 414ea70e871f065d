"""An attempt to get a response (`/v1/responses`), also from a provider that has chat completions
only, or keeps no responses.

A provider without responses is known by its setting `responses: false`, or by its answer: if it
has no such path the attempt goes on at once, in the same place, with the request as one for a chat
completion. It is known from then on, until a reload, if it answers that one. A 404 that is about a
model or another response is no such answer: then the path is there. Nor is any 404 of a provider
that has answered there before.

OpenAI's API continues a response by `previous_response_id`, which its server has kept. Many
engines have the path and keep nothing. Some say that they do not support the field, others that
there is no such response: the request is then sent once more, with the conversation.

This file is one concept: what is learned of a provider, and what an attempt there makes of it.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from typing import TYPE_CHECKING, Any

import orjson

from aioserver.errors import InvalidRequest, ResponseNotFound
from aioserver.gateway.continuation import continuable
from aioserver.protocol.bridging.whole import MAX_WHOLE_BYTES
from aioserver.protocol.json_body import at_once
from aioserver.protocol.openai import BadEvent, ErrorEvent
from aioserver.provider_errors import ProviderRefused, RequestNotBridged
from aioserver.providers.api import CHAT, Memory
from aioserver.providers.attempt import Attempt
from aioserver.providers.error_mapping import event_fault
from aioserver.providers.request import ProviderRequest
from aioserver.providers.sinks import BodySink
from aioserver.wings.responses.api import RESPONSES
from aioserver.wings.responses.bridge.events import ResponseWriter
from aioserver.wings.responses.bridge.output import Frame
from aioserver.wings.responses.bridge.request import chat_request
from aioserver.wings.responses.bridge.whole import WholeWriter, whole_response
from aioserver.wings.responses.sinks import BridgedSaid, BridgeSink

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from aioserver.auth.callers import Caller
    from aioserver.config import settings
    from aioserver.protocol.client_headers import ClientHeaders
    from aioserver.protocol.said import Said
    from aioserver.providers.attempt import AttemptedProvider
    from aioserver.providers.http1 import RequestWriter
    from aioserver.providers.request import Answer, BodyMaker, Hold
    from aioserver.providers.sinks import StreamSink
    from aioserver.streams.stream import Stream
    from aioserver.wings.responses.bridge.request import ChatRequest
    from aioserver.wings.responses.draft import Draft

logger = logging.getLogger("aioserver.providers")

# The statuses with which engines refuse to continue a response.
REFUSAL_STATUSES = frozenset({400, 404, 422, 501})
# Bytes of a refusal that is read.
MAX_READ = 1 << 16
_SUBJECT = re.compile(
    r"\bprevious[ _-]?response(?:_?id)?\b|\bresponse (?:with|id)\b|\bno response found",
    re.IGNORECASE,
)
_UNSUPPORTED = re.compile(
    r"not (?:yet )?(?:supported|implemented|allowed)|does(?: not|n't) support|unsupported|unknown"
    r"|unrecognized|unexpected|extra inputs",
    re.IGNORECASE,
)
# The statuses by which a provider says that it has no such path, or no such method there.
ABSENT_STATUSES = frozenset({404, 405, 501})
# Words of a 404 that is about something else than the path.
_OTHER_SUBJECTS = ("model", "resp_", "msg_")


class Learned(Memory):
    """The knowledge of how one provider does responses: from its settings, and from its answers
    since.

    *lacking* says that it was found to have no `/v1/responses`, and *present* that it has answered
    there: a 404 is about something else then, which a client may have named. *reasoning_field* is
    the name of the field in which it sends its reasoning; empty if it has sent none. *keeps*: it
    keeps the responses that it has made, as far as we know.
    """

    def __init__(self, settings: settings.Provider) -> None:
        super().__init__(settings)
        self._name = settings.name
        self._configured = settings.responses
        self.lacking = self.present = False
        self.reasoning_field = ""
        self.keeps = True

    @property
    def bridged(self) -> bool:
        """Whether a response is asked for as a chat completion."""
        return self.lacking or not self._configured

    def learn(self, status: int, body: bytes, *, previous_id: str | None, by_id: bool) -> bool:
        """Learn from an answer with *status* and *body* whether the provider keeps responses.

        Its request named the response *previous_id*; None: it named none, and says nothing.
        *by_id*: the provider has made that response, and we have it. Return whether the request is
        to be sent once more, as the provider does not know that response.
        """
        if previous_id is None or not refuses_continuation(status, body):
            return False
        # Refusals repeat the id, and a client could make one up that says more than the provider
        # does.
        if by_id or (_UNSUPPORTED.search(previous_id) is None and supports_none(status, body)):
            if self.keeps:
                logger.info(
                    "provider %s keeps no responses: those that continue others are asked for "
                    "with the conversation",
                    self._name,
                )
            self.keeps = False
        return by_id


class ResponseRequest(ProviderRequest):
    """A request for a response.

    *draft*: what it continues, or keeps to be continued; None if there is nothing of either.
    *patience*: seconds for which its client does without the id of the response, while it may come
    from another provider yet; None: until there is content.
    """

    __slots__ = ("draft", "patience")

    def __init__(
        self,
        body: BodyMaker,
        draft: Draft | None,
        *,
        streamed: bool,
        caller: Caller,
        model: str | None,
        hold: Hold,
        client_headers: ClientHeaders,
        patience: float | None = None,
    ) -> None:
        super().__init__(
            RESPONSES,
            body,
            streamed=streamed,
            caller=caller,
            model=model,
            hold=hold,
            client_headers=client_headers,
        )
        self.draft = draft
        self.patience = patience


class ResponseAttempt(Attempt):
    """One try of one request for a response.

    Always: `_chat` is set if, and only if, a chat completion is asked for.
    """

    __slots__ = ("_chat", "_draft", "_free", "_learning", "_patience", "_prepared", "_writer")

    def __init__(
        self,
        provider: AttemptedProvider,
        request: ProviderRequest,
        stream: Stream | None,
        **further: Any,
    ) -> None:
        super().__init__(provider, request, stream, **further)
        assert isinstance(request, ResponseRequest), "the face makes it"
        self._draft = request.draft
        self._patience = request.patience
        self._chat: ChatRequest | None = None
        # Whether the answer of that is one which can be continued.
        self._free = False
        self._writer: ResponseWriter | None = None
        # The body of a request that continues a response, between its preparation and its sending.
        self._prepared: bytes | None = None
        # Whether the provider has said that it has no such path, and has not been asked otherwise
        # before.
        self._learning = False

    def preparation(self) -> Awaitable[None] | None:
        """Return the steps that translate the request, or put what it continues in front of its
        input.
        """
        if self.bridged:
            return self._translate()
        draft = self._draft
        return None if draft is None or not draft.slow else self._prepare(draft)

    async def _prepare(self, draft: Draft) -> None:
        provider = self.provider
        body = self.request.body(provider.settings, self.model)
        keeps = self._learned.keeps
        self._prepared = await draft.body_for(body, provider.name, keeps=keeps)

    @property
    def _learned(self) -> Learned:
        # Asked for anew each time, since a reload makes another.
        return self.provider.memory(Learned)

    @property
    def bridged(self) -> bool:
        """Whether a chat completion is asked for."""
        return self._learned.bridged or self._learning

    def written(self, writer: RequestWriter) -> bytes:
        """Return the bytes to send.

        Raises:
            RequestTooLarge, InvalidRequest: the request continues a response, and that cannot be
                written out.
        """
        chat, prepared = self._chat, self._prepared
        if chat is None:
            request, self._prepared = self.request, None
            if prepared is None:
                prepared = request.body(self.provider.settings, self.model)
                if self._draft is not None:
                    keeps = self._learned.keeps
                    steps = self._draft.body_for(prepared, self.provider.name, keeps=keeps)
                    prepared = at_once(steps)
            return self.request_bytes(writer, request.api, request.path, prepared)
        body, chat.body = chat.body, b""
        return self.request_bytes(writer, CHAT, CHAT.path, body)

    def repeats(self) -> bool:
        """Return whether the request is to be sent as one for a chat completion, since the
        provider has no such path.

        Or, where it has, once more: with the conversation, since the provider does not know the id
        of the response.
        """
        sink = self.sink
        if self._chat is not None or self.status == 200 or not isinstance(sink, BodySink):
            return False
        if (
            self.status not in ABSENT_STATUSES
            or (self.status == 404 and self._learned.present)
            or not path_absent(self.status, sink.body)
        ):
            if not self._refused(sink.body):
                return False
        else:
            self._learning = True
        self.provider.meter.attempts["http_4xx" if self.status < 500 else "http_5xx"].value += 1
        return True

    def _refused(self, body: bytes) -> bool:
        """Return whether the provider does not know the response which the request continues by
        its id.
        """
        draft = self._draft
        return draft is not None and self._learned.learn(
            self.status, body, previous_id=draft.previous_id, by_id=draft.by_id
        )

    def first_event(self) -> None:
        """Note that the answer has begun."""
        learned = self._learned
        if self._chat is None:
            learned.present = True
        elif self._learning and not learned.lacking:
            learned.lacking = True
            logger.info(
                "provider %s has no /v1/responses: they are translated to chat completions",
                self.provider.name,
            )
        super().first_event()

    def stream_sink(self, stream: Stream) -> StreamSink:
        """Return what fills *stream* with the events of the answer."""
        sink: StreamSink
        chat, said = self._chat, stream.said
        if chat is None:
            sink = RESPONSES.sink(stream)
        elif self.hop is not None and isinstance(said, BridgedSaid):
            # The same response goes on.
            self._writer = said.writer
            sink = BridgeSink(stream, said.writer)
        else:
            self._writer = ResponseWriter(chat, self._frame(chat), stream.max_bytes)
            sink = BridgeSink(stream, self._writer)
        sink.patience = self._patience
        return sink

    def said(self) -> BridgedSaid | None:
        """Return what keeps the answer of a chat completion; a native response is not
        continued.
        """
        return BridgedSaid(self._writer) if self._free and self._writer is not None else None

    def goes_on(self, said: Said) -> bool:
        """Return whether the rest can be asked for here: as a chat completion, as the answer so
        far was one.
        """
        return isinstance(said, BridgedSaid) and self.bridged

    @property
    def max_answer_bytes(self) -> int:
        """The bytes at most of a good answer that is not streamed."""
        limit = super().max_answer_bytes
        return limit if self._chat is None else min(limit, MAX_WHOLE_BYTES)

    def conclude(self) -> Awaitable[None] | None:
        """Check the answer, and return the steps that translate it if it was not streamed.

        Raises:
            ProviderFault: as `Attempt.conclude`.
        """
        try:
            super().conclude()
        except ProviderRefused as fault:
            draft, sink = self._draft, self.sink
            if draft is not None and draft.unknown and isinstance(sink, BodySink):
                fault.unknown_there = refuses_continuation(self.status, sink.body)
            raise
        chat, answer = self._chat, self.answer
        if chat is not None and answer is not None:
            self._writer = writer = WholeWriter(chat, self._frame(chat), MAX_WHOLE_BYTES)
            return self._translate_answer(answer, writer)
        if chat is not None:
            self._note_reasoning()
        return None

    async def _translate_answer(self, answer: Answer, writer: WholeWriter) -> None:
        """Translate *answer*, in steps.

        Raises:
            ProviderFault: it is no chat completion.
        """
        body, answer.body = answer.body, b""
        try:
            answer.body = await whole_response(body, writer, int(time.time()))
        except (BadEvent, ErrorEvent) as exc:
            self.answer = None
            raise event_fault(exc) from exc
        self._note_reasoning()

    def _note_reasoning(self) -> None:
        if self._writer is not None and self._writer.reasoning_field:
            self._learned.reasoning_field = self._writer.reasoning_field

    async def _translate(self) -> None:
        """Translate the request, in steps.

        Raises:
            RequestNotBridged: it has no form in chat completions.
            ResponseNotFound: it continues a response that is not known here.
        """
        draft, provider = self._draft, self.provider
        body = self.request.body(provider.settings, self.model)
        if draft is not None:
            body = await draft.bridge(body, provider.name)
        try:
            self._chat = await chat_request(
                body,
                previous=None if draft is None else draft.previous_id,
                reasoning_field=self._learned.reasoning_field,
            )
        except ResponseNotFound:
            raise
        except InvalidRequest as exc:
            raise RequestNotBridged(exc.message, param=exc.param) from None
        if self.hop is not None:
            self._chat.body = await self.hop.body(self._chat.body)
        elif self.request.keeps_body:
            self._free = await continuable(self._chat.body)

    @staticmethod
    def _frame(chat: ChatRequest) -> Frame:
        return Frame(f"resp_{uuid.uuid4().hex}", int(time.time()), chat.model, chat.repeated)


def path_absent(status: int, body: bytes) -> bool:
    """Return whether an answer with this *status* and *body* says that there is no such path, or
    no such method.

    It may be about the model, or another object that the request names, too.
    """
    if refuses_continuation(status, body):
        return False
    if status != 404:
        return True
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError:
        return True
    error = content.get("error") if isinstance(content, dict) else None
    if not isinstance(error, dict):
        error = {"message": error or content}
    text = f"{error.get('message')} {error.get('code')}".lower()
    return not error.get("param") and not any(subject in text for subject in _OTHER_SUBJECTS)


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
    return isinstance(error, str) and _SUBJECT.search(error) is not None


def supports_none(status: int, body: bytes) -> bool:
    """Return whether such a refusal says that no response at all can be continued, not only this
    one.
    """
    return status == 501 or _UNSUPPORTED.search(body.decode("utf-8", "replace")) is not None


def _error_in(body: bytes) -> object:
    """Return the error that *body* has: an object or a text; other content is its own."""
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError:
        return body.decode("utf-8", "replace")
    if isinstance(content, dict):
        return content.get("error") or str(content)
    return str(content)
