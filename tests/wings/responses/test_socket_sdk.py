"""OpenAI's own client for Responses over WebSocket, in front of a server and behind connections
that are cut.
"""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import pytest
from openai.types.responses.responses_server_event import ResponseWsError
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidMessage

from tests.support import responses
from tests.support.fault_proxy import FaultProxy
from tests.support.sdk import openai_of
from tests.support.simulator import Behaviour

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from openai.resources.responses.responses import AsyncResponsesConnection

    from tests.support.server import MakeServer, RunningServer

LANES = ("a", "b")
# What the client raises when its connection is cut.
CUT = (ConnectionClosed, InvalidHandshake, InvalidMessage, OSError, EOFError)


async def read(connection: AsyncResponsesConnection, answers: dict[str, list[Any]]) -> None:
    """Read what comes on both lanes into *answers*, until each has an end."""
    missing = {lane for lane in LANES if not ended(answers[lane])}
    while missing:
        event = await connection.recv()
        assert event.stream_id is not None
        answers[event.stream_id].append(event)
        if event.type in responses.ENDS:
            missing.discard(event.stream_id)


def ended(events: list[Any]) -> bool:
    return bool(events) and events[-1].type in responses.ENDS


def whole(events: list[Any]) -> bool:
    return responses.whole([event.model_dump() for event in events])


async def test_two_lanes_of_the_official_client(server: RunningServer, sdk: AsyncOpenAI) -> None:
    answers: dict[str, list[Any]] = {lane: [] for lane in LANES}
    async with sdk.responses.connect() as connection:
        for lane in LANES:
            await connection.response.create(model="sim-model", input="Hello", stream_id=lane)
        await read(connection, answers)
        assert all(map(whole, answers.values()))

        previous = answers["a"][-1].response.id
        await connection.response.steer(input="Shorter!", previous_response_id=previous)
        failed = await connection.recv()
        assert failed.type == "response.steer.failed"
        assert (failed.steer.input, failed.steer.previous_response_id) == ("Shorter!", previous)
        assert failed.error.code == "steering_not_supported"

        await connection.response.create(
            model="fault-status-429", input="Hello", previous_response_id=previous
        )
        error = await connection.recv()
        assert isinstance(error, ResponseWsError)
        assert (error.status, error.error.code) == (429, "provider_rate_limited")
        assert error.error.headers is not None
        assert "retry-after" in error.error.headers

        await connection.send_raw(json.dumps(responses.create(generate=False)))
        kinds = [(await connection.recv()).type for _ in range(3)]
        assert kinds == ["response.created", "response.in_progress", "response.completed"]


@pytest.mark.virtual_time
@pytest.mark.parametrize("store", [True, False])
@pytest.mark.parametrize("cuts", [8, pytest.param(100, marks=pytest.mark.stress)])
async def test_every_answer_is_whole_or_its_connection_was_cut(
    make_server: MakeServer, cuts: int, store: bool
) -> None:
    server = await make_server(Behaviour(ttft=0, interval=0.002, tokens=30))
    dice = random.Random(cuts)

    def allowance() -> int | None:
        return dice.randint(0, 20_000) if proxy.cuts < cuts else None

    async def ask(connection: AsyncResponsesConnection, lane: str, events: list[Any]) -> None:
        if not events:
            await connection.response.create(
                model="sim-model", input="Hello", stream_id=lane, store=store
            )
        elif not ended(events):
            resume = {
                "type": "response.resume",
                "response_id": events[0].response.id,
                "starting_after": events[-1].sequence_number,
                "stream_id": lane,
            }
            await connection.send_raw(json.dumps(resume))

    good = lost = 0
    async with (
        FaultProxy(server.port, allowance) as proxy,
        openai_of(f"{proxy.url}/v1") as sdk,
    ):
        while proxy.cuts < cuts or not good:
            answers: dict[str, list[Any]] = {lane: [] for lane in LANES}
            while not all(map(ended, answers.values())):
                try:
                    async with sdk.responses.connect() as connection:
                        for lane, events in answers.items():
                            await ask(connection, lane, events)
                        await read(connection, answers)
                except CUT:
                    if not store:
                        # The client knows that these are not whole, and asks again.
                        lost += sum(not ended(events) for events in answers.values())
                        for events in answers.values():
                            if not ended(events):
                                events.clear()
            assert all(map(whole, answers.values()))
            good += len(answers)

    assert store or lost
    await server.nothing_held()
