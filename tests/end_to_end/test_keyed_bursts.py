"""Clients with keys that all come at once to a house with few places, on every face, while limits
change, and to workers.

Each of them is served, and afterwards nothing is held: no place, none of a key's counts.
"""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from tests.support.chat import CHAT, STREAMED, chat, frames_of, to_end
from tests.support.keys import bearer, code_of, entry
from tests.support.logs import errors
from tests.support.process import serving
from tests.support.server import CONCURRENCY, QUICK, UVICORN
from tests.support.simulator import Simulator
from tests.support.waiting import until, until_result

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.server import MakeServer

PLACES, CROWD, ROUNDS = 4, 20, 2
NAMES = ("one", "two")
MESSAGES = {**CHAT, "model": "sim", "max_tokens": 100}
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "embeddings": ("/v1/embeddings", {"model": "sim", "input": "Hello"}),
    "openai": ("/v1/chat/completions", CHAT),
    "openai streamed": ("/v1/chat/completions", STREAMED),
    "messages": ("/v1/messages", MESSAGES),
    "messages streamed": ("/v1/messages", {**MESSAGES, "stream": True}),
    "responses": ("/v1/responses", {"input": "Hello", "stream": True}),
    "sse": ("/sse/chat", CHAT),
}
FACES = (*BODIES, "websocket")
SERVED = "served"
# What a client may hear whose key has as many connections as it may, and what one whose place is
# taken away.
REFUSALS = frozenset({"concurrency_exceeded", "server_at_capacity"})


def house(places: int, *, bound: int = 0) -> dict[str, Any]:
    """A server with that many *places*, where all may wait; each key has at most *bound*
    connections, if that is not 0.
    """
    limits = {"max_connections": bound, "requests_per_minute": 1_000_000}
    return {
        f"{CONCURRENCY}.max_connections": places,
        f"{CONCURRENCY}.connection_queue_size": max(400, places),
        f"{CONCURRENCY}.queue_timeout": 30.0,
        f"{UVICORN}.backlog": 1024,
        "auth.keys": [*(entry(name, **limits) for name in NAMES), entry("root")],
    }


async def ask(session: aiohttp.ClientSession, base: str, face: str, number: int) -> str:
    """Ask as the client *number* does; return SERVED, or the code of the refusal."""
    headers = bearer(NAMES[number % len(NAMES)])
    if face == "websocket":
        return await ask_socket(session, base, number, headers)
    path, body = BODIES[face]
    if face == "sse":
        body = {"request_id": f"r{number}", **body}
    async with session.post(base + path, json=body, headers=headers) as response:
        if response.status != 200:
            return await code_of(response)
        answer = await response.read()
    if face == "sse":
        last = frames_of(answer)[-1]
        return SERVED if last["status"] == "complete" else str(last["chunk"]["code"])
    return SERVED


async def ask_socket(
    session: aiohttp.ClientSession, base: str, number: int, headers: dict[str, str]
) -> str:
    try:
        async with session.ws_connect(f"{base}/ws/chat", headers=headers) as ws:
            await ws.send_json(chat(f"r{number}"))
            last = (await to_end(ws))[-1]
    except aiohttp.WSServerHandshakeError as error:
        return {429: "concurrency_exceeded", 503: "server_at_capacity"}.get(
            error.status, f"status {error.status}"
        )
    return SERVED if last["status"] == "complete" else str(last["chunk"]["code"])


def crowd() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))


async def active(session: aiohttp.ClientSession, base: str) -> Any:
    """The connections that `/stats` shows, active and waiting."""
    async with session.get(f"{base}/stats", headers=bearer("root")) as response:
        assert response.status == 200
        connections = (await response.json())["connections"]
    return connections["active"], connections["waiting"]


@pytest.mark.parametrize("face", FACES)
async def test_a_crowd_with_keys_is_served_by_a_full_house(
    make_server: MakeServer, face: str, caplog: pytest.LogCaptureFixture
) -> None:
    server = await make_server(QUICK, **house(PLACES))
    numbers = itertools.count()
    async with crowd() as session:
        for _ in range(ROUNDS):
            answers = await asyncio.gather(
                *(ask(session, server.base, face, next(numbers)) for _ in range(CROWD))
            )
            assert set(answers) == {SERVED}
        await server.nothing_held()
        connections = server.context.monitor.fresh()["connections"]
        assert (connections["active"], connections["waiting"]) == (0, 0)

    assert not errors(caplog.records)


@pytest.mark.parametrize(
    "reloads", [12, pytest.param(100, marks=[pytest.mark.stress, pytest.mark.timeout(300)])]
)
async def test_no_place_is_lost_while_reloads_change_the_limits_under_a_crowd_with_keys(
    make_server: MakeServer, reloads: int, caplog: pytest.LogCaptureFixture
) -> None:
    server = await make_server(QUICK, **house(PLACES))
    numbers, answers = itertools.count(), list[str]()
    over = False

    async def come_back(face: str) -> None:
        while not over:
            answers.append(await ask(session, server.base, face, next(numbers)))

    async with crowd() as session, asyncio.TaskGroup() as clients:
        for face in FACES * 3:
            clients.create_task(come_back(face))
        for number in range(reloads):
            # Some clients have met the limits.
            enough = len(answers) + 8
            await until(lambda enough=enough: len(answers) >= enough)  # type: ignore[misc]
            changes = house(500 if number % 2 == 0 else PLACES, bound=(0, 3, 0, 12)[number % 4])
            assert await server.change(**changes)
        over = True

    await server.nothing_held()
    assert set(answers) <= {SERVED, *REFUSALS}
    assert answers.count(SERVED) > reloads
    assert server.context.admission.gate.limit == PLACES
    assert not errors(caplog.records)


async def test_a_crowd_with_keys_is_served_by_two_workers_whose_house_is_full(
    tmp_path: Path,
) -> None:
    changes = {**house(PLACES), f"{UVICORN}.workers": 2}
    async with (
        Simulator(QUICK) as simulator,
        serving(tmp_path / "config.yaml", simulator.base_url, changes=changes) as process,
        crowd() as session,
    ):
        base, numbers = (await process.ready()).base, itertools.count()
        for _ in range(ROUNDS):
            answers = await process.living(
                asyncio.gather(
                    *(
                        ask(session, base, face, next(numbers))
                        for face in FACES
                        for _ in range(CROWD // len(FACES))
                    )
                )
            )
            assert set(answers) == {SERVED}
        await until_result(lambda: active(session, base), lambda counts: counts == (0, 0))
        log = process.log
        process.signal()
        assert await process.ended() == 0

    assert "Traceback" not in log
    assert "ERROR" not in log
