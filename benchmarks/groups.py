"""What placement by prefix is worth: a trace of conversations on four engines with a prefix cache.

    python benchmarks/groups.py                five seeds, in virtual time
    python benchmarks/groups.py --seed 3       one

The trace is that of trace_of_chats.py: 32 users, four engines, 400 s.

The router, the gates and the lines are the server's own; the engines are the simulator's, whose
time is virtual. Beside the group the same trace goes round robin (request i to engine i mod 4, where
it waits), and to an ideal placement that knows all caches and when each place ends.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[1]))

from trace_of_chats import ENGINES, Load, Result, Trace, Turn, text_of

from aioserver.auth.callers import NO_CALLER
from aioserver.config import settings
from aioserver.config.settings import Group, Llm, Member
from aioserver.gateway import affinity
from aioserver.gateway.request import Request
from aioserver.gateway.router import Router
from aioserver.provider_errors import ProviderFault
from aioserver.providers.provider import Provider
from aioserver.providers.request import CHAT, ProviderRequest
from aioserver.wings.simulator.engine import Engine, block_hashes, count_tokens
from tests.support.scripted_provider import LIMITS
from tests.support.virtual_loop import run_virtually

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.providers.attempt import Attempt

JSON = {"content-type": "application/json"}


class EngineProvider(Provider):
    """A provider whose exchange is an engine's time."""

    def __init__(self, name: str, engine: Engine, places: int, run: Run) -> None:
        limits = replace(
            LIMITS,
            max_connections=places,
            max_keepalive=places,
            concurrent_requests=places,
            queue_size=1000,
            queue_timeout=120.0,
            read_timeout=120.0,
        )
        entry = settings.Provider(
            name=name, base_url=f"http://{name}:9/v1", model="m", http_client=limits
        )
        self._time = asyncio.get_running_loop().time
        super().__init__(entry, entry.base_url, max_response_bytes=1 << 20, clock=self._time)
        self.engine, self._run = engine, run
        self.free_at = 0.0

    async def exchange(self, attempt: Attempt) -> None:
        """Read the prompt, and write the answer."""
        attempt.pool = self.pools.pool
        attempt.sending()
        record = attempt.request.record
        record.outcome.sent_at = self._time()
        turn = self._run.turns[attempt.request]
        await self._run.answer(self, turn, lambda: setattr(record, "first_event_at", self._time()))
        attempt.head_received(200, JSON).feed(b"{}")


class Run(Trace):
    """One run of the trace with one way of placing requests."""

    def __init__(self, seed: int, load: Load, way: str) -> None:
        super().__init__(seed, load)
        self.way = way
        self.turns: dict[ProviderRequest, Turn] = {}
        self._given: set[bytes] = set()
        self._number = 0
        self._places: dict[str, asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(self.load.places)
        )
        # Of the ideal placement: who waits, and when each place ends.
        self._waiting: dict[asyncio.Future[EngineProvider], Turn] = {}
        self._end_of: dict[asyncio.Future[EngineProvider], float] = {}
        self._ends: dict[str, list[float]] = defaultdict(list)
        self.engines = [Engine(load.options) for _ in range(ENGINES)]
        self.providers = {
            f"e{number}": EngineProvider(f"e{number}", engine, load.places, self)
            for number, engine in enumerate(self.engines)
        }
        llm = Llm(
            active="group",
            models={
                "group": Group(
                    members=tuple(Member(provider=name) for name in self.providers),
                    choose="least_busy",
                    affinity="prefix",
                )
            },
            providers={name: provider.settings for name, provider in self.providers.items()},
        )
        self.routers = [
            Router(dict(self.providers), llm, alone=load.instances == 1)
            for _ in range(load.instances)
        ]

    async def answer(
        self, provider: EngineProvider, turn: Turn, first: Callable[[], None]
    ) -> None:
        """Have the engine of *provider* answer *turn*; *first* is called with its first token."""
        engine, prompt, result = provider.engine, turn.prompt, self.result
        tokens, size = count_tokens(prompt), engine.options.block
        async with engine.read(prompt) as cached:
            counts = self.counts
            blocks = block_hashes(prompt, size)
            if counts:
                result.prompt += tokens
                result.cached += cached
                known = 0
                while known < len(blocks) and blocks[known] in self._given:
                    known += 1
                result.ideal += known * size
                result.starts[provider.name] += 1
            self._given.update(blocks)
            await asyncio.sleep(1 / engine.options.decode)
            first()
            await asyncio.sleep((turn.answer_tokens - 1) / engine.options.decode)
            if self.counts:
                result.output += turn.answer_tokens
        said = [*turn.messages, {"role": "assistant", "content": self._said(turn)}]
        text = text_of(said)
        engine.wrote(text)
        self._given.update(block_hashes(text, size))

    def _said(self, turn: Turn) -> str:
        return random.Random(turn.prompt).randbytes(2 * turn.answer_tokens).hex()

    async def ask(self, turn: Turn, user: int, first: Callable[[], None]) -> str:
        """Have *turn* answered by the engine that is its way's."""
        began = self._loop.time()
        number, self._number = self._number, self._number + 1
        if self.way == "round robin":
            provider = self.providers[f"e{number % ENGINES}"]
            async with self._places[provider.name]:
                await self.answer(provider, turn, first)
        elif self.way == "ideal":
            await self._ideally(turn, first)
        else:
            body = turn.body
            request = ProviderRequest(
                CHAT, lambda _settings, _model: body, streamed=False, caller=NO_CALLER
            )
            self.turns[request] = turn
            router = self.routers[user % len(self.routers)]
            try:
                await router.call(
                    Request(router.route(None, caller=NO_CALLER), request, "openai", "r")
                )
            except ProviderFault:
                self.result.failed += 1
            self.result.first_tokens += (
                [request.record.first_event_at - began] if self.counts else []
            )
            if (start := request.outcome.start) is not None:
                self.result.homes[start.home] += 1
            del self.turns[request]
        return self._said(turn)

    async def _ideally(self, turn: Turn, first: Callable[[], None]) -> None:
        """Start the request where its first token comes first, once there is a place."""
        chosen: asyncio.Future[EngineProvider] = self._loop.create_future()
        self._waiting[chosen] = turn
        self._place_ideally()
        provider = await chosen
        try:
            await self.answer(provider, turn, first)
        finally:
            self._ends[provider.name].remove(self._end_of.pop(chosen))
            self._place_ideally()

    def _place_ideally(self) -> None:
        """Start, in order of arrival, each request whose earliest first token is at a free
        place.
        """
        now, places = self._loop.time(), self.load.places
        for chosen, turn in list(self._waiting.items()):
            blocks, tokens = block_hashes(turn.prompt, 16), count_tokens(turn.prompt)
            best: tuple[float, EngineProvider] | None = None
            for provider in self.providers.values():
                ends = self._ends[provider.name]
                place = now if len(ends) < places else min(ends)
                unknown = tokens - 16 * provider.engine._known(blocks)  # noqa: SLF001
                at = max(now, place, provider.free_at) + unknown / provider.engine.options.prefill
                if best is None or at < best[0]:
                    best = at, provider
            assert best is not None
            at, provider = best
            if len(self._ends[provider.name]) < places:
                del self._waiting[chosen]
                provider.free_at = at
                self._end_of[chosen] = at + turn.answer_tokens / provider.engine.options.decode
                self._ends[provider.name].append(self._end_of[chosen])
                chosen.set_result(provider)

    async def play(self) -> Result:
        """Run the trace."""
        await super().play()
        group = self.routers[0].groups["group"]
        self.result.held_back = group.held_back
        return self.result


def run(seed: int, load: Load, way: str) -> Result:
    """Run the trace of *seed* with *load*, placed by *way*."""

    async def scene() -> Result:
        return await Run(seed, load, way).play()

    before = affinity.PATIENCE
    affinity.PATIENCE = before * load.wrong
    try:
        return run_virtually(scene())
    finally:
        affinity.PATIENCE = before


ROWS: list[tuple[str, Load]] = [
    ("32 users", Load()),
    ("48 users", Load(users=48)),
    ("4 instances", Load(instances=4)),
    (
        "one system prompt of 4,000 tokens",
        Load(turns=(1, 3), systems=1, system_tokens=4000, first=100, later=100, places=64),
    ),
    ("c_m 4 times too large", Load(wrong=4.0)),
    ("c_m 4 times too small", Load(wrong=0.25)),
]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int)
    parser.add_argument("--row", type=int)
    given = parser.parse_args()
    seeds = [1, 2, 3, 4, 5] if given.seed is None else [given.seed]
    rows = ROWS if given.row is None else [ROWS[given.row]]
    for name, load in rows:
        print(
            f"\n{name}: hits of ideal, round robin's hits, output of round robin, p90 of ideal, "
            "most to least starts"
        )
        for seed in seeds:
            group, robin = run(seed, load, "group"), run(seed, load, "round robin")
            ideal = run(seed, load, "ideal")
            starts = [group.starts[f"e{number}"] for number in range(ENGINES)]
            print(
                f"seed {seed}: {group.hits:.3f} {robin.hits:.3f} "
                f"{group.output / max(1, robin.output):.2f} {group.p90 / max(1e-9, ideal.p90):.2f} "
                f"{max(starts) / max(1, min(starts)):.2f}  failed {group.failed}, "
                f"homes {dict(group.homes)}, held back {group.held_back}",
                flush=True,
            )


if __name__ == "__main__":
    main()
