"""The SQLite file of conversations: its tables and their versions.

The file is in WAL mode, so that readers and the writer of several processes do not wait for each other, with
`synchronous=NORMAL`: a turn that was committed survives a process that is killed at any moment. A machine that loses its
power may lose the last turns before that, but not the file. Text that is deleted is overwritten (`secure_delete`).

`PRAGMA user_version` is the version of the tables. A file of an older version is brought to the newest by the steps of
`MIGRATIONS`, in one transaction. A file of a newer version, or of another program, stays as it is.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING

from aioserver.gateway.sqlite.troubles import Broken, trouble, trouble_of

if TYPE_CHECKING:
    from collections.abc import Iterator

# "aios": marks the file as ours (https://sqlite.org/pragma.html#pragma_application_id).
APPLICATION_ID = 0x61696F73
# Seconds for which a write waits for the lock of another process, and a read.
WRITE_WAIT, READ_WAIT = 2.0, 0.25
# Seconds between two tries to switch a new file to WAL.
AGAIN = 0.01
# Bytes of a file that is checked as a whole when it is opened; it takes about a second.
MAX_CHECKED = 1 << 28

# Texts come last, so that what only counts need not read them.
_VERSION_1 = """
CREATE TABLE conversations (
    id INTEGER PRIMARY KEY,
    caller TEXT NOT NULL,
    name TEXT NOT NULL,
    address TEXT NOT NULL,
    updated REAL NOT NULL,
    size INTEGER NOT NULL DEFAULT 0,
    UNIQUE (caller, name)
);
CREATE INDEX listed ON conversations (caller, address, updated);
CREATE INDEX oldest ON conversations (updated);
CREATE TABLE turns (
    id INTEGER PRIMARY KEY,
    conversation INTEGER NOT NULL REFERENCES conversations ON DELETE CASCADE,
    ended REAL NOT NULL,
    question_tokens INTEGER NOT NULL,
    answer_tokens INTEGER NOT NULL,
    size INTEGER NOT NULL,
    question TEXT NOT NULL,
    answer TEXT NOT NULL
);
CREATE INDEX turns_of ON turns (conversation);
CREATE INDEX ended ON turns (ended);
CREATE TRIGGER turn_kept AFTER INSERT ON turns BEGIN
    UPDATE conversations SET size = size + NEW.size WHERE id = NEW.conversation;
END;
CREATE TRIGGER turn_deleted AFTER DELETE ON turns BEGIN
    UPDATE conversations SET size = size - OLD.size WHERE id = OLD.conversation;
END;
"""
# Deletions, of a conversation or (name '') of all of a caller's at an address, for answers that run meanwhile.
_VERSION_2 = """
CREATE TABLE deletions (
    caller TEXT NOT NULL,
    address TEXT NOT NULL,
    name TEXT NOT NULL,
    at REAL NOT NULL,
    PRIMARY KEY (caller, address, name)
) WITHOUT ROWID;
"""
# Each step leaves what the version before it reads and writes: processes of both are at the file while workers are replaced.
MIGRATIONS = (_VERSION_1, _VERSION_2)
VERSION = len(MIGRATIONS)
# In one statement: another process may make the tables meanwhile.
_WHAT = """
SELECT user_version, application_id, (SELECT count(*) FROM sqlite_schema)
FROM pragma_user_version, pragma_application_id
"""
# For each connection.
PRAGMAS = ("PRAGMA foreign_keys = ON", "PRAGMA synchronous = NORMAL", "PRAGMA secure_delete = ON")


def prepare(path: str, *, check: bool = True, clear: bool = False) -> tuple[int, int]:
    """Make the file *path*, or bring it to the newest version; return its device and inode.

    *check*: look for damage in all of it. *clear*: delete all conversations. It blocks, for seconds if another process is at the file.

    Raises:
        Broken: the file cannot be used. It stays as it is.
    """
    try:
        _make(path)
        with contextlib.closing(_connect(path)) as connection:
            _migrate(connection, path)
            if check:
                _check(connection, path)
            if clear:
                with _transaction(connection):
                    connection.execute("DELETE FROM conversations")
                    connection.execute("DELETE FROM deletions")
        return identity(path)
    except (OSError, sqlite3.Error) as fault:
        raise Broken(trouble_of(fault, path) or trouble("io", path, fault)) from fault


def identity(path: str) -> tuple[int, int]:
    """Return device and inode of the file *path*.

    Raises:
        OSError: there is none.
    """
    found = os.stat(path)  # noqa: PTH116 - its result is all that is used
    return found.st_dev, found.st_ino


def _make(path: str) -> None:
    """Make an empty file that only its owner can read, unless there is a file already."""
    for left in (f"{path}-wal", f"{path}-shm"):
        if not Path(path).exists() and Path(left).exists():
            # It belongs to the file that was there, and SQLite would put what it has into the new one.
            raise Broken(trouble("gone", path, f"{left} is still there"))
    # Not opened if it is there: closing it would drop the locks that this process has on it
    # (https://sqlite.org/howtocorrupt.html, 2.2).
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))
    if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116
        what = "it is a folder" if Path(path).is_dir() else "it is no file"
        raise Broken(trouble("unreachable", path, what))


def _connect(path: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=WRITE_WAIT, isolation_level=None)
    try:
        for pragma in PRAGMAS:
            connection.execute(pragma)
    except BaseException:
        connection.close()
        raise
    return connection


def _migrate(connection: sqlite3.Connection, path: str) -> None:
    """Bring the tables to the newest version."""
    if _version(connection, path) == 0:
        # Only before there is a table.
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
    mode = _write_ahead(connection)
    if mode != "wal":
        raise Broken(trouble("io", path, "its file system has no shared memory for WAL"))
    if _version(connection, path) == VERSION:
        return
    with _transaction(connection):
        # Another process may have done it meanwhile.
        for script in MIGRATIONS[_version(connection, path) :]:
            for statement in _statements(script):
                connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {VERSION}")


def _write_ahead(connection: sqlite3.Connection) -> str:
    """Switch the file to WAL; return the mode in which it is then."""
    end = time.monotonic() + WRITE_WAIT
    while True:
        try:
            (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
            return str(mode)
        except sqlite3.OperationalError as fault:
            # SQLite does not wait for a lock here, which another process may have that makes the file as well.
            if fault.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                raise
        time.sleep(AGAIN)


def _check(connection: sqlite3.Connection, path: str) -> None:
    if os.stat(path).st_size <= MAX_CHECKED:  # noqa: PTH116
        (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise Broken(trouble("corrupt", path, verdict))


def _version(connection: sqlite3.Connection, path: str) -> int:
    """Return the version of the tables; 0: there are none yet.

    Raises:
        Broken: the tables are not ours, or newer.
    """
    version, application, tables = connection.execute(_WHAT).fetchone()
    if (tables or version) and application != APPLICATION_ID:
        raise Broken(trouble("foreign", path))
    if version > VERSION:
        raise Broken(trouble("newer", path, f"version {version}, at most {VERSION}"))
    return int(version)


def _statements(script: str) -> Iterator[str]:
    """Yield the statements of *script*; not `executescript`, which commits first."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
