"""The meaning of an HTTP status, a close code or a failed connection for a question."""

from __future__ import annotations

import os
import ssl
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson

from aioserver.client.errors import Fault

if TYPE_CHECKING:
    from collections.abc import Mapping

# Bytes of an error's body that are read.
MAX_ERROR_BYTES = 1 << 16
# Characters of a server's message that are kept.
MAX_MESSAGE = 1000
# The usual codes of statuses whose body has none, or is out of reach: that of a refused WebSocket handshake.
CODES = {
    401: "invalid_api_key",
    403: "permission_denied",
    404: "not_found",
    426: "upgrade_required",
    429: "concurrency_exceeded",
    503: "server_at_capacity",
}
RETRYABLE = frozenset({408, 429, 503})
# A proxy in front says these while the server behind it restarts.
GATEWAY_FAULTS = frozenset({502, 504})


def refusal(status: int, headers: Mapping[str, str], body: bytes) -> tuple[Fault, bool]:
    """Return the fault in an HTTP answer, and whether it is final.

    *headers* are looked up by their names in lower case.
    """
    code, message = error_object(body)
    retry_after = _seconds(headers.get("retry-after-ms"), 1000)
    if retry_after is None:
        retry_after = _seconds(headers.get("retry-after"), 1)
    if status in GATEWAY_FAULTS and not code:
        fault = Fault("connect_error", f"HTTP status {status} of a proxy", True, retry_after)
        return fault, False
    retryable = status in RETRYABLE and headers.get("x-should-retry") != "false"
    if not code:
        code = CODES.get(status, "protocol_error")
        message = message or f"HTTP status {status}"
    return Fault(code, message, retryable, retry_after), not retryable


def closed_fault(close_code: int | None) -> Fault:
    """Return the fault of a connection that has ended too early; *close_code*: the server's, if it sent one."""
    suffix = "" if close_code in {None, 1006} else f", with close code {close_code}"
    return Fault("connect_error", f"the connection to the server was closed{suffix}", True)


def unreachable_fault(url: str, error: BaseException) -> Fault:
    """Return the fault of a connection to *url* that could not be opened, or has broken by *error*."""
    return Fault("connect_error", f"{url} cannot be reached: {describe(error)}", True)


def describe(error: BaseException) -> str:
    """Return in a few words why a server was not reached; aiohttp's own texts are long."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, aiohttp.ClientConnectorError):
        inner = error.os_error
        # A host name that was not found has no positive number, and neither has a certificate.
        if not isinstance(inner, ssl.SSLError) and inner.errno and inner.errno > 0:
            return os.strerror(inner.errno)
        return str(inner.strerror or inner)
    return str(error) or type(error).__name__


def error_object(body: bytes) -> tuple[str, str]:
    """Return code and message of the error in *body*, an object like OpenAI's; empty, if there is none."""
    try:
        answer: Any = orjson.loads(body)
    except orjson.JSONDecodeError:
        return "", ""
    error = answer.get("error") if isinstance(answer, dict) else None
    if not isinstance(error, dict):
        return "", ""
    return str(error.get("code") or ""), str(error.get("message") or "")[:MAX_MESSAGE]


def _seconds(text: str | None, per_second: int) -> float | None:
    if text is None or not text.isascii() or not text.isdigit() or len(text) > 9:
        return None
    return int(text) / per_second
