"""Anthropic's Messages API on a provider that has chat completions only: the official SDK sees no
difference.
"""

from __future__ import annotations

import asyncio
import io
import re
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from aioserver.provider_errors import ContextTooLong
from aioserver.providers.error_mapping import check_status
from aioserver.wings.anthropic.attempt import CountingCapabilities, MessagesCapabilities
from aioserver.wings.anthropic.bridge.refused import translate
from tests.support.lazily import lazily
from tests.support.message_events import check_run, put_together, read_events
from tests.support.scripted_engine import engine, refuses, said
from tests.support.scripted_provider import (
    EVENT_STREAM,
    LAST_CHUNK,
    ScriptedProvider,
    answering,
    chunk,
)
from tests.support.sdk import anthropic_of
from tests.support.server import QUICK, SIM_HTTP_CLIENT, provider_entry
from tests.support.simulator import Behaviour, Simulator
from tests.support.waiting import patience

if TYPE_CHECKING:
    import anthropic

    from tests.support.scripted_provider import Peer
    from tests.support.server import MakeServer, RunningServer
else:
    anthropic = lazily("anthropic")

BRIDGED = {"llm.providers.sim.messages": "bridge"}
AUTO = {"llm.providers.sim.messages": "auto"}
WITHOUT = Behaviour(ttft=0, interval=0, messages=False, counts=False)
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
ASK: dict[str, Any] = {"model": "m", "max_tokens": 1000, "messages": HELLO}
STREAMED = {**ASK, "stream": True}
WEATHER: Any = {
    "name": "weather",
    "description": "Tells the weather.",
    "input_schema": {"type": "object", "properties": {"days": {"type": "integer"}}},
}
SEARCH: Any = {"type": "web_search_20250305", "name": "web_search"}
JSON = b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"


@pytest.fixture
async def server(make_server: MakeServer) -> RunningServer:
    return await make_server(QUICK, **BRIDGED)


def post(server: RunningServer, body: object, path: str = "messages") -> Any:
    return server.session.post(f"{server.v1}/{path}", json=body)


async def answer_of(server: RunningServer, body: Any, path: str = "messages") -> tuple[int, Any]:
    async with post(server, body, path) as response:
        return response.status, orjson.loads(await response.read())


async def stream_of(server: RunningServer, body: Any) -> list[dict[str, Any]]:
    async with post(server, body) as response:
        assert response.status == 200, await response.text()
        return read_events(await response.read())


async def shows(server: RunningServer, **facts: Any) -> None:
    """Wait until `/stats`, which is made now and then, says that *facts* are known."""
    async with asyncio.timeout(patience(30)):
        while True:
            async with server.session.get(f"{server.base}/stats") as response:
                state = (await response.json())["providers"]["sim"]["learned"]
            if state | facts == state:
                return
            await asyncio.sleep(0.05)


def paths(simulator: Simulator) -> list[str]:
    return [request.path.removeprefix("/v1/") for request in simulator.requests]


def alike(message: dict[str, Any]) -> dict[str, Any]:
    """Without the ids, which differ from answer to answer."""
    content = [{**block, "id": ""} if "id" in block else block for block in message["content"]]
    return {**message, "id": "", "content": content}


async def test_an_answer_is_the_same_streamed_or_not(server: RunningServer) -> None:
    for tools in ([], [WEATHER]):
        asked = {**ASK, "tools": tools, "tool_choice": {"type": "any"}} if tools else ASK
        message = check_run(await stream_of(server, {**asked, "stream": True}))
        status, whole = await answer_of(server, asked)

        assert status == 200
        assert alike(whole) == alike(message)
        assert message["stop_reason"] == ("tool_use" if tools else "end_turn")
    assert set(paths(server.simulator)) == {"chat/completions"}


async def test_the_sdk_calls_a_tool_and_brings_its_result(server: RunningServer) -> None:
    async with anthropic_of(server.base) as sdk:
        asked: dict[str, Any] = {"model": "m", "max_tokens": 1000, "tools": [WEATHER]}
        question: Any = {"role": "user", "content": "call a tool"}
        async with sdk.messages.stream(
            **asked, messages=[question], tool_choice={"type": "any"}
        ) as stream:
            first = await stream.get_final_message()
        (call,) = first.content
        assert call.type == "tool_use"
        assert call.input == {"days": 1}
        result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
        again = await sdk.messages.create(
            **asked,
            messages=[
                question,
                {"role": "assistant", "content": first.content},
                {"role": "user", "content": [result, {"type": "text", "text": "Thanks"}]},
            ],
        )

    assert again.content[0].type == "text"
    sent = server.simulator.bodies[-1]["messages"]
    assert [message["role"] for message in sent] == ["user", "assistant", "tool", "user"]
    assert sent[1]["tool_calls"][0]["id"] == sent[2]["tool_call_id"]


async def test_models_of_a_bridged_provider_are_listed(server: RunningServer) -> None:
    async with server.session.get(
        f"{server.v1}/models?limit=1000", headers={"anthropic-version": "2023-06-01"}
    ) as response:
        assert [model["id"] for model in (await response.json())["data"]] == [
            "sim",
            "sim/sim-model",
        ]


async def test_the_names_that_an_agent_has_built_in_are_one_line(make_server: MakeServer) -> None:
    server = await make_server(QUICK, **BRIDGED, **{"llm.models": {"claude-*": ["sim"]}})

    check_run(await stream_of(server, {**STREAMED, "model": "claude-opus-4-1"}))

    assert [body["model"] for body in server.simulator.bodies] == ["sim-model"]


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_provider_without_messages_is_found_out_once(
    make_server: MakeServer, streamed: bool
) -> None:
    server = await make_server(WITHOUT, **AUTO)
    await shows(server, messages="unknown", refused_words=[])
    for _ in range(2):
        if streamed:
            check_run(await stream_of(server, STREAMED))
        else:
            assert (await answer_of(server, ASK))[0] == 200

    await shows(server, messages="bridge")
    assert paths(server.simulator) == ["chat/completions"] * 2
    assert server.simulator.stats().connections_accepted == 1
    assert await server.counted("retries", "reason") == {}
    assert await server.counted("provider_attempts", "outcome") == {("http_4xx",): 1, ("ok",): 2}
    server.simulator.behaviour = QUICK
    await server.forgive()
    await answer_of(server, ASK)
    assert paths(server.simulator)[-1] == "messages"


@pytest.mark.parametrize("messages", [True, False])
async def test_an_engine_of_which_nothing_is_written_answers_messages(
    make_server: MakeServer, *, messages: bool
) -> None:
    async with Simulator(QUICK if messages else WITHOUT) as engine:
        changes = {"llm.providers.bare": provider_entry(engine.base_url), "llm.active": "bare"}
        server = await make_server(**changes)
        for model in ("bare", "claude-sonnet-4-5"):
            status, answer = await answer_of(server, {**ASK, "model": model})
            assert (status, answer["type"]) == (200, "message")
        status, _ = await answer_of(server, ASK, "messages/count_tokens")
        assert status == 200
        assert paths(engine)[0] == ("messages" if messages else "chat/completions")


async def test_a_provider_that_speaks_messages_is_asked_for_them(make_server: MakeServer) -> None:
    server = await make_server(**AUTO)

    status, answer = await answer_of(server, {**ASK, "model": "fault-404"})
    assert (status, answer["type"]) == (404, "error")
    await answer_of(server, ASK)
    await shows(server, messages="speaks")
    server.simulator.behaviour = WITHOUT
    status, _ = await answer_of(server, ASK)

    assert status == 404
    assert not server.provider.capabilities(MessagesCapabilities).bridged


async def test_with_true_its_404_passes(make_server: MakeServer) -> None:
    server = await make_server(WITHOUT)

    assert (await answer_of(server, ASK))[0] == 404
    assert (await answer_of(server, ASK, "messages/count_tokens"))[0] == 404


async def test_tokens_are_estimated_where_nobody_counts_them(make_server: MakeServer) -> None:
    server = await make_server(Behaviour(ttft=0, interval=0, counts=False), **AUTO)
    asked = {"model": "m", "messages": HELLO, "tools": [WEATHER]}
    found = []
    for _ in range(2):
        async with post(server, asked, "messages/count_tokens") as response:
            assert response.status == 200
            assert response.headers["x-aioserver-estimated"] == "input_tokens"
            found.append((await response.json())["input_tokens"])

    assert found[0] == found[1] > 10
    assert not server.simulator.requests
    assert server.provider.capabilities(CountingCapabilities).bridged
    assert not server.provider.capabilities(MessagesCapabilities).bridged
    # An engine may speak messages, and not count their tokens.
    await answer_of(server, ASK)
    assert paths(server.simulator) == ["messages"]


async def test_nobody_is_asked_for_a_count_that_is_an_estimate(server: RunningServer) -> None:
    status, answer = await answer_of(server, ASK, "messages/count_tokens")

    assert (status, answer["input_tokens"] > 0) == (200, True)
    assert server.simulator.stats().requests == 0
    status, answer = await answer_of(server, {**ASK, "tools": [SEARCH]}, "messages/count_tokens")
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_hosted_tool_is_left_out_or_refused(server: RunningServer, streamed: bool) -> None:
    asked = {**ASK, "stream": streamed, "tools": [SEARCH, WEATHER]}
    async with post(server, asked) as response:
        assert response.status == 200
        assert response.headers["x-aioserver-left-out"] == "web_search"
    assert len(server.simulator.bodies[-1]["tools"]) == 1
    assert await server.counted("left_out_tools", "provider") == {("sim",): 1}

    status, answer = await answer_of(server, {**asked, "tools": [SEARCH]})

    assert status == 400
    assert answer["error"]["type"] == "invalid_request_error"
    assert "web_search" in answer["error"]["message"]


async def test_a_thread_that_is_continued_is_refused_in_words_that_its_client_knows(
    server: RunningServer,
) -> None:
    status, answer = await answer_of(server, {**ASK, "thread": {"type": "continue", "id": "t"}})

    assert status == 400
    assert answer["error"]["type"] == "invalid_request_error"
    assert (
        "capability_rejected: beta_header:message-threads-2026-08-12" in answer["error"]["message"]
    )
    assert answer["error"]["details"] == {"error_code": "thread_unsupported_request"}


async def test_failover_goes_from_one_kind_of_provider_to_the_other(
    make_server: MakeServer,
) -> None:
    async with Simulator(QUICK) as native:
        other = provider_entry(native.base_url) | {"messages": True}
        changes = {"llm.fallbacks": ["other"], "llm.providers.other": other}
        server = await make_server(QUICK, **BRIDGED, **changes)
        check_run(await stream_of(server, STREAMED))

        server.simulator.behaviour = Behaviour(fail_rate=1.0)
        await stream_of(server, STREAMED)
        # What has no form in chat completions goes to the one that has them.
        server.simulator.behaviour = QUICK
        await answer_of(server, {**ASK, "tools": [SEARCH]})
        assert paths(native) == ["messages"] * 2

        await server.change(
            **BRIDGED, **changes | {"llm.active": "other", "llm.fallbacks": ["sim"]}
        )
        native.behaviour = Behaviour(fail_rate=1.0)
        check_run(await stream_of(server, STREAMED))
        assert paths(server.simulator)[-1] == "chat/completions"


async def test_our_thinking_never_reaches_a_provider_that_speaks_messages(
    make_server: MakeServer,
) -> None:
    server = await make_server()
    ours = {"type": "thinking", "thinking": "Hm", "signature": "aioserver.unsigned"}
    foreign = {"type": "thinking", "thinking": "Hm", "signature": "EqQB"}
    text = {"type": "text", "text": "aioserver.unsigned"}
    history = [
        *HELLO,
        {"role": "assistant", "content": [ours, text, foreign]},
        {"role": "user", "content": "aioserver.unsigned"},
        {"role": "assistant", "content": [ours]},
        *HELLO,
    ]

    await answer_of(server, {**ASK, "messages": history})

    assert server.simulator.bodies[-1]["messages"] == [
        *HELLO,
        {"role": "assistant", "content": [text, foreign]},
        {"role": "user", "content": "aioserver.unsigned"},
        *HELLO,
    ]


async def asked_of(
    make_server: MakeServer, *answers: tuple[int, Any], **asked: Any
) -> tuple[int, Any, list[Any]]:
    """What the client gets, and what the provider was asked, which gives these *answers*."""
    async with engine(make_server, *answers) as (server, seen):
        status, answer = await answer_of(server, {**ASK, **asked})
    return status, answer, seen


async def test_reasoning_goes_back_in_the_field_in_which_it_came(make_server: MakeServer) -> None:
    async with engine(make_server, said(reasoning="Hm", content="Yes")) as (server, seen):
        thinking = {**ASK, "thinking": {"type": "adaptive"}}
        _, first = await answer_of(server, thinking)
        answered = {"role": "assistant", "content": first["content"]}
        await answer_of(server, {**thinking, "messages": [*HELLO, answered, *HELLO]})

    assert [block["type"] for block in first["content"]] == ["thinking", "text"]
    assert seen[1]["messages"][1] == {"role": "assistant", "content": "Yes", "reasoning": "Hm"}


@pytest.mark.parametrize(
    ("word", "asked"),
    [
        ("top_k", {"top_k": 5}),
    ],
)
async def test_a_word_that_the_engine_refuses_is_learned(
    make_server: MakeServer, word: str, asked: dict[str, Any]
) -> None:
    refusal = refuses(f"Unrecognized request argument supplied: {word}")
    async with engine(make_server, refusal, said(content="Yes")) as (server, seen):
        for _ in range(2):
            assert (await answer_of(server, {**ASK, **asked}))[0] == 200
        assert await server.counted("retries", "reason") == {}

        assert await server.counted("learnt_repeats", "what") == {(word,): 1}
        assert await server.counted("bridged_requests", "api") == {("messages",): 3}

    assert [word in body for body in seen] == [True, False, False]


VLLM = (
    "'max_tokens' or 'max_completion_tokens' is too large: 64000. This model's maximum context "
    "length is 32768 tokens and your request has 1024 input tokens (64000 > 32768 - 1024). "
)
GROQ = (
    "`max_tokens` must be less than or equal to `8192`, the maximum value for `max_tokens` is less "
    "than the `context_window` for this model"
)


@pytest.mark.parametrize(("message", "bound"), [(VLLM, 32768 - 1024 - 16), (GROQ, 8192)])
async def test_a_bound_that_is_too_large_is_lowered(
    make_server: MakeServer, message: str, bound: int
) -> None:
    async with engine(make_server, refuses(message), said(content="Yes")) as (server, seen):
        for _ in range(2):
            assert (await answer_of(server, {**ASK, "max_tokens": 64_000}))[0] == 200
        await shows(server, context_limit={"m": 32768} if message == VLLM else {})
        sizes = {}
        for model in ("m", "sim/m", "sim", "another"):
            async with server.session.get(f"{server.v1}/models/{model}") as response:
                sizes[model] = (await response.json()).get("context_length")

    known = 32768 if message == VLLM else None
    assert sizes == {"m": known, "sim/m": known, "sim": None, "another": None}
    assert [body["max_tokens"] for body in seen[:2]] == [64_000, bound]
    assert bound <= seen[2]["max_tokens"] < 32768


async def test_a_refusal_is_learned_from_once(make_server: MakeServer) -> None:
    status, answer, seen = await asked_of(make_server, refuses("top_k is wrong"), top_k=5)

    assert (status, len(seen)) == (400, 2)
    assert answer == {
        "type": "error",
        "error": {
            "type": "invalid_request_error",
            "message": "top_k is wrong",
            "code": "provider_error",
        },
    }


@pytest.mark.parametrize(
    "message",
    [
        "no template for 'What is top_k?'",
        f"no template for {VLLM!r}",
        f"no template for {GROQ!r}",
        "no template for 'max_tokens is not supported, use max_completion_tokens'",
    ],
)
async def test_a_refusal_that_repeats_what_a_client_has_written_costs_others_nothing(
    make_server: MakeServer, message: str
) -> None:
    refused = [refuses(message), refuses(message)]
    async with engine(make_server, *refused, said(content="Yes")) as (server, seen):
        asked = {**ASK, "top_k": 5, "max_tokens": 64_000}
        statuses = [(await answer_of(server, asked))[0] for _ in range(2)]

    # It was sent once more, and refused again: so it was about something else.
    assert statuses == [400, 200]
    assert seen[0] == seen[2] != seen[1]


async def test_a_word_that_was_not_sent_is_not_learned(make_server: MakeServer) -> None:
    status, _, seen = await asked_of(make_server, refuses("top_k and temperature differ"))

    assert (status, len(seen)) == (400, 1)


TOO_LONG: dict[str, tuple[Any, str]] = {
    "vLLM": (
        refuses(
            "This model's maximum context length is 4096 tokens. However, you requested 9100 "
            "tokens (9000 in the messages, 100 in the completion)."
        ),
        "prompt is too long: 9000 tokens > 4096 maximum",
    ),
    "SGLang": (
        refuses(
            "The input (9000 tokens) is longer than the model's context length (8192 tokens)."
        ),
        "prompt is too long: 9000 tokens > 8192 maximum",
    ),
    "llama.cpp": (
        refuses(
            "request exceeds the available context size, try increasing it",
            type="exceed_context_size_error",
            n_prompt_tokens=9000,
            n_ctx=4096,
        ),
        "prompt is too long: 9000 tokens > 4096 maximum",
    ),
    "OpenAI": (
        refuses(
            "This model's maximum context length is 8192 tokens. However, your messages resulted "
            "in 9000 tokens.",
            code="context_length_exceeded",
        ),
        "prompt is too long: 9000 tokens > 8192 maximum",
    ),
    "Groq": (
        refuses(
            "Please reduce the length of the messages or completion.",
            code="context_length_exceeded",
        ),
        "prompt is too long: Please reduce the length of the messages or completion.",
    ),
}


@pytest.mark.parametrize("engine", TOO_LONG)
def test_a_prompt_that_is_too_long_is_refused_in_words_that_its_client_knows(engine: str) -> None:
    (status, content), message = TOO_LONG[engine]
    body = orjson.dumps(content)
    with pytest.raises(ContextTooLong) as caught:
        check_status("sim", status, {}, body)

    translate(caught.value, body)

    assert caught.value.provider_answer is not None
    shown, answer = caught.value.provider_answer
    error = orjson.loads(answer)["error"]
    assert (shown, error["type"], error["message"]) == (400, "invalid_request_error", message)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Too many tokens a minute: 6,000 of 5,000.", "Too many tokens a minute: 6,000 of 5,000."),
        ("The API key sk-1 is limited.", "sim limits our rate"),
        (None, "sim limits our rate"),
    ],
)
async def test_a_client_learns_why_an_engine_limits_its_rate(
    make_server: MakeServer, text: str | None, shown: str
) -> None:
    found, answer, _ = await asked_of(make_server, (429, {"error": {"message": text}}))

    assert found == 429
    assert answer["error"]["type"] == "rate_limit_error"
    assert answer["error"]["message"] == shown


@pytest.mark.parametrize("bridged", [True, False])
@pytest.mark.parametrize("passed", [(), ("anthropic-beta",)])
async def test_the_headers_of_the_api_go_to_those_that_speak_it(
    make_server: MakeServer, passed: tuple[str, ...], bridged: bool
) -> None:
    heads: list[str] = []

    async def play(peer: Peer) -> None:
        head, _, _ = (await peer.request()).partition(b"\r\n\r\n")
        heads.append(head.decode())
        body = b"{}"
        await peer.send(JSON % (400, len(body), body))

    async with ScriptedProvider(play) as provider:
        server = await make_server(
            QUICK,
            **{
                "llm.providers.sim.base_url": provider.url,
                "llm.providers.sim.messages": "bridge" if bridged else True,
                "llm.providers.sim.pass_headers": list(passed),
            },
        )
        headers = {"anthropic-beta": "context-1m", "anthropic-version": "2023-06-01", "a": "b"}
        url = f"{server.v1}/messages?beta=true"
        async with server.session.post(url, json=ASK, headers=headers) as response:
            assert response.status == 400

    (head,) = heads
    lines = [line.partition(": ")[0].lower() for line in head.split("\r\n")[1:]]
    own = sorted(name for name in lines if name.startswith("anthropic-"))
    assert own == (sorted(passed) if bridged else ["anthropic-beta", "anthropic-version"])
    assert ("beta" in head.partition("\r\n")[0]) is not bridged


@pytest.mark.virtual_time
async def test_a_stream_that_waits_is_told_its_position(make_server: MakeServer) -> None:
    server = await make_server(
        Behaviour(ttft=0, interval=0.03, tokens=15),
        **{
            **BRIDGED,
            f"{SIM_HTTP_CLIENT}.concurrent_requests": 1,
            "chat.websocket.ping_interval": 0.1,
        },
    )

    async def ask() -> bytes:
        async with post(server, STREAMED) as response:
            assert response.status == 200
            body: bytes = await response.read()
            return body

    bodies = await asyncio.gather(*(ask() for _ in range(5)))

    told = [
        re.findall(rb": queued at=provider position=(\d) eta=[0-9.]+\n\n", body) for body in bodies
    ]
    # The first two may have waited for less than an interval.
    assert sum(map(bool, told)) >= 3
    for positions, body in zip(told, bodies, strict=True):
        assert positions == sorted(positions, reverse=True)
        assert body.count(b"event: ping") >= len(positions)
        check_run(read_events(body))
    # The official client reads over it.
    async with anthropic_of(server.base) as sdk, asyncio.TaskGroup() as clients:
        clients.create_task(ask())
        async with sdk.messages.stream(**ASK) as stream:
            assert (await stream.get_final_text()).strip()


async def test_what_breaks_off_has_no_end(make_server: MakeServer) -> None:
    events = [
        b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n',
        b'data: {"error":{"message":"out of memory","code":500}}\n\n',
    ]

    async def play(peer: Peer) -> None:
        await peer.request()
        await peer.send(EVENT_STREAM, *map(chunk, events), LAST_CHUNK)

    async with ScriptedProvider(play) as provider:
        address = {"llm.providers.sim.base_url": provider.url}
        server = await make_server(QUICK, **BRIDGED, **address)
        seen = await stream_of(server, STREAMED)

    assert seen[-1]["type"] == "error"
    assert seen[-1]["error"]["type"] == "api_error"
    assert put_together(seen[:-1])["content"] == [{"type": "text", "text": "a"}]


@pytest.mark.parametrize(
    ("status", "content", "streamed", "expected"),
    [
        (400, b"<html>Bad Request</html>", False, (400, "invalid_request_error")),
        (502, b"<html>Bad Gateway</html>", True, (502, "api_error")),
        (200, {"error": {"message": "out of memory", "code": 500}}, True, (502, "api_error")),
        (200, {"error": {"message": "out of memory", "code": 500}}, False, (502, "api_error")),
        (401, {"error": {"message": "no", "code": 401}}, False, (502, "api_error")),
        (503, {"error": {"message": "no", "code": 503}}, False, (502, "api_error")),
    ],
)
async def test_the_faults_of_an_engine_are_those_of_any_provider(
    make_server: MakeServer,
    status: int,
    content: Any,
    streamed: bool,
    expected: tuple[int, str],
) -> None:
    found, answer, _ = await asked_of(make_server, (status, content), stream=streamed)

    assert (found, answer["error"]["type"]) == expected


async def test_a_history_of_a_megabyte(make_server: MakeServer) -> None:
    server = await make_server(QUICK, **BRIDGED)
    turns: list[Any] = []
    for number in range(200):
        name = f"c{number}"
        use = {"type": "tool_use", "id": name, "name": "f", "input": {"n": number}}
        result = {"type": "tool_result", "tool_use_id": name, "content": "é" * 2500}
        turns += [
            {"role": "assistant", "content": [use]},
            {"role": "user", "content": [result]},
        ]
    asked = io.BytesIO(orjson.dumps({**STREAMED, "messages": [*HELLO, *turns]}))
    headers = {"Content-Type": "application/json"}

    async with server.session.post(
        f"{server.v1}/messages", data=asked, headers=headers
    ) as response:
        check_run(read_events(await response.read()))

    (sent,) = server.simulator.bodies
    assert len(sent["messages"]) == 401


async def test_white_space_and_reasoning_do_not_keep_a_fallback_away(
    make_server: MakeServer,
) -> None:
    async with (
        Simulator(QUICK) as other,
        ScriptedProvider(
            answering(
                (
                    EVENT_STREAM,
                    chunk(b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'),
                    chunk(b'data: {"choices":[{"delta":{"content":"\\n\\n"}}]}\n\n'),
                    chunk(b'data: {"error":{"message":"out of memory","code":500}}\n\n'),
                    LAST_CHUNK,
                )
            )
        ) as provider,
    ):
        changes = {
            "llm.providers.sim.base_url": provider.url,
            "llm.providers.sim.http_client.max_retries": 0,
            "llm.fallbacks": ["other"],
            "llm.providers.other": provider_entry(other.base_url) | {"messages": "bridge"},
        }
        server = await make_server(QUICK, **BRIDGED, **changes)
        async with server.session.post(f"{server.v1}/messages", json=STREAMED) as response:
            message = check_run(read_events(await response.read()))

    assert message["model"] == "other-model"
    assert await server.counted("provider_attempts", "outcome") == {("http_5xx",): 1, ("ok",): 1}


async def test_an_answer_that_breaks_off_is_continued_as_the_same_message(
    make_server: MakeServer,
) -> None:
    changes: dict[str, Any] = {"llm.fallbacks": ["other"]}
    async with Simulator(QUICK) as other:
        entry = provider_entry(other.base_url)
        changes["llm.providers.other"] = entry | {"messages": "bridge", "continuation": "prefill"}
        server = await make_server(Behaviour(ttft=0, interval=0), **BRIDGED, **changes)
        _, answer = await answer_of(server, ASK)
        server.simulator.behaviour = Behaviour(ttft=0, interval=0, cut_after=5)
        async with server.session.post(f"{server.v1}/messages", json=STREAMED) as response:
            body = await response.read()

    message = check_run(read_events(body))
    assert [block["text"] for block in message["content"]] == [answer["content"][0]["text"]]
    seams = [line for line in body.split(b"\n") if line.startswith(b": seam ")]
    assert seams
