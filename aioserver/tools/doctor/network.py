"""The steps of a connection to a host: the look-up of its name, TCP, TLS."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aioserver.client import faults
from aioserver.tools.doctor.results import Result, fail, ok, warn

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from yarl import URL

    Problem = Callable[[str, str], Result]

# Days that a certificate is still valid, below which the doctor warns.
SOON = 14.0
SECONDS_A_DAY = 86400.0


@dataclass
class Peer:
    """A host to connect to, with *limit* seconds for each step.

    *context* is None without TLS. *trust* is the hint for a certificate of an unknown authority.
    """

    host: str
    port: int
    context: ssl.SSLContext | None
    limit: float
    trust: str = "trust its authority (ca_file)"
    # Whether all steps have succeeded, and the protocol that TLS has agreed on (ALPN, RFC 7301).
    reached: bool = False
    protocol: str = ""

    @classmethod
    def at(cls, url: URL, limit: float, default_port: int = 0) -> Peer:
        """Return the peer at *url*, with TLS if its scheme asks for it."""
        context = ssl.create_default_context() if url.scheme in {"https", "rediss"} else None
        return cls(url.host or "", url.port or default_port, context, limit)

    async def steps(self, problem: Problem = fail) -> AsyncIterator[Result]:
        """Look the name up, connect, and make a TLS handshake.

        *problem* makes the result of a step that fails.
        """
        loop, began = asyncio.get_running_loop(), time.perf_counter()
        try:
            async with asyncio.timeout(self.limit):
                infos = await loop.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            yield problem(
                f"the name {self.host} is not found: {_reason(error)}",
                "check its spelling, and the DNS servers of this machine (/etc/resolv.conf)",
            )
            return
        addresses = [*dict.fromkeys(str(info[4][0]) for info in infos)]
        # If the host is an address, nothing was looked up.
        if addresses != [self.host]:
            took = time.perf_counter() - began
            yield ok(f"DNS: {self.host} is {', '.join(addresses)}", seconds=took)
        began = time.perf_counter()
        try:
            async with asyncio.timeout(self.limit):
                _, writer = await asyncio.open_connection(self.host, self.port)
        except OSError as error:
            hint = "nothing listens there, or a firewall is in the way"
            where = f"{', '.join(addresses)} port {self.port}"
            yield problem(f"no connection: {where}: {_reason(error)}", hint)
            return
        try:
            took = time.perf_counter() - began
            address, port = writer.get_extra_info("peername")[:2]
            yield ok(f"connected to {address} port {port}", seconds=took)
            if self.context is None:
                self.reached = True
            else:
                yield await self._secure(writer, self.context, problem)
        finally:
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _secure(
        self, writer: asyncio.StreamWriter, context: ssl.SSLContext, problem: Problem
    ) -> Result:
        """Make a TLS handshake, and check the certificate."""
        began = time.perf_counter()
        try:
            async with asyncio.timeout(self.limit):
                await writer.start_tls(context, server_hostname=self.host)
        except ssl.SSLCertVerificationError as error:
            text = f"TLS: the certificate is refused: {error.verify_message}"
            return problem(text, f"renew it, use the name that it has, or {self.trust}")
        except OSError as error:
            text = f"TLS: no handshake: {_reason(error)}"
            return problem(text, "is there TLS on this port at all?")
        took = time.perf_counter() - began
        tls: ssl.SSLObject = writer.get_extra_info("ssl_object")
        self.reached, self.protocol = True, tls.selected_alpn_protocol() or ""
        ends = ssl.cert_time_to_seconds(str((tls.getpeercert() or {})["notAfter"]))
        days = (ends - time.time()) / SECONDS_A_DAY
        text = f"TLS: {tls.version()}, and a certificate that is valid for {days:.0f} days"
        if days < SOON:
            return warn(text, "renew it: once it has ended, nobody connects")
        return ok(text, seconds=took)


def _reason(error: BaseException) -> str:
    """Return the reason of a failed step in a few words; the texts of asyncio are long."""
    if isinstance(error, ssl.SSLError):
        return str(error.reason or "the connection was closed")
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return faults.describe(error)
