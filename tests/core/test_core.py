"""What the server does without any wing: chats on each face of its own, its state, a reload, and
an orderly end.

These tests know no wing, nor do the helpers that they use: tests/test_wings.py runs them without
each.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
import yaml

import aioserver
from tests.support.scripted_provider import (
    DONE,
    EVENT_STREAM,
    LAST_CHUNK,
    Peer,
    ScriptedProvider,
    chunk,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = [pytest.mark.core, pytest.mark.real_time]

# Seconds for whatever a busy machine does late.
PATIENCE = 90.0
CHAT = {"messages": [{"role": "user", "content": "Hello"}]}
WORDS = ("Good", " morning", ".")
HTTP_CLIENT = {
    "max_connections": 4,
    "max_keepalive": 4,
    "keepalive_expiry": 30.0,
    "connect_timeout": PATIENCE,
    "read_timeout": PATIENCE,
    "write_timeout": PATIENCE,
    "pool_timeout": PATIENCE,
    "requests_per_minute": 100_000,
    "concurrent_requests": 4,
    "max_retries": 0,
    "backoff_factor": 0.1,
}


def event(text: str | None) -> bytes:
    """An event of a chat completion; None stands for its end."""
    delta = {} if text is None else {"content": text}
    choice = {"index": 0, "delta": delta, "finish_reason": None if text else "stop"}
    data = {"id": "c1", "object": "chat.completion.chunk", "model": "m", "choices": [choice]}
    return b"data: %b\n\n" % json.dumps(data).encode()


async def answer(peer: Peer) -> None:
    """Answer each request on a connection, streamed if it asks for that."""
    while True:
        if b'"stream":true' in (await peer.request()).replace(b" ", b""):
            events = [*map(event, WORDS), event(None), DONE]
            await peer.send(EVENT_STREAM, *map(chunk, events), LAST_CHUNK)
            continue
        message = {"role": "assistant", "content": "".join(WORDS)}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        body = json.dumps({"id": "c1", "object": "chat.completion", "choices": [choice]}).encode()
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        await peer.send(head % len(body) + body)


def configuration(provider: str, places: int) -> dict[str, Any]:
    uvicorn = {
        "backlog": 128,
        "workers": 1,
        "access_log": False,
        "keepalive_timeout": 5,
        "max_keepalive_requests": 1000,
        "h11_max_incomplete_event_size": 16384,
        "h11_max_request_line_size": 8192,
        "h11_max_header_size": 32768,
    }
    concurrency = {
        "max_connections": places,
        "connection_queue_size": 100,
        "queue_timeout": PATIENCE,
        "uvicorn": uvicorn,
    }
    model = {"base_url": provider, "model": "m", "http_client": HTTP_CLIENT}
    return {
        "chat": {
            "websocket": {"host": "127.0.0.1", "port": 0, "concurrency": concurrency},
            "service": {"repository": {"type": "memory"}},
        },
        "llm": {"active": "scripted", "providers": {"scripted": model}},
        "logging": {"level": "INFO", "format": "json"},
    }


def write(path: Path, provider: str, places: int) -> None:
    path.write_text(yaml.safe_dump(configuration(provider, places)))


class Running:
    """A server in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process, path: Path, provider: str) -> None:
        self.process = process
        self.base = ""
        self._path, self._provider = path, provider
        self.log = ""

    def write(self, places: int) -> None:
        """Write its configuration anew."""
        write(self._path, self._provider, places)

    async def read_until(self, words: str) -> None:
        """Read its log until it says *words*."""
        assert self.process.stderr is not None
        while words not in self.log:
            line = (await asyncio.wait_for(self.process.stderr.readline(), PATIENCE)).decode()
            assert line, self.log
            self.log += line


@asynccontextmanager
async def serving(path: Path) -> AsyncIterator[tuple[Running, aiohttp.ClientSession]]:
    """Serve with a scripted provider, for the length of the block."""
    environ = {name: value for name, value in os.environ.items() if "AIOSERVER" not in name}
    # That of the tests: a copy without a wing, perhaps.
    root = Path(aioserver.__file__).parents[1]
    async with ScriptedProvider(answer) as provider:
        write(path, provider.url, 50)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "aioserver", "serve", "--config", str(path)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environ | {"PYTHONPATH": str(root)},
            cwd=root,
        )
        running = Running(process, path, provider.url)
        try:
            assert process.stdout is not None
            line = (await asyncio.wait_for(process.stdout.readline(), PATIENCE)).decode()
            match = re.search(r"http://[\d.]+:\d+", line)
            if match is None:
                process.kill()
                _out, log = await process.communicate()
                raise AssertionError(line + log.decode())
            running.base = match[0]
            async with aiohttp.ClientSession() as session:
                yield running, session
        finally:
            if process.returncode is None:
                process.kill()
            await process.communicate()


async def test_a_chat_is_answered_on_each_face_of_the_core(tmp_path: Path) -> None:
    async with serving(tmp_path / "config.yaml") as (server, session):
        async with session.ws_connect(f"{server.base}/ws/chat") as ws:
            payload = {"text": "Hello"}
            await ws.send_json({"action": "chat", "request_id": "w1", "payload": payload})
            frames = [await ws.receive_json(timeout=PATIENCE)]
            while frames[-1]["status"] not in {"complete", "error"}:
                frames.append(await ws.receive_json(timeout=PATIENCE))
        body = {"request_id": "s1", "text": "Hello"}
        async with session.post(f"{server.base}/sse/chat", json=body) as response:
            events = await response.text()
        url = f"{server.base}/v1/chat/completions"
        async with session.post(url, json=CHAT) as response:
            whole = await response.json()
        async with session.post(url, json={**CHAT, "stream": True}) as response:
            streamed = await response.read()

    texts = [frame["chunk"]["data"] for frame in frames if frame["status"] == "chunk"]
    assert "".join(texts) == "".join(WORDS)
    assert frames[-1]["status"] == "complete"
    assert events.count("event: chunk") == len(WORDS)
    assert "event: complete" in events
    assert whole["choices"][0]["message"]["content"] == "".join(WORDS)
    assert streamed == b"".join([*map(event, WORDS), event(None), DONE])


async def test_the_server_shows_its_state_reloads_and_ends_in_order(tmp_path: Path) -> None:
    async with serving(tmp_path / "config.yaml") as (server, session):
        async with session.get(f"{server.base}/ready") as response:
            ready = response.status
        async with session.get(f"{server.base}/metrics") as response:
            metrics = await response.text()
        async with session.get(f"{server.base}/stats") as response:
            stats = await response.json()
        server.write(7)
        server.process.send_signal(signal.SIGHUP)
        await server.read_until("configuration applied")
        async with session.get(f"{server.base}/no/such/path") as response:
            unknown = response.status
        server.process.send_signal(signal.SIGTERM)
        code = await asyncio.wait_for(server.process.wait(), PATIENCE)
        await server.read_until("stopped")

    assert ready == 200
    assert "aioserver_connections" in metrics
    assert stats["connections"]["limit"] == 50
    assert "max_connections=7" in server.log
    assert unknown == 404
    assert code == 0
