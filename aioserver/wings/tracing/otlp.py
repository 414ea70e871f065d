"""Spans as bytes, as the OpenTelemetry Protocol (OTLP 1.x,
https://opentelemetry.io/docs/specs/otlp/) sends them over HTTP.

    ExportTraceServiceRequest {
        ResourceSpans { Resource, ScopeSpans { InstrumentationScope, Span* } }
    }

They are written in the binary form of Protocol Buffers, which every collector accepts; some do not
accept the JSON form. Field numbers of a stable version of the protocol never change. Written by
hand because the official encoder takes eight times as long, and would block the event loop by the
interpreter's lock even from a thread of its own.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Value = str | bool | int | float | tuple[str, ...]

# Values of `Span.kind` and of `Status.code`.
INTERNAL, SERVER, CLIENT = 1, 2, 3
ERROR: Final = 2
# `Span.flags` of a sampled trace: the parent is a span of another process; or it is a span of this
# process, or there is none.
_REMOTE, _HERE = 0x301, 0x101

_DOUBLE = struct.Struct("<d")
# `start_time_unix_nano`, `end_time_unix_nano` (fixed64) and `flags` (fixed32) of a span, with
# their tags.
_REST = struct.Struct("<BQBQBBI")
_START_TAG, _END_TAG, _FLAGS_TAG = 7 << 3 | 1, 8 << 3 | 1, (0x85, 0x01)
_ONE_BYTE = [bytes((number,)) for number in range(128)]


def varint(number: int) -> bytes:
    """Return *number*, from 0 to 2^64 - 1, as a varint."""
    if number < 128:
        return _ONE_BYTE[number]
    parts = bytearray()
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    parts.append(number)
    return bytes(parts)


def field(number: int, data: bytes) -> bytes:
    """Return *data*, a message or a string, as the field *number*, from 1 to 15."""
    return b"%b%b%b" % (_ONE_BYTE[number << 3 | 2], varint(len(data)), data)


def _text(value: str) -> bytes:
    # No lone surrogate should come so far, but an error here would be an error of a request.
    return value.encode("utf-8", "replace")


def _any_value(value: Value) -> bytes:
    """Return an `AnyValue`; an integer has 63 bits at most, and is not negative."""
    if isinstance(value, str):
        return field(1, _text(value))
    if isinstance(value, bool):
        return b"\x10\x01" if value else b"\x10\x00"
    if isinstance(value, int):
        return b"\x18" + varint(value)
    if isinstance(value, float):
        return b"\x21" + _DOUBLE.pack(value)
    return field(5, b"".join([field(1, _any_value(part)) for part in value]))


@lru_cache(128)
def _key(key: str) -> bytes:
    return field(1, key.encode())


def key_value(key: str, value: Value) -> bytes:
    """Return a `KeyValue`; there are few keys, all of them ours."""
    return _key(key) + field(2, _any_value(value))


def attribute(key: str, value: Value) -> bytes:
    """Return an attribute as a part of `Span`."""
    return field(9, key_value(key, value))


def description(name: str, kind: int, attributes: Mapping[str, Value], *, failed: bool) -> bytes:
    """Return the parts of a span that many have in common; *failed*: its status is an error."""
    parts = [field(5, _text(name)), b"\x30" + varint(kind)]
    parts += [attribute(key, value) for key, value in attributes.items()]
    if failed:
        parts.append(field(15, b"\x18" + varint(ERROR)))
    return b"".join(parts)


class Context(NamedTuple):
    """The place of a span in its trace: ids of 16 and 8 bytes, the parent's empty if there is
    none.

    *remote*: the parent is a span of another process. *state* is a `tracestate`.
    """

    trace_id: bytes
    span_id: bytes
    parent_id: bytes = b""
    remote: bool = False
    state: bytes = b""


def span(
    context: Context,
    times: tuple[int, int],
    described: bytes,
    attributes: Iterable[bytes] = (),
    link: tuple[bytes, bytes] | None = None,
) -> bytes:
    """Return a span as a part of `ScopeSpans`.

    *times*: its start and its end in nanoseconds of Unix time. *described*: made by `description`.
    *attributes*: more of them, made by `attribute`. *link*: the ids of the trace and of another
    span, to which it belongs.
    """
    trace_id, span_id, parent_id, remote, state = context
    data = b"\x0a\x10%b\x12\x08%b%b%b%b%b" % (
        trace_id,
        span_id,
        b"\x22\x08" + parent_id if parent_id else b"",
        described,
        _REST.pack(
            _START_TAG, times[0], _END_TAG, times[1], *_FLAGS_TAG, _REMOTE if remote else _HERE
        ),
        b"".join(attributes),
    )
    if state:
        data += field(3, state)
    if link is not None:
        data += field(13, b"\x0a\x10%b\x12\x08%b" % link)
    return field(2, data)


def request(resource: Iterable[bytes], scope: tuple[str, str], spans: bytes) -> bytes:
    """Return an export of *spans*, joined; *resource*: key-value pairs.

    *scope*: name and version of the instrumentation.
    """
    attributes = b"".join([field(1, pair) for pair in resource])
    name, version = scope
    written_scope = field(1, field(1, _text(name)) + field(2, _text(version)))
    return field(1, field(1, attributes) + field(2, written_scope + spans))


def rejected(response: bytes) -> int:
    """Return how many spans a collector has rejected, by its `ExportTraceServiceResponse`; 0 if
    none.
    """
    # partial_success { rejected_spans, error_message }: the number comes first, and is left out
    # where it is 0.
    if len(response) < 4 or response[0] != 0x0A:
        return 0
    start = 1
    while start < len(response) and response[start] > 127:
        start += 1
    number = shift = 0
    if response[start + 1 : start + 2] == b"\x08":
        for byte in response[start + 2 : start + 12]:
            number |= (byte & 127) << shift
            if byte < 128:
                return number
            shift += 7
    return 0
