"""The events of a streamed answer of Anthropic's Messages API."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from aioserver.protocol import eventstream
from aioserver.streams.store import StreamStore
from aioserver.wings.anthropic.sink import MessageSink
from aioserver.wings.anthropic.wire import MessageErrors
from tests.fuzz.inputs import alike, fed, parts

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aioserver.protocol.eventstream import ServerEvent
WORDS = (
    *(b'"type":"message_start"', b'"type":"message_stop"', b'"type":"error"', b'"type":"ping"'),
    *(b'"type": "message_stop"', b'"usage":', b'"message":', b'"output_tokens":', b"event: "),
    *(b'"overloaded_error"', b'"authentication_error"', b'"rate_limit_error"', b"{}", b"[]"),
)


def run(data: bytes) -> None:
    """Take the content for the events of an answer: in pieces, at once, and byte for byte."""
    alike(parts(data), _play)


def _play(reads: Iterable[bytes]) -> list[Any]:
    store = StreamStore(max_stream_bytes=1 << 22, max_kept_bytes=1 << 22)
    stream = store.open("r1", "me", window=30.0)
    stream.outcome.provider, stream.outcome.model = "sim", "a-model"
    stream.append_processing()
    stream.events = MessageErrors()
    sink = MessageSink(stream)
    fault = fed(sink, stream, reads)
    assert stream.ended
    events = eventstream.parse(b"".join(entry.data for entry in stream.entries))
    if stream.end_status == b"complete":
        assert _type(events[-1]) == "message_stop"
    else:
        assert stream.error is not None
        assert _type(events[-1]) == "error" or b'"error"' in events[-1].data
    # Pings before the answer pass, unless a fault comes in the same read.
    answer = [event for event in events if _type(event) != "ping"]
    return [fault, stream.end_status, stream.answered, answer, stream.outcome.usage]


def _type(event: ServerEvent) -> Any:
    try:
        content = orjson.loads(event.data)
    except orjson.JSONDecodeError:
        return None
    return content.get("type") if isinstance(content, dict) else None
