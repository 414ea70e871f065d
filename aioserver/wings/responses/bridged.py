"""An attempt to get a response (`/v1/responses`), also from a provider that has chat completions only.

Such a provider is known by its setting `responses: false`, or by its answer: if it has no such path the attempt goes
on at once, in the same place, with the request as one for a chat completion. It is known from then on, until a reload, if it answers
that one.

A 404 that is about a model or another response is no such answer: then the path is there. Nor is any 404 of a provider that
has answered there before.
"""

from __future__ import annotations

import logging
import time
import uuid
from typing import TYPE_CHECKING, Any

import orjson

from aioserver.errors import InvalidRequest, ResponseNotFound
from aioserver.protocol.openai import BadEvent, ErrorEvent
from aioserver.provider_errors import RequestNotBridged
from aioserver.providers.attempt import Attempt
from aioserver.providers.error_mapping import event_fault
from aioserver.providers.sinks import BodySink
from aioserver.wings.responses.bridge.events import ResponseWriter
from aioserver.wings.responses.bridge.output import Frame
from aioserver.wings.responses.bridge.request import chat_request
from aioserver.wings.responses.bridge.whole import MAX_WHOLE_BYTES, WholeWriter, whole_response
from aioserver.wings.responses.continuation import refuses_continuation
from aioserver.wings.responses.sinks import BridgeSink

if TYPE_CHECKING:
    from collections.abc import Generator

    from aioserver.providers.attempt import AttemptedProvider
    from aioserver.providers.http1 import RequestWriter, Sink
    from aioserver.providers.request import Answer, ProviderRequest
    from aioserver.streams.stream import Stream
    from aioserver.wings.responses.bridge.request import ChatRequest

logger = logging.getLogger("aioserver.providers")

RESPONSES, CHAT = "responses", "chat/completions"
# The statuses by which a provider says that it has no such path, or no such method there.
ABSENT_STATUSES = frozenset({404, 405, 501})
# Words of a 404 that is about something else than the path.
_OTHER_SUBJECTS = ("model", "resp_", "msg_")


class ResponseAttempt(Attempt):
    """One try of one request for a response.

    Always: `_chat` is set if, and only if, a chat completion is asked for.
    """

    __slots__ = ("_chat", "_learning", "_writer")

    def __init__(
        self,
        provider: AttemptedProvider,
        request: ProviderRequest,
        stream: Stream | None,
        **further: Any,
    ) -> None:
        super().__init__(provider, request, stream, **further)
        self._chat: ChatRequest | None = None
        self._writer: ResponseWriter | None = None
        # Whether the provider has said that it has no such path, and has not been asked otherwise before.
        self._learning = False

    def preparation(self) -> Generator[None, None, None] | None:
        """Return the steps that translate the request, or those of `Attempt.preparation`."""
        return self._translate() if self.bridged else super().preparation()

    @property
    def bridged(self) -> bool:
        """Whether a chat completion is asked for."""
        return self.provider.bridging.on or self._learning

    def written(self, writer: RequestWriter) -> bytes:
        """Return the bytes to send."""
        chat = self._chat
        if chat is None:
            return super().written(writer)
        body, chat.body = chat.body, b""
        return self.request_bytes(writer, CHAT, body)

    def repeats(self) -> bool:
        """Return whether the request is to be sent as one for a chat completion, since the provider has no such path.

        Or as `Attempt.repeats`, where it has.
        """
        sink = self.sink
        if self._chat is not None:
            return False
        if (
            self.status not in ABSENT_STATUSES
            or not isinstance(sink, BodySink)
            or (self.status == 404 and self.provider.bridging.present)
            or not path_absent(self.status, sink.body)
        ):
            return super().repeats()
        self._learning = True
        self.provider.meter.attempts["http_4xx" if self.status < 500 else "http_5xx"].value += 1
        return True

    def first_event(self) -> None:
        """Note that the answer has begun."""
        bridging = self.provider.bridging
        if self._chat is None:
            bridging.present = True
        elif self._learning and not bridging.lacking:
            bridging.lacking = True
            logger.info(
                "provider %s has no /v1/responses: they are translated to chat completions",
                self.provider.name,
            )
        super().first_event()

    def event_sink(self, stream: Stream) -> Sink:
        """Return the sink for the events of the answer."""
        if self._chat is None:
            return super().event_sink(stream)
        self._writer = ResponseWriter(self._chat, self._frame(self._chat), stream.max_bytes)
        return BridgeSink(stream, self._writer)

    @property
    def max_body_bytes(self) -> int:
        """The bytes at most of a good answer that is not streamed."""
        limit = super().max_body_bytes
        return limit if self._chat is None else min(limit, MAX_WHOLE_BYTES)

    def conclude(self) -> Generator[None, None, None] | None:
        """Check the answer, and return the steps that translate it if it was not streamed.

        Raises:
            ProviderFault: as `Attempt.conclude`.
        """
        super().conclude()
        chat, answer = self._chat, self.answer
        if chat is not None and answer is not None:
            self._writer = writer = WholeWriter(chat, self._frame(chat), MAX_WHOLE_BYTES)
            return self._translate_answer(answer, writer)
        if chat is not None:
            self._note_reasoning()
        return None

    def _translate_answer(
        self, answer: Answer, writer: WholeWriter
    ) -> Generator[None, None, None]:
        """Translate *answer*, in steps.

        Raises:
            ProviderFault: it is no chat completion.
        """
        body, answer.body = answer.body, b""
        try:
            answer.body = yield from whole_response(body, writer, int(time.time()))
        except (BadEvent, ErrorEvent) as exc:
            self.answer = None
            raise event_fault(exc) from exc
        self._note_reasoning()

    def _note_reasoning(self) -> None:
        if self._writer is not None and self._writer.reasoning_field:
            self.provider.bridging.reasoning_field = self._writer.reasoning_field

    def _translate(self) -> Generator[None, None, None]:
        """Translate the request, in steps.

        Raises:
            RequestNotBridged: it has no form in chat completions.
            ResponseNotFound: it continues a response that is not known here.
        """
        draft, provider = self.request.draft, self.provider
        body = self.request.body(provider.settings)
        if draft is not None:
            body = yield from draft.bridge(body, provider.name)
        try:
            self._chat = yield from chat_request(
                body,
                previous=None if draft is None else draft.previous_id,
                reasoning_field=provider.bridging.reasoning_field,
            )
        except ResponseNotFound:
            raise
        except InvalidRequest as exc:
            raise RequestNotBridged(exc.message, param=exc.param) from None

    @staticmethod
    def _frame(chat: ChatRequest) -> Frame:
        return Frame(f"resp_{uuid.uuid4().hex}", int(time.time()), chat.model, chat.repeated)


def path_absent(status: int, body: bytes) -> bool:
    """Return whether an answer with this *status* and *body* says that there is no such path, or no such method.

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
