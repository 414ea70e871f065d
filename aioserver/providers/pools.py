"""The pool that a provider uses, and the pools of former settings that still have requests.

A pool fits its settings: when one of them changes (the address, the key, a limit of connections,
…) another pool is built beside it, and the old one is retired. Requests end in the pool in which
they began; the old pool keeps no connection that becomes free. All pools count their connections
in one resource. So together they have no more than the newest `max_connections`, once the requests
above that number have ended.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from msgspec.structs import replace

from aioserver.config.faults import ConfigurationError
from aioserver.files.certificates import CertificateFault, client_context
from aioserver.limits.scheduler import Scheduler
from aioserver.providers.http1 import RequestWriter
from aioserver.providers.pool import Pool, PoolStats, connection_gate

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable
    from collections.abc import Set as AbstractSet

    from aioserver.config import settings
    from aioserver.files.x509 import Certificate
    from aioserver.providers.connections import PooledConnection

# The settings of a provider, and of its `http_client`, that a pool or its requests' heads depend
# on.
PROVIDER_SETTINGS = (
    *("api_key", "headers", "proxy", "ca_file"),
    *("client_cert_file", "client_key_file"),
)
CLIENT_SETTINGS = (
    "max_connections",
    "max_keepalive",
    "keepalive_expiry",
    "connect_timeout",
    "pool_timeout",
)


class Pools:
    """The pools to one provider.

    Always: `pool` and `writer` fit the settings applied last, and `certificates` are what `pool`
    presents to the provider; each other pool has a task, which closes it when its last request has
    ended. `close` closes all of them.

    *pending* counts the requests that may soon want a connection; see `Pool`. *hop*: see
    `RequestWriter`.
    """

    def __init__(
        self,
        settings: settings.Provider,
        base_url: str,
        *,
        pending: Callable[[], int],
        hop: str = "",
        scheduler: Scheduler | None = None,
    ) -> None:
        self._hop = hop
        loop = asyncio.get_running_loop()
        self._scheduler = scheduler = scheduler or Scheduler(loop)
        self._settings = settings
        self.base_url = base_url
        self._pending = pending
        self.gate = connection_gate(settings.http_client, scheduler, loop.time)
        self._retired: dict[Pool, asyncio.Task[None]] = {}
        self.pool, self.writer, self.certificates = self._build(settings, base_url)

    def prepare(self, settings: settings.Provider, base_url: str) -> Callable[[], None]:
        """Return the function that puts *settings* into effect.

        Nothing changes until it is called.

        Raises:
            ConfigurationError: `ca_file` or a client certificate cannot be used.
        """
        replacement = None
        if self._needs_replacement(settings, base_url):
            replacement = self._build(settings, base_url)

        def apply() -> None:
            self._settings, self.base_url = settings, base_url
            if replacement is None:
                self.writer.apply(settings)
                return
            old = self.pool
            self.pool, self.writer, self.certificates = replacement
            self.gate.queue_timeout = settings.http_client.pool_timeout
            self._scheduler.resize(self.gate, settings.http_client.max_connections)
            old.retire()
            task = asyncio.get_running_loop().create_task(old.drain())
            self._retired[old] = task
            task.add_done_callback(lambda _task: self._retired.pop(old))

        return apply

    def renew(self) -> None:
        """Build another pool for the same settings: the certificate files have changed.

        Raises:
            ConfigurationError: as `prepare`.
        """
        self.prepare(self._settings, self.base_url)()

    def stats(self) -> PoolStats:
        """Return a snapshot of all pools together."""
        stats = self.pool.stats()
        retired = sum(pool.stats().open for pool in self._retired)
        return replace(stats, open=stats.open + retired)

    @property
    def in_use(self) -> AbstractSet[PooledConnection]:
        """The connections of all pools that carry exchanges, or are about to."""
        if not self._retired:
            return self.pool.in_use
        return {each for pool in (self.pool, *self._retired) for each in pool.in_use}

    async def drain(self) -> None:
        """Close each pool when its last request has ended.

        Cancelling leaves all of them as they are.
        """
        self.pool.retire()
        await self.pool.drain()
        if self._retired:
            await asyncio.wait(tuple(self._retired.values()))

    async def close(self) -> None:
        """Close every connection of every pool."""
        retired = dict(self._retired)
        for task in retired.values():
            task.cancel()
        if retired:
            await asyncio.wait(tuple(retired.values()))
        for pool in (self.pool, *retired):
            await pool.close()

    def _needs_replacement(self, settings: settings.Provider, base_url: str) -> bool:
        """Return whether the pool does not fit *settings*.

        A pool with a certificate file never fits: the content may have changed under the file's
        name.
        """
        old, client, old_client = self._settings, settings.http_client, self._settings.http_client
        return (
            base_url != self.base_url
            or settings.ca_file is not None
            or settings.client_cert_file is not None
            or any(getattr(settings, name) != getattr(old, name) for name in PROVIDER_SETTINGS)
            or any(getattr(client, name) != getattr(old_client, name) for name in CLIENT_SETTINGS)
        )

    def _build(
        self, settings: settings.Provider, base_url: str
    ) -> tuple[Pool, RequestWriter, list[Certificate]]:
        context: ssl.SSLContext | None = None
        presented: list[Certificate] = []
        name, files = settings.name, (settings.ca_file, settings.client_cert_file)
        try:
            if base_url.startswith("https:") and files != (None, None):
                context, presented = client_context(*files, settings.client_key_file)
        except CertificateFault as exc:
            fault = f"llm.providers.{name}.client_{exc.setting}: {exc}"
            raise ConfigurationError([fault]) from exc
        except OSError as exc:
            # ssl.SSLError is an OSError, too.
            fault = f"llm.providers.{name}.ca_file: {settings.ca_file} holds no certificates"
            raise ConfigurationError([fault]) from exc
        pool = Pool(
            base_url,
            settings.http_client,
            proxy=settings.proxy,
            context=context,
            pending=self._pending,
            scheduler=self._scheduler,
            gate=self.gate,
        )
        writer = RequestWriter(
            settings,
            base_url,
            absolute=pool.forwards,
            proxy_headers=pool.proxy_headers(),
            hop=self._hop,
        )
        return pool, writer, presented
