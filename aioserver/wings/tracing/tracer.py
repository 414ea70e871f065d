"""The traces of requests (OpenTelemetry): begun with their records, made of them at the end, and sent by an exporter.

    begin ──▶ trace.py: notes of waits and attempts ──▶ finish ──▶ export.py: a batch ──▶ spans.py: as bytes ──▶ sent

The spans of many requests are written one after the other, which takes a third of the time that it would take at the end of each:
between two ends a thousand other things are in the processor's caches.

A client that says that its trace is not sampled gets no spans here, and its headers go on as they came. Where `tracing` has
no endpoint there is no tracer, and a request has no trace.
"""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING, Protocol

from aioserver.wings.tracing.spans import EndedRequest, EndedVisit
from aioserver.wings.tracing.trace import Trace, new_context

if TYPE_CHECKING:
    from aioserver.protocol.client_headers import ClientHeaders
    from aioserver.telemetry.request_log import RequestRecord
    from aioserver.wings.tracing.otlp import Context


class Exporter(Protocol):
    """The receiver of requests and visits that have ended (export.py)."""

    def take(self, ended: EndedRequest | EndedVisit) -> None:
        """Write the spans of *ended* later, and send them; or drop and count them."""

    def drop(self, number: int) -> None:
        """Count *number* spans that were dropped."""


class Tracer:
    """Makes the traces of requests, and gives the spans of those that have ended to *exporter*."""

    def __init__(self, exporter: Exporter) -> None:
        self._exporter = exporter

    def begin(
        self,
        record: RequestRecord,
        client_headers: ClientHeaders,
        path: str,
        waited_since: float = 0.0,
    ) -> None:
        """Begin the trace of *record*, which is admitted now; its request goes to *path* at its provider.

        A client that samples no trace gets none. *waited_since*: the monotonic time since which the request had waited for a
        place, 0.0 if it has not.
        """
        context = new_context(client_headers)
        if context is None:
            return
        record.trace = trace = Trace(context, path.partition("?")[0])
        # The log line of the request leads to its trace.
        record.trace_id = context.trace_id.hex()
        if waited_since:
            trace.waited("", waited_since, record.admitted_at)
            trace.wait = None

    def visit(
        self,
        record: RequestRecord,
        client_headers: ClientHeaders,
        request_id: str,
        after: int = 0,
    ) -> Visit | None:
        """Note that a client reads the answer of *record*, known as *request_id*, from event *after* on.

        Return the visit, which the caller ends; None for the client whose request began the answer, and for one that samples
        no trace.
        """
        trace = record.trace
        if trace is not None and not trace.followed:
            trace.followed = True
            return None
        context = new_context(client_headers)
        if context is None:
            return None
        link = None if trace is None else trace.context
        return Visit(self._exporter, context, link, request_id, after)

    def finish(
        self, record: RequestRecord, now: float, code: str, outcome: str, status: int
    ) -> None:
        """Have the spans of *record* made, which ended at the monotonic time *now* as the request log says."""
        trace = record.trace
        assert trace is not None, "only a record with a trace is finished here"
        if trace.left_out:
            self._exporter.drop(trace.left_out)
        self._exporter.take(EndedRequest(record, trace, now, code, outcome, status))


class Visit:
    """A client that reads the answer of another request. `end` is called once."""

    __slots__ = ("_after", "_began", "_context", "_exporter", "_link", "_request_id")

    def __init__(
        self,
        exporter: Exporter,
        context: Context,
        link: Context | None,
        request_id: str,
        after: int,
    ) -> None:
        self._exporter = exporter
        self._context = context
        self._link = link
        self._request_id = request_id
        self._after = after
        self._began = monotonic()

    def end(self, status: bytes, code: str = "") -> None:
        """Make the span: the client has left, or has read it all.

        *status* is that with which the answer has ended, empty if it goes on; *code*: that of its error.
        """
        self._exporter.take(
            EndedVisit(
                self._context,
                self._link,
                self._request_id,
                self._after,
                self._began,
                monotonic(),
                status.decode(),
                code,
            )
        )
