"""An event loop in virtual time: nothing sleeps, since its clock jumps to the next timer.

Its timers are those of strict_timers.py.
"""

from __future__ import annotations

import asyncio
import functools
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from tests.support.strict_timers import StrictLoop

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

P = ParamSpec("P")
T = TypeVar("T")
# When a run begins: before any time of the clock of a machine that has just started, since the
# parts of a test that have no clock of their own look at that one.
START = 1.0


class VirtualLoop(StrictLoop):
    """An event loop without sockets, whose clock jumps to the next timer."""

    def __init__(self) -> None:
        super().__init__()
        self.now = START
        self._clock_resolution = 1e-9
        self._selector: Any = self

    def time(self) -> float:
        return self.now

    def select(self, timeout: float | None) -> list[Any]:
        """Be the loop's selector: let *timeout* seconds pass."""
        if timeout is None:
            raise RuntimeError("every task waits, and there is no timer")
        self.now += max(0.0, timeout)
        return []

    def get_map(self) -> dict[Any, Any]:
        """Be the loop's selector, which watches no file."""
        return {}

    def _process_events(self, event_list: list[Any]) -> None:
        assert not event_list

    def _write_to_self(self) -> None:
        raise RuntimeError("there is no other thread")


def run_virtually(main: Coroutine[Any, Any, T]) -> T:
    """Run *main* in a loop of its own, in virtual time."""
    loop = VirtualLoop()
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(main)
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        asyncio.set_event_loop(None)
        loop.close()


def virtually(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Return *test* as a test that runs in a loop of its own, in virtual time."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        run_virtually(test(*args, **kwargs))

    return run
