"""What the logs keep in memory, as Python counts it, against what `max_kept_bytes` counts."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import tracemalloc
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.auth.callers import anonymous
from aioserver.providers.request import Answer
from aioserver.streams.entries import CHUNK
from aioserver.streams.store import StreamStore
from aioserver.streams.stream import Stream
from tests.support.chat import STREAMED, big, cancel, chat, frames_of, to_end, until_status
from tests.support.raw import SMALL, Raw
from tests.support.scripted_provider import (
    DONE,
    EVENT_STREAM,
    LAST_CHUNK,
    Peer,
    ScriptedProvider,
    chunk,
)
from tests.support.server import NOWHERE, SIM_HTTP_CLIENT
from tests.support.simulator import Behaviour
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from tests.support.server import MakeServer, RunningServer

COUNT = 25
# Real memory at most, in counted bytes: allocators round up, and dictionaries keep room.
MULTIPLE = 1.5
# Bytes of what else comes meanwhile: requests that the provider notes, points of the history.
OTHERS = 50_000
# Headers that pass, and a usage that is large: neither was counted.
HEADERS = tuple((f"x-ratelimit-{number}", "9" * 200) for number in range(40))


@contextlib.contextmanager
def traced() -> Iterator[list[int]]:
    """Trace allocations; at the end of the block the list has the bytes of it that are left."""
    left: list[int] = []
    gc.collect()
    tracemalloc.start()
    try:
        yield left
        gc.collect()
        left.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()


async def frames(server: RunningServer, number: int) -> None:
    async with server.connect() as ws:
        # Not a text, which the history of its conversation would keep as well.
        messages = [{"role": "user", "content": "word " * 20}]
        await ws.send_json(chat(f"r{number}", messages=messages))
        await to_end(ws)


async def passed_on(server: RunningServer, number: int) -> None:
    key = {"Idempotency-Key": f"k{number}"}
    url = f"{server.v1}/chat/completions"
    async with server.session.post(url, json=STREAMED, headers=key) as response:
        assert (await response.read()).endswith(b"[DONE]\n\n")


async def whole(server: RunningServer, number: int) -> None:
    body: dict[str, Any] = {"model": "sim", "input": "Hello", "store": True}
    async with server.session.post(f"{server.v1}/responses", json=body) as response:
        assert response.status == 200, number
        await response.read()


async def response(server: RunningServer, number: int) -> None:
    body: dict[str, Any] = {"model": "sim", "input": "Hello", "store": True, "stream": True}
    async with server.session.post(f"{server.v1}/responses", json=body) as answer:
        assert b"response.completed" in await answer.read(), number


@pytest.mark.parametrize(
    ("ask", "headers"),
    [(frames, HEADERS), (passed_on, ()), (whole, HEADERS), (response, ())],
)
async def test_many_small_answers_cost_little_more_than_is_counted(
    make_server: MakeServer,
    ask: Callable[[RunningServer, int], Awaitable[None]],
    headers: tuple[tuple[str, str], ...],
) -> None:
    behaviour = Behaviour(ttft=0, interval=0, headers=headers)
    # On a busy machine the first would else be forgotten before the last is asked.
    server = await make_server(behaviour, **{"chat.streams.resume_window": 600.0})
    store = server.owners.streams
    for number in range(10):
        await ask(server, -1 - number)
    before = store.stats()
    with traced() as real:
        for number in range(COUNT):
            await ask(server, number)
        await until(lambda: store.stats().finished == before.finished + COUNT)

    counted = store.stats().bytes - before.bytes
    assert real[0] < MULTIPLE * counted + OTHERS


@pytest.mark.parametrize("ask", [frames, response])
async def test_answers_that_made_room_for_others_are_forgotten_at_once(
    make_server: MakeServer, ask: Callable[[RunningServer, int], Awaitable[None]]
) -> None:
    def alive() -> int:
        gc.collect()
        return sum(isinstance(held_object, Stream) for held_object in gc.get_objects())

    others = alive()
    server = await make_server(
        **{"chat.streams.max_kept_bytes": 50_000, "chat.streams.resume_window": 600.0}
    )
    for number in range(20):
        await ask(server, number)
    await until(lambda: not server.held()["running"])

    kept = server.owners.streams.stats().finished
    assert 0 < kept < 15
    assert alive() - others == kept


async def test_headers_of_a_running_answer_are_counted(make_server: MakeServer) -> None:
    server = await make_server(Behaviour(ttft=0, interval=1.0, headers=HEADERS))
    async with server.connect() as ws:
        await ws.send_json(chat("r"))
        await until_status(ws, "chunk")
        assert server.owners.streams.stats().bytes > len(HEADERS) * 400
        await ws.send_json(cancel("r"))
        await to_end(ws)


@pytest.mark.parametrize("ask", [frames, passed_on, whole, response])
async def test_no_usage_is_kept_after_the_end(
    server: RunningServer, ask: Callable[[RunningServer, int], Awaitable[None]]
) -> None:
    await ask(server, 1)
    await until(lambda: not server.held()["running"])

    (stream,) = server.owners.streams.owned_by(anonymous("127.0.0.1"))
    assert stream.outcome.usage is None
    assert stream.record.outcome is stream.outcome
    if isinstance(stream.whole, Answer):
        assert stream.whole.outcome is stream.outcome
    counted = await server.counted("tokens", "type")
    assert sum(counted.values()) > 0, "it was counted before"


async def test_an_answer_that_never_began_keeps_nothing_of_its_request(
    make_server: MakeServer,
) -> None:
    server = await make_server(**{"llm.providers.sim.base_url": NOWHERE})
    async with server.connect() as ws:
        await ws.send_json(chat("r"))
        assert (await to_end(ws))[-1]["status"] == "error"

    (stream,) = server.owners.streams.owned_by(anonymous("127.0.0.1"))
    assert stream.attempt is None
    assert stream.keeper is None


def completed(server: RunningServer, count: int) -> bool:
    return server.simulator.stats().completed == count


async def test_stalled_readers_of_kept_logs_are_dropped_before_anybody_is_refused(
    make_server: MakeServer,
) -> None:
    most = 2 << 20
    server = await make_server(
        **{
            "chat.streams.max_kept_bytes": most,
            "chat.streams.max_stream_bytes": 1 << 20,
            "chat.streams.send_timeout": 60.0,
            f"{SIM_HTTP_CLIENT}.concurrent_requests": 4,
        }
    )
    store = server.owners.streams
    async with contextlib.AsyncExitStack() as stack:
        raws = [
            await stack.enter_async_context(Raw(server, receive_buffer=SMALL)) for _ in range(8)
        ]
        for number, raw in enumerate(raws):
            await raw.ask_sse(f"r{number}", **big(30_000, 30))  # 0.9 MB
            await until(partial(completed, server, number + 1))
            await until(lambda: store.stats().running == 0)
            assert store.stats().bytes < most + (1 << 18)
        async with server.connect() as ws:
            await ws.send_json(chat("mine"))
            assert (await to_end(ws))[-1]["status"] == "complete"

        bodies = []
        for raw in raws:
            raw.widen()
            bodies.append((await raw.answer()).body)

    ends = [frames_of(body)[-1] for body in bodies]
    errors = [end for end in ends if end["status"] == "error"]
    assert {end["chunk"]["code"] for end in errors} == {"slow_client"}
    assert len(errors) >= 8 - most // 900_000
    assert server.context.metrics.slow_clients.value == len(errors)


# Answers that run at once; the events of each, and the bytes of text of an event.
RUNNING, EVENTS, TEXT = 12, 30, 30_000
MESSAGES = [{"role": "user", "content": "Hello"}]


async def ask_socket(raw: Raw, name: str) -> None:
    await raw.upgrade()
    await raw.send_json(chat(name, messages=MESSAGES))


async def ask_in_conversation(raw: Raw, name: str) -> None:
    await raw.ask_sse(name, text="Hello")


async def ask_sse(raw: Raw, name: str) -> None:
    await raw.ask_sse(name, messages=MESSAGES)


async def ask_keyed(raw: Raw, name: str) -> None:
    body = {"messages": MESSAGES, "stream": True}
    await raw.post("/v1/chat/completions", body, f"Idempotency-Key: {name}")


async def ask_stored(raw: Raw, name: str) -> None:
    body = {"input": "Hello", "stream": True, "store": True}
    await raw.post("/v1/responses", body, f"Idempotency-Key: {name}")


def events_for(request: bytes, text: bytes) -> tuple[bytes, ...]:
    """The first bytes of an answer to *request*, and an event with *text*."""
    if b"/responses" not in request.partition(b"\r\n")[0]:
        event = b'data: {"choices":[{"index":0,"delta":{"content":"%b"}}]}\n\n'
        return EVENT_STREAM, chunk(event % text)
    created = b'data: {"type":"response.created","response":{"id":"resp_1"}}\n\n'
    event = b'data: {"type":"response.output_text.delta","delta":"%b"}\n\n'
    return EVENT_STREAM + chunk(created), chunk(event % text)


@pytest.mark.parametrize("ask", [ask_socket, ask_sse, ask_in_conversation, ask_keyed, ask_stored])
async def test_running_answers_that_nobody_takes_stay_within_the_bound(
    make_server: MakeServer, ask: Callable[[Raw, str], Awaitable[None]]
) -> None:
    most, largest, begun, written = 2 << 20, 0, 0, 0
    all_begun = asyncio.Event()

    async def write_on(peer: Peer) -> None:
        """Answer with many events and no end; but well where the question is a short one."""
        nonlocal begun, written
        request = await peer.request()
        begin, event = events_for(request, b"y" * TEXT)
        await peer.send(begin)
        if b"short" in request:
            await peer.send(chunk(DONE), LAST_CHUNK)
            return
        begun += 1
        if begun == RUNNING:
            # A new one is refused where others fill the store.
            all_begun.set()
        await all_begun.wait()
        with contextlib.suppress(ConnectionError):
            for _ in range(EVENTS):
                await peer.send(event)
                await peer.writer.drain()
        written += 1
        await peer.left()

    def all_written() -> bool:
        nonlocal largest
        largest = max(largest, store.stats().bytes)
        return written == RUNNING

    async with ScriptedProvider(write_on) as provider, contextlib.AsyncExitStack() as stack:
        server = await make_server(
            **{
                "llm.providers.sim.base_url": provider.url,
                "chat.streams.max_kept_bytes": most,
                "chat.streams.max_stream_bytes": 1 << 20,
                "chat.streams.send_timeout": 60.0,
                f"{SIM_HTTP_CLIENT}.concurrent_requests": RUNNING + 1,
                f"{SIM_HTTP_CLIENT}.read_timeout": 120.0,
            }
        )
        store = server.owners.streams
        for number in range(RUNNING):
            raw = await stack.enter_async_context(Raw(server, receive_buffer=SMALL))
            await ask(raw, f"r{number}")
        await until(all_written, 30.0, server.held)
        async with server.connect() as ws:
            await ws.send_json(chat("mine", messages=[{"role": "user", "content": "short"}]))
            frames = await to_end(ws)

    assert frames[-1]["status"] == "complete"
    # A conversation needs the texts of answers until they have ended, which takes a turn of the
    # loop: on a busy machine much comes in one. All of them would be ten times the bound.
    assert largest < most * (5 if ask is ask_in_conversation else 1.05)


@pytest.mark.parametrize(
    ("size", "count", "passed_on"),
    [(10, 400, False), (5000, 200, True)],
    ids=["frames", "passed on"],
)
def test_running_logs_that_were_cut_cost_little_more_than_is_counted(
    size: int, count: int, passed_on: bool
) -> None:
    most = 1 << 20
    store = StreamStore(max_stream_bytes=most, max_kept_bytes=most)
    with traced() as real:
        logs = [store.open(f"r{number}", "anybody", window=30.0) for number in range(COUNT)]
        for number in range(count):
            for stream in logs:
                text = b"%d" % (number % 10) * size
                if passed_on:
                    stream.append(CHUNK, data=b"data: {%b}\n\n" % text)
                else:
                    stream.append(CHUNK, [b'{"data":"%b"}' % text])

    counted = store.stats().bytes
    assert any(stream.offset for stream in logs)
    assert real[0] < MULTIPLE * counted


async def test_a_usage_of_any_size_costs_little(make_server: MakeServer) -> None:
    usage = {"total_tokens": 3, "details": [{"a": number} for number in range(4000)]}
    event = json.dumps(
        {"choices": [{"delta": {"content": "Hi"}, "finish_reason": "stop"}], "usage": usage}
    )

    async def play(peer: Peer) -> None:
        while True:
            await peer.request()
            answer = chunk(b"data: %b\n\ndata: [DONE]\n\n" % event.encode())
            await peer.send(EVENT_STREAM + answer + LAST_CHUNK)

    async with ScriptedProvider(play) as provider:
        server = await make_server(**{"llm.providers.sim.base_url": provider.url})
        async with server.connect() as ws:
            await ws.send_json(chat("first"))
            await to_end(ws)
            before = server.owners.streams.stats().bytes
            ends = []
            with traced() as real:
                for number in range(10):
                    await ws.send_json(chat(f"r{number}"))
                    ends.append((await to_end(ws))[-1])
        counted = server.owners.streams.stats().bytes - before

    for end in ends:
        assert end["chunk"]["metadata"]["usage"] == {"total_tokens": 3}
    assert counted < 200_000  # ten logs of a few events, and not ten usages of 60 KB
    assert real[0] < 2_000_000  # ten usages are ten million bytes as objects
