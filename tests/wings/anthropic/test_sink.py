"""The sink of Anthropic's events: a provider's bytes into a log, whatever way they are cut."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from aioserver.provider_errors import (
    ProviderAuthError,
    ProviderBadResponse,
    ProviderDisconnected,
    ProviderError,
    ProviderFault,
    ProviderForbidden,
    ProviderRateLimited,
    ProviderRefused,
)
from aioserver.streams.stream import Stream
from aioserver.wings.anthropic.sink import MessageSink
from aioserver.wings.anthropic.wire import PING, MessageErrors

if TYPE_CHECKING:
    from collections.abc import Iterable


def event(kind: str, **fields: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), orjson.dumps({"type": kind, **fields}))


def text(words: str) -> bytes:
    delta = {"type": "text_delta", "text": words}
    return event("content_block_delta", index=0, delta=delta)


def error(kind: str, message: str = "No.") -> bytes:
    return event("error", error={"type": kind, "message": message})


START = event(
    "message_start", message={"id": "msg_1", "usage": {"input_tokens": 7, "output_tokens": 1}}
)
DELTA = event(
    "message_delta",
    delta={"stop_reason": "end_turn"},
    usage={"input_tokens": None, "output_tokens": 9},
)
STOP = event("message_stop")
# A text that speaks of ends is none, whatever it is.
ANSWER = START + PING + text("message_stop") + text('{"type":"message_stop"} Grüße') + DELTA


def new_stream() -> Stream:
    stream = Stream("r1", "anybody", window=30.0, max_bytes=1 << 20)
    stream.outcome.provider, stream.outcome.model = "sim", "a-model"
    stream.append_processing()
    stream.events = MessageErrors()
    return stream


def play(sink: MessageSink, data: bytes, cuts: Iterable[int] = ()) -> bool:
    """Feed *data*, cut at *cuts*; return whether the sink said that it has all it wants."""
    return any(not sink.feed(data[start:end]) for start, end in pairwise([0, *cuts, len(data)]))


def passed(stream: Stream) -> bytes:
    return b"".join(entry.data for entry in stream.entries)


def cuts_of(data: bytes) -> list[tuple[int, ...]]:
    dice = random.Random(5)
    some = [tuple(sorted(dice.sample(range(1, len(data)), 7))) for _ in range(30)]
    return [(), tuple(range(1, len(data))), *((at,) for at in range(1, len(data))), *some]


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
def test_every_cut_passes_the_same_bytes_up_to_the_end(line_end: bytes) -> None:
    data = (ANSWER + STOP).replace(b"\n", line_end)
    for cuts in cuts_of(data):
        stream = new_stream()
        # Only a line end may lack when the last event is known to be whole.
        ended = play(MessageSink(stream), data + b"\n", (*cuts, len(data)))

        assert ended
        assert passed(stream).replace(b"\r\n", b"\n").replace(b"\r", b"\n") == ANSWER + STOP
        assert stream.end_status == b"complete"
        assert stream.outcome.usage == {
            "input_tokens": 7,
            "output_tokens": 9,
            "total_tokens": 16,
        }
        assert stream.answered


def test_nothing_behind_the_end_is_passed_on() -> None:
    for behind in (text("more"), error("api_error"), b"data: {"):
        stream = new_stream()

        assert play(MessageSink(stream), START + STOP + behind)
        assert passed(stream) == START + STOP
        assert stream.end_status == b"complete"


@pytest.mark.parametrize(
    "data", [START, START + text("x"), ANSWER.removesuffix(DELTA) + b"data: [DONE]\n\n"]
)
def test_a_body_that_ends_without_message_stop_is_cut_off(data: bytes) -> None:
    stream = new_stream()
    sink = MessageSink(stream)

    assert not play(sink, data)
    with pytest.raises(ProviderDisconnected, match="without message_stop"):
        sink.end()
    assert not stream.ended


@pytest.mark.parametrize("behind", [b"", STOP[:-2], b"data: {\n\n", b"data: [DONE]\n\n"])
def test_a_message_that_breaks_off_behind_its_stop_reason_is_whole(behind: bytes) -> None:
    fault: ProviderFault = ProviderDisconnected("cut")
    for cuts in cuts_of(ANSWER + behind)[:40]:
        stream = new_stream()
        sink = MessageSink(stream)
        try:
            play(sink, ANSWER + behind, cuts)
        except ProviderBadResponse as exc:
            fault = exc
        assert sink.broken(fault)

        assert stream.end_status == b"complete"
        assert passed(stream) == ANSWER + behind * (b"DONE" in behind) + STOP
        assert stream.outcome.usage is not None


def test_a_body_without_a_byte_is_a_bad_response() -> None:
    with pytest.raises(ProviderBadResponse):
        MessageSink(new_stream()).end()


FAULTS: list[tuple[str, type[ProviderFault], int | None]] = [
    ("invalid_request_error", ProviderRefused, 400),
    ("authentication_error", ProviderAuthError, None),
    ("billing_error", ProviderForbidden, None),
    ("permission_error", ProviderForbidden, None),
    ("not_found_error", ProviderRefused, 404),
    ("request_too_large", ProviderRefused, 413),
    ("rate_limit_error", ProviderRateLimited, 429),
    ("api_error", ProviderError, 500),
    ("timeout_error", ProviderError, 504),
    ("overloaded_error", ProviderError, 529),
    ("new_error", ProviderError, 500),
]


@pytest.mark.parametrize(("kind", "fault", "status"), FAULTS)
@pytest.mark.parametrize("before", [b"", PING, b": x\n\n" + PING, START + PING])
def test_an_error_before_the_first_content_is_no_answer(
    before: bytes, kind: str, fault: type[ProviderFault], status: int | None
) -> None:
    data = before + error(kind)
    for cuts in cuts_of(data)[:40]:
        stream = new_stream()
        with pytest.raises(fault) as caught:
            play(MessageSink(stream), data, cuts)

        assert type(caught.value) is fault
        answer = caught.value.provider_answer
        assert (answer and answer[0]) == status
        assert (answer is not None) == (b"No." in (answer or (0, b""))[1])
        assert not stream.answered
        # What comes has its HTTP status, so no head may go out but for a comment.
        assert passed(stream) in (b"", b": x\n\n")


@pytest.mark.parametrize(("kind", "fault", "status"), FAULTS)
def test_an_error_in_the_answer_passes_and_ends_it_unless_it_is_about_our_key(
    kind: str, fault: type[ProviderFault], status: int | None
) -> None:
    data = START + text("good") + error(kind)
    for cuts in cuts_of(data)[:40]:
        stream = new_stream()
        if status is None:
            with pytest.raises(fault):
                play(MessageSink(stream), data, cuts)
            assert passed(stream) == START + text("good")
            continue

        assert play(MessageSink(stream), data + text("more"), cuts)
        assert passed(stream) == data
        assert isinstance(stream.error, fault)
        assert stream.end_status == b"error"


def test_an_error_without_a_type_is_one_too() -> None:
    stream = new_stream()

    data = START + text("good") + b'data: {"error":{"message":"No."}}\n\n'
    assert play(MessageSink(stream), data)
    assert isinstance(stream.error, ProviderError)


@pytest.mark.parametrize("broken", [b'data: {"type":"mess\n\n', b'data: {"a":"\xff"}\n\n'])
@pytest.mark.parametrize("behind", [b"", STOP, error("api_error")])
def test_an_event_that_is_not_json_ends_the_answer(broken: bytes, behind: bytes) -> None:
    stream = new_stream()

    with pytest.raises(ProviderBadResponse):
        play(MessageSink(stream), START + text("good") + broken + behind)
    assert passed(stream) == START + text("good")


def test_an_endless_event_is_cut_at_its_bound() -> None:
    stream = new_stream()
    sink = MessageSink(stream)

    with pytest.raises(ProviderBadResponse):
        play(sink, b"data: {" + b"x" * (stream.max_bytes + 1))


def test_pings_are_no_answer_and_come_with_it() -> None:
    stream = new_stream()
    sink = MessageSink(stream)

    play(sink, b": y\n\n")
    play(sink, PING)
    play(sink, b": x\n\n")
    play(sink, PING + START)
    assert (stream.answered, stream.last) == (False, 1)
    assert passed(stream) == b": y\n\n"
    play(sink, text("Hello"))
    assert (stream.answered, stream.last) == (True, 5)
    assert passed(stream) == b": y\n\n" + PING + b": x\n\n" + PING + START + text("Hello")
    assert len(stream.entries) == 3, "the processing, the comment, and all of the answer"


def test_our_own_fault_is_an_event_of_its_form() -> None:
    stream = new_stream()
    play(MessageSink(stream), START + text("good"))

    stream.fail(ProviderDisconnected("cut"))

    last = passed(stream).removeprefix(START + text("good"))
    assert last == (
        b"event: error\n"
        b'data: {"type":"error","error":{"type":"api_error","message":"cut","code":"provider_disconnected"}}\n\n'
    )


def test_usage_that_grows_costs_a_bounded_memory() -> None:
    stream = new_stream()
    sink = MessageSink(stream)
    play(sink, START)

    for number in range(200):
        usage = {f"count_{number}_{part}": "x" * 100 for part in range(20)}
        play(sink, event("message_delta", usage={**usage, "output_tokens": number}))

    assert stream.outcome.usage is not None
    assert len(orjson.dumps(stream.outcome.usage)) < 20_000
    assert stream.outcome.usage["total_tokens"] == 7 + 199


def test_usage_may_be_anything_and_its_unknown_counts_are_left_out() -> None:
    usages: tuple[Any, ...] = (None, [], "x", {"input_tokens": None}, {"cache": {"deep": 1}})
    for usage in usages:
        stream = new_stream()
        data = START + event("message_delta", usage=usage) + STOP
        assert play(MessageSink(stream), data)
        assert stream.outcome.usage is not None
        assert stream.outcome.usage["total_tokens"] == 7, "of the prompt alone"
    stream = new_stream()
    counts = {"input_tokens": 1, "cache_creation_input_tokens": 2, "cache_read_input_tokens": 4}
    play(MessageSink(stream), event("message_start", message={"usage": counts}))
    assert stream.outcome.usage == {**counts, "total_tokens": 3}
