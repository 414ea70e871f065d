"""An answer begun on one face is read on at any other: exactly the rest, asked of nobody again."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.auth.callers import Caller
from aioserver.protocol import eventstream
from aioserver.streams import entries
from tests.support.chat import (
    CHAT,
    STREAMED,
    big,
    cancel,
    chat,
    frames_of,
    numbers,
    read_frames,
    resume,
    text_of,
    to_end,
    whole,
)
from tests.support.raw import Raw
from tests.support.server import QUICK, SILENT, SIM_HTTP_CLIENT, MakeServer
from tests.support.simulator import Behaviour
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from tests.support.server import RunningServer

    Read = Callable[[RunningServer, str, int], Awaitable[list[Any]]]

PACED = Behaviour(ttft=0, interval=0.002, tokens=20)
KEY = "Idempotency-Key: r1"


# Reading on.


async def by_websocket(server: RunningServer, name: str, after: int) -> list[Any]:
    async with server.connect() as ws:
        await ws.send_json(resume(name, after))
        return await to_end(ws)


async def by_header(server: RunningServer, name: str, after: int) -> list[Any]:
    return await whole(server, name, after)


async def by_query(server: RunningServer, name: str, after: int) -> list[Any]:
    async with server.session.get(f"{server.sse}/{name}?last_event_id={after}") as response:
        assert response.status == 200, await response.text()
        return await read_frames(response)


READ_ON = [by_websocket, by_header, by_query]


# Beginning, and leaving once *count* events were read.


async def begin_websocket(raw: Raw, count: int) -> list[Any]:
    await raw.upgrade()
    await raw.send_json(chat("r1", **CHAT))
    return [await raw.json_frame() for _ in range(count)]


async def begin_sse(raw: Raw, count: int) -> list[Any]:
    await raw.ask_sse("r1", **CHAT)
    assert (await raw.head()).status == 200
    return frames_of(await some(raw, count)) if count else []


async def some(raw: Raw, count: int) -> bytes:
    """The first *count* events of a body."""
    body = b""
    async for chunk in raw.chunks():
        body += chunk
        if len(events := eventstream.split(body)) >= count:  # `retry` is none
            return b"".join(events[:count])
    raise AssertionError(body)


async def text_of_answer(server: RunningServer) -> str:
    """The same question's answer, in one piece."""
    async with server.session.post(server.v1 + "/chat/completions", json={**CHAT}) as response:
        return str((await response.json())["choices"][0]["message"]["content"])


# With a count of -1 the client has read all but the end.
@pytest.mark.parametrize(
    ("begin", "count", "read_on"),
    [
        (begin_websocket, 0, by_header),
        (begin_websocket, 1, by_websocket),
        (begin_websocket, -1, by_query),
        (begin_sse, 0, by_websocket),
        (begin_sse, 7, by_header),
        (begin_sse, 7, by_query),
        (begin_sse, -1, by_websocket),
    ],
)
async def test_the_rest_is_read_on_any_face(
    make_server: MakeServer,
    begin: Callable[[Raw, int], Awaitable[list[Any]]],
    count: int,
    read_on: Read,
) -> None:
    server = await make_server(PACED)
    text = await text_of_answer(server)
    async with server.session.post(server.sse, json={"request_id": "r0", **CHAT}) as response:
        last = len(await read_frames(response))
    count %= last
    async with Raw(server) as raw:
        seen = await begin(raw, count)
        await server.simulator.until(lambda stats: stats.requests == 3)  # now it is worth money
        raw.close()

    rest = await read_on(server, "r1", count)

    assert numbers(seen) == list(range(1, count + 1))
    assert numbers(rest) == list(range(count + 1, last + 1))
    assert rest[-1]["status"] == "complete"
    assert text_of(seen + rest) == text
    assert await whole(server, "r1") == seen + rest
    assert (server.simulator.stats().requests, server.simulator.stats().aborted) == (3, 0)


@pytest.mark.parametrize(("count", "read_on"), [(1, by_query), (7, by_websocket)])
async def test_an_openai_answer_with_a_key_is_read_on_by_frames(
    make_server: MakeServer, count: int, read_on: Read
) -> None:
    server = await make_server(PACED)
    text = await text_of_answer(server)
    async with Raw(server) as raw:
        await raw.post("/v1/chat/completions", STREAMED, KEY)
        assert (await raw.head()).status == 200
        seen = eventstream.parse(await some(raw, count))
        raw.close()

    rest = await read_on(server, "r1", count + 1)  # number 1 is `processing`, not shown there

    first = rest[0]["event_id"]
    assert numbers(rest) == list(range(first, first + len(rest)))
    assert first == count + 2
    assert rest[-1]["status"] == "complete"
    begun = "".join(
        json.loads(event.data)["choices"][0]["delta"].get("content", "") for event in seen
    )
    assert begun + text_of(rest) == text
    assert server.simulator.stats().requests == 2


async def test_readers_on_all_faces_at_once_get_all_of_it(make_server: MakeServer) -> None:
    server = await make_server(PACED)
    text = await text_of_answer(server)
    async with server.connect() as ws:
        await ws.send_json(chat("r1", **CHAT))
        seen = [await ws.receive_json() for _ in range(3)]
        readings = await asyncio.gather(*(read_on(server, "r1", 0) for read_on in READ_ON * 2))
        seen += await to_end(ws)

    assert all(frames == seen for frames in readings)
    assert numbers(seen) == list(range(1, len(seen) + 1))
    assert text_of(seen) == text
    assert server.simulator.stats().requests == 2


async def test_readers_of_an_openai_answer_at_once_get_all_of_it(make_server: MakeServer) -> None:
    server = await make_server(PACED)
    text = await text_of_answer(server)
    headers = dict([KEY.split(": ")])

    async def ask() -> bytes:
        async with server.session.post(
            server.v1 + "/chat/completions", json=STREAMED, headers=headers
        ) as response:
            return bytes(await response.read())

    first = asyncio.ensure_future(ask())
    await server.simulator.until(lambda stats: stats.requests == 2)
    second, *readings = await asyncio.gather(
        ask(), *(read_on(server, "r1", 0) for read_on in READ_ON)
    )

    assert await first == second
    assert second.endswith(b"data: [DONE]\n\n")
    assert all(frames == readings[0] for frames in readings)
    assert text_of(readings[0]) == text
    assert numbers(readings[0]) == list(range(1, len(readings[0]) + 1))
    assert server.simulator.stats().requests == 2


# What cannot be read on.


async def refusals(server: RunningServer, name: str, after: int) -> list[tuple[int, str]]:
    """The refusal of each face: status (0 on a WebSocket) and code."""
    async with server.connect() as ws:
        await ws.send_json(resume(name, after))
        frame = await ws.receive_json()
    outcomes = [(0, frame["chunk"]["code"])]
    for headers, query in (
        ({"Last-Event-ID": str(after)}, ""),
        ({}, f"?last_event_id={after}"),
    ):
        async with server.session.get(f"{server.sse}/{name}{query}", headers=headers) as response:
            outcomes.append((response.status, (await response.json())["error"]["code"]))
    return outcomes


@pytest.mark.parametrize("face", ["frames", "openai"])
async def test_events_that_are_no_longer_kept_are_a_gap_on_each_face(
    make_server: MakeServer, face: str
) -> None:
    server = await make_server(
        Behaviour(ttft=0, interval=0.001), **{"chat.streams.max_stream_bytes": 20_000}
    )
    fields = big(1000, 60)
    headers = dict([KEY.split(": ")])
    body = {**CHAT, "stream": True, **fields["options"]}
    if face == "frames":
        async with server.session.post(
            server.sse, json={"request_id": "r1", **fields}
        ) as response:
            await response.read()
    else:
        url = server.v1 + "/chat/completions"
        async with server.session.post(url, json=body, headers=headers) as response:
            assert (await response.read()).endswith(b"data: [DONE]\n\n")
        async with server.session.post(url, json=body, headers=headers) as response:
            assert response.status == 409
            assert (await response.json())["error"]["code"] == "resume_gap"

    for after in (0, 1, 5, 1_000_000):
        assert await refusals(server, "r1", after) == [
            (0, "resume_gap"),
            (409, "resume_gap"),
            (409, "resume_gap"),
        ]
    assert server.simulator.stats().requests == 1


async def test_another_callers_stream_is_as_if_it_were_not_there(server: RunningServer) -> None:
    stream = server.owners.streams.open("r1", Caller("somebody else"), window=30.0)
    stream.end(entries.COMPLETE, {})
    for name in ("r1", "never-seen"):
        assert await refusals(server, name, 0) == [
            (0, "stream_not_found"),
            (404, "stream_not_found"),
            (404, "stream_not_found"),
        ]
        async with server.session.delete(f"{server.sse}/{name}") as response:
            assert response.status == 404
        async with server.connect() as ws:
            await ws.send_json(cancel(name))
            assert (await ws.receive_json())["chunk"]["code"] == "stream_not_found"
    async with server.session.get(server.sse) as response:
        assert await response.json() == {"streams": []}
    async with server.session.post(server.sse, json={"request_id": "r1", "text": "x"}) as response:
        assert (await read_frames(response))[-1]["status"] == "complete"  # a name of one's own
    assert stream.last == 1


@pytest.mark.parametrize("read_on", READ_ON)
async def test_an_answer_asked_for_later_is_listed_read_on_and_then_at_its_end(
    make_server: MakeServer, read_on: Read
) -> None:
    server = await make_server(SILENT)
    ask = {"request_id": "r1", **CHAT}

    async def listed() -> Any:
        async with server.session.get(server.sse) as response:
            return (await response.json())["streams"]

    for expected in ("running", "complete"):
        if expected == "complete":
            async with server.session.delete(f"{server.sse}/r1") as response:
                assert response.status == 204
            server.simulator.behaviour = PACED
            ask["request_id"] = "r2"
        headers = {"Prefer": "respond-async"}
        async with server.session.post(server.sse, json=ask, headers=headers) as response:
            assert response.status == 202
        if expected == "running":
            await server.simulator.until(lambda stats: stats.active == 1)
            (listed_stream,) = await listed()
            assert (
                listed_stream["status"],
                listed_stream["readers"],
                listed_stream["last_event_id"],
            ) == ("running", 0, 1)
    frames = await read_on(server, "r2", 0)
    assert numbers(frames) == list(range(1, len(frames) + 1))
    assert [(frame["request_id"], frame["status"]) for frame in await listed()] == [
        ("r1", "cancelled"),
        ("r2", "complete"),
    ]
    end = str(len(frames))
    for position in ({"headers": {"Last-Event-ID": end}}, {"params": {"last_event_id": end}}):
        async with server.session.get(f"{server.sse}/r2", **position) as response:  # type: ignore[arg-type]
            assert response.status == 204


# Leaving before anything was sent, and coming back.


async def asked_by_websocket(server: RunningServer, path: str, body: dict[str, Any]) -> str:
    async with server.session.ws_connect(server.base + path) as ws:
        await ws.send_json({"action": "chat", "request_id": "r1", "payload": body})
        return str((await to_end(ws))[-1])


async def asked_by_post(server: RunningServer, path: str, body: dict[str, Any]) -> str:
    headers = {"Idempotency-Key": "r1"}
    async with server.session.post(server.base + path, json=body, headers=headers) as response:
        return f"{response.status} {await response.text()}"


RESPONSE = {"model": "sim", "input": "Hello"}
MESSAGE = {"model": "sim", "max_tokens": 100, **CHAT}


@pytest.mark.parametrize(
    ("ask", "path", "body", "end"),
    [
        (asked_by_websocket, "/ws/chat", {"text": "Hello"}, "'complete'"),
        (asked_by_post, "/sse/chat", {"request_id": "r1", "text": "Hello"}, '"complete"'),
        (asked_by_post, "/v1/chat/completions", STREAMED, "[DONE]"),
        (asked_by_post, "/v1/chat/completions", CHAT, '"stop"'),
        (asked_by_post, "/v1/responses", {**RESPONSE, "stream": True}, "response.completed"),
        (asked_by_post, "/v1/responses", RESPONSE, '"completed"'),
        (asked_by_post, "/v1/messages", {**MESSAGE, "stream": True}, "message_stop"),
        (asked_by_post, "/v1/messages", MESSAGE, '"stop_reason"'),
    ],
)
async def test_a_question_that_waited_is_answered_when_its_client_comes_back(
    make_server: MakeServer,
    ask: Callable[[RunningServer, str, dict[str, Any]], Coroutine[Any, Any, str]],
    path: str,
    body: dict[str, Any],
    end: str,
) -> None:
    server = await make_server(SILENT, **{f"{SIM_HTTP_CLIENT}.concurrent_requests": 1})
    async with server.connect() as ws:
        await ws.send_json(chat("other"))
        await server.simulator.until(lambda stats: stats.active == 1)
        leaving = asyncio.create_task(ask(server, path, body))
        await until(lambda: server.owners.waiting == 1)
        leaving.cancel()
        await until(lambda: server.owners.waiting == 0)

        server.simulator.behaviour = QUICK
        again = asyncio.create_task(ask(server, path, body))
        await until(lambda: server.owners.waiting == 1 or again.done())
        await ws.send_json(cancel("other"))

        assert end in await again
        assert server.simulator.stats().requests == 2
