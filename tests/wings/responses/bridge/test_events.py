"""The events of a response, written from the chunks of a chat completion."""

from __future__ import annotations

import random
from typing import Any

import orjson
import pytest

from aioserver.protocol.openai import BadEvent
from aioserver.protocol.steps import at_once
from aioserver.wings.responses.bridge.events import ResponseWriter
from aioserver.wings.responses.bridge.output import Frame
from aioserver.wings.responses.bridge.request import chat_request
from tests.support.response_events import check_run, read_events
from tests.support.tool_calls import CALLS, call

NOW = 1_764_000_000
ASKED: dict[str, Any] = {"model": "m", "input": "Hello", "stream": True}
PATCH: Any = {"type": "custom", "name": "apply_patch", "description": "Edits files."}
AGENT: Any = {"type": "function", "name": "wait", "parameters": {"type": "object"}}
SHELL: Any = {"type": "namespace", "name": "agents", "description": "Agents.", "tools": [AGENT]}


def new_writer(max_bytes: int = 1 << 20, **asked: Any) -> ResponseWriter:
    request = at_once(chat_request(orjson.dumps(ASKED | asked)))
    return ResponseWriter(request, Frame("resp_1", NOW, "m", request.repeated), max_bytes)


def delta(finish: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"index": 0, "delta": fields, "finish_reason": finish}


def written(*choices: dict[str, Any], usage: Any = None, **asked: Any) -> list[dict[str, Any]]:
    """The events for chunks with these *choices*, one in each, and a last one with the *usage*."""
    writer = new_writer(**asked)
    chunks = [{"id": "c", "model": "m-1", "choices": [choice]} for choice in choices]
    chunks.append({"choices": [], "usage": usage})
    data = [orjson.dumps(chunk) for chunk in chunks]
    writer.note_model(data[0])
    events = writer.begin()
    for chunk in data:
        events += writer.read(chunk)
    events += writer.finish(NOW)
    return read_events(b"".join(events))


def kinds(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


def test_a_text_is_a_message() -> None:
    usage = {
        "prompt_tokens": 5,
        "completion_tokens": 7,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 3},
        "completion_tokens_details": {"reasoning_tokens": 2},
    }

    events = written(
        delta(role="assistant", content=""),
        delta(content='He"l'),
        delta(content="lö\n"),
        delta("stop"),
        usage=usage,
    )
    response = check_run(events)

    assert kinds(events) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert response["output"][0]["content"][0]["text"] == 'He"llö\n'
    assert response["model"] == "m-1"
    assert response["completed_at"] == NOW
    assert response["usage"] == {
        "input_tokens": 5,
        "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 0},
        "output_tokens": 7,
        "output_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": 12,
    }


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_reasoning_is_an_item_before_the_message(field: str) -> None:
    events = written(
        delta(**{field: "Hm"}), delta(**{field: "m."}), delta(content="Yes"), delta("stop")
    )
    response = check_run(events)

    thought, message = response["output"]
    assert thought["content"] == [{"type": "reasoning_text", "text": "Hmm."}]
    assert (thought["summary"], thought["status"]) == ([], "completed")
    assert message["content"][0]["text"] == "Yes"
    places = {kind: number for number, kind in enumerate(kinds(events))}
    assert places["reasoning_text.done"] < places["output_text.delta"]


def test_thoughts_that_are_parts_of_the_content_are_reasoning() -> None:
    thought = {"type": "thinking", "thinking": [{"type": "text", "text": "Hm"}, {"text": 5}, 5]}
    text = {"type": "text", "text": "Yes"}

    response = check_run(written(delta(content=[thought, 5, text, {"type": "x"}]), delta("stop")))

    assert [item["content"][0]["text"] for item in response["output"]] == ["Hm", "Yes"]


def test_reasoning_after_a_text_is_an_item_of_its_own() -> None:
    response = check_run(
        written(
            delta(reasoning="a"),
            delta(content="b"),
            delta(reasoning="c"),
            delta(content="d"),
            delta("stop"),
        )
    )

    assert [item["type"] for item in response["output"]] == ["reasoning", "message"] * 2


def test_a_refusal_is_a_part_of_the_message() -> None:
    response = check_run(written(delta(content="I "), delta(refusal="cannot."), delta("stop")))

    text, refusal = response["output"][0]["content"]
    assert (text["text"], refusal) == ("I ", {"type": "refusal", "refusal": "cannot."})


def test_two_calls_of_one_chunk_are_two_items_though_they_have_one_id() -> None:
    both = [call(None, id="f:0", name="f", arguments=text)["tool_calls"][0] for text in "12"]

    response = check_run(written(delta(tool_calls=both), delta("tool_calls")))

    assert [item["arguments"] for item in response["output"]] == ["1", "2"]


@pytest.mark.parametrize("name", CALLS)
def test_two_calls_are_two_items(name: str) -> None:
    deltas = CALLS[name]

    events = written(
        delta(content="Well"), *(delta(**fields) for fields in deltas), delta("tool_calls")
    )
    response = check_run(events)

    message, *calls = response["output"]
    assert message["content"][0]["text"] == "Well"
    assert [(item["call_id"], item["name"], item["arguments"]) for item in calls] == [
        ("c0", "f", '{"a":1}'),
        ("c1", "g", '{"b":2}'),
    ]
    assert response["status"] == "completed"


def test_a_call_without_arguments_and_without_an_id_has_both() -> None:
    response = check_run(written(delta(**call(0, name="f")), delta("tool_calls")))

    [item] = response["output"]
    assert item["arguments"] == "{}"
    assert item["call_id"].startswith("call_")


def test_the_form_of_calls_before_there_were_tools_is_read() -> None:
    events = written(
        delta(function_call={"name": "f", "arguments": '{"a"'}),
        delta(function_call={"arguments": ":1}"}),
        delta("function_call"),
    )

    assert check_run(events)["output"][0]["arguments"] == '{"a":1}'


def test_a_call_without_a_name_is_a_fault() -> None:
    with pytest.raises(BadEvent, match="without a name"):
        written(delta(**call(0, arguments="{}")), delta("tool_calls"))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ('{"input":"*** Begin Patch\\n\\u00fc"}', "*** Begin Patch\nü"),
        ("*** Begin Patch", "*** Begin Patch"),
        ('{"patch":"x"}', '{"patch":"x"}'),
        ('{"input":{"a":1}}', '{"input":{"a":1}}'),
    ],
)
def test_a_call_of_a_custom_tool_has_its_input(arguments: str, text: str) -> None:
    pieces = [arguments[:9], arguments[9:]]
    events = written(
        delta(**call(0, id="c0", name="apply_patch")),
        *(delta(**call(0, arguments=piece)) for piece in pieces),
        delta("tool_calls"),
        tools=[PATCH],
    )
    response = check_run(events)

    [item] = response["output"]
    assert (item["type"], item["name"], item["input"]) == ("custom_tool_call", "apply_patch", text)
    assert response["tools"] == [PATCH]


def test_a_call_of_a_tool_in_a_namespace_has_its_own_name() -> None:
    events = written(
        delta(**call(0, id="c0", name="agents__wait", arguments="{}")),
        delta("tool_calls"),
        tools=[SHELL],
    )

    [item] = check_run(events)["output"]
    assert (item["namespace"], item["name"]) == ("agents", "wait")


@pytest.mark.parametrize(
    ("finish", "reason"), [("length", "max_output_tokens"), ("content_filter", "content_filter")]
)
def test_an_answer_that_was_cut_is_incomplete(finish: str, reason: str) -> None:
    response = check_run(
        written(delta(**call(0, id="c", name="f", arguments='{"a')), delta(finish))
    )

    assert response["incomplete_details"] == {"reason": reason}
    assert (response["status"], response["completed_at"]) == ("incomplete", None)
    assert response["output"][0]["status"] == "incomplete"
    assert response["output"][0]["arguments"] == '{"a'


def test_only_the_newest_item_can_have_been_cut() -> None:
    response = check_run(
        written(
            delta(**call(0, id="c", name="f", arguments="{}")),
            delta(**call(1, id="d", name="f", arguments="{")),
            delta("length"),
        )
    )

    assert [item["status"] for item in response["output"]] == ["completed", "incomplete"]


def test_an_answer_without_anything_has_an_empty_message() -> None:
    response = check_run(written(delta("stop")))

    assert response["output"][0]["content"][0]["text"] == ""


def test_a_provider_that_reports_no_usage_gets_an_estimate() -> None:
    usage = check_run(written(delta(content="x" * 100), delta("stop")))["usage"]

    assert usage["input_tokens"] > 0
    assert usage["output_tokens"] == 25
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]


def test_implausible_usage_and_further_choices_are_ignored() -> None:
    other = {"index": 1, "delta": {"content": "no"}, "finish_reason": "length"}
    usage = {"prompt_tokens": "5", "completion_tokens": -1, "total_tokens": True}

    response = check_run(written(delta(content="yes"), other, delta("stop"), usage=usage))

    assert response["output"][0]["content"][0]["text"] == "yes"
    assert response["status"] == "completed"


def test_halves_of_a_character_are_joined() -> None:
    writer = new_writer()
    chunks = [
        b'{"choices":[{"index":0,"delta":{"content":"a\\ud83d"}}]}',
        b'{"choices":[{"index":0,"delta":{"content":"\\ude00b\\ud83d"},"finish_reason":"stop"}]}',
    ]
    events = writer.begin()
    for chunk in chunks:
        events += writer.read(chunk)
    events += writer.finish(NOW)

    response = check_run(read_events(b"".join(events)))
    assert response["output"][0]["content"][0]["text"] == "a😀b\ufffd"


def test_logprobs_come_with_their_text() -> None:
    token = {"token": "Hi", "logprob": -0.5, "bytes": [72, 105]}
    logprobs = {"content": [{**token, "top_logprobs": [token]}]}
    choice = {**delta(content="Hi"), "logprobs": logprobs}

    events = written(choice, choice, delta("stop"), include=["message.output_text.logprobs"])
    response = check_run(events)

    [part] = response["output"][0]["content"]
    assert part["logprobs"] == 2 * [{**token, "top_logprobs": [token]}]
    plain = {"token": "Hi", "logprob": -0.5}
    done = next(event for event in events if event["type"] == "response.output_text.done")
    assert done["logprobs"] == 2 * [{**plain, "top_logprobs": [plain]}]
    assert "logprobs" not in str(check_run(written(choice, delta("stop")))["output"][0]).replace(
        "'logprobs': []", ""
    )


@pytest.mark.parametrize(
    "fields",
    [{"content": "x" * 3000}, {"reasoning": "x" * 3000}, call(0, name="f", arguments="x" * 3000)],
)
def test_an_answer_has_a_bound(fields: dict[str, Any]) -> None:
    writer = new_writer(max_bytes=100_000)
    chunk = orjson.dumps({"choices": [delta(**fields)]})

    for _ in range(30):
        writer.read(chunk)
    with pytest.raises(BadEvent, match="more than 100000 bytes"):
        [writer.read(chunk) for _ in range(10)]

    assert writer.size <= 100_000 + 3000


def test_a_flood_of_calls_has_a_bound() -> None:
    writer = new_writer(max_bytes=100_000)

    calls = [{"choices": [delta(**call(index, name="f"))]} for index in range(1000)]
    with pytest.raises(BadEvent, match="more than 100000 bytes"):
        [writer.read(orjson.dumps(each)) for each in calls]


def test_any_order_of_any_pieces_gives_a_sound_response() -> None:
    for seed in range(100):
        dice = random.Random(seed)
        pieces = [
            {"content": "text"},
            {"reasoning": "thought"},
            {"refusal": "no"},
            call(dice.randrange(3), id=f"c{dice.randrange(3)}", name="f", arguments="{"),
            call(None, id=f"c{dice.randrange(3)}", name="f", arguments='"a"'),
            call(None, name="apply_patch", arguments=":1"),
            {"content": None, "tool_calls": [None, "x"], "refusal": 5, "reasoning": []},
        ]
        choices = [delta(**dice.choice(pieces)) for _ in range(dice.randrange(1, 12))]
        finish = dice.choice(["stop", "length", "tool_calls", "what?"])
        check_run(written(*choices, delta(finish), tools=[PATCH]))
