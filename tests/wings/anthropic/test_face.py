"""The face of Anthropic's API: the official SDK unchanged, the provider's bytes as they came,
errors in its form.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.protocol import eventstream
from aioserver.wings.anthropic.wire import PING
from tests.support.chat import text_of
from tests.support.chat import whole as read_over_sse
from tests.support.keys import bearer, key_of, keys_of
from tests.support.lazily import lazily
from tests.support.messages_of_2026 import (
    NO_MORE,
    STILL,
    VERSION_OF_2026,
    has_document_of_assistant,
)
from tests.support.raw import Raw
from tests.support.scripted_provider import EVENT_STREAM, LAST_CHUNK, ScriptedProvider, chunk
from tests.support.sdk import anthropic_of
from tests.support.server import (
    CONCURRENCY,
    HTTP_CLIENT,
    NOWHERE,
    QUICK,
    SILENT,
    MakeServer,
    provider_entry,
)
from tests.support.simulator import Behaviour, Simulator
from tests.support.waiting import patience, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import anthropic

    from tests.support.scripted_provider import Peer
    from tests.support.server import RunningServer
else:
    anthropic = lazily("anthropic")

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
ASKED: dict[str, Any] = {"model": "any", "max_tokens": 1000, "messages": HELLO}
STREAMED = {**ASKED, "stream": True}
WEATHER: Any = {
    "name": "weather",
    "description": "Tells the weather.",
    "input_schema": {"type": "object", "properties": {"days": {"type": "integer"}}},
}
START = b'event: message_start\ndata: {"type":"message_start","message":{"id":"msg_1"}}\n\n'
STOP = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
OLD = "llm.providers.old"


@pytest.fixture
async def sdk(server: RunningServer) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic_of(server.base) as client:
        yield client


def post(server: RunningServer, body: object, path: str = "messages", **headers: str) -> Any:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return server.session.post(f"{server.v1}/{path}", json=body, headers=named)


async def error_of(response: Any) -> dict[str, Any]:
    """The error of ours that is the body of *response*, with its form checked."""
    body = await response.json()
    assert body.keys() == {"type", "error", "request_id"}
    assert body["type"] == "error"
    assert body["error"].keys() == {"type", "message", "code"}
    assert body["request_id"] == response.headers["x-request-id"]
    return dict(body["error"])


def last_event(body: bytes) -> Any:
    """The last event of *body*, whose name is its type."""
    event = eventstream.parse(body)[-1]
    content = json.loads(event.data)
    assert event.event.decode() == content["type"]
    return content


# The SDK.


async def test_an_answer_reads_the_same_streamed_and_whole(sdk: anthropic.AsyncAnthropic) -> None:
    whole = await sdk.messages.create(**ASKED)
    async with sdk.messages.stream(**ASKED) as stream:
        text = "".join([piece async for piece in stream.text_stream])
        streamed = await stream.get_final_message()

    [block] = whole.content
    assert block.type == "text"
    assert text == block.text
    assert "Hello" in text
    assert (whole.stop_reason, streamed.stop_reason) == ("end_turn", "end_turn")
    assert streamed.usage.output_tokens == whole.usage.output_tokens > 10
    assert whole._request_id  # noqa: SLF001 - documented by the SDK under this name


async def test_thinking_comes_before_the_text(sdk: anthropic.AsyncAnthropic) -> None:
    thinking: Any = {"type": "enabled", "budget_tokens": 1024}
    whole = await sdk.messages.create(**ASKED, thinking=thinking)
    async with sdk.messages.stream(**ASKED, thinking=thinking) as stream:
        streamed = await stream.get_final_message()

    assert [block.type for block in whole.content] == ["thinking", "text"]
    assert streamed.content[0].model_dump() == whole.content[0].model_dump()


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
async def test_a_tool_is_called_where_the_client_demands_it(
    sdk: anthropic.AsyncAnthropic, choice: Any
) -> None:
    other: Any = {**WEATHER, "name": "other"} if choice["type"] == "tool" else WEATHER
    tools = [other, WEATHER]
    async with sdk.messages.stream(**ASKED, tools=tools, tool_choice=choice) as stream:
        streamed = await stream.get_final_message()
    whole = await sdk.messages.create(**ASKED, tools=tools, tool_choice=choice)
    free = await sdk.messages.create(**ASKED, tools=tools)

    for answer in (streamed.model_dump(), whole.model_dump()):
        [block] = answer["content"]
        assert (answer["stop_reason"], block["type"]) == ("tool_use", "tool_use")
        assert (block["name"], block["input"]) == ("weather", {"days": 1})
    assert [block.type for block in free.content] == ["text"]


async def test_tokens_are_counted(sdk: anthropic.AsyncAnthropic, server: RunningServer) -> None:
    count = await sdk.messages.count_tokens(model="any", messages=HELLO, system="x" * 400)

    assert count.input_tokens == 102
    assert server.simulator.requests[-1].path == "/v1/messages/count_tokens"


async def test_models_of_providers_that_speak_it_are_discovered(make_server: MakeServer) -> None:
    server = await make_server(**{OLD: {**provider_entry(NOWHERE, "m"), "messages": False}})
    async with anthropic_of(server.base) as sdk:
        listed = [model.id async for model in sdk.models.list(limit=1000)]
        retrieved = await sdk.models.retrieve("sim/anything")
        with pytest.raises(anthropic.NotFoundError, match="old does not speak"):
            await sdk.models.retrieve("old")
    async with server.session.get(f"{server.v1}/models") as response:
        others = [model["id"] for model in (await response.json())["data"]]

    assert listed == ["sim", "sim/sim-model"]
    assert (retrieved.id, retrieved.type) == ("sim/anything", "model")
    assert {"sim", "old"} < set(others)


async def test_the_sdk_raises_its_own_errors(
    sdk: anthropic.AsyncAnthropic, server: RunningServer
) -> None:
    expected: list[tuple[str, type[anthropic.APIStatusError], str]] = [
        ("fault-status-400", anthropic.BadRequestError, "invalid_request_error"),
        ("fault-status-413", anthropic.RequestTooLargeError, "request_too_large"),
        ("fault-status-429", anthropic.RateLimitError, "rate_limit_error"),
        ("fault-status-529", anthropic.OverloadedError, "overloaded_error"),
        ("fault-html", anthropic.InternalServerError, "api_error"),
        ("sim9/x", anthropic.NotFoundError, "not_found_error"),
    ]
    for model, error, kind in expected[:-1]:
        await server.forgive()
        with pytest.raises(error) as caught:
            await sdk.messages.create(**{**ASKED, "model": model})
        assert (type(caught.value), caught.value.type) == (error, kind)
        assert caught.value.request_id

    stream = await sdk.messages.create(**{**ASKED, "model": "fault-end-3"}, stream=True)
    with pytest.raises(anthropic.APIStatusError, match="without message_stop") as broken:
        async for _ in stream:
            pass
    assert broken.value.type == "api_error"


# Byte for byte.


def alike(body: bytes) -> bytes:
    """Without the ids, which differ from answer to answer."""
    return re.sub(rb"(msg_|toolu_)[0-9a-f]{24}", rb"\1", body)


async def straight(server: RunningServer, body: object, path: str = "messages") -> bytes:
    async with server.session.post(f"{server.simulator.base_url}/{path}", json=body) as response:
        return await response.read()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("messages", ASKED),
        ("messages", STREAMED),
        ("messages", {**STREAMED, "tools": [WEATHER], "tool_choice": {"type": "any"}}),
        ("messages/count_tokens", {"model": "any", "messages": HELLO}),
    ],
)
async def test_the_providers_answer_comes_byte_for_byte(
    server: RunningServer, path: str, body: dict[str, Any]
) -> None:
    expected = await straight(server, body, path)
    async with post(server, body, path) as response:
        through = await response.read()

    assert alike(through) == alike(expected)
    assert response.headers["x-aioserver-provider"] == "sim"
    assert response.headers["x-aioserver-attempts"] == "1"
    assert response.headers["request-id"] == response.headers["x-request-id"]


async def test_unusual_answers_pass_as_they_are(server: RunningServer) -> None:
    for kind in ["crlf", "cr", "multi-data", "comments", "slices", "1xx"]:
        body = {**STREAMED, "model": f"fault-{kind}", "max_tokens": 6}
        expected = await straight(server, body)
        async with post(server, body) as response:
            assert alike(await response.read()) == alike(expected), kind


async def test_each_event_comes_as_soon_as_the_provider_sends_it(make_server: MakeServer) -> None:
    server = await make_server(Behaviour(ttft=0, interval=60, tokens=5))
    async with asyncio.timeout(patience(5)), post(server, STREAMED) as response:
        received = b""
        while received.count(b"content_block_delta") < 2:
            received += await response.content.readany()
    await server.simulator.until(lambda stats: stats.aborted == 1)


# What is sent to the provider.


async def sent(server: RunningServer, body: bytes, **headers: str) -> Any:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with server.session.post(
        f"{server.v1}/messages", data=body, headers={"Content-Type": "application/json", **named}
    ) as response:
        assert response.status == 200, await response.read()
        await response.read()
    return server.simulator.requests[-1]


async def test_a_body_goes_on_as_it_came_but_for_the_model(server: RunningServer) -> None:
    odd = b'{ "max_tokens" : 9, "messages":[{"role":"user","content":"h\\u00e9"}],%b "x":[1.50, 1e2]}'
    for model in (b"sim-model", b"claude-x", b"org/name"):
        body = odd % b'"model":"%b",' % model
        assert (await sent(server, body)).body == body
    for model, expected in ((b"", "sim-model"), (b'"model":"sim/other",', "other")):
        asked = json.loads((await sent(server, odd % model)).body)
        assert asked.pop("model") == expected
        assert asked == json.loads(odd % b"")


async def test_the_headers_of_the_api_go_on_and_no_others(make_server: MakeServer) -> None:
    server = await make_server(
        **{"llm.providers.sim.headers": {"Anthropic-Fixed": "ours"}}, **keys_of("web")
    )
    body = json.dumps(ASKED).encode()

    seen = await sent(
        server,
        body,
        anthropic_beta="a,b",
        anthropic_fixed="theirs",
        anthropic_new="n",
        x_app="cli",
        x_api_key=key_of("web"),
        **bearer("web"),
    )

    assert seen.headers["anthropic-version"] == "2023-06-01"
    assert seen.headers["anthropic-beta"] == "a,b"
    assert seen.headers["anthropic-new"] == "n"
    assert seen.headers["anthropic-fixed"] == "ours"
    for name in ("x-app", "x-api-key", "authorization"):
        assert name not in seen.headers
    seen = await sent(server, body, anthropic_version="2099-01-01", **bearer("web"))
    assert seen.headers["anthropic-version"] == "2099-01-01"


@pytest.mark.parametrize("path", ["messages", "messages/count_tokens"])
async def test_what_the_version_of_the_client_has_no_more_is_refused_as_by_the_api(
    server: RunningServer, path: str
) -> None:
    version = {"anthropic_version": VERSION_OF_2026}
    for changes, where in NO_MORE:
        async with post(server, ASKED | changes, path) as response:
            assert response.status == 200, where
        async with post(server, ASKED | changes, path, **version) as response:
            assert response.status == 400, where
            error = (await response.json())["error"]
        assert error["type"] == "invalid_request_error"
        assert error["message"].startswith(where)
    async with post(server, ASKED | {"messages": STILL}, path, **version) as response:
        assert response.status == 200


async def test_a_bridge_and_its_engine_take_what_the_version_of_the_client_has_no_more(
    make_server: MakeServer,
) -> None:
    server = await make_server(**{"llm.providers.sim.messages": "bridge"})
    bodies = [ASKED | changes for changes, _where in NO_MORE]
    for body in (*bodies, ASKED | {"messages": STILL}):
        async with post(server, body, anthropic_version=VERSION_OF_2026) as response:
            # This has no form in a chat completion, whatever the version.
            refused = has_document_of_assistant(body)
            assert response.status == (400 if refused else 200), await response.text()
        if refused:
            continue
        sent = server.simulator.bodies[-1]
        for name in ("temperature", "top_p", "top_k"):
            assert sent.get(name) == body.get(name)
        assert "anthropic-version" not in server.simulator.requests[-1].headers


async def test_the_key_of_the_sdk_is_taken_in_the_header_of_its_version(
    make_server: MakeServer,
) -> None:
    server = await make_server(**keys_of("web", "other"))
    async with anthropic_of(server.base, key_of("web")) as client:
        assert client.auth_headers == {"Authorization": f"Bearer {key_of('web')}"}
        assert (await client.messages.create(**ASKED)).stop_reason == "end_turn"
        assert server.simulator.requests[-1].headers["anthropic-version"] == VERSION_OF_2026
        both = {"x-api-key": key_of("other")}
        with pytest.raises(anthropic.AuthenticationError):
            await client.messages.create(**ASKED, extra_headers=both)


def declined(index: int = 0) -> bytes:
    """The block of a model that has declined, at once, and named the next one."""
    block = {
        "type": "fallback",
        "from": {"model": "first"},
        "to": {"model": "second"},
        "trigger": {"type": "refusal", "category": "cyber"},
    }
    opened: dict[str, Any] = {
        "type": "content_block_start",
        "index": index,
        "content_block": block,
    }
    closed: dict[str, Any] = {"type": "content_block_stop", "index": index}
    return b"".join(
        b"event: %b\ndata: %b\n\n" % (each["type"].encode(), json.dumps(each).encode())
        for each in (opened, closed)
    )


async def test_a_block_that_names_another_model_is_no_content(make_server: MakeServer) -> None:
    async def play(peer: Peer) -> None:
        await peer.request()
        await peer.send(EVENT_STREAM, chunk(START + declined()))

    async with ScriptedProvider(play) as provider:
        server = await make_server(
            **{
                "llm.providers.first": {**provider_entry(provider.url), "messages": True},
                "llm.active": "first",
                "llm.fallbacks": ["sim"],
                "llm.providers.sim.messages": True,
            }
        )
        async with post(server, STREAMED) as response:
            body = await response.read()
    assert provider.accepted
    assert body.endswith(STOP)
    assert b'"error"' not in body
    assert b"fallback" not in body


@pytest.mark.parametrize("hold", ["preamble", "calls", "turn"])
async def test_a_block_that_names_another_model_passes_as_it_is(
    make_server: MakeServer, hold: str
) -> None:
    text = (
        b'event: content_block_start\ndata: {"type":"content_block_start","index":1,'
        b'"content_block":{"type":"text","text":"Hi"}}\n\n'
    )
    whole = START + declined() + text + STOP

    async def play(peer: Peer) -> None:
        await peer.request()
        await peer.send(EVENT_STREAM, chunk(whole), LAST_CHUNK)

    async with ScriptedProvider(play) as provider:
        entry = {**provider_entry(provider.url), "messages": True}
        server = await make_server(**{"llm.providers.own": entry, "llm.active": "own"})
        async with post(server, STREAMED, x_aioserver_hold=hold) as response:
            assert await response.read() == whole


@pytest.mark.parametrize(
    ("query", "expected"),
    [("?beta=true", "beta=true"), ("?beta=true&x=y", "beta=true"), ("?x=y", ""), ("", "")],
)
async def test_the_query_of_the_beta_goes_on_and_no_other(
    server: RunningServer, query: str, expected: str
) -> None:
    for path in ("messages", "messages/count_tokens"):
        async with post(server, ASKED, path + query) as response:
            assert response.status == 200
            await response.read()
        assert server.simulator.requests[-1].query == expected
        assert server.simulator.requests[-1].path == f"/v1/{path}"


async def test_the_key_of_a_provider_is_presented_in_both_ways(make_server: MakeServer) -> None:
    server = await make_server(**{"llm.providers.sim.api_key": "sk-1"})

    seen = await sent(server, json.dumps(ASKED).encode())

    assert seen.headers["x-api-key"] == "sk-1"
    assert seen.headers["authorization"] == "Bearer sk-1"


async def test_other_faces_send_no_header_of_this_api(server: RunningServer) -> None:
    body = {"model": "any", "messages": HELLO}
    async with post(server, body, "chat/completions", anthropic_beta="a") as response:
        await response.read()

    assert not [
        name for name in server.simulator.requests[-1].headers if name.startswith("anthropic-")
    ]


async def test_limits_of_the_provider_pass_and_its_account_does_not(
    make_server: MakeServer,
) -> None:
    headers = (
        ("anthropic-ratelimit-requests-remaining", "59"),
        ("anthropic-organization-id", "secret"),
        ("request-id", "req_theirs"),
        ("Set-Cookie", "a=b"),
    )
    server = await make_server(Behaviour(ttft=0, interval=0, headers=headers))
    for body in (ASKED, STREAMED):
        async with post(server, body, Origin="http://page.example") as response:
            await response.read()
        assert response.headers["anthropic-ratelimit-requests-remaining"] == "59"
        assert response.headers["request-id"] == "req_theirs"
        assert "anthropic-organization-id" not in response.headers
        assert "Set-Cookie" not in response.headers
        exposed = response.headers["Access-Control-Expose-Headers"].split(", ")
        assert {"request-id", "anthropic-ratelimit-requests-remaining"} < set(exposed)
        assert len(exposed) == len(set(exposed))


# Which provider is asked.


async def test_a_provider_that_does_not_speak_it_is_a_clear_error(make_server: MakeServer) -> None:
    server = await make_server(
        **{OLD: {**provider_entry(NOWHERE, "m"), "messages": False}, "llm.active": "old"}
    )
    for model, message in (
        ("old", "the provider old does not speak Anthropic's Messages API"),
        ("old/m", "the provider old does not speak Anthropic's Messages API"),
        ("claude-x", "the active provider old does not speak Anthropic's Messages API"),
        (None, "the active provider old does not speak Anthropic's Messages API"),
    ):
        async with post(server, {**ASKED, "model": model}) as response:
            assert response.status == 404
            error = await error_of(response)
        assert (error["type"], error["code"]) == ("not_found_error", "model_not_found")
        assert error["message"].startswith(message)
        assert error["message"].endswith("the model may name one that does: sim")
    async with post(server, {**ASKED, "model": "sim/x"}) as response:
        assert response.status == 200
    assert json.loads(server.simulator.requests[-1].body)["model"] == "x"


async def test_no_provider_that_speaks_it_is_reported(make_server: MakeServer) -> None:
    server = await make_server(**{"llm.providers.sim.messages": False})
    async with post(server, ASKED) as response:
        assert (await error_of(response))["message"].endswith("by its setting `messages`")


async def test_a_fault_fails_over_to_one_that_speaks_it_only(make_server: MakeServer) -> None:
    async with Simulator(QUICK) as spare:
        speaking = {**provider_entry(spare.base_url, "spare-model"), "messages": True}
        server = await make_server(
            Behaviour(fail_rate=1.0),
            **{
                OLD: {**provider_entry(NOWHERE, "m"), "messages": False},
                "llm.providers.spare": speaking,
                "llm.fallbacks": ["old", "spare"],
            },
        )
        for body in (ASKED, STREAMED):
            async with post(server, body) as response:
                assert response.status == 200
                await response.read()
            assert response.headers["x-aioserver-provider"] == "spare"
            assert response.headers["x-aioserver-attempts"] == "2"
        assert [body["model"] for body in spare.bodies] == ["spare-model"] * 2
        # Another model would count other tokens.
        async with post(server, ASKED, "messages/count_tokens") as response:
            assert response.status == 503


async def test_the_first_fallback_that_speaks_it_stands_for_the_active_provider(
    make_server: MakeServer,
) -> None:
    server = await make_server(
        **{
            OLD: {**provider_entry(NOWHERE, "m"), "messages": False},
            "llm.active": "old",
            "llm.fallbacks": ["sim"],
        }
    )
    async with post(server, ASKED) as response:
        assert response.status == 200
    assert json.loads(server.simulator.requests[-1].body)["model"] == "any"


async def test_an_error_before_the_answer_is_retried_even_after_a_ping_and_a_start(
    make_server: MakeServer,
) -> None:
    overloaded = b'{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}'

    async def play(peer: Peer) -> None:
        await peer.request()
        await peer.send(EVENT_STREAM, chunk(PING), chunk(START))
        await peer.send(chunk(b"event: error\ndata: %b\n\n" % overloaded) + LAST_CHUNK)

    async with ScriptedProvider(play) as provider:
        entry = provider_entry(provider.url, max_retries=1, backoff_factor=0.01)
        own = {**entry, "messages": True}
        server = await make_server(**{"llm.providers.own": own, "llm.active": "own"})
        async with post(server, STREAMED) as response:
            assert response.status == 529
            assert await response.read() == overloaded

    assert await server.counted("provider_attempts", "outcome") == {("http_5xx",): 2}


# Refusals of our own.


async def test_our_refusals_have_its_form(make_server: MakeServer) -> None:
    server = await make_server(**keys_of("web"), **{"chat.websocket.max_message_size": 2000})
    cases: list[tuple[dict[str, str], object, int, str, str]] = [
        ({}, ASKED, 401, "authentication_error", "missing_api_key"),
        ({"x-api-key": "no"}, ASKED, 401, "authentication_error", "invalid_api_key"),
        (bearer("web"), [], 400, "invalid_request_error", "invalid_request"),
        (bearer("web"), {"x": "x" * 3000}, 413, "request_too_large", "request_too_large"),
        ({"Origin": "null", **bearer("web")}, {"model": 7}, 400, "invalid_request_error", ""),
        (
            {"x-api-key": key_of("web")},
            {**ASKED, "model": "sim9/x", "stream": "?"},
            400,
            "invalid_request_error",
            "invalid_request",
        ),
    ]
    for headers, body, status, kind, code in cases:
        async with server.session.post(
            f"{server.v1}/messages", json=body, headers=headers
        ) as response:
            assert response.status == status, await response.read()
            error = await error_of(response)
        assert error["type"] == kind
        assert error["code"] == (code or error["code"])
    assert server.simulator.stats().requests == 0


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/messages", 405),
        ("POST", "/v1/messages/batches", 404),
        ("POST", "/v1/v1/messages", 404),
        ("POST", "/v1/x/v1/messages", 404),
    ],
)
async def test_paths_that_are_not_there_have_its_form(
    server: RunningServer, method: str, path: str, status: int
) -> None:
    headers = {"anthropic-version": "2023-06-01"}
    async with server.session.request(method, server.base + path, headers=headers) as response:
        assert response.status == status
        error = await error_of(response)
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
    assert ("the base URL must not end in /v1" in error["message"]) == ("v1/messages" in path[4:])


async def test_a_base_url_without_its_version_is_told_the_path(server: RunningServer) -> None:
    async with server.session.post(server.base + "/messages", json=ASKED) as response:
        assert response.status == 404
        message = (await response.json())["error"]["message"]
    assert message.endswith("the base URL must end in /v1, so that the path is /v1/messages")


async def test_a_full_server_is_overloaded_and_says_when_to_come_back(
    make_server: MakeServer,
) -> None:
    server = await make_server(
        SILENT,
        **{
            f"{CONCURRENCY}.max_connections": 1,
            f"{CONCURRENCY}.connection_queue_size": 1,
            f"{CONCURRENCY}.queue_timeout": 0.05,
        },
    )
    async with Raw(server) as raw:
        await raw.post("/v1/messages", ASKED)
        await server.simulator.until(lambda stats: stats.active == 1)
        async with post(server, ASKED) as response:
            assert response.status == 529
            assert 1 <= int(response.headers["Retry-After"]) <= 60
            error = await error_of(response)
    assert (error["type"], error["code"]) == ("overloaded_error", "server_at_capacity")
    assert "max_connections=1" in error["message"]
    assert (await server.counted("rejections", "code"))["server_at_capacity",] == 1


async def test_the_limits_of_a_key_are_429_with_retry_after(make_server: MakeServer) -> None:
    server = await make_server(**keys_of("web", requests_per_minute=1))
    async with post(server, ASKED, **bearer("web")) as response:
        assert response.status == 200
        await response.read()
    async with post(server, ASKED, **bearer("web")) as response:
        assert response.status == 429
        assert int(response.headers["Retry-After"]) >= 1
        error = await error_of(response)
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")


@pytest.mark.parametrize("messages", [True, "bridge"])
@pytest.mark.parametrize("fault", ["slow-down", "status-429", "status-503"])
async def test_a_provider_that_says_when_to_come_back_may_be_asked_again(
    make_server: MakeServer, fault: str, messages: bool | str
) -> None:
    server = await make_server(QUICK, **{"llm.providers.sim.messages": messages})
    asked = {**ASKED, "model": f"fault-{fault}"}
    async with server.session.post(f"{server.v1}/messages", json=asked) as response:
        # What passes as it is has the provider's status, and what was translated has ours.
        if response.status in {429, 503, 529}:
            assert 1 <= int(response.headers["Retry-After"]) <= 60
            assert "x-should-retry" not in response.headers
        else:
            assert (response.status, messages) == (502, "bridge")
            assert response.headers["x-should-retry"] == "false"


async def test_the_providers_full_queue_is_overloaded(make_server: MakeServer) -> None:
    limits = {**HTTP_CLIENT, "concurrent_requests": 1, "queue_size": 1}
    server = await make_server(SILENT, **{"llm.providers.sim.http_client": limits})
    async with Raw(server) as first, Raw(server) as second:
        for raw in (first, second):
            await raw.post("/v1/messages", STREAMED)
        await until(lambda: server.held()["sim waiting"] == 1)
        for body in (ASKED, STREAMED):
            async with post(server, body) as response:
                assert response.status == 529
                assert (await error_of(response))["code"] == "provider_queue_full"
                assert 1 <= int(response.headers["Retry-After"]) <= 60
    await server.nothing_held()


async def test_sessions_of_one_key_take_turns(make_server: MakeServer) -> None:
    limits = {**HTTP_CLIENT, "concurrent_requests": 1}
    server = await make_server(SILENT, **{"llm.providers.sim.http_client": limits})
    lines = {
        "busy": "x-claude-code-session-id: one",
        "late": "x-claude-code-session-id: two",
        "user": "X: y",
    }
    asked = ["busy", "busy", "busy", "late", "user"]
    raws: list[Raw] = []
    for number, name in enumerate(asked):
        raw = Raw(server)
        await raw.__aenter__()
        raws.append(raw)
        metadata = {"user_id": "three"} if name == "user" else {}
        body = {**STREAMED, "model": f"{name}-{number}", "metadata": metadata}
        await raw.post("/v1/messages", body, lines[name])
        if not number:
            await server.simulator.until(lambda stats: stats.active == 1)
        else:
            await until(lambda number=number: server.held()["sim waiting"] == number)  # type: ignore[misc]
    order = []
    for count in range(1, len(asked) + 1):
        await server.simulator.until(lambda stats, count=count: stats.requests == count)  # type: ignore[misc]
        await until(lambda count=count: len(server.simulator.bodies) == count)  # type: ignore[misc]
        model = server.simulator.bodies[-1]["model"]
        order.append(model)
        raws[int(model[-1])].reset()
    for raw in raws:
        raw.close()

    # What the first has cost counts for its session.
    assert order == ["busy-0", "late-3", "user-4", "busy-1", "busy-2"]
    await server.nothing_held()


# Faults behind the head, silence, leaving.


async def test_an_error_of_the_provider_passes_as_it_is_and_ends_the_answer(
    server: RunningServer,
) -> None:
    async with post(server, {**STREAMED, "model": "fault-error-event-3"}) as response:
        body = await response.read()

    error = last_event(body)
    assert error["error"]["message"] == "The server had an error processing your request."
    assert error["request_id"] == "req_simulated"
    assert body.count(b"event: error") == 1
    assert STOP not in body


@pytest.mark.virtual_time
async def test_pings_come_while_the_provider_is_silent(make_server: MakeServer) -> None:
    server = await make_server(
        Behaviour(ttft=0.9, interval=0, tokens=3), **{"chat.websocket.ping_interval": 0.2}
    )
    async with post(server, STREAMED) as response:
        assert not server.simulator.stats().tokens_sent, "the head goes out alone"
        body = await response.read()

    # The provider's own is written in another way.
    assert 1 <= body.count(PING) <= 4
    assert body.startswith(PING)
    assert b": keep-alive" not in body
    assert body.endswith(STOP)


async def test_a_fault_behind_a_head_that_went_out_alone_is_an_event(
    make_server: MakeServer,
) -> None:
    server = await make_server(
        **{
            "chat.websocket.ping_interval": 0.1,
            "llm.providers.sim.http_client.read_timeout": 0.4,
        }
    )
    async with post(server, {**STREAMED, "model": "fault-silent"}) as response:
        assert response.status == 200
        body = await response.read()

    assert last_event(body) == {
        "type": "error",
        "error": {
            "type": "timeout_error",
            "message": last_event(body)["error"]["message"],
            "code": "read_timeout",
        },
    }


@pytest.mark.parametrize("streamed", [True, False])
async def test_an_idempotency_key_brings_the_same_answer_again(
    server: RunningServer, streamed: bool
) -> None:
    bodies = []
    for _ in range(2):
        async with post(server, {**ASKED, "stream": streamed}, Idempotency_Key="k1") as response:
            assert response.status == 200
            bodies.append(await response.read())
    async with post(server, {**ASKED, "max_tokens": 7}, Idempotency_Key="k1") as response:
        assert response.status == 409
        assert (await error_of(response))["type"] == "conflict_error"

    assert bodies[0] == bodies[1]
    assert server.simulator.stats().requests == 1
    frames = await read_over_sse(server, "k1")
    assert frames[-1]["status"] == "complete"
    assert text_of(frames) == "", "it is not shown on the other faces"


async def test_an_answer_that_is_cancelled_ends_with_an_error(make_server: MakeServer) -> None:
    server = await make_server(Behaviour(ttft=0, interval=0.05, tokens=1000))
    async with post(server, STREAMED, Idempotency_Key="mine") as response:
        while b"text_delta" not in await response.content.readline():
            pass
        async with server.session.delete(f"{server.sse}/mine") as cancelled:
            assert cancelled.status < 300
        body = await response.content.read()

    assert last_event(body)["error"]["code"] == "stream_not_found"
    assert STOP not in body


# What is counted.


async def test_its_requests_and_tokens_are_counted_by_its_name(server: RunningServer) -> None:
    for body in (ASKED, STREAMED):
        async with post(server, body) as response:
            await response.read()

    assert await server.counted("requests", "face", "outcome") == {("anthropic", "ok"): 2}
    tokens = await server.counted("tokens", "type", "source")
    assert tokens["input", "provider"] == 4
    assert tokens["output", "provider"] > 20
    assert ("output", "estimate") not in tokens


async def test_the_log_has_the_status_that_the_client_has(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    server = await make_server(**{"logging.level": "INFO"})
    caplog.set_level(logging.INFO, "aioserver.requests")
    statuses = []
    for model in ("fault-status-529", "fault-status-401", "fault-status-404", "any"):
        async with post(server, {**ASKED, "model": model}) as response:
            statuses.append(response.status)
            await response.read()
        await server.forgive()
    await server.nothing_held()

    lines: list[Any] = [
        record for record in caplog.records if record.getMessage() == "request finished"
    ]
    assert [line.fields["status"] for line in lines] == statuses == [529, 502, 404, 200]
    assert {line.fields["face"] for line in lines} == {"anthropic"}


async def test_a_probe_of_the_server_by_head_is_answered(server: RunningServer) -> None:
    async with server.session.head(server.base + "/") as response:
        assert response.status == 200
