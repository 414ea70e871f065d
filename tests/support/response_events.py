"""Checks of the events of a response: they are those of OpenAI's own SDK, and say the same thing
throughout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

import orjson
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel

from aioserver.protocol import eventstream

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# Members that the SDK does not know: those that OpenAI's response objects have too, and the one of a
# fault that is ours.
UNKNOWN = {
    "Response": {"store", "presence_penalty", "frequency_penalty"},
    "ResponseFailedEvent": {"error"},
}
ENDS = {"response.completed", "response.incomplete"}
# For the kind of a text: the event of its pieces, the event of its end, and the member that has
# all of it there.
TEXTS = {
    "response.output_text": "text",
    "response.refusal": "refusal",
    "response.reasoning_text": "text",
    "response.function_call_arguments": "arguments",
    "response.custom_tool_call_input": "input",
}
_EVENTS: dict[str, type[BaseModel]] = {
    get_args(event.model_fields["type"].annotation)[0]: event
    for event in get_args(get_args(ResponseStreamEvent)[0])
}


def read_events(body: bytes) -> list[dict[str, Any]]:
    """The events of a response in *body*, each of them checked alone."""
    events = []
    for event in eventstream.parse(body):
        content = orjson.loads(event.data)
        assert event.event.decode() == content["type"]
        check_shape(_EVENTS[content["type"]], content)
        events.append(content)
    return events


def check_response(response: Mapping[str, Any]) -> None:
    """Check a response object alone."""
    check_shape(Response, response)


def check_shape(model: type[BaseModel], content: Mapping[str, Any]) -> None:
    """Check that *content* is a *model* of the SDK: every member known, and of its type to the
    letter.
    """
    _check_known(model.model_validate(content, strict=True), model.__name__)


def _check_known(value: object, path: str) -> None:
    if isinstance(value, BaseModel):
        more = set(value.model_extra or {})
        assert more <= UNKNOWN.get(type(value).__name__, set()), f"{path} has {more}"
        for name in value.model_fields_set - set(value.model_extra or {}):
            _check_known(getattr(value, name), f"{path}.{name}")
    elif isinstance(value, list):
        for number, element in enumerate(value):
            _check_known(element, f"{path}[{number}]")


def check_run(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Check what the events of a response that has ended well say together; returns the
    response.
    """
    numbers = [event["sequence_number"] for event in events]
    assert numbers == list(range(len(events)))
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] in ENDS
    assert not ENDS.intersection(kinds[:-1])
    responses = [event["response"] for event in events if "response" in event]
    assert len({response["id"] for response in responses}) == 1
    last: dict[str, Any] = responses[-1]
    assert last["status"] == kinds[-1].removeprefix("response.")
    assert last["usage"]["total_tokens"] > 0

    added = [event for event in events if event["type"] == "response.output_item.added"]
    assert [event["output_index"] for event in added] == list(range(len(added)))
    ids = [event["item"]["id"] for event in added]
    assert len(set(ids)) == len(ids)
    done: dict[int, Any] = {}
    for event in events:
        if event["type"] == "response.output_item.done":
            assert event["output_index"] not in done
            done[event["output_index"]] = event["item"]
        elif "item_id" in event:
            assert event["item_id"] == ids[event["output_index"]]
            assert event["output_index"] not in done, "an event after the end of its item"
    assert [done[index] for index in sorted(done)] == last["output"]
    assert [item["id"] for item in last["output"]] == ids
    for kind, member in TEXTS.items():
        _check_texts(events, kind, member)
    return last


def _check_texts(events: Sequence[dict[str, Any]], kind: str, member: str) -> None:
    texts: dict[tuple[str, int], str] = {}
    ended = set()
    for event in events:
        if event["type"] in {f"{kind}.delta", f"{kind}.done"}:
            place = (event["item_id"], event.get("content_index", 0))
            assert place not in ended
            if event["type"].endswith(".delta"):
                texts[place] = texts.get(place, "") + event["delta"]
            else:
                ended.add(place)
                assert event[member] == texts.get(place, "")
    assert set(texts) <= ended
