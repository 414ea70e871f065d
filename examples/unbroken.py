"""Answers that survive their connections: cut every few events, on each face, and still complete.

    python examples/unbroken.py [--url http://127.0.0.1:8000] [--every 20] [--text "Tell me more"]

A small fault proxy in this process stands between the clients and the server. It resets each
connection after a number of events, wherever in the bytes it is then. Each client comes back with
the number of the last event that it has seen: those of the WebSocket and the SSE face are the
client library's, and the one of OpenAI's Responses shows how it is done by hand.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import uuid
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import aiohttp

from aioserver.client import Client

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

AGAIN = 0.05  # seconds before a client comes back
CONNECTION_LOST = (aiohttp.ClientError, ConnectionError)


class FaultProxy:
    """Relays TCP, and resets each connection after *every()* events have come down on it."""

    def __init__(self, host: str, port: int, every: Callable[[], int]) -> None:
        self.cuts = 0
        self._address = host, port
        self._every = every
        self._connections: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        """Listen; yield the address to connect to. At the end every connection is closed."""
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        try:
            yield f"{host}:{port}"
        finally:
            server.close()
            for connection in self._connections:
                connection.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)
            await server.wait_closed()

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A coroutine as the callback would be a task of asyncio's, which Python 3.11 reports with
        # a traceback when it is cancelled.
        task = asyncio.create_task(self._relay(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _relay(
        self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter
    ) -> None:
        try:
            from_server, to_server = await asyncio.open_connection(*self._address)
        except OSError:
            to_client.transport.abort()
            return
        up = asyncio.create_task(self._pass(from_client, to_server))
        down = asyncio.create_task(self._pass(from_server, to_client, self._every()))
        try:
            await asyncio.wait((up, down), return_when=asyncio.FIRST_COMPLETED)
        finally:
            up.cancel()
            down.cancel()
            to_server.transport.abort()
            to_client.transport.abort()
            await asyncio.gather(up, down, return_exceptions=True)

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, events: int | None = None
    ) -> None:
        """Pass bytes on to the end, or until *events* have passed and half of one more read.

        A read has a few events at most, also where a client that was away finds many.
        """
        while data := await reader.read(512):
            if events is not None:
                events -= data.count(b'"event_id":') + data.count(b'"sequence_number":')
                if events <= 0:
                    self.cuts += 1
                    writer.write(data[: len(data) // 2])
                    await writer.drain()
                    return
            writer.write(data)
            await writer.drain()


async def websocket(session: aiohttp.ClientSession, address: str, text: str) -> str:
    """Ask over a WebSocket.

    The client library resumes after each cut; this code knows nothing of them.
    """
    async with Client(f"http://{address}", session=session) as client:
        return await client.chat(text).text()


async def sse(session: aiohttp.ClientSession, address: str, text: str) -> str:
    """The same over SSE."""
    async with Client(f"http://{address}", transport="sse", session=session) as client:
        return await client.chat(text).text()


async def responses(session: aiohttp.ClientSession, address: str, text: str) -> str:
    """Ask OpenAI's Responses: create with `store`, then retrieve with `starting_after`."""
    url, response_id, last, parts = f"http://{address}/v1/responses", "", 0, []
    # Until the id of the response has come, the same request with the same key is the way back.
    key = {"Idempotency-Key": uuid.uuid4().hex}
    while True:
        try:
            if response_id:
                params = {"stream": "true", "starting_after": str(last)}
                request = session.get(f"{url}/{response_id}", params=params)
            else:
                body = {"input": text, "stream": True, "store": True}
                request = session.post(url, json=body, headers=key)
            async with request as response:
                async for event in _events(response):
                    last = event["sequence_number"]
                    response_id = response_id or event.get("response", {}).get("id", "")
                    if event["type"] == "response.output_text.delta":
                        parts.append(event["delta"])
                    elif event["type"] in {"response.completed", "response.failed"}:
                        return "".join(parts)
        except CONNECTION_LOST:
            pass
        await asyncio.sleep(AGAIN)


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The JSON of each complete event. An event that was cut off has no empty line behind it."""
    data = b""
    async for line in response.content:
        if line.startswith(b"data:"):
            data = line[5:]
        elif line == b"\n" and data:
            yield json.loads(data)
            data = b""


CLIENTS = {"websocket": websocket, "sse": sse, "responses": responses}


async def main() -> None:
    """Ask on each face through the fault proxy, and print the answers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--every", type=int, default=20, help="events between two cuts")
    parser.add_argument("--text", default="Tell me a long story")
    options = parser.parse_args()
    host, _, port = options.url.removeprefix("http://").partition(":")
    async with aiohttp.ClientSession() as session:
        for name, client in CLIENTS.items():
            proxy = FaultProxy(host, int(port or 80), lambda: options.every)
            async with proxy.running() as address:
                answer = await client(session, address, options.text)
            print(f"{name}, cut {proxy.cuts} times: {answer}\n")


if __name__ == "__main__":
    try:
        asyncio.run(main())
        sys.stdout.flush()
    except* BrokenPipeError:  # as of `| head`, which has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
