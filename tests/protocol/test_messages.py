"""Commands in: whatever is sent, a command or a BadCommand. Frames out: the shapes of CONTRACT 6."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aioserver.errors import InvalidJson, InvalidRequest, ServerAtCapacity
from aioserver.protocol import messages
from aioserver.protocol.messages import BadCommand, Cancel, Chat, Ping, Resume

unhurried = settings(deadline=None, max_examples=150)

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
FIELDS = (
    *("action", "request_id", "payload", "text", "messages", "streaming", "conversation_id"),
    *("provider", "model", "options", "metadata", "last_event_id", "role", "stream"),
)
near = st.recursive(
    scalars | st.sampled_from(("chat", "cancel", "resume", "ping", "r1", "user", "7")),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=6)
        | st.fixed_dictionaries(
            {
                "action": st.sampled_from(("chat", "cancel", "resume", "ping")),
                "request_id": st.just("r1") | inner,
                "payload": st.dictionaries(st.sampled_from(FIELDS), inner, max_size=3),
            }
        )
    ),
    max_leaves=20,
)


def command(**fields: Any) -> messages.Command:
    return messages.parse(json.dumps(fields))


def chat(**payload: Any) -> Chat:
    parsed = command(action="chat", request_id="r1", payload=payload)
    assert isinstance(parsed, Chat)
    return parsed


def refused(text: bytes | str) -> BadCommand:
    with pytest.raises(BadCommand) as caught:
        messages.parse(text)
    assert isinstance(caught.value.error, InvalidJson | InvalidRequest)
    return caught.value


def survives(text: bytes | str) -> None:
    """Assert that *text* is a command whose digest can be made, or is refused."""
    try:
        parsed = messages.parse(text)
    except BadCommand as bad:
        assert type(bad.error) in {InvalidJson, InvalidRequest}  # noqa: PT017 - either is right
        # The refusal can be written.
        messages.loose_frame(bad.request_id, "error", bad.error.as_chunk())
    else:
        if isinstance(parsed, Chat):
            assert len(parsed.digest()) == 32


# Commands.


def test_each_action_is_its_command() -> None:
    assert command(action="ping") == Ping(None)
    assert command(action="ping", request_id="p") == Ping("p")
    assert command(action="cancel", request_id="r1") == Cancel("r1")
    assert command(action="resume", request_id="r1", payload={"last_event_id": 17}) == Resume(
        "r1", 17
    )
    assert command(action="resume", request_id="r1") == Resume("r1", 0)
    assert chat(text="Hello") == Chat(request_id="r1", text="Hello")


def test_a_chat_has_every_field_of_the_contract() -> None:
    parsed = chat(
        messages=[{"role": "user", "content": "Hello"}],
        streaming=False,
        conversation_id="c1",
        provider="groq",
        model="llama",
        options={"temperature": 0.2, "tools": []},
        metadata={"user": "u7"},
    )

    assert parsed == Chat(
        request_id="r1",
        messages=[{"role": "user", "content": "Hello"}],
        streaming=False,
        conversation_id="c1",
        provider="groq",
        model="llama",
        options={"temperature": 0.2, "tools": []},
        metadata={"user": "u7"},
    )


@pytest.mark.parametrize("given", [0, 17, "17", 2**63, "0", "9" * 18])
def test_an_event_number_may_be_written_as_text(given: int | str) -> None:
    assert messages.event_number(given) == int(given)


@pytest.mark.parametrize(
    "given", [None, -1, 1.0, True, "", "-1", "1.5", " 1", "\u0661", "9" * 19, [1], {"a": 1}]
)
def test_an_event_number_is_a_number_from_0_on(given: object) -> None:
    with pytest.raises(InvalidRequest, match=">= 0") as caught:
        messages.event_number(given)
    assert caught.value.param == "last_event_id"


# Refusals.


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "hello",
        "{'action': 'ping'}",
        '{"action": "ping"}}',
        '{"action": NaN}',
        '{"action": Infinity}',
        '{"action": 1e999}',
        f'{{"action": {"1" * 5000}}}',
        '{"action": "\\ud800"}',
        '{"action": "\ud800"}',
        b'{"action": "\xff"}',
        '\ufeff{"action": "ping"}',
        '{"action": "a\nb"}',
        "[" * 100_000,
        '{"a":' * 100_000,
        "[" * 100_000 + "]" * 100_000,
        '{"action":"chat","request_id":"r1","payload":{"text":"a","options":{"a":'
        + "[" * 100_000
        + "]" * 100_000
        + "}}}",
    ],
    ids=lambda text: repr(text)[:30],
)
def test_a_frame_that_is_no_json_gets_an_error(text: str | bytes) -> None:
    bad = refused(text)

    assert isinstance(bad.error, InvalidJson)
    assert bad.request_id is None


@pytest.mark.parametrize("text", ["null", "1", "true", '"chat"', "[]", '[{"action": "ping"}]'])
def test_a_frame_is_an_object(text: str) -> None:
    assert refused(text).error.message == "a frame must be a JSON object"


@pytest.mark.parametrize("action", [None, 1, [], {}, "", "Chat", "chat ", "delete"])
def test_an_unknown_action_names_the_known(action: object) -> None:
    bad = refused(json.dumps({"action": action, "request_id": "r1"}))

    assert bad.error.param == "action"
    assert "chat, cancel, resume, ping" in bad.error.message
    assert bad.request_id == "r1"


@pytest.mark.parametrize("action", ["chat", "cancel", "resume"])
@pytest.mark.parametrize("request_id", [None, 1, "", [], "x" * 257, "a\nb", "\u200e", "a\0"])
def test_a_request_id_is_1_to_256_printable_characters(action: str, request_id: object) -> None:
    bad = refused(
        json.dumps({"action": action, "request_id": request_id, "payload": {"text": "a"}})
    )

    assert bad.error.param == "request_id"


def test_a_request_id_of_256_characters_passes() -> None:
    assert messages.identifier("é" * 256) == "é" * 256


@pytest.mark.parametrize(
    ("payload", "param"),
    [
        ([], "payload"),
        (None, "payload"),
        ("text", "payload"),
        ({}, "text"),
        ({"text": "a", "messages": [{"role": "user"}]}, "text"),
        ({"text": None, "messages": None}, "text"),
        ({"text": ""}, "text"),
        ({"text": 1}, "text"),
        ({"text": ["a"]}, "text"),
        ({"messages": []}, "messages"),
        ({"messages": {}}, "messages"),
        ({"messages": "a"}, "messages"),
        ({"messages": [1]}, "messages"),
        ({"messages": [{"content": "a"}]}, "messages"),
        ({"messages": [{"role": 1}]}, "messages"),
        ({"text": "a", "streaming": "yes"}, "streaming"),
        ({"text": "a", "streaming": 1}, "streaming"),
        ({"text": "a", "conversation_id": ""}, "conversation_id"),
        ({"text": "a", "conversation_id": 7}, "conversation_id"),
        ({"text": "a", "provider": "x" * 257}, "provider"),
        ({"text": "a", "model": []}, "model"),
        ({"text": "a", "options": []}, "options"),
        ({"text": "a", "options": {"model": "gpt"}}, "options"),
        ({"text": "a", "options": {"messages": []}}, "options"),
        ({"text": "a", "options": {"stream": True}}, "options"),
        ({"text": "a", "metadata": "u"}, "metadata"),
        ({"text": "a", "temperature": 1}, "temperature"),
        ({"text": "a", "x" * 100: 1}, "x" * 64),
    ],
)
def test_a_wrong_payload_names_its_field(payload: object, param: str) -> None:
    bad = refused(json.dumps({"action": "chat", "request_id": "r1", "payload": payload}))

    assert isinstance(bad.error, InvalidRequest)
    assert bad.error.param == param
    assert bad.request_id == "r1"


@unhurried
@given(anything)
def test_any_json_is_a_command_or_a_bad_one(value: object) -> None:
    survives(json.dumps(value))


@unhurried
@given(near)
def test_almost_right_json_is_a_command_or_a_bad_one(value: object) -> None:
    survives(json.dumps(value))


@unhurried
@given(st.text() | st.binary())
def test_any_text_is_a_command_or_a_bad_one(text: str | bytes) -> None:
    survives(text)


@unhurried
@given(st.text(alphabet=st.characters(codec=None), max_size=8))
def test_lone_surrogates_are_no_json(text: str) -> None:
    survives(f'{{"action":"ping","request_id":"{text}"}}')


# The digest.


def test_equal_questions_have_equal_digests() -> None:
    one = chat(text="a", options={"a": 1, "b": {"c": 2, "d": 3}}, metadata={"user": "u1"})
    two = chat(metadata={}, options={"b": {"d": 3, "c": 2}, "a": 1}, text="a")

    assert one.digest() == two.digest()


def test_other_questions_have_other_digests() -> None:
    base: dict[str, Any] = {"text": "a"}
    others: list[dict[str, Any]] = [
        {"text": "b"},
        {"messages": [{"role": "user", "content": "a"}]},
        base | {"streaming": True},
        base | {"streaming": False},
        base | {"conversation_id": "a"},
        base | {"provider": "a"},
        base | {"model": "a"},
        base | {"options": {"n": 1}},
        base | {"options": {"n": "1"}},
    ]

    assert len({chat(**one).digest() for one in (base, *others)}) == len(others) + 1


def test_a_digest_of_a_long_question_is_short() -> None:
    assert len(chat(text="x" * 1_000_000).digest()) == 32


@pytest.mark.parametrize("where", ["options", "messages"])
def test_json_that_can_be_read_but_not_written_is_refused(where: str) -> None:
    deep = "[" * 400 + "]" * 400
    value = (
        f'{{"a": {deep}}}' if where == "options" else f'[{{"role": "user", "content": {deep}}}]'
    )
    text = '"text": "a", ' if where == "options" else ""
    parsed = messages.parse(
        f'{{"action":"chat","request_id":"r1","payload":{{{text}"{where}":{value}}}}}'
    )
    assert isinstance(parsed, Chat)

    with pytest.raises(InvalidRequest, match="nested too deeply"):
        parsed.digest()


# Frames.


@unhurried
@given(
    st.none() | st.text(st.characters(exclude_categories=["Cs"])),
    st.integers(1, 2**40),
    st.sampled_from([b"processing", b"chunk", b"complete", b"error", b"cancelled"]),
)
def test_an_event_of_a_log_is_a_frame(request_id: str | None, number: int, status: bytes) -> None:
    frame = messages.frame(messages.frame_head(request_id), number, status, b'{"a":"\\u20ac"}')

    assert json.loads(frame) == {
        "request_id": request_id,
        "event_id": number,
        "status": status.decode(),
        "chunk": {"a": "€"},
    }


def test_the_frame_of_the_contract_is_byte_for_byte() -> None:
    head = messages.frame_head("6f0c")
    chunk = b'{"type":"text","data":"Hel","metadata":{}}'

    assert messages.frame(head, 3, b"chunk", chunk) == (
        b'{"request_id":"6f0c","event_id":3,"status":"chunk",'
        b'"chunk":{"type":"text","data":"Hel","metadata":{}}}'
    )


def test_a_loose_frame_has_no_event_id() -> None:
    error = ServerAtCapacity("full", retry_after=2.0)

    assert json.loads(messages.loose_frame(None, "error", error.as_chunk())) == {
        "request_id": None,
        "status": "error",
        "chunk": {
            "error": "full",
            "code": "server_at_capacity",
            "retryable": True,
            "retry_after": 2.0,
        },
    }
    assert messages.loose_frame("p", "pong", {}) == (
        b'{"request_id":"p","status":"pong","chunk":{}}'
    )
