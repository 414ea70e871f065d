"""Signals end an answer, or the program: SIGINT (Ctrl-C), SIGTERM, and SIGHUP of a terminal that was closed.

While an answer comes, the first signal cancels its task, so that the answer ends at the server too. A second one, and any signal
at another time, is an exception.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from typing import TYPE_CHECKING, Self, TypeVar

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from types import FrameType
    from typing import Any, NoReturn

T = TypeVar("T")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """A signal came. *number* is that of the signal. *forced*: it is the second one, and work may still be under way.

    A KeyboardInterrupt, since asyncio lets no other exception of a signal handler out of its loop.
    """

    def __init__(self, number: int, *, forced: bool = False) -> None:
        super().__init__(number)
        self.number = number
        self.forced = forced


class Interrupts:
    """Takes the signals over inside a `with`, and runs the coroutines that they may end."""

    def __init__(self, runner: asyncio.Runner) -> None:
        self._runner = runner
        self._task: asyncio.Task[Any] | None = None
        self._running = False
        self._number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in SIGNALS:
            # `nohup` has SIGHUP ignored, and a shell SIGINT for what runs in the background.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *_exc: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run *work* to its end.

        Raises:
            Interrupted: a signal came, and *work* has ended, unless a second one came.
        """
        self._number, self._running = 0, True
        try:
            result = self._runner.run(self._cancellable(work))
        except asyncio.CancelledError:
            if not self._number:
                raise
            raise Interrupted(self._number) from None
        finally:
            self._running = False
        if self._number:
            # The signal came too late to cancel anything.
            raise Interrupted(self._number)
        return result

    async def _cancellable(self, work: Coroutine[Any, Any, T]) -> T:
        self._task = asyncio.current_task()
        assert self._task is not None
        if self._number:
            # The signal came before there was a task.
            self._task.cancel()
        try:
            return await work
        finally:
            self._task = None

    def _take(self, number: int, _frame: FrameType | None) -> None:
        if not self._running:
            raise Interrupted(number)
        if self._number:
            raise Interrupted(number, forced=True)
        self._number = number
        if self._task is not None:
            # Thread-safe, since that also wakes the loop, which waits for its sockets.
            self._task.get_loop().call_soon_threadsafe(self._task.cancel)


def end_by(number: int) -> NoReturn:
    """End this process by the signal *number*, as if nobody had taken it over: a shell then ends its loop, too."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    raise SystemExit(128 + number)
