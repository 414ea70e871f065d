"""The request for a response as one for a chat completion."""

from __future__ import annotations

import tracemalloc
from typing import Any

import orjson
import pytest
from openai.types.chat.completion_create_params import (
    CompletionCreateParamsBase,
    CompletionCreateParamsStreaming,
)
from pydantic import TypeAdapter

from aioserver.errors import InvalidRequest, ResponseNotFound
from aioserver.protocol.steps import at_once
from aioserver.wings.responses.bridge.output import MAX_REPEATED_BYTES
from aioserver.wings.responses.bridge.request import ChatRequest, chat_request

_PARAMS: TypeAdapter[Any] = TypeAdapter(CompletionCreateParamsStreaming)
WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "description": "Tells the weather.",
    "parameters": {"type": "object"},
    "strict": True,
}
USER = {"role": "user", "content": "Hello"}


def request_of(**fields: Any) -> ChatRequest:
    body = {"model": "m", "input": "Hello", **fields}
    return at_once(chat_request(orjson.dumps(body), reasoning_field="reasoning"))


def chat_of(**fields: Any) -> dict[str, Any]:
    """The chat completion that is asked for, of which the SDK knows every field."""
    chat: dict[str, Any] = orjson.loads(request_of(**fields).body)
    _PARAMS.validate_python({**chat, "stream": True})
    assert set(chat) <= {*CompletionCreateParamsBase.__annotations__, "stream"}
    return chat


def messages_of(*items: Any, **fields: Any) -> list[Any]:
    messages: list[Any] = chat_of(input=list(items), **fields)["messages"]
    return messages


def repeated(**fields: Any) -> dict[str, Any]:
    shown: dict[str, Any] = orjson.loads(b"{%b}" % request_of(**fields).repeated)
    return shown


def called(name: str, call_id: str, arguments: str = "{}", **more: Any) -> dict[str, Any]:
    return {
        "type": "function_call",
        "call_id": call_id,
        "name": name,
        "arguments": arguments,
        **more,
    }


def output(call_id: str, text: Any = "ok", kind: str = "function") -> dict[str, Any]:
    return {"type": f"{kind}_call_output", "call_id": call_id, "output": text}


def test_a_plain_request_has_no_more_than_it_must_have() -> None:
    assert chat_of() == {"model": "m", "messages": [USER]}
    assert chat_of(stream=True, store=True, metadata={"a": "b"}, prompt_cache_key="k") == {
        "model": "m",
        "messages": [USER],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_every_option_has_its_name_in_chat_completions() -> None:
    chat = chat_of(
        temperature=0.5,
        top_p=0.9,
        max_output_tokens=7,
        reasoning={"effort": "low", "summary": "auto"},
        text={"verbosity": "low", "format": {"type": "json_object"}},
        top_logprobs=2,
        include=["message.output_text.logprobs", "reasoning.encrypted_content"],
        safety_identifier="u1",
        service_tier="flex",
        parallel_tool_calls=False,
        tools=[WEATHER],
        truncation="auto",
    )

    assert chat == {
        "model": "m",
        "messages": [USER],
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 7,
        "reasoning_effort": "low",
        "verbosity": "low",
        "response_format": {"type": "json_object"},
        "logprobs": True,
        "top_logprobs": 2,
        "user": "u1",
        "service_tier": "flex",
        "parallel_tool_calls": False,
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "weather",
                    "description": "Tells the weather.",
                    "parameters": {"type": "object"},
                    "strict": True,
                },
            }
        ],
    }
    assert chat_of(user="u", safety_identifier="s")["user"] == "u"


def test_a_schema_goes_one_level_deeper() -> None:
    form = {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}

    chat = chat_of(text={"format": form})

    schema = {"name": "n", "schema": {"type": "object"}, "strict": True}
    assert chat["response_format"] == {"type": "json_schema", "json_schema": schema}
    assert repeated(text={"format": form})["text"] == {"format": form}
    assert repeated(text={"verbosity": "low"})["text"] == {
        "format": {"type": "text"},
        "verbosity": "low",
    }


def test_instructions_and_the_first_system_messages_are_one() -> None:
    messages = messages_of(
        {"role": "developer", "content": [{"type": "input_text", "text": 'b"ü'}]},
        {"type": "message", "role": "system", "content": "c"},
        USER,
        instructions="a",
    )

    assert messages == [{"role": "system", "content": 'a\n\nb"ü\n\nc'}, USER]


def test_a_later_system_message_is_a_text_of_the_user_in_its_place() -> None:
    """Templates of many models refuse a second system message, and one that is not in front."""
    later = [
        {"role": role, "content": text} for role, text in (("system", 'a"'), ("developer", "b"))
    ]
    reminders = [f"<system-reminder>\n{text}\n</system-reminder>" for text in ('a"', "b")]
    empty = {"role": "system", "content": ""}
    asked = [called("f", "c1"), called("f", "c2"), output("c1"), later[0], output("c2")]

    said = [USER, later[0], empty, USER, {"role": "assistant", "content": "c"}, later[1]]
    messages = messages_of(*said, instructions="i")
    behind_calls = messages_of(USER, *asked, later[1])

    assert messages == [
        {"role": "system", "content": "i"},
        {"role": "user", "content": "\n\n".join((USER["content"], reminders[0], USER["content"]))},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": reminders[1]},
    ]
    assert [message["role"] for message in behind_calls] == [
        *("user", "assistant", "tool", "tool", "user")
    ]
    assert behind_calls[-1]["content"] == "\n\n".join(reminders)
    # What was translated is a prefix of what is translated later.
    assert messages_of(*said[:5], instructions="i") == messages[:3]


def test_what_the_assistant_did_at_once_is_one_message() -> None:
    messages = messages_of(
        USER,
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "Hm"}],
        },
        {
            "type": "message",
            "role": "assistant",
            "id": "msg_1",
            "status": "completed",
            "content": [
                {"type": "output_text", "text": "a", "annotations": []},
                {"type": "refusal", "refusal": "b"},
            ],
        },
        called("f", "c1"),
        called("f", "c2"),
        output("c1", "one"),
        output("c2", [{"type": "input_text", "text": "two"}]),
        {"role": "assistant", "content": "Done"},
        {"type": "reasoning", "id": "rs_2", "summary": [], "encrypted_content": "xyz"},
        USER,
    )

    function = {"name": "f", "arguments": "{}"}
    assert messages == [
        USER,
        {
            "role": "assistant",
            "content": "a\nb",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": function},
                {"id": "c2", "type": "function", "function": function},
            ],
            "reasoning": "Hm",
        },
        {"role": "tool", "tool_call_id": "c1", "content": "one"},
        {"role": "tool", "tool_call_id": "c2", "content": "two"},
        {"role": "assistant", "content": "Done"},
        USER,
    ]


def test_what_comes_between_a_call_and_its_output_stays_with_the_call() -> None:
    thought = {
        "type": "reasoning",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": "Hm"}],
    }

    messages = messages_of(
        thought,
        called("f", "c1"),
        thought,
        called("f", "c2"),
        {"role": "assistant", "content": "Both."},
        output("c1"),
        output("c2"),
        thought,
        {"role": "assistant", "content": "Done."},
        {"role": "assistant", "content": "Really."},
    )

    assert [message["role"] for message in messages] == [
        *("assistant", "tool", "tool", "assistant")
    ]
    assert (messages[0]["reasoning"], messages[0]["content"]) == ("Hm\nHm", "Both.")
    assert len(messages[0]["tool_calls"]) == 2
    assert (messages[3]["reasoning"], messages[3]["content"]) == ("Hm", "Done.\n\nReally.")


def test_pictures_and_files_have_their_form() -> None:
    picture = {
        "type": "input_image",
        "image_url": "data:image/png;base64,AA==",
        "detail": "original",
    }
    file = {"type": "input_file", "filename": "a.pdf", "file_data": "data:application/pdf,x"}
    text = {"type": "input_text", "text": "Look"}
    shown = {
        "type": "image_url",
        "image_url": {"url": "data:image/png;base64,AA==", "detail": "high"},
    }

    messages = messages_of(
        {"role": "user", "content": [text, picture, file]},
        called("view", "c1"),
        output("c1", [picture]),
    )

    assert messages[0]["content"] == [
        {"type": "text", "text": "Look"},
        shown,
        {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf,x"}},
    ]
    assert messages[2]["content"]
    assert messages[3] == {"role": "user", "content": [shown]}


CUSTOM: Any = {
    "type": "custom",
    "name": "apply_patch",
    "description": "Edits.",
    "format": {"type": "grammar", "syntax": "lark", "definition": 'start: "a"\n'},
}
NAMESPACE: Any = {
    "type": "namespace",
    "name": "agents",
    "description": "Agents.",
    "tools": [{**WEATHER, "name": "wait"}, {**WEATHER, "name": "x" * 70}],
}


def test_custom_tools_and_namespaces_are_functions() -> None:
    chat = chat_of(
        tools=[CUSTOM, NAMESPACE], tool_choice={"type": "custom", "name": "apply_patch"}
    )

    custom, wait, long = (tool["function"] for tool in chat["tools"])
    assert custom["parameters"]["required"] == ["input"]
    assert 'start: "a"' in custom["parameters"]["properties"]["input"]["description"]
    assert wait["name"] == "agents__wait"
    assert len(long["name"]) == 64
    assert chat["tool_choice"] == {"type": "function", "function": {"name": "apply_patch"}}
    messages = messages_of(
        called("wait", "c1", namespace="agents"),
        output("c1"),
        {"type": "custom_tool_call", "call_id": "c2", "name": "apply_patch", "input": 'a"b\n'},
        output("c2", kind="custom_tool"),
        tools=[CUSTOM, NAMESPACE],
    )
    assert messages[0]["tool_calls"][0]["function"]["name"] == "agents__wait"
    arguments = messages[2]["tool_calls"][0]["function"]["arguments"]
    assert orjson.loads(arguments) == {"input": 'a"b\n'}


def test_names_that_would_be_the_same_are_kept_apart() -> None:
    both = [WEATHER, {"type": "custom", "name": "weather"}]

    request = request_of(tools=both)

    assert len(request.tools.functions) == 2
    assert {tool.kind for tool in request.tools.declared.values()} == {"function", "custom"}


def test_a_choice_among_tools_leaves_the_others_out() -> None:
    other = {**WEATHER, "name": "other"}
    allowed = {
        "type": "allowed_tools",
        "mode": "required",
        "tools": [{"type": "function", "name": "other"}],
    }

    chat = chat_of(tools=[WEATHER, other], tool_choice=allowed)

    assert [tool["function"]["name"] for tool in chat["tools"]] == ["other"]
    assert chat["tool_choice"] == "required"
    assert repeated(tools=[WEATHER, other], tool_choice=allowed)["tool_choice"] == allowed


def test_a_web_search_that_may_not_search_is_left_out() -> None:
    cached = {"type": "web_search", "external_web_access": False}

    assert "tools" not in chat_of(tools=[cached], tool_choice="auto")
    assert len(chat_of(tools=[cached, WEATHER], tool_choice="auto")["tools"]) == 1
    assert repeated(tools=[cached, WEATHER])["tools"] == [WEATHER]
    with pytest.raises(InvalidRequest) as caught:
        chat_of(tools=[cached], tool_choice="required")
    assert caught.value.param == "tool_choice"


def test_the_response_repeats_the_request() -> None:
    shown = repeated(instructions="a", store=False, temperature=0.5, tools=[WEATHER])

    assert (shown["instructions"], shown["store"], shown["temperature"]) == ("a", False, 0.5)
    assert shown["tools"] == [WEATHER]
    assert repeated()["store"] is True
    long = repeated(instructions="x" * MAX_REPEATED_BYTES, tools=[WEATHER])
    assert (long["instructions"], long["tools"]) == (None, [])


BAD: dict[str, tuple[Any, str | None]] = {
    "no input": ({"input": None}, "input"),
    "an empty input": ({"input": []}, "input"),
    "an input that is a number": ({"input": 5}, "input"),
    "an item that is a number": ({"input": [5]}, "input[0]"),
    "an item without a role": ({"input": [{"content": "x"}]}, "input[0].role"),
    "a content that is a number": (
        {"input": [{"role": "user", "content": 5}]},
        "input[0].content",
    ),
    "a part of no type": (
        {"input": [{"role": "user", "content": [{"text": "x"}]}]},
        "input[0].content[0]",
    ),
    "a part of another type": (
        {"input": [USER, {"role": "user", "content": [{"type": "input_video"}]}]},
        "input[1].content[0]",
    ),
    "a picture of the account": (
        {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]},
        "input[0].content[0]",
    ),
    "a picture in a system message": (
        {"input": [{"role": "system", "content": [{"type": "input_image", "image_url": "u"}]}]},
        "input[0].content",
    ),
    "a call without a name": (
        {"input": [{"type": "function_call", "call_id": "c", "arguments": ""}]},
        "input[0]",
    ),
    "arguments that are an object": (
        {"input": [called("f", "c", {})]},  # type: ignore[arg-type]
        "input[0].arguments",
    ),
    "an output without its call": (
        {"input": [{"type": "function_call_output", "output": "x"}]},
        "input[0].call_id",
    ),
    "a compaction": ({"input": [{"type": "compaction", "id": "x"}]}, "input[0].type"),
    "a conversation of the account": ({"conversation": "conv_1"}, "conversation"),
    "a prompt of the account": ({"prompt": {"id": "pmpt_1"}}, "prompt"),
    "a computer": ({"tool_choice": {"type": "computer_use_preview"}}, "tool_choice"),
    "a local shell": ({"tools": [{"type": "local_shell"}]}, "tools[0].type"),
    "a tool that is a number": ({"tools": [5]}, "tools[0]"),
    "tools that are an object": ({"tools": {}}, "tools"),
    "a tool without a name": ({"tools": [{"type": "function"}]}, "tools[0].name"),
    "a hosted tool in a namespace": (
        {"tools": [{"type": "namespace", "name": "n", "tools": [{"type": "mcp"}]}]},
        "tools[0].tools[0].type",
    ),
    "a namespace in a namespace": (
        {"tools": [{"type": "namespace", "name": "n", "tools": [NAMESPACE]}]},
        "tools[0].tools[0].type",
    ),
    "the choice of another tool": (
        {"tools": [WEATHER], "tool_choice": {"type": "function", "name": "f"}},
        "tool_choice",
    ),
    "a choice that is a number": ({"tool_choice": 5}, "tool_choice"),
    "another format": ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    "a schema without a name": (
        {"text": {"format": {"type": "json_schema", "schema": {}}}},
        "text.format.name",
    ),
    "instructions that are a list": ({"instructions": []}, "instructions"),
    "metadata that is a list": ({"metadata": []}, "metadata"),
    "many parts": (
        {"input": [{"role": "user", "content": 5000 * [{"type": "input_text", "text": "x"}]}]},
        "input[0].content",
    ),
    "many tools": ({"tools": 5000 * [WEATHER]}, "tools"),
    "much metadata": ({"metadata": {"a": "x" * 3 * MAX_REPEATED_BYTES}}, None),
    "a model that is a number": ({"model": 5}, "model"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_request_is_refused_by_its_name(name: str) -> None:
    fields, param = BAD[name]

    with pytest.raises(InvalidRequest) as caught:
        request_of(**fields)

    assert caught.value.param == param


def test_a_response_that_is_not_known_cannot_be_continued() -> None:
    with pytest.raises(ResponseNotFound):
        request_of(previous_response_id="resp_1")


@pytest.mark.parametrize("element", [b"{}", b"1", b'{"type":"input_text","text":""}'])
@pytest.mark.parametrize("place", ["items", "parts", "tools"])
def test_no_body_costs_ten_times_its_bytes(element: bytes, place: str) -> None:
    many = b",".join([element] * (600_000 // len(element)))
    body = {
        "items": b'{"model":"m","input":[%b]}',
        "parts": b'{"model":"m","input":[{"role":"user","content":[%b]}]}',
        "tools": b'{"model":"m","input":"x","tools":[%b]}',
    }[place] % many
    steps = chat_request(body).__await__()

    tracemalloc.start()
    try:
        for _ in range(10_000):
            next(steps)
    except (StopIteration, InvalidRequest):
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()

    assert peak < 9 * len(body)


PICTURE = {"type": "input_image", "image_url": "data:image/png;base64,AA=="}
SHOWN = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}


def test_what_the_user_says_in_a_row_is_one_message() -> None:
    """Templates of many models want roles that alternate, and Codex begins with two of the user."""
    said = [{"role": "user", "content": text} for text in ("one", "two")]
    texts = {"role": "user", "content": [{"type": "input_text", "text": "three"}]}
    picture = {"role": "user", "content": [{"type": "input_text", "text": "four"}, PICTURE]}

    assert messages_of(*said, texts) == [{"role": "user", "content": "one\n\ntwo\n\nthree"}]
    assert messages_of(said[0], picture, said[1]) == [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "one\n\nfour"},
                SHOWN,
                {"type": "text", "text": "two"},
            ],
        }
    ]
