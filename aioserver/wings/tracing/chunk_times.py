"""The times between the events of one answer, on the slow path and on the fast one
(streams/fast_path.py).

They are noted only where attempts are counted (gen_ai_metrics.py): without that no event has
another call.
"""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING

from aioserver.telemetry.counters import Histogram

if TYPE_CHECKING:
    from aioserver.telemetry.tracer import WatchedPath

# Upper bounds of histograms of seconds, as the conventions for generative AI ask for.
SECONDS = tuple(0.01 * 2**n for n in range(14))


class ChunkTimes(Histogram):
    """The seconds between the events of an answer, from its first content on."""

    __slots__ = ("_last_at",)

    def __init__(self) -> None:
        super().__init__(SECONDS)
        # The monotonic time of the newest event; 0.0 until there is one.
        self._last_at = 0.0

    def came(self, events: int) -> None:
        """Note that so many *events* have come together."""
        now = monotonic()
        if self._last_at:
            self.observe(now - self._last_at)
            self.counts[0] += events - 1
        self._last_at = now


class TimedPath:
    """Another fast path, whose events are noted in *chunks*."""

    __slots__ = ("_chunks", "_path")

    def __init__(self, path: WatchedPath, chunks: ChunkTimes) -> None:
        self._path = path
        self._chunks = chunks

    @property
    def forwarded_at(self) -> float:
        """As of the other path."""
        return self._path.forwarded_at

    @property
    def read_at(self) -> float:
        """As of the other path, which it sets."""
        return self._path.read_at

    @read_at.setter
    def read_at(self, moment: float) -> None:
        self._path.read_at = moment

    def forward(self, read: bytes) -> bool:
        """Have the other path forward *read*, which is one event; return whether it has."""
        if not self._path.forward(read):
            return False
        self._chunks.came(1)
        return True

    def close(self) -> None:
        """Close the other path."""
        self._path.close()
