"""Faults within an answer: it begins well, and ends badly or never."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aioserver.wings.simulator.shapes import COMMENT, event

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aiohttp import web

    from aioserver.wings.simulator.exchange import Exchange, Fault

# Seconds: no provider sends comments as fast as they are read.
_MIN_COMMENT_INTERVAL = 0.005
# Bytes of a long line.
_LONG_LINE = 10_000_000
# Bytes of each write of a long line.
_PIECE = 65536


async def _head_only(exchange: Exchange, _n: int) -> web.StreamResponse:
    await exchange.head()
    return await exchange.stall()


async def stall(exchange: Exchange, n: int) -> web.StreamResponse:
    """Send nothing more after *n* tokens, or after all of them."""
    await exchange.play(n)
    return await exchange.stall()


async def _half_line(exchange: Exchange, n: int) -> web.StreamResponse:
    await exchange.play(n)
    line = exchange.answer.piece(n)
    await exchange.write(line[: len(line) // 2])
    return await exchange.stall()


async def cut(exchange: Exchange, n: int) -> web.StreamResponse:
    """Reset the connection after *n* tokens, or after all of them."""
    await exchange.play(n)
    return exchange.reset()


async def _cut_mid(exchange: Exchange, n: int) -> web.StreamResponse:
    await exchange.play(n)
    data = exchange.answer.piece(n)
    exchange.transport.write(b"%x\r\n%b" % (len(data), data[: len(data) // 2]))
    return exchange.reset()


async def _end(exchange: Exchange, n: int) -> web.StreamResponse:
    await exchange.play(n)
    return await exchange.end()


async def _error_event(exchange: Exchange, n: int) -> web.StreamResponse:
    await exchange.play(n)
    message = "The server had an error processing your request."
    await exchange.write(exchange.answer.error_event(500, message))
    return await exchange.end()


async def _verdict(exchange: Exchange, n: int) -> web.StreamResponse:
    await exchange.play(n)
    message = "The response was filtered due to the prompt."
    await exchange.write(exchange.answer.error_event(400, message))
    return await exchange.end()


async def _error_chunk(exchange: Exchange, n: int) -> web.StreamResponse:
    await exchange.play(n)
    await exchange.write(_chunk_error(exchange, 502))
    return await exchange.end()


async def _error_first(exchange: Exchange, n: int) -> web.StreamResponse:
    await exchange.head()
    await exchange.write(exchange.answer.idle)
    await exchange.write(_chunk_error(exchange, n))
    return await exchange.end()


def _chunk_error(exchange: Exchange, code: int) -> bytes:
    """Encode an error as OpenRouter does: in a chunk, with a number for its code.

    Messages have events for errors.
    """
    if exchange.answer.idle != COMMENT:
        return exchange.answer.error_event(code, "Provider disconnected unexpectedly")
    choice = {"index": 0, "delta": {"content": ""}, "finish_reason": "error"}
    fault = {"code": code, "message": "Provider disconnected unexpectedly"}
    chunk = {"id": "gen-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return event({**chunk, "error": fault, "choices": [choice]})


async def _bad_json(exchange: Exchange, n: int) -> web.StreamResponse:
    await exchange.play(n)
    await exchange.write(b'data: {"id":"chatcmpl-\n\n')
    await exchange.play()
    return await exchange.finish()


async def _bad_utf8(exchange: Exchange, n: int) -> web.StreamResponse:
    await exchange.play(n)
    await exchange.write(b'data: {"choices":[{"index":0,"delta":{"content":"\xc3\x28\xff"}}]}\n\n')
    await exchange.play()
    return await exchange.finish()


async def _bad_chunk(exchange: Exchange, n: int) -> web.StreamResponse:
    await exchange.play(n)
    return await exchange.raw(b"no size\r\n")


async def _early_done(exchange: Exchange, n: int) -> web.StreamResponse:
    await exchange.play(n)
    await exchange.write(exchange.answer.end)
    return await exchange.end()


async def _comments_stall(exchange: Exchange, n: int) -> web.StreamResponse:
    await comments(exchange, n)
    return await exchange.stall()


async def _comments_endless(exchange: Exchange, _n: int) -> web.StreamResponse:
    while True:
        await comments(exchange, 1)


async def comments(exchange: Exchange, n: int) -> None:
    """Write *n* comments, or pings, one each `interval`, as providers do to keep a connection
    alive.
    """
    if not exchange.response.prepared:
        await exchange.head()
    for _ in range(n):
        await exchange.write(exchange.answer.idle)
        await asyncio.sleep(max(exchange.interval, _MIN_COMMENT_INTERVAL))


async def _no_done(exchange: Exchange, _n: int) -> web.StreamResponse:
    await exchange.play()
    return await exchange.finish(done=False)


async def _after_done(exchange: Exchange, _n: int) -> web.StreamResponse:
    await exchange.play()
    await exchange.closing()
    await exchange.write(exchange.answer.piece(0))
    return await exchange.end()


async def _open_done(exchange: Exchange, _n: int) -> web.StreamResponse:
    await exchange.play()
    await exchange.closing()
    return await exchange.stall()


async def _long_line(exchange: Exchange, n: int) -> web.StreamResponse:
    await exchange.play(n)
    await exchange.write(b'data: {"choices":[{"index":0,"delta":{"content":"')
    for start in range(0, _LONG_LINE, _PIECE):
        await exchange.write(b"x" * min(_PIECE, _LONG_LINE - start))
        await asyncio.sleep(0)
    await exchange.write(b'"}}]}\n\n')
    await exchange.play()
    return await exchange.finish()


async def _endless(exchange: Exchange, _n: int) -> web.StreamResponse:
    await exchange.play(1)
    exchange.interval = 0
    while True:
        await exchange.token()


async def _endless_line(exchange: Exchange, n: int) -> web.StreamResponse:
    await exchange.play(n)
    await exchange.write(b"data: ")
    while True:
        await exchange.write(b"x" * _PIECE)
        await asyncio.sleep(0)


async def _wrong_length(exchange: Exchange, _n: int) -> web.StreamResponse:
    await exchange.wait()
    body = b"".join(exchange.answer.everything())
    head = exchange.raw_head(b"Content-Length: %d\r\n" % (len(body) + 100))
    return await exchange.raw(head, body)


BROKEN: Mapping[str, Fault] = {
    "head-only": _head_only,
    "stall": stall,
    "comments-stall": _comments_stall,
    "comments-endless": _comments_endless,
    "half-line": _half_line,
    "cut": cut,
    "cut-mid": _cut_mid,
    "bad-chunk": _bad_chunk,
    "end": _end,
    "error-event": _error_event,
    "verdict": _verdict,
    "error-chunk": _error_chunk,
    "error-first": _error_first,
    "bad-json": _bad_json,
    "bad-utf8": _bad_utf8,
    "no-done": _no_done,
    "early-done": _early_done,
    "after-done": _after_done,
    "open-done": _open_done,
    "long-line": _long_line,
    "endless": _endless,
    "endless-line": _endless_line,
    "wrong-length": _wrong_length,
}
