"""Continuation: another attempt generates the rest of an answer that broke off after text.

The rest is requested if all of this holds:

    the fault      has broken the answer off, and is no verdict on the request: `breaks`
    the answer     has shown text alone, perhaps after reasoning: `Transcript.text`
    the request    asks for one choice of free text, and does not end with a message of the
                   assistant, which would be a beginning by the client itself: `continuable`
    the readers    there is one, or one may come back
    the attempts   for the rest, a *hop* each, are at most MAX_HOPS

The same provider is asked first, then the others of the request's order. A provider that has gone
silent, or has broken off the rest as well, is asked last. Each is asked in its own *form*, the
setting `continuation`, which says what follows the messages of the request (`continued`):

    prefill         the assistant's message so far
    prefix          the same, with `"prefix": true` in it
    final_message   the same, and two members that vLLM and similar engines require
    instruct        the same, and a user's request for the last words and the rest

The provider's text is the rest if its seam says so (protocol/seam.py). It goes into the same log
through the same sink, rewritten as the first answer would have gone on (protocol/transcript.py).
If a hop fails before any of its output was sent, the next provider is tried. When no provider is
left, the answer ends with the fault that broke it.

Where calls are held (providers/holding.py) and the client has seen only reasoning, there is no
text to continue. The request is then sent again as it was, with any setting of `continuation`, and
the new reasoning is dropped. Held events are no part of the text so far.

This file is one concept: which answers may be continued, in which form, and by which provider.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import msgspec
import orjson
from msgspec import Raw

from aioserver.config.llm import FINAL_MESSAGE, INSTRUCT, NO_CONTINUATION, PREFIXED
from aioserver.errors import AioserverError, InvalidRequest
from aioserver.protocol import eventstream, json_body
from aioserver.protocol.eventstream import EventTooLong
from aioserver.protocol.json_body import ABSENT, null
from aioserver.protocol.model_body import Member
from aioserver.protocol.openai import BadEvent, ErrorEvent, error_codes
from aioserver.protocol.request_headers import CALLS
from aioserver.protocol.seam import (
    CLOSING,
    OPENING,
    Anchored,
    Onward,
    SeamBroken,
    anchor_of,
    provable,
)
from aioserver.protocol.steps import pause_after
from aioserver.protocol.transcript import Tokens
from aioserver.provider_errors import (
    ContextTooLong,
    ContinuationFailed,
    ProviderBadResponse,
    ProviderDisconnected,
    ProviderError,
    ProviderFault,
    ProviderRateLimited,
    ProviderRefused,
    ReadTimeout,
)
from aioserver.providers.error_mapping import FILTERS, error_in, event_fault
from aioserver.providers.request import Capabilities
from aioserver.providers.verdicts import Verdicts
from aioserver.streams import entries
from aioserver.streams.cursor import ConditionReader
from aioserver.telemetry.counters import Counter
from aioserver.telemetry.metrics import CONTINUED, FAILED
from aioserver.telemetry.outcome import Continued, comment
from aioserver.tracebacks import forget_frames

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aioserver.config import settings
    from aioserver.gateway.request import Request
    from aioserver.protocol.seam import Seam
    from aioserver.protocol.transcript import Transcript
    from aioserver.providers.attempt import Attempt
    from aioserver.providers.provider import Provider
    from aioserver.providers.request import ProviderRequest
    from aioserver.providers.sinks import StreamSink
    from aioserver.streams.stream import Stream

    # The providers that may be asked for an answer, in their order, with the model of each.
    Order = Sequence[tuple[Provider, str | None]]

# The most attempts to get the rest of one answer.
MAX_HOPS = 2
# The faults that break an answer off; a fault that is an event is excluded if it is a verdict.
BREAKS = (
    ProviderDisconnected,
    ReadTimeout,
    ProviderBadResponse,
    ProviderError,
    ProviderRateLimited,
)
WISH = (
    "Your last message was cut off. Write its last words again, exactly as they stand between "
    f"{OPENING} and {CLOSING}, and go on from there to its end, without a comment, an apology, "
    f"a heading or these brackets. {OPENING}%s{CLOSING}"
)
MESSAGES = Member("messages")
BOUNDS = Member("max_tokens"), Member("max_completion_tokens")
# The statuses of a provider that does not take the form.
REFUSALS = frozenset({400, 404, 422, 501})


class _Asked(msgspec.Struct, gc=False):
    """The members of a request that may forbid a continuation, or ask for JSON."""

    messages: Raw = ABSENT
    n: Raw = ABSENT
    logprobs: Raw = ABSENT
    top_logprobs: Raw = ABSENT
    response_format: Raw = ABSENT
    text: Raw = ABSENT
    output_config: Raw = ABSENT
    output_format: Raw = ABSENT
    structured_outputs: Raw = ABSENT
    guided_json: Raw = ABSENT
    guided_regex: Raw = ABSENT
    guided_choice: Raw = ABSENT
    guided_grammar: Raw = ABSENT
    grammar: Raw = ABSENT
    json_schema: Raw = ABSENT
    regex: Raw = ABSENT
    ebnf: Raw = ABSENT
    continue_final_message: Raw = ABSENT
    add_generation_prompt: Raw = ABSENT


# An engine's grammar begins at its own first token, so the earlier text and the rest would not fit
# together. A client that says itself how a message is continued keeps control of it.
_GRAMMARS = (
    *("output_format", "structured_outputs", "grammar", "json_schema", "regex", "ebnf"),
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar"),
)
_FORBIDDEN = (*_GRAMMARS, "continue_final_message", "add_generation_prompt")
_ASKED = msgspec.json.Decoder(_Asked)


class _Message(msgspec.Struct, gc=False):
    role: Raw = ABSENT


_MESSAGE = msgspec.json.Decoder(_Message)


class ContinuationCapabilities(Capabilities):
    """How one provider continues an answer.

    *refused* has the models for which it has refused to.
    """

    def __init__(
        self, settings: settings.Provider, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(settings, clock)
        self.refused: Verdicts[str, None] = Verdicts(clock)
        self._repeats: Verdicts[None, bool] = Verdicts(clock)

    @property
    def repeats(self) -> bool | None:
        """Whether it repeats the earlier text before it goes on; None: not known."""
        return self._repeats.get(None)

    def learn(self, *, repeats: bool) -> None:
        """Learn whether it repeats the earlier text."""
        self._repeats.keep(None, repeats)


async def continuable(body: bytes) -> bool:
    """Return whether the answer to the request in *body* is one that can be continued."""
    asked = json_body.decode(_ASKED, body, "the body")
    await pause_after(body)
    if any(not null(getattr(asked, name)) for name in _FORBIDDEN):
        return False
    try:
        n, logprobs, number = (
            _value(raw) for raw in (asked.n, asked.logprobs, asked.top_logprobs)
        )
        free = _asks_for_text(asked)
    except orjson.JSONDecodeError:
        # The body is nested too deeply to be read here.
        return False
    if not (n is None or n == 1) or logprobs or number or not free:
        return False
    messages = bytes(asked.messages)
    if not messages.startswith(b"["):
        return False
    try:
        json_body.check_values(messages)
    except InvalidRequest:
        return False
    last = json_body.elements(messages)[-1:]
    if not last or not bytes(last[0]).startswith(b"{"):
        return False
    return json_body.text(_MESSAGE.decode(last[0]).role) != "assistant"


async def structured(body: bytes) -> bool:
    """Return whether the request in *body* asks for structured output: JSON, or the words of a
    grammar.
    """
    try:
        asked = json_body.decode(_ASKED, body, "the body")
        await pause_after(body)
        if any(not null(getattr(asked, name)) for name in _GRAMMARS):
            return True
        return not _asks_for_text(asked)
    except (InvalidRequest, orjson.JSONDecodeError):
        # Its provider will report the fault.
        return False


def _asks_for_text(asked: _Asked) -> bool:
    """Return whether *asked* wants free text, as far as its formats say.

    Raises:
        orjson.JSONDecodeError: one of them is nested more deeply than is read here.
    """
    holders = _value(asked.output_config), _value(asked.text)
    formats = [holder.get("format") for holder in holders if isinstance(holder, dict)]
    return all(map(_free, (_value(asked.response_format), *formats)))


def _value(raw: Raw) -> Any:
    """Return the value that *raw* is; None if it is absent."""
    return None if raw is ABSENT else orjson.loads(memoryview(raw))


def _free(format_: object) -> bool:
    """Return whether *format_* asks for free text."""
    return format_ is None or (isinstance(format_, dict) and format_.get("type") == "text")


async def continued(body: bytes, form: str, transcript: str, tokens: int) -> bytes:
    """Return the request in *body* as one for the rest of an answer, in this *form*.

    *transcript* is the answer so far; its *tokens* are subtracted from the request's bound.

    Raises:
        InvalidRequest: the body has too many keys that may be those looked for.
    """
    for member in BOUNDS:
        if (place := member.place(body)) is not None:
            bound = json_body.count(Raw(body[place.value : place.end]))
            if bound is not None:
                left = b"%d" % max(1, bound - tokens)
                body = b"".join((body[: place.value], left, body[place.end :]))
    message: dict[str, Any] = {"role": "assistant", "content": transcript}
    if form == PREFIXED:
        message["prefix"] = True
    added = [message]
    if form == INSTRUCT:
        added.append({"role": "user", "content": WISH % anchor_of(transcript)})
    place = MESSAGES.place(body)
    assert place is not None, "`continuable` has seen them"
    end = place.end - 1
    pieces = b"".join(b",%b" % orjson.dumps(each) for each in added)
    view = memoryview(body)
    body = b"".join((view[:end], pieces, view[end:]))
    if form == FINAL_MESSAGE:
        flags = b'"continue_final_message":true,"add_generation_prompt":false'
        start = body.index(b"{") + 1
        body = b"".join((body[:start], flags, b",", memoryview(body)[start:]))
    return body


def breaks(fault: ProviderFault) -> bool:
    """Return whether *fault* has broken an answer off, and is no verdict on it."""
    return isinstance(fault, BREAKS)


def seam_of(form: str, transcript: str, capabilities: ContinuationCapabilities) -> Seam | None:
    """Return the seam of an answer that is continued in this *form*; None if it could not be
    found.
    """
    if form == INSTRUCT:
        anchor = anchor_of(transcript)
        return Anchored(anchor) if anchor else None
    if form == PREFIXED and capabilities.repeats is None and not provable(transcript):
        # Some providers repeat the beginning and others do not: the two cannot be told apart here.
        return None
    return Onward(transcript, repeats=form == PREFIXED and capabilities.repeats is True)


class Hop:
    """An attempt to get the rest of the answer in *stream* from *provider*.

    *text* is the answer so far. *fault* has broken it off, at the provider *broken*. The *seam* is
    that of the *form*, whatever a reload changes while the request waits.
    """

    def __init__(
        self,
        stream: Stream,
        transcript: Transcript,
        text: str,
        form: str,
        seam: Seam,
        provider: Provider,
        fault: ProviderFault,
        broken: Provider,
    ) -> None:
        self.seam = seam
        # If only reasoning was shown, this attempt gives the whole turn.
        self.earlier = Tokens(*stream.outcome.spent) if text else Tokens()
        self.rest = transcript.rest(self.earlier)
        # Whether any of the rest is shown, and how many events of text have come.
        self.shown = False
        self.heard = 0
        self._stream = stream
        self._text, self._events = text, transcript.events
        self._provider = provider
        self._form = form
        self._told = Continued(len(text), broken.name, provider.name, fault.code)
        self._seams = broken.meter.seams.setdefault(fault.code, Counter())

    async def body(self, body: bytes) -> bytes:
        """Return the request in *body* as one for the rest."""
        if not self._text:
            return body
        return await continued(body, self._form, self._text, self._events)

    def sink(self, attempt: Attempt, sink: StreamSink) -> SeamSink:
        """Return the sink of *attempt*, which passes the rest on to *sink*."""
        return SeamSink(self, attempt, sink, self._stream.max_bytes)

    def show(self, attempt: Attempt) -> None:
        """Note that some of the rest is about to be shown."""
        if self.shown:
            return
        stream, told = self._stream, self._told
        self.shown = True
        stream.outcome.seams = (*stream.outcome.seams, told)
        self._provider.meter.continuations[CONTINUED].value += 1
        self._seams.value += 1
        remark(attempt.request, stream, told.comment)
        attempt.first_event()

    def learn(self) -> None:
        """Learn whether the provider repeats the earlier text."""
        if isinstance(self.seam, Onward) and self.seam.repeated is not None:
            self._provider.capabilities(ContinuationCapabilities).learn(repeats=self.seam.repeated)


class SeamSink:
    """Checks the seam of an answer that is continued, and rewrites its events for the *sink* of
    the log.

    Always: nothing is shown before the seam is found.
    """

    def __init__(self, hop: Hop, attempt: Attempt, sink: StreamSink, max_bytes: int) -> None:
        self._hop = hop
        self._attempt = attempt
        self._sink = sink
        # The sink shows the parts that it is fed at once, unless the holding keeps them back.
        self._holding = attempt.holding
        self._splitter = eventstream.Splitter(max_bytes)
        # The number of events that have come.
        self.progress = 0

    def feed(self, data: bytes) -> bool:
        """Pass on what *data* brings of the rest; return False at its end.

        Raises:
            ContinuationFailed: it is not the rest.
            ProviderFault: as `StreamSink.feed`.
        """
        parts: list[bytes] = []
        more = True
        try:
            for event in eventstream.parse(self._splitter.feed(data)):
                if event.data:
                    self.progress += 1
                    self._take(event.data, parts)
        except SeamBroken as exc:
            raise ContinuationFailed(str(exc)) from exc
        except (EventTooLong, BadEvent, ErrorEvent) as exc:
            raise event_fault(exc) from exc
        finally:
            # The events before a fault pass, as if they had come in a read of their own.
            if parts:
                if self._holding is None:
                    self._hop.show(self._attempt)
                more = self._sink.feed(b"".join(parts))
        return more

    def end(self) -> None:
        """Complete the log, as `StreamSink.end`."""
        self._sink.end()

    def broken(self, fault: Exception) -> bool:
        """Return whether the answer is complete, as `StreamSink.broken`."""
        return self._sink.broken(fault)

    def fast(self) -> None:
        """Return None: every event is rewritten."""

    def _take(self, data: bytes, parts: list[bytes]) -> None:
        """Add to *parts* what may be shown of the event with this *data*."""
        rest, seam = self._hop.rest, self._hop.seam
        text, content = rest.take(data)
        self._hop.heard += bool(text)
        shown = seam.feed(text) if text else ""
        if content is not None:
            shown += seam.close()
        if shown:
            parts.append(rest.text(shown))
        if content is not None:
            parts.append(rest.event(content))


async def request_rest(
    request: Request, stream: Stream, fault: ProviderFault, order: Order
) -> None:
    """Get the rest of the answer in *stream*, which *fault* has broken off, from one of *order*.
    Cancelling ends it.

    Raises:
        ProviderFault: no provider could; it is the fault that has broken the answer off.
    """
    outcome, hops = request.provider_request.outcome, 0
    former = ""
    while True:
        broken = outcome.provider, outcome.model, outcome.headers
        # Its traceback would keep the frames of the attempt, and with them the body.
        forget_frames(fault)
        text = await _text(request, stream, fault)
        last = isinstance(fault, ReadTimeout) or broken[0] == former
        candidates = []
        if text is not None:
            candidates = _candidates(order, broken[0], last=last, anew=not text)
        former = broken[0]
        further: ProviderFault | None = None
        while candidates and further is None and hops < MAX_HOPS:
            provider, model = candidates.pop(0)
            capabilities, transcript = (
                provider.capabilities(ContinuationCapabilities),
                stream.transcript,
            )
            assert text is not None
            assert transcript is not None
            attempt = request.make_attempt(
                provider,
                request.provider_request,
                stream,
                model=model,
                fallback=bool(candidates),
                again=True,
            )
            form = attempt.form_of_rest() if text else ""
            seam = seam_of(form, text, capabilities)
            if (
                seam is None
                or not attempt.goes_on(transcript)
                or not _affordable(provider, broken[0])
            ):
                continue
            speaker = next((each for each, _ in order if each.name == broken[0]), provider)
            hop = Hop(stream, transcript, text, form, seam, provider, fault, speaker)
            attempt.hop = hop
            request.provider_request.begin_attempt(provider.name, attempt.asked_model)
            if not text:
                announce_repeat(attempt, stream, broken[0], fault.code)
            try:
                await provider.run(attempt)
            except AioserverError as failed:
                if outcome.sent_at:
                    hops += 1
                else:
                    outcome.attempts -= 1
                if hop.shown and isinstance(failed, ProviderFault):
                    further = failed
                elif outcome.sent_at:
                    provider.meter.continuations[FAILED].value += 1
                    if text and _refuses_form(failed):
                        capabilities.refused.keep(attempt.asked_model, None)
                forget_frames(failed)
            finally:
                # It refers to the attempt: the two would hold each other.
                attempt.sink = None
            hop.learn()
            if stream.ended or stream.ending is not None:
                return
        if further is None:
            outcome.provider, outcome.model, outcome.headers = broken
            raise fault
        fault = further


def remark(request: ProviderRequest, stream: Stream, data: bytes) -> None:
    """Show *data*, a comment, to the readers that get *stream* as an event stream. A comment is
    not an event.
    """
    if request.reading is None:
        stream.forward(data, 0)
    else:
        stream.append(entries.CHUNK, data=data, count=0)


def announce_repeat(attempt: Attempt, stream: Stream, broken: str, code: str) -> None:
    """Tell readers whose answers have begun, if only with heartbeats, that *attempt* asks for a
    held turn again, which the provider *broken* has broken off for the reason of this *code*.
    """
    if all(isinstance(reader, ConditionReader) for reader in stream.readers):
        return
    told = {
        "from": broken,
        "to": attempt.provider.name,
        "code": code,
        "held": stream.outcome.dropped,
    }
    remark(attempt.request, stream, comment("again", told))


def _refuses_form(fault: AioserverError) -> bool:
    """Return whether *fault* means that the provider cannot continue answers at all. A fault about
    this one answer does not: it may be too long by now, or not allowed.
    """
    return (
        isinstance(fault, ProviderRefused)
        and not isinstance(fault, ContextTooLong)
        and fault.http_status in REFUSALS
        and error_codes(error_in(fault.provider_body)).isdisjoint(FILTERS)
    )


async def _text(request: Request, stream: Stream, fault: ProviderFault) -> str | None:
    """Return the text of the answer so far, empty if it was nothing but reasoning; None if it may
    not be continued.
    """
    provider_request, transcript = request.provider_request, stream.transcript
    if (
        transcript is None
        or not breaks(fault)
        or stream.ended
        or stream.ending is not None
        or not (stream.readers or stream.window > 0)
    ):
        return None
    # The transcript must include the texts that the fast path has passed on.
    stream.close_fast_path()
    text = transcript.text()
    if text is None or not provider_request.keeps_body:
        return None
    if not text and (provider_request.hold != CALLS or provider_request.choices > 1):
        return None
    # The rest may have to wait for a place, and needs the body then.
    provider_request.need_body()
    if not text:
        return text
    route = request.route
    body = provider_request.body(route.provider.settings, route.model)
    return text if transcript.checked or await continuable(body) else None


def _candidates(
    order: Order, broken: str, *, last: bool, anew: bool
) -> list[tuple[Provider, str | None]]:
    """Return the providers that are asked for the rest, in order. The one that has *broken* off
    the answer is the first of them, or the *last*. *anew*: they are asked for the whole turn. Each
    provider can give that, and the same one is asked only if its settings allow retries.
    """
    able = [
        (provider, model)
        for provider, model in order
        if provider.settings.usable
        and provider.health.available
        and (anew or _continues(provider, model))
    ]
    same = [each for each in able if each[0].name == broken]
    if anew:
        same = [each for each in same if each[0].settings.http_client.max_retries]
    others = [each for each in able if each[0].name != broken]
    return others + same if last else same + others


def _continues(provider: Provider, model: str | None) -> bool:
    """Return whether *provider* goes on with an answer of *model*, as far as we know."""
    return (
        provider.settings.continuation != NO_CONTINUATION
        and (model or provider.settings.model)
        not in provider.capabilities(ContinuationCapabilities).refused
    )


def _affordable(provider: Provider, broken: str) -> bool:
    """Return whether *provider* may be asked for the rest, by its retry budget: as a retry if its
    own answer has *broken* off, as a failover otherwise.
    """
    if provider.name != broken:
        provider.budget.add_request()
        return True
    if provider.budget.take_retry():
        return True
    provider.meter.retries_refused.value += 1
    return False
