r"""Every way in which the simulator can fail, each asked for by a model's name.

`<n>` may be left out (3). What counts tokens counts slices of the JSON where the answer is not
streamed. "stalls": nothing more comes, and the connection stays open.

Before the answer

    fault-status-<code>         any status, with OpenAI's error body; 429 and 503: Retry-After 1
    fault-quota                 429 with the code insufficient_quota
    fault-credits               OpenRouter's 402: the code is a number
    fault-retry-after-<n>       429, Retry-After n seconds
    fault-retry-after-ms        429, retry-after-ms 700 beside Retry-After 1
    fault-retry-after-date      429, Retry-After as a date, some 2 s from now
    fault-retry-after-absurd    429, Retry-After 31536000
    fault-day-over              Groq's 429: the requests of a day are used up, Retry-After 2
    fault-capacity              Groq's 498, capacity_exceeded
    fault-slow-down             OpenAI's 503, slow_down
    fault-html                  200 with an HTML page
    fault-type-html             a good stream that is called text/html
    fault-type-text             a good stream that is called text/plain
    fault-empty                 200 with nothing
    fault-json-under-200-stream 200 with a JSON error, also where a stream was asked for
    fault-redirect              302 to /elsewhere
    fault-silent                stalls before the head
    fault-drop                  closes the connection in place of a head
    fault-not-http              bytes that are no HTTP
    fault-flap-<n>              502 n times, then n good answers, then 502 again

In the answer

    fault-head-only             stalls after the head
    fault-stall-<n>             stalls after n tokens
    fault-comments-stall-<n>    stalls after n comments, before the first token
    fault-comments-endless      comments for ever and no token
    fault-half-line-<n>         stalls in the middle of the line after n tokens
    fault-cut-<n>               TCP reset after n tokens
    fault-cut-mid-<n>           the same in the middle of the next chunk
    fault-bad-chunk-<n>         a chunk without a size after n tokens
    fault-end-<n>               clean end of the body after n tokens: no finish_reason, no [DONE]
    fault-error-event-<n>       an error object as an event, then the end
    fault-error-chunk-<n>       OpenRouter's: a chunk with `error` and finish_reason "error"
    fault-error-first-<code>    the same in place of the first token, with that code (502)
    fault-bad-json-<n>          an event that is no JSON after n tokens, then the rest
    fault-bad-utf8-<n>          an event that is no UTF-8 after n tokens, then the rest
    fault-no-done               finish_reason but no [DONE]
    fault-early-done-<n>        llama.cpp's: [DONE] after n tokens
    fault-after-done            an event after [DONE]
    fault-open-done             [DONE], but the body never ends
    fault-long-line             a line of 10 MB in the middle
    fault-endless               tokens for ever, as fast as they are taken
    fault-endless-line          a line for ever
    fault-wrong-length          Content-Length beyond the body, then the connection closes

Unusual, but good

    fault-slow-<ms>             a token each ms
    fault-thinking-<n>          n comments before the first token
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
    fault-limits-spent-<ms>     x-ratelimit-remaining-requests 0, reset in so many ms (17ms, 6m0s)
    fault-limits-day            Groq's headers: requests of a day, tokens of a minute
    fault-limits-nonsense       the same headers with -1, nan, soon
    fault-no-usage              says nothing of its usage, also where it was asked to
    fault-usage-x-groq          says it in x_groq
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from aiohttp import web

from aioserver.providers.simulator.broken import BROKEN, cut, stall
from aioserver.providers.simulator.model import BadRequest
from aioserver.providers.simulator.refusals import REFUSALS
from aioserver.providers.simulator.unusual import UNUSUAL

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from aioserver.providers.simulator.exchange import Exchange, Fault

    Play = Callable[[Exchange], Awaitable[web.StreamResponse]]

__all__ = ["FAULTS", "PREFIX", "cut", "find", "stall"]

PREFIX = "fault-"
_N = 3
_NUMBERS = {"status": 500, "error-first": 502, "limits-spent": 17}  # where it is left out


def find(model: str) -> Play | None:
    """The fault that *model* names, None: it names none. Raises BadRequest: an unknown fault."""
    if not model.startswith(PREFIX):
        return None
    name = model.removeprefix(PREFIX)
    number = _NUMBERS.get(name, _N)
    if name not in FAULTS and (match := re.fullmatch(r"(.+)-([0-9]{1,6})", name)):
        name, number = match[1], int(match[2])
    if name not in FAULTS or (name == "status" and not 200 <= number <= 599):
        message = f"The model '{model}' does not exist"
        raise BadRequest(message, param="model", code="model_not_found", status=404)
    fault = FAULTS[name]
    return lambda exchange: fault(exchange, number)


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


FAULTS: Mapping[str, Fault] = {
    **{name: _refused(refuse) for name, refuse in REFUSALS.items()},
    "empty": _empty,
    "silent": _silent,
    "drop": _drop,
    "not-http": _not_http,
    **BROKEN,
    **UNUSUAL,
}
