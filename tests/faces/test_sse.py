"""The SSE face, over real sockets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from unittest.mock import ANY
from urllib.parse import quote

import pytest
from yarl import URL

from tests.support.chat import (
    cancel,
    chat,
    frames_of,
    numbers,
    read_frames,
    resume,
    text_of,
    to_end,
    until_status,
    whole,
)
from tests.support.raw import Raw
from tests.support.server import PACED, QUICK, SILENT, SLOW, MakeServer
from tests.support.simulator import Behaviour
from tests.support.waiting import until

if TYPE_CHECKING:
    from tests.support.server import RunningServer


ASK = {"request_id": "r1", "text": "Hello"}
ASYNC = {"Prefer": "respond-async"}


async def test_a_post_streams_the_frames_of_the_websocket_face(server: RunningServer) -> None:
    async with server.session.post(server.sse, json=ASK) as response:
        body = await response.read()
    async with server.connect() as ws:
        await ws.send_json(resume("r1"))
        by_websocket = await to_end(ws)

    assert response.status == 200
    assert response.headers["Content-Type"] == "text/event-stream"
    assert response.headers["Cache-Control"] == "no-cache"
    assert response.headers["X-Accel-Buffering"] == "no"
    assert response.headers["x-request-id"]
    assert "Content-Encoding" not in response.headers
    assert body.startswith(b"retry: 2000\nid: 1\nevent: processing\ndata: {")
    assert frames_of(body) == by_websocket


async def test_respond_async_says_where_the_answer_is(make_server: MakeServer) -> None:
    server = await make_server(PACED)
    ask = {**ASK, "request_id": "a/b c"}
    headers = {"Prefer": "wait=5, Respond-Async"}
    async with server.session.post(server.sse, json=ask, headers=headers) as response:
        body = await response.json()
    assert response.status == 202
    assert response.headers["Preference-Applied"] == "respond-async"
    assert response.headers["Location"] == body["location"] == "/sse/chat/a%2Fb%20c"
    assert body["request_id"] == "a/b c"

    async with Raw(server) as raw:
        await raw.get(body["location"])
        answer = await raw.answer()

    frames = frames_of(answer.body)
    assert numbers(frames) == list(range(1, len(frames) + 1))
    assert frames[-1]["status"] == "complete"
    assert server.simulator.stats().requests == 1


async def test_an_answer_whose_client_has_left_ends_with_its_window(
    make_server: MakeServer,
) -> None:
    server = await make_server(SILENT, **{"chat.streams.resume_window": 0.2})
    async with server.session.post(server.sse, json=ASK):
        await server.simulator.until(lambda stats: stats.active == 1)

    await server.simulator.until(lambda stats: stats.aborted == 1)
    await server.nothing_held()


async def state_of(server: RunningServer, name: str = "r1") -> dict[str, Any]:
    """How far an answer is."""
    headers = {"Accept": "application/json"}
    async with server.session.get(f"{server.sse}/{name}", headers=headers) as response:
        assert response.status == 200
        return dict(await response.json())


async def test_respond_async_runs_to_its_end_without_a_reader(make_server: MakeServer) -> None:
    server = await make_server(
        PACED, **{"chat.streams.resume_window": 0.05, "chat.streams.max_detached": 1}
    )
    async with server.session.post(server.sse, json=ASK, headers=ASYNC) as response:
        assert response.status == 202
    await server.simulator.until(lambda stats: stats.active == 1)
    running = await state_of(server)
    await until(lambda: not server.held()["running"])
    final = await state_of(server)
    frames = await whole(server, "r1")

    assert running == {"request_id": "r1", "status": "running", "last_event_id": ANY}
    assert "text" not in running
    assert final == {
        "request_id": "r1",
        "status": "complete",
        "last_event_id": len(frames),
        "text": text_of(frames),
    }
    assert final["text"]
    assert server.simulator.stats().aborted == 0


async def test_respond_async_waits_behind_half_of_the_places(make_server: MakeServer) -> None:
    server = await make_server(SLOW, **{"llm.providers.sim.http_client.concurrent_requests": 2})
    for name in ("r1", "r2"):
        ask = {**ASK, "request_id": name}
        async with server.session.post(server.sse, json=ask, headers=ASYNC) as response:
            assert response.status == 202
    await server.simulator.until(lambda stats: stats.active == 1)
    server.simulator.behaviour = QUICK
    async with server.session.post(server.sse, json={**ASK, "request_id": "r3"}) as response:
        assert (await read_frames(response))[-1]["status"] == "complete"

    states = [await state_of(server, name) for name in ("r1", "r2")]
    assert [state["status"] for state in states] == ["running", "queued"]
    async with server.session.delete(f"{server.sse}/r1") as response:
        assert response.status == 204
    await until(lambda: not server.held()["running"])
    states = [await state_of(server, name) for name in ("r1", "r2")]
    assert [state["status"] for state in states] == ["cancelled", "complete"]


async def test_there_are_half_as_many_in_the_background_as_without_a_reader(
    make_server: MakeServer,
) -> None:
    server = await make_server(SILENT, **{"chat.streams.max_detached": 2})
    for name, status in (("r1", 202), ("r2", 503)):
        ask = {**ASK, "request_id": name}
        async with server.session.post(server.sse, json=ask, headers=ASYNC) as response:
            assert response.status == status
            assert ("Retry-After" in response.headers) == (status == 503)
    async with server.session.delete(f"{server.sse}/r1") as response:
        assert response.status == 204


async def test_an_answer_that_failed_in_the_background_says_how(make_server: MakeServer) -> None:
    server = await make_server(Behaviour(ttft=0, fail_rate=1.0))
    async with server.session.post(server.sse, json=ASK, headers=ASYNC) as response:
        assert response.status == 202
    await until(lambda: not server.held()["running"])

    state = await state_of(server)

    assert (state["status"], state["text"]) == ("error", "")
    assert state["error"]["code"] == "provider_error"


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("way", ["header", "query"])
async def test_a_reader_that_comes_back_gets_exactly_the_rest(
    server: RunningServer, way: str, method: str
) -> None:
    # Some libraries repeat their POST when they reconnect: @microsoft/fetch-event-source does so
    # at each switch of the browser's tab.
    server.simulator.behaviour = Behaviour(ttft=0, interval=0, tokens=12)
    async with server.session.post(server.sse, json=ASK) as response:
        frames = await read_frames(response)
    url, body = (f"{server.sse}/r1", None) if method == "GET" else (server.sse, ASK)

    for after in range(len(frames)):
        headers = {"Last-Event-ID": str(after)} if way == "header" else {}
        query = f"?last_event_id={after}" if way == "query" else ""
        asking = server.session.request(method, f"{url}{query}", json=body, headers=headers)
        async with asking as response:
            assert await read_frames(response) == frames[after:]
    headers = {"Last-Event-ID": str(len(frames))}
    async with server.session.request(method, url, json=body, headers=headers) as response:
        assert response.status == 204  # nothing is left: an EventSource stops
        assert await response.read() == b""
    assert server.simulator.stats().requests == 1


@pytest.mark.parametrize(
    ("body", "after", "status", "code"),
    [
        (ASK, "1000000", 409, "resume_gap"),
        ({**ASK, "text": "Another"}, "1", 409, "request_conflict"),
        ({**ASK, "request_id": "unknown"}, "1", 404, "stream_not_found"),
        (ASK, "x", 400, "invalid_request"),
    ],
)
async def test_a_repeated_post_that_cannot_go_on_asks_no_provider(
    server: RunningServer, body: dict[str, str], after: str, status: int, code: str
) -> None:
    async with server.session.post(server.sse, json=ASK) as response:
        await response.read()

    headers = {"Last-Event-ID": after}
    async with server.session.post(server.sse, json=body, headers=headers) as response:
        assert response.status == status
        assert (await response.json())["error"]["code"] == code
    assert server.simulator.stats().requests == 1


async def test_no_block_of_an_answer_is_without_an_event(server: RunningServer) -> None:
    # A block with `retry:` alone is an empty event to httpx-sse and to fetch-event-source.
    async with server.session.post(server.sse, json=ASK) as response:
        first = await response.read()
    async with server.session.get(f"{server.sse}/r1?last_event_id=1") as response:
        rest = await response.read()

    for body in (first, rest):
        blocks = body.removesuffix(b"\n\n").split(b"\n\n")
        assert all(b"\ndata: " in block for block in blocks)
    assert first.count(b"retry: ") == 1
    assert b"retry: " not in rest


async def test_a_last_event_id_that_is_no_number_is_an_invalid_request(
    server: RunningServer,
) -> None:
    async with server.session.post(server.sse, json=ASK) as response:
        await response.read()
    for position in ("x", "-1", "1.5", "1e3", "٣", "9" * 19, "0x1"):
        params = {"last_event_id": position}
        async with server.session.get(f"{server.sse}/r1", params=params) as response:
            assert response.status == 400, position
            error = (await response.json())["error"]
            assert (error["code"], error["param"]) == ("invalid_request", "last_event_id")


async def test_an_event_that_does_not_exist_yet_is_a_gap(server: RunningServer) -> None:
    async with server.session.post(server.sse, json=ASK) as response:
        await response.read()
    async with server.session.get(f"{server.sse}/r1?last_event_id=1000000") as response:
        assert response.status == 409
        assert (await response.json())["error"]["code"] == "resume_gap"
        assert response.headers["x-should-retry"] == "false"


async def test_the_listing_shows_the_streams_that_are_kept(make_server: MakeServer) -> None:
    server = await make_server(SILENT)
    async with server.connect() as ws:
        await ws.send_json(chat("r1"))
        await until_status(ws, "processing")
        async with server.session.get(server.sse) as response:
            running = await response.json()
        await ws.send_json(cancel("r1"))
        await to_end(ws)
        async with server.session.get(server.sse) as response:
            ended = await response.json()

    common = {"request_id": "r1", "first_event_id": 1}
    assert running == {
        "streams": [{**common, "status": "running", "last_event_id": 1, "readers": 1}]
    }
    assert ended == {
        "streams": [{**common, "status": "cancelled", "last_event_id": 2, "readers": 0}]
    }


async def test_delete_ends_an_answer_for_every_reader_and_may_be_repeated(
    make_server: MakeServer,
) -> None:
    server = await make_server(SLOW)
    async with server.session.post(server.sse, json=ASK) as response:
        await response.content.readuntil(b"event: chunk")
        for _ in range(2):
            async with server.session.delete(f"{server.sse}/r1") as deleted:
                assert deleted.status == 204
        rest = await response.read()
        await server.simulator.until(lambda stats: stats.aborted == 1)

    assert b"event: cancelled\n" in rest
    assert frames_of(rest.partition(b"\n\n")[2])[-1]["status"] == "cancelled"


@pytest.mark.parametrize("name", ["{6F9619FF-8B86}", "}{", "a/b", "%2F"])
async def test_an_answer_of_any_id_is_resumed_and_deleted(
    server: RunningServer, name: str
) -> None:
    async with server.session.post(server.sse, json={**ASK, "request_id": name}) as response:
        assert frames_of(await response.read())[-1]["status"] == "complete"
    url = URL(f"{server.sse}/{quote(name, safe='')}", encoded=True)

    async with server.session.get(url, headers={"Last-Event-ID": "2"}) as response:
        assert (await read_frames(response))[0]["event_id"] == 3
    async with server.session.delete(url) as response:
        assert response.status == 204


@pytest.mark.virtual_time
async def test_silence_is_filled_with_comments(make_server: MakeServer) -> None:
    server = await make_server(
        Behaviour(ttft=1.1, interval=0), **{"chat.websocket.ping_interval": 0.2}
    )
    async with server.session.post(server.sse, json=ASK) as response:
        body = await response.read()

    assert body.count(b": keep-alive\n\n") == 5
    assert frames_of(body)[-1]["status"] == "complete"


@pytest.mark.virtual_time
async def test_no_comments_come_while_events_do(make_server: MakeServer) -> None:
    server = await make_server(
        Behaviour(ttft=0, interval=0.02, tokens=40), **{"chat.websocket.ping_interval": 0.5}
    )
    async with server.session.post(server.sse, json=ASK) as response:
        assert b": keep-alive" not in await response.read()


async def test_a_client_sees_that_it_waits_for_the_provider(make_server: MakeServer) -> None:
    server = await make_server(SLOW, **{"llm.providers.sim.http_client.concurrent_requests": 1})
    async with server.connect() as ws:
        await ws.send_json(chat("r0"))
        await until_status(ws, "chunk")
        async with server.session.post(server.sse, json=ASK) as response:
            first = await response.content.readuntil(b"}}\n\n")
            server.simulator.behaviour = QUICK
            await ws.send_json(cancel("r0"))
            frames = frames_of(first + await response.read())

    assert first.startswith(b'event: queued\ndata: {"request_id":"r1"')
    assert frames[0]["chunk"]["position"] == 1
    assert "event_id" not in frames[0]
    events = [frame for frame in frames if frame["status"] != "queued"]
    assert numbers(events) == list(range(1, len(events) + 1))
    assert events[-1]["status"] == "complete"


@pytest.mark.parametrize("line", ["Connection: close", "Connection: keep-alive", "X: y"])
async def test_an_http_10_client_gets_a_plain_body_that_ends(
    server: RunningServer, line: str
) -> None:
    async with Raw(server) as raw:
        await raw.post("/sse/chat", ASK, line, version="1.0")
        head = await raw.head()
        body = await raw.to_the_end()

    assert head.status == 200
    assert "transfer-encoding" not in head.headers
    assert head.headers["connection"] == "close"
    assert body.startswith(b"retry: 2000\n")
    assert frames_of(body)[-1]["status"] == "complete"


async def test_a_connection_is_used_again_after_an_answer(server: RunningServer) -> None:
    async with Raw(server) as raw:
        for number in range(3):
            await raw.ask_sse(f"r{number}", text="Hello")
            answer = await raw.answer()
            assert frames_of(answer.body)[-1]["status"] == "complete"
        await raw.get("/health")
        assert (await raw.answer()).status == 200


async def test_pipelined_answers_come_in_order_and_whole(server: RunningServer) -> None:
    async with Raw(server) as raw:
        for number in range(5):
            await raw.ask_sse(f"r{number}", text="Hello")
        for number in range(5):
            frames = frames_of((await raw.answer()).body)
            assert {frame["request_id"] for frame in frames} == {f"r{number}"}
            assert frames[-1]["status"] == "complete"


async def test_head_has_no_body(server: RunningServer) -> None:
    for path in ["/sse/chat/r1", "/sse/chat", "/ws/chat", "/", "/health"]:
        async with server.session.post(server.sse, json=ASK) as response:
            await response.read()
        async with Raw(server) as raw:
            await raw.send(f"HEAD {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            head = await raw.head()
            await raw.get("/health")
            second = await raw.answer()

        assert head.status in {200, 204, 400, 405}, path
        assert (second.version, second.status) == ("HTTP/1.1", 200), path


FAULTY: list[Any] = [
    [],
    {"text": "x"},
    {"request_id": "r1", "text": "x", "options": {"stream": True}},
    {"request_id": "r" * 257, "text": "x"},
]


async def test_a_faulty_question_is_400_and_asks_nobody(server: RunningServer) -> None:
    for body in FAULTY:
        async with server.session.post(server.sse, json=body) as response:
            assert response.status == 400, body
            assert (await response.json())["error"]["code"] == "invalid_request"
    assert server.simulator.stats().requests == 0


async def test_another_payload_under_a_known_request_id_is_a_conflict(
    server: RunningServer,
) -> None:
    async with server.session.post(server.sse, json=ASK) as response:
        await response.read()
    async with server.session.post(server.sse, json={**ASK, "text": "other"}) as response:
        assert response.status == 409
        assert (await response.json())["error"]["code"] == "request_conflict"


async def test_turns_over_sse_share_a_conversation_by_its_id(server: RunningServer) -> None:
    for number, text in enumerate(("one", "two")):
        ask = {"request_id": f"r{number}", "text": text, "conversation_id": "c1"}
        async with server.session.post(server.sse, json=ask) as response:
            assert text_of(await read_frames(response))

    sent = [message["content"] for message in server.simulator.bodies[-1]["messages"]]
    assert (sent[0], sent[-1], len(sent)) == ("one", "two", 3)


async def test_without_keys_the_list_is_that_of_ones_own_address(make_server: MakeServer) -> None:
    server = await make_server(auth={"open": True, "trusted_proxies": ["127.0.0.1"]})
    mine, others = {"X-Forwarded-For": "192.0.2.1"}, {"X-Forwarded-For": "192.0.2.2"}
    body = {"request_id": "r1", "text": "Hello"}
    async with server.session.post(server.sse, json=body, headers=mine) as response:
        await response.read()

    ids = {}
    for name, headers in (("mine", mine), ("others", others)):
        async with server.session.get(server.sse, headers=headers) as response:
            ids[name] = [stream["request_id"] for stream in (await response.json())["streams"]]

    assert ids == {"mine": ["r1"], "others": []}
