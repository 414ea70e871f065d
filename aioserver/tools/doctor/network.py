"""A connection to a host: the look-up of its name, TCP, TLS."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from aioserver.client import faults
from aioserver.tools.doctor.results import Result, fail, ok, warn

if TYPE_CHECKING:
    from collections.abc import Callable

    from yarl import URL

# Days that a certificate is still valid, below which the doctor warns.
SOON = 14.0
SECONDS_A_DAY = 86400.0
TRUST = "trust its authority (ca_file)"
# The text and the hint for each error of a connection: the first row that fits counts.
FAULTS: tuple[tuple[type[Exception] | tuple[type[Exception], ...], str, str], ...] = (
    (
        (socket.gaierror, UnicodeError),
        "the name {host} is not found: {reason}",
        "check its spelling, and the DNS servers of this machine (/etc/resolv.conf)",
    ),
    (
        ssl.SSLCertVerificationError,
        "TLS: the certificate is refused: {reason}",
        "renew it, use the name that it has, or {trust}",
    ),
    (ssl.SSLError, "TLS: no handshake: {reason}", "is there TLS on this port at all?"),
    (
        OSError,
        "no connection: {host} port {port}: {reason}",
        "nothing listens there, or a firewall is in the way",
    ),
)


class Connected(NamedTuple):
    """The results of a connection, whether it was made, and the protocol that TLS has agreed on
    (ALPN, RFC 7301).
    """

    results: list[Result]
    reached: bool = False
    protocol: str = ""


def context_for(url: URL) -> ssl.SSLContext | None:
    """Return a context for *url*; None if its scheme has no TLS."""
    return ssl.create_default_context() if url.scheme == "https" else None


async def connect(
    url: URL,
    context: ssl.SSLContext | None,
    limit: float,
    problem: Callable[[str, str], Result] = fail,
    trust: str = TRUST,
) -> Connected:
    """Connect to the host of *url* within *limit* seconds, with TLS if there is a *context*.

    *problem* makes the result of a failure. *trust* is the hint for a certificate of an unknown
    authority.
    """
    began = time.perf_counter()
    try:
        async with asyncio.timeout(limit):
            _, writer = await asyncio.open_connection(url.host, url.port, ssl=context)
    except (OSError, UnicodeError) as error:
        text, hint = next(row[1:] for row in FAULTS if isinstance(error, row[0]))
        text = text.format(host=url.host, port=url.port, reason=_reason(error))
        return Connected([problem(text, hint.format(trust=trust))])
    took = time.perf_counter() - began
    try:
        address, port = writer.get_extra_info("peername")[:2]
        results = [ok(f"connected to {address} port {port}", seconds=took)]
        tls: ssl.SSLObject | None = writer.get_extra_info("ssl_object")
        if tls is None:
            return Connected(results, reached=True)
        certificate: Any = tls.getpeercert()
        ends = ssl.cert_time_to_seconds(certificate["notAfter"])
        days = (ends - time.time()) / SECONDS_A_DAY
        text = f"TLS: {tls.version()}, and a certificate that is valid for {days:.0f} days"
        soon = warn(text, "renew it: once it has ended, nobody connects")
        results.append(ok(text) if days >= SOON else soon)
        return Connected(results, reached=True, protocol=tls.selected_alpn_protocol() or "")
    finally:
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def _reason(error: BaseException) -> str:
    """Return the reason of a failure in a few words; the texts of asyncio are long."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if isinstance(error, ssl.SSLError):
        return str(error.reason or "the connection was closed")
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return faults.describe(error)
