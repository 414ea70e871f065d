"""The backlog-configured site: listening, and what the kernel gave.

Private names of aiohttp used here, guarded by `tests/server/test_listener.py`: `_runner`, `_server`, `_sock`,
`_backlog`.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiohttp import web

from aioserver.faces import context
from aioserver.telemetry.kernel import accept_queue

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aioserver.config.settings import WebSocket

logger = logging.getLogger("aioserver.listener")

UVLOOP_EARS = 8
KERNEL_PATIENCE = (
    1.0  # seconds by which the kernel's watch comes after ours, which logs and counts
)
MAX_PATIENCE = 2**31 - 1  # milliseconds: what setsockopt(2) takes
MAX_NOT_SENT = 1 << 17  # bytes that the kernel keeps for a client who takes nothing; else 4 MiB
SOMAXCONN = Path("/proc/sys/net/core/somaxconn")


class UnixSite(web.SockSite):
    """Serves a UNIX socket that somebody else has made, and leaves its file alone."""

    async def start(self) -> None:
        """Accept; the other sites know TCP only, or remove the file at the end."""
        await web.BaseSite.start(self)
        assert self._runner.server is not None
        loop = asyncio.get_running_loop()
        keep: dict[str, Any] = {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}
        self._server = await loop.create_unix_server(
            self._runner.server, sock=self._sock, backlog=self._backlog, **keep
        )


@dataclass(frozen=True, slots=True)
class Listening:
    """One listening socket. *queue_limit*: what the kernel gave; None where it does not say.

    Of a UNIX socket the host is its path, or `@` and its abstract name, and the port 0.
    """

    host: str
    port: int
    backlog: int
    queue_limit: int | None

    @property
    def url(self) -> str:
        """The address, as a browser wants it."""
        if not self.port:
            return f"unix:{self.host}"
        return (
            f"http://[{self.host}]:{self.port}"
            if ":" in self.host
            else f"http://{self.host}:{self.port}"
        )


async def listen(
    runner: web.AppRunner,
    given: WebSocket,
    *,
    send_timeout: float = 10.0,
    inherited: Sequence[socket.socket] = (),
) -> list[Listening]:
    """Listen on every address of the host, with the backlog.

    *inherited*: sockets that are bound and listen already; where there are any, host and port are
    not looked at. Connections that wait in them are answered. They are closed at the end.

    *send_timeout*: the kernel aborts a connection that takes nothing for a second more than that,
    also when all that is left to do is to close it (`TCP_USER_TIMEOUT`, inherited from the listening socket). What
    it keeps for one that takes nothing is bounded as well (`TCP_NOTSENT_LOWAT`).

    Raises:
        OSError: the address is in use, or is not ours.
    """
    backlog = given.concurrency.uvicorn.backlog
    loop = asyncio.get_running_loop()
    bound = list(inherited) or await _bound(loop, given.host, given.port)
    listening = []
    for sock in bound:
        site = UnixSite if sock.family == socket.AF_UNIX else web.SockSite
        limit_kernel(sock, send_timeout)
        sock.setblocking(False)
        for ear in (sock, *(sock.dup() for _ in range(_ears(loop) - 1))):
            await site(runner, ear, backlog=backlog).start()
        host, number = address_of(sock)
        queue = accept_queue(sock)
        listening.append(Listening(host, number, backlog, queue.limit if queue else None))
        runner.app[context.LIFE].listening.append(sock)
    _tell(listening)
    return listening


def _ears(loop: asyncio.AbstractEventLoop) -> int:
    """How often *loop* watches one listening socket.

    uvloop takes one connection for each watcher and turn of the loop: under load a turn is long,
    and newcomers would starve while those who are in notice nothing. asyncio takes all that wait.
    """
    return UVLOOP_EARS if type(loop).__module__.startswith("uvloop") else 1


async def _addresses(
    loop: asyncio.AbstractEventLoop, host: str, port: int
) -> Sequence[tuple[int, str]]:
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    unique = dict.fromkeys((family, str(address[0])) for family, *_, address in found)
    if host == "localhost":  # a machine may have no IPv6 though its hosts file names it
        unique = {
            key: None for key in unique if key[0] == socket.AF_INET or socket.has_dualstack_ipv6()
        }
    return list(unique)


async def _bound(loop: asyncio.AbstractEventLoop, host: str, port: int) -> list[socket.socket]:
    """A socket for each address of *host*, all on one port; or none, where one cannot be bound."""
    bound: list[socket.socket] = []
    try:
        for family, address in await _addresses(loop, host, port):
            bound.append(_bind(family, address, port))
            port = port or bound[0].getsockname()[1]  # any port, but one for all addresses
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


def limit_kernel(sock: socket.socket, send_timeout: float) -> None:
    """Bound what the kernel keeps for a client of *sock*, and how long; accepted ones inherit it."""
    if sock.family == socket.AF_UNIX or sock.fileno() < 0:
        return
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        milliseconds = min(int((send_timeout + KERNEL_PATIENCE) * 1000), MAX_PATIENCE)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, MAX_NOT_SENT)


def hosts(inherited: Sequence[socket.socket]) -> list[str] | None:
    """The addresses that *inherited* can be reached by over a network; None: the configured one."""
    if not inherited:
        return None
    return [address_of(sock)[0] for sock in inherited if sock.family != socket.AF_UNIX]


def address_of(sock: socket.socket) -> tuple[str, int]:
    """Host and port of *sock*; of a UNIX socket its path (abstract: `@` and the name) and 0."""
    name = sock.getsockname()
    if sock.family != socket.AF_UNIX:
        return name[0], name[1]
    if isinstance(name, bytes):
        return f"@{name[1:].decode(errors='replace')}", 0
    return name, 0


def _tell(listening: Sequence[Listening]) -> None:
    for one in listening:
        given = "unknown" if one.queue_limit is None else one.queue_limit
        logger.info("listening on %s backlog=%d kernel=%s", one.url, one.backlog, given)
        if one.queue_limit is not None and one.queue_limit < one.backlog:
            logger.warning(
                "the kernel gave a queue of %d instead of backlog=%d: raise %s",
                one.queue_limit,
                one.backlog,
                "net.core.somaxconn",
            )
