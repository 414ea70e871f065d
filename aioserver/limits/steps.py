"""Work in steps, each in a turn of the event loop of its own, so that nobody waits for the whole
of it.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Generator

T = TypeVar("T")


async def in_turns(steps: Generator[None, None, T]) -> T:
    """Take *steps*, each in a turn of the event loop of its own, and return their result."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            result: T = stop.value
            return result
        await asyncio.sleep(0)
