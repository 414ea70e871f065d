"""A provider that fails and comes back, as clients see it; and one that is slower than it was."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING

from aioserver.faces import context
from aioserver.providers.breaker import CONSECUTIVE_FAILURES, FIRST_WAIT
from aioserver.providers.simulator.exchange import Behaviour
from aioserver.providers.simulator.server import Simulator
from tests.support.faces import FACES, Seen, ask_every_face, over_openai, over_sse, over_websocket
from tests.support.scripted_provider import DONE
from tests.support.server import HTTP_CLIENT, QUICK, House, provider_entry
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Make = Callable[..., Awaitable[House]]

FLAPPING = f"fault-flap-{CONSECUTIVE_FAILURES}"
FAILING = Behaviour(fail_rate=1.0, fault="status-500")
OPEN, CLOSED = 2, 0


async def state(house: House, name: str = "sim") -> int:
    """The breaker of *name*, as /metrics shows it."""
    return (await house.counted("breaker_state", "provider"))[name,]


def left_alone(house: House, name: str, seconds: float) -> None:
    """Let *name*, which is left alone already, be so for *seconds* from now on."""
    breaker = house.provider_of(name)._health.breaker
    breaker._open_until = breaker._clock() + seconds


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


async def test_a_flapping_provider_is_left_alone_and_asked_again(make_house: Make) -> None:
    house = await make_house(Behaviour(ttft=0, interval=0.02, tokens=40))
    running = asyncio.create_task(over_openai(house, "m"))
    await house.simulator.until(lambda stats: stats.tokens_sent > 2)
    house.simulator.behaviour = QUICK

    for round_ in range(1, 3):
        failed = [await over_openai(house, FLAPPING) for _ in range(CONSECUTIVE_FAILURES)]
        assert [one.status for one in failed] == [502] * CONSECUTIVE_FAILURES
        assert await state(house) == OPEN
        asked = house.simulator.stats().requests
        refused_for(await ask_every_face(house, "m"), 1.0, 1.1 * FIRST_WAIT)
        assert house.simulator.stats().requests == asked
        left_alone(house, "sim", 0.0)
        good = [await over_openai(house, FLAPPING) for _ in range(CONSECUTIVE_FAILURES)]
        assert [one.end for one in good] == ["complete"] * CONSECUTIVE_FAILURES
        assert await state(house) == CLOSED
        tries = await house.counted("provider_attempts", "outcome")
        assert tries["http_5xx",] == round_ * CONSECUTIVE_FAILURES

    assert (await running).end == "complete", "what runs is not touched"
    tries = await house.counted("provider_attempts", "outcome")
    assert tries == {
        ("http_5xx",): 2 * CONSECUTIVE_FAILURES,
        ("ok",): 2 * CONSECUTIVE_FAILURES + 1,
    }
    assert (await house.counted("rejections", "code"))["circuit_open",] == 2 * FACES.total()
    await house.nothing_held()


async def test_where_all_are_left_alone_each_face_is_told_the_soonest(make_house: Make) -> None:
    async with Simulator(FAILING) as other:
        house = await make_house(
            FAILING,
            **{
                "llm.fallbacks": ["other"],
                "llm.providers.other": provider_entry(other.base_url),
            },
        )
        for _ in range(CONSECUTIVE_FAILURES):
            seen = await over_openai(house, "m")
            assert (seen.status, seen.headers["x-should-retry"]) == (502, "false")
        assert (await state(house), await state(house, "other")) == (OPEN, OPEN)

        for first, second in ((40.0, 20.0), (20.0, 40.0)):
            left_alone(house, "sim", first)
            left_alone(house, "other", second)
            refused_for(await ask_every_face(house, f"m{first}"), 10.0, 22.0)

        tries = await house.counted("provider_attempts", "provider", "outcome")
        assert tries == {
            ("sim", "http_5xx"): CONSECUTIVE_FAILURES,
            ("other", "http_5xx"): CONSECUTIVE_FAILURES,
        }
        await house.nothing_held()


async def test_where_all_limit_us_each_face_is_told_the_soonest(make_house: Make) -> None:
    async with Simulator(Behaviour(fail_rate=1.0, fault="retry-after-20")) as other:
        house = await make_house(
            Behaviour(fail_rate=1.0, fault="retry-after-90"),
            **{
                "llm.fallbacks": ["other"],
                "llm.providers.other": provider_entry(other.base_url),
            },
        )
        first = await over_openai(house, "m")
        ws, sse, v1, whole = await ask_every_face(house, "m")  # nobody is asked any more

        for one in (first, v1, whole):
            assert (one.status, one.code) == (429, "provider_rate_limited")
            assert 10 < int(one.headers["retry-after"]) <= 22
        for one in (ws, sse):
            assert one.code == "provider_rate_limited"
            assert 10 < one.error["retry_after"] <= 22
        tries = await house.counted("provider_attempts", "provider", "outcome")
        assert tries == {("sim", "http_429"): 1, ("other", "http_429"): 1}
        over = await house.counted("failovers", "provider", "reason")
        assert over == {("sim", "provider_rate_limited"): 1 + FACES.total()}
        ends = await house.counted("requests", "code")
        assert ends == {("provider_rate_limited",): 1 + FACES.total()}
        await house.nothing_held()


async def test_a_provider_faster_than_its_clients_is_done_with_before_them(
    make_house: Make,
) -> None:
    house = await make_house(QUICK, **{"llm.providers.sim.http_client": {**HTTP_CLIENT}})
    house.simulator.behaviour = Behaviour(ttft=0, interval=0, tokens=3000)
    body = {"model": "m", "messages": [{"role": "user", "content": "Hello"}], "stream": True}
    async with house.session.post(f"{house.v1}/chat/completions", json=body) as response:
        # It reads nothing until the provider is long done, and its place and connection free.
        await house.simulator.until(lambda stats: stats.completed == 1)
        await until(lambda: house.provider.stats().queue.inside == 0)
        pool = house.provider.stats().pool
        kept = house.app[context.STREAMS].stats().bytes
        raw = await response.read()

    assert (pool.open, pool.idle) == (1, 1)
    assert kept <= house.settings.chat.streams.max_stream_bytes
    assert raw.endswith(DONE)
    assert raw.count(b'"content"') >= 3000
    await house.nothing_held()
    assert await house.counted("provider_attempts", "outcome") == {("ok",): 1}


async def test_a_429_under_load_lets_nobody_in_before_its_time(make_house: Make) -> None:
    limits = {**HTTP_CLIENT, "max_retries": 3, "queue_timeout": 2.0}
    house = await make_house(
        Behaviour(fail_rate=1.0, fault="retry-after-90"),
        **{"llm.providers.sim.http_client": limits},
    )
    first = await over_openai(house, "m")

    many = await asyncio.gather(
        *(over_openai(house, "m") for _ in range(20)),
        *(over_websocket(house, "m", f"ws-{number}") for number in range(20)),
        *(over_sse(house, f"m{number}") for number in range(5)),
    )

    assert {one.code for one in (first, *many)} == {"provider_rate_limited"}
    assert house.simulator.stats().requests == 1, "no wave: nobody else is let through"
    ends = await house.counted("requests", "face", "code")
    assert ends == Counter(
        {
            (face, "provider_rate_limited"): count
            for face, count in (("openai", 21), ("websocket", 20), ("sse", 5))
        }
    )
    await house.nothing_held()
