"""One request for an answer, from its admission to its end: its times, its gaps, its log line.

A record is made when the request was parsed, and accompanies it: gateway, provider, stream and
writers write what happens into the record. When the request has ended, the request log adds the
record to the metrics and writes one line. Requests that are refused for now are warnings, and
thinned out.

The longest gap of an answer is measured for each of three causes, so that its line shows why it
stuttered: the provider sent nothing, we were late, or the client read nothing.

This file is one concept: a record, and its use at the end.
"""

from __future__ import annotations

import logging
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from aioserver.auth.callers import NO_CALLER, Caller
from aioserver.errors import AioserverError, SlowClient, TokensExceeded
from aioserver.telemetry import logs
from aioserver.telemetry.bookkeeping import bookkeeping, nothing
from aioserver.telemetry.counters import Counter
from aioserver.telemetry.ended_requests import MAX_NAME, MAX_PARTS, EndedRequests
from aioserver.telemetry.loop_lag import THRESHOLD
from aioserver.telemetry.metrics import CANCELLED, CLIENT_LEFT, OK, Metrics
from aioserver.telemetry.outcome import COUNTED, MIXED, NOBODY, PROVIDER, RESCUED, Outcome
from aioserver.telemetry.tracer import RequestEnd, RequestTrace

if TYPE_CHECKING:
    from aioserver.telemetry.bugs import Bugs
    from aioserver.telemetry.ended_requests import End
    from aioserver.telemetry.loop_lag import LoopLag
    from aioserver.telemetry.outcome import GroupStart
    from aioserver.telemetry.tracer import Tracer

logger = logging.getLogger("aioserver.requests")

# Faults and continuations in a log line: the last ones.
NEWEST = 5


class Statuses(Protocol):
    """The HTTP statuses of errors, as the clients of one API know them (providers/request.py)."""

    def http_status(self, error: AioserverError) -> int:
        """Return the HTTP status of *error*."""


class RequestRecord(msgspec.Struct, eq=False):
    """The times, counts and gaps of one request.

    Times are of the monotonic clock, and 0.0 before the event has happened:

        admitted_at     the request was admitted and parsed
        queued_at       the request asked for a place at its provider, for the first time
        first_event_at  the first content of its answer was there

    Durations are in seconds:

        door            its client waited for a place in front of the handlers
        key_wait        spent in the queue of the caller's key
        queue_wait      spent in queues of providers, over all attempts
        connecting      spent on new connections to providers, over all attempts
        prefill         from the sending of the request to the first content of the answer
        silence         the longest time between two reads of the provider, or from the last one
                        to the end: from the first content on, or of an attempt that got none; it
                        ended at *silence_end*, in the time of the event loop
        delay           the longest time that an event which had been read waited for us
        client_stall    the longest time that the client read nothing

    *outcome* has the provider that was asked, and the result there. *key_place* is the position in
    the queue of the caller's key in which the request began to wait, and the length of that queue.
    """

    outcome: Outcome = msgspec.field(default_factory=Outcome)
    face: str = ""
    request_id: str = ""
    caller: Caller = NO_CALLER
    # The name in `llm.models` by which the model was requested, if any.
    group: str = ""
    # The id of its trace (W3C Trace Context), the client's or a new one, 32 hex digits; "" if it
    # has none.
    trace_id: str = ""
    # The notes from which spans are made, and by which attempts are counted; None without either.
    trace: RequestTrace | None = None
    # The method and the path of a request that is passed on as it is, without its query.
    target: str = ""
    # The path below a provider's base URL, and whether the request uses what others leave.
    path: str = ""
    batch: bool = False
    admitted_at: float = 0.0
    queued_at: float = 0.0
    first_event_at: float = 0.0
    queue_wait: float = 0.0
    door: float = 0.0
    key_wait: float = 0.0
    key_place: tuple[int, int] = (0, 0)
    connecting: float = 0.0
    prefill: float = 0.0
    silence: float = 0.0
    silence_end: float = 0.0
    delay: float = 0.0
    client_stall: float = 0.0
    # Events of the answer, without those that open and end the stream.
    events: int = 0
    # Whether the request was cancelled because its answer had no reader any more.
    abandoned: bool = False
    # Whether its last reader was dropped, since it read too slowly.
    slow_client: bool = False
    # Whether the answer comes as events, while the model makes them.
    streamed: bool = False
    # None: each error has its own.
    statuses: Statuses | None = None
    # The log that counts the first content of the answer when it comes; None if it is not counted.
    log: RequestLog | None = None

    def answered(self, now: float) -> None:
        """Note that the first content of the answer has come *now*; it counts at once, and of
        several attempts that of the first.
        """
        if self.first_event_at:
            return
        self.first_event_at = now
        self.prefill = now - self.outcome.sent_at if self.outcome.sent_at else 0.0
        # Silences before the answer do not count: in a head, between comments, in a failed attempt.
        self.silence = 0.0
        if self.log is not None:
            self.log.count_first_token(self)

    def silent(self, since: float, until: float) -> float:
        """Note a silence of the provider, in the loop's time; return the longest so far."""
        if until - since > self.silence:
            self.silence, self.silence_end = until - since, until
        return self.silence

    def waited(self, provider: str, began: float, until: float) -> None:
        """Note a wait in the queue of *provider*; both times are of the clock of the queue."""
        self.queue_wait += until - began
        if self.trace is not None:
            self.trace.waited(provider, began, until)

    def note_bug(self, bug: Exception) -> None:
        """Count *bug*, one of ours that was logged: one client of this request has met it."""
        if self.log is not None:
            self.log.metrics.bugs.note(bug)


def _status(error: AioserverError, statuses: Statuses | None) -> int:
    return error.http_status if statuses is None else statuses.http_status(error)


# The record of a stream without a request: its notes are not shown.
NO_RECORD = RequestRecord()


class RequestLog:
    """Counts, logs and remembers each request that has ended; *tracer* is None if no spans are
    made. *ended* has the last ones.
    """

    def __init__(self, metrics: Metrics, lag: LoopLag, tracer: Tracer | None = None) -> None:
        self.metrics = metrics
        self.ended = EndedRequests(_described)
        self.tracer = tracer
        self._lag = lag

    @property
    def bugs(self) -> Bugs:
        """The counter of the server's bugs."""
        return self.metrics.bugs

    @bookkeeping(nothing)
    def count_first_token(self, record: RequestRecord) -> None:
        """Count the time to the first content of the answer, from admission and from sending."""
        metrics, first = self.metrics, record.first_event_at
        from_admission, from_sending = first - record.admitted_at, first - record.outcome.sent_at
        metrics.faces[record.face].first_token.observe(from_admission)
        metrics.recent_first_tokens.add(first, from_admission)
        provider = metrics.providers[record.outcome.provider]
        provider.first_token.observe(from_sending)
        provider.recent_first_tokens.add(first, from_sending)

    @bookkeeping(nothing)
    def finish(
        self, record: RequestRecord, error: BaseException | None, *, cancelled: bool = False
    ) -> None:
        """Count and log *record*, whose request ended well, with *error*, or *cancelled*."""
        metrics, asked, now = self.metrics, record.outcome, monotonic()
        if asked.turn_read is not None:
            asked.find_loss()
        if (lost := asked.cache_lost) is not None:
            losses = metrics.providers[asked.provider].cache_lost
            losses.setdefault(lost.verdict, Counter()).value += lost.tokens
        code, outcome, status = "", OK, 200
        if error is not None:
            public = error if isinstance(error, AioserverError) else None
            code = public.code if public else "internal_error"
            outcome = public.outcome if public else "internal_error"
            status = _status(public, record.statuses) if public else 500
            if public and outcome == "rejected":
                metrics.rejections[code].value += 1
                public.counted = True
            if isinstance(error, TokensExceeded):
                metrics.count_budget_refusal(record.caller.label, error)
        elif cancelled:
            outcome, status = (CLIENT_LEFT if record.abandoned else CANCELLED), 499
            if record.abandoned and record.slow_client:
                code, outcome = SlowClient.code, SlowClient.outcome
        metrics.requests[record.face, asked.provider, code, outcome].value += 1
        metrics.outcomes[outcome].value += 1
        if record.key_wait:
            metrics.key_wait.observe(record.key_wait)
        face, provider = metrics.faces[record.face], metrics.providers[asked.provider]
        face.duration.observe(now - record.admitted_at)
        if queued_at := record.queued_at:
            face.overhead.observe(queued_at - record.admitted_at)
            if record.queue_wait:
                provider.wait.observe(record.queue_wait)
            else:
                provider.wait.observe_none()
        if record.first_event_at and record.events > 1:
            provider.interval.observe((now - record.first_event_at) / (record.events - 1))
            self._count_gaps(record, now)
        elif record.silence > THRESHOLD:
            self._count_gaps(record, now)
        if (start := asked.start) is not None:
            if asked.attempts:
                self._count_start(start, asked, now)
            else:
                # The request was refused while it waited.
                asked.start = None
        if asked.held_for is not None and not cancelled:
            turn = asked.turn(lost=error is not None)
            metrics.held_turns[asked.hold, turn].value += 1
            for name, cut in asked.cuts if turn == RESCUED else ():
                metrics.providers[name].rescued.setdefault(cut, Counter()).value += 1
        if record.trace is not None:
            record.trace.ended(_end_of(record, now, code, outcome, status))
        end = record, now, code, outcome, status
        if outcome == "rejected":
            if (left_out := metrics.refusal_lines.allow(code)) is not None:
                logs.write(
                    logger, logging.WARNING, "request finished", _fields_of(*end) | left_out
                )
        elif logger.isEnabledFor(logging.INFO):
            # One line cannot show the costs of several attempts.
            for part in _parts_of(record) if len(asked.costs) > 1 else ():
                logs.write(logger, logging.INFO, "attempt finished", part)
            logs.write(logger, logging.INFO, "request finished", _fields_of(*end))
        self.ended.keep(record.caller.name, record.request_id, end)
        # A log refers to the outcome for its window; the usage is no longer needed.
        asked.usage = None

    def _count_gaps(self, record: RequestRecord, now: float) -> None:
        """Count the longest gap of each side, after subtracting our own lag from the provider's."""
        metrics, lag, end = self.metrics, self._lag, record.silence_end
        if record.silence > THRESHOLD:
            ours = lag.before(end, end - record.silence)
            # Not below 0: the lag is a sum of floats, and may exceed the silence by its rounding.
            record.silence = max(0.0, record.silence - ours)
        silence, provider = record.silence, metrics.providers[record.outcome.provider]
        provider.gap.observe(silence)
        provider.recent_silences.add(now, silence)
        if not record.first_event_at:
            # There was no event that we or the client could delay.
            return
        delay, stall = max(record.delay, lag.longest(record.first_event_at)), record.client_stall
        record.delay = delay
        delays, recent = metrics.delay, metrics.recent_delays
        delays["ours"].observe(delay)
        recent["ours"].add(now, delay)
        if stall:
            delays["client"].observe(stall)
        else:
            delays["client"].observe_none()
        recent["client"].add(now, stall)

    def _count_start(self, start: GroupStart, outcome: Outcome, now: float) -> None:
        """Count a request by *start*, and the known and cached parts of its prompt."""
        meter = self.metrics.groups[start.group]
        meter.starts[start.provider, start.home].value += 1
        if start.size:
            meter.known.add(now, start.known, start.size)
        cost = outcome.costs[-1] if outcome.costs else None
        if cost is not None and cost.provider == start.provider and cost.source in COUNTED:
            meter.cached[start.provider].add(now, cost.tokens.cached, cost.tokens_in)


def _described(end: End[RequestRecord]) -> dict[str, Any]:
    """Return the fields of all log lines of a request that has ended."""
    return {**_fields_of(*end), "parts": _parts_of(end[0])[-MAX_PARTS:]}


def _parts_of(record: RequestRecord) -> list[dict[str, Any]]:
    """Return the cost of each attempt, as fields of a log line."""
    return [
        {
            "request_id": record.request_id[:MAX_NAME],
            **({"caller": record.caller.name} if record.caller.name else {}),
            "attempt": number,
            "provider": cost.provider,
            "model": cost.model[:MAX_NAME],
            "outcome": cost.outcome,
            "tokens_in": cost.tokens_in,
            "tokens_out": cost.tokens_out,
            "estimated": cost.estimated,
        }
        for number, cost in enumerate(record.outcome.costs, 1)
    ]


def _fields_of(
    record: RequestRecord, now: float, code: str, outcome: str, status: int
) -> dict[str, Any]:
    """Return the fields of the log line of a request, which has ended *now*."""
    fields: dict[str, Any] = {
        "request_id": record.request_id[:MAX_NAME],
        "face": record.face,
        "provider": record.outcome.provider,
        "model": record.outcome.model[:MAX_NAME],
        "status": status,
        "outcome": outcome,
        "duration_ms": _ms(now - record.admitted_at),
        "wait_ms": _ms(record.queue_wait),
        "attempts": record.outcome.attempts,
    }
    if record.caller.name:
        fields["caller"] = record.caller.name
    if record.batch:
        fields["class"] = "batch"
    if record.key_wait:
        fields["key_wait_ms"] = _ms(record.key_wait)
        fields["key_place"], fields["key_waiting"] = record.key_place
    waits = {
        "door_ms": record.door,
        "connect_ms": record.connecting,
        "prefill_ms": record.prefill,
    }
    fields |= {name: _ms(seconds) for name, seconds in waits.items() if seconds}
    if record.target:
        fields["target"] = record.target[:MAX_NAME]
    if (start := record.outcome.start) is not None:
        fields |= {"group": start.group, "home": start.home}
    elif record.group:
        fields["group"] = record.group
    if record.trace_id:
        fields["trace_id"] = record.trace_id
    if code:
        fields["code"] = code
    if record.first_event_at:
        fields["first_token_ms"] = _ms(record.first_event_at - record.admitted_at)
    gaps = {
        "provider_gap_ms": record.silence,
        "our_gap_ms": record.delay,
        "client_gap_ms": record.client_stall,
    }
    fields |= {name: _ms(seconds) for name, seconds in gaps.items() if seconds > THRESHOLD}
    if record.outcome.costs:
        fields |= _bill(record.outcome)
    if record.outcome.seams:
        fields["seams"] = len(record.outcome.seams)
        fields["continued"] = [seam.described() for seam in record.outcome.seams[-NEWEST:]]
    if record.outcome.faults:
        fields["faults"] = [
            {
                "provider": fault.provider,
                "code": fault.code,
                "at_ms": _ms(fault.began - record.admitted_at),
                "ms": _ms(fault.ended - fault.began),
            }
            for fault in record.outcome.faults[-NEWEST:]
        ]
    if (held_for := record.outcome.held_for) is not None:
        fields |= {"hold": record.outcome.hold, "held_ms": _ms(held_for)}
    if record.outcome.bridge:
        fields |= _bridged(record.outcome)
    if (lost := record.outcome.cache_lost) is not None:
        fields["cache_lost"] = lost.verdict
        if lost.tokens:
            fields |= {"cache_lost_at": lost.at} if lost.at else {}
            fields["cache_lost_tokens"] = lost.tokens
    if record.outcome.hooks:
        fields["hook"] = ",".join(record.outcome.hooks)
    return fields


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)


def _bridged(outcome: Outcome) -> dict[str, object]:
    """Return the fields of a request that was translated."""
    fields: dict[str, object] = {"bridge": outcome.bridge}
    if outcome.left_out:
        fields["left_out"] = list(outcome.left_out)
    if outcome.learnt:
        fields["learnt"] = list(outcome.learnt)
    return fields


def _bill(outcome: Outcome) -> dict[str, object]:
    """Return the token fields of a log line for all attempts, as far as they are known."""
    asked = answered = reasoning = 0
    cached: int | None = None
    source = ""
    for cost in outcome.costs:
        if cost.source == NOBODY:
            continue
        asked += cost.tokens_in
        answered += cost.tokens_out
        reasoning += cost.tokens.reasoning
        if cost.tokens.cached is not None:
            cached = (cached or 0) + cost.tokens.cached
        source = cost.source if source in {"", cost.source} else MIXED
    if not source:
        return {}
    fields: dict[str, object] = {"tokens_in": asked, "tokens_out": answered}
    if cached is not None:
        fields["cached_tokens"] = cached
    if reasoning:
        fields["reasoning_tokens"] = reasoning
    if source != PROVIDER:
        fields["tokens_source"] = source
    return fields


def _end_of(record: RequestRecord, now: float, code: str, outcome: str, status: int) -> RequestEnd:
    return RequestEnd(
        request_id=record.request_id,
        face=record.face,
        target=record.target,
        provider=record.outcome.provider,
        caller=record.caller.name,
        streamed=record.streamed,
        admitted_at=record.admitted_at,
        first_event_at=record.first_event_at,
        ended_at=now,
        queue_wait=record.queue_wait,
        attempts=record.outcome.attempts,
        code=code,
        outcome=outcome,
        status=status,
    )
