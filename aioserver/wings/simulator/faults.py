r"""The faults of the simulator: the table that `aioserver provider --list-faults` prints.

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

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from aiohttp import web

from aioserver.wings.simulator.broken import BROKEN
from aioserver.wings.simulator.model import BadRequest
from aioserver.wings.simulator.refusals import REFUSALS
from aioserver.wings.simulator.unusual import UNUSUAL

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from aioserver.wings.simulator.exchange import Exchange, Fault

    Play = Callable[[Exchange], Awaitable[web.StreamResponse]]

PREFIX = "fault-"
# The number of a fault that is named without one.
_DEFAULT_NUMBER = 3
_DEFAULT_NUMBERS = {"status": 500, "error-first": 502, "limits-spent": 17}


def find(model: str) -> Play | None:
    """Return the fault that *model* names; None: it names none.

    Raises:
        BadRequest: the name begins like a fault's, and there is no such fault.
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


def _refused(refuse: Callable[[int], web.Response]) -> Fault:
    async def play(_: Exchange, n: int) -> web.StreamResponse:
        return refuse(n)

    return play


async def _empty(exchange: Exchange, _n: int) -> web.StreamResponse:
    return web.Response(content_type=exchange.response.content_type)


async def _silent(exchange: Exchange, _n: int) -> web.StreamResponse:
    return await exchange.stall()


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
