"""A small file that programs change while others read it: it is replaced as a whole.

A change is made under a lock (flock(2)) on a file beside it, `NAME.lock`, which stays there: two
programs that change it at once lose nothing. The new content is on the disk before it gets the
file's name (rename(2)). So a reader, a crash or a killed writer finds the old content or the new
one, and never a part. Symbolic links are followed: they stay, and their target is replaced.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Seconds to wait for another program, each of which needs milliseconds, and between two attempts.
PATIENCE, LOOK = 10.0, 0.02
# The mode of a new file: it has hashes, and only its owner may read even these.
NEW_MODE = 0o600


def change(path: Path, edit: Callable[[bytes], bytes], *, new: bool = False) -> None:
    """Replace the content of the file *path* by the result of *edit*, which may raise.

    If it raises at once, not even a lock file is left. *new*: the file may be missing; its content
    is then b"".

    Raises:
        OSError: the file cannot be read or replaced; it is as it was. TimeoutError: another
            program holds the lock.
    """
    target = Path(os.path.realpath(path))
    edit(_read(target, new=new)[0])
    with _locked(target):
        content, status = _read(target, new=new)
        changed = edit(content)
        if status is None or changed != content:
            _replace(target, changed, status)


def _read(target: Path, *, new: bool) -> tuple[bytes, os.stat_result | None]:
    """Return the content and the status of *target*; b"" and None if it is missing and *new*."""
    try:
        return target.read_bytes(), target.stat()
    except FileNotFoundError:
        if not new:
            raise
        return b"", None


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Hold the lock of the file *target*."""
    lock = target.with_name(f"{target.name}.lock")
    descriptor = os.open(lock, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise TimeoutError(f"another program holds {lock}") from None
                time.sleep(LOOK)
        yield
    finally:
        os.close(descriptor)


def _replace(target: Path, content: bytes, status: os.stat_result | None) -> None:
    """Give *target* another *content*, with the owner and the mode in *status*."""
    # One name is enough under the lock, and the remains of a killed writer are overwritten.
    written = target.with_name(f"{target.name}.new")
    written.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    descriptor = os.open(written, flags, NEW_MODE)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            if status is not None:
                if (status.st_uid, status.st_gid) != (os.geteuid(), os.getegid()):
                    # Otherwise the server could not read a file that root has changed.
                    os.fchown(file.fileno(), status.st_uid, status.st_gid)
                os.fchmod(file.fileno(), stat.S_IMODE(status.st_mode))
            os.fsync(file.fileno())
        written.replace(target)
    except BaseException:
        written.unlink(missing_ok=True)
        raise
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
