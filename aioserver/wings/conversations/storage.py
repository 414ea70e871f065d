"""The storage: see `wings.conversations.history.Storage`.

    keep, delete  → a queue → one task: many in one transaction
    load, listing → a connection of its own, which waits for no writer

No answer waits for the disk: `keep` only puts a turn into the queue, and the next question of the same conversation reads the
file and what waits. Of several processes each has its own connections, and what one has written the others read.

The file may fail at any time. That is a trouble: the task tries again, with growing pauses; turns wait in the queue, and beyond its
bounds the oldest are lost; the chat goes on with what the process remembers. A trouble ends with the first write
that succeeds. Nothing is written to a file that is damaged.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import msgspec

from aioserver.wings.conversations import sqlite_file
from aioserver.wings.conversations.connections import Connections
from aioserver.wings.conversations.history import StorageStats, Trouble
from aioserver.wings.conversations.queue import Key, Queue, Write
from aioserver.wings.conversations.spool import Spool
from aioserver.wings.conversations.sqlite_file import UNREADABLE, Broken, trouble, trouble_of
from aioserver.wings.conversations.sweep import Sweep
from aioserver.wings.conversations.turn import Bounds, Page, Position, Summary, Turn, title_of
from aioserver.wings.conversations.turn_locks import TurnLocks

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aioserver.auth.callers import Caller
    from aioserver.config.settings import Persistence
    from aioserver.telemetry.counters import Counter
    from aioserver.wings.conversations.connections import Statement

logger = logging.getLogger("aioserver.history")

# Seconds for which a question waits for its conversation, and a client for a list or a deletion.
LOAD_TIMEOUT, CALL_TIMEOUT = 2.0, 5.0
# Seconds for which the first opening holds up the start of the server, and the queue its end.
OPEN_TIMEOUT, CLOSE_TIMEOUT = 3.0, 3.0
# Seconds of the first pause after a failure, and of the longest.
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
KEEP = (
    sqlite_file.KEEP_CONVERSATION,
    sqlite_file.KEEP_TURN,
    sqlite_file.TRIM_OLD,
    sqlite_file.TRIM,
)
KEEP_LEFT = (KEEP[0], sqlite_file.KEEP_LEFT_TURN, *KEEP[2:])
DELETE = (sqlite_file.NOTE_DELETION, sqlite_file.DELETE_EXPIRED, sqlite_file.DELETE)
DELETE_ALL = (sqlite_file.NOTE_ALL_DELETED, sqlite_file.DELETE_ALL_EXPIRED, sqlite_file.DELETE_ALL)


class SqliteStorage:
    """The conversations in the file *path*; *clock* returns Unix time. *counts*: of turns `written` and `lost`.

    Always: a turn that was kept is written once, or waits, or is counted as lost.
    """

    def __init__(
        self,
        path: str,
        persistence: Persistence,
        clock: Callable[[], float],
        counts: Mapping[str, Counter],
    ) -> None:
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._connections = Connections(path)
        self._locks = TurnLocks(path)
        self._spool = Spool(path)
        self._queue = Queue(self._locks.remove)
        self._sweep = Sweep(Bounds.of(persistence), clock)
        self._wake = asyncio.Event()
        self._opened = asyncio.Event()
        self._closing = False
        self._pause = FIRST_PAUSE
        self._trouble: Trouble | None = None
        self._since = 0.0
        # A failure of a read, for the task to deal with.
        self._failure: BaseException | None = None
        self._written, self._lost = counts["written"], counts["lost"]
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Open the file; what takes longer than OPEN_TIMEOUT goes on in the background."""
        self._task = self._loop.create_task(self._run())
        with suppress(TimeoutError):
            async with asyncio.timeout(OPEN_TIMEOUT):
                await self._opened.wait()

    def apply(self, persistence: Persistence) -> None:
        """Use new bounds, also for conversations that nobody goes on with."""
        self._sweep.apply(Bounds.of(persistence))
        self._wake.set()

    def stats(self) -> StorageStats:
        """Return a snapshot."""
        return StorageStats(
            storage="sql",
            waiting=len(self._queue),
            written=int(self._written.value),
            lost=int(self._lost.value),
            trouble=self._trouble,
            since=self._since,
        )

    @property
    def troubled(self) -> bool:
        """Whether what is read may lack what was kept."""
        return self._trouble is not None

    async def load(self, caller: Caller, conversation_id: str) -> list[Turn] | None:
        """Return the turns of a conversation, those that wait among them; None if the file does not say in time."""
        key = Key(caller.name, conversation_id)
        values = {**key._asdict(), "oldest": self._sweep.oldest()}
        if self._trouble is None:
            await self._locks.wait(key)
        waiting = self._queue.turns(key)
        rows = await self._read(sqlite_file.LOAD, values, LOAD_TIMEOUT)
        if rows is None:
            return None
        turns = [Turn(*row) for row in rows]
        # A turn that was written while the file was read is in both.
        known = {(turn.ended, turn.question) for turn in turns}
        return [*turns, *(turn for turn in waiting if (turn.ended, turn.question) not in known)]

    def keep(self, caller: Caller, conversation_id: str, turn: Turn, asked: float) -> None:
        """Append a turn soon; not if its conversation was deleted since *asked*."""
        key = Key(caller.name, conversation_id)
        values = {
            **key._asdict(),
            "address": caller.address,
            "asked": asked,
            "ended": turn.ended,
            "question": turn.question,
            "answer": turn.answer,
            "question_tokens": turn.question_tokens,
            "answer_tokens": turn.answer_tokens,
            "turn_size": turn.size,
        }
        if self._trouble is None:
            self._locks.add(key)
        self._spool.add(msgspec.msgpack.encode(values))
        self._add(Write(key, KEEP, values, self._loop.create_future(), turn))

    async def listing(self, caller: Caller, limit: int, after: Position | None) -> Page | None:
        """Return part of the caller's conversations; None if the file does not say in time."""
        values = {
            "caller": caller.name,
            "address": caller.address,
            "oldest": self._sweep.oldest(),
            "updated": 1e300 if after is None else after.updated,
            "after": "" if after is None else after.conversation_id,
            "limit": limit + 1,
        }
        newest = self._queue.newest()
        if newest is not None and self._trouble is None:
            await asyncio.wait((newest,), timeout=CALL_TIMEOUT)
        rows = await self._read(sqlite_file.LIST, values, CALL_TIMEOUT)
        if rows is None:
            return None
        summaries = [
            Summary(name, title_of(question), updated, messages)
            for name, question, updated, messages in rows[:limit]
        ]
        if len(rows) <= limit:
            return Page(summaries)
        return Page(summaries, Position(summaries[-1].updated, summaries[-1].conversation_id))

    async def delete(self, caller: Caller, conversation_id: str) -> bool | None:
        """Delete a conversation; return whether there was one, None if it is not deleted for certain."""
        key = Key(caller.name, conversation_id)
        number = await self._delete(key, DELETE, key._asdict())
        return None if number is None else number > 0

    async def delete_all(self, caller: Caller) -> int | None:
        """Delete all that `listing` shows; return their number, None if they are not deleted for certain."""
        values = {"caller": caller.name, "address": caller.address}
        return await self._delete(Key(caller.name, ""), DELETE_ALL, values)

    async def close(self) -> None:
        """Write what waits, for CLOSE_TIMEOUT at most, and close the file."""
        self._closing = True
        self._wake.set()
        if self._task is not None:
            await asyncio.wait((self._task,), timeout=CLOSE_TIMEOUT)
            self._task.cancel()
            await asyncio.wait((self._task,))
        await self._connections.close()
        self._locks.close()
        self._spool.close(empty=not self._queue)
        if waiting := len(self._queue):
            logger.warning("turns that are not written at the end: %d", waiting)

    def _add(self, write: Write) -> None:
        self._lost.value += self._queue.add(write)
        self._wake.set()

    def _add_left(self, record: bytes) -> None:
        """Write a turn that a killed process has left, unless it has done so."""
        try:
            values = msgspec.msgpack.decode(record)
            turn = Turn.of(
                values["question"],
                values["answer"],
                values["ended"],
                (values["question_tokens"], values["answer_tokens"]),
            )
            key = Key(values["caller"], values["name"])
        except (msgspec.DecodeError, KeyError, TypeError):
            # Of another version.
            return
        self._add(Write(key, KEEP_LEFT, values, self._loop.create_future(), turn))

    async def _delete(
        self, key: Key, what: tuple[str, ...], values: Mapping[str, Any]
    ) -> int | None:
        if self._trouble is not None or self._closing:
            return None
        times = {"at": self._clock(), "oldest": self._sweep.oldest()}
        write = Write(key, what, {**values, **times}, self._loop.create_future())
        self._add(write)
        await asyncio.wait((write.done,), timeout=CALL_TIMEOUT)
        # A client that is told that nothing is certain may go on with the conversation: it must not be deleted later.
        write.done.cancel()
        return None if write.done.cancelled() else write.done.result()

    async def _read(
        self, statement: str, values: Mapping[str, Any], seconds: float
    ) -> list[Any] | None:
        """Return the rows of a query; None if the file cannot be read now."""
        try:
            async with asyncio.timeout(seconds):
                await self._opened.wait()
                return await self._connections.read(statement, values)
        except TimeoutError:
            fault: Exception = Broken(trouble("slow", self._connections.path))
        except (sqlite3.Error, ValueError) as failure:
            fault = failure
        if self._opened.is_set() and self._trouble is None:
            self._failure = fault
            self._wake.set()
        return None

    async def _run(self) -> None:
        while True:
            try:
                await self._connections.open()
                self._locks.open()
                for record in await asyncio.to_thread(self._spool.open):
                    self._add_left(record)
                if not self._queue:
                    await self._connections.write([])
                    self._recover()
                self._opened.set()
                await self._work()
                return
            except (Broken, OSError, sqlite3.Error, ValueError) as fault:
                await self._fail(fault)
            except Exception as bug:
                # It costs the history, and not the server.
                logger.exception("bug in the history")
                await self._fail(bug)
            if self._closing:
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(self._pause):
                    while not self._closing:
                        self._wake.clear()
                        await self._wake.wait()
            self._pause = min(2 * self._pause, LONGEST_PAUSE)

    async def _fail(self, fault: BaseException) -> None:
        """Note the trouble, and close what is open of the file; of a full disk, for example, it can still be read."""
        by_read, self._failure = fault is self._failure, None
        path = self._connections.path
        found = trouble_of(fault, path) or trouble("io", path, fault)
        if self._trouble is None:
            self._since = self._clock()
        self._trouble = found
        self._queue.cancel_deletions()
        self._locks.close()
        self._opened.set()
        await self._connections.close(readable=not by_read and found.kind not in UNREADABLE)

    def _recover(self) -> None:
        self._trouble, self._pause = None, FIRST_PAUSE

    async def _work(self) -> None:
        """Write what comes, and sweep now and then, until the end.

        Raises:
            Broken, OSError, sqlite3.Error: the file has failed.
        """
        while True:
            self._wake.clear()
            if self._failure is not None:
                raise self._failure
            await self._connections.look()
            if self._queue:
                await self._write(self._queue.batch())
                self._recover()
                if not self._queue:
                    self._spool.clear()
                elif self._spool.crowded:
                    self._spool.clear(map(msgspec.msgpack.encode, self._queue.values()))
            elif self._closing:
                return
            if not self._closing:
                await self._sweep.step(self._connections)
            if not self._queue and not self._closing:
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(self._sweep.due):
                        await self._wake.wait()

    async def _write(self, batch: list[Write]) -> None:
        """Write *batch*, the first of the queue, and take it out."""
        try:
            deleted = await self._write_once(batch)
        except (sqlite3.Error, ValueError, OverflowError) as fault:
            if trouble_of(fault, self._connections.path) is not None:
                raise
            if len(batch) > 1:
                # One of them cannot be written.
                for write in batch:
                    await self._write([write])
                return
            logger.error("a turn cannot be written: %s", type(fault).__name__)  # noqa: TRY400
            self._lost.value += 1
            deleted = [0]
        for write, number in zip(batch, deleted, strict=True):
            self._queue.remove(write)
            if not write.done.done():
                write.done.set_result(number)

    async def _write_once(self, batch: list[Write]) -> list[int]:
        """Write *batch* in one transaction; return how many rows each deletion has deleted."""
        bounds = self._sweep.values()
        transaction: list[Statement] = []
        turns: list[Write] = []
        # The place of each deletion's last statement.
        places: dict[Write, int] = {}

        def add_turns() -> None:
            if turns:
                values: list[Mapping[str, Any]] = [{**turn.values, **bounds} for turn in turns]
                transaction.extend((statement, values) for statement in turns[0].statements)
                turns.clear()

        for write in batch:
            if write.done.cancelled():
                continue
            if turns and turns[0].statements != write.statements:
                add_turns()
            if write.turn is not None:
                turns.append(write)
            else:
                transaction.extend((statement, write.values) for statement in write.statements)
                places[write] = len(transaction) - 1
        add_turns()
        counts = await self._connections.write(transaction)
        written = sum(write.turn is not None and not write.done.cancelled() for write in batch)
        self._written.value += written
        self._sweep.count(written)
        return [counts[places[write]] if write in places else 0 for write in batch]
