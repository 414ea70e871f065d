"""Connections that slowhttptest makes: slow heads, slow bodies, slow reading. All go, and nobody
else waits.

They hold no place while they drip, and are gone at their deadlines, however much they drip.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from typing import TYPE_CHECKING

import pytest

from aioserver.faces import intake
from tests.support.chat import big
from tests.support.faces import ask_every_face
from tests.support.raw import SMALL, Raw
from tests.support.server import CONCURRENCY, QUICK, UVICORN
from tests.support.waiting import until

if TYPE_CHECKING:
    from tests.support.server import MakeServer, RunningServer

# Seconds, of each kind: others have them, too, and a busy machine may be late by more than one.
DEADLINE = 4.0
DRIP = 0.2  # seconds between two bytes, and between two questions of the others
HEAD = b"GET /health HTTP/1.1\r\nHost: x\r\nX-"
BODY = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    b'Content-Length: 100000\r\n\r\n{"messages": "'
)
# More than the kernel keeps for a reader with a small buffer.
ANSWER = big(30_000, 40)


async def dripping(server: RunningServer, begin: bytes) -> bytes:
    """Send *begin* and then a byte now and then, until the server closes; returns what it said."""
    async with Raw(server) as raw:
        await raw.send(begin)
        ended = asyncio.ensure_future(raw.to_the_end())
        while not ended.done():
            with contextlib.suppress(ConnectionError):
                await raw.send(b"x")
            await asyncio.sleep(DRIP)
        return await ended


async def slow_reader(server: RunningServer, name: str, readers: int) -> bytes:
    """Read nothing of a large answer until all *readers* are dropped; returns what was on its
    way.
    """
    async with Raw(server, receive_buffer=SMALL) as raw:
        await raw.ask_sse(name, **ANSWER)
        dropped = server.context.metrics.slow_clients
        await until(lambda: dropped.value >= readers, 60.0, lambda: dropped.value)
        raw.widen()
        return await raw.to_the_end()


# The other clients never let the loop be idle.
@pytest.mark.real_time
@pytest.mark.parametrize(
    "each", [10, pytest.param(50, marks=[pytest.mark.stress, pytest.mark.timeout(300)])]
)
async def test_slow_connections_of_every_kind_go_at_their_deadlines_and_others_are_served(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch, each: int
) -> None:
    monkeypatch.setattr(intake, "BODY_TIMEOUT", DEADLINE)
    server = await make_server(
        QUICK,
        **{
            f"{UVICORN}.keepalive_timeout": DEADLINE,
            "chat.streams.send_timeout": DEADLINE,
            # The readers and the other clients have places; nobody else may hold one.
            f"{CONCURRENCY}.max_connections": each + 4,
            f"{CONCURRENCY}.connection_queue_size": each + 4,
        },
    )

    slow = [
        asyncio.gather(*(dripping(server, HEAD) for _ in range(each))),
        asyncio.gather(*(dripping(server, BODY) for _ in range(each))),
        asyncio.gather(*(slow_reader(server, f"slow-{number}", each) for number in range(each))),
    ]
    answers = []
    for number in itertools.count():
        answers += await ask_every_face(server, f"model-{number}")
        if all(kind.done() for kind in slow):
            break
        await asyncio.sleep(DRIP)
    heads, bodies, read = [await kind for kind in slow]

    assert {answer.end for answer in answers} == {"complete"}
    assert set(heads) == {b""}
    assert all(body.startswith(b"HTTP/1.1 408 ") for body in bodies)
    assert all(b'"complete"' not in read_bytes for read_bytes in read)
    assert await server.counted("bad_requests", "code") == {("request_timeout",): each}
    assert await server.counted("slow_clients") == {(): each}
    assert not await server.counted("rejections", "code")
    await server.session.close()
    await until(lambda: not server.http_server.connections)
