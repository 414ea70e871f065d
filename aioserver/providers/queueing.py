"""The queue of a provider: its gate, which opens at the provider's pace, and its faults.

While the provider is dead, the gate opens for trials only.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from aioserver.limits.gate import Gate, Place
from aioserver.provider_errors import ProviderPaced, ProviderQueueFull, ProviderQueueTimeout
from aioserver.providers.pace import Pace

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.config.settings import HttpClient
    from aioserver.providers.breaker import Breaker
    from aioserver.providers.health import Health


class TrialPlace(Place):
    """A place whose attempt is a trial of a dead provider.

    Always: the breaker hears of the trial's end, also if the place is given back and nobody has taken
    the trial over.
    """

    __slots__ = ("_breaker", "_taken")

    def __init__(self, gate: Gate, breaker: Breaker) -> None:
        super().__init__(gate)
        self._breaker = breaker
        self._taken = False

    def take(self) -> None:
        """Take the trial over: the caller will tell the breaker how it ends."""
        self._taken = True

    def release(self) -> None:
        """Give the place back."""
        if not self._taken:
            self._taken = True
            self._breaker.unsure(trial=True)
        super().release()


class ProviderGate(Gate):
    """The gate of the provider *name*, which opens as the breaker of its *health* allows.

    Always: places, queue and pace follow the *limits* that were applied last.
    """

    def __init__(
        self,
        name: str,
        limits: HttpClient,
        health: Health,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._limits = limits
        self._health = health
        self.pace = Pace(
            limits.requests_per_minute,
            _burst(limits),
            clock,
            tokens_per_minute=limits.tokens_per_minute,
        )
        super().__init__(
            limits.concurrent_requests,
            queue_size=limits.queue_size,
            queue_timeout=limits.queue_timeout,
            full_error=lambda wait: ProviderQueueFull(
                f"{self._limits.queue_size} requests wait for {name} already", retry_after=wait
            ),
            timeout_error=lambda wait: ProviderQueueTimeout(
                f"no place at {name} within {self._limits.queue_timeout} s", retry_after=wait
            ),
            pace=self.pace,
            pace_error=self.paced_fault,
            clock=clock,
        )

    def paced_fault(self, wait: float) -> ProviderPaced:
        """Return the fault of a request that cannot wait the *wait* seconds until it could start."""
        limits = self._limits
        text = f"{self._name} limits our rate"
        if not self.pace.cooling:
            text = (
                f"{self._name} can take no more requests in the next {limits.queue_timeout} s: "
                f"requests_per_minute={limits.requests_per_minute}"
            )
        return ProviderPaced(text, retry_after=wait)

    def apply_limits(self, limits: HttpClient) -> None:
        """Use new limits. Places that are taken stay taken, and starts stay counted."""
        self._limits = limits
        self.pace.apply(
            limits.requests_per_minute, _burst(limits), tokens_per_minute=limits.tokens_per_minute
        )
        self.apply(
            limits.concurrent_requests,
            queue_size=limits.queue_size,
            queue_timeout=limits.queue_timeout,
        )

    def _delay(self) -> float:
        return max(super()._delay(), self._health.breaker.delay())

    def _start(self, cost: int) -> Place:
        place = super()._start(cost)
        breaker = self._health.breaker
        return TrialPlace(self, breaker) if breaker.start() else place


def _burst(limits: HttpClient) -> int:
    """Return how many requests may start at once after a rest: those of a second."""
    return min(limits.concurrent_requests, limits.requests_per_minute // 60)
