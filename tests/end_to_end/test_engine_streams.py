"""The chunks of engines that exist (tests/support/engine_streams.py), over both bridges and passed on
as they are, wherever reads end.
"""

from __future__ import annotations

import random
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from aioserver.protocol.steps import at_once
from aioserver.protocol.tokens import tokens_of
from aioserver.provider_errors import ProviderFault
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
RUNS = 40


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


def played(
    make: Callable[[Stream], StreamSink], data: bytes, cuts: Iterable[int] = ()
) -> tuple[Stream, bytes, ProviderFault | None]:
    """The log of an answer of *data*, read in pieces, its bytes, and the fault of its end."""
    stream = Stream("r", "anybody", window=30.0, max_bytes=1 << 22)
    stream.outcome.begin_attempt("p", "m")
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
