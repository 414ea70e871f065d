"""The chunks of engines that exist (tests/support/engine_streams.py), over both bridges and passed on
as they are, wherever reads end, and whatever of them is held.
"""

from __future__ import annotations

import random
import re
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import orjson
import pytest

from aioserver.protocol.request_headers import CALLS, PREAMBLE, TURN
from aioserver.protocol.steps import at_once
from aioserver.protocol.tokens import tokens_of
from aioserver.provider_errors import ProviderFault
from aioserver.providers import attempt
from aioserver.providers.request import CHAT, ProviderRequest
from aioserver.providers.sinks import EventSink
from aioserver.streams.stream import Stream
from aioserver.wings.anthropic.bridge import request as messages
from aioserver.wings.anthropic.bridge.events import MessageWriter
from aioserver.wings.anthropic.bridge.whole import WholeWriter, whole_message
from aioserver.wings.anthropic.sink import BridgeSink as MessageSink
from aioserver.wings.responses.bridge import request as responses
from aioserver.wings.responses.bridge.events import ResponseWriter
from aioserver.wings.responses.bridge.output import Frame
from aioserver.wings.responses.sinks import BridgeSink as ResponseSink
from tests.support import message_events, response_events
from tests.support.engine_streams import STREAMS, EngineStream
from tests.support.reference_chat import shown_ids

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from aioserver.providers.http1 import Sink
    from aioserver.providers.sinks import StreamSink

NAME = "0123456789abcdef0123456789abcdef"
TOOL = {"type": "object"}
MESSAGE: Any = {
    "model": "m",
    "max_tokens": 100,
    "messages": [{"role": "user", "content": "Hello"}],
    "tools": [{"name": "look_up", "input_schema": TOOL}],
    "thinking": {"type": "adaptive"},
}
RESPONSE: Any = {
    "model": "m",
    "input": "Hello",
    "tools": [{"type": "function", "name": "look_up", "parameters": TOOL}],
}
GOOD = [stream for stream in STREAMS if not stream.fault]
# Runs with random ends of reads, beside one where each byte is a read.
RUNS = 3


def message_request() -> Any:
    return at_once(messages.chat_request(orjson.dumps(MESSAGE)))


def message_sink(stream: Stream) -> StreamSink:
    return MessageSink(stream, MessageWriter(message_request(), NAME, 1 << 20))


def response_sink(stream: Stream) -> StreamSink:
    asked = at_once(responses.chat_request(orjson.dumps(RESPONSE)))
    return ResponseSink(
        stream, ResponseWriter(asked, Frame("resp_1", 1, "m", asked.repeated), 1 << 20)
    )


def passing_sink(stream: Stream) -> StreamSink:
    return EventSink(stream, hides_usage=True)


class Told:
    """The provider of an attempt that is played: it learns that the answer has begun."""

    def answered(self, _attempt: attempt.Attempt) -> None:
        """Learn it."""


class PlayedAttempt(attempt.Attempt):
    """An attempt whose answer is read by a sink that *make* makes."""

    make: Callable[[Stream], StreamSink] = passing_sink

    def stream_sink(self, stream: Stream) -> StreamSink:
        return self.make(stream)


def holding(make: Callable[[Stream], StreamSink], word: str) -> Callable[[Stream], Sink]:
    """A sink that *make* makes, in front of which *word* is held."""

    def make_sink(stream: Stream) -> Sink:
        request = ProviderRequest(CHAT, lambda _provider, _model: b"{}", streamed=True)
        request.hold = word
        played = PlayedAttempt(cast("Any", Told()), request, stream, make=make)
        return played.event_sink(stream)

    return make_sink


def shown(stream: Stream) -> list[tuple[int, bytes]]:
    """The entries of a log."""
    return [(entry.count, TIME.sub(b"", entry.data)) for entry in stream.entries]


# What a bridge takes from the clock.
TIME = re.compile(rb'"completed_at":[0-9]+')
SINKS = [message_sink, response_sink, passing_sink]


def played(
    make: Callable[[Stream], Sink], data: bytes, cuts: Iterable[int] = ()
) -> tuple[Stream, bytes, ProviderFault | None]:
    """The log of an answer of *data*, read in pieces, its bytes, and the fault of its end."""
    stream = Stream("r", "anybody", window=30.0, max_bytes=1 << 22)
    stream.outcome.provider, stream.outcome.model = "p", "m"
    sink, fault = make(stream), None
    try:
        for start, end in pairwise((0, *cuts, len(data))):
            if start < end and not sink.feed(data[start:end]):
                break
        else:
            sink.end()
    except ProviderFault as exc:
        fault = exc
    return stream, b"".join(entry.data for entry in stream.entries), fault


def all_cuts(engine: EngineStream) -> Iterable[Iterable[int]]:
    """Where reads end: nowhere, behind each byte, and at random."""
    size = len(engine.data)
    yield ()
    yield range(1, size)
    for seed in range(RUNS):
        yield sorted(random.Random(seed).choices(range(1, size), k=3))


def named(engine: EngineStream) -> str:
    return engine.engine


def content_of(engine: EngineStream) -> list[dict[str, Any]]:
    """The content of the message that *engine* means."""
    content: list[dict[str, Any]] = []
    if engine.thought:
        thought = {"thinking": engine.thought, "signature": "aioserver.unsigned"}
        content.append({"type": "thinking", **thought})
    if engine.text:
        content.append({"type": "text", "text": engine.text})
    ids = shown_ids([own for own, _ in engine.calls], NAME)
    for shown, (_, arguments) in zip(ids, engine.calls, strict=True):
        call = {"id": shown, "name": "look_up", "input": orjson.loads(arguments)}
        content.append({"type": "tool_use", **call})
    return content


@pytest.mark.parametrize("engine", STREAMS, ids=named)
def test_an_answer_of_an_engine_is_a_message(engine: EngineStream) -> None:
    for cuts in all_cuts(engine):
        stream, body, fault = played(message_sink, engine.data, cuts)
        events = message_events.read_events(body)
        if engine.fault:
            assert fault is not None
            made = message_events.put_together(events)
            assert made["content"] == content_of(engine)
            assert made["stop_reason"] is None
            continue
        assert fault is None
        message = message_events.check_run(events)
        assert message["content"] == content_of(engine)
        cut_by = "stop_sequence" if message["stop_sequence"] else "end_turn"
        assert message["stop_reason"] == ("tool_use" if engine.calls else cut_by)
        check_usage(engine, stream)
        if engine.usage is not None:
            prompt, cached, answer = engine.usage
            usage = message["usage"]
            assert usage["input_tokens"] == prompt - cached
            assert usage["cache_read_input_tokens"] == cached
            assert usage["output_tokens"] == answer


@pytest.mark.parametrize("engine", STREAMS, ids=named)
def test_an_answer_of_an_engine_is_a_response(engine: EngineStream) -> None:
    for cuts in all_cuts(engine):
        stream, body, fault = played(response_sink, engine.data, cuts)
        if engine.fault:
            assert fault is not None
            assert b"response.completed" not in body
            continue
        assert fault is None
        output = response_events.check_run(response_events.read_events(body))["output"]
        texts = {
            item["type"]: "".join(part["text"] for part in item["content"])
            for item in output
            if item["type"] in {"message", "reasoning"}
        }
        assert texts.get("reasoning", "") == engine.thought
        assert texts.get("message", "") == engine.text
        calls = [item for item in output if item["type"] == "function_call"]
        assert tuple((each["call_id"], each["arguments"]) for each in calls) == engine.calls
        check_usage(engine, stream)


@pytest.mark.parametrize("engine", GOOD, ids=named)
def test_an_answer_of_an_engine_passes_without_a_usage_that_nobody_has_asked_for(
    engine: EngineStream,
) -> None:
    shown = b"".join(
        engine.written(event)
        for event in engine.events
        if isinstance(event, str) or event["choices"] or not event.get("usage")
    )
    for cuts in all_cuts(engine):
        stream, body, fault = played(passing_sink, engine.data, cuts)

        assert fault is None
        # The end mark is written here.
        assert body == shown.replace(b"[DONE]\r\n\r\n", b"[DONE]\n\n")
        check_usage(engine, stream)


def check_preamble(engine: EngineStream) -> None:
    for make in SINKS:
        for cuts in all_cuts(engine):
            stream, _, fault = played(make, engine.data, cuts)
            other, _, other_fault = played(holding(make, PREAMBLE), engine.data, cuts)

            assert shown(other) == shown(stream)
            assert repr(other_fault) == repr(fault)


@pytest.mark.parametrize("engine", STREAMS, ids=named)
async def test_with_preamble_the_log_is_that_of_an_answer_of_which_nothing_can_be_held(
    engine: EngineStream,
) -> None:
    check_preamble(engine)


async def test_a_server_that_holds_calls_with_preamble_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attempt, "PREAMBLE", "")

    for engine in (each for each in GOOD if len(each.calls) == 2):
        with pytest.raises(AssertionError):
            check_preamble(engine)


@pytest.mark.parametrize("word", [CALLS, TURN])
@pytest.mark.parametrize("engine", GOOD, ids=named)
async def test_what_was_held_has_the_same_events_as_what_was_not(
    engine: EngineStream, word: str
) -> None:
    for make in SINKS:
        for cuts in all_cuts(engine):
            stream, body, fault = played(make, engine.data, cuts)
            held, held_body, held_fault = played(holding(make, word), engine.data, cuts)

            assert fault is held_fault is None
            assert TIME.sub(b"", held_body) == TIME.sub(b"", body)
            assert held.last == stream.last


@pytest.mark.parametrize("engine", GOOD, ids=named)
def test_a_whole_answer_of_an_engine_is_the_same_message(engine: EngineStream) -> None:
    calls = [
        {"id": own, "type": "function", "function": {"name": "look_up", "arguments": arguments}}
        for own, arguments in engine.calls
    ]
    answered: dict[str, Any] = {
        "role": "assistant",
        "content": engine.text or None,
        "reasoning_content": engine.thought or None,
        "tool_calls": calls or None,
        # As llama-cpp-python has the first of them once more.
        "function_call": calls[0]["function"] if calls else None,
    }
    choice = {"index": 0, "message": answered, "finish_reason": engine.finish}
    body = orjson.dumps({"model": "m", "choices": [choice]})

    writer = WholeWriter(message_request(), NAME, 1 << 20)
    message = orjson.loads(at_once(whole_message(body, writer)))

    assert message["content"] == content_of(engine)


def check_usage(engine: EngineStream, stream: Stream) -> None:
    tokens = tokens_of(stream.outcome.usage)
    if engine.usage is None:
        assert tokens.prompt is None
        return
    prompt, cached, answer = engine.usage
    assert (tokens.prompt, tokens.cached or 0, tokens.answer) == (prompt, cached, answer)
