"""What the sample proxies tell aioserver of a client, and which upgrades they let through."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import aiohttp
import pytest

from tests.support.proxy import KINDS, running
from tests.support.scripted_provider import ScriptedProvider
from tests.support.waiting import patience

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.support.scripted_provider import Peer
    from tests.support.server import MakeServer

# Method, path and `Upgrade` of a request, and whether the upgrade reaches aioserver.
UPGRADES = [
    ("GET", "/ws/chat", "websocket", True),
    ("GET", "/v1/responses", "websocket", True),
    ("GET", "/v1/models", "WebSocket", True),
    ("POST", "/v1/responses", "websocket", False),
    ("GET", "/v1/responses", "h2c", False),
    ("GET", "/v1/responses", "websocket, irc/6.9", False),
    ("GET", "/v1/responses", "websocket2", False),
    ("GET", "/v2/responses", "websocket", False),
    ("GET", "/sse/chat/r1", "websocket", False),
    ("GET", "/session", "websocket", False),
]
HANDSHAKE = {
    "Connection": "Upgrade",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}


@contextlib.asynccontextmanager
async def recorder() -> AsyncIterator[tuple[int, list[dict[str, str]]]]:
    """A server that keeps the heads of what it is asked, names in lower case."""
    heads: list[dict[str, str]] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            first, *lines = head.strip().split("\r\n")
            fields = {"": first}
            for line in lines:
                name, _, value = line.partition(": ")
                fields[name.lower()] = fields.get(name.lower(), "") + value
            if not first.startswith("GET /ready"):
                heads.append(fields)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], heads


@pytest.mark.parametrize("kind", KINDS)
async def test_the_address_is_the_client_s_and_an_upgrade_passes_where_one_is_answered(
    kind: str, tmp_path: Path
) -> None:
    async with recorder() as (port, heads), running(kind, tmp_path, port) as proxy:
        for method, path, upgrade, _ in UPGRADES:
            asked = {**HANDSHAKE, "X-Forwarded-For": "203.0.113.7", "Upgrade": upgrade}
            async with proxy.session.request(method, proxy.base + path, headers=asked) as response:
                assert response.status == 200

    for head, (method, path, upgrade, passes) in zip(heads, UPGRADES, strict=True):
        assert head[""] == f"{method} {path} HTTP/1.1"
        assert head["x-forwarded-for"] == "127.0.0.1"
        assert head["x-forwarded-proto"] == "https"
        assert head["host"] == proxy.base.removeprefix("https://")
        case = f"{method} {path} {upgrade}"
        assert head.get("upgrade", "").lower() == (upgrade.lower() if passes else ""), case
        assert ("upgrade" in head.get("connection", "").lower()) == passes, case


@pytest.mark.parametrize("kind", KINDS)
async def test_responses_come_over_a_websocket_and_another_path_below_v1_is_426(
    kind: str, tmp_path: Path, make_server: MakeServer
) -> None:
    server = await make_server()

    async with running(kind, tmp_path, server.port) as proxy:
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await proxy.session.ws_connect(f"{proxy.base}/v1/models")
        async with proxy.session.ws_connect(f"{proxy.base}/v1/responses") as socket:
            await socket.send_json({"type": "response.create", "input": "Hello"})
            kinds = [(await socket.receive_json())["type"]]
            while kinds[-1] != "response.completed":
                kinds.append((await socket.receive_json())["type"])

    assert refused.value.status == 426
    assert kinds[0] == "response.created"
    assert "response.output_text.delta" in kinds


@pytest.mark.parametrize("kind", KINDS)
async def test_what_follows_a_refused_upgrade_is_a_request_to_the_proxy(
    kind: str, tmp_path: Path
) -> None:
    paths: list[bytes] = []

    async def play(peer: Peer) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                path = (await peer.request()).split(b" ")[1]
                if path == b"/ready":
                    await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                    continue
                paths.append(path)
                # As a server answers that keeps the connection, which ours does not.
                status = b"HTTP/1.1 426 Upgrade Required\r\n"
                await peer.send(status + b"Upgrade: HTTP/1.1\r\nContent-Length: 0\r\n\r\n")

    headers = "".join(f"{name}: {value}\r\n" for name, value in HANDSHAKE.items())
    host = "Host: 127.0.0.1\r\n"
    upgrade = f"GET /v1/responses HTTP/1.1\r\n{host}Upgrade: websocket\r\n{headers}\r\n"
    smuggled = f"GET /metrics HTTP/1.1\r\n{host}Connection: close\r\n\r\n"
    async with ScriptedProvider(play) as server, running(kind, tmp_path, server.port) as proxy:
        port = int(proxy.base.rpartition(":")[2])
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", port, ssl=proxy.tls, local_addr=("127.0.0.2", 0)
        )
        writer.write((upgrade + smuggled).encode())
        async with asyncio.timeout(patience(30)):
            data = await reader.read()
        writer.transport.abort()

    assert data.startswith(b"HTTP/1.1 426 ")
    # A proxy that took any answer to an upgrade for a tunnel would let the second pass.
    assert paths == [b"/v1/responses"]
