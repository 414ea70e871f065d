"""Spans as bytes, read by OpenTelemetry's own classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from aioserver.wings.tracing import otlp
from aioserver.wings.tracing.otlp import Context
from tests.support.collector import attributes_of, span_of

if TYPE_CHECKING:
    from aioserver.wings.tracing.otlp import Value

TRACE, SPAN, PARENT = bytes(range(16)), b"\x01" * 8, b"\xff" * 8
VALUES: Any = st.one_of(
    st.text(max_size=150),
    st.booleans(),
    st.integers(0, 2**63 - 1),
    st.floats(allow_nan=False),
    st.lists(st.text(max_size=9), max_size=4).map(tuple),
)


def read(span: bytes) -> Any:
    """The only span of an export of *span*."""
    data = otlp.request([otlp.key_value("service.name", "s")], ("scope", "1"), span)
    (resource,) = ExportTraceServiceRequest.FromString(data).resource_spans
    (scoped,) = resource.scope_spans
    assert attributes_of(resource.resource.attributes) == {"service.name": "s"}
    assert (scoped.scope.name, scoped.scope.version) == ("scope", "1")
    (written,) = scoped.spans
    return written


@settings(max_examples=25)
@given(st.dictionaries(st.text(max_size=150), VALUES, max_size=4), st.text(max_size=150))
def test_any_attributes_are_read_as_they_were(attributes: dict[str, Value], name: str) -> None:
    described = otlp.description(name, otlp.CLIENT, attributes, failed=True)
    later = [otlp.attribute(f"later {key}", value) for key, value in attributes.items()]

    span = span_of(read(otlp.span(Context(TRACE, SPAN), (1, 2**63), described, later)))

    expected = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in attributes.items()
    }
    assert {key: span.attributes[key] for key in attributes} == expected
    assert {key: span.attributes[f"later {key}"] for key in attributes} == expected
    assert (span.name, span.kind, span.failed) == (name, "CLIENT", True)
    assert (span.start, span.end) == (1e-9, 2**63 / 1e9)


def test_a_span_has_its_place_in_the_trace_and_its_link() -> None:
    described = otlp.description("queue", otlp.INTERNAL, {}, failed=False)
    context = Context(TRACE, SPAN, PARENT, remote=True, state=b"a=b,c=d")
    other = Context(bytes(reversed(TRACE)), PARENT)

    span = span_of(read(otlp.span(context, (5, 7), described, link=other[:2])))

    assert span.trace_id == TRACE.hex()
    assert (span.span_id, span.parent_id) == (SPAN.hex(), PARENT.hex())
    assert (span.remote, span.state, span.failed) == (True, "a=b,c=d", False)
    assert span.links == ((other.trace_id.hex(), other.span_id.hex()),)
    assert (span.name, span.kind) == ("queue", "INTERNAL")


def test_a_lone_surrogate_spoils_no_span() -> None:
    described = otlp.description("chat \ud800", otlp.SERVER, {"a": "\udfff"}, failed=False)

    assert read(otlp.span(Context(TRACE, SPAN), (1, 2), described)).name == "chat ?"


@pytest.mark.parametrize("number", [0, 1, 127, 128, 300, 2**40])
@pytest.mark.parametrize("message", ["", "no room", "x" * 300])
def test_the_number_of_rejected_spans_is_read(number: int, message: str) -> None:
    answer = ExportTraceServiceResponse()
    answer.partial_success.rejected_spans = number
    answer.partial_success.error_message = message

    assert otlp.rejected(answer.SerializeToString()) == number


@given(st.binary(max_size=40))
def test_any_answer_of_a_collector_is_read(answer: bytes) -> None:
    assert otlp.rejected(answer) >= 0
    assert otlp.rejected(b"\x0a\x05\x08" + answer) >= 0
