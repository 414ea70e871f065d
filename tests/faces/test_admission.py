"""The counting wrapper: places, the line in front of them, refusals, and nothing ever kept."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import WSMsgType

from aioserver.faces import admission, intake
from aioserver.faces import socket as sockets
from aioserver.faces.upgrade import SocketPlace
from aioserver.telemetry.logs import RateLimit
from tests.support.chat import CHAT, chat, frames_of, to_end, until_status
from tests.support.raw import CLOSE, TEXT, Raw, closing
from tests.support.server import CONCURRENCY, SILENT, MakeServer, places
from tests.support.waiting import patience, until, within

if TYPE_CHECKING:
    from aioserver.errors import AioserverError
    from tests.support.clock import FakeClock
    from tests.support.server import RunningServer


FULL = re.compile(
    r"the server is full: 2 of 2 places are taken; try again in \d+ s "
    rf"\({re.escape(CONCURRENCY)}\.max_connections=2 reached\)"
)


def limits(inside: int = 2, line: int = 2, timeout: float = 0.3) -> dict[str, Any]:
    return places(inside, line, timeout)


@contextlib.asynccontextmanager
async def full(server: RunningServer) -> Any:
    """Every place taken by a WebSocket."""
    count = server.settings.chat.websocket.concurrency.max_connections
    async with contextlib.AsyncExitStack() as stack:
        sockets = [await stack.enter_async_context(server.connect()) for _ in range(count)]
        await until(lambda: server.held()["places"] == count)
        yield sockets


def waiting(server: RunningServer) -> int:
    return server.held()["waiting"]


# WebSockets.


@pytest.mark.virtual_time
@pytest.mark.parametrize("wait", [0, 0.2])
async def test_a_websocket_without_a_place_is_told_why_and_closed_with_1013(
    make_server: MakeServer, wait: float
) -> None:
    server = await make_server(**limits(timeout=wait))
    loop = asyncio.get_running_loop()
    async with full(server), Raw(server) as raw:
        begun = loop.time()
        assert (await raw.upgrade()).status == 101
        frames: list[tuple[int, bytes]] = []
        while not frames or frames[-1][0] != CLOSE:
            frames.append(await raw.frame())
        took = loop.time() - begun
        assert within(wait + 2.0, begun)

    *queued, error = [json.loads(data) for opcode, data in frames if opcode == TEXT]
    assert [frame["status"] for frame in queued] == (["queued"] if wait else [])
    assert (error["request_id"], error["status"]) == (None, "error")
    assert error["chunk"]["code"] == "server_at_capacity"
    assert FULL.fullmatch(error["chunk"]["error"])
    assert error["chunk"]["retryable"] is True
    assert 1 <= error["chunk"]["retry_after"] <= 60
    code, reason = closing(frames[-1][1])
    assert (code, reason) == (1013, b"Server at maximum capacity, try again later")
    assert wait <= took + 0.01


@pytest.mark.virtual_time
async def test_a_full_queue_refuses_at_once(make_server: MakeServer) -> None:
    server = await make_server(**limits(timeout=30.0))
    async with full(server), contextlib.AsyncExitStack() as stack:
        for _ in range(2):
            ws = await stack.enter_async_context(server.connect())
            assert (await ws.receive_json())["status"] == "queued"
        ws = await stack.enter_async_context(server.connect())
        assert (await ws.receive_json(timeout=patience(5)))["chunk"][
            "code"
        ] == "server_at_capacity"
        assert (await ws.receive(timeout=patience(5))).type == WSMsgType.CLOSE
        assert ws.close_code == 1013


async def test_a_waiting_websocket_knows_its_position_and_enters_in_order(
    make_server: MakeServer,
) -> None:
    server = await make_server(**limits(timeout=30.0))
    async with (
        full(server) as (first, second),
        server.connect() as third,
        server.connect() as fourth,
    ):
        for number, ws in enumerate((third, fourth), 1):
            frame = await ws.receive_json()
            assert (frame["request_id"], frame["status"]) == (None, "queued")
            assert frame["chunk"]["position"] == number
            assert frame["chunk"]["eta"] > 0
            assert "event_id" not in frame
        await first.close()
        await third.send_json({"action": "ping"})
        assert (await until_status(third, "pong"))[-1]["status"] == "pong"
        assert server.held()["places"] == 2
        await until_status(fourth, "queued")  # one step nearer
        await second.close()
        await fourth.send_json({"action": "ping"})
        await until_status(fourth, "pong")


async def test_frames_of_a_waiting_websocket_are_carried_out_in_order_once_it_is_in(
    make_server: MakeServer,
) -> None:
    server = await make_server(**limits(timeout=30.0))
    async with full(server) as (first, _), server.connect() as ws:
        assert (await ws.receive_json())["status"] == "queued"
        for number in range(16):
            await ws.send_json({"action": "ping", "request_id": f"p{number}"})
        await asyncio.sleep(0)
        assert waiting(server) == 1
        await first.close()
        pongs = [(await until_status(ws, "pong"))[-1]["request_id"] for _ in range(16)]

    assert pongs == [f"p{number}" for number in range(16)]


@pytest.mark.parametrize("size", [0, 1 << 20])
async def test_too_much_from_a_waiting_websocket_closes_with_1008(
    make_server: MakeServer, size: int
) -> None:
    server = await make_server(**limits(timeout=30.0))
    async with full(server), server.connect() as ws:
        assert (await ws.receive_json())["status"] == "queued"
        for _ in range(2 if size else 17):
            await ws.send_json({"action": "ping", "x": "x" * size})
        frames = await until_status(ws, "error")
        assert frames[-1]["chunk"]["code"] == "rate_limit_exceeded"
        assert frames[-1]["chunk"]["retry_after"] == 1.0
        assert (await ws.receive()).type == WSMsgType.CLOSE
        assert ws.close_code == 1008
        await until(lambda: waiting(server) == 0)


async def test_a_waiting_client_that_was_closed_and_then_gets_a_place_asks_nothing(
    make_server: MakeServer,
) -> None:
    server = await make_server(**limits(inside=1, line=5, timeout=30))
    async with full(server) as (holder,), Raw(server) as raw:
        await raw.upgrade()
        for number in range(sockets.MAX_WAITING_MESSAGES + 1):
            await raw.send_json(chat(f"r{number}"))
        while (frame := await raw.frame())[0] == TEXT:
            pass
        assert closing(frame[1])[0] == 1008

        await holder.close()
        await until(lambda: server.held()["sockets"] == 1 and not waiting(server))
        await raw.send_frame(CLOSE, frame[1])
        await raw.to_the_end()

    await server.nothing_held()
    assert not any(counter.value for counter in server.context.metrics.outcomes.values())


@pytest.mark.parametrize("politely", [True, False])
async def test_a_waiter_that_leaves_frees_its_place_in_the_queue(
    make_server: MakeServer, politely: bool
) -> None:
    server = await make_server(**limits(timeout=30.0))
    async with full(server) as (first, _), Raw(server) as raw:
        await raw.upgrade()
        await raw.json_frame()
        assert waiting(server) == 1
        async with server.connect() as ws:
            assert (await ws.receive_json())["chunk"]["position"] == 2
            if politely:
                await raw.send_frame(CLOSE, b"\x03\xe8")
            else:
                raw.reset()
            frames = await until_status(ws, "queued")
            assert frames[-1]["chunk"]["position"] == 1
            assert waiting(server) == 1
            await first.close()
            await ws.send_json({"action": "ping"})
            await until_status(ws, "pong")


async def test_a_refused_websocket_that_never_answers_its_close_is_let_go(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "CLOSE_TIMEOUT", 0.3)
    server = await make_server(**limits(timeout=0))
    async with full(server), Raw(server) as raw:
        await raw.upgrade()
        frames = await raw.frames()  # never answered: the server gives up
        assert closing(frames[-1][1])[0] == 1013
        await until(lambda: server.held()["sockets"] == 2)
    assert server.context.admission.refused_closing == 0


async def test_when_too_many_refused_sockets_are_closing_the_answer_is_a_plain_503(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aioserver.faces.upgrade.MAX_REFUSED_CLOSING", 2)
    server = await make_server(**limits(timeout=0))
    async with full(server), Raw(server) as first, Raw(server) as second, Raw(server) as third:
        for raw in (first, second):
            assert (await raw.upgrade()).status == 101
            await raw.frame()
        head = await third.upgrade()

    assert head.status == 503
    assert 1 <= int(head.headers["retry-after"]) <= 60
    assert admission.MAX_REFUSED_CLOSING == 256


# HTTP.


@pytest.mark.virtual_time
@pytest.mark.parametrize(
    ("path", "body"),
    [("/sse/chat", {"request_id": "r1", "text": "x"}), ("/v1/chat/completions", CHAT)],
)
@pytest.mark.parametrize("wait", [0, 0.2])
async def test_a_post_without_a_place_is_503_with_retry_after(
    make_server: MakeServer, path: str, body: object, wait: float
) -> None:
    server = await make_server(**limits(timeout=wait))
    loop = asyncio.get_running_loop()
    async with full(server):
        begun = loop.time()
        async with server.session.post(server.base + path, json=body) as response:
            error = (await response.json())["error"]
        took = loop.time() - begun
        assert within(wait + 2.0, begun)

    assert response.status == 503
    assert 1 <= int(response.headers["Retry-After"]) <= 60
    assert FULL.fullmatch(error.pop("message"))
    assert error == {
        "type": "service_unavailable_error",
        "param": None,
        "code": "server_at_capacity",
    }
    assert wait <= took + 0.01
    assert server.simulator.stats().requests == 0


async def test_a_post_that_waits_is_served_when_a_place_is_free(make_server: MakeServer) -> None:
    server = await make_server(**limits(timeout=30.0))
    async with full(server) as (first, _):
        asking = asyncio.ensure_future(
            server.session.post(server.v1 + "/chat/completions", json=CHAT)
        )
        await until(lambda: waiting(server) == 1)
        await first.close()
        async with await asking as response:
            assert response.status == 200


@pytest.mark.parametrize("path", ["/sse/chat", "/v1/chat/completions"])
async def test_a_post_that_leaves_the_queue_is_forgotten(
    make_server: MakeServer, path: str
) -> None:
    server = await make_server(**limits(timeout=30.0))
    body = {**CHAT, "request_id": "r1"} if path == "/sse/chat" else CHAT
    async with full(server), Raw(server) as raw:
        await raw.post(path, body)
        await until(lambda: waiting(server) == 1)
        assert server.held()["body_bytes"] > 0
        raw.close()
        await until(lambda: waiting(server) == 0)
        assert server.held()["body_bytes"] == 0
    assert server.simulator.stats().requests == 0


async def test_an_event_source_without_a_place_is_asked_to_come_back(
    make_server: MakeServer,
) -> None:
    server = await make_server(**limits(timeout=0.1))
    async with server.session.post(server.sse, json={"request_id": "r1", "text": "x"}) as response:
        await response.read()
    async with full(server), server.session.get(f"{server.sse}/r1") as response:
        body = await response.read()

    assert response.status == 200
    assert response.headers["Content-Type"] == "text/event-stream"
    assert body.startswith(b"retry: 2000\n")
    (frame,) = frames_of(body)
    assert (frame["request_id"], frame["status"]) == ("r1", "busy")
    assert frame["chunk"]["code"] == "server_at_capacity"
    async with server.session.get(f"{server.sse}/r1") as response:  # and misses nothing
        assert frames_of(await response.read())[-1]["status"] == "complete"


async def test_requests_that_free_or_show_a_full_server_work_in_it(
    make_server: MakeServer,
) -> None:
    server = await make_server(SILENT, **limits(inside=1, line=1, timeout=30.0))
    session, base = server.session, server.base
    shown: list[Any] = []
    async with full(server) as (ws,), server.connect() as waiter:
        await ws.send_json(chat("r1"))
        await until_status(ws, "processing")
        assert (await waiter.receive_json())["status"] == "queued"
        server.context.monitor.tick()
        async with session.get(base + "/metrics") as response:
            assert "aioserver_connections_waiting" in await response.text()
        for path in (
            *("/health", "/healthz", "/livez", "/ready", "/readyz"),
            *("/v1/models", "/", "/stats"),
        ):
            async with session.get(base + path) as response:
                assert response.status == 200, path
                shown.append(await response.json())
        connections = shown[-1]["connections"]
        assert (connections["active"], connections["limit"]) == (1, 1)
        assert (connections["waiting"], connections["queue_size"]) == (1, 1)
        assert connections["waiting_by_face"]["websocket"] == 1
        async with session.get(base + "/v1/models/sim") as response:
            assert response.status == 200
        async with session.get(server.sse) as response:
            assert [stream["request_id"] for stream in (await response.json())["streams"]] == [
                "r1"
            ]
        async with session.delete(f"{server.sse}/r1") as response:
            assert response.status == 204
        assert (await to_end(ws))[-1]["status"] == "cancelled"


async def test_a_faulty_request_is_400_though_the_server_is_full(
    make_server: MakeServer,
) -> None:
    server = await make_server(**limits(timeout=0))
    async with full(server):
        for path, status in (("/sse/chat", 400), ("/v1/chat/completions", 400)):
            async with server.session.post(server.base + path, json=[]) as response:
                assert response.status == status
        async with server.session.get(f"{server.sse}/nobody") as response:
            assert response.status == 404


# Bodies.


@pytest.mark.virtual_time
async def test_a_slow_body_holds_no_place_and_gets_408(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "BODY_TIMEOUT", 0.5)
    server = await make_server(**limits(inside=1))
    loop = asyncio.get_running_loop()
    async with Raw(server) as raw:
        begun = loop.time()
        await raw.send(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
            b'Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"x": '
        )
        await until(lambda: server.held()["body_bytes"] == 6)
        assert server.held()["places"] == 0
        async with server.session.post(server.v1 + "/chat/completions", json=CHAT) as response:
            assert response.status == 200
        answer = await raw.answer()
        rest = await raw.to_the_end()

    assert (answer.status, answer.code) == (408, "request_timeout")
    assert answer.headers["connection"] == "close"
    assert rest == b""
    assert loop.time() - begun > 0.4
    assert within(5.0, begun)
    await server.nothing_held()


async def test_bodies_beyond_their_bound_all_together_are_503(make_server: MakeServer) -> None:
    server = await make_server(**limits(), **{f"{CONCURRENCY}.max_body_bytes": 1000})
    head = (
        b"POST /sse/chat HTTP/1.1\r\nHost: x\r\n"
        b"Content-Type: application/json\r\nContent-Length: 900\r\n\r\n"
    )
    async with Raw(server) as first, Raw(server) as second:
        await first.send(head + b" " * 800)
        await until(lambda: server.held()["body_bytes"] == 800)
        await second.send(head + b" " * 300)
        answer = await second.answer()
        assert (answer.status, answer.code) == (503, "server_at_capacity")
        assert f"{CONCURRENCY}.max_body_bytes=1000" in answer.json()["error"]["message"]
        assert "retry-after" in answer.headers
        assert server.held()["body_bytes"] == 800
    await server.nothing_held()


async def test_the_body_of_a_waiter_counts_and_that_of_a_request_not_answered_yet(
    make_server: MakeServer,
) -> None:
    server = await make_server(SILENT, **limits(inside=1, line=1, timeout=30.0))
    async with Raw(server) as first, Raw(server) as second:
        await first.post("/v1/chat/completions", CHAT)
        await server.simulator.until(lambda stats: stats.active == 1)
        assert server.held()["body_bytes"] == len(json.dumps(CHAT))
        await second.post("/v1/chat/completions", CHAT)
        await until(lambda: waiting(server) == 1)
        assert server.held()["body_bytes"] == 2 * len(json.dumps(CHAT))
    await server.nothing_held()


async def test_frames_that_came_before_a_socket_was_sent_away_are_not_carried_out(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "CLOSE_TIMEOUT", 0.3)
    server = await make_server(**limits(inside=1, line=1, timeout=30.0))
    async with full(server) as (ws,), Raw(server) as raw:
        await raw.upgrade()
        await raw.json_frame()
        await raw.send_json(chat("r1"))
        await raw.send_frame(2, b"no text")  # closed while it waits
        while (await raw.frame())[0] != CLOSE:
            pass
        await ws.close()  # its place is free now
        await raw.frames()

    await server.nothing_held()
    assert server.simulator.stats().requests == 0


async def test_a_socket_whose_wait_has_a_bug_is_refused(
    server: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    async def wait(*_args: object) -> Any:
        raise RuntimeError("a bug")

    metrics = server.context.metrics
    fake: Any = SimpleNamespace(try_enter=lambda: None, wait=wait, metrics=metrics)
    refused: list[AioserverError] = []
    socket: Any = SimpleNamespace(
        face="websocket",
        caller=SimpleNamespace(name=""),
        show_position=None,
        refused=refused.append,
    )
    with SocketPlace(fake, socket):
        await until(lambda: bool(refused))

    assert [error.code for error in refused] == ["internal_error"]
    assert metrics.bugs.value == 1
    # A tick may have found the incident already.
    logged = [
        record.getMessage() for record in caplog.records if record.name != "aioserver.monitoring"
    ]
    assert logged == ["bug in a socket's wait"]


# Log lines.


async def refused_once(server: RunningServer, face: str, number: int) -> None:
    """Let *face* refuse one connection of a full server."""
    if face == "websocket":
        async with server.connect() as ws:
            assert (await ws.receive_json())["chunk"]["code"] == "server_at_capacity"
        return
    url, body = {
        "sse": (server.sse, {"request_id": f"r{number}", **CHAT}),
        "openai": (f"{server.v1}/chat/completions", CHAT),
    }[face]
    async with server.session.post(url, json=body) as response:
        assert response.status == 503


@pytest.mark.parametrize("face", ["websocket", "sse", "openai"])
async def test_refusals_are_one_line_a_second_and_face_and_the_others_are_counted(
    face: str, make_server: MakeServer, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    server = await make_server(**limits(1, 1, 0))
    server.context.admission.refusal_lines = RateLimit(
        admission.REFUSAL_LINES_PER_SECOND, clock=clock
    )

    async with full(server):
        for number in range(7):
            await refused_once(server, face, number)
        clock.now += 1
        for number in range(7, 9):
            await refused_once(server, face, number)

    lines: list[Any] = [
        record for record in caplog.records if record.getMessage() == "connection refused"
    ]
    assert [(record.levelno, record.fields["face"]) for record in lines] == [
        (logging.WARNING, face)
    ] * 2
    assert {line.fields["code"] for line in lines} == {"server_at_capacity"}
    assert "suppressed" not in lines[0].fields
    assert lines[1].fields["suppressed"] == 6
