"""Waiting for a condition, and for the event loop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


async def until(
    holds: Callable[[], bool], within: float = 10.0, state: Callable[[], object] | None = None
) -> None:
    """Wait until *holds* returns true. No other place in the tests polls.

    Raises:
        AssertionError: *within* seconds have passed; the message shows *state*.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + within
    while not holds():
        if loop.time() > end:
            raise AssertionError(f"it did not come true: {state() if state else holds}")
        await asyncio.sleep(0.002)


async def ticks(count: int = 4) -> None:
    """Let the event loop turn *count* times: what is ready runs, and so does what it makes ready."""
    for _ in range(count):
        await asyncio.sleep(0)
