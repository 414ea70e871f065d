"""The events of a streamed response (`/v1/responses`), and what is remembered of them for clients
that come back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from aioserver.errors import InternalError
from aioserver.protocol import eventstream
from aioserver.streams.store import StreamStore
from aioserver.wings.responses.events import ResponseEvents
from aioserver.wings.responses.sinks import ResponseSink
from tests.fuzz.inputs import alike, fed, parts

if TYPE_CHECKING:
    from collections.abc import Iterable
WORDS = (
    *(b'"sequence_number":', b'"response":', b'"type":"error"', b'"type":"response.completed"'),
    *(b'"id":', b"event: ", b'"status":', b'"type": "response.failed"', b'"usage":'),
    *(b"{}", b'{"id":"r"}', b"99999999999999999999"),
)


def run(data: bytes) -> None:
    """Take the content for the events of a response: in pieces, at once, and byte for byte."""
    alike(parts(data), _play)


def _play(reads: Iterable[bytes]) -> list[Any]:
    store = StreamStore(max_stream_bytes=1 << 22, max_kept_bytes=1 << 22)
    stream = store.open("r1", "me", window=30.0)
    stream.outcome.provider, stream.outcome.model = "sim", "a-model"
    stream.append_processing()
    stream.events = form = ResponseEvents()
    sink = ResponseSink(stream)
    fault = fed(sink, stream, reads)
    assert stream.ended
    events = eventstream.parse(b"".join(entry.data for entry in stream.entries))
    numbers = [form.event_before(sequence, stream.last) for sequence in range(-1, 8)]
    assert all(number is None or 0 <= number <= stream.last for number in numbers)
    newest = form.newest("cancelled")
    if newest is not None:
        assert orjson.loads(newest)["status"] == "cancelled"
    assert (newest is None) == (form.newest() is None)
    failed = eventstream.parse(form.render(InternalError("it failed")))
    assert len(failed) == 1
    last = orjson.loads(failed[0].data)
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert last["sequence_number"] == form.last_sequence + 1
    known = store.find("me", "resp_1") is stream
    return [fault, stream.end_status, events, numbers, newest, known]
