"""The costs of attempts at one provider, in tokens and work: estimated before they start, and as
the provider has counted them at their end.

If a provider reports no usage, or an answer was cut, its cost is estimated, too. The estimates
learn from reported usage. Each attempt that was sent has its cost in the outcome of its request,
and in the ledger.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING

from aioserver.limits.estimate import OUTPUT_FACTOR, UNKNOWN_WORK
from aioserver.protocol.tokens import MAX_TOKENS, TOTAL, several, tier_of, tokens_of
from aioserver.providers.sinks import BodySink, StreamSink
from aioserver.telemetry.bookkeeping import bookkeeping, nothing
from aioserver.telemetry.outcome import COUNTED, ESTIMATE, MIXED, NOBODY, PROVIDER, AttemptCost
from aioserver.usage.accounting import CANCELLED, CUT, FAILED, OK

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.auth.callers import Caller
    from aioserver.limits.estimate import Estimate, Estimates
    from aioserver.providers.attempt import Attempt
    from aioserver.providers.capacity import Capacity
    from aioserver.providers.request import ProviderRequest
    from aioserver.telemetry.bugs import Bugs
    from aioserver.usage.accounting import Usage

# From this status on there is no answer, and no cost.
MIN_ERROR_STATUS = 400


class Costs:
    """The costs of attempts at the provider *name*.

    Always: an attempt that was sent, and not refused, is counted once, at its end.
    """

    def __init__(
        self,
        name: str,
        capacity: Capacity,
        usage: Usage,
        estimates: Estimates,
        clock: Callable[[], float],
    ) -> None:
        self._name, self._capacity, self._clock = name, capacity, clock
        self._usage, self._estimates = usage, estimates

    @property
    def bugs(self) -> Bugs:
        """The counter of the server's bugs."""
        return self._usage.bugs

    def estimate(self, request: ProviderRequest, model: str) -> Estimate:
        """Return the estimated cost of *request*, which is about to wait, if it is asked for
        *model*; store the estimate in it.
        """
        estimate = request.estimate = self._before(request, model, request.size)
        if request.estimated:
            request.ticket.work = estimate.work
        return estimate

    def _before(self, request: ProviderRequest, model: str, size: int) -> Estimate:
        return self._estimates.before(
            self._name, model, request.caller.flow, size, request.max_answer, request.choices
        )

    def tokens_per_byte(self, model: str, caller: Caller | None = None) -> float:
        """Return the estimated tokens of a prompt for each byte of a request of *caller* for
        *model*; *caller* None: of any request.
        """
        flow = None if caller is None else caller.flow
        return self._estimates.tokens_per_byte(self._name, model, flow)

    def expected_tokens(self, attempt: Attempt, limit: int) -> int:
        """Return the estimated tokens by which *attempt* will count for the pace of *limit* tokens
        a minute.
        """
        request = attempt.request
        if not request.estimated:
            return 0
        estimate = request.estimate or self.estimate(request, attempt.asked_model)
        prompt = estimate.prompt if request.api.paces_cached else estimate.uncached
        # At most a minute's worth: a body with a picture has far fewer tokens than its bytes
        # suggest.
        return min(prompt + estimate.answer, limit)

    def sent(self, attempt: Attempt) -> None:
        """Record in the ledger that *attempt* was sent: from here on it may cost money."""
        if attempt.request.api.costs:
            self._usage.sent(attempt.request.record, partial(self.so_far, attempt))

    @bookkeeping(nothing)
    def count(self, attempt: Attempt, exc: BaseException | None) -> AttemptCost | None:
        """Return the cost of *attempt*, which has ended, well or with *exc*, and record it in the
        outcome; None if there is no cost.
        """
        request = attempt.request
        outcome = request.outcome
        if not outcome.sent_at or attempt.status >= MIN_ERROR_STATUS or not request.api.costs:
            return None
        cost = self.so_far(attempt, exc)
        outcome.costs += (cost,)
        if cost.source in COUNTED and not several(outcome.usage):
            whole = None
            if exc is None and cost.source == PROVIDER and attempt.hop is None:
                whole = cost.tokens_out
            self._estimates.learn(
                self._name,
                cost.model,
                request.caller.flow,
                attempt.text_bytes,
                cost.tokens_in,
                cost.tokens.cached or 0,
                whole,
                0 if attempt.stream is None else _events(attempt),
                request.max_answer,
                request.choices,
            )
        return cost

    def ended(self, attempt: Attempt, cost: AttemptCost | None) -> None:
        """Record in sums and ledger that *attempt* has ended at *cost*, None if there is no cost.
        Its place was given back already.
        """
        if cost is None:
            self._usage.refused(attempt.request.record)
        else:
            self._usage.ended(attempt.request.record, cost)

    def so_far(self, attempt: Attempt, exc: BaseException | None = None) -> AttemptCost:
        """Return the cost of *attempt*, which has ended, well or with *exc*, or may still run."""
        request, hop = attempt.request, attempt.hop
        outcome, first = request.outcome, request.record.first_event_at
        tokens = tokens_of(outcome.usage)
        asked, answered = tokens.prompt, tokens.answer
        if hop is not None:
            # The usage includes the earlier attempts.
            asked = None if asked is None else max(0, asked - hop.earlier.asked)
            answered = None if answered is None else max(0, answered - hop.earlier.answered)
        result, source = OK, PROVIDER
        if exc is not None:
            result = _ended_as(attempt, exc)
        uncached = 0 if asked is None else asked - (tokens.cached or 0)
        if asked is None or answered is None:
            if request.estimated:
                source, estimate = MIXED, self._unreported(attempt, result)
                if asked is None:
                    source, asked, uncached = ESTIMATE, estimate.prompt, estimate.uncached
                answered = estimate.answer if answered is None else answered
            elif asked is None:
                source, asked, answered, uncached = NOBODY, 0, 0, UNKNOWN_WORK
            else:
                # The model has written nothing.
                answered = 0
        work = uncached + OUTPUT_FACTOR * answered
        began = outcome.sent_at
        return AttemptCost(
            self._name,
            outcome.model,
            result,
            asked,
            answered,
            source,
            tokens,
            self._capacity.waited(request.ticket),
            first - began if first > began else 0.0,
            self._clock() - began,
            work if work > 0 else 1,
            tier_of(outcome.usage),
        )

    def _unreported(self, attempt: Attempt, result: str) -> Estimate:
        """Return an estimate of the cost of *attempt*, with this *result* or so far."""
        request, model = attempt.request, attempt.request.outcome.model
        estimate = request.estimate
        if estimate is None or attempt.hop is not None:
            estimate = self._before(request, model, attempt.body_bytes)
        if not attempt.streamed and result != FAILED:
            # It is not known how much of the answer the model has written.
            return estimate
        return self._estimates.unreported(
            self._name, model, request.caller.flow, estimate, _events(attempt)
        )


def paced_tokens(attempt: Attempt, cost: AttemptCost | None) -> int:
    """Return the tokens by which *attempt*, which has ended at *cost*, counts for the pace."""
    outcome, hop = attempt.request.outcome, attempt.hop
    if cost is None:
        # A refusal counts as the tokens of its prompt, unless the provider says otherwise.
        estimate = attempt.request.estimate
        if estimate is None or not outcome.sent_at:
            return 0
        return min(estimate.prompt, attempt.expected_tokens)
    if cost.source != MIXED and hop is None and outcome.usage is not None:
        total = outcome.usage.get(TOTAL)
        if isinstance(total, int) and 0 <= total < MAX_TOKENS:
            return total
    cached = 0 if attempt.request.api.paces_cached else cost.tokens.cached or 0
    return cost.tokens_in - cached + cost.tokens_out


def _events(attempt: Attempt) -> int:
    """Return the number of streamed events that *attempt* has received."""
    stream, hop = attempt.stream, attempt.hop
    if stream is None or not attempt.streamed:
        return 0
    # The last event of the log is not the provider's.
    events = stream.last - attempt.before - stream.ended
    # Events that are held, or were dropped, were paid for.
    if isinstance(attempt.sink, StreamSink):
        events += attempt.sink.kept_pieces
    elif attempt.holding is not None:
        events += attempt.holding.unseen
    # Events of a continuation that were not shown were paid for as well.
    return events if hop is None else max(events, hop.heard)


def _ended_as(attempt: Attempt, exc: BaseException) -> str:
    """Return how *attempt* has ended, with *exc*."""
    stream, sink, hop = attempt.stream, attempt.sink, attempt.hop
    if isinstance(exc, asyncio.CancelledError):
        ours = stream is not None and stream.cancel_reason is not None
        bound = attempt.request.bound
        return CUT if ours or (bound is not None and bound.cut) else CANCELLED
    begun = attempt.answered or (isinstance(sink, BodySink) and sink.progress > 0)
    begun = begun or (hop is not None and hop.heard > 0)
    return CUT if begun else FAILED
