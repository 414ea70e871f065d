"""`/client.js` over connections that are cut at random: the exact text, asked of the provider
once.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import pytest

from tests.support.client_page import page_elsewhere, run, unwatched
from tests.support.fault_proxy import FaultProxy
from tests.support.simulator import Behaviour
from tests.support.waiting import until

if TYPE_CHECKING:
    from playwright.async_api import Page

    from tests.support.server import MakeServer

CUTS = 40
# A browser has six connections to a host at most.
ANSWERS = 5
# Slow enough that a browser has read most of it when a connection ends: fetch drops what it has
# not yet given out.
LONG = Behaviour(ttft=0, interval=0.004, tokens=300)
ROUND = """
  window.clients ??= {};
  const client = (clients[a] ??= new aio.Client(a, { transport: b }));
  return await Promise.all(Array.from({ length: c }, () => read(client.chat("Hello"))));
"""


@pytest.mark.timeout(200)
@pytest.mark.parametrize("transport", ["websocket", "sse"])
async def test_each_token_comes_once_over_connections_that_are_cut(
    make_server: MakeServer, page: Page, transport: str
) -> None:
    """Takes seconds: so many connections of a browser, in the time of the machine."""
    server = await make_server(LONG)
    dice = random.Random(transport)

    def allowance() -> int | None:
        # An answer is cut once its provider was asked: before, leaving ends it, since it costs
        # nothing yet.
        if proxy.cuts >= CUTS or server.simulator.stats().requests < asked:
            return None
        # Now and then no event comes through: the cut is in the handshake, the head, or before it.
        return dice.randint(0, 600) if dice.random() < 0.05 else dice.randint(1000, 3000)

    def all_asked() -> bool:
        return server.simulator.stats().requests == asked

    asked = 1
    async with (
        FaultProxy(server.port, allowance) as proxy,
        # Chromium reports a head that was cut as an error of the page.
        unwatched(page) as mine,
    ):
        # No waits: a cut behind a burst makes fetch drop it, and some cuts in succession bring no
        # event.
        await mine.add_init_script("Math.random = () => 0")
        async with page_elsewhere(mine, server.base):
            (whole,) = await run(mine, ROUND, server.base, transport, 1)
            while proxy.cuts < CUTS:
                asked += ANSWERS
                async with asyncio.TaskGroup() as tasks:
                    reading = tasks.create_task(run(mine, ROUND, proxy.url, transport, ANSWERS))
                    await until(all_asked)
                    await proxy.cut()

                for outcome in reading.result():
                    assert outcome["error"] is None, outcome
                    assert outcome["text"] == whole["text"]
                    assert outcome["numbers"] == [*range(1, len(outcome["numbers"]) + 1)]
                assert all_asked()

            assert whole["text"]
            await run(mine, "for (const client of Object.values(clients)) client.close();")
    await server.nothing_held()
