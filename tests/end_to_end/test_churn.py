"""Random clients of two keys that connect, ask, cancel, leave, reset and send half requests, on
every face.

Afterwards nothing is held: no place, nothing of a key, no socket, no task, no stream that runs;
and every place of the provider can be taken at once. The seed is printed with a failure.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import struct
from typing import TYPE_CHECKING

import pytest

from tests.support.keys import bearer, entry
from tests.support.simulator import Behaviour
from tests.support.waiting import until
from tests.support.writing import write

if TYPE_CHECKING:
    from tests.support.server import MakeServer, RunningServer

PACE = Behaviour(ttft=0.002, interval=0.001, tokens=12)
# Two keys, whose limits are met: together they have more than all places, and one has no more than
# half of them.
KEYS = (entry("many", max_concurrent=15), entry("few", max_connections=10, max_concurrent=5))


class Client:
    """A raw socket that misbehaves at random."""

    def __init__(self, server: RunningServer, dice: random.Random, number: int) -> None:
        self._server = server
        self._dice = dice
        self._name = f"churn-{number}"
        self._headers = bearer("few" if number % 4 == 0 else "many")
        self._credentials = "".join(f"{name}: {text}\r\n" for name, text in self._headers.items())

    async def live(self) -> None:
        life = self._dice.choice(
            (self._openai, self._plain, self._websocket, self._sse, self._half)
        )
        reader, writer = await asyncio.open_connection("127.0.0.1", self._server.port)
        try:
            await life(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # it was sent away
        finally:
            if self._dice.random() < 0.3:  # no farewell: a reset
                sock = writer.get_extra_info("socket")
                with contextlib.suppress(OSError, AttributeError):  # it may be gone already
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.close()

    async def _some(self, reader: asyncio.StreamReader) -> None:
        """Read for a while: none, some or all of what comes."""
        patience = self._dice.choice((0.0, 0.01, 0.3))  # seconds; an idle socket is never closed
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                while await reader.read(4096) and self._dice.random() > 0.05:
                    pass

    async def _post(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str, body: object
    ) -> None:
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        head += f"{self._credentials}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
        write(writer, head.encode() + data)
        await self._some(reader)

    async def _openai(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
        await self._post(reader, writer, "/v1/chat/completions", body)

    async def _plain(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        body = {"messages": [{"role": "user", "content": "x"}]}
        await self._post(reader, writer, "/v1/chat/completions", body)

    async def _sse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._post(reader, writer, "/sse/chat", {"request_id": self._name, "text": "x"})
        if self._dice.random() < 0.3:
            path = f"/sse/chat/{self._name}"
            async with self._server.session.delete(
                self._server.base + path, headers=self._headers
            ) as response:
                assert response.status in {204, 404}

    async def _websocket(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        write(
            writer,
            b"GET /ws/chat HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
            + f"{self._credentials}\r\n".encode(),
        )
        await reader.readuntil(b"\r\n\r\n")
        for number in range(self._dice.randint(0, 3)):
            name = f"{self._name}-{number}"
            frame = {"action": "chat", "request_id": name, "payload": {"text": "x"}}
            write(writer, _masked(frame))
            if self._dice.random() < 0.5:
                await self._some(reader)
            if self._dice.random() < 0.5:
                write(writer, _masked({"action": "cancel", "request_id": name}))
        if self._dice.random() < 0.5:
            write(writer, b"\x88\x80\0\0\0\0")  # a close frame, empty
        await self._some(reader)

    async def _half(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        whole = (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        )
        whole += f'{self._credentials}Content-Length: 400\r\n\r\n{{"messages": ['.encode()
        write(writer, whole[: self._dice.randint(1, len(whole))])
        await writer.drain()


def _masked(frame: object) -> bytes:
    data = json.dumps(frame).encode()
    assert len(data) < 65536
    size = bytes([0x80 | len(data)]) if len(data) < 126 else struct.pack("!BH", 0xFE, len(data))
    return b"\x81" + size + b"\0\0\0\0" + data  # a mask of zeros is a mask


@pytest.mark.parametrize(
    "count", [250, pytest.param(5000, marks=[pytest.mark.stress, pytest.mark.timeout(600)])]
)
async def test_nothing_is_held_after_random_clients(make_server: MakeServer, count: int) -> None:
    server = await make_server(
        PACE,
        **{
            "chat.streams.resume_window": 0.2,
            "chat.websocket.concurrency.max_connections": 20,
            "chat.websocket.concurrency.connection_queue_size": 20,
            "chat.websocket.concurrency.queue_timeout": 0.2,
            "auth.keys": [
                *({**key, "requests_per_minute": 1_000_000} for key in KEYS),
                entry("root"),
            ],
        },
    )
    seed = random.randrange(1 << 30)
    print("seed", seed)
    dice = random.Random(seed)
    room = asyncio.Semaphore(60)

    async def run_client(number: int) -> None:
        async with room:
            await Client(server, random.Random(dice.random()), number).live()

    async with asyncio.TaskGroup() as group:
        for number in range(count):
            group.create_task(run_client(number))

    await server.nothing_held()
    await until(lambda: server.simulator.stats().active == 0)
    await _all_places_at_once(server)


async def _all_places_at_once(server: RunningServer) -> None:
    places = server.settings.llm.providers["sim"].http_client.concurrent_requests
    server.simulator.behaviour = Behaviour(ttft=0, interval=0, stall_after=1, tokens=2)
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
    async with asyncio.TaskGroup() as group:
        asks = [
            group.create_task(
                server.session.post(
                    server.v1 + "/chat/completions", json=body, headers=bearer("root")
                )
            )
            for _ in range(places)
        ]
        await until(lambda: server.simulator.stats().active == places)
    for ask in asks:
        ask.result().close()
