"""The sinks: a provider's bytes into a log, whatever way they are cut."""

from __future__ import annotations

import random
import tracemalloc
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from aioserver.errors import ServerAtCapacity
from aioserver.protocol import eventstream
from aioserver.protocol.openai import MAX_HALVES, Reading
from aioserver.provider_errors import (
    ProviderAuthError,
    ProviderBadResponse,
    ProviderDisconnected,
    ProviderError,
)
from aioserver.providers.reading_sinks import ChatSink
from aioserver.providers.sinks import DONE, BodySink, EventSink, plausible
from aioserver.streams import entries
from aioserver.streams.cursor import CollectingReader
from aioserver.streams.store import StreamStore
from aioserver.streams.stream import Stream
from aioserver.wings.responses.events import ResponseEvents
from aioserver.wings.responses.sinks import ResponseSink

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aioserver.providers.http1 import Sink


def new_stream() -> Stream:
    stream = Stream("r1", "anybody", window=30.0, max_bytes=1 << 22)
    stream.outcome.provider, stream.outcome.model = "sim", "a-model"
    stream.append_processing()
    return stream


def delta(text: str | None = None, finish: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "delta": {} if text is None else {"content": text}}
    answer = {"id": "c1", "choices": [{**choice, "finish_reason": finish}], **more}
    return b"data: %b\n\n" % orjson.dumps(answer)


@pytest.mark.parametrize("seed", range(4))
def test_many_events_at_once_are_plausible_where_each_is(seed: int) -> None:
    dice = random.Random(seed)
    pieces = [b"data: {", b"}", b"\n", b"\n\n", DONE, ERROR, b"event: x\n", b"\r\n", b": c\n\n"]
    pieces += [b"\xc3", b"\xc3\xa9", b" ", b"a", b"}\n\n", b"data:"]
    for _ in range(3000):
        block = b"".join(dice.choices(pieces, k=dice.randint(1, 7))) + b"\n\n"

        assert plausible(block) == all(map(plausible, eventstream.split(block)))


@pytest.mark.parametrize("seed", range(4))
def test_events_that_come_together_pass_as_those_that_come_one_by_one(seed: int) -> None:
    dice = random.Random(seed)
    for number in range(300):
        usage = {"prompt_tokens": 3, "completion_tokens": number}
        counted = [b"data: %b\n\n" % orjson.dumps({"choices": [], "usage": usage, "at": 1})]
        counted += [b'data: {"choices": [], "usage": {"prompt_tokens": %d}}\n\n' % number]
        pieces = [delta("a"), delta("\u00e9"), delta("c", usage=None), delta("[DONE]"), *counted]
        pieces += [delta('"choices":[]'), b'data: {"choices":[],"filtered":true}\n\n', b": c\n\n"]
        events = [delta("first"), *dice.choices(pieces, k=dice.randint(0, 8))]
        events += [dice.choice((delta(finish="stop"), delta(finish="stop", usage=usage)))]
        events += dice.choices(counted, k=dice.randint(0, 2))
        events += [DONE] * (dice.random() < 0.7) + [delta("behind")] * (dice.random() < 0.2)
        one, each = new_stream(), new_stream()
        together, apart = EventSink(one, hides_usage=True), EventSink(each, hides_usage=True)

        assert together.feed(b"".join(events)) == all(map(apart.feed, events)) == (not one.ended)

        assert (passed(one), one.last, one.ended) == (passed(each), each.last, each.ended)
        assert not one.ended or one.outcome.usage == each.outcome.usage


@pytest.mark.parametrize("seed", range(4))
async def test_frames_of_events_that_come_together_are_those_of_single_events(seed: int) -> None:
    dice = random.Random(seed)
    texts = [delta("a"), delta("\u00e9"), delta("c"), delta("d ")] * 4
    others = [delta('"'), delta("\n"), delta("b", usage=None), delta("b", x={}), b": c\n\n"]
    others += [
        delta(reasoning="r"),
        delta(),
        delta("a").replace(b'"a"', b'"\xc3"'),
        b"\n",
        DONE,
        ERROR,
    ]
    others += [delta("a").replace(b'"a"', rb'"\ud83d"'), b"data: {\n\n", delta(finish="stop")]
    for _ in range(300):
        events = [delta("first"), *dice.choices(texts + others, k=dice.randint(0, 12))]
        streams, readings, ends = [new_stream(), new_stream()], [Reading(), Reading()], []
        for stream, reading, reads in zip(
            streams, readings, ([b"".join(events)], events), strict=True
        ):
            sink, reader = ChatSink(stream, reading), CollectingReader(stream)
            ends.append("")
            try:
                goes_on = all(map(sink.feed, reads))
            except (ProviderError, ProviderBadResponse) as fault:
                ends[-1] = str(fault)
            else:
                assert goes_on != stream.ended
            # Each reader was notified of everything.
            last = reader.entries[-1]
            assert last.first + last.count - 1 == stream.last
            reader.leave()

        assert ends[0] == ends[1]
        assert shown(streams[0]) == shown(streams[1])
        one, each = readings
        assert (one.text, one.texts, one.half) == (each.text, each.texts, each.half)
        assert (one.only_text, one.finish_reason) == (each.only_text, each.finish_reason)


ERROR = b'data: {"error":{"message":"the model has crashed","code":500}}\n\n'
ANSWER = delta("Hel") + delta("lo") + delta(finish="stop")


def play(sink: Sink, data: bytes, cuts: Iterable[int], *, end: bool) -> bool:
    """Feed *data*; whether the sink said that it has all it wants."""
    places = [0, *cuts, len(data)]
    for a, b in pairwise(places):
        if a < b and not sink.feed(data[a:b]):
            return True
    if end:
        sink.end()
    return False


def passed(stream: Stream) -> bytes:
    """The bytes that the OpenAI face sends."""
    return b"".join(entry.data for entry in stream.entries)


def shown(stream: Stream) -> list[tuple[str, Any]]:
    """The frames of WebSocket and SSE, without the processing event."""
    frames = [orjson.loads(part) for entry in stream.entries for part in stream.frames(entry)]
    assert [frame["event_id"] for frame in frames] == list(range(1, stream.last + 1))
    return [(frame["status"], frame["chunk"]) for frame in frames[1:]]


def every_cut(data: bytes) -> list[tuple[int, ...]]:
    dice = random.Random(5)
    some = [tuple(sorted(dice.sample(range(1, len(data)), 7))) for _ in range(30)]
    return [(), tuple(range(1, len(data))), *((at,) for at in range(1, len(data))), *some]


FRAMINGS: dict[str, bytes] = {
    "LF": ANSWER + DONE,
    "CRLF": (ANSWER + DONE).replace(b"\n", b"\r\n"),
    "CR": (ANSWER + DONE).replace(b"\n", b"\r"),
    "a byte order mark": eventstream.BOM + ANSWER + DONE,
    "no blank behind the colon": (ANSWER + DONE).replace(b"data: ", b"data:"),
    "comments": b": OPENROUTER PROCESSING\n\n" + ANSWER + b": x\n\n" + DONE,
    "other fields": (ANSWER + DONE).replace(b"data: ", b"id: 7\nevent: message\ndata: "),
    "no [DONE]": ANSWER,
    "[DONE] without its blank line": ANSWER + b"data: [DONE]\n",
    "split characters": delta("Grüße 😀 ") + ANSWER + DONE,
}


@pytest.mark.parametrize("name", FRAMINGS)
def test_every_framing_and_every_cut_gives_the_same_text(name: str) -> None:
    data = FRAMINGS[name]
    text = ("Grüße 😀 " if name == "split characters" else "") + "Hello"
    for cut in every_cut(data):
        reading, stream = Reading(), new_stream()
        ended = play(ChatSink(stream, reading), data, cut, end=True)

        *chunks, (status, end) = shown(stream)
        assert "".join(chunk["data"] for _, chunk in chunks) == text
        assert (status, end["metadata"]["finish_reason"]) == ("complete", "stop")
        assert ended == (name not in {"no [DONE]", "[DONE] without its blank line"})
        assert reading.text == text


@pytest.mark.parametrize("name", FRAMINGS)
def test_every_framing_and_every_cut_passes_the_same_bytes(name: str) -> None:
    data = FRAMINGS[name]
    expected = eventstream.parse(data.removeprefix(eventstream.BOM) + b"\n\n")
    if name == "no [DONE]":
        expected += eventstream.parse(DONE)
    for cut in every_cut(data):
        stream = new_stream()
        play(EventSink(stream), data, cut, end=True)

        assert eventstream.parse(passed(stream)) == expected
        assert (stream.end_status, stream.answered) == (entries.COMPLETE, True)
        assert passed(stream).endswith(DONE)
        assert passed(stream).count(b"[DONE]") == 1
        if name == "LF":
            assert passed(stream) == data, "byte for byte"


@pytest.mark.parametrize("frames", [True, False], ids=["frames", "bytes"])
def test_an_end_without_a_finish_reason_is_no_end(frames: bool) -> None:
    data = delta("Hel") + delta("lo")
    for cut in every_cut(data):
        stream = new_stream()
        sink: Sink = ChatSink(stream, Reading()) if frames else EventSink(stream)
        with pytest.raises(ProviderDisconnected):
            play(sink, data, cut, end=True)

        assert not stream.ended
        assert b"[DONE]" not in passed(stream)


@pytest.mark.parametrize("frames", [True, False], ids=["frames", "bytes"])
def test_a_stream_without_a_byte_is_a_bad_response(frames: bool) -> None:
    stream = new_stream()
    sink: Sink = ChatSink(stream, Reading()) if frames else EventSink(stream)
    with pytest.raises(ProviderBadResponse):
        sink.end()


@pytest.mark.parametrize("frames", [True, False], ids=["frames", "bytes"])
def test_half_an_event_is_never_passed_on(frames: bool) -> None:
    whole, half = delta("Hel"), delta("lo")[:-20]
    stream = new_stream()
    sink: Sink = ChatSink(stream, Reading()) if frames else EventSink(stream)

    play(sink, whole + half, range(1, len(whole + half)), end=False)

    assert not stream.ended
    if frames:
        assert [chunk["data"] for _, chunk in shown(stream)] == ["Hel"]
    else:
        assert passed(stream) == whole


@pytest.mark.parametrize("frames", [True, False], ids=["frames", "bytes"])
def test_nothing_behind_done_is_passed_on(frames: bool) -> None:
    data = ANSWER + DONE + delta("more") + ERROR
    for cut in every_cut(data):
        stream = new_stream()
        sink: Sink = ChatSink(stream, Reading()) if frames else EventSink(stream)
        assert play(sink, data, cut, end=True)

        assert stream.end_status == entries.COMPLETE
        if frames:
            assert "".join(chunk["data"] for _, chunk in shown(stream)[:-1]) == "Hello"
        else:
            assert passed(stream) == ANSWER + DONE


@pytest.mark.parametrize("behind", [b"", DONE, delta("more", "stop") + DONE])
def test_an_error_event_is_the_end_and_nothing_follows_it(behind: bytes) -> None:
    data = delta("Hel") + ERROR + behind
    for cut in every_cut(data):
        stream = new_stream()
        assert play(EventSink(stream), data, cut, end=True)

        assert passed(stream) == delta("Hel") + ERROR, cut
        assert (stream.end_status, stream.answered) == (entries.ERROR, True)
        assert isinstance(stream.error, ProviderError)
        assert shown(stream)[-1][1]["code"] == "provider_error"


@pytest.mark.parametrize("frames", [True, False], ids=["frames", "bytes"])
def test_an_error_about_our_key_is_not_passed_on_in_the_middle_either(frames: bool) -> None:
    error = b'data: {"error":{"message":"Insufficient credits of sk-1","code":402}}\n\n'
    stream = new_stream()
    sink: Sink = ChatSink(stream, Reading()) if frames else EventSink(stream)

    with pytest.raises(ProviderAuthError) as raised:
        play(sink, delta("Hel") + error + DONE, (), end=True)

    assert b"credits" not in passed(stream)
    assert "credits" not in raised.value.message
    assert not stream.ended


def test_an_error_event_is_the_end_for_frames_too() -> None:
    data = delta("Hel") + ERROR + DONE
    for cut in every_cut(data):
        stream = new_stream()
        with pytest.raises(ProviderError, match="the model has crashed"):
            play(ChatSink(stream, Reading()), data, cut, end=True)

        assert [chunk["data"] for _, chunk in shown(stream)] == ["Hel"]
        assert stream.answered


@pytest.mark.parametrize("frames", [True, False], ids=["frames", "bytes"])
@pytest.mark.parametrize("before", [b"", b": OPENROUTER PROCESSING\n\n"], ids=["", "a comment"])
def test_an_error_as_the_first_event_is_no_answer(frames: bool, before: bytes) -> None:
    # So that it still can have its HTTP status, and another try.
    data = before + ERROR + DONE
    for cut in every_cut(data):
        stream = new_stream()
        sink: Sink = ChatSink(stream, Reading()) if frames else EventSink(stream)
        with pytest.raises(ProviderError, match="the model has crashed"):
            play(sink, data, cut, end=True)

        assert (stream.ended, stream.answered) == (False, False)
        assert b"error" not in passed(stream)


def test_an_error_of_null_and_a_text_about_errors_are_no_errors() -> None:
    data = delta('"error": {"x": 1}', error=None) + delta(finish="stop", error={}) + DONE
    for cut in every_cut(data):
        stream = new_stream()
        assert play(EventSink(stream), data, cut, end=True)

        assert passed(stream) == data
        assert stream.end_status == entries.COMPLETE


def test_a_text_that_speaks_of_ends_is_no_end() -> None:
    text = 'data: [DONE]\n\n"finish_reason":"stop" {"type":"response.completed"} [DONE]'
    data = delta(text)
    for cut in every_cut(data):
        for kind in (EventSink, ResponseSink):
            stream = new_stream()
            with pytest.raises(ProviderDisconnected):
                play(kind(stream), data, cut, end=True)
            assert passed(stream) == data

        stream = new_stream()
        with pytest.raises(ProviderDisconnected):
            play(ChatSink(stream, Reading()), data, cut, end=True)
        assert shown(stream)[-1][1]["data"] == text


def response_event(kind: str, **fields: Any) -> bytes:
    body = orjson.dumps({"type": f"response.{kind}", **fields})
    return b"event: response.%b\ndata: %b\n\n" % (kind.encode(), body)


@pytest.mark.parametrize("kind", ["completed", "incomplete", "failed"])
def test_a_response_has_its_own_end(kind: str) -> None:
    failed = {"error": {"message": "x"} if kind == "failed" else None}
    data = (
        response_event("created", response={"error": None})
        + response_event("output_text.delta", delta="Hello")
        + response_event(kind, response=failed)
    )
    for cut in every_cut(data):
        stream = new_stream()
        assert play(ResponseSink(stream), data, cut, end=True)

        assert passed(stream) == data, "and no [DONE]"
        assert stream.end_status == entries.COMPLETE


@pytest.mark.parametrize("kind", ["completed", "incomplete", "failed"])
@pytest.mark.parametrize(
    "behind",
    [
        response_event("output_text.delta", delta="more"),
        response_event("completed"),
        b'data: {"type":"error","message":"late"}\n\n',
        b"data: nonsense\n\n",
    ],
    ids=["a text", "an end", "an error", "no JSON"],
)
def test_nothing_behind_the_end_of_a_response_is_passed_on(kind: str, behind: bytes) -> None:
    data = response_event("created", response={"id": "resp_1"}) + response_event(kind)
    for cut in every_cut(data + behind):
        stream = new_stream()
        assert play(ResponseSink(stream), data + behind, cut, end=True)

        assert passed(stream) == data, cut
        assert stream.end_status == entries.COMPLETE


def test_a_comment_that_looks_like_the_end_of_a_response_is_none() -> None:
    data = b': "type":"response.completed"\n\n' + response_event("created")
    for cut in every_cut(data):
        with pytest.raises(ProviderDisconnected):
            play(ResponseSink(new_stream()), data, cut, end=True)


@pytest.mark.parametrize(
    "before",
    [b": OPENROUTER PROCESSING\n\n", response_event("ping"), b""],
    ids=["a comment", "another event", "nothing"],
)
def test_a_response_is_found_by_its_id_however_it_comes(before: bytes) -> None:
    data = before + response_event("created", response={"id": "resp_1"})
    data += response_event("output_text.delta", delta="Hello")
    for cut in every_cut(data):
        store = StreamStore(max_stream_bytes=1 << 20, max_kept_bytes=1 << 20)
        stream = store.open("r1", "me", window=30.0)
        play(ResponseSink(stream), data, cut, end=False)

        assert store.find("me", "resp_1") is stream, cut


FLAT = (
    b'event: error\ndata: {"type":"error","sequence_number":2,"code":"server_error",'
    b'"message":"the model has crashed"}\n\n'
)
NESTED = (
    b'event: error\ndata: {"type":"error","sequence_number":2,'
    b'"error":{"type":"server_error","message":"the model has crashed"}}\n\n'
)
LATER = response_event("output_text.delta", delta="x", sequence_number=9)


@pytest.mark.parametrize("behind", [b"", DONE, LATER, response_event("completed")])
@pytest.mark.parametrize(
    ("error", "seen"), [(ERROR, b""), (FLAT, FLAT), (NESTED, NESTED)], ids=["", "flat", "nested"]
)
def test_an_error_within_a_response_is_a_failed_response(
    error: bytes, seen: bytes, behind: bytes
) -> None:
    before = response_event("created", sequence_number=0, response={"id": "resp_1", "error": None})
    before += response_event("output_text.delta", sequence_number=1, delta="Hello")
    data = before + error + behind
    for cut in every_cut(data):
        stream = new_stream()
        stream.events = form = ResponseEvents()
        assert play(ResponseSink(stream), data, cut, end=True)

        assert passed(stream).startswith(before + seen + b"event: response.failed\n")
        failed = orjson.loads(eventstream.parse(passed(stream))[-1].data)
        assert failed["sequence_number"] == (3 if seen else 2)
        assert failed["response"]["id"] == "resp_1"
        assert failed["response"]["status"] == "failed"
        assert "the model has crashed" in failed["error"]["message"]
        assert form.response == failed["response"]
        assert form.event_before(failed["sequence_number"] - 1, stream.last) == stream.last - 1
        assert (stream.end_status, stream.answered) == (entries.ERROR, True)
        assert isinstance(stream.error, ProviderError)


def test_a_failed_response_with_our_error_beside_it_passes_as_it_is() -> None:
    # Another aioserver is the provider.
    data = response_event("created", sequence_number=0, response={"error": None}) + LATER
    data += response_event("failed", sequence_number=10, response={}, error={"message": "gone"})
    for cut in every_cut(data):
        stream = new_stream()
        stream.events = ResponseEvents()
        assert play(ResponseSink(stream), data, cut, end=True)

        assert passed(stream) == data
        assert (stream.end_status, stream.answered) == (entries.ERROR, True)
        assert isinstance(stream.error, ProviderError)


@pytest.mark.parametrize("error", [FLAT, NESTED], ids=["flat", "nested"])
def test_an_error_about_our_key_within_a_response_is_not_shown(error: bytes) -> None:
    error = error.replace(b"server_error", b"invalid_api_key")
    stream = new_stream()
    with pytest.raises(ProviderAuthError):
        play(ResponseSink(stream), response_event("created") + LATER + error, (), end=True)

    assert passed(stream) == response_event("created") + LATER
    assert not stream.ended


def test_a_response_without_its_end_is_no_answer() -> None:
    data = response_event("created") + response_event("output_text.delta", delta="x") + DONE
    stream = new_stream()
    with pytest.raises(ProviderDisconnected):
        play(ResponseSink(stream), data, (), end=True)


@pytest.mark.parametrize(
    "event",
    [
        b'data: {"id":"chatcmpl-\n\n',
        b'data: {"choices":[{"index":0,"delta":{"content":"\xc3\x28\xff"}}]}\n\n',
        b"data: 7\n\n",
        b"data: hello\n\n",
    ],
    ids=["broken JSON", "broken UTF-8", "a number", "a word"],
)
def test_an_event_that_is_no_object_ends_an_answer_in_frames(event: bytes) -> None:
    data = delta("Hel") + event + delta("lo") + DONE
    for cut in every_cut(data):
        stream = new_stream()
        with pytest.raises(ProviderBadResponse):
            play(ChatSink(stream, Reading()), data, cut, end=True)

        assert [chunk["data"] for _, chunk in shown(stream)] == ["Hel"]


@pytest.mark.parametrize(
    "event",
    [
        b'data: {"id":"chatcmpl-\n\n',
        b'data: {"choices":[{"index":0,"delta":{"content":"\xc3\x28\xff"}}]}\n\n',
        b"data: 7\n\n",
        b"data: hello\n\n",
        b"id: 1\ndata: hello\n\n",
        b'data: {"choices":[{"index":0,"delta":{"content":"a\rb"}}]}\n\n',
    ],
    ids=["broken JSON", "broken UTF-8", "a number", "a word", "two fields", "a CR in a text"],
)
@pytest.mark.parametrize("kind", [EventSink, ResponseSink])
def test_an_event_that_is_no_object_ends_an_answer_in_bytes(
    event: bytes, kind: type[EventSink | ResponseSink]
) -> None:
    data = delta("Hel") + event + delta("lo") + DONE
    for cut in every_cut(data):
        stream = new_stream()
        with pytest.raises(ProviderBadResponse, match="not JSON"):
            play(kind(stream), data, cut, end=True)

        assert passed(stream) == delta("Hel")
        assert stream.last == 2


@pytest.mark.parametrize(
    "event",
    [
        b"data:\n\n",
        b"data: \n\n",
        b": caf\xe9\n\n",
        b"event: ping\n\n",
        b'data:  {"choices":[]} \n\n',
        b'event: x\ndata: {"choices":\ndata: []}\n\n',
        'data: {"choices":[{"index":0,"delta":{"content":""}}],"größe":"ß"}\n\n'.encode(),
    ],
)
def test_comments_and_unusual_events_end_nothing(event: bytes) -> None:
    data = delta("Hel") + event + delta("lo", "stop") + DONE
    frames, raw = new_stream(), new_stream()

    assert play(ChatSink(frames, Reading()), data, (), end=True)
    assert play(EventSink(raw), data, (), end=True)

    assert [chunk["data"] for _, chunk in shown(frames)[:-1]] == ["Hel", "lo"]
    assert passed(raw) == data


@pytest.mark.parametrize("frames", [True, False], ids=["frames", "bytes"])
@pytest.mark.parametrize("size", [1000, 65536, 1 << 22])
def test_an_endless_line_is_cut_at_its_bound(frames: bool, size: int) -> None:
    stream = new_stream()
    sink: Sink = ChatSink(stream, Reading()) if frames else EventSink(stream)
    assert sink.feed(delta("Hel"))
    for _ in range(stream.max_bytes // size):
        assert sink.feed(b"x" * size)

    with pytest.raises(ProviderBadResponse):
        sink.feed(b"x" * size)

    assert stream.last == 2


def events(*deltas: str, finish: bool = True) -> bytes:
    """Events whose delta is JSON as it stands: escapes of surrogates, too."""
    choices = [f'{{"index":0,"delta":{part}}}' for part in deltas]
    if finish:
        choices.append('{"index":0,"delta":{},"finish_reason":"stop"}')
    return b"".join(f'data: {{"choices":[{choice}]}}\n\n'.encode() for choice in choices) + DONE


@pytest.mark.parametrize("key", ["content", "reasoning", "reasoning_content"])
@pytest.mark.parametrize(
    ("texts", "shown_texts"),
    [
        # The halves of one character, cut over two events, and with text around them.
        ((r"\ud83d", r"\ude00"), ["😀"]),
        ((r"a\uD83D", r"\uDE00b"), ["a", "😀b"]),
        ((r"a\ud83d", "", r"\ude00"), ["a", "😀"]),
        # A half without its other half.
        ((r"a\ud83d", "b"), ["a", "\ufffdb"]),
        ((r"\ude00b",), ["\ufffdb"]),
        ((r"a\ud83d",), ["a", "\ufffd"]),
        ((r"\ud83d\ud83d", r"\ude00"), ["\ufffd", "😀"]),
        # A whole pair stays one.
        ((r"\ud83d\ude00",), ["😀"]),
    ],
)
def test_halves_of_a_character_are_joined_or_replaced(
    texts: tuple[str, ...], shown_texts: list[str], key: str
) -> None:
    data = events(*(f'{{"{key}":"{text}"}}' for text in texts))
    for cut in every_cut(data):
        stream = new_stream()

        assert play(ChatSink(stream, Reading()), data, cut, end=True)

        chunks = [chunk for status, chunk in shown(stream) if status == "chunk"]
        assert [chunk["data"] for chunk in chunks] == shown_texts
        assert stream.end_status == entries.COMPLETE


def tool_call(text: str, index: int = 0, *, custom: bool = False) -> str:
    """A delta with one piece of a tool call."""
    field = f'"custom":{{"input":"{text}"}}' if custom else f'"function":{{"arguments":"{text}"}}'
    return f'{{"tool_calls":[{{"index":{index},{field}}}]}}'


def arguments_of(stream: Stream) -> dict[int, str]:
    """The texts of the tool calls that the frames show, by their index."""
    texts: dict[int, str] = {}
    for _, chunk in shown(stream)[:-1]:
        for call in chunk["data"] if chunk["type"] == "tool_calls" else ():
            text = call["function"]["arguments"] if "function" in call else call["custom"]["input"]
            texts[call["index"]] = texts.get(call["index"], "") + text
    return texts


@pytest.mark.parametrize("custom", [False, True], ids=["function", "custom"])
@pytest.mark.parametrize(
    ("texts", "joined"),
    [
        ([(0, r"a\ud83d"), (0, r"\ude00b")], {0: "a😀b"}),
        # The pieces of two calls, and their halves, may come by turns.
        ([(0, r"\ud83d"), (1, r"\ud83c"), (0, r"\ude00"), (1, r"\udf89")], {0: "😀", 1: "🎉"}),
        ([(0, r"a\ud83d"), (1, "b"), (0, "c")], {0: "a\ufffdc", 1: "b"}),
        ([(0, r"a\ud83d"), (1, r"\ude00")], {0: "a\ufffd", 1: "\ufffd"}),
        ([(3, r"\ud83d"), (3, ""), (3, r"\ud83d\ude00")], {3: "\ufffd😀"}),
        ([(0, r"\ud83d\ude00")], {0: "😀"}),
    ],
)
def test_halves_of_a_character_in_a_tool_call_are_joined_or_replaced(
    texts: list[tuple[int, str]], joined: dict[int, str], custom: bool
) -> None:
    data = events(*(tool_call(text, index, custom=custom) for index, text in texts))
    for cut in every_cut(data):
        stream = new_stream()

        assert play(ChatSink(stream, Reading()), data, cut, end=True)

        assert arguments_of(stream) == joined
        assert stream.end_status == entries.COMPLETE


def test_half_a_character_in_a_tool_call_is_no_half_of_a_text() -> None:
    data = events(
        tool_call(r"\ud83d"),
        r'{"content":"\ud83c"}',
        tool_call(r"\ude00"),
        r'{"content":"\udf89"}',
    )
    stream = new_stream()

    assert play(ChatSink(stream, Reading()), data, (), end=True)

    assert arguments_of(stream) == {0: "😀"}
    assert "".join(c["data"] for _, c in shown(stream)[:-1] if c["type"] == "text") == "🎉"


def test_halves_in_endless_tool_calls_cost_a_bounded_memory() -> None:
    reading = Reading()
    for index in range(10 * MAX_HALVES):
        delta_json = tool_call(r"\ud83d", index)
        reading.read(b'{"choices":[{"delta":%b}]}' % delta_json.encode())

    assert len(reading.half) == MAX_HALVES


def test_the_calls_of_a_whole_answer_have_no_halves_of_each_other() -> None:
    calls = r'[{"function":{"arguments":"a\ud83d"}},{"function":{"arguments":"\ude00b"}}]'
    answer = f'{{"choices":[{{"message":{{"tool_calls":{calls}}},"finish_reason":"stop"}}]}}'

    (chunk,) = Reading().read(answer.encode())

    texts = [call["function"]["arguments"] for call in orjson.loads(chunk)["data"]]
    assert texts == ["a\ufffd", "\ufffdb"]


def test_half_a_character_keeps_texts_in_their_order() -> None:
    # These events have one shape, so that the fast path would take the last of them.
    stream, reading = new_stream(), Reading()
    sink = ChatSink(stream, reading)
    for text in ("a", "b", r"\ud83d"):
        assert sink.feed(events(f'{{"content":"{text}"}}', finish=False).removesuffix(DONE))

    assert sink.fast() is None

    assert not sink.feed(events(r'{"content":"\ude00c"}'))
    assert "".join(chunk["data"] for _, chunk in shown(stream)[:-1]) == "ab😀c"
    assert reading.text == "ab😀c"


@pytest.mark.parametrize(
    "delta_json",
    [
        r'{"tool_calls":[{"index":0,"function":{"arguments":"\ud83d"}}]}',
        r'{"content":"x","name":"\ude00"}',
    ],
)
def test_a_lone_surrogate_elsewhere_ends_nothing(delta_json: str) -> None:
    stream = new_stream()

    assert play(ChatSink(stream, Reading()), events(delta_json), (), end=True)

    assert stream.end_status == entries.COMPLETE


@pytest.mark.parametrize(
    "data",
    [
        rb'{"choices":[{"delta":{"content":"\ud83d"}]}',
        b'{"a":"\\ud83d' + b"[" * 100_000,
        b'"\xed\xa0\xbd"',
    ],
)
def test_a_surrogate_makes_broken_json_no_better(data: bytes) -> None:
    with pytest.raises(ProviderBadResponse):
        play(ChatSink(new_stream(), Reading()), b"data: %b\n\n" % data, (), end=False)


@pytest.mark.parametrize("frames", [True, False], ids=["frames", "bytes"])
@pytest.mark.parametrize("piece", [1000, 65536, 1 << 22])
def test_an_event_of_megabytes_passes_whole(frames: bool, piece: int) -> None:
    # A streamed picture is one event of 1 to 5 MB; here one of 3.
    stream = new_stream()
    text = "x" * 3_000_000
    sink: Sink = ChatSink(stream, Reading()) if frames else EventSink(stream)
    data = delta(text) + delta("!", "stop") + DONE

    assert play(sink, data, range(piece, len(data), piece), end=True)

    if frames:
        assert [chunk["data"] for _, chunk in shown(stream)[:-1]] == [text, "!"]
    else:
        assert passed(stream) == data
    assert stream.end_status == entries.COMPLETE


def test_half_an_event_costs_little_more_than_its_bytes() -> None:
    splitter = eventstream.Splitter(1 << 22)
    tracemalloc.start()
    try:
        for _ in range(3000):
            assert splitter.feed(b"x" * 1000) == b""
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 2 * 3_000_000


def test_a_body_is_bounded_inclusively() -> None:
    sink = BodySink(10)
    assert sink.feed(b"12345")
    assert sink.feed(b"67890")
    sink.end()
    assert sink.body == b"1234567890"

    with pytest.raises(ProviderBadResponse, match="10 bytes"):
        sink.feed(b"x")


@pytest.mark.parametrize("size", [2, 1000])
def test_a_body_costs_its_bytes_in_however_many_parts_it_comes(size: int) -> None:
    count = 200_000 // size
    sink = BodySink(1 << 20)
    tracemalloc.start()
    try:
        for number in range(count):
            sink.feed(b"%0*d" % (size, number % 100))
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()

    assert sink.body == b"".join(b"%0*d" % (size, number % 100) for number in range(count))
    assert taken < 1.5 * count * size


def test_large_and_small_parts_of_a_body_stay_in_their_order() -> None:
    rng, sink, body = random.Random(7), BodySink(1 << 20), b""
    for number in range(200):
        part = b"%d," % number * rng.choice((1, 2, 400, 2000))
        sink.feed(part)
        body += part

    assert sink.body == body


def test_usage_and_the_finish_reason_are_reported_at_the_end() -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    last = b"data: %b\n\n" % orjson.dumps({"choices": [], "usage": usage})
    stream = new_stream()

    play(ChatSink(stream, Reading()), ANSWER + last + DONE, (), end=True)

    assert shown(stream)[-1] == (
        "complete",
        {
            "metadata": {
                "finish_reason": "stop",
                "usage": usage,
                "provider": "sim",
                "model": "a-model",
            }
        },
    )


def test_the_bytes_of_a_body_count_from_the_first_to_the_release_and_each_attempt_anew() -> None:
    store = StreamStore(max_stream_bytes=100, max_kept_bytes=100)
    with store.hold() as held:
        first = BodySink(1000, held)
        first.feed(b"x" * 60)
        assert store.stats().bytes == 60

        second = BodySink(1000, held)
        second.feed(b"y" * 30)
        assert store.stats().bytes == 30
        with pytest.raises(ServerAtCapacity):
            second.feed(b"y" * 80)
        assert store.stats().bytes == 30

    assert store.stats().bytes == 0
    second.feed(b"late")
    assert store.stats().bytes == 0


def test_what_a_running_answer_keeps_beside_its_events_is_counted_as_it_grows() -> None:
    text = orjson.dumps({"choices": [{"index": 0, "delta": {"content": "x" * 1000}}]})
    stream = new_stream()
    chat = ChatSink(stream, Reading(max_text_bytes=1 << 20))
    before = stream.extra_bytes
    for _ in range(100):
        chat.feed(b"data: %b\n\n" % text)
    assert stream.extra_bytes - before >= 90_000

    stream = new_stream()
    stream.events = ResponseEvents()
    response = ResponseSink(stream)
    before = stream.extra_bytes
    response.feed(b'data: {"type":"x","response":{"id":"r1","text":"%b"}}\n\n' % (b"x" * 20_000))
    assert stream.extra_bytes - before >= 20_000
