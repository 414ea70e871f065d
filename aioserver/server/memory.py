"""The memory of this process: when what it no longer uses goes back to the system.

An allocator gives memory back in pieces, each once no object is left in it: Python's own in arenas
of a megabyte. So few small objects that are made under a load and outlive it keep much of its
memory. What is ours and lasts keeps numbers in arrays instead. Most others are nobody's: Python
keeps some thousand tuples, floats and dictionaries that have ended for those which come next, until
a full collection, and its cache of attributes keeps the names by which they were looked up. The C
library has holes of its own, and lets their pages go when it is asked to.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import time
from typing import TYPE_CHECKING

from aioserver.monitoring.interval import TICK

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

# Bytes of an object that has pages of its own (`mallopt` of the GNU C library), which go back to
# the system with it. By default the library raises this to the largest object that was ever freed,
# up to 32 MiB: large bodies then leave holes in its heap. An asyncio loop reads into 256 KiB, for
# which pages would be made each time; and so many bytes are free at the heap's end before they go.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
PAGES_BYTES, END_BYTES = 320 << 10, 1 << 20

# Seconds between two looks at whether something runs; the share of a core above which it does.
LOOK, BUSY = 5.0, 0.02
# Looks after the last busy one at which memory is given back: at 10 s, and again when connections
# to providers and those of clients have been closed for having nothing to do.
WHEN_IDLE = frozenset((2, 4, 8, 16, 32))
# Seconds after which it is done once more. A tick of the server makes its objects out of those of
# the last one, which Python keeps for it until a collection: in the memory of the load, for ever. In
# between it has made them anew, side by side.
AGAIN = TICK
# Connections of clients that may be open meanwhile: a collection passes over their objects, which
# takes a millisecond for a hundred of them.
MOST_CONNECTIONS = 500


def return_pages() -> None:
    """Let the C library, if it is GNU's, return the pages of large objects once they are freed."""
    # Other libraries have no such function.
    with contextlib.suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, PAGES_BYTES)
        mallopt(M_TRIM_THRESHOLD, END_BYTES)


class IdleMemory:
    """Gives back the memory of a load that is over, until it is closed.

    Always: nothing is done while *running* says that answers are under way, or *connections* that
    more than MOST_CONNECTIONS are open.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        running: Callable[[], int],
        connections: Callable[[], int],
        clock: Callable[[], float] = time.process_time,
    ) -> None:
        self._loop, self._running, self._connections = loop, running, connections
        self._clock = clock
        # How often memory was given back.
        self.times = 0
        self._cpu = clock()
        # The looks since something ran; none of the first counts.
        self._idle = max(WHEN_IDLE)
        self._timer = loop.call_later(LOOK, self._look)
        self._again: asyncio.TimerHandle | None = None

    def close(self) -> None:
        """Do nothing any more."""
        self._timer.cancel()
        if self._again is not None:
            self._again.cancel()

    def _look(self) -> None:
        self._timer = self._loop.call_later(LOOK, self._look)
        cpu = self._clock()
        busy = self._running() or cpu - self._cpu > BUSY * LOOK
        self._cpu = cpu
        self._idle = 0 if busy else self._idle + 1
        if self._idle in WHEN_IDLE and self._connections() <= MOST_CONNECTIONS:
            self.times += 1
            self.give_back()
            self._again = self._loop.call_later(AGAIN, self._give_back_again)

    def _give_back_again(self) -> None:
        if not self._running():
            self.give_back()

    def give_back(self) -> None:
        """Give back what nobody uses."""
        gc.collect()
        # Other Pythons have no such function, and other C libraries than GNU's not the second.
        with contextlib.suppress(AttributeError):
            ctypes.pythonapi.PyType_ClearCache()
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
