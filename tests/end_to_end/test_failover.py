"""A fallback, as clients see it on each face."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.chat import CHAT
from tests.support.failing import left_alone
from tests.support.server import QUICK, MakeServer, provider_entry
from tests.support.simulator import Behaviour, Simulator

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.server import RunningServer


FAILING = Behaviour(fail_rate=1.0, fail_status=503)


@asynccontextmanager
async def two(
    make_server: MakeServer, **limits: Any
) -> AsyncIterator[tuple[RunningServer, Simulator]]:
    """A server whose provider fails, and the simulator of another provider that it may ask."""
    async with Simulator(QUICK) as other:
        server = await make_server(
            FAILING,
            **{
                "llm.fallbacks": ["other"],
                "llm.providers.other": provider_entry(other.base_url, **limits),
            },
        )
        yield server, other
        await server.nothing_held()


@pytest.mark.parametrize("streamed", [True, False])
async def test_an_openai_client_sees_who_answered_after_how_many_tries(
    make_server: MakeServer, streamed: bool
) -> None:
    async with two(make_server) as (server, _):
        body = {**CHAT, "model": "gpt-4o-mini", "stream": streamed}
        async with server.session.post(f"{server.v1}/chat/completions", json=body) as response:
            assert response.status == 200
            text = await response.text()
        assert response.headers["x-aioserver-provider"] == "other"
        assert response.headers["x-aioserver-attempts"] == "2"
        assert "other-model" in text
        assert "gpt-4o-mini" not in text


async def test_embeddings_are_asked_of_no_other(make_server: MakeServer) -> None:
    """Vectors of two models cannot be compared: a store of them would be spoilt unnoticed."""
    async with two(make_server) as (server, other):
        async with server.session.post(
            f"{server.v1}/embeddings", json={"input": "Hello"}
        ) as response:
            assert response.status == 502
        assert response.headers["x-aioserver-provider"] == "sim"
        assert other.stats().requests == 0


async def test_all_of_it_can_be_watched(make_server: MakeServer) -> None:
    async with two(make_server) as (server, _):
        for number in range(6):
            dead = [server.provider.health.breaker] if number == 5 else []
            with left_alone(*dead):
                async with server.session.post(
                    f"{server.v1}/chat/completions", json=CHAT
                ) as response:
                    assert response.status == 200
        server.context.monitor.tick()
        async with server.session.get(server.base + "/stats") as response:
            providers = (await response.json())["providers"]
        async with server.session.get(server.base + "/metrics") as response:
            metrics = await response.text()

        incidents = [incident["text"] for incident in server.incidents()]
        await server.forgive()
        server.context.monitor.tick()
        again = [incident["text"] for incident in server.incidents()]

    text = (
        "sim answers with server errors (5xx): 5 of 5 attempts failed in the last minute; "
        "it is left alone"
    )
    assert text in incidents
    assert providers["sim"]["trouble"]["text"] == text
    assert providers["sim"]["trouble"]["detail"].endswith("; its fallback is other")
    assert "sim answers again" in again
    assert providers["sim"]["state"] == "dead"
    assert providers["sim"]["faults"]["http_5xx"] == 5
    assert providers["sim"]["failovers"] == 6
    assert providers["other"]["requests"] == 6
    assert 'aioserver_provider_state{provider="sim"} 2.0' in metrics
    assert 'aioserver_provider_state{provider="other"} 0.0' in metrics
    assert 'aioserver_failovers_total{provider="sim",reason="provider_error"} 5.0' in metrics
    assert 'aioserver_failovers_total{provider="sim",reason="circuit_open"} 1.0' in metrics


@pytest.mark.parametrize("face", ["chat/completions", "responses", "messages"])
@pytest.mark.parametrize("streamed", [True, False])
async def test_where_it_is_too_long_for_all_the_first_refusal_is_told_as_it_came(
    make_server: MakeServer, face: str, streamed: bool
) -> None:
    async with Simulator(QUICK) as first:
        server = await make_server(
            FAILING,
            **{
                "llm.active": "first",
                "llm.fallbacks": ["sim"],
                "llm.providers.first": {
                    **provider_entry(first.base_url, model="fault-too-long"),
                    "messages": True,
                },
            },
        )
        body = {**CHAT, "max_tokens": 9, "input": "Hello", "stream": streamed}
        async with server.session.post(f"{server.v1}/{face}", json=body) as response:
            assert response.status == 400
            error = (await response.json())["error"]
        assert error["message"] == "prompt is too long: 9000 tokens > 8192 maximum"
        assert response.headers["x-aioserver-provider"] == "first"
        assert response.headers["x-aioserver-attempts"] == "2"
        await server.nothing_held()
