"""Timers as the stricter of asyncio's loop and uvloop has them: what relies on the other fails
(tests/event-loops.md).

uvloop counts whole milliseconds, so that a timer may fire half of one early, and does so here
whenever it may. One that comes to nothing has a handle without `when`. It fires at its own time
here: in virtual time none would pass, however often the loop turns.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


class BriefTimer(asyncio.TimerHandle):
    """The handle of a timer of less than half a millisecond, whose time nobody can ask for."""

    when = property()  # to read it is an AttributeError


def strict_timer(
    loop: asyncio.AbstractEventLoop,
    when: float,
    callback: Callable[..., Any],
    args: tuple[Any, ...],
    context: Any,
) -> tuple[float, asyncio.TimerHandle]:
    """Return the time at which a timer of *loop* fires that was to fire at *when*, and its
    handle.
    """
    delay = when - loop.time()
    if not math.isfinite(delay):
        return when, asyncio.TimerHandle(when, callback, args, loop, context)
    if (milliseconds := round(delay * 1000)) <= 0:
        return when, BriefTimer(when, callback, args, loop, context)
    when = min(when, loop.time() + milliseconds / 1000)
    return when, asyncio.TimerHandle(when, callback, args, loop, context)


class StrictLoop(asyncio.BaseEventLoop):
    """An event loop whose timers are such."""

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., Any], *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        """Call *callback* at the time *when*, as `strict_timer` says."""
        self._check_closed()  # type: ignore[attr-defined]
        _, timer = strict_timer(self, when, callback, args, context)
        heapq.heappush(self._scheduled, timer)  # type: ignore[attr-defined]
        # As asyncio's own `call_at`: it counts those that are cancelled.
        timer._scheduled = True  # type: ignore[attr-defined]  # noqa: SLF001
        return timer

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., Any], *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        """Call *callback* in *delay* seconds, as `call_at` does."""
        return self.call_at(self.time() + delay, callback, *args, context=context)
