"""The traces of requests (OpenTelemetry): begun with them, and given to an exporter.

    begin ──▶ trace.py: notes of waits and attempts ──▶ ended
          ──▶ export.py: a batch ──▶ spans.py: as bytes ──▶ sent

The spans of many requests are written one after the other. This takes a third of the time that it
would take at the end of each, because between two ends a thousand other things are in the
processor's caches.

A client whose trace is not sampled gets no spans here, and its headers are passed on unchanged. If
`tracing` has no endpoint there are no spans at all. Attempts are counted (gen_ai_metrics.py) with or
without spans, if the settings ask for it. Without both there is no tracer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aioserver.telemetry.bookkeeping import bookkeeping, nothing
from aioserver.wings.tracing.spans import EndedRequest, Visit
from aioserver.wings.tracing.trace import CountedRequest, Trace, new_context

if TYPE_CHECKING:
    from aioserver.protocol.request_headers import ClientHeaders
    from aioserver.telemetry.bugs import Bugs
    from aioserver.telemetry.tracer import RequestEnd, RequestTrace
    from aioserver.wings.tracing.export import SpanExporter
    from aioserver.wings.tracing.gen_ai_metrics import GenAiMeter


class Tracer:
    """Makes the traces of requests, and gives the spans of those that have ended to *exporter*, if
    there is one. *meter* counts all attempts, if there is one.
    """

    def __init__(
        self, exporter: SpanExporter | None, bugs: Bugs, meter: GenAiMeter | None = None
    ) -> None:
        self._exporter = exporter
        self._count = None if meter is None else meter.count
        self.bugs = bugs

    @bookkeeping(nothing)
    def begin(
        self,
        client_headers: ClientHeaders,
        path: str,
        admitted_at: float,
        waited_since: float = 0.0,
    ) -> RequestTrace | None:
        """Begin the trace of a request that goes to *path* at its provider.

        None if its client's trace is not sampled, unless attempts are counted. The request was
        admitted at the monotonic time *admitted_at*, and had waited for a place since
        *waited_since*; 0.0 if it has not.
        """
        path, count = path.partition("?")[0], self._count
        context = None if self._exporter is None else new_context(client_headers)
        if context is None:
            if count is None:
                return None
            return CountedRequest(client_headers.trace_id, path, count, self.bugs)
        trace = Trace(context, path, self._finish, self.bugs, count)
        if waited_since:
            trace.waited("", waited_since, admitted_at)
            trace.wait = None
        return trace

    @bookkeeping(nothing)
    def visit(
        self,
        trace: RequestTrace | None,
        client_headers: ClientHeaders,
        request_id: str,
        after: int = 0,
    ) -> Visit | None:
        """Note that a client reads the answer of *request_id*, with *trace*, after event *after*.

        Return the visit, which the caller ends; None for the client whose request began the
        answer, and for one whose trace is not sampled.
        """
        if trace is not None and not trace.followed:
            trace.followed = True
            return None
        if self._exporter is None:
            return None
        context = new_context(client_headers)
        if context is None:
            return None
        link = None if trace is None else trace.link
        return Visit(self._exporter.take, context, link, request_id, after, self.bugs)

    def _finish(self, trace: Trace, end: RequestEnd) -> None:
        """Give the spans of *trace*, whose request has ended, to the exporter."""
        assert self._exporter is not None, "spans are made for an exporter"
        if trace.left_out:
            self._exporter.drop(trace.left_out)
        self._exporter.take(EndedRequest(trace, end))
