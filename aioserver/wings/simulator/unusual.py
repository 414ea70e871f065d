"""Good answers of an unusual form, which a client must understand all the same."""

from __future__ import annotations

import asyncio
import dataclasses
import zlib
from typing import TYPE_CHECKING

import orjson

from aioserver.wings.simulator.broken import comments
from aioserver.wings.simulator.refusals import refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from aiohttp import web

    from aioserver.wings.simulator.exchange import Exchange, Fault
    from aioserver.wings.simulator.shapes import Answer

# Bytes of headers.
_HEADERS_SIZE = 100_000
# Tokens of an answer that is sent byte by byte.
_SLICED_TOKENS = 8


def _several_lines(data: bytes) -> bytes:
    # Only the first is replaced: the text of the answer may contain the same bytes.
    data = data.replace(b"data: {", b"data: {\ndata: ", 1)
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
        return await exchange.complete()

    return play


async def _bom(exchange: Exchange, _n: int) -> web.StreamResponse:
    await exchange.head()
    await exchange.write(b"\xef\xbb\xbf")
    await exchange.play()
    return await exchange.finish()


async def _slices(exchange: Exchange, _n: int) -> web.StreamResponse:
    await exchange.wait()
    answer = exchange.answer
    words = map(answer.piece, range(min(_SLICED_TOKENS, answer.count)))
    pieces = [*answer.opening, *words, *answer.closing, answer.end]
    if not answer.streamed:
        pieces = [answer.whole]
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(data), data) for data in pieces if data)
    head = exchange.raw_head(b"Transfer-Encoding: chunked\r\nConnection: close\r\n")
    everything = head + chunks + b"0\r\n\r\n"
    return await exchange.raw(*(everything[i : i + 1] for i in range(len(everything))))


async def _cookie(exchange: Exchange, _n: int) -> web.StreamResponse:
    exchange.response.headers["Set-Cookie"] = "simulator=1; Path=/"
    return await exchange.complete()


async def _headers(exchange: Exchange, _n: int) -> web.StreamResponse:
    for number in range(_HEADERS_SIZE // 1000):
        exchange.response.headers[f"x-much-{number}"] = "x" * 1000
    return await exchange.complete()


async def _early_hints(exchange: Exchange, _n: int) -> web.StreamResponse:
    exchange.transport.write(b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>\r\n\r\n")
    return await exchange.complete()


async def _gzip(exchange: Exchange, _n: int) -> web.StreamResponse:
    # wbits 31: gzip, not zlib's own format.
    packer = zlib.compressobj(wbits=31)

    def compress(data: bytes) -> bytes:
        return packer.compress(data) + packer.flush(zlib.Z_SYNC_FLUSH)

    exchange.response.headers["Content-Encoding"] = "gzip"
    exchange.translate = compress
    await exchange.play()
    await exchange.closing()
    exchange.translate = bytes
    await exchange.write(packer.flush())
    return await exchange.end()


async def _http10(exchange: Exchange, _n: int) -> web.StreamResponse:
    await exchange.wait()
    head = exchange.raw_head(b"", b"1.0")
    return await exchange.raw(head, *filter(None, exchange.answer.everything()))


async def _close_idle(exchange: Exchange, _n: int) -> web.StreamResponse:
    response = await exchange.complete()
    asyncio.get_running_loop().call_soon(exchange.transport.close)
    return response


async def _close_next(exchange: Exchange, _n: int) -> web.StreamResponse:
    response = await exchange.complete()
    exchange.reset_next_time()
    return response


async def _slow(exchange: Exchange, n: int) -> web.StreamResponse:
    exchange.interval = n / 1000
    return await exchange.complete()


async def _thinking(exchange: Exchange, n: int) -> web.StreamResponse:
    if exchange.answer.streamed:
        await comments(exchange, n)
    return await exchange.complete()


async def _flap(exchange: Exchange, n: int) -> web.StreamResponse:
    if exchange.flap(n) // max(1, n) % 2 == 0:
        return refusal(502)
    return await exchange.complete()


def _limits(**headers: Callable[[int], str]) -> Fault:
    """Send these x-ratelimit headers; their names have `_` for `-`."""

    async def play(exchange: Exchange, n: int) -> web.StreamResponse:
        for name, value in headers.items():
            exchange.response.headers[f"x-ratelimit-{name.replace('_', '-')}"] = value(n)
        return await exchange.complete()

    return play


def _always(text: str) -> Callable[[int], str]:
    return lambda _n: text


def _duration(milliseconds: int) -> str:
    """Write a duration as OpenAI does: 17ms, 1s, 6m0s."""
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, seconds = divmod(milliseconds // 1000, 60)
    return f"{minutes}m{seconds}s" if minutes else f"{seconds}s"


def _usage(change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Fault:
    """Move the usage: *change* gets the last event (or the whole JSON) without it, and the
    usage.
    """

    async def play(exchange: Exchange, _n: int) -> web.StreamResponse:
        answer = exchange.answer
        usage = {"prompt_tokens": 2, "completion_tokens": answer.count}
        usage["total_tokens"] = sum(usage.values())
        exchange.answer = _without_usage(answer, lambda event: change(event, usage))
        return await exchange.complete()

    return play


def _without_usage(answer: Answer, change: Callable[[dict[str, Any]], None]) -> Answer:
    if not answer.streamed:
        return dataclasses.replace(answer, whole=orjson.dumps(_changed(answer.whole, change)))
    # An event without choices has nothing but the usage.
    closing = [data for data in answer.closing if b'"choices":[]' not in data]
    head, mark, last = closing[-1].partition(b"data: ")
    closing[-1] = head + mark + orjson.dumps(_changed(last, change)) + b"\n\n"
    return dataclasses.replace(answer, closing=closing)


def _changed(data: bytes, change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    event: dict[str, Any] = orjson.loads(data)
    event.pop("usage", None)
    change(event)
    return event


def _add_groq_usage(event: dict[str, Any], usage: dict[str, Any]) -> None:
    event["x_groq"] = {"id": "req_1", "usage": usage}


UNUSUAL: Mapping[str, Fault] = {
    **{name: _translated(translate) for name, translate in _TRANSLATIONS.items()},
    "bom": _bom,
    "slices": _slices,
    "cookie": _cookie,
    "headers": _headers,
    "1xx": _early_hints,
    "gzip": _gzip,
    "http10": _http10,
    "close-idle": _close_idle,
    "close-next": _close_next,
    "slow": _slow,
    "thinking": _thinking,
    "flap": _flap,
    "limits-spent": _limits(
        limit_requests=_always("500"), remaining_requests=_always("0"), reset_requests=_duration
    ),
    "limits-day": _limits(
        limit_requests=_always("14400"),
        remaining_requests=_always("14370"),
        reset_requests=_always("2m59.56s"),
        limit_tokens=_always("18000"),
        remaining_tokens=_always("17997"),
        reset_tokens=_always("7.66s"),
    ),
    "limits-nonsense": _limits(
        limit_requests=_always("-1"),
        remaining_requests=_always("-1"),
        reset_requests=_always("-1"),
        remaining_tokens=_always("nan"),
        reset_tokens=_always("soon"),
    ),
    "no-usage": _usage(lambda _event, _usage: None),
    "usage-x-groq": _usage(_add_groq_usage),
}
