"""What engines and clients do that others stumble over, from the request to the last event: each of
these has broken Claude Code behind some gateway.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from aioserver.protocol import eventstream
from tests.support.message_events import check_run, put_together, read_events
from tests.support.scripted_provider import EVENT_STREAM, LAST_CHUNK, ScriptedProvider, chunk
from tests.support.server import QUICK, provider_entry
from tests.support.simulator import Behaviour, Simulator

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.support.scripted_provider import Peer
    from tests.support.server import MakeServer, RunningServer

BRIDGED = {"llm.providers.sim.messages": "bridge"}
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
ASK: dict[str, Any] = {"model": "m", "max_tokens": 1000, "messages": HELLO}
STREAMED = {**ASK, "stream": True}


def body_of(status: int, content: bytes, kind: bytes = b"application/json") -> bytes:
    head = b"HTTP/1.1 %d X\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n"
    return head % (status, kind, len(content)) + content


def always(*pieces: bytes) -> Callable[[Peer], Awaitable[None]]:
    """A script that answers every request with *pieces*."""

    async def play(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.send(*pieces)

    return play


def events(*data: Any) -> tuple[bytes, ...]:
    """The pieces of an answer in events of this *data*."""
    written = [b"data: %b\n\n" % orjson.dumps(each) for each in data]
    return EVENT_STREAM, *map(chunk, written), chunk(b"data: [DONE]\n\n"), LAST_CHUNK


def delta(**fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": None}]}


async def answered(
    make_server: MakeServer, *pieces: bytes, query: str = "", **asked: Any
) -> tuple[int, bytes]:
    """The status and the body of an answer where the provider sends *pieces*."""
    async with ScriptedProvider(always(*pieces)) as provider:
        address = {"llm.providers.sim.base_url": provider.url}
        server = await make_server(QUICK, **BRIDGED, **address)
        url = f"{server.v1}/messages{query}"
        async with server.session.post(url, json={**ASK, **asked}) as response:
            return response.status, await response.read()


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("status", [400, 502])
async def test_html_as_an_error(make_server: MakeServer, status: int, streamed: bool) -> None:
    page = body_of(status, b"<html>Bad Gateway</html>", b"text/html")

    found, body = await answered(make_server, page, stream=streamed)

    error = orjson.loads(body)["error"]
    assert (found, error["type"]) == (
        status,
        "invalid_request_error" if status == 400 else "api_error",
    )


@pytest.mark.parametrize("streamed", [True, False])
async def test_an_error_object_with_200_and_no_stream(
    make_server: MakeServer, streamed: bool
) -> None:
    error = body_of(200, b'{"error":{"message":"out of memory","code":500}}')

    found, body = await answered(make_server, error, stream=streamed)

    assert (found, orjson.loads(body)["error"]["type"]) == (502, "api_error")


@pytest.mark.parametrize("streamed", [True, False])
async def test_the_beta_path(make_server: MakeServer, streamed: bool) -> None:
    server = await make_server(QUICK, **BRIDGED)
    asked = {**ASK, "stream": streamed}

    async with server.session.post(f"{server.v1}/messages?beta=true", json=asked) as response:
        assert response.status == 200

    # It belongs to the API, and engines do not know it.
    (request,) = server.simulator.requests
    assert (request.path, request.query) == ("/v1/chat/completions", "")


async def test_an_answer_of_one_token(make_server: MakeServer) -> None:
    server = await make_server(QUICK, **BRIDGED)
    asked = {**ASK, "max_tokens": 1}

    async with server.session.post(f"{server.v1}/messages", json=asked) as response:
        answer = await response.json()

    assert (response.status, answer["stop_reason"]) == (200, "max_tokens")


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


async def test_a_lone_surrogate_in_the_history(make_server: MakeServer) -> None:
    server = await make_server(QUICK, **BRIDGED)
    body = b'{"model":"m","max_tokens":9,"messages":[{"role":"user","content":"a\\ud83d"}]}'

    headers = {"Content-Type": "application/json"}
    async with server.session.post(
        f"{server.v1}/messages", data=body, headers=headers
    ) as response:
        assert response.status == 200

    assert server.simulator.bodies[-1]["messages"] == [{"role": "user", "content": "a\ufffd"}]


async def test_a_stream_of_calls_that_ends_with_stop(make_server: MakeServer) -> None:
    call = {"index": 0, "id": "c", "function": {"name": "f", "arguments": "{}"}}
    last = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}

    _, body = await answered(make_server, *events(delta(tool_calls=[call]), last), stream=True)

    assert check_run(read_events(body))["stop_reason"] == "tool_use"


async def test_an_answer_to_a_question_that_was_not_to_be_streamed(
    make_server: MakeServer,
) -> None:
    message: dict[str, Any] = {"role": "assistant", "content": None, "reasoning_content": "Hm"}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}

    found, body = await answered(make_server, body_of(200, orjson.dumps({"choices": [choice]})))

    answer = orjson.loads(body)
    assert (found, answer["content"], answer["stop_reason"]) == (200, [], "end_turn")


async def test_white_space_and_reasoning_do_not_keep_a_fallback_away(
    make_server: MakeServer,
) -> None:
    async with (
        Simulator(QUICK) as other,
        ScriptedProvider(
            always(
                EVENT_STREAM,
                chunk(b"data: %b\n\n" % orjson.dumps(delta(role="assistant", content=""))),
                chunk(b"data: %b\n\n" % orjson.dumps(delta(content="\n\n"))),
                chunk(b'data: {"error":{"message":"out of memory","code":500}}\n\n'),
                LAST_CHUNK,
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


async def test_an_answer_that_breaks_off_is_continued_as_the_same_message(
    make_server: MakeServer,
) -> None:
    changes: dict[str, Any] = {"llm.fallbacks": ["other"]}
    async with Simulator(QUICK) as other:
        entry = provider_entry(other.base_url)
        changes["llm.providers.other"] = entry | {"messages": "bridge", "continuation": "prefill"}
        server = await make_server(Behaviour(ttft=0, interval=0), **BRIDGED, **changes)
        whole = await whole_text(server)
        server.simulator.behaviour = Behaviour(ttft=0, interval=0, cut_after=5)
        async with server.session.post(f"{server.v1}/messages", json=STREAMED) as response:
            body = await response.read()

    message = check_run(read_events(body))
    assert [block["text"] for block in message["content"]] == [whole]
    seams = [line for line in body.split(b"\n") if line.startswith(b": seam ")]
    assert seams


async def whole_text(server: RunningServer) -> str:
    async with server.session.post(f"{server.v1}/messages", json=ASK) as response:
        answer = await response.json()
        text: str = answer["content"][0]["text"]
        return text


async def test_silence_has_pings_which_are_no_answer(make_server: MakeServer) -> None:
    server = await make_server(
        Behaviour(ttft=0.5, interval=0), **BRIDGED, **{"chat.websocket.ping_interval": 0.1}
    )
    async with server.session.post(f"{server.v1}/messages", json=STREAMED) as response:
        body = await response.read()

    kinds = [event.event for event in eventstream.parse(body)]
    assert kinds[0] == b"ping"
    check_run(read_events(body))


async def test_what_came_before_a_break_is_whole_as_far_as_it_goes(
    make_server: MakeServer,
) -> None:
    server = await make_server(Behaviour(ttft=0, interval=0, cut_after=5), **BRIDGED)
    async with server.session.post(f"{server.v1}/messages", json=STREAMED) as response:
        seen = read_events(await response.read())

    assert seen[-1]["type"] == "error"
    assert put_together(seen[:-1])["stop_reason"] is None
