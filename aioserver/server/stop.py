"""The request that this process ends: by a signal, by its parent, or because the parent is
gone.

    serves → retired → ends

A process whose siblings go on retires first: it accepts nothing more, and keeps its answers.
"""

from __future__ import annotations

import asyncio
import logging
import os

logger = logging.getLogger("aioserver.serve")


class Stop:
    """Whether this process was asked to end, and how.

    Each request sets *asked*. *now* is set by a request after which running answers have
    `shutdown_timeout` at most. *orphaned*: whether the parent is gone.
    """

    def __init__(self) -> None:
        self.asked, self.now = asyncio.Event(), asyncio.Event()
        self.orphaned = False
        self._signalled = False

    def by_signal(self) -> None:
        """End; a second signal ends the process at once."""
        if self._signalled:
            os._exit(1)
        self._signalled = True
        self._end()

    def by_parent(self) -> None:
        """Retire, since others take over; a second call ends the retirement."""
        if self.asked.is_set():
            self.now.set()
        self.asked.set()

    def by_lifeline(self, lifeline: int) -> None:
        """End, since the parent is gone."""
        asyncio.get_running_loop().remove_reader(lifeline)
        logger.warning("the parent process is gone")
        self.orphaned = True
        self._end()

    def _end(self) -> None:
        self.asked.set()
        self.now.set()
