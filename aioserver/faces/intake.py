"""Taking in what clients send: the bytes of a body, bounded and under a deadline.

The bytes count against `max_body_bytes` from the first one. A body that is passed on while its
client sends it is a `BodyStream`.

If requests are traced, each client that reads an answer which another request began is a visit,
with a span of its own. The client whose request began the answer is its first reader, and no
visit.
"""

from __future__ import annotations

import asyncio
from io import BytesIO
from typing import TYPE_CHECKING

from aiohttp import EMPTY_PAYLOAD, hdrs
from aiohttp.http import HttpVersion11
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web import RequestPayloadError
from multidict import istr

from aioserver.auth.callers import CALLER
from aioserver.errors import (
    InvalidRequest,
    LoopDetected,
    RequestTimeout,
    RequestTooLarge,
    UnsupportedCoding,
    UnsupportedMediaType,
)
from aioserver.gateway.contracts.instances import BODY
from aioserver.protocol import model_body
from aioserver.protocol.client_frames import MAX_ID_CHARACTERS
from aioserver.protocol.model_body import ModelBody
from aioserver.protocol.request_headers import HOP, MAX_HOPS, SESSIONS, collect, hops
from aioserver.providers.backpressure import LEAST_RATE

if TYPE_CHECKING:
    from aiohttp import web

    from aioserver.auth.callers import Caller
    from aioserver.faces.admission import BodyHold
    from aioserver.faces.context import Context
    from aioserver.protocol.request_headers import ClientHeaders
    from aioserver.providers.backpressure import ClientPace
    from aioserver.streams.stream import Stream
    from aioserver.telemetry.tracer import Visit

# Seconds for a whole body, or a whole WebSocket message: aiohttp has no deadline for either.
BODY_TIMEOUT = 15.0
# Seconds for which a client may send nothing of a body that is passed on.
BODY_SILENCE = 15.0
# Bytes of such a body that are kept, so that they can be sent again if a pooled connection turns
# out to be closed.
MAX_REPEATED = 1 << 16
# Bytes of such a body that are taken at once.
PIECE_BYTES = 1 << 16
# Bytes of such a body that must have arrived before a provider's place is taken for it.
FIRST_BYTES = 1 << 18
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
IDEMPOTENCY_KEY = istr("Idempotency-Key")
CODINGS = (hdrs.CONTENT_ENCODING, hdrs.TRANSFER_ENCODING)


def session_of(request: web.Request) -> str | None:
    """Return the session of an agent that *request* belongs to, None if it names none."""
    headers = request.headers
    if headers.keys().isdisjoint(SESSIONS):
        return None
    return next(filter(None, map(headers.get, SESSIONS)), None)


def caller_of(request: web.Request, user: str | None) -> Caller:
    """Return the caller of *request*. In the fair queue, requests of *user* wait apart from the
    caller's others; without a user, those of the session do.
    """
    user = user or session_of(request)
    return request[CALLER].on_behalf_of(user) if user else request[CALLER]


async def read_body(request: web.Request, hold: BodyHold, max_bytes: int) -> bytes:
    """Read the body, and return its bytes, which *hold* counts.

    Raises:
        UnsupportedMediaType, UnsupportedCoding: the body is not `application/json`, or as
            `refuse_coded`.
        RequestTooLarge: the body has more than *max_bytes*.
        RequestTimeout: the body was not complete within BODY_TIMEOUT.
        ServerAtCapacity: see `Admission.make_room`.
    """
    body = _arrived(request, hold, max_bytes)
    return await _collect(request, hold, max_bytes) if body is None else body


def _arrived(request: web.Request, hold: BodyHold, max_bytes: int) -> bytes | None:
    """Return the body as `read_body` does, if all of it is there; None if it still comes."""
    refuse_coded(request)
    header = request.headers.get(hdrs.CONTENT_TYPE)
    # For nearly all clients, comparing the header itself saves parsing it.
    if header != "application/json" and request.content_type != "application/json":
        raise UnsupportedMediaType("Content-Type must be application/json")
    content = request.content
    if content is EMPTY_PAYLOAD:
        return b""
    if not content.is_eof():
        return None
    # The body usually arrives together with the head. It was read if an owner has lost its answer.
    body = content.read_nowait() or request.pop(BODY, b"")
    if len(body) > max_bytes:
        raise RequestTooLarge(f"a body of {len(body)} bytes, at most {max_bytes}")
    hold.grow(len(body))
    return body


def refuse_coded(request: web.Request) -> None:
    """Refuse a body that is compressed or has an unknown transfer coding.

    Raises:
        UnsupportedMediaType: it is compressed.
        UnsupportedCoding: it has a transfer coding other than `chunked`.
    """
    headers = request.headers
    if headers.keys().isdisjoint(CODINGS):
        return
    if hdrs.CONTENT_ENCODING in headers:
        raise UnsupportedMediaType("a compressed body is not accepted")
    # aiohttp's parser removes the last coding, `chunked`, and ignores all others.
    if headers[hdrs.TRANSFER_ENCODING].strip().lower() != "chunked":
        raise UnsupportedCoding("no transfer coding but chunked is accepted")


async def read_start(request: web.Request, hold: BodyHold, max_bytes: int) -> bytes:
    """Return the whole body, or its first bytes if it has more than *max_bytes*.

    *hold* counts the bytes.

    Raises:
        RequestTimeout, ServerAtCapacity: as `read_body`.
    """
    let_continue(request)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT):
            while len(body) <= max_bytes and (part := await request.content.readany()):
                hold.grow(len(part))
                body += part
    except TimeoutError:
        raise RequestTimeout(f"the body was not complete within {BODY_TIMEOUT} s") from None
    return bytes(body)


def let_continue(request: web.Request) -> None:
    """Send `100 Continue` to a client that waits for it before sending its body (RFC 9110,
    10.1.1).
    """
    waits = hdrs.EXPECT in request.headers and request.version >= HttpVersion11
    if waits and not request.content.is_eof() and request.transport is not None:
        request.transport.write(CONTINUE)


class BodyStream:
    """A body that its client is still sending, for the upload to a provider.

    *first* is the part that was read before. *hold* counts that part, and all bytes that are read
    before a place is taken. A client that waits for `100 Continue` gets it when the request is
    passed on.

    Always: besides the first FIRST_BYTES and one piece, at most MAX_REPEATED bytes are kept until
    they are read.
    """

    def __init__(
        self, request: web.Request, hold: BodyHold, pace: ClientPace, first: bytes = b""
    ) -> None:
        self.chunked = request.content_length is None
        self._request = request
        self._hold = hold
        self._pace = pace
        self._count = 0
        # Pieces to be returned before those that the client sends now, the last one first.
        self._before = [first] if first else []
        self._asked = bool(first)
        # The bytes that were read, kept for a second reading; None once they are too many.
        self._read: list[bytes] | None = []

    async def begin(self) -> None:
        """Read the first FIRST_BYTES, or the whole body if it is shorter. Cancelling is safe: a
        cancelled call reads nothing.

        Raises:
            ServerAtCapacity: see `Admission.make_room`.
            RequestTimeout, InvalidRequest: as `read`.
        """
        pieces = self._before[::-1]
        size = sum(map(len, pieces))
        while size < FIRST_BYTES and (piece := await self._next()):
            self._hold.grow(len(piece))
            pieces.append(piece)
            size += len(piece)
        self._before = pieces[::-1]

    async def read(self) -> bytes:
        """Return the next piece; empty at the end. Cancelling is safe.

        Raises:
            RequestTimeout: the client has sent nothing for BODY_SILENCE, or too little while other
                requests wait.
            InvalidRequest: the body breaks off, or is not HTTP.
        """
        piece = self._before.pop() if self._before else await self._next()
        if self._read is not None:
            self._read.append(piece)
            if sum(map(len, self._read)) > MAX_REPEATED:
                self._read = None
        return piece

    def rewind(self) -> bool:
        """Let the whole body be read again, and return True.

        Returns False if the body was too large to be kept.
        """
        if self._read is None:
            return False
        self._before += reversed([piece for piece in self._read if piece])
        self._read = []
        return True

    async def _next(self) -> bytes:
        if not self._asked:
            self._asked = True
            let_continue(self._request)
        silence, too_slow = asyncio.timeout(BODY_SILENCE), False

        def give_up() -> None:
            nonlocal too_slow
            too_slow = True
            silence.reschedule(asyncio.get_running_loop().time())

        try:
            with self._pace.waited_for(lambda: self._count, give_up):
                async with silence:
                    piece = await self._request.content.read(PIECE_BYTES)
                self._count += len(piece)
                return piece
        except TimeoutError:
            text = f"no bytes of the body came for {BODY_SILENCE} s"
            if too_slow:
                text = (
                    f"the body came at less than {LEAST_RATE} bytes a second while others waited"
                )
            raise RequestTimeout(text) from None
        except (ConnectionError, HttpProcessingError, RequestPayloadError) as exc:
            raise InvalidRequest("the body breaks off") from exc


async def read_model_body(
    request: web.Request, hold: BodyHold, max_bytes: int
) -> tuple[ModelBody, bytes]:
    """Read a body that is a JSON object with a `model`, which *hold* counts; return it, and the
    bytes as they came.

    Raises:
        InvalidJson, InvalidRequest: as `ModelBody`.
        AioserverError: as `read_body`.
    """
    data = await read_body(request, hold, max_bytes)
    # Reading in steps would cost each request a coroutine, and few bodies are large enough to need
    # it.
    body = ModelBody(data) if model_body.simple(data) else await model_body.reading(data)
    return body, data


async def _collect(request: web.Request, hold: BodyHold, max_bytes: int) -> bytes:
    """Return the bytes of the body as they come.

    Raises:
        RequestTooLarge, RequestTimeout, ServerAtCapacity: as `read_body`.
    """
    length = request.content_length
    if length is not None and length > max_bytes:
        raise RequestTooLarge(f"a body of {length} bytes, at most {max_bytes}")
    # Its value is no copy, and a body that comes byte by byte costs no more than its size.
    body, size = BytesIO(), 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT):
            while part := await request.content.readany():
                size += len(part)
                if size > max_bytes:
                    raise RequestTooLarge(f"a body of more than {max_bytes} bytes")
                hold.grow(len(part))
                body.write(part)
    except TimeoutError:
        raise RequestTimeout(f"the body was not complete within {BODY_TIMEOUT} s") from None
    return body.getvalue()


def idempotency_key(request: web.Request) -> str | None:
    """Return the `Idempotency-Key` of *request*, None if it has none.

    Raises:
        InvalidRequest: the key is empty, too long, or not printable.
    """
    key = request.headers.get(IDEMPOTENCY_KEY)
    if key is not None and (len(key) > MAX_ID_CHARACTERS or not key.isprintable() or not key):
        raise InvalidRequest(
            f"Idempotency-Key must have 1 to {MAX_ID_CHARACTERS} printable characters"
        )
    return key


def client_headers(context: Context, request: web.Request, api: str = "") -> ClientHeaders:
    """Return the headers of *request* that go on to a provider: its trace, and those that settings
    name.

    If *api* is not empty, the headers whose names begin with it are included.

    Raises:
        LoopDetected: the request came from this server by way of a provider.
    """
    if HOP in request.headers:
        passed = hops(request.headers)
        if context.hop in passed or len(passed) >= MAX_HOPS:
            raise LoopDetected("this request comes from this server, by way of a provider")
    return collect(request.headers, context.router.passed_headers, api)


def begin_visit(
    context: Context, request: web.Request, stream: Stream, after: int = 0
) -> Visit | None:
    """Return the visit of *request*, which reads *stream* from event *after* on; None if it is the
    first reader.
    """
    if context.tracer is None:
        return None
    headers = collect(request.headers)
    return context.tracer.visit(stream.record.trace, headers, stream.request_id, after)


def end_visit(visit: Visit, stream: Stream) -> None:
    """End *visit*: its client has left *stream*, or has read it to its end."""
    error = stream.error
    visit.end(stream.end_status if stream.ended else b"", "" if error is None else error.code)
