"""A key that is a function: it is asked at each connect, and once more after a 401."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Literal

import pytest

from aioserver.client import AnswerError, Client
from aioserver.wings.simulator.exchange import Behaviour
from tests.support.issuer import SigningKey, claims, issuer_server, jwt_settings
from tests.support.keys import key_of, keys_of

if TYPE_CHECKING:
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
