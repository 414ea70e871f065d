"""The turns of this process that are not written yet, in a small file beside the one of conversations.

An answer does not wait until its turn is committed, and the process may be killed within that moment, or while the file of
conversations is locked or full. So a turn is also copied here, before its client knows that the answer is complete: one
pwrite(2) into the kernel's memory, some microseconds, of which nothing is waited for. What a killed process leaves in its
spool, the next one that opens the storage writes. Each process has a spool of its own, and holds a lock on it.

    record*  a zero            record = length, CRC-32, bytes
"""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from struct import Struct, error
from typing import TYPE_CHECKING
from zlib import crc32

from aioserver.wings.conversations.turn_locks import SUPPORTED, lock

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# Bytes of a spool; what does not fit is not protected.
SIZE = 1 << 22
# Spools of one file: more than processes that have it open.
MOST = 256
_HEAD = Struct("<II")
_END = bytes(_HEAD.size)
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)


class Spool:
    """The spool of one storage, whose file of conversations is *path*.

    Always: what was added since the last `clear` is in the file, as far as it had room.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._descriptor = -1
        self._file = self._path
        self._used = 0

    def open(self) -> list[bytes]:
        """Take a spool that no process has; return the records that other processes have left in theirs. It blocks.

        What they have left is copied to our spool. Without a spool nothing is protected.
        """
        if not SUPPORTED or self._descriptor >= 0:
            return []
        left: list[bytes] = []
        for file in self._spools():
            descriptor = _take(file)
            if descriptor < 0:
                continue
            records = list(records_in(os.pread(descriptor, SIZE, 0)))
            left += records
            if self._descriptor < 0:
                self._descriptor, self._file = descriptor, file
                self._rewrite(records)
            else:
                for record in records:
                    self.add(record)
                with suppress(OSError):
                    file.unlink()
                os.close(descriptor)
        return left

    def add(self, record: bytes) -> None:
        """Copy *record*, if there is room."""
        data = _HEAD.pack(len(record), crc32(record)) + record
        if self._descriptor >= 0 and self._used + len(data) + len(_END) <= SIZE:
            with suppress(OSError):
                if os.pwrite(self._descriptor, data + _END, self._used) == len(data) + len(_END):
                    self._used += len(data)

    @property
    def crowded(self) -> bool:
        """Whether there is not much room left."""
        return 2 * self._used > SIZE

    def clear(self, records: Iterable[bytes] = ()) -> None:
        """Forget all but *records*, without a trace."""
        if self._used and self._descriptor >= 0:
            with suppress(OSError):
                os.pwrite(self._descriptor, bytes(self._used + len(_END)), 0)
            self._rewrite(records)

    def close(self, *, empty: bool) -> None:
        """Give the spool back: away with it if it is *empty*, else it is for the next process."""
        if self._descriptor >= 0:
            if empty:
                with suppress(OSError):
                    self._file.unlink()
            os.close(self._descriptor)
            self._descriptor = -1

    def _rewrite(self, records: Iterable[bytes]) -> None:
        self._used = 0
        for record in records:
            self.add(record)

    def _spools(self) -> list[Path]:
        """Return the spools that are there, and names of new ones."""
        name = f"{self._path.name}-spool-"
        there = sorted(self._path.parent.glob(f"{name}[0-9]*"))[:MOST]
        new = (self._path.with_name(f"{name}{number}") for number in range(MOST))
        return [*there, *[file for file in new if file not in there][:1]]


def _take(file: Path) -> int:
    """Return a descriptor of *file*, which we have locked; -1 if another process has it, or it cannot be used."""
    try:
        descriptor = os.open(file, _FLAGS, 0o600)
    except OSError:
        return -1
    with suppress(OSError):
        # The process that had it may have removed it meanwhile.
        if lock(descriptor, fcntl.F_WRLCK, 0) and os.path.samestat(
            os.fstat(descriptor), file.stat()
        ):
            return descriptor
    os.close(descriptor)
    return -1


def records_in(data: bytes) -> Iterator[bytes]:
    """Yield the records in *data*, up to its end, or to one that is not whole."""
    place = 0
    while True:
        try:
            length, checksum = _HEAD.unpack_from(data, place)
        except error:
            return
        place += _HEAD.size
        record = data[place : place + length]
        if not length or len(record) < length or crc32(record) != checksum:
            return
        yield record
        place += length
