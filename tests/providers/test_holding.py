"""What is held of a turn: from the first piece of a call on, however that is written; whole, or
dropped where an event of it is broken.
"""

from __future__ import annotations

import json
from itertools import product

import pytest

from aioserver.protocol.openai import Reading
from aioserver.protocol.request_headers import CALLS, TURN
from aioserver.provider_errors import ProviderBadResponse
from aioserver.providers.holding import COUNT_STEP, Holding
from aioserver.providers.reading_sinks import ChatSink
from aioserver.providers.request import CHAT, Api, ProviderRequest
from aioserver.providers.sinks import DONE, StreamSink
from aioserver.streams.stream import Stream
from aioserver.wings.anthropic.api import MESSAGES
from aioserver.wings.responses.api import RESPONSES
from tests.support.held_turns import TEXT, Turn
from tests.support.road import BRIDGES, RESPONSES_FACES, Road, assert_same, play, taking
from tests.support.scripted_provider import EVENT_STREAM, LAST_CHUNK, chunk

EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"%b"},"finish_reason":null}]}\n\n'
FINISH = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
BROKEN = {
    "no JSON in braces": b'data: {"choices":[}\n\n',
    "half an object": b'data: {"choices":[\n\n',
    "half a character": EVENT % b"\xc3",
    "half an escape": EVENT % b"\\u12",
}


def holding(
    *, frames: bool, api: Api = CHAT, hold: str = TURN
) -> tuple[Stream, StreamSink, Holding]:
    """A log, and its sink, which holds what *hold* says."""
    stream = Stream("r1", "anybody", window=30.0, max_bytes=1 << 22)
    stream.append_processing()
    reading = Reading() if frames else None
    stream.api, stream.events = api, api.events()
    request = ProviderRequest(api, lambda *_: b"{}", streamed=True, reading=reading)
    request.hold = hold
    sink = api.sink(stream) if reading is None else ChatSink(stream, reading)
    held = Holding(request, stream, sink, api.parts, lambda: None, None)
    sink.hold(held, held)
    return stream, sink, held


@pytest.mark.parametrize("frames", [True, False], ids=["frames", "bytes"])
async def test_turn_is_shown_at_its_finish_and_not_before(frames: bool) -> None:
    stream, sink, held = holding(frames=frames)
    before = stream.last

    assert sink.feed(EVENT % b"a")
    assert sink.fast() is held
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

    rest = EVENT % b"c" + FINISH + DONE
    if not held.forward(chunk(BROKEN[name])):
        rest = BROKEN[name] + rest
    with pytest.raises(ProviderBadResponse):
        sink.feed(rest)

    assert (stream.last, stream.ended) == (before, False)


async def test_broken_event_ends_a_turn_before_much_more_is_held() -> None:
    _, sink, held = holding(frames=True)
    assert sink.feed(EVENT % b"a")
    assert held.forward(chunk(BROKEN["half an escape"]))

    while held.forward(chunk(EVENT % b"b")):
        assert len(held.held) < COUNT_STEP
    with pytest.raises(ProviderBadResponse):
        sink.feed(EVENT % b"b")


@pytest.mark.parametrize("frames", [True, False], ids=["frames", "bytes"])
async def test_broken_event_is_not_shown_when_a_turn_is_let_go(frames: bool) -> None:
    stream, sink, held = holding(frames=frames)
    before = stream.last
    # The second has an escape, so that it is looked at, and the first with it.
    assert sink.feed(EVENT % b"a")
    assert sink.feed(EVENT % b"\\u0062")
    assert held.forward(chunk(BROKEN["half an escape"]))

    held.let_go()

    assert stream.last == before + 2
    with pytest.raises(ProviderBadResponse):
        sink.feed(FINISH + DONE)
    assert stream.last == before + 2


# Of each API a text and the first event of a call, which one of its words makes one.
PATHS = {CHAT: "chat/completions", MESSAGES: "messages", RESPONSES: "responses"}
LAST_TEXT = "So. "
FACES = {CHAT: "openai", MESSAGES: "messages", RESPONSES: "responses"}
CALL_WORDS = {
    CHAT: ("tool_calls", "function_call"),
    MESSAGES: ("tool_use",),
    RESPONSES: ("function_call", "custom_tool_call"),
}
SPELLINGS = [
    (api, word, "".join(spelled))
    for api, words in CALL_WORDS.items()
    for word in words
    for at, letter in enumerate(word)
    for code in (f"\\u{ord(letter):04x}", f"\\u{ord(letter):04X}")
    for spelled in [(word[:at], code, word[at + 1 :])]
]


def text_and_call(api: Api, word: str, spelled: str) -> tuple[list[bytes], bytes]:
    """The events of an answer to its first text, and that which begins a call, with *word* as it
    is *spelled*.
    """
    events = Turn(text=(*TEXT, LAST_TEXT)).events(PATHS[api], 1)
    text = next(at for at, event in enumerate(events) if LAST_TEXT.encode() in event)
    call = next(event for event in events if b"call_1_0" in event)
    usual = CALL_WORDS[api][0]
    name, data = call.split(b"data: ")
    assert usual.encode() in data
    data = data.replace(b'"%b"' % usual.encode(), b'"%b"' % spelled.encode())
    assert word in str(json.loads(data))
    return events[: text + 1], b"data: ".join((name, data))


@pytest.mark.parametrize("api", PATHS, ids=list(PATHS.values()))
async def test_held_run_of_texts_is_written_as_it_would_have_come(api: Api) -> None:
    texts = [f"w{number} " for number in range(200)]
    # Some are not plain, and one part of each size stands between two of these.
    texts = [text + "\n" * (at**2 % 17 == 1) for at, text in enumerate(texts)]
    events = Turn(text=texts).events(PATHS[api], 1)
    reads = [EVENT_STREAM, *map(chunk, events[:-1]), chunk(events[-1]) + LAST_CHUNK]
    faces = {CHAT: ("openai", "sse", "websocket", *BRIDGES), MESSAGES: ("messages",)}
    for face in faces.get(api, RESPONSES_FACES):
        shown = await play(face, reads)

        assert_same(face, await play(face, reads, hold=TURN), shown)


async def test_a_call_is_held_however_its_letters_are_written() -> None:
    for (api, word, spelled), whole in product(SPELLINGS, (True, False)):
        shown, call = text_and_call(api, word, spelled)
        stream, sink, held = holding(frames=False, api=api, hold=CALLS)
        for event in shown:
            assert sink.feed(event)
        before = stream.last
        assert before > 1, "a text comes at once"

        for at in range(0, len(call), len(call) if whole else 1):
            assert sink.feed(call[at:] if whole else call[at : at + 1])

        assert (stream.last, bytes(held.held)) == (before, call), spelled


async def test_no_fast_path_shows_a_call_however_its_letters_are_written() -> None:
    for api, word, spelled in SPELLINGS:
        shown, call = text_and_call(api, word, spelled)
        async with Road(FACES[api], hold=CALLS) as road:
            await road.say(EVENT_STREAM, *map(chunk, shown[:-1]))
            with taking() as taken:
                await road.say(chunk(shown[-1]))
                assert taken or api is MESSAGES, "a text takes the fast path"
                before = road.body
                taken.clear()

                await road.say(chunk(call))

                assert not taken, spelled
            assert road.body == before
            assert road.held is not None
            assert road.held.held == call


@pytest.mark.parametrize(
    "text", ["\\u00e9t\\u00e9", "a\\/b", "\\u4f60\\u597d", "tool_calls", "\\\\u005f"]
)
@pytest.mark.parametrize("api", PATHS, ids=list(PATHS.values()))
async def test_text_with_escapes_comes_at_once(api: Api, text: str) -> None:
    shown, _ = text_and_call(api, CALL_WORDS[api][0], CALL_WORDS[api][0])
    escaped = shown[-1].replace(LAST_TEXT.encode(), text.encode())
    stream, sink, held = holding(frames=False, api=api, hold=CALLS)
    for event in shown:
        assert sink.feed(event)
    before = stream.last

    assert sink.feed(escaped)

    assert (stream.last, bytes(held.held)) == (before + 1, b"")


@pytest.mark.parametrize("api", PATHS, ids=list(PATHS.values()))
async def test_call_in_one_read_with_the_text_in_front_of_it_is_held(api: Api) -> None:
    shown, call = text_and_call(api, CALL_WORDS[api][0], CALL_WORDS[api][0])
    stream, sink, held = holding(frames=False, api=api, hold=CALLS)
    for event in shown:
        assert sink.feed(event)
    before = stream.last

    assert sink.feed(shown[-1] + call)

    assert (stream.last, bytes(held.held)) == (before + 1, call)
