"""The events of a message on the fast path, beside the same bytes that come one by one."""

from __future__ import annotations

import random

import pytest

from aioserver.protocol.request_headers import CALLS, PREAMBLE
from tests.support.road import assert_same, cut, play, play_bytes, taking
from tests.support.scripted_provider import EVENT_STREAM, LAST_CHUNK, chunk

BEFORE = (
    b'event: message_start\ndata: {"type":"message_start","message":{"id":"msg_1","type":"message",'
    b'"role":"assistant","model":"m","content":[],"usage":{"input_tokens":1,"output_tokens":1}}}\n\n'
    b'event: content_block_start\ndata: {"type":"content_block_start","index":0,'
    b'"content_block":{"type":"text","text":""}}\n\n'
)
AFTER = (
    b'event: content_block_stop\ndata: {"type":"content_block_stop","index":0}\n\n'
    b'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"end_turn"},'
    b'"usage":{"output_tokens":9}}\n\n'
    b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
)


def delta(inner: bytes, text: bytes = b"") -> bytes:
    return (
        b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,"delta":'
        + inner.replace(b"?", text)
        + b"}\n\n"
    )


def says(text: bytes) -> bytes:
    return delta(b'{"type":"text_delta","text":"?"}', text)


TAKEN = {
    "a text": says(b"a"),
    "a text with blanks in its JSON": (
        b'event: content_block_delta\ndata: {"type": "content_block_delta", "index": 0, '
        b'"delta": {"type": "text_delta", "text": "a"}}\n\n'
    ),
    "a text beyond ASCII": says("Grüße 😀\x7f\u2028".encode()),
    "a text that looks like an end": says(b"event: message_stop data: {error: usage}"),
    "a text of a later block": says(b"a").replace(b'"index":0', b'"index":12'),
}
NOT_TAKEN = {
    "no text": says(b""),
    "escapes": says(rb"\n\"\u00fc"),
    "an escape of a letter": says(b"a").replace(b"text_delta", rb"text\u005fdelta"),
    "a second text": delta(b'{"type":"text_delta","text":"?","text":"b"}', b"a"),
    "citations": delta(b'{"type":"text_delta","text":"?","citations":[]}', b"a"),
    "usage": says(b"a").replace(b'"a"}}', b'"a"},"usage":{"output_tokens":3}}'),
    "an error beside it": says(b"a").replace(b'"a"}}', b'"a"},"error":{"message":"no"}}'),
    "thinking": delta(b'{"type":"thinking_delta","thinking":"a"}'),
    "a piece of a call": delta(b'{"type":"input_json_delta","partial_json":"{"}'),
    "half a character": says("😀".encode()[:2]),
    "a control character": says(b"a\tb"),
    "no name": says(b"a").partition(b"\n")[2],
    "another name": says(b"a").replace(b"event: content_block_delta", b"event: message_stop"),
    "a data line more": says(b"a")[:-1] + b"data: {}\n\n",
    "an id": b"id: 7\n" + says(b"a"),
    "line ends of another kind": says(b"a").replace(b"\n", b"\r\n"),
    "two events": says(b"a") + says(b"b"),
    "a ping": b'event: ping\ndata: {"type":"ping"}\n\n',
    "an error": b'event: error\ndata: {"type":"error","error":{"type":"api_error"}}\n\n',
    "too many bytes": says(b"a" * 2048),
    "half an event": says(b"a")[:-9],
}


@pytest.mark.parametrize("hold", [PREAMBLE, CALLS])
@pytest.mark.parametrize("name", [*TAKEN, *NOT_TAKEN])
async def test_an_event_has_the_same_effect_on_both_ways(name: str, hold: str) -> None:
    odd = chunk({**TAKEN, **NOT_TAKEN}[name])
    texts = [chunk(says(b"w%d " % number)) for number in range(3)]
    reads = [EVENT_STREAM, chunk(BEFORE), *texts, odd, texts[0], chunk(AFTER), LAST_CHUNK]
    with taking() as taken:
        seen = await play("messages", reads, hold=hold)

    assert texts[1] in taken
    assert (odd in taken) == (name in TAKEN)
    data = b"".join(reads)
    assert_same("messages", seen, await play_bytes("messages", data, hold=hold))
    places = random.Random(3).sample(range(1, len(data)), 9)
    assert_same("messages", seen, await play("messages", cut(data, places), hold=hold))
