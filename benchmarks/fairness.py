"""Who gets how much of a provider while others wait for it.

    python benchmarks/fairness.py bound            random histories against the bound: a minute
    python benchmarks/fairness.py shares [TREE]…   two callers on one engine, over sockets
    python benchmarks/fairness.py batch            a chat beside 10,000 batch requests, in virtual time

`bound`: how far two callers, and two flows of one, get apart at most, as a part of what
limits/fair_queue.py allows (tests/support/fair_model.py). `shares`: a caller with prompts of 100
tokens and one with prompts of 5,000 both keep requests waiting, until 1,000 have ended; what they
have had is counted by what the engine reports. `batch`: when the first token of a chat comes,
with and without the batch.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import aiohttp
from process import free_port

from aioserver.auth.callers import Caller
from aioserver.config import settings
from aioserver.limits.estimate import Estimate
from aioserver.providers.attempt import Attempt
from aioserver.providers.provider import Provider
from aioserver.providers.request import CHAT, ProviderRequest
from aioserver.wings.simulator.engine import Engine, EngineOptions
from tests.support.fair_model import History
from tests.support.scripted_provider import LIMITS
from tests.support.virtual_loop import run_virtually

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parents[1]
JSON = {"content-type": "application/json"}
CALLERS = {"short": 100, "long": 5000}
PLACES, WAITING, STARTS = 4, 12, 1000
CONFIG = """
auth:
  keys:
    - {{name: short, key_env: SHORT_KEY, max_concurrent: 100, requests_per_minute: 100000}}
    - {{name: long, key_env: LONG_KEY, max_concurrent: 100, requests_per_minute: 100000}}
    - {{name: admin, key_env: ADMIN_KEY, admin: true}}
chat:
  websocket: {{host: 127.0.0.1, port: {port}}}
llm:
  active: engine
  providers:
    engine:
      base_url: http://127.0.0.1:{engine}/v1
      model: m
      http_client: {{max_connections: 20, concurrent_requests: {places}, queue_size: 200,
                    requests_per_minute: 1000000, max_keepalive: 20,
                    keepalive_expiry: 60.0, max_retries: 2, pool_timeout: 300.0, backoff_factor: 0.5,
                    connect_timeout: 5.0,
                    write_timeout: 60.0, queue_timeout: 300.0, read_timeout: 300.0}}
"""


def bound(seeds: int) -> None:
    """Print how much of the bound random histories need."""
    callers, flows = 0.0, 0.0
    for seed in range(seeds):
        history = History(seed)
        history.run()
        callers, flows = (
            max(callers, history.ratio[0]),
            max(flows, history.ratio[1]),
        )
        if max(history.ratio) > 1:
            sys.exit(f"seed {seed} passes the bound: {history.ratio}")
    print(f"{seeds} seeds: callers need {callers:.2f} of the bound, flows {flows:.2f}")


@contextlib.contextmanager
def process(command: list[str], tree: Path, folder: str) -> Iterator[None]:
    """Run *command* of the version in *tree* while the block lasts."""
    environ = {
        **os.environ,
        **{f"{name.upper()}_KEY": f"{name}-key-{'x' * 32}" for name in (*CALLERS, "admin")},
        "PYTHONPATH": str(tree),
    }
    with (Path(folder) / f"{command[0]}.log").open("w") as log:
        running = subprocess.Popen(
            [sys.executable, "-m", "aioserver", *command],
            env=environ,
            cwd=folder,
            stdout=log,
            stderr=log,
        )
        try:
            yield
        finally:
            running.terminate()
            running.wait(20)


async def shares(tree: Path) -> None:
    """Print what two callers get of one engine, by the version in *tree*."""
    with tempfile.TemporaryDirectory() as folder:
        port, engine = free_port(), free_port()
        config = Path(folder) / "config.yaml"
        config.write_text(CONFIG.format(port=port, engine=engine, places=PLACES))
        options = f"slots={PLACES},prefill=40000,decode=400,cache=65536,block=16"
        with (
            process(
                ["provider", "--port", str(engine), "--engine", options, "--tokens", "20"],
                tree,
                folder,
            ),
            process(["serve", "--config", str(config)], tree, folder),
        ):
            async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
                await _ready(session)
                await _share(session, tree)


async def _ready(session: aiohttp.ClientSession) -> None:
    deadline = time.monotonic() + 30
    while True:
        with contextlib.suppress(aiohttp.ClientError):
            async with session.get("/health") as answer:
                if answer.status == 200:
                    return
        if time.monotonic() > deadline:
            sys.exit("the server does not start")
        await asyncio.sleep(0.1)


async def _share(session: aiohttp.ClientSession, tree: Path) -> None:
    dice, begun = random.Random(1), time.monotonic()
    cost, starts = dict.fromkeys(CALLERS, 0), dict.fromkeys(CALLERS, 0)
    over = asyncio.Event()

    async def client(name: str) -> None:
        while not over.is_set():
            # No two begin alike: nothing comes from the engine's cache.
            text = dice.randbytes(2 * CALLERS[name]).hex()
            body = {"model": "m", "messages": [{"role": "user", "content": text}]}
            headers = {"Authorization": f"Bearer {name}-key-{'x' * 32}"}
            async with session.post("/v1/chat/completions", json=body, headers=headers) as answer:
                usage = (await answer.json())["usage"]
            details = usage.get("prompt_tokens_details") or {}
            if over.is_set():
                return
            starts[name] += 1
            work = usage["prompt_tokens"] - details.get("cached_tokens", 0)
            cost[name] += work + 2 * usage["completion_tokens"]
            if sum(starts.values()) == STARTS:
                over.set()

    tasks = [asyncio.ensure_future(client(name)) for name in CALLERS for _ in range(WAITING)]
    admin = {"Authorization": f"Bearer admin-key-{'x' * 32}"}
    await asyncio.sleep(1.0)
    async with session.get("/stats", headers=admin) as answer:
        provider = (await answer.json())["providers"]["engine"]
    await over.wait()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    shown = {name: provider.get(name) for name in ("in_flight", "limit", "waiting")}
    print(f"{tree}: /stats {json.dumps(shown)}")
    print(f"  starts {starts}, cost {cost}, in {time.monotonic() - begun:.1f} s")
    print(f"  cost, long to short: {cost['long'] / max(1, cost['short']):.2f}")


class EngineProvider(Provider):
    """A provider whose exchange is an engine's time; *place* counts its places."""

    def __init__(self, engine: Engine, places: int) -> None:
        limits = replace(
            LIMITS,
            max_connections=places,
            max_keepalive=places,
            concurrent_requests=places,
            queue_size=30_000,
            queue_timeout=3600.0,
            read_timeout=3600.0,
        )
        entry = settings.Provider(
            name="engine", base_url="http://engine:9/v1", model="m", http_client=limits
        )
        self._time = asyncio.get_running_loop().time
        super().__init__(entry, entry.base_url, max_response_bytes=1 << 20, clock=self._time)
        self.engine = engine
        self.batch_started = 0
        self._dice = random.Random(5)

    async def exchange(self, attempt: Attempt) -> None:
        """Read the prompt, and write the answer."""
        attempt.pool = self.pools.pool
        attempt.sending()
        request = attempt.request
        request.record.outcome.sent_at = self._time()
        self.batch_started += request.batch
        assert request.estimate is not None
        prompt = self._dice.randbytes(4 * request.estimate.prompt)
        async with self.engine.read(prompt):
            await asyncio.sleep(1 / self.engine.options.decode)
            request.record.first_event_at = self._time()
            await asyncio.sleep(request.estimate.answer / self.engine.options.decode)
        attempt.head_received(200, JSON).feed(b"{}")


async def chat(places: int, users: int, batch: int) -> tuple[list[float], int]:
    """Return when the first tokens of a chat of *users* have come, beside *batch* requests that
    wait, and how many of those have started.
    """
    # The chat is the same with and without the batch.
    dice, talk, loop = random.Random(3), random.Random(4), asyncio.get_running_loop()
    engine = Engine(EngineOptions(slots=places, prefill=20_000, decode=40, cache=1024))
    provider = EngineProvider(engine, places)

    async def ask(caller: Caller, prompt: int, answer: int) -> float:
        request = ProviderRequest(CHAT, lambda *_: b"{}", streamed=False, caller=caller)
        request.estimate = Estimate(prompt, prompt, answer)
        began = loop.time()
        with contextlib.suppress(AssertionError):
            await provider.run(Attempt(provider, request, None))
        return request.record.first_event_at - began

    night, web = Caller("night", batch=True), Caller("web")
    waiting = [
        loop.create_task(ask(night, dice.randint(50, 500), dice.randint(50, 400)))
        for _ in range(batch)
    ]
    await asyncio.sleep(60.0)
    first: list[float] = []

    async def user(turns: list[tuple[float, int, int]]) -> None:
        for pause, prompt, answer in turns:
            await asyncio.sleep(pause)
            first.append(await ask(web, prompt, answer))

    turns = [
        [
            (talk.uniform(1.0, 20.0), talk.randint(200, 4000), talk.randint(50, 400))
            for _ in range(160 // users)
        ]
        for _ in range(users)
    ]
    await asyncio.gather(*map(user, turns))
    started = provider.batch_started
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    await provider.close()
    return first, started


def p90(values: list[float]) -> float:
    """Return the 90th percentile."""
    return sorted(values)[len(values) * 9 // 10]


def main() -> None:
    """Run a command."""
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=("bound", "shares", "batch"))
    parser.add_argument("tree", nargs="*", type=Path, default=[HERE])
    parser.add_argument("--seeds", type=int, default=1000)
    given = parser.parse_args()
    if given.command == "bound":
        bound(given.seeds)
    elif given.command == "shares":
        for tree in given.tree:
            asyncio.run(shares(tree.resolve()))
    else:
        for places, users in ((20, 1), (50, 4), (100, 8)):
            results: list[Any] = [
                run_virtually(chat(places, users, batch)) for batch in (0, 10_000)
            ]
            alone, beside = (p90(first) for first, _ in results)
            print(
                f"{places} places, a chat of {users}: first token p90 {alone:.2f} s alone, "
                f"{beside:.2f} s beside 10,000, of which {results[1][1]} have started: "
                f"{beside / alone:.2f}"
            )


if __name__ == "__main__":
    main()
