"""A provider whose address leads back to this server: one question ends at once, and says why."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.protocol.request_headers import HOP, MAX_HOPS
from tests.support.chat import CHAT
from tests.support.faces import (
    ask_every_face,
    expected_text,
    over_anthropic,
    over_openai,
)
from tests.support.scripted_provider import ScriptedProvider
from tests.support.server import provider_entry

if TYPE_CHECKING:
    from tests.support.scripted_provider import Peer
    from tests.support.server import MakeServer, RunningServer

ANSWER = b'{"choices":[{"index":0,"message":{"role":"assistant","content":"Hi"}}]}'
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


def circle(base_url: str, **changes: Any) -> dict[str, Any]:
    entry = provider_entry(base_url, "m") | {"messages": True}
    return {"llm.active": "circle", "llm.providers.circle": entry, **changes}


async def over_a_passed_path(server: RunningServer) -> tuple[int, str, str]:
    body = {"model": "m", "query": "a", "documents": ["b"]}
    async with server.session.post(f"{server.v1}/rerank", json=body) as response:
        error = (await response.json())["error"]
        return response.status, error["code"], response.headers["x-should-retry"]


async def test_a_provider_that_leads_back_is_told_of_on_every_face(
    make_server: MakeServer,
) -> None:
    server = await make_server()
    text = "llm.providers.circle.base_url leads back to this server"

    async def anew() -> None:
        # A reload tries the provider again.
        assert await server.change(**circle(server.v1))

    for ask in (over_anthropic, over_openai):
        for stream in (True, False):
            await anew()
            seen = await ask(server, "m", stream=stream)
            assert (seen.status, seen.code) == (508, "loop_detected")
            assert seen.headers["x-should-retry"] == "false"
            assert seen.error["message"] == text
    await anew()
    assert await over_a_passed_path(server) == (508, "loop_detected", "false")
    await anew()
    for seen in await ask_every_face(server, "m"):
        assert seen.code == "loop_detected"
        assert (seen.error.get("error") or seen.error["message"]) == text
        assert seen.error.get("retryable", False) is False

    assert server.provider_of("circle").stats().flagged
    tries = await server.counted("provider_attempts", "provider", "outcome")
    assert tries.keys() == {("circle", "loop")}, "one attempt of each, and no retry"
    # Flagged, it is not asked again, and what is said of it stays the same.
    seen = await over_openai(server, "m")
    assert (seen.status, seen.error["message"]) == (508, text)
    assert await server.counted("provider_attempts", "provider", "outcome") == tries
    server.context.monitor.tick()
    trouble = server.context.monitor.fresh()["providers"]["circle"]["trouble"]
    assert trouble is not None
    assert trouble["text"] == "circle leads back to this server"
    assert "base_url" in trouble["advice"]
    await server.nothing_held()


async def test_another_provider_answers_in_place_of_one_that_leads_back(
    make_server: MakeServer,
) -> None:
    server = await make_server()
    text = await expected_text(server)
    assert await server.change(**circle(server.v1, **{"llm.fallbacks": ["sim"]}))

    for seen in await ask_every_face(server, "m"):
        assert (seen.end, seen.text) == ("complete", text)


async def test_two_servers_that_lead_to_each_other(make_server: MakeServer) -> None:
    one, other = await make_server(), await make_server()
    assert await one.change(**circle(other.v1))
    assert await other.change(**circle(one.v1))

    seen = await over_openai(one, "m")

    assert (seen.status, seen.code) == (508, "loop_detected")
    assert one.provider_of("circle").stats().flagged
    for server in (one, other):
        assert await server.counted("provider_attempts", "outcome") == {("loop",): 1}
        await server.nothing_held()


@pytest.mark.parametrize(
    "entry", [{"headers": {str(HOP): "forged"}}, {"pass_headers": [str(HOP)]}]
)
async def test_a_request_says_through_which_servers_it_has_come(
    make_server: MakeServer, entry: dict[str, Any]
) -> None:
    heads: list[bytes] = []

    async def play(peer: Peer) -> None:
        while True:
            heads.append((await peer.request()).partition(b"\r\n\r\n")[0])
            await peer.send(HEAD % len(ANSWER) + ANSWER)

    def hops() -> list[str]:
        lines = [line.split(": ", 1) for line in heads[-1].decode("latin-1").split("\r\n")[1:]]
        texts = ",".join(value for name, value in lines if name.lower() == HOP)
        return [text.strip() for text in texts.split(",")]

    async with ScriptedProvider(play) as provider:
        there = provider_entry(provider.url, "m") | entry
        server = await make_server(**{"llm.active": "there", "llm.providers.there": there})
        for values in ((), ("a",), ("a, b",), ("a", "b,c , d"), ("é", "a b", "c")):
            sound = [part.strip() for part in ",".join(values).split(",")]
            sound = [part for part in sound if part.isascii() and " " not in part and part]
            headers = [(HOP, value) for value in values]
            for path, body in (("chat/completions", {"model": "m", **CHAT}), ("rerank", {})):
                url = f"{server.v1}/{path}"
                async with server.session.post(url, json=body, headers=headers) as response:
                    assert response.status == 200
                assert hops() == [server.context.hop, *sound], path


async def test_a_request_that_has_come_through_many_servers_asks_nobody(
    make_server: MakeServer,
) -> None:
    server = await make_server()
    many = ",".join(f"{number}" for number in range(MAX_HOPS))
    url = f"{server.v1}/chat/completions"

    for value in (many, server.context.hop, f"a, {server.context.hop},b"):
        async with server.session.post(
            url, json={"model": "m", **CHAT}, headers={HOP: value}
        ) as response:
            assert response.status == 508
            assert (await response.json())["error"]["code"] == "loop_detected"
            assert response.headers["x-should-retry"] == "false"
        upgrade = server.session.ws_connect(server.ws, headers={HOP: value})
        with pytest.raises(Exception, match="508"):
            await upgrade
        async with server.session.get(f"{server.v1}/models", headers={HOP: value}) as response:
            assert response.status == 200, "nobody is asked for it"

    assert await server.counted("provider_attempts", "provider") == {}
    await asyncio.sleep(0)
    await server.nothing_held()
