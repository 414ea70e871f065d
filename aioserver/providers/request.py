"""A request to a provider, the API that it is for, and an answer that was not streamed.

A request is made once and may be sent several times: each try of it is an `Attempt` (attempt.py).

An API is the meaning of a path below a provider's base URL, as it differs from chat completions.
The face that makes a request passes its `Api` along. The attempt, its sink, the head of the
request and the log of the answer use it, and nothing looks it up. Chat completions are `CHAT`; the
wings have the other APIs.

This file is one concept: what is asked, independent of the provider that answers.
"""

from __future__ import annotations

import asyncio
import time
from math import inf
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import msgspec

from aioserver.auth.callers import NO_CALLER
from aioserver.limits.deadline import Deadline
from aioserver.limits.fair_queue import BATCH
from aioserver.limits.resource import Ticket
from aioserver.protocol.model_body import MAX_CHOICES
from aioserver.protocol.openai import bounded, is_content, usage_of
from aioserver.protocol.parts import CHAT_PARTS, Parts
from aioserver.protocol.request_headers import AGENTS, NO_HEADERS, NO_REQUEST_OPTIONS, PREAMBLE
from aioserver.protocol.transcript import ChatTranscript
from aioserver.providers import error_mapping
from aioserver.providers.sinks import EventSink
from aioserver.streams.contracts import PLAIN_EVENTS
from aioserver.streams.fast_path import ForwardedApi
from aioserver.streams.formats import MESSAGES
from aioserver.telemetry.outcome import Outcome
from aioserver.telemetry.request_log import RequestRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from aioserver.auth.callers import Caller
    from aioserver.config import settings
    from aioserver.errors import AioserverError
    from aioserver.limits.estimate import Estimate
    from aioserver.protocol.model_body import ModelBody
    from aioserver.protocol.openai import Reading
    from aioserver.protocol.request_headers import ClientHeaders, RequestOptions
    from aioserver.protocol.transcript import PassedTranscript
    from aioserver.providers.sinks import StreamSink
    from aioserver.streams.contracts import AnswerEvents
    from aioserver.streams.formats import Format
    from aioserver.streams.store import HeldBytes
    from aioserver.streams.stream import Stream

    BodyMaker = Callable[[settings.Provider, str | None], bytes]


class Capabilities:
    """The capabilities that an API has learned about one provider: made at the first use, and anew
    after a change of the settings. Verdicts of single answers expire by *clock* (verdicts.py).
    """

    def __init__(
        self, settings: settings.Provider, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Begin with nothing but *settings*."""

    @property
    def refused_words(self) -> Collection[str]:
        """The parameters that the provider has refused."""
        return ()

    @property
    def context_limits(self) -> Mapping[str, int]:
        """The context lengths of models in tokens, by name."""
        return MappingProxyType({})

    @property
    def messages(self) -> str | None:
        """The word in `/stats` for the way in which messages are asked for; None if it is not
        about messages.
        """
        return None


class Api(ForwardedApi):
    """The API at *path*, below the base URL of a provider: chat completions, and every API that is
    asked and answered like them.

    Always: it has no state, so that one object serves every request for its path.
    """

    # Its name in a sentence, and the setting by which a provider speaks it.
    name: ClassVar[str] = "OpenAI's API"
    setting: ClassVar[str] = ""
    # Headers that are added unless the client or the settings have them; the names in lower case.
    headers: ClassVar[Mapping[str, str]] = {}
    # The members of a body that bound an answer in tokens, those that ask for several answers, and
    # whether each of several prompts gets its own answer.
    bounds: ClassVar[Sequence[str]] = ()
    choices: ClassVar[Sequence[str]] = ()
    many_prompts: ClassVar[bool] = False
    # Whether an answer costs tokens; and whether the cached tokens of a prompt count for the
    # provider's pace.
    costs: ClassVar[bool] = True
    paces_cached: ClassVar[bool] = True
    # The transcript of an answer that can be continued; None: no answer of this API can be.
    continues: ClassVar[type[PassedTranscript] | None] = None
    # How its events are told apart, of which some are held.
    parts: ClassVar[Parts] = CHAT_PARTS

    def __init__(self, path: str) -> None:
        self.path = path

    def speaks(self, provider: settings.Provider) -> bool:  # noqa: ARG002 - all speak this one
        """Return whether a provider with these settings speaks this API."""
        return True

    def allowed(self, body: ModelBody) -> tuple[int | None, int]:
        """Return the most tokens of an answer that *body* allows, None if it sets no bound, and
        the number of answers that it asks for. Members that this API does not have mean nothing.

        Of several bounds the largest counts: engines differ in which of them they obey.
        """
        choices = 1
        if body.several and (wanted := body.largest(self.choices)) is not None:
            choices = min(wanted, MAX_CHOICES)
        if self.many_prompts:
            choices *= body.prompts
        return body.largest(self.bounds), choices

    def key_headers(self, host: str, key: str) -> dict[str, str]:  # noqa: ARG002
        """Return the headers that present *key* to a provider at *host*."""
        return {"Authorization": f"Bearer {key}"}

    def sink(self, stream: Stream) -> StreamSink:
        """Return the sink that fills *stream* with the events of an answer as they come."""
        return EventSink(stream, self.content)

    def content(self, event: bytes) -> bool:
        """Return whether *event*, the data of a streamed event, is content that a person or a
        program waits for. Other events are a preamble.
        """
        return is_content(event)

    def events(self) -> AnswerEvents:
        """Return the memory for the events of an answer to come, and the form of its errors."""
        return PLAIN_EVENTS

    def messages(self, lane: str | None) -> Format:  # noqa: ARG002 - only responses have lanes
        """Return the format of its answers on a WebSocket, on the *lane* of that name."""
        return MESSAGES

    def check_status(
        self, provider: str, status: int, headers: Mapping[str, str], body: bytes
    ) -> None:
        """Raise the fault that the *status* of an answer of *provider* means.

        Raises:
            ProviderFault: it is not between 200 and 299.
        """
        error_mapping.check_status(provider, status, headers, body)

    def usage(self, content: object) -> Mapping[str, Any] | None:
        """Return the tokens that *content*, a whole answer, reports; None if it reports none."""
        usage = usage_of(content)
        return usage and bounded(usage)

    def http_status(self, error: AioserverError) -> int:
        """Return the HTTP status of *error* for a client of this API."""
        return error.http_status


class ChatApi(Api):
    """Chat completions, whose answers can be continued."""

    bounds = ("max_tokens", "max_completion_tokens")
    choices = ("n", "best_of")
    continues = ChatTranscript


class CompletionsApi(Api):
    """Completions, with an answer to each prompt."""

    bounds = ("max_tokens",)
    choices = ("n", "best_of")
    many_prompts = True


class WordlessApi(Api):
    """A path whose answers have no tokens, such as that of embeddings."""

    def allowed(self, body: ModelBody) -> tuple[int | None, int]:  # noqa: ARG002 - nothing is
        """Return that an answer has no tokens."""
        return 0, 1


CHAT = ChatApi("chat/completions")


class Loan(Protocol):
    """A client whose place others can use while its request waits for its key.

    *lent* says that others use it.
    """

    lent: bool

    def lend(self) -> None:
        """Lend the place to others.

        Raises:
            ConcurrencyExceeded: too many clients have lent their places.
        """

    def regain(self, until: float) -> asyncio.Future[None] | None:
        """Take the next free place, *until* a time of the loop's clock; return a future for that,
        None if there is no need to wait.

        Raises:
            AioserverError: the server is stopping; the future has `ServerAtCapacity` once it is
                too late.
        """


class Hold(Protocol):
    """The bytes of a client's body that count against `max_body_bytes`, as their request sees
    them.

    *given* says that the request releases them, and not the handler that has read them.
    *waited_since* is the monotonic time since which its client had waited for a place, 0.0 if it
    got one at once. Their request *arrived* at this time of the loop, with these
    *request_options*.
    """

    given: bool
    waited_since: float
    arrived: float
    request_options: RequestOptions

    @property
    def loan(self) -> Loan | None:
        """The client whose place can be lent, if any."""

    def grow(self, size: int) -> None:
        """Count another *size* bytes.

        Raises:
            ServerAtCapacity: there is no room for them.
        """

    def spare(self, let_go: Callable[[], None] | None = None) -> None:
        """Call *let_go*, once, when another body needs the room; None: no longer."""

    def shrink_to(self, size: int) -> None:
        """Count at most *size* bytes from now on."""

    def release(self) -> None:
        """Stop counting; a second call does nothing."""


class ProviderRequest:
    """A request for one answer, the same for every provider that is asked.

    Always: only its `record` and `outcome`, and the count of its answer's bytes, change from one
    attempt to the next.

    *api* decides where it goes and how its answer is read; `path` is the API's, with the *query*
    behind it. *body* makes the JSON for one provider and model, None for the provider's own; it is
    called for each attempt, and its result is not stored. *keeps_body*: `forget_body` keeps the
    body while there is room for it, since the answer may have to be continued. *hold* counts the
    client's body until `forget_body`, or `release`; *kept_bytes* of it are kept longer. *reading*
    collects the text of an answer whose log has `chunk` objects; None if the log has the
    provider's bytes. *model* is for the provider that is asked first; None: the model in its
    settings. Each provider gets those of the *client_headers* that its settings name, and the
    trace.

    *size* is the number of its bytes that are known before a body is made. *allowed* has the bound
    of an answer in tokens by the request itself, None without one, and the number of answers (its
    `max_answer` and `choices`). From these comes its `estimate`, once it is about to wait, and its
    `work`, the cost for its caller's share of a provider. *usage_options* are the `stream_options`
    for a body that does not ask for the usage (protocol/model_body.py); None: add nothing. A
    *batch* request uses what others leave, and an answer in the *background* runs to its end
    without a reader. *bound* has its deadlines, None if there are none. `hold` is what is held of a
    streamed answer; *structured*: the client asks for JSON; *continues*: a provider may generate
    the rest of the answer.
    """

    # Whether its tokens can be estimated before it starts.
    estimated = True

    def __init__(
        self,
        api: Api,
        body: BodyMaker,
        *,
        query: str = "",
        streamed: bool,
        caller: Caller = NO_CALLER,
        model: str | None = None,
        reading: Reading | None = None,
        hold: Hold | None = None,
        kept_bytes: int = 0,
        client_headers: ClientHeaders = NO_HEADERS,
        size: int = 0,
        allowed: tuple[int | None, int] = (None, 1),
        usage_options: bytes | None = None,
    ) -> None:
        self.size = size
        self.max_answer, self.choices = allowed
        self.usage_options = usage_options
        self.estimate: Estimate | None = None
        self.bound: Deadline | None = None
        self.keeps_body = self.background = self.structured = self.continues = False
        # Whether the prompt has pictures or files; None: that was not read.
        self.pictures: bool | None = None
        # The part of a streamed answer that is held, once the gateway has said it.
        self.hold = PREAMBLE
        batch = caller.batch
        if hold is not None and (request_options := hold.request_options).bounding:
            self.bound = Deadline(hold.arrived, request_options)
            batch = batch or request_options.batch
        self.api = api
        self.path = f"{api.path}?{query}" if query else api.path
        self.body = body
        self.streamed = streamed
        self.caller = caller
        self.model = model
        self.reading = reading
        self.client_headers = client_headers
        self.outcome = Outcome()
        self.record = RequestRecord(
            self.outcome,
            caller=caller,
            trace_id=client_headers.trace_id,
            path=api.path,
            batch=batch,
            streamed=streamed,
            statuses=api,
        )
        # Returns a count of the bytes of an answer that is collected without a log; and that count,
        # once such an answer has begun.
        self.hold_answer: Callable[[], HeldBytes] | None = None
        self._answer_bytes: HeldBytes | None = None
        # The ticket with which it waits, at its key and at providers.
        self.ticket = Ticket(
            caller.flow,
            caller.subflow,
            caller.priority,
            0,
            BATCH if batch else "",
            asyncio.get_running_loop().time() if hold is None else hold.arrived,
        )
        self._hold = hold
        if self.bound is not None:
            self.ticket.deadline = self.bound.next
            self.ticket.patient = self.options.patient
        self._kept_bytes = kept_bytes

    @property
    def options(self) -> RequestOptions:
        """The options in its headers."""
        return NO_REQUEST_OPTIONS if self._hold is None else self._hold.request_options

    @property
    def loan(self) -> Loan | None:
        """The place of its client, if that can be lent."""
        return None if self._hold is None else self._hold.loan

    def begin_attempt(self, provider: str, model: str) -> None:
        """Note that *provider* is asked for an answer of *model*."""
        outcome = self.outcome
        if outcome.attempts or outcome.sent_at or outcome.bridge:
            outcome.forget_attempt()
        outcome.provider, outcome.model = provider, model
        outcome.attempts += 1

    def hold_by(self, word: str) -> None:
        """Hold of the answer what the request says, or its key, or else *word*."""
        options = self.options
        word = options.hold or self.caller.hold or word
        self.hold = self.outcome.hold = options.agent if word == AGENTS else word

    def count_answer(self) -> HeldBytes | None:
        """Return the count of the bytes of an answer without a log, which all attempts share."""
        if self._answer_bytes is None and self.hold_answer is not None:
            self._answer_bytes = self.hold_answer()
        return self._answer_bytes

    def let_answer_go(self) -> None:
        """Stop counting the bytes of the answer: it was written."""
        if self._answer_bytes is not None:
            self._answer_bytes.release()

    def outlive_handler(self) -> None:
        """Note that the request goes on after the client's handler has ended: `release` is called
        then.
        """
        if self._hold is not None:
            self._hold.given = True

    async def whole_body(self, provider: settings.Provider, model: str | None) -> bytes:
        """Return the body for *provider*, built step by step, with everything that some provider
        gets by it: also what a provider that stores it gets by a name.
        """
        return self.body(provider, model)

    def replace_body(self, body: BodyMaker, size: int) -> None:
        """Send the result of *body*, of about *size* bytes, in place of what the client has sent.

        Raises:
            ServerAtCapacity: there is no room for it.
        """
        if self._hold is not None and size > self.size:
            self._hold.grow(size - self.size)
        self.body, self.size = body, max(size, self.size)

    def forget_body(self) -> None:
        """Forget the body, unless it is kept: the request was sent for the last time."""
        if not self.keeps_body:
            self.let_body_go()
        elif self._hold is not None:
            self._hold.spare(self.let_body_go)

    def spare_body(self, let_go: Callable[[], None]) -> None:
        """Have *let_go* called when another body needs the room of this one."""
        if self._hold is not None:
            self._hold.spare(let_go)

    def need_body(self) -> None:
        """Protect the kept body from making room for others: it is to be sent again."""
        if self._hold is not None:
            self._hold.spare()

    def let_body_go(self) -> None:
        """Forget the body, even if it is kept."""
        self.keeps_body = False
        self.body = _no_body
        if self._hold is not None:
            self._hold.shrink_to(self._kept_bytes)

    def release(self) -> None:
        """Release the body and all other resources: the request is over."""
        self.body = _no_body
        # The callback refers to the attempt whose wait was refused.
        self.ticket.estimate = None
        # Its last attempt may have been a trial; it does not come back.
        self.ticket.free_slot()
        if self._hold is not None:
            self._hold.release()
            self._hold = None

    @property
    def waited_since(self) -> float:
        """The monotonic time since which its client had waited for a place.

        0.0 if it has not, or that is unknown.
        """
        return 0.0 if self._hold is None else self._hold.waited_since

    @property
    def left(self) -> float:
        """The seconds until it must have started, or have its answer; inf without a deadline."""
        return inf if self.bound is None else self.bound.left

    @property
    def batch(self) -> bool:
        """Whether it uses what others leave."""
        return self.record.batch

    @batch.setter
    def batch(self, batch: bool) -> None:
        self.record.batch, self.ticket.kind = batch, BATCH if batch else ""

    @property
    def whole(self) -> bool:
        """Whether the answer is one body, passed on as the provider sent it."""
        return self.reading is None and not self.streamed


def _no_body(_provider: settings.Provider, _model: str | None) -> bytes:
    raise AssertionError("the request was sent for the last time")


class Answer(msgspec.Struct, eq=False):
    """A body that was not streamed.

    *outcome* names the provider that has given it, and the number of attempts.
    """

    status: int
    body: bytes
    content_type: str
    outcome: Outcome

    @property
    def size(self) -> int:
        """The bytes of its body; its log counts the size of its outcome."""
        return len(self.body)
