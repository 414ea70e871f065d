"""One TCPConnector per provider, with httpx's limits and timeouts.

`max_connections` is the cap on open sockets (one connector per provider, no redirects: then
aiohttp's `limit`, which counts acquired ones only, is exact). `max_keepalive` idle ones are kept;
while requests wait for this provider its connections are handed on instead of closed, however many
they are: httpx closes them there and opens 24 sockets for what 6 can do. `keepalive_expiry` is
aiohttp's `keepalive_timeout`, looked at on reuse and by a sweep.

`pool_timeout` is the wait for a connection and nothing else: our gate stands in front, so that the
connector never has a waiter of its own and `connect_timeout` is DNS, TCP and TLS together.

Private names of aiohttp used here, guarded by `tests/providers/test_pool.py`: `_factory`, `_conns`,
`_release`, `_acquired`.
"""

from __future__ import annotations

import asyncio
import functools
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.request import getproxies, proxy_bypass

import aiohttp
from aiohttp import ClientRequest, ClientTimeout, TCPConnector
from yarl import URL

from aioserver.errors import AioserverError
from aioserver.limits.gate import Gate, Place
from aioserver.provider_errors import CertificateFault, ConnectError, ConnectTimeout, PoolTimeout
from aioserver.providers.exchange import WireProtocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp.client_proto import ResponseHandler
    from aiohttp.client_reqrep import ConnectionKey
    from aiohttp.connector import Connection

    from aioserver.config.settings import HttpClient

NEVER_CEIL = float(
    "inf"
)  # aiohttp moves timeouts above 5 s to whole seconds: ours mean what they say
UNBOUNDED = 1 << 31


class CappedConnector(TCPConnector):
    """Keeps at most *max_keepalive* idle connections, and as many more as *demand* will take."""

    def __init__(self, *, max_keepalive: int, demand: Callable[[], int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._max_keepalive = max_keepalive
        self._demand = demand
        self.released: Callable[[], None] = lambda: None  # called when a connection is given back
        self._factory = functools.partial(WireProtocol, loop=self._loop)  # type: ignore[assignment]

    @property
    def idle(self) -> int:
        """How many connections are kept and free."""
        return sum(map(len, self._conns.values()))

    @property
    def acquired(self) -> int:
        """How many connections are in use, or being opened."""
        return len(self._acquired)

    def _release(
        self, key: ConnectionKey, protocol: ResponseHandler, *, should_close: bool = False
    ) -> None:
        full = self.idle >= self._max_keepalive + self._demand()
        if isinstance(protocol, WireProtocol):
            protocol.idle_lost = self._forget
        super()._release(key, protocol, should_close=should_close or full)
        self.released()

    def retire(self, released: Callable[[], None]) -> None:
        """Keep no connection from now on; *released* is called with each that is given back."""
        self._max_keepalive, self._demand, self.released = 0, lambda: 0, released
        self.drop_idle()

    def trim(self) -> None:
        """Close what is beyond the cap, the longest idle first."""
        surplus = self.idle - self._max_keepalive - self._demand()
        while surplus > 0:
            self._drop_oldest()
            surplus -= 1

    def drop_idle(self) -> None:
        """Close every idle connection: one of them proved dead."""
        while self.idle:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        key = next(iter(self._conns))
        protocol, _ = self._conns[key].popleft()
        if not self._conns[key]:
            del self._conns[key]
        protocol.abort()

    def _forget(self, protocol: WireProtocol) -> None:
        """The provider closed an idle connection."""
        for key, kept in list(self._conns.items()):
            for item in kept:
                if item[0] is protocol:
                    kept.remove(item)
                    break
            if not kept:
                del self._conns[key]


class Target(ClientRequest):
    """Where a pool connects to: what aiohttp looks for a kept connection by, made once."""

    @functools.cached_property
    def connection_key(self) -> ConnectionKey:
        """The key of the pool's connections."""
        return super().connection_key


@dataclass(frozen=True, slots=True)
class PoolStats:
    """A pool at one moment; *open* = *idle* + in use or being opened."""

    open: int
    idle: int
    limit: int
    waiting: int


def connections(limits: HttpClient) -> Gate:
    """The gate that counts the connections in use; pools that follow each other share it."""
    return Gate(
        limits.max_connections,
        queue_size=UNBOUNDED,  # bounded by the provider's queue in front
        queue_timeout=limits.pool_timeout,
        full_error=lambda wait: PoolTimeout("no free connection", retry_after=wait),
        timeout_error=lambda wait: PoolTimeout(
            "no free connection within pool_timeout", retry_after=wait
        ),
    )


class Pool:
    """The connections to one provider.

    Always: `open <= max_connections`; every connection handed out is released or closed by its
    exchange. `close` aborts them all.

    Once it is *retired* it opens connections only for who had come before, and keeps none.
    """

    def __init__(
        self,
        base_url: str,
        limits: HttpClient,
        *,
        proxy: str | None = None,
        ca_file: str | None = None,
        demand: Callable[[], int] = lambda: 0,
        gate: Gate | None = None,
    ) -> None:
        url = URL(base_url)
        loop = asyncio.get_running_loop()
        context: ssl.SSLContext | bool = True
        if url.scheme == "https":
            context = ssl.create_default_context(cafile=ca_file)
        self._limits = limits
        self._gate = connections(limits) if gate is None else gate
        self._empty: asyncio.Event | None = None  # set when a retired pool has nothing under way
        self._connector = CappedConnector(
            max_keepalive=limits.max_keepalive,
            demand=lambda: demand() + self._coming,
            limit=limits.max_connections,
            limit_per_host=limits.max_connections,
            keepalive_timeout=limits.keepalive_expiry,
            timeout_ceil_threshold=NEVER_CEIL,
            resolver=aiohttp.ThreadedResolver(),  # aiodns, where installed, would change the answers
            ssl=context,
        )
        self._coming = 0  # who waits, or has a place and has not run since: the gate counts less
        self._proxy = URL(proxy) if proxy else _environment_proxy(url)
        self._key = Target(
            "POST",
            url,
            loop=loop,
            ssl=context,
            proxy=self._proxy,
            headers={"Host": f"{url.host_subcomponent}:{url.port}"},  # of a CONNECT
        )
        self._timeout = ClientTimeout(
            total=None,
            connect=limits.connect_timeout,
            sock_connect=None,
            ceil_threshold=NEVER_CEIL,
        )
        self._host = f"{url.host}:{url.port}"

    @property
    def forwards(self) -> bool:
        """Whether a plain proxy stands between: the request line is then an absolute URL."""
        return self._proxy is not None and not self._key.is_ssl()

    def proxy_headers(self) -> dict[str, str]:
        """What a plain proxy wants to see in each request."""
        given = aiohttp.BasicAuth.from_url(self._proxy) if self._proxy and self.forwards else None
        return {"Proxy-Authorization": given.encode()} if given else {}

    async def connect(self) -> Connection:
        """A connection, kept or new. Who takes it must release or close it.

        Raises:
            PoolTimeout: none became free within `pool_timeout`.
            ConnectTimeout: DNS, TCP and TLS took longer than `connect_timeout`.
            ConnectError: refused, unreachable, no such host, TLS.
            CertificateFault: the provider's certificate does not hold.
        """
        place = self._gate.try_enter() or await self._wait()
        try:
            connection = await self._connector.connect(self._key, [], self._timeout)
        except BaseException as exc:
            place.release()
            self._released()
            if isinstance(exc, Exception):
                raise self._translated(exc) from exc
            raise
        connection.add_callback(place.release)
        return connection

    async def _wait(self) -> Place:
        self._coming += 1
        try:
            place = await self._gate.enter()
        except BaseException:
            self._coming -= 1
            self.trim()
            self._released()
            raise
        self._coming -= 1  # it takes an idle connection before anything else runs, or opens one
        return place

    def trim(self) -> None:
        """Close idle connections beyond the cap: a request that was counted on did not come."""
        self._connector.trim()

    def drop_idle(self) -> None:
        """Close every idle connection."""
        self._connector.drop_idle()

    def stats(self) -> PoolStats:
        """The state now."""
        idle, acquired = self._connector.idle, self._connector.acquired
        return PoolStats(
            open=idle + acquired,
            idle=idle,
            limit=self._limits.max_connections,
            waiting=self._gate.waiting,
        )

    def retire(self) -> None:
        """Serve who has come, and keep nothing: another pool takes this one's place."""
        self._empty = asyncio.Event()
        self._connector.retire(self._released)
        self._released()

    async def end(self) -> None:
        """Wait until a retired pool has served the last who had come, then close it."""
        assert self._empty is not None, "retired before"
        await self._empty.wait()
        await self.close()

    def _released(self) -> None:
        if self._empty is not None and not self._coming and not self._connector.acquired:
            self._empty.set()

    async def close(self) -> None:
        """Close every connection."""
        await self._connector.close(abort_ssl=True)

    def _translated(self, exc: Exception) -> AioserverError | Exception:
        match exc:
            case AioserverError():
                return exc
            case aiohttp.ClientConnectorCertificateError():
                return CertificateFault("the provider's certificate does not hold")
            case TimeoutError():
                return ConnectTimeout(
                    f"no connection to {self._host} in {self._limits.connect_timeout} s"
                )
            case aiohttp.ClientError() | OSError() | UnicodeError():  # the last: no name at all
                return ConnectError(f"cannot connect to {self._host}")
        return exc


def _environment_proxy(url: URL) -> URL | None:
    """The proxy of `HTTP_PROXY`, `HTTPS_PROXY`, `NO_PROXY`, as httpx would use it.

    Not `trust_env=True`: with a matching netrc entry aiohttp refuses our Authorization header.
    """
    proxy = getproxies().get(url.scheme) or getproxies().get("all")
    if not proxy or url.host is None or proxy_bypass(f"{url.host}:{url.port}"):
        return None
    return URL(proxy if "://" in proxy else f"http://{proxy}")
