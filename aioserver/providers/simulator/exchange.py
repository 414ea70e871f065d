"""One request and its answer on one connection of the simulator: the tools faults are made of."""

from __future__ import annotations

import asyncio
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from aioserver.providers.simulator.shapes import Answer

    Fault = Callable[["Exchange", int], Awaitable[web.StreamResponse]]

_LINGER_0 = struct.pack("ii", 1, 0)  # close() then sends RST and not FIN: socket(7), SO_LINGER


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """How the simulator answers. Times are seconds; `*_after` count tokens."""

    ttft: float = 0.2  # before the first token
    interval: float = 0.03  # between two tokens
    tokens: int = 0  # in an answer; 0: as many as its text has
    fail_rate: float = 0.0  # the share of requests that fail, 0 to 1
    fail_status: int = 503  # how
    fault: str = ""  # or how, by a name of faults.py: "stall-3"
    cut_after: int | None = None  # a TCP reset
    stall_after: int | None = None  # silence for ever
    deaf: bool = False  # reads no body: a large upload gets stuck, and its end is not noticed
    headers: tuple[tuple[str, str], ...] = ()  # on every good answer, x-ratelimit-* for example


class Raw(web.StreamResponse):
    """The answer was written by hand: aiohttp adds nothing, and closes the connection."""

    async def prepare(self, request: web.BaseRequest) -> None:
        """Nothing."""

    async def write_eof(self, data: bytes = b"") -> None:
        """Nothing."""


class Exchange:
    """The answer is written once, in order: head, opening, tokens, closing, end.

    Every method that writes raises ConnectionError where the client has left; the handler's task
    is cancelled then, too. *count* is called for each token, *doomed* has the connections on
    which the next request finds nobody, *turns* how often those were asked who take turns.
    """

    def __init__(
        self,
        request: web.BaseRequest,
        answer: Answer,
        behaviour: Behaviour,
        *,
        count: Callable[[], None],
        doomed: set[asyncio.Transport],
        turns: dict[int, int],
    ) -> None:
        assert request.transport is not None
        self.transport = request.transport
        self.answer = answer
        self.interval = behaviour.interval
        self.translate: Callable[[bytes], bytes] = bytes
        self.response = web.StreamResponse(headers=self._headers(behaviour.headers))
        self._request = request
        self._ttft = behaviour.ttft
        self._count = count
        self._doomed = doomed
        self._turns = turns
        self._due = 0.0
        self._next = 0
        self._opened = False

    def _headers(self, more: tuple[tuple[str, str], ...]) -> Mapping[str, str]:
        streamed = self.answer.streamed
        kind = "text/event-stream; charset=utf-8" if streamed else "application/json"
        return {"Content-Type": kind, "Cache-Control": "no-cache", **dict(more)}

    async def wait(self) -> None:
        """The time to the first token; for an answer in one piece, to the last one."""
        tail = 0.0 if self.answer.streamed else self.interval * self.answer.count
        await asyncio.sleep(self._ttft + tail)

    async def head(self) -> None:
        """Write the head, after the time to the first token."""
        await asyncio.sleep(self._ttft)
        self._due = asyncio.get_running_loop().time()
        await self.response.prepare(self._request)

    async def write(self, data: bytes) -> None:
        """One write of the body, a chunk on the wire."""
        await self.response.write(self.translate(data))

    async def play(self, stop: int | None = None) -> None:
        """Head and opening where they are due, then the tokens before number *stop*; None: all."""
        if not self.response.prepared:
            await self.head()
        if not self._opened:
            self._opened = True
            for data in self.answer.opening:
                await self.write(data)
        last = self.answer.count if stop is None else min(stop, self.answer.count)
        while self._next < last:
            await self.token()

    async def token(self) -> None:
        """The next token, `interval` after the one before; past the last one they start again."""
        if self._next:
            await self._pace()
        await self.write(self.answer.piece(self._next))
        self._next += 1
        self._count()

    async def _pace(self) -> None:
        if not self.interval:
            await asyncio.sleep(0)  # other answers go on
            return
        now = asyncio.get_running_loop().time()
        self._due = max(self._due + self.interval, now)  # late is not made up for by a burst
        await asyncio.sleep(self._due - now)

    async def closing(self, *, done: bool = True) -> None:
        """What follows the last token, with the stream's end mark if *done*."""
        for data in self.answer.closing:
            await self.write(data)
        if done and self.answer.end:
            await self.write(self.answer.end)

    async def finish(self, *, done: bool = True) -> web.StreamResponse:
        """Closing, then the end of the body."""
        await self.closing(done=done)
        return await self.end()

    async def end(self) -> web.StreamResponse:
        """The end of the body, whatever it holds; the connection is kept."""
        await self.response.write_eof()
        return self.response

    async def whole(self) -> web.StreamResponse:
        """The answer as it should be."""
        if self.answer.streamed:
            await self.play()
            return await self.finish()
        await self.wait()
        self.response.content_length = len(self.answer.whole)
        await self.response.prepare(self._request)
        await self.response.write(self.answer.whole)
        for _ in range(self.answer.count):
            self._count()
        return await self.end()

    async def silence(self) -> web.StreamResponse:
        """Nothing more, until the client leaves or the simulator is closed."""
        await asyncio.get_running_loop().create_future()
        raise AssertionError("nobody ends the silence but a cancellation")

    async def raw(self, *pieces: bytes) -> web.StreamResponse:
        """The bytes as they are, below HTTP; then the connection is closed."""
        for data in pieces:
            self.transport.write(data)
            await asyncio.sleep(0)  # a packet of its own, where the client reads fast enough
        return Raw()

    def raw_head(self, framing: bytes, version: bytes = b"1.1") -> bytes:
        """The head of a good answer, for `raw`."""
        kind = self.response.content_type.encode()
        return b"HTTP/%b 200 OK\r\nContent-Type: %b\r\n%b\r\n" % (version, kind, framing)

    def turn(self, name: int) -> int:
        """How often *name* has been asked before."""
        turn = self._turns.get(name, 0)
        self._turns[name] = turn + 1
        return turn

    def reset(self) -> web.StreamResponse:
        """Close the connection hard: the client sees ECONNRESET."""
        reset(self.transport)
        return Raw()

    def doom(self) -> None:
        """The next request on this connection finds nobody."""
        self._doomed.add(self.transport)


def reset(transport: asyncio.Transport) -> None:
    """End a TCP connection with RST; the kernel drops what it has not sent."""
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_0)
    transport.abort()
