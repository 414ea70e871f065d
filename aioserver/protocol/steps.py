"""Long work in steps: coroutines that pause between two steps, so that the event loop serves
others.

Awaited in a task, a pause lets the event loop run; `at_once` needs no loop, and skips the pauses.
One pass of C over a body of 16 MiB is a step, which takes 70 ms at most, and usually some 10 ms.
When Python reads many values one by one, a few of them make a step.
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Coroutine, Generator, Sized

T = TypeVar("T")
# Bytes from which on a pass over them is a step of its own.
LARGE_BYTES = 1 << 20
# Values, and bytes of them, that are read one by one in one step.
STEP_VALUES, STEP_VALUE_BYTES = 64, 1 << 16


@types.coroutine
def pause() -> Generator[None]:
    """Let the event loop run, as `asyncio.sleep(0)` does, before the next step."""
    yield


async def pause_after(data: Sized) -> None:
    """Pause after a pass over *data*, if that takes long."""
    if len(data) > LARGE_BYTES:
        await pause()


def at_once(steps: Coroutine[object, None, T]) -> T:
    """Run all *steps*, which await nothing but `pause`, and return their result."""
    while True:
        try:
            steps.send(None)
        except StopIteration as stop:
            result: T = stop.value
            return result


class Steps:
    """The steps in which values are read one by one."""

    def __init__(self) -> None:
        self._taken = 0

    def over(self, size: int) -> bool:
        """Return whether to pause, now that a value of *size* bytes was read."""
        self._taken += size + STEP_VALUE_BYTES // STEP_VALUES
        over = self._taken >= STEP_VALUE_BYTES
        if over:
            self._taken = 0
        return over

    async def taken(self, size: int) -> None:
        """Pause if that is due, since a value of *size* bytes was read."""
        if self.over(size):
            await pause()
