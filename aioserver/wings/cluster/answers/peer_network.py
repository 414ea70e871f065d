"""How the instances of a cluster reach each other: each listens on a socket of its own, and its
name ends with the address of that socket. So an instance that knows a member or a claim can reach
it, also while the cluster's server is away.

    HOST-PID-TOKEN@unix               FOLDER/TOKEN.sock, in the folder of their parent's server
    HOST-PID-TOKEN@10.0.0.5:41234     TCP

The socket is bound before the instance joins, so that its name is known, and connections are
accepted once the instance serves. After its end they are refused.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from aioserver.config.faults import ConfigurationError
from aioserver.files.certificates import load_authorities, load_pair
from aioserver.gateway.contracts.timeouts import timeout
from aioserver.wings.cluster.limits.leases import token_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from aioserver.config.settings import Cluster, PeerTls

P = TypeVar("P", bound=asyncio.Protocol)
# Seconds for a connection to another instance, with TLS.
CONNECT = 1.0
# Connections that wait to be accepted.
BACKLOG = 1024
# The end of a name whose instance has a UNIX socket.
UNIX = "unix"
# Bytes of the path of such a socket, at most (`sun_path` in unix(7), with its last zero).
MAX_PATH = 107
# Instances whose TLS sessions are kept.
MAX_SESSIONS = 64
# The port of a Redis server whose URL names none.
REDIS_PORT = 6379


class Gone(Exception):
    """Nothing listens at the address of an instance: its process has ended."""


class Unreachable(Exception):
    """No connection to an instance could be made: nothing is known of it."""


class Address(NamedTuple):
    """Where an instance listens: a host and a port, or the path of a UNIX socket and 0."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}" if self.port else self.host


class Resuming(ssl.SSLContext):
    """TLS of a client that resumes its last session with each instance (RFC 8446, 2.2): both sides
    have shown their certificates in it, so that they need not sign again.

    Always: a session is offered to the instance that has given it, and to no other; at most
    MAX_SESSIONS instances are remembered. An instance that does not know a session goes on with
    its certificate.
    """

    def __init__(self, _protocol: int) -> None:
        # By the token of an instance, the last used at the end: its last session, and the
        # connection whose session is the next one, once its ticket has come.
        self._last: dict[str, tuple[ssl.SSLSession | None, ssl.SSLObject]] = {}

    # asyncio and uvloop begin each connection by it.
    def wrap_bio(self, *args: Any, **options: Any) -> ssl.SSLObject:
        """Begin a connection to the instance whose token is the option *server_hostname*. The
        token is not sent: a host's name goes over the wire in clear (RFC 6066, 3).
        """
        token = options.pop("server_hostname")
        session, before = self._last.pop(token, (None, None))
        if before is not None and (newer := before.session) is not None and newer.has_ticket:
            session = newer
        begun = super().wrap_bio(*args, **options | {"session": session})
        self._last[token] = session, begun
        if len(self._last) > MAX_SESSIONS:
            del self._last[next(iter(self._last))]
        return begun


class Contexts(NamedTuple):
    """TLS between instances: both sides show a certificate of one authority, whose names are not
    checked.
    """

    server: ssl.SSLContext
    client: Resuming


class PeerNetwork:
    """The ways of one instance, which listens on *sock*, and whose name ends with *end*.

    *folder* has the UNIX sockets of the instances that have one; None: none has.
    """

    def __init__(
        self,
        sock: socket.socket,
        end: str,
        folder: Path | None = None,
        tls: Contexts | None = None,
    ) -> None:
        self.end = end
        self._sock, self._folder, self._tls = sock, folder, tls
        # The file of a UNIX socket; an abstract one, whose name is bytes, has none.
        self._path = name if isinstance(name := sock.getsockname(), str) else None
        self._server: asyncio.Server | None = None

    async def listen(self, make: Callable[[], asyncio.Protocol]) -> None:
        """Accept connections of others, each with a protocol that *make* returns."""
        loop = asyncio.get_running_loop()
        context = None if self._tls is None else self._tls.server
        self._sock.setblocking(False)
        if self._sock.family == socket.AF_UNIX:
            self._server = await loop.create_unix_server(make, sock=self._sock, backlog=BACKLOG)
        else:
            self._server = await loop.create_server(
                make, sock=self._sock, backlog=BACKLOG, ssl=context
            )

    async def dial(self, name: str, make: Callable[[], P]) -> tuple[asyncio.Transport, P]:
        """Return a new connection to the instance *name*, with the protocol that *make* returns.

        Raises:
            Gone: the instance has ended.
            Unreachable: nothing is known of it.
        """
        loop = asyncio.get_running_loop()
        try:
            address = self.where(name)
            async with timeout(CONNECT):
                if not address.port:
                    return await loop.create_unix_connection(make, address.host)
                options: dict[str, Any] = {}
                if self._tls is not None:
                    options = {"ssl": self._tls.client, "server_hostname": token_of(name)}
                made = await loop.create_connection(make, *address, **options)
                keep_alive(made[0])
                return made
        except (ConnectionRefusedError, FileNotFoundError) as exc:
            raise Gone(name) from exc
        except TimeoutError:
            raise Unreachable(f"no connection in {CONNECT:g} s") from None
        # A full backlog of a UNIX socket is one of them: EAGAIN.
        except (OSError, ValueError) as exc:
            raise Unreachable(str(exc)) from exc

    def where(self, name: str) -> Address:
        """Return the address of the instance *name*.

        Raises:
            ValueError: the name has none.
        """
        end = name.rpartition("@")[2]
        if end == UNIX and self._folder is not None:
            return Address(os.fspath(socket_of(self._folder, token_of(name))), 0)
        try:
            address = address_of(end)
        except ValueError:
            raise ValueError("its name has no address") from None
        if not address.port:
            raise ValueError("its name has no address")
        return address

    def forget(self, token: str) -> None:
        """Note that the instance with *token* has certainly ended: remove its UNIX socket."""
        if self._folder is not None:
            socket_of(self._folder, token).unlink(missing_ok=True)

    def close(self) -> None:
        """Accept nothing any more; a second call does nothing."""
        if self._server is None:
            self._sock.close()
        else:
            self._server.close()
        if self._path is not None:
            Path(self._path).unlink(missing_ok=True)


def keep_alive(transport: asyncio.BaseTransport) -> None:
    """Let the kernel notice within three seconds that the other machine of a TCP connection is
    gone, also while nothing is sent.
    """
    sock = transport.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 1), ("TCP_KEEPINTVL", 1), ("TCP_KEEPCNT", 2)):
        # macOS has another name for the first one.
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def socket_of(folder: Path, token: str) -> Path:
    """Return the path of the UNIX socket of the instance with *token*."""
    return folder / f"{token}.sock"


def address_of(text: str) -> Address:
    """Return the address HOST:PORT, or HOST alone with the port 0; an IPv6 address stands in
    brackets if it has a port.

    Raises:
        ValueError: it is none.
    """
    host, separator, port = text.rpartition(":")
    if not separator or (":" in host and not host.startswith("[")) or text.endswith("]"):
        host, port = text, "0"
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"no address: {text}")
    return Address(host, int(port))


def bind_unix(folder: Path, token: str) -> PeerNetwork:
    """Return the network of an instance with *token* whose parent has the private *folder*.

    Raises:
        ConfigurationError: the path of its socket would be too long.
    """
    path = socket_of(folder, token)
    if len(os.fsencode(path)) > MAX_PATH:
        raise ConfigurationError(
            [f"{path} is too long for a socket: set TMPDIR to a shorter path"]
        )
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(os.fspath(path))
    return PeerNetwork(sock, UNIX, folder)


async def bind_tcp(cluster: Cluster, url: str) -> PeerNetwork:
    """Return the network of an instance of *cluster*, whose server is at *url*.

    Raises:
        ConfigurationError: it cannot listen where it is told to, or its certificate cannot be
            used.
    """
    tls = None if cluster.tls is None else contexts_of(cluster.tls)
    host, ports = (None, [0]) if cluster.listen is None else _ports(cluster.listen)
    local = await _local_address(url)
    sock = await _bind(host or local, ports)
    bound = Address(*sock.getsockname()[:2])
    advertised = address_of(cluster.advertise or host or local)
    if cluster.advertise is None and advertised.host in {"0.0.0.0", "::"}:  # noqa: S104 - any address
        advertised = Address(local, 0)
    end = str(advertised if advertised.port else Address(advertised.host, bound.port))
    return PeerNetwork(sock, end, tls=tls)


def contexts_of(tls: PeerTls) -> Contexts:
    """Return the contexts of both sides. It blocks.

    Raises:
        ConfigurationError: a file cannot be used.
    """
    contexts = Contexts(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), Resuming(ssl.PROTOCOL_TLS_CLIENT))
    contexts.client.check_hostname = False
    # A session may be resumed more than once.
    contexts.server.num_tickets = 1
    for context in contexts:
        context.verify_mode = ssl.CERT_REQUIRED
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        try:
            load_pair(context, tls.cert_file, tls.key_file)
            load_authorities(tls.ca_file, context)
        except ValueError as fault:
            raise ConfigurationError([f"cluster.tls: {fault}"]) from None
    return contexts


def _ports(listen: str) -> tuple[str, Iterator[int]]:
    """Return the host of HOST:PORT or HOST:FIRST-LAST, and the ports."""
    host, _, ports = listen.rpartition(":")
    first, _, last = ports.partition("-")
    return host.removeprefix("[").removesuffix("]"), iter(
        range(int(first), int(last or first) + 1)
    )


async def _bind(host: str, ports: Any) -> socket.socket:
    """Return a socket that is bound to the first free one of *ports*.

    Raises:
        ConfigurationError: none is free, or *host* is no address of this machine.
    """
    loop = asyncio.get_running_loop()
    fault: OSError | None = None
    try:
        found = await loop.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
        family, _, _, _, address = found[0]
    except OSError as exc:
        raise ConfigurationError([f"cluster.listen: {host}: {exc.strerror}"]) from None
    for port in ports:
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((address[0], port, *address[2:]))
            # Two sockets may be bound to one port until one of them listens.
            sock.listen(BACKLOG)
        except OSError as exc:
            sock.close()
            fault = exc
        else:
            return sock
    why = "no port" if fault is None else fault.strerror
    raise ConfigurationError([f"cluster.listen: no port of {host} can be used: {why}"])


async def _local_address(url: str) -> str:
    """Return the address of this machine from which it reaches the server at *url*: the others
    most likely reach this machine by it, too.
    """
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return "127.0.0.1"
    try:
        infos = await asyncio.get_running_loop().getaddrinfo(
            parts.hostname or "localhost", parts.port or REDIS_PORT, type=socket.SOCK_DGRAM
        )
        family, kind, _, _, address = infos[0]
        # Nothing is sent: the kernel chooses the address.
        with socket.socket(family, kind) as sock:
            sock.connect(address)
            return str(sock.getsockname()[0])
    except (OSError, ValueError):
        # The server's name is not known now: `cluster.advertise` can name an address.
        return "127.0.0.1"
