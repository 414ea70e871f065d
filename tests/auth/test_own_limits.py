"""A key's own limits and its own answers, on each face; whatever the way an answer ends, it is
counted once.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import openai
import pytest

from tests.support.chat import (
    CHAT,
    cancel,
    chat,
    read_frames,
    resume,
    text_of,
    to_end,
    until_status,
)
from tests.support.keys import bearer, code_of, key_of, keys_of
from tests.support.server import ENDLESS, SILENT, MakeServer
from tests.support.simulator import Behaviour
from tests.support.waiting import patience, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from aiohttp import ClientResponse, ClientWebSocketResponse

    from aioserver.limits.quota import Quota
    from tests.support.server import RunningServer


OPENAI = ("stream", "whole", "idempotent", "stored")
MESSAGES = ("messages stream", "messages")
FACES = ("websocket", "sse", *OPENAI, *MESSAGES)


def quota(server: RunningServer, name: str = "web") -> Quota:
    key_quota: Quota | None = server.context.access.keys.caller(key_of(name).encode()).quota
    assert key_quota is not None
    return key_quota


class Client:
    """Asks on one face, with the key of *name*; `refusal` is the code with which it was refused,
    if it was.
    """

    def __init__(self, server: RunningServer, face: str, name: str = "web") -> None:
        self.server = server
        self.face = face
        self.headers = bearer(name)
        self.ws: ClientWebSocketResponse | None = None
        self.responses: list[ClientResponse] = []

    async def ask(self) -> tuple[str, float | None]:
        """The code of the refusal, and its retry_after; "": the answer is under way, or over."""
        name = f"{self.face}-{uuid.uuid4().hex}"
        if self.face == "websocket":
            if self.ws is None:
                self.ws = await self.server.connect(headers=self.headers)
            await self.ws.send_json(chat(name))
            frame = await self.ws.receive_json(timeout=patience(20))
            while frame["request_id"] != name or frame["status"] == "queued":
                frame = await self.ws.receive_json(timeout=patience(20))
            if frame["status"] != "error":
                return "", None
            return frame["chunk"]["code"], frame["chunk"]["retry_after"]
        response = await self.server.session.post(
            self.server.sse if self.face == "sse" else f"{self.server.v1}/{self._path}",
            json=self._body(name),
            headers=self.headers
            | ({"Idempotency-Key": name} if self.face == "idempotent" else {}),
        )
        self.responses.append(response)
        if response.status == 200:
            return "", None
        assert response.status == 429
        assert (await response.json())["error"]["type"] == "rate_limit_error"
        milliseconds = int(response.headers["retry-after-ms"])
        whole = int(response.headers["Retry-After"])
        assert whole >= milliseconds / 1000
        return await code_of(response), milliseconds / 1000

    @property
    def _path(self) -> str:
        if self.face in MESSAGES:
            return "messages"
        return "responses" if self.face == "stored" else "chat/completions"

    def _body(self, name: str) -> dict[str, Any]:
        if self.face == "sse":
            return {"request_id": name, **CHAT}
        if self.face == "stored":
            return {"input": "Hello", "store": True, "stream": False}
        limit = {"max_tokens": 4096} if self.face in MESSAGES else {}
        return {**CHAT, **limit, "stream": self.face.endswith("stream")}

    async def leave(self) -> None:
        if self.ws is not None:
            await self.ws.close()
        for response in self.responses:
            response.close()


@asynccontextmanager
async def client(server: RunningServer, face: str, name: str = "web") -> AsyncIterator[Client]:
    face_client = Client(server, face, name)
    try:
        yield face_client
    finally:
        await face_client.leave()


@pytest.mark.parametrize("face", FACES)
async def test_a_key_has_a_minutes_worth(make_server: MakeServer, face: str) -> None:
    server = await make_server(**keys_of("web", "app", requests_per_minute=3))
    async with client(server, face) as web:
        for _ in range(3):
            assert await web.ask() == ("", None)
        code, retry_after = await web.ask()

        assert code == "rate_limit_exceeded"
        assert retry_after is not None
        assert 0 < retry_after <= 20
        for other in FACES:
            async with client(server, other) as again:
                assert (await again.ask())[0] == "rate_limit_exceeded", (
                    "a limit holds on every face"
                )
        async with client(server, face, "app") as app:
            assert await app.ask() == ("", None)
    await until(lambda: quota(server).running == 0)
    assert server.context.metrics.rejections["rate_limit_exceeded"].value == 1 + len(FACES)


@pytest.mark.parametrize("face", FACES)
async def test_a_key_has_so_many_answers_at_once(make_server: MakeServer, face: str) -> None:
    changes = {"llm.providers.sim.http_client.concurrent_requests": 1}  # one runs, one is queued
    server = await make_server(
        SILENT,
        **keys_of("web", "app", max_concurrent=2),
        **changes,
        **{"chat.streams.resume_window": 0},
    )
    async with (
        client(server, face) as first,
        client(server, face) as two,
        asyncio.TaskGroup() as group,
    ):
        tasks = [group.create_task(each.ask()) for each in (first, two)]
        await until(lambda: quota(server).running == 2)
        for other in FACES:
            async with client(server, other) as third:
                assert await third.ask() == ("concurrency_exceeded", 1.0)
        async with client(server, face, "app") as app:
            task = group.create_task(app.ask())
            await until(lambda: quota(server, "app").running == 1)
            task.cancel()
        await until(lambda: server.provider.stats().queue.waiting == 1)
        assert quota(server).running == 2
        for task in tasks:
            task.cancel()  # its client leaves
    await until(lambda: quota(server).running == 0, state=server.held)


async def ended_by_cancel(server: RunningServer) -> None:
    async with server.connect(headers=bearer("web")) as ws:
        await ws.send_json(chat("c"))
        await until_status(ws, "chunk")
        await ws.send_json(cancel("c"))
        await to_end(ws)


async def ended_by_delete(server: RunningServer) -> None:
    headers = bearer("web")
    async with server.session.post(
        server.sse, json={"request_id": "d", **CHAT}, headers=headers
    ) as response:
        await response.content.readuntil(b"event: chunk\n")
        async with server.session.delete(f"{server.sse}/d", headers=headers) as deleted:
            assert deleted.status == 204
        assert b"event: cancelled" in await response.read()


async def ended_by_leaving(server: RunningServer) -> None:
    async with server.connect(headers=bearer("web")) as ws:
        await ws.send_json(chat("l"))
        await until_status(ws, "chunk")


async def ended_by_leaving_openai(server: RunningServer) -> None:
    for streamed in (True, False):
        body = {**CHAT, "stream": streamed}
        before = server.simulator.stats().requests
        task = asyncio.ensure_future(
            server.session.post(f"{server.v1}/chat/completions", json=body, headers=bearer("web"))
        )
        await until(lambda: server.simulator.stats().requests > before)  # noqa: B023 - awaited here
        await until(lambda: quota(server).running == 1)
        if streamed:
            (await task).close()
        else:
            task.cancel()
        await until(lambda: quota(server).running == 0)


async def ended_by_the_server(server: RunningServer) -> None:
    async with server.connect(headers=bearer("web")) as ws:
        await ws.send_json(chat("s"))
        await until_status(ws, "chunk")
        await server.context.gateway.close()
        assert (await to_end(ws))[-1]["chunk"]["code"] == "server_shutdown"


@pytest.mark.parametrize(
    "end",
    [
        *(ended_by_cancel, ended_by_delete, ended_by_leaving, ended_by_leaving_openai),
        ended_by_the_server,
    ],
)
async def test_however_an_answer_ends_its_place_is_back(
    make_server: MakeServer, end: Callable[[RunningServer], Awaitable[None]]
) -> None:
    server = await make_server(
        ENDLESS, **keys_of("web", max_concurrent=1), **{"chat.streams.resume_window": 0}
    )

    await end(server)

    await until(lambda: quota(server).running == 0)


async def test_a_chat_that_is_refused_leaves_no_question_behind(make_server: MakeServer) -> None:
    changes = keys_of("web", max_concurrent=1) | {"chat.streams.resume_window": 0}
    server = await make_server(ENDLESS, **changes)
    async with server.connect(headers=bearer("web")) as ws:
        await ws.send_json(chat("a"))
        await until_status(ws, "chunk")
        for number in range(5):
            await ws.send_json(chat(f"r{number}"))
            frames = await until_status(ws, "error")
            assert frames[-1]["chunk"]["code"] == "concurrency_exceeded"
        assert server.held()["questions"] == 1
    await server.nothing_held()


@pytest.mark.parametrize("path", ["/conversations/never", "/conversations", "/v1/responses/never"])
async def test_deletions_count_in_the_rate_of_their_key(
    make_server: MakeServer, path: str
) -> None:
    changes = keys_of("web", "other", max_concurrent=1) | {"chat.streams.resume_window": 0}
    changes["auth.keys"][0]["requests_per_minute"] = 3
    server = await make_server(ENDLESS, **changes)
    async with server.connect(headers=bearer("web")) as ws:
        # A deletion takes no place: it works while the key has all its answers.
        await ws.send_json(chat("a"))
        await until_status(ws, "chunk")
        for name, expected in (("web", 2), ("other", 4)):
            statuses = []
            for _ in range(4):
                async with server.session.delete(
                    f"{server.base}{path}", headers=bearer(name)
                ) as response:
                    statuses.append(response.status)
                    if response.status == 429:
                        assert await code_of(response) == "rate_limit_exceeded"
                        assert int(response.headers["Retry-After"]) > 0
            assert statuses[:expected] == [200 if path == "/conversations" else 404] * expected
            assert statuses[expected:] == [429] * (4 - expected)


async def test_a_provider_that_fails_gives_the_place_back(make_server: MakeServer) -> None:
    server = await make_server(
        Behaviour(fail_rate=1.0, fail_status=400), **keys_of("web", max_concurrent=1)
    )
    for face in FACES:
        body = (
            {**CHAT, "request_id": face} if face == "sse" else {**CHAT, "stream": face == "stream"}
        )
        if face == "websocket":
            async with server.connect(headers=bearer("web")) as ws:
                await ws.send_json(chat("f"))
                assert (await to_end(ws))[-1]["status"] == "error"
        else:
            url = server.sse if face == "sse" else f"{server.v1}/chat/completions"
            async with server.session.post(url, json=body, headers=bearer("web")) as response:
                await response.read()
        await until(lambda: quota(server).running == 0)


async def test_a_provider_that_is_never_asked_is_not_counted(make_server: MakeServer) -> None:
    server = await make_server(**keys_of("web", requests_per_minute=2, max_concurrent=2))
    async with server.connect(headers=bearer("web")) as ws:
        for number in range(5):
            await ws.send_json(chat(f"n{number}", provider="nobody"))
            assert (await to_end(ws))[-1]["chunk"]["code"] == "model_not_found"
        for body in ({"messages": 7}, {**CHAT, "model": "nobody/x", "stream": "yes"}):
            async with server.session.post(
                f"{server.v1}/chat/completions", json=body, headers=bearer("web")
            ) as response:
                assert response.status in {200, 400, 404}
        await ws.send_json(chat("good"))
        assert (await to_end(ws))[-1]["status"] == "complete"


async def test_a_full_store_counts_for_nothing(make_server: MakeServer) -> None:
    server = await make_server(
        Behaviour(ttft=0, interval=0, stall_after=5),
        **keys_of("web", "app", requests_per_minute=1),
        **{"chat.streams.max_kept_bytes": 300},
    )
    async with (
        server.connect(headers=bearer("app")) as other,
        server.connect(headers=bearer("web")) as ws,
    ):
        await other.send_json(chat("fills"))
        await until(lambda: server.owners.streams.stats().bytes >= 300)
        for number in range(3):
            await ws.send_json(chat(f"n{number}"))
            assert (await to_end(ws))[-1]["chunk"]["code"] == "server_at_capacity"
        assert quota(server).running == 0
        await other.send_json(cancel("fills"))
        await until_status(other, "cancelled")
        await ws.send_json(chat("now"))
        await until_status(ws, "processing")
        await ws.send_json(cancel("now"))
        await until_status(ws, "cancelled")


async def test_resuming_an_answer_begins_none(make_server: MakeServer) -> None:
    server = await make_server(**keys_of("web", requests_per_minute=2, max_concurrent=1))
    headers = bearer("web")
    async with server.connect(headers=headers) as ws:
        for _ in range(3):
            await ws.send_json(chat("r"))
            assert (await to_end(ws))[-1]["status"] == "complete"
        await ws.send_json(resume("r", 1))
        assert (await to_end(ws))[-1]["status"] == "complete"
    for after in (0, 2):
        async with server.session.get(
            f"{server.sse}/r", headers={**headers, "Last-Event-ID": str(after)}
        ) as response:
            assert (await read_frames(response))[-1]["status"] == "complete"
    for _ in range(3):
        for streamed in (False, False):
            async with server.session.post(
                f"{server.v1}/chat/completions",
                json={**CHAT, "stream": streamed},
                headers={**headers, "Idempotency-Key": "same"},
            ) as response:
                assert response.status == 200
                await response.read()
    async with client(server, "whole") as web:
        assert (await web.ask())[0] == "rate_limit_exceeded"


async def test_the_official_sdk_understands_the_guard(make_server: MakeServer) -> None:
    server = await make_server(**keys_of("web", requests_per_minute=2))
    messages: Any = CHAT["messages"]
    async with openai.AsyncOpenAI(base_url=server.v1, api_key="aio-nobody", max_retries=0) as sdk:
        with pytest.raises(openai.AuthenticationError) as refused:
            await sdk.chat.completions.create(model="sim", messages=messages)
        assert refused.value.code == "invalid_api_key"
    async with openai.AsyncOpenAI(base_url=server.v1, api_key=key_of("web"), max_retries=0) as sdk:
        answer = await sdk.chat.completions.create(model="sim", messages=messages)
        assert answer.choices[0].message.content
        stream = await sdk.chat.completions.create(model="sim", messages=messages, stream=True)
        assert "".join(
            [part.choices[0].delta.content or "" async for part in stream if part.choices]
        )
        with pytest.raises(openai.RateLimitError) as limited:
            await sdk.chat.completions.create(model="sim", messages=messages)
        assert limited.value.code == "rate_limit_exceeded"


# What belongs to a key.


async def test_streams_belong_to_their_key(make_server: MakeServer) -> None:
    server = await make_server(ENDLESS, **keys_of("web", "app"))
    mine, yours = bearer("web"), bearer("app")
    async with server.connect(headers=mine) as ws, server.connect(headers=yours) as other:
        await ws.send_json(chat("same", "mine"))
        await until_status(ws, "chunk")
        for command in (resume("same"), cancel("same")):
            await other.send_json(command)
            frame = await other.receive_json(timeout=patience(20))
            assert frame["chunk"]["code"] == "stream_not_found"
        for method in ("GET", "DELETE"):
            async with server.session.request(method, f"{server.sse}/same", headers=yours) as got:
                assert (got.status, await code_of(got)) == (404, "stream_not_found")
        async with server.session.get(server.sse, headers=yours) as response:
            assert await response.json() == {"streams": []}
        async with server.session.get(server.sse, headers=mine) as response:
            assert [stream["request_id"] for stream in (await response.json())["streams"]] == [
                "same"
            ]
        await other.send_json(chat("same", "yours"))  # no conflict: another stream
        await until_status(other, "chunk")
        assert server.owners.streams.stats().running == 2
        for socket in (ws, other):
            await socket.send_json(cancel("same"))
            await to_end(socket)


async def test_idempotency_keys_belong_to_their_key(make_server: MakeServer) -> None:
    server = await make_server(**keys_of("web", "app"))
    for name, text in (("web", "one"), ("app", "two"), ("web", "one")):
        body = {"messages": [{"role": "user", "content": text}]}
        headers = {**bearer(name), "Idempotency-Key": "k"}
        async with server.session.post(
            f"{server.v1}/chat/completions", json=body, headers=headers
        ) as response:
            assert response.status == 200
    assert len(server.simulator.requests) == 2
    body = {"messages": [{"role": "user", "content": "two"}]}
    headers = {**bearer("web"), "Idempotency-Key": "k"}
    async with server.session.post(
        f"{server.v1}/chat/completions", json=body, headers=headers
    ) as response:
        assert response.status == 409


async def test_responses_belong_to_their_key(make_server: MakeServer) -> None:
    server = await make_server(**keys_of("web", "app"))
    body = {"input": "Hello", "store": True}
    async with server.session.post(
        f"{server.v1}/responses", json=body, headers=bearer("web")
    ) as response:
        name = (await response.json())["id"]
    for caller, status in (("app", 404), ("web", 200)):
        for method, path in (("GET", ""), ("POST", "/cancel")):
            async with server.session.request(
                method, f"{server.v1}/responses/{name}{path}", headers=bearer(caller)
            ) as response:
                assert response.status == status


async def test_conversations_belong_to_their_key(make_server: MakeServer) -> None:
    server = await make_server(**keys_of("web", "app"))
    for name in ("web", "app"):
        async with server.connect(headers=bearer(name)) as ws:
            await ws.send_json(chat("r", f"I am {name}", conversation_id="c"))
            assert text_of(await to_end(ws))
    sent = [json.loads(request.body)["messages"] for request in server.simulator.requests]
    assert [[message["content"] for message in messages] for messages in sent] == [
        ["I am web"],
        ["I am app"],
    ]


async def test_a_key_waits_by_its_weight(make_server: MakeServer) -> None:
    server = await make_server(SILENT, **keys_of("web", "app", priority=7))
    headers = bearer("web")
    async with server.connect(headers=headers) as ws:
        await ws.ping()
        (socket,) = server.context.sockets
        assert (socket.caller.name, socket.caller.priority, socket.caller.subflow) == (
            "web",
            7,
            "",
        )
