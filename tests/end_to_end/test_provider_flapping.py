"""A provider that fails and comes back, as clients see it; and one that is slower than it was."""

from __future__ import annotations

import asyncio
from collections import Counter

from aioserver.providers.breaker import CONSECUTIVE_FAILURES, FIRST_WAIT
from aioserver.providers.simulator.exchange import Behaviour
from aioserver.providers.simulator.server import Simulator
from tests.support.faces import FACES, Seen, ask_every_face, over_openai, over_sse, over_websocket
from tests.support.scripted_provider import DONE
from tests.support.server import HTTP_CLIENT, QUICK, MakeServer, RunningServer, provider_entry
from tests.support.waiting import until

FLAPPING = f"fault-flap-{CONSECUTIVE_FAILURES}"
FAILING = Behaviour(fail_rate=1.0, fault="status-500")
OPEN, CLOSED = 2, 0


async def state(server: RunningServer, name: str = "sim") -> int:
    """The breaker of *name*, as /metrics shows it."""
    return (await server.counted("provider_state", "provider"))[name,]


def left_alone(server: RunningServer, name: str, seconds: float) -> None:
    """Let the breaker of *name*, which is open, stay open for *seconds* from now on."""
    server.provider_of(name).health.breaker.leave_alone(seconds)


def refused_for(seen: list[Seen], low: float, high: float) -> None:
    """Each face says `circuit_open` and when to come back."""
    ws, sse, *openai = seen
    assert [one.code for one in seen] == ["circuit_open"] * 4
    for one in (ws, sse):
        assert low <= one.error["retry_after"] <= high
        assert one.error["retryable"]
    for one in openai:
        assert (one.status, one.headers.get("x-should-retry")) == (503, None)
        assert one.headers["x-aioserver-attempts"] == "0"
        assert low <= int(one.headers["retry-after"]) < high + 1


async def test_a_flapping_provider_is_left_alone_and_asked_again(make_server: MakeServer) -> None:
    server = await make_server(Behaviour(ttft=0, interval=0.02, tokens=40))
    running = asyncio.create_task(over_openai(server, "m"))
    await server.simulator.until(lambda stats: stats.tokens_sent > 2)
    server.simulator.behaviour = QUICK

    for round_ in range(1, 3):
        failed = [await over_openai(server, FLAPPING) for _ in range(CONSECUTIVE_FAILURES)]
        assert [one.status for one in failed] == [502] * CONSECUTIVE_FAILURES
        assert await state(server) == OPEN
        asked = server.simulator.stats().requests
        refused_for(await ask_every_face(server, "m"), 1.0, 1.1 * FIRST_WAIT)
        assert server.simulator.stats().requests == asked
        left_alone(server, "sim", 0.0)
        good = [await over_openai(server, FLAPPING) for _ in range(CONSECUTIVE_FAILURES)]
        assert [one.end for one in good] == ["complete"] * CONSECUTIVE_FAILURES
        assert await state(server) == CLOSED
        tries = await server.counted("provider_attempts", "outcome")
        assert tries["http_5xx",] == round_ * CONSECUTIVE_FAILURES

    assert (await running).end == "complete", "what runs is not touched"
    tries = await server.counted("provider_attempts", "outcome")
    assert tries == {
        ("http_5xx",): 2 * CONSECUTIVE_FAILURES,
        ("ok",): 2 * CONSECUTIVE_FAILURES + 1,
    }
    assert (await server.counted("rejections", "code"))["circuit_open",] == 2 * FACES.total()
    await server.nothing_held()


async def test_where_all_breakers_are_open_each_face_shows_the_soonest(
    make_server: MakeServer,
) -> None:
    async with Simulator(FAILING) as other:
        server = await make_server(
            FAILING,
            **{
                "llm.fallbacks": ["other"],
                "llm.providers.other": provider_entry(other.base_url),
            },
        )
        for _ in range(CONSECUTIVE_FAILURES):
            seen = await over_openai(server, "m")
            assert (seen.status, seen.headers["x-should-retry"]) == (502, "false")
        assert (await state(server), await state(server, "other")) == (OPEN, OPEN)

        for first, second in ((40.0, 20.0), (20.0, 40.0)):
            left_alone(server, "sim", first)
            left_alone(server, "other", second)
            refused_for(await ask_every_face(server, f"m{first}"), 10.0, 22.0)

        tries = await server.counted("provider_attempts", "provider", "outcome")
        assert tries == {
            ("sim", "http_5xx"): CONSECUTIVE_FAILURES,
            ("other", "http_5xx"): CONSECUTIVE_FAILURES,
        }
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

        for one in (first, v1, whole):
            assert (one.status, one.code) == (429, "provider_rate_limited")
            assert 10 < int(one.headers["retry-after"]) <= 22
        for one in (ws, sse):
            assert one.code == "provider_rate_limited"
            assert 10 < one.error["retry_after"] <= 22
        tries = await server.counted("provider_attempts", "provider", "outcome")
        assert tries == {("sim", "http_429"): 1, ("other", "http_429"): 1}
        over = await server.counted("failovers", "provider", "reason")
        assert over == {("sim", "provider_rate_limited"): 1 + FACES.total()}
        ends = await server.counted("requests", "code")
        assert ends == {("provider_rate_limited",): 1 + FACES.total()}
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


async def test_a_429_under_load_lets_nobody_in_before_its_time(make_server: MakeServer) -> None:
    limits = {**HTTP_CLIENT, "max_retries": 3, "queue_timeout": 2.0}
    server = await make_server(
        Behaviour(fail_rate=1.0, fault="retry-after-90"),
        **{"llm.providers.sim.http_client": limits},
    )
    first = await over_openai(server, "m")

    many = await asyncio.gather(
        *(over_openai(server, "m") for _ in range(20)),
        *(over_websocket(server, "m", f"ws-{number}") for number in range(20)),
        *(over_sse(server, f"m{number}") for number in range(5)),
    )

    assert {one.code for one in (first, *many)} == {"provider_rate_limited"}
    assert server.simulator.stats().requests == 1, "no wave: nobody else is let through"
    ends = await server.counted("requests", "face", "code")
    assert ends == Counter(
        {
            (face, "provider_rate_limited"): count
            for face, count in (("openai", 21), ("websocket", 20), ("sse", 5))
        }
    )
    await server.nothing_held()
