"""Responses that continue others, in a group: who keeps what they continue is asked, alone."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import openai
import pytest

from tests.support.failing import left_alone
from tests.support.sdk import openai_of
from tests.support.server import QUICK, MakeServer, provider_entry
from tests.support.simulator import Simulator
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from openai import AsyncOpenAI

    from tests.support.server import RunningServer

FORGETFUL = replace(QUICK, forgets=(404, "Response with id 'resp_1' not found."))
REFUSING = replace(QUICK, forgets=(400, "previous_response_id is not supported"))
FAILING = replace(QUICK, fail_rate=1.0)


class Pair:
    """A server with a group `pair` of the providers `e0` and `e1`."""

    def __init__(
        self,
        server: RunningServer,
        sdk: AsyncOpenAI,
        simulators: list[Simulator],
        providers: dict[str, Any],
    ) -> None:
        self.server, self.sdk, self.simulators = server, sdk, simulators
        # Their settings.
        self.providers = providers

    async def ask(self, text: str, *, streamed: bool = False, **fields: Any) -> Any:
        """The response to *text*, once it is complete."""
        fields = {"model": "pair", "input": text, "store": True, **fields}
        if not streamed:
            return await self.sdk.responses.create(**fields)
        events = [event async for event in await self.sdk.responses.create(stream=True, **fields)]
        assert events[-1].type == "response.completed"
        return events[-1].response

    def asked(self, number: int) -> list[tuple[str | None, int]]:
        """What a provider was asked: the id that it was to continue, and the items of the input."""
        return [
            (
                body.get("previous_response_id"),
                1 if isinstance(body["input"], str) else len(body["input"]),
            )
            for body in self.simulators[number].bodies
        ]


@asynccontextmanager
async def pair_of(
    make_server: MakeServer, *behaviours: Any, choose: str = "least_busy", **changes: Any
) -> AsyncIterator[Pair]:
    async with AsyncExitStack() as stack:
        simulators = [
            await stack.enter_async_context(Simulator(behaviour)) for behaviour in behaviours
        ]
        names = [f"e{number}" for number in range(len(simulators))]
        providers = {
            f"llm.providers.{name}": provider_entry(
                simulator.base_url, max_retries=0, concurrent_requests=1, queue_size=50
            )
            for name, simulator in zip(names, simulators, strict=True)
        }
        models = {"pair": {"members": names, "choose": choose}}
        server = await make_server(QUICK, **{**providers, "llm.models": models, **changes})
        sdk = await stack.enter_async_context(openai_of(server.v1))
        yield Pair(server, sdk, simulators, providers)
        await server.nothing_held()


@pytest.mark.parametrize("streamed", [True, False])
async def test_the_member_that_keeps_a_response_continues_it(
    make_server: MakeServer, streamed: bool
) -> None:
    async with pair_of(make_server, QUICK, QUICK) as pair:
        first = await pair.ask("one", streamed=streamed)
        second = await pair.ask("two", streamed=streamed, previous_response_id=first.id)
        await pair.ask("three", streamed=streamed, previous_response_id=second.id)

        # Left to its choice, the group would take turns.
        assert pair.asked(0) == [(None, 1), (first.id, 1), (second.id, 1)]
        assert pair.asked(1) == []


async def test_it_is_waited_for_though_another_has_a_place(make_server: MakeServer) -> None:
    async with pair_of(make_server, QUICK, QUICK, choose="ordered") as pair:
        first = await pair.ask("one")
        pair.simulators[0].behaviour = replace(QUICK, stall_after=0)
        busy = asyncio.create_task(pair.ask("slow"))
        provider = pair.server.context.router.providers["e0"]
        await until(lambda: provider.capacity.inside > 0)
        waiting = asyncio.create_task(pair.ask("two", previous_response_id=first.id))
        await until(lambda: provider.stats().queue.waiting == 1)
        assert pair.server.context.router.providers["e1"].stats().queue.waiting == 0

        pair.simulators[0].behaviour = QUICK
        busy.cancel()
        await waiting

        assert pair.asked(0)[-1] == (first.id, 1)
        assert pair.asked(1) == []


@pytest.mark.parametrize("streamed", [True, False])
async def test_once_it_is_dead_another_gets_the_conversation(
    make_server: MakeServer, streamed: bool
) -> None:
    async with pair_of(make_server, QUICK, QUICK) as pair:
        first = await pair.ask("one")
        with left_alone(pair.server.context.router.providers["e0"].health.breaker):
            second = await pair.ask("two", streamed=streamed, previous_response_id=first.id)
            await pair.ask("three", streamed=streamed, previous_response_id=second.id)

        assert pair.asked(0) == [(None, 1)]
        assert pair.asked(1) == [(None, 3), (second.id, 1)]


@pytest.mark.parametrize("streamed", [True, False])
async def test_once_there_is_no_connection_to_it_another_gets_the_conversation(
    make_server: MakeServer, streamed: bool
) -> None:
    """Long before it is known to be dead."""
    async with pair_of(make_server, QUICK, QUICK) as pair:
        first = await pair.ask("one")
        await pair.simulators[0].close()
        pair.server.context.router.providers["e0"].pools.pool.drop_idle()
        breaker = pair.server.context.router.providers["e0"].health.breaker

        second = await pair.ask("two", streamed=streamed, previous_response_id=first.id)

        assert not breaker.dead
        assert pair.asked(1) == [(None, 3)]
        assert second.id != first.id


async def test_what_fails_but_lives_is_not_left(make_server: MakeServer) -> None:
    async with pair_of(make_server, QUICK, QUICK) as pair:
        first = await pair.ask("one")
        pair.simulators[0].behaviour = FAILING
        with pytest.raises(openai.InternalServerError):
            await pair.ask("two", previous_response_id=first.id)
        assert pair.asked(1) == []


async def test_where_it_was_removed_another_gets_the_conversation(
    make_server: MakeServer,
) -> None:
    async with pair_of(make_server, QUICK, QUICK) as pair:
        first = await pair.ask("one")
        assert await pair.server.change(**pair.providers, **{"llm.models": {"pair": ["e1"]}})
        await pair.ask("two", previous_response_id=first.id)
        assert pair.asked(1) == [(None, 3)]


async def test_what_only_the_dead_one_has_is_not_found(make_server: MakeServer) -> None:
    """Its conversation begins with a response that is not ours."""
    async with pair_of(make_server, QUICK, QUICK, choose="ordered") as pair:
        second = await pair.ask("two", previous_response_id="resp_of_yesterday")
        with (
            left_alone(pair.server.context.router.providers["e0"].health.breaker),
            pytest.raises(openai.BadRequestError) as caught,
        ):
            await pair.ask("three", previous_response_id=second.id)
        assert caught.value.code == "previous_response_not_found"
        assert pair.asked(1) == []


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("refusal", [FORGETFUL, REFUSING])
async def test_an_id_that_is_not_ours_goes_to_the_members_in_turn(
    make_server: MakeServer, refusal: Any, streamed: bool
) -> None:
    async with pair_of(make_server, refusal, FORGETFUL, QUICK, choose="ordered") as pair:
        await pair.ask("two", streamed=streamed, previous_response_id="resp_of_yesterday")
        assert [pair.asked(number) for number in range(3)] == [[("resp_of_yesterday", 1)]] * 3


async def test_where_nobody_knows_it_the_refusal_is_told(make_server: MakeServer) -> None:
    async with pair_of(make_server, FORGETFUL, FORGETFUL) as pair:
        with pytest.raises(openai.NotFoundError, match="not found"):
            await pair.ask("two", previous_response_id="resp_of_yesterday")
        assert pair.asked(0) == pair.asked(1) == [("resp_of_yesterday", 1)]


async def test_one_that_fails_may_have_made_it(make_server: MakeServer) -> None:
    async with pair_of(make_server, FAILING, FORGETFUL, choose="ordered") as pair:
        with pytest.raises(openai.InternalServerError):
            await pair.ask("two", previous_response_id="resp_of_yesterday")
        assert len(pair.asked(1)) == 1


async def test_a_member_without_responses_has_not_made_it(make_server: MakeServer) -> None:
    lacking = replace(QUICK, responses=False)
    async with pair_of(make_server, lacking, QUICK, choose="ordered") as pair:
        await pair.ask("two", previous_response_id="resp_of_yesterday")
        assert pair.asked(1) == [("resp_of_yesterday", 1)]
