"""The body of a request for a message, as one for a chat completion."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from aioserver.errors import InvalidRequest
from aioserver.protocol.bridging.accepted_parameters import AcceptedParameters
from aioserver.protocol.steps import at_once
from aioserver.wings.anthropic.bridge.request import ChatRequest, ThreadContinued, chat_request

ASKED: dict[str, Any] = {"model": "m", "max_tokens": 100}
HELLO: Any = {"role": "user", "content": "Hello"}
TOOL: Any = {"name": "f", "description": "Does it.", "input_schema": {"type": "object"}}
SEARCH: Any = {"type": "web_search_20250305", "name": "web_search"}
PICTURE: Any = {
    "type": "image",
    "source": {"type": "base64", "media_type": "image/png", "data": "QUJD"},
}
SHOWN: Any = {"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD"}}


def text(accepted: str) -> dict[str, Any]:
    return {"type": "text", "text": accepted}


def use(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": name, "name": "f", "input": arguments}


def result(name: str, content: Any = "done", **further: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": name, "content": content, **further}


def request(
    reasoning_field: str = "", accepted: AcceptedParameters | None = None, **asked: Any
) -> ChatRequest:
    accepted = accepted or AcceptedParameters()
    body = orjson.dumps({**ASKED, "messages": [HELLO], **asked})
    return at_once(chat_request(body, reasoning_field=reasoning_field, accepted=accepted))


def sent(**asked: Any) -> dict[str, Any]:
    body: dict[str, Any] = orjson.loads(request(**asked).body)
    return body


def messages(*said: Any, **asked: Any) -> list[dict[str, Any]]:
    written: list[dict[str, Any]] = sent(messages=said, **asked)["messages"]
    return written


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def assistant(*content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": list(content)}


def refused(**asked: Any) -> str | None:
    with pytest.raises(InvalidRequest) as info:
        request(**asked)
    return info.value.param


def test_each_word_has_its_own() -> None:
    assert sent(
        stream=True,
        temperature=0.5,
        top_p=0.9,
        top_k=5,
        stop_sequences=["END"],
        output_config={
            "effort": "max",
            "format": {"type": "json_schema", "schema": {"type": "object"}},
        },
        tools=[TOOL],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        thinking={"type": "enabled", "budget_tokens": 1024},
        metadata={"user_id": "me"},
        service_tier="auto",
        context_management={"edits": []},
        container="c",
        thread={"type": "create"},
    ) == {
        "model": "m",
        "messages": [HELLO],
        "stream": True,
        "stream_options": {"include_usage": True},
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "f",
                    "description": "Does it.",
                    "parameters": {"type": "object"},
                },
            }
        ],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "max_tokens": 100,
        "stop": ["END"],
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "reasoning_effort": "high",
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": {"type": "object"}},
        },
    }


def test_what_says_nothing_is_left_out() -> None:
    assert sent(tools=[], tool_choice={"type": "auto"}, stop_sequences=[]) == {
        **ASKED,
        "messages": [HELLO],
    }


def test_the_system_is_one_message_in_front() -> None:
    billing = text("x-anthropic-billing-header: cc_version=2.1; cch=abc;")
    first = {"role": "system", "content": "d"}

    said = messages(first, HELLO, system=[billing, text("a"), text("b\n")])

    assert said == [{"role": "system", "content": "a\n\nb\n\n\nd"}, HELLO]
    assert messages(HELLO, system="a")[0] == {"role": "system", "content": "a"}
    assert messages(HELLO, system=[billing]) == [HELLO]


def test_a_system_message_in_the_midst_stays_in_its_place() -> None:
    reminder = {"role": "system", "content": [text("Mind.")]}
    said = messages(HELLO, reminder, assistant(use("a")), reminder, user(result("a"), text("b")))

    assert said[0]["content"] == "Hello\n\n<system-reminder>\nMind.\n</system-reminder>"
    assert [message["role"] for message in said] == ["user", "assistant", "tool", "user"]
    assert said[3]["content"] == "<system-reminder>\nMind.\n</system-reminder>\nb"


def test_messages_of_the_user_in_a_row_are_one() -> None:
    said = messages(HELLO, user(text("a"), text("b")), user(PICTURE, text("c"), text("d")))

    assert said == [user(text("Hello\n\na\nb"), SHOWN, text("c\nd"))]


def test_results_stand_behind_their_calls_in_their_order() -> None:
    said = messages(
        HELLO,
        assistant(text("Well"), use("a", x=1.10), use("b")),
        user(
            result("b", [text("1"), PICTURE, text("2")]),
            text("then"),
            result("a", "no", is_error=True),
        ),
    )

    assert [message["role"] for message in said] == ["user", "assistant", "tool", "tool", "user"]
    assert said[1]["content"] == "Well"
    assert [call["id"] for call in said[1]["tool_calls"]] == ["a", "b"]
    assert said[2:4] == [
        {"role": "tool", "tool_call_id": "a", "content": "Error: no"},
        {"role": "tool", "tool_call_id": "b", "content": "1\n2"},
    ]
    assert said[4] == user(SHOWN, text("then"))


def test_a_result_without_its_call_is_a_text_and_a_call_without_a_result_has_an_empty_one() -> (
    None
):
    said = messages(HELLO, assistant(use("a")), user(result("z", "lost"), text("b")))

    assert said[2:] == [
        {"role": "tool", "tool_call_id": "a", "content": ""},
        {"role": "user", "content": "lost\nb"},
    ]


def test_an_error_is_marked_once() -> None:
    for content in ("Error: no", "<tool_use_error>no</tool_use_error>"):
        said = messages(HELLO, assistant(use("a")), user(result("a", content, is_error=True)))
        assert said[2]["content"] == content


def test_a_result_that_is_a_picture_says_so() -> None:
    said = messages(HELLO, assistant(use("a")), user(result("a", [PICTURE])))

    assert said[2]["content"] == "(see the next message)"
    assert said[3] == user(SHOWN)


def test_arguments_are_the_bytes_of_the_input() -> None:
    body = b'{"model":"m","messages":[{"role":"assistant","content":[%b]}]}' % (
        b'{"type":"tool_use","id":"a","name":"f","input":{"n": 12345678901234567890, "f":1.10}}'
    )

    chat = orjson.loads(at_once(chat_request(body)).body)

    function = chat["messages"][0]["tool_calls"][0]["function"]
    assert function["arguments"] == '{"n": 12345678901234567890, "f":1.10}'


def test_our_own_thinking_goes_back_in_the_field_of_the_provider_and_nothing_for_anthropic() -> (
    None
):
    ours = {"type": "thinking", "thinking": "Hm", "signature": "aioserver.unsigned"}
    foreign = {"type": "thinking", "thinking": "No", "signature": "EqQB"}
    redacted = {"type": "redacted_thinking", "data": "x"}
    declined = {"type": "fallback", "from": {"model": "x"}, "to": {"model": "y"}}
    said = [HELLO, assistant(foreign, ours, redacted, declined, text("a"))]

    chat = orjson.loads(request("reasoning", messages=said).body)

    assert chat["messages"][1] == {"role": "assistant", "content": "a", "reasoning": "Hm"}
    assert messages(*said)[1] == {"role": "assistant", "content": "a"}


def test_white_space_of_the_assistant_is_left_out() -> None:
    said = messages(
        HELLO, assistant(text("\n\n"), use("a")), user(result("a")), assistant(text(" "))
    )

    assert said[1]["content"] is None
    assert [message["role"] for message in said] == ["user", "assistant", "tool"]


def test_documents_are_files_or_texts() -> None:
    pdf = {"type": "base64", "media_type": "application/pdf", "data": "QUJD"}
    plain = {"type": "text", "media_type": "text/plain", "data": "a"}
    said = messages(
        user(
            {"type": "document", "source": plain},
            {"type": "document", "source": pdf, "title": "x.pdf"},
            {"type": "document", "source": {"type": "content", "content": [text("b")]}},
            {"type": "image", "source": {"type": "url", "url": "https://h/p.png"}},
        )
    )

    file = {"filename": "x.pdf", "file_data": "data:application/pdf;base64,QUJD"}
    assert said == [
        user(
            text("a"),
            {"type": "file", "file": file},
            text("b"),
            {"type": "image_url", "image_url": {"url": "https://h/p.png"}},
        )
    ]


def test_what_stands_for_a_content_elsewhere_is_refused_by_name() -> None:
    for source in ({"type": "file", "file_id": "f"}, {"type": "url", "url": "https://h"}):
        document = {"type": "document", "source": source}
        assert refused(messages=[user(document)]) == "messages[0].content[0]"
    assert refused(messages=[user({"type": "container_upload"})]) == "messages[0].content[0]"
    nameless = {"type": "tool_result"}
    assert refused(messages=[user(nameless)]) == "messages[0].content[0].tool_use_id"
    assert refused(messages=[]) == "messages"
    assert refused(messages=[{"role": "tool", "content": ""}]) == "messages[0].role"
    assert refused(messages=[user({"type": "image"})]) == "messages[0].content[0].source"
    with pytest.raises(ThreadContinued, match="message-threads-2026-08-12"):
        request(thread={"type": "continue", "id": "t"})


def test_hosted_tools_are_left_out_among_others_and_refused_alone() -> None:
    history = assistant(
        {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
        {"type": "web_search_tool_result", "tool_use_id": "s", "content": []},
        text("Found."),
    )
    mcp = [{"type": "url", "url": "https://h", "name": "x"}]

    chat = request(tools=[SEARCH, TOOL], messages=[HELLO, history], mcp_servers=mcp)

    assert list(chat.hosted.left_out) == ["web_search", "mcp_servers"]
    body = orjson.loads(chat.body)
    assert [tool["function"]["name"] for tool in body["tools"]] == ["f"]
    assert body["messages"][1] == {"role": "assistant", "content": "Found."}
    assert refused(tools=[SEARCH]) == "tools[0]"
    assert refused(mcp_servers=mcp) == "mcp_servers"
    chosen = {"type": "tool", "name": "web_search"}
    assert refused(tools=[SEARCH, TOOL], tool_choice=chosen) == "tool_choice"


def test_a_choice_follows_the_tools() -> None:
    for choice, expected in (
        ({"type": "auto"}, "auto"),
        ({"type": "none"}, "none"),
        ({"type": "tool", "name": "f"}, {"type": "function", "function": {"name": "f"}}),
    ):
        assert sent(tools=[TOOL], tool_choice=choice)["tool_choice"] == expected
    assert refused(tools=[TOOL], tool_choice={"type": "tool", "name": "g"}) == "tool_choice"
    assert refused(tools=[TOOL], tool_choice={"type": "some"}) == "tool_choice"
    assert refused(tool_choice={"type": "any"}) == "tool_choice"


def test_words_that_a_provider_refuses_are_not_sent() -> None:
    refused_words = frozenset({"top_k", "stream_options", "reasoning_effort"})
    accepted = AcceptedParameters(refused_words, "max_completion_tokens", limit=2000, most=500)
    asked: dict[str, Any] = {
        "stream": True,
        "top_k": 5,
        "max_tokens": 64_000,
        "output_config": {"effort": "low"},
    }

    chat = orjson.loads(request(accepted=accepted, **asked).body)

    assert chat == {
        "model": "m",
        "messages": [HELLO],
        "stream": True,
        "max_completion_tokens": 500,
    }
    assert request(**asked).accepted == refused_words
    for limit, bound in ((2000, 1976), (100, 1024), (100_000, 64_000)):
        chat = orjson.loads(request(accepted=AcceptedParameters(limit=limit), **asked).body)
        assert abs(chat["max_tokens"] - bound) < 20


def test_the_estimate_takes_a_picture_for_no_text() -> None:
    large = {"type": "base64", "media_type": "image/png", "data": "A" * 1_000_000}

    chat = request(messages=[user({"type": "image", "source": large}, text("a" * 4000))])

    assert 2600 < chat.asked_tokens < 2700
