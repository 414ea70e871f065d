"""What requests do while their provider is away: it cannot be reached, or says that it is not
ready.

A model server that restarts is away for minutes. With `when_down: wait` a request that no other
provider can answer waits in the provider's queue until it is back, for `queue_timeout` at most,
all its waits together. A trial finds out that it is back, and the requests that wait are the
trials.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aioserver.limits.deadline import Wait
from aioserver.limits.gate import BATCH_PATIENCE
from aioserver.provider_errors import CircuitOpen, ProviderFault
from aioserver.providers.breaker import TRIAL_INTERVAL
from aioserver.telemetry.outcome import NO_HEADERS

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.config import settings
    from aioserver.providers.attempt import Attempt
    from aioserver.providers.health import Health
    from aioserver.providers.queueing import ProviderGate
    from aioserver.streams.lifetime import Lifetime

# The value of `when_down` by which requests wait.
WAIT = "wait"


class Absence:
    """Keeps requests in the queue of a provider while it is away.

    Always: a request waits only while its provider is away and no attempt of it is under way. It
    waits for a client, or for one that has begun it and not read it yet.
    """

    def __init__(
        self,
        provider: settings.Provider,
        health: Health,
        gate: ProviderGate,
        clock: Callable[[], float],
        lifetime: Lifetime | None = None,
    ) -> None:
        self._settings = provider
        self._health = health
        self._gate = gate
        self._clock = clock
        self._lifetime = lifetime

    def apply(self, provider: settings.Provider) -> None:
        """Use new settings; if requests wait no longer, those that do are refused."""
        self._settings = provider
        if self._health.breaker.dead and provider.when_down != WAIT:
            self._gate.refuse_waiting(self._health.refusal)

    def waits(self, attempt: Attempt) -> bool:
        """Return whether the request of *attempt* waits, since its provider is dead and away."""
        breaker = self._health.breaker
        return (
            breaker.dead
            and breaker.unreachable
            and self._settings.when_down == WAIT
            and not attempt.fallback
            and not self._health.flagged
        )

    def refuse(self) -> None:
        """Refuse the requests that do not wait, since no attempt may start now."""
        waits = self._settings.when_down == WAIT and self._health.breaker.unreachable
        self._gate.refuse_waiting(
            self._health.refusal, fallback_only=waits and not self._health.flagged
        )

    def told_dead(self, *, unreachable: bool) -> None:
        """Learn that another instance has found the provider dead."""
        if self._health.breaker.told_dead(unreachable=unreachable):
            self.refuse()

    def told_alive(self) -> None:
        """Learn that the provider has answered another instance."""
        if self._health.breaker.told_alive():
            self._gate.resume()

    async def wait(self, attempt: Attempt, fault: ProviderFault, seconds: float) -> bool:
        """Return whether the request of *attempt*, which ended with *fault*, is to ask again and
        wait.

        If the provider is not known as dead yet, the request is parked before, outside of the
        queue, for *seconds* or more. Cancelling is safe.

        Raises:
            ProviderQueueFull: too many requests wait already.
            AioserverError: the request is refused while it is parked.
        """
        if self._settings.when_down != WAIT or attempt.fallback:
            return False
        if isinstance(fault, CircuitOpen):
            again = self._health.breaker.unreachable
        else:
            # A trial that has waited fails at no cost, if nothing can have been paid for.
            again = fault.unreachable or (
                fault.retry and attempt.rejoin and self._health.breaker.unreachable
            )
        seconds = max(seconds, TRIAL_INTERVAL)
        if attempt.began:
            # A trial that fails slowly is a part of the wait.
            attempt.waited += self._clock() - attempt.began
        batch = attempt.request.batch
        timeout = self._settings.http_client.queue_timeout * (BATCH_PATIENCE if batch else 1)
        if not again or attempt.waited + seconds >= timeout:
            return False
        await self.begin(attempt)
        try:
            if not attempt.rejoin:
                self._gate.check_room(batch=batch)
            if not self._health.breaker.dead:
                await self._park(attempt, seconds)
        except CircuitOpen:
            # It fails in another way now, and has died of it: *fault* says more than that.
            return False
        except ProviderFault as refusal:
            refusal.request_outcome = outcome = attempt.request.outcome
            # They are those of the fault before it.
            outcome.headers = NO_HEADERS
            raise
        return True

    async def begin(self, attempt: Attempt) -> None:
        """Note that the request of *attempt* waits, and that no attempt of it is under way any
        more.

        A client that leaves ends the wait from now on, and one that has left ends it here: an
        answer that nobody reads does not stand in front of others. Cancelling is safe.
        """
        stream = attempt.stream
        if stream is None or not stream.sent:
            return
        attempt.request.outcome.sent = False
        if self._lifetime is not None and self._lifetime.unsent(stream):
            # The cancellation of this very task arrives.
            await asyncio.sleep(0)

    async def _park(self, attempt: Attempt, seconds: float) -> None:
        if (bound := attempt.request.bound) is not None:
            bound.wait = Wait(f"{attempt.provider.name} is away", seconds)
        began = self._clock()
        await self._gate.park(seconds, waited=attempt.waited)
        now = self._clock()
        attempt.waited += now - began
        attempt.request.record.waited(attempt.provider.name, began, now)
