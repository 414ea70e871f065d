"""The frames of the Responses API over WebSocket: what goes on to a provider, and what is
refused.
"""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest

from aioserver.errors import InvalidRequest, ServerAtCapacity
from aioserver.protocol import steps
from aioserver.provider_errors import ProviderRateLimited, ProviderRefused
from aioserver.wings.responses import frames as response_frames
from aioserver.wings.responses.frames import (
    MAX_ECHO_BYTES,
    BadFrame,
    Cancel,
    Create,
    Processed,
    Refused,
    Resume,
    Steer,
)


def parse(frame: bytes) -> response_frames.Command:
    return steps.at_once(response_frames.parsing(frame))


def created(text: str) -> Create:
    command = parse(text.encode())
    assert isinstance(command, Create), command
    return command


def bad(frame: bytes) -> BadFrame:
    with pytest.raises(BadFrame) as caught:
        parse(frame)
    return caught.value


# What clients send.


@pytest.mark.parametrize(
    ("frame", "body"),
    [
        ('{"type":"response.create","model":"m"}', '{"stream":true,"model":"m"}'),
        ('{"model":"m","type":"response.create"}', '{"stream":true,"model":"m"}'),
        (
            ' { "model" : "m" , "type" : "response.create" , "x" : [1, 2.50] } ',
            ' { "stream":true,"model" : "m" , "x" : [1, 2.50] } ',
        ),
        ('{"type":"response.create"}', '{"stream":true}'),
        (
            '{"type":"response.create","stream":true,"stream_id":"a","generate":true}',
            '{"stream":true}',
        ),
        (
            '{"stream" : false ,"type":"response.create","stream_id":null,"generate":null,"a":1}',
            '{"stream":true,"a":1}',
        ),
        (
            (
                '{"input":[{"type":"response.create","stream_id":"b","generate":false}],'
                '"type":"response.create","stream_id":"b"}'
            ),
            '{"stream":true,"input":[{"type":"response.create","stream_id":"b","generate":false}]}',
        ),
        (
            '{"text":"\\"type\\":\\"response.create\\"","\\u0074ype":"response.create"}',
            '{"stream":true,"text":"\\"type\\":\\"response.create\\""}',
        ),
        (
            '{"type":"response.create","background":false,"unknown":{"b":1e400}}',
            '{"stream":true,"background":false,"unknown":{"b":1e400}}',
        ),
    ],
)
def test_a_body_goes_on_as_it_came_without_what_belongs_to_the_frame(
    frame: str, body: str
) -> None:
    command = created(frame)

    assert command.body.data.decode() == body
    assert command.body.streamed
    assert command.generate


def test_what_the_frame_says_of_the_response_is_read() -> None:
    command = created(
        '{"type":"response.create","stream_id":"A-z_0.9","generate":false,"store":false,'
        '"previous_response_id":"resp_1","model":"m"}'
    )

    assert (command.lane, command.generate) == ("A-z_0.9", False)
    body = command.body
    assert (body.model, body.stored, body.previous_response_id) == ("m", False, "resp_1")


@pytest.mark.parametrize(
    ("frame", "param"),
    [
        ('{"type":"response.create","generate":0,"stream_id":"a"}', "generate"),
        ('{"type":"response.create","background":true,"stream_id":"a"}', "background"),
        ('{"type":"response.create","model":7,"stream_id":"a"}', "model"),
        ('{"type":"response.create","type":"response.create","stream_id":"a"}', "type"),
        ('{"type":"response.create","stream_id":"a","stream_id":"a"}', "stream_id"),
    ],
)
def test_a_response_that_cannot_be_made_is_refused_in_its_lane(frame: str, param: str) -> None:
    command = parse(frame.encode())

    assert isinstance(command, Refused)
    assert command.lane == "a"
    assert isinstance(command.error, InvalidRequest)
    assert command.error.param == param


@pytest.mark.parametrize(
    ("frame", "code", "param"),
    [
        (b"{", "invalid_json", None),
        (b"[]", "invalid_request", None),
        (b'"response.create"', "invalid_request", None),
        (b"{}", "invalid_request", "type"),
        (b'{"type":["response.create"]}', "invalid_request", "type"),
        (b'{"type":"response.createx"}', "invalid_request", "type"),
        (b'{"type":"response.create","x":"\xff"}', "invalid_json", None),
        (b'{"type":"response.resume"}', "invalid_request", "response_id"),
        (b'{"type":"response.resume","response_id":7}', "invalid_request", "response_id"),
        (b'{"type":"response.cancel","response_id":""}', "invalid_request", "response_id"),
        *(
            (
                b'{"type":"response.resume","response_id":"r","starting_after":%b}' % number,
                "invalid_request",
                "starting_after",
            )
            for number in (b"-2", b"1.5", b'"1"', b"1" + 30 * b"0", b"[]")
        ),
        *(
            (
                b'{"type":"response.create","stream_id":%b}' % name,
                "invalid_stream_id",
                "stream_id",
            )
            for name in (b'""', b'"a b"', b'"\\u00e4"', b"7", b'"%b"' % (257 * b"x"), b'"a\\n"')
        ),
    ],
)
def test_a_bad_frame_says_what_is_wrong(frame: bytes, code: str, param: str | None) -> None:
    error = bad(frame).error

    assert (error.code, error.param) == (code, param)


def test_the_other_commands() -> None:
    assert parse(b'{"type":"response.cancel","stream_id":"a"}') == Cancel("a", None)
    assert parse(b'{"type":"response.cancel","response_id":"r"}') == Cancel(None, "r")
    assert parse(b'{"type":"response.resume","response_id":"r"}') == Resume(None, "r", None)
    assert parse(
        b'{"type":"response.resume","response_id":"r","starting_after":0,"stream_id":"a"}'
    ) == Resume("a", "r", 0)
    assert parse(b'{"type":"response.processed","response_id":"r","more":1}') == Processed()
    steer = parse(b'{"type":"response.steer","previous_response_id":"r","input":[{"a":1}]}')
    assert steer == Steer("r", b'[{"a":1}]')


def test_a_lone_surrogate_becomes_a_replacement_character() -> None:
    assert created('{"type":"response.create","input":"\\ud83d"}').body.data == (
        b'{"stream":true,"input":"\\ufffd"}'
    )


def test_a_large_frame_is_read_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "LARGE_BYTES", 64)
    text = 300 * "ä".encode()
    frame = b'{"type":"response.create","stream_id":"a","input":"%b"}' % text

    pauses = [*response_frames.parsing(frame).__await__()]
    command = parse(frame)

    assert len(pauses) > 3
    assert isinstance(command, Create)
    assert command.body.data == b'{"stream":true,"input":"%b"}' % text


# What clients get.


@pytest.mark.parametrize(
    ("event", "frame"),
    [
        (b'{"type":"a"}', b'{"type":"a","stream_id":"l.1"}'),
        (b"{}", b'{"stream_id":"l.1"}'),
        (b"{ } ", b'{"stream_id":"l.1"}'),
        (b'{"a":{"b":"}"} } ', b'{"a":{"b":"}"},"stream_id":"l.1"}'),
    ],
)
def test_an_event_gets_the_name_of_its_lane_at_its_end(event: bytes, frame: bytes) -> None:
    assert response_frames.in_lane(event, "l.1") == frame


def test_an_error_has_its_status_and_the_headers_of_an_answer_over_http() -> None:
    frame = json.loads(response_frames.error(ProviderRateLimited("slow", retry_after=1.5), "a"))

    headers = {"retry-after": "2", "retry-after-ms": "1500"}
    assert frame == {
        "type": "error",
        "status": 429,
        "stream_id": "a",
        "error": {
            "type": "rate_limit_error",
            "code": "provider_rate_limited",
            "message": "slow",
            "param": None,
            "headers": headers,
        },
        "headers": headers,
    }


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        (
            (
                b'{"error":{"message":"gone","type":"invalid_request_error",'
                b'"param":"previous_response_id","code":"previous_response_not_found"}}'
            ),
            (
                "gone",
                "invalid_request_error",
                "previous_response_id",
                "previous_response_not_found",
            ),
        ),
        # A number, as vLLM sends it, is no code to clients in typed languages.
        (
            b'{"error":{"message":"no","type":"BadRequestError","param":null,"code":400}}',
            ("no", "BadRequestError", None, "400"),
        ),
        (b'{"error":{"message":null}}', ("ours", "invalid_request_error", None, None)),
        (b'{"detail":"no"}', ("ours", "invalid_request_error", None, "provider_error")),
        (b"<html>", ("ours", "invalid_request_error", None, "provider_error")),
    ],
)
def test_a_refusal_of_the_provider_is_shown_in_its_own_words(
    body: bytes, shown: tuple[str | None, ...]
) -> None:
    frame = json.loads(response_frames.error(ProviderRefused("ours", 400, body), None))

    error = frame["error"]
    assert tuple(error[name] for name in ("message", "type", "param", "code")) == shown
    assert "stream_id" not in frame


def test_a_full_server_says_when_to_come_back() -> None:
    frame = json.loads(response_frames.error(ServerAtCapacity("full", retry_after=7.0), None))

    assert (frame["status"], frame["error"]["headers"]) == (503, {"retry-after": "7"})


def test_a_prepared_response_repeats_what_is_short() -> None:
    instructions = "x" * MAX_ECHO_BYTES
    command = created(
        '{"type":"response.create","generate":false,"tools":[{"type":"function","n":1.50}],'
        f'"instructions":"{instructions}","previous_response_id":"r0","store":false}}'
    )

    made = response_frames.prepared(command, "resp_1", "m", 1_700_000_000)
    events: list[Any] = [orjson.loads(event) for event, _ in made]
    assert [event["response"] for event in events] == [orjson.loads(own) for _, own in made]

    assert [event["type"] for event in events] == [
        "response.created",
        "response.in_progress",
        "response.completed",
    ]
    assert [event["sequence_number"] for event in events] == [0, 1, 2]
    last = events[-1]["response"]
    assert (last["id"], last["status"], last["model"], last["output"]) == (
        "resp_1",
        "completed",
        "m",
        [],
    )
    assert (last["tools"], last["instructions"]) == ([{"type": "function", "n": 1.5}], None)
    assert (last["previous_response_id"], last["store"]) == ("r0", False)


@pytest.mark.parametrize(
    ("members", "previous", "given"),
    [
        ({}, "", ""),
        ({"previous_response_id": None, "input": None}, "", None),
        ({"previous_response_id": "r", "input": 7}, "r", 7),
        ({"previous_response_id": "r", "input": "x" * 10_000}, "r", ""),
        ({"previous_response_id": "r", "stream_id": "no lane!"}, "r", ""),
    ],
    ids=lambda value: str(value)[:40],
)
def test_steering_is_refused_whatever_the_frame_has(
    members: dict[str, Any], previous: str, given: object
) -> None:
    command = parse(json.dumps({"type": "response.steer", **members}).encode())
    assert isinstance(command, Steer)

    frame = json.loads(response_frames.not_steered(command))

    assert frame["steer"] == {"previous_response_id": previous, "input": given}
    assert frame["error"].keys() == {"type", "code", "message"}
    assert frame["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "previous", [7, True, ["r"], {"id": "r"}, "r" * 5000], ids=lambda value: str(value)[:9]
)
def test_steering_by_what_is_no_id_is_an_error(previous: object) -> None:
    frame = {"type": "response.steer", "previous_response_id": previous, "input": "Shorter!"}
    with pytest.raises(BadFrame) as refused:
        parse(json.dumps(frame).encode())

    assert refused.value.error.param == "previous_response_id"


def test_input_that_cannot_steer_is_given_back() -> None:
    command = parse(b'{"type":"response.steer","previous_response_id":"r","input":"Shorter!"}')
    assert isinstance(command, Steer)

    frame = json.loads(response_frames.not_steered(command))

    assert frame["type"] == "response.steer.failed"
    assert frame["steer"] == {"previous_response_id": "r", "input": "Shorter!"}
    assert frame["error"]["code"] == "steering_not_supported"
