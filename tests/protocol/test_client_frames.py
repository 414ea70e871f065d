"""Commands in: whatever is sent, a command or a BadCommand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from aioserver.errors import InvalidJson, InvalidRequest
from aioserver.protocol import client_frames
from aioserver.protocol.client_frames import BadCommand, Cancel, Chat, Ping, Resume
from aioserver.protocol.steps import at_once
from tests.support.commands import TOO_DEEP, encoded, parse


def command(**fields: Any) -> client_frames.Command:
    return parse(json.dumps(fields).encode())


def chat(**payload: Any) -> Chat:
    parsed = command(action="chat", request_id="r1", payload=payload)
    assert isinstance(parsed, Chat)
    return parsed


def refused(text: bytes | str) -> BadCommand:
    with pytest.raises(BadCommand) as caught:
        parse(encoded(text))
    assert isinstance(caught.value.error, InvalidJson | InvalidRequest)
    return caught.value


# Commands.


def test_each_action_is_its_command() -> None:
    assert command(action="ping") == Ping(None)
    assert command(action="ping", request_id="p") == Ping("p")
    assert command(action="cancel", request_id="r1") == Cancel("r1")
    assert command(action="resume", request_id="r1", payload={"last_event_id": 17}) == Resume(
        "r1", 17
    )
    assert command(action="resume", request_id="r1") == Resume("r1", 0)
    assert chat(text="Hello") == Chat(request_id="r1", text=b'"Hello"')


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
        messages=b'[{"role": "user", "content": "Hello"}]',
        streaming=False,
        conversation_id="c1",
        provider="groq",
        model="llama",
        options=b'{"temperature": 0.2, "tools": []}',
        option_names=frozenset({"temperature"}),
    )


@pytest.mark.parametrize("event_id", [0, 17, "17", 2**63, "0", "9" * 18])
def test_an_event_number_may_be_written_as_text(event_id: int | str) -> None:
    assert client_frames.event_number(event_id) == int(event_id)


@pytest.mark.parametrize(
    "event_id", [None, -1, 1.0, True, "", "-1", "1.5", " 1", "\u0661", "9" * 19, [1], {"a": 1}]
)
def test_an_event_number_is_a_number_from_0_on(event_id: object) -> None:
    with pytest.raises(InvalidRequest, match=">= 0") as caught:
        client_frames.event_number(event_id)
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
        '{"action": "\ud800"}',
        b'{"action": "\xff"}',
        '\ufeff{"action": "ping"}',
        '{"action": "a\nb"}',
        "[" * TOO_DEEP,
        '{"a":' * TOO_DEEP,
        "[" * TOO_DEEP + "]" * TOO_DEEP,
        '{"action":"chat","request_id":"r1","payload":{"text":"a","options":{"a":'
        + "[" * TOO_DEEP
        + "]" * TOO_DEEP
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


@pytest.mark.parametrize(
    "action",
    [
        *("null", "1", "[]", "{}", '""', '"Chat"', '"chat "', '"delete"', '"\\ud800"'),
        *("1e999", "1" * 5000, f'"{"x" * 5000}"', f"[{'1,' * 5000}1]"),
    ],
    ids=lambda action: action[:9],
)
def test_an_unknown_action_names_the_known(action: str) -> None:
    bad = refused(f'{{"action": {action}, "request_id": "r1"}}')

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
    assert len(bad.request_id or "") <= 256


def test_a_request_id_of_256_characters_passes() -> None:
    assert client_frames.identifier("é" * 256) == "é" * 256


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


# The digest.


def test_the_same_bytes_have_the_same_digest_on_both_faces() -> None:
    payload = '"text":"a","options":{"a": 1}'
    question = parse(
        f'{{"action":"chat","request_id":"r1","payload":{{{payload},"metadata":{{"user":"u1"}}}}}}'.encode()
    )
    two = at_once(client_frames.reading_question(f'{{{payload}, "request_id":"r1"}}'.encode()))

    assert isinstance(question, Chat)
    assert question.digest() == two.digest()


def test_a_digest_is_of_the_bytes_as_they_came() -> None:
    texts = [
        r'{"text":"a\ud800"}',
        r'{"text":"a\ud801"}',
        r'{"text":"a\ufffd"}',
        '{"text":"a\ufffd"}',
        '{"text":"a","options":{"a":1,"b":2}}',
        '{"text":"a","options":{"b":2,"a":1}}',
        '{"text":"a","options":{"b":2, "a":1}}',
    ]
    digests = set()
    for payload in texts:
        parsed = parse(f'{{"action":"chat","request_id":"r1","payload":{payload}}}'.encode())
        assert isinstance(parsed, Chat)
        digests.add(parsed.digest())

    assert len(digests) == len(texts)


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

    assert len({chat(**fields).digest() for fields in (base, *others)}) == len(others) + 1


def test_a_digest_of_a_long_question_is_short() -> None:
    assert len(chat(text="x" * 1_000_000).digest()) == 32


@pytest.mark.parametrize("where", ["options", "messages"])
def test_a_deeply_nested_question_stays_as_it_came(where: str) -> None:
    deep = "[" * 400 + "]" * 400
    value = (
        f'{{"a": {deep}}}' if where == "options" else f'[{{"role": "user", "content": {deep}}}]'
    )
    text = '"text": "a", ' if where == "options" else ""
    parsed = parse(
        f'{{"action":"chat","request_id":"r1","payload":{{{text}"{where}":{value}}}}}'.encode()
    )

    assert isinstance(parsed, Chat)
    assert getattr(parsed, where) == value.encode()


@pytest.mark.parametrize("face", ["frame", "question"])
def test_a_lone_surrogate_becomes_the_replacement_character(face: str) -> None:
    payload = r'"text":"a\ud83d b\ud83d\ude00"'
    if face == "frame":
        text = f'{{"action":"chat","request_id":"r\\udc00","payload":{{{payload}}}}}'
        parsed = parse(text.encode())
    else:
        text = f'{{"request_id":"r\\udc00",{payload}}}'
        parsed = at_once(client_frames.reading_question(text.encode()))

    assert isinstance(parsed, Chat)
    assert parsed.request_id == "r\ufffd"
    assert parsed.text == rb'"a\ufffd b\ud83d\ude00"'


def test_so_many_messages_that_each_would_cost_are_left_to_the_provider() -> None:
    bad = b'{"role":1},'
    frame = b'{"action":"chat","request_id":"r1","payload":{"messages":[%b{"role":"user"}]}}'
    many = client_frames.MAX_CHECKED_MESSAGES

    assert isinstance(parse(frame % (bad * many)), Chat)
    assert refused(frame % (bad * (many - 1))).error.param == "messages"
