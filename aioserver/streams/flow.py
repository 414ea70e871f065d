"""Flow control: where nobody can come back, a provider is read no faster than its client reads.

A log that a client can come back to takes the answer at the provider's speed, so that the provider's
place is soon free. With a window of 0 that would only lose what the client has not read, so reading
from the provider pauses instead: TCP's own flow control then reaches from the client to the provider.

A pause costs the provider's place, so that there is none while a request waits for it
(providers/backpressure.py). `send_timeout` ends a client that reads nothing at all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aioserver.streams.contracts import Reader, Source
    from aioserver.streams.entries import Entry

# Unread bytes of a log at which reading pauses, and at which it goes on: as much as a socket's buffers
# hold, and what a writer writes at once.
PAUSE_BYTES, RESUME_BYTES = 1 << 18, 1 << 16


def regulate(source: Source, unread: int, max_bytes: int) -> None:
    """Pause *source*, or let it go on, for a log with *unread* bytes, of which it keeps *max_bytes*."""
    # A small log pauses well before its bound, which would drop the client.
    if unread > min(PAUSE_BYTES, max_bytes // 2):
        source.pause()
    elif unread <= min(RESUME_BYTES, max_bytes // 8):
        source.resume()


def late(entries: Sequence[Entry], offset: int, reader: Reader) -> bool:
    """Return whether *reader* is far behind: by more than it gets in one write, the newest entry aside."""
    size, index = 0, len(entries) - 1
    while index > max(reader.next_index - offset, 0) and size <= RESUME_BYTES:
        index -= 1
        size += entries[index].size
    return size > RESUME_BYTES


def unread_bytes(entries: Sequence[Entry], offset: int, readers: Sequence[Reader]) -> int:
    """Return about how many bytes of *entries*, at most PAUSE_BYTES and one entry, no reader has passed.

    The reader that is ahead counts: a slow reader costs the others nothing. *offset* is the index
    of the first entry.
    """
    ahead = max([reader.next_index for reader in readers], default=offset) - offset
    size, index = 0, len(entries)
    while index > max(ahead, 0) and size <= PAUSE_BYTES:
        index -= 1
        size += entries[index].size
    return size
