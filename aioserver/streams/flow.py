"""Flow control: where nobody can come back, a provider is read no faster than its client reads.

A log that a client can come back to takes the answer at the provider's speed, so that the provider's
place is soon free. With a window of 0 that would only lose what the client has not read, so reading
from the provider pauses instead: TCP's own flow control then reaches from the client to the provider.

A pause costs the provider's place, so that there is none while a request waits for it
(providers/backpressure.py). `send_timeout` ends a client that reads nothing at all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from aioserver.streams.contracts import Reader, Source
    from aioserver.streams.entries import Entry

# Unread bytes of a log at which reading pauses, and at which it goes on: as much as a socket's buffers
# hold, and what a writer writes at once.
PAUSE_BYTES, RESUME_BYTES = 1 << 18, 1 << 16
# With several readers: entries between two counts of what is unread, and bytes of one that is counted at once.
CHECK_EVERY, CHECK_BYTES = 16, 1 << 12


class Log(Protocol):
    """A log (stream.py), as far as it is seen here; *offset* is the index of its first entry."""

    bytes: int
    entries: list[Entry]
    max_bytes: int
    offset: int
    readers: list[Reader]
    window: float


def regulate(source: Source, log: Log) -> None:
    """Pause *source*, or let it go on, as *log*, where passed entries are discarded, is read."""
    unread, max_bytes = unread_bytes(log), log.max_bytes
    # A small log pauses well before its bound, which would drop the client.
    if unread > min(PAUSE_BYTES, max_bytes // 2):
        source.pause()
    elif unread <= min(RESUME_BYTES, max_bytes // 8):
        source.resume()


def due(log: Log) -> bool:
    """Return whether the unread bytes are counted for the newest entry.

    With several readers they are for each CHECK_EVERY-th entry and for each large one, since it takes
    longer the more of them are unread. The count is then late by 64 KiB at most.
    """
    if len(log.readers) < 2 or not log.entries:
        return True
    number = log.offset + len(log.entries)
    return not number % CHECK_EVERY or log.entries[-1].size > CHECK_BYTES


def unread_bytes(log: Log) -> int:
    """Return about how many bytes no reader has passed; with several, PAUSE_BYTES and one entry at most.

    The reader that is ahead counts: a slow reader costs the others nothing.
    """
    entries = log.entries
    if len(log.readers) < 2:
        # What the only reader has passed is discarded already.
        return log.bytes
    ahead = max([reader.next_index for reader in log.readers]) - log.offset
    size, index = 0, len(entries)
    while index > max(ahead, 0) and size <= PAUSE_BYTES:
        index -= 1
        size += entries[index].size
    return size
