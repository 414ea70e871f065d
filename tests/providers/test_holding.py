"""What is held of a turn: whole, or dropped where an event of it is broken."""

from __future__ import annotations

import pytest

from aioserver.protocol.openai import Reading
from aioserver.protocol.parts import CHAT_PARTS
from aioserver.protocol.request_headers import TURN
from aioserver.provider_errors import ProviderBadResponse
from aioserver.providers.holding import Holding
from aioserver.providers.reading_sinks import ChatSink
from aioserver.providers.request import CHAT, ProviderRequest
from aioserver.providers.sinks import DONE, EventSink, StreamSink
from aioserver.streams.stream import Stream
from tests.support.scripted_provider import chunk

EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"%b"},"finish_reason":null}]}\n\n'
FINISH = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
BROKEN = {
    "no JSON in braces": b'data: {"choices":[}\n\n',
    "half an object": b'data: {"choices":[\n\n',
    "half a character": EVENT % b"\xc3",
    "half an escape": EVENT % b"\\u12",
}


def holding(*, frames: bool) -> tuple[Stream, StreamSink, Holding]:
    """A log, and its sink, which holds a whole turn."""
    stream = Stream("r1", "anybody", window=30.0, max_bytes=1 << 22)
    stream.append_processing()
    reading = Reading() if frames else None
    request = ProviderRequest(CHAT, lambda *_: b"{}", streamed=True, reading=reading)
    request.hold = TURN
    sink = EventSink(stream) if reading is None else ChatSink(stream, reading)
    held = Holding(request, stream, sink, CHAT_PARTS, lambda: None, None)
    sink.hold(held, held.path)
    return stream, sink, held


@pytest.mark.parametrize("frames", [True, False], ids=["frames", "bytes"])
async def test_turn_is_shown_at_its_finish_and_not_before(frames: bool) -> None:
    stream, sink, held = holding(frames=frames)
    before = stream.last

    assert sink.feed(EVENT % b"a")
    assert held.path() is held
    assert held.forward(chunk(EVENT % "\u00e9".encode()))
    assert stream.last == before
    assert not sink.feed(FINISH + DONE)

    assert stream.ended
    shown = b"".join(data for entry in stream.entries for data in stream.frames(entry))
    assert "\u00e9".encode() in (shown if frames else stream.entries[1].data)


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("frames", [True, False], ids=["frames", "bytes"])
async def test_nothing_is_shown_of_a_turn_with_a_broken_event(name: str, frames: bool) -> None:
    stream, sink, held = holding(frames=frames)
    before = stream.last
    assert sink.feed(EVENT % b"a")
    assert held.forward(chunk(EVENT % b"b"))

    assert not held.forward(chunk(BROKEN[name]))
    with pytest.raises(ProviderBadResponse):
        sink.feed(BROKEN[name] + EVENT % b"c" + FINISH + DONE)

    assert (stream.last, stream.ended) == (before, False)
