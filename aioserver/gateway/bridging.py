"""An attempt whose request is translated to a chat completion, where its provider has no other
API, and what is learned of such a provider.

A provider is known by its settings to have no such API, or by its answer: if it has no such path
the attempt goes on at once, in the same place, with the request as one for a chat completion. It
is known from then on, for five minutes after the newest such answer, if it answers that one. A 404
that is about a model is no such answer: then the path is there. Nor is any 404 of a provider that
has answered there within five minutes.

What an engine refuses by name is learned, too: a word that only the bridge has added, or a bound
of the answer for which its context has no room. The request is sent once more, at once and in its
place, without it; this is no retry. If it is answered, that is known of its model from then on, for
as long, for each bridge and for streams that pass (stream_usage.py): not before, since a refusal
may repeat what a client has written. A word that the model has taken lately, or whose refusal is
about its value, is left out of the one request alone: the value was the client's.

The wings with such an API derive their attempts from `BridgedAttempt`. This file is one concept:
what is learned of a provider, and what an attempt there makes of it.
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
from aioserver.protocol.request_options import CALLS
from aioserver.provider_errors import ProviderFault, RequestNotBridged
from aioserver.providers.api import CHAT, Capabilities
from aioserver.providers.attempt import Attempt
from aioserver.providers.sinks import BodySink
from aioserver.providers.verdicts import Verdicts

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from aioserver.config import settings
    from aioserver.protocol.bridging.chat import BridgedChat
    from aioserver.protocol.bridging.chunks import ChunkReader
    from aioserver.protocol.transcript import Transcript
    from aioserver.providers.api import Api
    from aioserver.providers.http1 import RequestWriter, Sink
    from aioserver.providers.request import Answer

logger = logging.getLogger("aioserver.providers")

# The statuses by which a provider says that it has no such path, or no such method there.
ABSENT_STATUSES = frozenset({404, 405, 501})
# Words of a 404 that is about something else than the path.
_OTHER_SUBJECTS = ("model", "resp_", "msg_")
# The header that names the hosted tools which the provider did not get.
LEFT_OUT = "x-aioserver-left-out"
# Names of tools of which a line was logged.
MAX_NAMES = 16
# Tokens of an answer below which a request is not sent once more, and those that are left between
# the two: templates add a few.
MIN_LEFT, SPARE = 256, 16


# The key of a verdict on a path: whether it is there.
_PATH = "path"


class PathCapabilities(Capabilities):
    """The knowledge of one path of a provider, from its settings and from its answers since.

    Where it has answered, a 404 is about something else, which a client may have named.
    """

    # It is never asked there; and its 404 may be that of the path.
    never = False
    learns = True

    def __init__(
        self, settings: settings.Provider, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(settings, clock)
        self._shown: Verdicts[str, bool] = Verdicts(clock)

    @property
    def lacking(self) -> bool:
        """Whether it was found to have no such path."""
        return self._shown.get(_PATH) is False

    @property
    def present(self) -> bool:
        """Whether it has answered there."""
        return self._shown.get(_PATH) is True

    def found(self, *, present: bool) -> bool:
        """Learn from an answer whether it has that path; return whether that is news."""
        return self._shown.keep(_PATH, present)

    @property
    def bridged(self) -> bool:
        """Whether it is asked for a chat completion instead."""
        return self.lacking or self.never

    def absent(self, status: int, body: bytes) -> bool:
        """Return whether an answer with *status* and *body* says that there is no such path."""
        return (
            self.learns
            and status in ABSENT_STATUSES
            and not (status == 404 and self.present)
            and path_absent(status, body)
        )


class ChatCapabilities(Capabilities):
    """The knowledge of one provider's chat completions, for every bridge to them.

    *reasoning_field* is the name of the field in which it sends its reasoning; empty if it has
    sent none. By model, *limits* and *most* have the tokens of a prompt and its answer, and of an
    answer; by word and model it is known whether that is taken.
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
        """The words that one of its models has refused."""
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
        """Return whether *model* is not sent *word*."""
        return self._accepted.get((word, model)) is False

    def take(self, word: str, model: str) -> None:
        """Learn that *model* has answered a request with *word*."""
        self._accepted.keep((word, model), value=True)

    def refuse(self, word: str, model: str) -> None:
        """Send *model* no *word* for a while, unless it has taken that lately."""
        if not self._accepted.get((word, model)) and self._accepted.keep(
            (word, model), value=False
        ):
            instead = f"{MAX_COMPLETION_TOKENS} in its place"
            self._say(instead if word == MAX_TOKENS else f"{word} is left out")

    def keep_limit(self, model: str, tokens: int) -> None:
        """Keep that *model* has room for so many *tokens* of a prompt and its answer."""
        if self.limits.keep(model, tokens):
            self._say(f"{tokens} tokens in its context")

    def keep_most(self, model: str, tokens: int) -> None:
        """Keep that an answer of *model* has so many *tokens* at most."""
        if self.most.keep(model, tokens):
            self._say(f"{tokens} tokens in an answer at most")

    def _say(self, consequence: str) -> None:
        logger.info("learned from a refusal of provider %s: %s", self.name, consequence)

    def note_left_out(self, names: Mapping[str, None]) -> None:
        """Say once of each of these hosted tools that this provider does not get it."""
        for name in names:
            if name not in self._left_out and len(self._left_out) < MAX_NAMES:
                self._left_out.add(name)
                logger.info("provider %s has no tool %s: it is left out", self.name, name)


class LearningAttempt(Attempt):
    """One try of a request that is sent once more without what its provider refuses.

    Always: others are sent it until the answer to this one has begun.
    """

    # What it has been sent once more without, and what of it was refused for its value.
    _learnt: frozenset[str] = frozenset()
    _of_value: frozenset[str] = frozenset()

    @property
    def _capabilities(self) -> ChatCapabilities:
        # Asked for anew each time, since a reload makes another.
        return self.provider.capabilities(ChatCapabilities)

    def _repeats_without(self, what: str) -> bool:
        """Note that the request is sent once more without *what*; return True."""
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
    """One try of a request of an API that is translated where the provider does not have it.

    Always: `_chat` is set if, and only if, a chat completion is asked for.
    """

    # The memory of the path of this API, and its name in the log.
    capabilities: ClassVar[type[PathCapabilities]]
    shown_path: ClassVar[str]
    # How logs and metrics name the API.
    shown_api: ClassVar[str]

    def __init__(self, *names: Any, **further: Any) -> None:
        super().__init__(*names, **further)
        self._chat: BridgedChat | None = None
        # Whether the answer of that is one which can be continued.
        self._free = False
        self._writer: ChunkReader[Any] | None = None
        # Whether the provider has said that it has no such path, and has not been asked otherwise
        # before.
        self._learning = False
        # The tokens that it has said it has: for both, for an answer, and left for this one.
        self._limit: int | None = None
        self._most: int | None = None
        self._left: int | None = None

    @property
    def _learned(self) -> PathCapabilities:
        # Asked for anew each time, since a reload makes another.
        return self.provider.capabilities(self.capabilities)

    @property
    def bridged(self) -> bool:
        """Whether a chat completion is asked for."""
        return self._learned.bridged or self._learning

    @property
    def _accepted(self) -> AcceptedParameters:
        """The words that the provider takes for this request."""
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
            RequestNotBridged: it asks for the rest of an answer that has begun in the other API:
                which of them the provider has was learned since, in the wait or by its answer.
        """
        bridged = self.bridged
        if self.hop is not None:
            transcript = None if self.stream is None else self.stream.transcript
            if isinstance(transcript, BridgedTranscript) != bridged:
                raise RequestNotBridged("the rest of an answer has no form in another API")
        return self._translate() if bridged else self._own_preparation()

    @abstractmethod
    def _own_preparation(self) -> Awaitable[None] | None:
        """Return the steps before a request of its own API; None if there are none."""

    async def _translate(self) -> None:
        """Translate the request, in steps.

        Raises:
            RequestNotBridged: it has no form in chat completions.
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
        """Return the request as one for a chat completion.

        Raises:
            RequestNotBridged: it has no form there.
        """

    @abstractmethod
    async def _translate_answer(self, answer: Answer) -> None:
        """Translate *answer*, a whole chat completion, in steps.

        Raises:
            ProviderFault: it is no chat completion.
        """

    def written(self, writer: RequestWriter) -> bytes:
        """Return the bytes to send."""
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
        """Return whether the request is to be sent once more: as one for a chat completion, since
        the provider has no such path, or without what it has refused.
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
        """Return whether the request is to be sent once more, in another form of its own API,
        since the provider has refused it with *body*.
        """
        return False

    def _learn_refusal(self, chat: BridgedChat, refusal: Refusal) -> bool:
        """Return whether something was learned, without which the request is sent once more."""
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
                "provider %s has no %s: it is translated to chat completions",
                self.provider.name,
                self.shown_path,
            )
        super().first_event()

    @property
    def answering_api(self) -> Api:
        """The API of the events that the provider sends."""
        return self.request.api if self._chat is None else CHAT

    def transcript(self) -> Transcript | None:
        """Return what keeps the answer of a chat completion."""
        if self._chat is None:
            return super().transcript()
        if self._writer is None or not (self._free or self.request.hold == CALLS):
            return None
        return BridgedTranscript(self._writer, free=self._free)

    def goes_on(self, transcript: Transcript) -> bool:
        """Return whether the rest can be asked for here: in the API in which it has begun."""
        return isinstance(transcript, BridgedTranscript) == self.bridged and super().goes_on(
            transcript
        )

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
        """Have *fault*, that of a chat completion which was refused with *body*, shown in the form
        of this API.
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
    """Return whether an answer with this *status* and *body* says that there is no such path, or
    no such method.

    It may be about the model, or another object that the request names, too.
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
