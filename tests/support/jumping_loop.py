"""An event loop with real sockets, in whose time nothing is waited for: when all is idle, its
clock jumps.

Time stands still while anything runs, so a busy machine makes no timeout come early. When no
socket is ready the next timer is due at once. What a thread or another process does takes real
time, though: while one of them works, the clock does not jump, but goes as the machine's does. A
test that is never idle until a deadline has passed needs the mark `real_time`, and so does one
that waits for a clock of the kernel.

Its timers are those of strict_timers.py.

This is the "autojump clock" of the library trio, with asyncio's loop and sockets of the machine.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple, Unpack

from tests.support.strict_timers import StrictLoop

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from concurrent.futures import Executor

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")

# Real seconds without a ready socket after which all is idle. The kernel passes bytes on at once
# on loopback, but on a busy machine it may be interrupted.
IDLE = 0.003
# Seconds that each turn of the loop takes, so that no two moments are the same.
TURN = 1e-5

_real = time.monotonic


class _Clock:
    """The time of the loop that runs, if it is one that jumps."""

    def __init__(self) -> None:
        self.running: JumpingLoop | None = None

    def __call__(self) -> float:
        loop = self.running
        return _real() if loop is None else loop.now


_clock = _Clock()


def install() -> None:
    """Let `time.monotonic` tell the time of the loop that runs: before anything takes it by
    name.
    """
    time.monotonic = _clock


def block(seconds: float) -> None:
    """Block the event loop that runs."""
    loop = _clock.running
    if loop is None:
        time.sleep(seconds)
    else:
        loop.now += seconds


class JumpingLoop(StrictLoop, asyncio.SelectorEventLoop):
    """The loop. Its `now` is in seconds, and begins with the time of the machine."""

    def __init__(self) -> None:
        self.now = _real()
        # Threads that work for it.
        self.working = 0
        # Whether another process takes part.
        self.real_time = False
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        return self.now

    def run_forever(self) -> None:
        before, _clock.running = _clock.running, self
        try:
            super().run_forever()
        finally:
            _clock.running = before

    def run_in_executor(
        self,
        executor: Executor | None,
        func: Callable[[Unpack[Arguments]], T],
        *args: *Arguments,
    ) -> asyncio.Future[T]:
        """Run *func* in a thread; the clock does not jump before it has ended."""
        self.working += 1
        future = super().run_in_executor(executor, func, *args)
        future.add_done_callback(self._worked)
        return future

    def _worked(self, _future: object) -> None:
        self.working -= 1

    async def shutdown_default_executor(self, *timeout: Any) -> None:
        """Wait for the threads, in real time."""
        self.real_time = True
        await super().shutdown_default_executor(*timeout)

    async def subprocess_exec(self, *args: Any, **kwargs: Any) -> Any:
        """Start a process, which lives in real time, and so does the loop from now on."""
        self.real_time = True
        return await super().subprocess_exec(*args, **kwargs)


class _JumpingSelector(selectors.BaseSelector):
    """A selector that lets the time of *loop* pass."""

    def __init__(self, loop: JumpingLoop) -> None:
        self._loop = loop
        self._inner = selectors.DefaultSelector()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        loop = self._loop
        loop.now += TURN
        ready = self._inner.select(0)
        if ready or (timeout is not None and timeout <= 0):
            return ready
        began = _real()
        if timeout is None or loop.working or loop.real_time:
            ready = self._inner.select(timeout)
            loop.now += _real() - began
            return ready
        ready = self._inner.select(min(timeout, IDLE))
        if not ready:
            loop.now += timeout
        return ready

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._inner.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._inner.unregister(fileobj)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._inner.modify(fileobj, events, data)

    def get_key(self, fileobj: Any) -> selectors.SelectorKey:
        return self._inner.get_key(fileobj)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._inner.get_map()

    def close(self) -> None:
        self._inner.close()
