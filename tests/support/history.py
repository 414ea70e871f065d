"""Conversations in an SQLite file: a storage of a test's own, and what it is asked."""

from __future__ import annotations

import sqlite3
from contextlib import asynccontextmanager, closing
from typing import TYPE_CHECKING, Any

from aioserver.auth.callers import Caller
from aioserver.config.settings import Context, Persistence
from aioserver.telemetry.counters import Counter
from aioserver.wings.conversations.memory import Conversations
from aioserver.wings.conversations.sqlite import SqliteStorage
from aioserver.wings.conversations.turn import Turn
from tests.support.clock import FakeClock
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from aioserver.wings.conversations.redis import RedisHistories

ME, YOU = Caller("me"), Caller("you")
# Whatever is kept is sent.
WIDE = Context(max_tokens=10**9, reserve_tokens=0, preserve_recent=0)
REPOSITORY = "chat.service.repository"
# Unix time of the clocks of these tests, at first.
NOW = 1_700_000_000.0


def clock() -> FakeClock:
    return FakeClock(NOW)


def policy(name: str = "unlimited", **bounds: Any) -> Persistence:
    return Persistence(retention_policy=name, **bounds)


def conversations(
    persistence: Persistence | None = None, now: Callable[[], float] | None = None
) -> Conversations:
    """Conversations in memory, all of which are sent."""
    return Conversations(WIDE, persistence or policy(), clock=now or clock())


def sql(path: Path, **persistence: Any) -> dict[str, Any]:
    """The changes of a server that keeps its conversations in the file *path*."""
    return {
        f"{REPOSITORY}.type": "sql",
        f"{REPOSITORY}.path": str(path),
        **{f"{REPOSITORY}.persistence.{name}": value for name, value in persistence.items()},
    }


@asynccontextmanager
async def storage(
    path: Path,
    persistence: Persistence | None = None,
    now: Callable[[], float] | None = None,
    *,
    shared: bool = False,
    late: RedisHistories | None = None,
) -> AsyncIterator[SqliteStorage]:
    """A storage that is open."""
    counts = {"written": Counter(), "lost": Counter()}
    made = SqliteStorage(
        str(path), persistence or policy(), now or clock(), counts, shared=shared, late=late
    )
    await made.open()
    try:
        yield made
    finally:
        await made.close()


async def written(kept: SqliteStorage) -> None:
    """Wait until nothing waits to be written."""
    await until(lambda: kept.stats().waiting == 0, state=kept.stats)


def keep(
    kept: SqliteStorage,
    text: str,
    name: str = "c",
    *,
    caller: Caller = ME,
    ended: float = NOW,
    asked: float | None = None,
) -> None:
    """Keep a turn of the question *text*."""
    turn = Turn.of(text, f"to {text}", ended)
    kept.keep(caller, name, turn, ended if asked is None else asked)


async def questions(kept: SqliteStorage, name: str = "c", caller: Caller = ME) -> list[str] | None:
    """The questions of a conversation, as it is loaded."""
    loaded = await kept.load(caller, name)
    return None if loaded is None else [turn.question for turn in loaded.turns]


async def listed(kept: SqliteStorage, caller: Caller = ME) -> list[str]:
    """The names of the conversations in the list."""
    page = await kept.listing(caller, 100, None)
    assert page is not None
    return [summary.conversation_id for summary in page.summaries]


def query(path: Path, statement: str, *values: Any) -> list[Any]:
    """The rows of a statement, by a connection of its own."""
    with closing(sqlite3.connect(path, timeout=5, isolation_level=None)) as connection:
        return connection.execute(statement, values).fetchall()
