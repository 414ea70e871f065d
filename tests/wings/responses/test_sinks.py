"""The sink of a chat completion that becomes a response: whatever way its bytes are cut."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from aioserver.config.settings import Provider
from aioserver.protocol import eventstream
from aioserver.protocol.steps import at_once
from aioserver.provider_errors import (
    ProviderAuthError,
    ProviderBadResponse,
    ProviderDisconnected,
    ProviderError,
)
from aioserver.streams import entries
from aioserver.streams.stream import Stream
from aioserver.wings.responses.attempt import ResponsesCapabilities
from aioserver.wings.responses.bridge.events import ResponseWriter
from aioserver.wings.responses.bridge.output import Frame
from aioserver.wings.responses.bridge.request import chat_request
from aioserver.wings.responses.events import ResponseEvents
from aioserver.wings.responses.sinks import BridgeSink
from tests.support.response_events import check_run, read_events
from tests.support.scripted_provider import LIMITS

if TYPE_CHECKING:
    from collections.abc import Iterable

DONE = b"data: [DONE]\n\n"


def new_stream(max_bytes: int = 1 << 22) -> Stream:
    stream = Stream("r1", "anybody", window=30.0, max_bytes=max_bytes)
    stream.outcome.provider, stream.outcome.model = "sim", "a-model"
    stream.append_processing()
    stream.events = ResponseEvents()
    return stream


def new_sink(stream: Stream) -> BridgeSink:
    request = at_once(chat_request(b'{"model":"m","input":"Hello","stream":true}'))
    frame = Frame("resp_1", 1_764_000_000, "m", request.repeated)
    return BridgeSink(stream, ResponseWriter(request, frame, stream.max_bytes))


def delta(finish: str | None = None, **fields: Any) -> bytes:
    choice = {"index": 0, "delta": fields, "finish_reason": finish}
    return b"data: %b\n\n" % orjson.dumps({"id": "c1", "model": "m", "choices": [choice]})


def arguments(text: str, **more: Any) -> bytes:
    return delta(tool_calls=[{"index": 0, "function": {"arguments": text}, **more}])


NAMED = [{"index": 0, "id": "c", "function": {"name": "f", "arguments": ""}}]
ANSWER = b"".join(
    (
        delta(role="assistant", content=""),
        delta(reasoning_content="Hm"),
        *(delta(content=text) for text in ("Gr", "üße", ' "', "\\", " 😀 ", "a b", "!")),
        delta(tool_calls=NAMED),
        arguments('{"a"'),
        arguments(":1}"),
        delta("tool_calls"),
    )
)
TEXT = 'Grüße "\\ 😀 a b!'


def play(sink: BridgeSink, data: bytes, cuts: Iterable[int], *, end: bool) -> bool:
    """Feed *data*; whether the sink said that it has all it wants."""
    for start, stop in pairwise([0, *cuts, len(data)]):
        if start < stop and not sink.feed(data[start:stop]):
            return True
    if end:
        sink.end()
    return False


def passed(stream: Stream) -> bytes:
    return b"".join(entry.data for entry in stream.entries)


def some_cuts(data: bytes) -> list[tuple[int, ...]]:
    dice = random.Random(5)
    events = [place + 2 for place in range(len(data)) if data.startswith(b"\n\n", place)]
    several = [tuple(sorted(dice.sample(range(1, len(data)), 7))) for _ in range(20)]
    return [(), tuple(range(1, len(data))), tuple(events[:-1]), *several]


FRAMINGS = {
    "LF": ANSWER + DONE,
    "CRLF": (ANSWER + DONE).replace(b"\n", b"\r\n"),
    "a byte order mark": eventstream.BOM + ANSWER + DONE,
    "comments": b": OPENROUTER PROCESSING\n\n" + ANSWER + b": x\n\n" + DONE,
    "no [DONE]": ANSWER,
    "an event behind the end": ANSWER + DONE + delta(content="no"),
}


@pytest.mark.parametrize("name", FRAMINGS)
def test_every_framing_and_every_cut_gives_the_same_events(name: str) -> None:
    data = FRAMINGS[name]
    expected = b""
    for cut in some_cuts(data):
        stream = new_stream()
        ended = play(new_sink(stream), data, cut, end=True)

        events = read_events(passed(stream))
        response = check_run(events)
        thought, message, call = response["output"]
        assert thought["content"][0]["text"] == "Hm"
        assert message["content"][0]["text"] == TEXT
        assert call["arguments"] == '{"a":1}'
        assert (stream.end_status, stream.answered) == (entries.COMPLETE, True)
        assert ended == (name != "no [DONE]")
        # The log has the processing event, those of the response, and its own end.
        assert stream.last == len(events) + 2
        # The last event has the time.
        before_end = passed(stream).partition(b"event: response.completed")[0]
        assert before_end == (expected or before_end)
        expected = before_end
        form = stream.events
        assert isinstance(form, ResponseEvents)
        assert form.last_sequence == events[-1]["sequence_number"]
        assert [form.event_before(n, stream.last) for n in range(len(events) - 1)] == list(
            range(2, len(events) + 1)
        )
        assert stream.text_bytes == 0


@pytest.mark.parametrize(
    ("tail", "fault"),
    [
        (b"", ProviderDisconnected),
        (b'data: {"error":{"message":"the model has crashed","code":500}}\n\n', ProviderError),
        (b'data: {"error":{"message":"no","code":401}}\n\n', ProviderAuthError),
        (b"data: {no json}\n\n", ProviderBadResponse),
        (b"data: \xff\n\n", ProviderBadResponse),
    ],
)
def test_a_fault_in_the_middle_leaves_whole_events(tail: bytes, fault: type[Exception]) -> None:
    data = delta(content="Hel") + delta(content="lo") + tail
    for cut in some_cuts(data):
        stream = new_stream()
        with pytest.raises(fault):
            play(new_sink(stream), data, cut, end=True)

        events = read_events(passed(stream))
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        assert events[-1].get("delta") == "lo"
        assert stream.answered
        assert not stream.ended


@pytest.mark.parametrize("error", [b'{"error":{"message":"no","code":502}}', b"{}}", b"[]"])
def test_a_fault_in_the_first_event_is_no_answer(error: bytes) -> None:
    stream = new_stream()

    with pytest.raises((ProviderError, ProviderBadResponse)):
        new_sink(stream).feed(b"data: %b\n\n" % error)

    assert (stream.answered, passed(stream)) == (False, b"")


def test_an_answer_beyond_the_bound_of_its_log_is_a_fault() -> None:
    stream = new_stream(max_bytes=50_000)
    sink = new_sink(stream)
    chunk = delta(content="x" * 1000)
    for _ in range(40):
        sink.feed(chunk)

    assert stream.text_bytes > 30_000
    with pytest.raises(ProviderBadResponse, match="more than 50000 bytes"):
        [sink.feed(chunk) for _ in range(20)]


@pytest.mark.parametrize(
    ("status", "body", "absent"),
    [
        (404, b'{"detail":"Not Found"}', True),
        (404, b"404 page not found", True),
        (404, b'{"error":{"code":404,"message":"File Not Found","type":"not_found_error"}}', True),
        (404, b'{"error":{"message":"Invalid URL (POST /v1/responses)","param":null}}', True),
        (404, b'{"error":"no such route"}', True),
        (404, b"null", True),
        (405, b'{"detail":"Method Not Allowed"}', True),
        (501, b"", True),
        (404, b'{"error":{"message":"The model `x` does not exist","code":404}}', False),
        (404, b'{"error":{"message":"no","code":"model_not_found"}}', False),
        (404, b'{"error":{"message":"no","param":"model"}}', False),
        (404, b'{"error":{"message":"Response with id resp_1 not found"}}', False),
    ],
)
def test_a_path_that_is_not_there_is_told_from_a_model(
    status: int, body: bytes, absent: bool
) -> None:
    learned = ResponsesCapabilities(
        Provider(name="sim", base_url="http://h/v1", model="m", http_client=LIMITS)
    )

    assert learned.absent(status, body) == absent
