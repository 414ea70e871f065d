"""OpenAI's chat objects: real chunks of several providers, and anything else that may come."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aioserver.protocol.openai import BadEvent, ErrorEvent, Reading
from aioserver.provider_errors import (
    ProviderAuthError,
    ProviderBadResponse,
    ProviderError,
    ProviderFault,
    ProviderForbidden,
    ProviderRateLimited,
    ProviderRefused,
)
from aioserver.providers.error_mapping import event_fault

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                (
                    *("choices", "delta", "message", "content", "index", "tool_calls", "usage"),
                    *("reasoning", "reasoning_content", "finish_reason", "error", "x_groq"),
                )
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)


def event(delta: dict[str, Any] | None = None, **more: Any) -> bytes:
    return orjson.dumps({"choices": [{"index": 0, "delta": delta or {}, **more}]})


def read(data: bytes) -> list[bytes]:
    """Read *data* as the sinks do."""
    try:
        return Reading().read(data)
    except (BadEvent, ErrorEvent) as exc:
        raise event_fault(exc) from exc


def texts_of(chunks: list[bytes]) -> list[tuple[str, Any]]:
    read = [orjson.loads(chunk) for chunk in chunks]
    assert all(chunk.keys() == {"type", "data", "metadata"} for chunk in read)
    return [(chunk["type"], chunk["data"]) for chunk in read]


def test_text_is_a_chunk_and_is_kept_for_the_history() -> None:
    reading = Reading()

    assert reading.read(event({"content": 'He"l'})) == [
        b'{"type":"text","data":"He\\"l","metadata":{}}'
    ]
    assert texts_of(reading.read(event({"content": "lo 😀"}))) == [("text", "lo 😀")]
    assert reading.text == 'He"llo 😀'


def test_the_first_and_the_last_event_say_nothing() -> None:
    reading = Reading()

    assert reading.read(event({"role": "assistant", "content": ""})) == []
    assert reading.read(event({"role": "assistant", "content": None})) == []
    assert reading.read(event({}, finish_reason="stop")) == []
    assert reading.finish_reason == "stop"
    assert reading.text == ""


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_has_its_own_type_and_is_not_kept(name: str) -> None:
    reading = Reading()

    assert texts_of(reading.read(event({name: "hm", "content": "so"}))) == [
        ("reasoning", "hm"),
        ("text", "so"),
    ]
    assert reading.text == "so"


def test_tool_calls_pass_as_they_are() -> None:
    calls = [{"index": 0, "id": "c1", "function": {"name": "weather", "arguments": '{"ci'}}]

    assert texts_of(Reading().read(event({"tool_calls": calls}))) == [("tool_calls", calls)]


def test_a_whole_answer_is_read_as_one_event() -> None:
    reading = Reading()
    whole = {
        "object": "chat.completion",
        "choices": [
            {"index": 0, "message": {"content": "Hello"}, "finish_reason": "length"},
        ],
        "usage": {"total_tokens": 7},
    }

    assert texts_of(reading.read(orjson.dumps(whole))) == [("text", "Hello")]
    assert reading.finish_reason == "length"
    assert reading.usage == {"total_tokens": 7}


def test_only_the_choice_asked_for_is_read() -> None:
    reading = Reading(choice_index=1)
    choices = [
        {"index": at, "delta": {"content": f"{at}"}, "finish_reason": f"f{at}"} for at in (0, 1, 2)
    ]

    assert texts_of(reading.read(orjson.dumps({"choices": choices}))) == [("text", "1")]
    assert reading.finish_reason == "f1"


def test_a_choice_without_an_index_is_the_first() -> None:
    assert texts_of(Reading().read(b'{"choices":[{"delta":{"content":"a"}}]}')) == [("text", "a")]


def test_usage_comes_in_an_event_without_choices_or_as_groqs() -> None:
    reading = Reading()
    reading.read(b'{"choices":[],"usage":{"total_tokens":7}}')
    assert reading.usage == {"total_tokens": 7}
    reading.read(event({"content": "a"}, usage=None))
    assert reading.usage == {"total_tokens": 7}

    groq = Reading()
    groq.read(b'{"choices":[],"x_groq":{"id":"r","usage":{"total_tokens":8}}}')
    assert groq.usage == {"total_tokens": 8}


def test_the_text_kept_for_the_history_is_bounded_and_the_answer_is_not() -> None:
    reading = Reading(max_text_bytes=100)

    for _ in range(50):
        assert len(reading.read(event({"content": "€€€€"}))) == 1

    assert 100 <= len(reading.text.encode()) <= 112


def test_the_text_kept_for_the_history_costs_its_bytes_in_however_many_events_it_comes() -> None:
    reading, count = Reading(), 8_000
    piece = event({"content": "€"})
    tracemalloc.start()
    try:
        for _ in range(count):
            reading.read(piece)
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()

    assert reading.text == "€" * count
    assert reading.size == 3 * count
    assert taken < 1.5 * reading.size


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b'{"error":{"message":"overloaded","code":529}}', "overloaded"),
        (b'{"error":"overloaded"}', "overloaded"),
        (b'{"error":{"message":7}}', "the provider reported an error"),
        (b'{"error":[1]}', "the provider reported an error"),
        (b'{"error":{"message":"no"},"choices":[{"delta":{"content":"a"}}]}', "no"),
    ],
)
def test_an_error_under_200_is_a_fault(data: bytes, text: str) -> None:
    with pytest.raises(ProviderError) as caught:
        read(data)
    assert caught.value.message == f"the provider reported an error: {text}"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ({"code": 401}, ProviderAuthError),
        ({"code": 402}, ProviderForbidden),
        ({"code": "403"}, ProviderForbidden),
        ({"code": "insufficient_quota"}, ProviderAuthError),
        ({"type": "insufficient_quota", "code": None}, ProviderAuthError),
        ({"code": "invalid_api_key"}, ProviderAuthError),
        ({"code": 429}, ProviderRateLimited),
        ({"code": "498"}, ProviderRateLimited),
        ({"code": "rate_limit_exceeded"}, ProviderRateLimited),
        ({"code": 400}, ProviderRefused),
        ({"code": "404"}, ProviderRefused),
        ({"code": 408}, ProviderError),
        ({"code": 502}, ProviderError),
        ({"code": "server_error"}, ProviderError),
        ({"code": [429]}, ProviderError),
        ({"code": 4.29e2}, ProviderError),
        ({"code": True}, ProviderError),
        ({"code": -1}, ProviderError),
        ({}, ProviderError),
    ],
)
def test_the_code_of_an_error_under_200_says_what_it_means(
    error: dict[str, Any], kind: type[ProviderFault]
) -> None:
    with pytest.raises(ProviderFault) as caught:
        read(orjson.dumps({"error": {"message": "our secret", **error}}))

    assert type(caught.value) is kind
    shown = caught.value.message.encode() + caught.value.body()
    assert (b"our secret" in shown) == (kind in (ProviderError, ProviderRefused))
    if isinstance(caught.value, ProviderRefused):
        assert caught.value.http_status in (400, 404)
        assert orjson.loads(caught.value.body())["error"]["message"] == "our secret"


def test_the_text_of_a_providers_error_is_cut() -> None:
    with pytest.raises(ProviderError) as caught:
        read(orjson.dumps({"error": {"message": "x" * 100_000}}))
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[DONE]", b"\xff", b"NaN", b'{"\\ud800"', b"[" * 2000]
)
def test_a_body_that_is_no_json_is_a_bad_response(data: bytes) -> None:
    with pytest.raises(ProviderBadResponse, match="not JSON"):
        read(data)


@pytest.mark.parametrize("data", [b"null", b"[]", b"1", b'"a"', b'"\\ud800"'])
def test_json_that_is_no_object_is_a_bad_response(data: bytes) -> None:
    with pytest.raises(ProviderBadResponse, match="not an object"):
        read(data)


@pytest.mark.parametrize(
    "data",
    [
        '{"choices":[{"delta":{"tool_calls":%s}}]}',
        '{"choices":[],"usage":{"a":%s}}',
        '{"choices":[],"x_groq":{"usage":{"a":%s}}}',
    ],
)
@pytest.mark.parametrize("depth", [252, 253, 254, 300, 900])
def test_json_that_can_be_read_but_not_written_is_a_bad_response(data: str, depth: int) -> None:
    reading = Reading()
    deep = "[" * depth + "]" * depth

    try:
        reading.read((data % deep).encode())
    except BadEvent as error:
        assert "nested too deeply" in str(error)  # noqa: PT017 - at the border it may pass
    else:
        assert depth < 300
        orjson.dumps({"metadata": {"usage": reading.usage}})


@settings(max_examples=60)
@given(st.dictionaries(st.sampled_from(("choices", "usage", "x_groq", "error")), anything))
def test_any_answer_is_read_or_refused(answer: dict[str, Any]) -> None:
    reading = Reading()
    data = json.dumps(answer).encode()

    try:
        chunks = reading.read(data)
    except (BadEvent, ErrorEvent) as error:
        assert event_fault(error).body()  # noqa: PT017 - either is right
    else:
        texts_of(chunks)
        orjson.dumps({"finish_reason": reading.finish_reason, "usage": reading.usage})
