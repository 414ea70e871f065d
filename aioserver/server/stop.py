"""The request that this process ends: by a signal, by its parent, or because the parent is
gone.
"""

from __future__ import annotations

import asyncio
import logging
import os

logger = logging.getLogger("aioserver.serve")


class Stop:
    """Whether this process was asked to end, and how.

    *hand_over*: whether other processes go on to serve the same sockets. *orphaned*: whether the
    parent is gone.
    """

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.hand_over = False
        self.orphaned = False
        self._signalled = False

    def by_signal(self) -> None:
        """End; a second signal ends the process at once."""
        if self._signalled:
            os._exit(1)
        self._signalled = True
        self.asked.set()

    def by_parent(self) -> None:
        """End, since others take over."""
        self.hand_over = not self.asked.is_set()
        self.asked.set()

    def by_lifeline(self, lifeline: int) -> None:
        """End, since the parent is gone."""
        asyncio.get_running_loop().remove_reader(lifeline)
        logger.warning("the parent process is gone")
        self.orphaned = True
        self.asked.set()
