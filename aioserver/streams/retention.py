"""Retention: which entries of a log are discarded, and which of its readers are late.

Beyond `max_stream_bytes` the oldest entries go, though never the newest. Where no client can come back,
those go that every reader has passed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aioserver.streams.flow import RESUME_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aioserver.streams.contracts import Reader
    from aioserver.streams.entries import Entry
    from aioserver.streams.flow import Log


def discard(log: Log, count: int = 0) -> int:
    """Discard the oldest *count* entries of *log*, those passed, and what is beyond its bound.

    Return the bytes that are free now; readers that have not seen what is gone are still to be dropped.
    """
    passed = log.offset + count
    if log.window <= 0 and log.readers:
        passed = max(passed, min([reader.next_index for reader in log.readers]))
    count, freed = discardable(log.entries, passed - log.offset, log.bytes - log.max_bytes)
    if count:
        del log.entries[:count]
        log.offset += count
    return freed


def discardable(entries: Sequence[Entry], passed: int, excess: int) -> tuple[int, int]:
    """Return how many of the oldest *entries* to discard, and their bytes.

    The first *passed* of them go, and more until *excess* bytes are freed, though never the newest.
    """
    count, freed = 0, 0
    while len(entries) - count > 1 or (len(entries) > count and count < passed):
        if count >= passed and freed >= excess:
            break
        freed += entries[count].size
        count += 1
    return count, freed


def late(entries: Sequence[Entry], offset: int, reader: Reader) -> bool:
    """Return whether *reader* is far behind: by more than it gets in one write, the newest entry aside."""
    size, index = 0, len(entries) - 1
    while index > max(reader.next_index - offset, 0) and size <= RESUME_BYTES:
        index -= 1
        size += entries[index].size
    return size > RESUME_BYTES
