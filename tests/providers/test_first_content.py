"""The first content of an answer: what comes before it is held, and comes with it."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from aioserver.protocol.openai import Reading
from aioserver.provider_errors import (
    ProviderBadResponse,
    ProviderDisconnected,
    ProviderError,
    ProviderFault,
    ProviderRefused,
    ReadTimeout,
)
from aioserver.providers.reading_sinks import ChatSink
from aioserver.providers.request import CHAT
from aioserver.providers.sinks import (
    DONE,
    MAX_HELD_BYTES,
    MAX_HELD_EVENTS,
    TEXT_STEP,
    EventSink,
    PassingSink,
    StreamSink,
)
from aioserver.streams.store import StreamStore
from aioserver.wings.anthropic.api import MESSAGES
from aioserver.wings.responses.api import RESPONSES
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aioserver.providers.request import Api
    from aioserver.streams.stream import Stream

COMMENT = b": OPENROUTER PROCESSING\n\n"
STORE_BYTES = 1 << 24


def chat(delta: Any, finish: str | None = None, **more: Any) -> dict[str, Any]:
    return {"id": "c1", "choices": [{"index": 0, "delta": delta, "finish_reason": finish, **more}]}


def written(*events: Any) -> bytes:
    """*events* as a provider sends them."""
    return b"".join(
        (b"event: %b\n" % event["type"].encode() if "type" in event else b"")
        + b"data: %b\n\n" % orjson.dumps(event)
        for event in events
    )


# What is no content, and what is, by API.
PREAMBLES: dict[Api, list[Any]] = {
    CHAT: [
        chat({"role": "assistant"}),
        chat({"role": "assistant", "content": ""}),
        chat({"role": "assistant", "content": None, "refusal": None, "tool_calls": []}),
        chat({}, logprobs=None, content_filter_results={}),
        {"choices": [], "prompt_filter_results": [{"prompt_index": 0}]},
        {"choices": [], "usage": None},
        {"choices": [], "usage": {"total_tokens": 3}},
        {"choices": [], "x_groq": {"usage": {"total_tokens": 3}}},
        {"id": "c1"},
        {"choices": [*chat({"role": "assistant"})["choices"], *chat({}, index=1)["choices"]]},
    ],
    MESSAGES: [
        {"type": "message_start", "message": {"id": "m", "usage": {"input_tokens": 3}}},
        {"type": "ping"},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {
            "type": "content_block_start",
            "index": 0,
            "content_block": {"type": "thinking", "thinking": "", "signature": ""},
        },
    ],
    RESPONSES: [
        *(
            {"type": f"response.{kind}", "response": {"id": "resp_1", "output": []}}
            for kind in ("created", "queued", "in_progress")
        ),
        {
            "type": "response.output_item.added",
            "item": {"id": "i", "type": "message", "role": "assistant", "content": []},
        },
        {
            "type": "response.output_item.added",
            "item": {"id": "i", "type": "reasoning", "summary": [], "encrypted_content": ""},
        },
        {
            "type": "response.content_part.added",
            "part": {"type": "output_text", "text": "", "annotations": []},
        },
        {
            "type": "response.reasoning_summary_part.added",
            "part": {"type": "summary_text", "text": ""},
        },
    ],
}
CONTENTS: dict[Api, list[Any]] = {
    CHAT: [
        chat({"content": "Hello"}),
        chat({"role": "assistant", "content": " "}),
        chat({"reasoning_content": "Hm"}),
        chat({"refusal": "No"}),
        chat({"tool_calls": [{"index": 0, "id": "c", "function": {"name": "f"}}]}),
        chat({"audio": {"id": "a"}}),
        chat({"something_new": 0}),
        chat({}, "stop"),
        chat({"role": "assistant"}, something_new="x"),
        {"choices": [{"index": 0, "text": "", "finish_reason": None}]},
        {"choices": [*chat({})["choices"], *chat({"content": "x"})["choices"]]},
        {"choices": "?"},
    ],
    MESSAGES: [
        {"type": "content_block_delta", "delta": {"type": "text_delta", "text": ""}},
        {
            "type": "content_block_start",
            "content_block": {"type": "tool_use", "id": "t", "name": "f", "input": {}},
        },
        {"type": "content_block_start", "content_block": {"type": "text", "text": "x"}},
        {"type": "content_block_start", "content_block": {"type": "redacted_thinking"}},
        {"type": "something_new"},
    ],
    RESPONSES: [
        {"type": "response.output_text.delta", "delta": "x"},
        {"type": "response.output_item.added", "item": {"type": "function_call", "name": "f"}},
        {"type": "response.output_item.added", "item": {"type": "message", "content": [{}]}},
        {"type": "response.content_part.added", "part": {"type": "output_text", "text": "x"}},
        {"type": "response.something_new"},
    ],
}
APIS = [pytest.param(api, id=api.path) for api in PREAMBLES]


def opened() -> tuple[StreamStore, Stream]:
    store = StreamStore(max_stream_bytes=1 << 22, max_kept_bytes=STORE_BYTES)
    stream = store.open("r1", "anybody", window=30.0)
    stream.outcome.provider, stream.outcome.model = "sim", "a-model"
    stream.append_processing()
    return store, stream


def play(sink: StreamSink, data: bytes, cuts: Iterable[int] = ()) -> None:
    for start, end in pairwise((0, *cuts, len(data))):
        if start < end:
            sink.feed(data[start:end])


def passed(stream: Stream) -> bytes:
    return b"".join(entry.data for entry in stream.entries)


@pytest.mark.parametrize("api", APIS)
def test_each_api_says_what_is_content_and_whatever_it_does_not_know_is(api: Api) -> None:
    for event in PREAMBLES[api]:
        assert not api.content(orjson.dumps(event)), event
    for event in CONTENTS[api]:
        assert api.content(orjson.dumps(event)), event
    for data in (b"[1]", b"7", b"{no", b'{"choices":[{"delta":{"content":"\\ud83d"}}]}'):
        assert api.content(data), data


@pytest.mark.parametrize("api", APIS)
def test_a_preamble_comes_with_the_first_content_in_one_entry_byte_for_byte(api: Api) -> None:
    # Some KiB, so that it is counted.
    padding = b": %b\n\n" % (b"x" * TEXT_STEP)
    before = written(*PREAMBLES[api][:3]) + padding + written(*PREAMBLES[api][3:])
    first, more = written(CONTENTS[api][0]), written(CONTENTS[api][0])
    for size in (1, 7, 100, 10_000):
        store, stream = opened()
        bare = store.stats().bytes
        sink = api.sink(stream)

        play(sink, COMMENT + before, range(size, len(COMMENT + before), size))
        held = store.stats().bytes - bare

        assert passed(stream) in (COMMENT, b""), "a comment in front passes at once, if alone"
        assert (stream.answered, stream.last) == (False, 1)
        assert held >= len(before) - TEXT_STEP, "it is counted"
        comments = len(stream.entries)

        play(sink, first)
        assert passed(stream) == COMMENT + before + first
        assert len(stream.entries) == comments + 1
        assert stream.last == 1 + len(PREAMBLES[api]) + 1
        assert stream.answered

        play(sink, more)
        assert passed(stream) == COMMENT + before + first + more
        assert stream.text_bytes == 0


@pytest.mark.parametrize("api", APIS)
def test_a_fault_before_the_content_leaves_nothing(api: Api) -> None:
    store, stream = opened()
    bare = store.stats().bytes
    sink = api.sink(stream)
    play(sink, written(*PREAMBLES[api]) + b": %b\n\n" % (b"x" * TEXT_STEP))
    assert store.stats().bytes > bare + TEXT_STEP

    with pytest.raises(ProviderDisconnected):
        sink.end()
    assert not sink.broken(ProviderDisconnected("cut"))
    sink.forget()

    assert (stream.answered, stream.ended, stream.last, passed(stream)) == (False, False, 1, b"")
    assert store.stats().bytes == bare

    again = api.sink(stream)
    play(again, written(PREAMBLES[api][0], CONTENTS[api][0]))
    assert passed(stream) == written(PREAMBLES[api][0], CONTENTS[api][0])
    assert store.find("anybody", "resp_1") is (stream if api is RESPONSES else None)


def test_the_id_of_a_response_that_failed_leads_nowhere() -> None:
    store, stream = opened()
    sink = RESPONSES.sink(stream)

    play(sink, written(*PREAMBLES[RESPONSES]))
    sink.forget()

    assert store.find("anybody", "resp_1") is None


@pytest.mark.parametrize(
    "event",
    [{"choices": [], "padding": "x" * (MAX_HELD_BYTES // 3)}, chat({"role": "assistant"})],
    ids=["bytes", "events"],
)
def test_what_is_held_has_a_bound_and_beyond_it_the_attempt_is_committed(event: Any) -> None:
    data = written(event)
    _, stream = opened()
    sink = CHAT.sink(stream)
    sent = 0
    while not stream.answered:
        assert sent * len(data) <= MAX_HELD_BYTES
        assert sent <= MAX_HELD_EVENTS
        play(sink, data)
        sent += 1

    assert sent in (3, MAX_HELD_EVENTS + 1)
    assert passed(stream) == sent * data
    assert stream.last == 1 + sent


@pytest.mark.parametrize("frames", [True, False], ids=["frames", "bytes"])
@pytest.mark.parametrize("before", [b"", written(chat({"role": "assistant"}))])
def test_an_end_mark_without_content_is_an_answer(before: bytes, frames: bool) -> None:
    _, stream = opened()
    sink = ChatSink(stream, Reading()) if frames else CHAT.sink(stream)

    assert not sink.feed(before + DONE)

    assert (stream.answered, stream.end_status) == (True, b"complete")
    assert frames or passed(stream) == before + DONE


@pytest.mark.parametrize("frames", [True, False], ids=["frames", "bytes"])
@pytest.mark.parametrize("fault", [ProviderDisconnected("cut"), ReadTimeout("silent")])
@pytest.mark.parametrize("behind", [b"", b"data: {", b"data: {nonsense\n\n"])
def test_behind_the_finish_a_break_is_a_good_end(
    fault: ProviderFault, behind: bytes, frames: bool
) -> None:
    answer = written(chat({"role": "assistant"}), chat({"content": "Hi"}), chat({}, "stop"))
    for cut in (len(answer), 10):
        _, stream = opened()
        sink: StreamSink = ChatSink(stream, Reading()) if frames else CHAT.sink(stream)
        broken: Exception = fault
        try:
            play(sink, answer + behind, (cut,))
        except ProviderBadResponse as exc:
            broken = exc
        assert sink.broken(broken)

        assert stream.end_status == b"complete"
        assert frames or passed(stream) == answer + DONE


@pytest.mark.parametrize("frames", [True, False], ids=["frames", "bytes"])
def test_before_the_finish_and_at_an_error_it_is_none(frames: bool) -> None:
    cut = ProviderDisconnected("cut")
    text, finish = written(chat({"content": "Hi"})), written(chat({}, "stop"))
    for data, fault in ((text, cut), (text + finish, ProviderError("no"))):
        _, stream = opened()
        sink: StreamSink = ChatSink(stream, Reading()) if frames else CHAT.sink(stream)
        play(sink, data)
        assert not sink.broken(fault)
        assert not stream.ended

    # What stands behind an event that is no JSON has not come.
    _, stream = opened()
    sink = ChatSink(stream, Reading()) if frames else CHAT.sink(stream)
    with pytest.raises(ProviderBadResponse) as raised:
        play(sink, text + b"data: {nonsense\n\n" + finish)
    assert not sink.broken(raised.value)


def test_one_of_two_choices_that_has_finished_is_no_end() -> None:
    def of(number: int, delta: Any, finish: str | None = None) -> bytes:
        (choice,) = chat(delta, finish)["choices"]
        return written({"choices": [{**choice, "index": number}]})

    usage = written({"choices": [], "usage": {"total_tokens": 3}})
    both = of(0, {"content": "a"}) + of(1, {"content": "b"}) + of(0, {}, "stop")
    for data, whole in (
        (both + of(1, {"content": "c"}), False),
        (both + of(1, {"content": "c"}) + of(1, {}, "stop"), True),
        (both + of(1, {}, "stop") + usage, True),
        (both + of(1, {}, "stop") + of(0, {"role": "assistant", "content": ""}), True),
    ):
        for size in (10_000, 150):
            _, stream = opened()
            sink = CHAT.sink(stream)
            play(sink, data, range(size, len(data), size))
            assert sink.broken(ProviderDisconnected("cut")) == whole, data


def test_a_response_that_fails_before_any_content_is_a_fault_as_its_code_says() -> None:
    for code, fault in (("server_error", ProviderError), ("invalid_prompt", ProviderRefused)):
        _, stream = opened()
        error = {"code": code, "message": "No."}
        response = {"id": "resp_1", "status": "failed", "error": error, "output": []}
        failed = {"type": "response.failed", "response": response}
        with pytest.raises(fault):
            play(RESPONSES.sink(stream), written(PREAMBLES[RESPONSES][0], failed))
        assert (stream.answered, stream.ended) == (False, False)

        _, stream = opened()
        data = written(PREAMBLES[RESPONSES][0], CONTENTS[RESPONSES][0], failed)
        play(RESPONSES.sink(stream), data)
        assert passed(stream) == data


@pytest.mark.parametrize("code", ["content_filter", "content_policy_violation", "slow", 503])
def test_a_verdict_without_a_number_is_the_callers_fault(code: str | int) -> None:
    verdict = str(code).startswith("content")
    for frames in (True, False):
        _, stream = opened()
        sink: StreamSink = ChatSink(stream, Reading()) if frames else CHAT.sink(stream)
        with pytest.raises(ProviderRefused if verdict else ProviderError):
            play(sink, written(chat({"role": "assistant"}), {"error": {"code": code}}))


@pytest.mark.parametrize("patience", [0.0, 0.01])
async def test_a_preamble_that_a_client_needs_is_let_go_after_a_while(patience: float) -> None:
    data = written(*PREAMBLES[RESPONSES])
    store, stream = opened()
    sink = RESPONSES.sink(stream)
    sink.patience = patience
    play(sink, data)
    await until(lambda: stream.answered)

    assert passed(stream) == data
    assert store.find("anybody", "resp_1") is stream
    play(sink, written(CONTENTS[RESPONSES][0]))
    assert passed(stream) == data + written(CONTENTS[RESPONSES][0])
    sink.forget()


async def test_what_is_let_go_too_late_shows_nothing() -> None:
    _, stream = opened()
    sink = RESPONSES.sink(stream)
    sink.patience = 0.01
    play(sink, written(*PREAMBLES[RESPONSES]))
    sink.forget()
    sink.let_go()

    assert not stream.answered
    assert passed(stream) == b""


def test_an_attempt_that_failed_leaves_nothing_in_what_is_read() -> None:
    reading = Reading()
    _, stream = opened()
    usage = chat({"role": "assistant"}) | {"usage": {"total_tokens": 3}}
    play(ChatSink(stream, reading), written(usage))
    reading.half["content"] = "\ud83d"
    reading.note(b"half")

    reading.begin_anew()

    assert (reading.usage, reading.half, reading.text, reading.size) == (None, {}, "", 0)


def test_the_sinks_of_all_apis_hold() -> None:
    for api in PREAMBLES:
        assert isinstance(api.sink(opened()[1]), PassingSink)
    assert isinstance(CHAT.sink(opened()[1]), EventSink)
