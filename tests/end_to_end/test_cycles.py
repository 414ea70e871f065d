"""An answer that has ended leaves no cycles of references, however it ended: what is in one stays
until the collector happens to look at old objects.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from tests.support.chat import CHAT, STREAMED, cancel, chat, resume, to_end, until_status
from tests.support.cycles import cycles
from tests.support.keys import bearer, keys_of
from tests.support.raw import SMALL, Raw
from tests.support.server import ENDLESS, QUICK, SILENT, SIM_HTTP_CLIENT
from tests.support.simulator import Behaviour
from tests.support.waiting import patience, until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.support.server import MakeServer, RunningServer

WEB = bearer("web")
LATE = {"x-aioserver-deadline": "0.05"}
LANE = {"type": "response.create", "stream_id": "a", "model": "sim"}
CUT = Behaviour(ttft=0, interval=0, cut_after=2)
REFUSED = Behaviour(fail_rate=1.0, fail_status=400)
FAILED = Behaviour(fail_rate=1.0, fail_status=500)


async def _post(
    server: RunningServer, path: str, body: Any, headers: dict[str, str] | None = None
) -> bytes:
    url = server.sse if path == "sse" else f"{server.v1}/{path}"
    with contextlib.suppress(aiohttp.ClientPayloadError):
        async with server.session.post(url, json=body, headers=WEB | (headers or {})) as response:
            return await response.read()
    return b""


async def completed(server: RunningServer, number: int) -> None:
    await _post(server, "chat/completions", CHAT)
    await _post(server, "chat/completions", STREAMED)
    await _post(server, "sse", {"request_id": f"{number}", "text": "?"})
    await _post(server, "responses", {"input": "?", "stream": True})
    await _post(server, "messages", {**STREAMED, "max_tokens": 9})


async def closed(server: RunningServer, number: int) -> None:
    """Each connection ends, also those to the provider."""
    last = {"Connection": "close"}
    await _post(server, "chat/completions", CHAT, last)
    await _post(server, "chat/completions", CHAT, {**last, "Idempotency-Key": f"k{number}"})
    await _post(server, "responses", {"input": "?", "store": True}, last)
    async with server.session.ws_connect(f"{server.v1}/responses", headers=WEB) as ws:
        await ws.send_json({**LANE, "input": "?"})
        while (await ws.receive_json())["type"] != "response.completed":
            pass
    await until(lambda: server.provider.pools.stats().open == 0)


async def late(server: RunningServer, _number: int) -> None:
    await _post(server, "chat/completions", CHAT, LATE)


async def late_stream(server: RunningServer, number: int) -> None:
    await _post(server, "chat/completions", STREAMED, LATE)
    await _post(server, "sse", {"request_id": f"{number}", "text": "?"}, LATE)
    await _post(server, "responses", {"input": "?", "stream": True}, LATE)
    await _post(server, "messages", {**STREAMED, "max_tokens": 9}, LATE)


async def continued(server: RunningServer, number: int) -> None:
    await _post(server, "chat/completions", STREAMED)
    await _post(server, "sse", {"request_id": f"{number}", "text": "?"})


async def failed(server: RunningServer, number: int) -> None:
    await completed(server, number)


async def cancelled(server: RunningServer, number: int) -> None:
    async with server.connect(headers=WEB) as ws:
        await ws.send_json(chat(f"{number}"))
        await until_status(ws, "chunk")
        await ws.send_json(cancel(f"{number}"))
        await to_end(ws, f"{number}")


async def left(server: RunningServer, _number: int) -> None:
    url = f"{server.v1}/chat/completions"
    async with server.session.post(url, json=STREAMED, headers=WEB) as response:
        await response.content.readline()
        response.close()
    task = asyncio.create_task(server.session.post(url, json=CHAT, headers=WEB))
    await until(lambda: server.context.gateway.running > 0)
    task.cancel()
    await asyncio.wait([task])


async def at_the_door(server: RunningServer, _number: int) -> None:
    url = f"{server.v1}/chat/completions"
    for headers, data in (({}, b"{}"), (WEB, b"{"), (WEB, b"[]")):
        async with server.session.post(url, data=data, headers=headers) as response:
            assert 400 <= response.status < 500
            await response.read()
    async with server.connect(headers=WEB) as ws:
        await ws.send_json(resume("none"))
        await ws.receive_json(timeout=patience(20))


async def at_the_key(server: RunningServer, _number: int) -> None:
    async with server.connect(headers=WEB) as ws:
        names = [f"{_number}-{each}" for each in range(4)]
        for name in names:
            await ws.send_json(chat(name))
        refused = 0
        while refused < 2:
            frame = await ws.receive_json(timeout=patience(20))
            refused += frame["status"] == "error"
        for name in names:
            await ws.send_json(cancel(name))


async def at_a_hook(server: RunningServer, number: int) -> None:
    await completed(server, number)


async def slow(server: RunningServer, _number: int) -> None:
    dropped = server.context.metrics.slow_clients.value
    async with Raw(server, receive_buffer=SMALL) as raw:
        key = f"Authorization: {WEB['Authorization']}"
        await raw.post("/v1/chat/completions", STREAMED, key)
        # It reads nothing.
        await until(lambda: server.context.metrics.slow_clients.value > dropped)


async def background(server: RunningServer, number: int) -> None:
    await _post(server, "responses", {"input": "?", "background": True})
    headers = {"Prefer": "respond-async"}
    await _post(server, "sse", {"request_id": f"{number}", "text": "?"}, headers)
    await until(lambda: not server.context.gateway.running)


async def passed(server: RunningServer, _number: int) -> None:
    await _post(server, "moderations", {"input": "?"})
    await _post(server, "moderations", {"input": "?"}, LATE)


WAYS: list[tuple[Callable[[RunningServer, int], Awaitable[None]], Behaviour]] = [
    (completed, QUICK),
    (closed, QUICK),
    (failed, FAILED),
    (failed, REFUSED),
    (failed, CUT),
    (continued, CUT),
    (late, SILENT),
    (late_stream, ENDLESS),
    (late_stream, SILENT),
    (cancelled, ENDLESS),
    (left, ENDLESS),
    (at_the_door, QUICK),
    (at_the_key, ENDLESS),
    (background, QUICK),
    (passed, QUICK),
    (at_a_hook, QUICK),
    (slow, Behaviour(ttft=0, interval=0, tokens=200_000)),
]
MORE: dict[Any, dict[str, Any]] = {
    closed: {f"{SIM_HTTP_CLIENT}.keepalive_expiry": 0.05},
    continued: {"llm.providers.sim.continuation": "prefill"},
    # Nobody answers there, so that the requests are refused.
    at_a_hook: {"hooks": [{"name": "h", "url": "http://127.0.0.1:9/"}]},
    slow: {"chat.streams.send_timeout": 0.1},
}
# Answers of one way, of which each would leave its own.
ANSWERS = 3


@pytest.mark.parametrize(("ask", "behaviour"), WAYS)
async def test_an_answer_leaves_no_cycles_however_it_ends(
    make_server: MakeServer,
    ask: Callable[[RunningServer, int], Awaitable[None]],
    behaviour: Behaviour,
) -> None:
    keys = keys_of("web", max_concurrent=2)
    changes: dict[str, Any] = {"llm.providers.sim.http_client.max_retries": 0}
    changes |= MORE.get(ask, {})
    server = await make_server(behaviour, **keys, **changes)
    await ask(server, -1)
    await server.nothing_held()
    cycles()
    gc.disable()
    try:
        for number in range(ANSWERS):
            await ask(server, number)
        await server.nothing_held()
        left_over = cycles()
    finally:
        gc.enable()

    # One alone may be the last of its kind, which the loop or a connection still refers to.
    assert {name: count for name, count in left_over.items() if count >= ANSWERS} == {}
