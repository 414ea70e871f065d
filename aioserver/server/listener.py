"""Listening with the configured backlog, and a check of the backlog that the kernel granted."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from aioserver.telemetry.kernel import accept_queue

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from aioserver.config.settings import WebSocket
    from aioserver.server.connection import ConnectionServer
    from aioserver.server.tls import Handshakes

logger = logging.getLogger("aioserver.listener")

UVLOOP_WATCHERS = 8
# Unsent bytes that the kernel keeps for a client that reads nothing; its own default is 4 MiB.
MAX_NOT_SENT = 1 << 17
# How the configured host is looked up.
LOOK_UP: dict[str, Any] = {"type": socket.SOCK_STREAM, "flags": socket.AI_PASSIVE}
# Iterations of the loop within which asyncio makes a connection of an accepted socket; it needs
# one.
MAX_TURNS = 10


class ListeningSocket(socket.socket):
    """A socket that counts accepted connections, and accepts nothing while it is *paused*.

    For asyncio's loop alone, which accepts by this class; libuv does not.
    """

    accepted = 0
    paused = False

    def accept(self) -> tuple[socket.socket, Any]:
        """Return the next connection, and its address.

        Raises:
            BlockingIOError: there is none, or the socket is paused.
        """
        if self.paused:
            raise BlockingIOError
        connection = super().accept()
        self.accepted += 1
        return connection


class Site:
    """Accepts the connections of *server* on *sock*, a TCP socket, or a UNIX socket whose file is
    not removed at the end. While it accepts, it is one of the server's sites.

    *handshakes* are the TLS handshakes of TCP sockets; None: all connections are plain.

    Always: each connection that it has accepted becomes one of the server's.
    """

    def __init__(
        self,
        server: ConnectionServer,
        sock: ListeningSocket,
        *,
        backlog: int,
        handshakes: Handshakes | None = None,
    ) -> None:
        self._server, self._sock, self._backlog = server, sock, backlog
        # A UNIX socket is guarded by the permissions of its file.
        self._handshakes = handshakes if sock.family != socket.AF_UNIX else None
        self._accepting: asyncio.Server | None = None
        # How many of the accepted sockets have become connections.
        self._made = 0

    async def start(self) -> None:
        """Accept connections."""
        self._server.sites.add(self)
        loop = asyncio.get_running_loop()
        if self._sock.family == socket.AF_UNIX:
            keep: dict[str, Any] = {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}
            self._accepting = await loop.create_unix_server(
                self._make, sock=self._sock, backlog=self._backlog, **keep
            )
        else:
            self._accepting = await loop.create_server(
                self._make, sock=self._sock, backlog=self._backlog
            )

    def pause(self) -> None:
        """Accept nothing more on asyncio's loop, which keeps trying until `stop` is called."""
        self._sock.paused = True

    async def stop(self) -> None:
        """Accept no more connections, and close the socket.

        asyncio makes a connection of an accepted socket in the next iteration of the loop. If its
        server is closed by then, asyncio silently drops the socket, and the client would wait for
        ever.
        """
        self.pause()
        for _ in range(MAX_TURNS):
            if self._made >= self._sock.accepted:
                break
            await asyncio.sleep(0)
        if self._accepting is not None:
            self._accepting.close()
        self._server.sites.discard(self)

    def _make(self) -> asyncio.Protocol:
        self._made += 1
        return self._server() if self._handshakes is None else self._handshakes.make(self._server)


class Balance(Protocol):
    """Decides when this process accepts connections, where several do."""

    async def accept_on(
        self,
        server: ConnectionServer,
        sock: ListeningSocket,
        backlog: int,
        handshakes: Handshakes | None,
    ) -> None:
        """Accept connections for *server* on *sock*, which already listens, and close it at the
        end; *handshakes*: see `Site`.
        """

    def server(self, *args: Any, **kwargs: Any) -> ConnectionServer:
        """Return a server whose connections are counted."""

    def start(self, waiting: Callable[[], int]) -> None:
        """Begin: this process serves. *waiting* returns how many clients wait for a place here."""

    async def end(self) -> None:
        """Accept no more connections, for good."""

    def close(self) -> None:
        """Undo `start`."""


class Listening(msgspec.Struct, frozen=True):
    """One listening socket. *queue_limit*: the backlog that the kernel granted, None if unknown.

    The host of a UNIX socket is its path, or `@` and its abstract name; its port is 0.
    """

    host: str
    port: int
    backlog: int
    queue_limit: int | None
    sock: socket.socket
    scheme: str = "http"

    @property
    def url(self) -> str:
        """The address for a browser."""
        return url_of(self.host, self.port, self.scheme)


async def listen(
    server: ConnectionServer,
    settings: WebSocket,
    *,
    inherited: Sequence[socket.socket] = (),
    balance: Balance | None = None,
    handshakes: Handshakes | None = None,
) -> list[Listening]:
    """Listen on every address of the configured host, with the configured backlog, and accept for
    *server*.

    *inherited*: sockets that are already bound and listen. If there are any, host and port are not
    used; connections that wait in them are answered, and the sockets are closed at the end.

    *handshakes* are the TLS handshakes of TCP sockets; None: plain. *balance* decides when this
    process accepts, if other processes accept on the same sockets, too; the sockets listen already
    in that case.

    The kernel's buffer for a client that reads nothing is bounded (`TCP_NOTSENT_LOWAT`, which
    accepted sockets inherit). There is no `TCP_USER_TIMEOUT`: it also resets a client that reads
    steadily, if its window is closed at the moment (limits/write_watchdog.py).

    Raises:
        OSError: the address is in use, or is not one of this machine.
    """
    backlog = settings.concurrency.uvicorn.backlog
    loop = asyncio.get_running_loop()
    if inherited:
        bound = list(inherited)
    else:
        infos = await loop.getaddrinfo(settings.host, settings.port, **LOOK_UP)
        bound = bind(settings.host, settings.port, infos)
    listening = []
    for plain in bound:
        sock = ListeningSocket(plain.family, plain.type, plain.proto, fileno=plain.detach())
        limit_kernel(sock)
        sock.setblocking(False)
        if balance is not None:
            await balance.accept_on(server, sock, backlog, handshakes)
        else:
            for watched in (sock, *(sock.dup() for _ in range(watchers(loop) - 1))):
                await Site(server, watched, backlog=backlog, handshakes=handshakes).start()
        host, port = address_of(sock)
        queue = accept_queue(sock)
        scheme = "http" if handshakes is None else "https"
        limit = queue.limit if queue else None
        listening.append(Listening(host, port, backlog, limit, sock, scheme))
    _log(listening)
    return listening


def watchers(loop: asyncio.AbstractEventLoop) -> int:
    """Return how many watchers *loop* needs for one listening socket.

    uvloop accepts one connection for each watcher and iteration of the loop. Under load an
    iteration is long, and new clients would starve, while connected ones notice nothing. asyncio
    accepts all waiting connections.
    """
    return UVLOOP_WATCHERS if type(loop).__module__.startswith("uvloop") else 1


def _addresses(host: str, infos: Iterable[tuple[Any, ...]]) -> Sequence[tuple[int, str]]:
    unique = dict.fromkeys((family, str(address[0])) for family, *_, address in infos)
    # A machine may have no IPv6, although its hosts file has such an address for localhost.
    if host == "localhost":
        unique = {
            key: None for key in unique if key[0] == socket.AF_INET or socket.has_dualstack_ipv6()
        }
    return list(unique)


def bind(host: str, port: int, infos: Iterable[tuple[Any, ...]]) -> list[socket.socket]:
    """Return a bound socket for each address of *host*, all on one port.

    *infos* is the result of getaddrinfo(3) for the host, looked up with LOOK_UP.

    Raises:
        OSError: one address cannot be bound; no socket is left open then.
    """
    bound: list[socket.socket] = []
    try:
        for family, address in _addresses(host, infos):
            bound.append(_bind(family, address, port))
            # Port 0 stands for any free port, but for the same one at all addresses.
            port = port or bound[0].getsockname()[1]
    except OSError:
        for sock in bound:
            sock.close()
        raise
    return bound


def _bind(family: int, address: str, port: int) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((address, port))
    except OSError:
        sock.close()
        raise
    return sock


def limit_kernel(sock: socket.socket) -> None:
    """Bound the kernel's buffer for each client on sockets accepted from *sock*."""
    if sock.family != socket.AF_UNIX and hasattr(socket, "TCP_NOTSENT_LOWAT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, MAX_NOT_SENT)


def hosts(inherited: Sequence[socket.socket]) -> list[str] | None:
    """Return the network addresses of *inherited* sockets; None if the configured one is used."""
    if not inherited:
        return None
    return [address_of(sock)[0] for sock in inherited if sock.family != socket.AF_UNIX]


def address_of(sock: socket.socket) -> tuple[str, int]:
    """Return host and port of *sock*. For a UNIX socket these are its path (abstract: `@` and the
    name) and 0.
    """
    name = sock.getsockname()
    if sock.family != socket.AF_UNIX:
        return name[0], name[1]
    if isinstance(name, bytes):
        return f"@{name[1:].decode(errors='replace')}", 0
    return name, 0


def url_of(host: str, port: int, scheme: str = "http") -> str:
    """Return the address for a browser of a listening socket that `address_of` names."""
    if not port:
        return f"unix:{host}"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _log(listening: Sequence[Listening]) -> None:
    for entry in listening:
        limit = "unknown" if entry.queue_limit is None else entry.queue_limit
        logger.info("listening on %s backlog=%d kernel=%s", entry.url, entry.backlog, limit)
        if entry.queue_limit is not None and entry.queue_limit < entry.backlog:
            logger.warning(
                "the kernel gave a queue of %d instead of backlog=%d: raise %s",
                entry.queue_limit,
                entry.backlog,
                "net.core.somaxconn",
            )
