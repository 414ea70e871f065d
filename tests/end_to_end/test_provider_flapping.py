"""A provider that fails and comes back, as clients see it; and one that is slower than it was."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from tests.support.faces import FACES, Seen, ask_every_face, over_openai, over_sse, over_websocket
from tests.support.failing import kill, left_alone
from tests.support.scripted_provider import DONE
from tests.support.server import HTTP_CLIENT, QUICK, MakeServer, RunningServer, provider_entry
from tests.support.simulator import Behaviour, Simulator
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

FAILURES = 5
FLAPPING = f"fault-flap-{FAILURES}"
FAILING = Behaviour(fail_rate=1.0, fault="status-500")
WELL, SICK, DEAD = 0, 1, 2


async def state(server: RunningServer, name: str = "sim") -> int:
    """The state of the provider *name*, as /metrics shows it."""
    return (await server.counted("provider_state", "provider"))[name,]


async def trial_due(server: RunningServer) -> None:
    """Wait until the next request may be a trial."""
    await until(lambda: server.provider.health.breaker.delay() <= 0)


def refused_soon(seen: list[Seen]) -> None:
    """Each face says `circuit_open` and when to come back."""
    ws, sse, *openai = seen
    assert [answer.code for answer in seen] == ["circuit_open"] * 4
    for answer in (ws, sse):
        assert 1.0 <= answer.error["retry_after"] <= 1.1
        assert answer.error["retryable"]
    for answer in openai:
        assert (answer.status, answer.headers.get("x-should-retry")) == (503, None)
        assert answer.headers["x-aioserver-attempts"] == "0"
        assert answer.headers["retry-after"] in {"1", "2"}


async def test_a_flapping_provider_is_left_alone_and_asked_again(make_server: MakeServer) -> None:
    server = await make_server(Behaviour(ttft=0, interval=0.02, tokens=40))
    running = asyncio.create_task(over_openai(server, "m"))
    await server.simulator.until(lambda stats: stats.tokens_sent > 2)
    server.simulator.behaviour = QUICK

    for round_ in range(1, 3):
        failed = [await over_openai(server, FLAPPING) for _ in range(FAILURES)]
        assert [answer.status for answer in failed] == [502] * FAILURES
        with left_alone(server.provider.health.breaker):
            assert await state(server) == DEAD
            asked = server.simulator.stats().requests
            refused_soon(await ask_every_face(server, "m"))
            assert server.simulator.stats().requests == asked
        await trial_due(server)
        good = [await over_openai(server, FLAPPING) for _ in range(FAILURES)]
        assert [answer.end for answer in good] == ["complete"] * FAILURES
        assert await state(server) == WELL
        tries = await server.counted("provider_attempts", "outcome")
        assert tries["http_5xx",] == round_ * FAILURES

    assert (await running).end == "complete", "what runs is not touched"
    tries = await server.counted("provider_attempts", "outcome")
    assert tries == {("http_5xx",): 2 * FAILURES, ("ok",): 2 * FAILURES + 1}
    assert (await server.counted("rejections", "code"))["circuit_open",] == 2 * FACES.total()
    await server.nothing_held()


async def test_a_dead_provider_is_back_with_the_first_event_on_every_face(
    make_server: MakeServer,
) -> None:
    server = await make_server()
    faces: tuple[Callable[[], Awaitable[Seen]], ...] = (
        lambda: over_websocket(server, "m"),
        lambda: over_sse(server, "m"),
        lambda: over_openai(server, "m"),
        lambda: over_openai(server, "m", stream=False),
    )
    for ask in faces:
        kill(server.provider.health.breaker)
        await trial_due(server)
        assert (await ask()).end == "complete"
        assert await state(server) == WELL
    await server.nothing_held()


async def test_where_all_are_dead_each_face_says_so(make_server: MakeServer) -> None:
    async with Simulator(FAILING) as other:
        server = await make_server(
            FAILING,
            **{
                "llm.fallbacks": ["other"],
                "llm.providers.other": provider_entry(other.base_url),
            },
        )
        breakers = (server.provider_of(name).health.breaker for name in ("sim", "other"))
        with left_alone(*breakers):
            assert (await state(server), await state(server, "other")) == (DEAD, DEAD)
            refused_soon(await ask_every_face(server, "m"))

        assert not (await server.counted("provider_attempts", "provider"))
        await server.nothing_held()


async def test_where_all_limit_us_each_face_shows_the_soonest(make_server: MakeServer) -> None:
    async with Simulator(Behaviour(fail_rate=1.0, fault="retry-after-20")) as other:
        server = await make_server(
            Behaviour(fail_rate=1.0, fault="retry-after-90"),
            **{
                "llm.fallbacks": ["other"],
                "llm.providers.other": provider_entry(other.base_url),
            },
        )
        first = await over_openai(server, "m")
        ws, sse, v1, whole = await ask_every_face(server, "m")  # nobody is asked any more

        for answer in (first, v1, whole):
            assert (answer.status, answer.code) == (429, "provider_rate_limited")
            assert 10 < int(answer.headers["retry-after"]) <= 22
        for answer in (ws, sse):
            assert answer.code == "provider_rate_limited"
            assert 10 < answer.error["retry_after"] <= 22
        tries = await server.counted("provider_attempts", "provider", "outcome")
        assert tries == {("sim", "http_429"): 1, ("other", "http_429"): 1}
        over = await server.counted("failovers", "provider", "reason")
        assert over == {("sim", "provider_rate_limited"): 1 + FACES.total()}
        ends = await server.counted("requests", "code")
        assert ends == {("provider_rate_limited",): 1 + FACES.total()}
        await server.nothing_held()


@pytest.mark.parametrize("fault", ["retry-after-86400", "retry-after-absurd"])
async def test_a_day_to_retry_after_is_two_minutes_on_every_face(
    fault: str, make_server: MakeServer
) -> None:
    server = await make_server(Behaviour(fail_rate=1.0, fault=fault))

    first = await over_openai(server, "m")
    later = await ask_every_face(server, "m")

    assert server.provider.stats().pace.cooling > 100
    assert server.simulator.stats().requests == 1, "it is left alone"
    for answer in (first, *later):
        assert answer.code == "provider_rate_limited"
    for answer in (first, *later[2:]):
        assert 100 < int(answer.headers["retry-after"]) <= 120
        assert 100_000 < int(answer.headers["retry-after-ms"]) <= 120_000
    for answer in later[:2]:
        assert 100 < answer.error["retry_after"] <= 120
    await server.nothing_held()


async def test_a_provider_faster_than_its_clients_is_done_with_before_them(
    make_server: MakeServer,
) -> None:
    server = await make_server(QUICK, **{"llm.providers.sim.http_client": {**HTTP_CLIENT}})
    server.simulator.behaviour = Behaviour(ttft=0, interval=0, tokens=3000)
    body = {"model": "m", "messages": [{"role": "user", "content": "Hello"}], "stream": True}
    async with server.session.post(f"{server.v1}/chat/completions", json=body) as response:
        # It reads nothing until the provider is long done, and its place and connection free.
        await server.simulator.until(lambda stats: stats.completed == 1)
        await until(lambda: server.provider.stats().queue.inside == 0)
        pool = server.provider.stats().pool
        kept = server.owners.streams.stats().bytes
        raw = await response.read()

    assert (pool.open, pool.idle) == (1, 1)
    assert kept <= server.settings.chat.streams.max_stream_bytes
    assert raw.endswith(DONE)
    assert raw.count(b'"content"') >= 3000
    await server.nothing_held()
    assert await server.counted("provider_attempts", "outcome") == {("ok",): 1}
