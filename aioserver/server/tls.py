"""TLS on an accepted connection (RFC 8446, RFC 5246), the same on each event loop. Our protocol
uses `ssl.MemoryBIO`, between the loop's transport below and aiohttp's connection above.

    bytes → Handshake → (done) → TlsTransport ↔ aiohttp's connection
                      ↘ failed, timeout, displaced, plain

The loops have TLS of their own, but they do not report failed handshakes and fix the context when
the listener opens. They also hide waiting bytes from `get_write_buffer_size`, by which the write
watchdog detects a client that reads nothing. Here everything is encrypted as soon as it is
written, and no byte waits in this layer: buffers, their bounds and pauses are those of the
transport below.

Handshakes are bounded in time and in number. An honest handshake lasts some round trips. If there
are too many, the oldest is ended: otherwise a thousand silent sockets would lock out every client.

To close, this layer sends `close_notify` and waits for nothing: a body that ends by its framing
needs no more (RFC 8446, 6.1).

This file is one concept: the whole way of a connection's bytes through TLS.

Private names of the standard library used here: `_sslobj` of `ssl.SSLObject`, whose methods are
those of C without a call of Python around each.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import time
from typing import TYPE_CHECKING, Any, cast

from aioserver.errors import InvalidRequest
from aioserver.faces.form import OPENAI
from aioserver.faces.http import SERVER
from aioserver.files import x509
from aioserver.files.certificates import reason_of
from aioserver.telemetry.logs import RateLimit
from aioserver.telemetry.metrics import DISPLACED, DONE, FAILED, PLAIN, RESUMED, TIMED_OUT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from aioserver.server.connection import ConnectionServer
    from aioserver.telemetry.counters import Counter

logger = logging.getLogger("aioserver.tls")

# Seconds for a handshake, and the most unfinished handshakes in a process.
TIMEOUT, MAX_UNFINISHED = 10.0, 1024
# Log lines a second about failed handshakes, for each reason.
LINES_PER_SECOND = 5
# The most plain bytes of a record (RFC 8446, 5.1), which is also the size of one read.
RECORD = 1 << 14
# Bytes that are encrypted at once, so that an answer of 16 MiB is not in memory twice.
PIECE = 1 << 16
# The first byte of a connection that speaks TLS: a record of the handshake (RFC 8446, 5.1).
HANDSHAKE = 0x16
# Seconds for which a plain request is read on, so that its response arrives.
LINGERING = 1.0
TOO_LATE = f"not finished within {TIMEOUT:g} s"
SPEAK_TLS = "this port speaks TLS: use https://"


class Handshakes:
    """The unfinished handshakes of this process, and the outcomes of the finished ones.

    Always: there are at most MAX_UNFINISHED, none is older than TIMEOUT by more than one iteration
    of the loop, and one more ends the oldest. *context* is used for connections that are accepted
    from now on; established ones keep theirs. *outcomes* counts the finished ones.
    """

    def __init__(self, context: ssl.SSLContext, outcomes: Mapping[str, Counter]) -> None:
        self.context = context
        self.outcomes = outcomes
        self._loop = asyncio.get_running_loop()
        # The oldest first, each with the timer that ends it.
        self._unfinished: dict[Handshake, asyncio.TimerHandle] = {}
        self._lines = RateLimit(LINES_PER_SECOND)

    def __len__(self) -> int:
        return len(self._unfinished)

    def make(self, server: ConnectionServer) -> asyncio.Protocol:
        """Return the protocol of an accepted connection. *server* makes the HTTP connection once
        the handshake is done.
        """
        return Handshake(self, server)

    def add(self, handshake: Handshake) -> None:
        """Count *handshake*, which begins."""
        if len(self._unfinished) >= MAX_UNFINISHED:
            next(iter(self._unfinished)).give_up(DISPLACED, f"one of {MAX_UNFINISHED}, the oldest")
        late = self._loop.call_later(TIMEOUT, handshake.give_up, TIMED_OUT, TOO_LATE)
        self._unfinished[handshake] = late

    def remove(self, handshake: Handshake, outcome: str, reason: str = "") -> None:
        """Forget *handshake*, and count it; if it failed, log *reason*."""
        self._unfinished.pop(handshake).cancel()
        self.outcomes[outcome].value += 1
        if not reason or (left_out := self._lines.allow(reason)) is None:
            return
        fields = {"address": handshake.address, "outcome": outcome, "reason": reason, **left_out}
        logger.warning("tls handshake failed", extra={"fields": fields})

    def close(self) -> None:
        """End all handshakes that are not finished."""
        for handshake in tuple(self._unfinished):
            handshake.give_up(FAILED, "the server stops")


class Handshake(asyncio.Protocol):
    """One handshake: the protocol of an accepted connection until it is done.

    Always: it is counted once, by its outcome. Until then it is one of *unfinished*, and *server*
    counts it as a connection to be made. No OpenSSL object is made before the first byte has come.
    """

    def __init__(self, unfinished: Handshakes, server: ConnectionServer) -> None:
        self._unfinished = unfinished
        self._server = server
        self._lower: asyncio.Transport | None = None
        self._object: ssl.SSLObject | None = None
        self.address = ""
        self._writing_paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for the client's first bytes."""
        # uvloop's transports are no instances of it.
        self._lower = cast("asyncio.Transport", transport)
        peer = transport.get_extra_info("peername")
        self.address = peer[0] if peer else ""
        self._unfinished.add(self)
        self._server.handshake_begins()

    def data_received(self, data: bytes) -> None:
        """Go on with the handshake."""
        if self._lower is None or self._lower.is_closing():
            return
        if self._object is None:
            if data[0] != HANDSHAKE:
                self._refuse_plain(data)
                return
            self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            context = self._unfinished.context
            self._object = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._incoming.write(data)
        try:
            self._object.do_handshake()
        except ssl.SSLWantReadError:
            self._flush()
        except ssl.SSLError as exc:
            # This sends the alert with the reason.
            self._flush()
            self.give_up(FAILED, reason_of(exc))
        else:
            self._flush()
            self._finish(self._lower, self._object)

    def connection_lost(self, exc: Exception | None) -> None:
        """Count a client that has left during its handshake. A probe that sends nothing is not
        logged.
        """
        del exc
        if self._lower is not None:
            self._settle(FAILED, "the client has left" if self._object is not None else "")

    def pause_writing(self) -> None:
        """Note that the client does not read."""
        self._writing_paused = True

    def resume_writing(self) -> None:
        """Note that the client reads again."""
        self._writing_paused = False

    def give_up(self, outcome: str, reason: str) -> None:
        """End the connection."""
        if (lower := self._lower) is not None:
            self._settle(outcome, reason)
            close_soon(lower)

    def _settle(self, outcome: str, reason: str = "") -> None:
        self._lower = None
        self._unfinished.remove(self, outcome, reason)
        self._server.handshake_ends()

    def _flush(self) -> None:
        assert self._lower is not None
        if self._outgoing.pending:
            self._lower.write(self._outgoing.read())

    def _finish(self, lower: asyncio.Transport, tls: ssl.SSLObject) -> None:
        if tls.session_reused and outlived(tls):
            self.give_up(FAILED, "certificate has expired")
            return
        self._settle(RESUMED if tls.session_reused else DONE)
        connection = self._server()
        transport = TlsTransport(lower, tls, self._incoming, self._outgoing, connection)
        lower.set_protocol(transport)
        connection.connection_made(transport)
        if self._writing_paused:
            connection.pause_writing()
        if self._incoming.pending:
            # In a separate iteration of the loop, as the first bytes of a plain connection are.
            transport.read_soon()

    def _refuse_plain(self, data: bytes) -> None:
        """Answer a request without TLS, of which *data* is the beginning, if it looks
        like HTTP.
        """
        lower = self._lower
        assert lower is not None
        if not data[:1].isalpha():
            self.give_up(FAILED, "no TLS")
            return
        self._settle(PLAIN, "a plain request")
        # The rest of the request is read, so that the client gets its response.
        lower.set_protocol(asyncio.Protocol())
        lower.write(PLAIN_RESPONSE)
        lower.write_eof()
        asyncio.get_running_loop().call_later(LINGERING, lower.abort)


class TlsTransport(asyncio.Transport, asyncio.Protocol):
    """The transport of an HTTP connection over TLS, and the protocol of the transport below.

    Always: all written bytes are with the transport below, encrypted. While reading is paused,
    nothing is passed on, though decrypted bytes may wait inside; they come before all later ones.
    """

    __slots__ = (
        *("_decrypt", "_encrypt", "_ended", "_feed", "_incoming", "_lower", "_lower_write"),
        *("_object", "_outgoing", "_paused", "_protocol", "_take"),
        # The methods of the transport below, without a call of ours around each.
        *("get_write_buffer_size", "is_closing"),
    )

    get_write_buffer_size: Callable[[], int]
    is_closing: Callable[[], bool]

    def __init__(
        self,
        lower: asyncio.Transport,
        tls: ssl.SSLObject,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        protocol: asyncio.Protocol,
    ) -> None:
        self._lower, self._object = lower, tls
        self._incoming, self._outgoing = incoming, outgoing
        self._protocol = protocol
        inner: Any = tls._sslobj  # type: ignore[attr-defined]  # noqa: SLF001 - see the head
        self._encrypt, self._decrypt = inner.write, inner.read
        self._take, self._feed = outgoing.read, incoming.write
        self._lower_write = lower.write
        self.get_write_buffer_size, self.is_closing = lower.get_write_buffer_size, lower.is_closing
        self._paused = False
        # Whether the client has said that it sends nothing more.
        self._ended = False

    # The interface of a transport, for the connection above.

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Encrypt *data* and write it."""
        if not data:
            return
        if len(data) > PIECE:
            view = memoryview(data)
            for at in range(0, len(view), PIECE):
                if not self.is_closing():
                    self.write(view[at : at + PIECE])
            return
        try:
            self._encrypt(data)
        except ssl.SSLError:
            self._break()
        else:
            self._lower_write(self._take())

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        """Write all pieces at once, so that small pieces share one record."""
        self.write(b"".join(list_of_data))

    def close(self) -> None:
        """Announce the end, and close once all is sent, without waiting for the client."""
        self._paused = True
        if self.is_closing():
            return
        # SSLError: it would wait for the client's `close_notify`.
        with contextlib.suppress(ssl.SSLError):
            self._object.unwrap()
        if self._outgoing.pending:
            self._lower_write(self._take())
        self._lower.close()

    def abort(self) -> None:
        """Close at once; unsent bytes are lost."""
        self._paused = True
        self._lower.abort()

    def pause_reading(self) -> None:
        """Pass nothing on from now on."""
        if not self._paused and not self.is_closing():
            self._paused = True
            self._lower.pause_reading()

    def resume_reading(self) -> None:
        """Pass on what comes, after the bytes that wait inside, in the next iteration
        of the loop.
        """
        if self._paused and not self.is_closing():
            self._paused = False
            self._lower.resume_reading()
            self.read_soon()

    def is_reading(self) -> bool:
        """Return whether incoming bytes are passed on."""
        return not self._paused and not self.is_closing()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return information about the connection: about TLS, or about the socket below."""
        if name == "sslcontext":
            return self._object.context
        if name == "ssl_object":
            return self._object
        return self._lower.get_extra_info(name, default)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Set the numbers of encrypted bytes at which writing pauses and resumes."""
        self._lower.set_write_buffer_limits(high, low)

    def get_protocol(self) -> asyncio.BaseProtocol:
        """Return the connection above."""
        return self._protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Pass everything on to *protocol* from now on."""
        assert isinstance(protocol, asyncio.Protocol)
        self._protocol = protocol

    # The interface of a protocol, for the transport below.

    def data_received(self, data: bytes) -> None:
        """Decrypt *data*, and pass it on unless reading is paused."""
        self._feed(data)
        if not self._paused:
            self.read_on()

    def eof_received(self) -> bool:
        """Pass on the remaining bytes, and the end. The transport below stays open until we close
        it.
        """
        self._incoming.write_eof()
        if not self._paused:
            self.read_on()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """Pass on that the connection is gone."""
        self._paused = True
        self._protocol.connection_lost(exc)

    def pause_writing(self) -> None:
        """Pass on that the client does not read."""
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        """Pass on that it reads again."""
        self._protocol.resume_writing()

    def read_on(self) -> None:
        """Pass on the bytes inside, until reading is paused or the rest of a record is missing."""
        if self._ended:
            return
        incoming, decrypt = self._incoming, self._decrypt
        try:
            while not self._paused:
                # A whole record, so that OpenSSL keeps nothing of it.
                data = decrypt(RECORD)
                if not data:
                    self._end()
                    return
                self._protocol.data_received(data)
                if not incoming.pending and not incoming.eof:
                    break
        except ssl.SSLWantReadError:
            pass
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            self._end()
            return
        except ssl.SSLError:
            self._break()
            return
        if self._outgoing.pending and not self.is_closing():
            # A message of TLS itself, such as the answer to a key update (RFC 8446, 4.6.3).
            self._lower_write(self._take())

    def read_soon(self) -> None:
        """Pass on the bytes inside in the next iteration of the loop."""
        asyncio.get_running_loop().call_soon(self._read_on)

    def _read_on(self) -> None:
        try:
            self.read_on()
        except BaseException:
            # The loop does the same with a connection whose protocol raises.
            self.abort()
            raise

    def _end(self) -> None:
        """Pass on, once, that the client sends nothing more."""
        self._ended = True
        if not self._protocol.eof_received():
            self.close()

    def _break(self) -> None:
        """End a connection on which TLS does not allow the bytes that came or were written."""
        if self.is_closing():
            return
        self._paused = True
        if self._outgoing.pending:
            # This sends the alert.
            self._lower_write(self._take())
        close_soon(self._lower)


def close_soon(lower: asyncio.Transport) -> None:
    """Close *lower*, at the latest after LINGERING: its peer may not read the rest."""
    lower.close()
    if lower.get_write_buffer_size():
        asyncio.get_running_loop().call_later(LINGERING, lower.abort)


def outlived(tls: ssl.SSLObject) -> bool:
    """Return whether the client's certificate has expired: a resumed session does not present it
    again.
    """
    der = tls.getpeercert(binary_form=True)
    return der is not None and x509.certificate(der).expires < time.time()


_PLAIN_BODY = OPENAI.error(InvalidRequest(SPEAK_TLS), "")
# The response to a request that does not speak TLS.
PLAIN_RESPONSE = (
    f"HTTP/1.1 400 Bad Request\r\nServer: {SERVER}\r\nContent-Type: application/json\r\n"
    f"Content-Length: {len(_PLAIN_BODY)}\r\nConnection: close\r\n\r\n"
).encode() + _PLAIN_BODY
