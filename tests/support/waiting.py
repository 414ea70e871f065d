"""Waiting for a condition, and for the event loop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

from tests.support.jumping_loop import JumpingLoop

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

T = TypeVar("T")

# Seconds that a machine which does much else may take for anything.
LATE = 90.0
# Seconds between two looks at a condition, at first.
POLL = 0.002


def patience(seconds: float) -> float:
    """How long to wait for what must happen within *seconds*, in the time of the loop that runs.

    Time that jumps stands still while anything runs; of the machine's time it may take LATE.
    """
    loop = asyncio.get_running_loop()
    return seconds if _jumps(loop) else max(seconds, LATE)


def _jumps(loop: asyncio.AbstractEventLoop) -> bool:
    return isinstance(loop, JumpingLoop) and not loop.real_time


async def until(
    holds: Callable[[], bool], within: float = LATE, state: Callable[[], object] | None = None
) -> None:
    """Wait until *holds* returns true. No other place in the tests polls: at first every 2 ms, and
    the longer it takes, the less often.

    Raises:
        AssertionError: *within* seconds have passed, or on a busy machine LATE; the message shows
            *state*.
    """
    began, most = asyncio.get_running_loop().time(), patience(within)
    while not holds():
        if (passed := asyncio.get_running_loop().time() - began) > most:
            raise AssertionError(f"it did not come true: {state() if state else holds}")
        await asyncio.sleep(max(POLL, passed / 200))


async def until_result(
    ask: Callable[[], Awaitable[T]], holds: Callable[[T], bool], within: float = LATE
) -> T:
    """Ask until *holds* is true of the result, and return that.

    Raises:
        AssertionError: *within* seconds have passed, or on a busy machine LATE; the message shows
            the last result.
    """
    began, most = asyncio.get_running_loop().time(), patience(within)
    while not holds(result := await ask()):
        if (passed := asyncio.get_running_loop().time() - began) > most:
            raise AssertionError(f"it did not come true: {result}")
        await asyncio.sleep(max(POLL, passed / 200))
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
    return not _jumps(loop) or loop.time() - since <= most
