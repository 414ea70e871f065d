"""Claims, logs, conversations and responses over a real server of Redis' kind."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.gateway.contracts.commands import ITEM_OVERHEAD, Commands
from aioserver.wings.cluster.answers.claims import Claim, Claims
from aioserver.wings.cluster.redis_commands import RedisCommands
from aioserver.wings.conversations.redis import Listed, RedisTurns
from aioserver.wings.responses.redis import MISSING, NEXT, NO_ROOM, PRESENT, WRITTEN, RedisChains
from tests.support.chat import chat, resume, to_end, until_status
from tests.support.instances import Instance, World, instance_of
from tests.support.redis_server import RedisServer
from tests.support.server import ENDLESS, PACED
from tests.support.simulator import Behaviour
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

# Another process takes part, whose time does not jump.
pytestmark = pytest.mark.real_time

# Bytes and turns of a conversation, and seconds for which it is kept.
BOUNDS = (1000, 4, 60.0)
PREFIX = "aio:{test}:"
NOBODYS = Claim("", 0.0)


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path) as server:
        yield server


class Member:
    """An instance, with its connection for commands."""

    def __init__(self, url: str, name: str) -> None:
        self.name = name
        self.commands = RedisCommands(url)


@pytest.fixture
async def join(valkey: RedisServer) -> AsyncIterator[Callable[[str], Any]]:
    """Make a member that is connected: `await join("a")`."""
    async with AsyncExitStack() as stack:

        async def make(name: str) -> Member:
            member = Member(valkey.url, name)
            stack.push_async_callback(member.commands.close)
            await until(lambda: member.commands.connected)
            await member.commands.execute("ZADD", f"{PREFIX}m", 1, name)
            return member

        yield make


def commands_of(member: Member) -> Commands:
    return Commands(member.commands, PREFIX)


def claims_of(member: Member) -> Claims:
    return Claims(commands_of(member), member.name)


async def test_a_claim_has_one_owner(join: Any) -> None:
    a, b = await join("a"), await join("b")
    at_a, at_b = claims_of(a), claims_of(b)

    assert await at_b.find("n") == NOBODYS
    assert await at_a.take("n") == Claim("a", 0.0)
    assert await at_a.take("n") == Claim("a", 0.0)
    assert await at_a.find("n") == NOBODYS
    assert await at_b.take("n") == Claim("a", 0.0)
    assert await at_b.find("n") == Claim("a", 0.0)
    # The owner has lost it, or is no member any more.
    assert await at_b.find("n", "a") == Claim("a", 0.0)
    assert await at_b.take("n", "a") == Claim("b", 0.0)
    await b.commands.execute("ZREM", f"{PREFIX}m", "b")
    assert await at_a.find("n") == NOBODYS
    assert await at_a.take("n") == Claim("a", 0.0)


async def test_a_claim_lives_as_long_as_it_is_renewed(join: Any) -> None:
    a, b = await join("a"), await join("b")
    at_a, at_b = claims_of(a), claims_of(b)
    await at_a.take("n", seconds=60)

    await at_a.renew({"n": 90, "gone": 90})

    assert await a.commands.execute("PTTL", f"{PREFIX}o:n") > 80_000
    assert (await at_b.find("gone")).owner == "a"
    # What is another's stays so.
    await at_b.renew({"n": 0})
    assert (await at_b.find("n")).owner == "a"
    await at_a.renew({"n": 0})
    assert await at_b.find("n") == NOBODYS


async def test_a_log_that_was_handed_over_outlives_its_owner(join: Any) -> None:
    a, b, c = await join("a"), await join("b"), await join("c")
    at_a, at_b, at_c = claims_of(a), claims_of(b), claims_of(c)
    await at_a.take("n")
    await at_a.put_log("n", b"log", 30)
    # Its owner still serves it.
    assert await at_b.find("n") == Claim("a", 0.0)
    assert (await at_b.find("n", "a")).owner == ""
    await a.commands.execute("ZREM", f"{PREFIX}m", "a")

    assert (await at_b.find("n")).owner == ""
    assert 29 < (await at_b.find("n")).seconds <= 30
    assert await at_b.get_log("n") == b"log"
    # Of two that adopt it, one does.
    claims = await asyncio.gather(at_b.take("n"), at_c.take("n"))
    assert claims[0].owner == claims[1].owner
    assert sorted(29 < claim.seconds <= 30 for claim in claims) == [False, True]


@pytest.mark.parametrize("seconds", [0.0, 0.0004, -1.0])
async def test_a_log_whose_window_ends_while_it_is_handed_over_is_no_fault(
    join: Any, seconds: float
) -> None:
    """A fault would be taken for a server that is away, and keep back all other logs."""
    store = claims_of(await join("a"))

    await store.put_log("n", b"log", seconds)
    await store.put_log("m", b"log", 30)

    assert await store.get_log("m") == b"log"


async def test_a_conversation_keeps_its_newest_turns(join: Any) -> None:
    turns = RedisTurns(commands_of(await join("a")))
    for number in range(10):
        await turns.keep_turn("c", b"%d" % number, (1000, 4, 60.0))
        await turns.keep_turn("d", b"x" * number, (20, 100, 60.0))
    await turns.keep_turn("d", b"y" * 100, (20, 100, 60.0))

    assert (await turns.turns("c"))[:2] == ([b"6", b"7", b"8", b"9"], False)
    # The newest stays, even if it alone is more than the bound.
    assert (await turns.turns("d"))[:2] == ([b"y" * 100], False)


async def test_a_caller_has_a_list_of_its_conversations(join: Any) -> None:
    turns = RedisTurns(commands_of(await join("a")))
    now = time.time()
    for number in range(5):
        listed = Listed("owner", f"c {number}", now + number / 1000, now)
        await turns.keep_turn(f"n{number}", b"%d" % number, BOUNDS, listed)
    await turns.keep_turn("n1", b"again", BOUNDS, Listed("owner", "c 1", now + 1, now))

    page = await turns.conversations("owner", 3, None)
    rest = await turns.conversations("owner", 3, page[-1])

    assert [position.conversation_id for position in page] == ["c 1", "c 4", "c 3"]
    assert [position.conversation_id for position in rest] == ["c 2", "c 0"]
    assert await turns.first_turns(["n1", "unknown", "n0"]) == [(2, b"1"), (0, b""), (1, b"0")]
    assert await turns.conversations("another", 3, None) == []


async def test_a_response_is_kept_with_those_before_it(join: Any) -> None:
    member = await join("a")
    chains = RedisChains(commands_of(member))
    for number in range(1, 6):
        previous = f"r{number - 1}" if number > 1 else ""
        await chains.put_response("o", f"r{number}", b"%d" % number, previous, 100.0, 1 << 20)
    assert await chains.put_response("o", "fork", b"f", "r2", 100.0, 1 << 20) == WRITTEN
    assert await chains.put_response("o", "lost", b"l", "r0", 100.0, 1 << 20) == MISSING

    assert not await chains.has_response("lost")
    assert list((await chains.response_chain("r5", 5))[1]) == [b"5", b"4", b"3", b"2", b"1"]
    assert list((await chains.response_chain("fork", 1000))[1]) == [b"f", b"2", b"1"]
    assert list((await chains.response_chain("r5", 4))[1]) == []
    assert not await chains.has_response("r9")
    # The responses before it live at least as long.
    lives = [await member.commands.execute("PTTL", f"{PREFIX}r:r{n}") for n in range(1, 6)]
    assert min(lives[:-1]) >= lives[-1] > 0
    for name in ("r4", "r5"):
        await member.commands.execute("PEXPIRE", f"{PREFIX}r:{name}", 50_000)
    await chains.put_response("o", "r6", b"6", "r5", 100.0, 1 << 20)
    for name in ("r4", "r5"):
        assert 150_000 < await member.commands.execute("PTTL", f"{PREFIX}r:{name}") <= 200_000
    await member.commands.execute("DEL", f"{PREFIX}r:r1")
    assert list((await chains.response_chain("r5", 1000))[1]) == []


async def test_a_deleted_response_is_kept_for_those_that_continued_it(join: Any) -> None:
    member = await join("a")
    chains = RedisChains(commands_of(member))
    await chains.put_response("o", "r1", b"1", "", 100.0, 1 << 20)
    await chains.put_response("o", "r2", b"2", "r1", 100.0, 1 << 20)

    assert await chains.delete_response("r1")

    assert not await chains.delete_response("r1")
    assert list((await chains.response_chain("r1", 1000))[1]) == []
    assert list((await chains.response_chain("r2", 1000))[1]) == [b"2", b"1"]
    assert await chains.delete_response("r2")
    assert not await chains.has_response("r2")
    assert not await chains.delete_response("r3")


async def test_responses_have_a_bound_and_the_ones_that_rested_for_longest_go(
    join: Any,
) -> None:
    member = await join("a")
    chains = RedisChains(commands_of(member))
    data, most = b"x" * 744, 10_000
    await chains.put_response("o", "old", data, "", 100.0, most)
    await chains.put_response("o", "new", data, "old", 100.0, most)
    for number in range(30):
        await chains.put_response("o", f"r{number}", data, "", 101.0 + number, most)
        # Once more: it takes the place of the former.
        await chains.put_response("o", f"r{number}", data, "", 101.0 + number, most)
        size = int(await member.commands.execute("GET", f"{PREFIX}kept"))
        count = await member.commands.execute("ZCARD", f"{PREFIX}ends")
        assert size == (744 + ITEM_OVERHEAD) * count <= most

    kept = [n for n in range(30) if await chains.has_response(f"r{n}")]
    assert kept == list(range(30 - len(kept), 30))
    assert len(kept) >= 6
    assert not await chains.has_response("new")
    assert await chains.put_response("o", "large", b"x" * most, "", 100.0, most) == NO_ROOM
    assert not await chains.has_response("large")


async def test_what_was_asked_before_a_deletion_is_not_kept_whatever_clocks_say(
    join: Any,
) -> None:
    turns = RedisTurns(commands_of(await join("a")))
    # The time of a turn is that of its machine, which may be an hour ahead.
    ended = time.time() + 3600
    asked = (await turns.turns("n")).now
    assert abs(asked - time.time()) < 60
    await turns.keep_turn("n", b"1", BOUNDS, Listed("owner", "c", ended, asked))
    assert (await turns.turns("m"))[:2] == ([], False)
    asked = (await turns.turns("n")).now

    assert await turns.delete_turns("owner", {"c": "n", "d": "m"}, 60.0) == 1
    await turns.note_deletion("owner", 60.0, asked=True)
    assert not await turns.keep_turn("n", b"2", BOUNDS, Listed("owner", "c", ended, asked))
    assert not await turns.keep_turn("new", b"2", BOUNDS, Listed("owner", "new", ended, asked))

    assert (await turns.turns("n"))[:2] == ([], True)
    assert (await turns.turns("new"))[:2] == ([], False)
    assert await turns.conversations("owner", 10, None) == []
    asked = (await turns.turns("n")).now
    assert await turns.keep_turn("n", b"3", BOUNDS, Listed("owner", "c", ended, asked))
    assert (await turns.turns("n"))[:2] == ([b"3"], False)


async def test_a_question_leaves_a_mark_until_its_turn_is_kept(join: Any) -> None:
    here, there = [commands_of(await join(name)) for name in "ab"]
    at_a, at_b = RedisTurns(here), RedisTurns(there)
    first, second = (f"{here.me}:{number}" for number in range(2))

    assert not (await at_a.turns("n", first)).busy
    assert not (await at_a.turns("n", second)).busy
    assert (await at_b.turns("n")).busy
    assert await here.execute("PTTL", f"{PREFIX}busy:n") > 60_000
    await at_a.keep_turn("n", b"1", BOUNDS, None, first)
    assert (await at_b.turns("n")).busy
    await at_a.take_mark("n", second)
    assert not (await at_b.turns("n")).busy
    # A question under way is a conversation that there is, and its turn comes too late.
    asked = (await at_a.turns("new", first)).now
    assert await at_b.delete_turns("owner", {"id": "new"}, 60.0) == 1
    assert await at_b.delete_turns("owner", {"id": "new"}, 60.0) == 0
    listed = Listed("owner", "id", asked, asked)
    assert not await at_a.keep_turn("new", b"1", BOUNDS, listed, first)


async def test_a_response_that_is_deleted_before_it_is_written_is_not_kept(join: Any) -> None:
    chains = RedisChains(commands_of(await join("a")))
    await chains.announce("r1")
    assert await chains.has_response("r1") == NEXT

    assert await chains.delete_response("r1")

    assert await chains.put_response("o", "r1", b"1", "", 60.0, 1000) == WRITTEN
    assert not await chains.has_response("r1")
    assert not await chains.delete_response("r1")
    await chains.announce("r2")
    assert await chains.put_response("o", "r2", b"2", "", 60.0, 1000) == WRITTEN
    assert await chains.has_response("r2") == PRESENT
    assert (await chains.response_chain("r2", 1000))[0] in {0, 1}


async def test_deletions_of_what_never_was_leave_nothing(join: Any) -> None:
    member = await join("a")
    turns, chains = RedisTurns(commands_of(member)), RedisChains(commands_of(member))
    before = set(await member.commands.execute("KEYS", "*"))

    for number in range(100):
        assert await turns.delete_turns("owner", {f"c{number}": f"n{number}"}, 60.0) == 0
        assert await turns.note_deletion(f"owner{number}", 60.0)
        assert not await chains.delete_response(f"r{number}")

    assert set(await member.commands.execute("KEYS", "*")) == before


async def test_who_keeps_most_makes_room_and_nothing_is_counted_twice(join: Any) -> None:
    member = await join("a")
    chains, turns, now = (
        RedisChains(commands_of(member)),
        RedisTurns(commands_of(member)),
        time.time(),
    )
    data, most = b"x" * 1000, 20 * 1600
    for number in range(4):
        await chains.put_response("small", f"s{number}", data, "", 100.0, most)
        listed = Listed("other", f"c{number}", now, now)
        await turns.keep_turn(f"n{number}", data, (4000, 4, 60.0), listed)

    for number in range(200):
        assert await chains.put_response("large", f"r{number}", data, "", 50.0, most) == WRITTEN

    assert all([await chains.has_response(f"s{number}") for number in range(4)])
    assert all([(await turns.turns(f"n{number}"))[0] for number in range(4)])
    kept = [number for number in range(200) if await chains.has_response(f"r{number}")]
    assert kept == list(range(188, 200))
    sums = await member.commands.execute("ZRANGE", f"{PREFIX}owners", 0, -1, "WITHSCORES")
    assert sums == [b"other", b"6400", b"small", b"6400", b"large", b"19200"]
    assert int(await member.commands.execute("GET", f"{PREFIX}kept")) == most
    # All that is said of items goes with them, and lives no longer.
    for number in range(200):
        await chains.delete_response(f"r{number}")
    # But for the members, and for how much memory is used, which lives for a moment.
    others = {f"{PREFIX}{name}".encode() for name in ("m", "memory")}
    for key in set(await member.commands.execute("KEYS", f"{PREFIX}*")) - others:
        assert await member.commands.execute("TTL", key) > 0
    assert int(await member.commands.execute("GET", f"{PREFIX}kept")) == 12800


async def test_keys_have_neither_names_nor_ids(join: Any, tmp_path: Path) -> None:
    async with running_over(join, tmp_path) as (a, b):
        async with a.server.connect() as ws:
            await ws.send_json(chat("secret-id", conversation_id="secret-talk"))
            await to_end(ws)
        async with b.server.connect() as ws:
            await ws.send_json(resume("secret-id", 1))
            await to_end(ws)
        keys = await (await join("c")).commands.execute("KEYS", "*")

    assert len(keys) >= 3
    assert not [key for key in keys if b"secret" in key]


class running_over:  # noqa: N801 - it is used like a function
    """Two instances over a real server: `async with running_over(join, path) as (a, b)`."""

    def __init__(self, join: Any, path: Path, behaviour: Any = PACED) -> None:
        self._join, self._path, self._behaviour = join, path, behaviour
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> list[Instance]:
        made = []
        for name in "ab":
            commands = commands_of(await self._join(name))
            made.append(
                await instance_of(
                    World(), self._stack, self._path, name, self._behaviour, None, commands
                )
            )
        return made

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()


async def test_streams_go_on_anywhere_over_a_real_server(join: Any, tmp_path: Path) -> None:
    async with running_over(join, tmp_path) as (a, b):
        async with a.server.connect() as first, b.server.connect() as second:
            await first.send_json(chat("r1"))
            seen = await until_status(first, "chunk")
            await second.send_json(chat("r1"))
            await second.send_json(resume("r1", 1))
            whole = seen + await to_end(first)
            # The question may have shown some of it.
            assert (await to_end(second))[-len(whole[1:]) :] == whole[1:]
        async with b.server.session.get(b.server.sse) as response:
            listed = (await response.json())["streams"]
        assert [entry["request_id"] for entry in listed] == ["r1"]
        assert a.requests + b.requests == 1
        await a.leave()

        async with b.server.connect() as again:
            await again.send_json(resume("r1", 2))
            assert await to_end(again) == whole[2:]


async def test_a_stored_response_is_continued_anywhere_over_a_real_server(
    join: Any, tmp_path: Path
) -> None:
    forgetful = Behaviour(ttft=0, interval=0, forgets=(404, "Response with id 'x' not found."))
    async with running_over(join, tmp_path, forgetful) as (a, b):
        asked = {"model": "sim", "input": "one", "store": True}
        response_id = (await post(a, "responses", asked))["id"]

        # What it has stored is there before it has left.
        await a.leave()
        asked |= {"input": "two", "previous_response_id": response_id}
        second = (await post(b, "responses", asked))["id"]

        items = b.server.simulator.bodies[-1]["input"]
        assert [item["role"] for item in items] == ["user", "assistant", "user"]
        for status in (200, 404):
            url = f"{b.server.v1}/responses/{response_id}"
            async with b.server.session.delete(url) as response:
                assert response.status == status
        async with b.server.session.get(
            f"{b.server.v1}/responses/{second}/input_items"
        ) as listing:
            assert len((await listing.json())["data"]) == 3


async def post(instance: Instance, path: str, body: dict[str, Any]) -> dict[str, Any]:
    async with instance.server.session.post(f"{instance.server.v1}/{path}", json=body) as response:
        assert response.status == 200, await response.text()
        content: dict[str, Any] = await response.json()
        return content


async def test_a_reader_elsewhere_reads_on_while_the_server_pauses(
    join: Any, tmp_path: Path, valkey: RedisServer
) -> None:
    async with running_over(join, tmp_path, ENDLESS) as (a, b):  # noqa: SIM117 - it is clearer
        async with a.server.connect() as first, b.server.connect() as second:
            await first.send_json(chat("r1"))
            await until_status(first, "chunk")
            await second.send_json(resume("r1"))
            seen = await until_status(second, "chunk")

            valkey.pause()
            # They take longer than any answer of it is awaited.
            seen += [await second.receive_json(timeout=20) for _ in range(200)]
            valkey.go_on()
            async with a.server.session.delete(f"{a.server.sse}/r1") as response:
                assert response.status == 204
            seen += await to_end(second)
            await to_end(first)

    assert [frame["event_id"] for frame in seen] == list(range(1, len(seen) + 1))


async def test_a_command_after_a_restart_of_the_server_is_carried_out(
    join: Any, valkey: RedisServer
) -> None:
    a = await join("a")
    valkey.kill()
    valkey.start()
    # It is heard that the server has gone, although nothing is asked.
    await until(lambda: not a.commands.connected)
    await until(lambda: a.commands.connected)

    assert await a.commands.execute("PING") == b"PONG"


async def test_commands_that_wait_for_a_server_that_is_away_fail(
    join: Any, valkey: RedisServer
) -> None:
    a = await join("a")
    valkey.pause()

    answers = await asyncio.gather(
        *(a.commands.execute("PING") for _ in range(3)), return_exceptions=True
    )
    valkey.go_on()

    assert all(isinstance(answer, Exception) for answer in answers)
    await until(lambda: a.commands.connected)
    assert await a.commands.execute("PING") == b"PONG"
