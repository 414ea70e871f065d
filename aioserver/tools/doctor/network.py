"""A connection to a host: the look-up of its name, TCP, TLS."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import time
from typing import TYPE_CHECKING, Any

from aioserver.client import faults
from aioserver.tools.doctor.results import Result, fail, ok, warn

if TYPE_CHECKING:
    from collections.abc import Callable

    from yarl import URL

# The doctor warns of a certificate that is valid for fewer days than this.
SOON = 14.0
SECONDS_A_DAY = 86400.0


async def connect(
    url: URL,
    limit: float,
    context: ssl.SSLContext | None = None,
    problem: Callable[[str, str], Result] = fail,
    trust: str = "ca_file",
) -> tuple[list[Result], str | None]:
    """Connect to the host of *url* within *limit* seconds, with TLS if its scheme has that.

    Return the results, and the protocol that TLS has agreed on (ALPN, RFC 7301), or ""; None if
    there is no connection. *problem* makes the result of a failure. *trust* says how an authority
    is trusted.
    """
    if url.scheme == "https":
        context = context or ssl.create_default_context()
        context.set_alpn_protocols(["h2", "http/1.1"])
    began = time.perf_counter()
    try:
        async with asyncio.timeout(limit):
            _, writer = await asyncio.open_connection(url.host, url.port, ssl=context)
    except (OSError, UnicodeError) as error:
        return [problem(*_fault(error, url, trust))], None
    took = time.perf_counter() - began
    try:
        address, port = writer.get_extra_info("peername")[:2]
        results = [ok(f"connected to {address} port {port}", seconds=took)]
        tls: Any = writer.get_extra_info("ssl_object")
        if tls is None:
            return results, ""
        ends = ssl.cert_time_to_seconds(tls.getpeercert()["notAfter"])
        days = (ends - time.time()) / SECONDS_A_DAY
        text = f"TLS: {tls.version()}, and a certificate that is valid for {days:.0f} days"
        soon = warn(text, "renew it: no client connects once it has expired")
        results.append(ok(text) if days >= SOON else soon)
        return results, tls.selected_alpn_protocol() or ""
    finally:
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def _fault(error: Exception, url: URL, trust: str) -> tuple[str, str]:
    """Return the text and the hint for *error*; the texts of asyncio are long."""
    reason = faults.describe(error)
    match error:
        case ssl.SSLCertVerificationError():
            hint = f"renew it, use the name that it has, or trust its authority ({trust})"
            return f"TLS: the certificate is refused: {error.verify_message}", hint
        case ssl.SSLError():
            text = f"TLS: no handshake: {error.reason or 'the connection was closed'}"
            return text, "is there TLS on this port at all?"
        case socket.gaierror() | UnicodeError():
            hint = "check its spelling, and the DNS servers of this machine (/etc/resolv.conf)"
            return f"the name {url.host} is not found: {reason}", hint
        case OSError(errno=int(number)) if number > 0:
            reason = os.strerror(number)
    text = f"no connection: {url.host} port {url.port}: {reason}"
    return text, "nothing listens there, or a firewall is in the way"
