"""Which conversations have a turn that is on its way into the file, for all processes that have it open.

A client may send its next question, to another process, before the turn that it follows is written. So a process locks a
byte of a file beside the one of conversations before it says that an answer is complete, and unlocks it when the turn is
written. The byte is made of the conversation, and the file stays empty. The locks belong to an open file description
(fcntl(2), F_OFD_SETLK): the kernel releases them when a process dies, and there are as many as storages. Where there are no
such locks, a question may miss the turn before it if it comes to another process within a moment.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
import sys
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING
from zlib import crc32

if TYPE_CHECKING:
    from aioserver.wings.conversations.queue import Key

BYTES = 1 << 24
# Seconds between two looks at a byte that another process has locked, the first and the longest: a lock tells nobody
# that it is free. And the seconds for which that is awaited.
FIRST_LOOK, LONGEST_LOOK, PATIENCE = 0.0005, 0.01, 0.5
# struct flock of Linux with 64 bits: type, whence, start, length, pid.
_FLOCK = struct.Struct("hhqqi4x")
SUPPORTED = hasattr(fcntl, "F_OFD_SETLK") and sys.platform == "linux" and sys.maxsize > 1 << 32


class TurnLocks:
    """The locks of one storage, whose file of conversations is *path*.

    Always: a byte is locked here while turns of its conversations are counted, and `open` has succeeded.
    """

    def __init__(self, path: str) -> None:
        self._path = f"{path}-turns"
        self._descriptor = -1
        self._counts: Counter[int] = Counter()

    def open(self) -> None:
        """Open the file of the locks; without it there are none."""
        if SUPPORTED and self._descriptor < 0:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            with suppress(OSError):
                self._descriptor = os.open(self._path, flags, 0o600)

    def close(self) -> None:
        """Release all locks."""
        self._counts.clear()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def add(self, key: Key) -> None:
        """Count a turn that is on its way. It never waits: where another process has the byte, that does as well."""
        if self._descriptor >= 0:
            byte = _byte(key)
            self._counts[byte] += 1
            self._set(fcntl.F_RDLCK, byte)

    def remove(self, key: Key) -> None:
        """Count it as written, or lost."""
        byte = _byte(key)
        if self._counts[byte] <= 1:
            if self._counts.pop(byte, 0):
                self._set(fcntl.F_UNLCK, byte)
        else:
            self._counts[byte] -= 1

    async def wait(self, key: Key) -> None:
        """Wait until no other process has a turn of the conversation on its way, for PATIENCE at most."""
        look, waited = FIRST_LOOK, 0.0
        while waited < PATIENCE and self._locked_elsewhere(_byte(key)):
            await asyncio.sleep(look)
            waited += look
            look = min(2 * look, LONGEST_LOOK)

    def _set(self, kind: int, byte: int) -> None:
        # Read locks: several processes may have turns on their way.
        lock(self._descriptor, kind, byte)

    def _locked_elsewhere(self, byte: int) -> bool:
        if self._descriptor < 0:
            return False
        flock = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
        try:
            found = fcntl.fcntl(self._descriptor, fcntl.F_OFD_GETLK, flock)
        except OSError:
            return False
        kind: int = _FLOCK.unpack(found)[0]
        return kind != fcntl.F_UNLCK


def lock(descriptor: int, kind: int, byte: int) -> bool:
    """Lock or unlock a byte of the file *descriptor*; return whether no other process has it."""
    try:
        flock = _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, flock)
    except OSError:
        return False
    return True


def _byte(key: Key) -> int:
    return crc32(f"{key.caller}\0{key.name}".encode("utf-8", "replace")) % BYTES
