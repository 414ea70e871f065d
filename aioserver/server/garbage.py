"""When garbage is collected in a process that serves: often, and little at a time.

A young pass of CPython's garbage collector looks at the objects that have been made since the pass
before it and are alive. The interpreter makes one when 10,000 more objects have been made than
freed. While as many streams end as begin, the one number hardly runs ahead of the other: a pass
came after some seconds, when most objects of all streams were young, and blocked the event loop
for 15 to 38 ms at 750 streams. So there is a young pass every tenth of a second.

Passes over older objects are rare: what has outlived a young pass is freed with its stream, without
any pass. They come by time, and by number: where memory grows by many objects, these may be cycles
that have outlived a young pass.
"""

from __future__ import annotations

import gc
import sys
from time import perf_counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

# What the interpreter's own passes begin at. They bound what a burst of requests makes between two
# of ours; shorter than (50_000, 20, 20), they halve the p99 gap of WebSocket streams.
YOUNG, OLD = 10_000, 50
# In place of OLD where ours are counted as well: they come ten times a second.
RARELY = 10_000
# Seconds between two young passes, and the share of the time that they take about.
PERIOD, SHARE = 0.1, 0.005
# Seconds between them at most, and after one that has found next to nothing, which takes so many
# seconds: an idle server wakes up for little else.
LONGEST, NOTHING = 0.5, 2e-5
# Seconds between two passes over older objects.
OLDER = 600.0
# Blocks of memory, one for about each object, by which it has grown when the next such pass is made
# before that: some 20 MB, and a pass over so many objects takes a few milliseconds.
GROWN = 200_000


def begin() -> None:
    """Begin to collect garbage, but none of what there is now, in passes that fit a server.

    A full pass before would find 0.4 MB, and take 20 ms.
    """
    gc.freeze()
    gc.set_threshold(YOUNG, OLD, OLD)
    if generational():
        gc.set_threshold(YOUNG, RARELY, OLD)
    gc.enable()


def generational() -> bool:
    """Return whether each pass is over all objects of some age.

    The first releases of 3.14 look at older objects in small steps, and know no third threshold.
    """
    return gc.get_threshold()[2] > 0


class Collector:
    """Makes young passes until it is closed, and one over older objects every *older* seconds and
    where there are *grown* more blocks of memory; none where the interpreter's own are short.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, *, older: float = OLDER, grown: int = GROWN
    ) -> None:
        self._grown = grown
        # Of how many blocks the next pass over older objects is made.
        self._older_from = sys.getallocatedblocks() + grown
        self._loop = loop
        self._older = older
        self._older_at = loop.time() + older
        self._timer = loop.call_later(PERIOD, self._collect) if generational() else None

    def close(self) -> None:
        """Leave it to the interpreter."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _collect(self) -> None:
        now, began = self._loop.time(), perf_counter()
        if now < self._older_at and sys.getallocatedblocks() < self._older_from:
            gc.collect(0)
        else:
            gc.collect(1)
            self._older_at = now + self._older
            self._older_from = sys.getallocatedblocks() + self._grown
        took = perf_counter() - began
        pause = LONGEST if took < NOTHING else min(max(PERIOD, took / SHARE), LONGEST)
        self._timer = self._loop.call_later(pause, self._collect)
