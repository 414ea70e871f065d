"""The sockets to one provider: one TCPConnector, with httpx's limits and timeouts.

`max_connections` is the cap on open sockets, and aiohttp's `limit`. At most `max_keepalive` idle
connections are kept. While requests wait for this provider, its connections are handed on instead
of closed, however many they are. httpx would close them, and open 24 sockets for the work of 6.
`keepalive_expiry` is aiohttp's `keepalive_timeout`, checked on reuse and by a sweep.
connections.py has the idle connections.

`pool_timeout` bounds the wait for a connection and nothing else: our capacity stands in front, so
that the connector never has a waiter of its own, and `connect_timeout` covers DNS, TCP and TLS
together.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import logging
from typing import TYPE_CHECKING
from urllib.request import getproxies, proxy_bypass

import aiohttp
import msgspec
from aiohttp import ClientRequest, ClientTimeout
from yarl import URL

from aioserver.errors import AioserverError
from aioserver.limits.resource import Bid, Reason, Resource, Ticket
from aioserver.limits.scheduler import Scheduler
from aioserver.provider_errors import CertificateFault, ConnectError, ConnectTimeout, PoolTimeout
from aioserver.providers.connections import Connections
from aioserver.tracebacks import forget_frames

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable
    from collections.abc import Set as AbstractSet

    from aiohttp.client_reqrep import ConnectionKey

    from aioserver.config.settings import HttpClient
    from aioserver.limits.resource import Grant
    from aioserver.providers.connections import PooledConnection

logger = logging.getLogger("aioserver.pool")

# This process, or the machine, has no file descriptor left: the provider is not at fault.
NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE)
# aiohttp rounds timeouts above its threshold, 5 s, up to whole seconds; ours stay as configured.
NEVER_CEIL = float("inf")
# The size of the queue for connections: the provider's queue in front of it has a bound already.
UNBOUNDED = 1 << 31


class Endpoint(ClientRequest):
    """The address of a pool, in the form that aiohttp's connectors take.

    Always: its key is computed once. aiohttp looks for an idle connection by this key.
    """

    @functools.cached_property
    def connection_key(self) -> ConnectionKey:
        """The key of the pool's connections."""
        return super().connection_key


class PoolStats(msgspec.Struct, frozen=True):
    """A snapshot of a pool; *open* = *idle* + in use or being opened."""

    open: int
    idle: int
    limit: int
    waiting: int


def connection_gate(
    limits: HttpClient, scheduler: Scheduler, clock: Callable[[], float]
) -> Resource:
    """Return the resource that counts open connections; a pool and its successors share one."""
    return Resource(
        "connections",
        limits.max_connections,
        queue_size=UNBOUNDED,
        queue_timeout=limits.pool_timeout,
        refuse=_refuse,
        serve=scheduler.serve,
        clock=clock,
        bare=True,
        idle=True,
    )


def _refuse(reason: Reason, retry_after: float, _bid: Bid) -> PoolTimeout:
    if reason is Reason.FULL:
        return PoolTimeout("no free connection", retry_after=retry_after)
    return PoolTimeout("no connection became free within pool_timeout", retry_after=retry_after)


class Pool:
    """The connections to one provider.

    Always: `open <= max_connections`; every connection handed out is released or closed by its
    exchange. `close` aborts them all.

    *context* is that of TLS to the provider; None: the system's authorities are trusted. *pending*
    counts the requests that may soon want a connection, beyond those that wait in the pool: as
    many idle connections are kept for them. A retired pool opens connections only for the requests
    that it has, and keeps none.
    """

    def __init__(
        self,
        base_url: str,
        limits: HttpClient,
        *,
        proxy: str | None = None,
        context: ssl.SSLContext | None = None,
        pending: Callable[[], int] = lambda: 0,
        scheduler: Scheduler | None = None,
        gate: Resource | None = None,
    ) -> None:
        url = URL(base_url)
        loop = asyncio.get_running_loop()
        # True: aiohttp's own context, which has loaded the system's certificates at its import.
        trust: ssl.SSLContext | bool = True if context is None else context
        self._limits = limits
        self._scheduler = scheduler = scheduler or Scheduler(loop)
        self._gate = connection_gate(limits, scheduler, loop.time) if gate is None else gate
        # Requests that wait for a place, or have got one and have not run since. The resource does
        # not count the latter as waiting.
        self._pending = 0
        # Set when a retired pool has no request any more; None unless the pool is retired.
        self._drained: asyncio.Event | None = None
        self._proxy = URL(proxy) if proxy else environment_proxy(url)
        endpoint = Endpoint(
            "POST",
            url,
            loop=loop,
            ssl=trust,
            proxy=self._proxy,
            # For the CONNECT to a proxy.
            headers={"Host": f"{url.host_subcomponent}:{url.port}"},
        )
        timeout = ClientTimeout(
            total=None,
            connect=limits.connect_timeout,
            sock_connect=None,
            ceil_threshold=NEVER_CEIL,
        )
        self._connections = Connections(
            endpoint,
            timeout,
            self._gate,
            limit=limits.max_connections,
            max_idle=limits.max_keepalive,
            expiry=limits.keepalive_expiry,
            pending=lambda: pending() + self._pending,
            timeout_ceil_threshold=NEVER_CEIL,
            # Set, since aiohttp would use aiodns if that is installed, which resolves differently.
            resolver=aiohttp.ThreadedResolver(),
            ssl=trust,
        )
        # Returns an idle connection, as `connect` does; None if there is none, or no place for it.
        self.take = self._connections.take
        self._address = f"{url.host}:{url.port}"
        # Whether requests go to a plain HTTP proxy: their target is then an absolute URL.
        self.forwards = self._proxy is not None and not endpoint.is_ssl()

    def proxy_headers(self) -> dict[str, str]:
        """Return the headers for a plain HTTP proxy in each request."""
        if self._proxy is None or not self.forwards:
            return {}
        credentials = aiohttp.BasicAuth.from_url(self._proxy)
        return {"Proxy-Authorization": credentials.encode()} if credentials else {}

    async def connect(self) -> PooledConnection:
        """Return a connection, idle before or new, that the caller must release or close.

        Cancelling is safe: no connection is lost.

        Raises:
            PoolTimeout: no connection became free within `pool_timeout`, or no descriptor is free
                for one.
            ConnectTimeout: DNS, TCP and TLS took longer than `connect_timeout`.
            ConnectError: the connection was refused, the host is unreachable or unknown, or TLS
                failed.
            CertificateFault: the provider's certificate is not valid.
        """
        self._connections.give_places()
        place = self._gate.try_start(Ticket()) or await self._wait()
        try:
            if (connection := self._connections.take(place)) is not None:
                return connection
            return await self._connections.open_one(place)
        except BaseException as exc:
            place.release()
            self._check_drained()
            if isinstance(exc, Exception):
                fault = self._translated(exc)
                # The exceptions of aiohttp are in cycles with its frames, which refer to ours and
                # to the request.
                if fault is not exc:
                    forget_frames(exc)
                raise fault from exc
            raise

    async def _wait(self) -> Grant:
        self._pending += 1
        try:
            place = await self._scheduler.wait(Ticket(), [Bid(self._gate)])
        except BaseException:
            self._pending -= 1
            self.trim()
            self._check_drained()
            raise
        # Before anything else runs, this request takes an idle connection or opens one.
        self._pending -= 1
        return place

    def trim(self) -> None:
        """Close idle connections beyond the cap: a request that was expected did not come."""
        self._connections.trim()

    def drop_idle(self) -> None:
        """Close every idle connection: one of them proved dead."""
        self._connections.drop_idle()

    def stats(self) -> PoolStats:
        """Return a snapshot."""
        idle, acquired = len(self._connections.idle), self._connections.acquired
        return PoolStats(
            open=idle + acquired,
            idle=idle,
            limit=self._limits.max_connections,
            waiting=self._gate.waiting,
        )

    @property
    def in_use(self) -> AbstractSet[PooledConnection]:
        """The connections that carry exchanges, or are about to, as they are now."""
        return self._connections.in_use

    def retire(self) -> None:
        """Serve the requests that the pool has, and keep no connection: another pool takes
        over.
        """
        self._drained = asyncio.Event()
        self._connections.retire(self._check_drained)
        self._check_drained()

    async def drain(self) -> None:
        """Wait until a retired pool has served its last request, then close it."""
        assert self._drained is not None, "`retire` was called before"
        await self._drained.wait()
        await self.close()

    def _check_drained(self) -> None:
        if self._drained is not None and not self._pending and not self._connections.acquired:
            self._drained.set()

    async def close(self) -> None:
        """Close every connection."""
        await self._connections.close()

    def _translated(self, exc: Exception) -> AioserverError | Exception:
        """Return the fault that stands for *exc*, raised while connecting."""
        match exc:
            case AioserverError():
                return exc
            case aiohttp.ClientConnectorCertificateError():
                return CertificateFault("the provider's certificate is not valid")
            case TimeoutError():
                return ConnectTimeout(
                    f"no connection to {self._address} in {self._limits.connect_timeout} s"
                )
            case OSError(errno=code) if code in NO_DESCRIPTOR:
                logger.error(
                    "no file descriptor is free for a connection to %s: "
                    "raise the limit of open files",
                    self._address,
                )
                return PoolTimeout("no file descriptor is free for a connection", retry_after=1.0)
            # UnicodeError: the text cannot be a host name at all.
            case aiohttp.ClientError() | OSError() | UnicodeError():
                return ConnectError(f"cannot connect to {self._address}")
        return exc


def environment_proxy(url: URL) -> URL | None:
    """Return the proxy of `HTTP_PROXY`, `HTTPS_PROXY` and `NO_PROXY`, as httpx would use it.

    Not `trust_env=True`: with a matching netrc entry aiohttp refuses our Authorization header.
    """
    proxy = getproxies().get(url.scheme) or getproxies().get("all")
    if not proxy or url.host is None or proxy_bypass(f"{url.host}:{url.port}"):
        return None
    return URL(proxy if "://" in proxy else f"http://{proxy}")
