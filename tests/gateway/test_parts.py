"""One part for each attempt that may have cost something, on each face and for each end."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.usage.accounting import Usage
from tests.support.chat import CHAT
from tests.support.faces import over_anthropic, over_openai, over_sse, over_websocket
from tests.support.scripted_provider import EVENT_STREAM, OK, ScriptedProvider, chunk
from tests.support.server import QUICK, SLOW, provider_entry
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aioserver.telemetry.outcome import AttemptCost
    from aioserver.telemetry.request_log import RequestRecord
    from tests.support.scripted_provider import Peer
    from tests.support.server import MakeServer, RunningServer

FACES: dict[str, Any] = {
    "websocket": over_websocket,
    "sse": over_sse,
    "openai": over_openai,
    "anthropic": over_anthropic,
}


class Announcements(Usage):
    """The usage of a server, which keeps all parts that it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.costs: list[AttemptCost] = []

    def ended(self, record: RequestRecord, cost: AttemptCost) -> None:
        super().ended(record, cost)
        assert record.outcome.costs[-1] is cost
        self.costs.append(cost)


def told_by(server: RunningServer) -> list[AttemptCost]:
    """What the providers of *server* tell from now on."""
    told = Announcements()
    for provider in server.context.router.providers.values():
        provider.costs._usage = told  # noqa: SLF001 - the ledger shows it only as lines
    return told.costs


async def ask(server: RunningServer, path: str = "chat/completions", **body: Any) -> int:
    """Ask, and read the answer to its end; return its status."""
    asked = {"model": "m", **(CHAT if path == "chat/completions" else {}), **body}
    async with server.session.post(f"{server.v1}/{path}", json=asked) as answer:
        await answer.read()
        return answer.status


@asynccontextmanager
async def scripted(make_server: MakeServer, play: Any) -> AsyncIterator[RunningServer]:
    async with ScriptedProvider(play) as provider:
        entry = {**provider_entry(provider.url), "messages": True}
        yield await make_server(**{"llm.providers.first": entry, "llm.active": "first"})


@pytest.mark.parametrize("face", FACES)
async def test_good_answer_is_one_part_on_each_face(make_server: MakeServer, face: str) -> None:
    server = await make_server(replace(QUICK, cached=1))
    costs = told_by(server)
    await FACES[face](server, "m")

    await until(lambda: bool(costs))
    (cost,) = costs
    assert (cost.provider, cost.model, cost.outcome, cost.source) == ("sim", "m", "ok", "provider")
    assert cost.tokens_in == 2
    assert cost.tokens.cached == 1
    assert cost.tokens_out > 10
    assert 0 <= cost.first <= cost.duration


@pytest.mark.parametrize("face", FACES)
async def test_answer_that_breaks_off_is_a_part_with_an_estimate(
    make_server: MakeServer, face: str
) -> None:
    server = await make_server()
    costs = told_by(server)
    seen = await FACES[face](server, "fault-cut-9")

    assert seen.end == "error"
    await until(lambda: bool(costs))
    (cost,) = costs
    # The prompt of a message is known from its first event on.
    assert (cost.outcome, cost.source) == ("cut", "mixed" if face == "anthropic" else "estimate")
    assert cost.tokens_in >= 2
    assert 9 <= cost.tokens_out <= 13


@pytest.mark.parametrize("fault", ["status-400", "status-503", "status-429"])
async def test_refusal_is_no_part(make_server: MakeServer, fault: str) -> None:
    server = await make_server()
    costs = told_by(server)
    for stream in (True, False):
        assert await ask(server, model=f"fault-{fault}", stream=stream) >= 400
    assert await ask(server, stream=False) == 200

    (cost,) = costs
    assert cost.outcome == "ok"


async def test_refusals_before_an_answer_leave_one_part(make_server: MakeServer) -> None:
    server = await make_server(
        **{
            "llm.providers.sim.http_client.max_retries": 2,
            "llm.providers.sim.http_client.backoff_factor": 0.0,
        }
    )
    costs = told_by(server)
    assert await ask(server, model="fault-flap-1", stream=True) == 200

    assert [cost.outcome for cost in costs] == ["ok"]


async def test_request_that_nobody_can_have_got_is_no_part(make_server: MakeServer) -> None:
    async def play(peer: Peer) -> None:
        await peer.request()
        body = b'{"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":6}}'
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        await peer.send(head % len(body) + body)
        # A kept connection that is closed as the next request comes.
        await peer.head()
        peer.abort()

    async with scripted(make_server, play) as server:
        costs = told_by(server)
        for _ in range(3):
            await ask(server)

        assert [(cost.outcome, cost.tokens_in, cost.tokens_out) for cost in costs] == [
            ("ok", 5, 6)
        ] * 3


async def test_new_connection_that_breaks_may_have_cost_something(
    make_server: MakeServer,
) -> None:
    async def play(peer: Peer) -> None:
        await peer.request()
        peer.abort()

    async with scripted(make_server, play) as server:
        costs = told_by(server)
        assert await ask(server) == 502

        (cost,) = costs
        assert (cost.outcome, cost.source, cost.tokens_out) == ("failed", "estimate", 1)
        assert cost.tokens_in > 0


async def test_client_that_leaves_pays_for_what_has_come(make_server: MakeServer) -> None:
    server = await make_server(replace(SLOW, interval=0.01))
    costs = told_by(server)
    url = f"{server.v1}/chat/completions"
    body = {"model": "m", **CHAT, "stream": True}
    async with server.session.post(url, json=body) as answer:
        for _ in range(5):
            await answer.content.readuntil(b"\n\n")

    await until(lambda: bool(costs))
    (cost,) = costs
    assert (cost.outcome, cost.source) == ("cancelled", "estimate")
    assert cost.tokens_out >= 5


async def test_message_that_is_cut_has_a_true_prompt(make_server: MakeServer) -> None:
    usage = {"input_tokens": 7, "cache_read_input_tokens": 30, "cache_creation_input_tokens": 3}
    started: dict[str, Any] = {
        "type": "message_start",
        "message": {"id": "m", "usage": {**usage, "output_tokens": 1}},
    }
    delta: dict[str, Any] = {
        "type": "content_block_delta",
        "index": 0,
        "delta": {"type": "text_delta", "text": "x"},
    }
    events = [
        b"event: %b\ndata: %b\n\n" % (str(each["type"]).encode(), json.dumps(each).encode())
        for each in (started, *[delta] * 3)
    ]

    async def play(peer: Peer) -> None:
        await peer.request()
        await peer.send(EVENT_STREAM, *map(chunk, events))

    async with scripted(make_server, play) as server:
        costs = told_by(server)
        await ask(server, "messages", **CHAT, max_tokens=9, stream=True)

        await until(lambda: bool(costs))
        (cost,) = costs
        assert (cost.outcome, cost.source) == ("cut", "mixed")
        assert (cost.tokens_in, cost.tokens_out) == (40, 4)
        assert (cost.tokens.cached, cost.tokens.cache_write) == (30, 3)


async def test_embeddings_cost_their_input_and_counts_of_tokens_nothing(
    make_server: MakeServer,
) -> None:
    server = await make_server()
    costs = told_by(server)
    assert await ask(server, "embeddings", input="Hello") == 200
    assert await ask(server, "messages/count_tokens", **CHAT) == 200

    (cost,) = costs
    assert (cost.source, cost.tokens_in, cost.tokens_out) == ("provider", 2, 0)


async def test_tokens_of_what_is_passed_on_are_not_known(make_server: MakeServer) -> None:
    async def play(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.send(OK)

    async with scripted(make_server, play) as server:
        costs = told_by(server)
        assert await ask(server, "audio/speech", input="Hello") == 200

        (cost,) = costs
        assert (cost.source, cost.tokens_in, cost.tokens_out) == ("none", 0, 0)


async def test_whole_answer_without_a_usage_has_what_answers_have_had(
    make_server: MakeServer,
) -> None:
    usages = iter([b"", b',"usage":{"prompt_tokens":5,"completion_tokens":600}', b""])

    async def play(peer: Peer) -> None:
        while True:
            await peer.request()
            body = b'{"choices":[{"message":{"content":"x"}}]%b}' % next(usages)
            head = (
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
            )
            await peer.send(head % len(body) + body)

    async with scripted(make_server, play) as server:
        costs = told_by(server)
        for _ in range(3):
            await ask(server, max_tokens=2000)

    assert [cost.source for cost in costs] == ["estimate", "provider", "estimate"]
    assert [cost.tokens_out for cost in costs] == [2000, 600, 600]
