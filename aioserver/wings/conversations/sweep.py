"""The sweep: what the bounds ask of conversations that nobody goes on with, step by step.

Between two steps turns are written, by this process and by others. Each process sweeps; what one has deleted, the others do
not find any more.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any

from aioserver.wings.conversations import sqlite_file

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.wings.conversations.connections import Connections, Statement
    from aioserver.wings.conversations.turn import Bounds

# Seconds between two sweeps, and the turns after which one comes sooner.
PERIOD, TURNS = 60.0, 1_000
# Bounds on what one step deletes, or looks at.
STEP = 500
# Bounds on all conversations of a file together; beyond, those that rested for longest are deleted.
MAX_CONVERSATIONS, MAX_BYTES = 100_000, 1 << 30
# Conversations that go at once where the bytes are too many: they may be large.
FEW = 10
# Seconds for which a deletion is remembered: no answer runs for longer.
DELETION_SECONDS = 86_400.0
NO_BOUND = 1 << 62


class Sweep:
    """When to sweep, and how far the sweep is; *clock* returns Unix time."""

    def __init__(self, bounds: Bounds, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._turns = 0
        # By chance, so that several processes do not sweep at once.
        self.due = self._loop.time() + random.uniform(0, PERIOD)  # noqa: S311
        self.bounds = bounds
        # The id of the last conversation that was cut to these bounds; None: all are.
        self._trimmed: int | None = 0

    def apply(self, bounds: Bounds) -> None:
        """Use new bounds, and sweep soon if they have changed."""
        if bounds != self.bounds:
            self.bounds, self._trimmed = bounds, 0
            self.due = self._loop.time()

    def oldest(self) -> float:
        """Return the time before which a turn is too old, in Unix time."""
        # SQLite has no infinite literal, but any number will do.
        return max(-1e300, self._clock() - self.bounds.seconds)

    def values(self) -> dict[str, Any]:
        """Return the bounds as values of statements."""
        return {
            "oldest": self.oldest(),
            "tokens": min(self.bounds.tokens, NO_BOUND),
            "turns": min(self.bounds.turns, NO_BOUND),
            "size": self.bounds.size,
        }

    def count(self, turns: int) -> None:
        """Note that so many *turns* were written."""
        self._turns += turns
        if self._turns >= TURNS:
            self.due = self._loop.time()

    async def step(self, connections: Connections) -> None:
        """Do a step, if one is due.

        Raises:
            sqlite3.Error: the file cannot be used.
        """
        if self._loop.time() < self.due:
            return
        if self._trimmed is not None:
            await self._trim(connections, self._trimmed)
        elif await self._delete(connections):
            await connections.shrink()
            self.due, self._turns = self._loop.time() + PERIOD, 0

    async def _trim(self, connections: Connections, first: int) -> None:
        """Cut the next conversations to the bounds."""
        (newest,) = await connections.ask(sqlite_file.LAST_CONVERSATION)
        last = first + STEP
        values = {**self.values(), "first": first, "last": last}
        await connections.write([(sqlite_file.TRIM_RANGE, values)])
        if self._trimmed == first:
            self._trimmed = last if last < newest else None

    async def _delete(self, connections: Connections) -> bool:
        """Delete what is too old or too much; return whether nothing is left."""
        number, size = await connections.ask(sqlite_file.TOTALS)
        limit = {"limit": STEP, "oldest": self.oldest()}
        step: list[Statement] = [
            (sqlite_file.EXPIRE, limit),
            (sqlite_file.DROP_EMPTY, limit),
            (sqlite_file.FORGET_DELETIONS, {"before": self._clock() - DELETION_SECONDS}),
        ]
        over = number - MAX_CONVERSATIONS
        if over > 0 or size > MAX_BYTES:
            step.append((sqlite_file.DROP_OLDEST, {"limit": min(STEP, max(over, FEW))}))
        expired, emptied, *_ = await connections.write(step)
        return expired < STEP and emptied < STEP and len(step) == 3
