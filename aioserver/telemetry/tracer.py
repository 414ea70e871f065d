"""The contract of a tracer: the notes about a request, from which spans are made after its end.

    Tracer.begin ──▶ RequestTrace: waited, sending ──▶ watch ──▶ attempt_ended ──▶ ended
    Tracer.visit ──▶ Visit: a client that reads the answer of another request, until `end`

Without a tracer no request has a trace. The W3C Trace Context of a client is not lost then: it
goes on to the provider as it came.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aioserver.protocol.request_headers import ClientHeaders


class WatchedPath(Protocol):
    """What a tracer needs of a fast path (streams/contracts.py has all of it)."""

    forwarded_at: float
    read_at: float

    def forward(self, read: bytes) -> bool:
        """Forward *read*, one event; return False if it must take the slow path."""

    def close(self) -> None:
        """Stop forwarding."""


Fast_co = TypeVar("Fast_co", bound=WatchedPath, covariant=True)


class WatchedSink(Protocol[Fast_co]):
    """The sink of an answer's body (providers/http1.py), with its own kind of fast path."""

    @property
    def progress(self) -> int:
        """A number that grows with each event of the provider; comments, which only keep a
        connection alive, do not count.
        """

    def feed(self, data: bytes) -> bool:
        """Take a part of the body, never empty; return False if the answer needs no more."""

    def end(self) -> None:
        """Note that the body is complete."""

    def broken(self, fault: Exception) -> bool:
        """Return whether the answer is complete, and thus ends well, although it breaks off now
        with *fault*: only its end mark was missing.
        """

    def fast(self) -> Fast_co | None:
        """Return the fast path for the next bytes; None if there is none."""


class AttemptEnd(NamedTuple):
    """How an attempt at *provider* has ended, well or with *error*.

    *began* and *ended* are monotonic times; *began* is 0.0 if it got no place. *base_url* is the
    address to which it was sent, *first_chunk* the seconds from the sending to the first content
    of a stream. *body*: a good answer that came as a whole.
    """

    provider: str
    model: str
    base_url: str
    began: float
    ended: float
    first_chunk: float
    status: int
    error: BaseException | None
    usage: Mapping[str, Any] | None
    body: bytes


class RequestEnd(NamedTuple):
    """How a request has ended, as in its log line; its times are monotonic."""

    request_id: str
    face: str
    target: str
    provider: str
    caller: str
    streamed: bool
    admitted_at: float
    first_event_at: float
    ended_at: float
    queue_wait: float
    attempts: int
    code: str
    outcome: str
    status: int


class RequestTrace(Protocol):
    """The notes about one request.

    *followed*: a client reads its answer, or has read it; any other client comes back for it.
    """

    followed: bool

    @property
    def trace_id(self) -> str:
        """The id of the trace, 32 hex digits; "" if there is none."""

    @property
    def link(self) -> tuple[bytes, bytes] | None:
        """The ids of the trace and of the request's span, for links from later readers; None if it
        has no span.
        """

    def waited(self, provider: str, began: float, ended: float) -> None:
        """Note that a wait for a place at *provider* is over."""

    def sending(self, client_headers: ClientHeaders, body: bytes = b"") -> ClientHeaders:
        """Note that *body* is about to be sent; return its headers, with the attempt as their
        parent.
        """

    def watch(self, sink: WatchedSink[Fast_co]) -> WatchedSink[Fast_co]:
        """Return a sink that notes the beginning and the end of the bytes fed to *sink*, and, if
        attempts are counted, the times of its events.
        """

    def attempt_ended(self, end: AttemptEnd) -> None:
        """Note the end of an attempt."""

    def ended(self, end: RequestEnd) -> None:
        """Make the spans: the request has ended."""


class Visit(Protocol):
    """A client that reads the answer of another request. `end` is called once."""

    def end(self, status: bytes, code: str = "") -> None:
        """Note that the client has left, or has read all of it.

        *status* is that with which the answer has ended, empty if it goes on; *code* is that of
        its error.
        """


class Tracer(Protocol):
    """The source of the traces of a server."""

    def begin(
        self, client_headers: ClientHeaders, path: str, admitted_at: float, waited_since: float
    ) -> RequestTrace | None:
        """Begin the trace of a request that goes to *path* at its provider.

        None if its client does not sample, unless attempts are counted. The request was admitted at the monotonic time
        *admitted_at*, and had waited for a place since *waited_since*; 0.0 if it has not.
        """

    def visit(
        self,
        trace: RequestTrace | None,
        client_headers: ClientHeaders,
        request_id: str,
        after: int = 0,
    ) -> Visit | None:
        """Note that a client reads the answer of *request_id*, with *trace*, after event *after*.

        Return the visit, which the caller ends; None for the client whose request began the
        answer, and for a client that does not sample.
        """
