"""OpenAI's Responses API on a provider that has chat completions only: the official SDK sees no
difference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import openai
import orjson
import pytest

from aioserver.wings.responses.attempt import ResponsesCapabilities
from tests.support.messages_of_2026 import VERSION_OF_2026
from tests.support.response_events import check_response, check_run, read_events
from tests.support.scripted_engine import engine, refuses, said
from tests.support.server import QUICK, provider_entry
from tests.support.simulator import Behaviour, Simulator

if TYPE_CHECKING:
    from openai import AsyncOpenAI

    from tests.support.server import MakeServer, RunningServer

BRIDGED = {"llm.providers.sim.responses": False}
WITHOUT = Behaviour(ttft=0, interval=0, responses=False)
WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "description": "Tells the weather.",
    "parameters": {"type": "object", "properties": {"days": {"type": "integer"}}},
    "strict": False,
}
ASK: dict[str, Any] = {"model": "m", "input": "Hello"}
STREAMED = {**ASK, "stream": True}


@pytest.fixture
async def server(make_server: MakeServer) -> RunningServer:
    return await make_server(QUICK, **BRIDGED)


async def stream_of(server: RunningServer, body: Any) -> list[dict[str, Any]]:
    async with server.session.post(f"{server.v1}/responses", json=body) as response:
        assert response.status == 200, await response.text()
        return read_events(await response.read())


async def answer_of(server: RunningServer, body: Any) -> tuple[int, Any]:
    async with server.session.post(f"{server.v1}/responses", json=body) as response:
        return response.status, orjson.loads(await response.read())


def paths(simulator: Simulator) -> list[str]:
    return [request.path.removeprefix("/v1/") for request in simulator.requests]


async def test_each_event_is_one_of_the_api(server: RunningServer) -> None:
    for tools in ([], [WEATHER]):
        events = await stream_of(server, {**STREAMED, "input": "call a tool", "tools": tools})
        response = check_run(events)
        _, whole = await answer_of(server, {**ASK, "input": "call a tool", "tools": tools})
        check_response(whole)
        assert set(paths(server.simulator)) == {"chat/completions"}

        for changing in ("id", "created_at", "completed_at"):
            response[changing] = whole[changing]
        for item in (response["output"][0], whole["output"][0]):
            item["id"] = item["call_id"] = ""
        assert response == whole


@pytest.mark.parametrize("bridged", [True, False])
async def test_a_version_of_another_api_changes_nothing(
    make_server: MakeServer, bridged: bool
) -> None:
    server = await make_server(QUICK, **(BRIDGED if bridged else {}))
    sampled = {"temperature": 0.5, "top_p": 0.9}
    headers = {"anthropic-version": VERSION_OF_2026}
    for streamed in (True, False):
        body = {**ASK, **sampled, "stream": streamed}
        async with server.session.post(
            f"{server.v1}/responses", json=body, headers=headers
        ) as response:
            assert response.status == 200
            text = await response.text()
        assert '"status":"completed"' in text.replace(" ", "")
        assert "anthropic-version" not in server.simulator.requests[-1].headers
        assert sampled.items() <= server.simulator.bodies[-1].items()
    assert set(paths(server.simulator)) == {"chat/completions" if bridged else "responses"}


async def test_a_tool_is_called_and_its_result_comes_back(
    server: RunningServer, sdk: AsyncOpenAI
) -> None:
    async with sdk.responses.stream(
        model="m", input="call a tool", tools=[WEATHER], tool_choice="required"
    ) as stream:
        final = await stream.get_final_response()
    (call,) = final.output
    assert call.type == "function_call"
    assert orjson.loads(call.arguments)["days"] == 1

    again = await sdk.responses.create(
        model="m",
        instructions="Be short.",
        input=[
            {"role": "user", "content": "call a tool"},
            call.model_dump(exclude_none=True),  # type: ignore[list-item]
            {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"},
            {"role": "user", "content": "Thanks"},
        ],
    )

    assert again.output_text
    assert server.simulator.bodies[-1]["messages"] == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "call a tool"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": call.call_id,
                    "type": "function",
                    "function": {"name": "weather", "arguments": call.arguments},
                }
            ],
        },
        {"role": "tool", "tool_call_id": call.call_id, "content": "sunny"},
        {"role": "user", "content": "Thanks"},
    ]


async def test_reasoning_goes_back_in_the_field_in_which_it_came(make_server: MakeServer) -> None:
    answer = said(reasoning_content="Hm", content="Yes")
    async with engine(make_server, answer) as (server, asked):
        _, first = await answer_of(server, ASK)
        thought = first["output"][0]
        items = [{"role": "user", "content": "Hello"}, *first["output"]]
        await answer_of(server, {**ASK, "input": [*items, {"role": "user", "content": "Why?"}]})

    assert thought["content"] == [{"type": "reasoning_text", "text": "Hm"}]
    assert asked[1]["messages"][1] == {
        "role": "assistant",
        "content": "Yes",
        "reasoning_content": "Hm",
    }


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_provider_without_responses_is_found_out_once(
    make_server: MakeServer, streamed: bool
) -> None:
    server = await make_server(WITHOUT)
    previous: dict[str, Any] = {}
    response: Any = None
    for _ in range(2):
        if streamed:
            response = check_run(await stream_of(server, STREAMED | previous))
        else:
            _, response = await answer_of(server, ASK | previous)
            check_response(response)
        # The response from which it was found out is kept, too.
        previous = {"previous_response_id": response["id"]}

    assert response["previous_response_id"]
    assert paths(server.simulator) == ["chat/completions"] * 2
    assert server.simulator.stats().connections_accepted == 1
    assert await server.counted("retries", "reason") == {}
    assert await server.counted("provider_attempts", "outcome") == {("http_4xx",): 1, ("ok",): 2}


async def test_a_reload_asks_a_provider_again(make_server: MakeServer) -> None:
    server = await make_server(WITHOUT)
    await answer_of(server, ASK)
    server.simulator.behaviour = QUICK

    await answer_of(server, ASK)
    await server.forgive()
    await answer_of(server, ASK)

    assert paths(server.simulator) == ["chat/completions", "chat/completions", "responses"]
    assert await server.change(**BRIDGED)
    await answer_of(server, ASK)
    assert paths(server.simulator)[-1] == "chat/completions"


async def test_a_model_that_is_not_there_says_nothing_of_the_path(
    make_server: MakeServer,
) -> None:
    server = await make_server()

    status, answer = await answer_of(server, {**ASK, "model": "fault-404"})
    await answer_of(server, ASK)

    assert status == 404, answer
    assert paths(server.simulator)[-1] == "responses"


async def test_a_provider_that_has_answered_has_the_path_whatever_it_does_not_find(
    make_server: MakeServer,
) -> None:
    server = await make_server()
    await answer_of(server, ASK)
    server.simulator.behaviour = WITHOUT

    status, _ = await answer_of(server, ASK)

    assert status == 404
    assert not server.provider.capabilities(ResponsesCapabilities).bridged


async def test_failover_goes_from_one_kind_of_provider_to_the_other(
    make_server: MakeServer,
) -> None:
    async with Simulator(QUICK) as native:
        other = provider_entry(native.base_url)
        changes = {"llm.fallbacks": ["other"], "llm.providers.other": other}
        server = await make_server(WITHOUT, **changes)
        check_run(await stream_of(server, STREAMED))

        server.simulator.behaviour = Behaviour(fail_rate=1.0, responses=False)
        events = await stream_of(server, STREAMED)
        assert events[-1]["response"]["model"] == "other-model"
        assert paths(native) == ["responses"]

        await server.change(**{**changes, "llm.active": "other", "llm.fallbacks": ["sim"]})
        server.simulator.behaviour = WITHOUT
        native.behaviour = Behaviour(fail_rate=1.0)
        check_run(await stream_of(server, STREAMED))
        assert paths(server.simulator)[-1] == "chat/completions"


HOSTED: dict[str, tuple[Any, str]] = {
    "web_search": ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    "web_search_preview": (
        {
            "tools": [WEATHER, {"type": "web_search_preview"}],
            "tool_choice": {"type": "web_search_preview"},
        },
        "tool_choice",
    ),
    "item_reference": ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
    "conversation": ({"conversation": "conv_1"}, "conversation"),
}


@pytest.mark.parametrize("streamed", [True, False])
async def test_what_the_provider_cannot_have_is_refused_by_name(
    server: RunningServer, streamed: bool
) -> None:
    for name, (fields, param) in HOSTED.items():
        status, answer = await answer_of(server, {**ASK, "stream": streamed, **fields})

        error = answer["error"]
        assert (status, error["code"], error["param"]) == (400, "invalid_request", param)
        assert error["type"] == "invalid_request_error"
        assert name in error["message"]
    assert not server.simulator.requests


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_hosted_tool_among_others_is_left_out(
    server: RunningServer, streamed: bool
) -> None:
    hosted = [{"type": "web_search"}, {"type": "image_generation"}]
    history = [
        {"type": "web_search_call", "id": "ws_1", "status": "completed"},
        {"type": "mcp_list_tools", "id": "m", "server_label": "x", "tools": []},
        {"role": "user", "content": "Hello"},
    ]
    asked = {**ASK, "stream": streamed, "tools": [WEATHER, *hosted], "input": history}

    async with server.session.post(f"{server.v1}/responses", json=asked) as response:
        body = await response.read()
        left_out = response.headers["x-aioserver-left-out"]

    assert left_out == "web_search, image_generation, mcp_list_tools"
    shown = check_run(read_events(body)) if streamed else orjson.loads(body)
    assert [tool["name"] for tool in shown["tools"]] == ["weather"]
    (sent,) = server.simulator.bodies
    assert [tool["function"]["name"] for tool in sent["tools"]] == ["weather"]
    assert sent["messages"] == [{"role": "user", "content": "Hello"}]


async def test_the_number_of_input_tokens_is_not_found_where_there_are_no_responses(
    server: RunningServer,
) -> None:
    url = f"{server.v1}/responses/input_tokens"
    async with server.session.post(url, json=ASK) as response:
        error = orjson.loads(await response.read())["error"]
        assert (response.status, error["code"]) == (404, "not_found")
        assert "has no /v1/responses" in error["message"]
    assert not server.simulator.requests


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_result_of_a_call_that_is_not_there_is_refused(
    server: RunningServer, sdk: AsyncOpenAI, *, streamed: bool
) -> None:
    output: Any = [{"type": "function_call_output", "call_id": "call_1", "output": "x"}]
    first = await sdk.responses.create(**ASK)
    for more in ({}, {"previous_response_id": first.id}):
        with pytest.raises(openai.BadRequestError) as caught:
            await sdk.responses.create(model="m", input=output, stream=streamed, **more)
        assert caught.value.code == "invalid_request"
        assert str(caught.value.param).endswith(".call_id")
    assert len(server.simulator.requests) == 1


async def test_a_response_repeats_its_request_and_says_what_is_usual_otherwise(
    server: RunningServer,
) -> None:
    usual = {"temperature": 1.0, "top_p": 1.0, "top_logprobs": 0, "max_tool_calls": None}
    usual |= {"presence_penalty": 0.0, "frequency_penalty": 0.0}
    own = {"temperature": 0.0, "top_p": 0.5, "top_logprobs": 2, "max_tool_calls": 7}
    own |= {"presence_penalty": 1.5, "frequency_penalty": -1.0}
    bare = {name: value for name, value in WEATHER.items() if name != "strict"}

    _, plain = await answer_of(server, {**ASK, "tools": [bare]})
    _, told = await answer_of(server, {**ASK, **own, "tools": [{**WEATHER, "strict": True}]})

    assert {name: plain[name] for name in usual} == usual
    assert {name: told[name] for name in own} == own
    assert plain["tools"] == [WEATHER]
    assert told["tools"] == [{**WEATHER, "strict": True}]
    penalties = ("presence_penalty", "frequency_penalty")
    bodies = server.simulator.bodies
    assert [[body.get(name) for name in penalties] for body in bodies] == [[None] * 2, [1.5, -1.0]]


async def test_what_one_provider_cannot_have_goes_to_one_that_can(
    make_server: MakeServer,
) -> None:
    async with Simulator(QUICK) as native:
        server = await make_server(
            QUICK,
            **BRIDGED,
            **{
                "llm.fallbacks": ["other"],
                "llm.providers.other": provider_entry(native.base_url),
            },
        )

        status, _ = await answer_of(server, {**ASK, "tools": [{"type": "web_search"}]})

        assert (status, paths(native)) == (200, ["responses"])

        native.behaviour = Behaviour(fail_rate=1.0)
        status, _ = await answer_of(server, {**ASK, "tools": [{"type": "web_search"}]})

        # The fault of the one that could have answered says more.
        assert status == 502


async def test_an_error_before_the_first_event_has_its_status(make_server: MakeServer) -> None:
    server = await make_server(Behaviour(fail_rate=1.0, fail_status=503), **BRIDGED)

    assert (await answer_of(server, STREAMED))[0] == 502
    assert (await answer_of(server, ASK))[0] == 502


async def test_a_client_learns_why_an_engine_limits_its_rate(make_server: MakeServer) -> None:
    limited = 429, {"error": {"message": "Too many tokens a minute."}}
    async with engine(make_server, limited) as (server, _):
        status, answer = await answer_of(server, ASK)

    assert (status, answer["error"]["code"]) == (429, "provider_rate_limited")
    assert answer["error"]["message"] == "sim limits our rate: Too many tokens a minute."


async def test_an_input_that_is_too_long_has_the_code_that_codex_knows(
    make_server: MakeServer,
) -> None:
    message = "This model's maximum context length is 4096 tokens, and the input has 9000."
    async with engine(make_server, refuses(message)) as (server, asked):
        status, answer = await answer_of(server, ASK)

    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    assert answer["error"]["message"] == message
    assert len(asked) == 1


async def test_a_response_is_continued_by_its_id(server: RunningServer, sdk: AsyncOpenAI) -> None:
    first = await sdk.responses.create(
        model="m", input="call a tool", instructions="Not kept.", tools=[WEATHER]
    )
    (call,) = first.output
    assert call.type == "function_call"

    async with sdk.responses.stream(
        model="m",
        previous_response_id=first.id,
        input=[{"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}],
    ) as stream:
        second = await stream.get_final_response()
    third = await sdk.responses.create(model="m", previous_response_id=second.id, input="Thanks")

    assert third.previous_response_id == second.id
    messages = server.simulator.bodies[-1]["messages"]
    assert [message["role"] for message in messages] == [
        *("user", "assistant", "tool", "assistant", "user")
    ]
    assert messages[3]["content"] == second.output_text
    assert "previous_response_id" not in server.simulator.bodies[-1]
    assert (await sdk.responses.retrieve(second.id)).output_text == second.output_text


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_response_that_was_not_stored_is_not_continued(
    server: RunningServer, streamed: bool
) -> None:
    _, first = await answer_of(server, {**ASK, "store": False})
    for name in (first["id"], "resp_unknown"):
        body = {**ASK, "stream": streamed, "previous_response_id": name}
        status, answer = await answer_of(server, body)

        assert (status, answer["error"]["code"]) == (400, "previous_response_not_found")
    assert len(server.simulator.requests) == 1
