"""Health, readiness, and the state in short."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from aioserver import __version__, keys
from aioserver.providers.simulator import Behaviour
from tests.faces.raw import Raw
from tests.faces.talk import CHAT
from tests.house import until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.house import House

    Make = Callable[..., Awaitable[House]]


@pytest.mark.parametrize("path", ["/health", "/healthz", "/livez"])
async def test_a_living_process_is_healthy(house: House, path: str) -> None:
    async with house.connect(), house.session.get(house.base + path) as response:
        assert response.status == 200
        assert await response.json() == {
            "status": "healthy",
            "version": __version__,
            "connections": {"active": 1, "limit": 50, "waiting": 0},
        }


@pytest.mark.parametrize("path", ["/ready", "/readyz"])
async def test_readiness_ends_before_the_server_does(house: House, path: str) -> None:
    async with house.session.get(house.base + path) as response:
        assert (response.status, await response.json()) == (200, {"status": "ready"})

    house.app[keys.LIFE].ready = False

    async with house.session.get(house.base + path) as response:
        assert response.status == 503
        assert "Retry-After" in response.headers
        assert (await response.json())["status"] == "not ready"
    async with house.session.get(house.base + "/health") as response:
        assert response.status == 200


async def test_without_a_usable_provider_the_server_is_not_ready(make_house: Make) -> None:
    house = await make_house(**{"llm.providers.sim.api_key_env": "NO_SUCH_KEY"})
    async with house.session.get(house.base + "/ready") as response:
        assert response.status == 503
        assert "provider" in (await response.json())["reason"]
    async with house.session.post(house.v1 + "/chat/completions", json=CHAT) as response:
        assert response.status == 503
        assert (await response.json())["error"]["code"] == "no_provider"
        assert "Retry-After" in response.headers
    async with house.session.get(house.v1 + "/models") as response:
        assert (await response.json())["data"] == []


async def test_the_overview_shows_connections_and_pools(make_house: Make) -> None:
    house = await make_house(Behaviour(ttft=60))
    async with Raw(house) as raw:
        await raw.post("/v1/chat/completions", CHAT)
        await house.simulator.until(lambda stats: stats.active == 1)
        async with house.session.get(house.base + "/") as response:
            shown = await response.json()

    assert shown["name"] == "aioserver"
    assert shown["active_provider"] == "sim"
    assert shown["connections"] == {"active": 1, "limit": 50, "waiting": 0, "queue_size": 50}
    assert shown["providers"] == {
        "sim": {
            "usable": True,
            "in_flight": 1,
            "limit": 20,
            "waiting": 0,
            "pool": {"open": 1, "idle": 0, "limit": 20},
        }
    }
    assert (shown["streams"]["running"], shown["streams"]["detached"]) == (0, 0)
    assert shown["endpoints"] == {"websocket": "/ws/chat", "sse": "/sse/chat", "openai": "/v1"}
    await until(lambda: house.held()["places"] == 0)


async def test_an_answer_that_nobody_reads_is_shown(make_house: Make) -> None:
    house = await make_house(Behaviour(ttft=0, interval=60))
    async with house.connect() as ws:
        await ws.send_json({"action": "chat", "request_id": "r1", "payload": {"text": "hi"}})
        await house.simulator.until(lambda stats: stats.active == 1)
    await until(lambda: house.held()["detached"] == 1)

    async with house.session.get(house.base + "/") as response:
        streams = (await response.json())["streams"]
    async with house.session.delete(f"{house.sse}/r1") as response:
        assert response.status == 204
    await until(lambda: house.held()["detached"] == 0)

    assert (streams["running"], streams["detached"], streams["max_detached"]) == (1, 1, 100)
    assert 0 < streams["bytes"] < streams["max_bytes"]
