"""A client that uploads something for a provider, and sends its last part slowly: it has a place
there meanwhile.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Self

import orjson

from tests.simulation.truth import Violation

if TYPE_CHECKING:
    from tests.simulation.client import Client

FACE = "upload"
# What is uploaded goes to the provider as it is, whatever key its client has.
PATH = "audio/transcriptions"
# Bytes that come at once, more than an upload needs for its place; then some each second, for some
# time; the rest comes at once again.
FIRST, PIECE, REST = 300_000, 500, 50_000
SECONDS = (0, 20, 60)


class _Body:
    """The pieces of an upload.

    No generator: nobody closes one whose upload breaks off.
    """

    def __init__(self, slow: int) -> None:
        self._pieces = iter((FIRST, *[PIECE] * slow, REST))

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        size = next(self._pieces, 0)
        if not size:
            raise StopAsyncIteration
        if size == PIECE:
            await asyncio.sleep(1.0)
        return bytes(size)


async def ask(client: Client) -> None:
    """Upload, and read how much has come."""
    slow = client.dice.choice(SECONDS)
    size = FIRST + slow * PIECE + REST

    headers = {**client.headers, "Content-Length": str(size), "Content-Type": "audio/wav"}
    url = f"{client.base}/v1/{PATH}"
    async with client.session.post(url, data=_Body(slow), headers=headers) as response:
        if response.status != 200:
            await client.refused(response)
            return
        answer = orjson.loads(await response.read())
    if answer != {"bytes": size}:
        raise Violation(f"of {size} bytes the provider has got {answer}")
    client.outcome = "complete"
