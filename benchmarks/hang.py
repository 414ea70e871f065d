"""What clients of a cluster notice while its Redis or Valkey server hangs (SIGSTOP).

    python benchmarks/hang.py                 # 10 s, a minute in all
    python benchmarks/hang.py --seconds 20

Three instances share 12 places of a provider, and 12 clients ask again at once, each with an id and
a conversation of its own. Every second it prints the answers, the faults, and the places in use at
the least, on average and at the most.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import aiohttp
from elsewhere import ROOT, instance

from tests.support.redis_server import RedisServer
from tests.support.referee import Referee

INSTANCES, PLACES, CLIENTS = 3, 12, 12
# The seconds of an answer, those before and after the fault, and those until all have joined.
ANSWER, AROUND, JOINED = 0.2, 5, 5.0


class Clients:
    """Clients that ask the instances at *urls* again and again."""

    def __init__(self, session: aiohttp.ClientSession, urls: list[str]) -> None:
        self._session, self._urls = session, urls
        self._names = itertools.count()
        self.answered = self.faults = 0
        self.slowest = 0.0

    async def ask(self, number: int) -> None:
        """Ask, as client *number*, until cancelled."""
        url, name = self._urls[number % len(self._urls)], f"c{number}"
        while True:
            body = {"request_id": f"r{next(self._names)}", "text": "hi", "conversation_id": name}
            began = time.monotonic()
            async with self._session.post(url, json=body) as response:
                text = await response.read()
            self.slowest = max(self.slowest, time.monotonic() - began)
            if b"event: complete" in text:
                self.answered += 1
            else:
                self.faults += 1
                await asyncio.sleep(0.01)


async def row(clients: Clients, referee: Referee, text: str) -> None:
    """Print what one second was like."""
    clients.answered = clients.faults = referee.peak = 0
    clients.slowest = 0.0
    inside = []
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        inside.append(referee.inside)
        await asyncio.sleep(0.01)
    print(
        f"{text:8} {clients.answered:8} {clients.faults:7} {clients.slowest:10.2f} "
        f"{min(inside):6} {sum(inside) / len(inside):6.1f} {referee.peak:6}",
        flush=True,
    )


async def run(seconds: int, tree: Path) -> None:
    """Let the server hang for so long, and print a row for each second."""
    client = {
        "max_connections": 4 * PLACES,
        "concurrent_requests": PLACES,
        "max_retries": 0,
        "requests_per_minute": 1_000_000,
    }
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        redis = stack.enter_context(RedisServer(folder))
        referee = await stack.enter_async_context(Referee(ANSWER))
        provider = {"base_url": referee.url, "model": "m", "http_client": client}
        settings = {
            "llm": {"active": "sim", "providers": {"sim": provider}},
            "cluster": {"redis_url": redis.url},
            "logging": {"level": "ERROR"},
        }
        config = folder / "config.yaml"
        config.write_text(json.dumps(settings))
        urls = [
            (await stack.enter_async_context(instance(tree, config)))[1] for _ in range(INSTANCES)
        ]
        session = await stack.enter_async_context(aiohttp.ClientSession())
        await asyncio.sleep(JOINED)
        clients = Clients(session, urls)
        tasks = [asyncio.create_task(clients.ask(number)) for number in range(CLIENTS)]
        print("           answers  faults  slowest s  least   mean   most")
        for second in range(AROUND):
            await row(clients, referee, f"before {second}")
        redis.pause()
        for second in range(seconds):
            await row(clients, referee, f"hangs {second}")
        redis.go_on()
        for second in range(AROUND):
            await row(clients, referee, f"after {second}")
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks)


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=10)
    parser.add_argument("--tree", type=Path, default=ROOT)
    given = parser.parse_args()
    asyncio.run(run(given.seconds, given.tree.resolve()))


if __name__ == "__main__":
    main()
