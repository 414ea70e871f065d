"""How long a client waits, and how it ends otherwise than well."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Self

import aiohttp

from tests.simulation.clock import Clock

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

# What is raised where a connection breaks.
GONE = (aiohttp.ClientError, ConnectionError, TimeoutError, EOFError)

# Seconds between two looks at most.
MOST_UNSEEN = 60.0


class Left(Exception):
    """The client has left, as it wanted to."""


class Patience:
    """Raises TimeoutError in its `with`, once nothing was `heard` for so many *seconds* as are
    asked for now. Once a stream has begun, something is heard in each *quiet* seconds.

    Not asyncio.timeout: it would set a timer for each event that is heard.
    """

    def __init__(self, seconds: Callable[[], float], quiet: Callable[[], float]) -> None:
        self._seconds = seconds
        self.quiet = quiet
        self._heard_at = 0.0
        self._over = False
        self._task: asyncio.Task[object]
        self._timer: asyncio.TimerHandle

    def heard(self) -> None:
        """Note that something was heard."""
        self._heard_at = Clock.now

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._heard_at = Clock.now
        self._look()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._timer.cancel()
        if self._over and kind is asyncio.CancelledError:
            self._task.uncancel()
            raise TimeoutError(f"nothing was heard for {self._seconds()} s") from exc

    def _look(self) -> None:
        rest = self._heard_at + self._seconds() - Clock.now
        if rest > 0:
            # It may be asked for less meanwhile.
            rest = min(rest, MOST_UNSEEN)
            self._timer = asyncio.get_running_loop().call_later(rest, self._look)
        else:
            self._over = True
            self._task.cancel()
