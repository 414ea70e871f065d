"""TLS on an accepted connection (RFC 8446, RFC 5246), the same on each event loop: our protocol
over `ssl.MemoryBIO`, between the loop's transport, which is below, and aiohttp's connection.

    bytes → Handshake → (done) → TlsTransport ↔ aiohttp's connection
                      ↘ failed, timeout, displaced, plain

The loops have TLS of their own, but say nothing of handshakes that fail, fix the context when the
listener opens, and hide what waits below them from `get_write_buffer_size`, by which the write
watchdog sees a client that reads nothing. Here everything is encrypted as soon as it is written,
and no byte waits in this layer: buffers, their bounds and pauses are those of the transport below.

A handshake is bounded in time and in number. An honest one lasts some round trips, so where there
are too many the oldest ends: a thousand silent sockets would lock everybody out otherwise.

To close is to send `close_notify`, and to wait for nothing: a body that ends by its framing needs
no more (RFC 8446, 6.1).

This file is one concept: the whole way of a connection's bytes through TLS.

Private names of the standard library used here, guarded by `tests/server/test_tls.py`: `_sslobj`
of `ssl.SSLObject`, whose methods are those of C without a call of Python around each.
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

# Seconds for a handshake, and unfinished ones in a process at most.
TIMEOUT, MAX_UNFINISHED = 10.0, 1024
# Log lines about handshakes that fail, in a second, for each reason.
LINES_PER_SECOND = 5
# Plain bytes of a record at most (RFC 8446, 5.1), which is what one read returns.
RECORD = 1 << 14
# Bytes that are encrypted at once: an answer of 16 MiB need not be there twice.
PIECE = 1 << 16
# The first byte of a connection that speaks TLS: a record of the handshake (RFC 8446, 5.1).
HANDSHAKE = 0x16
# Seconds for which a plain request is read on, so that its response arrives.
LINGERING = 1.0
TOO_LATE = f"not finished within {TIMEOUT:g} s"
SPEAK_TLS = "this port speaks TLS: use https://"


class Handshakes:
    """The handshakes of this process that are not finished, and what has become of the others.

    Always: there are at most MAX_UNFINISHED, none is older than TIMEOUT by more than a turn of the
    loop, and one more ends the oldest. *context* is that of connections which are accepted from
    now on; established ones keep theirs. *outcomes* count.

    """

    def __init__(self, context: ssl.SSLContext, outcomes: Mapping[str, Counter]) -> None:
        self.context = context
        self.outcomes = outcomes
        self._loop = asyncio.get_running_loop()
        # The oldest first, each with what ends it when it is too old.
        self._unfinished: dict[Handshake, asyncio.TimerHandle] = {}
        self._lines = RateLimit(LINES_PER_SECOND)

    def __len__(self) -> int:
        return len(self._unfinished)

    def make(self, server: ConnectionServer) -> asyncio.Protocol:
        """Return the protocol of an accepted connection. *server* makes what speaks HTTP on it,
        once the handshake is done.
        """
        return Handshake(self, server)

    def add(self, handshake: Handshake) -> None:
        """Count *handshake*, which begins."""
        if len(self._unfinished) >= MAX_UNFINISHED:
            next(iter(self._unfinished)).give_up(DISPLACED, f"one of {MAX_UNFINISHED}, the oldest")
        late = self._loop.call_later(TIMEOUT, handshake.give_up, TIMED_OUT, TOO_LATE)
        self._unfinished[handshake] = late

    def remove(self, handshake: Handshake, outcome: str, reason: str = "") -> None:
        """Forget *handshake*, and count it; where it did not succeed, *reason* is logged."""
        self._unfinished.pop(handshake).cancel()
        self.outcomes[outcome].value += 1
        if not reason or (left_out := self._lines.allow(reason)) is None:
            return
        fields = {"address": handshake.address, "outcome": outcome, "reason": reason, **left_out}
        logger.warning("tls handshake failed", extra={"fields": fields})

    def close(self) -> None:
        """End all that are not finished."""
        for handshake in tuple(self._unfinished):
            handshake.give_up(FAILED, "the server stops")


class Handshake(asyncio.Protocol):
    """One handshake: the protocol of an accepted connection until it is done.

    Always: it is counted once, by its outcome, and is one of *unfinished*, and for *server* a
    connection to be made, until then. Nothing of OpenSSL's is made before the first byte has come.
    """

    __slots__ = (
        "_incoming",
        "_lower",
        "_object",
        "_outgoing",
        "_server",
        "_unfinished",
        "_writing_paused",
        "address",
    )

    def __init__(self, unfinished: Handshakes, server: ConnectionServer) -> None:
        self._unfinished = unfinished
        self._server = server
        self._lower: asyncio.Transport | None = None
        self._object: ssl.SSLObject | None = None
        self.address = ""
        self._writing_paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for the client's first bytes."""
        # uvloop's are no instances of it.
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
            # With the alert that says why.
            self._flush()
            self.give_up(FAILED, reason_of(exc))
        else:
            self._flush()
            self._finish(self._lower, self._object)

    def connection_lost(self, exc: Exception | None) -> None:
        """Count a client that has left in the middle. A probe that sends nothing is no news."""
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
            # In a turn of its own, as what comes first on a plain connection.
            transport.read_soon()

    def _refuse_plain(self, data: bytes) -> None:
        """Answer a plain request, of which *data* is the beginning, as far as HTTP is meant."""
        lower = self._lower
        assert lower is not None
        if not data[:1].isalpha():
            self.give_up(FAILED, "no TLS")
            return
        self._settle(PLAIN, "a plain request")
        # What is left of the request is read, so that the client has its response.
        lower.set_protocol(asyncio.Protocol())
        lower.write(PLAIN_RESPONSE)
        lower.write_eof()
        asyncio.get_running_loop().call_later(LINGERING, lower.abort)


class TlsTransport(asyncio.Transport, asyncio.Protocol):
    """The transport of an HTTP connection over TLS, and the protocol of the transport below.

    Always: what was written is with the transport below, encrypted; while reading is paused,
    nothing is passed on, though decrypted bytes may be inside; they come before all that follow.
    """

    __slots__ = (
        *("_decrypt", "_encrypt", "_ended", "_feed", "_incoming", "_lower", "_lower_write"),
        *("_object", "_outgoing", "_paused", "_protocol", "_take"),
        # Those of the transport below, without a call of ours around each.
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
        # Whether the client has said that nothing more comes.
        self._ended = False

    # The transport of the connection above.

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
        """Write all of them at once: small pieces in one record."""
        self.write(b"".join(list_of_data))

    def close(self) -> None:
        """Say that nothing more comes, and close once all is sent; nothing is waited for."""
        self._paused = True
        if self.is_closing():
            return
        # It would wait for the client's.
        with contextlib.suppress(ssl.SSLError):
            self._object.unwrap()
        if self._outgoing.pending:
            self._lower_write(self._take())
        self._lower.close()

    def abort(self) -> None:
        """Close at once; what is not sent is lost."""
        self._paused = True
        self._lower.abort()

    def pause_reading(self) -> None:
        """Pass nothing on from now on."""
        if not self._paused and not self.is_closing():
            self._paused = True
            self._lower.pause_reading()

    def resume_reading(self) -> None:
        """Pass on what comes, and before it what is inside already, in the next turn."""
        if self._paused and not self.is_closing():
            self._paused = False
            self._lower.resume_reading()
            self.read_soon()

    def is_reading(self) -> bool:
        """Return whether what comes is passed on."""
        return not self._paused and not self.is_closing()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return what is known of the connection: of TLS, or of the socket below."""
        if name == "sslcontext":
            return self._object.context
        if name == "ssl_object":
            return self._object
        return self._lower.get_extra_info(name, default)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Set the bytes at which writing pauses, encrypted ones."""
        self._lower.set_write_buffer_limits(high, low)

    def get_protocol(self) -> asyncio.BaseProtocol:
        """Return the connection above."""
        return self._protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Pass everything on to *protocol* from now on."""
        assert isinstance(protocol, asyncio.Protocol)
        self._protocol = protocol

    # The protocol of the transport below.

    def data_received(self, data: bytes) -> None:
        """Decrypt *data*, and pass it on unless reading is paused."""
        self._feed(data)
        if not self._paused:
            self.read_on()

    def eof_received(self) -> bool:
        """Pass on what is left, and the end. The transport below stays, until we close it."""
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
        """Pass on what is inside, until reading is paused or the rest of a record is missing."""
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
            # A message of the protocol itself, as the answer to a new key (RFC 8446, 4.6.3).
            self._lower_write(self._take())

    def read_soon(self) -> None:
        """Pass on what is inside in the next turn of the loop."""
        asyncio.get_running_loop().call_soon(self._read_on)

    def _read_on(self) -> None:
        try:
            self.read_on()
        except BaseException:
            # As the loop does with a connection whose protocol has a bug.
            self.abort()
            raise

    def _end(self) -> None:
        """Pass on that the client sends nothing more, once."""
        self._ended = True
        if not self._protocol.eof_received():
            self.close()

    def _break(self) -> None:
        """End a connection on which something came, or was written, that TLS does not allow."""
        if self.is_closing():
            return
        self._paused = True
        if self._outgoing.pending:
            # The alert.
            self._lower_write(self._take())
        close_soon(self._lower)


def close_soon(lower: asyncio.Transport) -> None:
    """Close *lower*, at the latest after LINGERING: its peer need not read what is left."""
    lower.close()
    if lower.get_write_buffer_size():
        asyncio.get_running_loop().call_later(LINGERING, lower.abort)


def outlived(tls: ssl.SSLObject) -> bool:
    """Return whether the client's certificate has expired: a resumed session does not show it
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
