"""Whole servers with a real Redis or Valkey server between them: whatever happens to it, clients
are answered.

A provider counts what is in flight at it: never more than its limit, which is that of all servers
together.
"""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import TYPE_CHECKING

import pytest

from aioserver.wings.cluster.answers.claims import Claims
from aioserver.wings.cluster.connection import CallFailed
from aioserver.wings.cluster.limits.grants import State
from aioserver.wings.cluster.limits.lease_messages import TIMES as REAL_TIMES
from aioserver.wings.cluster.limits.lease_messages import Times
from aioserver.wings.cluster.membership import join
from aioserver.wings.conversations.redis import Listed, RedisTurns
from aioserver.wings.responses.redis import RedisChains
from aioserver.workers.balance import Balance
from aioserver.workers.loads import Loads
from tests.support.keys import bearer, keys_of
from tests.support.redis_server import RedisServer, Road, away, full, paused, replica
from tests.support.referee import Referee
from tests.support.server import CONCURRENCY, QUICK, SIM_HTTP_CLIENT, UVICORN, running
from tests.support.waiting import until, until_result

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path
    from typing import Any

    from aioserver.wings.cluster.membership import Membership
    from tests.support.server import RunningServer

pytestmark = pytest.mark.real_time
LIMIT, CLIENTS = 6, 8
# Seconds that an answer takes: so long that the load is no load of the machine.
ANSWER = 0.04
# A tenth of the real times, but for the bound of a call: the machine may be busy.
TIMES = Times(lease=0.9, margin=0.1, beat=0.15, bound=0.2, pause=0.4, grace=0.4, gone=3.0)
SLOW = 0.03


class World:
    """Two servers, whose clients ask all the time."""

    def __init__(self, referee: Referee) -> None:
        self.referee = referee
        self.servers: list[RunningServer] = []
        self.members: list[Membership] = []
        self.answered = 0
        self.faults: list[str] = []
        self._clients: list[asyncio.Task[None]] = []

    def load(self) -> None:
        self._clients = [
            asyncio.create_task(self._ask(server))
            for server in self.servers
            for _ in range(CLIENTS)
        ]

    async def rest(self) -> None:
        for client in self._clients:
            client.cancel()
        if self._clients:
            await asyncio.wait(self._clients)
        self._clients = []

    async def _ask(self, server: RunningServer) -> None:
        body = {"messages": [{"role": "user", "content": "Hello"}], "stream": True}
        while True:
            async with server.session.post(f"{server.v1}/chat/completions", json=body) as answer:
                text = await answer.text()
            if answer.status == 200 and "[DONE]" in text:
                self.answered += 1
            else:
                self.faults.append(text)
                await asyncio.sleep(0.01)

    async def are(self, state: State) -> None:
        await until(
            lambda: all(each.leases.state is state for each in self.members), state=self.states
        )

    def states(self) -> list[State]:
        return [each.leases.state for each in self.members]

    async def work(self) -> None:
        """Wait until both have been answered several times more."""
        before = self.answered
        await until(lambda: self.answered > before + 4 * CLIENTS, state=self.states)

    async def recover(self) -> None:
        """Wait until both are joined, and all places are used again."""
        await self.are(State.JOINED)
        await until(lambda: self.referee.inside == LIMIT, state=self.states)
        await self.work()


@asynccontextmanager
async def two(url: str, path: Path, times: Times = TIMES, **changes: Any) -> AsyncIterator[World]:
    async with Referee(ANSWER) as referee, AsyncExitStack() as stack:
        world = World(referee)
        all_changes = {
            "llm.providers.sim.base_url": referee.url,
            f"{SIM_HTTP_CLIENT}.concurrent_requests": LIMIT,
            f"{SIM_HTTP_CLIENT}.queue_size": 100,
            f"{SIM_HTTP_CLIENT}.queue_timeout": 30.0,
            f"{CONCURRENCY}.max_connections": 100,
            f"{CONCURRENCY}.connection_queue_size": 100,
            f"{UVICORN}.backlog": 128,
            **changes,
        }
        for number in range(2):
            member = await stack.enter_async_context(join(url, "test", times=times))
            server = running(path / f"{number}.yaml", QUICK, all_changes, cluster=member)
            world.members.append(member)
            world.servers.append(await stack.enter_async_context(server))
        try:
            yield world
        finally:
            await world.rest()


async def test_clients_are_answered_whatever_happens_to_the_server(
    redis: RedisServer, tmp_path: Path
) -> None:
    """Paused, full and read-only for longer than a lease, emptied, restarted, without its
    scripts.
    """
    async with two(redis.url, tmp_path) as world:
        world.load()
        await world.recover()
        redis.call("SCRIPT", "FLUSH")
        await world.work()
        redis.call("FLUSHALL")
        await world.recover()
        redis.kill()
        redis.start()
        await world.recover()
        for fault in (paused, full, replica, away):
            undo = fault(redis)
            await world.are(State.ALONE)
            await world.work()
            undo()
            await world.recover()

        assert world.referee.peak == LIMIT
        assert world.faults == []


async def test_a_server_that_is_slow_loads_or_comes_late_costs_no_client_its_answer(
    tmp_path: Path,
) -> None:
    redis = RedisServer(tmp_path)
    async with Road(tmp_path, redis) as road, two(road.url, tmp_path) as world:
        world.load()
        # Two strangers start nothing: each might be alone.
        await asyncio.sleep(TIMES.bound)
        assert world.referee.starts == 0
        with redis:
            await world.recover()
            road.delay = SLOW
            await world.work()
            await world.recover()
            road.delay = 0.0
            road.reply = b"-LOADING Redis is loading the dataset in memory\r\n"
            await world.are(State.ALONE)
            await world.work()
            road.reply = b""
            await world.recover()
            await world.rest()

        assert world.referee.peak == LIMIT
        assert world.faults == []


async def test_two_that_are_asked_with_one_id_ask_the_provider_once(
    redis: RedisServer, tmp_path: Path
) -> None:
    async with two(redis.url, tmp_path) as world:
        await world.are(State.JOINED)

        def unclaimed() -> int:
            return sum(each.standing()["unclaimed"] for each in world.members)

        async def ask(server: RunningServer, name: str) -> list[dict[str, Any]]:
            frames: list[dict[str, Any]] = []
            async with server.connect() as ws:
                await ws.send_json(
                    {"action": "chat", "request_id": name, "payload": {"text": name}}
                )
                while not frames or frames[-1]["status"] not in {"complete", "error"}:
                    frames.append(await ws.receive_json())
            return [frame for frame in frames if frame.get("event_id")]

        number, before = 0, -1
        answers: list[list[dict[str, Any]]] = []
        # On a busy machine Redis may answer too late, and then both begin one.
        while unclaimed() != before:
            number, before = number + 1, unclaimed()
            asking = (ask(server, f"r{number}") for server in world.servers * 8)
            answers = await asyncio.gather(*asking)

        assert world.referee.asked[f"r{number}"] == 1
        assert all(answer == answers[0] for answer in answers)
        assert answers[0][-1]["status"] == "complete"


async def test_a_stop_beside_another_instance_refuses_nothing_that_waits(
    redis: RedisServer, tmp_path: Path
) -> None:
    changes = {f"{SIM_HTTP_CLIENT}.concurrent_requests": 1}
    async with two(redis.url, tmp_path, REAL_TIMES, **changes) as world:
        await until(lambda: all(len(each.leases.members) == 2 for each in world.members))
        # Longer than it takes to hear that nobody else serves.
        world.referee.seconds = 0.25
        first, second = world.servers

        async def answered(server: RunningServer) -> bool:
            body = {"messages": [{"role": "user", "content": "Hello"}], "stream": True}
            async with server.session.post(f"{server.v1}/chat/completions", json=body) as answer:
                return answer.status == 200 and "[DONE]" in await answer.text()

        for server, expected in ((first, {True}), (second, {True, False})):
            asked = [asyncio.create_task(answered(server)) for _ in range(CLIENTS)]
            await until(lambda server=server: server.owners.waiting >= CLIENTS - 1)  # type: ignore[misc]
            await until(lambda server=server: len(server.http_server.connections) >= CLIENTS)  # type: ignore[misc]
            # The place may still be on its way here from the other instance.
            await until(lambda: world.referee.inside == 1)

            await server.runner.end()

            assert {*await asyncio.gather(*asked)} == expected


async def test_an_answer_that_nobody_reads_gives_way_only_where_no_place_is_free_anywhere(
    redis: RedisServer, tmp_path: Path
) -> None:
    changes = {"chat.streams.resume_window": 60.0, f"{SIM_HTTP_CLIENT}.read_timeout": 60.0}
    async with two(redis.url, tmp_path, REAL_TIMES, **changes) as world:
        await world.are(State.JOINED)
        one, other = world.servers
        world.referee.seconds = 40.0
        for number in range(LIMIT):
            question = {"request_id": f"r{number}", "text": "Hello"}
            async with one.session.post(one.sse, json=question) as answer:
                await answer.content.readuntil(b"event: chunk")
                answer.close()
            await until(lambda number=number: one.held()["detached"] == number + 1)  # type: ignore[misc]

        assert world.referee.inside == LIMIT

        # None is free now, and one of them ends. Its place is the next one's.
        world.referee.seconds = 0.01
        for number, server in enumerate((other, one, other)):
            question = {"request_id": f"q{number}", "text": "Hello"}
            async with server.session.post(server.sse, json=question) as answer:
                assert b"event: complete" in await answer.read()
            assert one.held()["detached"] == LIMIT - 1
        await one.context.gateway.close()


async def test_the_limit_of_a_key_holds_for_both_together(
    redis: RedisServer, tmp_path: Path
) -> None:
    changes = keys_of("web", max_concurrent=3)
    async with two(redis.url, tmp_path, **changes) as world:
        await world.are(State.JOINED)
        world.referee.seconds = 1.0
        body = {"messages": [{"role": "user", "content": "Hello"}], "stream": True}

        async def ask(server: RunningServer) -> tuple[int, str]:
            async with server.session.post(
                f"{server.v1}/chat/completions", json=body, headers=bearer("web")
            ) as answer:
                return answer.status, await answer.text()

        answers = await asyncio.gather(*(ask(server) for server in world.servers * 6))

        assert world.referee.peak == 3
        assert sum(status == 200 for status, _text in answers) == 3
        refused = [text for status, text in answers if status == 429]
        assert len(refused) == 9
        assert all("concurrency_exceeded" in text for text in refused)


async def test_the_tokens_of_a_key_are_those_of_both_together_whatever_the_server_forgets(
    redis: RedisServer, tmp_path: Path
) -> None:
    limit, headers = 3000, bearer("web")
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 100, "stream": True}

    async def ask(server: RunningServer) -> tuple[int, str]:
        url = f"{server.v1}/chat/completions"
        async with server.session.post(url, json=body, headers=headers) as answer:
            assert answer.headers["x-ratelimit-limit-tokens"] == str(limit)
            return answer.status, await answer.text()

    async def used(server: RunningServer) -> int:
        async with server.session.get(f"{server.base}/usage", headers=headers) as answer:
            [budget] = (await answer.json())["budgets"]
        state = budget["tokens_per_day"]
        assert state["limit"] == limit
        assert state["used"] + state["reserved"] + state["remaining"] == limit
        return int(state["used"])

    # Each look at `/usage` is a request, and on a busy machine there are many.
    keys = keys_of("web", tokens_per_day=limit, requests_per_minute=1_000_000)
    async with two(redis.url, tmp_path, **keys) as world:
        await world.are(State.JOINED)
        one, other = world.servers
        # All at one server, though there are two; on a busy machine an answer of theirs may be late.
        deadline = time.monotonic() + 120
        while await used(one) < 0.85 * limit:
            assert time.monotonic() < deadline
            await ask(one)
        while await used(other) < 0.85 * limit:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)
        status, text = 200, ""
        while status == 200:
            status, text = await ask(other)

        assert status == 429
        assert f"tokens_per_day of this key: limit {limit}, used " in text
        for restarts in (False, True):
            epochs = {each.leases.epoch for each in world.members}
            redis.call("FLUSHALL")
            if restarts:
                redis.kill()
                redis.start()
            # Nothing is given until all have said what they know.
            await until(
                lambda former=epochs: (
                    not any(  # type: ignore[misc]
                        each.leases.epoch in former or each.leases.standing.grace
                        for each in world.members
                    )
                )
            )
            await world.are(State.JOINED)
            # What fits is the rest of before, at most.
            statuses = {200}
            while 200 in statuses:
                assert time.monotonic() < deadline
                statuses = {(await ask(server))[0] for server in world.servers}
            # An answer of theirs may be late here, too.
            assert await until_result(lambda: used(one), lambda now: now >= 0.85 * limit) <= limit


async def test_all_that_clients_let_grow_fills_the_server_and_every_limit_stays_exact(
    tmp_path: Path,
) -> None:
    most = 5 << 20
    options = ("--maxmemory", str(most), "--maxmemory-policy", "noeviction")
    with RedisServer(tmp_path, *options) as redis:
        async with two(redis.url, tmp_path) as world:
            world.load()
            await world.recover()
            commands = world.members[0].commands
            turns, chains = RedisTurns(commands), RedisChains(commands)
            claims, now = Claims(commands, world.members[0].instance), time.time()

            async def grow(number: int) -> None:
                name, owner = f"n{number}", f"o{number % 50}"
                listed = Listed(owner, name * 8, now, now)
                for growing in (
                    claims.take(name, seconds=3600.0),
                    claims.put_log(name, b"x" * 1000, 3600.0),
                    turns.turns(f"q{number}", f"mark{number}"),
                    chains.announce(f"a{number}"),
                    turns.keep_turn(name, b"x" * 500, (1 << 20, 10, 3600.0), listed),
                    turns.delete_turns(owner, {name: f"d{number}"}, 3600.0, asked=True),
                    turns.note_deletion(name, 3600.0, asked=True),
                    chains.put_response(owner, name, b"x" * 500, "", 3600.0, 1 << 30),
                ):
                    # Where there is no room, some of it is refused.
                    with suppress(CallFailed):
                        await growing

            def used() -> float:
                memory = redis.call("INFO", "memory").decode()
                return int(memory.partition("used_memory:")[2].split()[0]) / most

            number, rounds = 0, 0
            while rounds < 5:
                await asyncio.gather(*map(grow, range(number, number + 50)))
                number += 50
                rounds += used() > 0.74
                assert number < 50_000
            await world.work()

            # A moment of a script is above, by what it has just written.
            assert used() < 0.85
            assert world.states() == [State.JOINED] * 2
            assert world.referee.peak == LIMIT
            assert world.faults == []
            # What is newest is kept.
            assert await chains.has_response(f"n{number - 1}")


async def test_the_first_instance_deletes_the_conversations_if_it_is_told_to(
    redis: RedisServer,
) -> None:
    # The name has what is a pattern of keys elsewhere.
    name, other = "a*[b]", "a*[b]2"
    for each in (name, other):
        redis.call("RPUSH", f"aio:{{{each}}}:c:1", "turn")

    async with (
        join(redis.url, name, times=TIMES),
        join(redis.url, name, times=TIMES, clear=True),
    ):
        assert redis.call("EXISTS", f"aio:{{{name}}}:c:1") == 1
    async with join(redis.url, name, times=TIMES):
        assert redis.call("EXISTS", f"aio:{{{name}}}:c:1") == 1
    async with join(redis.url, name, times=TIMES, clear=True):
        assert redis.call("EXISTS", f"aio:{{{name}}}:c:1") == 0
        assert redis.call("EXISTS", f"aio:{{{other}}}:c:1") == 1


async def test_a_worker_that_was_reaped_gives_its_places_back_at_once(
    redis: RedisServer, tmp_path: Path
) -> None:
    """Its sibling learns of its end from the loads in shared memory."""
    page = Loads.create(2)
    async with AsyncExitStack() as stack:
        stack.callback(os.close, page.fd)
        stack.callback(page.close)
        mine, dead = Loads(page.fd, 0), Loads(page.fd, 1)
        stack.callback(mine.close)
        stack.callback(dead.close)
        first = await stack.enter_async_context(join(redis.url, "test", times=REAL_TIMES))
        second = await stack.enter_async_context(join(redis.url, "test", times=REAL_TIMES))
        server = running(tmp_path / "0.yaml", balance=Balance(mine, first.ended), cluster=first)
        await stack.enter_async_context(server)
        dead.tell_instance(second.token)
        await until(lambda: len(first.leases.members) == 2)

        # As a killed process ends: it says nothing.
        await second.renewer.close()
        page.reaped(1)

        await until(lambda: first.leases.members == [first.instance], REAL_TIMES.lease / 2)
