"""The faults of the file of conversations, in words, and what an operator can do."""

from __future__ import annotations

import sqlite3

from aioserver.gateway.history import Trouble


class Broken(Exception):
    """The file cannot be used now."""

    def __init__(self, trouble: Trouble) -> None:
        super().__init__(trouble.text)
        self.trouble = trouble


_FREE = "Free space on its disk; conversations are written again by themselves."
_UNLOCK = "End the program that holds the file (`fuser FILE`); a backup is made by VACUUM INTO."
_RIGHTS = "Let the server's user write the file and its folder, or name another path."
_MEND = (
    "Move the file and its -wal and -shm away, or put a backup in its place: see docs/history.md."
)
_DISK = "Look at the disk, its mount and the kernel's log."
# By kind: what is wrong, and what to do.
KINDS = {
    "full": ("the disk is full", _FREE),
    "locked": ("another program holds a lock on it", _UNLOCK),
    "read_only": ("it cannot be written", _RIGHTS),
    "unreachable": ("it cannot be opened", _RIGHTS),
    "corrupt": ("it is damaged, or no SQLite file", _MEND),
    "foreign": (
        "it belongs to another program",
        "Name another file in chat.service.repository.path.",
    ),
    "newer": (
        "a newer version of aioserver has written it",
        "Run that version, or name another file in chat.service.repository.path.",
    ),
    "gone": (
        "it was moved or deleted while the server ran",
        "Move its -wal and -shm along with it; better stop the server before: see docs/history.md.",
    ),
    "slow": ("it does not answer in time", _DISK),
    "io": ("it cannot be read or written", _DISK),
}
# The kinds in which nothing of the file can be read, or trusted.
UNREADABLE = frozenset(("corrupt", "foreign", "newer", "gone", "unreachable", "slow"))
_BY_CODE = {
    sqlite3.SQLITE_FULL: "full",
    sqlite3.SQLITE_BUSY: "locked",
    sqlite3.SQLITE_LOCKED: "locked",
    sqlite3.SQLITE_PROTOCOL: "locked",
    sqlite3.SQLITE_READONLY: "read_only",
    sqlite3.SQLITE_PERM: "read_only",
    sqlite3.SQLITE_CANTOPEN: "unreachable",
    sqlite3.SQLITE_CORRUPT: "corrupt",
    sqlite3.SQLITE_NOTADB: "corrupt",
    sqlite3.SQLITE_IOERR: "io",
    sqlite3.SQLITE_NOMEM: "io",
    # A table is not as it was made.
    sqlite3.SQLITE_ERROR: "corrupt",
    sqlite3.SQLITE_SCHEMA: "corrupt",
}


def trouble(kind: str, path: str, why: object = "") -> Trouble:
    """Return the trouble of *kind* with the file *path*."""
    text, advice = KINDS[kind]
    detail = f" ({why})" if why else ""
    return Trouble(kind, f"conversations are not kept in {path}: {text}{detail}", advice)


def trouble_of(fault: BaseException, path: str) -> Trouble | None:
    """Return the trouble that *fault* tells of; None if it is about what was written, not about the file."""
    if isinstance(fault, Broken):
        return fault.trouble
    if isinstance(fault, OSError):
        return trouble("unreachable", path, fault.strerror or fault)
    if isinstance(fault, sqlite3.Error):
        code = getattr(fault, "sqlite_errorcode", None)
        # The lower byte is the primary code (https://sqlite.org/rescode.html).
        kind = None if code is None else _BY_CODE.get(code & 0xFF)
        if kind is not None:
            return trouble(kind, path, fault)
    return None
