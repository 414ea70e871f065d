"""What `affinity: prefix` costs a request: reading its prompt, and choosing among 8 members.

    python benchmarks/affinity.py

Each figure is the best of many short rounds, so that others on the machine count little. A
choice is the order of the members, the look into the table, the home and the delays, the count of
the start, and the note of what was sent; attempts and places are not in it.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[1]))

from aioserver.config import settings
from aioserver.gateway.affinity import Affinity
from aioserver.gateway.groups import Group, Member
from aioserver.protocol.prefix import prefix_of
from aioserver.protocol.regions import RegionReader
from aioserver.protocol.steps import at_once
from aioserver.providers.provider import Provider
from tests.support.scripted_provider import LIMITS

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.protocol.prefix import Prefix

MEMBERS = 8
ROUNDS, SECONDS = 100, 0.003
# Messages of some 3,200 bytes each, after a system prompt of 1,000.
TURNS = (1, 3, 11, 41)
# Bodies above 256 KiB are read in steps, by the loop; these are not.
MOST_TURNS = 61


def best(work: Callable[[], object]) -> float:
    """Return the seconds that *work* takes, the least of some rounds."""
    began, times = perf_counter(), 0
    while perf_counter() - began < SECONDS:
        work()
        times += 1
    rounds = []
    for _ in range(ROUNDS):
        began = perf_counter()
        for _ in range(times):
            work()
        rounds.append((perf_counter() - began) / times)
    return min(rounds)


def body_of(turns: int) -> bytes:
    """Return the body of a conversation of so many *turns*, without markers."""
    dice = random.Random(turns)
    messages = [{"role": "system", "content": "x" * 1000}]
    for number in range(turns):
        role = "assistant" if number % 2 else "user"
        messages.append({"role": role, "content": dice.randbytes(1600).hex()})
    return json.dumps({"model": "m", "messages": messages}).encode()


def hashed(body: bytes, reader: RegionReader) -> Prefix:
    """Return the prefix of *body*, which has a prompt."""
    regions = at_once(reader.read(body))
    assert regions is not None
    return prefix_of(regions, "group")


async def main() -> None:
    """Print both tables."""
    print("| body, bytes | reading it, µs | ns a byte | once more, µs | ns a byte |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    sizes, times = [], []
    for turns in (*TURNS, MOST_TURNS):
        body = body_of(turns)
        reader, size = RegionReader(), len(body)
        first = best(lambda body=body: hashed(body, RegionReader()))  # type: ignore[misc]
        seconds = best(lambda body=body, reader=reader: hashed(body, reader))  # type: ignore[misc]
        sizes.append(size)
        times.append(seconds)
        print(f"| {size:,} ", end="")
        for each in (first, seconds):
            print(f"| {1e6 * each:.1f} | {1e9 * each / size:.2f} ", end="")
        print("|")
    slope = (times[-1] - times[0]) / (sizes[-1] - sizes[0])
    print(f"\nA byte more: {1e9 * slope:.2f} ns.\n")
    members = []
    for number in range(MEMBERS):
        name = f"e{number}"
        entry = settings.Provider(
            name=name, base_url=f"http://{name}:9/v1", model="m", http_client=LIMITS
        )
        provider = Provider(entry, entry.base_url, max_response_bytes=1 << 20)
        members.append(Member(provider))
    print(f"| body, bytes | one choice among {MEMBERS}, µs |\n| ---: | ---: |")
    for turns in TURNS:
        prefix = hashed(body_of(turns), RegionReader())
        group, homes = Group("group", members, "least_busy", "prefix"), Affinity()

        def choose(prefix: Prefix = prefix, group: Group = group, homes: Affinity = homes) -> None:
            among = group.order(group.members)
            placement = homes.place(prefix, among)
            among.sort(key=lambda member: member is not placement.home)
            group.started(among[0], among)
            homes.sent(prefix, among[0])

        print(f"| {len(body_of(turns)):,} | {1e6 * best(choose):.1f} |")
    for member in members:
        await member.provider.close()


if __name__ == "__main__":
    asyncio.run(main())
