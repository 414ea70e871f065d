"""One request and its answer on a connection of the simulator.

It has the steps that faults are made of.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aioserver.wings.simulator.engine import EngineOptions
    from aioserver.wings.simulator.shapes import Answer

# With SO_LINGER on and a linger time of 0, close() sends RST and not FIN: socket(7).
_LINGER_0 = struct.pack("ii", 1, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """How the simulator answers.

    - ttft: seconds before the first token.
    - interval: seconds between two tokens.
    - tokens: tokens of an answer; 0: as many as its text has.
    - fail_rate: share of the requests that fail, 0 to 1.
    - fail_status: HTTP status of the requests that fail.
    - fault: a name of `faults`, such as "stall-3": requests fail in this way instead.
    - cut_after: tokens before a TCP reset; None: no reset.
    - stall_after: tokens before nothing more is sent; None: all are sent.
    - headers: added to every good answer, for example x-ratelimit-*.
    - responses: whether there is a /v1/responses.
    - engine: an engine with a prefix cache, whose time replaces ttft and interval.
    - models: the names that it lists, though it answers any; () for its own.
    """

    ttft: float = 0.2
    interval: float = 0.03
    tokens: int = 0
    fail_rate: float = 0.0
    fail_status: int = 503
    fault: str = ""
    cut_after: int | None = None
    stall_after: int | None = None
    headers: tuple[tuple[str, str], ...] = ()
    responses: bool = True
    engine: EngineOptions | None = None
    models: tuple[str, ...] = ()


class RawResponse(web.StreamResponse):
    """Stands for an answer that was written below HTTP: aiohttp adds nothing, and closes the
    connection.
    """

    async def prepare(self, request: web.BaseRequest) -> None:
        """Write no head."""

    async def write_eof(self, data: bytes = b"") -> None:
        """Write no end."""


class Exchange:
    """Writes one answer, in order: head, opening, tokens, closing, end.

    Every method that writes raises ConnectionError when the client has left; the handler's task is
    cancelled then, too. *count_token* is called after each token. All exchanges of a simulator
    share two of the arguments. *reset_next* has the connections to reset at their next request.
    *flaps* counts the requests that each `flap` fault has had, by the number in its name.
    """

    def __init__(
        self,
        request: web.BaseRequest,
        answer: Answer,
        behaviour: Behaviour,
        *,
        count_token: Callable[[], None],
        reset_next: set[asyncio.Transport],
        flaps: dict[int, int],
    ) -> None:
        assert request.transport is not None
        self.transport = request.transport
        self.answer = answer
        self.interval = behaviour.interval
        self.translate: Callable[[bytes], bytes] = bytes
        self.response = web.StreamResponse(headers=self._headers(behaviour.headers))
        self._request = request
        self._ttft = behaviour.ttft
        self._count_token = count_token
        self._reset_next = reset_next
        self._flaps = flaps
        # Loop time of the last token.
        self._due = 0.0
        # Number of the next token.
        self._next = 0
        self._opened = False

    def _headers(self, extra: tuple[tuple[str, str], ...]) -> Mapping[str, str]:
        streamed = self.answer.streamed
        kind = "text/event-stream; charset=utf-8" if streamed else "application/json"
        return {"Content-Type": kind, "Cache-Control": "no-cache", **dict(extra)}

    async def wait(self) -> None:
        """Sleep until the first token is due; for an answer in one piece, until the last is."""
        tail = 0.0 if self.answer.streamed else self.interval * self.answer.count
        await asyncio.sleep(self._ttft + tail)

    async def head(self) -> None:
        """Write the head when the first token is due."""
        await asyncio.sleep(self._ttft)
        self._due = asyncio.get_running_loop().time()
        await self.response.prepare(self._request)

    async def write(self, data: bytes) -> None:
        """Write a part of the body as one HTTP chunk."""
        await self.response.write(self.translate(data))

    async def play(self, stop: int | None = None) -> None:
        """Write the tokens before number *stop*; None: all. Head and opening come first, once."""
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
        """Write the next token, `interval` after the one before; after the last one, the first."""
        if self._next:
            await self._pace()
        await self.write(self.answer.piece(self._next))
        self._next += 1
        self._count_token()

    async def _pace(self) -> None:
        if not self.interval:
            # There is no pause, but other answers must go on.
            await asyncio.sleep(0)
            return
        now = asyncio.get_running_loop().time()
        # A burst does not make up for a delay.
        self._due = max(self._due + self.interval, now)
        await asyncio.sleep(self._due - now)

    async def closing(self, *, done: bool = True) -> None:
        """Write the events after the last token, and the stream's end mark if *done*."""
        for data in self.answer.closing:
            await self.write(data)
        if done and self.answer.end:
            await self.write(self.answer.end)

    async def finish(self, *, done: bool = True) -> web.StreamResponse:
        """Write the closing and the end of the body."""
        await self.closing(done=done)
        return await self.end()

    async def end(self) -> web.StreamResponse:
        """End the body at this point; the connection is kept."""
        await self.response.write_eof()
        return self.response

    async def complete(self) -> web.StreamResponse:
        """Write the whole answer without a fault."""
        if self.answer.streamed:
            await self.play()
            return await self.finish()
        await self.wait()
        self.response.content_length = len(self.answer.whole)
        await self.response.prepare(self._request)
        await self.response.write(self.answer.whole)
        for _ in range(self.answer.count):
            self._count_token()
        return await self.end()

    async def stall(self) -> web.StreamResponse:
        """Send nothing more, until the client leaves or the simulator is closed."""
        await asyncio.get_running_loop().create_future()
        raise AssertionError("only a cancellation ends a stall")

    async def raw(self, *pieces: bytes) -> web.StreamResponse:
        """Write bytes below HTTP, as they are; the connection is closed afterwards."""
        for data in pieces:
            self.transport.write(data)
            # Each piece is a packet of its own if the client reads fast enough.
            await asyncio.sleep(0)
        return RawResponse()

    def raw_head(self, framing: bytes, version: bytes = b"1.1") -> bytes:
        """Return the head of a good answer, for `raw`."""
        kind = self.response.content_type.encode()
        return b"HTTP/%b 200 OK\r\nContent-Type: %b\r\n%b\r\n" % (version, kind, framing)

    def flap(self, number: int) -> int:
        """Count this request for the `flap` fault of *number*; returns how many came before it."""
        earlier = self._flaps.get(number, 0)
        self._flaps[number] = earlier + 1
        return earlier

    def reset(self) -> web.StreamResponse:
        """Reset the connection: the client sees ECONNRESET."""
        reset(self.transport)
        return RawResponse()

    def reset_next_time(self) -> None:
        """Reset the connection when its next request comes."""
        self._reset_next.add(self.transport)


def reset(transport: asyncio.Transport) -> None:
    """End a TCP connection with RST; the kernel drops what it has not sent."""
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_0)
    transport.abort()
