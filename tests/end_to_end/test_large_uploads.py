"""Uploads and downloads that are passed on: their size costs no memory, whichever side is slow."""

from __future__ import annotations

import asyncio
import tracemalloc
from typing import TYPE_CHECKING

import pytest

from tests.support.passing import answer, parts, read_body, read_head, scripted, settings_for
from tests.support.raw import SMALL, Raw
from tests.support.waiting import ticks, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.scripted_provider import Peer
    from tests.support.server import MakeServer

BLOCK = b"\xa5" * (1 << 16)
# What a request may cost: what waits on either side of it, one read of each, and the other sides,
# which are here.
MOST = 1 << 21
# Bytes that the reader of the test's provider buffers.
LIMIT = 1 << 16
SIZES = [
    16 << 20,
    pytest.param(200_000_000, marks=[pytest.mark.stress, pytest.mark.timeout(300)]),
]


@pytest.fixture(autouse=True)
def traced() -> Iterator[None]:
    """Trace allocations."""
    tracemalloc.start()
    yield
    tracemalloc.stop()


def since_now() -> Callable[[], int]:
    """Return a function that returns how many bytes were allocated at most, above those of now."""
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    return lambda: tracemalloc.get_traced_memory()[1] - before


async def send_body(raw: Raw, size: int, *, chunked: bool) -> None:
    """Send an upload of *size* bytes, as fast as it is taken."""
    framing = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {size}"
    await raw.send(
        f"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\n"
        f"{framing}\r\n\r\n".encode()
    )
    left = size
    while left:
        block = BLOCK[: min(left, len(BLOCK))]
        await raw.send(b"%x\r\n%b\r\n" % (len(block), block) if chunked else block)
        left -= len(block)
    if chunked:
        await raw.send(b"0\r\n\r\n")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("chunked", [False, True])
async def test_an_upload_of_any_size_costs_little_memory(
    make_server: MakeServer, size: int, *, chunked: bool
) -> None:
    received: list[int] = []

    async def play(peer: Peer) -> None:
        passed = await read_head(peer)
        total = 0
        async for part in parts(peer, passed):
            total += len(part)
        received.append(total)
        await peer.send(answer())

    async with scripted(play, limit=LIMIT) as provider:
        server = await make_server(**settings_for(provider))
        peak = since_now()
        async with Raw(server) as raw:
            sending = asyncio.ensure_future(send_body(raw, size, chunked=chunked))
            assert (await raw.answer()).status == 200
            await sending
        assert received == [size]
        assert peak() < MOST


async def test_a_provider_that_takes_an_upload_slowly_stops_its_client(
    make_server: MakeServer,
) -> None:
    go_on = asyncio.Event()

    async def play(peer: Peer) -> None:
        passed = await read_head(peer)
        await go_on.wait()
        size = await read_body(peer, passed)
        await peer.send(answer(b"%d" % size))

    async with scripted(play, limit=LIMIT) as provider:
        server = await make_server(
            **settings_for(provider), **{"llm.providers.sim.http_client.write_timeout": 60}
        )
        size = 32 << 20
        peak = since_now()
        async with Raw(server) as raw:
            sending = asyncio.ensure_future(send_body(raw, size, chunked=False))
            await until(lambda: server.held()["sim busy"] == 1)
            await ticks(200)
            assert not sending.done()
            assert peak() < MOST
            go_on.set()
            assert (await raw.answer()).body == b"%d" % size
            await sending


async def endless(peer: Peer) -> None:
    """Answer with as many bytes as are taken."""
    await read_body(peer, await read_head(peer))
    await peer.send(b"HTTP/1.1 200 X\r\nContent-Length: 1000000000000\r\n\r\n")
    while True:
        peer.write(BLOCK)
        await peer.writer.drain()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("chunked", [False, True])
async def test_a_download_of_any_size_costs_little_memory(
    make_server: MakeServer, size: int, *, chunked: bool
) -> None:
    framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % size

    async def play(peer: Peer) -> None:
        await read_body(peer, await read_head(peer))
        peer.write(b"HTTP/1.1 200 X\r\nContent-Type: a/b\r\n%b\r\n\r\n" % framing)
        left = size
        while left:
            block = BLOCK[: min(left, len(BLOCK))]
            peer.write(b"%x\r\n%b\r\n" % (len(block), block) if chunked else block)
            await peer.writer.drain()
            left -= len(block)
        await peer.send(b"0\r\n\r\n" if chunked else b"")
        await peer.left()

    async with scripted(play, limit=LIMIT) as provider:
        server = await make_server(**settings_for(provider))
        received = 0
        peak = since_now()
        async with server.session.get(f"{server.v1}/files/f/content") as response:
            async for part in response.content.iter_chunked(1 << 16):
                received += len(part)
        assert received == size
        assert peak() < MOST


async def test_a_client_that_reads_slowly_stops_its_provider_even_if_others_wait(
    make_server: MakeServer,
) -> None:
    async with scripted(endless, limit=LIMIT) as provider:
        server = await make_server(
            **settings_for(provider), **{"llm.providers.sim.http_client.concurrent_requests": 1}
        )
        peak = since_now()
        async with Raw(server, receive_buffer=SMALL) as raw, Raw(server) as other:
            await raw.get("/v1/files/f/content")
            await raw.head()
            await until(lambda: server.held()["sim busy"] == 1)
            await other.get("/v1/files/f/content")
            await until(lambda: server.held()["sim waiting"] == 1)
            await ticks(200)
            assert peak() < MOST
            for _ in range(10):
                await raw.exactly(100_000)


# The kernel has a deadline of its own for such a client, in the machine's time.
@pytest.mark.real_time
async def test_a_client_that_reads_nothing_is_dropped_and_its_provider_left(
    make_server: MakeServer,
) -> None:
    async with scripted(endless, limit=LIMIT) as provider:
        server = await make_server(**settings_for(provider), **{"chat.streams.send_timeout": 0.3})
        async with Raw(server, receive_buffer=SMALL) as raw:
            await raw.get("/v1/files/f/content")
            await raw.head()
            await until(lambda: not provider.open)
            await server.nothing_held()
            assert server.context.metrics.slow_clients.value == 1
        counts = await server.counted("requests", "face", "outcome")
        assert counts == {("other", "slow_client"): 1}
