"""Clients that read nothing of a response, whatever it is and however it is written: they are
dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from typing import TYPE_CHECKING

import pytest

from aioserver.auth.callers import anonymous
from aioserver.streams.entries import COMPLETE
from tests.support.chat import CHAT
from tests.support.raw import SMALL
from tests.support.server import CONCURRENCY
from tests.support.waiting import until
from tests.support.whole_answers import PATH, provider

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.support.server import MakeServer, RunningServer


@contextlib.asynccontextmanager
async def silent_client(
    server: RunningServer, tmp_path: Path, kind: str
) -> AsyncIterator[socket.socket]:
    """A client that reads nothing, over TCP or a UNIX socket."""
    loop = asyncio.get_running_loop()
    path = str(tmp_path / "socket")
    unix = kind == "unix"
    family = socket.AF_UNIX if unix else socket.AF_INET
    listening = await loop.create_unix_server(server.http_server, path)
    async with listening:
        with socket.socket(family) as client:
            if not unix:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
            client.setblocking(False)
            await loop.sock_connect(client, path if unix else ("127.0.0.1", server.port))
            yield client
        await until(lambda: not server.held()["places"])


def posted(path: str, *lines: str, version: str = "1.1") -> bytes:
    body = json.dumps({**CHAT, "input": "Hello", "store": True}).encode()
    head = (
        *(f"POST {path} HTTP/{version}", "Host: x", "Content-Type: application/json"),
        *(f"Content-Length: {len(body)}", *lines),
    )
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


# Requests whose answers are written by aiohttp, but for the first.
POSTS = {
    "ordinary": posted(PATH),
    "last": posted(PATH, "Connection: close"),
    "page": posted(PATH, "Origin: http://x"),
    "old": posted(PATH, version="1.0"),
    "keyed": posted(PATH, "Connection: close", "Idempotency-Key: k"),
    "stored": posted("/v1/responses", "Connection: close"),
}


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "tcp") for name in POSTS), ("ordinary", "unix"), ("last", "unix")]
)
async def test_a_client_that_reads_nothing_of_a_whole_answer_is_dropped(
    make_server: MakeServer, tmp_path: Path, name: str, kind: str
) -> None:
    async with provider() as scripted:
        server = await make_server(
            **{
                "llm.providers.sim.base_url": scripted.url,
                "chat.streams.send_timeout": 0.05,
                "chat.streams.resume_window": 0,
                "chat.streams.store_window": 0,
            }
        )
        async with silent_client(server, tmp_path, kind) as client:
            await asyncio.get_running_loop().sock_sendall(client, POSTS[name])
            await until(lambda: server.held()["places"] == 1)
            await until(lambda: server.held()["places"] == 0)

            assert server.context.metrics.slow_clients.value == 1
            assert server.owners.streams.stats().bytes == 0


async def test_a_client_that_reads_nothing_of_a_long_list_is_dropped(
    make_server: MakeServer, tmp_path: Path
) -> None:
    """What needs no place is watched, too: the metrics, the pages, and the answers of a face."""
    server = await make_server(**{"chat.streams.send_timeout": 0.2})
    for number in range(600):
        name = f"{number:04}" + "€" * 200
        stream = server.owners.streams.open(name, anonymous("127.0.0.1"), window=600.0)
        stream.end(COMPLETE, {})
    async with silent_client(server, tmp_path, "tcp") as client:
        listing = b"GET /sse/chat HTTP/1.1\r\nHost: x\r\n\r\n"
        await asyncio.get_running_loop().sock_sendall(client, listing)

        await until(lambda: server.context.metrics.slow_clients.value == 1, 5.0)


async def test_cancelling_works_in_a_full_server(make_server: MakeServer) -> None:
    async with provider(size=100) as scripted:
        server = await make_server(
            **{
                "llm.providers.sim.base_url": scripted.url,
                f"{CONCURRENCY}.max_connections": 1,
            }
        )
        body = {"input": "Hello", "store": True}
        async with server.session.post(f"{server.v1}/responses", json=body) as response:
            await response.read()
        async with server.connect():
            await until(lambda: server.held()["places"] == 1)
            async with server.session.post(f"{server.v1}/responses/resp_1/cancel") as response:
                assert (await response.json())["id"] == "resp_1"
