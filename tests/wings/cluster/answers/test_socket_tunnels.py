"""Answers that a client reads on its WebSocket, and that are passed on from their owner."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import WSMsgType

from aioserver.errors import RequestConflict, ServerAtCapacity, ServerShutdown, StreamNotFound
from aioserver.faces.websocket import MAX_ANSWERS
from aioserver.streams.formats import WS_TEXT, ws_frame, ws_payload
from aioserver.streams.store import StreamStore
from aioserver.wings.cluster.answers.greeting import (
    END,
    FOUND,
    Follow,
    Greeting,
    encode,
    refusal,
    refused,
)
from aioserver.wings.cluster.answers.socket_tunnels import SocketTunnel
from tests.support import responses
from tests.support.chat import big, cancel, chat, numbers, resume, to_end, until_status
from tests.support.instances import SECRET, World, answered, asked, instance_of, read_by
from tests.support.keys import bearer, keys_of
from tests.support.server import CONCURRENCY, ENDLESS, PACED, QUICK
from tests.support.waiting import ticks, until, within

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from aioserver.errors import AioserverError
    from tests.support.instances import Instance, Make


# The bytes.

# Heads of each length: of 7, 16 and 64 bits (RFC 6455, 5.2).
MESSAGES = [ws_frame(WS_TEXT, b"x" * size) for size in (0, 1, 125, 126, 300, 65_536, 7)]
ANSWER = b"".join(MESSAGES)
MOST = 1 << 20


class Client:
    """A client's socket: it reads until it is `blocked`, and notes how the answer has ended."""

    def __init__(self, most: int = MOST) -> None:
        self.store = StreamStore(max_stream_bytes=most, max_kept_bytes=most)
        self.got: list[bytes] = []
        self.ends: list[AioserverError | None] = []
        self.lost = 0
        self.again: list[Callable[[], None]] = []
        self.blocked = False
        self.tunnel = SocketTunnel(self.store.hold(), self.lose)

    def lose(self, tunnel: SocketTunnel) -> None:
        assert tunnel is self.tunnel
        self.lost += 1

    def pass_on(self, data: bytes, again: Callable[[], None]) -> bool:
        if self.blocked:
            self.again.append(again)
            return False
        self.got.append(data)
        return True

    def start(self) -> None:
        self.tunnel.start(self.pass_on, self.ends.append)

    def read(self) -> None:
        """Read again."""
        self.blocked = False
        again, self.again = self.again, []
        for each in again:
            each()

    @property
    def kept(self) -> int:
        return self.store.stats().bytes


def fed(pieces: Iterable[bytes], *, begin: int = 0, end: bool = True) -> Client:
    """A client that begins to read after *begin* pieces; the connection ends behind the last."""
    client = Client()
    for number, piece in enumerate(pieces):
        if number == begin:
            client.start()
        client.tunnel.data_received(piece)
    if end:
        client.tunnel.connection_lost(None)
    return client


def cuts(data: bytes) -> Iterable[int]:
    """Each place at which *data* may be cut, but those in the middle of the long message."""
    return (at for at in range(1, len(data)) if not 1_000 < at < len(data) - 1_000)


async def test_whole_messages_are_passed_on_however_their_bytes_are_cut() -> None:
    data = FOUND + ANSWER + END
    for at in cuts(data):
        for begin in (0, 1):
            client = fed([data[:at], data[at:]], begin=begin)

            assert client.tunnel.accepted.result()
            assert b"".join(client.got) == ANSWER
            assert client.ends == [None]
            assert (client.kept, client.lost) == (0, 1)
            assert client.tunnel.passed == len(client.got)


async def test_no_part_of_a_message_is_passed_on() -> None:
    data = FOUND + ANSWER + END
    ends = {b"".join(MESSAGES[:count]) for count in range(len(MESSAGES) + 1)}
    for step in (1, 3, 1_000):
        client = Client()
        client.start()
        for at in range(0, len(data), step):
            client.tunnel.data_received(data[at : at + step])
            if step > 1 or len(client.got) < 10:
                assert b"".join(client.got) in ends
            if client.got:
                whole = client.got[-1]
                assert whole.endswith(client.tunnel.last)
                assert client.tunnel.last in MESSAGES

        assert client.ends == [None]


@pytest.mark.parametrize("blocked", [False, True])
async def test_an_answer_that_is_cut_off_is_one_whose_owner_has_ended(blocked: bool) -> None:
    data = FOUND + ANSWER + END
    for at in (1, *cuts(data)):
        client = Client()
        client.start()
        client.blocked = blocked
        client.tunnel.data_received(data[:at])
        client.tunnel.connection_lost(None)
        if blocked and client.again:
            # What has come is read first.
            assert not client.ends
            client.read()

        assert ANSWER.startswith(b"".join(client.got))
        (error,) = client.ends
        assert isinstance(error, ServerShutdown) or (blocked and at == len(data))
        assert client.kept == 0


async def test_what_a_client_does_not_read_is_kept_in_order_and_counted() -> None:
    client = Client()
    client.start()
    client.tunnel.data_received(FOUND + MESSAGES[1])
    client.blocked = True
    client.tunnel.data_received(MESSAGES[4] + MESSAGES[5][:100])
    assert client.kept == len(MESSAGES[4]) + 100
    client.tunnel.data_received(MESSAGES[5][100:] + MESSAGES[6])
    assert len(client.again) == 1

    client.read()

    assert b"".join(client.got) == MESSAGES[1] + MESSAGES[4] + MESSAGES[5] + MESSAGES[6]
    assert client.kept == 0
    client.tunnel.data_received(END)
    assert client.ends == [None]


@pytest.mark.parametrize("blocked", [False, True])
async def test_an_answer_that_there_is_no_room_for_ends(blocked: bool) -> None:
    client = Client(most=1_000)
    client.start()
    client.blocked = blocked
    client.tunnel.data_received(FOUND + (ANSWER if blocked else MESSAGES[5][:1_100]))

    (error,) = client.ends
    assert isinstance(error, ServerAtCapacity)
    assert client.kept == 0
    client.read()
    client.tunnel.data_received(ANSWER)
    assert client.got == []


async def test_nothing_is_passed_on_to_a_client_that_has_left() -> None:
    client = Client()
    client.start()
    client.blocked = True
    client.tunnel.data_received(FOUND + ANSWER)

    client.tunnel.leave()
    client.tunnel.leave()
    client.read()
    client.tunnel.data_received(ANSWER + END)
    client.tunnel.connection_lost(None)

    assert (client.got, client.ends, client.kept) == ([], [], 0)


async def test_a_refusal_is_understood_however_its_bytes_are_cut() -> None:
    error = RequestConflict("this request id is known, with another payload")
    data = refusal(error)
    for at in range(1, len(data)):
        client = fed([data[:at], data[at:]], begin=5)

        assert not client.tunnel.accepted.result()
        again = refused(client.tunnel.refusal)
        assert (type(again), again.message) == (RequestConflict, error.message)
    assert refused(b"HTTP/1.1 400 ").code == "internal_error"


# Both ends.


def by_id(frames: list[Any], name: str) -> list[Any]:
    return [frame for frame in frames if frame["request_id"] == name]


async def test_no_log_is_made_of_an_answer_that_is_passed_on(make: Make) -> None:
    a, b = await make()
    async with AsyncExitStack() as stack:
        first = await asked(a, stack)
        second = await stack.enter_async_context(b.server.connect())
        await second.send_json(resume("r1"))
        seen = await until_status(second, "chunk")
        assert (b.cluster.stats().tunnels, a.cluster.stats().links) == (1, 1)
        assert b.server.owners.streams.stats().running == 0
        seen += await to_end(second)
        await to_end(first)
        # The socket goes on.
        await second.send_json({"action": "ping"})
        assert (await second.receive_json())["status"] == "pong"

    assert numbers(seen) == list(range(1, len(seen) + 1))
    assert seen[-1]["status"] == "complete"
    assert (b.cluster.stats().tunnels, a.cluster.stats().links) == (0, 0)
    assert b.requests == 0


async def test_a_question_that_is_answered_elsewhere_is_passed_on_from_its_first_event(
    make: Make,
) -> None:
    a, b = await make()
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(a.server.connect())
        await first.send_json(chat("r1"))
        whole = await until_status(first, "chunk")
        second = await stack.enter_async_context(b.server.connect())
        await second.send_json(chat("r1"))
        seen = await until_status(second, "chunk")
        assert b.server.owners.streams.stats().running == 0
        await second.send_json(chat("r1", "Something else"))
        conflict = (await to_end(second))[-1]
        seen += await to_end(second)
        whole += await to_end(first)

    assert conflict["chunk"]["code"] == "request_conflict"
    assert [frame for frame in seen if frame["status"] != "error"][-1] == whole[-1]
    assert (a.requests, b.requests) == (1, 0)


async def test_an_owner_that_is_just_claiming_an_id_is_not_taken_for_one_without_it(
    make: Make, world: World
) -> None:
    a, b = await make()
    world.replies["a"] = 0.03
    async with a.server.connect() as first, b.server.connect() as second:
        await first.send_json(chat("r1"))
        await until(lambda: bool(world.claims))
        await second.send_json(chat("r1"))
        answers = [await to_end(ws) for ws in (first, second)]

    assert answers[0] == answers[1]
    assert (a.requests, b.requests) == (1, 0)


async def test_a_question_that_a_hanging_owner_may_answer_is_not_answered_twice(
    make: Make, world: World
) -> None:
    a, b = await make(2, ENDLESS)
    async with AsyncExitStack() as stack:
        first = await asked(a, stack)
        world.silent.add("a")
        began = asyncio.get_running_loop().time()
        async with b.server.connect() as second:
            await second.send_json(chat("r1"))
            (error,) = await to_end(second)
        assert within(1.2, began)
        await first.send_json(cancel("r1"))
        await to_end(first)

    assert (error["chunk"]["code"], error["chunk"]["retryable"]) == ("instance_unavailable", True)
    assert (a.requests, b.requests) == (1, 0)


async def test_a_question_goes_on_when_its_client_leaves_while_its_id_is_claimed(
    make: Make, world: World
) -> None:
    _a, b = await make()
    world.slow = 0.03
    calls = world.calls
    async with b.server.connect() as ws:
        await ws.send_json(chat("r1"))
        await until(lambda: world.calls > calls)
    assert b.requests == 0

    again = await answered(b)

    assert again[-1]["status"] == "complete"
    assert numbers(again) == list(range(1, len(again) + 1))
    assert b.requests == 1


async def test_commands_of_one_id_are_carried_out_in_order(make: Make, world: World) -> None:
    a, b = await make(2, ENDLESS)
    world.slow = 0.03
    async with AsyncExitStack() as stack:
        first = await asked(a, stack)
        second = await stack.enter_async_context(b.server.connect())
        await second.send_json(resume("r1"))
        await second.send_json(cancel("r1"))
        await second.send_json(resume("r1"))
        read = await to_end(second)
        again = await to_end(second)
        whole = await to_end(first)

    assert read[-1]["status"] == again[-1]["status"] == whole[-1]["status"] == "cancelled"
    assert numbers(read) == list(range(1, len(read) + 1))
    assert again == read


async def test_an_id_that_is_asked_for_delays_no_other(make: Make, world: World) -> None:
    a, b = await make(2, PACED)
    await answered(a, "far")
    world.silent.add("a")
    async with b.server.connect() as ws:
        began = asyncio.get_running_loop().time()
        await ws.send_json(resume("far"))
        await ws.send_json(cancel("far"))
        await ws.send_json({"action": "ping"})
        await ws.send_json(chat("near"))
        assert (await ws.receive_json())["status"] == "pong"
        near = await to_end(ws)
        assert within(0.9, began)
        far = [await ws.receive_json(timeout=5) for _ in range(2)]

    assert numbers(near) == list(range(1, len(near) + 1))
    assert {frame["request_id"] for frame in near} == {"near"}
    for frame in far:
        assert frame["request_id"] == "far"
        assert frame["chunk"]["code"] == "instance_unavailable"
        assert "event_id" not in frame


async def test_as_many_commands_wait_for_other_instances_as_answers_may_run(
    make: Make, world: World
) -> None:
    _a, b = await make(2, QUICK)
    world.slow = 0.4
    async with b.server.connect() as ws:
        for sent in [resume(f"r{number}") for number in range(MAX_ANSWERS)] + [
            resume("one more"),
            *[cancel("r0")] * MAX_ANSWERS,
            cancel("r0"),
        ]:
            await ws.send_json(sent)
        for name in ("one more", "r0"):
            error = await ws.receive_json()
            assert (error["request_id"], error["chunk"]["code"]) == (name, "concurrency_exceeded")
        # Nobody has any of them.
        for _ in range(2 * MAX_ANSWERS):
            assert (await ws.receive_json())["chunk"]["code"] == "stream_not_found"


async def test_a_killed_owner_is_told_of_and_the_socket_stays(make: Make, world: World) -> None:
    a, b = await make(2, ENDLESS)
    async with AsyncExitStack() as stack:
        first = await asked(a, stack)
        second = await stack.enter_async_context(b.server.connect())
        await second.send_json(resume("r1"))
        seen = await until_status(second, "chunk")
        await second.send_json(chat("other"))
        killed = asyncio.get_running_loop().time()
        world.kill("a")
        seen += await to_end(second, "r1")
        assert within(0.1, killed)
        await second.send_json(cancel("other"))
        assert (await to_end(second))[-1]["request_id"] == "other"
        assert not second.closed
        await first.close()
    await a.server.context.gateway.close()

    error = seen[-1]
    assert (error["chunk"]["code"], error["chunk"]["retryable"]) == ("server_shutdown", True)
    assert "event_id" not in error
    mine = by_id(seen, "r1")
    assert numbers(mine) == list(range(1, len(mine)))


async def test_a_connection_that_breaks_between_two_that_live_loses_nothing(make: Make) -> None:
    a, b = await make(2, PACED)
    async with AsyncExitStack() as stack:
        first = await asked(a, stack)
        second = await stack.enter_async_context(b.server.connect())
        await second.send_json(resume("r1"))
        seen = await until_status(second, "chunk")
        b.cluster.keep(["b"])
        seen += (await to_end(second))[:-1]
        await second.send_json(resume("r1", seen[-1]["event_id"]))
        seen += await to_end(second)
        await to_end(first)

    assert numbers(seen) == list(range(1, len(seen) + 1))
    assert seen[-1]["status"] == "complete"


async def test_an_owner_that_stops_in_good_order_passes_its_answers_on_to_their_end(
    make: Make,
) -> None:
    a, b = await make(2, PACED)
    async with AsyncExitStack() as stack:
        first = await asked(a, stack)
        second = await stack.enter_async_context(b.server.connect())
        await second.send_json(resume("r1"))
        seen = await until_status(second, "chunk")
        await first.close()
        stopping = asyncio.create_task(a.server.runner.end())
        seen += await to_end(second)
        await stopping

    assert seen[-1]["status"] == "complete"
    assert numbers(seen) == list(range(1, len(seen) + 1))


async def test_a_client_that_leaves_leaves_its_owners(make: Make) -> None:
    a, b = await make(2, ENDLESS)
    async with AsyncExitStack() as stack:
        first = await asked(a, stack)
        other = await asked(a, stack, "r2")
        async with b.server.connect() as second:
            await second.send_json(resume("r1"))
            await second.send_json(resume("r2"))
            await until(lambda: read_by(a) == 4)

        await until(lambda: read_by(a) == 2)
        await until(lambda: b.cluster.stats().tunnels == 0)
        await first.close()
        await other.close()
    await a.server.context.gateway.close()


@pytest.mark.parametrize("sent", [resume("r1"), cancel("r1")], ids=["resume", "cancel"])
async def test_a_client_that_leaves_while_its_id_is_asked_for_leaves_nothing_behind(
    make: Make, world: World, sent: Any
) -> None:
    a, b = await make(2, ENDLESS)
    world.slow = 0.04
    async with AsyncExitStack() as stack:
        first = await asked(a, stack)
        calls = world.calls
        async with b.server.connect() as second:
            await second.send_json(sent)
            await until(lambda: world.calls > calls)
        await b.server.nothing_held()
        if sent["action"] == "cancel":
            # It costs money while it runs.
            assert (await to_end(first))[-1]["status"] == "cancelled"
        else:
            await until(lambda: read_by(a) == 1)
            await first.close()
    await until(lambda: b.cluster.stats().tunnels == 0)
    await a.server.context.gateway.close()


async def test_a_client_that_reads_nothing_holds_up_its_owner_and_loses_nothing(
    make: Make,
) -> None:
    a, b = await make(2, QUICK, **{"chat.streams.max_stream_bytes": 1 << 26})
    whole = [await answered(a, name, **big(50_000, 100)) for name in ("r1", "r2")]
    async with b.server.connect() as ws:
        ws._conn.transport.pause_reading()  # noqa: SLF001 - it has no other way
        for name in ("r1", "r2"):
            await ws.send_json(resume(name))
        await until(lambda: b.cluster.stats().tunnels == 2)
        tunnels = tuple(b.cluster._tunnels._open)  # noqa: SLF001 - no snapshot has them
        await until(lambda: all(tunnel._blocked and tunnel.passed for tunnel in tunnels))  # type: ignore[union-attr]  # noqa: SLF001
        # What is read once of each may be kept.
        kept, passed = b.server.owners.streams.stats().bytes, [t.passed for t in tunnels]
        assert 0 < kept < 1 << 20
        await ticks(200)
        assert b.server.owners.streams.stats().bytes == kept
        assert [tunnel.passed for tunnel in tunnels] == passed
        await ws.send_json(chat("near"))
        ws._conn.transport.resume_reading()  # noqa: SLF001
        frames = []
        for _ in range(3):
            frames += await to_end(ws)

    assert [by_id(frames, name) for name in ("r1", "r2")] == whole
    assert by_id(frames, "near")[-1]["status"] == "complete"
    assert b.server.owners.streams.stats().running == 0


async def test_what_else_is_written_stands_between_whole_messages(make: Make) -> None:
    a, b = await make(2, PACED, **{"chat.streams.max_stream_bytes": 1 << 26})
    whole = await answered(a, **big(200_000, 30))
    async with b.server.connect(autoping=False) as ws:
        await ws.send_json(chat("near"))
        await ws.send_json(resume("r1"))
        frames: list[Any] = []
        pongs = 0
        while sum(frame["status"] in {"complete", "error"} for frame in frames) < 2:
            if len(frames) % 8 == 1:
                await ws.ping(b"?")
            message = await ws.receive(timeout=20)
            if message.type is WSMsgType.TEXT:
                frames.append(json.loads(message.data))
            else:
                assert message.type is WSMsgType.PONG
                pongs += 1
        assert pongs

    assert by_id(frames, "r1") == whole
    assert numbers(by_id(frames, "near"))[-1] == len(by_id(frames, "near"))


async def test_an_answer_that_is_resumed_again_takes_the_place_of_the_first(make: Make) -> None:
    a, b = await make(2, ENDLESS)
    async with AsyncExitStack() as stack:
        first = await asked(a, stack)
        second = await stack.enter_async_context(b.server.connect())
        for _ in range(3):
            await second.send_json(resume("r1"))
            await until_status(second, "chunk")
        await until(lambda: read_by(a) == 2)
        await second.send_json(cancel("r1"))
        ends = [frame for frame in await to_end(second) if frame["status"] == "cancelled"]
        await second.send_json({"action": "ping"})
        assert (await second.receive_json())["status"] == "pong"
        await to_end(first)

    assert len(ends) == 1


async def test_one_answer_of_others_too_many_is_refused(make: Make) -> None:
    few = {f"{CONCURRENCY}.max_connections": 2, f"{CONCURRENCY}.connection_queue_size": 2}
    a, b = await make(2, ENDLESS, **few)
    async with AsyncExitStack() as stack:
        first = await asked(a, stack)
        other = await asked(a, stack, "r2")
        second = await stack.enter_async_context(b.server.connect())
        await second.send_json(resume("r1"))
        await until_status(second, "chunk")
        await second.send_json(resume("r2"))
        refusal = (await to_end(second, "r2"))[-1]
        assert refusal["chunk"]["code"] == "instance_unavailable"
        assert (await until_status(second, "chunk"))[-1]["request_id"] == "r1"
        for ws in (first, other):
            await ws.close()
    await a.server.context.gateway.close()


# Responses.


async def begun(instance: Instance, stack: AsyncExitStack) -> tuple[Any, str]:
    """Ask for a response, and return its socket and its id."""
    ws = await stack.enter_async_context(responses.connect(instance.server))
    await ws.send_json(responses.create(store=True))
    created = await responses.next_event(ws)
    while "delta" not in (await responses.next_event(ws))["type"]:
        pass
    return ws, created["response"]["id"]


@pytest.mark.parametrize("lane", [None, "a"])
async def test_a_response_elsewhere_ends_in_its_own_form_with_its_owner(
    make: Make, world: World, lane: str | None
) -> None:
    a, b = await make(2, ENDLESS)
    async with AsyncExitStack() as stack:
        first, name = await begun(a, stack)
        second = await stack.enter_async_context(responses.connect(b.server))
        sent = {"type": "response.resume", "response_id": name}
        await second.send_json(sent if lane is None else {**sent, "stream_id": lane})
        seen = [await responses.next_event(second) for _ in range(8)]
        world.kill("a")
        seen += await responses.to_end(second, lane)
        await second.send_json(responses.create("two", lane=lane))
        assert (await responses.next_event(second))["type"] == "response.created"
        await first.close()
    await a.server.context.gateway.close()

    assert {event.get("stream_id") for event in seen} == {lane}
    assert [event["sequence_number"] for event in seen] == list(range(len(seen)))
    assert seen[-1]["type"] == "response.failed"
    assert "out of reach" in seen[-1]["response"]["error"]["message"]


@pytest.mark.parametrize("by", ["id", "lane"])
async def test_a_response_elsewhere_is_cancelled_where_it_is_read(make: Make, by: str) -> None:
    a, b = await make(2, ENDLESS)
    async with AsyncExitStack() as stack:
        first, name = await begun(a, stack)
        second = await stack.enter_async_context(responses.connect(b.server))
        await second.send_json(
            {"type": "response.resume", "response_id": name, "stream_id": "one"}
        )
        await responses.next_event(second)
        which = {"response_id": name} if by == "id" else {"stream_id": "one"}
        await second.send_json({"type": "response.cancel", **which})
        ends = [
            (await responses.to_end(first))[-1],
            (await responses.to_end(second, "one"))[-1],
        ]

    assert ends[0]["type"] == ends[1]["type"]
    assert ends[1].pop("stream_id") == "one"
    await a.server.simulator.until(lambda stats: stats.active == 0)


async def test_a_response_elsewhere_that_is_not_kept_from_there_on_is_a_gap(make: Make) -> None:
    a, b = await make(2, QUICK)
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(responses.connect(a.server))
        await first.send_json(responses.create(store=True))
        name = (await responses.to_end(first))[0]["response"]["id"]
        second = await stack.enter_async_context(responses.connect(b.server))
        await second.send_json(
            {"type": "response.resume", "response_id": name, "starting_after": 1_000}
        )
        (error,) = await responses.to_end(second)

    assert (error["status"], error["error"]["code"]) == (409, "resume_gap")


# Who may.


async def test_a_key_reads_and_cancels_its_own_answers_only(world: World, tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        a = await instance_of(world, stack, tmp_path, "a", ENDLESS, keys_of("one", "two"))
        b = await instance_of(world, stack, tmp_path, "b", ENDLESS, keys_of("one", "two"))
        first = await stack.enter_async_context(a.server.connect(headers=bearer("one")))
        await first.send_json(chat("r1"))
        await until_status(first, "chunk")
        async with b.server.connect(headers=bearer("two")) as stranger:
            for sent in (resume("r1"), cancel("r1")):
                await stranger.send_json(sent)
                (error,) = await to_end(stranger)
                assert error["chunk"]["code"] == "stream_not_found"
        async with b.server.connect(headers=bearer("one")) as second:
            await second.send_json(cancel("r1"))
            assert (await to_end(second))[-1]["status"] == "cancelled"
        await to_end(first)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({}, None),
        ({"caller": "other"}, StreamNotFound),
        ({"request_id": "r2"}, StreamNotFound),
        ({"api": "responses"}, StreamNotFound),
        ({"api": "unknown"}, StreamNotFound),
        ({"digest": b"another"}, RequestConflict),
    ],
)
async def test_whoever_names_a_caller_reads_what_exists_and_begins_nothing(
    make: Make, world: World, changes: Any, code: type[AioserverError] | None
) -> None:
    a, b = await make(2, QUICK)
    whole = await answered(a)
    word = {
        "caller": "",
        "request_id": "r1",
        "after": 0,
        "sequence": None,
        "digest": None,
        "api": "",
        "lane": None,
    }
    path = world.networks["a"].where("a").host
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(encode(Greeting(SECRET, Follow(**{**word, **changes}))))
    answer = await reader.read()
    writer.close()

    if code is None:
        assert answer.startswith(FOUND)
        assert answer.endswith(END)
        assert json.loads(ws_payload(answer[1:-2][answer.rindex(b"\x81") - 1 :])) == whole[-1]
    else:
        assert type(refused(answer)) is code
    assert (a.requests, b.requests) == (1, 0)
