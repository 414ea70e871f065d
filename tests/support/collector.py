"""A collector of spans: it takes them by OTLP over HTTP, and reads them with OpenTelemetry's own
classes.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span as WrittenSpan
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from tests.support.waiting import until
from tests.support.web_app import served

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@dataclass(frozen=True, slots=True)
class Span:
    """A span as a tracing system shows it; ids are in hex, times in seconds."""

    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: dict[str, Any]
    links: tuple[tuple[str, str], ...]
    failed: bool
    start: float
    end: float
    state: str
    remote: bool


def value_of(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [value_of(part) for part in value.array_value.values]
    return getattr(value, kind)


def attributes_of(pairs: Any) -> dict[str, Any]:
    named = {pair.key: value_of(pair.value) for pair in pairs}
    assert len(named) == len(pairs), "an attribute came twice"
    return named


def span_of(span: WrittenSpan) -> Span:
    assert len(span.trace_id) == 16
    assert len(span.span_id) == 8
    assert span.flags & 0x101 == 0x101, "sampled, and it is known where the parent is"
    return Span(
        name=span.name,
        kind=WrittenSpan.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        attributes=attributes_of(span.attributes),
        links=tuple((link.trace_id.hex(), link.span_id.hex()) for link in span.links),
        failed=span.status.code == Status.STATUS_CODE_ERROR,
        start=span.start_time_unix_nano / 1e9,
        end=span.end_time_unix_nano / 1e9,
        state=span.trace_state,
        remote=bool(span.flags & 0x200),
    )


class Collector:
    """A collector at `url`.

    It answers with `status`, never if that is 0, and says that it has `rejected` so many spans of
    a request. `bodies` has what came, with any status, `headers` those of the newest request,
    `resource` the attributes of its resource.
    """

    def __init__(self) -> None:
        self.url = ""
        self.status = 200
        self.rejected = 0
        self.retry_after = ""
        self.spans: list[Span] = []
        self.bodies: list[bytes] = []
        self.headers: dict[str, str] = {}
        self.resource: dict[str, Any] = {}
        self.scope = ("", "")

    async def take(self, request: web.Request) -> web.Response:
        body = await request.read()
        self.bodies.append(body)
        self.headers = {name.lower(): value for name, value in request.headers.items()}
        if not self.status:
            await asyncio.get_running_loop().create_future()
        if self.status == 200:
            export = ExportTraceServiceRequest.FromString(body)
            (resource,) = export.resource_spans
            (scoped,) = resource.scope_spans
            self.resource = attributes_of(resource.resource.attributes)
            self.scope = (scoped.scope.name, scoped.scope.version)
            self.spans += [span_of(span) for span in scoped.spans]
        answer = ExportTraceServiceResponse()
        if self.rejected:
            answer.partial_success.rejected_spans = self.rejected
            answer.partial_success.error_message = "no room"
        headers = {"Retry-After": self.retry_after} if self.retry_after else None
        return web.Response(
            status=self.status,
            body=answer.SerializeToString(),
            headers=headers,
            content_type="application/x-protobuf",
        )

    async def until(self, number: int) -> list[Span]:
        """Wait for *number* spans in all, and return them in the order in which they began."""
        await until(lambda: len(self.spans) >= number, 15.0, lambda: self.spans)
        assert len(self.spans) == number, [span.name for span in self.spans]
        return sorted(self.spans, key=lambda span: span.start)

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]


@contextlib.asynccontextmanager
async def collecting() -> AsyncIterator[Collector]:
    """A collector that listens until the end of the block."""
    collector = Collector()
    app = web.Application(client_max_size=1 << 24)
    app.router.add_post("/v1/traces", collector.take)
    async with served(app) as collector.url:
        yield collector
