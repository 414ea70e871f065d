"""The engine with a prefix cache: its slots, its time and its cache."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest

from aioserver.wings.simulator.engine import Engine, EngineOptions
from tests.support.simulator import Behaviour, Simulator
from tests.support.virtual_loop import run_virtually

OPTIONS = EngineOptions(slots=2, prefill=100.0, decode=10.0, cache=160, block=16)


def text(name: str, tokens: int) -> bytes:
    return name.encode() * (4 * tokens)


async def answered(engine: Engine, prompt: bytes, tokens: int = 0) -> int:
    async with engine.read(prompt) as cached:
        await asyncio.sleep(tokens / engine.options.decode)
    engine.wrote(prompt)
    return cached


def test_prompts_are_read_one_at_a_time_and_slots_are_taken_in_order() -> None:
    async def scene() -> list[float]:
        loop, engine = asyncio.get_running_loop(), Engine(OPTIONS)
        began = loop.time()

        async def ask(name: str) -> float:
            await answered(engine, text(name, 100), 20)
            return loop.time() - began

        return await asyncio.gather(*map(ask, "abc"))

    # One second of reading each and two of writing: the third has a slot when the first ends.
    assert run_virtually(scene()) == pytest.approx([3.0, 4.0, 6.0])


def test_what_begins_alike_is_not_read_again() -> None:
    async def scene() -> list[int]:
        engine = Engine(OPTIONS)
        counts = [await answered(engine, text("a", 64))]
        counts.append(await answered(engine, text("a", 64) + text("b", 20)))
        counts.append(await answered(engine, text("a", 64) + text("c", 20)))
        counts.append(await answered(engine, text("b", 64)))
        return counts

    assert run_virtually(scene()) == [0, 64, 64, 0]


def test_the_least_recently_used_blocks_go_first_and_a_chain_loses_its_end() -> None:
    async def scene() -> list[int]:
        engine = Engine(OPTIONS)
        for name in "ab":
            await answered(engine, text(name, 80))
        await answered(engine, text("a", 80))
        # Of 160 tokens `a` has 80 and `c` 48: what is left of `b` is its beginning.
        await answered(engine, text("c", 48))
        return [await answered(engine, text(name, 80)) for name in "ab"]

    assert run_virtually(scene()) == [80, 32]


def test_a_request_that_is_cancelled_gives_its_slot_back() -> None:
    async def scene() -> None:
        engine = Engine(OPTIONS)
        tasks = [asyncio.create_task(answered(engine, text("a", 1000), 99)) for _ in range(5)]
        await asyncio.sleep(1)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert await answered(engine, text("b", 10)) == 0

    run_virtually(scene())


@pytest.mark.parametrize(
    ("path", "extra"),
    [
        ("chat/completions", {}),
        ("responses", {}),
        ("messages", {"max_tokens": 10}),
    ],
)
async def test_usage_says_what_came_from_the_cache_in_each_form(
    path: str, extra: dict[str, int]
) -> None:
    name = "input" if path == "responses" else "messages"
    body = {"model": "m", name: [{"role": "user", "content": "x" * 4000}], **extra}
    fast = EngineOptions(prefill=1_000_000, decode=1_000_000)
    async with (
        Simulator(Behaviour(engine=fast, tokens=5)) as simulator,
        aiohttp.ClientSession() as session,
    ):
        usages = []
        for _ in range(2):
            async with session.post(f"{simulator.base_url}/{path}", json=body) as response:
                assert response.status == 200
                usages.append((await response.json())["usage"])

    def cached(usage: dict[str, dict[str, int] | int]) -> object:
        details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details")
        if isinstance(details, dict):
            return details["cached_tokens"]
        return usage["cache_read_input_tokens"]

    assert cached(usages[0]) == 0
    assert cached(usages[1]) == 992
