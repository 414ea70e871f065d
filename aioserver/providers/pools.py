"""The pool in use, and beside it those of former settings until their requests have ended.

A pool is as its settings are: where one of them changes (the address, the key, a limit of
connections, …) another is built beside it. What is under way ends where it began; the old one keeps
no connection that becomes free. All of them count their connections in one gate, so that together
they have no more than the newest `max_connections`, once what was above it has ended.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

from aioserver.errors import ConfigurationError
from aioserver.providers.http1 import RequestWriter
from aioserver.providers.pool import UNBOUNDED, Pool, PoolStats, connections

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.config import settings

# What a pool, or the head of each of its requests, is made of.
OF_PROVIDER = ("api_key", "headers", "proxy", "ca_file")
OF_CLIENT = (
    "max_connections",
    "max_keepalive",
    "keepalive_expiry",
    "connect_timeout",
    "pool_timeout",
)


class Pools:
    """The pools to one provider.

    Always: `pool` and `writer` are of the settings applied last; each other pool has a task, which
    closes it when its last request has ended.
    """

    def __init__(
        self, given: settings.Provider, base_url: str, *, demand: Callable[[], int]
    ) -> None:
        self._given = given
        self.base_url = base_url
        self._demand = demand
        self._gate = connections(given.http_client)
        self._retired: dict[Pool, asyncio.Task[None]] = {}
        self.pool, self.writer = self._make(given, base_url)

    def prepare(self, given: settings.Provider, base_url: str) -> Callable[[], None]:
        """What puts *given* in the place of the settings now. Until it is called nothing changes.

        Raises:
            ConfigurationError: `ca_file` cannot be read, or holds no certificate.
        """
        made = self._make(given, base_url) if self._differ(given, base_url) else None

        def put() -> None:
            self._given, self.base_url = given, base_url
            if made is None:
                return
            old = self.pool
            self.pool, self.writer = made
            self._gate.apply(
                given.http_client.max_connections,
                queue_size=UNBOUNDED,
                queue_timeout=given.http_client.pool_timeout,
            )
            old.retire()
            task = asyncio.get_running_loop().create_task(old.end())
            self._retired[old] = task
            task.add_done_callback(lambda _task: self._retired.pop(old))

        return put

    def stats(self) -> PoolStats:
        """The state now, of all pools together."""
        stats = self.pool.stats()
        old = sum(pool.stats().open for pool in self._retired)
        return replace(stats, open=stats.open + old)

    async def end(self) -> None:
        """Close when the last request has ended; cancelling leaves everything as it is."""
        self.pool.retire()
        await self.pool.end()
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

    def _differ(self, given: settings.Provider, base_url: str) -> bool:
        """Whether another pool is wanted. A certificate file may have changed under its name."""
        before, client, was = self._given, given.http_client, self._given.http_client
        return (
            base_url != self.base_url
            or given.ca_file is not None
            or any(getattr(given, name) != getattr(before, name) for name in OF_PROVIDER)
            or any(getattr(client, name) != getattr(was, name) for name in OF_CLIENT)
        )

    def _make(self, given: settings.Provider, base_url: str) -> tuple[Pool, RequestWriter]:
        try:
            pool = Pool(
                base_url,
                given.http_client,
                proxy=given.proxy,
                ca_file=given.ca_file,
                demand=self._demand,
                gate=self._gate,
            )
        except OSError as exc:  # ssl.SSLError is one
            fault = f"llm.providers.{given.name}.ca_file: {given.ca_file} holds no certificates"
            raise ConfigurationError([fault]) from exc
        writer = RequestWriter(
            given, base_url, absolute=pool.forwards, proxy_headers=pool.proxy_headers()
        )
        return pool, writer
