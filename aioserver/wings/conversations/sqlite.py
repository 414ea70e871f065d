"""Conversations in an SQLite file: a turn is committed before its client sees the end of it.

This file is one concept: the queue, its transactions, their failures and the sweep are one order
of writes to one file.

    keep, delete  → a queue → one thread: all waiting writes in one transaction
    load, listing → another thread, which waits for no writer

Writes that come while a transaction is under way are in the next one (group commit: DeWitt et al.,
"Implementation Techniques for Main Memory Database Systems", 1984). So an answer waits for one or
two transactions, as long as each holds all waiting writes, and a turn that a client has seen
survives a process that is killed. Of several processes each has its own connections, and reads
what the others have committed.

The file may fail at any time. That is a trouble: the task tries again, with growing pauses. Turns
wait in the queue, and beyond its bounds the oldest are lost. Chats continue with the memory of the
process, and wait for nothing. A trouble ends with the first write that succeeds. Nothing is
written to a damaged file.

The sweep applies the bounds to conversations that are not continued, step by step; between two
steps turns are written. Each process sweeps, and does not find conversations that another one has
deleted.
"""

from __future__ import annotations

import asyncio
import logging
import random
import sqlite3
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple

from aioserver.gateway.contracts.timeouts import awaited
from aioserver.wings.conversations import sqlite_file
from aioserver.wings.conversations.history import Loaded, StorageStats, Trouble
from aioserver.wings.conversations.sqlite_file import UNREADABLE, Broken, trouble, trouble_of
from aioserver.wings.conversations.turn import Bounds, Page, Position, Summary, Turn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from aioserver.auth.callers import Caller
    from aioserver.config.settings import Persistence
    from aioserver.gateway.contracts.histories import Begun
    from aioserver.telemetry.counters import Counter
    from aioserver.wings.conversations.redis import RedisHistories

    Values = Mapping[str, Any]
    # Statements, and the values of all of them.
    Work = tuple[Sequence[str], Values]

logger = logging.getLogger("aioserver.history")

T = TypeVar("T")
Args = TypeVarTuple("Args")

# Seconds for which the end of an answer waits for its turn; then the end is sent anyway, and the
# turn stays in the queue.
COMMIT_TIMEOUT = 1.0
# Seconds for which a question waits for its conversation, and a client for a list or a deletion.
LOAD_TIMEOUT, CALL_TIMEOUT = 2.0, 5.0
# Seconds for which the first opening may delay the start of the server, and the queue its end.
OPEN_TIMEOUT, CLOSE_TIMEOUT = 3.0, 3.0
# Seconds of the first pause after a failure, and of the longest.
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
# Seconds between checks that the path still leads to the open file.
LOOK_PERIOD = 5.0
# Bounds on the waiting writes: their number, and their bytes of text.
MAX_WAITING, MAX_WAITING_BYTES = 10_000, 1 << 26
# Bounds on one transaction, in writes and in bytes of text.
MAX_BATCH, MAX_BATCH_BYTES = 200, 1 << 22
# Seconds between two sweeps, and the turns after which one comes sooner.
SWEEP_PERIOD, SWEEP_TURNS = 60.0, 1_000
# The most conversations or turns that one step of a sweep deletes, or reads.
SWEEP_STEP = 500
# Bounds on all conversations of a file together. Beyond them the key (or address) that has most
# loses those that rested for longest.
MAX_CONVERSATIONS, MAX_BYTES = 100_000, 1 << 30
# Seconds for which a deletion is remembered: no answer runs for longer.
DELETION_SECONDS = 86_400.0
NO_BOUND = 1 << 62
KEEP = (
    sqlite_file.KEEP_CONVERSATION,
    sqlite_file.KEEP_TURN,
    sqlite_file.TRIM_OLD,
    sqlite_file.TRIM,
)
DELETE = (
    sqlite_file.NOTE_DELETION,
    sqlite_file.FORGET_OLD_DELETIONS,
    sqlite_file.DELETE_EXPIRED,
    sqlite_file.DELETE,
)
DELETE_ALL = (
    sqlite_file.NOTE_ALL_DELETED,
    sqlite_file.FORGET_OLD_DELETIONS,
    sqlite_file.DELETE_ALL_EXPIRED,
    sqlite_file.DELETE_ALL,
)
# Remembered deletions of one caller: more than it has answers under way.
MAX_DELETIONS = 1_000


@dataclass(eq=False)
class Write:
    """A turn that is to be written, or a deletion: *statements* with their *values*.

    *done* ends the wait for it. Its result is the number of rows that the last statement has
    changed. A cancelled deletion is not written; a turn stays in the queue, even if its waiter is
    cancelled.
    """

    statements: Sequence[str]
    values: Values
    done: asyncio.Future[int]
    turn: Turn | None = None

    @property
    def wanted(self) -> bool:
        """Whether it is still to be written."""
        return self.turn is not None or not self.done.cancelled()

    @property
    def conversation(self) -> tuple[str, str]:
        """The name of the caller, and that of the conversation."""
        return self.values["caller"], self.values["name"]

    @property
    def size(self) -> int:
        """The bytes of its text."""
        return 0 if self.turn is None else self.turn.size

    def settle(self, number: int) -> None:
        """Report to the waiter that it is written, and that *number* rows were changed."""
        if not self.done.done():
            self.done.set_result(number)

    def give_up(self) -> None:
        """Report to the waiter that it is not written: a deletion will not be, a turn perhaps
        later.
        """
        if self.turn is None:
            self.done.cancel()
        else:
            self.settle(0)


class Queue:
    """Writes in their order.

    Always: at most MAX_WAITING with MAX_WAITING_BYTES of text, apart from the newest.
    """

    def __init__(self) -> None:
        self._writes: deque[Write] = deque()
        self._size = 0

    def __len__(self) -> int:
        return len(self._writes)

    def add(self, write: Write) -> int:
        """Append *write*; return how many turns were dropped for it."""
        self._writes.append(write)
        self._size += write.size
        lost = 0
        while len(self._writes) > MAX_WAITING or (
            self._size > MAX_WAITING_BYTES and len(self._writes) > 1
        ):
            oldest = self._writes[0]
            self.remove(oldest)
            oldest.give_up()
            lost += oldest.turn is not None
        return lost

    def batch(self) -> list[Write]:
        """Return the first writes, which stay in the queue."""
        batch: list[Write] = []
        size = 0
        for write in self._writes:
            size += write.size
            if batch and (len(batch) == MAX_BATCH or size > MAX_BATCH_BYTES):
                break
            batch.append(write)
        return batch

    def remove(self, write: Write) -> None:
        """Take *write* out, if it is the first; it may have gone already."""
        if self._writes and self._writes[0] is write:
            self._writes.popleft()
            self._size -= write.size

    def newest(self, conversation: tuple[str, str] | None = None) -> Write | None:
        """Return the newest write, or that of one *conversation*, by its caller's name and its
        own; None if none waits.
        """
        writes = reversed(self._writes)
        found = (each for each in writes if conversation in {None, each.conversation})
        return next(found, None)

    def give_up(self) -> None:
        """End all waits: turns stay for later, and no deletion is certain."""
        for write in self._writes:
            write.give_up()


class Connection:
    """A connection to the file, and the only thread that uses it."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, f"history-{name}")
        self._connection: sqlite3.Connection | None = None

    @property
    def usable(self) -> bool:
        """Whether it is open."""
        return self._connection is not None

    async def open(self, path: str, wait: float) -> None:
        """Open it, unless it is open; *wait*: seconds for which it waits for a lock.

        Raises:
            sqlite3.Error: it cannot be opened.
        """
        if self._connection is None:
            work = self._loop.run_in_executor(self._thread, sqlite_file.connect, path, wait)
            self._connection = await work

    async def do(self, work: Callable[[sqlite3.Connection, *Args], T], *args: *Args) -> T:
        """Return the result of *work*, which runs in the thread; cancelling does not stop it.

        Raises:
            sqlite3.Error: by *work*.
        """
        assert self._connection is not None, "it is open"
        return await self._loop.run_in_executor(self._thread, work, self._connection, *args)

    async def close(self) -> None:
        """Close it, once its thread has finished its work."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(sqlite3.Error):
                await self._loop.run_in_executor(self._thread, connection.close)

    def end(self) -> None:
        """Let the thread end."""
        self._thread.shutdown(wait=False)


def rows(connection: sqlite3.Connection, statement: str, values: Values) -> list[Any]:
    """Return the rows of a query.

    Raises:
        sqlite3.Error: the file cannot be read.
    """
    return connection.execute(statement, values).fetchall()


def transact(connection: sqlite3.Connection, works: Sequence[Work]) -> list[int]:
    """Do *works* in one transaction; return how many rows the last statement of each has changed.

    Without any statement it still writes, so that a return proves that the file can be written.

    Raises:
        sqlite3.Error: nothing is written.
    """
    counts = []
    with sqlite_file.transaction(connection):
        if not any(statements for statements, _ in works):
            connection.execute(sqlite_file.PROBE)
        for statements, values in works:
            cursors = [connection.execute(statement, values) for statement in statements]
            counts.append(cursors[-1].rowcount if cursors else 0)
    return counts


class SqliteStorage:
    """The conversations in the file *path*: see `history.Storage`; *clock* returns Unix time.

    *counts*: of turns `written` and `lost`. *shared*: other processes have the file, too, and
    their questions are unknown here; a deletion is remembered for these. A turn that is not
    written in time leaves a mark in *late*, as if its question were under way; None if there is no
    such place.

    Always: a turn that was kept is written once, or waits, or is counted as lost. A connection is
    only opened to a file that was found good, and closed when the file proves bad.
    """

    def __init__(
        self,
        path: str,
        persistence: Persistence,
        clock: Callable[[], float],
        counts: Mapping[str, Counter],
        *,
        shared: bool = False,
        late: RedisHistories | None = None,
    ) -> None:
        self._path = path
        self._late = late
        self._shared = shared
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._reader, self._writer = Connection("reader"), Connection("writer")
        self._identity = (0, 0)
        self._looked_at = 0.0
        # Whether the file was found good, and has not failed since.
        self._checked = False
        self._queue = Queue()
        self._sweep = Sweep(Bounds.of(persistence), clock)
        self._wake = asyncio.Event()
        self._opened = asyncio.Event()
        self._closing = False
        self._pause = FIRST_PAUSE
        self._trouble: Trouble | None = None
        self._since = 0.0
        # A failure of a read, for the task to handle.
        self._failure: BaseException | None = None
        self._written, self._lost = counts["written"], counts["lost"]
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Open the file; after OPEN_TIMEOUT it continues in the background."""
        self._task = self._loop.create_task(self._run())
        with suppress(TimeoutError):
            async with asyncio.timeout(OPEN_TIMEOUT):
                await self._opened.wait()

    def apply(self, persistence: Persistence) -> None:
        """Use new bounds, also for conversations that are not continued."""
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
        """Whether a read may lack kept turns."""
        return self._trouble is not None

    async def begin(
        self, caller: Caller, conversation_id: str, *, known: bool
    ) -> tuple[Loaded | None, Begun | None]:
        """Return the turns of a conversation that is *known*, for a question."""
        return (await self.load(caller, conversation_id) if known else None), None

    def leave(self, caller: Caller, conversation_id: str, begun: Begun) -> None:
        """Do nothing: no question leaves a mark in the file."""

    async def load(self, caller: Caller, conversation_id: str) -> Loaded | None:
        """Return the turns of a conversation.

        None if the file does not answer in time, or lacks a turn that this process has kept.
        """
        values, end = self._values(caller, conversation_id), self._loop.time() + LOAD_TIMEOUT
        while (newest := self._queue.newest((caller.name, conversation_id))) is not None:
            left = end - self._loop.time()
            if self._trouble is not None or left <= 0:
                return None
            await asyncio.wait((newest.done,), timeout=left)
        if self._late is not None:
            await self._late.load(caller, conversation_id)
        found = await self._read(sqlite_file.LOAD, values, LOAD_TIMEOUT)
        return None if found is None else Loaded([Turn(*row) for row in found])

    def keep(
        self,
        caller: Caller,
        conversation_id: str,
        turn: Turn,
        asked: float,
        begun: Begun | None = None,  # noqa: ARG002 - one machine has one clock
    ) -> asyncio.Future[None] | None:
        """Append a turn; not if its conversation was deleted since *asked*.

        Return a future that is done once it is committed, or after COMMIT_TIMEOUT, and then once
        other processes know that it is late; None in a trouble.
        """
        values = self._values(caller, conversation_id, asked=asked, **turn._asdict())
        write = self._add(KEEP, values, turn)
        if self._trouble is not None:
            return None
        committed = awaited(write.done, COMMIT_TIMEOUT)
        if self._late is None:
            return committed
        noting = self._note_late(self._late, caller, conversation_id, write, committed)
        return self._loop.create_task(noting)

    async def listing(self, caller: Caller, limit: int, after: Position | None) -> Page | None:
        """Return part of the caller's conversations; None if the file does not answer in time."""
        updated, name = (1e300, "") if after is None else after
        values = self._values(caller, updated=updated, after=name, limit=limit + 1)
        newest = self._queue.newest()
        if newest is not None and self._trouble is None:
            await asyncio.wait((newest.done,), timeout=CALL_TIMEOUT)
        found = await self._read(sqlite_file.LIST, values, CALL_TIMEOUT)
        if found is None:
            return None
        return Page.of([Summary.of(*row) for row in found], limit)

    async def delete(self, caller: Caller, conversation_id: str, *, asked: bool) -> bool | None:
        """Delete a conversation; return whether there was one, None if that is not certain."""
        number = await self._delete(caller, conversation_id, DELETE, asked=asked)
        return None if number is None else number > 0

    async def delete_all(self, caller: Caller, *, asked: bool) -> int | None:
        """Delete all conversations that `listing` shows; return their number, None if that is not
        certain.
        """
        return await self._delete(caller, "", DELETE_ALL, asked=asked)

    async def close(self) -> None:
        """Write the waiting turns, for CLOSE_TIMEOUT at most, and close the file."""
        self._closing = True
        self._wake.set()
        if self._task is not None:
            await asyncio.wait((self._task,), timeout=CLOSE_TIMEOUT)
            self._task.cancel()
            await asyncio.wait((self._task,))
        self._queue.give_up()
        for connection in (self._writer, self._reader):
            await connection.close()
            connection.end()
        if waiting := len(self._queue):
            logger.warning("turns that are not written at the end: %d", waiting)

    async def _note_late(
        self,
        late: RedisHistories,
        caller: Caller,
        conversation_id: str,
        write: Write,
        committed: asyncio.Future[None],
    ) -> None:
        await committed
        if not write.done.done():
            _none, begun = await late.begin(caller, conversation_id, known=False)
            leave = partial(late.leave, caller, conversation_id, begun)
            write.done.add_done_callback(lambda _written: leave())

    def _add(self, statements: Sequence[str], values: Values, turn: Turn | None = None) -> Write:
        write = Write(statements, values, self._loop.create_future(), turn)
        self._lost.value += self._queue.add(write)
        self._wake.set()
        return write

    def _values(self, caller: Caller, conversation_id: str = "", **others: Any) -> Values:
        """Return the values of statements about conversations of *caller*, or one of them."""
        names = {"caller": caller.name, "name": conversation_id, "address": caller.address}
        return {**names, "oldest": self._sweep.oldest(), **others}

    async def _delete(
        self, caller: Caller, conversation_id: str, statements: tuple[str, ...], *, asked: bool
    ) -> int | None:
        if self._trouble is not None or self._closing:
            return None
        asked = asked or self._shared
        values = self._values(
            caller, conversation_id, at=self._clock(), asked=asked, most=MAX_DELETIONS
        )
        write = self._add(statements, values)
        await asyncio.wait((write.done,), timeout=CALL_TIMEOUT)
        # After an error a client may continue the conversation: it must not be deleted later.
        write.done.cancel()
        return None if write.done.cancelled() else write.done.result()

    async def _read(self, statement: str, values: Values, seconds: float) -> list[Any] | None:
        """Return the rows of a query; None if the file cannot be read now."""
        try:
            async with asyncio.timeout(seconds):
                await self._opened.wait()
                if not self._reader.usable:
                    return None
                return await self._reader.do(rows, statement, values)
        except TimeoutError:
            fault: Exception = Broken(trouble("slow", self._path))
        except sqlite3.Error as failure:
            fault = failure
        if self._opened.is_set() and self._trouble is None:
            self._failure = fault
            self._wake.set()
        return None

    async def _run(self) -> None:
        while True:
            try:
                await self._open()
                if not self._queue:
                    await self._writer.do(transact, ())
                    self._recover()
                self._opened.set()
                await self._work()
                return
            except (Broken, OSError, sqlite3.Error) as fault:
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

    async def _open(self) -> None:
        """Open the connections that are not open.

        Raises:
            Broken, OSError, sqlite3.Error: the file cannot be used.
        """
        self._identity = await asyncio.to_thread(
            sqlite_file.prepare, self._path, check=not self._checked
        )
        self._checked = True
        self._looked_at = self._loop.time()
        await self._reader.open(self._path, sqlite_file.READ_WAIT)
        await self._writer.open(self._path, sqlite_file.WRITE_WAIT)

    async def _fail(self, fault: BaseException) -> None:
        """Note the trouble, and close the connections; a file on a full disk can still be read."""
        by_read, self._failure = fault is self._failure, None
        found = trouble_of(fault, self._path) or trouble("io", self._path, fault)
        if self._trouble is None:
            self._since = self._clock()
        self._trouble = found
        self._queue.give_up()
        self._opened.set()
        await self._writer.close()
        if by_read or found.kind in UNREADABLE:
            self._checked = False
            await self._reader.close()

    def _recover(self) -> None:
        self._trouble, self._pause = None, FIRST_PAUSE

    async def _look(self) -> None:
        """Check, not too often, that the path still leads to the open file.

        Raises:
            Broken: it does not.
        """
        if self._loop.time() < self._looked_at + LOOK_PERIOD:
            return
        self._looked_at = self._loop.time()
        try:
            identity = await asyncio.to_thread(sqlite_file.identity, self._path)
        except OSError as fault:
            raise Broken(trouble("gone", self._path, fault.strerror)) from fault
        if identity != self._identity:
            raise Broken(trouble("gone", self._path))

    async def _work(self) -> None:
        """Write the queue, and sweep now and then, until the end.

        Raises:
            Broken, OSError, sqlite3.Error: the file has failed.
        """
        while True:
            self._wake.clear()
            if self._failure is not None:
                raise self._failure
            await self._look()
            if self._queue:
                await self._write(self._queue.batch())
                self._recover()
            elif self._closing:
                return
            if not self._closing:
                await self._sweep.step(self._writer)
            if not self._queue and not self._closing:
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(self._sweep.due):
                        await self._wake.wait()

    async def _write(self, batch: list[Write]) -> None:
        """Write *batch*, the first of the queue, and take it out."""
        bounds = self._sweep.values()
        works = [
            (write.statements if write.wanted else (), {**write.values, **bounds})
            for write in batch
        ]
        turns = sum(write.turn is not None for write in batch)
        try:
            counts = await self._writer.do(transact, works)
        except (sqlite3.Error, ValueError, OverflowError) as fault:
            if trouble_of(fault, self._path) is not None:
                raise
            if len(batch) > 1:
                # One of them cannot be written.
                for write in batch:
                    await self._write([write])
                return
            logger.error("a turn cannot be written: %s", type(fault).__name__)  # noqa: TRY400
            self._lost.value += 1
            turns, counts = 0, [0]
        self._written.value += turns
        self._sweep.count(turns)
        for write, number in zip(batch, counts, strict=True):
            self._queue.remove(write)
            write.settle(number)


class Sweep:
    """The time and the progress of the sweep; *clock* returns Unix time."""

    def __init__(self, bounds: Bounds, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._turns = 0
        # At random, so that several processes do not sweep at once.
        self.due = self._loop.time() + random.uniform(0, SWEEP_PERIOD)  # noqa: S311
        self.bounds = bounds
        # The id of the last conversation that was cut to these bounds; None: all are.
        self._trimmed: int | None = 0

    def apply(self, bounds: Bounds) -> None:
        """Use new bounds, and sweep soon if they have changed."""
        if bounds != self.bounds:
            self.bounds, self._trimmed = bounds, 0
            self.due = self._loop.time()

    def oldest(self) -> float:
        """Return the time before which a turn is too old, in Unix time."""
        # SQLite has no infinite literal, but any number will do.
        return max(-1e300, self._clock() - self.bounds.seconds)

    def values(self) -> dict[str, Any]:
        """Return the bounds as values of statements."""
        return {
            "oldest": self.oldest(),
            "tokens": min(self.bounds.tokens, NO_BOUND),
            "turns": min(self.bounds.turns, NO_BOUND),
            "bytes": self.bounds.size,
        }

    def count(self, turns: int) -> None:
        """Note that *turns* turns were written."""
        self._turns += turns
        if self._turns >= SWEEP_TURNS:
            self.due = self._loop.time()

    async def step(self, writer: Connection) -> None:
        """Do a step, if one is due.

        Raises:
            sqlite3.Error: the file cannot be used.
        """
        if self._loop.time() < self.due:
            return
        if self._trimmed is not None:
            await self._trim(writer, self._trimmed)
        elif await self._delete(writer):
            await writer.do(sqlite_file.shrink)
            self.due, self._turns = self._loop.time() + SWEEP_PERIOD, 0

    async def _trim(self, writer: Connection, first: int) -> None:
        """Cut the next conversations to the bounds."""
        ((newest,),) = await writer.do(rows, sqlite_file.LAST_CONVERSATION, {})
        last = first + SWEEP_STEP
        values = {**self.values(), "first": first, "last": last}
        await writer.do(transact, [((sqlite_file.TRIM_RANGE,), values)])
        if self._trimmed == first:
            self._trimmed = last if last < newest else None

    async def _delete(self, writer: Connection) -> bool:
        """Delete conversations that are too old or too many; return whether nothing is left."""
        ((number, size),) = await writer.do(rows, sqlite_file.TOTALS, {})
        values = {
            "limit": SWEEP_STEP,
            "oldest": self.oldest(),
            "before": self._clock() - DELETION_SECONDS,
            "conversations": number - MAX_CONVERSATIONS,
            "bytes": min(size - MAX_BYTES, MAX_BATCH_BYTES),
        }
        step = [sqlite_file.EXPIRE, sqlite_file.DROP_EMPTY, sqlite_file.FORGET_DELETIONS]
        if number > MAX_CONVERSATIONS:
            step.append(sqlite_file.DROP_MOST)
        elif size > MAX_BYTES:
            step.append(sqlite_file.DROP_LARGEST)
        expired, emptied, *_ = await writer.do(transact, [((each,), values) for each in step])
        return expired < SWEEP_STEP and emptied < SWEEP_STEP and len(step) == 3
