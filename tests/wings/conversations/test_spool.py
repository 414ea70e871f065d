"""What a killed process leaves: each turn whose answer was complete is written by the next."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from aioserver.wings.conversations import spool as spool_module
from aioserver.wings.conversations.spool import Spool
from aioserver.wings.conversations.turn_locks import SUPPORTED
from tests.support.history import ME, keep, query, questions, storage, written

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.real_time,
    pytest.mark.skipif(not SUPPORTED, reason="this system has no such locks"),
]


def opened(path: Path) -> tuple[Spool, list[bytes]]:
    spool = Spool(str(path))
    return spool, spool.open()


def test_what_was_added_and_not_cleared_is_for_the_next_process(tmp_path: Path) -> None:
    path = tmp_path / "h.db"
    spool, left = opened(path)
    assert left == []
    for record in (b"one", b"two"):
        spool.add(record)
    spool.clear()
    for record in (b"3", b"four" * 1000):
        spool.add(record)
    spool.close(empty=False)

    spool, left = opened(path)
    assert left == [b"3", b"four" * 1000]
    spool.add(b"five")
    spool.close(empty=False)
    spool, left = opened(path)
    assert left == [b"3", b"four" * 1000, b"five"]
    spool.close(empty=True)

    assert list(tmp_path.iterdir()) == []


def test_each_process_has_its_own_and_takes_those_of_the_dead(tmp_path: Path) -> None:
    path = tmp_path / "h.db"
    spools = [opened(path)[0] for _ in range(3)]
    for number, spool in enumerate(spools):
        spool.add(b"%d" % number)
    spools[0].close(empty=False)
    spools[2].close(empty=False)

    last, left = opened(path)

    assert left == [b"0", b"2"]
    assert len(list(tmp_path.iterdir())) == 2
    last.close(empty=False)
    last, left = opened(path)
    assert left == [b"0", b"2"]
    last.close(empty=True)
    spools[1].close(empty=True)


def test_a_spool_that_is_full_or_cut_loses_no_earlier_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_module, "SIZE", 100)
    path = tmp_path / "h.db"
    spool, _ = opened(path)
    for number in range(20):
        spool.add(b"record %d" % number)
    assert spool.crowded
    spool.close(empty=False)
    (file,) = tmp_path.iterdir()
    data = file.read_bytes()

    _, left = opened(path)
    assert left == [b"record %d" % number for number in range(len(left))]
    assert len(left) == 5
    for cut in range(len(data)):
        records = list(spool_module.records_in(data[:cut]))
        assert records == left[: len(records)]
    assert list(spool_module.records_in(random.randbytes(100))) == []


async def test_a_turn_is_written_once_although_its_process_was_killed(tmp_path: Path) -> None:
    path = tmp_path / "h.db"
    async with storage(path) as kept:
        keep(kept, "one")
        await written(kept)
        keep(kept, "two", "d")  # not written yet
        keep(kept, "three", "d")
        killed = (tmp_path / "h.db-spool-0").read_bytes()
        await written(kept)
    # It died after the first of the two was written.
    query(path, "DELETE FROM turns WHERE question = 'three'")
    (tmp_path / "h.db-spool-0").write_bytes(killed)

    async with storage(path) as kept:
        await written(kept)
        assert await questions(kept, "d", ME) == ["two", "three"]
        assert await questions(kept, "c") == ["one"]
        assert kept.stats().lost == 0


async def test_what_could_not_be_written_before_a_stop_is_written_after_it(
    tmp_path: Path,
) -> None:
    path = tmp_path / "h.db"
    async with storage(path) as kept:
        keep(kept, "one")
        await written(kept)
        path.rename(tmp_path / "away")
        path.mkdir()
        keep(kept, "two")
        await kept.close()
    path.rmdir()
    (tmp_path / "away").rename(path)
    async with storage(path) as kept:
        await written(kept)
        assert await questions(kept) == ["one", "two"]
