"""Clients that come back at whatever instance, over a network whose connections break off: no
event is lost or doubled.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.chat import ENDS, chat, resume
from tests.support.instances import World, instances
from tests.support.server import PACED

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.instances import Instance

CLIENTS = 8
# Errors after which a client comes back.
AGAIN = {"server_shutdown", "instance_unavailable"}


async def wander(every: list[Instance], rng: random.Random, request_id: str) -> list[Any]:
    """Ask, leave after some events, and come back anywhere, up to the end; return all events."""
    events: list[Any] = []
    for attempt in range(200):
        async with rng.choice(every).server.connect() as ws:
            if events and rng.random() < 0.8:
                await ws.send_json(resume(request_id, events[-1]["event_id"]))
                skip = 0
            else:
                await ws.send_json(chat(request_id, f"Hello {request_id}"))
                skip = len(events)
            # A client that leaves before its request was sent ends it.
            left = rng.randint(0 if events else 2, 30)
            while left or attempt > 20:
                frame = await ws.receive_json(timeout=20)
                if "event_id" not in frame:
                    assert frame["chunk"].get("code") in {None, *AGAIN}, frame
                    if frame["status"] in ENDS:
                        break
                elif skip:
                    skip -= 1
                    assert frame == events[frame["event_id"] - 1]
                else:
                    events.append(frame)
                    if frame["status"] in ENDS:
                        return events
                    left -= 1
        await asyncio.sleep(rng.random() * 0.05)
    raise AssertionError(f"{request_id} has no end")


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=[pytest.mark.stress] * (seed > 1)) for seed in range(40)]
)
async def test_clients_may_come_back_anywhere(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    world = World(random.Random(seed), broken=0.3)
    async with instances(tmp_path, 3, PACED, world) as every:
        answers = await asyncio.gather(
            *(wander(every, random.Random(rng.random()), f"r{n}") for n in range(CLIENTS))
        )
        requests = sum(instance.requests for instance in every)

    for events in answers:
        assert [event["event_id"] for event in events] == list(range(1, len(events) + 1))
        assert events[-1]["status"] == "complete", f"{seed=}"
        assert len(events) > 35
    assert requests == CLIENTS, f"{seed=}"
