"""Faults before the answer: refusals, and responses of another kind; none needs a stream."""

from __future__ import annotations

import time
from email.utils import formatdate
from typing import TYPE_CHECKING

import orjson
from aiohttp import web

from aioserver.wings.simulator.model import error

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_MESSAGES = {
    401: "Incorrect API key provided.",
    404: "The model does not exist or you do not have access to it.",
    429: "Rate limit reached.",
    503: "The engine is currently overloaded, please try again later.",
}
_CODES = {401: "invalid_api_key", 404: "model_not_found", 429: "rate_limit_exceeded"}


def refusal(status: int, headers: Mapping[str, str] | None = None) -> web.Response:
    """Make a response with OpenAI's error body."""
    defaults = {"Retry-After": "1"} if status in {429, 503} else {}
    message = _MESSAGES.get(status, f"The simulator says {status}.")
    body = error(status, message, code=_CODES.get(status))
    return as_json(status, body, {**defaults, **(headers or {})})


def as_json(status: int, body: bytes, headers: Mapping[str, str] | None = None) -> web.Response:
    """Make a response with a JSON body."""
    return web.Response(status=status, body=body, headers=headers, content_type="application/json")


def _quota(_n: int) -> web.Response:
    message = "You exceeded your current quota, please check your plan and billing details."
    return as_json(429, error(429, message, code="insufficient_quota"))


def _retry_after_date(_n: int) -> web.Response:
    return refusal(429, {"Retry-After": formatdate(time.time() + 2, usegmt=True)})


def _refused(status: int, message: str, code: object, **headers: str) -> web.Response:
    """Make an error with any *code*; *headers* have `_` for `-`."""
    fault = orjson.loads(error(status, message))
    fault["error"]["code"] = code
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    return as_json(status, orjson.dumps(fault), fields)


def _day_over(_n: int) -> web.Response:
    return _refused(
        429,
        "Rate limit reached on requests per day (RPD): Limit 14400, Used 14400, Requested 1.",
        "rate_limit_exceeded",
        Retry_After="2",
        x_ratelimit_limit_requests="14400",
        x_ratelimit_remaining_requests="0",
        x_ratelimit_reset_requests="23h51m7.2s",
    )


def _typed(content_type: str) -> Callable[[int], web.Response]:
    """Answer with the bytes of a good stream under another content type."""
    chunk = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    choice = {"index": 0, "delta": {"content": "Hello"}, "finish_reason": "stop"}
    body = b"data: %b\n\ndata: [DONE]\n\n" % orjson.dumps({**chunk, "choices": [choice]})
    return lambda _n: web.Response(body=body, content_type=content_type)


def _html(_n: int) -> web.Response:
    page = "<!doctype html><title>Bad gateway</title><h1>Something in between answers</h1>"
    return web.Response(text=page, content_type="text/html")


REFUSALS: Mapping[str, Callable[[int], web.Response]] = {
    "status": refusal,
    "quota": _quota,
    "retry-after": lambda n: refusal(429, {"Retry-After": str(n)}),
    "retry-after-ms": lambda _n: refusal(429, {"retry-after-ms": "700"}),
    "retry-after-date": _retry_after_date,
    "retry-after-absurd": lambda _n: refusal(429, {"Retry-After": "31536000"}),
    "day-over": _day_over,
    "capacity": lambda _n: _refused(
        498, "The Flex tier is at capacity, please try again.", "capacity_exceeded"
    ),
    "too-long": lambda _n: _refused(
        400, "prompt is too long: 9000 tokens > 8192 maximum", "context_length_exceeded"
    ),
    "credits": lambda _n: _refused(402, "Insufficient credits.", 402),
    "slow-down": lambda _n: _refused(503, "Slow down.", "slow_down", Retry_After="1"),
    "html": _html,
    "type-html": _typed("text/html"),
    "type-text": _typed("text/plain"),
    "json-under-200-stream": lambda _n: as_json(200, error(500, "The model has crashed.")),
    "redirect": lambda _n: web.Response(status=302, headers={"Location": "/elsewhere"}),
}
