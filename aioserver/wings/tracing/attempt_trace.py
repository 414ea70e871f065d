"""The notes of an attempt in the trace of its request, where there is one (wings/tracing/trace.py).

Of the question only two numbers are read. Of the answer some bytes of its beginning and its end are kept until the spans are
written (wings/tracing/spans.py): they have its id, its model and why it ended.
"""

from __future__ import annotations

import asyncio
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
from yarl import URL

from aioserver.errors import AioserverError
from aioserver.providers.sinks import BodySink
from aioserver.telemetry.request_log import TOKENS_IN, TOKENS_OUT, token_count

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aioserver.config import settings
    from aioserver.protocol.client_headers import ClientHeaders
    from aioserver.provider_errors import ProviderFault
    from aioserver.providers.http1 import Sink
    from aioserver.streams.contracts import Path
    from aioserver.telemetry.request_log import RequestRecord
    from aioserver.wings.tracing.trace import AttemptTrace, Trace

# Bytes of a body in which the parameters are looked for: a larger one would take long.
MAX_READ = 1 << 16
# Bytes at the beginning and at the end of an answer that are noted.
HEAD_BYTES, TAIL_BYTES = 512, 1024


class _Parameters(msgspec.Struct, gc=False):
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None


_PARAMETERS = msgspec.json.Decoder(_Parameters)


class AskedProvider(Protocol):
    """The provider of an attempt."""

    name: str
    settings: settings.Provider


class RecordedRequest(Protocol):
    """The request of an attempt."""

    record: RequestRecord


class EndedAttempt(Protocol):
    """An attempt (providers/attempt.py), as its trace sees it."""

    began: float
    fault: ProviderFault | None
    model: str | None
    sink: Sink | None
    status: int
    usage: Mapping[str, Any] | None

    @property
    def provider(self) -> AskedProvider:
        """The provider that it asked."""

    @property
    def request(self) -> RecordedRequest:
        """The request that it was made for."""


class WatchedSink:
    """Another sink; of what it is fed the first and the last bytes are noted."""

    def __init__(self, sink: Sink, noted: AttemptTrace) -> None:
        self._sink = sink
        self._noted = noted

    @property
    def progress(self) -> int:
        """That of the other sink."""
        return self._sink.progress

    def feed(self, data: bytes) -> bool:
        """Feed the other sink."""
        noted = self._noted
        if len(noted.head) < HEAD_BYTES:
            noted.head += data[: HEAD_BYTES - len(noted.head)]
        noted.tail = (noted.tail + data[-TAIL_BYTES:])[-TAIL_BYTES:]
        return self._sink.feed(data)

    def end(self) -> None:
        """End the other sink."""
        self._sink.end()

    def fast(self) -> Path | None:
        """Return the fast path of the other sink: what goes by it is a text, and pays nothing for the trace."""
        return self._sink.fast()


def note_request(trace: Trace, body: bytes, client_headers: ClientHeaders) -> ClientHeaders:
    """Note what *body* asks for, which is about to be sent; return the headers that go with it."""
    attempt = trace.next_attempt()
    if len(body) <= MAX_READ and (body.find(b'"max_') > 0 or body.find(b'"temperature"') > 0):
        try:
            parameters = _PARAMETERS.decode(body)
        except (msgspec.MsgspecError, RecursionError):
            # The provider will say what it thinks of them.
            pass
        else:
            attempt.max_tokens = _plausible(
                parameters.max_tokens
                or parameters.max_completion_tokens
                or parameters.max_output_tokens
            )
            attempt.temperature = parameters.temperature
    return trace.passed(client_headers)


def _plausible(number: int | None) -> int | None:
    """Return a *number* that can be exported."""
    return number if number is not None and 0 <= number < 1 << 62 else None


def note_end(
    attempt: EndedAttempt, error: BaseException | None, now: float, base_url: str
) -> None:
    """Note the end of *attempt*, well or with *error*, at the monotonic time *now*; its request has a trace."""
    record = attempt.request.record
    trace = record.trace
    assert trace is not None, "only an attempt with a trace ends here"
    code = _code(error or attempt.fault)
    if not attempt.began:
        trace.refused(code)
        return
    noted = trace.next_attempt()
    noted.provider, noted.error = attempt.provider.name, code
    noted.model = attempt.model or attempt.provider.settings.model
    noted.address = address(base_url)
    noted.began, noted.ended = attempt.began, now
    noted.status = attempt.status
    if record.streamed and record.first_event_at > noted.began:
        noted.first_chunk = record.first_event_at - record.sent_at
    noted.tokens = token_count(attempt.usage, TOKENS_IN), token_count(attempt.usage, TOKENS_OUT)
    if isinstance(attempt.sink, BodySink) and attempt.status == 200:
        body = attempt.sink.body
        noted.head, noted.tail = body[:HEAD_BYTES], body[-TAIL_BYTES:]
    trace.attempt_ended(noted)


def _code(error: BaseException | None) -> str:
    """Return `error.type`; empty for a good end, and for an answer that nobody wants any more."""
    if error is None or isinstance(error, asyncio.CancelledError):
        return ""
    return error.code if isinstance(error, AioserverError) else "internal_error"


@lru_cache(256)
def address(base_url: str) -> tuple[str, int]:
    """Return the host and the port of a provider at *base_url*."""
    url = URL(base_url)
    return url.host or "", url.port or 0
