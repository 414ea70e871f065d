"""Turns on their way into the file, as other processes see them: each storage has locks of its
own.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from aioserver.wings.conversations import turn_locks
from aioserver.wings.conversations.queue import Key
from aioserver.wings.conversations.turn_locks import TurnLocks
from tests.support.waiting import ticks

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.real_time,
    pytest.mark.skipif(not turn_locks.SUPPORTED, reason="this system has no such locks"),
]
C, D = Key("me", "c"), Key("me", "d")


@pytest.fixture
def pair(tmp_path: Path) -> tuple[TurnLocks, TurnLocks]:
    locks = TurnLocks(str(tmp_path / "h.db")), TurnLocks(str(tmp_path / "h.db"))
    for each in locks:
        each.open()
    return locks


async def waits(locks: TurnLocks, key: Key = C) -> bool:
    """Whether a question of a conversation has to wait now."""
    task = asyncio.create_task(locks.wait(key))
    await ticks()
    ended = task.done()
    task.cancel()
    return not ended


async def test_a_question_waits_for_a_turn_that_another_process_writes(
    pair: tuple[TurnLocks, TurnLocks],
) -> None:
    here, there = pair
    here.add(C)
    here.add(C)
    assert not await waits(here)
    assert await waits(there)
    assert not await waits(there, D)

    here.remove(C)
    assert await waits(there)
    waiting = asyncio.create_task(there.wait(C))
    here.remove(C)
    await waiting

    assert not await waits(there)
    here.close()
    there.close()


async def test_several_processes_write_turns_of_one_conversation(
    pair: tuple[TurnLocks, TurnLocks],
) -> None:
    here, there = pair
    here.add(C)
    there.add(C)
    assert await waits(here)
    assert await waits(there)

    here.remove(C)
    assert not await waits(there)
    assert await waits(here)
    # As when its process dies.
    there.close()
    assert not await waits(here)
    here.close()


async def test_nobody_waits_for_ever(
    pair: tuple[TurnLocks, TurnLocks], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turn_locks, "PATIENCE", 0.01)
    here, there = pair
    here.add(C)

    await there.wait(C)

    here.close()
    there.close()


async def test_without_the_file_of_locks_nothing_waits(tmp_path: Path) -> None:
    locks = TurnLocks(str(tmp_path / "missing" / "h.db"))
    locks.open()
    locks.add(C)
    locks.remove(C)

    assert not await waits(locks)
    locks.close()
