"""Conversations in Redis: what is kept, for how long, and how much."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.auth.callers import Caller, anonymous
from aioserver.config.chat import Context, Persistence
from aioserver.gateway.contracts.commands import Commands
from aioserver.wings.conversations.memory import Conversations
from aioserver.wings.conversations.redis import RedisHistories
from aioserver.wings.conversations.turn import Page, Turn
from tests.support.instances import MemoryStore, World

if TYPE_CHECKING:
    from collections.abc import Callable

CALLER = Caller("somebody")


def conversations(**persistence: Any) -> Conversations:
    context = Context(max_tokens=100_000, reserve_tokens=0, preserve_recent=2)
    return Conversations(context, Persistence(**persistence))


def make(
    store: MemoryStore, kept: Conversations | None = None, clock: Callable[[], float] = time.time
) -> RedisHistories:
    commands = Commands(store, "")
    return RedisHistories(commands, conversations() if kept is None else kept, clock)


async def keep(
    histories: RedisHistories,
    question: str,
    answer: str,
    *,
    ended: float = 0.0,
    caller: Caller = CALLER,
    name: str = "c",
) -> None:
    now = ended or time.time()
    histories.keep(caller, name, Turn.of(question, answer, now), now)
    await histories.close()


async def load(histories: RedisHistories, kept: Conversations) -> None:
    """Do what `History.load` does."""
    loaded = await histories.load(CALLER, "c")
    if loaded is not None and loaded.certain:
        kept.replace(CALLER, "c", loaded.turns)


def contents(kept: Conversations) -> list[str]:
    return [message["content"] for message in kept.history(CALLER, "c", "now")]


async def test_what_one_instance_keeps_another_loads() -> None:
    world = World()
    there = conversations()
    a, b = make(MemoryStore(world, "a")), make(MemoryStore(world, "b"), there)
    await keep(a, "q1", "a1")
    await keep(a, "q2", "a2")
    await keep(a, "q3", "a3", caller=Caller("other"))

    await load(b, there)

    assert contents(there) == ["q1", "a1", "q2", "a2", "now"]


async def test_turns_that_are_too_old_are_not_sent() -> None:
    now = time.time()
    kept = conversations(retention_policy="time_based", retention_days=1)
    histories = make(MemoryStore(World(), "a"), kept)
    await keep(histories, "q1", "a1", ended=now - 90_000)
    await keep(histories, "q2", "a2", ended=now - 60)

    await load(histories, kept)

    assert contents(kept) == ["q2", "a2", "now"]


async def test_the_policy_bounds_what_is_loaded() -> None:
    world = World()
    kept = conversations(retention_policy="message_count", max_messages_per_conversation=4)
    histories = make(MemoryStore(world, "a"), kept)
    for number in range(5):
        await keep(histories, f"q{number}", f"a{number}")

    await load(histories, kept)

    assert contents(kept) == ["q3", "a3", "q4", "a4", "now"]
    assert sum(map(len, world.conversations.values())) == 2


async def test_what_is_no_turn_is_left_out() -> None:
    world, kept = World(), conversations()
    histories = make(MemoryStore(world, "a"), kept)
    await keep(histories, "q1", "a1")
    (turns,) = world.conversations.values()
    turns[:0] = [b"", b"\xc1", b"\x93\x01\x02\x03"]

    await load(histories, kept)

    assert contents(kept) == ["q1", "a1", "now"]


async def test_an_unknown_conversation_leaves_what_is_known_here() -> None:
    kept = conversations()
    kept.keep(CALLER, "c", Turn.of("q1", "a1", time.time()))

    await load(make(MemoryStore(World(), "a"), kept), kept)

    assert contents(kept) == ["q1", "a1", "now"]


@pytest.mark.parametrize("deleter", ["a", "b"])
async def test_what_one_instance_deletes_no_other_has(deleter: str) -> None:
    world, there = World(), conversations()
    a, b = make(MemoryStore(world, "a")), make(MemoryStore(world, "b"), there)
    await keep(a, "q1", "a1")
    await keep(a, "q2", "a2", name="d")
    await load(b, there)

    _loaded, begun = await a.begin(CALLER, "c", known=True)
    assert await (a if deleter == "a" else b).delete(CALLER, "c", asked=False)
    now = time.time() + 3600
    a.keep(CALLER, "c", Turn.of("q3", "a3", now), now, begun)
    await a.close()
    await load(b, there)

    assert contents(there) == ["now"]
    page = await b.listing(CALLER, 50, None)
    assert page is not None
    assert [summary.conversation_id for summary in page.summaries] == ["d"]
    assert await b.delete(CALLER, "c", asked=False) is False
    assert await b.delete_all(CALLER, asked=False) == 1
    assert await a.listing(CALLER, 50, None) == Page([], None)


async def test_a_list_has_pages_and_titles() -> None:
    world = World()
    a, b = make(MemoryStore(world, "a")), make(MemoryStore(world, "b"))
    for number in range(5):
        await keep(a, f"question  {number}", "x", ended=1e9 + number, name=f"c{number}")
    await keep(a, "another", "x", ended=1e9 + 9, name="c1")

    first = await b.listing(CALLER, 3, None)
    assert first is not None
    second = await b.listing(CALLER, 3, first.after)
    assert second is not None

    assert [(s.conversation_id, s.title, s.messages) for s in first.summaries] == [
        ("c1", "question 1", 4),
        ("c4", "question 4", 2),
        ("c3", "question 3", 2),
    ]
    assert [summary.conversation_id for summary in second.summaries] == ["c2", "c0"]
    assert second.after is None


async def test_without_keys_a_list_is_that_of_an_address() -> None:
    histories = make(MemoryStore(World(), "a"))
    await keep(histories, "q", "a", caller=anonymous("192.0.2.1"))

    here = await histories.listing(anonymous("192.0.2.1"), 50, None)
    there = await histories.listing(anonymous("192.0.2.2"), 50, None)

    assert here is not None
    assert there is not None
    assert (len(here.summaries), len(there.summaries)) == (1, 0)
    assert await histories.load(anonymous("192.0.2.2"), "c")  # its id is enough
