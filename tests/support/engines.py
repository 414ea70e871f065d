"""Providers whose exchange is a wait in virtual time, for tests of groups."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from aioserver.config import settings
from aioserver.providers.provider import Provider
from tests.support.outage import JSON
from tests.support.schedulers import scheduler
from tests.support.scripted_provider import LIMITS

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.gateway.router import Router
    from aioserver.provider_errors import ProviderFault
    from aioserver.providers.attempt import Attempt


class Engine(Provider):
    """A provider that answers in *seconds*, or as *fault* says for a model."""

    def __init__(self, name: str, places: int = 1, **changes: Any) -> None:
        limits = {
            "max_retries": 0,
            "backoff_factor": 1.0,
            "queue_size": 10,
            "queue_timeout": 60.0,
            "max_connections": 20,
            **changes.pop("limits", {}),
        }
        entry = settings.Provider(
            name=name,
            base_url="http://127.0.0.1:9/v1",
            model=f"{name}-model",
            http_client=replace(LIMITS, concurrent_requests=places, **limits),
            **changes,
        )
        self._time = asyncio.get_running_loop().time
        super().__init__(
            entry,
            entry.base_url,
            max_response_bytes=1000,
            clock=self._time,
            scheduler=scheduler(),
        )
        self.seconds = 1.0
        self.fault: Callable[[str], ProviderFault | None] = lambda _model: None
        # The models that were asked for, with the time.
        self.asked: list[tuple[str, float]] = []
        self.most = self.running = 0

    async def exchange(self, attempt: Attempt) -> None:
        model = attempt.model or self.settings.model
        self.asked.append((model, self._time()))
        attempt.pool = self.pools.pool
        attempt.sending()
        attempt.request.outcome.sent_at = self._time()
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(self.seconds)
        finally:
            self.running -= 1
        if (fault := self.fault(model)) is not None:
            raise fault
        attempt.head_received(200, JSON).feed(b"{}")


def nothing_is_held(router: Router) -> None:
    for provider in router.providers.values():
        stats = provider.stats().queue
        assert (stats.inside, stats.waiting) == (0, 0)
    for known in router.groups.values():
        assert known.waiting == 0
