"""The file of conversations fails: it costs the history and never the chat, is said, and ends by
itself.
"""

from __future__ import annotations

import asyncio
import os
import random
import resource
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from aioserver.errors import HistoryUnavailable
from aioserver.gateway.contracts.commands import Commands
from aioserver.gateway.contracts.histories import Answered
from aioserver.wings.conversations import sqlite
from aioserver.wings.conversations.history import History
from aioserver.wings.conversations.redis import RedisHistories
from aioserver.wings.conversations.sqlite_file import (
    APPLICATION_ID,
    KINDS,
    VERSION,
    Broken,
    prepare,
)
from aioserver.wings.conversations.turn import Turn
from tests.support.history import (
    ME,
    NOW,
    conversations,
    keep,
    listed,
    query,
    questions,
    storage,
    written,
)
from tests.support.instances import MemoryStore, World
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aioserver.wings.conversations.sqlite import SqliteStorage

# The file is read and written by threads.
pytestmark = pytest.mark.real_time


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what failed be tried again soon, and locks be waited for not long."""
    monkeypatch.setattr(sqlite, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(sqlite, "LONGEST_PAUSE", 0.05)
    monkeypatch.setattr(sqlite, "LOOK_PERIOD", 0.0)
    for name in ("READ_WAIT", "WRITE_WAIT"):
        monkeypatch.setattr(f"aioserver.wings.conversations.sqlite_file.{name}", 0.02)


def kind(kept: SqliteStorage) -> str | None:
    trouble = kept.stats().trouble
    return None if trouble is None else trouble.kind


def filled(path: Path, turns: int = 50) -> None:
    """Make a file that has turns, without a server."""
    prepare(str(path))
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("INSERT INTO conversations VALUES (1, 'me', 'c', '', 1, 0)")
        connection.executemany(
            "INSERT INTO turns VALUES (NULL, 1, ?, 1, 1, 2000, ?, ?)",
            [(NOW, f"{number}", "x" * 2000) for number in range(turns)],
        )
        connection.commit()


def truncated(path: Path) -> None:
    filled(path)
    os.truncate(path, path.stat().st_size // 2)


def random_bytes(path: Path) -> None:
    path.write_bytes(random.randbytes(100_000))


def damaged(path: Path) -> None:
    filled(path)
    data = bytearray(path.read_bytes())
    data[4096:40960] = random.randbytes(36864)
    path.write_bytes(data)


def text(path: Path) -> None:
    path.write_text("this is no database\n" * 100)


def folder(path: Path) -> None:
    path.mkdir()


def pipe(path: Path) -> None:
    os.mkfifo(path)


def of_another_program(path: Path) -> None:
    query(path, "CREATE TABLE events (id INTEGER)")


def newer(path: Path) -> None:
    filled(path)
    query(path, f"PRAGMA user_version = {VERSION + 1}")


def nowhere(path: Path) -> None:
    path.symlink_to(path.parent / "missing" / "h.db")


def left_wal(path: Path) -> None:
    Path(f"{path}-wal").write_bytes(b"of a file that was moved away")


UNUSABLE = [
    (truncated, "corrupt"),
    (random_bytes, "corrupt"),
    (damaged, "corrupt"),
    (text, "corrupt"),
    (folder, "unreachable"),
    (pipe, "unreachable"),
    (of_another_program, "foreign"),
    (newer, "newer"),
    (nowhere, "unreachable"),
    (left_wal, "gone"),
]


@pytest.mark.parametrize(
    ("make", "expected"), UNUSABLE, ids=lambda value: getattr(value, "__name__", value)
)
async def test_a_file_that_cannot_be_used_stays_as_it_is(
    tmp_path: Path, make: object, expected: str
) -> None:
    path = tmp_path / "h.db"
    assert callable(make)
    make(path)
    before = contents(tmp_path)

    async with storage(path) as kept:
        await until(lambda: kind(kept) == expected, state=kept.stats)
        assert await questions(kept) is None
        assert (await History(conversations(), kept).listing(ME, 10, None)).partial
        assert await kept.delete(ME, "c", asked=False) is None
        assert await kept.delete_all(ME, asked=False) is None
        keep(kept, "one")
        await asyncio.sleep(0.1)  # it is tried some times more
        assert (kept.stats().waiting, kept.stats().written) == (1, 0)
        trouble = kept.stats().trouble
        assert trouble is not None
        assert str(path) in trouble.text
        assert trouble.advice == KINDS[expected][1]

        # A try that is under way makes others, which come and go.
        assert contents(tmp_path, before) == before
        for name in before:
            shutil.move(tmp_path / name, tmp_path.parent / f"away-{tmp_path.name}-{name}")
        for left in ("h.db-wal", "h.db-shm"):  # of a try that was under way
            (tmp_path / left).unlink(missing_ok=True)
        await until(lambda: kind(kept) is None, state=kept.stats)
        await written(kept)

        assert await questions(kept) == ["one"]


def contents(folder: Path, names: Iterable[str] | None = None) -> dict[str, bytes]:
    """What is in the files of *folder* with these *names*; None: in all."""
    files = folder.iterdir() if names is None else [folder / name for name in names]
    return {each.name: each.read_bytes() if each.is_file() else b"" for each in files}


async def test_while_another_program_locks_the_file_turns_wait(tmp_path: Path) -> None:
    path = tmp_path / "h.db"
    async with storage(path) as kept:
        keep(kept, "one")
        await written(kept)
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            keep(kept, "two")
            await until(lambda: kind(kept) == "locked", state=kept.stats)

            # No answer waits for it.
            assert kept.keep(ME, "d", Turn.of("three", "3", NOW), NOW) is None
            # It can be read, but has not all of it.
            assert await questions(kept) is None
            assert await listed(kept) == ["c"]
            assert await kept.delete(ME, "c", asked=False) is None
            other.execute("COMMIT")
        await until(lambda: kind(kept) is None)
        await written(kept)

        assert query(path, "SELECT question FROM turns") == [("one",), ("two",), ("three",)]
        assert kept.stats().lost == 0


async def test_what_is_late_for_the_file_is_waited_for_by_other_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, world = tmp_path / "h.db", World()
    # The lock lasts for longer than an answer waits, and not for so long that it is a trouble.
    monkeypatch.setattr(sqlite, "COMMIT_TIMEOUT", 0.02)
    monkeypatch.setattr("aioserver.wings.conversations.sqlite_file.WRITE_WAIT", 20.0)
    here, there = (
        RedisHistories(Commands(MemoryStore(world, name), ""), conversations()) for name in "ab"
    )
    async with storage(path, late=here) as kept, storage(path, late=there) as read:
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            committed = kept.keep(ME, "c", Turn.of("one", "1", NOW), NOW)
            assert committed is not None
            await committed
            assert [len(marks) for marks in world.marks.values()] == [1]

            asked = asyncio.create_task(questions(read))
            calls = world.calls
            await until(lambda: world.calls > calls)
            other.execute("COMMIT")
        assert await asked == ["one"]
        await until(lambda: not any(world.marks.values()))
        assert await questions(read) == ["one"]
        await here.close()


async def test_answers_that_wait_when_the_file_fails_wait_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "COMMIT_TIMEOUT", 1000.0)
    path = tmp_path / "h.db"
    async with storage(path) as kept:
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            ending = kept.keep(ME, "c", Turn.of("one", "1", NOW), NOW)
            assert ending is not None
            await ending
            assert (kind(kept), kept.stats().waiting) == ("locked", 1)
        await until(lambda: kind(kept) is None)
        await written(kept)

        assert await questions(kept) == ["one"]


async def test_a_file_that_is_locked_for_all_costs_only_the_history(tmp_path: Path) -> None:
    path = tmp_path / "h.db"
    filled(path, 3)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        other.execute("INSERT INTO turns VALUES (NULL, 1, 1, 1, 1, 1, '', '')")
        async with storage(path) as kept:
            assert kind(kept) == "locked"
            assert await questions(kept) is None
            keep(kept, "new")
            other.execute("ROLLBACK")
            other.close()
            await until(lambda: kind(kept) is None, state=kept.stats)
            await written(kept)

            assert await questions(kept) == ["0", "1", "2", "new"]


async def test_a_file_that_was_moved_away_is_followed_by_a_new_one(tmp_path: Path) -> None:
    path, away = tmp_path / "h.db", tmp_path / "away.db"
    async with storage(path) as kept:
        keep(kept, "one")
        await written(kept)
        path.rename(away)
        keep(kept, "two")  # it may get into the old file, if nobody has looked since
        await until(lambda: kind(kept) == "gone", state=kept.stats)
        # They belong to the file that was moved, and would damage a new one.
        for suffix in ("-wal", "-shm"):
            shutil.move(f"{path}{suffix}", f"{away}{suffix}")
        keep(kept, "three")
        await until(lambda: kind(kept) is None, state=kept.stats)
        await written(kept)

        kept_questions = await questions(kept)
    assert [
        *(row[0] for row in query(away, "SELECT question FROM turns")),
        *(kept_questions or ()),
    ] == [*("one", "two", "three")]


async def test_a_file_that_breaks_while_it_is_open_is_not_written_any_more(tmp_path: Path) -> None:
    path = tmp_path / "h.db"
    filled(path, 200)
    async with storage(path) as kept:
        with path.open("r+b") as file:
            file.write(random.randbytes(path.stat().st_size))
        for number in range(20):
            keep(kept, f"{number}", f"c{number}")
            await questions(kept)
        await until(lambda: kind(kept) == "corrupt", state=kept.stats)
        assert await kept.load(ME, "c") is None
        # What was committed before has its place in the file when the connections are closed.
        await until(lambda: not Path(f"{path}-wal").exists())
        broken = path.read_bytes()

        keep(kept, "more")
        await asyncio.sleep(0.1)  # it is tried some times more

        assert kept.stats().waiting
    assert path.read_bytes() == broken


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
async def test_a_full_disk_loses_nothing_that_fits_into_memory(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = await asyncio.create_subprocess_exec(
        "mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", disk, stderr=asyncio.subprocess.DEVNULL
    )
    if await mounted.wait():
        pytest.skip("no mount here")
    try:
        async with storage(disk / "h.db") as kept:
            keep(kept, "one")
            await written(kept)
            fill(disk / "ballast")
            for number in range(20):
                keep(kept, f"{number}" + "x" * 2000)
            await until(lambda: kind(kept) == "full", state=kept.stats)

            assert await questions(kept) is None
            assert await listed(kept) == ["c"]
            (disk / "ballast").unlink()
            await until(lambda: kind(kept) is None, state=kept.stats)
            await written(kept)

            kept_questions = await questions(kept) or []
            assert [each[:2].strip("x") for each in kept_questions] == ["on", *map(str, range(20))]
            assert kept.stats().lost == 0
    finally:
        unmounted = await asyncio.create_subprocess_exec("umount", "-l", disk)
        await unmounted.wait()


def fill(path: Path) -> None:
    """Write until the disk is full."""
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            return


async def test_a_file_that_may_not_grow_is_written_when_it_may(tmp_path: Path) -> None:
    async with storage(tmp_path / "h.db") as kept:
        keep(kept, "one")
        await written(kept)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            for number in range(40):
                keep(kept, f"{number}" + "x" * 5000)
            await until(lambda: kind(kept) in {"full", "io"}, state=kept.stats)
            assert await questions(kept) is None
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        await until(lambda: kind(kept) is None, state=kept.stats)
        await written(kept)

        assert len(await questions(kept) or ()) == 41
        assert kept.stats().lost == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
@pytest.mark.parametrize("what", ["file", "folder"])
async def test_what_the_user_of_the_server_may_not_write_is_reported(
    tmp_path: Path, what: str
) -> None:
    path = tmp_path / "h.db"
    if what == "file":
        filled(path, 2)
        path.chmod(0o444)
    for each in (tmp_path, *list(tmp_path.parents)[:-2]):
        each.chmod(0o755)
    os.seteuid(65534)
    try:
        async with storage(path) as kept:
            keep(kept, "one")
            assert kind(kept) in {"read_only", "unreachable"}
            assert await questions(kept) is None
    finally:
        os.seteuid(0)


@pytest.mark.parametrize(("bound", "most"), [("MAX_WAITING", 2), ("MAX_WAITING_BYTES", 100)])
async def test_beyond_its_bound_the_queue_loses_its_oldest_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: str, most: int
) -> None:
    monkeypatch.setattr(sqlite, bound, most)
    path = tmp_path / "h.db"
    folder(path)
    async with storage(path) as kept:
        for number in range(10):
            keep(kept, f"{number}" + "x" * 20, f"c{number}")  # 46 bytes
        assert (kept.stats().waiting, kept.stats().lost) == (2, 8)
        path.rmdir()
        await until(lambda: kind(kept) is None)
        await written(kept)

        assert await listed(kept) == ["c9", "c8"]


async def test_the_chat_goes_on_with_what_the_process_remembers(tmp_path: Path) -> None:
    path = tmp_path / "h.db"
    async with storage(path) as kept:
        history = History(conversations(), kept)
        history.keep(Answered("one", "1", history.ask(ME, "c"), None, 1.0))
        await written(kept)
        path.unlink()
        folder(path)
        history.keep(Answered("two", "2", history.ask(ME, "c"), None, 1.0))
        await until(lambda: kind(kept) is not None, state=kept.stats)

        await history.begin(history.ask(ME, "c"), known=True)
        sent = history.messages(ME, "c", "three")
        dialogue, page = await history.read(ME, "c"), await history.listing(ME, 10, None)
        with pytest.raises(HistoryUnavailable):
            await history.delete(ME, "c")
        with pytest.raises(HistoryUnavailable):
            await history.delete_all(ME)

        assert [each["content"] for each in sent] == ["one", "1", "two", "2", "three"]
        assert (len(dialogue.turns), dialogue.partial) == (2, True)
        assert ([each.conversation_id for each in page.summaries], page.partial) == (["c"], True)
        path.rmdir()


# Versions.

VERSION_1 = """
CREATE TABLE conversations (
    id INTEGER PRIMARY KEY, caller TEXT NOT NULL, name TEXT NOT NULL, address TEXT NOT NULL,
    updated REAL NOT NULL, size INTEGER NOT NULL DEFAULT 0, UNIQUE (caller, name));
CREATE INDEX listed ON conversations (caller, address, updated);
CREATE INDEX oldest ON conversations (updated);
CREATE TABLE turns (
    id INTEGER PRIMARY KEY, conversation INTEGER NOT NULL REFERENCES conversations ON DELETE CASCADE,
    ended REAL NOT NULL, question_tokens INTEGER NOT NULL, answer_tokens INTEGER NOT NULL,
    size INTEGER NOT NULL, question TEXT NOT NULL, answer TEXT NOT NULL);
CREATE INDEX turns_of ON turns (conversation);
CREATE INDEX ended ON turns (ended);
CREATE TRIGGER turn_kept AFTER INSERT ON turns BEGIN
    UPDATE conversations SET size = size + NEW.size WHERE id = NEW.conversation; END;
CREATE TRIGGER turn_deleted AFTER DELETE ON turns BEGIN
    UPDATE conversations SET size = size - OLD.size WHERE id = OLD.conversation; END;
INSERT INTO conversations VALUES (1, 'me', 'c', '', 1700000000.0, 0);
INSERT INTO turns VALUES (1, 1, 1700000000.0, 1, 1, 2, 'q', 'a');
PRAGMA user_version = 1;
"""


async def test_a_file_of_the_first_version_is_brought_to_the_newest(tmp_path: Path) -> None:
    path = tmp_path / "h.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(f"PRAGMA application_id = {APPLICATION_ID};{VERSION_1}")

    async with storage(path) as kept:
        assert await questions(kept) == ["q"]
        keep(kept, "new")
        await written(kept)
        assert await questions(kept) == ["q", "new"]
        assert await kept.delete(ME, "c", asked=False) is True

    assert query(path, "PRAGMA user_version") == [(VERSION,)]


def test_a_migration_that_fails_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "h.db"
    filled(path, 3)
    monkeypatch.setattr("aioserver.wings.conversations.sqlite_file.VERSION", VERSION + 1)
    bad = ("CREATE TABLE more (id INTEGER);\nCREATE TABLE turns (id INTEGER);\n",)
    monkeypatch.setattr(
        "aioserver.wings.conversations.sqlite_file.MIGRATIONS", (*[""] * VERSION, *bad)
    )

    with pytest.raises(Broken):
        prepare(str(path))

    assert query(path, "PRAGMA user_version") == [(VERSION,)]
    assert query(path, "SELECT count(*) FROM sqlite_schema WHERE name = 'more'") == [(0,)]


async def test_a_new_file_that_many_open_at_once_is_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aioserver.wings.conversations.sqlite_file.WRITE_WAIT", 5.0)
    path = str(tmp_path / "h.db")

    made = await asyncio.gather(*(asyncio.to_thread(prepare, path) for _ in range(8)))

    assert len(set(made)) == 1
    assert query(tmp_path / "h.db", "PRAGMA user_version") == [(VERSION,)]


def test_a_start_may_clear_the_file(tmp_path: Path) -> None:
    path = tmp_path / "h.db"
    filled(path, 3)

    prepare(str(path), clear=True)

    assert query(path, "SELECT count(*) FROM turns") == [(0,)]


def test_a_backup_is_one_file_made_while_the_server_runs(tmp_path: Path) -> None:
    path, backup = tmp_path / "h.db", tmp_path / "backup.db"
    filled(path, 3)

    query(path, "VACUUM INTO ?", str(backup))

    assert prepare(str(backup))
    assert query(backup, "SELECT count(*) FROM turns") == [(3,)]
