"""What each store of conversations promises: in memory, in a file, and in Redis.

One process answers, and another one is asked next; in memory both are the same.
"""

from __future__ import annotations

import itertools
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING, Protocol

import pytest

from aioserver.auth.callers import Caller, anonymous
from aioserver.errors import ConversationNotFound
from aioserver.gateway.contracts.commands import Commands
from aioserver.gateway.contracts.histories import Answered
from aioserver.telemetry.counters import Counter
from aioserver.wings.conversations.history import History
from aioserver.wings.conversations.redis import RedisHistories
from aioserver.wings.conversations.sqlite import SqliteStorage
from tests.support.history import ME, NOW, WIDE, YOU, clock, conversations, policy
from tests.support.instances import MemoryStore, World

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from aioserver.config.settings import Persistence
    from tests.support.clock import FakeClock

# The file is read and written by threads.
pytestmark = pytest.mark.real_time
DAY = 86_400.0
HERE, THERE = anonymous("192.0.2.1"), anonymous("192.0.2.2")


class Open(Protocol):
    """Opens the store as another process does."""

    async def __call__(self, persistence: Persistence | None = None) -> History: ...


class Question:
    """A question that has begun and has no answer yet."""

    def __init__(self, history: History, caller: Caller = ME, name: str = "c") -> None:
        self._history = history
        self._asked = history.ask(caller, name)

    async def begin(self) -> Question:
        self._begun = await self._history.begin(self._asked, known=True)
        return self

    def shown(self) -> list[str]:
        """What the model is shown before it."""
        caller, name = self._asked.caller, self._asked.conversation_id
        return [each["content"] for each in self._history.messages(caller, name, "?")][:-1]

    async def end(self, text: str) -> None:
        """Keep the answer to *text*, and wait as the end of an answer does."""
        ending = self._history.keep(Answered(text, "a", self._asked, None, 1.0), self._begun)
        if ending is not None:
            await ending
        self._history.done(self._asked)

    def leave(self) -> None:
        """Let no turn come of it."""
        if self._begun is not None:
            self._history.leave(self._asked, self._begun)
        self._history.done(self._asked)


async def keep(history: History, text: str, name: str = "c", caller: Caller = ME) -> None:
    await (await Question(history, caller, name).begin()).end(text)


async def shown(history: History, name: str = "c", caller: Caller = ME) -> list[str]:
    question = await Question(history, caller, name).begin()
    question.leave()
    return question.shown()[::2]


async def listed(history: History, caller: Caller = ME) -> list[str]:
    page = await history.listing(caller, 100, None)
    assert not page.partial
    return [summary.conversation_id for summary in page.summaries]


@pytest.fixture
def now() -> FakeClock:
    return clock()


@pytest.fixture(params=["memory", "sql", "redis"])
async def another(
    request: pytest.FixtureRequest, tmp_path: Path, now: FakeClock
) -> AsyncIterator[Open]:
    # The clock of the server has milliseconds, and no two of its answers the same time.
    names, world = itertools.count(), World(slow=0.002)
    only = History(conversations(now=now))

    async def in_memory(persistence: Persistence | None = None) -> History:
        only.apply(WIDE, persistence or policy())
        return only

    async def in_file(persistence: Persistence | None = None) -> History:
        counts = {"written": Counter(), "lost": Counter()}
        path, bounds = str(tmp_path / "h.db"), persistence or policy()
        storage = SqliteStorage(path, bounds, now, counts, shared=True)
        stack.push_async_callback(storage.close)
        await storage.open()
        return History(conversations(persistence, now), storage)

    async def in_redis(persistence: Persistence | None = None) -> History:
        own = conversations(persistence, now)
        commands = Commands(MemoryStore(world, f"{next(names)}"), "")
        storage = RedisHistories(commands, own, now)
        stack.push_async_callback(storage.close)
        return History(own, storage)

    async with AsyncExitStack() as stack:
        yield {"memory": in_memory, "sql": in_file, "redis": in_redis}[request.param]


async def test_each_process_shows_a_model_what_was_said_before(another: Open) -> None:
    here, there = await another(), await another()
    await keep(here, "one")
    await keep(there, "two")
    await keep(here, "else", "d")

    for history in (here, there, await another()):
        question = await Question(history).begin()
        question.leave()
        assert question.shown() == ["one", "a", "two", "a"]
        assert await shown(history, "e") == []


async def test_conversations_belong_to_their_caller(another: Open) -> None:
    here, there = await another(), await another()
    await keep(here, "mine")
    await keep(here, "yours", caller=YOU)

    for history in (here, there):
        assert await shown(history) == ["mine"]
        assert await shown(history, caller=YOU) == ["yours"]
        assert await shown(history, caller=Caller("third")) == []
        with pytest.raises(ConversationNotFound):
            await history.read(Caller("third"), "c")
        with pytest.raises(ConversationNotFound):
            await history.delete(Caller("third"), "c")


@pytest.mark.parametrize(
    ("bounds", "left"),
    [
        (policy("token_limit", max_tokens_per_conversation=6), 3),
        (policy("message_count", max_messages_per_conversation=5), 2),
        # The newest stays.
        (policy("token_limit", max_tokens_per_conversation=1), 1),
        (policy("message_count", max_messages_per_conversation=1), 1),
        (policy("time_based", retention_days=0.7), 4),
        (policy(), 5),
    ],
)
async def test_a_conversation_has_the_turns_that_the_policy_retains(
    another: Open, now: FakeClock, bounds: Persistence, left: int
) -> None:
    here, there = await another(bounds), await another(bounds)
    for number in range(5):
        now.now += DAY / 5
        await keep(here, f"q{number}")

    for history in (here, there):
        assert await shown(history) == [f"q{number}" for number in range(5 - left, 5)]
        dialogue = await history.read(ME, "c")
        assert len(dialogue.turns) == left


async def test_a_list_has_pages_and_titles(another: Open, now: FakeClock) -> None:
    here, there = await another(), await another()
    for name in ("c0", "c1", "c2", "c3", "c4", "c1"):
        now.now += 1
        await keep(here, f"question  of\n{name}", name)

    first = await there.listing(ME, 3, None)
    second = await there.listing(ME, 3, first.after)

    assert [(each.conversation_id, each.title, each.messages) for each in first.summaries] == [
        ("c1", "question of c1", 4),
        ("c4", "question of c4", 2),
        ("c3", "question of c3", 2),
    ]
    assert first.summaries[0].updated == NOW + 6
    assert [each.conversation_id for each in second.summaries] == ["c2", "c0"]
    assert second.after is None


async def test_without_keys_a_list_is_that_of_an_address_and_an_id_is_enough_to_read(
    another: Open,
) -> None:
    here, there = await another(), await another()
    await keep(here, "q", "a", HERE)
    await keep(here, "q", "b", THERE)

    assert (await listed(there, HERE), await listed(there, THERE)) == (["a"], ["b"])
    assert await shown(there, "a", THERE) == ["q"]
    assert await there.delete_all(THERE) == 1
    assert (await listed(here, HERE), await listed(here, THERE)) == (["a"], [])


@pytest.mark.parametrize("deleter", ["same", "other"])
async def test_what_was_asked_before_a_deletion_is_not_kept(
    another: Open, now: FakeClock, deleter: str
) -> None:
    here, there = await another(), await another()
    await keep(here, "one")
    await keep(here, "one", "d")
    late, other = await Question(here).begin(), await Question(here, name="d").begin()
    now.now += 1

    await (here if deleter == "same" else there).delete(ME, "c")
    now.now += 1
    await late.end("late")
    await other.end("two")

    for history in (here, there):
        assert await shown(history) == []
        assert await shown(history, "d") == ["one", "two"]
        assert await listed(history) == ["d"]
        with pytest.raises(ConversationNotFound):
            await history.read(ME, "c")
    await keep(there, "new")
    assert await shown(here) == ["new"]


@pytest.mark.parametrize("deleter", ["same", "other"])
async def test_a_first_answer_whose_conversation_is_deleted_meanwhile_is_not_kept(
    another: Open, now: FakeClock, deleter: str
) -> None:
    here, there = await another(), await another()
    late = await Question(here).begin()
    now.now += 1

    with suppress(ConversationNotFound):
        await (here if deleter == "same" else there).delete(ME, "c")
    now.now += 1
    await late.end("late")

    assert (await listed(here), await shown(here), await shown(there)) == ([], [], [])


@pytest.mark.parametrize("deleter", ["same", "other"])
async def test_all_of_a_caller_are_deleted_and_no_others(
    another: Open, now: FakeClock, deleter: str
) -> None:
    here, there = await another(), await another()
    for number in range(5):
        await keep(here, "q", f"c{number}")
    await keep(here, "q", caller=YOU)
    late = await Question(here, name="c0").begin()
    now.now += 1

    assert await (here if deleter == "same" else there).delete_all(ME) == 5
    now.now += 1
    await late.end("late")

    for history in (here, there):
        assert await listed(history) == []
        assert await listed(history, YOU) == ["c"]
        assert await history.delete_all(ME) == 0


# In Redis, what an instance knows is beside what all know.


def in_redis(now: FakeClock, persistence: Persistence | None = None) -> tuple[World, History]:
    world, kept = World(), conversations(persistence, now)
    return world, History(kept, RedisHistories(Commands(MemoryStore(world, "a"), ""), kept, now))


async def test_what_is_no_turn_in_redis_is_left_out(now: FakeClock) -> None:
    world, history = in_redis(now)
    await keep(history, "one")
    (turns,) = world.conversations.values()
    turns[:0] = [b"", b"\xc1", b"\x93\x01\x02\x03"]

    assert await shown(history) == ["one"]


async def test_redis_has_no_more_turns_than_the_policy_retains(now: FakeClock) -> None:
    world, history = in_redis(now, policy("message_count", max_messages_per_conversation=4))
    for number in range(5):
        await keep(history, f"q{number}")

    assert [len(turns) for turns in world.conversations.values()] == [2]
    assert await shown(history) == ["q3", "q4"]


async def test_a_conversation_that_redis_has_forgotten_goes_on_with_what_is_known_here(
    now: FakeClock,
) -> None:
    world, history = in_redis(now)
    await keep(history, "one")
    world.conversations.clear()

    assert await shown(history) == ["one"]
