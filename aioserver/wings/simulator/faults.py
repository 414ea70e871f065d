"""The faults of the simulator: the meaning of each name, and the steps of which they are made.

This file is one concept: `TABLE` documents `FAULTS`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import re
import time
import zlib
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from typing import TYPE_CHECKING, Any

import orjson
from aiohttp import web

from aioserver.wings.simulator.exchange import Exchange
from aioserver.wings.simulator.model import BadRequest, error
from aioserver.wings.simulator.shapes import COMMENT, event

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aioserver.wings.simulator.shapes import Answer

Play = Callable[[Exchange], Awaitable[web.StreamResponse]]
# The same, with the number of the fault.
Numbered = Callable[[Exchange, int], Awaitable[web.StreamResponse]]

PREFIX = "fault-"
# The number of a fault that is named without one.
_DEFAULT_NUMBER = 3
_DEFAULT_NUMBERS = {"status": 500, "error-first": 502, "limits-spent": 17}
TABLE = """\
A request to the model in the first column is answered as the second column says. `<n>`, `<ms>` and
`<code>` are numbers; where a number is left out it is 3, or the number in brackets. "Stalls" means
that nothing more is sent and that the connection stays open. In an answer that is not streamed,
slices of its JSON count as tokens. In answers of Anthropic's Messages API an SSE comment is a
`ping`, [DONE] is `message_stop`, and an error is an event `error`.

Before the answer

    fault-status-<code>         any HTTP status (500); 429 and 503 with Retry-After: 1
    fault-quota                 429 with the code insufficient_quota
    fault-credits               402 as OpenRouter sends it: its code is a number
    fault-retry-after-<n>       429 with Retry-After: n
    fault-retry-after-ms        429 with retry-after-ms: 700 and Retry-After: 1
    fault-retry-after-date      429 with a date as Retry-After, about 2 s from now
    fault-retry-after-absurd    429 with Retry-After: 31536000, a year
    fault-day-over              429 with Retry-After: 2, as Groq sends it when a day's quota ends
    fault-capacity              498 as Groq sends it, with the code capacity_exceeded
    fault-too-long              400 with the code context_length_exceeded
    fault-slow-down             503 as OpenAI sends it, with the code slow_down
    fault-html                  200 with an HTML page
    fault-type-html             a good stream whose Content-Type is text/html
    fault-type-text             a good stream whose Content-Type is text/plain
    fault-empty                 200 with an empty body
    fault-json-under-200-stream 200 with an error as JSON, even for a request that wants a stream
    fault-redirect              302 to /elsewhere
    fault-silent                stalls before the response head
    fault-drop                  closes the connection without an answer
    fault-not-http              bytes that are not HTTP
    fault-flap-<n>              502 for n requests, then n good answers, then 502 again

In the answer

    fault-head-only             stalls after the response head
    fault-stall-<n>             stalls after n tokens
    fault-comments-stall-<n>    stalls after n SSE comments, before the first token
    fault-comments-endless      SSE comments for ever, and no token
    fault-half-line-<n>         stalls in the middle of the line that follows n tokens
    fault-cut-<n>               TCP reset after n tokens
    fault-cut-mid-<n>           TCP reset in the middle of the HTTP chunk that follows n tokens
    fault-bad-chunk-<n>         an HTTP chunk without a size after n tokens
    fault-end-<n>               the body ends after n tokens, without finish_reason and [DONE]
    fault-error-event-<n>       an error object as an event after n tokens, then the end
    fault-error-chunk-<n>       the same as OpenRouter sends it: finish_reason is "error"
    fault-verdict-<n>           an error of the request itself after n tokens, then the end
    fault-error-first-<code>    OpenRouter's error with this code (502) instead of the first token
    fault-bad-json-<n>          an event that is not JSON after n tokens, then the rest
    fault-bad-utf8-<n>          an event that is not UTF-8 after n tokens, then the rest
    fault-no-done               finish_reason, but no [DONE]
    fault-early-done-<n>        [DONE] after n tokens without finish_reason, as llama.cpp sends it
    fault-after-done            an event after [DONE]
    fault-open-done             [DONE], but the body never ends
    fault-long-line-<n>         a line of 10 MB after n tokens, then the rest
    fault-endless               tokens for ever, as fast as the client reads them
    fault-endless-line-<n>      a line that never ends, after n tokens
    fault-wrong-length          a Content-Length 100 bytes too large, then the connection closes

Good answers of an unusual form

    fault-slow-<ms>             a token every so many milliseconds
    fault-thinking-<n>          n SSE comments before the first token
    fault-crlf fault-cr         lines that end with CR LF, or with CR
    fault-bom                   a byte order mark at the start
    fault-multi-data            the JSON of each event on several `data:` lines
    fault-comments              the comment `: OPENROUTER PROCESSING` before each event
    fault-slices                every byte in a write of its own, head and chunk sizes included
    fault-cookie                with Set-Cookie
    fault-headers               with 100 kB of headers
    fault-1xx                   103 Early Hints before the response head
    fault-gzip                  gzip, which the request did not allow
    fault-http10                HTTP/1.0: the close of the connection ends the body
    fault-close-idle            closes the idle connection right after a good answer
    fault-close-next            resets the connection when its next request comes
    fault-limits-spent-<ms>     x-ratelimit-remaining-requests: 0, reset in so many ms (17)
    fault-limits-day            rate limits as Groq sends them: requests a day, tokens a minute
    fault-limits-nonsense       x-ratelimit headers with the values -1, nan, soon
    fault-no-usage              no usage, even for a request that wants it
    fault-usage-x-groq          the usage in x_groq instead
"""
# Seconds: no provider sends comments as fast as they are read.
_MIN_COMMENT_INTERVAL = 0.005
# Bytes of a long line, and of each write of it.
_LONG_LINE, _PIECE = 10_000_000, 65536
# The beginning of an event, up to its text.
_LINE = b'data: {"choices":[{"index":0,"delta":{"content":"'
_PAGE = "<!doctype html><title>Bad gateway</title><h1>Something in between answers</h1>"
# Tokens of an answer that is sent byte by byte.
_SLICED_TOKENS = 8
_MESSAGES = {
    401: "Incorrect API key provided.",
    404: "The model does not exist or you do not have access to it.",
    429: "Rate limit reached.",
    503: "The engine is currently overloaded, please try again later.",
}
_CODES = {401: "invalid_api_key", 404: "model_not_found", 429: "rate_limit_exceeded"}


def find(model: str) -> Play | None:
    """Return the fault that *model* names; None: it names none.

    Raises:
        BadRequest: the name has the prefix of faults, and there is no such fault.
    """
    if not model.startswith(PREFIX):
        return None
    name = model.removeprefix(PREFIX)
    number = _DEFAULT_NUMBERS.get(name, _DEFAULT_NUMBER)
    if name not in FAULTS and (match := re.fullmatch(r"(.+)-([0-9]{1,6})", name)):
        name, number = match[1], int(match[2])
    if name not in FAULTS or (name == "status" and not 200 <= number <= 599):
        message = f"The model '{model}' does not exist"
        raise BadRequest(message, param="model", code="model_not_found", status=404)
    fault = FAULTS[name]
    return lambda exchange: fault(exchange, number)


# Faults before the answer.


def as_json(status: int, body: bytes, headers: Mapping[str, str] | None = None) -> web.Response:
    """Make a response with a JSON body."""
    return web.Response(status=status, body=body, headers=headers, content_type="application/json")


def refusal(status: int, headers: Mapping[str, str] | None = None) -> web.Response:
    """Make a response with OpenAI's error body."""
    defaults = {"Retry-After": "1"} if status in {429, 503} else {}
    message = _MESSAGES.get(status, f"The simulator says {status}.")
    body = error(status, message, code=_CODES.get(status))
    return as_json(status, body, {**defaults, **(headers or {})})


def _instead(respond: Callable[[int], web.Response]) -> Numbered:
    """Answer with a response that is made of the fault's number."""

    async def play(_exchange: Exchange, n: int) -> web.StreamResponse:
        return respond(n)

    return play


def _refused(status: int, message: str, code: str | int, **headers: str) -> Numbered:
    """Answer with an error; *headers* have `_` for `-`."""
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    body = error(status, message, code=code)
    return _instead(lambda _n: as_json(status, body, fields))


def _later(header: str, value: Callable[[int], object]) -> Numbered:
    """Answer with a 429 whose *header* says when to come back."""
    return _instead(lambda n: refusal(429, {header: str(value(n))}))


def _typed(content_type: str) -> Numbered:
    """Answer with the bytes of a good stream under another content type."""
    chunk = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    choice = {"index": 0, "delta": {"content": "Hello"}, "finish_reason": "stop"}
    body = b"data: %b\n\ndata: [DONE]\n\n" % orjson.dumps({**chunk, "choices": [choice]})
    return _instead(lambda _n: web.Response(body=body, content_type=content_type))


async def _empty(exchange: Exchange, _n: int) -> web.StreamResponse:
    return web.Response(content_type=exchange.response.content_type)


async def _flap(exchange: Exchange, n: int) -> web.StreamResponse:
    if exchange.flap(n) // max(1, n) % 2 == 0:
        return refusal(502)
    return await exchange.complete()


# Faults within the answer.


def _within(
    data: bytes | Callable[[Exchange, int], bytes] = b"",
    then: Play = Exchange.end,
) -> Numbered:
    """Write n tokens and *data*, or its result if it is a function, and continue with *then*."""

    async def play(exchange: Exchange, n: int) -> web.StreamResponse:
        await exchange.play(n)
        return await _write(exchange, n, data, then)

    return play


def _behind(
    data: bytes | Callable[[Exchange, int], bytes] = b"",
    then: Play = Exchange.end,
    *,
    done: bool = True,
) -> Numbered:
    """Write the answer, its end mark if *done*, and *data*, and continue with *then*."""

    async def play(exchange: Exchange, n: int) -> web.StreamResponse:
        await exchange.play()
        await exchange.closing(done=done)
        return await _write(exchange, n, data, then)

    return play


async def _write(
    exchange: Exchange, n: int, data: bytes | Callable[[Exchange, int], bytes], then: Play
) -> web.StreamResponse:
    if written := data if isinstance(data, bytes) else data(exchange, n):
        await exchange.write(written)
    return await then(exchange)


async def _rest(exchange: Exchange) -> web.StreamResponse:
    await exchange.play()
    return await exchange.finish()


async def _reset(exchange: Exchange) -> web.StreamResponse:
    return exchange.reset()


# After n tokens, or after all of them: nothing more is sent, or the connection is reset.
stall, cut = _within(then=Exchange.stall), _within(then=_reset)


def _half(exchange: Exchange, n: int) -> bytes:
    line = exchange.answer.piece(n)
    return line[: len(line) // 2]


def _failed(status: int, message: str) -> Callable[[Exchange, int], bytes]:
    return lambda exchange, _n: exchange.answer.error_event(status, message)


def _openrouters(exchange: Exchange, code: int) -> bytes:
    """Encode an error as OpenRouter does: in a chunk, with a number for its code.

    The Messages API has events for errors.
    """
    if exchange.answer.idle != COMMENT:
        return exchange.answer.error_event(code, "Provider disconnected unexpectedly")
    choice = {"index": 0, "delta": {"content": ""}, "finish_reason": "error"}
    fault = {"code": code, "message": "Provider disconnected unexpectedly"}
    chunk = {"id": "gen-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return event({**chunk, "error": fault, "choices": [choice]})


async def _head_only(exchange: Exchange, _n: int) -> web.StreamResponse:
    await exchange.head()
    return await exchange.stall()


async def _cut_mid(exchange: Exchange, n: int) -> web.StreamResponse:
    await exchange.play(n)
    size = len(exchange.answer.piece(n))
    exchange.transport.write(b"%x\r\n%b" % (size, _half(exchange, n)))
    return exchange.reset()


async def _error_first(exchange: Exchange, n: int) -> web.StreamResponse:
    await exchange.head()
    await exchange.write(exchange.answer.idle)
    await exchange.write(_openrouters(exchange, n))
    return await exchange.end()


async def _comments(exchange: Exchange, n: int) -> None:
    """Write *n* comments, or pings, one each `interval`, as providers do to keep a connection
    alive.
    """
    if not exchange.response.prepared:
        await exchange.head()
    for _ in range(n):
        await exchange.write(exchange.answer.idle)
        await asyncio.sleep(max(exchange.interval, _MIN_COMMENT_INTERVAL))


async def _comments_stall(exchange: Exchange, n: int) -> web.StreamResponse:
    await _comments(exchange, n)
    return await exchange.stall()


async def _comments_endless(exchange: Exchange, _n: int) -> web.StreamResponse:
    while True:
        await _comments(exchange, 1)


async def _endless(exchange: Exchange, _n: int) -> web.StreamResponse:
    await exchange.play(1)
    exchange.interval = 0
    while True:
        await exchange.token()


async def _fill(exchange: Exchange, size: float) -> None:
    """Write *size* bytes of a line."""
    while size > 0:
        await exchange.write(b"x" * int(min(size, _PIECE)))
        size -= _PIECE
        await asyncio.sleep(0)


async def _long_line(exchange: Exchange) -> web.StreamResponse:
    await _fill(exchange, _LONG_LINE)
    await exchange.write(b'"}}]}\n\n')
    return await _rest(exchange)


async def _endless_line(exchange: Exchange) -> web.StreamResponse:
    await _fill(exchange, math.inf)
    raise AssertionError("only a cancellation ends such a line")


async def _wrong_length(exchange: Exchange, _n: int) -> web.StreamResponse:
    await exchange.wait()
    body = b"".join(exchange.answer.everything())
    head = exchange.raw_head(b"Content-Length: %d\r\n" % (len(body) + 100))
    return await exchange.raw(head, body)


# Good answers of an unusual form.


def _translated(translate: Callable[[bytes], bytes]) -> Numbered:
    async def play(exchange: Exchange, _n: int) -> web.StreamResponse:
        exchange.translate = translate
        return await exchange.complete()

    return play


def _several_lines(data: bytes) -> bytes:
    # Only the first is replaced: the text of the answer may contain the same bytes.
    data = data.replace(b"data: {", b"data: {\ndata: ", 1)
    return data.replace(b"}\n\n", b"\ndata:}\n\n")


def _with_headers(headers: Callable[[int], Mapping[str, str]]) -> Numbered:
    async def play(exchange: Exchange, n: int) -> web.StreamResponse:
        exchange.response.headers.update(headers(n))
        return await exchange.complete()

    return play


def _limits(reset_requests: str = "", **others: str) -> Numbered:
    """Send these x-ratelimit headers; their names have `_` for `-`.

    Without *reset_requests* the fault's number is the time until their reset in ms.
    """

    def headers(n: int) -> dict[str, str]:
        limits = {"reset_requests": reset_requests or _duration(n), **others}
        return {f"x-ratelimit-{name.replace('_', '-')}": text for name, text in limits.items()}

    return _with_headers(headers)


def _duration(milliseconds: int) -> str:
    """Write a duration as OpenAI does: 17ms, 1s, 6m0s."""
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, seconds = divmod(milliseconds // 1000, 60)
    return f"{minutes}m{seconds}s" if minutes else f"{seconds}s"


def _usage(name: str = "") -> Numbered:
    """Move the usage to *name* in the last event, or the whole JSON; "": there is none."""

    async def play(exchange: Exchange, _n: int) -> web.StreamResponse:
        usage = {"prompt_tokens": 2, "completion_tokens": exchange.answer.count}
        usage["total_tokens"] = sum(usage.values())
        more = {name: {"id": "req_1", "usage": usage}} if name else {}
        exchange.answer = _without_usage(exchange.answer, more)
        return await exchange.complete()

    return play


def _without_usage(answer: Answer, more: Mapping[str, Any]) -> Answer:
    """Return *answer* without its usage, but with the members *more* at its end."""

    def changed(data: bytes) -> bytes:
        members = {name: part for name, part in orjson.loads(data).items() if name != "usage"}
        return orjson.dumps({**members, **more})

    if not answer.streamed:
        return dataclasses.replace(answer, whole=changed(answer.whole))
    # An event without choices has only the usage.
    closing = [data for data in answer.closing if b'"choices":[]' not in data]
    head, mark, last = closing[-1].partition(b"data: ")
    closing[-1] = head + mark + changed(last) + b"\n\n"
    return dataclasses.replace(answer, closing=closing)


async def _bom(exchange: Exchange, _n: int) -> web.StreamResponse:
    await exchange.head()
    await exchange.write(b"\xef\xbb\xbf")
    return await _rest(exchange)


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
        await _comments(exchange, n)
    return await exchange.complete()


FAULTS: Mapping[str, Numbered] = {
    "status": _instead(refusal),
    "quota": _refused(
        429,
        "You exceeded your current quota, please check your plan and billing details.",
        "insufficient_quota",
    ),
    "credits": _refused(402, "Insufficient credits.", 402),
    "retry-after": _later("Retry-After", int),
    "retry-after-ms": _later("retry-after-ms", lambda _n: 700),
    "retry-after-date": _later("Retry-After", lambda _n: formatdate(time.time() + 2, usegmt=True)),
    "retry-after-absurd": _later("Retry-After", lambda _n: 31536000),
    "day-over": _refused(
        429,
        "Rate limit reached on requests per day (RPD): Limit 14400, Used 14400, Requested 1.",
        "rate_limit_exceeded",
        Retry_After="2",
        x_ratelimit_limit_requests="14400",
        x_ratelimit_remaining_requests="0",
        x_ratelimit_reset_requests="23h51m7.2s",
    ),
    "capacity": _refused(
        498, "The Flex tier is at capacity, please try again.", "capacity_exceeded"
    ),
    "too-long": _refused(
        400, "prompt is too long: 9000 tokens > 8192 maximum", "context_length_exceeded"
    ),
    "slow-down": _refused(503, "Slow down.", "slow_down", Retry_After="1"),
    "html": _instead(lambda _n: web.Response(text=_PAGE, content_type="text/html")),
    "type-html": _typed("text/html"),
    "type-text": _typed("text/plain"),
    "empty": _empty,
    "json-under-200-stream": _instead(
        lambda _n: as_json(200, error(500, "The model has crashed."))
    ),
    "redirect": _instead(lambda _n: web.Response(status=302, headers={"Location": "/elsewhere"})),
    "silent": lambda exchange, _n: exchange.stall(),
    "drop": lambda exchange, _n: exchange.raw(),
    "not-http": lambda exchange, _n: exchange.raw(b"220 mail.example ESMTP ready\r\n"),
    "flap": _flap,
    "head-only": _head_only,
    "stall": stall,
    "comments-stall": _comments_stall,
    "comments-endless": _comments_endless,
    "half-line": _within(_half, Exchange.stall),
    "cut": cut,
    "cut-mid": _cut_mid,
    "bad-chunk": _within(then=lambda exchange: exchange.raw(b"no size\r\n")),
    "end": _within(),
    "error-event": _within(_failed(500, "The server had an error processing your request.")),
    "error-chunk": _within(lambda exchange, _n: _openrouters(exchange, 502)),
    "verdict": _within(_failed(400, "The response was filtered due to the prompt.")),
    "error-first": _error_first,
    "bad-json": _within(b'data: {"id":"chatcmpl-\n\n', _rest),
    "bad-utf8": _within(_LINE + b'\xc3\x28\xff"}}]}\n\n', _rest),
    "no-done": _behind(done=False),
    "early-done": _within(lambda exchange, _n: exchange.answer.end),
    "after-done": _behind(lambda exchange, _n: exchange.answer.piece(0)),
    "open-done": _behind(then=Exchange.stall),
    "long-line": _within(_LINE, _long_line),
    "endless": _endless,
    "endless-line": _within(b"data: ", _endless_line),
    "wrong-length": _wrong_length,
    "slow": _slow,
    "thinking": _thinking,
    "crlf": _translated(lambda data: data.replace(b"\n", b"\r\n")),
    "cr": _translated(lambda data: data.replace(b"\n", b"\r")),
    "bom": _bom,
    "multi-data": _translated(_several_lines),
    "comments": _translated(lambda data: COMMENT + data),
    "slices": _slices,
    "cookie": _with_headers(lambda _n: {"Set-Cookie": "simulator=1; Path=/"}),
    "headers": _with_headers(lambda _n: {f"x-much-{number}": "x" * 1000 for number in range(100)}),
    "1xx": _early_hints,
    "gzip": _gzip,
    "http10": _http10,
    "close-idle": _close_idle,
    "close-next": _close_next,
    "limits-spent": _limits(limit_requests="500", remaining_requests="0"),
    "limits-day": _limits(
        limit_requests="14400",
        remaining_requests="14370",
        reset_requests="2m59.56s",
        limit_tokens="18000",
        remaining_tokens="17997",
        reset_tokens="7.66s",
    ),
    "limits-nonsense": _limits(
        limit_requests="-1",
        remaining_requests="-1",
        reset_requests="-1",
        remaining_tokens="nan",
        reset_tokens="soon",
    ),
    "no-usage": _usage(),
    "usage-x-groq": _usage("x_groq"),
}
