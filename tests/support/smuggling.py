"""Requests that two parsers might read differently, and what must come of them.

Each has a second request within or behind it. Whoever takes a part of the first request for the
second, or the second for a part of the first, lets a client smuggle a request past the proxy that
has checked it.
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any

from tests.support.server import UVICORN

if TYPE_CHECKING:
    import pytest

SECRET = b"S3CR3T"
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
# Ends the connection.
LAST = b"GET /last HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
GET = b"GET /health HTTP/1.1\r\nHost: x\r\n"
POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
POST_10 = POST.replace(b"HTTP/1.1", b"HTTP/1.0")
LENGTH = b"Content-Length: %d\r\n" % len(SMUGGLED)
UPGRADE = (
    b"Host: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
# A server that logs each request.
LOGGED = {f"{UVICORN}.access_log": True, "logging.level": "INFO"}

# aioserver answers each once, with 400, and closes.
INVALID = [
    POST + b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    POST + b"Transfer-Encoding: chunked\r\nContent-Length: 6\r\n\r\n0\r\n\r\n" + SMUGGLED,
    POST + b"Content-Length: 0\r\nContent-Length: 38\r\n\r\n" + SMUGGLED,
    POST + b"Content-Length: +5\r\n\r\nhello" + SMUGGLED,
    POST + b"Content-Length: 0x5\r\n\r\nhello" + SMUGGLED,
    POST + b"Content-Length: -1\r\n\r\n" + SMUGGLED,
    POST + b"Content-Length: 1_0\r\n\r\n" + SMUGGLED,
    POST + b"Content-Length: 5 5\r\n\r\n" + SMUGGLED,
    POST + b"Content-Length : 5\r\n\r\nhello" + SMUGGLED,
    POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n" + SMUGGLED,
    POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    POST + b"Transfer-Encoding: chunked\r\n\r\n+0\r\n\r\n" + SMUGGLED,
    POST + b"Transfer-Encoding: chunked\r\n\r\n0x0\r\n\r\n" + SMUGGLED,
    POST + b"Transfer-Encoding: chunked\r\n\r\n5\nhello\r\n0\r\n\r\n" + SMUGGLED,
    POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\nhello\r\n0\r\n\r\n" + SMUGGLED,
    GET + b"X: " + SECRET + b"\r\n folded\r\n\r\n" + SMUGGLED,
    GET + b"X: " + SECRET + b"\0\r\n\r\n" + SMUGGLED,
    GET + b"X\0: " + SECRET + b"\r\n\r\n" + SMUGGLED,
    GET + b"X: " + SECRET + b"\rY: z\r\n\r\n" + SMUGGLED,
    GET + b": " + SECRET + b"\r\n\r\n" + SMUGGLED,
    GET + SECRET + b"\r\n\r\n" + SMUGGLED,
    b"GET /health HTTP/1.1\nHost: x\n\n" + SMUGGLED,
    b"GET /health HTTP/1.1\r\nHost: x\nX: " + SECRET + b"\r\n\r\n" + SMUGGLED,
    b"GET /health HTTP/1.1\r\nHost: x\r\nHost: " + SECRET + b"\r\n\r\n" + SMUGGLED,
    b"GET /" + SECRET + b" HTTP/3.7\r\nHost: x\r\n\r\n" + SMUGGLED,
    b"GET /" + SECRET + b" x HTTP/1.1\r\nHost: x\r\n\r\n" + SMUGGLED,
    b"GET /" + SECRET + b"\r\n\r\n" + SMUGGLED,
    b"GET http://[" + SECRET + b" HTTP/1.1\r\nHost: x\r\n\r\n" + SMUGGLED,
    b"G\0T /" + SECRET + b" HTTP/1.1\r\nHost: x\r\n\r\n" + SMUGGLED,
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc" + SECRET + b"\r\n\r\n",
    b"\r\n\r\n" * 3 + SECRET + b"\r\n\r\n",
    POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    POST
    + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n"
    + SMUGGLED,
    POST
    + b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    + SMUGGLED,
    POST + b"Transfer-Encoding: gzip\r\n" + CHUNKED + SMUGGLED,
    POST + b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    POST + b"Transfer-Encoding: chunked\r\n\r\n0;\n\r\n\r\n" + SMUGGLED,
    POST + b"Transfer-Encoding: chunked\r\n\r\n5;a\nb\r\nhello\r\n0\r\n\r\n" + SMUGGLED,
    POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}x\n0\r\n\r\n" + SMUGGLED,
    POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\nContent-Length: 40\r\n\r\n" + SMUGGLED,
    POST + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff1\r\nx\r\n0\r\n\r\n" + SMUGGLED,
    POST + b"Content-Length: 38, 38\r\n\r\n" + SMUGGLED,
    POST + b"Content-Length: 99999999999999999999\r\n\r\n" + SMUGGLED,
    POST_10 + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
]

# Valid, and whether the second request is one of its own.
VALID: list[tuple[bytes, bool]] = [
    (b"GET /ws/chat HTTP/1.1\r\n" + UPGRADE + LENGTH + b"\r\n" + SMUGGLED, False),
    (b"GET /ws/chat HTTP/1.1\r\n" + UPGRADE + CHUNKED + SMUGGLED, False),
    (
        b"GET /ws/chat HTTP/1.1\r\n"
        + UPGRADE.replace(b" 13", b" 12")
        + LENGTH
        + b"\r\n"
        + SMUGGLED,
        False,
    ),
    (b"GET /ws/chat HTTP/1.1\r\n" + UPGRADE.replace(b" 13", b" 12") + b"\r\n" + SMUGGLED, True),
    (b"GET /v1/responses HTTP/1.1\r\n" + UPGRADE + LENGTH + b"\r\n" + SMUGGLED, False),
    (b"GET /v1/responses HTTP/1.1\r\n" + UPGRADE + b"\r\n" + SMUGGLED, True),
    (b"GET /health HTTP/1.1\r\n" + UPGRADE + LENGTH + b"\r\n" + SMUGGLED, False),
    (b"POST /ws/chat HTTP/1.1\r\n" + UPGRADE + LENGTH + b"\r\n" + SMUGGLED, False),
    (GET + LENGTH + b"\r\n" + SMUGGLED, False),
    (GET + b"Expect: 100-continue\r\n" + LENGTH + b"\r\n" + SMUGGLED, False),
    (POST + LENGTH + b"\r\n" + SMUGGLED, False),
    (POST + b"Connection: content-length\r\n" + LENGTH + b"\r\n" + SMUGGLED, False),
    (POST + b"Connection: transfer-encoding\r\n" + CHUNKED + SMUGGLED, True),
    (POST + CHUNKED.replace(b": c", b":\tc") + SMUGGLED, True),
    (POST + CHUNKED.replace(b"chunked", b"CHUNKED") + SMUGGLED, True),
    (POST + CHUNKED.replace(b"chunked", b"gzip, chunked") + SMUGGLED, False),
    (POST + b"Content_Length: 38\r\n\r\n" + SMUGGLED, True),
]


def accesses(caplog: pytest.LogCaptureFixture) -> list[Any]:
    """The lines of the access log, but for those of a proxy's health check."""
    lines: list[Any] = [record for record in caplog.records if record.getMessage() == "access"]
    return [
        record
        for record in lines
        if record.levelno == logging.INFO and record.fields["path"] != "/ready"
    ]


def answers_with_ids(data: bytes) -> int:
    """The number of aioserver's answers in *data*; an upgrade is no answer, it is logged at its
    end.
    """
    return len(re.findall(rb"^x-request-id: ", data, re.MULTILINE)) - data.count(b"HTTP/1.1 101 ")
