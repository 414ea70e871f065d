"""Answers over connections that are cut at random: the exact text, asked of the provider once."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Literal

import pytest

from aioserver.client import Client, Processing
from tests.support.fault_proxy import FaultProxy
from tests.support.simulator import Behaviour

if TYPE_CHECKING:
    from tests.support.server import MakeServer

CUTS = 100
ANSWERS = 6
LONG = Behaviour(ttft=0, interval=0.002, tokens=300)
TRANSPORTS = ("websocket", "sse")


@pytest.mark.virtual_time
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_each_token_comes_once_over_connections_that_are_cut(
    make_server: MakeServer, transport: Literal["websocket", "sse"]
) -> None:
    # Cuts that follow each other keep a client away for longer than the shipped window.
    server = await make_server(LONG, **{"chat.streams.resume_window": 3600})
    dice = random.Random(transport)

    def allowance() -> int | None:
        if proxy.cuts >= CUTS or not server.simulator.stats().requests:
            return None
        # Now and then no event comes through: the cut is in the handshake, the head, or before it.
        return dice.randint(0, 400) if dice.random() < 0.1 else dice.randint(400, 2500)

    seen: list[list[str]] = [[] for _ in range(ANSWERS)]
    begun: list[int] = []

    async def read(client: Client, pieces: list[str]) -> None:
        async for event in client.chat("Hello").events():
            if isinstance(event, Processing):
                begun.append(len(pieces))
            elif hasattr(event, "text"):
                pieces.append(event.text)

    async with (
        FaultProxy(server.port, allowance) as proxy,
        Client(proxy.url, transport=transport, deadline=10_000) as client,
    ):
        whole = await client.chat("Hello").text()
        asked = server.simulator.stats().requests
        while proxy.cuts < CUTS:
            for pieces in seen:
                pieces.clear()
            begun.clear()
            await proxy.cut()
            await asyncio.gather(*(read(client, pieces) for pieces in seen))

            assert all("".join(pieces) == whole for pieces in seen)
            assert begun == [0] * ANSWERS
            asked += ANSWERS
            assert server.simulator.stats().requests == asked

    await server.nothing_held()
