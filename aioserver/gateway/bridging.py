"""Attempts whose request is translated to a chat completion, since their provider lacks the API,
and the learned capabilities of such providers.

Either a provider's settings or its answer can say that it lacks the API. If the path is missing,
the attempt goes on at once, in the same place, with the request translated to a chat completion.
If that is answered, the path counts as missing for five minutes after the newest such answer. A
404 about a model proves nothing, since the path is there then. A 404 also proves nothing if the
provider has answered on the path within five minutes.

Named refusals of an engine are learned, too: of a parameter that only the bridge has added, or of
a bound of the answer that exceeds the context. The request is sent once more without it, at once
and in its place; this is no retry. The refusal is kept for the model only if that is answered,
since a refusal may repeat what a client has written. It is kept for the same time, for each bridge
and for streams that pass (stream_usage.py). If the model has accepted the parameter lately, or the
refusal is about its value, it is left out of this one request alone: the value was the client's.

The wings with such an API derive their attempts from `BridgedAttempt`. This file is one concept:
what is learned about a provider decides the form of its attempts.
"""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import orjson

from aioserver.gateway.continuation import continuable
from aioserver.protocol.bridging.accepted_parameters import (
    LIMIT,
    MARGIN,
    MAX_COMPLETION_TOKENS,
    MAX_TOKENS,
    OPTIONAL,
    AcceptedParameters,
)
from aioserver.protocol.bridging.refusals import STATUSES, Refusal, refusal
from aioserver.protocol.bridging.transcript import BridgedTranscript
from aioserver.protocol.bridging.whole import MAX_WHOLE_BYTES
from aioserver.protocol.request_headers import CALLS
from aioserver.provider_errors import ProviderFault, RequestNotBridged
from aioserver.providers.attempt import Attempt
from aioserver.providers.request import CHAT, Capabilities
from aioserver.providers.sinks import BodySink
from aioserver.providers.verdicts import Verdicts

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from aioserver.config import settings
    from aioserver.protocol.bridging.chat import BridgedChat
    from aioserver.protocol.bridging.chunks import ChunkReader
    from aioserver.protocol.parts import Parts
    from aioserver.protocol.transcript import Transcript
    from aioserver.providers.http1 import RequestWriter, Sink
    from aioserver.providers.request import Answer

logger = logging.getLogger("aioserver.providers")

# The statuses by which a provider says that it lacks the path, or the method there.
ABSENT_STATUSES = frozenset({404, 405, 501})
# Words in a 404 that is not about the path.
_OTHER_SUBJECTS = ("model", "resp_", "msg_")
# The header that names the hosted tools which were not sent to the provider.
LEFT_OUT = "x-aioserver-left-out"
# Names of tools that are logged once each.
MAX_NAMES = 16
# A request is not sent once more with fewer tokens for its answer than the first; the second is a
# margin, since chat templates add some tokens.
MIN_LEFT, SPARE = 256, 16


# The key of the verdict on whether a path is there.
_PATH = "path"


class PathCapabilities(Capabilities):
    """The capabilities of one path of a provider, by its settings and its later answers.

    After an answer on the path, a 404 is about something else, which a client may have named.
    """

    # Whether the path is never tried, and whether a 404 may be about the path.
    never = False
    learns = True

    def __init__(
        self, settings: settings.Provider, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(settings, clock)
        self._shown: Verdicts[str, bool] = Verdicts(clock)

    @property
    def lacking(self) -> bool:
        """Whether the provider was found to lack the path."""
        return self._shown.get(_PATH) is False

    @property
    def present(self) -> bool:
        """Whether the provider has answered on the path."""
        return self._shown.get(_PATH) is True

    def found(self, *, present: bool) -> bool:
        """Learn from an answer whether the path is there; return whether that is news."""
        return self._shown.keep(_PATH, present)

    @property
    def bridged(self) -> bool:
        """Whether chat completions are used instead."""
        return self.lacking or self.never

    def absent(self, status: int, body: bytes) -> bool:
        """Return whether an answer with *status* and *body* says that the path is missing."""
        return (
            self.learns
            and status in ABSENT_STATUSES
            and not (status == 404 and self.present)
            and path_absent(status, body)
        )


class ChatCapabilities(Capabilities):
    """The capabilities of one provider's chat completions, for every bridge to them.

    *reasoning_field* is the field in which its reasoning comes, empty before there was any. By
    model, *limits* has the tokens of its context, and *most* the most tokens of an answer. For
    each parameter and model it is known whether the model accepts it.
    """

    def __init__(
        self, settings: settings.Provider, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(settings, clock)
        self.name = settings.name
        self.reasoning_field = ""
        self._accepted: Verdicts[tuple[str, str], bool] = Verdicts(clock)
        self.limits: Verdicts[str, int] = Verdicts(clock)
        self.most: Verdicts[str, int] = Verdicts(clock)
        self._left_out: set[str] = set()

    @property
    def refused_words(self) -> set[str]:
        """The parameters that at least one of its models has refused."""
        return {word for word, _ in self._refused() if word != MAX_TOKENS}

    @property
    def renaming(self) -> set[str]:
        """The models that want the bound of an answer by its newer name."""
        return {model for word, model in self._refused() if word == MAX_TOKENS}

    def _refused(self) -> list[tuple[str, str]]:
        return [key for key, taken in self._accepted.items() if not taken]

    @property
    def context_limits(self) -> Mapping[str, int]:
        """The tokens of a prompt and its answer, by model."""
        return dict(self.limits.items())

    def refuses(self, word: str, model: str) -> bool:
        """Return whether *word* is not sent to *model*."""
        return self._accepted.get((word, model)) is False

    def take(self, word: str, model: str) -> None:
        """Learn that *model* has answered a request with *word*."""
        self._accepted.keep((word, model), value=True)

    def refuse(self, word: str, model: str) -> None:
        """Stop sending *word* to *model* for a while, unless the model has taken it lately."""
        if not self._accepted.get((word, model)) and self._accepted.keep(
            (word, model), value=False
        ):
            instead = f"sending {MAX_COMPLETION_TOKENS}" if word == MAX_TOKENS else "omitting it"
            logger.info("provider %s rejected %s; %s from now on", self.name, word, instead)

    def keep_limit(self, model: str, tokens: int) -> None:
        """Record that the context of *model* has room for so many *tokens*."""
        if self.limits.keep(model, tokens):
            logger.info("provider %s has a context of %d tokens", self.name, tokens)

    def keep_most(self, model: str, tokens: int) -> None:
        """Record that an answer of *model* has so many *tokens* at most."""
        if self.most.keep(model, tokens):
            logger.info("provider %s allows %d tokens in an answer", self.name, tokens)

    def note_left_out(self, names: Mapping[str, None]) -> None:
        """Log once for each of these hosted tools that it is not sent to this provider."""
        for name in names:
            if name not in self._left_out and len(self._left_out) < MAX_NAMES:
                self._left_out.add(name)
                logger.info("provider %s has no tool %s; omitting it", self.name, name)


class LearningAttempt(Attempt):
    """An attempt whose request is sent once more without what its provider refuses.

    Always: other requests are unaffected until the answer to this one has begun.
    """

    # What was left out of the repeated request, and the part of it that was refused for its value.
    _learnt: frozenset[str] = frozenset()
    _of_value: frozenset[str] = frozenset()

    @property
    def _capabilities(self) -> ChatCapabilities:
        # Looked up each time, since a reload makes another object.
        return self.provider.capabilities(ChatCapabilities)

    def _repeats_without(self, what: str) -> bool:
        """Record that the request is sent once more without *what*; return True."""
        self._learnt |= {what}
        outcome = self.request.outcome
        outcome.learnt = (*outcome.learnt, what)
        self.provider.meter.learnt[what].value += 1
        return True

    def first_event(self) -> None:
        """Note that the answer has begun, and keep what was learned."""
        if self._learnt:
            self._keep_learnt()
        super().first_event()

    def _keep_learnt(self) -> None:
        for word in (*OPTIONAL, MAX_TOKENS):
            if word in self._learnt and word not in self._of_value:
                self._capabilities.refuse(word, self.asked_model)


class BridgedAttempt(LearningAttempt):
    """An attempt at a request of an API that is translated if the provider lacks it.

    Always: `_chat` is set if, and only if, chat completions are used.
    """

    # The class of the path's capabilities, and the path's name in the log.
    capabilities: ClassVar[type[PathCapabilities]]
    shown_path: ClassVar[str]
    # The API's name in logs and metrics.
    shown_api: ClassVar[str]

    _chat: BridgedChat | None = None
    # Whether the answer to the translated request can be continued.
    _free: bool = False
    _writer: ChunkReader[Any] | None = None
    # Whether this attempt was the first to find that the provider lacks the path.
    _learning: bool = False
    # The limits that the provider has named: of the context, of an answer, and what is left for
    # this answer.
    _limit: int | None = None
    _most: int | None = None
    _left: int | None = None

    @property
    def _learned(self) -> PathCapabilities:
        # Looked up each time, since a reload makes another object.
        return self.provider.capabilities(self.capabilities)

    @property
    def bridged(self) -> bool:
        """Whether chat completions are used."""
        return self._learned.bridged or self._learning

    @property
    def _accepted(self) -> AcceptedParameters:
        """The parameters that the provider accepts for this request."""
        capabilities, model = self._capabilities, self.asked_model
        return AcceptedParameters(
            self._learnt.union(word for word in OPTIONAL if capabilities.refuses(word, model)),
            MAX_COMPLETION_TOKENS
            if MAX_TOKENS in self._learnt or capabilities.refuses(MAX_TOKENS, model)
            else MAX_TOKENS,
            capabilities.limits.get(model),
            self._most or capabilities.most.get(model),
            self._left,
            self.provider.costs.tokens_per_byte(model, self.request.caller),
        )

    def preparation(self) -> Awaitable[None] | None:
        """Return the steps that translate the request, or those of its own API.

        Raises:
            RequestNotBridged: it continues an answer that has begun in the other API:
                the provider's API was learned during the wait, or from its answer.
        """
        bridged = self.bridged
        if self.hop is not None:
            transcript = None if self.stream is None else self.stream.transcript
            if isinstance(transcript, BridgedTranscript) != bridged:
                raise RequestNotBridged(
                    "the rest of an answer cannot be translated to another API"
                )
        return self._translate() if bridged else self._own_preparation()

    @abstractmethod
    def _own_preparation(self) -> Awaitable[None] | None:
        """Return the steps that prepare a request of its own API; None if there are none."""

    async def _translate(self) -> None:
        """Translate the request, step by step.

        Raises:
            RequestNotBridged: it has no equivalent in chat completions.
        """
        self._chat = chat = await self._translated()
        outcome, meter, left_out = self.request.outcome, self.provider.meter, chat.hosted.left_out
        meter.bridged[self.shown_api].value += 1
        outcome.bridge, outcome.left_out = self.shown_api, tuple(left_out)
        if left_out:
            meter.left_out.value += len(left_out)
            self._capabilities.note_left_out(left_out)
        if self.hop is not None:
            chat.body = await self.hop.body(chat.body)
        elif self.request.keeps_body:
            self._free = await continuable(chat.body)

    @abstractmethod
    async def _translated(self) -> BridgedChat:
        """Return the request translated to a chat completion.

        Raises:
            RequestNotBridged: it has no equivalent there.
        """

    @abstractmethod
    async def _translate_answer(self, answer: Answer) -> None:
        """Translate *answer*, a whole chat completion, step by step.

        Raises:
            ProviderFault: it is not a chat completion.
        """

    def written(self, writer: RequestWriter) -> Sequence[bytes]:
        """Return the pieces to send."""
        chat = self._chat
        if chat is None:
            return super().written(writer)
        body, chat.body = chat.body, b""
        return self.request_bytes(writer, CHAT, CHAT.path, body)

    def head_received(self, status: int, headers: Mapping[str, str]) -> Sink:
        """Return the sink for the body, as `Attempt.head_received`."""
        sink = super().head_received(status, headers)
        chat = self._chat
        if chat is not None and (left_out := chat.hosted.left_out):
            shown = {LEFT_OUT: ", ".join(left_out)}
            self.request.outcome.headers = {**self.request.outcome.headers, **shown}
        return sink

    def repeats(self) -> bool:
        """Return whether the request is to be sent once more: as a chat completion, since the
        provider lacks the path, or without a parameter that it has refused.
        """
        sink = self.sink
        if self.status == 200 or not isinstance(sink, BodySink):
            return False
        chat = self._chat
        if chat is not None:
            again = self.status in STATUSES and self._learn_refusal(chat, refusal(sink.body))
        elif self._learned.absent(self.status, sink.body):
            again = self._learning = True
        else:
            again = self._refused(sink.body)
        if again:
            self._chat = None
            counted = "http_4xx" if self.status < 500 else "http_5xx"
            self.provider.meter.attempts[counted].value += 1
        return again

    def _refused(self, body: bytes) -> bool:  # noqa: ARG002 - in one API only
        """Return whether the request is to be sent once more in another form of its own API, since
        the provider has refused it with *body*.
        """
        return False

    def _learn_refusal(self, chat: BridgedChat, refusal: Refusal) -> bool:
        """Return whether the refusal named something without which the request is sent once more."""
        for word in sorted(chat.accepted - self._learnt):
            if refusal.names(word):
                if refusal.of_value:
                    self._of_value |= {word}
                return self._repeats_without(word)
        if refusal.renames and MAX_TOKENS not in self._learnt:
            return self._repeats_without(MAX_TOKENS)
        wanted = self.request.max_answer
        if LIMIT in self._learnt or wanted is None:
            return False
        if refusal.limit:
            estimated = round(MARGIN * chat.asked_tokens)
            left = refusal.limit - (estimated if refusal.asked is None else refusal.asked) - SPARE
            self._limit = refusal.limit
            self._left = left
            return MIN_LEFT <= left < wanted and self._repeats_without(LIMIT)
        if refusal.most and refusal.most < wanted:
            self._most = refusal.most
            return self._repeats_without(LIMIT)
        return False

    def _keep_learnt(self) -> None:
        super()._keep_learnt()
        capabilities, model = self._capabilities, self.asked_model
        if self._limit is not None:
            capabilities.keep_limit(model, self._limit)
        if self._most is not None:
            capabilities.keep_most(model, self._most)

    def first_event(self) -> None:
        """Note that the answer has begun."""
        learned, chat = self._learned, self._chat
        if chat is None:
            learned.found(present=True)
        else:
            for word in chat.accepted:
                self._capabilities.take(word, self.asked_model)
        if self._learning and learned.found(present=False):
            logger.info(
                "provider %s has no %s; translating requests to chat completions",
                self.provider.name,
                self.shown_path,
            )
        super().first_event()

    @property
    def parts(self) -> Parts | None:
        """The parts of a turn in the provider's events, as `Attempt.parts`."""
        return super().parts if self._chat is None else CHAT.parts

    def transcript(self) -> Transcript | None:
        """Return the transcript of a chat completion."""
        if self._chat is None:
            return super().transcript()
        if self._writer is None or not (self._free or self.request.hold == CALLS):
            return None
        return BridgedTranscript(self._writer, checked=self._free)

    def goes_on(self, transcript: Transcript) -> bool:
        """Return whether the rest can be requested here, in the API in which the answer has begun."""
        return isinstance(transcript, BridgedTranscript) == self.bridged and super().goes_on(
            transcript
        )

    @property
    def max_answer_bytes(self) -> int:
        """The most bytes of a good answer that is not streamed."""
        limit = super().max_answer_bytes
        return limit if self._chat is None else min(limit, MAX_WHOLE_BYTES)

    def conclude(self) -> Awaitable[None] | None:
        """Check the answer, and return the steps that translate it if it was not streamed.

        Raises:
            ProviderFault: as `Attempt.conclude`.
        """
        if self._chat is None:
            super().conclude()
            return None
        try:
            super().conclude()
        except ProviderFault as fault:
            if isinstance(self.sink, BodySink) and self.status >= 400:
                self._translate_fault(fault, self.sink.body)
            raise
        answer = self.answer
        if answer is not None:
            return self._translating(answer)
        self._note_reasoning()
        return None

    def _translate_fault(self, fault: ProviderFault, body: bytes) -> None:
        """Translate *fault*, the refusal of a chat completion with *body*, into the form of this
        API.
        """

    async def _translating(self, answer: Answer) -> None:
        try:
            await self._translate_answer(answer)
        except BaseException:
            self.answer = None
            raise
        self._note_reasoning()

    def _note_reasoning(self) -> None:
        if self._writer is not None and self._writer.reasoning_field:
            self._capabilities.reasoning_field = self._writer.reasoning_field


def path_absent(status: int, body: bytes) -> bool:
    """Return whether an answer with this *status* and *body* says that the path, or the method
    there, is missing.

    It may also be about the model, or another object that the request names.
    """
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
