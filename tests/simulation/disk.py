"""The disk of a run: SQLite does its work at once, in the thread of the loop, and what comes of it
takes a moment.

aiosqlite has a thread for each connection, which would have a time of its own.
"""

from __future__ import annotations

import random
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest import mock

import aiosqlite.core

from tests.simulation.clock import Clock

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

# Seconds that a statement takes, as a rule; and at most, one of so many times.
MOMENT, LONG, SELDOM = 0.001, 0.5, 0.01


class _NoThread:
    """Stands for the thread of a connection."""

    def __init__(self, **_kwargs: Any) -> None:
        pass

    def start(self) -> None:
        """Do nothing."""

    def join(self) -> None:
        """Do nothing."""


class _Statements:
    """What a connection is to do, in order; *dice* decides how long it takes."""

    def __init__(self, dice: random.Random) -> None:
        self._dice = dice
        self._due = 0.0

    def put_nowait(self, item: tuple[asyncio.Future[Any] | None, Callable[[], Any]]) -> None:
        """Do it."""
        future, function = item
        result, error = None, None
        try:
            result = function()
        except Exception as exc:  # noqa: BLE001 - whoever waits gets it
            error = exc
        if future is None:
            return
        seconds = self._dice.uniform(0.0, MOMENT)
        if self._dice.random() < SELDOM:
            seconds = self._dice.uniform(0.0, LONG)
        self._due = max(self._due, Clock.now + seconds)
        future.get_loop().call_at(self._due, _tell, future, result, error)


def _tell(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def patches(seed: int) -> ExitStack:
    """Let SQLite be a part of the run with this *seed*, in the block."""
    dice = random.Random(f"disk {seed}")
    stack = ExitStack()
    stack.enter_context(mock.patch.object(aiosqlite.core, "Thread", _NoThread))
    stack.enter_context(
        mock.patch.object(aiosqlite.core, "SimpleQueue", partial(_Statements, dice))
    )
    return stack
