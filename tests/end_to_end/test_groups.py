"""Groups as clients see them, on each face."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.wings.simulator.exchange import Behaviour
from aioserver.wings.simulator.server import Simulator
from tests.support.chat import CHAT, chat, read_frames, to_end
from tests.support.server import QUICK, MakeServer, provider_entry
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.server import RunningServer

SLOW = Behaviour(ttft=0.3, interval=0)
FAILING = Behaviour(fail_rate=1.0, fail_status=503)


def entries(simulators: list[Simulator], places: int = 1) -> dict[str, Any]:
    """The providers `e0`, `e1` …"""
    limits = {"concurrent_requests": places, "queue_size": 50, "max_retries": 0}
    return {
        f"llm.providers.e{number}": provider_entry(
            simulator.base_url, model=f"e{number}-model", **limits
        )
        for number, simulator in enumerate(simulators)
    }


@asynccontextmanager
async def engines(
    make_server: MakeServer,
    *behaviours: Behaviour,
    choose: str = "least_busy",
    places: int = 1,
    changes: dict[str, Any] | None = None,
) -> AsyncIterator[tuple[RunningServer, list[Simulator]]]:
    """A server with a group `pair` of providers `e0`, `e1` …, one for each of *behaviours*."""
    simulators = [Simulator(behaviour) for behaviour in behaviours]
    for simulator in simulators:
        await simulator.__aenter__()
    providers = entries(simulators, places)
    names = [name.rpartition(".")[2] for name in providers]
    models = {"pair": {"members": names, "choose": choose}, "other-name": names[1]}
    server = await make_server(QUICK, **{**providers, "llm.models": models, **(changes or {})})
    try:
        yield server, simulators
        await server.nothing_held()
    finally:
        for simulator in simulators:
            await simulator.__aexit__(None, None, None)


def base(server: RunningServer) -> str:
    return server.v1.removesuffix("/v1")


async def stats(server: RunningServer) -> dict[str, Any]:
    async with server.session.get(f"{base(server)}/stats") as response:
        state: dict[str, Any] = await response.json()
        return state


async def test_twenty_at_once_are_shared_by_both_engines(make_server: MakeServer) -> None:
    async with engines(make_server, SLOW, SLOW) as (server, _):

        async def ask() -> tuple[int, str]:
            body = {**CHAT, "model": "pair"}
            async with server.session.post(f"{server.v1}/chat/completions", json=body) as response:
                await response.read()
                return response.status, response.headers["x-aioserver-provider"]

        asked = [asyncio.create_task(ask()) for _ in range(8)]
        await until(lambda: server.context.router.groups["pair"].waiting == 6)
        pair = server.context.monitor.fresh()["groups"]["pair"]
        assert pair["waiting"] == 6
        assert [member["in_flight"] for member in pair["members"]] == [1, 1]
        answers = await asyncio.gather(*asked)

        assert {status for status, _ in answers} == {200}
        assert {provider for _, provider in answers} == {"e0", "e1"}
        pair = server.context.monitor.fresh()["groups"]["pair"]
        assert pair["waiting"] == 0
        assert (await stats(server))["groups"].keys() == {"pair", "other-name"}
        assert sum(member["starts"] for member in pair["members"]) == 8
        async with server.session.get(f"{base(server)}/metrics") as response:
            text = await response.text()
        assert 'aioserver_group_starts_total{group="pair",home="none",provider="e0"}' in text
        assert 'aioserver_group_waiting{group="pair"} 0.0' in text


@pytest.mark.parametrize("face", ["websocket", "sse", "openai", "responses"])
async def test_every_face_goes_on_at_another_member(make_server: MakeServer, face: str) -> None:
    async with engines(make_server, FAILING, QUICK, choose="ordered", places=2) as (
        server,
        simulators,
    ):
        if face == "websocket":
            async with server.connect() as ws:
                await ws.send_json(chat("r1", model="pair"))
                frames = await to_end(ws)
            answered = frames[-1]["chunk"]["metadata"]
            assert (answered["provider"], answered["model"]) == ("e1", "e1-model")
        elif face == "sse":
            body = {"request_id": "r1", "text": "Hello", "provider": "pair"}
            async with server.session.post(server.sse, json=body) as response:
                frames = await read_frames(response)
            assert frames[-1]["chunk"]["metadata"]["provider"] == "e1"
        else:
            asked: dict[str, Any] = {**CHAT, "model": "pair"}
            path = "chat/completions"
            if face == "responses":
                path, asked = "responses", {"input": "Hello", "model": "pair"}
            async with server.session.post(f"{server.v1}/{path}", json=asked) as response:
                text = await response.text()
                assert response.status == 200
            assert response.headers["x-aioserver-provider"] == "e1"
            assert response.headers["x-aioserver-attempts"] == "2"
            assert "e1-model" in text
        assert [simulator.stats().requests > 0 for simulator in simulators] == [True, True]


async def test_a_position_is_told_while_a_request_stands_in_both_lines(
    make_server: MakeServer,
) -> None:
    async with engines(make_server, SLOW, SLOW) as (server, _), server.connect() as ws:
        for number in range(3):
            await ws.send_json(chat(f"r{number}", model="pair"))
        queued: list[int] = []
        ended = 0
        while ended < 3:
            frame = await ws.receive_json(timeout=10)
            if frame.get("status") == "queued":
                queued.append(frame["chunk"]["position"])
            ended += frame.get("status") in {"complete", "error"}
        assert queued[:1] == [1]


async def test_models_are_listed_by_all_the_names_that_lead_somewhere(
    make_server: MakeServer,
) -> None:
    async with engines(
        make_server, QUICK, QUICK, changes={"llm.providers.e1.models": ["listed"]}
    ) as (
        server,
        _,
    ):
        async with server.session.get(f"{server.v1}/models") as response:
            listed = {entry["id"]: entry["owned_by"] for entry in (await response.json())["data"]}
        assert listed["pair"] == listed["other-name"] == "aioserver"
        assert listed["listed"] == listed["e1/listed"] == listed["e1"] == "e1"
        assert {*[*listed][:2]} == {"pair", "other-name"}
        for name, owner in (("pair", "aioserver"), ("listed", "e1"), ("e0/anything", "e0")):
            async with server.session.get(f"{server.v1}/models/{name}") as response:
                assert (await response.json())["owned_by"] == owner
        async with server.session.get(f"{server.v1}/models/nobodys") as response:
            assert (await response.json())["owned_by"] == "sim"


async def test_what_is_passed_on_goes_to_one_member_and_account_paths_to_none(
    make_server: MakeServer,
) -> None:
    async with engines(
        make_server, QUICK, QUICK, changes={"llm.providers.e0.account_paths": True}
    ) as (
        server,
        _,
    ):
        body = {"model": "pair", "query": "q", "documents": ["a"]}
        async with server.session.post(f"{server.v1}/rerank", json=body) as response:
            assert response.headers["x-aioserver-provider"] in {"e0", "e1"}
        headers = {"x-aioserver-provider": "pair"}
        async with server.session.get(f"{server.v1}/files", headers=headers) as response:
            assert response.status == 400
            assert "may have several" in (await response.json())["error"]["message"]


async def test_a_reload_changes_the_members_without_a_dropped_request(
    make_server: MakeServer,
) -> None:
    async with engines(make_server, SLOW, SLOW, choose="ordered") as (server, simulators):
        body = {**CHAT, "model": "pair"}

        async def ask() -> int:
            async with server.session.post(f"{server.v1}/chat/completions", json=body) as response:
                await response.read()
                return response.status

        asked = [asyncio.create_task(ask()) for _ in range(6)]
        await until(lambda: sum(each.stats().active for each in simulators) == 2)
        assert await server.change(
            **entries(simulators), **{"llm.models": {"pair": ["e1"], "other-name": "e0"}}
        )

        assert set(await asyncio.gather(*asked)) == {200}
        before = simulators[0].stats().requests
        assert await ask() == 200
        assert simulators[0].stats().requests == before
