"""An answer that survives its connection: cut every few events, on each transport, and whole.

    python examples/unbroken.py [--url http://127.0.0.1:8000] [--every 20] [--text "Tell me a story"]

Between this client and the server stands a small fault proxy, in this process, that resets the
connection after so many events, wherever in the bytes it is then. Each client below does what a
good client does about it: it comes back with the number of the last event that it has seen.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import uuid
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import aiohttp

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

AGAIN = 0.05  # seconds before a client comes back
GONE = (aiohttp.ClientError, ConnectionError)


class FaultProxy:
    """Passes bytes on, and resets a connection after *every()* events have come down on it."""

    def __init__(self, host: str, port: int, every: Callable[[], int]) -> None:
        self.cuts = 0
        self._to = host, port
        self._every = every

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        """Yields the address to connect to."""
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        async with server:
            host, port = server.sockets[0].getsockname()
            yield f"{host}:{port}"

    async def _connection(self, near: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        try:
            far, forth = await asyncio.open_connection(*self._to)
        except OSError:
            back.transport.abort()
            return
        try:
            up = asyncio.create_task(self._pass(near, forth))
            down = asyncio.create_task(self._pass(far, back, self._every()))
            await asyncio.wait((up, down), return_when=asyncio.FIRST_COMPLETED)
            for task in (up, down):
                task.cancel()
            await asyncio.gather(up, down, return_exceptions=True)
        finally:
            forth.transport.abort()
            back.transport.abort()

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, events: int | None = None
    ) -> None:
        while data := await reader.read(65536):
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
    """Ask once; after a cut, `resume` behind the last event."""
    request_id, seen, parts = uuid.uuid4().hex, 0, []
    command: dict[str, Any] = {
        "action": "chat",
        "request_id": request_id,
        "payload": {"text": text},
    }
    while True:
        try:
            async with session.ws_connect(f"ws://{address}/ws/chat") as ws:
                await ws.send_json(command)
                async for message in ws:
                    frame = json.loads(message.data)
                    seen = frame.get("event_id", seen)
                    if frame["status"] == "chunk" and frame["chunk"]["type"] == "text":
                        parts.append(frame["chunk"]["data"])
                    elif frame["status"] in {"complete", "error", "cancelled"}:
                        return "".join(parts)
        except GONE:
            pass
        if seen:
            payload = {"last_event_id": seen}
            command = {"action": "resume", "request_id": request_id, "payload": payload}
        await asyncio.sleep(AGAIN)


async def sse(session: aiohttp.ClientSession, address: str, text: str) -> str:
    """POST once; after a cut, GET with `Last-Event-ID`, as an EventSource does by itself."""
    url, request_id, seen, parts = f"http://{address}/sse/chat", uuid.uuid4().hex, 0, []
    while True:
        try:
            if seen:
                headers = {"Last-Event-ID": str(seen)}
                asking = session.get(f"{url}/{request_id}", headers=headers)
            else:
                asking = session.post(url, json={"request_id": request_id, "text": text})
            async with asking as answer:
                async for frame in _events(answer):
                    seen = frame.get("event_id", seen)
                    if frame["status"] == "chunk" and frame["chunk"]["type"] == "text":
                        parts.append(frame["chunk"]["data"])
                    elif frame["status"] in {"complete", "error", "cancelled"}:
                        return "".join(parts)
        except GONE:
            pass
        await asyncio.sleep(AGAIN)


async def responses(session: aiohttp.ClientSession, address: str, text: str) -> str:
    """OpenAI's Responses: create with `store`, then retrieve with `starting_after`."""
    url, name, seen, parts = f"http://{address}/v1/responses", "", 0, []
    key = {"Idempotency-Key": uuid.uuid4().hex}  # until its id has come, asking again is this
    while True:
        try:
            if name:
                params = {"stream": "true", "starting_after": str(seen)}
                asking = session.get(f"{url}/{name}", params=params)
            else:
                body = {"input": text, "stream": True, "store": True}
                asking = session.post(url, json=body, headers=key)
            async with asking as answer:
                async for event in _events(answer):
                    seen = event["sequence_number"]
                    name = name or event.get("response", {}).get("id", "")
                    if event["type"] == "response.output_text.delta":
                        parts.append(event["delta"])
                    elif event["type"] in {"response.completed", "response.failed"}:
                        return "".join(parts)
        except GONE:
            pass
        await asyncio.sleep(AGAIN)


async def _events(answer: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The JSON of each whole event; one that was cut in the middle is none."""
    data = b""
    async for line in answer.content:
        if line.startswith(b"data:"):
            data = line[5:]
        elif line == b"\n" and data:
            yield json.loads(data)
            data = b""


CLIENTS = {"websocket": websocket, "sse": sse, "responses": responses}


async def main() -> None:
    """Ask on each transport and print the answers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--every", type=int, default=20, help="events between two cuts")
    parser.add_argument("--text", default="Tell me a long story")
    given = parser.parse_args()
    host, _, port = given.url.removeprefix("http://").partition(":")
    async with aiohttp.ClientSession() as session:
        for name, client in CLIENTS.items():
            proxy = FaultProxy(host, int(port or 80), lambda: given.every)
            async with proxy.running() as address:
                answer = await client(session, address, given.text)
            print(f"{name}, cut {proxy.cuts} times: {answer}\n")


if __name__ == "__main__":
    asyncio.run(main())
