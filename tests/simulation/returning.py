"""Coming back for the rest of an answer: after a connection that broke, and after leaving."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tests.simulation.patience import GONE, Left

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.simulation.client import Client

# Times that a client comes back.
RETURNS = 5


async def come_back(
    client: Client, read: Callable[[int], Awaitable[None]], end: Callable[[], str]
) -> None:
    """Let *client* `read(attempt)` until there is an *end*, if it has the habit to return.

    Raises:
        Left: the client has left for good.
        ClientError, OSError, EOFError: its last connection broke.
    """
    for attempt in range(RETURNS + 1):
        try:
            await read(attempt)
        except (Left, *GONE):
            if not client.has("return") or attempt == RETURNS:
                raise
        if client.outcome or end():
            client.outcome = client.outcome or end()
            return
        await asyncio.sleep(client.dice.uniform(0.0, 3.0))
