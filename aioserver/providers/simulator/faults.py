r"""Every way in which the simulator can fail, each asked for by a model's name.

`<n>` may be left out (3). What counts tokens counts slices of the JSON where the answer is not
streamed. "stalls": nothing more comes, and the connection stays open.

Before the answer

    fault-status-<code>         any status, with OpenAI's error body; 429 and 503: Retry-After 1
    fault-quota                 429 with the code insufficient_quota
    fault-retry-after-<n>       429, Retry-After n seconds
    fault-retry-after-ms        429, retry-after-ms 150 beside Retry-After 1
    fault-retry-after-date      429, Retry-After as a date, some 2 s from now
    fault-retry-after-absurd    429, Retry-After 31536000
    fault-html                  200 with an HTML page
    fault-empty                 200 with nothing
    fault-json-under-200-stream 200 with a JSON error, also where a stream was asked for
    fault-redirect              302 to /elsewhere
    fault-silent                stalls before the head
    fault-drop                  closes the connection in place of a head
    fault-not-http              bytes that are no HTTP

In the answer

    fault-head-only             stalls after the head
    fault-stall-<n>             stalls after n tokens
    fault-half-line-<n>         stalls in the middle of the line after n tokens
    fault-cut-<n>               TCP reset after n tokens
    fault-cut-mid-<n>           the same in the middle of the next chunk
    fault-end-<n>               clean end of the body after n tokens: no finish_reason, no [DONE]
    fault-error-event-<n>       an error object as an event, then the end
    fault-error-chunk-<n>       OpenRouter's: a chunk with `error` and finish_reason "error"
    fault-bad-json-<n>          an event that is no JSON after n tokens, then the rest
    fault-bad-utf8-<n>          an event that is no UTF-8 after n tokens, then the rest
    fault-no-done               finish_reason but no [DONE]
    fault-after-done            an event after [DONE]
    fault-open-done             [DONE], but the body never ends
    fault-long-line             a line of 10 MB in the middle
    fault-endless               tokens for ever, as fast as they are taken
    fault-endless-line          a line for ever
    fault-slow-<ms>             a token each ms
    fault-wrong-length          Content-Length beyond the body, then the connection closes

Unusual, but good

    fault-crlf fault-cr         lines that end so
    fault-bom                   a byte order mark first
    fault-multi-data            each event's JSON on several `data:` lines
    fault-comments              `: OPENROUTER PROCESSING` before each event
    fault-slices                every byte its own write, heads and chunk sizes too
    fault-cookie                Set-Cookie
    fault-headers               100 kB of headers
    fault-1xx                   103 Early Hints first
    fault-gzip                  gzip, which nobody asked for
    fault-http10                HTTP/1.0: the close is the end
    fault-close-idle            closes the kept connection right after a good answer
    fault-close-next            resets it when the next request comes: a dead pooled connection
"""

from __future__ import annotations

import asyncio
import re
import zlib
from typing import TYPE_CHECKING

from aiohttp import web

from aioserver.providers.simulator.model import BadRequest, error
from aioserver.providers.simulator.refusals import REFUSALS
from aioserver.providers.simulator.shapes import event

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from aioserver.providers.simulator.exchange import Exchange

    Fault = Callable[[Exchange, int], Awaitable[web.StreamResponse]]
    Play = Callable[[Exchange], Awaitable[web.StreamResponse]]

_PREFIX = "fault-"
_N = 3
_LONG_LINE = 10_000_000  # bytes
_HEADERS = 100_000  # bytes
_SHORT = 8  # tokens of an answer that goes out byte by byte
_PIECE = 65536  # bytes of one write where a lot is written


def find(model: str) -> Play | None:
    """The fault that *model* names, None: it names none. Raises BadRequest: an unknown fault."""
    if not model.startswith(_PREFIX):
        return None
    name, number = model.removeprefix(_PREFIX), _N
    if name not in FAULTS and (match := re.fullmatch(r"(.+)-([0-9]{1,6})", name)):
        name, number = match[1], int(match[2])
    elif name == "status":
        number = 500
    if name not in FAULTS or (name == "status" and not 200 <= number <= 599):
        message = f"The model '{model}' does not exist"
        raise BadRequest(message, param="model", code="model_not_found", status=404)
    fault = FAULTS[name]
    return lambda exchange: fault(exchange, number)


def _raw_head(exchange: Exchange, framing: bytes, version: bytes = b"1.1") -> bytes:
    kind = exchange.response.content_type.encode()
    return b"HTTP/%b 200 OK\r\nContent-Type: %b\r\n%b\r\n" % (version, kind, framing)


# Before the answer.


def _refused(refuse: Callable[[int], web.Response]) -> Fault:
    async def play(_: Exchange, n: int) -> web.StreamResponse:
        return refuse(n)

    return play


async def _empty(exchange: Exchange, _n: int) -> web.StreamResponse:
    return web.Response(content_type=exchange.response.content_type)


async def _silent(exchange: Exchange, _n: int) -> web.StreamResponse:
    return await exchange.silence()


async def _drop(exchange: Exchange, _n: int) -> web.StreamResponse:
    return await exchange.raw()


async def _not_http(exchange: Exchange, _n: int) -> web.StreamResponse:
    return await exchange.raw(b"220 mail.example ESMTP ready\r\n")


# In the answer.


async def _head_only(exchange: Exchange, _n: int) -> web.StreamResponse:
    await exchange.head()
    return await exchange.silence()


async def stall(exchange: Exchange, n: int) -> web.StreamResponse:
    """Silence after *n* tokens, or after all of them."""
    await exchange.play(n)
    return await exchange.silence()


async def _half_line(exchange: Exchange, n: int) -> web.StreamResponse:
    await exchange.play(n)
    line = exchange.answer.piece(n)
    await exchange.write(line[: len(line) // 2])
    return await exchange.silence()


async def cut(exchange: Exchange, n: int) -> web.StreamResponse:
    """A TCP reset after *n* tokens, or after all of them."""
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
    body = error(500, "The server had an error processing your request.")
    await exchange.write(b"data: %b\n\n" % body)
    return await exchange.end()


async def _error_chunk(exchange: Exchange, n: int) -> web.StreamResponse:
    await exchange.play(n)
    choice = {"index": 0, "delta": {"content": ""}, "finish_reason": "error"}
    fault = {"code": 502, "message": "Provider disconnected unexpectedly"}
    chunk = {"id": "gen-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    await exchange.write(event({**chunk, "error": fault, "choices": [choice]}))
    return await exchange.end()


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
    return await exchange.silence()


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


async def _slow(exchange: Exchange, n: int) -> web.StreamResponse:
    exchange.interval = n / 1000
    return await exchange.whole()


async def _wrong_length(exchange: Exchange, _n: int) -> web.StreamResponse:
    await exchange.wait()
    body = b"".join(exchange.answer.everything())
    return await exchange.raw(
        _raw_head(exchange, b"Content-Length: %d\r\n" % (len(body) + 100)), body
    )


# Unusual, but good.


def _several_lines(data: bytes) -> bytes:
    data = data.replace(b"data: {", b"data: {\ndata: ", 1)  # once: the text may hold it, too
    return data.replace(b"}\n\n", b"\ndata:}\n\n")


_TRANSLATIONS: Mapping[str, Callable[[bytes], bytes]] = {
    "crlf": lambda data: data.replace(b"\n", b"\r\n"),
    "cr": lambda data: data.replace(b"\n", b"\r"),
    "multi-data": _several_lines,
    "comments": lambda data: b": OPENROUTER PROCESSING\n\n" + data,
}


def _translated(translate: Callable[[bytes], bytes]) -> Fault:
    async def play(exchange: Exchange, _n: int) -> web.StreamResponse:
        exchange.translate = translate
        return await exchange.whole()

    return play


async def _bom(exchange: Exchange, _n: int) -> web.StreamResponse:
    await exchange.head()
    await exchange.write(b"\xef\xbb\xbf")
    await exchange.play()
    return await exchange.finish()


async def _slices(exchange: Exchange, _n: int) -> web.StreamResponse:
    await exchange.wait()
    answer = exchange.answer
    words = map(answer.piece, range(min(_SHORT, answer.count)))
    pieces = [*answer.opening, *words, *answer.closing, answer.end]
    if not answer.streamed:
        pieces = [answer.whole]
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(data), data) for data in pieces if data)
    head = _raw_head(exchange, b"Transfer-Encoding: chunked\r\nConnection: close\r\n")
    everything = head + chunks + b"0\r\n\r\n"
    return await exchange.raw(*(everything[i : i + 1] for i in range(len(everything))))


async def _cookie(exchange: Exchange, _n: int) -> web.StreamResponse:
    exchange.response.headers["Set-Cookie"] = "simulator=1; Path=/"
    return await exchange.whole()


async def _headers(exchange: Exchange, _n: int) -> web.StreamResponse:
    for number in range(_HEADERS // 1000):
        exchange.response.headers[f"x-much-{number}"] = "x" * 1000
    return await exchange.whole()


async def _early_hints(exchange: Exchange, _n: int) -> web.StreamResponse:
    exchange.transport.write(b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>\r\n\r\n")
    return await exchange.whole()


async def _gzip(exchange: Exchange, _n: int) -> web.StreamResponse:
    packer = zlib.compressobj(wbits=31)  # 31: gzip, and not zlib's own format

    def squeeze(data: bytes) -> bytes:
        return packer.compress(data) + packer.flush(zlib.Z_SYNC_FLUSH)

    exchange.response.headers["Content-Encoding"] = "gzip"
    exchange.translate = squeeze
    await exchange.play()
    await exchange.closing()
    exchange.translate = bytes
    await exchange.write(packer.flush())
    return await exchange.end()


async def _http10(exchange: Exchange, _n: int) -> web.StreamResponse:
    await exchange.wait()
    return await exchange.raw(
        _raw_head(exchange, b"", b"1.0"), *filter(None, exchange.answer.everything())
    )


async def _close_idle(exchange: Exchange, _n: int) -> web.StreamResponse:
    response = await exchange.whole()
    asyncio.get_running_loop().call_soon(exchange.transport.close)
    return response


async def _close_next(exchange: Exchange, _n: int) -> web.StreamResponse:
    response = await exchange.whole()
    exchange.doom()
    return response


FAULTS: Mapping[str, Fault] = {
    **{name: _refused(refuse) for name, refuse in REFUSALS.items()},
    **{name: _translated(translate) for name, translate in _TRANSLATIONS.items()},
    "empty": _empty,
    "silent": _silent,
    "drop": _drop,
    "not-http": _not_http,
    "head-only": _head_only,
    "stall": stall,
    "half-line": _half_line,
    "cut": cut,
    "cut-mid": _cut_mid,
    "end": _end,
    "error-event": _error_event,
    "error-chunk": _error_chunk,
    "bad-json": _bad_json,
    "bad-utf8": _bad_utf8,
    "no-done": _no_done,
    "after-done": _after_done,
    "open-done": _open_done,
    "long-line": _long_line,
    "endless": _endless,
    "endless-line": _endless_line,
    "slow": _slow,
    "wrong-length": _wrong_length,
    "bom": _bom,
    "slices": _slices,
    "cookie": _cookie,
    "headers": _headers,
    "1xx": _early_hints,
    "gzip": _gzip,
    "http10": _http10,
    "close-idle": _close_idle,
    "close-next": _close_next,
}
