"""A fallback, as clients see it on each face."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.faces import context
from aioserver.providers.simulator.exchange import Behaviour
from aioserver.providers.simulator.server import Simulator
from tests.support.chat import CHAT, chat, read_frames, text_of, to_end
from tests.support.server import QUICK, provider_entry

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from tests.support.server import House

    Make = Callable[..., Awaitable[House]]

FAILING = Behaviour(fail_rate=1.0, fail_status=503)


@asynccontextmanager
async def two(make_house: Make, **limits: Any) -> AsyncIterator[tuple[House, Simulator]]:
    """A house whose provider fails, and the other one that it may ask."""
    async with Simulator(QUICK) as other:
        house = await make_house(
            FAILING,
            **{
                "llm.fallbacks": ["other"],
                "llm.providers.other": provider_entry(other.base_url, **limits),
            },
        )
        yield house, other
        await house.nothing_held()


async def test_a_websocket_client_gets_the_answer_of_the_other(make_house: Make) -> None:
    async with two(make_house) as (house, other), house.connect() as ws:
        await ws.send_json(chat("r1"))
        frames = await to_end(ws)

        assert [frame["event_id"] for frame in frames] == list(range(1, len(frames) + 1))
        assert frames[0]["chunk"]["metadata"]["provider"] == "sim"  # it was tried first
        assert frames[-1]["status"] == "complete"
        assert frames[-1]["chunk"]["metadata"]["provider"] == "other"
        assert frames[-1]["chunk"]["metadata"]["model"] == "other-model"
        assert text_of(frames)
        assert other.stats().requests == 1


async def test_an_sse_client_gets_the_answer_of_the_other(make_house: Make) -> None:
    async with two(make_house) as (house, _):
        body = {"request_id": "r1", "text": "Hello"}
        async with house.session.post(house.sse, json=body) as response:
            frames = await read_frames(response)
        assert frames[-1]["chunk"]["metadata"]["provider"] == "other"


@pytest.mark.parametrize("streamed", [True, False])
async def test_an_openai_client_sees_who_answered_after_how_many_tries(
    make_house: Make, streamed: bool
) -> None:
    async with two(make_house) as (house, _):
        body = {**CHAT, "model": "gpt-4o-mini", "stream": streamed}
        async with house.session.post(f"{house.v1}/chat/completions", json=body) as response:
            assert response.status == 200
            text = await response.text()
        assert response.headers["x-aioserver-provider"] == "other"
        assert response.headers["x-aioserver-attempts"] == "2"
        assert "other-model" in text
        assert "gpt-4o-mini" not in text


async def test_where_both_fail_the_last_one_is_told(make_house: Make) -> None:
    async with two(make_house) as (house, other):
        other.behaviour = FAILING
        async with house.session.post(f"{house.v1}/chat/completions", json=CHAT) as response:
            assert response.status == 502
            assert (await response.json())["error"]["code"] == "provider_error"
        assert response.headers["x-aioserver-provider"] == "other"
        assert response.headers["x-aioserver-attempts"] == "2"
        assert response.headers["x-should-retry"] == "false"


async def test_embeddings_are_asked_of_no_other(make_house: Make) -> None:
    """Vectors of two models cannot be compared: a store of them would be spoilt unnoticed."""
    async with two(make_house) as (house, other):
        async with house.session.post(
            f"{house.v1}/embeddings", json={"input": "Hello"}
        ) as response:
            assert response.status == 502
        assert response.headers["x-aioserver-provider"] == "sim"
        assert other.stats().requests == 0


async def test_a_pinned_provider_has_no_other(make_house: Make) -> None:
    async with two(make_house) as (house, other):
        body = {**CHAT, "model": "sim/anything"}
        async with house.session.post(f"{house.v1}/chat/completions", json=body) as response:
            assert response.status == 502
        assert response.headers["x-aioserver-provider"] == "sim"
        assert other.stats().requests == 0


async def test_all_of_it_can_be_watched(make_house: Make) -> None:
    async with two(make_house) as (house, _):
        for _ in range(6):
            async with house.session.post(f"{house.v1}/chat/completions", json=CHAT) as response:
                assert response.status == 200
        house.app[context.MONITOR].tick()
        async with house.session.get(house.base + "/stats") as response:
            providers = (await response.json())["providers"]
        async with house.session.get(house.base + "/metrics") as response:
            metrics = await response.text()

        incidents = [one["text"] for one in house.app[context.MONITOR]._incidents]
        house.forgive()
        house.app[context.MONITOR].tick()
        again = [one["text"] for one in house.app[context.MONITOR]._incidents]

    assert "sim fails: its breaker has opened" in incidents
    assert "sim answers again" in again
    assert providers["sim"]["breaker"] == "open"
    assert providers["sim"]["faults"]["http_5xx"] == 5
    assert providers["sim"]["failovers"] == 6
    assert providers["other"]["requests"] == 6
    assert 'aioserver_breaker_state{provider="sim"} 2.0' in metrics
    assert 'aioserver_breaker_state{provider="other"} 0.0' in metrics
    assert 'aioserver_failovers_total{provider="sim",reason="provider_error"} 5.0' in metrics
    assert 'aioserver_failovers_total{provider="sim",reason="circuit_open"} 1.0' in metrics
