"""What a provider's guards learn from its attempts: the breaker, the pace and the queue; and how each attempt has ended.

    the head of an answer       its headers say what is left of the provider's limits
    the first event             the provider is not dead
    a refusal for its rate      nothing starts for as long as the provider asks
    the end                     well, or with a fault that the breaker hears of; the tokens that it did cost

An attempt that was sent by former settings, perhaps with another key or to another address, teaches nothing of this.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aioserver.provider_errors import ProviderFault
from aioserver.providers.queueing import FAILOVER_WAIT
from aioserver.providers.sinks import BodySink
from aioserver.providers.token_estimate import charge_difference
from aioserver.telemetry.tracer import AttemptEnd

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.provider_errors import ProviderRateLimited
    from aioserver.providers.attempt import Attempt
    from aioserver.providers.health import Health
    from aioserver.providers.outage import Absence
    from aioserver.providers.pools import Pools
    from aioserver.providers.queueing import ProviderGate


class Feedback:
    """Tells the guards of one provider how its attempts fare.

    Always: the breaker hears of the end of each trial, once.
    """

    def __init__(
        self,
        health: Health,
        gate: ProviderGate,
        pools: Pools,
        absence: Absence,
        clock: Callable[[], float],
    ) -> None:
        self._health = health
        self._gate = gate
        self._pools = pools
        self._absence = absence
        self._clock = clock

    def head_received(self, attempt: Attempt) -> None:
        """Learn from the head of an answer: *attempt* knows its status and headers now."""
        if self._outdated(attempt):
            return
        if self._gate.pace.learn(attempt.headers) and self._gate.waiting:
            self._gate.refuse_late(FAILOVER_WAIT)

    def answered(self, attempt: Attempt) -> None:
        """Learn that an answer has begun: the provider is not dead."""
        trial, attempt.trial = attempt.trial, False
        if attempt.rejoin:
            self._gate.free_room(attempt)
        if self._outdated(attempt):
            self._health.breaker.unsure(trial=trial)
            # Another trial may start now.
            self._gate.serve()
            return
        seconds = self._clock() - (attempt.request.outcome.sent_at or attempt.began)
        if self._health.answered(seconds, trial=trial):
            self._gate.resume()

    def rate_limited(self, attempt: Attempt, fault: ProviderRateLimited) -> None:
        """Start nothing for as long as the provider asks, which has refused *attempt* for its rate."""
        if not self._outdated(attempt):
            self._gate.pace.cool_down(fault.retry_after or 0.0)
            self._gate.refuse_late(FAILOVER_WAIT)

    def ended(self, attempt: Attempt, exc: BaseException | None) -> None:
        """Count an attempt that has ended, well or with *exc*, and learn from it. Its place is given back already."""
        provider, record = attempt.provider, attempt.request.record
        if attempt.expected_tokens:
            failed = exc is not None
            charge_difference(attempt, provider.settings, self._gate.pace, failed=failed)
            self._gate.serve()
        if exc is None and not attempt.answered:
            # An answer in one piece has no first event.
            attempt.first_event()
        if record.trace is not None:
            record.trace.attempt_ended(self._end_of(attempt, exc))
        trial, attempt.trial = attempt.trial, False
        outdated, attempt.pool = self._outdated(attempt), None
        exc = exc or attempt.fault
        attempts = provider.meter.attempts
        if exc is None:
            attempts["ok"].value += 1
            return
        if isinstance(exc, ProviderFault):
            if exc.attempt_outcome:
                attempts[exc.attempt_outcome].value += 1
        elif isinstance(exc, asyncio.CancelledError) and record.outcome.sent_at:
            attempts["cancelled"].value += 1
        if outdated or attempt.says_little:
            # Its fault is that of former settings, with another key or address, or of one path.
            self._health.breaker.unsure(trial=trial)
        elif self._health.attempt_failed(
            exc, attempt.began, trial=trial, answered=attempt.answered
        ):
            self._absence.refuse()
        if trial:
            # Another trial may start now.
            self._gate.serve()

    def _end_of(self, attempt: Attempt, exc: BaseException | None) -> AttemptEnd:
        provider, record, sink = attempt.provider, attempt.request.record, attempt.sink
        body = sink.body if isinstance(sink, BodySink) and attempt.status == 200 else b""
        timed = record.streamed and record.first_event_at > attempt.began
        return AttemptEnd(
            provider=provider.name,
            model=attempt.model or provider.settings.model,
            base_url=self._pools.base_url,
            began=attempt.began,
            ended=self._clock(),
            first_chunk=record.first_event_at - record.outcome.sent_at if timed else 0.0,
            status=attempt.status,
            error=exc or attempt.fault,
            usage=record.outcome.usage,
            body=body,
        )

    def _outdated(self, attempt: Attempt) -> bool:
        """Return whether *attempt* was sent by former settings, perhaps with another key or address."""
        return attempt.pool is not None and attempt.pool is not self._pools.pool
