"""The WebSocket transport against a server that follows a script: places, refusals, close codes,
slow readers.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.client import AnswerError, Client, Processing, Queued, socket
from tests.support.scripted_server import Refusal, ScriptedServer, answer, frame, idle
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.scripted_server import SocketPeer, SocketScript

HELLO = ("Hel", "lo")


async def play_answers(peer: SocketPeer) -> None:
    """Answer each question with `HELLO`."""
    while True:
        command = await peer.command()
        if command["action"] == "chat":
            await peer.send(*answer(command["request_id"], *HELLO))


def closing(code: int, remark: dict[str, Any] | None = None) -> SocketScript:
    """A script that closes the socket after its first question."""

    async def play(peer: SocketPeer) -> None:
        await peer.command()
        if remark is not None:
            await peer.send(remark)
        await peer.ws.close(code=code)

    return play


def client_of(server: ScriptedServer, **arguments: Any) -> Client:
    return Client(server.url, **{"deadline": 200.0, **arguments})


@asynccontextmanager
async def met(
    *scripts: SocketScript | Refusal, **arguments: Any
) -> AsyncIterator[tuple[ScriptedServer, Client]]:
    """A server whose sockets follow *scripts*, and a client of it."""
    async with (
        ScriptedServer(sockets=[*scripts]) as server,
        client_of(server, **arguments) as client,
    ):
        yield server, client


def full(retry_after: float) -> dict[str, Any]:
    """The remark of a server that has no place."""
    again = {"retryable": True, "retry_after": retry_after}
    return frame(None, "error", error="full", code="server_at_capacity", **again)


async def test_many_answers_share_one_socket() -> None:
    async with ScriptedServer(sockets=[play_answers]) as server, client_of(server) as client:
        texts = await asyncio.gather(*(client.chat("Hi").text() for _ in range(20)))

    assert texts == ["Hello"] * 20
    assert server.connections == 1


async def test_more_answers_than_a_socket_may_have_get_another_one_which_closes_after_them() -> (
    None
):
    closed = 0
    release = asyncio.Event()

    async def play(peer: SocketPeer) -> None:
        nonlocal closed
        try:
            while True:
                command = await peer.command()
                await release.wait()
                await peer.send(*answer(command["request_id"], *HELLO))
        finally:
            closed += 1

    async with ScriptedServer(sockets=[play]) as server, client_of(server) as client:
        count = socket.MAX_ANSWERS + 1
        tasks = [asyncio.ensure_future(client.chat("Hi").text()) for _ in range(count)]
        await until(lambda: server.connections == 2)
        release.set()
        texts = await asyncio.gather(*tasks)
        await until(lambda: closed == 1)

        assert texts == ["Hello"] * count


async def test_nothing_is_sent_before_the_socket_has_its_place() -> None:
    sent_early = False

    async def play(peer: SocketPeer) -> None:
        nonlocal sent_early
        ping = await peer.ws.receive_json()
        await peer.send(frame(None, "queued", position=2, eta=1.5))
        try:
            await peer.ws.receive(timeout=0.05)
            sent_early = True
        except TimeoutError:
            pass
        await peer.send(frame(ping["request_id"], "pong"))
        await play_answers(peer)

    async with ScriptedServer(sockets=[play]) as server, client_of(server) as client:
        events = [event async for event in client.chat("Hi").events()]

    assert events[0] == Queued(2, 1.5)
    assert isinstance(events[1], Processing)
    assert not sent_early


async def test_wait_that_is_told_with_the_handshake_is_not_lost() -> None:
    async def play(peer: SocketPeer) -> None:
        await peer.send(frame(None, "queued", position=2, eta=1.5))
        ping = await peer.ws.receive_json()
        await announced.wait()
        await peer.send(frame(ping["request_id"], "pong"))
        await play_answers(peer)

    announced = asyncio.Event()
    async with ScriptedServer(sockets=[play]) as server, client_of(server) as client:
        events = client.chat("Hi").events()
        first = await anext(events)
        announced.set()
        rest = [event async for event in events]
        second = [event async for event in client.chat("Hi").events()]

    assert first == Queued(2, 1.5)
    assert isinstance(first, Queued)
    assert first.admission
    assert isinstance(rest[0], Processing)
    assert isinstance(second[0], Processing)


@pytest.mark.virtual_time
@pytest.mark.parametrize("code", [1000, 1001, 1006, 1011, 1012, 1013, 4000])
async def test_lost_socket_is_replaced_and_the_question_repeated_with_its_id(code: int) -> None:
    scripts = [closing(1000 if code == 1006 else code), play_answers]
    if code == 1006:

        async def abort(peer: SocketPeer) -> None:
            await peer.command()
            transport = peer.ws._req.transport  # type: ignore[union-attr] # noqa: SLF001
            assert transport is not None
            transport.close()

        scripts[0] = abort
    async with ScriptedServer(sockets=scripts) as server, client_of(server) as client:
        began = asyncio.get_running_loop().time()
        text = await client.chat("Hi", request_id="r1").text()
        took = asyncio.get_running_loop().time() - began

    assert text == "Hello"
    assert [command["request_id"] for command in server.seen] == ["r1", "r1"]
    assert server.actions == ["chat", "chat"]
    least, most = {1012: (1, 10.5), 1013: (1, 2.5)}.get(code, (0, 0.5))
    assert least <= took < most


@pytest.mark.virtual_time
async def test_full_server_is_asked_again_after_its_retry_after() -> None:
    async with met(closing(1013, full(7.0)), play_answers) as (_server, client):
        began = asyncio.get_running_loop().time()
        assert await client.chat("Hi").text() == "Hello"

        assert 7.0 <= asyncio.get_running_loop().time() - began <= 8.5


@pytest.mark.virtual_time
async def test_wait_beyond_the_deadline_is_not_begun() -> None:
    async with met(closing(1013, full(60.0)), deadline=30.0) as (_server, client):
        began = asyncio.get_running_loop().time()
        with pytest.raises(AnswerError) as caught:
            await client.chat("Hi").text()

        assert asyncio.get_running_loop().time() - began < 1.0
    assert caught.value.code == "server_at_capacity"
    assert caught.value.retryable
    assert caught.value.retry_after == 60.0


@pytest.mark.parametrize(
    ("code", "remark", "expected"),
    [
        (1002, None, "protocol_error"),
        (1003, None, "protocol_error"),
        (1007, None, "protocol_error"),
        (1008, "invalid_api_key", "invalid_api_key"),
        (1009, "request_too_large", "request_too_large"),
        (1009, None, "request_too_large"),
    ],
)
async def test_socket_that_must_not_come_back_is_one_clear_error(
    code: int, remark: str | None, expected: str
) -> None:
    remark_frame = None if remark is None else frame(None, "error", error="no", code=remark)
    async with met(closing(code, remark_frame)) as (server, client):
        with pytest.raises(AnswerError) as caught:
            await client.chat("Hi").text()

    assert caught.value.code == expected
    assert server.connections == 1


async def test_question_that_is_too_large_costs_the_other_answers_nothing() -> None:
    async def refuse_the_largest(peer: SocketPeer) -> None:
        small = await peer.command()
        await peer.send(*answer(small["request_id"], *HELLO)[:2])
        await peer.command()
        await peer.send(frame(None, "error", error="too large", code="request_too_large"))
        await peer.ws.close(code=1009)

    async def resume(peer: SocketPeer) -> None:
        command = await peer.command()
        after = command["payload"]["last_event_id"]
        await peer.send(*answer(command["request_id"], *HELLO, after=after))
        await play_answers(peer)

    async with met(refuse_the_largest, resume) as (_server, client):
        small = aiter(client.chat("Hi"))
        first = await anext(small)
        with pytest.raises(AnswerError) as caught:
            await client.chat("x" * 1000).text()

        assert caught.value.code == "request_too_large"
        assert first + "".join([piece async for piece in small]) == "Hello"


@pytest.mark.parametrize("number", [0, 1, 2, 3])
async def test_rest_is_asked_for_by_number(number: int) -> None:
    async def begin(peer: SocketPeer) -> None:
        command = await peer.command()
        await peer.send(*answer(command["request_id"], *HELLO)[:number])
        await peer.ws.close(code=1001)

    async def go_on(peer: SocketPeer) -> None:
        command = await peer.command()
        after = command.get("payload", {}).get("last_event_id", 0)
        await peer.send(*answer(command["request_id"], *HELLO, after=after))
        await peer.command()

    async with met(begin, go_on) as (server, client):
        answered = client.chat("Hi")
        text = await answered.text()

    assert text == "Hello"
    assert server.actions == ["chat", "resume" if number else "chat"]
    if number:
        assert server.seen[1]["payload"] == {"last_event_id": number}
    assert answered.complete is not None


@pytest.mark.virtual_time
async def test_pings_keep_a_silent_socket_and_end_a_dead_one() -> None:
    """aiohttp's own pings: after 30 s of silence, and the answer may take 15 s."""

    async def dead(peer: SocketPeer) -> None:
        await peer.command()
        # Nobody reads, so nobody answers a ping.
        await idle()

    async with met(dead, play_answers) as (_server, client):
        began = asyncio.get_running_loop().time()
        assert await client.chat("Hi").text() == "Hello"

        assert 30 < asyncio.get_running_loop().time() - began < 60


async def test_slow_reader_delays_nobody_and_keeps_a_bounded_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(socket, "MAX_UNREAD", 2000)
    words = [f"w{number} " for number in range(500)]

    async def play(peer: SocketPeer) -> None:
        while True:
            command = await peer.command()
            if command["request_id"] != "slow":
                await peer.send(*answer(command["request_id"], *HELLO))
                continue
            after = command["payload"].get("last_event_id", 0)
            await peer.send(*answer("slow", *words, after=after))

    async with ScriptedServer(sockets=[play]) as server, client_of(server) as client:
        slow = client.chat("Hi", request_id="slow")
        pieces = aiter(slow)
        first = await anext(pieces)
        assert await client.chat("Hi").text() == "Hello"
        unread = slow._reading._frames  # type: ignore[attr-defined] # noqa: SLF001
        assert len(unread) < 40
        text = first + "".join([piece async for piece in pieces])

    assert text == "".join(words)
    assert server.actions[:2] == ["chat", "chat"]
    assert 1 < server.actions.count("resume") < 60


async def test_reader_that_the_server_calls_slow_resumes() -> None:
    async def play(peer: SocketPeer) -> None:
        command = await peer.command()
        name = command["request_id"]
        await peer.send(*answer(name, *HELLO)[:2])
        slow = frame(name, "error", error="too slow", code="slow_client", retryable=True)
        await peer.send(slow)
        command = await peer.command()
        await peer.send(*answer(name, *HELLO, after=command["payload"]["last_event_id"]))
        await peer.command()

    async with ScriptedServer(sockets=[play]) as server, client_of(server) as client:
        assert await client.chat("Hi").text() == "Hello"

    assert server.actions == ["chat", "resume"]
    assert server.connections == 1


async def test_two_answers_of_one_id_do_not_take_each_others_frames() -> None:
    async with ScriptedServer(sockets=[play_answers]) as server, client_of(server) as client:
        texts = await asyncio.gather(*(client.chat("Hi", request_id="r1").text() for _ in "ab"))

    assert texts == ["Hello", "Hello"]
    assert server.connections == 2


@pytest.mark.virtual_time
async def test_commands_keep_below_the_servers_bound_of_frames() -> None:
    """100 frames a second, after a burst of 200: beyond, the server closes the socket."""
    times: list[float] = []

    async def play(peer: SocketPeer) -> None:
        loop = asyncio.get_running_loop()
        while True:
            command = await peer.command()
            times.append(loop.time())
            await peer.send(*answer(command["request_id"], *HELLO))

    async with ScriptedServer(sockets=[play]) as server, client_of(server) as client:

        async def ask_many() -> None:
            for _ in range(20):
                assert await client.chat("Hi").text() == "Hello"

        await asyncio.gather(*(ask_many() for _ in range(20)))

    assert len(times) == 400
    for first, time in enumerate(times):
        in_a_second = sum(1 for other in times[first:] if other < time + 1.0)
        assert in_a_second < 200
    assert times[-1] - times[0] > 3.5


async def test_idle_socket_that_the_server_closes_is_no_error() -> None:
    async def close_after_one(peer: SocketPeer) -> None:
        command = await peer.command()
        await peer.send(*answer(command["request_id"], *HELLO))
        await peer.ws.close(code=1000)

    async with met(close_after_one) as (server, client):
        for _ in range(3):
            assert await client.chat("Hi").text() == "Hello"

        assert server.connections == 3


@pytest.mark.virtual_time
async def test_server_that_stops_keeps_its_answers_and_gets_no_new_question() -> None:
    async def stopping(peer: SocketPeer) -> None:
        first = await peer.command()
        await peer.send(*answer(first["request_id"], *HELLO)[:2])
        second = await peer.command()
        refusal = {"error": "stops", "code": "server_shutdown", "retryable": True}
        await peer.send(frame(second["request_id"], "error", **refusal))
        await peer.command()

    async with met(stopping, play_answers) as (server, client):
        first = aiter(client.chat("Hi", request_id="first"))
        assert await anext(first) == "Hel"
        assert await client.chat("Hi", request_id="second").text() == "Hello"
        assert server.connections == 2
        # The cancel goes to the process that has the answer.
        del first
        await until(lambda: server.actions == ["chat", "chat", "chat", "cancel"])

    assert [command["request_id"] for command in server.seen] == [
        "first",
        "second",
        "second",
        "first",
    ]


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (401, "invalid_api_key"),
        (403, "permission_denied"),
        (404, "not_found"),
        (426, "upgrade_required"),
        (200, "protocol_error"),
    ],
)
async def test_refused_handshake_is_one_clear_error(status: int, code: str) -> None:
    async with ScriptedServer(sockets=[Refusal(status)]) as server, client_of(server) as client:
        with pytest.raises(AnswerError) as caught:
            await client.chat("Hi").text()

    assert caught.value.code == code
    assert not caught.value.retryable
    # The second one asks for the reason.
    assert server.connections == 2


@pytest.mark.virtual_time
@pytest.mark.parametrize(("status", "least"), [(429, 9), (503, 9), (502, 0), (504, 0)])
async def test_handshake_that_is_refused_for_now_is_tried_again(status: int, least: float) -> None:
    headers = {"Retry-After": "9"} if least else {}
    scripts: list[SocketScript | Refusal] = [Refusal(status, headers), play_answers]
    async with ScriptedServer(sockets=scripts) as server, client_of(server) as client:
        began = asyncio.get_running_loop().time()
        assert await client.chat("Hi").text() == "Hello"

        assert least <= asyncio.get_running_loop().time() - began < least + 2
