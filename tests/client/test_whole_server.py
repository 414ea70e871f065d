"""The client library with whole servers: keys, queues, capacity, cancels, stops and restarts."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Literal

import aiohttp
import pytest

from aioserver.client import AnswerError, Client, Complete, Processing, Queued, ToolCalls
from tests.support.chat import big
from tests.support.fault_proxy import FaultProxy
from tests.support.keys import key_of, keys_of
from tests.support.server import (
    ENDLESS,
    NOWHERE,
    QUICK,
    SILENT,
    SIM_HTTP_CLIENT,
    places,
)
from tests.support.simulator import Behaviour
from tests.support.waiting import until

if TYPE_CHECKING:
    from tests.support.server import MakeServer, RunningServer

Transport = Literal["websocket", "sse"]

pytestmark = pytest.mark.parametrize("transport", ["websocket", "sse"])

PACED = Behaviour(ttft=0, interval=0.005, tokens=60)


def client_of(server: RunningServer, transport: Transport, **arguments: Any) -> Client:
    return Client(server.base, transport=transport, **{"deadline": 40.0, **arguments})


async def test_conversation_has_what_was_said_before(
    server: RunningServer, transport: Transport
) -> None:
    async with client_of(server, transport) as client:
        conversation = client.conversation()
        await conversation.chat("One").text()
        await conversation.chat("Two").text()
        await client.chat("Alone").text()
        async with client_of(server, transport) as other:
            await other.conversation(conversation.id).chat("Three").text()

    roles = [[message["role"] for message in body["messages"]] for body in server.simulator.bodies]
    assert [len(messages) for messages in roles] == [1, 3, 1, 5]


async def test_same_question_under_the_same_id_is_the_same_answer(
    server: RunningServer, transport: Transport
) -> None:
    async with client_of(server, transport) as client, client_of(server, transport) as other:
        texts = [await each.chat("Hi", request_id="x").text() for each in (client, client, other)]

    assert len({*texts}) == 1
    assert server.simulator.stats().requests == 1


async def test_server_begins_nothing_after_the_time_that_the_question_gives(
    make_server: MakeServer, transport: Transport
) -> None:
    server = await make_server(SILENT, **{f"{SIM_HTTP_CLIENT}.concurrent_requests": 1})
    async with client_of(server, transport, deadline=None) as client:
        running = asyncio.create_task(client.chat("Hi").text())
        await until(lambda: server.simulator.stats().active == 1)

        with pytest.raises(AnswerError) as caught:
            await client.chat("Hi", start_within=0.05).text()
        running.cancel()

    assert (caught.value.code, caught.value.retryable) == ("deadline_exceeded", False)
    assert "could not start within 0.05 s" in caught.value.message
    assert server.simulator.stats().requests == 1


async def test_refusal_of_the_provider_says_why(
    server: RunningServer, transport: Transport
) -> None:
    async with client_of(server, transport) as client:
        with pytest.raises(AnswerError) as caught:
            await client.chat("Hi", model="fault-status-422").text()

    assert caught.value.code == "provider_error"
    assert caught.value.message == "sim answered 422: The simulator says 422."
    assert not caught.value.retryable


async def test_key_opens_a_server_and_a_wrong_one_is_one_clear_error(
    make_server: MakeServer, transport: Transport
) -> None:
    server = await make_server(QUICK, **keys_of("ann"))
    async with client_of(server, transport, key=key_of("ann")) as client:
        assert await client.chat("Hi").text()
    for key, code in ((None, "missing_api_key"), ("wrong", "invalid_api_key")):
        async with client_of(server, transport, key=key) as client:
            with pytest.raises(AnswerError) as caught:
                await client.chat("Hi").text()

        assert caught.value.code == code
        assert not caught.value.retryable


@pytest.mark.virtual_time
@pytest.mark.parametrize("limit", [{"max_concurrent": 1}, {"requests_per_minute": 60}])
async def test_limits_of_a_key_are_waited_for(
    make_server: MakeServer, transport: Transport, limit: dict[str, int]
) -> None:
    server = await make_server(PACED, **keys_of("ann", **limit))
    async with client_of(server, transport, key=key_of("ann")) as client:
        texts = await asyncio.gather(*(client.chat("Hi").text() for _ in range(4)))

    assert len(set(texts)) == 1
    assert server.simulator.stats().requests == 4


async def test_session_and_endpoint_of_the_program_are_used(
    make_server: MakeServer, transport: Transport
) -> None:
    endpoints = {"chat.websocket.endpoint": "/there", "chat.sse.endpoint": "/there/too"}
    server = await make_server(QUICK, **endpoints)
    endpoint = endpoints[
        "chat.websocket.endpoint" if transport == "websocket" else "chat.sse.endpoint"
    ]
    async with aiohttp.ClientSession(headers={"User-Agent": "mine"}) as session:
        async with client_of(server, transport, session=session, endpoint=endpoint) as client:
            pieces = [piece async for piece in client.chat("Hi", streaming=False)]

        assert not session.closed
    assert len(pieces) == 1


async def test_question_that_waits_for_a_provider_is_told_its_position(
    make_server: MakeServer, transport: Transport
) -> None:
    server = await make_server(ENDLESS, **{f"{SIM_HTTP_CLIENT}.concurrent_requests": 1})
    async with client_of(server, transport) as client:
        first = aiter(client.chat("First"))
        await anext(first)
        second = aiter(client.chat("Second").events())
        queued = await anext(second)
        assert isinstance(queued, Queued)
        assert queued.position == 1
        server.simulator.behaviour = QUICK
        await first.aclose()
        events = [event async for event in second]

    assert isinstance(events[-1], Complete)
    assert any(isinstance(event, Processing) for event in events)
    await server.nothing_held()


@pytest.mark.virtual_time
async def test_full_server_is_waited_for(make_server: MakeServer, transport: Transport) -> None:
    server = await make_server(Behaviour(ttft=0, interval=0.01, tokens=30), **places(2, 2))

    async def ask(name: str) -> str:
        async with client_of(server, transport) as client:
            return await client.chat(name).text()

    texts = await asyncio.gather(*(ask("Hi") for _ in range(8)))

    assert len(set(texts)) == 1
    assert texts[0]
    assert server.simulator.stats().requests == 8


@pytest.mark.virtual_time
async def test_server_that_stays_full_is_its_own_error(
    make_server: MakeServer, transport: Transport
) -> None:
    changes = {**places(1, timeout=0), f"{SIM_HTTP_CLIENT}.read_timeout": 100.0}
    server = await make_server(SILENT, **changes)
    async with client_of(server, transport) as holder, client_of(server, transport) as client:
        held = aiter(holder.chat("Hi").events())
        assert isinstance(await anext(held), Processing)
        with pytest.raises(AnswerError) as caught:
            await client.chat("Hi", deadline=20.0).text()

    assert caught.value.code == "server_at_capacity"
    assert caught.value.retryable


async def test_many_chats_at_once(server: RunningServer, transport: Transport) -> None:
    async with client_of(server, transport) as client:
        texts = await asyncio.gather(*(client.chat("Hi").text() for _ in range(40)))

    assert len(set(texts)) == 1
    assert server.simulator.stats().requests == 40


async def test_leaving_frees_the_provider_at_once(
    make_server: MakeServer, transport: Transport
) -> None:
    server = await make_server(ENDLESS)
    async with client_of(server, transport) as client:
        async for _piece in client.chat("Hi"):
            break
        await server.simulator.until(lambda stats: stats.active == 0)
        assert server.simulator.stats().aborted == 1


async def test_large_answer_read_slowly_is_whole(
    make_server: MakeServer, transport: Transport
) -> None:
    """Another answer on the socket is not held up."""
    server = await make_server(QUICK, **{"chat.streams.max_stream_bytes": 1 << 26})
    fields = big(300_000, 20)
    async with client_of(server, transport) as client:
        options = {"tools": fields["options"]["tools"]}
        slow = client.chat(fields["text"], options=options)
        count = 0
        async for event in slow.events():
            if isinstance(event, ToolCalls):
                count += 1
                if count % 10 == 0:
                    assert await client.chat("Hi").text()

    assert slow.complete is not None
    assert count >= 20


@pytest.mark.virtual_time
async def test_program_that_rests_over_a_large_answer_reads_all_of_it(
    make_server: MakeServer, transport: Transport
) -> None:
    """The server drops a client that takes nothing: after 32 times `send_timeout`, since it may be
    busy with what its kernel has. It comes back for the rest.
    """
    changes = {
        "chat.streams.max_stream_bytes": 1 << 26,
        "chat.streams.send_timeout": 1.0,
        "chat.streams.resume_window": 3600,
    }
    server = await make_server(QUICK, **changes)
    fields = big(400_000, 40)
    options = {"tools": fields["options"]["tools"]}
    async with client_of(server, transport, deadline=200.0) as client:
        resting = client.chat(fields["text"], options=options)
        parts = []
        async for event in resting.events():
            if isinstance(event, ToolCalls):
                parts += [delta["function"].get("arguments", "") for delta in event.deltas]
                if len(parts) == 10:
                    await asyncio.sleep(45)

    assert "".join(parts).count("x" * 400_000) == 40
    assert server.simulator.stats().requests == 1
    resumes = await server.counted("resumes", "outcome")
    assert resumes.keys() == {("ok",)}


async def test_server_replaced_in_mid_chat_keeps_the_part_and_answers_on(
    make_server: MakeServer, transport: Transport
) -> None:
    former = await make_server(ENDLESS, **{"chat.streams.resume_window": 0.5})
    latter = await make_server(QUICK)
    pieces: list[str] = []
    async with (
        FaultProxy(former.port, lambda: None) as proxy,
        Client(proxy.url, transport=transport, deadline=40.0) as client,
    ):

        async def read() -> None:
            async for piece in client.chat("Hi"):
                pieces.append(piece)
                if len(pieces) == 3:
                    proxy.target = latter.port
                    await proxy.cut()

        with pytest.raises(AnswerError) as caught:
            await read()
        assert await client.chat("Hi").text()

    assert caught.value.code == "stream_not_found"
    assert caught.value.text == "".join(pieces)
    assert latter.simulator.stats().requests == 1


async def test_question_that_still_waited_is_answered_by_the_next_server(
    make_server: MakeServer, transport: Transport
) -> None:
    former = await make_server(ENDLESS, **{f"{SIM_HTTP_CLIENT}.concurrent_requests": 1})
    latter = await make_server(QUICK)
    async with (
        client_of(former, transport) as holder,
        FaultProxy(former.port, lambda: None) as proxy,
        Client(proxy.url, transport=transport, deadline=40.0) as client,
    ):
        held = aiter(holder.chat("Hi"))
        await anext(held)
        events = aiter(client.chat("Hi").events())
        assert isinstance(await anext(events), Queued)
        proxy.target = latter.port
        await proxy.cut()
        last = [event async for event in events][-1]

    assert isinstance(last, Complete)
    assert latter.simulator.stats().requests == 1


@pytest.mark.virtual_time
async def test_server_that_drains_finishes_the_answer_and_the_next_question_goes_elsewhere(
    make_server: MakeServer, transport: Transport
) -> None:
    former, latter = await make_server(PACED), await make_server(QUICK)
    async with (
        FaultProxy(former.port, lambda: None) as proxy,
        Client(proxy.url, transport=transport, deadline=40.0) as client,
    ):
        pieces = aiter(client.chat("Hi"))
        text = await anext(pieces)
        proxy.target = latter.port
        ending = asyncio.ensure_future(former.runner.end())
        await until(lambda: former.context.lifecycle.stopping.is_set())
        other = await client.chat("Hi").text()
        text += "".join([piece async for piece in pieces])
        await ending

    assert other
    assert text
    assert former.simulator.stats().requests == 1
    assert latter.simulator.stats().requests == 1


@pytest.mark.virtual_time
async def test_provider_that_cannot_be_reached_is_asked_three_times(
    make_server: MakeServer, transport: Transport
) -> None:
    server = await make_server(QUICK, **{"llm.providers.sim.base_url": NOWHERE})
    async with client_of(server, transport) as client:
        with pytest.raises(AnswerError) as caught:
            await client.chat("Hi").text()

    assert caught.value.code in {"connect_error", "circuit_open"}


# What takes no more than four answers at once, and lets nobody wait.
FULL: dict[str, dict[str, Any]] = {
    "a provider": {
        f"{SIM_HTTP_CLIENT}.concurrent_requests": 4,
        f"{SIM_HTTP_CLIENT}.queue_size": 1,
    },
    "a key": keys_of("ann", max_concurrent=4, queue_size=0),
    "a server": places(4, 4, 0),
}


@pytest.mark.virtual_time
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("full", FULL)
async def test_questions_of_one_client_keep_the_places_of_a_full_server_taken(
    make_server: MakeServer, transport: Transport, full: str
) -> None:
    seconds, places, questions = 4.8, 4, 20
    behaviour = Behaviour(ttft=0, interval=seconds / 12, tokens=12)
    server = await make_server(behaviour, **FULL[full])
    loop = asyncio.get_running_loop()
    key = key_of("ann") if full == "a key" else None
    async with client_of(server, transport, key=key, deadline=None) as client:
        began = loop.time()
        texts = await asyncio.gather(*(client.chat("Hi").text() for _ in range(questions)))
        took = loop.time() - began

    assert len(set(texts)) == 1
    # It is virtual time.
    assert took < 1.1 * seconds * questions / places
