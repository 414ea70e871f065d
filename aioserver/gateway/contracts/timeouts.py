"""Waits for a server or another instance, in which the time does not count by which our own event
loop was late.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

# The lateness of a timer, in seconds, above which the event loop counts as late, and the most
# seconds by which an answer is then awaited longer.
LATE, MAX_LONGER = 0.01, 1.0


class Timer:
    """Calls *on_end* after *seconds*. Time by which our own event loop was late does not count.
    Otherwise a busy instance could take the server, or another instance, for away, although the
    answer has arrived and only waits in a buffer.
    """

    def __init__(self, seconds: float, on_end: Callable[[], object]) -> None:
        self._loop = loop = asyncio.get_running_loop()
        self._seconds, self._on_end = seconds, on_end
        due = loop.time() + seconds
        self._last = due + MAX_LONGER
        self._timer = loop.call_at(due, self._look, due)

    def cancel(self) -> None:
        """Call nothing; a second call does nothing."""
        self._timer.cancel()

    def _look(self, due: float) -> None:
        now = self._loop.time()
        if now - due < LATE or now >= self._last:
            self._on_end()
        else:
            due = now + self._seconds
            self._timer = self._loop.call_at(due, self._look, due)


@asynccontextmanager
async def timeout(seconds: float) -> AsyncIterator[Callable[[], None]]:
    """Do as `asyncio.timeout`, with a `Timer`. Yield a function that ends the time at once.

    Raises:
        TimeoutError: the block has not ended in time.
    """
    scope = asyncio.timeout(None)

    def end() -> None:
        if not scope.expired():
            # A time in the past is now.
            scope.reschedule(0.0)

    try:
        async with scope:
            timer = Timer(seconds, end)
            try:
                yield end
            finally:
                timer.cancel()
    except TimeoutError:
        if scope.expired():
            raise TimeoutError(f"no answer within {seconds:g} s") from None
        raise


def awaited(writing: asyncio.Future[Any], seconds: float) -> asyncio.Future[None]:
    """Return a future that is done when *writing* is, or after *seconds*, by a `Timer`: see
    `Keeper.keep`.
    """
    # Not *writing* itself: a task that awaits a future cancels it when it is cancelled.
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def tell(_writing: object = None) -> None:
        if not done.done():
            done.set_result(None)

    timer = Timer(seconds, tell)
    writing.add_done_callback(tell)
    done.add_done_callback(lambda _done: timer.cancel())
    return done
