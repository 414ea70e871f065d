"""The two connections to the file: one reads and one writes, each in a thread of its own (aiosqlite)."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import aiosqlite

from aioserver.wings.conversations import sqlite_file
from aioserver.wings.conversations.sqlite_file import PROBE, SHRINK, Broken, trouble

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    # A statement, and its values; a list does it for each of them.
    Statement = tuple[str, Mapping[str, Any] | list[Mapping[str, Any]]]

# Seconds after which it is looked again whether the path still leads to the file that is open.
LOOK_PERIOD = 5.0


class Connections:
    """The connections to the file *path*.

    Always: a connection is only opened to a file that was found good, and closed when it proves not to be. What was
    committed before is then still put into its place in the file, by SQLite.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._loop = asyncio.get_running_loop()
        self._reader: aiosqlite.Connection | None = None
        self._writer: aiosqlite.Connection | None = None
        self._identity = (0, 0)
        self._looked_at = 0.0
        # Whether the file was found good, and nothing speaks against it.
        self._checked = False

    async def open(self) -> None:
        """Open what is not open.

        Raises:
            Broken, OSError, sqlite3.Error: the file cannot be used.
        """
        self._identity = await asyncio.to_thread(
            sqlite_file.prepare, self.path, check=not self._checked
        )
        self._checked = True
        self._looked_at = self._loop.time()
        if self._reader is None:
            self._reader = await self._open(sqlite_file.READ_WAIT)
        if self._writer is None:
            self._writer = await self._open(sqlite_file.WRITE_WAIT)

    async def close(self, *, readable: bool = False) -> None:
        """Close what is open; the connection that reads stays if the file is *readable*."""
        self._checked = self._checked and readable
        writer, self._writer = self._writer, None
        reader = None if readable else self._reader
        if not readable:
            self._reader = None
        for connection in (writer, reader):
            if connection is not None:
                with suppress(sqlite3.Error, ValueError):
                    await connection.close()

    async def read(self, statement: str, values: Mapping[str, Any]) -> list[Any] | None:
        """Return the rows of a query; None if the file is not open.

        Raises:
            sqlite3.Error: the file cannot be read.
            ValueError: the connection was closed meanwhile.
        """
        if self._reader is None:
            return None
        return list(await self._reader.execute_fetchall(statement, values))

    async def look(self) -> None:
        """Check, not too often, that the path still leads to the file that is open.

        Raises:
            Broken: it does not.
        """
        if self._loop.time() < self._looked_at + LOOK_PERIOD:
            return
        self._looked_at = self._loop.time()
        try:
            identity = await asyncio.to_thread(sqlite_file.identity, self.path)
        except OSError as fault:
            raise Broken(trouble("gone", self.path, fault.strerror)) from fault
        if identity != self._identity:
            raise Broken(trouble("gone", self.path))

    async def ask(self, statement: str) -> Any:
        """Return the first row of a query on the connection that writes.

        Raises:
            sqlite3.Error: the file cannot be read.
        """
        assert self._writer is not None, "the file is open"
        rows = list(await self._writer.execute_fetchall(statement))
        return rows[0] if rows else None

    async def shrink(self) -> None:
        """Give some pages that are free back to the file system.

        Raises:
            sqlite3.Error: the file cannot be written.
        """
        assert self._writer is not None, "the file is open"
        # Not `execute`: in Python 3.11 it ends after the first step, and each step frees one page.
        await self._writer.executescript(SHRINK)

    async def write(self, statements: Sequence[Statement]) -> list[int]:
        """Do *statements* in one transaction; return how many rows each has changed.

        Without any statement it writes all the same, so that a return means that the file can be written.

        Raises:
            sqlite3.Error: nothing is written.
        """
        connection = self._writer
        assert connection is not None, "the file is open"
        await connection.execute("BEGIN IMMEDIATE")
        try:
            counts = []
            for statement, values in statements or [(PROBE, {})]:
                if isinstance(values, list):
                    cursor = await connection.executemany(statement, values)
                else:
                    cursor = await connection.execute(statement, values)
                counts.append(cursor.rowcount)
            await connection.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error, ValueError):
                if connection.in_transaction:
                    await connection.execute("ROLLBACK")
            raise
        return counts

    async def _open(self, wait: float) -> aiosqlite.Connection:
        """Open a connection that waits for a lock for *wait* seconds."""
        connection = await aiosqlite.connect(self.path, timeout=wait, isolation_level=None)
        try:
            for pragma in sqlite_file.PRAGMAS:
                await connection.execute(pragma)
        except BaseException:
            await connection.close()
            raise
        return connection
