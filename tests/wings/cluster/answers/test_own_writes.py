"""Who has seen the end of an answer finds what it has left, at whatever instance he asks next."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest

from tests.support.chat import chat, frames_of, to_end
from tests.support.pairs import FORGETFUL, pair_in
from tests.support.responses import connect, create
from tests.support.responses import to_end as to_response_end

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from tests.support.pairs import Pair
    from tests.support.server import RunningServer

    # Asks a text after what an id names, if any; returns the id for the next one.
    Ask = Callable[[RunningServer, str, str | None], Awaitable[str]]

# Another process takes part, whose time does not jump.
pytestmark = pytest.mark.real_time
# Seconds for each way to Redis and back, of the instance that writes: several times as long as the
# end of an answer waits, and less than others wait for what is late, or than the answer takes from
# the first event on, by which clients know a response.
LATE = 0.1
STEADY = replace(FORGETFUL, interval=0.02, tokens=20)


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    async with pair_in(tmp_path) as made:
        yield made


def write_late(pair: Pair, seconds: float) -> None:
    """Let the first instance be so far from Redis."""
    pair.roads[0].delay = seconds
    pair.servers[0].simulator.behaviour = STEADY if seconds else FORGETFUL


async def by_websocket(server: RunningServer, text: str, conversation: str | None) -> str:
    conversation = conversation or uuid4().hex
    async with server.connect() as ws:
        await ws.send_json(chat(uuid4().hex, text, conversation_id=conversation))
        assert (await to_end(ws))[-1]["status"] == "complete"
    return conversation


async def by_sse(server: RunningServer, text: str, conversation: str | None) -> str:
    named = {} if conversation is None else {"conversation_id": conversation}
    question = {"request_id": uuid4().hex, "text": text, **named}
    async with server.session.post(server.sse, json=question) as response:
        frames = frames_of(await response.read())
    assert frames[-1]["status"] == "complete", frames[-1]
    (begun,) = (each["chunk"] for each in frames if each["status"] == "processing")
    name: str = begun["metadata"]["conversation_id"]
    return name


def _response(text: str, previous: str | None) -> dict[str, Any]:
    asked = {"model": "sim", "input": text, "store": True}
    return asked if previous is None else {**asked, "previous_response_id": previous}


async def by_whole_response(server: RunningServer, text: str, previous: str | None) -> str:
    asked = _response(text, previous)
    async with server.session.post(f"{server.v1}/responses", json=asked) as response:
        body = await response.json()
        assert response.status == 200, body
    name: str = body["id"]
    return name


async def by_streamed_response(server: RunningServer, text: str, previous: str | None) -> str:
    asked = {**_response(text, previous), "stream": True}
    async with server.session.post(f"{server.v1}/responses", json=asked) as response:
        body = await response.read()
        assert response.status == 200, body
    assert b"response.completed" in body, body
    return "resp_" + body.partition(b'"resp_')[2].partition(b'"')[0].decode()


async def by_response_socket(server: RunningServer, text: str, previous: str | None) -> str:
    return await _on_socket(server, create(**_response(text, previous)))


async def by_prepared_response(server: RunningServer, text: str, previous: str | None) -> str:
    return await _on_socket(server, create(**_response(text, previous), generate=False))


async def _on_socket(server: RunningServer, frame: dict[str, Any]) -> str:
    async with connect(server) as ws:
        await ws.send_json(frame)
        last = (await to_response_end(ws))[-1]
    assert last["type"] == "response.completed", last
    name: str = last["response"]["id"]
    return name


def asked_last(server: RunningServer) -> list[str]:
    """The questions that the provider of *server* was sent last."""
    body = server.simulator.bodies[-1]
    messages = body.get("messages") or body["input"]
    if isinstance(messages, str):
        return [messages]
    texts = [each["content"] for each in messages if each["role"] == "user"]
    return [text if isinstance(text, str) else text[0]["text"] for text in texts]


STREAMED: list[Ask] = [by_websocket, by_sse, by_streamed_response, by_response_socket]
NOT_STREAMED: list[Ask] = [by_whole_response, by_prepared_response]


async def test_next_question_finds_the_last_answer_at_any_instance(pair: Pair) -> None:
    for ask in (*STREAMED, *NOT_STREAMED):
        expected: list[str] = []
        name: str | None = None
        for number in range(6):
            server, text = pair.servers[number % 2], f"q{number}"
            expected.append(text)
            name = await ask(server, text, name)
            if ask is not by_prepared_response:
                assert asked_last(server) == expected
        last = by_whole_response if ask is by_prepared_response else ask
        await last(pair.servers[0], "last", name)
        assert asked_last(pair.servers[0]) == [*expected, "last"]


async def test_next_question_waits_elsewhere_for_an_answer_that_is_written_late(
    pair: Pair,
) -> None:
    here, there = pair.servers
    for ask in STREAMED:
        write_late(pair, LATE)

        name = await ask(here, "one", None)
        await ask(there, "two", name)

        assert asked_last(there) == ["one", "two"], ask


async def test_a_conversation_is_deleted_elsewhere_as_soon_as_its_answer_has_ended(
    pair: Pair,
) -> None:
    here, there = pair.servers
    for ask in (by_websocket, by_sse):
        write_late(pair, LATE)

        name = await ask(here, "one", None)
        url = "/conversations/" + name
        async with there.session.delete(there.base + url) as response:
            assert response.status == 204

        write_late(pair, 0.0)
        # What was on its way has come.
        await asyncio.sleep(2 * LATE)
        for server in (there, here):
            async with server.session.get(server.base + url) as response:
                assert response.status == 404
        await ask(there, "two", name)
        assert asked_last(there) == ["two"]


async def test_a_response_is_deleted_elsewhere_as_soon_as_it_has_ended(pair: Pair) -> None:
    here, there = pair.servers
    for ask in (by_streamed_response, by_response_socket):
        write_late(pair, LATE)

        name = await ask(here, "one", None)
        url = "/responses/" + name
        async with there.session.delete(there.v1 + url) as response:
            assert response.status == 200

        write_late(pair, 0.0)
        await asyncio.sleep(2 * LATE)
        for server in (there, here):
            async with server.session.get(server.v1 + url) as response:
                assert response.status == 404
