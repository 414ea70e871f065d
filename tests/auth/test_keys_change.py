"""Keys that change while the server runs: callers that lost theirs are closed, and no other client
notices.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from aioserver.config.settings import Auth
from aioserver.protocol import eventstream
from aioserver.server import reload
from tests.support.chat import CHAT, chat, read_frames, to_end, until_status
from tests.support.keys import auth_of, bearer, code_of, cookie, keys_of, log_in
from tests.support.raw import CLOSE, TEXT, Raw, closing
from tests.support.server import ENDLESS, SILENT, MakeServer
from tests.support.waiting import patience, until


async def test_a_removed_key_is_refused_and_its_session_is_dead(make_server: MakeServer) -> None:
    server = await make_server(**keys_of("web", "app"))
    session = await log_in(server, "web")

    assert await reload.apply_auth(server.owners, auth_of("app", "new")) == {"web"}

    for headers in (bearer("web"), cookie(session)):
        async with server.session.get(f"{server.v1}/models", headers=headers) as response:
            assert (response.status, await code_of(response)) == (401, "invalid_api_key")
    for name in ("app", "new"):
        async with server.session.get(f"{server.v1}/models", headers=bearer(name)) as response:
            assert response.status == 200


async def test_its_sockets_hear_why_and_are_closed(make_server: MakeServer) -> None:
    server = await make_server(ENDLESS, **keys_of("web", "app"))
    async with (
        Raw(server) as idle,
        Raw(server) as busy,
        server.connect(headers=bearer("app")) as ws,
    ):
        for raw in (idle, busy):
            await raw.upgrade(f"Authorization: {bearer('web')['Authorization']}")
        await busy.send_json(chat("mine"))
        while (await busy.json_frame())["status"] != "chunk":
            pass
        await ws.send_json(chat("mine"))
        await until_status(ws, "chunk")

        assert await reload.apply_auth(server.owners, auth_of("app")) == {"web"}

        for raw in (idle, busy):
            frames: list[Any] = []
            while (frame := await raw.frame())[0] == TEXT:
                frames.append(json.loads(frame[1]))
            assert frame[0] == CLOSE
            assert closing(frame[1]) == (1008, b"key revoked")
            ends = [frame for frame in frames if frame["status"] != "chunk"]
            assert {end["chunk"]["code"] for end in ends} == {"invalid_api_key"}
            named = [end["request_id"] for end in ends]
            assert named == ([None] if raw is idle else ["mine", None])
            raw.close()
        frame_of_other = await ws.receive_json(timeout=patience(20))
        assert frame_of_other["status"] == "chunk", "nobody else notices"
    assert server.context.metrics.faces["websocket"].closed["1008"].value == 2
    async with server.session.delete(f"{server.sse}/mine", headers=bearer("app")) as response:
        assert response.status == 204


async def test_its_answers_on_the_other_faces_end_with_an_error(make_server: MakeServer) -> None:
    server = await make_server(ENDLESS, **keys_of("web"))
    headers = bearer("web")
    async with (
        server.session.post(server.sse, json={"request_id": "s", **CHAT}, headers=headers) as sse,
        server.session.post(
            f"{server.v1}/chat/completions", json={**CHAT, "stream": True}, headers=headers
        ) as openai,
    ):
        for response in (sse, openai):
            await response.content.readuntil(b"\n\n")
        await until(lambda: server.simulator.stats().active == 2)

        assert await reload.apply_auth(server.owners, None) == {"web"}

        frames = await read_frames_from(await sse.read())
        assert frames[-1]["status"] == "error"
        assert frames[-1]["chunk"]["code"] == "invalid_api_key"
        last = list(eventstream.parse(await openai.read()))[-1]
        assert json.loads(last.data)["error"]["code"] == "invalid_api_key"
        assert json.loads(last.data)["error"]["type"] == "authentication_error"
    await until(lambda: server.simulator.stats().active == 0)


async def read_frames_from(body: bytes) -> list[Any]:
    """The frames of the rest of an SSE body, of which the first may be cut."""
    return [json.loads(event.data) for event in eventstream.parse(body) if event.event]


@pytest.mark.parametrize("extra", [{}, {"Idempotency-Key": "k"}])
async def test_an_answer_that_is_not_streamed_ends_as_well(
    make_server: MakeServer, extra: dict[str, str]
) -> None:
    server = await make_server(SILENT, **keys_of("web"))
    asked = asyncio.ensure_future(
        server.session.post(
            f"{server.v1}/chat/completions", json=CHAT, headers={**bearer("web"), **extra}
        )
    )
    await server.simulator.until(lambda stats: stats.active == 1)

    await reload.apply_auth(server.owners, auth_of("app"))

    async with await asked as response:
        assert (response.status, await code_of(response)) == (401, "invalid_api_key")
        assert response.headers["WWW-Authenticate"] == "Bearer"
    await until(lambda: server.simulator.stats().active == 0)


async def test_a_client_that_waits_for_a_place_begins_nothing(make_server: MakeServer) -> None:
    server = await make_server(
        SILENT,
        **keys_of("web", "app"),
        **{"chat.websocket.concurrency.max_connections": 1, "chat.streams.resume_window": 0},
    )
    url = f"{server.v1}/chat/completions"
    first = asyncio.ensure_future(server.session.post(url, json=CHAT, headers=bearer("app")))
    await server.simulator.until(lambda stats: stats.active == 1)
    waits = asyncio.ensure_future(server.session.post(url, json=CHAT, headers=bearer("web")))
    await until(lambda: server.held()["waiting"] == 1)

    await reload.apply_auth(server.owners, auth_of("app"))
    first.cancel()

    async with await waits as response:
        assert (response.status, await code_of(response)) == (401, "invalid_api_key")
    assert server.simulator.stats().requests == 1


async def test_a_watcher_is_shown_out(make_server: MakeServer) -> None:
    server = await make_server(**keys_of("root"))
    async with server.session.get(f"{server.base}/events", headers=bearer("root")) as response:
        await response.content.readuntil(b"event: stats\n")

        await reload.apply_auth(server.owners, auth_of("web"))

        last = list(eventstream.parse(b"event: stats\n" + await response.read()))[-1]
    assert last.event == b"error"
    assert json.loads(last.data)["code"] == "invalid_api_key"
    await until(lambda: not server.watchers)


async def test_a_former_admin_watches_no_longer_and_chats_on(
    make_server: MakeServer,
) -> None:
    server = await make_server(ENDLESS, **keys_of("root"))
    headers = bearer("root")
    async with (
        server.connect(headers=headers) as ws,
        server.session.get(f"{server.base}/events", headers=headers) as response,
    ):
        await response.content.readuntil(b"event: stats\n")
        await ws.send_json(chat("one"))
        await until_status(ws, "chunk")

        for _ in range(2):
            assert await reload.apply_auth(server.owners, auth_of("root", admin=False)) == set()

        last = list(eventstream.parse(b"event: stats\n" + await response.read()))[-1]
        assert (last.event, json.loads(last.data)["code"]) == (b"error", "permission_denied")
        assert (await ws.receive_json(timeout=patience(20)))["status"] == "chunk"
        async with server.session.delete(f"{server.sse}/one", headers=headers) as got:
            assert got.status == 204
    async with server.session.get(f"{server.base}/events", headers=headers) as response:
        assert (response.status, await code_of(response)) == (403, "permission_denied")


async def test_limits_change_in_place(make_server: MakeServer) -> None:
    server = await make_server(ENDLESS, **keys_of("web", max_concurrent=1))
    async with server.connect(headers=bearer("web")) as ws:
        await ws.send_json(chat("one"))
        await until_status(ws, "chunk")

        assert (
            await reload.apply_auth(server.owners, auth_of("web", max_concurrent=2, priority=9))
            == set()
        )

        await ws.send_json(chat("two"))
        await until_status_of(ws, "two", "chunk")
        await ws.send_json(chat("three"))
        frames = await to_end(ws, "three")
        assert frames[-1]["chunk"]["code"] == "concurrency_exceeded"
        (socket,) = server.context.sockets
        assert socket.caller.priority == 9
        for name in ("one", "two"):
            async with server.session.delete(f"{server.sse}/{name}", headers=bearer("web")) as got:
                assert got.status == 204


async def until_status_of(ws: Any, request_id: str, status: str) -> None:
    while True:
        frame = await ws.receive_json(timeout=patience(20))
        if (frame["request_id"], frame["status"]) == (request_id, status):
            return


async def test_another_key_under_the_same_name_is_another_caller_of_that_name(
    make_server: MakeServer,
) -> None:
    server = await make_server(ENDLESS, **keys_of("web"))
    assert server.settings.auth is not None
    (old,) = server.settings.auth.all_keys
    (other,) = auth_of("other").all_keys
    turned = Auth(keys=(type(old)(name="web", sha256=other.sha256),))
    async with server.connect(headers=bearer("web")) as ws:
        await ws.send_json(chat("r"))
        await until_status(ws, "chunk")

        assert await reload.apply_auth(server.owners, turned) == {"web"}

        assert (await to_end(ws))[-1]["chunk"]["code"] == "invalid_api_key"
        await ws.receive(timeout=patience(20))
    async with server.session.get(f"{server.sse}/r", headers=bearer("other")) as response:
        assert response.status == 200
        assert (await read_frames(response))[-1]["chunk"]["code"] == "invalid_api_key"


async def test_clients_without_a_key_are_closed_when_keys_come(make_server: MakeServer) -> None:
    server = await make_server()
    async with server.connect() as ws, server.session.get(f"{server.base}/events") as events:
        await ws.ping()
        await events.content.readuntil(b"event: stats\n")

        assert await reload.apply_auth(server.owners, auth_of("web")) == {""}

        assert (await ws.receive_json(timeout=patience(20)))["chunk"]["code"] == "invalid_api_key"
        await ws.receive(timeout=patience(20))
        assert ws.close_code == 1008
        assert b"event: error\n" in await events.read()
    async with server.session.get(f"{server.base}/stats") as response:
        assert response.status == 401
    await reload.apply_auth(server.owners, server.settings.auth)
    async with server.session.get(f"{server.base}/stats") as response:
        assert response.status == 200
