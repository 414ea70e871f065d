"""Answers that are passed on from their owner: the bytes in between, and both ends."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections import Counter
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, cast

import pytest
from aiohttp import ClientPayloadError

from aioserver.faces.admission import ACCEPTED
from aioserver.protocol import eventstream
from aioserver.wings.cluster.answers.greeting import Forward, Greeting, encode
from aioserver.wings.cluster.answers.peer_network import Gone
from aioserver.wings.cluster.answers.tunnels import Tunnel
from tests.support.chat import (
    CHAT,
    STREAMED,
    big,
    cancel,
    chat,
    numbers,
    read_frames,
    to_end,
    until_status,
)
from tests.support.instances import SECRET, NamedNetwork, World, asked, instance_of, read_by
from tests.support.jumping_loop import block
from tests.support.keys import bearer, keys_of
from tests.support.server import CONCURRENCY, ENDLESS, PACED, QUICK, UVICORN
from tests.support.waiting import until, within

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from tests.support.instances import Instance, Make


RESPONSE = {"model": "sim", "input": "Hello", "store": True, "stream": True}
QUESTION = {"request_id": "r1", "text": "Hello"}
KEY = {"Idempotency-Key": "r1"}

# The bytes.

EVENT = b'id: 1\nevent: complete\ndata: {"status":"complete"}\n\n'
HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
CHUNK = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)
CHUNKED = HEAD + CHUNK + CHUNK + b"0\r\n\r\n"
SIZED = b"HTTP/1.1 409 Conflict\r\nContent-Length: 12\r\nConnection: close\r\n\r\nhello hello\n"
EMPTY = b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n"
OLD = b"HTTP/1.0 200 OK\r\nConnection: close\r\n\r\nid: 1\ndata: x\n\n" + EVENT
RESPONSES = pytest.mark.parametrize(
    ("response", "options"),
    [
        (CHUNKED, {}),
        (SIZED, {}),
        (SIZED.replace(b"Content-Length", b"content-length"), {}),
        (EMPTY, {}),
        (EMPTY.replace(b"204", b"304"), {}),
        (HEAD, {"bodyless": True}),
        (SIZED.partition(b"hello")[0], {"bodyless": True}),
        (OLD, {"chunked": False}),
        (SIZED.replace(b"1.1", b"1.0"), {"chunked": False}),
    ],
    ids=[
        "chunks",
        "length",
        "lower case",
        "204",
        "304",
        "HEAD",
        "HEAD, length",
        "1.0",
        "1.0, length",
    ],
)


class Client:
    """The transport of a client that reads everything."""

    def __init__(self) -> None:
        self.got = b""

    def write(self, data: bytes) -> None:
        self.got += data

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0


async def never() -> None:
    raise AssertionError("the client reads everything")


def passed(
    pieces: Iterable[bytes], *, bodyless: bool = False, chunked: bool = True
) -> tuple[Tunnel, bytes]:
    """Pass *pieces* on, and end the connection; return the tunnel, and what the client got."""
    client = Client()
    tunnel = Tunnel(cast("asyncio.Transport", client), never, bodyless=bodyless, chunked=chunked)
    for piece in pieces:
        tunnel.data_received(piece)
    tunnel.connection_lost(None)
    assert tunnel.done.done()
    return tunnel, client.got


@RESPONSES
async def test_a_response_is_passed_on_however_its_bytes_are_cut(
    response: bytes, options: dict[str, bool]
) -> None:
    for data in (ACCEPTED + response, response):
        cuts = [[data[:at], data[at:]] for at in range(1, len(data))]
        for pieces in (*cuts, [data], [data[at : at + 1] for at in range(len(data))]):
            tunnel, got = passed(pieces, **options)

            assert got == response
            assert tunnel.accepted.result()
            assert tunnel.whole
            assert tunnel.status == int(response[9:12])
            assert tunnel.passed == len(response)


@RESPONSES
async def test_a_response_that_is_cut_off_is_not_whole(
    response: bytes, options: dict[str, bool]
) -> None:
    data = ACCEPTED + response
    # The status of the last event says enough to a client of HTTP/1.0.
    end = len(data) - (len(b'"}\n\n') - 1 if response is OLD else 0)
    for at in range(end):
        tunnel, got = passed([data[:at]], **options)

        assert not tunnel.whole
        assert response.startswith(got)
        assert got == b"" or got.find(b"\r\n\r\n") > 0, "only a whole head is passed on"


async def test_it_is_known_that_an_owner_has_the_answer_before_the_answer_begins() -> None:
    tunnel = Tunnel(cast("asyncio.Transport", Client()), never, bodyless=False, chunked=True)

    tunnel.data_received(ACCEPTED[:-1])
    assert not tunnel.accepted.done()
    tunnel.data_received(ACCEPTED[-1:])

    assert tunnel.accepted.result()
    assert not tunnel.done.done()


async def test_an_owner_that_does_not_have_the_answer_says_nothing_to_the_client() -> None:
    misdirected = b"HTTP/1.1 421 Misdirected Request\r\nContent-Length: 0\r\n\r\n"
    for at in range(1, len(misdirected)):
        tunnel, got = passed([misdirected[:at], misdirected[at:]])

        assert got == b""
        assert not tunnel.accepted.result()
        assert not tunnel.whole


# Both ends.


def at(instance: Instance, after: int = 0, name: str = "r1", **options: Any) -> Any:
    """A request for the answer *name*."""
    return instance.server.session.get(
        f"{instance.server.sse}/{name}?last_event_id={after}", **options
    )


@pytest.mark.parametrize("after", [0, 12])
async def test_a_stream_elsewhere_is_passed_on_and_no_log_is_made_of_it(
    make: Make, after: int
) -> None:
    a, b = await make()
    async with AsyncExitStack() as stack:
        ws = await asked(a, stack)
        while (await ws.receive_json())["event_id"] < after:
            pass
        async with at(b, after) as response:
            assert response.status == 200
            assert response.headers["Connection"] == "close"
            await response.content.readline()
            assert (b.cluster.stats().tunnels, a.cluster.stats().links) == (1, 1)
            assert b.server.owners.streams.stats().running == 0
            read = numbers(await read_frames_after(response))
        rest = await to_end(ws)

    assert read[-1] == rest[-1]["event_id"]
    assert read == list(range(read[0], read[-1] + 1))
    assert read[0] <= after + 2
    assert b.cluster.stats().tunnels == 0
    assert (a.requests, b.requests) == (1, 0)


async def read_frames_after(response: Any) -> list[Any]:
    """The frames behind the line that was read."""
    events = eventstream.parse(b"\n" + await response.read())
    return [json.loads(event.data) for event in events if event.data]


async def test_the_state_of_an_answer_elsewhere_is_told_by_its_owner(make: Make) -> None:
    a, b = await make()
    async with AsyncExitStack() as stack:
        ws = await asked(a, stack)
        headers = {"Accept": "application/json"}
        async with at(b, headers=headers) as response:
            running = await response.json()
        await to_end(ws)
    states = []
    for instance in (a, b):
        async with at(instance, headers=headers) as response:
            states.append(await response.json())

    assert running["status"] == "running"
    assert states[0] == states[1]
    assert states[0]["text"]


@pytest.mark.parametrize(
    ("method", "after", "status"),
    [("GET", 1000, 409), ("GET", None, 204), ("HEAD", 0, 200), ("HEAD", None, 204)],
)
async def test_a_short_answer_of_the_owner_is_the_answer_here(
    make: Make, method: str, after: int | None, status: int
) -> None:
    a, b = await make(2, QUICK)
    async with a.server.connect() as ws:
        await ws.send_json(chat("r1"))
        last = (await to_end(ws))[-1]["event_id"]
    url, body = f"{b.server.sse}/r1?last_event_id={last if after is None else after}", b""

    for _ in range(2):
        async with b.server.session.request(method, url) as response:
            assert response.status == status
            body = await response.read()

    assert status != 409 or json.loads(body)["error"]["code"] == "resume_gap"
    assert method != "HEAD" or body == b""
    await b.server.nothing_held()


async def raw_get(
    instance: Instance, version: str, path: str
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", instance.server.port)
    writer.write(f"GET {path} HTTP/{version}\r\nHost: x\r\n\r\n".encode())
    return reader, writer


async def test_a_client_of_http_1_0_gets_the_events_without_chunks(make: Make) -> None:
    a, b = await make()
    async with AsyncExitStack() as stack:
        ws = await asked(a, stack)
        reader, writer = await raw_get(b, "1.0", f"{b.server.settings.chat.sse.endpoint}/r1")
        await to_end(ws)
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()

    assert head.startswith(b"HTTP/1.0 200 OK\r\n")
    assert b"chunked" not in head
    assert eventstream.parse(body)[-1].event == b"complete"


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_a_reader_elsewhere_of_an_owner_that_is_killed_is_told_at_once(
    make: Make, world: World, version: str
) -> None:
    a, b = await make(2, ENDLESS)
    async with AsyncExitStack() as stack:
        ws = await asked(a, stack)
        reader, writer = await raw_get(b, version, f"{b.server.settings.chat.sse.endpoint}/r1")
        await reader.readuntil(b"event: chunk")
        # Its last read has come whole, as from a process that was killed a moment later.
        await until(lambda: b.cluster.stats().tunnels == 1)
        killed = asyncio.get_running_loop().time()
        world.kill("a")
        body = await reader.read()
        writer.close()
        assert within(0.1, killed)
        await ws.close()
    await a.server.context.gateway.close()

    if version == "1.1":
        assert body.endswith(b"\r\n0\r\n\r\n")
    event = eventstream.parse(body.removesuffix(b"\r\n0\r\n\r\n") + b"\n\n")[-1]
    error = json.loads(event.data)
    assert event.event == b"error"
    assert (error["request_id"], error["chunk"]["code"]) == ("r1", "server_shutdown")
    assert error["chunk"]["retryable"]
    # It is no event of the log.
    assert "event_id" not in error
    assert b.requests == 0


async def test_a_reader_of_a_response_is_told_in_its_own_form(make: Make, world: World) -> None:
    a, b = await make(2, ENDLESS)
    url = f"{a.server.v1}/responses"
    async with a.server.session.post(url, json=RESPONSE) as first:
        line = b""
        while not line.startswith(b"data: "):
            line = await first.content.readline()
        name = json.loads(line[6:])["response"]["id"]
        async with b.server.session.get(f"{b.server.v1}/responses/{name}?stream=true") as second:
            while b"output_text.delta" not in await second.content.readline():
                pass
            world.kill("a")
            events = eventstream.parse(b"\n" + await second.read())
    await a.server.context.gateway.close()

    data = [json.loads(event.data) for event in events if event.data]
    assert data[-1]["type"] == "response.failed"
    assert "out of reach" in data[-1]["response"]["error"]["message"]
    assert data[-1]["sequence_number"] == data[-2]["sequence_number"] + 1


async def test_an_owner_that_hangs_is_not_gone(make: Make, world: World) -> None:
    a, b = await make(2, ENDLESS)
    async with AsyncExitStack() as stack:
        ws = await asked(a, stack)
        world.silent.add("a")
        began = asyncio.get_running_loop().time()
        async with at(b) as response:
            assert response.status == 503
            assert (await response.json())["error"]["code"] == "instance_unavailable"
            assert "Retry-After" in response.headers
        assert within(1.1, began)
        world.silent.clear()
        async with at(b) as response:
            assert response.status == 200
            await response.content.readline()
        await ws.close()
    await a.server.context.gateway.close()


async def test_a_reader_of_an_owner_that_is_no_member_any_more_is_told(make: Make) -> None:
    a, b = await make(2, ENDLESS)
    async with AsyncExitStack() as stack:
        ws = await asked(a, stack)
        async with at(b) as response:
            await response.content.readline()
            b.cluster.keep(["a", "b"])
            await response.content.readuntil(b"event: chunk")
            b.cluster.keep(["b"])
            read = await read_frames_after(response)
        await ws.close()
    await a.server.context.gateway.close()

    assert read[-1]["chunk"]["code"] == "server_shutdown"


async def test_an_owner_that_is_gone_has_nothing_and_its_id_is_known_for_a_while(
    make: Make, world: World
) -> None:
    a, b = await make(2, QUICK)
    async with a.server.connect() as ws:
        await ws.send_json(chat("r1"))
        await to_end(ws)
    world.kill("a")

    async with at(b) as response:
        assert response.status == 503
        assert (await response.json())["error"]["code"] == "server_shutdown"
    world.members.remove("a")
    async with at(b) as response:
        assert response.status == 404


@pytest.mark.parametrize("found", [True, False])
async def test_an_answer_that_has_moved_is_looked_for_again(
    make: Make, world: World, monkeypatch: pytest.MonkeyPatch, found: bool
) -> None:
    _a, b, c = await make(3, QUICK)
    async with c.server.connect() as ws:
        await ws.send_json(chat("r1"))
        await to_end(ws)
    (claim,) = world.claims.values()
    claim.owner = "a"
    dialled = []

    async def dial(name: str, tunnel: Any) -> Any:
        dialled.append(name)
        # The claim is another one's by the time its owner is found to be gone.
        if name == "a" or not found:
            claim.owner = "c" if name == "a" else "a"
            raise Gone(name)
        return await NamedNetwork.dial(world.networks["b"], name, tunnel)

    monkeypatch.setattr(world.networks["b"], "dial", dial)
    async with at(b) as response:
        body = await response.read()

    if found:
        assert (response.status, dialled) == (200, ["a", "c"])
        assert eventstream.parse(body)[-1].event == b"complete"
    else:
        assert (response.status, dialled) == (503, ["a", "c", "a"])
        assert json.loads(body)["error"]["code"] == "server_shutdown"


async def test_an_answer_that_its_owner_does_not_keep_any_more_is_not_found(make: Make) -> None:
    a, b = await make(2, QUICK)
    async with a.server.connect() as ws:
        await ws.send_json(chat("r1"))
        await to_end(ws)
    (stream,) = a.server.owners.streams.finished()
    a.server.owners.streams.drop(stream)

    async with at(b) as response:
        assert response.status == 404
        assert (await response.json())["error"]["code"] == "stream_not_found"
    async with b.server.session.get(f"{b.server.v1}/responses/r1") as response:
        assert response.status == 404


async def test_whoever_reads_an_answer_reads_on_without_the_server_of_claims(
    make: Make, world: World
) -> None:
    a, b = await make(2, PACED)
    async with AsyncExitStack() as stack:
        ws = await asked(a, stack)
        async with at(b) as response:
            await response.content.readline()
            world.away = True
            read = await read_frames_after(response)
        whole = await to_end(ws)
        # Whose answer it is, is not known any more.
        async with at(b) as response:
            assert response.status == 503
            assert (await response.json())["error"]["code"] == "instance_unavailable"

    assert read[-1] == whole[-1]
    assert read[-1]["status"] == "complete"


async def test_a_client_that_leaves_leaves_the_owner(make: Make) -> None:
    a, b = await make(2, ENDLESS)
    async with AsyncExitStack() as stack:
        ws = await asked(a, stack)
        async with at(b) as response:
            await response.content.readline()
            assert read_by(a) == 2
        response.close()

        await until(lambda: read_by(a) == 1)
        await until(lambda: b.cluster.stats().tunnels == 0)
        await ws.close()
    await a.server.context.gateway.close()


async def test_a_reader_that_reads_nothing_holds_up_its_owner_and_loses_nothing(
    make: Make,
) -> None:
    a, b = await make(2, QUICK, **{"chat.streams.max_stream_bytes": 1 << 26})
    async with a.server.connect() as ws:
        await ws.send_json(chat("r1", **big(50_000, 200)))
        whole = await to_end(ws)
    async with at(b, read_bufsize=1024) as response:
        assert response.connection is not None
        response.connection.transport.pause_reading()
        (tunnel,) = b.cluster._tunnels._open  # noqa: SLF001 - no snapshot has it
        assert isinstance(tunnel, Tunnel)
        await until(lambda: tunnel._waiting is not None)  # noqa: SLF001
        passed = tunnel.passed
        for _ in range(200):
            await asyncio.sleep(0)
        assert tunnel.passed == passed
        assert passed < 4 << 20
        response.connection.transport.resume_reading()
        frames = await read_frames(response)

    assert frames == whole


async def test_an_owner_that_stops_in_good_order_passes_its_answers_on_to_their_end(
    make: Make,
) -> None:
    a, b = await make(2, PACED)
    async with AsyncExitStack() as stack:
        ws = await asked(a, stack)
        async with at(b) as response:
            await response.content.readline()
            await ws.close()
            stopping = asyncio.create_task(a.server.runner.end())
            read = await read_frames_after(response)
        await stopping

    assert read[-1]["status"] == "complete"


async def test_readers_that_come_all_at_once_get_their_answer_from_its_owner(make: Make) -> None:
    many = dict.fromkeys(
        (
            f"{CONCURRENCY}.max_connections",
            f"{CONCURRENCY}.connection_queue_size",
            f"{UVICORN}.backlog",
        ),
        1000,
    )
    a, b = await make(2, PACED, **many)
    path = f"{b.server.settings.chat.sse.endpoint}/r1?last_event_id=0"
    async with AsyncExitStack() as stack:
        ws = await asked(a, stack)
        # The connections are there, so that the requests come in one moment.
        connections = [
            await asyncio.open_connection("127.0.0.1", b.server.port) for _ in range(200)
        ]
        for _, writer in connections:
            writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        read = [await reader.read() for reader, _ in connections]
        whole = await to_end(ws)
        for _, writer in connections:
            writer.close()

    assert Counter(each[:12] for each in read) == {b"HTTP/1.1 200": 200}
    ends = {eventstream.parse(each.removesuffix(b"\r\n0\r\n\r\n"))[-1].data for each in read}
    assert [json.loads(end) for end in ends] == [whole[-1]]


async def test_an_owner_has_its_time_though_our_loop_was_late(
    make: Make, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = await make(2, QUICK)
    async with ask(a) as first:
        whole = await read_frames(first)
    dial = world.networks["b"].dial

    async def late(name: str, tunnel: Any) -> Any:
        made = await dial(name, tunnel)
        asyncio.get_running_loop().call_soon(block, 1.5)
        return made

    monkeypatch.setattr(world.networks["b"], "dial", late)
    async with at(b) as response:
        assert response.status == 200
        assert await read_frames(response) == whole


async def test_another_instance_takes_no_place_and_one_too_many_is_refused(make: Make) -> None:
    few = {f"{CONCURRENCY}.max_connections": 2, f"{CONCURRENCY}.connection_queue_size": 2}
    a, b = await make(2, ENDLESS, **few)
    async with AsyncExitStack() as stack:
        sockets = [await asked(a, stack)]
        sockets.append(await stack.enter_async_context(a.server.connect()))
        await until(lambda: a.server.context.admission.gate.inside == 2)
        async with at(b) as first:
            assert first.status == 200
            await first.content.readline()
            async with at(b) as second:
                assert second.status == 503
                assert (await second.json())["error"]["code"] == "instance_unavailable"
        for ws in sockets:
            await ws.close()
    await a.server.context.gateway.close()


# Questions, which begin an answer where nobody has it.


def ask(instance: Instance, body: Any = None, **options: Any) -> Any:
    """A question for the answer r1."""
    return instance.server.session.post(
        instance.server.sse, json=QUESTION if body is None else body, **options
    )


def complete(instance: Instance, body: Any = STREAMED, path: str = "chat/completions") -> Any:
    """A request of OpenAI's API with the key r1."""
    return instance.server.session.post(f"{instance.server.v1}/{path}", json=body, headers=KEY)


async def test_a_question_that_is_answered_elsewhere_is_passed_on_and_no_log_is_made_of_it(
    make: Make,
) -> None:
    a, b = await make(2, PACED)
    async with ask(a) as first:
        await first.content.readuntil(b"event: chunk")
        async with ask(b) as second:
            assert second.headers["Connection"] == "close"
            await second.content.readline()
            assert (b.cluster.stats().tunnels, a.cluster.stats().links) == (1, 1)
            assert b.server.owners.streams.stats().running == 0
            read = await read_frames_after(second)
        await first.read()
    async with ask(b) as again:
        assert await read_frames(again) == read

    assert numbers(read) == list(range(1, len(read) + 1))
    assert (a.requests, b.requests) == (1, 0)
    await b.server.nothing_held()


async def test_the_owner_counts_the_body_of_a_question_once_it_has_the_answer(make: Make) -> None:
    a, b = await make(2, ENDLESS)
    large = {"request_id": "r1", "text": "Hello " * 50_000}
    async with ask(a, large) as first:
        await first.content.readuntil(b"event: chunk")
        async with ask(b, large) as second:
            assert second.status == 200
            await second.content.readline()
            assert b.server.context.admission.body_bytes == 0
    await a.server.context.gateway.close()


@pytest.mark.parametrize("how", ["gone", "misdirected"])
async def test_a_question_whose_owner_has_lost_it_is_answered_where_it_is(
    make: Make, world: World, how: str
) -> None:
    a, b = await make(2, QUICK)
    text = "Hello " * 20_000
    large = {"request_id": "r1", "text": text}
    async with ask(a, large) as first:
        await first.read()
    if how == "gone":
        world.kill("a")
    else:
        # It is stopping, and has forgotten the answer.
        (stream,) = a.server.owners.streams.finished()
        a.server.owners.streams.drop(stream)
        a.server.context.gateway.drain()

    async with ask(b, large) as second:
        assert second.status == 200
        assert (await read_frames(second))[-1]["status"] == "complete"
    # It has the body that the client has sent.
    assert b.server.simulator.bodies[-1]["messages"][-1]["content"] == text
    assert (a.requests, b.requests) == (1, 1)
    (claim,) = world.claims.values()
    assert claim.owner == "b"
    await b.server.nothing_held()


async def test_a_question_that_was_lost_three_times_is_given_up(
    make: Make, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, _c = await make(3, QUICK)
    async with ask(a) as first:
        await first.read()
    (claim,) = world.claims.values()
    dialled = []

    async def dial(name: str, _tunnel: Any) -> Any:
        dialled.append(name)
        # By then another one has claimed it.
        claim.owner = "c" if name == "a" else "a"
        raise Gone(name)

    monkeypatch.setattr(world.networks["b"], "dial", dial)
    async with ask(b) as second:
        assert second.status == 503
        assert (await second.json())["error"]["code"] == "server_shutdown"

    assert dialled == ["a", "c", "a"]
    assert b.requests == 0
    await b.server.nothing_held()


async def test_a_question_comes_to_its_owner_before_the_owner_has_begun_it(
    make: Make, world: World
) -> None:
    few = {f"{CONCURRENCY}.max_connections": 1, f"{CONCURRENCY}.connection_queue_size": 2}
    a, b = await make(2, PACED, **few)
    async with a.server.connect() as other:
        # The first one has the claim, and waits for a place.
        first = asyncio.create_task(read_all(ask(a)))
        await until(lambda: len(world.claims) == 1)
        async with ask(b) as second:
            read = await read_frames(second)
        assert not first.done()
        await other.close()

    assert await first == read
    assert (a.requests, b.requests) == (1, 0)


FEW = {f"{CONCURRENCY}.max_connections": 1, f"{CONCURRENCY}.connection_queue_size": 2}


@pytest.mark.parametrize("over", [ask, complete], ids=["sse", "openai"])
async def test_a_question_that_waits_for_its_place_is_not_begun_elsewhere(
    make: Make, world: World, over: Callable[..., Any]
) -> None:
    a, b = await make(2, PACED, **FEW)
    async with a.server.connect() as other, b.server.connect() as ws:
        # It has the claim, and waits for a place.
        first = asyncio.create_task(read_text(over(a)))
        await until(lambda: len(world.claims) == 1)
        await ws.send_json(chat("r1"))
        await until(lambda: len(world.networks["a"].accepted) == 1)
        await other.close()
        frame = await ws.receive_json()
        while frame["status"] not in {"complete", "error"}:
            frame = await ws.receive_json()
        assert (await first)[0] == 200

    # The other face has asked something else with this id.
    assert frame["status"] == "complete" if over is ask else is_conflict(frame)
    assert (a.requests, b.requests) == (1, 0)


def is_conflict(frame: Any) -> bool:
    return bool(frame["chunk"]["code"] == "request_conflict")


async def test_a_question_that_waits_long_for_its_place_is_still_not_begun_elsewhere(
    make: Make, world: World
) -> None:
    a, b = await make(2, PACED, **FEW)
    async with a.server.connect() as other, b.server.connect() as ws:
        first = asyncio.create_task(read_text(ask(a)))
        await until(lambda: len(world.claims) == 1)
        await ws.send_json(chat("r1"))
        assert (await ws.receive_json())["chunk"]["code"] == "instance_unavailable"
        # A client that has left asks for nothing more: another one may have the id.
        first.cancel()
        await until(lambda: a.server.context.admission.gate.waiting == 0)
        await ws.send_json(chat("r1"))
        assert (await to_end(ws))[-1]["status"] == "complete"
        await other.close()

    assert (a.requests, b.requests) == (0, 1)


async def test_a_question_that_waits_for_its_place_is_passed_on_once_it_has_one(
    make: Make,
) -> None:
    a, b = await make(2, PACED, **FEW)
    async with a.server.connect() as other, b.server.connect() as ws:
        await ws.send_json(chat("r1"))
        await until_status(ws, "chunk")
        second = asyncio.create_task(read_text(ask(a)))
        await until(lambda: a.server.context.admission.gate.waiting == 1)
        await other.close()
        assert (await to_end(ws))[-1]["status"] == "complete"
        assert "event: complete" in (await second)[1]

    assert (a.requests, b.requests) == (0, 1)


async def read_text(asking: Any) -> tuple[int, str]:
    async with asking as response:
        return response.status, await response.text()


async def read_all(asking: Any) -> list[Any]:
    async with asking as response:
        return list(await read_frames(response))


async def test_an_owner_that_another_one_has_succeeded_begins_no_second_answer(
    make: Make, world: World
) -> None:
    a, b, c = await make(3, PACED)
    async with ask(c) as first:
        await first.content.readuntil(b"event: chunk")
        # What b knows of it is old by the time it has asked.
        (claim,) = world.claims.values()
        claim.owner = "a"
        network, listen = world.networks["a"], world.networks["b"].dial

        async def dial(name: str, make: Any) -> Any:
            claim.owner = "c"
            return await listen(name, make)

        world.networks["b"].dial = dial  # type: ignore[method-assign]
        async with ask(b) as second:
            read = await read_frames(second)
        await first.read()

    assert network is not None
    assert read[-1]["status"] == "complete"
    assert (a.requests, b.requests, c.requests) == (0, 0, 1)


async def test_a_question_for_an_owner_that_hangs_begins_no_second_answer(
    make: Make, world: World
) -> None:
    a, b = await make(2, PACED)
    async with ask(a) as first:
        world.silent.add("a")
        began = asyncio.get_running_loop().time()
        async with ask(b) as second:
            assert second.status == 503
            assert (await second.json())["error"]["code"] == "instance_unavailable"
        assert within(1.2, began)
        await first.read()

    assert b.requests == 0


async def test_who_asks_again_is_led_to_where_the_question_was_refused(make: Make) -> None:
    a, b = await make(2, ENDLESS, **keys_of("one", max_concurrent=1))
    headers = bearer("one")
    async with a.server.connect(headers=headers) as ws:
        await ws.send_json(chat("other"))
        await until_status(ws, "chunk")
        for instance in (a, b):
            async with ask(instance, headers=headers) as refused:
                assert refused.status == 429
        await ws.send_json(cancel("other"))
        await to_end(ws)
    a.server.simulator.behaviour = QUICK

    async with ask(b, headers=headers) as answered:
        assert (await read_frames(answered))[-1]["status"] == "complete"
    assert (a.requests, b.requests) == (2, 0)


async def test_a_client_that_leaves_while_its_id_is_asked_has_begun_nothing(
    make: Make, world: World
) -> None:
    a, b = await make(2, QUICK)
    world.slow = 0.04
    request = asyncio.create_task(read_all(ask(b)))
    await until(lambda: world.calls == 1)
    request.cancel()
    await asyncio.wait((request,))
    world.slow = 0.0

    await b.server.nothing_held()
    assert b.requests == 0
    async with ask(a) as response:
        assert (await read_frames(response))[-1]["status"] == "complete"


@pytest.mark.parametrize("path", ["chat/completions", "responses", "messages"])
@pytest.mark.parametrize("streamed", [True, False])
async def test_a_request_with_a_key_has_one_answer_at_all_instances(
    make: Make, path: str, streamed: bool
) -> None:
    a, b = await make(2, PACED)
    body = {"model": "sim", "max_tokens": 100, "stream": streamed, **CHAT}
    if path == "responses":
        body = RESPONSE | {"stream": streamed}
    answers = []
    for instance in (a, b, b):
        async with complete(instance, body, path) as response:
            assert response.status == 200
            assert response.headers["x-aioserver-provider"] == "sim"
            answers.append(await response.read())
    async with complete(b, body | {"temperature": 0}, path) as response:
        assert response.status == 409

    assert answers[0] == answers[1] == answers[2]
    assert (a.requests, b.requests) == (1, 0)


@pytest.mark.parametrize("path", ["chat/completions", "messages"])
async def test_a_reader_of_another_api_is_told_of_a_killed_owner_in_its_form(
    make: Make, world: World, path: str
) -> None:
    a, b = await make(2, ENDLESS)
    body = {"model": "sim", "max_tokens": 100_000, "stream": True, **CHAT}
    async with complete(a, body, path) as first, complete(b, body, path) as second:
        await first.content.readline()
        await second.content.readuntil(b"text_delta" if path == "messages" else b"data: ")
        await second.content.readline()
        world.kill("a")
        events = eventstream.parse(b"\n" + await second.read())
    await a.server.context.gateway.close()

    error = json.loads(events[-1].data)["error"]
    assert error["code"] == "server_shutdown"
    if path == "messages":
        assert (events[-1].event, error["type"]) == (b"error", "overloaded_error")
    assert b.requests == 0


async def test_an_owner_that_is_killed_within_a_whole_answer_ends_it_with_a_broken_connection(
    make: Make, world: World
) -> None:
    a, b = await make(2, QUICK)
    fields = big(90_000, 60)
    body = {"messages": [{"role": "user", "content": fields["text"]}], **fields["options"]}

    def asking(instance: Instance) -> Any:
        url = f"{instance.server.v1}/chat/completions"
        data, headers = io.BytesIO(json.dumps(body).encode()), {"Content-Type": "application/json"}
        return instance.server.session.post(url, data=data, headers=KEY | headers)

    async with asking(a) as response:
        answer = await response.read()
    async with asking(b) as response:
        assert response.connection is not None
        response.connection.transport.pause_reading()
        (tunnel,) = b.cluster._tunnels._open  # noqa: SLF001 - no snapshot has it
        assert isinstance(tunnel, Tunnel)
        await until(lambda: tunnel._waiting is not None)  # noqa: SLF001
        world.kill("a")
        response.connection.transport.resume_reading()
        with pytest.raises(ClientPayloadError):
            await response.read()
    # Who asks again gets a new answer.
    async with asking(b) as response:
        assert len(await response.read()) == len(answer)
    assert (a.requests, b.requests) == (1, 1)


async def test_the_access_log_names_the_owner_of_an_answer_that_was_passed_on(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = await make(2, QUICK, **{f"{UVICORN}.access_log": True})
    with caplog.at_level(logging.INFO, "aioserver.access"):
        for instance in (a, b):
            async with ask(instance) as response:
                await response.read()
        await until(lambda: len(lines(caplog)) == 2)

    # The owner has no line of what was passed on to it.
    assert [line.get("forwarded") for line in lines(caplog)] == [None, "a"]
    assert lines(caplog)[0]["bytes"] > 0


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """The lines of the access log."""
    records = [each for each in caplog.records if each.name == "aioserver.access"]
    return [record.__dict__["fields"] for record in records]


async def test_an_answer_in_the_background_is_begun_at_its_owner(make: Make) -> None:
    a, b = await make(2, PACED)
    async with ask(a, headers={"Prefer": "respond-async"}) as first:
        assert first.status == 202
    async with ask(b, headers={"Prefer": "respond-async"}) as second:
        assert second.status == 202
        assert (await second.json())["location"] == f"{a.server.settings.chat.sse.endpoint}/r1"
    async with ask(b) as third:
        assert (await read_frames(third))[-1]["status"] == "complete"

    assert (a.requests, b.requests) == (1, 0)


# Who may.


async def test_the_owner_checks_the_key_of_the_client_itself(world: World, tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        a = await instance_of(world, stack, tmp_path, "a", QUICK, keys_of("one", "two"))
        b = await instance_of(world, stack, tmp_path, "b", QUICK, keys_of("one", "two"))
        async with a.server.connect(headers=bearer("one")) as ws:
            await ws.send_json(chat("r1"))
            await to_end(ws)
        for name, status in (("one", 200), ("two", 404)):
            async with at(b, headers=bearer(name)) as response:
                assert response.status == status
                await response.read()

        # The key is taken out at one instance first.
        assert await a.server.change(**keys_of("two"))
        async with at(b, headers=bearer("one")) as response:
            assert response.status == 401


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        ("GET /sse/chat/r1", b"421"),
        ("POST /sse/chat", b"421"),
        ("DELETE /sse/chat/r1", b"405"),
        ("POST /v1/chat/completions", b"421"),
    ],
)
async def test_nothing_is_begun_or_ended_by_a_request_of_another_instance(
    make: Make, world: World, request_line: str, status: bytes
) -> None:
    a, b = await make(2, ENDLESS)
    async with AsyncExitStack() as stack:
        ws = await asked(a, stack)
        network = world.networks[b.name]
        reader, writer = await asyncio.open_unix_connection(network.where(b.name).host)
        writer.write(encode(Greeting(SECRET, Forward("10.1.1.1", secure=False))))
        body = json.dumps(QUESTION if "sse" in request_line else CHAT)
        head = "Host: x\r\nConnection: close\r\nContent-Type: application/json"
        size = f"Content-Length: {len(body)}"
        writer.write(f"{request_line} HTTP/1.1\r\n{head}\r\n{size}\r\n\r\n{body}".encode())
        answer = await reader.read()
        writer.close()
        assert read_by(a) == 1
        await ws.close()
    await a.server.context.gateway.close()

    # It is not passed on again, and what has no id is passed on by nobody.
    assert answer.split()[1] == status
    assert b.requests == 0
