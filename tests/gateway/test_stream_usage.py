"""Streams below `/v1`: their usage is asked for, counted, and shown to those who have asked."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.chat import CHAT, chat, to_end
from tests.support.faces import over_sse, over_websocket
from tests.support.scripted_provider import (
    EVENT_STREAM,
    LAST_CHUNK,
    ScriptedProvider,
    chunk,
)
from tests.support.server import QUICK, provider_entry
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.support.faces import Seen
    from tests.support.scripted_provider import Peer
    from tests.support.server import MakeServer, RunningServer

BODIES: dict[str, dict[str, Any]] = {
    "chat/completions": CHAT,
    "completions": {"prompt": "Hello"},
}
ASKING = {"stream_options": {"include_usage": True}}


async def ask(
    server: RunningServer, body: dict[str, Any], path: str = "chat/completions", **headers: str
) -> bytes:
    """The bytes of a streamed answer."""
    asked = {"model": "m", **BODIES[path], "stream": True, **body}
    async with server.session.post(f"{server.v1}/{path}", json=asked, headers=headers) as answer:
        assert answer.status == 200, await answer.text()
        return await answer.read()


def usages(data: bytes) -> list[Any]:
    """The usage of each event that has one."""
    events = [line[6:] for line in data.split(b"\n") if line.startswith(b"data: {")]
    return [usage for event in events if (usage := json.loads(event).get("usage"))]


async def parts(server: RunningServer, caplog: pytest.LogCaptureFixture) -> dict[str, Any]:
    """What the log says of the last request, once it has ended."""
    await until(lambda: "request finished" in caplog.messages)
    fields: dict[str, Any] = getattr(caplog.records[-1], "fields", {})
    caplog.clear()
    return fields


@pytest.fixture(autouse=True)
def _logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="aioserver.requests")
    caplog.set_level("INFO", logger="aioserver.providers")


@pytest.mark.parametrize("path", BODIES)
async def test_client_that_does_not_ask_does_not_see_the_usage_that_is_counted(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    server = await make_server(replace(QUICK, cached=1, reasoning=2))
    for options in ({}, {"stream_options": None}, {"stream_options": {"include_usage": False}}):
        seen = await ask(server, options, path)

        line = await parts(server, caplog)
        assert server.simulator.bodies[-1]["stream_options"] == {"include_usage": True}
        assert not usages(seen)
        assert seen.endswith(b"data: [DONE]\n\n")
        assert line["tokens_in"] == 2
        assert line["cached_tokens"] == 1
        assert line["tokens_out"] > 10
        assert line["reasoning_tokens"] == 2
        assert "tokens_source" not in line


@pytest.mark.parametrize("path", BODIES)
async def test_client_that_asks_gets_the_usage(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    server = await make_server()
    options = {"stream_options": {"include_usage": True, "include_obfuscation": False}}
    seen = await ask(server, options, path)

    line = await parts(server, caplog)
    assert server.simulator.bodies[-1]["stream_options"] == options["stream_options"]
    (usage,) = usages(seen)
    assert usage["completion_tokens"] == line["tokens_out"]


async def test_other_options_of_the_client_stay(make_server: MakeServer) -> None:
    server = await make_server()
    await ask(server, {"stream_options": {"include_obfuscation": False}})

    sent = server.simulator.bodies[-1]["stream_options"]
    assert sent == {"include_usage": True, "include_obfuscation": False}


@pytest.mark.parametrize(("usage", "shown"), [("always", 1), ("asked", 0)])
async def test_provider_that_is_not_to_be_asked_gets_the_body_as_it_came(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture, usage: str, shown: int
) -> None:
    server = await make_server(
        replace(QUICK, usage=usage), **{"llm.providers.sim.stream_usage": False}
    )
    seen = await ask(server, {})

    line = await parts(server, caplog)
    assert "stream_options" not in server.simulator.bodies[-1]
    assert len(usages(seen)) == shown
    # What comes unasked is counted all the same.
    assert line.get("tokens_source") == (None if shown else "estimate")
    assert line["tokens_out"] > 10


async def test_whole_answers_embeddings_and_other_faces_are_as_they_were(
    make_server: MakeServer,
) -> None:
    server = await make_server()
    for path, body in (*BODIES.items(), ("embeddings", {"input": "Hello"})):
        asked = {"model": "m", **body, "stream": False}
        async with server.session.post(f"{server.v1}/{path}", json=asked) as answer:
            assert answer.status == 200
        assert "stream_options" not in server.simulator.bodies[-1]
    for over in (over_websocket, over_sse):
        seen = await over(server, "m")
        assert b'"usage":{"prompt_tokens":' in seen.raw


async def test_key_of_a_repeated_request_is_of_the_bytes_as_they_came(
    make_server: MakeServer,
) -> None:
    server = await make_server()
    seen = [await ask(server, {}, **{"Idempotency-Key": "k"}) for _ in range(2)]

    assert seen[0] == seen[1]
    assert server.simulator.stats().requests == 1


@pytest.mark.parametrize("path", BODIES)
async def test_engine_that_refuses_is_asked_without_at_once_and_not_again(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    server = await make_server(replace(QUICK, refuses=("stream_options",)))
    for number in (1, 2):
        body = {"model": "m", **BODIES[path], "stream": True}
        async with server.session.post(f"{server.v1}/{path}", json=body) as answer:
            assert answer.status == 200
            assert answer.headers["x-aioserver-attempts"] == "1"
            await answer.read()
        line = await parts(server, caplog)
        assert line["attempts"] == 1
        assert line["tokens_source"] == "estimate"
        assert line["tokens_out"] >= 1
        # The first was refused once, and the second not.
        assert server.simulator.stats().requests == 1 + number
        assert "stream_options" not in server.simulator.bodies[-1]
    # A refusal is no part, no retry, and no trouble.
    assert await server.counted("retries", "provider") == {}
    assert not server.incidents()

    await server.change(**{"llm.providers.sim.temperature": 0.1})
    await ask(server, {}, path)
    assert server.simulator.stats().requests == 5, "a reload forgets it"


FACES: dict[str, dict[str, Any]] = {
    **BODIES,
    "messages": {**CHAT, "max_tokens": 9},
    "responses": {"input": "Hello"},
}
OWN_FACES: dict[str, Callable[..., Awaitable[Seen]]] = {
    "websocket": over_websocket,
    "sse": over_sse,
}


@pytest.mark.parametrize("first", [*FACES, *OWN_FACES])
async def test_what_is_learned_of_an_engine_holds_for_the_streams_of_every_api(
    make_server: MakeServer, first: str
) -> None:
    server = await make_server(
        replace(QUICK, refuses=("stream_options",)),
        **{"llm.providers.sim.messages": "bridge", "llm.providers.sim.responses": False},
    )
    asked = (first, *FACES, *OWN_FACES)
    for number, path in enumerate(asked):
        if (own := OWN_FACES.get(path)) is not None:
            seen = await own(server, "m", name=f"own-{number}")
            assert seen.end == "complete"
            continue
        body = {"model": "m", "stream": True, **FACES[path]}
        async with server.session.post(f"{server.v1}/{path}", json=body) as answer:
            assert answer.status == 200
            await answer.read()

    sent = ["stream_options" in body for body in server.simulator.bodies]
    assert sent == [True, *[False] * len(asked)]
    counted = await server.counted("learnt_repeats", "what")
    assert counted == {("stream_options",): 1}


async def test_options_that_a_client_of_our_own_faces_has_written_are_refused_to_it(
    make_server: MakeServer,
) -> None:
    server = await make_server(replace(QUICK, refuses=("stream_options",)))
    async with server.connect() as ws:
        await ws.send_json(chat("own", "Hello", model="m", options=ASKING))
        last = (await to_end(ws, "own"))[-1]

    assert last["status"] == "error"
    assert "stream_options" in json.dumps(last["chunk"])
    assert server.simulator.stats().requests == 1


async def test_one_line_says_what_was_learned(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    server = await make_server(replace(QUICK, refuses=("stream_options",)))
    for _ in range(3):
        await ask(server, {})

    learned = [message for message in caplog.messages if "rejected" in message]
    assert learned == ["provider sim rejected stream_options; omitting it from now on"]


@pytest.mark.parametrize(
    "options", [ASKING, {"stream_options": {"include_usage": True, "x": "y"}}]
)
async def test_what_a_client_has_asked_itself_is_refused_to_it(
    make_server: MakeServer, options: dict[str, Any]
) -> None:
    server = await make_server(replace(QUICK, refuses=("stream_options",)))
    body = {"model": "m", **CHAT, "stream": True, **options}
    async with server.session.post(f"{server.v1}/chat/completions", json=body) as answer:
        assert answer.status == 400
        assert b"stream_options" in await answer.read()
    assert server.simulator.stats().requests == 1


async def test_client_that_makes_a_refusal_say_the_word_costs_nobody_the_usage(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    server = await make_server(replace(QUICK, refuses=("evil",)))
    # The refusal repeats what the client has written.
    server.simulator.behaviour = replace(QUICK, refuses=("no stream_options",))
    body = {"model": "m", **CHAT, "stream": True, "no stream_options": 1}
    async with server.session.post(f"{server.v1}/chat/completions", json=body) as answer:
        assert answer.status == 400
    assert server.simulator.stats().requests == 2, "it was sent once more, and refused again"
    caplog.clear()

    await ask(server, {})
    assert server.simulator.bodies[-1]["stream_options"] == {"include_usage": True}


async def test_usage_that_comes_in_any_reads_is_taken_out(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    text = b'data: {"choices":[{"index":0,"delta":{"content":"Hi"},"finish_reason":null}]}\n\n'
    finish = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
    counts = b'{"prompt_tokens":7,"completion_tokens":3,"total_tokens":10}'
    usage = b'data: {"choices":[],"usage":%b}\n\n' % counts
    done = b"data: [DONE]\n\n"
    reads = [
        [text, text, finish, usage, done],
        [text, text + finish + usage + done],
        [text, text, finish + usage, done],
        [text, text, finish, usage + done],
        [text, text, finish + usage[:30], usage[30:] + done],
        [text, text, finish, usage[:9], usage[9:-1], usage[-1:], done],
    ]
    scripts = iter(reads)

    async def play(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.send(EVENT_STREAM)
            await peer.send(*map(chunk, next(scripts)), LAST_CHUNK)

    async with ScriptedProvider(play) as provider:
        entry = provider_entry(provider.url)
        server = await make_server(**{"llm.providers.first": entry, "llm.active": "first"})
        for script in reads:
            assert await ask(server, {}) == text + text + finish + done, script
            line = await parts(server, caplog)
            assert (line["tokens_in"], line["tokens_out"]) == (7, 3), script
            assert "tokens_source" not in line


@pytest.mark.parametrize("came", [0, 20])
async def test_answer_cut_behind_its_finish_is_whole_and_its_usage_an_estimate(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture, came: int
) -> None:
    text = b'data: {"choices":[{"index":0,"delta":{"content":"Hi"},"finish_reason":null}]}\n\n'
    finish = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":7}}\n\n'[:came]

    async def play(peer: Peer) -> None:
        await peer.request()
        await peer.send(EVENT_STREAM, chunk(text), chunk(finish), *([chunk(usage)] * (came > 0)))

    async with ScriptedProvider(play) as provider:
        entry = provider_entry(provider.url)
        server = await make_server(**{"llm.providers.first": entry, "llm.active": "first"})
        assert await ask(server, {}) == text + finish + b"data: [DONE]\n\n"
        line = await parts(server, caplog)
        assert line["outcome"] == "ok"
        assert line["tokens_source"] == "estimate"
        assert line["tokens_in"] > 0
        assert line["tokens_out"] == 2
