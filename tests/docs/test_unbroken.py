"""The example that cuts its own connections, with cuts at random: exact text, one provider
call.
"""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from tests.support.simulator import Behaviour

if TYPE_CHECKING:
    from tests.support.server import RunningServer

FILE = Path(__file__).parents[2] / "examples" / "unbroken.py"
CUTS = 12


def load() -> Any:
    spec = importlib.util.spec_from_file_location("unbroken", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("transport", ["websocket", "sse", "responses"])
async def test_an_answer_survives_its_connections(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    unbroken = load()
    monkeypatch.setattr(unbroken, "AGAIN", 0)
    dice = random.Random(transport)
    client = unbroken.CLIENTS[transport]
    left = CUTS

    def every() -> int:
        nonlocal left
        left -= 1
        return dice.randint(2, 7) if left >= 0 else 1 << 30

    server.simulator.behaviour = Behaviour(ttft=0, interval=0.001, tokens=200)
    async with aiohttp.ClientSession() as session:
        whole = await client(session, f"127.0.0.1:{server.port}", "Hello")
        asked = server.simulator.stats().requests
        proxy = unbroken.FaultProxy("127.0.0.1", server.port, every)
        async with proxy.running() as address:
            answer = await client(session, address, "Hello")

    assert answer == whole
    assert proxy.cuts == CUTS
    assert server.simulator.stats().requests == asked + 1
    await server.nothing_held()
