"""The frames of the WebSocket and SSE faces that go to clients; client_frames.py has those from them.

{"request_id":"6f0c","event_id":3,"status":"chunk","chunk":{"type":"text","data":"Hel","metadata":{}}}
"""

from __future__ import annotations

from typing import Any

import orjson


def frame_head(request_id: str | None) -> bytes:
    """Return the bytes with which every frame of one request begins; rendered once per stream."""
    return b'{"request_id":%b,' % orjson.dumps(request_id)


def frame(head: bytes, event_id: int, status: bytes, chunk: bytes) -> bytes:
    """Return an event of a stream as a frame; *chunk* is JSON."""
    return b'%b"event_id":%d,"status":"%b","chunk":%b}' % (head, event_id, status, chunk)


def text_frame(head: bytes, event_id: int, text: bytes) -> bytes:
    """Return the frame of a `chunk` event with a text.

    *text* is what follows the opening quote of a JSON string, its closing quote included.
    """
    return (
        b'%b"event_id":%d,"status":"chunk",'
        b'"chunk":{"type":"text","data":"%b,"metadata":{}}}' % (head, event_id, text)
    )


def loose_frame(request_id: str | None, status: str, chunk: dict[str, Any]) -> bytes:
    """Return a frame that is no event of a stream: `queued`, `pong`, or an error of the socket."""
    return orjson.dumps({"request_id": request_id, "status": status, "chunk": chunk})
