"""Hooks that stall, break, answer late or flood: they change no event, no order and no time of a
reader, and a closed one lets nothing pass that it has not decided.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.protocol import eventstream
from aioserver.wings.hooks.decisions import line
from tests.support.chat import STREAMED, chat
from tests.support.faces import ask_every_face, over_anthropic, over_openai
from tests.support.hook_program import entry, hook_program, hooks_of
from tests.support.scripted_provider import (
    DONE,
    EVENT_STREAM,
    LAST_CHUNK,
    ScriptedProvider,
    chunk,
)
from tests.support.server import ENDLESS, provider_entry
from tests.support.simulator import Behaviour
from tests.support.waiting import until

if TYPE_CHECKING:
    from tests.support.scripted_provider import Peer
    from tests.support.server import MakeServer, RunningServer

FOREVER = 1e6
PACED = Behaviour(ttft=0, interval=0.05, tokens=12)


async def stalls(_peer: Peer) -> None:
    await asyncio.sleep(FOREVER)


async def hangs_up(peer: Peer) -> None:
    peer.close()


async def breaks(peer: Peer) -> None:
    await peer.reader.read(600)
    peer.abort()


async def is_late(peer: Peer) -> None:
    reading = asyncio.create_task(peer.left())
    await asyncio.sleep(1000)
    await peer.send(b"HTTP/1.1 204 No Content\r\n\r\n")
    await reading


async def dribbles(peer: Peer) -> None:
    loop = asyncio.get_running_loop()
    while await peer.reader.read(1):
        resting = loop.create_future()
        loop.call_later(0.2, resting.set_result, None)
        await resting


async def floods(peer: Peer) -> None:
    await peer.head()
    await peer.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
    while True:
        peer.write(b'{"refuse":' + b" " * 60_000)
        await peer.writer.drain()


async def lies(peer: Peer) -> None:
    await peer.head()
    body = json.dumps({"refuse": {"message": "no", "status": 200}}).encode()
    await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    await peer.left()


async def speaks_another_tongue(peer: Peer) -> None:
    await peer.head()
    await peer.send(b"SSH-2.0-OpenSSH_9.6\r\n")
    await peer.left()


SICK = (stalls, hangs_up, breaks, is_late, dribbles, floods, lies, speaks_another_tongue)


async def transcript(server: RunningServer, name: str) -> dict[str, list[tuple[float, Any]]]:
    """The events of one answer on each of three faces, each with its time."""
    loop = asyncio.get_running_loop()

    async def websocket() -> list[tuple[float, Any]]:
        seen = []
        async with server.connect() as ws:
            began = loop.time()
            await ws.send_json(chat(name))
            while True:
                frame = await ws.receive_json(timeout=100)
                seen.append((loop.time() - began, frame))
                if frame["status"] in {"complete", "error"}:
                    return seen

    async def events(url: str, body: Any) -> list[tuple[float, Any]]:
        seen: list[tuple[float, Any]] = []
        splitter = eventstream.Splitter(1 << 20)
        began = loop.time()
        async with server.session.post(url, json=body) as response:
            while data := await response.content.readany():
                now = loop.time() - began
                seen += [(now, event.data) for event in eventstream.parse(splitter.feed(data))]
        return seen

    return {
        "websocket": await websocket(),
        "sse": await events(server.sse, {"request_id": f"{name}-sse", "text": "Hello"}),
        "openai": await events(f"{server.v1}/chat/completions", {"model": "m", **STREAMED}),
    }


def without_ids(face: str, event: Any) -> Any:
    """*event* without what is another one in each answer."""
    if face == "openai":
        if event == b"[DONE]":
            return event
        event = {**json.loads(event), "id": "", "created": 0}
    elif isinstance(event, bytes):
        event = json.loads(event)
    event.pop("request_id", None)
    event.get("chunk", {}).get("metadata", {}).pop("conversation_id", None)
    return event


async def outcomes(server: RunningServer) -> dict[tuple[str, ...], int]:
    return dict(await server.counted("hook_calls", "hook", "outcome"))


@pytest.mark.virtual_time
async def test_a_sick_hook_changes_no_event_no_order_and_no_time_of_a_reader(
    make_server: MakeServer,
) -> None:
    server = await make_server(PACED)
    before = await transcript(server, "before")
    for play in SICK:
        async with ScriptedProvider(play, limit=1) as hook:
            name = play.__name__
            sick = entry(hook.url, name, on=["answer"], fail="open", timeout=0.5)
            assert await server.change(hooks=[sick])
            behind = await transcript(server, f"behind {name} ")

            for face, events in before.items():
                others = behind[face]
                assert [without_ids(face, event) for _, event in others] == [
                    without_ids(face, event) for _, event in events
                ], name
                # In this time, nothing that is done takes any, but for a breath.
                pairs = zip(events, others, strict=True)
                assert max(abs(other - one) for (one, _), (other, _) in pairs) < 0.005, name
            await until(lambda: not any(hooks_of(server).stats()), 10, hooks_of(server).stats)
    assert await outcomes(server) == {(play.__name__, "failed"): 3 for play in SICK}


async def test_a_closed_hook_that_is_sick_lets_no_undecided_request_pass(
    make_server: MakeServer,
) -> None:
    server = await make_server()
    for play in SICK:
        async with ScriptedProvider(play, limit=1) as hook:
            sick = entry(hook.url, on=["request"], timeout=0.2)
            assert await server.change(hooks=[sick])

            seen = [*await ask_every_face(server, "m"), await over_anthropic(server, "m")]

            assert {answer.code for answer in seen} == {"hook_unavailable"}, play
            assert {answer.status for answer in seen if answer.status} <= {200, 503, 529}
            await server.nothing_held()
    assert await server.counted("provider_attempts", "provider") == {}


@pytest.mark.parametrize("fail", ["open", "closed"])
async def test_a_flood_of_events_puts_a_hook_behind_that_does_not_read(
    make_server: MakeServer, fail: str
) -> None:
    """Seven megabytes: the kernel takes some for a hook that reads nothing, and one more may
    wait.
    """
    content, number = "x" * 60_000, 120
    event = b'data: {"choices":[{"index":0,"delta":{"content":"%b"}}]}\n\n' % content.encode()
    end = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n' + DONE

    async def speak(peer: Peer) -> None:
        await peer.request()
        await peer.send(EVENT_STREAM)
        for _ in range(number):
            peer.write(chunk(event))
            await peer.writer.drain()
            await asyncio.sleep(0)
        await peer.send(chunk(end) + LAST_CHUNK)
        await peer.left()

    async with ScriptedProvider(speak) as provider, ScriptedProvider(stalls, limit=1) as hook:
        there = provider_entry(provider.url, read_timeout=60.0)
        server = await make_server(
            hooks=[entry(hook.url, on=["answer"], fail=fail)],
            **{"llm.active": "there", "llm.providers.there": there},
        )

        seen = await over_openai(server, "m")

        if fail == "open":
            assert seen.end == "complete"
            assert len(seen.text) == number * len(content)
        else:
            assert (seen.end, seen.code) == ("error", "hook_unavailable")
        await until(lambda: not any(hooks_of(server).stats()), 10, hooks_of(server).stats)
        assert await server.counted("hook_calls", "outcome") == {("behind",): 1}
        await server.nothing_held()


async def test_a_hook_that_reads_has_all_of_a_flood(make_server: MakeServer) -> None:
    event = b'data: {"choices":[{"index":0,"delta":{"content":"%b"}}]}\n\n' % (b"x" * 3_000_000)
    end = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n' + DONE

    async def speak(peer: Peer) -> None:
        await peer.request()
        await peer.send(EVENT_STREAM, chunk(event), chunk(end) + LAST_CHUNK)
        await peer.left()

    lengths = []

    async def read(line: dict[str, Any]) -> None:
        lengths.append(len(json.dumps(line)))

    async with ScriptedProvider(speak) as provider, hook_program(read=read) as hook:
        there = provider_entry(provider.url, read_timeout=60.0)
        server = await make_server(
            hooks=[entry(hook, on=["answer"], fail="closed")],
            **{"llm.active": "there", "llm.providers.there": there},
        )
        assert (await over_openai(server, "m")).end == "complete"
        await until(lambda: hook.ended == 1)

        assert max(lengths) > 3_000_000
        assert await server.counted("hook_calls", "outcome") == {("passed",): 1}


async def test_a_closed_hook_that_breaks_off_ends_the_answer(make_server: MakeServer) -> None:
    server = await make_server(ENDLESS)
    plays = (breaks, hangs_up, floods, lies)
    for play in plays:
        async with ScriptedProvider(play, limit=1) as hook:
            sick = entry(hook.url, play.__name__, on=["answer"], timeout=1.0)
            assert await server.change(hooks=[sick])

            seen = await over_openai(server, "m")

            assert (seen.end, seen.code) == ("error", "hook_unavailable")
            await server.nothing_held()
    assert await outcomes(server) == {(play.__name__, "failed"): 1 for play in plays}


async def test_what_a_provider_sends_cannot_end_the_lines_of_a_hook(
    make_server: MakeServer,
) -> None:
    """An event that is no JSON could close the object around it, and say that all is over."""
    lie = b'{"choices":[]}},{"end":"complete"'
    events = (
        b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'
        b'data: {"choices":\ndata: [{"index":0,"delta":{"content":"b"},"finish_reason":"stop"}]}\n\n'
    )

    async def speak(peer: Peer) -> None:
        await peer.request()
        await peer.send(EVENT_STREAM, chunk(events + DONE) + LAST_CHUNK)
        await peer.left()

    assert json.loads(line(3, lie)) == {"n": 3, "data": lie.decode()}
    assert json.loads(line(3, b'"\xff"')) == {"n": 3, "data": '"\ufffd"'}
    async with ScriptedProvider(speak) as provider, hook_program() as hook:
        there = provider_entry(provider.url)
        server = await make_server(
            hooks=[entry(hook, on=["answer"])],
            **{"llm.active": "there", "llm.providers.there": there},
        )
        assert (await over_openai(server, "m")).text == "ab"
        await until(lambda: hook.ended == 1)
        assert hook.texts() == "ab"
