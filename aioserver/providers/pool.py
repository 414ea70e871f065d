"""The sockets to one provider: one TCPConnector, with httpx's limits and timeouts.

`max_connections` is the cap on open sockets. With one connector per provider and no redirects it is
exactly aiohttp's `limit`, which counts only acquired connections. At most `max_keepalive` idle
connections are kept; but while requests wait for this provider, its connections are handed on instead
of closed, however many they are. httpx closes them then, and opens 24 sockets for the work of 6.
`keepalive_expiry` is aiohttp's `keepalive_timeout`, which is checked on reuse and by a sweep.

`pool_timeout` is the wait for a connection and nothing else: our gate stands in front, so that the
connector never has a waiter of its own and `connect_timeout` is DNS, TCP and TLS together.

Private names of aiohttp used here, guarded by `tests/providers/test_pool.py`: `_factory`, `_conns`,
`_release`, `_acquired` and `_loop` of `TCPConnector`.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import logging
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
from aioserver.providers.exchange import ConnectionProtocol
from aioserver.tracebacks import forget_frames

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from aiohttp.client_proto import ResponseHandler
    from aiohttp.client_reqrep import ConnectionKey
    from aiohttp.connector import Connection

    from aioserver.config.settings import HttpClient
    from aioserver.providers.exchange import Exchange

logger = logging.getLogger("aioserver.pool")

# This process, or the machine, has no file descriptor left. That is no fault of a provider.
NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE)
# aiohttp rounds timeouts above its threshold, 5 s, up to whole seconds; ours stay as configured.
NEVER_CEIL = float("inf")
# The size of the queue for connections: the provider's queue in front of it is bounded already.
UNBOUNDED = 1 << 31


class CappedConnector(TCPConnector):
    """A connector that bounds its idle connections.

    Always: a release keeps the connection only if at most `max_keepalive + pending()` are idle then.
    """

    def __init__(self, *, max_keepalive: int, pending: Callable[[], int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._max_keepalive = max_keepalive
        self._pending = pending
        # Called when a connection is given back.
        self._on_release: Callable[[], None] = lambda: None
        self._factory = functools.partial(  # type: ignore[assignment]
            ConnectionProtocol, loop=self._loop
        )

    @property
    def idle(self) -> int:
        """How many connections are open and not in use."""
        return sum(map(len, self._conns.values()))

    @property
    def acquired(self) -> int:
        """How many connections are in use, or being opened."""
        return len(self._acquired)

    @property
    def exchanges(self) -> Iterator[Exchange]:
        """Yield the exchanges under way."""
        for protocol in self._acquired:
            if isinstance(protocol, ConnectionProtocol) and protocol.exchange is not None:
                yield protocol.exchange

    def _release(
        self, key: ConnectionKey, protocol: ResponseHandler, *, should_close: bool = False
    ) -> None:
        full = self.idle >= self._max_keepalive + self._pending()
        if isinstance(protocol, ConnectionProtocol):
            protocol.on_idle_lost = self._forget
        super()._release(key, protocol, should_close=should_close or full)
        self._on_release()

    def retire(self, on_release: Callable[[], None]) -> None:
        """Keep no connection from now on; *on_release* is called when one is given back."""
        self._max_keepalive, self._pending, self._on_release = 0, lambda: 0, on_release
        self.drop_idle()

    def trim(self) -> None:
        """Close the idle connections beyond the cap, those that have been idle longest first."""
        surplus = self.idle - self._max_keepalive - self._pending()
        while surplus > 0:
            self._drop_oldest()
            surplus -= 1

    def drop_idle(self) -> None:
        """Close every idle connection."""
        while self.idle:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        key = next(iter(self._conns))
        protocol, _ = self._conns[key].popleft()
        if not self._conns[key]:
            del self._conns[key]
        protocol.abort()

    def _forget(self, protocol: ConnectionProtocol) -> None:
        """Take an idle connection that the provider has closed out of the pool."""
        for key, idle in list(self._conns.items()):
            for item in idle:
                if item[0] is protocol:
                    idle.remove(item)
                    break
            if not idle:
                del self._conns[key]


class Endpoint(ClientRequest):
    """The address of a pool, in the form in which aiohttp's connectors take it.

    Always: its key is computed once. aiohttp looks for an idle connection by this key.
    """

    @functools.cached_property
    def connection_key(self) -> ConnectionKey:
        """The key of the pool's connections."""
        return super().connection_key


@dataclass(frozen=True, slots=True)
class PoolStats:
    """A snapshot of a pool; *open* = *idle* + in use or being opened."""

    open: int
    idle: int
    limit: int
    waiting: int


def connection_gate(limits: HttpClient) -> Gate:
    """Return a gate that counts connections in use; a pool and its successors share one."""
    return Gate(
        limits.max_connections,
        queue_size=UNBOUNDED,
        queue_timeout=limits.pool_timeout,
        full_error=lambda wait: PoolTimeout("no free connection", retry_after=wait),
        timeout_error=lambda wait: PoolTimeout(
            "no connection became free within pool_timeout", retry_after=wait
        ),
    )


class Pool:
    """The connections to one provider.

    Always: `open <= max_connections`; every connection handed out is released or closed by its
    exchange. `close` aborts them all.

    *pending* counts the requests that may soon want a connection, beyond those that wait in the pool:
    as many idle connections are kept for them. A pool that is retired opens connections only for the
    requests that it has, and keeps none.
    """

    def __init__(
        self,
        base_url: str,
        limits: HttpClient,
        *,
        proxy: str | None = None,
        ca_file: str | None = None,
        pending: Callable[[], int] = lambda: 0,
        gate: Gate | None = None,
    ) -> None:
        url = URL(base_url)
        loop = asyncio.get_running_loop()
        context: ssl.SSLContext | bool = True
        if url.scheme == "https":
            context = ssl.create_default_context(cafile=ca_file)
        self._limits = limits
        self._gate = connection_gate(limits) if gate is None else gate
        # Requests that wait for a place in the gate, or have got one and have not run since. The gate
        # does not count the latter as waiting.
        self._pending = 0
        # Set when a retired pool has no request any more; None unless the pool is retired.
        self._drained: asyncio.Event | None = None
        self._connector = CappedConnector(
            max_keepalive=limits.max_keepalive,
            pending=lambda: pending() + self._pending,
            limit=limits.max_connections,
            limit_per_host=limits.max_connections,
            keepalive_timeout=limits.keepalive_expiry,
            timeout_ceil_threshold=NEVER_CEIL,
            # Set, since aiohttp would use aiodns where that is installed, which resolves differently.
            resolver=aiohttp.ThreadedResolver(),
            ssl=context,
        )
        self._proxy = URL(proxy) if proxy else environment_proxy(url)
        self._endpoint = Endpoint(
            "POST",
            url,
            loop=loop,
            ssl=context,
            proxy=self._proxy,
            # For the CONNECT to a proxy.
            headers={"Host": f"{url.host_subcomponent}:{url.port}"},
        )
        self._timeout = ClientTimeout(
            total=None,
            connect=limits.connect_timeout,
            sock_connect=None,
            ceil_threshold=NEVER_CEIL,
        )
        self._address = f"{url.host}:{url.port}"

    @property
    def forwards(self) -> bool:
        """Whether requests go to a plain HTTP proxy: their target is then an absolute URL."""
        return self._proxy is not None and not self._endpoint.is_ssl()

    def proxy_headers(self) -> dict[str, str]:
        """Return the headers that a plain HTTP proxy wants to see in each request."""
        if self._proxy is None or not self.forwards:
            return {}
        credentials = aiohttp.BasicAuth.from_url(self._proxy)
        return {"Proxy-Authorization": credentials.encode()} if credentials else {}

    async def connect(self) -> Connection:
        """Return a connection, idle before or new, that the caller must release or close.

        Cancelling is safe: no connection is lost.

        Raises:
            PoolTimeout: no connection became free within `pool_timeout`, or no descriptor is free for one.
            ConnectTimeout: DNS, TCP and TLS took longer than `connect_timeout`.
            ConnectError: the connection was refused, the host is unreachable or unknown, or TLS failed.
            CertificateFault: the provider's certificate is not valid.
        """
        place = self._gate.try_enter() or await self._wait()
        try:
            connection = await self._connector.connect(self._endpoint, [], self._timeout)
        except BaseException as exc:
            place.release()
            self._check_drained()
            if isinstance(exc, Exception):
                fault = self._translated(exc)
                # What aiohttp raises is in cycles with its frames, which lead to ours and to the request.
                if fault is not exc:
                    forget_frames(exc)
                raise fault from exc
            raise
        connection.add_callback(place.release)
        return connection

    async def _wait(self) -> Place:
        self._pending += 1
        try:
            place = await self._gate.enter()
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
        self._connector.trim()

    def drop_idle(self) -> None:
        """Close every idle connection: one of them proved dead."""
        self._connector.drop_idle()

    def stats(self) -> PoolStats:
        """Return a snapshot."""
        idle, acquired = self._connector.idle, self._connector.acquired
        return PoolStats(
            open=idle + acquired,
            idle=idle,
            limit=self._limits.max_connections,
            waiting=self._gate.waiting,
        )

    def exchanges(self) -> Iterator[Exchange]:
        """Iterate over the exchanges under way; nothing else may run meanwhile."""
        return self._connector.exchanges

    def retire(self) -> None:
        """Serve the requests that the pool has, and keep no connection: another pool takes over."""
        self._drained = asyncio.Event()
        self._connector.retire(self._check_drained)
        self._check_drained()

    async def drain(self) -> None:
        """Wait until a retired pool has served its last request, then close it."""
        assert self._drained is not None, "`retire` was called before"
        await self._drained.wait()
        await self.close()

    def _check_drained(self) -> None:
        if self._drained is not None and not self._pending and not self._connector.acquired:
            self._drained.set()

    async def close(self) -> None:
        """Close every connection."""
        await self._connector.close(abort_ssl=True)

    def _translated(self, exc: Exception) -> AioserverError | Exception:
        """Return the fault that stands for *exc*, which connecting has raised."""
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
                    "no file descriptor is free for a connection to %s: raise the limit of open files",
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
