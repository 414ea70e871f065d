"""The registry: the configured providers by name, and their change while answers run.

A provider that stays in the configuration is the same object, whatever changes in it. A provider
that is removed takes no new attempt, and is closed when the running ones have ended. If it comes
back before that, it is the same object again, so that its places are counted once.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from aioserver.config.faults import ConfigurationError
from aioserver.files.certificates import CertificateFault, read_pair
from aioserver.limits.estimate import Estimates
from aioserver.providers.health import ALONE
from aioserver.providers.provider import Provider
from aioserver.usage.accounting import Usage

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aioserver.config import settings
    from aioserver.files.watched_files import WatchedFiles
    from aioserver.limits.scheduler import Scheduler
    from aioserver.providers.capacity import ShareProvider
    from aioserver.providers.health import ProviderObserver
    from aioserver.streams.lifetime import Lifetime
    from aioserver.telemetry.metrics import Metrics

logger = logging.getLogger("aioserver.providers")


class ProviderRegistry:
    """Owns every provider.

    Always: `providers` has those of the settings that were applied last, in their order; every
    other provider has a task, which closes it when its last attempt has ended. `close` closes all
    of them.

    *observe* returns the observer of a named provider. *simulator* starts the provider of
    `simulated: true` at its first call, and returns its base URL; None if this server has no
    simulator. *lifetime* has the answers without a reader, which give
    way to waiting requests; None if there are none. *usage* receives the costs of attempts. *hop*
    is the id by which requests that come back are recognized.
    """

    def __init__(
        self,
        metrics: Metrics,
        share: ShareProvider | None = None,
        observe: Callable[[str], ProviderObserver] = lambda _name: ALONE,
        simulator: Callable[[], Awaitable[str]] | None = None,
        lifetime: Lifetime | None = None,
        usage: Usage | None = None,
        hop: str = "",
        *,
        scheduler: Scheduler | None = None,
    ) -> None:
        self._metrics = metrics
        self._scheduler = scheduler
        self._hop = hop
        self._usage = Usage() if usage is None else usage
        self._share = share
        self._observe = observe
        self._simulator = simulator
        # The estimates of tokens for all providers, present and future.
        self.estimates = Estimates()
        self._lifetime = lifetime
        # The configured providers, by name.
        self.providers: dict[str, Provider] = {}
        # The removed providers, each with the task that closes it.
        self._draining: dict[Provider, asyncio.Task[None]] = {}
        # The simulator's address; empty until the simulator runs.
        self._simulator_url = ""

    async def prepare(self, llm: settings.Llm) -> None:
        """Start the simulator, if a provider of *llm* is `simulated` and it does not run yet.

        Raises:
            ConfigurationError: there is no simulator.
        """
        if any(entry.simulated for entry in llm.providers.values()):
            if self._simulator is None:
                raise ConfigurationError(["simulated: true: this server has no simulator"])
            self._simulator_url = await self._simulator()

    def apply(self, llm: settings.Llm, *, max_response_bytes: int) -> None:
        """Use the providers of *llm* from now on; `prepare` must have been called for it.

        Raises:
            ConfigurationError: a `ca_file` holds no certificate; nothing has changed then.
        """
        groups = llm.groups()
        self._metrics.apply(llm.providers, groups)
        self._usage.sums.apply(llm.providers, groups)
        providers: dict[str, Provider] = {}
        changes: list[Callable[[], None]] = []
        changed: list[Provider] = []
        for name, entry in llm.providers.items():
            base_url = self._simulator_url if entry.simulated else entry.base_url
            provider = self._existing(name)
            if provider is not None:
                changes.append(
                    provider.prepare(entry, base_url, max_response_bytes=max_response_bytes)
                )
                if provider.settings != entry:
                    changed.append(provider)
            else:
                provider = Provider(
                    entry,
                    base_url,
                    max_response_bytes=max_response_bytes,
                    meter=self._metrics.providers[name],
                    share=self._share,
                    observer=self._observe(name),
                    lifetime=self._lifetime,
                    estimates=self.estimates,
                    usage=self._usage,
                    hop=self._hop,
                    scheduler=self._scheduler,
                )
                changed.append(provider)
            providers[name] = provider
        for change in changes:
            change()
        for name, provider in self.providers.items():
            if name not in providers:
                self._remove(provider)
        for provider in providers.values():
            if (task := self._draining.pop(provider, None)) is not None:
                task.cancel()
        self.providers = providers
        for provider in changed:
            _log_limits(provider)

    def watch(self, watched: WatchedFiles) -> None:
        """Reload client certificates when their files change."""
        watched.add("certificate", self._certificate_files, self._read_certificates)

    def _certificate_files(self) -> list[str]:
        return [
            file
            for provider in self.providers.values()
            for file in (provider.settings.client_cert_file, provider.settings.client_key_file)
            if file is not None
        ]

    def _read_certificates(self) -> Callable[[], None] | None:
        """Return the function that builds new pools for the providers whose certificates have
        changed.

        A certificate that cannot be used does not affect the others.
        """
        changed, faults = [], []
        for provider in tuple(self.providers.values()):
            entry = provider.settings
            if entry.client_cert_file is None or not provider.pools.certificates:
                continue
            try:
                chain = read_pair(entry.client_cert_file, entry.client_key_file)
            except CertificateFault as fault:
                faults.append(f"provider {entry.name}: {fault}")
            else:
                if chain != provider.pools.certificates:
                    changed.append(provider)
        if faults and not changed:
            raise ConfigurationError(faults)

        def apply() -> None:
            for provider in changed:
                provider.pools.renew()
                logger.info("provider %s: new client certificate", provider.name)
            if faults:
                raise ConfigurationError(faults)

        return apply if changed else None

    async def close(self) -> None:
        """Close every provider."""
        draining = dict(self._draining)
        for task in draining.values():
            task.cancel()
        if draining:
            await asyncio.wait(tuple(draining.values()))
        for provider in (*self.providers.values(), *draining):
            await provider.close()

    def _existing(self, name: str) -> Provider | None:
        """Return the provider *name* that is configured, or was removed and is still busy."""
        provider = self.providers.get(name)
        if provider is None:
            busy = (
                removed
                for removed in self._draining
                if removed.name == name and removed.capacity.inside
            )
            provider = next(busy, None)
        return provider

    def _remove(self, provider: Provider) -> None:
        provider.remove()
        task = asyncio.get_running_loop().create_task(provider.drain())
        self._draining[provider] = task
        task.add_done_callback(lambda _task: self._draining.pop(provider, None))
        logger.info("provider %s was removed from the configuration", provider.name)


def _log_limits(provider: Provider) -> None:
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
