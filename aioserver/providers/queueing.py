"""The queue of a provider: its gate, which opens at the provider's pace, and its faults."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aioserver.limits.gate import Gate
from aioserver.provider_errors import ProviderPaced, ProviderQueueFull, ProviderQueueTimeout
from aioserver.providers.pace import Pace

if TYPE_CHECKING:
    from aioserver.config.settings import HttpClient


class ProviderGate(Gate):
    """The gate of the provider *name*.

    Always: places, queue and pace follow the *limits* that were applied last.
    """

    def __init__(self, name: str, limits: HttpClient) -> None:
        self._name = name
        self._limits = limits
        self.pace = Pace(
            limits.requests_per_minute, _burst(limits), tokens_per_minute=limits.tokens_per_minute
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


def _burst(limits: HttpClient) -> int:
    """Return how many requests may start at once after a rest: those of a second."""
    return min(limits.concurrent_requests, limits.requests_per_minute // 60)
