"""The trace of one request while it runs: notes of its waits and its attempts, for spans.py.

The id of an attempt's span is made before it is sent, since the provider gets it as the parent of
its own spans (W3C Trace Context). Nothing else of a span exists before the request has ended.

Only two parameters of a question are read, the limit of tokens and the temperature. Some bytes of
an answer's beginning and end are kept until the spans are written: they have its id, its model and
the reason of its end.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Generic, TypeVar, cast

import msgspec
from yarl import URL

from aioserver.errors import AioserverError
from aioserver.protocol.tokens import NO_TOKENS, Tokens, tokens_of
from aioserver.telemetry.bookkeeping import bookkeeping, first, nothing
from aioserver.telemetry.tracer import Fast_co
from aioserver.wings.tracing.chunk_times import ChunkTimes, TimedPath
from aioserver.wings.tracing.otlp import Context

if TYPE_CHECKING:
    from aioserver.protocol.request_headers import ClientHeaders
    from aioserver.telemetry.bugs import Bugs
    from aioserver.telemetry.tracer import AttemptEnd, RequestEnd, WatchedSink

T = TypeVar("T")

# The most bytes of a body in which the parameters are searched: a larger one would take long.
MAX_READ = 1 << 16
# Bytes at the beginning and at the end of an answer that are noted.
HEAD_BYTES, TAIL_BYTES = 512, 1024
# The most waits, and attempts, of one request that become spans, the newest ones: while its
# provider is unreachable, a request may make an attempt every two seconds.
MAX_CHILDREN = 32
# The flag of a trace that is sampled.
SAMPLED = 1
_MODEL = re.compile(rb'"model": ?"([^"\\]{1,200})"')


class _Parameters(msgspec.Struct, gc=False):
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None


_PARAMETERS = msgspec.json.Decoder(_Parameters)


@dataclass
class Wait:
    """A wait in a queue, in monotonic time; *provider* is empty for the queue of the server."""

    provider: str
    began: float
    ended: float
    error: str = ""
    span_id: bytes = field(default_factory=lambda: new_id(8))


@dataclass
class AttemptTrace:
    """The facts for the span of one attempt; times are monotonic.

    *address* is the host and the port of the provider, and *error* the code of the fault.
    *first_chunk* are the seconds from sending to the first content of a stream. *tokens* are those
    of input and output, or None. *head* and *tail* are the first and the last bytes of the answer,
    which have its id, its model and the reason of its end. *chunks* are the times between its
    events, if attempts are counted and it is a stream.
    """

    span_id: bytes = field(default_factory=lambda: new_id(8))
    provider: str = ""
    model: str = ""
    error: str = ""
    began: float = 0.0
    ended: float = 0.0
    first_chunk: float = 0.0
    address: tuple[str, int] = ("", 0)
    status: int = 0
    head: bytes = b""
    tail: bytes = b""
    max_tokens: int | None = None
    temperature: float | None = None
    tokens: Tokens = NO_TOKENS
    chunks: ChunkTimes | None = None

    def note_body(self, body: bytes) -> None:
        """Note the parameters in *body*, which is about to be sent."""
        if len(body) > MAX_READ or (body.find(b'"max_') <= 0 and body.find(b'"temperature"') <= 0):
            return
        try:
            parameters = _PARAMETERS.decode(body)
        except (msgspec.MsgspecError, RecursionError):
            # The provider will report the fault.
            return
        self.max_tokens = _plausible(
            parameters.max_tokens
            or parameters.max_completion_tokens
            or parameters.max_output_tokens
        )
        self.temperature = parameters.temperature

    def note_end(self, end: AttemptEnd) -> None:
        """Note the *end* of the attempt."""
        self.provider, self.error = end.provider, _code(end.error)
        self.model, self.address = end.model, address(end.base_url)
        self.began, self.ended = end.began, end.ended
        self.first_chunk, self.status = end.first_chunk, end.status
        self.tokens = tokens_of(end.usage)
        if end.body:
            self.head, self.tail = end.body[:HEAD_BYTES], end.body[-TAIL_BYTES:]

    @property
    def response_model(self) -> str:
        """The model that has answered, as the answer says; "" without one."""
        if self.status != 200:
            return ""
        return text_of(_MODEL.search(self.head) or _MODEL.search(self.tail))


# It counts an attempt that has ended, of a request to this path.
Count = Callable[[str, AttemptTrace], None]


class NotingSink(Generic[Fast_co]):
    """Another sink; the first and the last bytes that it is fed are noted, and the times of its
    events if *noted* has a place for them.
    """

    def __init__(self, sink: WatchedSink[Fast_co], noted: AttemptTrace) -> None:
        self._sink = sink
        self._noted = noted

    @property
    def progress(self) -> int:
        """The progress of the other sink."""
        return self._sink.progress

    def feed(self, data: bytes) -> bool:
        """Feed the other sink."""
        noted = self._noted
        if len(noted.head) < HEAD_BYTES:
            noted.head += data[: HEAD_BYTES - len(noted.head)]
        noted.tail = (noted.tail + data[-TAIL_BYTES:])[-TAIL_BYTES:]
        if noted.chunks is None:
            return self._sink.feed(data)
        before = self._sink.progress
        goes_on = self._sink.feed(data)
        # A preamble is no progress until there is content.
        if events := self._sink.progress - before:
            noted.chunks.came(events)
        return goes_on

    def end(self) -> None:
        """End the other sink."""
        self._sink.end()

    def broken(self, fault: Exception) -> bool:
        """Return whether the other sink is complete, though *fault* ends it."""
        return self._sink.broken(fault)

    def fast(self) -> Fast_co | None:
        """Return the fast path of the other sink, on which a trace without *chunks* costs
        nothing.
        """
        path, chunks = self._sink.fast(), self._noted.chunks
        # A path is all that the exchange knows of it.
        return path if path is None or chunks is None else cast("Fast_co", TimedPath(path, chunks))


class Trace:
    """The trace of one request, while it runs.

    *context* is that of its SERVER span. *attempt* is under way, or about to be sent. *wait* is the
    newest wait, whose end is not known yet. *followed* says that a client reads the answer, or has
    read it, so that any other client is a visit. *count* is called for each attempt that has ended,
    if attempts are counted, and *finish* at the end.
    """

    def __init__(
        self,
        context: Context,
        path: str,
        finish: Callable[[Trace, RequestEnd], None],
        bugs: Bugs,
        count: Count | None = None,
    ) -> None:
        self._finish = finish
        self._count = count
        self.bugs = bugs
        self.context = context
        # The path of the request to the provider, below its base URL.
        self.path = path
        self.attempt: AttemptTrace | None = None
        self.attempts: list[AttemptTrace] = []
        self.wait: Wait | None = None
        self.waits: list[Wait] = []
        self.left_out = 0
        self.followed = False

    @property
    def trace_id(self) -> str:
        """The id of the trace, 32 hex digits."""
        return self.context.trace_id.hex()

    @property
    def link(self) -> tuple[bytes, bytes]:
        """The ids of the trace and of the SERVER span."""
        return self.context.trace_id, self.context.span_id

    def _attempt(self) -> AttemptTrace:
        """Return the attempt under way, which may be sent again on another connection."""
        if self.attempt is None:
            self.attempt = AttemptTrace()
        return self.attempt

    @bookkeeping(first)
    def sending(self, client_headers: ClientHeaders, body: bytes = b"") -> ClientHeaders:
        """Note the parameters in *body*, which is about to be sent; return its headers.

        They have the span of the attempt under way as the parent of the provider's spans.
        """
        attempt, trace_id = self._attempt(), self.trace_id
        attempt.note_body(body)
        parent = f"00-{trace_id}-{attempt.span_id.hex()}-01".encode()
        return client_headers.with_parent(parent, trace_id)

    @bookkeeping(first)
    def watch(self, sink: WatchedSink[Fast_co]) -> WatchedSink[Fast_co]:
        """Return a sink that notes the first and the last bytes that *sink* is fed."""
        attempt = self._attempt()
        if self._count is not None:
            attempt.chunks = ChunkTimes()
        return NotingSink(sink, attempt)

    @bookkeeping(nothing)
    def waited(self, provider: str, began: float, ended: float) -> None:
        """Note a wait that is over, for a place at *provider*; "" stands for the server."""
        self.wait = Wait(provider, began, ended)
        self._keep(self.waits, self.wait)

    @bookkeeping(nothing)
    def attempt_ended(self, end: AttemptEnd) -> None:
        """Note the end of the attempt under way. If it never got a place, its wait has the error."""
        attempt, wait = self._attempt(), self.wait
        self.attempt = self.wait = None
        if end.began:
            attempt.note_end(end)
            self._keep(self.attempts, attempt)
            if self._count is not None:
                self._count(self.path, attempt)
        elif wait is not None:
            wait.error = _code(end.error)

    @bookkeeping(nothing)
    def ended(self, end: RequestEnd) -> None:
        """Have the spans made: the request has ended."""
        self._finish(self, end)

    def _keep(self, kept: list[T], new: T) -> None:
        if len(kept) >= MAX_CHILDREN:
            del kept[0]
            self.left_out += 1
        kept.append(new)

    def forget(self) -> None:
        """Drop everything but the context, to which the spans of later readers link."""
        self.waits, self.attempts = [], []
        self.attempt = self.wait = None


class CountedRequest:
    """The notes about a request that has no spans: its attempts are counted alone.

    *trace_id* is that of its client. *followed* is as in a trace.
    """

    link = None

    def __init__(self, trace_id: str, path: str, count: Count, bugs: Bugs) -> None:
        self.trace_id = trace_id
        self.followed = False
        self.bugs = bugs
        self._path = path
        self._count = count
        self._attempt = AttemptTrace()

    def waited(self, provider: str, began: float, ended: float) -> None:
        """Note nothing."""

    def sending(self, client_headers: ClientHeaders, body: bytes = b"") -> ClientHeaders:  # noqa: ARG002
        """Return *client_headers* as they came."""
        return client_headers

    @bookkeeping(first)
    def watch(self, sink: WatchedSink[Fast_co]) -> WatchedSink[Fast_co]:
        """Return a sink that notes the first and the last bytes that *sink* is fed."""
        self._attempt.chunks = ChunkTimes()
        return NotingSink(sink, self._attempt)

    @bookkeeping(nothing)
    def attempt_ended(self, end: AttemptEnd) -> None:
        """Count the attempt that has ended."""
        attempt, self._attempt = self._attempt, AttemptTrace()
        if end.began:
            attempt.note_end(end)
            self._count(self._path, attempt)

    def ended(self, end: RequestEnd) -> None:
        """Note nothing."""


def new_context(client_headers: ClientHeaders) -> Context | None:
    """Return the place of a new span, below the client's; None if the client's trace is not
    sampled.
    """
    parent, state = client_headers.trace()
    if not parent:
        return Context(new_id(16), new_id(8))
    # A valid one begins with these parts, whatever its version.
    _version, trace_id, span_id, flags = parent.decode().split("-")[:4]
    if not int(flags, 16) & SAMPLED:
        return None
    return Context(
        bytes.fromhex(trace_id), new_id(8), bytes.fromhex(span_id), remote=True, state=state
    )


def new_id(size: int) -> bytes:
    """Return a new id of *size* bytes."""
    return random.randbytes(size)  # noqa: S311 - an id is no secret


def _plausible(number: int | None) -> int | None:
    """Return *number* if it can be exported, else None."""
    return number if number is not None and 0 <= number < 1 << 62 else None


def _code(error: BaseException | None) -> str:
    """Return `error.type`; empty for a good end, and for a cancelled answer."""
    if error is None or isinstance(error, asyncio.CancelledError):
        return ""
    return error.code if isinstance(error, AioserverError) else "internal_error"


def text_of(match: re.Match[bytes] | None) -> str:
    """Return the first group of *match*; "" without one."""
    return "" if match is None else match[1].decode("utf-8", "replace")


@lru_cache(256)
def address(base_url: str) -> tuple[str, int]:
    """Return the host and the port of a provider at *base_url*."""
    url = URL(base_url)
    return url.host or "", url.port or 0
