"""The road to a host, step by step: its name, a connection, TLS."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import ssl
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from aioserver.client import faults as client_faults

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from aioserver.tools.doctor.findings import Report

    Problem = Callable[[str, str, str], None]

# Addresses of one name that are tried; a name with more of them has them for one and the same
# service.
MAX_ADDRESSES = 4
# This machine has no address of that family, as most containers have none of IPv6.
NO_ROAD = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.ENETUNREACH})
# Days before the end of a certificate, from which on somebody has to act.
SOON = 14.0
SECONDS_A_DAY = 86400.0


class Peer(NamedTuple):
    """A host to reach, each step within *limit* seconds. *context*: None without TLS. *trust*: how
    an authority is trusted that the system does not know.
    """

    host: str
    port: int
    context: ssl.SSLContext | None
    limit: float
    trust: str = "trust its authority (ca_file)"


class Steps:
    """The steps to *peer*. *problem* takes what is wrong; None: `report.fail`."""

    def __init__(
        self, report: Report, subject: str, peer: Peer, problem: Problem | None = None
    ) -> None:
        self._report = report
        self._subject = subject
        self._peer = peer
        self._problem = problem or report.fail

    async def take(self) -> str | None:
        """Look the name up, connect to each of its addresses, and make a TLS handshake with one.

        Returns None if there is no way to the peer; otherwise the protocol that TLS has agreed on
        (ALPN, RFC 7301), empty where it has not.
        """
        infos = await self._look_up()
        sock = await self._connect(infos) if infos else None
        if sock is None:
            return None
        if self._peer.context is None:
            sock.close()
            return ""
        return await self._secure(sock)

    async def _look_up(self) -> Sequence[tuple[Any, ...]]:
        """Return the addresses; none if the name is not found."""
        host, port = self._peer.host, self._peer.port
        loop, began = asyncio.get_running_loop(), time.perf_counter()
        try:
            async with asyncio.timeout(self._peer.limit):
                infos = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            self._problem(
                self._subject,
                f"the name {host} is not found: {_reason(error)}",
                "check its spelling, and the DNS servers of this machine (/etc/resolv.conf)",
            )
            return ()
        names = dict.fromkeys(str(info[4][0]) for info in infos)
        # An address needs no look-up.
        if [*names] != [host]:
            took = time.perf_counter() - began
            self._report.ok(self._subject, f"DNS: {host} is {', '.join(names)}", took)
        return infos[:MAX_ADDRESSES]

    async def _connect(self, infos: Sequence[tuple[Any, ...]]) -> socket.socket | None:
        """Connect to all addresses.

        Returns the first socket that is connected; None if none is.
        """
        subject = self._subject
        faults: list[str] = []
        # Addresses of a family that this machine has not, which cost nobody any time.
        absent: list[str] = []
        with contextlib.ExitStack() as stack:
            connected: socket.socket | None = None
            for family, kind, protocol, _, address in infos:
                began = time.perf_counter()
                try:
                    sock = stack.enter_context(socket.socket(family, kind, protocol))
                    sock.setblocking(False)
                    async with asyncio.timeout(self._peer.limit):
                        await asyncio.get_running_loop().sock_connect(sock, address)
                except OSError as error:
                    text = f"{address[0]} port {address[1]}: {_reason(error)}"
                    (absent if error.errno in NO_ROAD else faults).append(text)
                    continue
                if connected is None:
                    took = time.perf_counter() - began
                    self._report.ok(subject, f"connected to {address[0]} port {address[1]}", took)
                    # The stack closes the original.
                    connected = sock.dup()
                    connected.setblocking(False)
        if connected is None:
            hint = "nothing listens there, or a firewall is in the way"
            self._problem(subject, f"no connection: {'; '.join((*faults, *absent))}", hint)
        elif faults:
            text = f"one of its addresses cannot be reached: {'; '.join(faults)}"
            self._report.warn(subject, text, "each new connection may try it first, and wait")
        return connected

    async def _secure(self, sock: socket.socket) -> str | None:
        """Make a TLS handshake on *sock*, and close it. Returns None if it has failed."""
        began = time.perf_counter()
        try:
            async with asyncio.timeout(self._peer.limit):
                # A transport closes the socket, also where the handshake fails.
                _, writer = await asyncio.open_connection(
                    sock=sock, ssl=self._peer.context, server_hostname=self._peer.host
                )
        except ssl.SSLCertVerificationError as error:
            self._problem(
                self._subject,
                f"TLS: the certificate is refused: {error.verify_message}",
                f"renew it, use the name that it has, or {self._peer.trust}",
            )
            return None
        except OSError as error:
            text = f"TLS: no handshake: {_reason(error)}"
            self._problem(self._subject, text, "is there TLS on this port at all?")
            return None
        took = time.perf_counter() - began
        tls: ssl.SSLObject = writer.get_extra_info("ssl_object")
        self._tell_certificate(f"TLS: {tls.version()}", tls.getpeercert() or {}, took)
        protocol = tls.selected_alpn_protocol() or ""
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        return protocol

    def _tell_certificate(self, text: str, certificate: Mapping[str, Any], took: float) -> None:
        days = ssl.cert_time_to_seconds(str(certificate["notAfter"])) - time.time()
        days /= SECONDS_A_DAY
        text = f"{text}, and a certificate that is valid for {days:.0f} days"
        if days < SOON:
            self._report.warn(self._subject, text, "renew it: once it has ended, nobody connects")
        else:
            self._report.ok(self._subject, text, took)


def _reason(error: BaseException) -> str:
    """Return in a few words why a step failed; asyncio's own texts are long."""
    if isinstance(error, ssl.SSLError):
        return str(error.reason or "the connection was closed")
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return client_faults.describe(error)
