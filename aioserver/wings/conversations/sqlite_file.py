"""The SQLite file of conversations: its tables, their versions, its statements and its faults.

The file is in WAL mode, so that readers and the writer of several processes do not wait for each
other. With `synchronous=NORMAL` a committed turn survives a process that is killed at any moment.
A machine that loses its power may lose the last turns before that, but not the file. Deleted text
is overwritten (`secure_delete`).

`PRAGMA user_version` is the version of the tables. A file of an older version is brought to the
newest by the steps of `MIGRATIONS`, in one transaction. A file of a newer version, or of another
program, stays as it is.

This file is one concept: all use of SQLite is here, tables and statements side by side.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING

from aioserver.wings.conversations.history import Trouble
from aioserver.wings.conversations.turn import MAX_READ

if TYPE_CHECKING:
    from collections.abc import Iterator


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
# For each kind: the fault, and the remedy.
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
        (
            "Move its -wal and -shm along with it; better stop the server before: "
            "see docs/history.md."
        ),
    ),
    "slow": ("it does not answer in time", _DISK),
    "io": ("it cannot be read or written", _DISK),
}
# The kinds of faults in which no part of the file can be read, or trusted.
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
    # A table differs from its definition.
    sqlite3.SQLITE_ERROR: "corrupt",
    sqlite3.SQLITE_SCHEMA: "corrupt",
}


def trouble(kind: str, path: str, why: object = "") -> Trouble:
    """Return the trouble of *kind* with the file *path*."""
    text, advice = KINDS[kind]
    detail = f" ({why})" if why else ""
    return Trouble(kind, f"conversations are not kept in {path}: {text}{detail}", advice)


def trouble_of(fault: BaseException, path: str) -> Trouble | None:
    """Return the trouble for *fault*.

    None if it is about the written data, not about the file.
    """
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


# "aios": marks the file as ours (https://sqlite.org/pragma.html#pragma_application_id).
APPLICATION_ID = 0x61696F73
# Seconds for which a write and a read wait for the lock of another process.
WRITE_WAIT, READ_WAIT = 2.0, 0.25
# Seconds between two attempts to switch a new file to WAL.
AGAIN = 0.01
# The most bytes of a file that is checked as a whole when it is opened; it takes about a second.
MAX_CHECKED = 1 << 28

# Texts come last, so that queries that only count need not read them.
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
# Deletions, of a conversation or (name '') of all conversations of a caller at an address, for
# answers that run meanwhile.
_VERSION_2 = """
CREATE TABLE deletions (
    caller TEXT NOT NULL,
    address TEXT NOT NULL,
    name TEXT NOT NULL,
    at REAL NOT NULL,
    PRIMARY KEY (caller, address, name)
) WITHOUT ROWID;
"""
# Each step leaves the tables usable for the version before it: processes of both use the file
# while workers are replaced.
MIGRATIONS = (_VERSION_1, _VERSION_2)
VERSION = len(MIGRATIONS)
# In one statement: another process may make the tables meanwhile.
_WHAT = """
SELECT user_version, application_id, (SELECT count(*) FROM sqlite_schema)
FROM pragma_user_version, pragma_application_id
"""
# Applied to each connection.
PRAGMAS = ("PRAGMA foreign_keys = ON", "PRAGMA synchronous = NORMAL", "PRAGMA secure_delete = ON")


def prepare(path: str, *, check: bool = True, clear: bool = False) -> tuple[int, int]:
    """Make the file *path*, or bring it to the newest version; return its device and inode.

    *check*: look for damage in all of it. *clear*: delete all conversations. It blocks, for
    seconds if another process uses the file.

    Raises:
        Broken: the file cannot be used. It stays as it is.
    """
    try:
        _make(path)
        with contextlib.closing(connect(path, WRITE_WAIT)) as connection:
            _migrate(connection, path)
            if check:
                _check(connection, path)
            if clear:
                with transaction(connection):
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
            # It belongs to the earlier file, and SQLite would copy its content into the new one.
            raise Broken(trouble("gone", path, f"{left} is still there"))
    # An existing file is not opened: closing it would drop the locks that this process has on it
    # (https://sqlite.org/howtocorrupt.html, 2.2).
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))
    if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116
        what = "it is a folder" if Path(path).is_dir() else "it is no file"
        raise Broken(trouble("unreachable", path, what))


def connect(path: str, wait: float) -> sqlite3.Connection:
    """Return a connection to the file *path*, which waits for a lock for *wait* seconds.

    Raises:
        sqlite3.Error: it cannot be opened.
    """
    connection = sqlite3.connect(path, timeout=wait, isolation_level=None)
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
        # This works only before there is a table.
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
    mode = _write_ahead(connection)
    if mode != "wal":
        raise Broken(trouble("io", path, "its file system has no shared memory for WAL"))
    if _version(connection, path) == VERSION:
        return
    with transaction(connection):
        # Another process may have done it meanwhile.
        for script in MIGRATIONS[_version(connection, path) :]:
            for statement in _statements(script):
                connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {VERSION}")


def _write_ahead(connection: sqlite3.Connection) -> str:
    """Switch the file to WAL; return its resulting mode."""
    end = time.monotonic() + WRITE_WAIT
    while True:
        try:
            (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
            return str(mode)
        except sqlite3.OperationalError as fault:
            # SQLite does not wait here for a lock of another process that also makes the file.
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
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Commit the statements of the block, or none of them.

    Raises:
        sqlite3.Error: nothing is written.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")


# A turn is not kept if its conversation was deleted after its question had come.
_NOT_DELETED = """NOT EXISTS (
    SELECT 1 FROM deletions WHERE caller = :caller AND at >= :asked
    AND ((name = :name AND address = '') OR (name = '' AND address = :address)))"""
KEEP_CONVERSATION = f"""
INSERT INTO conversations (caller, name, address, updated)
SELECT :caller, :name, :address, :ended WHERE {_NOT_DELETED}
ON CONFLICT (caller, name) DO UPDATE SET address = excluded.address,
    updated = max(updated, excluded.updated)
"""
KEEP_TURN = f"""
INSERT INTO turns (conversation, ended, question_tokens, answer_tokens, size, question, answer)
SELECT id, :ended, :question_tokens, :answer_tokens, :size, :question, :answer
FROM conversations WHERE caller = :caller AND name = :name AND {_NOT_DELETED}
"""  # noqa: S608
# The turns that `turn.Bounds.kept` leaves out: of one conversation, and of those with the ids of a
# range.
_BEYOND = """
SELECT id FROM (
    SELECT id, ended, row_number() OVER newest AS number,
        sum(question_tokens + answer_tokens) OVER newest AS tokens, sum(size) OVER newest AS size
    FROM turns WHERE {which} AND ended >= :oldest
    WINDOW newest AS (PARTITION BY conversation ORDER BY id DESC)
) WHERE number > 1 AND (tokens > :tokens OR number > :turns OR size > :bytes)
"""
_ONE = "conversation = (SELECT id FROM conversations WHERE caller = :caller AND name = :name)"
_RANGE = "conversation > :first AND conversation <= :last"
TRIM = f"DELETE FROM turns WHERE id IN ({_BEYOND.format(which=_ONE)})"  # noqa: S608
TRIM_OLD = f"DELETE FROM turns WHERE {_ONE} AND ended < :oldest"  # noqa: S608
TRIM_RANGE = f"DELETE FROM turns WHERE id IN ({_BEYOND.format(which=_RANGE)})"  # noqa: S608
LAST_CONVERSATION = "SELECT coalesce(max(id), 0) FROM conversations"
EXPIRE = "DELETE FROM turns WHERE id IN (SELECT id FROM turns WHERE ended < :oldest LIMIT :limit)"
DROP_EMPTY = """
DELETE FROM conversations WHERE id IN (
    SELECT id FROM conversations WHERE updated < :oldest
    AND NOT EXISTS (SELECT 1 FROM turns WHERE conversation = conversations.id) LIMIT :limit)
"""
FORGET_DELETIONS = "DELETE FROM deletions WHERE at < :before"
TOTALS = "SELECT count(*), coalesce(sum(size), 0) FROM conversations"
# The conversations that rested for longest of the largest owner, a key or without keys an address:
# as many conversations, or bytes, as are too many.
_MOST = """
DELETE FROM conversations WHERE id IN (
    SELECT id FROM (
        SELECT id, place, sum({weight}) OVER (ORDER BY place DESC, updated, id) - {weight} AS gone
        FROM (SELECT id, updated, size, sum({weight}) OVER (
            PARTITION BY caller, address ORDER BY updated, id
            ROWS BETWEEN CURRENT ROW AND UNBOUNDED FOLLOWING) AS place
            FROM conversations))
    WHERE gone < :{over} ORDER BY place DESC LIMIT :limit)
"""
DROP_MOST = _MOST.format(weight=1, over="conversations")
DROP_LARGEST = _MOST.format(weight="size", over="bytes")
# It writes a page, although nothing changes.
PROBE = f"PRAGMA user_version = {VERSION}"

LOAD = """
SELECT question, answer, ended, question_tokens, answer_tokens, turns.size
FROM conversations JOIN turns ON turns.conversation = conversations.id
WHERE caller = :caller AND name = :name AND ended >= :oldest ORDER BY turns.id
"""
LIST = f"""
SELECT name,
    (SELECT substr(question, 1, {MAX_READ}) FROM turns
        WHERE conversation = conversations.id AND ended >= :oldest ORDER BY id LIMIT 1),
    updated,
    (SELECT count(*) FROM turns WHERE conversation = conversations.id AND ended >= :oldest)
FROM conversations
WHERE caller = :caller AND address = :address AND updated >= :oldest
    AND (updated, name) < (:updated, :after)
ORDER BY updated DESC, name DESC LIMIT :limit
"""  # noqa: S608
# A deletion is noted if there is something to delete: turns, or (`:asked`) a question whose turn
# may come. Without a key, other addresses may also ask in the conversations of an address.
NOTE_DELETION = """
INSERT OR REPLACE INTO deletions SELECT :caller, '', :name, :at
WHERE :asked OR EXISTS (SELECT 1 FROM conversations WHERE caller = :caller AND name = :name)
"""
NOTE_ALL_DELETED = """
INSERT OR REPLACE INTO deletions
SELECT caller, '', name, :at FROM conversations
WHERE :address != '' AND caller = :caller AND address = :address AND updated >= :oldest
UNION ALL SELECT :caller, :address, '', :at
WHERE :asked OR EXISTS (
    SELECT 1 FROM conversations WHERE caller = :caller AND address = :address)
"""
FORGET_OLD_DELETIONS = """
DELETE FROM deletions WHERE caller = :caller AND at < (
    SELECT at FROM deletions WHERE caller = :caller ORDER BY at DESC LIMIT 1 OFFSET :most)
"""
# Expired ones come first, and then those that count.
_EXPIRED = " AND updated < :oldest"
DELETE = "DELETE FROM conversations WHERE caller = :caller AND name = :name"
DELETE_EXPIRED = DELETE + _EXPIRED
DELETE_ALL = "DELETE FROM conversations WHERE caller = :caller AND address = :address"
DELETE_ALL_EXPIRED = DELETE_ALL + _EXPIRED


def shrink(connection: sqlite3.Connection) -> None:
    """Return some free pages to the file system.

    Raises:
        sqlite3.Error: the file cannot be written.
    """
    # Not `execute`: in Python 3.11 it ends after the first step, and each step frees one page.
    connection.executescript("PRAGMA incremental_vacuum(1000);")
