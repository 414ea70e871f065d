"""A key that is a function: it is asked at each connect, and once more after a 401."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Literal

import pytest

from aioserver.client import AnswerError, Client, Complete, Text, Waiting
from tests.support.issuer import SigningKey, claims, issuer_server, jwt_settings
from tests.support.keys import key_of, keys_of
from tests.support.scripted_server import ScriptedServer, answer, saying
from tests.support.simulator import Behaviour

if TYPE_CHECKING:
    from collections.abc import Container

    from tests.support.server import MakeServer

TRANSPORTS: tuple[Literal["websocket", "sse"], ...] = ("websocket", "sse")
KEY = SigningKey("EdDSA")


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_the_function_is_asked_again_after_a_401_and_no_more(
    make_server: MakeServer, transport: Literal["websocket", "sse"]
) -> None:
    server = await make_server(**keys_of("web"))
    asked: list[str] = []
    keys = iter(["aio-old", key_of("web"), "aio-old", "aio-older", "aio-oldest"])

    def key() -> str:
        asked.append(next(keys))
        return asked[-1]

    async with Client(server.base, key=key, transport=transport) as client:
        assert await client.chat("Hello").text()
        assert asked == ["aio-old", key_of("web")]
    async with Client(server.base, key=key, transport=transport) as client:
        with pytest.raises(AnswerError) as caught:
            await client.chat("Hello").text()
        assert caught.value.code == "invalid_api_key"
    assert asked[2:] == ["aio-old", "aio-older"]


async def test_conversations_are_asked_for_with_what_the_function_returns(
    make_server: MakeServer,
) -> None:
    server = await make_server(**keys_of("web"))
    keys = iter(["aio-old", key_of("web")])

    async def key() -> str:
        return next(keys)

    async with Client(server.base, key=key) as client:
        assert await client.conversations() == []


async def test_what_the_function_raises_is_raised(make_server: MakeServer) -> None:
    server = await make_server(**keys_of("web"))

    async def key() -> str:
        raise LookupError("nobody has logged in")

    async with Client(server.base, key=key) as client:
        with pytest.raises(LookupError, match="nobody has logged in"):
            await client.chat("Hello").text()


@pytest.mark.virtual_time
@pytest.mark.timeout(600)
async def test_an_answer_goes_on_over_the_end_of_a_token(make_server: MakeServer) -> None:
    async with issuer_server(KEY) as issuer:
        behaviour = Behaviour(ttft=0, interval=2.0, tokens=60)
        server = await make_server(behaviour, **{"auth.jwt": jwt_settings(issuer.url)})
        asked = 0

        async def key() -> str:
            nonlocal asked
            asked += 1
            await asyncio.sleep(0)
            # The first one has a second to live, and no other one is shorter.
            return KEY.sign(claims(exp=time.time() + (1 if asked == 1 else 3600)))

        async with Client(server.base, key=key) as client:
            text = await client.chat("Hello").text()

        assert asked == 2
        assert text
        assert server.simulator.stats().requests == 1


HELLO = answer("r1", "Hel", "lo")


class Keys:
    """A function for a key that fails at its calls number *fails*, from 0."""

    def __init__(self, error: Exception, fails: Container[int]) -> None:
        self.calls = 0
        self._error = error
        self._fails = fails

    async def __call__(self) -> str:
        self.calls += 1
        await asyncio.sleep(0)
        if self.calls - 1 in self._fails:
            raise self._error
        return "aio-key"


@pytest.mark.virtual_time
@pytest.mark.timeout(600)
@pytest.mark.parametrize("transport", TRANSPORTS)
# What the client's own connections raise is told from what the function raises.
@pytest.mark.parametrize(
    "error", [LookupError("no login"), TimeoutError("no login"), ConnectionError("no login")]
)
async def test_a_function_that_fails_for_a_while_costs_no_answer_that_was_asked_for(
    transport: Literal["websocket", "sse"], error: Exception
) -> None:
    scripts = [saying(*HELLO[:2], cut=True), saying(*HELLO)]
    key = Keys(error, range(1, 6))
    async with (
        ScriptedServer(answers=scripts) as server,
        Client(server.url, key=key, transport=transport) as client,
    ):
        events = [event async for event in client.chat("Hi", request_id="r1").events()]

    assert [event.text for event in events if isinstance(event, Text)] == ["Hel", "lo"]
    assert isinstance(events[-1], Complete)
    assert server.actions == ["chat", "resume"]
    assert key.calls == 7
    waits = [event for event in events if isinstance(event, Waiting)]
    assert waits
    assert {(wait.code, wait.message) for wait in waits} <= {
        ("connect_error", "the function for the key has failed: no login"),
        ("connect_error", "the connection to the server was closed"),
    }


@pytest.mark.virtual_time
@pytest.mark.timeout(600)
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_function_that_fails_until_the_deadline_is_what_the_answer_fails_by(
    transport: Literal["websocket", "sse"],
) -> None:
    key = Keys(LookupError("no login"), range(1, 10_000))
    async with (
        ScriptedServer(answers=[saying(*HELLO[:2], cut=True)]) as server,
        Client(server.url, key=key, transport=transport, deadline=100) as client,
    ):
        answered = client.chat("Hi")
        with pytest.raises(AnswerError) as caught:
            await answered.text()

        # Nothing was asked of the next question, so that it fails by what the function has raised.
        with pytest.raises(LookupError, match="no login"):
            await client.chat("Hi").text()

    assert caught.value.code == "connect_error"
    assert caught.value.message == "the function for the key has failed: no login"
    assert caught.value.text == "Hel"
    # It is asked as a server is that is away.
    assert 5 < key.calls < 60
    assert server.actions[0] == "chat"
    assert "resume" not in server.actions


@pytest.mark.virtual_time
@pytest.mark.timeout(600)
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_an_answer_of_an_earlier_program_waits_for_the_function_as_for_a_server(
    transport: Literal["websocket", "sse"],
) -> None:
    async with ScriptedServer(answers=[saying(*HELLO)]) as server:
        for fails in (2, 3):
            key = Keys(TimeoutError(), range(fails))
            async with Client(server.url, key=key, transport=transport) as client:
                answered = client.chat("Hi", request_id="r1", last_event_id=2)
                if fails == 2:
                    assert await answered.text() == "lo"
                    continue
                with pytest.raises(AnswerError, match="the function for the key has failed"):
                    await answered.text()
