"""What is not known in time is not taken for absent, whatever is looked up at another instance."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import orjson
import pytest

from aioserver.errors import StreamNotFound
from aioserver.gateway.contracts import commands
from tests.support.chat import cancel, chat, resume, to_end, until_status
from tests.support.pairs import FORGETFUL, Pair, pair_in
from tests.support.responses import connect, create, next_event
from tests.support.responses import to_end as to_response_end
from tests.support.simulator import Behaviour
from tests.support.waiting import LATE, until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from tests.support.server import RunningServer

    # Looks something up, and returns what came of it: a status, or a code.
    Look = Callable[[RunningServer, str], Awaitable[object]]

# Another process takes part, whose time does not jump.
pytestmark = pytest.mark.real_time
# Seconds for each way to Redis and back, of the instance that looks: beyond what a request waits
# that can do without an answer.
SLOW = 0.06
ENDLESS = Behaviour(ttft=0, interval=0.01, tokens=100_000, forgets=FORGETFUL.forgets)
UNKNOWN = "instance_unavailable"


async def _status(server: RunningServer, method: str, url: str, **options: Any) -> object:
    async with server.session.request(method, url, **options) as response:
        if response.status == 503:
            assert "Retry-After" in response.headers
            body = await response.read()
            return orjson.loads(body)["error"]["code"] if body else UNKNOWN
        return response.status


def http(method: str, path: str, **options: Any) -> Look:
    """A request to *path*, in which `{}` stands for the name of what is looked up."""

    async def look(server: RunningServer, name: str) -> object:
        return await _status(server, method, server.base + path.format(name), **options)

    return look


async def continued(server: RunningServer, name: str) -> object:
    asked = {"model": "sim", "input": "two", "previous_response_id": name}
    return await _status(server, "POST", f"{server.v1}/responses", json=asked)


async def continued_on_a_socket(server: RunningServer, name: str) -> object:
    return await _on_a_response_socket(server, create("two", previous_response_id=name))


async def resumed_response(server: RunningServer, name: str) -> object:
    frame = {"type": "response.resume", "response_id": name, "starting_after": 0}
    return await _on_a_response_socket(server, frame)


async def _on_a_response_socket(server: RunningServer, frame: dict[str, Any]) -> object:
    async with connect(server) as ws:
        await ws.send_json(frame)
        last = (await to_response_end(ws))[-1]
    error = last.get("error") or (last.get("response") or {}).get("error") or {}
    return error.get("code", last["type"])


async def cancelled(server: RunningServer, name: str) -> object:
    async with server.connect() as ws:
        await ws.send_json(cancel(name))
        last = (await to_end(ws))[-1]
    return last["chunk"].get("code", last["status"])


async def resumed(server: RunningServer, name: str) -> object:
    async with server.connect() as ws:
        await ws.send_json(resume(name, 0))
        frame = await ws.receive_json(timeout=20)
    return frame["chunk"].get("code", frame["status"])


async def listed(server: RunningServer, name: str) -> object:
    async with server.session.get(server.sse) as response:
        body = await response.json()
    names = [each["request_id"] for each in body["streams"]]
    return body.get("partial", False) or name in names


async def conversations(server: RunningServer, name: str) -> object:
    async with server.session.get(f"{server.base}/conversations") as response:
        body = await response.json()
    return body["partial"] or name in [each["id"] for each in body["conversations"]]


# What is looked up: a chat that runs, a response that runs, one that is stored, a conversation.
CHATTING, RESPONDING, STORED, CONVERSATION = "chat", "responding", "stored", "conversation"
# What is looked up, how, and what comes of it at a slow server, and at one that does not answer.
LOOKS: list[tuple[str, Look, object, object]] = [
    # Every instance that is known to this one is asked, past the server that is silent.
    (CHATTING, http("DELETE", "/sse/chat/{}"), 204, 204),
    (CHATTING, http("GET", "/sse/chat/{}"), 200, UNKNOWN),
    (CHATTING, http("HEAD", "/sse/chat/{}"), 200, UNKNOWN),
    (CHATTING, cancelled, "cancelled", UNKNOWN),
    (CHATTING, resumed, "processing", UNKNOWN),
    (CHATTING, listed, True, True),
    (RESPONDING, http("POST", "/v1/responses/{}/cancel"), 200, UNKNOWN),
    (RESPONDING, http("GET", "/v1/responses/{}"), 200, UNKNOWN),
    (RESPONDING, http("DELETE", "/v1/responses/{}"), 200, UNKNOWN),
    (STORED, http("GET", "/v1/responses/{}"), 200, UNKNOWN),
    (STORED, http("GET", "/v1/responses/{}?stream=true"), 200, UNKNOWN),
    (STORED, http("GET", "/v1/responses/{}/input_items"), 200, UNKNOWN),
    (STORED, http("DELETE", "/v1/responses/{}"), 200, UNKNOWN),
    (STORED, continued, 200, UNKNOWN),
    (STORED, continued_on_a_socket, "response.completed", UNKNOWN),
    (STORED, resumed_response, "response.completed", UNKNOWN),
    (CONVERSATION, http("GET", "/conversations/{}"), 200, "history_unavailable"),
    (CONVERSATION, http("DELETE", "/conversations/{}"), 204, "history_unavailable"),
    (CONVERSATION, conversations, True, True),
    (CONVERSATION, http("DELETE", "/conversations"), 200, "history_unavailable"),
]


class There:
    """What the first instance has: one of each kind for each look."""

    def __init__(self, server: RunningServer, stack: AsyncExitStack) -> None:
        self._server = server
        self._stack = stack

    async def _end(self) -> None:
        """End what runs: nobody comes back for it."""
        gateway = self._server.owners.context.gateway
        await gateway.producers.end(lambda: StreamNotFound("this answer was cancelled"))

    async def make(self, kind: str) -> str:
        """Make one of *kind*; return its name."""
        name = uuid4().hex
        running = kind in {CHATTING, RESPONDING}
        self._server.simulator.behaviour = ENDLESS if running else FORGETFUL
        if kind in {CHATTING, CONVERSATION}:
            ws = await self._stack.enter_async_context(self._server.connect())
            self._stack.push_async_callback(self._end)
            await ws.send_json(chat(name, conversation_id=name))
            await (until_status(ws, "chunk") if running else to_end(ws))
            return name
        ws = await self._stack.enter_async_context(connect(self._server))
        self._stack.push_async_callback(self._end)
        await ws.send_json(create("one", store=True))
        first = await next_event(ws)
        if not running:
            await to_response_end(ws)
        response_id: str = first["response"]["id"]
        return response_id


async def look_up(pair: Pair, names: list[str]) -> list[object]:
    """What comes of each look, all at once; the last one deletes what others read."""
    there = pair.servers[1]
    *some, (_, look, _, _) = LOOKS
    outcomes = await asyncio.gather(
        *(each(there, name) for (_, each, _, _), name in zip(some, names, strict=False))
    )
    return [*outcomes, await look(there, names[-1])]


async def test_an_answer_that_takes_a_while_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a busy machine a while may be more than a second.
    monkeypatch.setattr(commands, "KNOWN_TIMEOUT", LATE)
    async with pair_in(tmp_path) as pair, AsyncExitStack() as stack:
        there = There(pair.servers[0], stack)
        names = [await there.make(kind) for kind, *_ in LOOKS]
        pair.roads[1].delay = SLOW

        outcomes = await look_up(pair, names)

        assert outcomes == [slow for _, _, slow, _ in LOOKS]
        async with pair.servers[1].session.get(f"{pair.servers[1].base}/stats") as response:
            heard = (await response.json())["instances"]
        assert len(heard) == 2
        assert None not in heard.values()


async def test_what_is_not_known_is_not_absent(tmp_path: Path) -> None:
    async with pair_in(tmp_path) as pair, AsyncExitStack() as stack:
        here, there = pair.servers[0], There(pair.servers[0], stack)
        names = [await there.make(kind) for kind, *_ in LOOKS]
        before = here.simulator.stats().active
        pair.redis.pause()
        try:
            outcomes = await look_up(pair, names)
        finally:
            pair.redis.go_on()

        assert outcomes == [silent for *_, silent in LOOKS]
        # The two chats that were cancelled end as soon as their instance hears of it.
        await until(
            lambda: here.simulator.stats().active <= before - 2, state=here.simulator.stats
        )
