"""Waiting for a condition, and for the event loop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

from tests.support.jumping_loop import JumpingLoop

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

T = TypeVar("T")


async def until(
    holds: Callable[[], bool], within: float = 30.0, state: Callable[[], object] | None = None
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


async def until_result(
    ask: Callable[[], Awaitable[T]], holds: Callable[[T], bool], within: float = 30.0
) -> T:
    """Ask until *holds* is true of the result, and return that.

    Raises:
        AssertionError: *within* seconds have passed; the message shows the last result.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + within
    while not holds(result := await ask()):
        if loop.time() > end:
            raise AssertionError(f"it did not come true: {result}")
        await asyncio.sleep(0.002)
    return result


async def ticks(count: int = 4) -> None:
    """Let the event loop turn *count* times: what is ready runs, and so does what it makes
    ready.
    """
    for _ in range(count):
        await asyncio.sleep(0)


def within(most: float, since: float) -> bool:
    """Whether *most* seconds at most have passed since the loop's time *since*, if its time jumps.

    Of the machine's time nothing can be said: it may be busy.
    """
    loop = asyncio.get_running_loop()
    passed = loop.time() - since
    return not isinstance(loop, JumpingLoop) or loop.real_time or passed <= most
