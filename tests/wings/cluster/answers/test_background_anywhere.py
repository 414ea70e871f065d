"""Answers in the background are polled, cancelled and deleted at any instance, and all instances
have half of the places for them together.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.server import SLOW
from tests.support.waiting import until

if TYPE_CHECKING:
    from tests.support.instances import Instance, Make, World


BRIDGED: dict[str, Any] = {"llm.providers.sim.responses": False}


@pytest.fixture
def settings_of_all() -> dict[str, Any]:
    return BRIDGED


async def asked(at: Instance) -> str:
    """Ask for a response in the background, and return its id."""
    body = {"model": "sim", "input": "Hello", "background": True}
    async with at.server.session.post(f"{at.server.v1}/responses", json=body) as response:
        assert response.status == 200
        return str((await response.json())["id"])


async def called(
    at: Instance, name: str, *, cancel: bool = False, delete: bool = False
) -> tuple[int, dict[str, Any]]:
    url = f"{at.server.v1}/responses/{name}{'/cancel' if cancel else ''}"
    method = "POST" if cancel else "DELETE" if delete else "GET"
    async with at.server.session.request(method, url) as response:
        return response.status, await response.json()


async def polled(at: Instance, name: str, *statuses: str) -> dict[str, Any]:
    """The response *name* once it has one of *statuses*."""
    async with asyncio.timeout(30):
        while True:
            status, response = await called(at, name)
            assert status == 200, response
            if response["status"] in statuses:
                return response
            await asyncio.sleep(0.02)


async def test_a_response_is_polled_at_another_instance(make: Make) -> None:
    a, b = await make()
    name = await asked(a)

    running = await polled(b, name, "queued", "in_progress")
    final = await polled(b, name, "completed")

    assert (running["id"], running["output"]) == (name, [])
    assert final["output"]
    assert (await polled(a, name, "completed")) == final
    assert (a.requests, b.requests) == (1, 0)


@pytest.mark.parametrize("how", ["cancel", "delete"])
async def test_a_response_is_ended_at_another_instance(make: Make, how: str) -> None:
    a, b = await make(2, SLOW)
    name = await asked(a)
    await a.server.simulator.until(lambda stats: stats.active == 1)

    status, _ = await called(b, name, **{how: True})

    assert status == 200
    await a.server.simulator.until(lambda stats: stats.aborted == 1)
    if how == "cancel":
        assert (await polled(b, name, "cancelled"))["id"] == name
    else:
        assert (await called(b, name))[0] == 404
    await a.server.nothing_held()


async def test_an_answer_of_sse_is_asked_about_at_another_instance(make: Make) -> None:
    a, b = await make()
    ask = {"request_id": "r1", "text": "Hello"}
    headers = {"Prefer": "respond-async"}
    async with a.server.session.post(a.server.sse, json=ask, headers=headers) as response:
        assert response.status == 202

    states: dict[str, dict[str, Any]] = {}
    async with asyncio.timeout(30):
        while not (states and states["b"]["status"] == "complete"):
            for key, instance in (("b", b), ("a", a)):
                url = f"{instance.server.sse}/r1"
                accept = {"Accept": "application/json"}
                async with instance.server.session.get(url, headers=accept) as response:
                    assert response.status == 200
                    states[key] = await response.json()
            await asyncio.sleep(0.02)

    assert states["a"] == states["b"]
    assert states["b"]["text"]
    await until(lambda: b.cluster.stats().tunnels == 0)


async def test_what_has_run_in_the_background_survives_a_graceful_stop(make: Make) -> None:
    a, b = await make()
    name = await asked(a)
    await polled(a, name, "completed")
    await a.leave()

    assert (await polled(b, name, "completed"))["output"]


async def test_what_is_deleted_after_a_graceful_stop_does_not_come_back(make: Make) -> None:
    a, b, c = await make(3)
    name = await asked(a)
    await polled(a, name, "completed")
    await a.leave()
    # It is adopted by now, and there is its log as well.
    await polled(b, name, "completed")

    assert (await called(c, name, delete=True))[0] == 200
    for instance in (b, c):
        assert (await called(instance, name))[0] == 404


async def test_what_its_process_ends_has_failed(make: Make) -> None:
    a, b = await make(2, SLOW)
    name = await asked(a)
    await a.server.simulator.until(lambda stats: stats.active == 1)
    a.server.context.gateway.drain()
    assert (await polled(b, name, "in_progress"))["id"] == name
    await a.server.context.gateway.close()
    assert (await polled(b, name, "failed"))["id"] == name
    await a.leave()

    response = await polled(b, name, "failed")

    assert "stopping" in response["error"]["message"]


async def test_an_instance_that_was_killed_is_told_of(make: Make, world: World) -> None:
    a, b = await make(2, SLOW)
    name = await asked(a)
    await a.server.simulator.until(lambda stats: stats.active == 1)

    world.kill("a")
    status, response = await called(b, name)

    assert (status, response["error"]["code"]) == (503, "server_shutdown")
    await called(a, name, cancel=True)


async def test_a_response_is_found_before_its_owner_has_claimed_its_id(
    make: Make, world: World
) -> None:
    a, b = await make(2, SLOW)
    world.slow = 0.01
    name = await asked(a)
    # The claim is on its way.
    assert not any(claim.until > 0 for claim in world.claims.values())
    world.slow = 0.0

    assert (await called(b, name))[0] == 200
    await called(a, name, cancel=True)
