"""Any instance continues, reads, lists and deletes the stored responses of all."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import openai
import pytest
from openai import AsyncOpenAI

from aioserver.auth.callers import Caller
from aioserver.gateway.contracts.commands import Commands
from aioserver.streams.store import StreamStore
from aioserver.wings.responses import redis as shared_responses
from aioserver.wings.responses import stored
from aioserver.wings.responses.items import ResponseParts
from aioserver.wings.responses.redis import SharedResponses
from aioserver.wings.responses.stored import StoredResponses
from tests.support.clock import FakeClock
from tests.support.instances import MemoryStore, World, instances
from tests.support.responses import connect, create, next_event, to_end, whole
from tests.support.server import ENDLESS
from tests.support.simulator import Behaviour
from tests.support.stored_responses import stored_in
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from aioserver.wings.responses.stored import StoredResponse
    from tests.support.instances import Instance

FORGETFUL = Behaviour(ttft=0, interval=0, forgets=(404, "Response with id 'x' not found."))
CALLER = Caller("somebody")


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
async def pair(tmp_path: Path, world: World) -> AsyncIterator[list[Instance]]:
    async with instances(tmp_path, 2, FORGETFUL, world) as started:
        yield started


@pytest.fixture
async def sdks(pair: list[Instance]) -> AsyncIterator[list[AsyncOpenAI]]:
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(
                AsyncOpenAI(api_key="x", base_url=instance.server.v1, max_retries=0)
            )
            for instance in pair
        ]


async def ask(sdk: Any, text: str, previous: Any = openai.omit) -> Any:
    return await sdk.responses.create(
        model="sim", input=text, store=True, previous_response_id=previous
    )


def last_input(instance: Instance) -> list[str]:
    items = instance.server.simulator.bodies[-1]["input"]
    contents = [item["content"] for item in items]
    return [each if isinstance(each, str) else each[0]["text"] for each in contents]


async def written(world: World, number: int) -> None:
    """Wait until so many responses are there for all."""
    await until(lambda: len(world.responses) == number)


async def texts(sdk: Any, response_id: str) -> list[str]:
    listed = await sdk.responses.input_items.list(response_id, order="asc")
    return [item.content[0].text for item in listed.data]


async def test_a_conversation_goes_on_at_any_instance(
    pair: list[Instance], sdks: list[AsyncOpenAI], world: World
) -> None:
    expected: list[str] = []
    previous: Any = openai.omit
    for number in range(6):
        response = await ask(sdks[number % 2], f"q{number}", previous)
        previous = response.id
        await written(world, number + 1)
        expected += [f"q{number}", response.output_text]

    assert last_input(pair[1]) == expected[:-1]
    for sdk in sdks:
        assert await texts(sdk, previous) == expected[:-1]
        assert (await sdk.responses.retrieve(previous)).output_text == expected[-1]
    # What an instance has of a conversation is not kept there a second time.
    sizes = [instance.server.owners.streams.stats().bytes for instance in pair]
    assert max(sizes) < 1.3 * min(sizes)


async def test_a_response_outlives_its_instance(
    pair: list[Instance], sdks: list[AsyncOpenAI], world: World
) -> None:
    first = await ask(sdks[0], "one")
    await pair[0].leave()

    await ask(sdks[1], "two", first.id)

    assert last_input(pair[1]) == ["one", first.output_text, "two"]


async def test_a_deleted_response_is_found_nowhere(
    pair: list[Instance], sdks: list[AsyncOpenAI], world: World
) -> None:
    first = await ask(sdks[0], "one")
    second = await ask(sdks[0], "two", first.id)
    await written(world, 2)

    await sdks[1].responses.delete(first.id)

    for sdk in sdks:
        for call in (sdk.responses.retrieve, sdk.responses.delete):
            with pytest.raises(openai.NotFoundError):
                await call(first.id)
    # What went on from it goes on.
    assert await texts(sdks[1], second.id) == ["one", first.output_text, "two"]
    assert len(stored_in(pair[0].server.owners)) == 1


async def test_a_response_that_runs_elsewhere_is_cancelled_by_its_deletion(
    pair: list[Instance], sdks: list[AsyncOpenAI]
) -> None:
    pair[0].server.simulator.behaviour = ENDLESS
    stream = await sdks[0].responses.create(model="sim", input="Hello", stream=True, store=True)
    events: Any = aiter(stream)
    response_id = (await anext(events)).response.id

    await sdks[1].responses.delete(response_id)

    await until(lambda: not pair[0].server.owners.streams.running())
    await stream.close()


async def test_while_redis_is_away_an_instance_goes_on_with_its_own(
    pair: list[Instance], sdks: list[AsyncOpenAI], world: World
) -> None:
    world.away = True
    first = await ask(sdks[0], "one")

    await ask(sdks[0], "two", first.id)

    assert last_input(pair[0]) == ["one", first.output_text, "two"]
    # What is not known is not absent.
    with pytest.raises(
        openai.InternalServerError, match="it is not known at the moment"
    ) as unknown:
        await ask(sdks[1], "two", first.id)
    assert unknown.value.status_code == 503
    assert "retry-after" in unknown.value.response.headers
    world.away = False
    await sdks[0].responses.delete(first.id)


class Holder:
    """The store of an instance that has nothing else."""

    def __init__(self, world: World, name: str, clock: FakeClock, room: int = 1 << 24) -> None:
        self.streams = StreamStore(max_stream_bytes=1 << 20, max_kept_bytes=room)
        self.stored = StoredResponses(self.streams, 60.0, clock=clock, loop=clock.loop)
        self.shared = SharedResponses(Commands(MemoryStore(world, name), ""), clock)
        self.stored.storage = self.shared

    def make(
        self, response_id: str, previous: StoredResponse | None, size: int = 10
    ) -> StoredResponse:
        """A response that continues *previous*, which it takes over."""
        parts = ResponseParts(response_id, "completed", b'{"output":[', b'"a"', b"]}")
        made = self.stored.make(
            CALLER, parts, b'"%b"' % (b"x" * size), previous, provider="sim", kept_there=False
        )
        if previous is not None:
            previous.release()
        assert made is not None
        return made

    async def add(
        self, response_id: str, previous: str | StoredResponse | None = None, size: int = 10
    ) -> None:
        if isinstance(previous, str):
            previous = await self.stored.reach(CALLER, previous)
        elif previous is not None:
            previous.retain()
        made = self.make(response_id, previous, size)
        self.stored.add(made)
        made.release()
        await self.shared.close()


async def test_a_shared_response_is_found_for_its_window_and_its_chain_for_longer(
    world: World,
) -> None:
    clock = FakeClock()
    a, b = Holder(world, "a", clock), Holder(world, "b", clock)
    await a.add("r1")
    clock.advance(50.0)
    await a.add("r2", "r1")
    clock.advance(20.0)

    assert await b.stored.reach(CALLER, "r1") is None
    assert await b.stored.reach(Caller("other"), "r2") is None
    second = await b.stored.reach(CALLER, "r2")

    assert second is not None
    assert [response.id for response in second.chain()] == ["r1", "r2"]
    assert second.response() == b'{"output":["a"]}'
    second.release()
    clock.advance(100.0)
    assert (a.streams.stats().bytes, b.streams.stats().bytes) == (0, 0)


async def test_what_only_a_connection_held_goes_with_what_continues_it(world: World) -> None:
    clock = FakeClock()
    a, b = Holder(world, "a", clock), Holder(world, "b", clock)
    await a.add("r1")
    held = a.make("r2", await a.stored.reach(CALLER, "r1"))
    await a.add("r3", held)
    held.release()

    third = await b.stored.reach(CALLER, "r3")

    assert await b.stored.reach(CALLER, "r2") is None
    assert third is not None
    assert b",".join(third.history()).count(b"x" * 10) == 3
    third.release()


async def test_what_others_could_not_take_over_is_not_sent(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "MAX_LOADED", 30_000)
    a = Holder(world, "a", FakeClock())
    held = a.make("r1", None, size=20_000)

    await a.add("r2", held, size=20_000)
    held.release()

    assert world.responses == {}
    assert a.stored.get(CALLER, "r2") is not None


@pytest.mark.parametrize("late", [True, False], ids=["while", "after"])
async def test_a_response_that_could_not_be_written_goes_with_what_continues_it(
    world: World, late: bool
) -> None:
    clock = FakeClock()
    a, b = Holder(world, "a", clock), Holder(world, "b", clock)
    failing = asyncio.Event()
    put = MemoryStore.put_response

    class Failing(MemoryStore):
        async def put_response(self, name: str, *args: Any) -> int:
            if failing.is_set():
                return await put(self, name, *args)
            failing.set()
            if late:
                # It is given up when what continues it has been written.
                await until(lambda: bool(world.responses))
            return shared_responses.NO_ROOM

    a.stored.storage = shared = SharedResponses(Commands(Failing(world, "a"), ""), clock)
    first = a.make("r1", None)
    a.stored.add(first)
    await failing.wait()
    if not late:
        await shared.close()
    first.retain()
    second = a.make("r2", first)
    a.stored.add(second)
    await shared.close()
    assert [response.shared for response in (first, second)] == [False, True]

    stored = await b.stored.reach(CALLER, "r2")

    assert await b.stored.reach(CALLER, "r1") is None
    assert stored is not None
    assert b",".join(stored.history()).count(b"x" * 10) == 2
    for response in (first, second, stored):
        response.release()
    clock.advance(100.0)
    assert (a.streams.stats().bytes, b.streams.stats().bytes) == (0, 0)


async def test_only_so_many_bytes_are_on_their_way(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_responses, "MAX_PENDING", 30_000)
    a = Holder(world, "a", FakeClock())
    made = [a.make(f"r{number}", None, size=20_000) for number in range(3)]
    for response in made[:2]:
        a.stored.add(response)
    assert [response.shared for response in made] == [True, False, False]

    await a.shared.close()
    a.stored.add(made[2])
    await a.shared.close()
    for response in made:
        response.release()

    assert made[2].shared
    assert len(world.responses) == 2


async def test_only_so_many_conversations_are_read_at_once(world: World) -> None:
    clock = FakeClock()
    a, b = Holder(world, "a", clock), Holder(world, "b", clock)
    await a.add("r1")
    reading = most = 0

    class Watched(MemoryStore):
        async def response_chain(self, name: str, most_bytes: int) -> list[bytes]:
            nonlocal reading, most
            reading += 1
            most = max(most, reading)
            chain = await super().response_chain(name, most_bytes)
            reading -= 1
            return chain

    b.stored.storage = SharedResponses(Commands(Watched(world, "b"), ""), clock)

    responses = await asyncio.gather(*(b.stored.reach(CALLER, "r1") for _ in range(20)))

    assert most == shared_responses.MAX_LOADS
    assert all(response is responses[0] for response in responses)
    for response in responses:
        assert response is not None
        response.release()
    assert b.streams.stats().bytes == 0


async def test_a_long_conversation_is_taken_over_without_recursion(world: World) -> None:
    clock = FakeClock()
    a, b = Holder(world, "a", clock), Holder(world, "b", clock)
    await a.add("r0")
    for number in range(1, 3000):
        await a.add(f"r{number}", f"r{number - 1}")

    last = await b.stored.reach(CALLER, "r2999")

    assert last is not None
    assert len(last.chain()) == 3000
    middle = await b.stored.reach(CALLER, "r1500")
    assert middle is last.chain()[1500]
    last.release()
    middle.release()
    assert b.streams.stats().bytes == 0


async def test_a_conversation_for_which_there_is_no_room_is_not_taken_over(world: World) -> None:
    clock = FakeClock()
    a, b = Holder(world, "a", clock), Holder(world, "b", clock, room=20_000)
    await a.add("r1", size=15_000)
    await a.add("r2", "r1", size=15_000)

    assert await b.stored.reach(CALLER, "r2") is None
    assert b.streams.stats().bytes == 0


async def test_what_makes_no_sense_is_no_response(world: World) -> None:
    clock = FakeClock()
    a, b = Holder(world, "a", clock), Holder(world, "b", clock)
    await a.add("r1")
    await a.add("r2", "r1")
    first, second = world.responses
    data, previous = world.responses[first]
    for nonsense in (b"", b"\x90", data[:-1], b"\xff" * 100):
        world.responses[first] = nonsense, previous

        assert await b.stored.reach(CALLER, "r2") is None
    del world.responses[first]
    assert await b.stored.reach(CALLER, "r2") is None
    assert second in world.responses


async def test_a_cancelled_look_holds_nothing(world: World) -> None:
    clock = FakeClock()
    a, b = Holder(world, "a", clock), Holder(world, "b", clock)
    await a.add("r1")
    for steps in range(4):
        look = asyncio.create_task(b.stored.reach(CALLER, "r1"))
        for _ in range(steps):
            await asyncio.sleep(0)
        if look.cancel():
            with pytest.raises(asyncio.CancelledError):
                await look
        assert b.streams.stats().bytes == 0 or look.done()
        if not look.cancelled() and (stored := look.result()) is not None:
            stored.release()
    assert b.streams.stats().bytes == 0


async def test_a_connection_continues_and_resumes_what_another_instance_has(
    pair: list[Instance], world: World
) -> None:
    here, there = (instance.server for instance in pair)
    here.simulator.behaviour = Behaviour(ttft=0, interval=0.005, tokens=40)
    async with connect(here) as ws:
        await ws.send_json(create("one", store=True))
        seen = [await next_event(ws) for _ in range(8)]
        async with connect(there) as other:
            response_id, number = seen[0]["response"]["id"], seen[-1]["sequence_number"]
            await other.send_json(
                {"type": "response.resume", "response_id": response_id, "starting_after": number}
            )
            rest = await to_end(other)
            assert whole([*seen, *rest])
            await to_end(ws)
            await written(world, 1)

            await other.send_json(create("two", previous_response_id=response_id))
            assert (await to_end(other))[-1]["type"] == "response.completed"
            await other.send_json({"type": "response.resume", "response_id": "resp_none"})
            (refusal,) = await to_end(other)

    assert last_input(pair[1]) == [
        "one",
        rest[-1]["response"]["output"][0]["content"][0]["text"],
        "two",
    ]
    assert (refusal["status"], refusal["error"]["code"]) == (404, "stream_not_found")
