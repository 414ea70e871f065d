"""Visits: clients that read the answer of another request, each with a span of its own where spans are made (wings/tracing/tracer.py).

The client whose request began an answer is its first reader, and no visit. A face begins a visit where it lets a client read an
answer, and ends it however the reading ends; without a tracer there are none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aioserver.faces.intake import client_headers

if TYPE_CHECKING:
    from aiohttp import web

    from aioserver.faces.context import Context
    from aioserver.streams.stream import Stream
    from aioserver.wings.tracing.tracer import Tracer, Visit


def begin(
    tracer: Tracer, context: Context, request: web.Request, stream: Stream, after: int = 0
) -> Visit | None:
    """Return the visit of *request*, which reads *stream* from event *after* on; None if it is none."""
    headers = client_headers(context, request)
    return tracer.visit(stream.record, headers, stream.request_id, after)


def end(visit: Visit, stream: Stream) -> None:
    """End *visit*: its client has left *stream*, or has read it to its end."""
    error = stream.error
    visit.end(stream.end_status if stream.ended else b"", "" if error is None else error.code)
