"""Who is asked, by name: the providers of the configuration, and how they change while answers run.

One that stays is the same object, whatever changes in it. One that is taken out lets nobody in, ends
what is under way, and is closed; where it comes back before that, it is the same object again, so that
its places are counted once.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from aioserver.providers.provider import Provider

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aioserver.config import settings
    from aioserver.telemetry.metrics import Metrics

logger = logging.getLogger("aioserver.providers")


class Roster:
    """Owns every provider.

    Always: `providers` are those of the settings applied last, in their order; each other one has a
    task, which closes it when its last answer has ended. `close` closes them all.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._providers: dict[str, Provider] = {}
        self._leaving: dict[Provider, asyncio.Task[None]] = {}
        self._stack = AsyncExitStack()
        self._simulated = ""  # the simulator's address; empty: it was not wanted yet

    @property
    def providers(self) -> Mapping[str, Provider]:
        """All that are configured, by name."""
        return self._providers

    async def prepare(self, llm: settings.Llm) -> None:
        """Start what *llm* needs beside the providers themselves: the simulator, for `simulated`.

        It stays when nobody needs it any more, until the roster is closed.
        """
        if self._simulated or not any(given.simulated for given in llm.providers.values()):
            return
        from aioserver.providers.simulator.server import Simulator  # noqa: PLC0415 - start-up time

        simulator = await self._stack.enter_async_context(Simulator(keep=0))
        self._simulated = simulator.base_url

    def apply(self, llm: settings.Llm, *, max_response_bytes: int) -> None:
        """The providers are those of *llm* from now on, for which all is prepared.

        Raises:
            ConfigurationError: a `ca_file` holds no certificate; nothing has changed then.
        """
        self._metrics.apply(llm.providers)
        found: dict[str, Provider] = {}
        changes: list[Callable[[], None]] = []
        told: list[Provider] = []
        for name, given in llm.providers.items():
            base_url = self._simulated if given.simulated else given.base_url
            provider = self._known(name)
            if provider is not None:
                change = provider.prepare(given, base_url, max_response_bytes=max_response_bytes)
                changes.append(change)
                if provider.settings != given:
                    told.append(provider)
            else:
                provider = Provider(
                    given,
                    base_url,
                    max_response_bytes=max_response_bytes,
                    meter=self._metrics.providers[name],
                )
                told.append(provider)
            found[name] = provider
        for change in changes:
            change()
        for name, provider in self._providers.items():
            if name not in found:
                self._leave(provider)
        for provider in found.values():
            if (task := self._leaving.pop(provider, None)) is not None:
                task.cancel()
        self._providers = found
        for provider in told:
            _tell(provider)

    async def close(self) -> None:
        """Close every provider, and the simulator."""
        leaving = dict(self._leaving)
        for task in leaving.values():
            task.cancel()
        if leaving:
            await asyncio.wait(tuple(leaving.values()))
        for provider in (*self._providers.values(), *leaving):
            await provider.close()
        await self._stack.aclose()

    def _known(self, name: str) -> Provider | None:
        """The provider of that name which is configured, or has still something under way."""
        known = self._providers.get(name)
        if known is None:
            alive = (one for one in self._leaving if one.name == name and one.busy)
            known = next(alive, None)
        return known

    def _leave(self, provider: Provider) -> None:
        provider.leave()
        task = asyncio.get_running_loop().create_task(provider.end())
        self._leaving[provider] = task
        task.add_done_callback(lambda _task: self._leaving.pop(provider, None))
        logger.info("provider %s was taken out", provider.name)


def _tell(provider: Provider) -> None:
    limits = provider.settings.http_client
    missing = provider.settings.missing_key
    if missing is not None:
        logger.info("provider %s is off: %s is not set", provider.name, missing)
        return
    logger.info(
        "provider %s: max_connections=%d max_keepalive=%d concurrent_requests=%d "
        "requests_per_minute=%d queue_size=%d",
        provider.name,
        limits.max_connections,
        limits.max_keepalive,
        limits.concurrent_requests,
        limits.requests_per_minute,
        limits.queue_size,
    )
