"""Idle WebSockets give way where one key holds most places, and a key has a bound of its own."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import WSMsgType, WSServerHandshakeError

from aioserver.auth.callers import Caller
from aioserver.faces import idle_sockets
from aioserver.faces.idle_sockets import IDLE_SECONDS, IdleSockets
from tests.support.chat import CHAT, STREAMED, cancel, chat, frames_of, to_end, until_status
from tests.support.keys import auth_of, bearer, code_of, entry, keys_of
from tests.support.logs import fields_of
from tests.support.server import ENDLESS, places
from tests.support.waiting import patience, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.clock import FakeClock
    from tests.support.server import MakeServer, RunningServer

MINE, OTHER = "mine", "other"


# The rule, in virtual time.


class Client:
    """A WebSocket of the key *name*, as the rule sees it."""

    def __init__(self, house: House, name: str) -> None:
        self.caller = Caller(name)
        self.busy = False
        self.left = False
        self._house = house
        house.inside += 1
        house.idle.opened(name)
        house.idle.add(self)

    def give_way(self) -> None:
        assert not self.left, "told twice"
        assert not self.busy
        self.left = True
        self._house.told.append(self)
        self._house.free()

    def close(self) -> None:
        self._house.idle.remove(self)
        self._house.idle.closed(self.caller.name)
        self._house.inside -= 1


class House:
    """A server with *limit* places, whose waiting clients get what becomes free in their order."""

    def __init__(self, clock: FakeClock, limit: int) -> None:
        self.clock = clock
        self.limit = limit
        self.inside = 0
        self.queue: list[str] = []
        self.told: list[Client] = []
        self.idle = IdleSockets(
            clock.loop, limit=lambda: self.limit, waiting=lambda: len(self.queue)
        )

    def enter(self, name: str, count: int, pause: float = 1.0) -> list[Client]:
        clients = []
        for _ in range(count):
            clients.append(Client(self, name))
            self.clock.advance(pause)
        return clients

    def wait(self, name: str) -> None:
        self.queue.append(name)
        self.idle.waits(name)
        self.clock.advance(0)

    def give_up(self, name: str) -> None:
        self.queue.remove(name)
        self.idle.waited(name)

    def free(self) -> None:
        self.inside -= 1
        if self.queue:
            # Its task runs in a later turn.
            self.clock.loop.call_later(0.0, self._entered, self.queue.pop(0))

    def _entered(self, name: str) -> None:
        self.idle.waited(name)
        self.inside += 1
        self.idle.opened(name)


@pytest.fixture
def house(clock: FakeClock) -> House:
    return House(clock, 4)


def test_the_socket_that_has_been_idle_longest_gives_way(house: House, clock: FakeClock) -> None:
    first, second, third, fourth = house.enter(MINE, 4)
    clock.advance(IDLE_SECONDS)
    house.idle.asked(first)
    clock.advance(IDLE_SECONDS)

    house.wait(OTHER)

    assert house.told == [second]
    assert [client.left for client in (first, third, fourth)] == [False] * 3


def test_one_gives_way_for_each_that_waits_down_to_half(house: House, clock: FakeClock) -> None:
    clients = house.enter(MINE, 4)
    clock.advance(IDLE_SECONDS)

    for waiting, gone in ((0, 1), (0, 2), (1, 2)):
        house.wait(OTHER)
        assert len(house.queue) == waiting
        assert house.told == clients[:gone]
    clock.advance(1000.0)
    assert len(house.told) == 2


@pytest.mark.parametrize(
    ("inside", "waits"),
    [([(MINE, 4)], MINE), ([(MINE, 2), (OTHER, 2)], "third"), ([("", 4)], "")],
    ids=["the same key", "a key while none has more than half", "another without a key"],
)
def test_nobody_gives_way_to(
    house: House, clock: FakeClock, inside: list[tuple[str, int]], waits: str
) -> None:
    for name, count in inside:
        house.enter(name, count)
    clock.advance(1000.0)
    house.wait(waits)
    clock.advance(1000.0)

    assert house.told == []
    assert clock.pending == 0


def test_a_socket_gives_way_in_the_moment_in_which_it_becomes_idle(
    house: House, clock: FakeClock
) -> None:
    first, *_ = house.enter(MINE, 4)
    house.wait(OTHER)
    house.wait("third")

    clock.advance(IDLE_SECONDS - 4 - 0.001)
    assert house.told == []
    clock.advance(0.002)
    assert house.told == [first]


def test_a_socket_with_an_answer_under_way_never_gives_way(house: House, clock: FakeClock) -> None:
    clients = house.enter(MINE, 4)
    for client in clients[:3]:
        client.busy = True
    clock.advance(1000.0)
    house.wait(OTHER)
    house.wait(OTHER)
    clock.advance(1000.0)
    assert house.told == clients[3:]

    clients[0].busy = False
    house.idle.asked(clients[0])  # its answer has ended
    clock.advance(IDLE_SECONDS - 0.001)
    assert len(house.told) == 1
    clock.advance(0.002)
    assert house.told == [clients[3], clients[0]]


def test_when_the_last_gives_up_nobody_gives_way_any_more(house: House, clock: FakeClock) -> None:
    house.enter(MINE, 4)
    house.wait(OTHER)
    house.give_up(OTHER)

    assert clock.pending == 0
    clock.advance(1000.0)
    assert house.told == []


def test_a_key_that_comes_to_more_than_half_meanwhile_gives_way(
    house: House, clock: FakeClock
) -> None:
    clients = house.enter(MINE, 2)
    (other, *_) = house.enter(OTHER, 2)
    clock.advance(1000.0)
    house.wait("third")
    other.close()
    house.enter(MINE, 1, 0.0)
    clock.advance(0)

    assert house.told == clients[:1]


def test_a_lower_limit_counts_at_once(house: House, clock: FakeClock) -> None:
    house.limit = 8
    clients = house.enter(MINE, 4)
    clock.advance(1000.0)
    house.wait(OTHER)
    assert house.told == []

    house.limit = 6
    house.idle.limit_changed()
    clock.advance(0)
    assert house.told == clients[:1]


def test_what_has_closed_is_forgotten(house: House, clock: FakeClock) -> None:
    first, second, *_ = house.enter(MINE, 4)
    first.close()
    (third,) = house.enter(MINE, 1)
    clock.advance(1000.0)
    house.wait(OTHER)
    assert house.told == [second]
    house.idle.remove(second)
    assert third.left is False


def test_a_socket_gives_way_at_once_to_who_may_not_wait(house: House, clock: FakeClock) -> None:
    first, second, third, fourth = house.enter(MINE, 4)
    clock.advance(IDLE_SECONDS - 4)

    for name, gone in (
        *((MINE, []), (OTHER, [first]), (OTHER, [first, second])),
        *((OTHER, [first, second]), ("", [first, second])),
    ):
        house.idle.make_room(name)
        house.idle.make_room(MINE)
        assert house.told == gone
        clock.advance(1.0)
    assert house.inside == 2
    assert clock.pending == 0
    assert [client.left for client in (third, fourth)] == [False] * 2


# On real sockets.


def limits(inside: int, timeout: float = 30.0) -> dict[str, Any]:
    return places(inside, timeout=timeout)


@pytest.fixture
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every socket that has no answer under way is idle at once."""
    monkeypatch.setattr(idle_sockets, "IDLE_SECONDS", 0.001)


@contextlib.asynccontextmanager
async def held_by(server: RunningServer, name: str, count: int) -> AsyncIterator[list[Any]]:
    """*count* WebSockets of the key *name*, all with their places."""
    inside = server.held()["places"]
    async with contextlib.AsyncExitStack() as stack:
        parts_held = [
            await stack.enter_async_context(server.connect(headers=bearer(name)))
            for _ in range(count)
        ]
        await until(lambda: server.held()["places"] == inside + count)
        yield parts_held


async def closed_with(ws: Any) -> tuple[Any, int]:
    """The error, and the close code of a socket that the server closes."""
    error = (await until_status(ws, "error"))[-1]
    assert (await ws.receive(timeout=patience(10))).type == WSMsgType.CLOSE
    return error, ws.close_code


@pytest.mark.usefixtures("no_patience")
@pytest.mark.parametrize("face", ["websocket", "sse", "openai", "openai streamed"])
async def test_an_idle_socket_gives_way_to_another_key_on_each_face(
    make_server: MakeServer, face: str, caplog: pytest.LogCaptureFixture
) -> None:
    server = await make_server(**limits(3), **keys_of(MINE, OTHER, "root"))
    async with held_by(server, MINE, 3) as (first, second, third):
        # It asks last: so the second one has been idle longest.
        await first.send_json(chat("r"))
        await to_end(first)
        # A client that does not read answers no close frame, and keeps its place for as long.
        closing = asyncio.create_task(closed_with(second))
        if face == "websocket":
            async with server.connect(headers=bearer(OTHER)) as ws:
                await ws.send_json(chat("w"))
                assert (await to_end(ws, "w"))[-1]["status"] == "complete"
        else:
            url = server.sse if face == "sse" else f"{server.v1}/chat/completions"
            body = {"request_id": "s", **CHAT} if face == "sse" else CHAT
            async with server.session.post(
                url, json=STREAMED if "streamed" in face else body, headers=bearer(OTHER)
            ) as response:
                assert response.status == 200
                await response.read()
        error, code = await closing
        for ws in (first, third):
            await ws.send_json({"action": "ping", "request_id": "p"})
            assert (await ws.receive_json())["status"] == "pong"

    assert (error["request_id"], error["chunk"]["code"]) == (None, "server_at_capacity")
    assert error["chunk"]["retry_after"] >= 1
    assert code == 1013
    [line] = [record for record in caplog.records if record.getMessage() == "connection gave way"]
    fields: Any = line.fields  # type: ignore[attr-defined]
    assert (line.levelname, fields["caller"], fields["face"]) == ("WARNING", MINE, "websocket")
    async with server.session.get(f"{server.base}/metrics", headers=bearer("root")) as response:
        text = await response.text()
    assert "aioserver_connections_gave_way_total 1.0" in text
    await server.nothing_held()


@pytest.mark.usefixtures("no_patience")
@pytest.mark.parametrize("queue_timeout", [0.0, 0.05])
async def test_where_nobody_may_wait_others_are_served_at_once_whatever_idle_clients_do(
    make_server: MakeServer, queue_timeout: float
) -> None:
    keys = keys_of(MINE, "a", "b", "c", max_concurrent=1)
    server = await make_server(**limits(6, timeout=queue_timeout), **keys)

    async def ask(name: str) -> int:
        async with server.session.post(
            f"{server.v1}/chat/completions", json=CHAT, headers=bearer(name)
        ) as response:
            await response.read()
            return response.status

    # Its clients read nothing, so they answer no close frame for as long as they like.
    async with held_by(server, MINE, 6) as sockets:
        # One waits in vain: it has answers under way.
        await sockets[0].send_json(chat("r"))
        await to_end(sockets[0])
        for names in ("a", "abc", "cab"):
            assert await asyncio.gather(*map(ask, names)) == [200] * len(names)
        # Half of the places stay, and none of the same key gives way.
        assert server.held()["places"] == 3
        for ws in sockets[3:5]:
            assert not ws.closed
    await server.nothing_held()


@pytest.mark.usefixtures("no_patience")
async def test_running_answers_keep_their_sockets(make_server: MakeServer) -> None:
    server = await make_server(ENDLESS, **limits(2, timeout=0.5), **keys_of(MINE, OTHER))
    async with held_by(server, MINE, 2) as sockets:
        for number, ws in enumerate(sockets):
            await ws.send_json(chat(f"r{number}"))
            await until_status(ws, "chunk")
        async with server.connect(headers=bearer(OTHER)) as ws:
            assert (await closed_with(ws))[1] == 1013
        for number, ws in enumerate(sockets):
            await until_status(ws, "chunk")
            await ws.send_json(cancel(f"r{number}"))
            await until_status(ws, "cancelled")
    await server.nothing_held()


async def test_a_socket_that_was_active_just_now_keeps_its_place(make_server: MakeServer) -> None:
    server = await make_server(**limits(2, timeout=0.3), **keys_of(MINE, OTHER))
    async with held_by(server, MINE, 2) as sockets, server.connect(headers=bearer(OTHER)) as ws:
        assert (await closed_with(ws))[1] == 1013
        for mine in sockets:
            await mine.send_json({"action": "ping", "request_id": "p"})
            assert (await mine.receive_json())["status"] == "pong"
    await server.nothing_held()


@pytest.mark.usefixtures("no_patience")
async def test_one_key_gives_way_to_many_down_to_half_of_the_places(
    make_server: MakeServer,
) -> None:
    server = await make_server(**limits(6), **keys_of(MINE, "a", "b", "c", "d"))
    async with held_by(server, MINE, 6), contextlib.AsyncExitStack() as stack:
        for name in ("a", "b", "c", "d"):
            await stack.enter_async_context(server.connect(headers=bearer(name)))
        await until(lambda: server.held()["places"] == 6 and server.held()["waiting"] == 1)
        await until(lambda: len(server.context.sockets) == 7)
        names = sorted(socket.caller.name for socket in server.context.sockets)

    assert names == ["a", "b", "c", "d", MINE, MINE, MINE]
    await server.nothing_held()


# A key's own bound.


@pytest.mark.parametrize("inside", [1, 10], ids=["one waits", "all inside"])
async def test_a_key_has_no_more_connections_than_its_own_bound(
    make_server: MakeServer, inside: int, caplog: pytest.LogCaptureFixture
) -> None:
    keys = [entry(MINE, max_connections=2), entry(OTHER)]
    server = await make_server(**limits(inside), **{"auth.keys": keys})
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(2):
            await stack.enter_async_context(server.connect(headers=bearer(MINE)))
        await until(lambda: server.held()["places"] + server.held()["waiting"] == 2)

        with pytest.raises(WSServerHandshakeError) as refused:
            await server.connect(headers=bearer(MINE))
        assert refused.value.status == 429
        for path, body in (
            ("/v1/chat/completions", CHAT),
            ("/v1/responses", {"input": "x", "stream": True}),
            ("/sse/chat", {"request_id": "r", **CHAT}),
        ):
            async with server.session.post(
                server.base + path, json=body, headers=bearer(MINE)
            ) as response:
                assert (response.status, await code_of(response)) == (429, "concurrency_exceeded")
                assert response.headers["Retry-After"] == "1"
        # Any other status would stop an EventSource for good.
        async with server.session.get(f"{server.sse}/r", headers=bearer(MINE)) as response:
            assert response.status == 200
            (frame,) = frames_of(await response.read())
            assert (frame["status"], frame["chunk"]["code"]) == ("busy", "concurrency_exceeded")
        # What frees or shows something works, and so does another key.
        async with server.session.get(f"{server.v1}/models", headers=bearer(MINE)) as response:
            assert response.status == 200
        async with server.connect(headers=bearer(OTHER)) as ws:
            await ws.send_json({"action": "ping"})
    await server.nothing_held()

    assert fields_of(caplog, "connection refused")
    async with server.connect(headers=bearer(MINE)) as ws:
        await ws.send_json(chat("r"))
        assert (await to_end(ws))[-1]["status"] == "complete"


async def test_connections_are_given_back_however_they_end(make_server: MakeServer) -> None:
    keys = [entry(MINE, max_connections=1)]
    server = await make_server(**limits(1, timeout=0.1), **{"auth.keys": keys})
    url, headers = f"{server.v1}/chat/completions", bearer(MINE)
    for _ in range(3):
        for body, status in (({}, 400), (CHAT, 200), ({**CHAT, "model": "fault-status-500"}, 502)):
            async with server.session.post(url, json=body, headers=headers) as response:
                assert response.status == status
                await response.read()
        async with server.connect(headers=headers) as ws:
            await ws.send_json({"action": "ping"})
            await until_status(ws, "pong")
        await server.nothing_held()


async def test_a_reload_changes_the_bound_and_keeps_the_count(make_server: MakeServer) -> None:
    server = await make_server(**{"auth.keys": [entry(MINE)]})
    async with held_by(server, MINE, 3):
        for bound, status in ((3, 429), (4, 200), (2, 429), (0, 200)):
            changes = {"auth.keys": [entry(MINE, max_connections=bound)]}
            assert await server.change(**changes)
            async with server.session.post(
                f"{server.v1}/chat/completions", json=CHAT, headers=bearer(MINE)
            ) as response:
                assert response.status == status
                await response.read()
    assert auth_of(MINE).all_keys[0].max_connections == 0


async def test_a_key_at_its_bound_does_not_hide_in_the_log_that_the_server_is_full(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    keys = [entry(MINE, max_connections=1), entry(OTHER)]
    server = await make_server(**limits(1, timeout=0), **{"auth.keys": keys})
    url = f"{server.v1}/chat/completions"
    async with server.connect(headers=bearer(MINE)):
        await until(lambda: server.held()["places"] == 1)

        for name, status in ((MINE, 429), (OTHER, 503)):
            async with server.session.post(url, json=CHAT, headers=bearer(name)) as response:
                assert response.status == status

    codes = [line["code"] for line in fields_of(caplog, "connection refused")]
    assert codes == ["concurrency_exceeded", "server_at_capacity"]
