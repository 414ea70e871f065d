"""A provider that any request may be passed on to, and a server in front of it."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.support.scripted_provider import Peer, ScriptedProvider

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

ANSWER = b'{"object":"list","data":[]}'


@dataclass
class Passed:
    """One request as the provider got it; names of headers are lower case."""

    method: str
    target: str
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


def answer(body: bytes = ANSWER, status: int = 200, *lines: str) -> bytes:
    """The bytes of an answer with *lines* among its headers."""
    headers = (
        lines if any("ontent-" in line for line in lines) else ("Content-Type: application/json",)
    )
    head = [
        f"HTTP/1.1 {status} X",
        *dict.fromkeys((*headers, *lines)),
        f"Content-Length: {len(body)}",
    ]
    return "\r\n".join([*head, "", ""]).encode() + body


async def read_head(peer: Peer) -> Passed:
    """Read the head of the next request."""
    first, *lines = (await peer.head()).decode("latin-1").strip().split("\r\n")
    method, target, _ = first.split(" ")
    headers: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(": ")
        assert name.lower() not in headers, "a header comes once"
        headers[name.lower()] = value
    return Passed(method, target, headers)


async def read_body(peer: Peer, passed: Passed) -> int:
    """Read the body of *passed*, and return how many bytes it has; small ones are kept."""
    assert ("content-length" in passed.headers) + ("transfer-encoding" in passed.headers) <= 1
    size = 0
    async for part in parts(peer, passed):
        size += len(part)
        if size < 1 << 20:
            passed.body += part
    return size


async def parts(peer: Peer, passed: Passed) -> AsyncIterator[bytes]:
    """Read the body of *passed* part by part."""
    if "transfer-encoding" not in passed.headers:
        left = int(passed.headers.get("content-length", 0))
        while left:
            part = await peer.reader.read(min(left, 1 << 16))
            if not part:
                raise asyncio.IncompleteReadError(b"", left)
            left -= len(part)
            yield part
        return
    assert passed.headers["transfer-encoding"] == "chunked"
    while size := int(await peer.reader.readuntil(b"\r\n"), 16):
        yield await peer.reader.readexactly(size)
        assert await peer.reader.readexactly(2) == b"\r\n"
    assert await peer.reader.readexactly(2) == b"\r\n"


class Account(ScriptedProvider):
    """A provider that reads each request whole and sends what *reply* makes of it; `passed` has
    the requests.
    """

    def __init__(self, reply: Callable[[Passed], bytes] = lambda _passed: answer()) -> None:
        super().__init__(self._serve_all)
        self.passed: list[Passed] = []
        self._reply = reply

    async def _serve_all(self, peer: Peer) -> None:
        while True:
            passed = await read_head(peer)
            await read_body(peer, passed)
            self.passed.append(passed)
            peer.write(self._reply(passed))
            await peer.writer.drain()


def settings_for(scripted: ScriptedProvider, **changes: Any) -> dict[str, Any]:
    """The changes of a server whose provider `sim` is *scripted*, with the paths of its account
    open.
    """
    sim = "llm.providers.sim"
    return {
        f"{sim}.base_url": scripted.url,
        f"{sim}.account_paths": True,
        f"{sim}.api_key": "provider-key",
        **changes,
    }


@contextlib.asynccontextmanager
async def scripted(
    play: Callable[[Peer], Awaitable[None]], **options: Any
) -> AsyncIterator[ScriptedProvider]:
    """A provider that plays *play* on each connection."""
    async with ScriptedProvider(play, **options) as provider:
        yield provider


@contextlib.asynccontextmanager
async def silent() -> AsyncIterator[tuple[ScriptedProvider, asyncio.Event]]:
    """A provider that reads the head of a request and no more; the event is set when its peer has
    left.
    """
    left = asyncio.Event()

    async def play(peer: Peer) -> None:
        try:
            await read_head(peer)
            await peer.left()
        finally:
            left.set()

    async with scripted(play) as provider:
        yield provider, left
