"""What instances leave in their Redis goes by itself."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import aiohttp
import pytest

from tests.support.chat import CHAT, STREAMED, chat, resume, to_end
from tests.support.keys import bearer, cookie, keys_of, log_in
from tests.support.pairs import pair_in
from tests.support.responses import connect, create
from tests.support.responses import to_end as to_response_end

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.server import RunningServer

# Another process takes part, whose time does not jump.
pytestmark = pytest.mark.real_time
# Seconds for which any key lives at most: the secret of browser sessions is kept between starts.
LONGEST = 30 * 86_400
# Keys without a time to live, each with its reason. There is none.
FOR_EVER: dict[str, str] = {}
KEY = bearer("web")


async def ask(server: RunningServer, method: str, path: str, **options: Any) -> Any:
    headers = {**KEY, **options.pop("headers", {})}
    url = server.base + path
    while True:
        async with server.session.request(method, url, headers=headers, **options) as response:
            body = await response.read()
            if response.status == 503:
                # On a busy machine the server may answer late; the test has a deadline of its own.
                await asyncio.sleep(0.05)
                continue
            assert response.status < 300, (path, response.status, body)
            return await response.json() if response.content_type == "application/json" else body


async def chatted(server: RunningServer, name: str, frame: dict[str, Any]) -> None:
    async with aiohttp.ClientSession(headers=KEY) as session, session.ws_connect(server.ws) as ws:
        await ws.send_json(frame)
        assert (await to_end(ws))[-1]["status"] == "complete", name


async def a_round(here: RunningServer, there: RunningServer) -> None:
    """Use every face, and what one instance has at the other."""
    name = uuid4().hex
    await chatted(here, name, chat(name, conversation_id=name))
    await chatted(there, name, resume(name, 0))
    question = {"request_id": uuid4().hex, "text": "Hello", "conversation_id": name}
    await ask(there, "POST", "/sse/chat", json=question)
    await ask(here, "GET", "/sse/chat")
    await ask(here, "DELETE", f"/sse/chat/{question['request_id']}")
    for body in (CHAT, STREAMED):
        again = {"Idempotency-Key": uuid4().hex}
        await ask(here, "POST", "/v1/chat/completions", json=body, headers=again)
        await ask(there, "POST", "/v1/chat/completions", json=body, headers=again)
    message = {"model": "sim", "max_tokens": 9, **CHAT}
    await ask(here, "POST", "/v1/messages", json=message)
    asked = {"model": "sim", "input": "one", "store": True}
    first = (await ask(here, "POST", "/v1/responses", json=asked))["id"]
    asked |= {"previous_response_id": first, "stream": True}
    await ask(there, "POST", "/v1/responses", json=asked)
    async with connect(there, headers=KEY) as ws:
        await ws.send_json(create("three", previous_response_id=first))
        assert (await to_response_end(ws))[-1]["type"] == "response.completed"
    await ask(here, "GET", f"/v1/responses/{first}/input_items")
    await ask(there, "DELETE", f"/v1/responses/{first}")
    await ask(here, "GET", "/conversations")
    await ask(here, "POST", "/session")
    await ask(there, "DELETE", f"/conversations/{name}")
    await ask(here, "DELETE", "/conversations")
    await chatted(here, name, chat(uuid4().hex, conversation_id=name))


async def test_each_key_has_a_time_to_live(tmp_path: Path) -> None:
    limits = keys_of(
        "web",
        max_concurrent=5,
        requests_per_minute=1000,
        max_connections=50,
        tokens_per_minute=100_000,
        tokens_per_day=10_000_000,
    )
    async with pair_in(tmp_path, **limits) as pair:
        await a_round(*pair.servers)
        keys = seen(pair.redis.call)
        await a_round(*reversed(pair.servers))
        keys |= seen(pair.redis.call)
        redis = pair.redis
        for member in pair.members:
            member.leases.leave()
        keys |= seen(redis.call)

    kinds = {key.split(":")[2] for key in keys}
    assert {
        "world",
        "names",
        "limit",
        "pace",
        "tokens",
        "m",
        "o",
        "c",
        "own",
        "gone",
        "r",
    } <= kinds
    endless = {key for key, seconds in keys.items() if seconds < 0}
    assert {key.split(":")[2] for key in endless} == set(FOR_EVER)
    assert max(keys.values()) <= LONGEST


def seen(call: Any) -> dict[str, int]:
    """The keys that there are, and how long they live."""
    lives = {key.decode(): call("TTL", key) for key in call("KEYS", "*")}
    # Some may have gone meanwhile.
    return {key: seconds for key, seconds in lives.items() if seconds != -2}


async def test_a_session_of_one_instance_is_one_of_all(tmp_path: Path) -> None:
    async with pair_in(tmp_path, **keys_of("web")) as pair:
        for here, there in (pair.servers, reversed(pair.servers)):
            session = await log_in(here, "web")
            async with there.session.get(
                f"{there.v1}/models", headers=cookie(session)
            ) as response:
                assert response.status == 200
